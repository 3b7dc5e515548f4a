"""SNIP: remove the connections whose masks matter least to the loss."""

from __future__ import annotations

import dataclasses

from methods.iterative import Iterative, Trained
from methods.masks import Mask
from methods.sensitivity import weight_times_gradient
from methods.snip.config import SNIPConfig
from methods.training.history import History


@dataclasses.dataclass(frozen=True)
class SNIP(Iterative[SNIPConfig]):
    """Connection sensitivity ``|dL/dm| = |w dL/dw|`` (Lee et al. 2019, "SNIP", Eq. 5; its normalisation keeps ranks).

    A channel's sensitivity is the mean over its weights.
    """

    config: SNIPConfig = dataclasses.field(default_factory=SNIPConfig)

    def prune(self, trained: Trained) -> tuple[Mask, History]:
        config = self.config
        found = weight_times_gradient(trained, images=config.images, objective=config.objective, at=config.at)
        scores = {name: value.abs() for name, value in found.items()}
        return trained.select(scores, config.scope, config.structured), History()
