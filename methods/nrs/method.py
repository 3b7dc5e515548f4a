"""Pruning with a stability penalty: IMP+NRSLoss, IMP+RSLoss, HYDRA+NRSLoss, HYDRA+RSLoss."""

from __future__ import annotations

import dataclasses

from methods.base import magnitude
from methods.hydra.search import search
from methods.iterative import Iterative, Trained
from methods.masks import Mask
from methods.nrs.config import NRSConfig
from methods.training.history import History
from methods.training.objective import Objective
from methods.training.regularised import Regularised


@dataclasses.dataclass(frozen=True)
class NRS(Iterative[NRSConfig]):
    """Stability-based pruning (Li et al. 2022, "Can pruning improve certified robustness of neural networks?", III.D).

    Networks are trained with a penalty on unstable ReLUs, so that the magnitude of a trained weight (or HYDRA's score)
    tells what it does for stability as well as for the loss.
    """

    config: NRSConfig = dataclasses.field(default_factory=NRSConfig)

    def objective(self, objective: Objective) -> Objective:
        return Regularised(objective, (self.config.penalty,), eps=self.config.eps)

    def prune(self, trained: Trained) -> tuple[Mask, History]:
        if self.config.hydra is not None:
            return search(trained, self.config.hydra)
        scores = magnitude(trained.network, trained.names)
        return trained.select(scores, self.config.scope, self.config.structured), History()
