"""One network, one VNN-LIB property: attack every region, then verify every region, and replay what was found.

A region with several unsafe conjunctions is safe where, for each of them, **some** row is positive. That is put into
the network itself: the rows of a conjunction go through ``max(a, b) = b + relu(a - b)`` until one number is left, and
the property becomes "all of these numbers are positive", which every verifier and attack understands.

Boxes are read in float64. Proofs cover the box rounded outward to float32; counterexamples lie in the box rounded
inward (where an end has no float32 inside, at the nearest one), since networks read float32.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from certify.perturbations import Box
from certify.specs import Linear
from certify.verdicts import Budget, Status
from runs.onnx import Network, Runtime
from runs.vnnlib import Conjunction, Property, Region

VERDICTS = ("holds", "violated", "unknown", "timeout")
FEW_INPUTS = 10
"""Up to this many free inputs, `runs.splitting` decides; beyond, `certify.verify`."""
CHUNK = 64
"""Regions that are attacked together."""

UNCONFIRMED = "a candidate counterexample was dropped because onnxruntime does not confirm it"

Array = np.ndarray[Any, Any]


@dataclasses.dataclass(frozen=True)
class Answer:
    """The verdict on a property.

    Attributes:
        verdict: one of `VERDICTS`.
        seconds: wall-clock seconds, loading included where the caller counts it.
        lower: a certified lower bound on the smallest safety margin over all regions; None if nothing was bounded.
        counterexample: an input (flat, float32 values) and onnxruntime's output for it, when violated.
        work: counts, such as "domains" and "regions".
        notes: what a reader should know, such as a candidate that onnxruntime did not confirm.
    """

    verdict: str
    seconds: float = 0.0
    lower: float | None = None
    counterexample: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    work: dict[str, int] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()


class SafetyMargins(nn.Module):
    """A network followed by one number a conjunction: the largest of its rows ``C y + d``, unsafe where it is <= 0."""

    C: Tensor
    d: Tensor

    def __init__(self, network: nn.Module, conjunctions: tuple[Conjunction, ...]) -> None:
        super().__init__()
        self.network = network
        self.count = len(conjunctions)
        rows = 1 << (max(len(c.d) for c in conjunctions) - 1).bit_length()
        # Repeating rows changes no maximum and makes every halving even. Row r of conjunction k sits at r * count + k.
        C = np.stack([c.C[np.arange(rows) % len(c.d)] for c in conjunctions], 1).reshape(rows * self.count, -1)
        d = np.stack([c.d[np.arange(rows) % len(c.d)] for c in conjunctions], 1).reshape(-1)
        self.register_buffer("C", torch.from_numpy(C))
        self.register_buffer("d", torch.from_numpy(d))

    def forward(self, x: Tensor) -> Tensor:
        y = self.network(x)
        z = F.linear(y, self.C.to(y.dtype), self.d.to(y.dtype))
        while z.shape[1] > self.count:
            # Halves picked by matrices: to a bound, a linear layer costs less than indexing.
            a, b = torch.eye(z.shape[1], dtype=z.dtype, device=z.device).chunk(2)
            z = F.linear(z, b) + F.relu(F.linear(z, a - b))
        return z


@dataclasses.dataclass(frozen=True, eq=False)
class Question:
    """A region as a verifier sees it: all rows ``C model(x) + d`` are positive for x between `lo` and `hi`.

    `C` and `d` are float64, `lo` and `hi` (1, *shape) float32; `inner` is the flat box that counterexamples lie in.
    """

    region: Region
    model: nn.Module
    C: Tensor
    d: Tensor
    lo: Tensor
    hi: Tensor
    inner: tuple[Array, Array]

    @property
    def free(self) -> int:
        """How many inputs may change."""
        return int((self.lo < self.hi).sum())

    def replay(self, x: Tensor, runtime: Runtime) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
        """The input nearest to `x` that the property allows and onnxruntime's output, if that is unsafe; else None."""
        point = np.clip(x.detach().cpu().numpy().reshape(-1).astype(np.float32), *self.inner)
        y = runtime(point)[0]
        if np.isfinite(y).all() and self.region.is_unsafe(y):
            return tuple(point.tolist()), tuple(y.tolist())
        return None


def ask(network: Network, region: Region, device: torch.device | str = "cpu") -> Question:
    """Put a region of a property of `network` into the form ``C y + d > 0``."""
    conjunctions = region.unsafe
    model: nn.Module = network
    if all(len(c.d) == 1 for c in conjunctions):
        C, d = np.concatenate([c.C for c in conjunctions]), np.concatenate([c.d for c in conjunctions])
    else:
        model = SafetyMargins(network, conjunctions).to(device).eval()
        C, d = np.eye(len(conjunctions)), np.zeros(len(conjunctions))
    outward = _float32(region.lo, -np.inf), _float32(region.hi, np.inf)
    inward = _float32(region.lo, np.inf), _float32(region.hi, -np.inf)
    hollow = inward[0] > inward[1]
    nearest = ((region.lo + region.hi) / 2).astype(np.float32)
    inner = np.where(hollow, nearest, inward[0]), np.where(hollow, nearest, inward[1])
    shape = (1, *network.input_shape)
    return Question(
        region,
        model,
        torch.from_numpy(C).to(device),
        torch.from_numpy(d).to(device),
        torch.from_numpy(outward[0]).reshape(shape).to(device),
        torch.from_numpy(outward[1]).reshape(shape).to(device),
        inner,
    )


