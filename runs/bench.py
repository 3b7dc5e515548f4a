"""Ratios worth knowing, each measured against its reference in the same process: ``python -m runs.bench``.

Rows: an interval-bound training step over a plain one; CROWN on a batch over auto-LiRPA one image at a time, with how
far their bounds differ; rendered aircraft images per second. Times are medians.
"""

from __future__ import annotations

import argparse
import json
import statistics as stdlib_statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from rich.console import Console
    from torch import Tensor, nn

    import certify

ROWS = {
    "ibp-step": "IBP training step over a plain training step (CNN7, batch 32)",
    "crown": "CROWN for 16 images over auto-LiRPA one image at a time (IBP-trained CNN7)",
    "render": "rendered aircraft images per second and core",
}

TRAINING_STEPS = 160


@dataclass(frozen=True)
class Measured:
    """One row. ``ratio``: ours over the reference (time); ``n``: repetitions behind each median."""

    row: str
    what: str
    ours: float
    reference: float | None
    unit: str
    ratio: float | None
    n: int
    goal: str
    note: str


def parser() -> argparse.ArgumentParser:
    """The command line's grammar."""
    p = argparse.ArgumentParser(prog="python -m runs.bench", description=(__doc__ or "").splitlines()[0])
    p.add_argument("--rows", nargs="+", choices=tuple(ROWS), default=list(ROWS), help="which rows")
    p.add_argument("--repeat", type=int, default=7, metavar="N", help="repetitions of a step (default 7)")
    p.add_argument("--width", type=float, default=1.0, help="width of the CNN7 (default 1)")
    p.add_argument("--device", default="auto", help="auto, cpu or cuda")
    p.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: all available)")
    p.add_argument("--json", metavar="FILE", help="also write the rows to FILE")
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the rows asked for and print them; returns the exit status."""
    from rich.console import Console

    args = parser().parse_args(arguments)
    if args.repeat < 1:
        parser().error(f"--repeat must be at least 1, got {args.repeat}")
    import torch

    from runs import measure
    from runs.execute import resolve_device

    console = Console() if sys.stdout.isatty() else Console(width=160)
    try:
        device = resolve_device(args.device)
    except ValueError as error:
        parser().error(str(error))
    torch.set_num_threads(args.threads or measure.available_cores())
    console.print(f"{measure.device_name(device)}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    rows: list[Measured] = []
    if "ibp-step" in args.rows:
        rows += ibp_step(device, args.repeat, args.width)
    if "crown" in args.rows:
        rows += crown(device, args.width)
    if "render" in args.rows:
        rows.append(rendering())
    show(rows, console)
    if args.json:
        from pathlib import Path

        from runs.store import write_atomic

        write_atomic(Path(args.json), (json.dumps([asdict(row) for row in rows], indent=1) + "\n").encode())
    return 0


def show(rows: Sequence[Measured], console: Console) -> None:
    """Print the rows as a table."""
    from rich.table import Table

    table = Table(title="bench", title_justify="left")
    for heading in ("what", "ours", "reference", "ratio", "n", "goal", "note"):
        table.add_column(heading, justify="right" if heading in ("ours", "reference", "ratio", "n") else "left")
    for row in rows:
        reference = "–" if row.reference is None else f"{row.reference:.4g} {row.unit}"
        ratio = "–" if row.ratio is None else f"{row.ratio:.3g}"
        table.add_row(row.what, f"{row.ours:.4g} {row.unit}", reference, ratio, str(row.n), row.goal, row.note)
    console.print(table)


def interleaved(
    first: Callable[[], object], second: Callable[[], object], repeat: int, device: torch.device
) -> tuple[float, float]:
    """Median seconds of two functions, run in turns so that a change of the machine's load meets both alike."""
    times: tuple[list[float], list[float]] = ([], [])
    for function in (first, second):
        function()
    for _ in range(repeat):
        for function, found in zip((first, second), times):
            found.append(timed(function, device))
    return stdlib_statistics.median(times[0]), stdlib_statistics.median(times[1])


