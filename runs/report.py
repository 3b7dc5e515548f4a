"""The leaderboard as text for a terminal, Markdown, CSV and JSON, and as files; its page is made by ``report_page``."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from runs import ranking
from runs.grids import csv_text
from runs.leaderboard import Row, Table, as_dicts
from runs.statistics import MeanSd
from runs.store import Record, write_atomic

if TYPE_CHECKING:
    from rich.console import Console

FORMATS = ("md", "csv", "json", "html", "svg")


@dataclass(frozen=True)
class Column:
    """A column: heading, how a row is written in it, and its rank where not all fit a terminal (0: always shown).

    ``value`` is what rows are sorted by on the page, None where a row has nothing in this column.
    """

    heading: str
    text: Callable[[Row, Table], str]
    value: Callable[[Row], float | str | None]
    rank: int = 0
    left: bool = False

    @property
    def lines(self) -> list[str]:
        """The heading, broken into short lines."""
        return textwrap.wrap(self.heading, 13)

    def width(self, table: Table) -> int:
        """Characters that it takes on a terminal, with its frame."""
        lines = [*self.lines, *(self.text(row, table) for row in table.rows)]
        return max(map(len, lines)) + 3


def _mean(spread: MeanSd | None) -> float | None:
    return None if spread is None else spread.mean


def _share(spread: MeanSd | None, digits: int = 1) -> str:
    if spread is None:
        return "–"
    text = f"{100 * spread.mean:.{digits}f}"
    return text if spread.sd is None else f"{text} ±{100 * spread.sd:.{digits}f}"


def _plain(spread: MeanSd | None, digits: int) -> str:
    if spread is None:
        return "–"
    text = f"{spread.mean:,.{digits}f}"
    return text if spread.sd is None else f"{text} ±{spread.sd:,.{digits}f}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


def _seconds(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.2g}" if value < 10 else f"{value:.0f}"


def _method(row: Row, table: Table) -> str:
    return row.method + (f" ({row.note})" if row.note else "")


def _clean(row: Row, table: Table) -> str:
    return _plain(row.clean, 2) if table.task == "keypoints" else _share(row.clean)


def _verified(row: Row, table: Table) -> str:
    if row.verified is None or row.interval is None:
        return "FAILED"
    return f"{_share(row.verified)} [{100 * row.interval.low:.0f}, {100 * row.interval.high:.0f}]"


def _counts(row: Row, table: Table) -> str:
    counts = row.counts
    return "–" if counts is None else f"{counts.holds}/{counts.violated}/{counts.unknown}/{counts.timeout}"


def _versus(row: Row, table: Table) -> str:
    if row.versus_dense_difference is None or row.versus_dense_p is None:
        return "–"
    p = f"p={row.versus_dense_p:.2g}" if row.versus_dense_p >= 0.001 else "p<0.001"
    return f"{100 * row.versus_dense_difference:+.1f} ({p})"


def _paper(row: Row, table: Table) -> str:
    printed = row.printed
    if printed["printed"] is None:
        return "–"
    if not printed["comparable"]:
        return "n/c"
    return f"{100 * printed['printed']:.1f} (Δ {100 * printed['difference']:+.1f})"


def _seeds(row: Row, table: Table) -> str:
    return f"{len(row.seeds)}" + (f" ({len(row.errors)} failed)" if row.errors else "")


def columns(table: Table) -> list[Column]:
    """The columns of a table: those in which nothing would stand are left out."""
    keypoints = table.task == "keypoints"
    found = [
        Column("Method", _method, lambda row: row.method, left=True),
        Column("Sparsity", lambda row, _: f"{100 * row.ratio:.0f} %" if row.ratio else "0", lambda row: row.ratio),
        Column("Training", lambda row, _: row.training, lambda row: row.training, left=True),
        Column("Error px" if keypoints else "Clean %", _clean, lambda row: _mean(row.clean)),
        Column("Attacked ≤ %", lambda row, _: _share(row.attacked), lambda row: _mean(row.attacked), 2),
        Column("Verified % [95 %]", _verified, lambda row: _mean(row.verified)),
        Column("Sampled %", lambda row, _: _share(row.sampled), lambda row: _mean(row.sampled), 2),
        Column("Δ dense", _versus, lambda row: row.versus_dense_difference, 3),
        Column("Holds/viol /unk/time-out", _counts, lambda row: row.counts.holds if row.counts else None, 5),
        Column("Seeds", _seeds, lambda row: len(row.seeds), 1),
        Column("Params %", lambda row, _: _percent(row.parameters_left), lambda row: row.parameters_left, 6),
        Column(
            "FLOPs % nz/run", lambda row, _: f"{_percent(row.flops_nonzero)}/{_percent(row.flops_executed)}",
            lambda row: row.flops_nonzero, 7,
        ),
        Column("Unstable ReLUs", lambda row, _: _plain(row.unstable, 0), lambda row: _mean(row.unstable), 8),
        Column("s/image", lambda row, _: _seconds(row.seconds), lambda row: row.seconds, 4),
        Column(
            "Peak MB", lambda row, _: "–" if row.peak_mb is None else f"{row.peak_mb:,.0f}", lambda row: row.peak_mb, 9
        ),
    ]  # fmt: skip
    if all(row.sampled is None for row in table.rows):
        found = [column for column in found if column.heading != "Sampled %"]
    if table.comparable:
        found.append(Column("Paper", _paper, lambda row: row.printed["printed"]))
    return found


def fitting(table: Table, width: int) -> list[Column]:
    """The columns that fit into ``width`` characters, by rank, in the order of the table."""
    every = columns(table)
    left = width - 1
    chosen = []
    for column in sorted(every, key=lambda column: column.rank):
        left -= column.width(table)
        if column.rank and left < 0:
            break
        chosen.append(column.heading)
    return [column for column in every if column.heading in chosen]


def caption(table: Table) -> str:
    """What the rows share: certifier, images, statement, and what kind of soundness the verdicts have."""
    verifier = table.verifier
    images = max((row.images for row in table.rows), default=verifier.images)
    if table.task == "keypoints":
        statement = f"no keypoint moves by more than {verifier.delta:g} px"
    else:
        statement = "the class stays right"
    parts = [f"certifier {verifier.method}", f"first {images} test images", f"statement: {statement}"]
    if verifier.seconds is not None:
        parts.append(f"{verifier.seconds:g} s an image")
    if table.soundness:
        parts.append("soundness: " + ", ".join(table.soundness))
    return " · ".join(parts)


def notes(table: Table) -> list[str]:
    """Lines below a table: ranking, papers, failures."""
    lines = [table.ranking_note]
    if table.paper_note:
        lines.append(table.paper_note)
    lines += [
        f"Paper, {row.method} {row.ratio:g} {row.training}: n/c, {row.printed['reason']}."
        for row in table.rows
        if table.comparable and row.printed["printed"] is not None and not row.printed["comparable"]
    ]
    lines += [f"FAILED {row.method} {row.ratio:g} {row.training}: {text}" for row in table.rows for text in row.errors]
    return lines


LEGEND: tuple[tuple[str, str], ...] = (
    ("Sparsity", "share of the prunable weights removed, or of channels, or the share that channels are matched to."),
    ("Clean / Error px", "accuracy on the certified images, or the mean distance of keypoints to the truth in pixels."),
    ("Attacked", "share that the strongest attack tried here could not break: an upper bound on what can be verified."),
    (
        "Verified",
        "share proved by the certifier (for classes: proved and right), mean ± standard deviation over seeds, with a "
        "95 % Clopper–Pearson interval over the test images. Seeds do not count as extra images.",
    ),
    (
        "Sampled",
        "share that is right and certified by random draws: at 95 % confidence (Clopper–Pearson) at most 1 % of them "
        "change the label. Weaker than verified.",
    ),
    ("Place", ranking.NOTE),
    (
        "Δ dense",
        "verified share minus that of the unpruned network with the same training, in points; p from a two-sided sign "
        "test over images, Holm-adjusted over the rows of the same training.",
    ),
    ("Holds/viol /unk/time-out", "verdicts summed over seeds; unknown means the certifier could not decide."),
    (
        "Params, FLOPs",
        "what is left, in % of dense; nz: multiply-adds with non-zero weights, run: executed after removal.",
    ),
    ("Unstable ReLUs", "units per image whose sign the bounds leave open: what makes certification hard."),
    ("n/c", "not comparable with the printed number: another network, data set, radius, budget or verifier."),
)


def print_terminal(tables: Sequence[Table], console: Console, *, legend: bool = True) -> None:
    """Print the leaderboards; columns that do not fit the terminal's width are left to the exported files."""
    from rich.markup import escape
    from rich.table import Table as RichTable

    hidden: set[str] = set()
    for table in tables:
        grid = RichTable(
            title=escape(table.title), caption=escape(caption(table)), title_justify="left", caption_justify="left"
        )
        shown = fitting(table, console.width)
        hidden |= {column.heading for column in columns(table)} - {column.heading for column in shown}
        for column in shown:
            grid.add_column("\n".join(column.lines), justify="left" if column.left else "right", no_wrap=True)
        block: str | None = None
        for i, row in enumerate(table.rows):
            own = None if row.ranked else row.training  # ordered rows stand together, whatever their training
            if i and own != block:
                grid.add_section()
            block = own
            style = "red" if row.failed else ("dim" if row.method == "dense" else None)
            grid.add_row(*(escape(column.text(row, table)) for column in shown), style=style)
        console.print(grid)
        for line in notes(table):
            console.print(escape(line), style="red" if line.startswith("FAILED") else "dim", highlight=False)
        for found in table.rankings:
            console.print(ranking.grid(found))
        console.print()
    if legend and tables:
        used = {column.heading for table in tables for column in columns(table)} - hidden
        for name, text in LEGEND:
            if _legend_applies(name, used):
                console.print(f"[bold]{escape(name)}[/bold]: {escape(text)}", highlight=False)
        if hidden:
            names = ", ".join(column.heading for column in columns(tables[0]) if column.heading in hidden)
            console.print(f"In the exported files or a wider terminal: {escape(names)}.", style="dim", highlight=False)


