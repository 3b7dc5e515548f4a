"""The figures of the NRSLoss suite as PNG bytes, from records alone. matplotlib is imported on first use.

Figure 2 shows the penalties themselves and needs no record. 4: unstable ReLUs, 6: verified, 8: instability, each
against pruning steps. 7: time and memory of structured pruning. 9: fine-tuning against rewinding. 10: seeds.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from runs import nrs_records
from runs.nrs_lines import Line, Study, verified
from runs.plots import COLOURS, LINES, MARKERS, png, tiles
from runs.statistics import clopper_pearson

REWINDINGS = ("imp", "imp-late", "imp-finetune", "imp-finetune-frozen", "imp-aliased")


def all_figures(studies: Sequence[Study]) -> list[tuple[str, str, bytes]]:
    """(file name, caption, PNG bytes) of every figure that the records allow."""
    found = [
        ("nrs-figure2.png", "RSLoss and NRSLoss of a ReLU by stability and BN weight (paper: Figure 2).", penalties())
    ]
    for number, study in enumerate(studies, 1):
        end = "" if len(studies) == 1 else f"-{number}"
        for name, caption, made in (
            ("figure4", "Unstable ReLUs against pruning steps (paper: Figure 4, under FGSM).", unstable(study)),
            ("figure6", "Verified against pruning steps, with 95 % intervals (paper: Figure 6).", against_steps(study)),
            ("figure7", "Time and memory of CROWN after channels are removed (paper: Figure 7).", consumption(study)),
            ("figure8", "Instability before ReLUs and before BN (paper: Figure 8).", instability(study)),
            ("figure9", "Rewinding and fine-tuning (paper: Figure 9).", rewinding(study)),
            ("figure10", "Verified by seed (paper: Figure 10).", seeds(study)),
        ):
            if made is not None:
                found.append((f"nrs-{name}{end}.png", f"{caption} {study.title}.", made))
    return found


def _dress(axis: Any, title: str, x: str, y: str) -> None:
    axis.set_title(title, fontsize=9)
    axis.set_xlabel(x, fontsize=8)
    axis.set_ylabel(y, fontsize=8)
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.25)


def _style(number: int) -> dict[str, Any]:
    return {
        "color": COLOURS[number % len(COLOURS)],
        "marker": MARKERS[number % len(MARKERS)],
        "linestyle": LINES[(number // len(COLOURS)) % len(LINES)],
        "markersize": 4,
        "linewidth": 1.2,
    }


def _legend(figure: Any, axes: Sequence[Any]) -> None:
    """One legend for all panels."""
    handles = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels())}
    if handles:
        figure.legend(
            list(handles.values()), list(handles), loc="outside lower center", ncols=4, frameon=False, fontsize=8
        )


def penalty(product: float, gamma: float) -> float:
    """The penalty of one ReLU: ``-tanh(1 + l u / gamma^2)``; RSLoss where gamma is 1."""
    return -math.tanh(1.0 + product / gamma**2)


def penalties() -> bytes:
    """RSLoss and NRSLoss over stability l u and gamma, and NRSLoss over l and u at four values of gamma."""
    figure, axes = tiles(6, 3.6, 3.1)
    gammas = [0.2 + 1.8 * k / 60 for k in range(61)]
    products = [-4.0 + 6.0 * k / 60 for k in range(61)]
    ends = [-2.0 + 4.0 * k / 60 for k in range(61)]
    for axis, title, values in (
        (axes[0], "RSLoss", [[penalty(v, 1.0) for v in products] for _ in gammas]),
        (axes[1], "NRSLoss", [[penalty(v, g) for v in products] for g in gammas]),
    ):
        image = axis.pcolormesh(products, gammas, values, vmin=-1, vmax=1, cmap="viridis", shading="nearest")
        _dress(axis, title, "stability l·u", "BN weight γ")
        figure.colorbar(image, ax=axis).ax.tick_params(labelsize=7)
    for axis, gamma in zip(axes[2:], (0.25, 0.5, 1.0, 2.0)):
        # Above the diagonal only: an interval has l <= u.
        values = [[penalty(low * high, gamma) if low <= high else math.nan for low in ends] for high in ends]
        image = axis.pcolormesh(ends, ends, values, vmin=-1, vmax=1, cmap="viridis", shading="nearest")
        _dress(axis, f"NRSLoss, γ = {gamma:g}", "lower end l", "upper end u")
        figure.colorbar(image, ax=axis).ax.tick_params(labelsize=7)
    return png(figure)


def _panels(lines: Sequence[Line], key: Callable[[Line], str]) -> dict[str, list[Line]]:
    """Lines of several steps in groups that share a panel."""
    found: dict[str, list[Line]] = {}
    for line in lines:
        if line.steps > 1:
            found.setdefault(key(line), []).append(line)
    return found


def _plot(
    panels: Mapping[str, Sequence[Line]], y: str, value: Callable[[Line, int], float],
    interval: Callable[[Line, int, float], tuple[float, float]] | None = None,
) -> bytes | None:  # fmt: skip
    """One panel a group, a curve a line."""
    if not panels:
        return None
    labels = list(dict.fromkeys(line.label for group in panels.values() for line in group))
    figure, axes = tiles(len(panels))
    for axis, (title, group) in zip(axes, panels.items()):
        for line in group:
            number = labels.index(line.label)
            # Rows at the same step would hide each other's intervals: shift them a little.
            shift = (number - (len(labels) - 1) / 2) * 0.03 if interval is not None else 0.0
            steps = [step + shift for step in range(line.steps)]
            values = [value(line, step) for step in range(line.steps)]
            axis.plot(steps, values, label=line.label, **_style(number))
            if interval is not None:
                ends = [interval(line, step, v) for step, v in enumerate(values)]
                errors = [
                    [v - low for v, (low, _) in zip(values, ends)],
                    [high - v for v, (_, high) in zip(values, ends)],
                ]
                axis.errorbar(steps, values, yerr=errors, fmt="none", ecolor=COLOURS[number % len(COLOURS)],
                              elinewidth=0.8, capsize=2)  # fmt: skip
        _dress(axis, title, "prunings", y)
        axis.xaxis.get_major_locator().set_params(integer=True)
    _legend(figure, axes)
    return png(figure)


def _training(line: Line) -> str:
    return line.training


def _ladder(line: Line) -> str:
    return f"{line.training}, {'structured' if line.structured else 'unstructured'}"


def unstable(study: Study) -> bytes | None:
    """Figure 4: share of unstable ReLUs."""
    return _plot(
        _panels(study.lines, _training), "unstable ReLUs (%)",
        lambda line, step: 100 * line.mean(step, lambda r: float(r["stability"]["unstable_ratio"])),
    )  # fmt: skip


def against_steps(study: Study) -> bytes | None:
    """Figure 6: verified share by the complete verifier."""

    def ends(line: Line, step: int, value: float) -> tuple[float, float]:
        found = clopper_pearson(value / 100 * study.images, study.images)
        return 100 * found.low, 100 * found.high

    lines = [line for line in study.lines if line.label == "imp" or line.label not in REWINDINGS]
    return _plot(
        _panels(lines, _ladder), "verified (%)", lambda line, step: 100 * line.mean(step, verified), ends
    )  # fmt: skip


def instability(study: Study) -> bytes | None:
    """Figure 8: the mean of -l u over neurons, before ReLUs and, normalised, before batch normalisation."""
    lines = [line for line in study.lines if line.steps > 1]
    panels: dict[str, list[Line]] = {}
    keys: dict[str, str] = {}
    for title, key in (("before ReLU", "pre_activation"), ("before BN", "pre_bn")):
        for training, group in _panels(lines, _training).items():
            if all(r["stability"][key] is not None for line in group for r in line.results(0)):
                panels[f"{training}, {title}"] = group
                keys[f"{training}, {title}"] = key
    if not panels:
        return None
    labels = list(dict.fromkeys(line.label for line in lines))
    figure, axes = tiles(len(panels))
    for axis, (title, group) in zip(axes, panels.items()):
        for line in group:
            key = keys[title]
            found = [[float(r["stability"][key]["mean"]) for r in line.results(step)] for step in range(line.steps)]
            values = [statistics.fmean(seeds) for seeds in found]
            axis.plot(range(line.steps), values, label=line.label, **_style(labels.index(line.label)))
        _dress(axis, title, "prunings", "instability, mean of -l·u")
        axis.xaxis.get_major_locator().set_params(integer=True)
    _legend(figure, axes)
    return png(figure)


def consumption(study: Study) -> bytes | None:
    """Figure 7: seconds an image and peak memory of CROWN for structured rows, channels removed."""
    lines = [line for line in study.lines if line.structured and line.steps > 1]
    if not lines:
        return None
    figure, axes = tiles(2)
    for number, line in enumerate(lines):
        steps = range(line.steps)
        timing = [[r["bounds"]["crown"]["timing"] for r in line.results(step)] for step in steps]
        seconds = [statistics.fmean(t["seconds_mean"] for t in found) for found in timing]
        axes[0].plot(steps, seconds, label=line.name, **_style(number))
        if all(t["peak_mb"] is not None for found in timing for t in found):
            axes[1].plot(
                steps, [max(t["peak_mb"] for t in found) for found in timing], label=line.name, **_style(number)
            )
    _dress(axes[0], "CROWN, time", "prunings of 11 % of the channels", "seconds an image")
    _dress(axes[1], "CROWN, memory", "prunings of 11 % of the channels", "peak MB")
    for axis in axes:
        axis.set_ylim(bottom=0)
        axis.xaxis.get_major_locator().set_params(integer=True)
    _legend(figure, axes)
    return png(figure)


def rewinding(study: Study) -> bytes | None:
    """Figure 9: verified share with rewinding, fine-tuning, and what the released code does."""
    panels = _panels([line for line in study.lines if line.label in REWINDINGS], _training)
    panels = {title: group for title, group in panels.items() if len({line.label for line in group}) > 1}
    return _plot(panels, "verified (%)", lambda line, step: 100 * line.mean(step, verified))


def seeds(study: Study) -> bytes | None:
    """Figure 10: a curve a seed, for rows with several."""
    lines = [line for line in study.lines if len(line.records) > 1 and line.steps > 1]
    if not lines:
        return None
    figure, axes = tiles(len(lines))
    for axis, line in zip(axes, lines):
        for number, record in enumerate(line.records):
            values = [
                100 * verified(nrs_records.result(state, line.perturbation.label))
                for state in record["states"][: line.steps]
            ]
            axis.plot(range(line.steps), values, label=f"seed {record['cell']['seed']}", **_style(number))
        _dress(axis, line.name, "prunings", "verified (%)")
        axis.xaxis.get_major_locator().set_params(integer=True)
    _legend(figure, axes)
    return png(figure)
