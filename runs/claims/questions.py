"""How a claim is put to the records: which networks are compared, in what, and by which test.

Two kinds of evidence are kept apart. A verdict is a bit per test image, so two methods are compared image by image:
the difference of an image is the mean over all pairs of networks (seeds, perturbations, ratios) that share it, the
test is the sign test over images, the interval Student's over images. A number of a whole network (an error, a count of
unstable neurons) is compared seed by seed: the difference of a seed is the mean over its pairs, test and interval are
Student's over seeds. Neither counts the same image or the same seed twice.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from runs.claims.observation import Observation, Pick, Value
from runs.statistics import holm, mean_sd, sign_test

SEEDS = 3
"""Fewer seeds say nothing about a method, only about the networks at hand."""

METHODS = "images a method"

Pair = tuple[Observation, Observation]


@dataclass(frozen=True)
class Evidence:
    """A difference (positive: as the claim says), with its interval, the test's p-value, and what it rests on.

    ``units`` are images or seeds, by ``unit``; ``difference`` is a share (images) or in the number's own unit (seeds).
    With the unit :data:`METHODS` methods are counted, each over so many images: ``difference`` is their share less one
    half, and has no interval.
    """

    difference: float
    low: float
    high: float
    p: float
    units: int
    unit: str
    pairs: int
    seeds: int
    test: str
    detail: str = ""


class Question(Protocol):
    """Something that records can answer."""

    def ask(self, found: Sequence[Observation]) -> Evidence | None:
        """The evidence, or None where no record bears on it."""
        ...


def _matched(found: Sequence[Observation], first: Pick, second: Pick, *, ratio: bool) -> list[Pair]:
    """Pairs that share context and seed, and the ratio where asked for; where none does, those of the same budget."""

    def key(one: Observation, shared: str | None) -> Hashable:
        return (shared, one.seed, round(one.ratio, 3) if ratio else None)

    alike, equal = defaultdict(list), defaultdict(list)
    for one in found:
        if second(one):
            alike[key(one, one.context)].append(one)
            equal[key(one, one.budget)].append(one)
    pairs = []
    for one in found:
        if first(one):
            others = alike[key(one, one.context)] or (equal[key(one, one.budget)] if one.budget is not None else [])
            pairs += [(one, other) for other in others]
    return pairs


def _student(values: Sequence[float]) -> tuple[float, float, float]:
    """Two-sided 95 % interval and p-value of the mean of at least two values."""
    from scipy.stats import t

    summary = mean_sd(values)
    error = (summary.sd or 0.0) / math.sqrt(summary.n)
    if error == 0.0:
        return summary.mean, summary.mean, 1.0 if summary.mean == 0.0 else 0.0
    half = float(t.ppf(0.975, summary.n - 1)) * error
    p = 2 * float(t.sf(abs(summary.mean) / error, summary.n - 1))
    return summary.mean - half, summary.mean + half, p


def by_image(pairs: Sequence[Pair]) -> Evidence | None:
    """The first of each pair verifies more images: sign test over the distinct test images."""
    differences: dict[tuple[str, int], list[int]] = defaultdict(list)
    for one, other in pairs:
        for i, (a, b) in enumerate(zip(one.bits, other.bits, strict=True)):
            differences[one.images, i].append(int(a) - int(b))
    if len(differences) < 2:
        return None
    means = [math.fsum(values) / len(values) for values in differences.values()]
    low, high, _ = _student(means)
    tested = sign_test(means)
    return Evidence(
        mean_sd(means).mean,
        low,
        high,
        tested.p,
        len(means),
        "images",
        len(pairs),
        len({one.seed for one, _ in pairs}),
        f"sign test, {tested.wins} images for, {tested.losses} against, {tested.ties} tied",
    )


def by_seed(pairs: Iterable[tuple[int, float]]) -> Evidence | None:
    """A number that differs pair by pair, given with the pair's seed: Student's test over the seeds."""
    groups: dict[int, list[float]] = defaultdict(list)
    for seed, value in pairs:
        groups[seed].append(value)
    if not groups:
        return None
    means = [math.fsum(values) / len(values) for values in groups.values()]
    count = sum(map(len, groups.values()))
    if len(means) < 2:
        return Evidence(means[0], -math.inf, math.inf, 1.0, 1, "seeds", count, 1, "one seed, no test")
    low, high, p = _student(means)
    return Evidence(
        mean_sd(means).mean, low, high, p, len(means), "seeds", count, len(means), "paired t test over seeds"
    )


@dataclass(frozen=True)
class Verifies:
    """``first`` verifies more images than ``second`` in the same context (at the same ratio, unless told otherwise)."""

    first: Pick
    second: Pick
    same_ratio: bool = True

    def ask(self, found: Sequence[Observation]) -> Evidence | None:
        return by_image(_matched(found, self.first, self.second, ratio=self.same_ratio))


@dataclass(frozen=True)
class AgainstEach:
    """A claim to be the best of all: a question for every rival, and the answer of the one that comes off best.

    If the claim's side is ahead of all, its p-value is the largest of theirs (an intersection-union test, which needs
    no adjustment); if it is behind some, the smallest of these rivals', times how many rivals there are.
    """

    questions: tuple[Question, ...]
    names: tuple[str, ...]

    def ask(self, found: Sequence[Observation]) -> Evidence | None:
        asked = [(name, question.ask(found)) for name, question in zip(self.names, self.questions, strict=True)]
        answers = [(name, evidence) for name, evidence in asked if evidence is not None]
        if not answers:
            return None
        ahead = [(name, evidence) for name, evidence in answers if evidence.difference > 0]
        behind = [(name, evidence) for name, evidence in answers if evidence.difference <= 0]
        if behind:
            name, worst = min(behind, key=lambda answer: (answer[1].p, answer[1].difference))
            p = min(1.0, len(answers) * worst.p)
        else:
            name, worst = max(ahead, key=lambda answer: (answer[1].p, -answer[1].difference))
            p = worst.p
        seeds = min(evidence.seeds for _, evidence in answers)
        detail = f"against {name}, the best of {len(answers)} rivals" if len(answers) > 1 else f"against {name}"
        return replace(worst, p=p, seeds=seeds, detail="; ".join(filter(None, (detail, worst.detail))))


@dataclass(frozen=True)
class VerifiesSomewhere:
    """At one ratio at least, ``first`` verifies more images than ``second``: Holm over the ratios tried.

    The ratios are those on record, so the best one is found on test images; Holm's adjustment pays for the search.
    """

    first: Pick
    second: Pick

    def ask(self, found: Sequence[Observation]) -> Evidence | None:
        pairs = _matched(found, self.first, self.second, ratio=False)
        ratios = sorted({round(one.ratio, 3) for one, _ in pairs})
        asked = [(r, by_image([pair for pair in pairs if round(pair[0].ratio, 3) == r])) for r in ratios]
        answers = [(ratio, evidence) for ratio, evidence in asked if evidence is not None]
        if not answers:
            return None
        adjusted = holm([evidence.p for _, evidence in answers])
        # A gain counts before a loss: the claim is that there is such a ratio.
        at = min(range(len(answers)), key=lambda i: (answers[i][1].difference <= 0, adjusted[i]))
        ratio, best = answers[at]
        p = adjusted[at] if best.difference > 0 or len(answers) == 1 else max(adjusted)
        return Evidence(
            best.difference, best.low, best.high, p, best.units, best.unit, best.pairs, best.seeds,
            best.test, f"at ratio {ratio:g}, the best of {len(answers)}",
        )  # fmt: skip


@dataclass(frozen=True)
class MatchesSomewhere:
    """Most methods of ``first`` have a ratio at which they verify no fewer images than ``second``, up to ``margin``.

    Per method, the test of non-inferiority at its best ratio with Holm's adjustment over its ratios; over methods, the
    partial conjunction test that more than half of them pass (Benjamini and Heller 2008, Bonferroni form).
    """

    first: Pick
    second: Pick
    margin: float = 0.02

    def ask(self, found: Sequence[Observation]) -> Evidence | None:
        pairs = _matched(found, self.first, self.second, ratio=False)
        best: dict[str, tuple[float, Evidence]] = {}
        for name in sorted({one.method for one, _ in pairs}):
            ratios = sorted({round(one.ratio, 3) for one, _ in pairs if one.method == name})
            asked = [by_image([p for p in pairs if p[0].method == name and round(p[0].ratio, 3) == r]) for r in ratios]
            answers = [evidence for evidence in asked if evidence is not None]
            if answers:
                adjusted = holm([self._inferior(evidence) for evidence in answers])
                at = min(range(len(answers)), key=adjusted.__getitem__)
                best[name] = adjusted[at], answers[at]
        if not best:
            return None
        ordered = sorted(p for p, _ in best.values())
        needed = len(ordered) // 2 + 1
        passed = [name for name, (p, _) in best.items() if p < 0.05]
        evidence = [item for _, item in best.values()]
        share = len(passed) / len(best)
        return Evidence(
            share - 0.5, -math.inf, math.inf, min(1.0, (len(ordered) - needed + 1) * ordered[needed - 1]),
            min(item.units for item in evidence), METHODS, len(pairs), min(item.seeds for item in evidence),
            "partial conjunction of non-inferiority tests",
            f"{len(passed)} of {len(best)} methods match within {self.margin:.0%}: {', '.join(passed) or 'none'}",
        )  # fmt: skip

    def _inferior(self, evidence: Evidence) -> float:
        """One-sided p-value of "worse by the margin or more", from the interval's normal half-width."""
        from scipy.stats import norm

        half = (evidence.high - evidence.low) / 2
        gap = evidence.difference + self.margin
        if half == 0.0:
            return 0.0 if gap > 0 else 1.0
        return float(norm.sf(1.96 * gap / half))


