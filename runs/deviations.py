"""Keypoint networks certified in pixels: how far outputs move at most, and what that means keypoint by keypoint.

For every image and perturbation: the verdict at the cell's δ with its time and work, the largest deviation enclosed to
``TOLERANCE`` (from which the verdict at any other δ follows), which keypoints are right and which are verified, and
what bounds without branching would have said.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import certify
from certify.perturbations import AffineFamily, Perturbation
from runs import measure, witness
from runs.cell import Verifier

METHOD = "deviation"
"""Name of this certifier in a cell."""

DELTAS = (1.0, 0.5, 0.25)
"""Pixels by which a coordinate may move, for the verdicts that are read off the largest deviation."""

TAUS = (1.0, 2.0, 4.0)
"""A keypoint is right when both coordinates are within this many pixels of the truth."""

TOLERANCE = 1e-3
"""Pixels between the two ends of the largest deviation."""

SINGLE_SHOT = ("ibp", "crown-ibp", "forward", "crown")
"""Bounds without branching, in order of cost. Full CROWN runs on the first ``crown_images`` images alone."""


class Contradiction(RuntimeError):
    """Two certifiers disagree on the same image: one of them is wrong."""


def crown_images(verifier: Verifier) -> int:
    """On how many images single-shot CROWN runs, from the verifier's settings (none if they do not say)."""
    return int(dict(verifier.settings).get("crown_images") or 0)


def verdicts(
    model: nn.Module, x: Tensor, y: Tensor, visible: Tensor | None, p: Perturbation, verifier: Verifier, start: int
) -> list[dict[str, Any]]:
    """One row an image.

    Args:
        model: keypoint network in evaluation mode, (N, 2K) coordinates in pixels.
        x: images (N, C, H, W); ``start`` is the number of the first.
        y: true coordinates (N, 2K).
        visible: whether each keypoint is seen, (N, K); None: all are.
        p: a perturbation of one or two parameters.
        verifier: δ, seconds an image, and ``crown_images`` in its settings.

    Raises:
        Contradiction: the verdict and the largest deviation exclude each other.
    """
    budget = certify.Budget() if verifier.seconds is None else certify.Budget(seconds=verifier.seconds)
    with torch.no_grad():
        outputs = model(x)
    with measure.Peak(x.device) as peak:
        found = certify.verify(model, x, certify.Deviation(verifier.delta), p, method="line", budget=budget, seed=start)
    farthest = certify.deviation(model, x, p, tol=TOLERANCE, budget=budget)
    kept = keypoints_verified(model, x, outputs, found.status, p, verifier.delta, budget, start)
    points = (outputs - y).unflatten(1, (-1, 2))
    error = points.abs().amax(2)
    seen = torch.ones_like(error, dtype=torch.bool) if visible is None else visible.to(error.device) > 0
    single = single_shot(model, x, outputs, p, max(0, crown_images(verifier) - start))
    unstable = measure.unstable_relus(model, x, p)
    rows = []
    for i in range(len(x)):
        status = certify.Status(int(found.status[i]))
        low, high = float(farthest.lower[i]), float(farthest.upper[i])
        check(start + i, status, low, high, verifier.delta)
        lower = float(found.lower[i])
        rows.append(
            {
                "index": start + i,
                "clean": float(points[i].norm(dim=1).mean()),
                "status": status.name.lower(),
                "lower": lower if math.isfinite(lower) else None,
                "unstable": int(unstable[i]),
                "soundness": found.soundness,
                "method": found.method,
                "seconds": float(found.seconds[i]),
                "peak_mb": peak.mb,
                "sub_intervals": _work(found.work, i),
                "deviation_low": low,
                "deviation_high": high if math.isfinite(high) else None,
                "deviation_at": farthest.argmax[i].tolist(),
                "deviation_seconds": float(farthest.seconds[i]),
                "deviation_timeout": bool(farthest.timeout[i]),
                "deviation_sub_intervals": _work(farthest.work, i),
                "single_shot": {name: None if bound is None else bound[i] for name, bound in single.items()},
                "visible": _bits(seen[i]),
                "verified_keypoints": _bits(kept[i]),
                "correct": {f"{tau:g}": _bits(error[i] <= tau) for tau in TAUS},
                **witness.kept(found, i),
            }
        )
    return rows


def check(index: int, status: certify.Status, low: float, high: float, delta: float) -> None:
    """Refuse a verdict at δ that the enclosure [low, high] of the largest deviation excludes.

    A thousandth of the tolerance is left to rounding in the model itself.

    Raises:
        Contradiction: they exclude each other.
    """
    slack = 1e-4 * max(1.0, delta)
    wrong = (status is certify.Status.HOLDS and low > delta + slack) or (
        status is certify.Status.VIOLATED and high < delta - slack
    )
    if wrong:
        raise Contradiction(
            f"image {index}: the verdict at {delta:g} px is {status.name}, but the largest deviation lies in "
            f"[{low:.6g}, {high:.6g}] px; one of the two certifiers is wrong"
        )


