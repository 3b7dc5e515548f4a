"""The figures of the USN suite as PNG bytes, from records alone. matplotlib is imported on first use, without windows.

Figure 3 of the paper: the unbiased and smooth metric of each channel of the fourth convolution. Figure 4: histograms of
correct keypoints and of verification time. Beside them, the channels' importance at λ_W = 0 and 10.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from runs.plots import COLOURS, LINES, canvas, png
from runs.store import Record
from runs.usn_tables import TAU, Line, Study

LAYER = 3
"""The fourth convolution, as in the paper's Figure 3; the last one of a network with fewer."""


def all_figures(studies: Sequence[Study]) -> list[tuple[str, str, bytes]]:
    """(file name, caption, PNG bytes) of every figure that the records allow."""
    found = []
    for number, study in enumerate(studies, 1):
        end = "" if len(studies) == 1 else f"-{number}"
        for name, caption, made in (
            ("figure3", "Metrics of the channels of the fourth convolution (paper: Figure 3).", channel_map(study)),
            ("figure4", "Correct keypoints and verification time (paper: Figure 4).", histograms(study)),
            ("importance", "Importance of channels with and without the Wasserstein term.", importance(study)),
        ):
            if made is not None:
                found.append((f"usn-{name}{end}.png", f"{caption} {study.title}.", made))
    return found


def _first(study: Study, *labels: str) -> Line | None:
    """A line of one of these variants: the one whose ratio is nearest to 0.2."""
    found = [line for label in labels for line in study.lines if line.label == label]
    return min(found, key=lambda line: abs(line.ratio - 0.2)) if found else None


def layer(record: Record, number: int = LAYER) -> tuple[str, dict[str, Any]]:
    """Name and metrics of the convolution ``number`` (from 0), or of the last one."""
    names = list(record["channels"])
    name = names[min(number, len(names) - 1)]
    return name, record["channels"][name]


def channel_map(study: Study) -> bytes | None:
    """A colour for each channel: plain training, USN losses without pruning, USN pruning; removed channels hatched."""
    lines = [line for line in (_first(study, "vanilla"), _first(study, "none"), _first(study, "usn")) if line]
    if len(lines) < 2:
        return None
    metrics = ("unbiased", "smooth")
    figure, axes = canvas(1, len(metrics), 7.5, 0.5 + 0.45 * len(lines))
    for axis, metric in zip(axes[:, 0], metrics):
        values = [layer(line.records[0])[1][metric] for line in lines]
        image = axis.imshow(values, aspect="auto", cmap="viridis", vmin=0)
        for row, line in enumerate(lines):
            for column, bit in enumerate(layer(line.records[0])[1]["kept"]):
                if bit == "0":
                    axis.text(column, row, "×", color="white", ha="center", va="center", fontsize=8)
        axis.set_yticks(range(len(lines)), [line.name for line in lines], fontsize=8)
        axis.set_title(f"{metric} metric, {layer(lines[0].records[0])[0]}", fontsize=9)
        axis.tick_params(labelsize=8)
        figure.colorbar(image, ax=axis).ax.tick_params(labelsize=7)
    axes[-1, 0].set_xlabel("channel (×: removed)", fontsize=8)
    return png(figure)


def histograms(study: Study) -> bytes | None:
    """How many of an image's keypoints are right, and how long its verdict takes, by variant; all perturbations."""
    lines = [line for line in study.lines if line.label in ("vanilla", "none", "usn", "random")]
    if not lines:
        return None
    figure, axes = canvas(2, 1, 4.6, 3.6)
    correct, seconds = axes[0]
    first = study.perturbations[0]
    counts = {line.name: [c for r in line.results(first) for c in right(r)] for line in lines}
    times = {
        line.name: [s for p in study.perturbations for r in line.results(p) for s in r["seconds"]] for line in lines
    }
    groups = lines[0].results(first)[0]["keypoints"].values()
    most = max(map(sum, zip(*(group["total"] for group in groups))))
    fastest = min(max(min(found), 1e-4) for found in times.values())
    slowest = max(max(found) for found in times.values())
    step = max((slowest / fastest) ** (1 / 24), 1.01)
    edges = [fastest * step**k for k in range(26)]
    for i, line in enumerate(lines):
        style: dict[str, Any] = {
            "histtype": "step", "density": True, "color": COLOURS[i % len(COLOURS)],
            "linestyle": LINES[(i // len(COLOURS)) % len(LINES)], "label": line.name,
        }  # fmt: skip
        correct.hist(counts[line.name], bins=[k - 0.5 for k in range(most + 2)], **style)
        weights = [1 / len(times[line.name])] * len(times[line.name])
        seconds.hist(times[line.name], bins=edges, weights=weights, **{**style, "density": False})
    correct.set_xlabel(f"keypoints of an image within {TAU} px", fontsize=8)
    seconds.set_xlabel(f"seconds of the verdict at {study.delta:g} px", fontsize=8)
    seconds.set_xscale("log")
    for axis in (correct, seconds):
        axis.set_ylabel("share of images", fontsize=8)
        axis.tick_params(labelsize=8)
    handles, labels = correct.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    return png(figure)


def right(result: dict[str, Any]) -> list[int]:
    """Correct keypoints of each image, seen and occluded together."""
    groups = [result["keypoints"][name]["correct"][TAU] for name in ("visible", "occluded")]
    return [a + b for a, b in zip(*groups)]


def importance(study: Study) -> bytes | None:
    """Histograms of log10 A (Eq. 19), of the channels that are left, relative to the mean of their layer."""
    ratios = study.ratios("usn", "usn-w0")
    if not ratios:
        return None
    lines = [line for label in ("usn-w0", "usn") if (line := study.line(label, ratios[-1])) is not None]
    figure, axes = canvas(1, 1, 5.2, 3.4)
    axis = axes[0, 0]
    for i, line in enumerate(lines):
        weight = "0" if line.label == "usn-w0" else "10"
        values = relative(line.records)
        style: dict[str, Any] = {"histtype": "step", "color": COLOURS[2 - i], "linestyle": LINES[i]}
        axis.hist(values, bins=[k / 8 for k in range(33)], label=f"λ_W = {weight}", density=True, **style)
    axis.set_xlabel("importance of a channel over the mean of its layer (left: stable)", fontsize=8)
    axis.set_ylabel("density", fontsize=8)
    axis.tick_params(labelsize=8)
    axis.legend(frameon=False, fontsize=8)
    return png(figure)


def relative(records: Sequence[Record]) -> list[float]:
    """Importances of the channels that are left over the mean of those in their layer, cut off at 4."""
    found = []
    for record in records:
        for values in record["channels"].values():
            left = [a for a, bit in zip(values["importance"], values["kept"]) if bit == "1"]
            mean = sum(left) / len(left)
            found += [min(a / mean, 4.0) if mean > 0 else 0.0 for a in left]
    return found