def timed(function: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, waiting for the device before and after."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def digits_at(size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """scikit-learn's digits enlarged to ``size`` pixels: real images that need no download."""
    import torch.nn.functional as F

    from runs.packages import ours

    x, y = ours("datasets").load("digits", split="train").tensors(device=device)
    return F.interpolate(x, size=(size, size), mode="bilinear", align_corners=False).clamp(0, 1), y


def cnn7(device: torch.device, width: float) -> nn.Module:
    """The CNN7 of the bench at 28×28."""
    import models

    return models.create("cnn7_nrs", num_outputs=10, in_channels=1, image_size=28, width=width, seed=0).to(device)


def ibp_step(device: torch.device, repeat: int, width: float, batch: int = 32) -> list[Measured]:
    """Forward, backward and optimiser step with the IBP objective at full radius, and with the natural one.

    A clean pass, a pass of centres and one of radii cost three plain steps when gradients flow through all of them, as
    published; the bound alone, with batch statistics held constant, needs no backward pass through the clean network.
    """
    import torch

    from methods.training.ibp import IBP
    from methods.training.losses import CrossEntropy
    from methods.training.natural import Natural
    from methods.training.objective import Objective, Progress

    x, y = digits_at(28, device)
    x, y = x[:batch], y[:batch]
    progress = Progress(9, 10)

    def stepper(objective: Objective) -> Callable[[], None]:
        model = cnn7(device, width).train()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

        def step() -> None:
            optimizer.zero_grad()
            objective.loss(model, x, y, CrossEntropy(), progress)[0].backward()
            optimizer.step()

        return step

    rows = []
    for objective, kind in (
        (IBP(eps=0.1, kappa_end=0.0, detach_statistics=True), "bound alone, statistics constant"),
        (IBP(eps=0.1), "clean and robust loss, gradients through statistics"),
    ):
        ours, plain = interleaved(stepper(objective), stepper(Natural()), repeat, device)
        note = f"{kind}; {batch / ours:.0f} images/s against {batch / plain:.0f}"
        rows.append(Measured("ibp-step", ROWS["ibp-step"], ours, plain, "s", ours / plain, repeat, "≤ 2.6", note))
    return rows


def trained_with_ibp(device: torch.device, width: float, eps: float) -> nn.Module:
    """CNN7 trained with interval bounds on the enlarged digits."""
    from methods.dense import Dense, DenseConfig
    from methods.training.config import TrainingConfig
    from methods.training.ibp import IBP

    x, y = digits_at(28, device)
    batches = [(x[i : i + 32], y[i : i + 32]) for i in range(0, 640, 32)]
    config = DenseConfig(
        epochs=TRAINING_STEPS // len(batches), training=TrainingConfig(lr=2e-3, objective=IBP(eps=eps))
    )
    return Dense(config).fit(cnn7(device, width), batches, seed=0, device=device).model


def crown(device: torch.device, width: float, images: int = 16, eps: float = 0.1) -> list[Measured]:
    """Time, peak memory and bounds: CROWN on a batch beside auto-LiRPA on its images in turn."""
    import torch

    import certify
    from runs.measure import Peak

    model = trained_with_ibp(device, width, eps)
    x, _ = digits_at(28, device)
    x = x[-images:]
    p = certify.Linf(eps)

    def together() -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            return certify.bounds(model, x, p, method="crown")

    def one_by_one() -> tuple[Tensor, Tensor]:
        found = [certify.bounds(model, image[None], p, method="auto-lirpa:CROWN") for image in x]
        return torch.cat([low for low, _ in found]), torch.cat([high for _, high in found])

    together()
    with Peak(device) as ours_peak:
        low, high = together()
    ours = stdlib_statistics.median(timed(together, device) for _ in range(3))
    with Peak(device) as their_peak:
        start = time.perf_counter()
        their_low, their_high = one_by_one()
        theirs = time.perf_counter() - start
    size = float(torch.maximum(their_low.abs(), their_high.abs()).max())
    same = crown_alone(model, x, p)
    apart = max(float((same[0] - their_low).abs().max()), float((same[1] - their_high).abs().max())) / size
    narrower = 1 - float((high - low).mean() / (their_high - their_low).mean())
    note = f"relative, intervals not intersected as there; intersected, ours are {100 * narrower:.2g} % narrower"
    speed = f"{theirs / ours:.1f}× faster; trained with {TRAINING_STEPS} IBP steps"
    rows = [
        Measured("crown", ROWS["crown"], ours, theirs, "s", ours / theirs, 3, "≤ 0.25", speed),
        Measured("crown", "largest difference from auto-LiRPA's bounds", apart, None, "", None, 1, "≤ 1e-4", note),
    ]
    if ours_peak.mb is not None and their_peak.mb is not None:
        ratio = ours_peak.mb / their_peak.mb
        what = "peak memory of the process" if device.type == "cpu" else "peak memory on the device"
        rows.append(
            Measured("crown", what, ours_peak.mb, their_peak.mb, "MB", ratio, 1, "≤ 1500 MB", "CROWN, 16 images")
        )
    return rows


def crown_alone(model: nn.Module, x: Tensor, p: certify.Perturbation) -> tuple[Tensor, Tensor]:
    """CROWN bounds whose intermediate intervals are CROWN's alone, not intersected with interval propagation."""
    import torch

    from certify.bounds.crown import crown_intervals, crown_rows
    from certify.bounds.region import attach
    from certify.bounds.trace import trace

    with torch.no_grad():
        graph, region = attach(trace(model, x[:2])[0].folded(), x, p)
        outputs = graph.nodes[graph.output].shape[0]
        eye = torch.eye(outputs, dtype=x.dtype, device=x.device).expand(len(x), -1, -1)
        found = crown_intervals(graph, region, intersect=False)
        lower = crown_rows(graph, region, found, torch.cat([eye, -eye], 1))
    return lower[:, :outputs], -lower[:, outputs:]


def rendering(images: int = 64) -> Measured:
    """Rendered aircraft images per second in one process."""
    from runs.packages import ours

    ours("datasets")
    from datasets import aircraft

    rate = aircraft.throughput(n=images)
    return Measured("render", ROWS["render"], rate, None, "images/s", None, images, "≥ 60", "one process")


if __name__ == "__main__":
    sys.exit(main())
