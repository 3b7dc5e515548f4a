"""HYDRA: learn pruning scores against the robust loss itself."""

from __future__ import annotations

import dataclasses

from methods.hydra.config import HYDRAConfig
from methods.hydra.search import search
from methods.iterative import Iterative, Trained
from methods.masks import Mask
from methods.training.history import History


@dataclasses.dataclass(frozen=True)
class HYDRA(Iterative[HYDRAConfig]):
    """HYDRA (Sehwag et al. 2020, "HYDRA: Pruning Adversarially Robust Neural Networks").

    Each pruning trains scores for ``search.epochs`` epochs on the state's own objective, without its ramps.
    """

    config: HYDRAConfig = dataclasses.field(default_factory=HYDRAConfig)

    def prune(self, trained: Trained) -> tuple[Mask, History]:
        return search(trained, self.config.search)
