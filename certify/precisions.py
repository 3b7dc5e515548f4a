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


def apart(given: Graph, double: Graph, C: Tensor, points: Tensor, precise: Tensor) -> Tensor:
    """How much float32 and float64 differ in the rows ``C y`` (N, rows, outputs), at some points of every image.

    Args:
        given: the graph in the images' precision.
        double: the same in float64.
        C: (N, rows, outputs).
        points: (M, N, ...) in the images' precision.
        precise: the same points in float64, not rounded.

    Returns:
        The largest ``sum_o |C_ro| |y_o - y'_o|`` over rows and points, (N,) float64. What float32 loses grows with the
        numbers inside the network, which may be large where its outputs are not; here that shows.
    """
    worst = torch.zeros(C.shape[0], dtype=torch.float64, device=C.device)
    for rough, exact in zip(points, precise, strict=True):
        difference = (given.forward(rough).double() - double.forward(exact)).abs()
        worst = torch.maximum(worst, (C.double().abs() @ difference.unsqueeze(2)).amax((1, 2)))
    return worst