def keypoints_verified(
    model: nn.Module,
    x: Tensor,
    outputs: Tensor,
    status: Tensor,
    p: Perturbation,
    delta: float,
    budget: certify.Budget,
    seed: int,
) -> Tensor:
    """Which keypoints stay within ``delta`` in both coordinates, (N, K): proved one by one where the image fails."""
    n, coordinates = outputs.shape
    points = coordinates // 2
    holds = (status == certify.Status.HOLDS).to(outputs.device)
    kept = holds.unsqueeze(1).repeat(1, points)
    eye = torch.eye(coordinates, dtype=outputs.dtype, device=outputs.device).unflatten(0, (points, 2))
    C = torch.cat([eye, -eye], 1)  # (K, 4, 2K): each coordinate of a keypoint from both sides
    for i in torch.nonzero(~holds).flatten().tolist():
        spec = certify.Linear(C, delta - C @ outputs[i])
        own = p.select(slice(i, i + 1), n)
        images = x[i : i + 1].expand(points, *x.shape[1:])
        one = certify.verify(model, images, spec, own, method="line", budget=budget, seed=seed)
        kept[i] = (one.status == certify.Status.HOLDS).to(kept.device)
    return kept


def single_shot(
    model: nn.Module, x: Tensor, outputs: Tensor, p: Perturbation, crown: int
) -> dict[str, list[float | None] | None]:
    """Upper bounds of each image's largest deviation without branching, in pixels, by method.

    None for a method that the network or the perturbation does not support, and for images behind the first ``crown``.
    """
    found: dict[str, list[float | None] | None] = {}
    for method in SINGLE_SHOT:
        count = min(crown, len(x)) if method == "crown" else len(x)
        if method == "forward" and not isinstance(p, AffineFamily):
            found[method] = None  # as a box it has one parameter for every pixel
            continue
        values: list[float | None] = [None] * len(x)
        try:
            # One image at a time: a network's intermediate rows of a whole batch do not fit into memory.
            size = 1 if method == "crown" else len(x)
            for at in range(0, count, size):
                part = slice(at, min(at + size, count))
                with torch.no_grad():
                    low, high = certify.bounds(model, x[part], p.select(part, len(x)), method)
                away = torch.maximum(high - outputs[part], outputs[part] - low).amax(1)
                values[part] = [v if math.isfinite(v) else None for v in away.tolist()]
        except certify.UnsupportedOperation:
            found[method] = None
            continue
        found[method] = values
    return found


def verdict(row: Mapping[str, Any], delta: float) -> str:
    """The verdict at any ``delta`` from the enclosure of the largest deviation: holds, violated or unknown."""
    high = row["deviation_high"]
    if high is not None and high < delta:
        return "holds"
    return "violated" if row["deviation_low"] >= delta else "unknown"


def summarise(rows: Sequence[Mapping[str, Any]], delta: float) -> dict[str, Any]:
    """What tables and figures need of all images under one perturbation; lists are in the order of the images."""
    highs = [row["deviation_high"] for row in rows]
    at: dict[str, dict[str, int]] = {}
    for value in DELTAS:
        # At the cell's own δ the verdict was decided, not read off.
        own = [row["status"] if value == delta else verdict(row, value) for row in rows]
        at[f"{value:g}"] = {name: own.count(name) for name in ("holds", "violated", "unknown", "timeout")}
    return {
        "verdicts": at,
        "deviation": {
            "low": [row["deviation_low"] for row in rows],
            "high": highs,
            "timeouts": sum(row["deviation_timeout"] for row in rows),
            "mean": statistics.fmean(row["deviation_low"] for row in rows),
            "p95": percentile([row["deviation_low"] for row in rows], 0.95),
            "seconds_mean": statistics.fmean(row["deviation_seconds"] for row in rows),
            "sub_intervals_mean": statistics.fmean(row["deviation_sub_intervals"] for row in rows),
        },
        "sub_intervals_mean": statistics.fmean(row["sub_intervals"] for row in rows),
        "seconds": [row["seconds"] for row in rows],
        "single_shot": {name: _single(rows, name) for name in SINGLE_SHOT},
        "keypoints": _keypoints(rows),
    }


def _single(rows: Sequence[Mapping[str, Any]], name: str) -> dict[str, Any]:
    values = [row["single_shot"][name] for row in rows]
    known = [value for value in values if value is not None]
    return {
        "images": len(known),
        "holds": {f"{delta:g}": sum(value < delta for value in known) for delta in DELTAS},
        "median": statistics.median(known) if known else None,
    }


def _keypoints(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Keypoints counted image by image, seen ones and occluded ones apart."""

    def count(wanted: str, *masks: str) -> list[int]:
        found = []
        for row in rows:
            columns = [row["visible"], *(_part(row, mask) for mask in masks)]
            found.append(sum(bits[0] == wanted and "0" not in bits[1:] for bits in zip(*columns)))
        return found

    return {
        name: {
            "total": count(bit),
            "verified": count(bit, "verified_keypoints"),
            "correct": {f"{tau:g}": count(bit, f"correct {tau:g}") for tau in TAUS},
            "correct_and_verified": {f"{tau:g}": count(bit, f"correct {tau:g}", "verified_keypoints") for tau in TAUS},
        }
        for name, bit in (("visible", "1"), ("occluded", "0"))
    }


def _part(row: Mapping[str, Any], mask: str) -> str:
    name, _, tau = mask.partition(" ")
    return str(row[name][tau] if tau else row[name])


def percentile(values: Sequence[float], q: float) -> float:
    """Quantile ``q`` of at least one value, linear between order statistics (numpy's default)."""
    ordered = sorted(values)
    place = q * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def _work(work: Mapping[str, Tensor], i: int) -> int:
    return int(work["sub-intervals"][i])


def _bits(mask: Tensor) -> str:
    return "".join("1" if bit else "0" for bit in mask.tolist())
