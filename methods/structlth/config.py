"""Configuration of structured lottery tickets."""

from __future__ import annotations

import dataclasses
from typing import Literal

from methods.iterative import IterativeConfig


@dataclasses.dataclass(frozen=True)
class StructLTHConfig(IterativeConfig):
    """IMP with refilling, in the loop of the NRSLoss paper: 11 prunings of 11 % of the channels that are left.

    Args:
        weights: fraction of the remaining weights that the inner magnitude pruning removes before channels are ranked.
        rank: what ranks a channel among the survivors of that: their "total" magnitude (the NRSLoss paper), their
            "mean" over the channel's weights (its released code), both over all layers at once, or their "count", a
            layer at a time (Chen et al. 2022).
    """

    ratio: float = 1.0 - 0.89**11
    rounds: int = 11
    structured: bool = True
    weights: float = 0.2
    rank: Literal["total", "mean", "count"] = "total"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.structured:
            raise ValueError("structured lottery tickets remove channels: structured must be True")
        if not 0.0 <= self.weights < 1.0:
            raise ValueError(f"weights is the fraction removed inside and must lie in [0, 1), got {self.weights}")
        if self.rank not in ("total", "mean", "count"):
            raise ValueError(f"rank must be 'total', 'mean' or 'count', got {self.rank!r}")