def _legend_applies(name: str, used: set[str]) -> bool:
    probes = {
        "Clean / Error px": ("Clean %", "Error px"),
        "Attacked": ("Attacked ≤ %",),
        "Verified": ("Verified % [95 %]",),
        "Params, FLOPs": ("Params %", "FLOPs % nz/run"),
        "Sampled": ("Sampled %",),
        "Place": ("Method",),
        "n/c": ("Method",),
    }
    return any(heading in used for heading in probes.get(name, (name,)))


def markdown(tables: Sequence[Table]) -> str:
    """The leaderboards as GitHub-flavoured Markdown."""
    out = ["# Leaderboard", ""]
    for table in tables:
        shown = columns(table)
        out += [f"## {table.title}", "", caption(table), ""]
        out.append("| " + " | ".join(column.heading for column in shown) + " |")
        out.append("|" + "|".join(":--" if column.left else "--:" for column in shown) + "|")
        for row in table.rows:
            out.append("| " + " | ".join(column.text(row, table).replace("|", "\\|") for column in shown) + " |")
        out += ["", *(f"* {line}" for line in notes(table)), ""]
        out += [line for own in table.rankings for line in ranking.markdown(own)]
    out += ["## Legend", "", *(f"* **{name}**: {text}" for name, text in LEGEND), ""]
    return "\n".join(out)


