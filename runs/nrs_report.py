"""The NRSLoss suite's tables and figures: on the terminal, and as files beside the leaderboard."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from runs import grids, nrs_figures, nrs_lines, nrs_records, nrs_tables
from runs.store import Record

if TYPE_CHECKING:
    from rich.console import Console

TITLE = "NRSLoss and iterative pruning"


def show(records: Sequence[Record], folder: Path, formats: Sequence[str], console: Console) -> list[Path]:
    """Print the tables of all runs that are recorded state by state and write ``nrs.*``; returns what was written.

    What is measured of every state is in the files alone: it would fill many screens.
    Records of other suites are passed over; without one of these nothing happens.
    """
    found = nrs_lines.studies(record for record in records if nrs_records.applies(record))
    for study in found:
        grids.show(nrs_tables.grids(study, states=False), console)
    return export(found, folder, formats) if found else []


def export(found: Sequence[nrs_lines.Study], folder: Path, formats: Sequence[str]) -> list[Path]:
    """Write the formats asked for; the page holds the figures, which also lie beside it as PNG files."""
    tables = tuple(grid for study in found for grid in nrs_tables.grids(study))
    page = grids.Page("nrs", TITLE, tables)
    return grids.write(page, nrs_tables.as_csv(found), lambda: nrs_figures.all_figures(found), folder, formats)
