"""The figures of the CAR suite as PNG bytes, from records alone. matplotlib is imported on first use, without windows.

Figure 1c of the paper: accuracy and certified share against the ratio. Figure 2: loss landscapes around the pruned
networks. Figure 3: distributions of the weights that are left.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from runs.car_lines import Bits, Line, Study, accurate, paper, valid
from runs.plots import COLOURS, LINES, MARKERS, canvas, png
from runs.suites import car


def all_figures(studies: Sequence[Study]) -> list[tuple[str, str, bytes]]:
    """(file name, caption, PNG bytes) of every figure that the records allow."""
    found = []
    for number, study in enumerate(studies, 1):
        end = "" if len(studies) == 1 else f"-{number}"
        for name, caption, made in (
            ("figure1c", "Accuracy and certified shares against the ratio (paper: Figure 1c).", against_ratio(study)),
            ("figure2", "Cross-entropy around the networks, filter-normalised (paper: Figure 2).", landscapes(study)),
            ("figure3", "Weights that are left (paper: Figure 3).", distributions(study)),
        ):
            if made is not None:
                found.append((f"car-{name}{end}.png", f"{caption} {study.title}.", made))
    return found


def setting(study: Study) -> tuple[int, str]:
    """Number of edits and network with the most lines of the paper's rows: what a figure shows."""
    counts: dict[tuple[int, str], int] = {}
    for line in study.lines:
        if line.row in car.ROWS:
            counts[line.edits, line.network] = counts.get((line.edits, line.network), 0) + 1
    return max(counts, key=lambda name: (counts[name], name)) if counts else (0, "")


def _lines(study: Study) -> list[Line]:
    edits, network = setting(study)
    return [line for line in study.lines if line.row in car.ROWS and (line.edits, line.network) == (edits, network)]


def against_ratio(study: Study) -> bytes | None:
    """Accuracy, the valid share and the paper's against the fraction removed, with 95 % intervals."""
    lines = _lines(study)
    if len({line.ratio for line in lines if line.ratio}) < 2:
        return None
    panels: list[tuple[str, Bits]] = [("accuracy (%)", accurate), ("PCA, valid (%)", valid)]
    if all(line.has_paper for line in lines):
        panels.append(("PCA, paper, not valid (%)", paper))
    figure, axes = canvas(len(panels), 1, 4.0, 3.4)
    for axis, (title, bits) in zip(axes[0], panels):
        for i, row in enumerate(car.ROWS):
            own = sorted((line for line in lines if line.row == row), key=lambda line: line.ratio)
            if not own:
                continue
            shares = [100 * line.share(bits) for line in own]
            ends = [line.interval(bits) for line in own]
            errors = [
                [s - 100 * e.low for s, e in zip(shares, ends)],
                [100 * e.high - s for s, e in zip(shares, ends)],
            ]
            axis.errorbar(
                [line.ratio + 0.006 * (i - 2) for line in own], shares, yerr=errors, color=COLOURS[i % len(COLOURS)],
                marker=MARKERS[i % len(MARKERS)], linestyle=LINES[i % len(LINES)], markersize=5, linewidth=1.2,
                elinewidth=0.8, capsize=2, label=row,
            )  # fmt: skip
        axis.set_xlabel("fraction removed", fontsize=8)
        axis.set_ylabel(title, fontsize=8)
        axis.set_ylim(-3, 103)
        axis.grid(alpha=0.25)
        axis.tick_params(labelsize=8)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6, frameon=False, fontsize=8)
    return png(figure)


def _sparsest(study: Study, ratio: float | None = None) -> list[Line]:
    """A line for each row: the unpruned ones, and the others at one ratio, the smallest that is on record."""
    lines = _lines(study)
    ratios = sorted({line.ratio for line in lines if line.ratio})
    chosen = ratio if ratio is not None else ratios[0] if ratios else 0.0
    return [line for line in lines if line.ratio in (0.0, chosen)]


def landscapes(study: Study) -> bytes | None:
    """log10 of the loss on the plane, one panel a row, on one colour scale; the star is the network itself."""
    lines = [line for line in _sparsest(study) if "landscape" in line.entries[0].record]
    if not lines:
        return None
    grids = [line.entries[0].record["landscape"] for line in lines]
    logs = [[[math.nan if v is None else math.log10(max(v, 1e-4)) for v in row] for row in g["loss"]] for g in grids]
    shown = [v for grid in logs for row in grid for v in row if not math.isnan(v)]
    columns = min(3, len(lines))
    height = -(-len(lines) // columns)
    figure, axes = canvas(columns, height, 3.3, 3.0)
    flat = axes.ravel().tolist()
    for axis in flat[len(lines) :]:
        axis.set_visible(False)
    for axis, line, grid, values in zip(flat, lines, grids, logs):
        ends = (grid["axis"][0], grid["axis"][-1])
        image = axis.imshow(
            values, origin="lower", extent=(*ends, *ends), vmin=min(shown), vmax=max(shown), cmap="viridis"
        )
        axis.plot([0], [0], marker="*", color="#E69F00", markersize=10)
        axis.set_title(f"{line.name}: mean rise {grid['flat']:.3g}", fontsize=8)
        axis.tick_params(labelsize=7)
    figure.colorbar(image, ax=flat[: len(lines)], label="log10 cross-entropy").ax.tick_params(labelsize=7)
    return png(figure)


def distributions(study: Study) -> bytes | None:
    """Histograms of the kept weights of the last convolution and of the last layer: unpruned, LMP and CAR."""
    lines = [line for line in _sparsest(study) if line.row in ("vanilla", "lmp", "car")]
    if len(lines) < 2:
        return None
    layers = [name for name in lines[0].entries[0].record["weights"] if name != "all"]
    figure, axes = canvas(len(layers), 1, 4.4, 3.2)
    for axis, layer in zip(axes[0], layers):
        for i, line in enumerate(lines):
            found = line.entries[0].record["weights"][layer]
            bins = len(found["counts"])
            width = 2 * found["reach"] / bins
            edges = [-found["reach"] + k * width for k in range(bins + 1)]
            density = [c / max(1, found["kept"]) / max(width, 1e-12) for c in found["counts"]]
            label = f"{line.name}, {100 * found['near_zero']:.1f} % near zero"
            axis.stairs(density, edges, color=COLOURS[i], linestyle=LINES[i], label=label)
        axis.set_title(layer, fontsize=8)
        axis.set_xlabel("weight", fontsize=8)
        axis.set_ylabel("density of those left", fontsize=8)
        axis.legend(frameon=False, fontsize=6)
        axis.tick_params(labelsize=7)
    return png(figure)
