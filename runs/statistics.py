"""The few statistics that the leaderboard uses: exact intervals and exact paired tests.

scipy is imported inside the functions, so that the command line answers without it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Interval:
    """A two-sided confidence interval for a probability."""

    low: float
    high: float

    @property
    def width(self) -> float:
        return self.high - self.low


def clopper_pearson(successes: float, trials: int, confidence: float = 0.95) -> Interval:
    """Exact two-sided interval for a binomial probability (Clopper and Pearson 1934).

    ``successes`` may be fractional (a mean count over seeds): the beta quantiles are continuous in it. Equal to
    ``scipy.stats.binomtest(k, n).proportion_ci(method="exact")`` at integers.

    Raises:
        ValueError: ``trials`` < 1, ``successes`` outside [0, trials], or confidence outside (0, 1).
    """
    from scipy.stats import beta

    if trials < 1 or not 0 <= successes <= trials:
        raise ValueError(f"need trials >= 1 and 0 <= successes <= trials, got {successes} of {trials}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie in (0, 1), got {confidence}")
    tail = (1 - confidence) / 2
    low = 0.0 if successes == 0 else float(beta.ppf(tail, successes, trials - successes + 1))
    high = 1.0 if successes == trials else float(beta.ppf(1 - tail, successes + 1, trials - successes))
    return Interval(low, high)


@dataclass(frozen=True)
class MeanSd:
    """Mean and sample standard deviation (n - 1) over ``n`` seeds; ``sd`` is None for one seed."""

    mean: float
    sd: float | None
    n: int


def mean_sd(values: Sequence[float]) -> MeanSd:
    """Mean and sample standard deviation. Raises ValueError on an empty sequence."""
    n = len(values)
    if n == 0:
        raise ValueError("mean_sd needs at least one value")
    mean = math.fsum(values) / n
    sd = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1)) if n > 1 else None
    return MeanSd(mean, sd, n)


@dataclass(frozen=True)
class Paired:
    """An exact paired test: pairs won, lost, tied, and the two-sided p-value."""

    wins: int
    losses: int
    ties: int
    p: float


def sign_test(differences: Sequence[float]) -> Paired:
    """Exact two-sided sign test of "no difference" on paired differences; ties are set aside.

    With differences of two binary verdicts this is McNemar's exact test.
    """
    from scipy.stats import binomtest

    wins = sum(d > 0 for d in differences)
    losses = sum(d < 0 for d in differences)
    p = float(binomtest(wins, wins + losses, 0.5).pvalue) if wins + losses else 1.0
    return Paired(wins, losses, len(differences) - wins - losses, p)


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> Paired:
    """McNemar's exact test between two sets of verdicts on the same images.

    Raises:
        ValueError: the two have different lengths.
    """
    if len(first) != len(second):
        raise ValueError(f"McNemar's test pairs verdicts on the same images, got {len(first)} and {len(second)}")
    return sign_test([int(a) - int(b) for a, b in zip(first, second)])


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment of several p-values, in the order given (Holm 1979)."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted = [0.0] * len(p_values)
    running = 0.0
    for rank, i in enumerate(order):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = running
    return adjusted
