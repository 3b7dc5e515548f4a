"""Configuration of one-shot magnitude pruning."""

from __future__ import annotations

import dataclasses
from typing import Literal

from methods.base import PruningConfig
from methods.training.config import TrainingConfig


@dataclasses.dataclass(frozen=True)
class MagnitudeConfig(PruningConfig):
    """Least-weight-magnitude pruning (LMP).

    Defaults: Han et al. 2015 (section 3: train, prune, retrain at a tenth of the rate), per layer and with the
    50 + 50 epochs at rates .01 and .001 that the CAR paper gives its LMP baseline (section V.A).

    Args:
        norm: structured only: rank channels by the L1 norm (Li et al. 2017, section 3.1) or the L2 norm of their
            weights, divided by the number of weights.
    """

    training: TrainingConfig = dataclasses.field(
        default_factory=lambda: TrainingConfig(optimizer="sgd", lr=0.01, momentum=0.9)
    )
    norm: Literal["l1", "l2"] = "l1"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.norm not in ("l1", "l2"):
            raise ValueError(f"norm must be 'l1' or 'l2', got {self.norm!r}")
