"""Configuration of SNIP."""

from __future__ import annotations

import dataclasses
from typing import Literal

from methods import sensitivity
from methods.iterative import IterativeConfig


@dataclasses.dataclass(frozen=True)
class SNIPConfig(IterativeConfig):
    """SNIP in the loop of the NRSLoss paper (Li et al. 2022, section III.D); for the rest see `IterativeConfig`.

    The original, one pruning at initialisation (Lee et al. 2019), is ``rounds=1, at="init"``.

    Args:
        at: weights at which the sensitivity is taken: "trained", as the NRSLoss paper does, or "init", those that the
            survivors go back to.
        images: size of the batch it is taken on.
        objective: loss it is taken of: "training" (adversarial or certified as the state was) or "natural".
    """

    at: Literal["trained", "init"] = "trained"
    images: int = 128
    objective: Literal["training", "natural"] = "training"

    def __post_init__(self) -> None:
        super().__post_init__()
        sensitivity.check(self.images, self.objective, self.at)
