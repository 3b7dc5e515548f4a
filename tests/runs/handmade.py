"""Cells and records made by hand: no training, no torch."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

from runs.cell import Cell, Data, Network, Perturb, Pruning, Training, Verifier
from runs.engine import Work, failure
from runs.progress import Progress
from runs.store import DONE, Record, Slot, file_sha256, write_atomic

LINF = Perturb("linf", 0.1)


def make_cell(
    method: str = "dense",
    ratio: float = 0.0,
    seed: int = 0,
    *,
    training: Training | None = None,
    perturbations: tuple[Perturb, ...] = (LINF,),
    images: int = 10,
    **changes: Any,
) -> Cell:
    parts: dict[str, Any] = {
        "pruning": Pruning(method, ratio),
        "training": training or Training("natural", epochs=2),
        "network": Network("mlp"),
        "data": Data("digits"),
        "perturbations": perturbations,
        "verifier": Verifier("crown", images=images),
        "seed": seed,
    }
    return Cell(**(parts | changes))


def make_result(perturbation: Perturb, bits: str, clean: float, attacked: int, seconds: float = 0.5) -> dict[str, Any]:
    holds = bits.count("1")
    return {
        "label": perturbation.label,
        "kind": perturbation.kind,
        "magnitude": perturbation.magnitude,
        "soundness": "real-arithmetic",
        "images": len(bits),
        "clean": clean,
        "attacked": attacked,
        "verified": holds,
        "verified_bits": bits,
        "holds": holds,
        "violated": len(bits) - attacked,
        "unknown": attacked - holds,
        "timeout": 0,
        "unstable": 12.0,
        "timing": {"seconds_mean": seconds, "seconds_median": seconds, "peak_mb": 321.0},
    }


def make_record(
    cell: Cell, bits: str, *, clean: float = 0.9, attacked: int = 8, task: str = "classification"
) -> Record:
    return {
        "schema": cell.schema,
        "key": cell.key,
        "training_key": cell.training_key,
        "status": DONE,
        "cell": cell.to_dict(),
        "data": {"task": task, "fingerprints": {"test": cell.data.name}},
        "size": {
            "parameters": 1000,
            "parameters_left": 1000 - int(800 * cell.pruning.ratio),
            "flops": 2000,
            "flops_nonzero": 2000 - int(1800 * cell.pruning.ratio),
            "flops_executed": 2000,
        },
        "results": [make_result(p, bits, clean, attacked) for p in cell.perturbations],
        "environment": {"versions": {"torch": "2.15"}, "device": "cpu"},
    }


def work(cell: Cell, slot: Slot, progress: Progress) -> Record:
    """A stand-in for a cell: "trains", then certifies three batches of two images, resuming where it stopped."""
    if slot.trained() is None:
        slot.clear_examples()
        slot.model_path.write_bytes(f"weights of {cell.training_key}".encode())
        files = {slot.model_path.name: file_sha256(slot.model_path)}
        slot.write_history([{"epoch": 0, "loss": 1.5}, {"event": "trained", "files": files}])
    done = {row["index"] for row in slot.examples()}
    for start in range(0, 6, 2):
        fresh = [i for i in range(start, start + 2) if i not in done]
        if fresh:
            slot.append_examples([{"index": i, "value": (cell.seed + 1) * i / 3} for i in fresh])
    rows = slot.examples()
    assert [row["index"] for row in rows] == list(range(6))
    record = make_record(cell, "1" * 6 + "0" * 4)
    return {**record, "sum": sum(row["value"] for row in rows)}


def broken(cell: Cell, slot: Slot, progress: Progress) -> Record:
    raise ZeroDivisionError(f"no luck with seed {cell.seed}")


def deadly(cell: Cell, slot: Slot, progress: Progress) -> Record:
    """Dies as if killed when it meets seed 1."""
    if cell.seed == 1:
        time.sleep(0.3)  # so that the parent hears of the beginning first
        os.kill(os.getpid(), signal.SIGKILL)
    return work(cell, slot, progress)


def sleeper(cell: Cell, slot: Slot, progress: Progress) -> Record:
    """Says who it is, then takes longer than any test."""
    write_atomic(slot.path / "worker.pid", str(os.getpid()).encode())
    time.sleep(600)
    return work(cell, slot, progress)


def make_work() -> Work:
    return work


def make_broken() -> Work:
    return broken


def make_deadly() -> Work:
    return deadly


def make_sleeper() -> Work:
    return sleeper


def make_failure() -> Record:
    cell = make_cell("magnitude", 0.5)
    try:
        raise FloatingPointError("loss is NaN in epoch 3")
    except FloatingPointError as error:
        return failure(cell, error)
