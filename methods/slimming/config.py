"""Configuration of network slimming."""

from __future__ import annotations

import dataclasses

from methods.iterative import IterativeConfig


@dataclasses.dataclass(frozen=True)
class SlimmingConfig(IterativeConfig):
    """Network slimming in the iterative loop of the NRSLoss paper: 11 prunings of 11 % of the channels that are left.

    Args:
        l1: weight of the L1 norm of the batch normalisations' weights (1e-4, Liu et al. 2017 and Li et al. 2022).
        average: divide that norm by the number of weights, as the code released with the NRSLoss paper does: 416 times
            weaker on its network.
    """

    ratio: float = 1.0 - 0.89**11
    rounds: int = 11
    structured: bool = True
    l1: float = 1e-4
    average: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.structured:
            raise ValueError("network slimming removes channels: structured must be True")
        if not 0.0 <= self.l1 < float("inf"):
            raise ValueError(f"l1 must be a finite weight >= 0, got {self.l1}")
