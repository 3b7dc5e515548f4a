"""Configuration of random pruning."""

from __future__ import annotations

import dataclasses

from methods.base import PruningConfig


@dataclasses.dataclass(frozen=True)
class RandomConfig(PruningConfig):
    """Train, remove a random `ratio`, fine-tune: the protocol of `MagnitudeConfig` with the choice left to chance.

    The random row of the USN paper (section IV: random channels at the same ratio) is ``structured=True``; that of the
    NRSLoss paper (section 4.1: global over convolutions) is ``scope="global", layers=("conv",)``.
    """
