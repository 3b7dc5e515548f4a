"""What the command line does with records: leaderboard, claims, check, pack. `runs.compare` reads the arguments."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from runs import suites
from runs.report import FORMATS
from runs.store import Record, Store
from runs.suites.plan import check, owners_of

if TYPE_CHECKING:
    from rich.console import Console

    from runs.leaderboard import Table

OK, FAILED = 0, 1
"""Exit statuses."""

COMMANDS = {
    "report": "the leaderboard of what is on record",
    "check": "every verdict on record attacked again",
    "claims": "each claim of the papers, held against what is on record",
    "pack": "the records under --results as one file of JSON lines, --to",
}
"""What can be asked for in place of a suite, with one line each."""

PROGRAMS = ("verify", "bench", "export")
"""What is asked for there by mistake: they are commands of their own."""

TAKES: Mapping[str, tuple[str, ...]] = {
    "report": ("results", "records", "export", "data_dir", "traceback"),
    "check": ("results", "limit", "device", "threads", "data_dir", "budget", "probes", "cross"),
    "claims": ("results", "records", "export"),
    "pack": ("results", "to", "made_by"),
}
"""The options that each command reads. A suite reads all but `ALONE`."""

ALONE = ("records", "to", "made_by", "budget", "probes", "cross")
"""The options that no suite reads."""


def check_suite(name: str) -> None:
    """Refuse a suite that there is not, among which a preset may be meant."""
    known = (*suites.suites(), *COMMANDS)
    if name in PROGRAMS:
        raise ValueError(f"{name!r} is a command of its own: python -m runs.{name} --help")
    if name not in known and (owners := owners_of(name)):
        raise ValueError(f"{name!r} is a preset, not a suite: python -m runs.compare {owners[0]} --preset {name}")
    check("suite", name, known)


def check_options(args: argparse.Namespace, default: Callable[[str], object]) -> None:
    """Refuse options that nothing would read, and values that no command takes.

    Raises:
        ValueError: which option, and what to do.
    """
    given = [name for name, value in vars(args).items() if value != default(name) and name not in ("suite", "plugin")]
    takes = TAKES.get(args.suite)
    for name in given:
        if takes is not None and name not in takes:
            raise ValueError(
                f"{_option(name)} does not apply to {args.suite!r}; it takes {', '.join(map(_option, takes))}"
            )
        if takes is None and name in ALONE:
            having = [command for command, options in TAKES.items() if name in options]
            raise ValueError(f"{_option(name)} does not apply to the suite {args.suite!r}, only to {', '.join(having)}")
    for name in ("limit", "images", "threads", "workers"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"{_option(name)} must be at least 1, got {value}")
    for seed in args.seeds or ():
        if seed < 0:
            raise ValueError(f"--seeds must be at least 0, got {seed}")
    for name in args.export:
        if name not in FORMATS:
            raise ValueError(f"unknown export format {name!r}; known: {', '.join(FORMATS)}")
    if args.engine != "ray" and (args.address is not None or args.gpus_per_worker is not None):
        raise ValueError("--address and --gpus-per-worker go with --engine ray")
    if args.engine == "serial" and (args.workers or 1) > 1:
        raise ValueError(
            f"--engine serial runs one cell at a time: for --workers {args.workers} say --engine processes"
        )
    for name in ("results", "data_dir"):
        _check_folder(_option(name), getattr(args, name))


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _check_folder(option: str, path: Path | None) -> None:
    """Refuse the path of a file, or one that leads through a file."""
    found = next((place for place in (path, *path.parents) if place.exists()), None) if path is not None else None
    if found is not None and not found.is_dir():
        raise ValueError(f"{option} must be a folder, {found} is a file")


def on_record(args: argparse.Namespace, console: Console) -> tuple[list[Record], bool]:
    """The records that --records or --results name, and whether all of them could be read.

    Raises:
        ValueError, FileNotFoundError, StoreError: packed records that are missing, damaged or contradict each other.
    """
    if args.records is not None:
        from runs import records

        packed = records.read_all(args.records)
        for one in packed:
            console.print(f"{one.path.name}: {one.about.line}.", highlight=False, markup=False, soft_wrap=True)
        return records.merged(packed), True
    return scanned(args.results, console)


def scanned(folder: Path, console: Console) -> tuple[list[Record], bool]:
    """Every record under a results folder, and whether all of them could be read; prints what could not be."""
    scan = Store(folder).scan()
    for problem in scan.problems:
        console.print(problem, style="red", markup=False, highlight=False)
    return scan.records, not scan.problems


def required(found: list[Record], args: argparse.Namespace) -> list[Record]:
    """The records, of which there must be some.

    Raises:
        ValueError: there is none.
    """
    if not found:
        stored = ", or --records for those that come with this clone" if "records" in TAKES[args.suite] else ""
        place = args.results.resolve()
        raise ValueError(f"no records under {place}; run python -m runs.compare first, or give --results DIR{stored}")
    return found


def report(args: argparse.Namespace, console: Console) -> int:
    """Print the leaderboard of everything on record.

    Raises:
        ValueError: there is no record.
    """
    found, intact = on_record(args, console)
    status = show_records(required(found, args), args, console)
    return status if intact else FAILED


def claims(args: argparse.Namespace, console: Console) -> int:
    """Print what the records say of each claim; without any, what the papers' own numbers say."""
    from runs import claims as evidence
    from runs import nrs_records

    found, intact = on_record(args, console)
    answers = evidence.evaluate(evidence.CLAIMS, nrs_records.unfold(found))
    evidence.print_terminal(answers, console)
    if args.export:
        args.results.mkdir(parents=True, exist_ok=True)
        for path in evidence.export(answers, args.results):
            console.print(f"wrote {path}", highlight=False, markup=False, soft_wrap=True)
    return OK if intact else FAILED


