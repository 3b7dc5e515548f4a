"""The report as one HTML page that needs nothing from elsewhere: tables that sort, plots, methods, sample images.

Style, script and pictures are inside, and the page forbids itself to fetch anything. Without scripts, and on paper, it
shows the same.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from runs import plots, ranking, report_methods, report_samples
from runs.leaderboard import Row, Table
from runs.report import LEGEND, caption, columns, notes
from runs.report_methods import MethodPage, Settings, Setup
from runs.report_samples import Sample, Strip
from runs.report_style import SCRIPT, STYLE
from runs.store import Record

TITLE = "Does pruning make networks easier to certify?"
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
MAX_LAYERS = 60
"""Layers of one network in a table of masks; the rest is summed up in a line."""

_e = html.escape


def make(tables: Sequence[Table], records: Sequence[Record], folder: Path, data_dir: Path | None = None) -> str:
    """The page of a results folder.

    Args:
        tables: leaderboards of the records.
        records: as read, runs that are recorded state by state in one piece.
        folder: where curves and verdicts of single images lie beside the records; what is not there is left out.
        data_dir: where data sets lie.
    """
    samples = report_samples.strips(tables, records, folder, data_dir)
    return as_html(tables, records, plots.all_plots(tables), report_methods.pages(records, folder), samples)


def as_html(
    tables: Sequence[Table],
    records: Sequence[Record],
    figures: Sequence[tuple[str, bytes]],
    methods: Sequence[MethodPage] = (),
    samples: Sequence[Strip] = (),
) -> str:
    """The page from its parts; ``figures`` are (caption, SVG)."""
    sections = [
        ("leaderboards", "Leaderboards", [_leaderboard(table) for table in tables]),
        ("plots", "Plots", [figure(text, svg) for text, svg in figures]),
        ("samples", "Sample images", [_strip(strip) for strip in samples]),
        ("reading", "How to read this", [_legend()]),
        ("made-with", "Made with", [_made_with(records)]),
    ]
    shown = [(name, title, parts) for name, title, parts in sections if parts]
    at = next((i for i, (name, _, _) in enumerate(shown) if name in ("samples", "reading")), len(shown))
    shown[at:at] = [(_anchor(page.name), f"Method: {page.name}", [_method(page)]) for page in methods]
    out = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width,initial-scale=1">',
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
        f"<title>certprune leaderboard</title><style>{STYLE}</style></head><body><main>",
        f'<h1>{TITLE}</h1><p class="sub">{_extent(tables, records)}</p><nav aria-label="Sections">',
        " ".join(f'<a href="#{name}">{_e(title)}</a>' for name, title, _ in shown),
        "</nav>",
    ]
    for name, title, parts in shown:
        out += [f'<section id="{name}"><h2>{_e(title)}</h2>', *parts, "</section>"]
    out.append(f"</main><script>{SCRIPT}</script></body></html>")
    return "".join(out) + "\n"


def _extent(tables: Sequence[Table], records: Sequence[Record]) -> str:
    failed = sum(record["status"] != "done" for record in records)
    seeds = sorted({record["cell"]["seed"] for record in records})
    parts = [_count(len(records), "trained and certified network"), _count(len(tables), "table")]
    parts.append(f"seed{'s' if len(seeds) != 1 else ''} {', '.join(map(str, seeds))}")
    if failed:
        parts.append(f"{failed} failed, shown with their errors")
    return "; ".join(parts) + "."


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' if number != 1 else ''}"


def _anchor(name: str) -> str:
    return "method-" + "".join(c if c.isalnum() else "-" for c in name)


def figure(text: str, svg: bytes) -> str:
    """A figure with its caption, as a data URI."""
    source = f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}"
    return f'<figure><img alt="{_e(text)}" src="{source}"><figcaption>{_e(text)}</figcaption></figure>'


# --- leaderboards ---------------------------------------------------------------------------------------------------
def _leaderboard(table: Table) -> str:
    shown = columns(table)
    out = [
        f'<h3>{_e(table.title)}</h3><p class="sub">{_e(caption(table))}</p>',
        '<div class="wrap"><table class="sortable"><thead><tr>',
        *(f'<th scope="col"{_side(c.left)}>{_e(c.heading)}</th>' for c in shown),
        "</tr></thead><tbody>",
    ]
    for row in table.rows:
        kind = "failed" if row.failed else ("dense" if row.method == "dense" else "")
        out.append(f'<tr class="{kind}">')
        for column in shown:
            bar = _interval(row) if column.heading.startswith("Verified") else ""
            value = column.value(row)
            key = "" if value is None else f' data-v="{_e(str(value))}"'
            out.append(f"<td{_side(column.left)}{key}>{_e(column.text(row, table))}{bar}</td>")
        out.append("</tr>")
    out.append("</tbody></table></div>")
    out += [f'<p class="note{" bad" if line.startswith("FAILED") else ""}">{_e(line)}</p>' for line in notes(table)]
    out += [ranking.page(own) for own in table.rankings]
    return "".join(out)


def _side(left: bool) -> str:
    return ' class="l"' if left else ""


def _interval(row: Row) -> str:
    if row.verified is None or row.interval is None:
        return ""
    low, high = 100 * row.interval.low, 100 * row.interval.high
    return (
        f'<span class="bar" aria-hidden="true"><i style="width:{100 * row.verified.mean:.2f}%"></i>'
        f'<b style="left:{low:.2f}%;width:{high - low:.2f}%"></b></span>'
    )


def _table(heading: Sequence[str], rows: Iterable[Sequence[str]], text: str, *, kind: str = "") -> str:
    """A table whose first column names its rows; cells are HTML."""
    head = "".join(f'<th scope="col"{_side(i == 0)}>{_e(name)}</th>' for i, name in enumerate(heading))
    body = "".join(
        f'<tr><th scope="row" class="l">{first}</th>{"".join(f"<td>{cell}</td>" for cell in rest)}</tr>'
        for first, *rest in rows
    )
    inside = f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody>"
    table = f'<table class="{kind}" aria-label="{_e(text)}">{inside}</table>'
    return f'<p class="sub">{_e(text)}</p><div class="wrap">{table}</div>'


# --- methods --------------------------------------------------------------------------------------------------------
def _method(page: MethodPage) -> str:
    return "".join(_setup(setup) for setup in page.setups)


def _setup(setup: Setup) -> str:
    out = [f"<h3>{_e(setup.where)}</h3>"]
    if setup.common:
        out.append(f'<p class="sub">Settings: {_e(_listed(setup.common))}.</p>')
    out += [f'<p class="sub">{_e(label)}: {_e(_listed(own))}.</p>' for label, own in setup.differing]
    out += [f'<p class="note bad">Predicts a constant: {_e(text)}.</p>' for text in setup.collapsed]
    if setup.histories:
        text = f"Training on {setup.where}: thick lines are means over seeds."
        out.append(figure(text, plots.curves(setup.histories)))
    if setup.kept:
        out.append(_masks(setup))
    if setup.unstable:
        out.append(_unstable(setup))
    return "".join(out)


def _listed(own: Settings) -> str:
    """Settings by what they belong to: "epochs 10, batch size 64; training: lr 0.003; method: rounds 5"."""
    groups: dict[str, list[str]] = {}
    for name, value in own:
        owner, _, field = name.rpartition(": ")
        groups.setdefault(owner, []).append(f"{field} {value}")
    return "; ".join((f"{owner}: " if owner else "") + ", ".join(items) for owner, items in groups.items())


def _masks(setup: Setup) -> str:
    layers = list(dict.fromkeys(name for kept in setup.kept for name in kept.layers))
    heading = ["Layer", *(kept.label + (", channels" if kept.structured else "") for kept in setup.kept)]
    rows = [
        [_e(name), *(_share(kept.layers.get(name)) for kept in setup.kept)] for name in layers[:MAX_LAYERS]
    ]  # fmt: skip
    if len(layers) > MAX_LAYERS:
        rows.append([f"{len(layers) - MAX_LAYERS} further layers", *("" for _ in setup.kept)])
    rows.append(["all layers", *(_share(kept.density) for kept in setup.kept)])
    return _table(heading, rows, "Share of the weights that each layer keeps, in %, mean over seeds.")


def _share(value: float | None) -> str:
    if value is None:
        return "–"
    return f'{100 * value:.1f}<span class="bar s" aria-hidden="true"><i style="width:{100 * value:.2f}%"></i></span>'


def _unstable(setup: Setup) -> str:
    labels = list(dict.fromkeys(label for found in setup.unstable.values() for label in found))

    def cell(found: Mapping[str, Any], label: str) -> str:
        spread = found.get(label)
        if spread is None:
            return "–"
        return f"{spread.mean:,.1f}" + ("" if spread.sd is None else f" ±{spread.sd:,.1f}")

    rows = [[_e(name), *(cell(found, label) for label in labels)] for name, found in setup.unstable.items()]
    return _table(["Network", *labels], rows, "Unstable ReLUs per image, mean ± standard deviation over seeds.")


# --- samples --------------------------------------------------------------------------------------------------------
def _strip(strip: Strip) -> str:
    table = strip.table
    heading = ["Test image", *(f"{index}" for index in strip.indices)]
    rows = []
    if strip.originals:
        truth = strip.truth or ("",) * len(strip.indices)
        pictures = zip(strip.originals, truth, strip.indices)
        rows.append(
            ["unperturbed", *(f"{_picture(png, f'Test image {index}')}{_e(text)}" for png, text, index in pictures)]
        )
    rows += [
        [_e(label), *(_sample(one, table, index) for one, index in zip(samples, strip.indices))]
        for label, samples in strip.networks
    ]
    what = "margin, in pixels left of δ" if table.task == "keypoints" else "certified margin of the true class"
    text = f"{table.title}: the first test images, verdict, {what}, and the worst parameter t with the image there."
    note = f'<p class="note">{_e(strip.note)}</p>' if strip.note else ""
    return _table(heading, rows, text, kind="samples") + note


def _sample(one: Sample, table: Table, index: int) -> str:
    out = ""
    if one.picture is not None:
        out += _picture(one.picture, f"Test image {index} where the network does worst")
    out += f'<span class="{_e(one.verdict)}">{_e(one.verdict)}</span>'
    if one.wrong:
        out += "<br>wrong from the start"
    if one.lower is not None and one.verdict != "violated":
        out += f"<br>≥ {one.lower:.3g}"
    if one.at is not None:
        out += f"<br>t = {', '.join(f'{t:+.3g}' if t else '0' for t in one.at)}"
    return out


def _picture(png: bytes, text: str) -> str:
    return f'<img alt="{_e(text)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


# --- the end --------------------------------------------------------------------------------------------------------
def _legend() -> str:
    entries = "".join(f"<dt>{_e(name)}</dt><dd>{_e(text)}</dd>" for name, text in LEGEND)
    return f"<dl>{entries}</dl>"


def environment(records: Iterable[Record]) -> dict[str, list[str]]:
    """Devices and library versions behind the records, each named once, by rising name."""
    found: dict[str, list[str]] = {}
    for record in records:
        own: dict[str, Any] = record.get("environment", {})
        named = [(str(name), str(value)) for name, value in own.get("versions", {}).items()]
        named += [(name, str(own[name])) for name in ("device", "threads") if own.get(name)]
        for name, value in named:
            if value not in found.setdefault(name, []):
                found[name].append(value)
    return dict(sorted(found.items()))


def _made_with(records: Sequence[Record]) -> str:
    rows = [[_e(name), _e(", ".join(values))] for name, values in environment(records).items()]
    if not rows:
        return '<p class="note">No environment on record.</p>'
    seconds = sum(record.get("timing", {}).get("seconds", 0.0) for record in records)
    rows.append(["time of all cells together", f"{seconds / 60:,.1f} min"])
    return _table(["What", "On record"], rows, "Hardware and versions of all records.")
