"""The tables of the USN suite, from records alone.

The paper's I to III with counts and intervals beside what is printed, and what an exact verifier shows beyond them.

A line is a variant at a ratio, over its seeds. Counts over seeds are means, and intervals are Clopper-Pearson over the
test images: seeds do not count as extra images.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from runs import deviations, paper
from runs.cell import Cell, Perturb, digest, from_dict
from runs.grids import CONSTANT, Grid, csv_text
from runs.statistics import clopper_pearson, holm, sign_test
from runs.store import DONE, Record

PAPER_IMAGES = 154
TAU = "2"
"""Pixels within which a keypoint counts as right in the tables and figures."""


@dataclass(frozen=True)
class Line:
    """One variant at one ratio: its records, one a seed."""

    label: str
    ratio: float
    records: tuple[Record, ...]

    @property
    def name(self) -> str:
        """``usn 0.2``."""
        return f"{self.label} {self.ratio:g}" if self.ratio else self.label

    @property
    def rule(self) -> str:
        """What is removed, without the settings: ``usn`` of ``usn λ_u=1``."""
        return self.label.partition(" ")[0]

    @property
    def settings(self) -> str:
        """Settings that are not the usual ones: ``λ_u=1``, ``without USN losses``, or nothing."""
        return self.label.partition(" ")[2]

    @property
    def seeds(self) -> set[int]:
        """The seeds on record."""
        return {int(record["cell"]["seed"]) for record in self.records}

    @property
    def collapsed(self) -> int:
        """Seeds in which the network predicts the same for every image."""
        return sum(bool(record["training"].get("collapsed")) for record in self.records)

    def results(self, perturbation: Perturb) -> list[dict[str, Any]]:
        """What each seed has under a perturbation."""
        wanted = (perturbation.kind, perturbation.magnitude)
        return [r for record in self.records for r in record["results"] if (r["kind"], r["magnitude"]) == wanted]

    def mean(self, perturbation: Perturb, value: Callable[[Mapping[str, Any]], float]) -> float:
        """Mean over seeds."""
        return statistics.fmean(value(result) for result in self.results(perturbation))


@dataclass(frozen=True)
class Study:
    """Everything that differs only in pruning, losses and seed, so that it may stand in one table."""

    data: str
    network: str
    delta: float
    images: int
    epochs: int
    perturbations: tuple[Perturb, ...]
    lines: tuple[Line, ...]

    @property
    def title(self) -> str:
        return f"{self.data} · {self.network} · {self.epochs} epochs · {self.images} test images"

    def line(self, label: str, ratio: float) -> Line | None:
        """The line of a variant, if it has been run."""
        return next((line for line in self.lines if line.label == label and line.ratio == ratio), None)

    def ratios(self, *labels: str) -> list[float]:
        """Ratios above 0 at which all of these variants have been run."""
        found = [{line.ratio for line in self.lines if line.label == label and line.ratio} for label in labels]
        return sorted(set.intersection(*found)) if found else []


def applies(record: Record) -> bool:
    """Whether a record belongs to these tables: a finished USN cell with keypoint deviations."""
    return bool(
        record["status"] == DONE
        and record["cell"]["pruning"]["method"] == "usn"
        and record["cell"]["verifier"]["method"] == deviations.METHOD
    )


def studies(records: Iterable[Record]) -> list[Study]:
    """Records grouped into studies, in the order in which they come."""
    groups: dict[str, list[tuple[Cell, Record]]] = {}
    for record in records:
        if not applies(record):
            continue
        cell = from_dict(record["cell"])
        whole = cell.to_dict()
        same = {name: whole[name] for name in ("training", "network", "data", "verifier", "perturbations")}
        groups.setdefault(digest(same), []).append((cell, record))
    return [_study(group) for group in groups.values()]


def _study(group: Sequence[tuple[Cell, Record]]) -> Study:
    first = group[0][0]
    lines: dict[tuple[str, float, str], list[Record]] = {}
    for cell, record in group:
        # The same name with other settings (another m, say) is another line.
        name = (cell.pruning.label, cell.pruning.ratio, digest(dict(cell.pruning.settings)))
        lines.setdefault(name, []).append(record)
    return Study(
        first.data.label,
        first.network.label,
        first.verifier.delta,
        min(result["images"] for _, record in group for result in record["results"]),
        first.training.epochs,
        first.perturbations,
        tuple(Line(label, ratio, tuple(found)) for (label, ratio, _), found in lines.items()),
    )


def grids(study: Study) -> list[Grid]:
    """Every table of a study that has rows; one with a constant predictor says what that means."""
    return [_warned(grid) for grid in _grids(study) if grid.rows]


def _warned(grid: Grid) -> Grid:
    if not any(CONSTANT in text for row in grid.rows for text in row):
        return grid
    warning = (
        f"{CONSTANT} k/n: in k of n seeds the network predicts (nearly) the same for every image. It is certified "
        "trivially and its row says nothing about the method."
    )
    return replace(grid, notes=(*grid.notes, warning))


def _grids(study: Study) -> list[Grid]:
    return [
        _paper_table(study, "I", "USN-guided against random pruning", ("random", "usn"), ()),
        _paper_table(study, "II", "USN pruning against no pruning", ("usn",), ("none", "vanilla")),
        _paper_table(study, "III", "λ_W = 0 against λ_W = 10", ("usn-w0", "usn"), ()),
        _overview(study),
        *(_exact(study, perturbation) for perturbation in study.perturbations),
        *_compared(study),
    ]


def _share(count: float, images: int) -> str:
    """``29/30 97 % [83, 100]``; the count is a mean over seeds."""
    interval = clopper_pearson(count, images)
    return f"{count:.4g}/{images} {100 * count / images:.0f} % [{100 * interval.low:.0f}, {100 * interval.high:.0f}]"


def printed(table: str, network: str, label: str, ratio: float, perturbation: Perturb) -> float | None:
    """The paper's number for a row of one of its tables, or None; the data are never the same as ours."""
    rule, weight = {
        "usn": ("usn", "10"), "usn-w0": ("usn", "0"), "none": ("none", "10"), "random": ("random", None),
    }.get(label, (None, None))  # fmt: skip
    name = network.split(" ")[0]
    for row in paper.load():
        if row.paper != paper.USN or row.table != table or row.network != name or row.perturbation is None:
            continue
        note = f"rule {rule}" + (f", λ_W={weight}" if weight else "")
        same = row.perturbation.kind == perturbation.kind and row.ratio == ratio and row.note == note
        if same and abs(row.perturbation.magnitude - perturbation.magnitude) < 1e-9:
            return row.value
    return None


