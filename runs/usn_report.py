"""The USN suite's tables and figures: on the terminal, and as files beside the leaderboard."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from runs import grids, usn_figures, usn_tables
from runs.store import Record

if TYPE_CHECKING:
    from rich.console import Console

TITLE = "USN pruning"
NOTE = "Transformers and dense prediction are out of scope."


def show(records: Sequence[Record], folder: Path, formats: Sequence[str], console: Console) -> list[Path]:
    """Print the tables of all USN studies among the records and write ``usn.*``; returns what was written.

    Records of other suites are passed over; without one of these nothing happens.
    """
    found = usn_tables.studies(records)
    for study in found:
        grids.show(usn_tables.grids(study), console)
    return export(found, folder, formats) if found else []


def export(found: Sequence[usn_tables.Study], folder: Path, formats: Sequence[str]) -> list[Path]:
    """Write the formats asked for; the page holds the figures, which also lie beside it as PNG files."""
    tables = tuple(grid for study in found for grid in usn_tables.grids(study))
    page = grids.Page("usn", TITLE, tables, NOTE)
    return grids.write(page, usn_tables.as_csv(found), lambda: usn_figures.all_figures(found), folder, formats)