@dataclass(frozen=True)
class Exceeds:
    """The networks chosen verify more images than another verifier does on the same networks.

    ``other`` gives that verifier's verdicts, a bit per image, or None where a record has none.
    """

    pick: Pick
    other: Callable[[Observation], str | None]

    def ask(self, found: Sequence[Observation]) -> Evidence | None:
        asked = [(one, self.other(one)) for one in found if self.pick(one)]
        return by_image([(one, replace(one, bits=bits)) for one, bits in asked if bits is not None])


@dataclass(frozen=True)
class Measures:
    """A number of ``first`` is larger (``more``) or smaller than that of ``second`` in the same context."""

    first: Pick
    second: Pick
    value: Value
    more: bool
    same_ratio: bool = True

    def ask(self, found: Sequence[Observation]) -> Evidence | None:
        sign = 1.0 if self.more else -1.0
        differences = []
        for one, other in _matched(found, self.first, self.second, ratio=self.same_ratio):
            a, b = self.value(one), self.value(other)
            if a is not None and b is not None:
                differences.append((one.seed, sign * (a - b)))
        return by_seed(differences)


@dataclass(frozen=True)
class Falls:
    """A number falls with the ratio (with ``rises``: rises): Kendall's tau against the ratio, a method and a seed.

    A series begins at the ``dense`` network of its context (or budget), where the method has none of ratio 0 itself.
    """

    pick: Pick
    dense: Pick
    value: Value
    rises: bool = False

    def ask(self, found: Sequence[Observation]) -> Evidence | None:
        from scipy.stats import kendalltau

        series: dict[tuple[str, int, str], dict[float, float]] = defaultdict(dict)
        for one in found:
            value = self.value(one)
            if self.pick(one) and value is not None:
                series[one.context, one.seed, one.method][one.ratio] = value
        for one, dense in _matched(found, self.pick, self.dense, ratio=False):
            value = self.value(dense)
            if value is not None and (one.context, one.seed, one.method) in series:
                series[one.context, one.seed, one.method].setdefault(0.0, value)
        sign = 1.0 if self.rises else -1.0
        taus = []
        for (_, seed, _), points in series.items():
            if len(points) >= 3:
                tau = float(kendalltau(*zip(*sorted(points.items()))).statistic)
                taus.append((seed, 0.0 if math.isnan(tau) else sign * tau))
        return by_seed(taus)


@dataclass(frozen=True)
class Gains:
    """The gain of ``first`` over ``second`` in verified images is larger under some perturbations than under others."""

    first: Pick
    second: Pick
    where: Pick

    def ask(self, found: Sequence[Observation]) -> Evidence | None:
        pairs = _matched(found, self.first, self.second, ratio=True)
        groups: dict[tuple[str, str, float], tuple[list[float], list[float]]] = defaultdict(lambda: ([], []))
        for one, other in pairs:
            gain = (one.bits.count("1") - other.bits.count("1")) / len(one.bits)
            groups[f"{one.seed}", one.data + one.network, one.ratio][0 if self.where(one) else 1].append(gain)
        return by_seed(
            (int(seed), math.fsum(inside) / len(inside) - math.fsum(outside) / len(outside))
            for (seed, _, _), (inside, outside) in groups.items()
            if inside and outside
        )
