"""The plots of the report, as SVG. matplotlib is imported on first use, with no window system.

Colours are Okabe and Ito's colour-blind-safe palette; methods also differ by marker and trainings by line style, so the
plots read in black and white.
"""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from runs.leaderboard import Row, Table
from runs.statistics import clopper_pearson

COLOURS = ("#000000", "#E69F00", "#0072B2", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#8C6D31")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">", "p")  # 11 and 8 colours: 88 pairs before one comes again
LINES = ("-", "--", ":", "-.")
FILLS = ("full", "none", "left", "bottom", "right", "top")


def canvas(columns: int, rows: int, width: float, height: float, extra: float = 0.0) -> tuple[Any, Any]:
    """A figure and its axes (rows, columns), each `width` by `height` inches, with `extra` inches for what is below."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height * rows + extra), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def tiles(
    count: int, width: float = 4.4, height: float = 3.6, extra: float = 0.0, columns: int = 3
) -> tuple[Any, list[Any]]:
    """A figure of so many panels, at most `columns` beside each other; see `canvas`."""
    columns = min(count, columns)
    figure, axes = canvas(columns, -(-count // columns), width, height, extra)
    whole = axes.ravel().tolist()
    for axis in whole[count:]:
        axis.set_visible(False)
    return figure, whole[:count]


def _figure(tables: int) -> tuple[Any, list[Any]]:
    return tiles(tables, 4.2, 3.3, extra=0.9, columns=2 if tables == 4 else 3)


def png(figure: Any) -> bytes:
    """A figure as PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def svg(figure: Any) -> bytes:
    """A figure as SVG, the same bytes for the same content."""
    import matplotlib

    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "certprune"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def _styles(tables: Sequence[Table]) -> tuple[dict[str, int], dict[str, int]]:
    methods = {row.method: None for table in tables for row in table.rows if not row.failed}
    trainings = {row.training: None for table in tables for row in table.rows if not row.failed}
    first = sorted(methods, key=lambda name: (name != "dense", name))
    return {name: i for i, name in enumerate(first)}, {name: i for i, name in enumerate(sorted(trainings))}


def _legend(figure: Any, methods: dict[str, int], trainings: dict[str, int], *, lines: bool) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=COLOURS[i % len(COLOURS)], marker=MARKERS[i % len(MARKERS)], linestyle="none", label=name)
        for name, i in methods.items()
    ]
    for name, i in trainings.items():
        style: dict[str, Any] = {"linestyle": LINES[i % len(LINES)] if lines else "none"} | _fill("black", i)
        handles.append(Line2D([], [], color="black", marker="o", label=f"trained: {name}", **style))
    columns = 2 if figure.get_figwidth() < 5 else 4
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=8)


def _fill(colour: str, training: int) -> dict[str, str]:
    """How a mark is filled, by the number of its training: whole, not at all, or half of it."""
    fill = FILLS[training % len(FILLS)]
    if fill == "none":
        return {"markerfacecolor": "white"}
    return {"markerfacecolor": colour, "markerfacecoloralt": "white", "fillstyle": fill}


def _against_sparsity(
    tables: Sequence[Table], label: str, value: Callable[[Row], tuple[float, float, float]], log: bool
) -> bytes:
    methods, trainings = _styles(tables)
    figure, axes = _figure(len(tables))
    for axis, table in zip(axes, tables):
        for method, m in methods.items():
            for training, t in trainings.items():
                rows = [r for r in table.rows if not r.failed and r.method == method and r.training == training]
                rows.sort(key=lambda row: row.ratio)
                if not rows:
                    continue
                centres, lows, highs = zip(*(value(row) for row in rows))
                errors = [[c - low for c, low in zip(centres, lows)], [high - c for c, high in zip(centres, highs)]]
                colour = COLOURS[m % len(COLOURS)]
                # Methods at the same sparsity would hide each other's intervals: shift them a little.
                shift = (m - (len(methods) - 1) / 2) * 0.008
                axis.errorbar(
                    [row.ratio + shift for row in rows], centres, yerr=errors, color=colour,
                    marker=MARKERS[m % len(MARKERS)], linestyle=LINES[t % len(LINES)],
                    markersize=5, linewidth=1.2, elinewidth=0.8, capsize=2, **_fill(colour, t),
                )  # fmt: skip
        axis.set_title(textwrap.fill(table.title, 48), fontsize=8)
        axis.set_xlabel("sparsity (fraction removed)", fontsize=8)
        axis.set_ylabel(label, fontsize=8)
        if log:
            axis.set_yscale("log")
        else:
            axis.set_ylim(-3, 103)
        axis.tick_params(which="both", labelsize=8)
        axis.grid(alpha=0.25)
    _legend(figure, methods, trainings, lines=True)
    return svg(figure)


def verified_against_sparsity(tables: Sequence[Table]) -> bytes:
    """Verified share against the fraction removed, with 95 % intervals; one panel per table."""

    def value(row: Row) -> tuple[float, float, float]:
        assert row.verified is not None
        assert row.interval is not None
        return 100 * row.verified.mean, 100 * row.interval.low, 100 * row.interval.high

    return _against_sparsity(tables, "verified (%)", value, log=False)


