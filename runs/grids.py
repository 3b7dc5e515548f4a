"""Tables of a suite as text: on the terminal, as Markdown, and as a page with figures.

What the suites say differs; how it is shown does not.
"""

from __future__ import annotations

import base64
import csv
import html
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from runs.report_style import STYLE
from runs.store import write_atomic

if TYPE_CHECKING:
    from rich.console import Console

CONSTANT = "CONSTANT"
"""Marks a row whose network predicts the same for every image, in so many of its seeds."""

Figure = tuple[str, str, bytes]
"""File name, caption, PNG."""


@dataclass(frozen=True)
class Grid:
    """A table as text: heading, columns, rows, and lines below it."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = field(default=())


@dataclass(frozen=True)
class Page:
    """A suite's tables, with the page's heading, a line below it, and the suite's name, which its files carry."""

    name: str
    title: str
    grids: tuple[Grid, ...]
    note: str = ""


def _constant(row: Sequence[str]) -> bool:
    return any(CONSTANT in text for text in row)


def show(grids: Iterable[Grid], console: Console) -> None:
    """Print the tables; rows of constant predictors are red."""
    from rich.markup import escape
    from rich.table import Table

    for grid in grids:
        table = Table(title=escape(grid.title), title_justify="left")
        for name in grid.header:
            table.add_column(escape(name), overflow="fold")
        for row in grid.rows:
            table.add_row(*map(escape, row), style="red" if _constant(row) else None)
        console.print(table)
        for note in grid.notes:
            console.print(escape(note), style="dim", highlight=False)
        console.print()


def markdown(page: Page) -> str:
    """The tables as GitHub-flavoured Markdown."""
    out = [f"# {page.title}", ""] + ([page.note, ""] if page.note else [])
    for grid in page.grids:
        out += [f"## {grid.title}", "", _line(grid.header), "|" + "--|" * len(grid.header)]
        out += [_line(row) for row in grid.rows]
        out += ["", *(f"* {note}" for note in grid.notes), ""]
    return "\n".join(out)


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def csv_text(rows: Sequence[Mapping[str, object]]) -> str:
    """Rows, all of the same names, as CSV with a heading; no rows are no text."""
    buffer = io.StringIO()
    if rows:
        writer = csv.DictWriter(buffer, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return buffer.getvalue()


def as_html(page: Page, figures: Sequence[Figure]) -> str:
    """One page with every table and figure that needs nothing from elsewhere."""
    e = html.escape
    out = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width,initial-scale=1">',
        f"<title>{e(page.title)}</title><style>{STYLE}</style></head><body><h1>{e(page.title)}</h1>",
    ]
    if page.note:
        out.append(f'<p class="sub">{e(page.note)}</p>')
    for grid in page.grids:
        out.append(f'<h2>{e(grid.title)}</h2><div class="wrap"><table><thead><tr>')
        out += [f"<th>{e(name)}</th>" for name in grid.header]
        out.append("</tr></thead><tbody>")
        for row in grid.rows:
            kind = ' class="failed"' if _constant(row) else ""
            out.append(f"<tr{kind}>" + "".join(f"<td>{e(text)}</td>" for text in row) + "</tr>")
        out.append("</tbody></table></div>")
        out += [f'<p class="note">{e(note)}</p>' for note in grid.notes]
    for _, caption, png in figures:
        data = base64.b64encode(png).decode()
        out.append(f'<figure><img alt="{e(caption)}" src="data:image/png;base64,{data}">')
        out.append(f"<figcaption>{e(caption)}</figcaption></figure>")
    out.append("</body></html>")
    return "".join(out) + "\n"


def write(
    page: Page, table: str, figures: Callable[[], Sequence[Figure]], folder: Path, formats: Sequence[str]
) -> list[Path]:
    """Write ``NAME.md``, ``NAME.csv`` (which is ``table``) and ``NAME.html``, as far as asked for.

    The page holds the figures, which also lie beside it as PNG files; they are drawn for it alone. Returns what was
    written.
    """
    files: dict[str, bytes] = {}
    if "md" in formats:
        files[f"{page.name}.md"] = markdown(page).encode()
    if "csv" in formats:
        files[f"{page.name}.csv"] = table.encode()
    if "html" in formats:
        drawn = figures()
        files |= {name: png for name, _, png in drawn}
        files[f"{page.name}.html"] = as_html(page, drawn).encode()
    for name, content in files.items():
        write_atomic(folder / name, content)
    return [folder / name for name in files]
