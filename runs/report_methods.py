"""What the page says of each method: settings, training curves, masks layer by layer, unstable neurons."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runs.cell import Cell, from_dict
from runs.nrs_records import unfold
from runs.statistics import MeanSd, mean_sd
from runs.store import DONE, Record, read_lines

Settings = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Kept:
    """The share of each layer's weights that a network keeps, mean over its seeds; ``structured``: whole channels."""

    label: str
    layers: dict[str, float]
    density: float
    structured: bool


@dataclass(frozen=True)
class Setup:
    """One method on one network and data set: what was asked for, and what became of it.

    Attributes:
        where: data set and network.
        common: settings that all its cells share; ``differing`` those that do not, by cell without its seed.
        histories: per label the epochs of each seed, as in ``history.jsonl``; empty where the files are not at hand.
        kept: masks by label.
        unstable: per label and perturbation the ReLUs whose sign the bounds leave open, over seeds.
        collapsed: labels and seeds of networks that predict a constant.
    """

    where: str
    common: Settings
    differing: tuple[tuple[str, Settings], ...]
    histories: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]]
    kept: tuple[Kept, ...]
    unstable: Mapping[str, Mapping[str, MeanSd]]
    collapsed: tuple[str, ...]


@dataclass(frozen=True)
class MethodPage:
    """Everything that is on record of one method."""

    name: str
    setups: tuple[Setup, ...]


def pages(records: Iterable[Record], folder: Path) -> list[MethodPage]:
    """The methods of all finished records, dense first; ``folder`` is where their ``history.jsonl`` lie."""
    found: dict[str, dict[str, list[tuple[Cell, Record]]]] = {}
    for record in unfold(records):
        if record["status"] == DONE:
            cell = from_dict(record["cell"])
            where = f"{cell.data.label} · {cell.network.label}"
            found.setdefault(cell.pruning.label, {}).setdefault(where, []).append((cell, record))
    names = sorted(found, key=lambda name: (name != "dense", name))
    return [
        MethodPage(name, tuple(_setup(where, cells, folder) for where, cells in found[name].items())) for name in names
    ]


def _label(cell: Cell) -> str:
    return f"{100 * cell.pruning.ratio:g} % · {cell.training.label}"


def _setup(where: str, cells: Sequence[tuple[Cell, Record]], folder: Path) -> Setup:
    groups: dict[str, list[tuple[Cell, Record]]] = {}
    for cell, record in sorted(cells, key=lambda pair: (pair[0].pruning.ratio, pair[0].training.label, pair[0].seed)):
        groups.setdefault(_label(cell), []).append((cell, record))
    given = {label: [settings(cell) for cell, _ in group] for label, group in groups.items()}
    every = [one for several in given.values() for one in several]
    common = tuple(
        (name, text) for name, text in every[0].items() if all(other.get(name) == text for other in every)
    )  # fmt: skip
    shared = {name for name, _ in common}
    differing = [
        (label, tuple((name, text) for name, text in own.items() if name not in shared))
        for label, several in given.items()
        for own in {tuple(one.items()): one for one in several}.values()
    ]
    return Setup(
        where,
        common,
        tuple((label, own) for label, own in differing if own),
        _histories(groups, folder),
        tuple(kept for label, group in groups.items() if (kept := _kept(label, group)) is not None),
        {label: found for label, group in groups.items() if (found := _unstable(group))},
        tuple(
            f"{label}, seed {cell.seed}"
            for label, group in groups.items()
            for cell, record in group
            if record.get("training", {}).get("collapsed")
        ),
    )


def settings(cell: Cell) -> dict[str, str]:
    """What a cell asks of its method and its training, without the sparsity and the seed."""
    training = cell.training
    own: dict[str, object] = {
        "training": training.label,
        "epochs": training.epochs,
        "batch size": training.batch_size,
        **{f"training: {name}": value for name, value in training.settings},
        **{f"method: {name}": value for name, value in cell.pruning.settings},
        **{f"network: {name}": value for name, value in cell.network.settings},
        **{f"data: {name}": value for name, value in cell.data.settings},
    }
    return {name: f"{value:g}" if isinstance(value, float) else str(value) for name, value in own.items()}


def _histories(
    groups: Mapping[str, Sequence[tuple[Cell, Record]]], folder: Path
) -> dict[str, list[list[dict[str, Any]]]]:
    """Epochs by label. The states of one run, and cells that share a training, have one history: it is drawn once."""
    found: dict[str, list[list[dict[str, Any]]]] = {}
    seen: set[str] = set()
    for label, group in groups.items():
        for _, record in group:
            if record["training_key"] in seen:
                continue
            rows = [row for row in read_lines(folder / record["key"] / "history.jsonl")[0] if "metrics" in row]
            if rows:
                seen.add(record["training_key"])
                found.setdefault(label if "states" not in record else _label_of_run(record), []).append(rows)
    return found


def _label_of_run(record: Record) -> str:
    return f"all states · {from_dict(record['cell']).training.label}"


def _kept(label: str, group: Sequence[tuple[Cell, Record]]) -> Kept | None:
    masks = [record["mask"] for _, record in group if record.get("mask", {}).get("layers")]
    if not masks:
        return None
    layers = {
        name: statistics.fmean(mask["layers"][name] for mask in masks if name in mask["layers"])
        for name in masks[0]["layers"]
    }
    density = statistics.fmean(mask["density"] for mask in masks)
    return Kept(label, layers, density, any(mask["structured"] for mask in masks))


def _unstable(group: Sequence[tuple[Cell, Record]]) -> dict[str, MeanSd]:
    counts: dict[str, list[float]] = {}
    for _, record in group:
        for result in record["results"]:
            if result.get("unstable") is not None:
                counts.setdefault(result["label"], []).append(result["unstable"])
    return {label: mean_sd(values) for label, values in counts.items()}
