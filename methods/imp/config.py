"""Configuration of iterative magnitude pruning."""

from __future__ import annotations

import dataclasses
from typing import Literal

from methods.iterative import IterativeConfig


@dataclasses.dataclass(frozen=True)
class IMPConfig(IterativeConfig):
    """Iterative magnitude pruning; fields and defaults of `IterativeConfig`, the loop of the NRSLoss paper.

    Args:
        norm: structured only: L1 or L2 norm of a channel's weights, divided by their number.
    """

    norm: Literal["l1", "l2"] = "l1"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.norm not in ("l1", "l2"):
            raise ValueError(f"norm must be 'l1' or 'l2', got {self.norm!r}")
