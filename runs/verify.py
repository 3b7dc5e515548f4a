"""Verify ONNX networks against VNN-LIB properties from the command line.

``python -m runs.verify MODEL.onnx PROPERTY.vnnlib[.gz] --timeout 60`` prints on its first line exactly one of
``holds``, ``violated``, ``unknown`` or ``timeout``, then time, bound and a counterexample that onnxruntime confirms.
``python -m runs.verify --instances LIST.csv`` runs a benchmark folder and compares with its known results.

Exit status: 0 for any verdict, 1 when a benchmark contradicts its known results or an instance failed, 2 for bad input.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from runs.decide import Answer
    from runs.instances import Instance

GRACE = 2.0
"""Seconds after the time limit at which a step that does not look at the clock is interrupted."""
DEFAULT_SECONDS = 60.0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="python -m runs.verify",
        description="Verify an ONNX network against a VNN-LIB property: holds, violated, unknown or timeout.",
    )
    p.add_argument("model", nargs="?", type=Path, metavar="MODEL.onnx[.gz]", help="the network")
    p.add_argument("property", nargs="?", type=Path, metavar="PROPERTY.vnnlib[.gz]", help="what must not happen")
    p.add_argument("--instances", type=Path, metavar="LIST.csv", help="a benchmark: rows of network,property,seconds")
    p.add_argument(
        "--timeout",
        type=_seconds,
        metavar="S",
        help=f"seconds an instance (default: {DEFAULT_SECONDS:.0f}, or what the list says)",
    )
    p.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, or auto: cuda if there is one (default: cpu)")
    p.add_argument("--threads", type=_threads, metavar="N", help="CPU threads (default: torch's choice)")
    p.add_argument("--seed", type=int, default=0, help="for random starts of the attack (default: 0)")
    p.add_argument("--json", action="store_true", help="everything after the verdict as one JSON object")
    p.add_argument("--results", type=Path, default=Path("results/verify"), help="where --instances keeps its results")
    p.add_argument("--export", nargs="+", choices=("md", "csv", "json"), default=(), help="also write the table there")
    p.add_argument("--force", action="store_true", help="run instances again whose results are there")
    return p


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number of seconds > 0, got {text!r}")
    return value


def _threads(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number of threads >= 1, got {text!r}")
    return int(text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    started = time.monotonic()
    p = parser()
    args = p.parse_args(arguments)
    if (args.instances is None) == (args.model is None) or (args.instances is None and args.property is None):
        p.error("give MODEL.onnx and PROPERTY.vnnlib, or --instances LIST.csv")
    try:
        device = _prepare(args.device, args.threads)
        if args.instances is not None:
            return benchmark(args, device)
        seconds = args.timeout if args.timeout is not None else DEFAULT_SECONDS
        answer = solve(args.model, args.property, seconds, device, args.threads, args.seed, started)
    except (OSError, ValueError, NotImplementedError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    print(answer.verdict)
    if args.json:
        print(json.dumps(dataclasses.asdict(answer)))
    else:
        show(answer)
    return 0


def _prepare(device: str, threads: int | None) -> str:
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(device).type
    except RuntimeError as e:
        raise ValueError(f"unknown device {device!r}: {str(e).splitlines()[0]}") from None
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {device!r} was asked for, but torch sees no CUDA device; use --device cpu or auto")
    return device


def solve(
    model: Path, prop: Path, seconds: float, device: str, threads: int | None, seed: int, started: float | None = None
) -> Answer:
    """Load both files, decide, and answer "timeout" at the latest `GRACE` seconds after the limit.

    `started` is the `time.monotonic()` from which the limit counts (default: now), so that loading is included.

    Raises:
        FileNotFoundError, runs.onnx.ImportFailure, runs.vnnlib.SyntaxFailure: see `runs.onnx.load`, `runs.vnnlib.load`.
    """
    started = time.monotonic() if started is None else started
    from runs import alarm, decide, onnx, vnnlib

    try:
        with alarm.limit(max(0.01, seconds + GRACE - (time.monotonic() - started))):
            network = onnx.load(model)
            problem = vnnlib.load(prop, network.input_shape, network.outputs)
            left = seconds - (time.monotonic() - started)
            if left > 0:
                runtime = onnx.Runtime(model, threads or 1)
                answer = decide.decide(network, runtime, problem, seconds=left, device=device, seed=seed)
                return dataclasses.replace(answer, seconds=time.monotonic() - started)
    except alarm.OutOfTime:
        pass
    return decide.Answer("timeout", time.monotonic() - started)


def show(answer: Answer) -> None:
    """The lines after the verdict, for people; a counterexample in the form that VNN-COMP uses."""
    print(f"seconds: {answer.seconds:.2f}")
    if answer.lower is not None:
        print(f"lower bound on the margin: {answer.lower:.6g}")
    if answer.work:
        print("work: " + ", ".join(f"{count} {name}" for name, count in answer.work.items()))
    for note in answer.notes:
        print(f"note: {note}")
    if answer.counterexample is not None:
        x, y = answer.counterexample
        lines = [f"({name}_{i} {value!r})" for name, values in (("X", x), ("Y", y)) for i, value in enumerate(values)]
        print("counterexample (confirmed by onnxruntime):\n(" + "\n".join(lines) + ")")


def benchmark(args: argparse.Namespace, device: str) -> int:
    """Run the list of instances and print the table; exit status 1 on a contradiction or a failed instance."""
    from rich.console import Console

    from runs import instances

    listed = instances.read(args.instances, args.timeout)
    name = f"{args.instances.resolve().parent.name}-{args.instances.stem}"
    console = Console(stderr=True)

    def answer(instance: Instance) -> Mapping[str, Any]:
        started = time.monotonic()
        try:
            found = solve(
                instance.network_file, instance.property_file, instance.seconds, device, args.threads, args.seed
            )
        except (ValueError, NotImplementedError, RuntimeError, MemoryError) as e:
            message = f"{type(e).__name__}: {e}"
            return {"verdict": "error", "seconds": time.monotonic() - started, "error": message}
        return dataclasses.asdict(found)

    results = []
    with console.status("") as status:
        for result in instances.run(listed, answer, args.results / f"{name}.jsonl", seed=args.seed, force=args.force):
            results.append(result)
            status.update(f"{len(results)}/{len(listed)}")
            console.print(" ".join(instances.cells(result)[:6]), highlight=False, soft_wrap=True)
    if args.json:
        print(json.dumps([instances.as_dict(r) for r in results]))
    else:
        out = Console(width=None if sys.stdout.isatty() else 160)  # a file has no width, and names should not be cut
        out.print(instances.table(results))
        for line in instances.summary(results):
            out.print(line, highlight=False)
    for path in instances.export(results, args.results / name, args.export):
        console.print(f"wrote {path}", highlight=False)
    return int(any(r.against_known == "CONTRADICTS" or r.verdict == "error" for r in results))


if __name__ == "__main__":
    sys.exit(main())
