"""The comparison from the command line: plan, run, leaderboard.

python -m runs.compare                              the quick arena
python -m runs.compare arena --preset smoke         a minute that shows that everything works
python -m runs.compare report --results results     the leaderboard of what is on record, without running anything
python -m runs.compare check --results results      every verdict on record attacked again
python -m runs.compare claims --results results     what the records say of each claim of the papers
python -m runs.compare pack --results results --to FILE.jsonl    the records as one file, for report --records
python -m runs.compare --list                       what there is to choose from
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from runs import commands, plugins, suites
from runs.cell import PERTURBATIONS, Perturb
from runs.commands import COMMANDS, FAILED, OK
from runs.engine import Shard
from runs.report import FORMATS
from runs.store import Store, StoreError
from runs.suites.plan import check, named_width, owners_of

if TYPE_CHECKING:
    from rich.console import Console

    from runs import progress
    from runs.cell import Cell
    from runs.execute import Execute

T = TypeVar("T")
N = TypeVar("N", int, float)

CERTIFIERS = {
    "auto": "bounds in order of cost, an attack, then a complete verifier, within the time an image has",
    "line": "exact for brightness, contrast and other perturbations of one or two parameters",
    "bab": "branch and bound (alpha,beta-CROWN): complete for boxes and balls",
    "milp": "mixed-integer programming (HiGHS): exact for small networks",
    "ibp": "interval bound propagation: fast, loose on networks not trained for it",
    "crown-ibp": "linear bounds of the output over intervals inside",
    "crown": "linear bounds of every unit (CROWN)",
    "forward": "lines in the parameters of a semantic perturbation",
    "deviation": "the largest deviation of keypoints, exact, with verdicts at several distances",
    "probabilistic": "random draws: a flip is rarer than eps, with a stated confidence (and CC-Cert beside it)",
}
ON_RECORDS = {"report": commands.report, "check": commands.recheck, "claims": commands.claims, "pack": commands.pack}
"""What runs for each of them. Nothing is trained."""

ENGINES = ("auto", "serial", "processes", "ray")
USAGE, INTERRUPTED = 2, 130


def _number(kind: Callable[[str], N]) -> Callable[[str], N]:
    """Reads one of several numbers."""

    def read(text: str) -> N:
        try:
            return kind(text)
        except ValueError:
            what = "whole number" if kind is int else "number"
            raise argparse.ArgumentTypeError(f"{text!r} is no {what}; several are separated by spaces") from None

    return read


def parser() -> argparse.ArgumentParser:
    """The command line's grammar."""
    p = argparse.ArgumentParser(
        prog="python -m runs.compare",
        description="Train, prune and certify networks side by side, and print the leaderboard. "
        "Finished cells are kept under --results: the same command resumes after a kill and repeats nothing.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    what = p.add_argument_group("what to run")
    what.add_argument(
        "suite", nargs="?", default="arena",
        help="a suite: " + ", ".join(suites.suites()) + "; or " + "; ".join(f"'{n}': {t}" for n, t in COMMANDS.items()),
    )  # fmt: skip
    what.add_argument(
        "--preset", default="quick",
        help=f"how much of the suite: {', '.join(suites.preset_names('arena'))}; usn, nrs and car have studies: --list",
    )  # fmt: skip
    what.add_argument("--methods", nargs="+", metavar="NAME", help="only these pruning methods")
    what.add_argument("--models", nargs="+", metavar="NAME[:WIDTH]", help="these networks instead of the preset's")
    what.add_argument("--datasets", nargs="+", metavar="NAME", help="these data sets instead of the preset's default")
    what.add_argument("--perturbations", nargs="+", metavar="KIND:SIZE", help="for instance linf:0.1 brightness:2/255")
    what.add_argument(
        "--ratios", nargs="+", type=_number(float), metavar="R", help="these fractions removed, in [0, 1)"
    )
    what.add_argument("--trainings", nargs="+", metavar="NAME", help="only these trainings, for instance natural ibp")
    what.add_argument("--verifier", metavar="NAME", help="certifier: " + ", ".join(CERTIFIERS))
    what.add_argument(
        "--images", type=int, metavar="N", help="certify the first N test images instead of the preset's number"
    )
    what.add_argument("--seeds", nargs="+", type=_number(int), metavar="S", help="these seeds instead of the preset's")
    what.add_argument("--limit", type=int, metavar="N", help="run (or check) at most the first N cells")
    what.add_argument("--shard", metavar="I/N", help="only part I of N equal parts of the plan: one for each machine")
    what.add_argument(
        "--plugin", action="append", default=[], metavar="MODULE",
        help="load methods, data sets, perturbations, verifiers from MODULE.register; may be repeated",
    )  # fmt: skip
    how = p.add_argument_group("how to run it")
    how.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:1")
    how.add_argument("--data-dir", type=Path, metavar="DIR", help="where data sets lie; $CERTPRUNE_DATA if not given")
    how.add_argument(
        "--results", type=Path, default=Path("results"), metavar="DIR", help="where records and leaderboards go"
    )
    how.add_argument("--engine", choices=ENGINES, default="auto", help="auto: processes on a CPU, serial on a GPU")
    how.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="cells at once with processes or ray; one per core (or GPU of a cluster)",
    )
    how.add_argument(
        "--address", help="with --engine ray: a running cluster (or auto); one is started here if not given"
    )
    how.add_argument("--gpus-per-worker", type=float, metavar="F", help="with --engine ray: 0.5 puts two on one GPU")
    how.add_argument("--threads", type=int, metavar="N", help="CPU threads of a cell; an equal share if not given")
    how.add_argument("--force", action="store_true", help="redo cells that are on record")
    how.add_argument("--dry-run", action="store_true", help="print the cells and the expected minutes, run nothing")
    how.add_argument(
        "--export", nargs="*", default=list(FORMATS), metavar="F", help="files to write: " + ", ".join(FORMATS)
    )
    how.add_argument("--traceback", action="store_true", help="print the full traceback of failed cells")
    again = p.add_argument_group("check")
    again.add_argument("--budget", type=float, metavar="SECONDS", help="stop after so long; the next check goes on")
    again.add_argument("--probes", type=int, default=1000, metavar="N", help="forward passes for an image, about")
    again.add_argument("--cross", type=int, default=2, metavar="N", help="images a verdict for auto-LiRPA to bound")
    stored = p.add_argument_group("report, claims and pack")
    stored.add_argument(
        "--records", nargs="*", type=Path, metavar="FILE",
        help="read packed records instead of --results; those that come with this clone if no file is named",
    )  # fmt: skip
    stored.add_argument("--to", type=Path, metavar="FILE", help="where pack writes: a file ending in .jsonl")
    stored.add_argument("--made-by", metavar="TEXT", help="how the records came about; found out for a whole preset")
    p.add_argument(
        "--list", action="store_true", help="list suites, methods, models, data sets, perturbations, certifiers"
    )
    return p


