"""The records of the CAR suite as lines of tables: a row of the paper at a ratio, a number of edits and a network.

Nothing here runs a network or imports torch.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from runs.cell import Cell, Perturb, digest, from_dict
from runs.statistics import Interval, Paired, clopper_pearson, sign_test
from runs.store import DONE, Record
from runs.suites import car

Bits = Callable[["Entry"], str]


@dataclass(frozen=True, eq=False)
class Entry:
    """One seed of a line: its cell, its record and what the record has under the study's perturbation."""

    cell: Cell
    record: Record
    result: Mapping[str, Any]


def valid(entry: Entry) -> str:
    """A character an image: 1 where a valid certificate holds and the image is right."""
    return str(entry.result["verified_bits"])


def paper(entry: Entry) -> str:
    """The same by CC-Cert, which is not valid."""
    return str(entry.result["paper"]["bits"])


def accurate(entry: Entry) -> str:
    """A character for each image that accuracy is measured on."""
    return str(entry.record["accuracy"]["bits"])


@dataclass(frozen=True, eq=False)
class Line:
    """A row of the paper at a ratio, trained with so many edits, on one network; one entry a seed."""

    row: str
    ratio: float
    edits: int
    network: str
    entries: tuple[Entry, ...]

    @property
    def name(self) -> str:
        """``car 0.5``."""
        return f"{self.row} {self.ratio:g}" if self.ratio else self.row

    @property
    def collapsed(self) -> int:
        """Seeds in which the network gives every image the same label."""
        return sum(bool(entry.record["training"].get("collapsed")) for entry in self.entries)

    @property
    def density(self) -> float:
        """Mean over seeds of the weights left that may be pruned, in per cent."""
        return statistics.fmean(100 * entry.record["mask"]["density"] for entry in self.entries)

    def share(self, bits: Bits) -> float:
        """Mean over seeds of the share of ones."""
        return statistics.fmean(bits(entry).count("1") / len(bits(entry)) for entry in self.entries)

    def interval(self, bits: Bits) -> Interval:
        """95 % Clopper-Pearson over the images: seeds do not count as further images."""
        images = min(len(bits(entry)) for entry in self.entries)
        return clopper_pearson(min(max(self.share(bits), 0.0), 1.0) * images, images)

    @property
    def has_paper(self) -> bool:
        """Whether CC-Cert was run beside the valid bound."""
        return all("paper" in entry.result for entry in self.entries)


@dataclass(frozen=True)
class Study:
    """Lines that are certified on the same images, in the same way, under the same edit."""

    data: str
    perturbation: Perturb
    settings: Mapping[str, Any]
    images: int
    lines: tuple[Line, ...]

    @property
    def title(self) -> str:
        return f"{self.data} · {self.perturbation.label} · {self.images} test images"

    def find(self, row: str, ratio: float, edits: int, network: str) -> Line | None:
        """The line of these, if it has been run."""
        for line in self.lines:
            if (line.row, line.edits, line.network) == (row, edits, network) and abs(line.ratio - ratio) < 5e-4:
                return line
        return None


def applies(record: Record) -> bool:
    """Whether a record belongs to these tables: a finished cell of a row of the paper, certified by sampling."""
    if record["status"] != DONE or record["cell"]["verifier"]["method"] != car.METHOD:
        return False
    return "accuracy" in record and car.row(from_dict(record["cell"])) is not None


def studies(records: Iterable[Record]) -> list[Study]:
    """Records grouped into studies, in the order in which they come."""
    groups: dict[str, list[Entry]] = {}
    for record in records:
        if not applies(record):
            continue
        cell = from_dict(record["cell"])
        whole = cell.to_dict()
        for result in record["results"]:
            data = whole["data"] | {"settings": cell.data.options}
            same = [data, whole["verifier"], result["label"], result["images"]]
            same.append(record["data"]["fingerprints"]["test"])
            groups.setdefault(digest({"same": same}), []).append(Entry(cell, record, result))
    return [_study(group) for group in groups.values()]


def _study(group: Sequence[Entry]) -> Study:
    first = group[0]
    lines: dict[tuple[str, float, int, str, str], list[Entry]] = {}
    for entry in group:
        cell = entry.cell
        row = car.row(cell)
        assert row is not None  # applies
        # The same row with other lengths or losses is another line.
        whole = cell.to_dict()
        key = (row, cell.pruning.ratio, cell.data.edited, cell.network.label,
               digest({"training": whole["training"], "settings": whole["pruning"]["settings"]}))  # fmt: skip
        lines.setdefault(key, []).append(entry)
    made = [
        Line(row, ratio, edits, network, tuple(sorted(found, key=lambda e: e.cell.seed)))
        for (row, ratio, edits, network, _), found in lines.items()
    ]
    named = Perturb(first.result["kind"], first.result["magnitude"])
    return Study(
        first.cell.data.name if first.cell.data.limit is None else first.cell.data.label.partition(" + ")[0],
        named, dict(first.cell.verifier.settings), first.result["images"], tuple(sorted(made, key=_place)),
    )  # fmt: skip


def _place(line: Line) -> tuple[str, int, int, float]:
    known = [*car.ROWS]
    return (line.network, line.edits, known.index(line.row) if line.row in known else len(known), line.ratio)


def paired(first: Line, second: Line, bits: Bits) -> tuple[float, Paired] | None:
    """Difference of the shares over common seeds, and the exact paired test over images (McNemar's for one seed).

    Each image counts once, with the number of seeds in which it passes. None without a common seed.
    """
    ours = {entry.cell.seed: bits(entry) for entry in first.entries}
    theirs = {entry.cell.seed: bits(entry) for entry in second.entries}
    common = sorted(set(ours) & set(theirs))
    if not common:
        return None
    images = min(len(found[seed]) for seed in common for found in (ours, theirs))
    differences = [sum((ours[s][i] == "1") - (theirs[s][i] == "1") for s in common) for i in range(images)]
    return sum(differences) / (images * len(common)), sign_test(differences)
