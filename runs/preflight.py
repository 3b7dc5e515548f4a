"""What can be known to fail before any cell starts: data sets that are not there, perturbations that nobody accepts."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from runs.cell import SEMANTIC, Cell, Data, Perturb
from runs.packages import ours

MADE = ("digits", "aircraft", "scenes_flowers", "scenes_faces")
"""Data sets that come with a library or are rendered: there is no file that could be missing."""

OURS = ("edits", "edited")
"""Settings of `Data` that its loader does not see."""


def check_data(cells: Iterable[Cell], data_dir: Path | None) -> None:
    """Load a test image of every data set that comes from files.

    Raises:
        ValueError: one is missing or damaged; the message says where it was looked for and how to get it.
    """
    for data in dict.fromkeys(cell.data for cell in cells):
        if data.name.partition(":")[0] not in MADE:
            _find(data, data_dir)


def _find(data: Data, data_dir: Path | None) -> None:
    options: dict[str, Any] = {name: value for name, value in data.settings if name not in OURS}
    try:
        ours("datasets").load(data.name, data_dir, "test", limit=1, **options)
    except FileNotFoundError as error:
        raise ValueError(f"the plan needs the data set {data.name}: {error}") from error


def check_perturbations(perturbations: Iterable[Perturb]) -> None:
    """Make every perturbation that a verifier would be given.

    Raises:
        ValueError: a magnitude that makes no sense, such as 8 for images in [0, 1].
    """
    from runs import measure

    for named in dict.fromkeys(perturbations):
        if named.kind in SEMANTIC:
            continue
        try:
            measure.perturbation(named.kind, named.magnitude)
        except (TypeError, ValueError) as error:
            raise ValueError(f"perturbation {named.kind}:{named.magnitude:g}: {error}") from error
