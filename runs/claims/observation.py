"""Records as flat observations: one network under one perturbation, with the verdict of every test image."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from runs.cell import Cell, digest, from_dict, recorded_by_state
from runs.store import DONE, Record


@dataclass(frozen=True)
class Observation:
    """What one cell says under one perturbation.

    ``context`` is everything that two networks must share before a difference between them says something about
    pruning: data, network, training with its epochs, perturbation, verifier and number of images. ``budget`` is that
    with the epochs of training in all, however a method divides those up; None where they are not on record, and for a
    state of a run, which is one of several trainings. ``bits`` has one character per test image, "1" where it is
    verified (and, for classes, right).
    """

    method: str
    ratio: float
    training: str
    data: str
    images: str
    network: str
    perturbation: str
    kind: str
    seed: int
    context: str
    bits: str
    result: Mapping[str, Any]
    record: Record
    budget: str | None = None


Pick = Callable[[Observation], bool]
"""Chooses the observations of one side of a comparison."""

Value = Callable[[Observation], float | None]
"""A number of an observation, None where it has none."""


def observations(records: Iterable[Record]) -> list[Observation]:
    """Every finished result, in the order of the records.

    Raises:
        ValueError: a record's cell cannot be read.
    """
    found = []
    for record in records:
        if record["status"] != DONE:
            continue
        cell = from_dict(record["cell"])
        whole = cell.to_dict()
        for result in record["results"]:
            same = {name: whole[name] for name in ("training", "network", "data", "verifier")}
            same |= {"perturbation": result["label"], "images": result["images"]}
            found.append(
                Observation(
                    method=cell.pruning.label,
                    ratio=cell.pruning.ratio,
                    training=cell.training.objective,
                    data=cell.data.label,
                    images=record["data"]["fingerprints"]["test"],
                    network=cell.network.name,
                    perturbation=result["label"],
                    kind=result["kind"],
                    seed=cell.seed,
                    context=digest(same),
                    bits=result["verified_bits"],
                    result=result,
                    record=record,
                    budget=_budget(same, cell, record),
                )
            )
    return found


def _budget(same: Mapping[str, Any], cell: Cell, record: Record) -> str | None:
    total = record.get("training", {}).get("epochs")
    if total is None or recorded_by_state(cell.pruning):
        return None
    return digest({**same, "training": cell.training.in_all(total)})


def picked(*methods: str, training: Iterable[str] = (), ratios: Iterable[float] = (), data: str = "") -> Pick:
    """Observations of some methods, of some trainings, ratios and data (all, where none are named)."""
    names, trainings, wanted = frozenset(methods), frozenset(training), tuple(ratios)

    def pick(found: Observation) -> bool:
        return (
            found.method in names
            and (not trainings or found.training in trainings)
            and (not wanted or any(abs(found.ratio - ratio) < 0.005 for ratio in wanted))
            and (not data or found.data.split(" ")[0].split(":")[0] == data)
        )

    return pick
