"""The few statistics that the leaderboard uses: intervals, exact paired tests, and ranks with ties.

scipy is imported inside the functions, so that the command line answers without it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
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


def paired_interval(differences: Sequence[float], confidence: float = 0.95) -> Interval:
    """Interval for the mean of paired differences in [-1, 1], such as those of two verdicts on the same images.

    A normal interval after half a win, half a loss and a tie are added: for differences of two binary verdicts that of
    Agresti and Min 2005, "Simple improved confidence intervals for comparing matched proportions", without its
    recentring on the pairs given. It does not shrink to a point when no pair differs.

    Raises:
        ValueError: no differences, one outside [-1, 1], or confidence outside (0, 1).
    """
    from scipy.stats import norm

    if not differences or any(not -1 <= value <= 1 for value in differences):
        raise ValueError(f"paired differences are numbers in [-1, 1], at least one, got {list(differences)!r:.80}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie in (0, 1), got {confidence}")
    n = len(differences) + 2
    mean = math.fsum(differences) / n
    # The additions are two half observations at 1 and -1, and a whole one at 0.
    spread = (math.fsum(value**2 for value in differences) + 1) / n - mean**2
    half = float(norm.ppf((1 + confidence) / 2)) * math.sqrt(max(spread, 0.0) / n)
    return Interval(max(-1.0, mean - half), min(1.0, mean + half))


@dataclass(frozen=True)
class Rank:
    """The places that an entrant may have, from 1: ``first`` to ``last``."""

    first: int
    last: int

    def __str__(self) -> str:
        return f"{self.first}" if self.first == self.last else f"{self.first}–{self.last}"


def ranks(scores: Sequence[Sequence[float]], level: float = 0.05) -> list[Rank]:
    """Places of entrants that are scored on the same images, ties left as ties.

    All pairs are compared by a sign test over images, adjusted by Holm over the pairs. An entrant's first place is one
    behind those that beat it significantly, its last place one before those that it beats.

    Args:
        scores: one sequence an entrant, one number an image.
        level: of all comparisons together.

    Raises:
        ValueError: entrants are scored on different numbers of images.
    """
    if len({len(own) for own in scores}) > 1:
        raise ValueError(f"entrants must be scored on the same images, got {sorted({len(own) for own in scores})}")
    pairs = [(i, j) for i in range(len(scores)) for j in range(i)]
    tests: Mapping[tuple[int, int], Paired] = {
        (i, j): sign_test([a - b for a, b in zip(scores[i], scores[j])]) for i, j in pairs
    }
    adjusted = dict(zip(pairs, holm([tests[pair].p for pair in pairs])))
    better, worse = [0] * len(scores), [0] * len(scores)
    for (i, j), p in adjusted.items():
        if p > level:
            continue
        winner, loser = (i, j) if tests[i, j].wins > tests[i, j].losses else (j, i)
        better[loser] += 1
        worse[winner] += 1
    return [Rank(1 + above, len(scores) - below) for above, below in zip(better, worse)]