def time_against_sparsity(tables: Sequence[Table]) -> bytes:
    """Seconds of certification per image against the fraction removed (logarithmic)."""

    def value(row: Row) -> tuple[float, float, float]:
        seconds = max(row.seconds or 0.0, 1e-6)
        return seconds, seconds, seconds

    return _against_sparsity(tables, "certification (s per image)", value, log=True)


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points (cost, gain) that no other beats in one and equals in the other, by rising cost.

    Of equal points the first one stands for all.
    """
    chosen: list[int] = []
    for i in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1])):
        if not chosen or points[i][1] > points[chosen[-1]][1]:
            chosen.append(i)
    return chosen


Place = tuple[float, float, float]
"""A value with the two ends of its interval."""


def _pareto(
    tables: Sequence[Table],
    label: Callable[[Table], str],
    place: Callable[[Table, Row], Place | None],
    less_is_better: Callable[[Table], bool],
    spread: float = 0.0,
) -> bytes:
    """The verified share against something else with intervals, and the front that no other network beats in both.

    ``spread`` shifts the methods against each other, so that those at the same place do not hide each other.
    """
    methods, trainings = _styles(tables)
    figure, axes = _figure(len(tables))
    for axis, table in zip(axes, tables):
        points: list[tuple[float, float]] = []
        for row in table.rows:
            if row.verified is None or row.interval is None or (at := place(table, row)) is None:
                continue
            m, t = methods[row.method], trainings[row.training]
            x, left, right = at
            colour = COLOURS[m % len(COLOURS)]
            y, low, high = 100 * row.verified.mean, 100 * row.interval.low, 100 * row.interval.high
            shift = (m - (len(methods) - 1) / 2) * spread
            axis.errorbar(
                x + shift, y, xerr=[[x - left], [right - x]], yerr=[[y - low], [high - y]],
                color=colour, marker=MARKERS[m % len(MARKERS)], markersize=4 + 4 * (1 - row.ratio), elinewidth=0.6,
                capsize=1.5, linestyle="none", **_fill(colour, t),
            )  # fmt: skip
            points.append((x, y))
        sign = 1 if less_is_better(table) else -1
        best = front([(sign * x, y) for x, y in points])
        axis.plot(*zip(*(points[i] for i in best)), color="0.75", linewidth=4, drawstyle="steps-post", zorder=0)
        axis.set_ylim(-3, 103)
        axis.set_title(textwrap.fill(table.title, 48), fontsize=8)
        axis.set_xlabel(label(table), fontsize=8)
        axis.set_ylabel("verified (%)", fontsize=8)
        axis.tick_params(which="both", labelsize=8)
        axis.grid(alpha=0.25)
    _legend(figure, methods, trainings, lines=False)
    return svg(figure)


def _clean(table: Table, row: Row) -> Place | None:
    if row.clean is None:
        return None
    mean = row.clean.mean
    if table.task == "keypoints":
        sd = row.clean.sd or 0.0
        return mean, mean - sd, mean + sd
    interval = clopper_pearson(min(max(mean, 0.0), 1.0) * row.images, row.images)
    return 100 * mean, 100 * interval.low, 100 * interval.high


def clean_against_verified(tables: Sequence[Table]) -> bytes:
    """Clean accuracy (or keypoint error) against the verified share; larger marks are denser networks."""

    def label(table: Table) -> str:
        return "mean keypoint error (px)" if table.task == "keypoints" else "clean accuracy (%)"

    return _pareto(tables, label, _clean, lambda table: table.task == "keypoints")


def parameters_against_verified(tables: Sequence[Table]) -> bytes:
    """What is left of the parameters against the verified share."""

    def place(table: Table, row: Row) -> Place | None:
        return None if row.parameters_left is None else (100 * row.parameters_left,) * 3

    return _pareto(tables, lambda table: "parameters left (%)", place, lambda table: True, spread=0.7)


def with_results(tables: Sequence[Table]) -> list[Table]:
    """Those of the tables in which a row is finished."""
    return [table for table in tables if any(not row.failed for row in table.rows)]


def all_plots(tables: Sequence[Table]) -> list[tuple[str, bytes]]:
    """The plots of a report as (caption, SVG), or nothing when no row is finished."""
    shown = with_results(tables)
    if not shown:
        return []
    return [
        ("Verified against sparsity; bars are 95 % intervals over the test images.", verified_against_sparsity(shown)),
        (
            "Clean against verified, with 95 % intervals over the test images (keypoint errors: ± one standard "
            "deviation over seeds); larger marks are denser networks. No network beats those on the grey line in both.",
            clean_against_verified(shown),
        ),
        (
            "Parameters left against verified, with 95 % intervals. No network beats those on the grey line in both.",
            parameters_against_verified(shown),
        ),
        ("Time of certification per image.", time_against_sparsity(shown)),
    ]


def curves(lines: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]]) -> bytes:
    """Training loss and validation score epoch by epoch.

    Args:
        lines: for every label the histories of its seeds: dictionaries with ``metrics`` and ``validation``, one an
            epoch. The mean over seeds is drawn thick, each seed thin.
    """
    from matplotlib.ticker import MaxNLocator

    figure, axes = _figure(2)
    for axis, (where, name, label) in zip(
        axes, (("metrics", "loss", "training loss"), ("validation", "score", "validation score"))
    ):
        for number, (text, seeds) in enumerate(lines.items()):
            colour, style = COLOURS[number % len(COLOURS)], LINES[number // len(COLOURS) % len(LINES)]
            values = [[row[where].get(name) for row in seed] for seed in seeds]
            told = [seed for seed in values if any(value is not None for value in seed)]
            known = [[math.nan if value is None else float(value) for value in seed] for seed in told]
            if not known:
                continue
            for seed in known if len(known) > 1 else ():
                axis.plot(range(1, len(seed) + 1), seed, color=colour, linestyle=style, linewidth=0.5, alpha=0.5)
            mean = [sum(epoch) / len(known) for epoch in zip(*known)]
            axis.plot(range(1, len(mean) + 1), mean, color=colour, linestyle=style, linewidth=1.4, label=text)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.set_xlabel("epoch, over all phases", fontsize=8)
        axis.set_ylabel(label, fontsize=8)
        axis.tick_params(which="both", labelsize=8)
        axis.grid(alpha=0.25)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=7)
    return svg(figure)
