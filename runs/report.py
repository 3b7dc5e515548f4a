"""The leaderboard as text for a terminal, Markdown, CSV, JSON, and one self-contained HTML page."""

from __future__ import annotations

import base64
import csv
import html
import io
import json
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runs.leaderboard import Row, Table, as_dicts
from runs.statistics import MeanSd
from runs.store import Record, write_atomic

if TYPE_CHECKING:
    from rich.console import Console

FORMATS = ("md", "csv", "json", "html")


@dataclass(frozen=True)
class Column:
    """A column: heading, how a row is written in it, and its rank where not all fit a terminal (0: always shown)."""

    heading: str
    text: Callable[[Row, Table], str]
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
        Column("Method", lambda row, _: row.method + (f" ({row.note})" if row.note else ""), left=True),
        Column("Sparsity", lambda row, _: f"{100 * row.ratio:.0f} %" if row.ratio else "0"),
        Column("Training", lambda row, _: row.training, left=True),
        Column("Error px" if keypoints else "Clean %", _clean),
        Column("Attacked ≤ %", lambda row, _: _share(row.attacked), 2),
        Column("Verified % [95 %]", _verified),
        Column("Δ dense", _versus, 3),
        Column("Holds/viol /unk/time-out", _counts, 5),
        Column("Seeds", _seeds, 1),
        Column("Params %", lambda row, _: _percent(row.parameters_left), 6),
        Column("FLOPs % nz/run", lambda row, _: f"{_percent(row.flops_nonzero)}/{_percent(row.flops_executed)}", 7),
        Column("Unstable ReLUs", lambda row, _: _plain(row.unstable, 0), 8),
        Column("s/image", lambda row, _: _seconds(row.seconds), 4),
        Column("Peak MB", lambda row, _: "–" if row.peak_mb is None else f"{row.peak_mb:,.0f}", 9),
    ]
    if table.comparable:
        found.append(Column("Paper", _paper))
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
    ("Sparsity", "share of the prunable weights (or channels) removed."),
    ("Clean / Error px", "accuracy on the certified images, or the mean distance of keypoints to the truth in pixels."),
    ("Attacked", "share that the strongest attack tried here could not break: an upper bound on what can be verified."),
    (
        "Verified",
        "share proved by the certifier (for classes: proved and right), mean ± standard deviation over seeds, with a "
        "95 % Clopper–Pearson interval over the test images. Seeds do not count as extra images.",
    ),
    (
        "Δ dense",
        "verified share minus that of the unpruned network with the same training, in points; p from a two-sided sign "
        "test over images, Holm-adjusted within the table.",
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
        training = None
        for row in table.rows:
            if not table.ranked and training not in (None, row.training):
                grid.add_section()
            training = row.training
            style = "red" if row.failed else ("dim" if row.method == "dense" else None)
            grid.add_row(*(escape(column.text(row, table)) for column in shown), style=style)
        console.print(grid)
        for line in notes(table):
            console.print(escape(line), style="red" if line.startswith("FAILED") else "dim", highlight=False)
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
    out += ["## Legend", "", *(f"* **{name}**: {text}" for name, text in LEGEND), ""]
    return "\n".join(out)


def as_csv(tables: Sequence[Table]) -> str:
    """One line per row with full-precision values and every column."""
    rows = as_dicts(tables)
    buffer = io.StringIO()
    if rows:
        writer = csv.DictWriter(buffer, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return buffer.getvalue()


def as_json(tables: Sequence[Table], records: Sequence[Record]) -> str:
    """Rows, and under ``keys`` the records from which they come."""
    content = {"rows": as_dicts(tables), "keys": sorted(str(record["key"]) for record in records)}
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


STYLE = """
body{font:15px/1.45 system-ui,sans-serif;margin:2rem auto;max-width:1500px;padding:0 1rem;color:#222}
h1{font-size:1.6rem}h2{font-size:1.15rem;margin:2.2rem 0 .2rem}
.sub,.note{color:#555;font-size:.9rem;margin:.15rem 0}.bad{color:#a40000}
.wrap{overflow-x:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums;margin:.5rem 0;font-size:.9rem}
th,td{padding:.28rem .45rem;text-align:right;white-space:nowrap;border-bottom:1px solid #ddd}
th{white-space:normal;vertical-align:bottom;border-bottom:2px solid #444;background:#f4f4f4;position:sticky;top:0}
td.l,th.l{text-align:left}tr.dense td{background:#f7f7f2}tr.failed td{background:#fdecea;color:#a40000}
.bar{display:inline-block;width:7rem;height:.6rem;background:#eee;margin-left:.5rem;position:relative;vertical-align:middle}
.bar i{position:absolute;top:0;bottom:0;left:0;background:#0072B2}
.bar b{position:absolute;top:-.15rem;bottom:-.15rem;height:.9rem;
border:1px solid #000;border-width:0 1px}
.bar b::before{content:"";position:absolute;left:0;right:0;top:50%;border-top:1px solid #000}
figure{margin:1.5rem 0}figure img{max-width:100%;height:auto}figcaption{color:#555;font-size:.9rem}
dt{font-weight:600}dd{margin:0 0 .3rem 1rem}
@media print{body{margin:0;max-width:none;font-size:11px}.wrap{overflow:visible}table{font-size:9px}}
"""


def _bar(row: Row) -> str:
    if row.verified is None or row.interval is None:
        return ""
    low, high = 100 * row.interval.low, 100 * row.interval.high
    return (
        f'<span class="bar"><i style="width:{100 * row.verified.mean:.2f}%"></i>'
        f'<b style="left:{low:.2f}%;width:{high - low:.2f}%"></b></span>'
    )


def as_html(tables: Sequence[Table], records: Sequence[Record], plots: Sequence[tuple[str, bytes]]) -> str:
    """One page that needs nothing from elsewhere: style inside, plots as data URIs."""
    e = html.escape
    out = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width,initial-scale=1">',
        f"<title>certprune leaderboard</title><style>{STYLE}</style></head><body>",
        "<h1>Does pruning make networks easier to certify?</h1>",
        f'<p class="sub">{len(records)} trained and certified networks, {len(tables)} tables.</p>',
    ]
    for table in tables:
        shown = columns(table)
        out.append(
            f'<h2>{e(table.title)}</h2><p class="sub">{e(caption(table))}</p><div class="wrap"><table><thead><tr>'
        )
        out += [f'<th class="l">{e(c.heading)}</th>' if c.left else f"<th>{e(c.heading)}</th>" for c in shown]
        out.append("</tr></thead><tbody>")
        for row in table.rows:
            kind = "failed" if row.failed else ("dense" if row.method == "dense" else "")
            out.append(f'<tr class="{kind}">')
            for column in shown:
                bar = _bar(row) if column.heading.startswith("Verified") else ""
                out.append(f"<td{' class=l' if column.left else ''}>{e(column.text(row, table))}{bar}</td>")
            out.append("</tr>")
        out.append("</tbody></table></div>")
        out += [f'<p class="note{" bad" if line.startswith("FAILED") else ""}">{e(line)}</p>' for line in notes(table)]
    for text, png in plots:
        data = base64.b64encode(png).decode()
        out.append(f'<figure><img alt="{e(text)}" src="data:image/png;base64,{data}">')
        out.append(f"<figcaption>{e(text)}</figcaption></figure>")
    out.append("<h2>How to read this</h2><dl>")
    out += [f"<dt>{e(name)}</dt><dd>{e(text)}</dd>" for name, text in LEGEND]
    out.append(f'</dl><h2>Made with</h2><p class="note">{e(environment_note(records))}</p></body></html>')
    return "".join(out) + "\n"


def environment_note(records: Sequence[Record]) -> str:
    """Devices and library versions behind the records, each named once."""
    found: dict[str, list[str]] = {}
    for record in records:
        environment: dict[str, Any] = record.get("environment", {})
        for name, value in environment.get("versions", {}).items():
            found.setdefault(str(name), [])
            if str(value) not in found[str(name)]:
                found[str(name)].append(str(value))
        device = environment.get("device")
        if device and device not in found.setdefault("device", []):
            found["device"].append(str(device))
    return (
        "; ".join(f"{name} {', '.join(values)}" for name, values in sorted(found.items())) or "no environment on record"
    )


def export(tables: Sequence[Table], records: Sequence[Record], folder: Path, formats: Sequence[str]) -> list[Path]:
    """Write ``leaderboard.<format>`` under ``folder`` for each format asked for.

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
        else:
            from runs import plots

            text = as_html(tables, records, plots.all_plots(tables))
        path = folder / f"leaderboard.{name}"
        write_atomic(path, text.encode())
        written.append(path)
    return written
