"""A model as graphs in both floating-point precisions."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from certify.bounds import Graph, trace


class Precisions:
    """The model's graph as given and, made when first needed, in float64."""

    def __init__(self, model: nn.Module, x: Tensor) -> None:
        self.model, self._example = model, x[:2]
        self.given = trace(model, self._example)[0].folded()
        self._double = None if x.dtype != torch.float64 else self.given

    @property
    def double(self) -> Graph:
        """The graph in float64."""
        if self._double is None:
            model = copy.deepcopy(self.model).double()
            self._double = trace(model, self._example.double())[0].folded()
        return self._double
