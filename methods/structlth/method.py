"""Structured lottery tickets: unstructured pruning tells which channels matter, and those are refilled."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from methods.base import magnitude
from methods.iterative import Iterative, Trained
from methods.masks import Mask, Scope
from methods.structlth.config import StructLTHConfig
from methods.training.history import History


@dataclasses.dataclass(frozen=True)
class StructLTH(Iterative[StructLTHConfig]):
    """IMP-Refill (Chen et al. 2022, "Coarsening the Granularity: Towards Structurally Sparse Lottery Tickets").

    Each pruning removes the smallest `weights` of the weights in the remaining channels, ranks channels by what
    survives of them, keeps the best and gives those all of their weights back.
    """

    config: StructLTHConfig = dataclasses.field(default_factory=StructLTHConfig)

    def prune(self, trained: Trained) -> tuple[Mask, History]:
        survivors = self.survivors(trained)
        sizes = magnitude(trained.network, trained.names)
        scores: dict[str, Tensor] = {}
        for name, size in sizes.items():
            kept = survivors[name].to(size)
            per_channel = kept[0].numel()
            # Ranking takes the mean over a channel's weights.
            scores[name] = {"total": size * kept * per_channel, "mean": size * kept, "count": kept}[self.config.rank]
        scope: Scope = "layer" if self.config.rank == "count" else self.config.scope
        return trained.select(scores, scope, True), History()

    def survivors(self, trained: Trained) -> Mask:
        """The unstructured mask of the inner magnitude pruning, global over the weights of remaining channels."""
        sizes = magnitude(trained.network, trained.names)
        left = trained.mask.kept / trained.mask.total
        return Mask.from_scores(sizes, 1.0 - (1.0 - self.config.weights) * left, "global", within=trained.mask)