def _paper_table(study: Study, table: str, what: str, pruned: Sequence[str], unpruned: Sequence[str]) -> Grid:
    """One of the paper's tables: ratios at which all of ``pruned`` have been run, below the rows that prune nothing."""
    wanted = [(label, 0.0) for label in unpruned]
    wanted += [(label, ratio) for ratio in study.ratios(*pruned) for label in pruned]
    known = [(line, label, ratio) for label, ratio in wanted if (line := study.line(label, ratio)) is not None]
    if not any(ratio for _, _, ratio in known):
        known = []
    asked = [p for p in study.perturbations if p.kind in ("brightness", "contrast")]
    rows = []
    for line, label, ratio in known:
        cells = []
        for perturbation in asked:
            count = line.mean(perturbation, lambda r: float(r["verdicts"][f"{study.delta:g}"]["holds"]))
            text = _share(count, study.images)
            value = printed(table, study.network, label, ratio, perturbation)
            if value is not None:
                # Every printed value is a count of 154 images, cut off after four digits.
                text += f" · paper {_share(round(value * PAPER_IMAGES), PAPER_IMAGES)}"
            cells.append(text)
        rows.append((f"{ratio:g}", _flag(line), str(len(line.records)), *cells))
    return Grid(
        f"Table {table}: {what}, images that hold at {study.delta:g} px · {study.title}",
        ("ρ", "rule", "seeds", *(p.label for p in asked)),
        tuple(rows) if asked else (),
        (
            "Counts with 95 % Clopper-Pearson intervals. The paper's images are not public: its numbers stand beside "
            "ours and are not compared.",
        ),
    )


def _flag(line: Line) -> str:
    """The variant, with a warning where it predicts the same for every image: such a network certifies trivially."""
    if not line.collapsed:
        return line.label
    return f"{line.label} ({CONSTANT} {line.collapsed}/{len(line.records)})"


def _spread(values: Sequence[float], digits: int) -> str:
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ±{statistics.stdev(values):.{digits}f}"


