"""How the fraction removed rises during training (arXiv 2510.00083, Eq. 22)."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Progressive:
    """``rho(t) = rho / steps * floor((t - start) / interval)`` for epochs t from `start` to `end`; 0 before, rho after.

    The paper leaves the end open; here it is where the formula reaches rho, ``start + steps * interval``.

    Args:
        ratio: the final fraction removed.
        steps: number of pruning steps.
        start: last epoch at which nothing is removed yet; epochs count from 1, as in Algorithm 1.
        interval: epochs between two steps.
    """

    ratio: float
    steps: int
    start: int = 0
    interval: int = 1

    def __post_init__(self) -> None:
        if not 0.0 <= self.ratio < 1.0:
            raise ValueError(f"ratio is the fraction removed and must lie in [0, 1), got {self.ratio}")
        if self.steps < 1 or self.interval < 1 or self.start < 0:
            raise ValueError(
                f"a schedule needs steps >= 1, interval >= 1 and start >= 0, got {self.steps}, {self.interval}, "
                f"{self.start}"
            )

    @property
    def end(self) -> int:
        """The first epoch at the final ratio."""
        return self.start + self.steps * self.interval

    def fraction(self, t: int) -> float:
        """``rho(t) / rho``: the part of the way done at the end of epoch `t`, in [0, 1]."""
        return min(max(t - self.start, 0) // self.interval, self.steps) / self.steps

    def __call__(self, t: int) -> float:
        """The fraction removed at the end of epoch `t` (from 1)."""
        return self.ratio * self.fraction(t)

    def prunes(self, t: int) -> bool:
        """Whether epoch `t` is a pruning epoch: the fraction rises at its end."""
        return self.fraction(t) > self.fraction(t - 1)
