"""Iterative magnitude pruning with rewinding: train, prune a little, rewind the survivors, repeat."""

from __future__ import annotations

import dataclasses

from methods.base import magnitude
from methods.imp.config import IMPConfig
from methods.iterative import Iterative, IterativeOutcome, Trained
from methods.masks import Mask
from methods.training.history import History

IMPOutcome = IterativeOutcome


@dataclasses.dataclass(frozen=True)
class IMP(Iterative[IMPConfig]):
    """Iterative magnitude pruning (Frankle & Carbin 2019, "The Lottery Ticket Hypothesis", section 1)."""

    config: IMPConfig = dataclasses.field(default_factory=IMPConfig)

    def prune(self, trained: Trained) -> tuple[Mask, History]:
        scores = magnitude(trained.network, trained.names, self.config.norm)
        return trained.select(scores, self.config.scope, self.config.structured), History()
