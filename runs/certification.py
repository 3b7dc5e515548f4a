"""Verdicts on the test images of a cell, written down batch by batch, and their summary."""

from __future__ import annotations

import math
import statistics as stdlib_statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import certify
from certify.arithmetic import full_float32
from certify.perturbations import Perturbation
from runs import car_sampling, deviations, measure, witness
from runs.cell import Cell, Perturb, Verifier
from runs.progress import Progress
from runs.store import Slot
from runs.suites import car

BATCH = 20
"""Images whose verdicts are written together."""


@full_float32()
def certify_one(
    cell: Cell,
    perturbation: Perturb,
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    pack: Any,
    slot: Slot,
    position: int,
    progress: Progress,
    state: int | None = None,
    states: int = 1,
    root: Path | None = None,
) -> dict[str, Any]:
    """Verdicts on all images ``x`` (N, C, H, W) of the test ``pack`` under one perturbation, and their summary.

    ``state`` numbers the network in a run that has ``states`` of them; its rows say so. ``root`` is the data directory.
    """
    label = perturbation.label
    rows = slot.examples()
    own = [r for r in rows if r["perturbation"] == label and r.get("state") == state and "event" not in r]
    whole = len(own) if len(own) == len(x) else len(own) - len(own) % BATCH
    if whole != len(own):  # a batch that was torn apart is done again as a whole, with the same numbers
        slot.keep_examples(len(rows) - (len(own) - whole))
        own = own[:whole]
    total = states * len(cell.perturbations) * len(x)
    for start in range(whole, len(x), BATCH):
        progress.step(cell, f"certifying {label}", position * len(x) + start, total)
        batch = slice(start, start + BATCH)
        fresh = verdicts(cell, perturbation, model, x[batch], y[batch], pack, start, root)
        fresh = [row if state is None else {**row, "state": state} for row in fresh]
        slot.append_examples(fresh)
        own += fresh
    if cell.verifier.method == car.METHOD:
        return car_sampling.summarise(perturbation, own, cell.verifier)
    result = summarise(perturbation, own, pack.task)
    if cell.verifier.method == deviations.METHOD:
        result |= deviations.summarise(own, cell.verifier.delta)
    return result


def verdicts(
    cell: Cell, perturbation: Perturb, model: nn.Module, x: Tensor, y: Tensor, pack: Any, start: int,
    root: Path | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """One row per image: clean result, verdict, certified margin, unstable ReLUs, seconds, peak memory."""
    verifier = cell.verifier
    if verifier.method == car.METHOD:
        return car_sampling.verdicts(model, x, y, perturbation, pack, verifier, start, root)
    p = measure.perturbation(perturbation)
    if verifier.method == deviations.METHOD:
        return _deviations(perturbation, p, verifier, model, x, y, pack, start)
    with torch.no_grad():
        outputs = model(x)
    spec: certify.Spec
    if pack.task == "keypoints":
        clean = (outputs - y).reshape(len(x), -1, 2).norm(dim=2).mean(1)
        spec = certify.Deviation(delta=verifier.delta)
    else:
        clean = (outputs.argmax(1) == y).float()
        spec = certify.Classification(y)
    budget = certify.Budget() if verifier.seconds is None else certify.Budget(seconds=verifier.seconds)
    with measure.Peak(x.device) as peak:
        found = certify.verify(model, x, spec, p, method=verifier.method, budget=budget, seed=start)
    unstable = measure.unstable_relus(model, x, p)
    columns = zip(
        clean.tolist(), found.status.tolist(), found.lower.tolist(), found.seconds.tolist(), unstable.tolist()
    )
    return [
        {
            "perturbation": perturbation.label,
            "index": start + i,
            "data": pack.fingerprint,
            "clean": value,
            "status": certify.Status(status).name.lower(),
            "lower": lower if math.isfinite(lower) else None,
            "unstable": count,
            "soundness": found.soundness,
            "method": found.method,
            "seconds": seconds,
            "peak_mb": peak.mb,
            # What the network gets wrong unperturbed needs no counterexample.
            **(witness.kept(found, i) if value or pack.task == "keypoints" else {}),
        }
        for i, (value, status, lower, seconds, count) in enumerate(columns)
    ]


def _deviations(
    perturbation: Perturb, p: Perturbation, verifier: Verifier, model: nn.Module, x: Tensor, y: Tensor, pack: Any,
    start: int,
) -> list[dict[str, Any]]:  # fmt: skip
    if pack.task != "keypoints":
        raise ValueError(
            f"the verifier {deviations.METHOD!r} measures how far keypoints move, but {pack.name} has classes; "
            "use --verifier auto"
        )
    visible = pack.extras.get("visibility")
    seen = None if visible is None else visible[start : start + len(x)]
    rows = deviations.verdicts(model, x, y, seen, p, verifier, start)
    return [{"perturbation": perturbation.label, "data": pack.fingerprint, **row} for row in rows]


def summarise(perturbation: Perturb, rows: Sequence[dict[str, Any]], task: str) -> dict[str, Any]:
    """Counts and means over the verdicts of one perturbation.

    "Verified" is correct and HOLDS for classification, HOLDS for keypoints; "attacked" counts the images (correct ones,
    for classification) for which no counterexample was found.
    """
    right = [task == "keypoints" or row["clean"] == 1.0 for row in rows]
    bits = "".join("1" if ok and row["status"] == "holds" else "0" for ok, row in zip(right, rows))
    peaks = [row["peak_mb"] for row in rows if row["peak_mb"] is not None]
    return {
        "label": perturbation.label,
        "kind": perturbation.kind,
        "magnitude": perturbation.magnitude,
        "images": len(rows),
        "clean": stdlib_statistics.fmean(row["clean"] for row in rows),
        "attacked": sum(ok and row["status"] != "violated" for ok, row in zip(right, rows)),
        "verified": bits.count("1"),
        "verified_bits": bits,
        **{name: sum(row["status"] == name for row in rows) for name in ("holds", "violated", "unknown", "timeout")},
        "unstable": stdlib_statistics.fmean(row["unstable"] for row in rows),
        "soundness": ", ".join(sorted({row["soundness"] for row in rows})),
        "method": ", ".join(sorted({row["method"] for row in rows})),
        "timing": {
            "seconds_mean": stdlib_statistics.fmean(row["seconds"] for row in rows),
            "seconds_median": stdlib_statistics.median(row["seconds"] for row in rows),
            "peak_mb": max(peaks, default=None),
        },
    }
