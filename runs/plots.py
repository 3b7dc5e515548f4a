"""The plots of the report, as PNG bytes. matplotlib is imported on first use, with no window system.

Colours are Okabe and Ito's colour-blind-safe palette; methods also differ by marker and trainings by line style, so the
plots read in black and white.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

from runs.leaderboard import Row, Table

COLOURS = ("#000000", "#E69F00", "#0072B2", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#8C6D31")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
LINES = ("-", "--", ":", "-.")


def _figure(panels: int) -> tuple[Any, list[Any]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(panels, 3)
    lines = -(-panels // columns)
    figure = Figure(figsize=(4.2 * columns, 3.3 * lines + 0.9), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(lines, columns, squeeze=False).ravel().tolist()
    for axis in axes[panels:]:
        axis.set_visible(False)
    return figure, axes[:panels]


def png(figure: Any) -> bytes:
    """A figure as PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
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
        face = "black" if i == 0 else "white"
        style: dict[str, Any] = {"linestyle": LINES[i % len(LINES)]} if lines else {"linestyle": "none"}
        handles.append(
            Line2D([], [], color="black", marker="o", markerfacecolor=face, label=f"trained: {name}", **style)
        )
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=8)


def _face(method: int, training: int) -> str:
    return COLOURS[method % len(COLOURS)] if training == 0 else "white"


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
                # Methods at the same sparsity would hide each other's intervals: shift them a little.
                shift = (m - (len(methods) - 1) / 2) * 0.008
                axis.errorbar(
                    [row.ratio + shift for row in rows], centres, yerr=errors, color=COLOURS[m % len(COLOURS)],
                    marker=MARKERS[m % len(MARKERS)], markerfacecolor=_face(m, t), linestyle=LINES[t % len(LINES)],
                    markersize=5, linewidth=1.2, elinewidth=0.8, capsize=2,
                )  # fmt: skip
        axis.set_title(table.title, fontsize=8)
        axis.set_xlabel("sparsity (fraction removed)", fontsize=8)
        axis.set_ylabel(label, fontsize=8)
        if log:
            axis.set_yscale("log")
        else:
            axis.set_ylim(-3, 103)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.25)
    _legend(figure, methods, trainings, lines=True)
    return png(figure)


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


def clean_against_verified(tables: Sequence[Table]) -> bytes:
    """Clean accuracy (or keypoint error) against the verified share; larger marks are denser networks."""
    methods, trainings = _styles(tables)
    figure, axes = _figure(len(tables))
    for axis, table in zip(axes, tables):
        keypoints = table.task == "keypoints"
        for row in table.rows:
            if row.clean is None or row.verified is None:
                continue
            m, t = methods[row.method], trainings[row.training]
            axis.scatter(
                row.clean.mean if keypoints else 100 * row.clean.mean, 100 * row.verified.mean,
                s=20 + 80 * (1 - row.ratio), marker=MARKERS[m % len(MARKERS)], linewidths=1.2,
                facecolors=_face(m, t), edgecolors=COLOURS[m % len(COLOURS)],
            )  # fmt: skip
        if not keypoints:
            low = min(axis.get_xlim()[0], axis.get_ylim()[0])
            axis.axline((100, 100), slope=1, color="0.7", linewidth=0.8)
            axis.set_xlim(left=low, right=103)
        axis.set_ylim(bottom=-3, top=103)
        axis.set_title(table.title, fontsize=8)
        axis.set_xlabel("mean keypoint error (px)" if keypoints else "clean accuracy (%)", fontsize=8)
        axis.set_ylabel("verified (%)", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.25)
    _legend(figure, methods, trainings, lines=False)
    return png(figure)


def all_plots(tables: Sequence[Table]) -> list[tuple[str, bytes]]:
    """The plots of a report as (caption, PNG bytes), or nothing when no row is finished."""
    shown = [table for table in tables if any(not row.failed for row in table.rows)]
    if not shown:
        return []
    return [
        ("Verified against sparsity; bars are 95 % intervals over the test images.", verified_against_sparsity(shown)),
        ("Clean against verified; larger marks are denser networks.", clean_against_verified(shown)),
        ("Time of certification per image.", time_against_sparsity(shown)),
    ]