def _overview(study: Study) -> Grid:
    """Error, size and keypoints of every variant, under the study's first perturbation."""
    first = study.perturbations[0]
    rows = []
    for line in study.lines:
        results = line.results(first)
        sizes = [record["size"] for record in line.records]
        cells = [_flag(line), f"{line.ratio:g}", str(len(line.records)), _spread([r["clean"] for r in results], 2)]
        cells.append(f"{100 * statistics.fmean(s['flops_executed'] / s['flops'] for s in sizes):.0f} %")
        for group in ("visible", "occluded"):
            parts = [_points(r, group) for r in results]
            total = sum(part[0] for part in parts)
            for column in (1, 2, 3):
                cells.append(f"{100 * sum(p[column] for p in parts) / total:.1f} %" if total else "–")
        rows.append(tuple(cells))
    kinds = ("correct", "verified", "both")
    return Grid(
        f"Keypoints under {first.label} · {study.title}",
        ("rule", "ρ", "seeds", "error px", "FLOPs", *(f"{g} {k}" for g in ("visible", "occluded") for k in kinds)),
        tuple(rows),
        (
            f"Correct: both coordinates within {TAU} px of the truth; verified: neither moves by {study.delta:g} px or "
            "more. FLOPs: multiply-adds left after removal.",
        ),
    )


def _points(result: Mapping[str, Any], group: str) -> tuple[int, int, int, int]:
    part = result["keypoints"][group]
    return (
        sum(part["total"]),
        sum(part["correct"][TAU]),
        sum(part["verified"]),
        sum(part["correct_and_verified"][TAU]),
    )


def _exact(study: Study, perturbation: Perturb) -> Grid:
    """What an exact verifier adds: verdicts at every δ, the largest deviation, work, and verdicts without branching."""
    rows = []
    for line in study.lines:
        results = line.results(perturbation)
        cells = [_flag(line), f"{line.ratio:g}", str(len(line.records))]
        for delta in deviations.DELTAS:
            counts = [r["verdicts"][f"{delta:g}"] for r in results]
            held = statistics.fmean(c["holds"] for c in counts)
            rest = "/".join(str(sum(c[name] for c in counts)) for name in ("violated", "unknown", "timeout"))
            share = _share(held, study.images) if delta == study.delta else f"{held:.4g}/{study.images}"
            cells.append(f"{share} ({rest})")
        cells += [
            _spread([r["deviation"]["mean"] for r in results], 4),
            _spread([r["deviation"]["p95"] for r in results], 4),
            _spread([r["sub_intervals_mean"] for r in results], 1),
            f"{statistics.fmean(statistics.median(r['seconds']) for r in results):.3f}",
            _spread([r["unstable"] for r in results], 0),
        ]
        for name in deviations.SINGLE_SHOT:
            single = [r["single_shot"][name] for r in results]
            images = sum(s["images"] for s in single)
            held = sum(s["holds"][f"{study.delta:g}"] for s in single if f"{study.delta:g}" in s["holds"])
            cells.append(f"{held}/{images}" if images else "–")
        rows.append(tuple(cells))
    holds = tuple(f"holds at {delta:g} px" for delta in deviations.DELTAS)
    return Grid(
        f"{perturbation.label}, decided exactly · {study.title}",
        (
            "rule", "ρ", "seeds", *holds, "largest move px", "95th percentile", "sub-intervals",
            "s/image (median)", "unstable ReLUs", *(f"{name} alone" for name in deviations.SINGLE_SHOT),
        ),
        tuple(rows),
        (
            "In brackets: violated, unknown and timed out, over all seeds.",
            f"Sub-intervals and seconds are those of the verdict at {study.delta:g} px; the last columns count what "
            f"bounds without branching prove at {study.delta:g} px: the rest is unknown to an incomplete verifier.",
        ),
    )  # fmt: skip


@dataclass(frozen=True)
class Paired:
    """Largest deviations of two lines on the same images: mean of each, and a two-sided sign test over images."""

    perturbation: Perturb
    line: Line
    other: Line
    seeds: int
    ours: float
    theirs: float
    wins: int
    losses: int
    p: float


def paired(study: Study, settings: str = "") -> list[Paired]:
    """USN against each other variant at the same ratio, and against the unpruned ones; wins are smaller deviations.

    All have the same ``settings`` (the usual ones, unless told otherwise), or are trained without USN's.
    """
    found = []
    for line in study.lines:
        if line.rule == "usn" and line.settings == settings:
            for other in study.lines:
                like = other.settings == settings or other.label in ("vanilla", "augmented")
                if like and other.rule != "usn" and other.ratio in (0.0, line.ratio):
                    found += _pairs(study, line, other)
    return found


