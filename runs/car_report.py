"""The CAR suite's tables and figures: on the terminal, and as files beside the leaderboard."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from runs import car_lines, car_tables, report
from runs.store import Record, write_atomic
from runs.usn_tables import CONSTANT, Grid

if TYPE_CHECKING:
    from rich.console import Console

TITLE = "CAR under semantic edits"


def show(records: Sequence[Record], folder: Path, formats: Sequence[str], console: Console) -> list[Path]:
    """Print the tables of all networks that are certified by sampling and write ``car.*``; returns what was written.

    Records of other suites are passed over; without one of these nothing happens.
    """
    found = car_lines.studies(records)
    for study in found:
        for grid in car_tables.grids(study):
            _print(grid, console)
    return export(found, folder, formats) if found else []


def _print(grid: Grid, console: Console) -> None:
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(grid.title), title_justify="left")
    for name in grid.header:
        table.add_column(escape(name), overflow="fold")
    for row in grid.rows:
        table.add_row(*map(escape, row), style="red" if CONSTANT in row[0] else None)
    console.print(table)
    for note in grid.notes:
        console.print(escape(note), style="dim", highlight=False)
    console.print()


def export(found: Sequence[car_lines.Study], folder: Path, formats: Sequence[str]) -> list[Path]:
    """Write the formats asked for; the page holds the figures, which also lie beside it as PNG files."""
    files: dict[str, bytes] = {}
    if "md" in formats:
        files["car.md"] = car_tables.markdown(found).encode()
    if "csv" in formats:
        files["car.csv"] = car_tables.as_csv(found).encode()
    if "html" in formats:
        from runs import car_figures

        figures = car_figures.all_figures(found)
        files |= {name: png for name, _, png in figures}
        files["car.html"] = as_html(found, figures).encode()
    for name, content in files.items():
        write_atomic(folder / name, content)
    return [folder / name for name in files]


def as_html(found: Sequence[car_lines.Study], figures: Sequence[tuple[str, str, bytes]]) -> str:
    """One page with every table and figure that needs nothing from elsewhere."""
    e = html.escape
    out = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width,initial-scale=1">',
        f"<title>{TITLE}</title><style>{report.STYLE}</style></head><body><h1>{TITLE}</h1>",
    ]
    for study in found:
        for grid in car_tables.grids(study):
            out.append(f'<h2>{e(grid.title)}</h2><div class="wrap"><table><thead><tr>')
            out += [f"<th>{e(name)}</th>" for name in grid.header]
            out.append("</tr></thead><tbody>")
            for row in grid.rows:
                kind = ' class="failed"' if CONSTANT in row[0] else ""
                out.append(f"<tr{kind}>" + "".join(f"<td>{e(text)}</td>" for text in row) + "</tr>")
            out.append("</tbody></table></div>")
            out += [f'<p class="note">{e(note)}</p>' for note in grid.notes]
    for _, caption, png in figures:
        data = base64.b64encode(png).decode()
        out.append(f'<figure><img alt="{e(caption)}" src="data:image/png;base64,{data}">')
        out.append(f"<figcaption>{e(caption)}</figcaption></figure>")
    out.append("</body></html>")
    return "".join(out) + "\n"
