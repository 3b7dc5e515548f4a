"""The CAR suite's tables and figures: on the terminal, and as files beside the leaderboard."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from runs import car_figures, car_lines, car_tables, grids
from runs.store import Record

if TYPE_CHECKING:
    from rich.console import Console

TITLE = "CAR under semantic edits"


def show(records: Sequence[Record], folder: Path, formats: Sequence[str], console: Console) -> list[Path]:
    """Print the tables of all networks that are certified by sampling and write ``car.*``; returns what was written.

    Records of other suites are passed over; without one of these nothing happens.
    """
    found = car_lines.studies(records)
    for study in found:
        grids.show(car_tables.grids(study), console)
    return export(found, folder, formats) if found else []


def export(found: Sequence[car_lines.Study], folder: Path, formats: Sequence[str]) -> list[Path]:
    """Write the formats asked for; the page holds the figures, which also lie beside it as PNG files."""
    tables = tuple(grid for study in found for grid in car_tables.grids(study))
    page = grids.Page("car", TITLE, tables)
    return grids.write(page, car_tables.as_csv(found), lambda: car_figures.all_figures(found), folder, formats)
