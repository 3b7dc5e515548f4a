"""Studies of networks that the USN suite has on record, one command each.

python -m runs.usn_studies variance --results results     how far a channel's importance scatters with the copies m
python -m runs.usn_studies strip --results results        images under growing perturbation with the predicted keypoints

The studies that train are presets of ``python -m runs.compare usn``: see its ``--list``.
"""

from __future__ import annotations

import argparse
import csv
import io
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runs.cell import Cell, from_dict
from runs.store import Store, StoreError, write_atomic

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

OK, FAILED, USAGE = 0, 1, 2
SAMPLINGS = ("antithetic", "iid")


@dataclass(frozen=True)
class Scatter:
    """How importances (Eq. 19) estimated with ``m`` copies an image vary over repetitions, mean over channels.

    ``variation`` is the standard deviation over the mean, ``bias`` the mean over that of the reference minus one,
    ``agreement`` the mean share of the channels that would be removed with the reference and are removed here, too.
    """

    layer: str
    sampling: str
    m: int
    variation: float
    bias: float
    agreement: float


def scatter(
    model: nn.Module,
    x: Tensor,
    config: Any,
    *,
    counts: Sequence[int] = (2, 4, 8, 16, 32),
    repeats: int = 8,
    reference: int = 256,
    ratio: float = 0.2,
    seed: int = 0,
) -> list[Scatter]:
    """Estimate the importances of every layer again and again, on the same images, with fresh copies.

    Args:
        model: network in evaluation mode.
        x: images (N, C, H, W); their number is that of a batch in training.
        config: a ``USNConfig``: layers, perturbation and reading of the metrics.
        counts: the numbers of copies to compare; even ones, for antithetic pairs.
        repeats: estimates for each, at least 2.
        reference: antithetic copies that stand for the truth.
        ratio: share of the channels removed, for the agreement.
        seed: of the draws.

    Raises:
        ValueError: fewer than two repeats.
    """
    import torch

    from methods import masks
    from methods.usn import measure

    if repeats < 2:
        raise ValueError(f"a scatter needs at least two estimates, got repeats={repeats}")
    names = masks.prunable(model, config.layers, structured=True)
    generator = torch.Generator().manual_seed(seed)
    batch = [(x, torch.zeros(len(x)))]

    def estimate(m: int, sampling: Any) -> dict[str, Tensor]:
        found = measure(
            model, batch, config.perturbation, names, m=m, sampling=sampling, metric=config.metric, generator=generator
        )
        return {name: layer.channel_importance(config.metric).cpu() for name, layer in found.items()}

    # In parts, so that memory does not grow with the reference.
    parts = [estimate(32, "antithetic") for _ in range(max(1, reference // 32))]
    truth = {name: torch.stack([part[name] for part in parts]).mean(0) for name in names}
    found = []
    for sampling in SAMPLINGS:
        for m in counts:
            again = [estimate(m, sampling) for _ in range(repeats)]
            for name in names:
                found.append(_compare(name, sampling, m, torch.stack([e[name] for e in again]), truth[name], ratio))
    return found


def _compare(name: str, sampling: str, m: int, estimates: Tensor, truth: Tensor, ratio: float) -> Scatter:
    alive = truth > 0
    estimates, truth = estimates[:, alive], truth[alive]
    mean = estimates.mean(0)
    gone = max(1, round(ratio * len(truth)))
    wanted = set(truth.topk(gone).indices.tolist())
    shares = [len(wanted & set(row.topk(gone).indices.tolist())) / gone for row in estimates]
    return Scatter(
        name,
        sampling,
        m,
        float((estimates.std(0) / mean).mean()),
        float((mean / truth).mean()) - 1,
        statistics.fmean(shares),
    )


def strip(model: nn.Module, x: Tensor, y: Tensor, rows: Sequence[tuple[str, Any, float]], steps: int = 5) -> bytes:
    """One image under growing perturbations, a row each, with true and predicted keypoints: the paper's Figure 2.

    Args:
        model: keypoint network in evaluation mode.
        x: one image (1, C, H, W).
        y: its keypoints (1, 2K).
        rows: (heading, perturbation of one parameter, its magnitude).
        steps: columns from minus to plus the magnitude, odd so that the middle one is the image itself.
    """
    import torch
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from runs.plots import png

    figure = Figure(figsize=(2.1 * steps, 2.4 * len(rows) + 0.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(rows), steps, squeeze=False)
    truth = y[0].detach().cpu().unflatten(0, (-1, 2))
    with torch.no_grad():
        still = model(x)
    for line, (heading, p, magnitude) in zip(axes, rows):
        for axis, t in zip(line, torch.linspace(-magnitude, magnitude, steps).tolist()):
            with torch.no_grad():
                image = p.apply(x, torch.full((1,), t, dtype=x.dtype, device=x.device))
                outputs = model(image)
            points = outputs[0].cpu().unflatten(0, (-1, 2))
            moved = float((outputs - still).abs().max())
            picture = image[0].permute(1, 2, 0).cpu()
            # Pixel (i, j) covers [j, j + 1) x [i, i + 1), as the keypoints count.
            axis.imshow(picture.squeeze(2) if picture.shape[2] == 1 else picture, cmap="gray", vmin=0, vmax=1,
                        extent=(0, picture.shape[1], picture.shape[0], 0))  # fmt: skip
            axis.scatter(truth[:, 0], truth[:, 1], s=16, facecolors="none", edgecolors="#56B4E9", linewidths=0.9)
            axis.scatter(points[:, 0], points[:, 1], s=9, marker="x", color="#E69F00", linewidths=0.9)
            axis.set_title(f"{heading} {t:+.3g}\nmoved {moved:.3f} px", fontsize=8)
            axis.set_axis_off()
    figure.supxlabel("circles: truth; crosses: prediction", fontsize=8)
    return png(figure)


def pick(store: Store, key: str | None) -> Cell:
    """The cell with this key, or the first USN network on record that is pruned by the metrics.

    Raises:
        ValueError: there is none.
    """
    scan = store.scan()
    cells = [
        from_dict(r["cell"]) for r in scan.records if r["status"] == "done" and r["cell"]["pruning"]["method"] == "usn"
    ]
    chosen = [cell for cell in cells if key == cell.key or (key is None and cell.pruning.label == "usn")]
    if not chosen:
        what = f"no network {key!r}" if key else "no network pruned by usn"
        known = ", ".join(f"{cell.key} ({cell.label})" for cell in cells) or "none"
        raise ValueError(
            f"{what} under {store.root.resolve()}; USN networks on record: {known}. "
            "python -m runs.compare usn trains them"
        )
    return chosen[0]


def load(cell: Cell, store: Store, device: torch.device, data_dir: Path | None, split: str, limit: int) -> Any:
    """The network of a cell, and the first ``limit`` images and targets of a split of its data."""
    import models
    from runs.packages import ours

    model = models.load(store.slot(cell).model_path, device=device)
    pack = ours("datasets").load(cell.data.name, data_dir, split, limit=limit, **dict(cell.data.settings))
    return model, *pack.tensors(device=device)


def parser() -> argparse.ArgumentParser:
    """The command line's grammar."""
    p = argparse.ArgumentParser(
        prog="python -m runs.usn_studies", description="Studies of networks that the USN suite has on record."
    )
    p.add_argument("study", choices=("variance", "strip"))
    p.add_argument("--results", type=Path, default=Path("results"), metavar="DIR", help="where the records are")
    p.add_argument("--key", help="the network's cell; the first one pruned by usn if not given")
    p.add_argument("--data-dir", type=Path, metavar="DIR", help="where data sets lie; $CERTPRUNE_DATA if not given")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:1")
    p.add_argument("--images", type=int, default=16, metavar="N", help="variance: images in a batch; strip: which one")
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a study; returns the exit status: 0, 1 when a file cannot be written, 2 wrong usage."""
    from rich.console import Console

    args = parser().parse_args(arguments)
    console = Console()
    try:
        if args.images < 1:
            raise ValueError(f"--images must be at least 1, got {args.images}")
        store = Store(args.results)
        cell = pick(store, args.key)
        console.print(f"{cell.key}: {cell.label}", highlight=False, markup=False)
        path = run(args, cell, store, console)
    except (ValueError, ImportError, FileNotFoundError) as error:
        Console(stderr=True, soft_wrap=True).print(f"error: {error}", markup=False, highlight=False, style="red")
        return USAGE
    except StoreError as error:
        Console(stderr=True, soft_wrap=True).print(f"error: {error}", markup=False, highlight=False, style="red")
        return FAILED
    console.print(f"wrote {path}", highlight=False, markup=False, soft_wrap=True)
    return OK


def run(args: argparse.Namespace, cell: Cell, store: Store, console: Any) -> Path:
    """Make the study's file under the results folder."""
    from runs.configure import build_config
    from runs.execute import resolve_device

    device = resolve_device(args.device)
    if args.study == "variance":
        model, x, _ = load(cell, store, device, args.data_dir, "val", args.images)
        found = scatter(model, x, build_config(cell))
        show(found, console)
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, [item.name for item in fields(Scatter)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in found)
        path = store.root / "usn-variance.csv"
        write_atomic(path, buffer.getvalue().encode())
        return path
    from runs.measure import perturbation

    model, x, y = load(cell, store, device, args.data_dir, "test", args.images)
    if y.ndim != 2:
        raise ValueError(f"the strip shows keypoints, but {cell.data.name} has classes; choose another --key")
    last = slice(len(x) - 1, len(x))
    rows = [
        (p.kind, perturbation(p), p.magnitude)
        for kind in dict.fromkeys(p.kind for p in cell.perturbations if p.kind != "joint")
        for p in [max((p for p in cell.perturbations if p.kind == kind), key=lambda p: p.magnitude)]
    ]
    path = store.root / "usn-figure2.png"
    write_atomic(path, strip(model, x[last], y[last], rows))
    return path


def show(found: Sequence[Scatter], console: Any) -> None:
    """Print the means over layers."""
    from rich.table import Table

    table = Table(title="scatter of a channel's importance over repeated estimates", title_justify="left")
    for name in ("copies", "m", "variation", "bias", "same channels removed"):
        table.add_column(name, justify="right")
    for sampling, m in dict.fromkeys((row.sampling, row.m) for row in found):
        own = [row for row in found if (row.sampling, row.m) == (sampling, m)]
        values = [statistics.fmean(getattr(row, name) for row in own) for name in ("variation", "bias", "agreement")]
        if all(map(math.isfinite, values)):
            table.add_row(sampling, str(m), f"{values[0]:.1%}", f"{values[1]:+.1%}", f"{values[2]:.0%}")
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