def pack(args: argparse.Namespace, console: Console) -> int:
    """Write the records under --results as one file.

    Raises:
        ValueError: no record, no --to, or unknown how the records came about.
    """
    from runs import records

    if args.to is None:
        raise ValueError("pack reads --results DIR and writes --to FILE.jsonl")
    found, intact = on_record(args, console)
    packed = records.pack(required(found, args), args.to, args.made_by)
    console.print(f"wrote {packed.path}: {packed.about.line}", highlight=False, markup=False, soft_wrap=True)
    return OK if intact else FAILED


def recheck(args: argparse.Namespace, console: Console) -> int:
    """Attack every verdict under --results again; 1 when one breaks or could not be checked.

    Raises:
        ValueError: there is no finished record, or a number out of range.
    """
    import torch

    from runs import check as checking
    from runs import checked
    from runs.execute import resolve_device

    if args.budget is not None and not args.budget > 0:
        raise ValueError(f"--budget is a number of seconds > 0, got {args.budget}")
    effort = checked.Effort(args.probes, args.cross)
    found, intact = scanned(args.results, console)
    records = checked.order(found, args.results)[: args.limit]
    if not records:
        raise ValueError(f"no finished records under {args.results.resolve()}; run python -m runs.compare first")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    checker = checking.Checker(Store(args.results), resolve_device(args.device), args.data_dir, effort)
    findings = checking.run(checker, records, args.budget, console)
    console.print(checked.summary(findings, len(records)), highlight=False)
    sound = not any(found.breaks or found.problems for found in findings)
    return OK if intact and sound else FAILED


def show_records(records: Sequence[Record], args: argparse.Namespace, console: Console) -> int:
    """Print and export the leaderboard; 1 when a cell failed."""
    from runs import car_report, checked, engine, leaderboard, nrs_records, nrs_report, report, usn_report

    tables: list[Table] = leaderboard.build(nrs_records.unfold(records))
    report.print_terminal(tables, console)
    if records and args.export:
        args.results.mkdir(parents=True, exist_ok=True)
        for path in report.export(tables, records, args.results, args.export, data_dir=args.data_dir):
            console.print(f"wrote {path}", highlight=False, markup=False, soft_wrap=True)
    if (line := checked.footer(records, args.results)) is not None:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    for shown in (usn_report.show, nrs_report.show, car_report.show):
        for path in shown(records, args.results, args.export or (), console):
            console.print(f"wrote {path}", highlight=False, markup=False, soft_wrap=True)
    failures = engine.failed(records)
    for record in failures:
        error = record["error"]
        console.print(
            f"failed cell {args.results / record['key']}: {error['type']}: {error['message']}",
            style="red", markup=False, highlight=False, soft_wrap=True,
        )  # fmt: skip
        if args.traceback:
            console.print(error["traceback"], markup=False, highlight=False, soft_wrap=True)
    if failures:
        console.print("The full tracebacks are in record.json (or --traceback). The same command tries them again.")
    return FAILED if failures else OK