def _float32(values: Array, towards: float) -> Array:
    """The float32 next to each float64 value in one direction (the value itself where it is a float32)."""
    near = values.astype(np.float32)
    wrong = near.astype(np.float64) < values if towards > 0 else near.astype(np.float64) > values
    return np.where(wrong, np.nextafter(near, np.float32(towards)), near)


def decide(
    network: Network,
    runtime: Runtime,
    problem: Property,
    *,
    seconds: float,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Answer:
    """Whether any input in the property's regions has an unsafe output.

    Args:
        network: the imported network; it is moved to `device`.
        runtime: onnxruntime on the same file: no counterexample is reported that it does not confirm.
        problem: the property, read for this network's shapes.
        seconds: wall-clock budget.
        device: where attack and bounds run.
        seed: for the attack's random starts.

    Raises:
        certify.bounds.UnsupportedOperation: the network has an operation without sound bounds (and no counterexample
            was found before that was noticed).
        ValueError: `seconds` is not positive.
    """
    start = time.monotonic()
    Budget(seconds=seconds)  # says what is wrong with seconds <= 0
    network.to(device)
    questions = [ask(network, region, device) for region in problem.regions]
    work: dict[str, int] = {"regions": len(questions)}
    notes: list[str] = []

    def remaining() -> float:
        return seconds - (time.monotonic() - start)

    def answer(verdict: str, lower: float | None = None, found: Any = None) -> Answer:
        return Answer(verdict, time.monotonic() - start, lower, found, work, tuple(dict.fromkeys(notes)))

    for question, candidate in _attacks(questions, seed, remaining):
        found = question.replay(candidate, runtime)
        if found is not None:
            return answer("violated", None, found)
        notes.append(UNCONFIRMED)
    lowers: list[float | None] = []
    statuses: list[Status] = []
    for i, question in enumerate(questions):
        left = remaining()
        if left <= 0:
            return answer("timeout", None if len(questions) > len(lowers) else _least(lowers))
        status, lower, suspect, counts = _verify(question, runtime, left / (len(questions) - i))
        for name, count in counts.items():
            work[name] = work.get(name, 0) + count
        lowers.append(lower)
        if status == Status.VIOLATED and suspect is not None:
            found = question.replay(suspect, runtime)
            if found is not None:
                return answer("violated", _least(lowers) if len(lowers) == len(questions) else None, found)
            notes.append(UNCONFIRMED)
            status = Status.UNKNOWN
        statuses.append(status)
    if all(status == Status.HOLDS for status in statuses):
        return answer("holds", _least(lowers))
    return answer("timeout" if Status.TIMEOUT in statuses else "unknown", _least(lowers))


def _least(lowers: list[float | None]) -> float | None:
    known = [v for v in lowers if v is not None]
    return min(known) if len(known) == len(lowers) and known else None


def _attacks(questions: list[Question], seed: int, remaining: Callable[[], float]) -> Iterator[tuple[Question, Tensor]]:
    """Inputs that look like counterexamples, with their questions. Regions with the same rows are attacked together."""
    from certify.attack import attack

    groups: dict[tuple[bytes, ...], list[Question]] = {}
    for question in questions:
        key = tuple(part.tobytes() for c in question.region.unsafe for part in (c.C, c.d))
        groups.setdefault(key, []).append(question)
    for group in groups.values():
        for first in range(0, len(group), CHUNK):
            if remaining() <= 0:
                return
            chunk = group[first : first + CHUNK]
            lo, hi = torch.cat([q.lo for q in chunk]), torch.cat([q.hi for q in chunk])
            result = attack(chunk[0].model, (lo + hi) / 2, Linear(chunk[0].C, chunk[0].d), Box(lo, hi), seed=seed)
            for i in result.success.nonzero().flatten().tolist():
                yield chunk[i], result.inputs[i]


def _verify(
    question: Question, runtime: Runtime, seconds: float
) -> tuple[Status, float | None, Tensor | None, dict[str, int]]:
    """Status, certified lower bound, candidate counterexample and work for one region."""
    if question.free <= FEW_INPUTS:
        from runs.splitting import split

        found = split(
            question.model,
            question.lo[0],
            question.hi[0],
            question.C,
            question.d,
            seconds=seconds,
            confirm=lambda x: question.replay(x, runtime) is not None,
        )
        return found.status, found.lower, found.counterexample, {"domains": found.domains}
    import certify

    centre = (question.lo + question.hi) / 2
    certificate = certify.verify(
        question.model,
        centre,
        Linear(question.C, question.d),
        Box(question.lo, question.hi),
        method="auto",
        budget=Budget(seconds=seconds),
        attack=False,  # every region has been attacked already
    )
    status = Status(int(certificate.status[0]))
    lower = float(certificate.lower[0])
    candidate = certificate.counterexamples[0] if status == Status.VIOLATED else None
    counts = {name: int(values[0]) for name, values in certificate.work.items()}
    return status, lower if np.isfinite(lower) else None, candidate, counts
