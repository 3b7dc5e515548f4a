"""Records of runs that are kept state by state: which state stands for a run, and what the leaderboard sees of it.

Nothing here runs a network or imports torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from runs.cell import Cell, from_dict, recorded_by_state
from runs.store import DONE, Record


def applies(record: Record) -> bool:
    """Whether a record is of a finished run that is recorded state by state."""
    return record["status"] == DONE and recorded_by_state(from_dict(record["cell"]).pruning)


def result(state: Mapping[str, Any], label: str | None = None) -> dict[str, Any]:
    """What a state has under the perturbation of that label; None for the first."""
    return next(found for found in state["results"] if label is None or found["label"] == label)


def score(state: Mapping[str, Any], label: str | None = None) -> tuple[int, int]:
    """What a state is chosen by: validation images that some bound proves, then those that are right."""
    found = result(state, label)["validation"]
    return found["verified"], found["right"]


def chosen(states: Sequence[Mapping[str, Any]], label: str | None = None) -> int:
    """Index of the sparse state that is best on validation images, the sparser one of equals.

    Args:
        states: of one run, the dense one first, which is chosen only when it is alone.
        label: the perturbation; None for the first.
    """
    best = max(states[1:] or states, key=lambda state: (*score(state, label), state["index"]))
    return int(best["index"])


def trains_plainly(cell: Cell) -> bool:
    """Whether the dense state of a run is the dense baseline: trained without a penalty, as most rows are."""
    given = dict(cell.pruning.settings)
    row = str(given["row"])
    return not given.get("one_shot") and "+" not in row and row != "slimming"


def unfold(records: Iterable[Record]) -> list[Record]:
    """Records for the leaderboard: a run that is recorded state by state becomes one record a state.

    The dense state of a row that trains as the dense baseline does is that baseline, and stands there once a seed.
    """
    unfolded: list[Record] = []
    seen: set[str] = set()
    for record in records:
        if not applies(record):
            unfolded.append(record)
            continue
        cell = from_dict(record["cell"])
        for state in record["states"]:
            pruning = dataclasses.replace(cell.pruning, ratio=state["removed"])
            if state["index"] == 0 and trains_plainly(cell):
                flavour = tuple(item for item in pruning.settings if item[0] == "flavour")
                pruning = dataclasses.replace(pruning, method="dense", settings=(*flavour, ("row", "dense")))
                whole = dataclasses.replace(cell, pruning=pruning)
                if whole.key in seen:
                    continue
                seen.add(whole.key)
            own = dataclasses.replace(cell, pruning=pruning)
            training = dict(record["training"]) | {"collapsed": state["constant"]}
            parts = {name: state[name] for name in ("size", "mask", "results")}
            unfolded.append({**record, "cell": own.to_dict(), "training": training, **parts})
    return unfolded