def unusual(study: Study) -> list[Paired]:
    """Each variant with settings of its own against the same variant with the usual ones, at the same ratio."""
    usual = {(line.rule, line.ratio): line for line in study.lines if not line.settings}
    found = []
    for line in study.lines:
        if line.settings and (other := usual.get((line.rule, line.ratio))) is not None:
            found += _pairs(study, line, other)
    return found


def _pairs(study: Study, line: Line, other: Line) -> list[Paired]:
    """Two lines under each perturbation, over the seeds that both have; nothing where they have none in common."""
    seeds = line.seeds & other.seeds
    found = []
    for perturbation in study.perturbations if seeds else ():
        ours, theirs = _deviations(line, perturbation, seeds), _deviations(other, perturbation, seeds)
        test = sign_test([b - a for a, b in zip(ours, theirs)])
        found.append(
            Paired(
                perturbation, line, other, len(seeds), statistics.fmean(ours), statistics.fmean(theirs), test.wins,
                test.losses, test.p,
            )
        )  # fmt: skip
    return found


def _deviations(line: Line, perturbation: Perturb, seeds: set[int]) -> list[float]:
    """Largest deviation of each image, the mean over these seeds."""
    chosen = replace(line, records=tuple(r for r in line.records if r["cell"]["seed"] in seeds))
    values = [result["deviation"]["low"] for result in chosen.results(perturbation)]
    return [statistics.fmean(of_image) for of_image in zip(*values)]


def _compared(study: Study) -> Iterator[Grid]:
    """A table for each kind of settings, and one of the settings themselves; p-values are adjusted within a table."""
    title = "largest move of a keypoint (px)"
    for settings in dict.fromkeys(line.settings for line in study.lines if line.rule == "usn"):
        own = f", {settings}" if settings else ""
        yield _versus(study, f"USN against the others{own}, {title}", paired(study, settings))
    yield _versus(study, f"Settings of their own against the usual ones, {title}", unusual(study))


def _versus(study: Study, title: str, pairs: Sequence[Paired]) -> Grid:
    adjusted = holm([pair.p for pair in pairs])
    rows = tuple(
        (
            pair.line.name, pair.other.name, str(pair.seeds), pair.perturbation.label, f"{pair.ours:.4f}",
            f"{pair.theirs:.4f}", f"{pair.ours / pair.theirs:.2f}" if pair.theirs else "–",
            f"{pair.wins}/{pair.losses}", f"{p:.2g}",
        )
        for pair, p in zip(pairs, adjusted)
    )  # fmt: skip
    return Grid(
        f"{title} · {study.title}",
        ("rule", "other", "seeds", "perturbation", "px", "other px", "ratio", "images better/worse", "p (Holm)"),
        rows,
        (
            "Two-sided sign test over images of the mean over the seeds in common. It says how these networks differ "
            "on these images, not how the methods would with other seeds.",
        ),
    )


def flat(found: Sequence[Study]) -> Iterator[dict[str, Any]]:
    """One dictionary for each network and perturbation, with full-precision values."""
    for study in found:
        for line in study.lines:
            for record in line.records:
                for result in record["results"]:
                    yield _flat(study, line, record, result)


def _flat(study: Study, line: Line, record: Record, result: Mapping[str, Any]) -> dict[str, Any]:
    values: dict[str, Any] = {
        "data": study.data,
        "network": study.network,
        "epochs": study.epochs,
        "rule": line.label,
        "ratio": line.ratio,
        "seed": record["cell"]["seed"],
        "collapsed": bool(record["training"].get("collapsed")),
        "perturbation": result["kind"],
        "magnitude": result["magnitude"],
        "images": result["images"],
        "error_px": result["clean"],
    }
    for delta, counts in result["verdicts"].items():
        values |= {f"{name}_{delta}": count for name, count in counts.items()}
    low = result["deviation"]
    values |= {"deviation_mean": low["mean"], "deviation_p95": low["p95"], "deviation_timeouts": low["timeouts"]}
    values |= {"sub_intervals": result["sub_intervals_mean"], "seconds": result["timing"]["seconds_mean"]}
    values |= {"unstable_relus": result["unstable"]}
    for name, single in result["single_shot"].items():
        values |= {f"{name}_images": single["images"], f"{name}_holds_1": single["holds"]["1"]}
    for group in ("visible", "occluded"):
        names = ("total", "correct", "verified", "correct_and_verified")
        values |= {f"{group}_{name}": n for name, n in zip(names, _points(result, group), strict=True)}
    return values


def as_csv(found: Sequence[Study]) -> str:
    """:func:`flat` as CSV."""
    return csv_text(list(flat(found)))
