"""Iterative random pruning: the loop of `methods.imp` with the choice left to chance."""

from __future__ import annotations

import dataclasses

import torch

from methods.iterative import Iterative, IterativeConfig, Trained
from methods.masks import Mask
from methods.training.history import History


@dataclasses.dataclass(frozen=True)
class IterativeRandom(Iterative[IterativeConfig]):
    """The random row of the NRSLoss paper (section 4.1): nested random masks, survivors rewound."""

    config: IterativeConfig = dataclasses.field(default_factory=IterativeConfig)

    def prune(self, trained: Trained) -> tuple[Mask, History]:
        generator = torch.Generator().manual_seed(trained.seed)  # on the CPU: the same masks on every device
        scores = {name: torch.rand(trained.mask[name].shape, generator=generator) for name in trained.names}
        return trained.select(scores, self.config.scope, self.config.structured), History()
