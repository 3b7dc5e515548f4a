"""Records of the NRSLoss suite put in order for its tables and figures: studies, lines, steps, and tickets.

A *line* is a row of the paper under one training and one perturbation, over its seeds; a *step* is a state of it, the
dense one first. A *study* holds everything on the same data and network that is certified in the same way. Counts over
seeds are means; tests and intervals are over test images, so that seeds do not count as extra images.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from runs import nrs_records
from runs.cell import Cell, Perturb, digest, from_dict
from runs.statistics import Interval, clopper_pearson, holm, sign_test
from runs.store import Record
from runs.suites.nrs import STRUCTURED

Result = Mapping[str, Any]
LEVEL = 0.05
"""Below which an adjusted p-value counts."""


@dataclass(frozen=True)
class Line:
    """A row of the paper under one training and perturbation: its records, one a seed."""

    label: str
    cell: Cell
    perturbation: Perturb
    records: tuple[Record, ...]

    @property
    def training(self) -> str:
        return self.cell.training.label

    @property
    def kind(self) -> str:
        """The objective's name."""
        return self.cell.training.objective

    @property
    def structured(self) -> bool:
        return dict(self.cell.pruning.settings)["row"] in STRUCTURED

    @property
    def name(self) -> str:
        return f"{self.label} · {self.training}"

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(record["cell"]["seed"] for record in self.records)

    @property
    def steps(self) -> int:
        """States of the run."""
        return min(len(record["states"]) for record in self.records)

    def states(self, step: int) -> list[dict[str, Any]]:
        """A state of every seed."""
        return [record["states"][step] for record in self.records]

    def results(self, step: int) -> list[dict[str, Any]]:
        """What every seed has in a state."""
        return [nrs_records.result(state, self.perturbation.label) for state in self.states(step)]

    def mean(self, step: int, value: Callable[[Result], float]) -> float:
        """Mean over seeds of something in the results."""
        return statistics.fmean(value(result) for result in self.results(step))

    @property
    def _sparse(self) -> Sequence[int]:
        return range(1, self.steps) if self.steps > 1 else range(1)

    @cached_property
    def chosen(self) -> int:
        """The sparse step that is best on validation images, mean over seeds: proved, then right, then sparser."""

        def score(step: int) -> tuple[float, float, int]:
            found = [nrs_records.score(state, self.perturbation.label) for state in self.states(step)]
            return statistics.fmean(v for v, _ in found), statistics.fmean(r for _, r in found), step

        return max(self._sparse, key=score)

    @property
    def optimistic(self) -> int:
        """The sparse step that verifies most test images, as the released code chooses."""
        return max(self._sparse, key=lambda step: (self.mean(step, verified), step))

    def best_by_seed(self) -> float:
        """Verified share of each seed's own best sparse step, mean over seeds: Table V's BEST."""
        best = [max(verified(self.results(step)[seed]) for step in self._sparse) for seed in range(len(self.records))]
        return statistics.fmean(best)

    def constant(self, step: int) -> int:
        """Seeds in which the network gives every image the same class."""
        return sum(bool(result["constant"]) for result in self.results(step))

    def bits(self, step: int, key: str) -> dict[int, str]:
        """One bit an image, by seed; ``key`` names the result's field."""
        return {seed: result[key] for seed, result in zip(self.seeds, self.results(step))}


def verified(result: Result) -> float:
    """Share of the certified images that the complete verifier proves."""
    return float(result["verified"]) / float(result["images"])


def proved_by(name: str) -> Callable[[Result], float]:
    """Share of the certified images that one bound proves ("ibp", "crown-ibp", "crown")."""
    return lambda result: share_of(result["bounds"][name]["bits"])


def share_of(bits: str) -> float:
    """Share of ones."""
    return bits.count("1") / len(bits)


@dataclass(frozen=True)
class Ticket:
    """A sparse state against the dense network on the same images.

    Attributes:
        std, verified: differences of the shares, mean over seeds.
        std_p, verified_p: two-sided exact sign tests over images, adjusted by Holm over all states of the study.
        interval: 95 % interval of the verified difference, from exact intervals of the shares of images won and lost.
        mark: "ticket" where both are at least the dense network's, "better" where verified is also significantly
            higher; "worse" where either is significantly lower; "open" where one is lower, but the images cannot tell.
    """

    std: float
    verified: float
    std_p: float
    verified_p: float
    interval: Interval
    mark: str


