"""Configuration of Taylor pruning."""

from __future__ import annotations

import dataclasses
from typing import Literal

from methods import sensitivity
from methods.iterative import IterativeConfig


@dataclasses.dataclass(frozen=True)
class TaylorConfig(IterativeConfig):
    """Taylor pruning in the loop of the NRSLoss paper (section III.D, "TP"); for the rest see `IterativeConfig`.

    Args:
        images: images that the first-order change of the loss is averaged over.
        objective: loss it is of: "training" (adversarial or certified as the state was) or "natural".
    """

    images: int = 128
    objective: Literal["training", "natural"] = "training"

    def __post_init__(self) -> None:
        super().__post_init__()
        sensitivity.check(self.images, self.objective)