def as_csv(tables: Sequence[Table]) -> str:
    """One line per row with full-precision values and every column."""
    return csv_text(as_dicts(tables))


def as_json(tables: Sequence[Table], records: Sequence[Record]) -> str:
    """Rows, and under ``keys`` the records from which they come."""
    content = {"rows": as_dicts(tables), "keys": sorted(str(record["key"]) for record in records)}
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def export(
    tables: Sequence[Table],
    records: Sequence[Record],
    folder: Path,
    formats: Sequence[str],
    *,
    data_dir: Path | None = None,
) -> list[Path]:
    """Write ``leaderboard.<format>`` under ``folder`` for each format asked for; "svg" is verified against sparsity.

    The page also shows what lies beside the records in ``folder`` (training curves, verdicts of single images), and the
    first test images where the data set can be had from ``data_dir`` (or $CERTPRUNE_DATA).

    Raises:
        ValueError: an unknown format.
        StoreError: the folder cannot be written.
    """
    unknown = [name for name in formats if name not in FORMATS]
    if unknown:
        raise ValueError(f"unknown export format {unknown[0]!r}; known: {', '.join(FORMATS)}")
    written = []
    for name in dict.fromkeys(formats):
        if name == "md":
            text = markdown(tables)
        elif name == "csv":
            text = as_csv(tables)
        elif name == "json":
            text = as_json(tables, records)
        elif name == "svg":
            from runs import plots

            if not (finished := plots.with_results(tables)):
                continue
            text = plots.verified_against_sparsity(finished).decode()
        else:
            from runs import report_page

            text = report_page.make(tables, records, folder, data_dir)
        path = folder / f"leaderboard.{name}"
        write_atomic(path, text.encode())
        written.append(path)
    return written