@dataclass(frozen=True)
class Study:
    """Everything on the same data and network that is certified in the same way."""

    cell: Cell
    lines: tuple[Line, ...]

    @property
    def images(self) -> int:
        """Test images that are certified."""
        return min(r["images"] for line in self.lines for r in line.results(0))

    @property
    def test_images(self) -> int:
        """Test images that accuracy is measured on."""
        return min(len(r["std"]) for line in self.lines for r in line.results(0))

    @property
    def title(self) -> str:
        return f"{self.cell.data.label} · {self.cell.network.label}"

    def dense(self, line: Line) -> Line | None:
        """The line whose first state is the dense baseline of another: trained alike, without a penalty."""
        same = (line.cell.training, line.perturbation)
        for other in self.lines:
            if nrs_records.trains_plainly(other.cell) and (other.cell.training, other.perturbation) == same:
                return other
        own = dict(line.cell.pruning.settings)
        return line if own.get("one_shot") else None

    @cached_property
    def tickets(self) -> dict[tuple[str, str, int], Ticket]:
        """Every sparse state with a dense baseline, constant predictors apart: (name, perturbation, step) -> test."""
        keys, found = [], []
        for line in self.lines:
            dense = self.dense(line)
            for step in range(1, line.steps) if dense is not None else ():
                assert dense is not None
                pair = [_compare(line, dense, step, key) for key in ("std", "verified_bits")]
                empty = line.constant(step) or dense.constant(0)  # a constant matches nothing worth matching
                if not empty and all(part is not None for part in pair):
                    keys.append((line.name, line.perturbation.label, step))
                    found.append([part for part in pair if part is not None])
        adjusted = holm([part.p for pair in found for part in pair])
        return {
            key: _ticket(std, ver, adjusted[2 * i], adjusted[2 * i + 1])
            for i, (key, (std, ver)) in enumerate(zip(keys, found))
        }

    def ticket(self, line: Line, step: int) -> Ticket | None:
        return self.tickets.get((line.name, line.perturbation.label, step))


@dataclass(frozen=True)
class _Compared:
    difference: float
    wins: int
    losses: int
    images: int
    p: float


def _compare(line: Line, dense: Line, step: int, key: str) -> _Compared | None:
    ours, theirs = line.bits(step, key), dense.bits(0, key)
    common = sorted(set(ours) & set(theirs))
    if not common:
        return None
    images = min(len(bits) for seed in common for bits in (ours[seed], theirs[seed]))
    gaps = [sum((ours[s][i] == "1") - (theirs[s][i] == "1") for s in common) for i in range(images)]
    test = sign_test(gaps)
    return _Compared(sum(gaps) / (images * len(common)), test.wins, test.losses, images, test.p)


def _ticket(std: _Compared, ver: _Compared, std_p: float, verified_p: float) -> Ticket:
    won, lost = clopper_pearson(ver.wins, ver.images), clopper_pearson(ver.losses, ver.images)
    interval = Interval(won.low - lost.high, won.high - lost.low)
    if std.difference >= 0 and ver.difference >= 0:
        mark = "better" if ver.difference > 0 and verified_p < LEVEL else "ticket"
    elif (std.difference < 0 and std_p < LEVEL) or (ver.difference < 0 and verified_p < LEVEL):
        mark = "worse"
    else:
        mark = "open"
    return Ticket(std.difference, ver.difference, std_p, verified_p, interval, mark)


def studies(records: Iterable[Record]) -> list[Study]:
    """Records grouped into studies, in the order in which they come; others are passed over."""
    groups: dict[str, list[tuple[Cell, Record]]] = {}
    for record in records:
        if nrs_records.applies(record):
            cell = from_dict(record["cell"])
            whole = cell.to_dict()
            groups.setdefault(digest({name: whole[name] for name in ("network", "data", "verifier")}), []).append(
                (cell, record)
            )
    return [_study(group) for group in groups.values()]


def _study(group: Sequence[tuple[Cell, Record]]) -> Study:
    lines: dict[tuple[str, Perturb], list[tuple[Cell, Record]]] = {}
    for cell, record in group:
        whole = cell.to_dict()
        same = digest({name: whole[name] for name in ("pruning", "training")})
        for perturbation in cell.perturbations:
            lines.setdefault((same, perturbation), []).append((cell, record))
    return Study(
        group[0][0],
        tuple(
            Line(found[0][0].pruning.label, found[0][0], perturbation, tuple(record for _, record in found))
            for (_, perturbation), found in lines.items()
        ),
    )