def parsed(p: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """The arguments; of a second word without an option the error says what it may have been meant for."""
    args, left = p.parse_known_args(arguments)
    if left:
        preset = next((text for text in left if owners_of(text)), None)
        hint = f" (a preset is chosen by --preset {preset})" if preset else ""
        if set(left) & {*suites.suites(), *COMMANDS}:
            hint = " (one suite or command at a time)"
        p.error(f"unrecognized arguments: {' '.join(left)}{hint}")
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, 1 failed cells, 2 wrong usage, 130 interrupted."""
    from rich.console import Console

    p = parser()
    args = parsed(p, arguments)
    console = Console() if sys.stdout.isatty() else Console(width=_width())
    errors = Console(stderr=True, soft_wrap=True)
    try:
        plugins.load(args.plugin)
        if args.list:
            show_list(console)
            return OK
        commands.check_suite(args.suite)
        commands.check_options(args, p.get_default)
        return ON_RECORDS.get(args.suite, run)(args, console)
    except (ValueError, ImportError, ConnectionError, FileNotFoundError) as error:
        errors.print(f"error: {error}", markup=False, highlight=False, style="red")
        return USAGE
    except (StoreError, OSError) as error:
        errors.print(f"error: {error}", markup=False, highlight=False, style="red")
        return FAILED


def _width() -> int:
    """Columns of a table that goes to a file or a pipe: $COLUMNS, or enough for every column."""
    try:
        return max(80, int(os.environ["COLUMNS"]))
    except (KeyError, ValueError):
        return 200


def certifiers() -> dict[str, str]:
    """Certifiers with one line each, those of plug-ins among them."""
    return CERTIFIERS | plugins.verifiers()


def show_list(console: Console) -> None:
    """Print what can be chosen, one line each."""
    from rich.table import Table as RichTable

    from runs.packages import ours

    sections = [
        ("suites", suites.suites()),
        ("instead of a suite", COMMANDS),
        *((f"presets of {name}", suites.preset_names(name)) for name in suites.suites()),
    ]
    sections += [(title, ours(package).describe()) for title, package in _NAMED_BY]
    sections += [
        ("perturbations (--perturbations KIND:SIZE)", dict(PERTURBATIONS)),
        ("certifiers (--verifier)", certifiers()),
    ]
    for title, entries in sections:
        grid = RichTable.grid(padding=(0, 2))
        grid.add_column(no_wrap=True)
        grid.add_column()
        for name, text in entries.items():
            grid.add_row(f"  {name}", text)
        console.print(title, style="bold", highlight=False)
        console.print(grid, highlight=False, markup=False)


_NAMED_BY = (("methods", "methods"), ("models", "models"), ("data sets", "datasets"))


def selection(args: argparse.Namespace) -> suites.Selection:
    """What the arguments ask for, with unknown names refused.

    Raises:
        ValueError: an unknown name, with close matches.
    """
    from runs.packages import ours

    for name in args.models or ():
        check("model", named_width(name)[0], ours("models").names())
    for name in args.datasets or ():
        check("data set", name.split(":")[0], ours("datasets").names())
    for text in args.perturbations or ():
        check("perturbation", re.split("[:= ]", text.lower())[0], PERTURBATIONS)
    if args.verifier is not None:
        check("certifier", args.verifier, certifiers())
    return suites.Selection(
        methods=_tuple(args.methods),
        models=_tuple(args.models),
        datasets=_tuple(args.datasets),
        perturbations=tuple(Perturb.parse(text.lower()) for text in args.perturbations) if args.perturbations else None,
        seeds=_tuple(args.seeds),
        ratios=_tuple(args.ratios),
        trainings=_tuple(args.trainings),
        images=args.images,
        verifier=args.verifier,
        limit=args.limit,
    )


def _tuple(values: Sequence[T] | None) -> tuple[T, ...] | None:
    return tuple(dict.fromkeys(values)) if values else None


def run(args: argparse.Namespace, console: Console) -> int:
    """Plan, run, and print the leaderboard of a suite."""
    from runs import engine, progress

    whole = suites.plan(args.suite, args.preset, selection(args))
    plan, part = whole, ""
    if args.shard is not None:
        plan, part = own_part(whole, Shard.parse(args.shard)), f", shard {args.shard}"
    store = Store(args.results)
    done = [] if args.force else [cell for cell in plan.cells if engine.finished(store.record(cell)) is not None]
    timed = f"{plan.preset.hardware}{' with the verifier of the preset' if args.verifier else ''}"
    console.print(
        f"{args.suite}, preset {args.preset}{part}: {len(plan.cells)} cells, {len(done)} on record; "
        f"expected {_minutes(plan.seconds(done))} on {timed}. Expect: {plan.preset.expectation}.",
        highlight=False,
    )
    check_plan(plan, set(done), args)
    if args.dry_run:
        show_plan(plan, set(done), console)
        return OK
    interrupted = False
    with progress.show(len(plan.cells), console) as shown:
        try:
            run_cells(plan.cells, args, store, shown)
        except KeyboardInterrupt:
            interrupted = True
    # A shard shows the whole plan as far as it is here, so that shards in one folder write the same files.
    records = [record for cell in whole.cells if (record := store.record(cell)) is not None]
    status = commands.show_records(records, args, console)
    if len(plan.cells) < len(whole.cells):
        console.print(f"{len(records)} of the plan's {len(whole.cells)} cells are on record here.", highlight=False)
    if interrupted:
        left = sum(store.record(cell) is None for cell in plan.cells)
        console.print(f"Interrupted with {left} cells to go. The same command resumes where this one stopped.")
        return INTERRUPTED
    return status


def check_plan(plan: suites.Plan, done: set[Cell], args: argparse.Namespace) -> None:
    """Refuse a plan whose data sets are not there, or whose verifiers do not decide its perturbations.

    A dry run trusts the preset's perturbations and looks at those of the command line alone, so that it stays quick. On
    a cluster the data lies with the workers, and no file is looked for here.

    Raises:
        ValueError: what is missing or wrong, and what to do.
    """
    from runs import preflight

    left = [cell for cell in plan.cells if cell not in done]
    if args.perturbations or not args.dry_run:
        preflight.check_perturbations(perturbation for cell in left for perturbation in cell.perturbations)
    if args.address is None:
        preflight.check_data(left, args.data_dir)
    else:
        preflight.check_verifiers(left)


def own_part(plan: suites.Plan, shard: Shard) -> suites.Plan:
    """The cells of a plan that a shard runs."""
    mine = shard.of(plan.cells, plan.costs)
    return replace(plan, cells=tuple(plan.cells[i] for i in mine), costs=tuple(plan.costs[i] for i in mine))


def run_cells(cells: Sequence[Cell], args: argparse.Namespace, store: Store, shown: progress.Progress) -> None:
    """Run the cells with the engine, the workers and the threads that the arguments ask for."""
    from runs import engine, ray_engine
    from runs.execute import Execute
    from runs.measure import available_cores

    data_dir: Path | None = args.data_dir
    if args.engine == "ray":  # workers have a working directory of their own
        ray_engine.require()
        if ":" in args.device:
            raise ValueError(f"Ray chooses the GPU of each worker; use --device cuda, not {args.device}")
        store, data_dir = Store(store.root.resolve()), data_dir and data_dir.resolve()

    def work(threads: int, device: str = args.device) -> Callable[[], Execute]:
        return Execute.factory(device, threads=threads, data_dir=data_dir, store=store)

    def elsewhere(threads: int) -> engine.Factory:
        return plugins.Prepared(tuple(args.plugin), work(threads))

    left = [cell for cell in cells if args.force or engine.finished(store.record(cell)) is None]
    if args.engine == "ray":
        if args.address is None:  # what has to be rendered or unpacked, once for all workers of this machine
            work(available_cores(), "cpu")().prepare(left, shown)
        gpus = 0.0 if args.device == "cpu" else args.gpus_per_worker
        cluster = ray_engine.RayEngine(args.workers, args.threads or 1, gpus, args.address)
        cluster.run(cells, elsewhere(args.threads or 1), store, shown, force=args.force)
        return
    cores = available_cores()
    here = work(args.threads or cores)()
    workers = min(args.workers or cores, max(1, len(left)))
    if args.engine == "processes" or (args.engine == "auto" and here.device.type == "cpu" and workers > 1):
        here.prepare(left, shown)
        threads = args.threads or max(1, cores // workers)
        engine.ProcessEngine(workers).run(cells, elsewhere(threads), store, shown, force=args.force)
    elif (args.workers or 1) > 1 and here.device.type != "cpu":
        raise ValueError(
            f"--workers {args.workers} on a GPU: say --engine processes (cells share it) or --engine ray (one GPU each)"
        )
    else:
        engine.SerialEngine().run(cells, here, store, shown, force=args.force)


def _minutes(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def show_plan(plan: suites.Plan, done: set[object], console: Console) -> None:
    """Print every cell with its key, its expected seconds, and whether it is on record."""
    from rich.table import Table as RichTable

    grid = RichTable(title="cells", title_justify="left")
    for heading in ("key", "cell", "perturbations", "expected", "state"):
        grid.add_column(
            heading, no_wrap=heading != "perturbations", justify="right" if heading == "expected" else "left"
        )
    for cell, cost in zip(plan.cells, plan.costs):
        labels = ", ".join(p.label for p in cell.perturbations)
        grid.add_row(cell.key, cell.label, labels, f"{cost:.1f} s", "on record" if cell in done else "to run")
    console.print(grid)


if __name__ == "__main__":
    sys.exit(main())
