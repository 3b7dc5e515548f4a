"""Ratios worth knowing, each measured against its reference in the same process: ``python -m runs.bench``.

Bounds per net and method beside a forward pass and auto-LiRPA (time, memory, tightness, growth with the batch),
training steps beside plain ones, sampling beside plain inference, rendered images per second; goals beside them.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runs import bench_bounds, bench_nets, bench_training
from runs.bench_timing import Clock, Spread
from runs.bench_training import Measured

if TYPE_CHECKING:
    from rich.console import Console
    from torch import Tensor, nn

    import certify

ROWS = {
    "bounds": "every bound method per net: time, memory, tightness, growth; beside a forward pass and auto-LiRPA",
    "ibp-step": "IBP training step over a plain training step (CNN7, batch 32)",
    "training": "steps of every training objective over a plain step, images a second",
    "crown": "CROWN for 16 images over auto-LiRPA one image at a time (IBP-trained CNN7)",
    "sampling": "draws a second in certify.estimate over plain batched inference",
    "render": "rendered aircraft images per second and core",
}
STEP_BATCH = 32
Table = tuple[str, tuple[str, ...], list[tuple[str, ...]]]


def parser() -> argparse.ArgumentParser:
    """The command line's grammar."""
    p = argparse.ArgumentParser(prog="python -m runs.bench", description=(__doc__ or "").splitlines()[0])
    p.add_argument("--rows", nargs="+", choices=tuple(ROWS), default=list(ROWS), help="which rows")
    p.add_argument("--nets", nargs="+", choices=tuple(bench_nets.NETS), default=list(bench_nets.NETS))
    p.add_argument("--methods", nargs="+", choices=bench_bounds.METHODS, default=list(bench_bounds.METHODS))
    p.add_argument("--images", nargs="+", type=int, default=[1, 16], metavar="N", help="batches of the bounds")
    p.add_argument("--repeats", "--repeat", dest="repeat", type=int, default=7, metavar="N", help="default 7")
    p.add_argument("--width", type=float, default=1.0, help="factor on the widths of the nets (default 1)")
    p.add_argument("--batch", type=int, default=STEP_BATCH, metavar="N", help="images of a training step (default 32)")
    p.add_argument("--limit", type=float, default=60.0, metavar="S", help="seconds for a bound (default 60)")
    p.add_argument("--device", default="auto", help="auto, cpu or cuda")
    p.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: all available)")
    p.add_argument("--cpu-time", action="store_true", help="measure CPU seconds of all threads, not the wall's")
    p.add_argument("--json", metavar="FILE", help="also write everything measured to FILE")
    p.add_argument("--markdown", metavar="FILE", help="also write the tables to FILE")
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the rows asked for and print them; returns the exit status."""
    from rich.console import Console

    args = parser().parse_args(arguments)
    if args.repeat < 1 or min(args.images) < 1 or args.batch < 1:
        parser().error("--repeats, --images and --batch must be at least 1")
    if not (args.limit > 0 and args.width > 0):
        parser().error(f"--limit and --width must be positive, got {args.limit:g} and {args.width:g}")
    import torch

    from certify import lirpa
    from runs import measure
    from runs.execute import resolve_device

    console = Console() if sys.stdout.isatty() else Console(width=200)
    try:
        device = resolve_device(args.device)
    except ValueError as error:
        parser().error(str(error))
    if args.cpu_time and device.type != "cpu":
        parser().error("--cpu-time measures a processor; leave it out, or pass --device cpu")
    torch.set_num_threads(args.threads or measure.available_cores())
    clock = Clock(device, args.cpu_time)
    seconds = "CPU seconds" if args.cpu_time else "seconds"
    head = f"{measure.device_name(device)}, {torch.get_num_threads()} threads, torch {torch.__version__}; {seconds}"
    head += ", median [smallest–largest]"
    if not lirpa.available():
        head += ". auto-LiRPA is not installed: its columns are left out"
    console.print(head)
    tables: list[Table] = []
    found: dict[str, Any] = {"environment": measure.environment(device), "clock": seconds, "bounds": [], "rows": []}
    if "bounds" in args.rows:
        cells = []
        for cell in bench_bounds.table(
            args.nets, args.methods, args.images, clock, args.repeat, args.width, args.limit
        ):
            console.print(f"  {cell.net} {cell.method} {cell.images}: {cell.seconds and cell.seconds.text('s')}")
            cells.append(cell)
        heading, rows = bench_bounds.lines(cells)
        tables.append(("bounds of the outputs, both ends", heading, rows))
        found["bounds"] = [asdict(cell) | {"passes": cell.passes, "goals": cell.goals()} for cell in cells]
    measured = simple_rows(args, clock)
    if measured:
        tables.append(as_table(measured))
        found["rows"] = [asdict(row) | {"met": row.met} for row in measured]
    for table in tables:
        show(table, console)
    from runs.store import write_atomic

    if args.json:
        write_atomic(Path(args.json), (json.dumps(found, indent=1) + "\n").encode())
    if args.markdown:
        write_atomic(Path(args.markdown), "\n\n".join([head, *map(markdown, tables), ""]).encode())
    return 0


def simple_rows(args: argparse.Namespace, clock: Clock) -> list[Measured]:
    """All rows but the table of bounds."""
    rows: list[Measured] = []
    if "ibp-step" in args.rows:
        names = [name for name in bench_training.objectives() if name.startswith("ibp")]
        rows += bench_training.steps(names, clock, args.repeat, args.width, STEP_BATCH, "ibp-step")
    if "training" in args.rows:
        rows += bench_training.training(clock, args.repeat, args.width, args.batch)
    if "crown" in args.rows:
        rows += crown(clock, args.width)
    if "sampling" in args.rows:
        rows += bench_training.sampling(clock, args.repeat, args.width)
    if "render" in args.rows:
        rows.append(rendering())
    return rows


def as_table(rows: Sequence[Measured]) -> Table:
    """The rows as text."""
    heading = ("what", "ours", "reference", "ratio", "n", "goal", "note")
    lines: list[tuple[str, ...]] = []
    for row in rows:
        reference = "–" if row.reference is None else row.reference.text(row.unit)
        ratio = "–" if row.ratio is None else f"{row.ratio:.3g}"
        goal = "–" if row.met is None else f"{row.goal}: {'met' if row.met else 'MISSED'}"
        lines.append((row.what, row.ours.text(row.unit), reference, ratio, str(row.ours.n), goal, row.note))
    return "ratios", heading, lines


def show(table: Table, console: Console) -> None:
    """Print a table."""
    from rich.table import Table as Grid

    title, heading, rows = table
    grid = Grid(title=title, title_justify="left")
    for name in heading:
        grid.add_column(name)
    for row in rows:
        grid.add_row(*row)
    console.print(grid)


def markdown(table: Table) -> str:
    """A table in Markdown."""
    title, heading, rows = table
    lines = ["| " + " | ".join(cells) + " |" for cells in (heading, ["---"] * len(heading), *rows)]
    return "\n".join([f"**{title}**", "", *lines])


def crown(clock: Clock, width: float, images: int = 16, eps: float = 0.05) -> list[Measured]:
    """Time, peak memory and bounds: CROWN on a batch beside auto-LiRPA (where installed) on its images in turn."""
    import torch

    import certify
    from certify import lirpa
    from runs.measure import Peak

    device = clock.device
    model = bench_nets.trained_with_ibp(device, width, eps)
    x, y = bench_nets.digits_at(28, device)
    correct = bench_nets.accuracy(model, x[-200:], y[-200:])
    x = x[-images:]
    p = certify.Linf(eps)

    def together() -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            return certify.bounds(model, x, p, method="crown")

    def one_by_one() -> tuple[Tensor, Tensor]:
        found = [certify.bounds(model, image[None], p, method="auto-lirpa:CROWN") for image in x]
        return torch.cat([low for low, _ in found]), torch.cat([high for _, high in found])

    with Peak(device) as ours_peak:
        low, high = together()
    ours = clock.repeated(together, 3)
    rows = []
    theirs: Spread | None = None
    if lirpa.available():
        answers: list[tuple[Tensor, Tensor]] = []
        theirs = Spread.of([clock.once(lambda: answers.append(one_by_one()))])
        their_low, their_high = answers[0]
        size = float(torch.maximum(their_low.abs(), their_high.abs()).max())
        same = crown_alone(model, x, p)
        apart = max(float((same[0] - their_low).abs().max()), float((same[1] - their_high).abs().max())) / size
        narrower = 1 - float((high - low).mean() / (their_high - their_low).mean())
        note = f"relative, intervals not intersected as there; intersected, ours are {100 * narrower:.2g} % narrower"
        what = "largest difference from auto-LiRPA's bounds"
        rows.append(Measured("crown", what, "", Spread.of([apart]), goal="≤ 1e-4", note=note))
    if ours_peak.mb is not None:
        what = "peak memory of the process" if device.type == "cpu" else "peak memory on the device"
        note = f"CROWN, {images} images"
        rows.append(Measured("crown", what, "MB", Spread.of([ours_peak.mb]), goal="≤ 1500", note=note))
    note = f"trained with {bench_nets.TRAINING_STEPS} IBP steps, {100 * correct:.0f} % of unseen images correct"
    ratio, goal = (None, "") if theirs is None else (ours.median / theirs.median, "≤ 0.25")
    if ratio is not None:
        note = f"{1 / ratio:.1f}× faster; {note}"
    return [Measured("crown", ROWS["crown"], "s", ours, theirs, ratio, goal, note), *rows]


def crown_alone(model: nn.Module, x: Tensor, p: certify.Perturbation) -> tuple[Tensor, Tensor]:
    """CROWN bounds whose intermediate intervals are CROWN's alone, not intersected with interval propagation."""
    import torch

    from certify.arithmetic import full_float32
    from certify.bounds.crown import crown_intervals, crown_rows
    from certify.bounds.region import attach
    from certify.bounds.trace import trace

    with torch.no_grad(), full_float32():  # as certify.bounds, which it is held against
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
    return Measured("render", ROWS["render"], "images/s", Spread.of([rate]), goal="≥ 60", note="one process")


if __name__ == "__main__":
    sys.exit(main())
