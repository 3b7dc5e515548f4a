"""Taylor pruning: remove what changes the loss least to first order."""

from __future__ import annotations

import dataclasses

from methods.iterative import Iterative, Trained
from methods.masks import Mask
from methods.sensitivity import weight_times_gradient
from methods.taylor.config import TaylorConfig
from methods.training.history import History


@dataclasses.dataclass(frozen=True)
class Taylor(Iterative[TaylorConfig]):
    """First-order change of the loss when a weight goes, ``|w dL/dw|`` (Molchanov et al. 2019, Eq. 7).

    When a channel goes its weights go together: the score of a channel is ``|sum w dL/dw|`` (ibid., Eq. 8, unsquared),
    divided by their number.
    """

    config: TaylorConfig = dataclasses.field(default_factory=TaylorConfig)

    def prune(self, trained: Trained) -> tuple[Mask, History]:
        config = self.config
        found = weight_times_gradient(trained, images=config.images, objective=config.objective, drawn=1)
        if config.structured:
            found = {n: v.flatten(1).mean(1).reshape(-1, *[1] * (v.ndim - 1)).expand_as(v) for n, v in found.items()}
        scores = {name: value.abs() for name, value in found.items()}
        return trained.select(scores, config.scope, config.structured), History()
