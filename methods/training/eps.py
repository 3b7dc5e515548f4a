"""Schedules of the perturbation radius: from nothing, while the network learns its task, to the target.

Both run in epochs (fractions allowed) and return the *fraction* of the target radius, in [0, 1].
"""

from __future__ import annotations

import dataclasses
from typing import Protocol


class Schedule(Protocol):
    """A ramp from 0 to 1; `start` and `end` are fractions of the whole training."""

    start: float
    end: float

    def __call__(self, fraction: float) -> float:
        """The fraction of the target radius when the part `fraction` (0 to 1) of the training is done."""
        ...


def _check(start: float, end: float) -> None:
    if not 0.0 <= start <= end <= 1.0:
        raise ValueError(f"a schedule needs 0 <= start <= end <= 1 (fractions of training), got {start} and {end}")


@dataclasses.dataclass(frozen=True)
class Linear:
    """0 until `start`, then straight up to 1 at `end` (Gowal et al. 2018, "On the effectiveness of IBP", section 3)."""

    start: float = 0.1
    end: float = 0.5

    def __post_init__(self) -> None:
        _check(self.start, self.end)

    def __call__(self, fraction: float) -> float:
        if fraction >= self.end:
            return 1.0
        return 0.0 if fraction <= self.start else (fraction - self.start) / (self.end - self.start)


@dataclasses.dataclass(frozen=True)
class Smoothed:
    """Power law up to `mid` of the ramp, then a straight line with the same slope at the join.

    The SmoothedScheduler of auto-LiRPA (Xu et al. 2020, appendix), used for CROWN-IBP and by NRSLoss: `mid` = 0.4,
    `beta` = 4. Differs in that it is continuous in time rather than rounded to whole steps.
    """

    start: float = 0.1
    end: float = 0.5
    mid: float = 0.4
    beta: float = 4.0

    def __post_init__(self) -> None:
        _check(self.start, self.end)
        if not 0.0 < self.mid < 1.0 or self.beta < 1.0:
            raise ValueError(f"expected 0 < mid < 1 and beta >= 1, got mid={self.mid}, beta={self.beta}")

    def __call__(self, fraction: float) -> float:
        if fraction >= self.end:
            return 1.0
        if fraction <= self.start:
            return 0.0
        t = (fraction - self.start) / (self.end - self.start)
        # Slope s of the line: value at mid is mid * s / beta, and the line reaches 1 at t = 1.
        slope = 1.0 / (1.0 - self.mid + self.mid / self.beta)
        if t < self.mid:
            return slope * self.mid / self.beta * (t / self.mid) ** self.beta
        return 1.0 - slope * (1.0 - t)
