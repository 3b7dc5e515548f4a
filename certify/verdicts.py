"""What a verifier answers: a status an image, bounds, counterexamples, and what it took."""

from __future__ import annotations

import dataclasses
import enum
import math

import torch
from torch import Tensor


class Status(enum.IntEnum):
    """The verdict on one image."""

    HOLDS = 0
    VIOLATED = 1
    UNKNOWN = 2
    TIMEOUT = 3


@dataclasses.dataclass(frozen=True)
class Budget:
    """What a verifier may spend: `seconds` an image (inf: no limit), `memory` bytes for its working tensors."""

    seconds: float = math.inf
    memory: int = 1 << 30

    def __post_init__(self) -> None:
        if not self.seconds > 0:
            raise ValueError(f"a budget needs seconds > 0, got {self.seconds}; use math.inf for no limit")
        if not self.memory > 0:
            raise ValueError(f"a budget needs memory > 0 bytes, got {self.memory}")


@dataclasses.dataclass(frozen=True)
class Certificate:
    """Verdicts for a batch of N images. All tensors are on the device of the images.

    Attributes:
        status: (N,) int64, values of `Status`.
        lower: (N,) certified lower bound on the smallest margin over all rows (HOLDS needs it > 0).
        seconds: (N,) wall-clock seconds an image (batched work is shared out evenly).
        counterexamples: (N, *input) perturbed images; rows of images that are not VIOLATED are NaN.
        work: counts of what was done, an entry a kind ("domains", "sub-intervals", "pieces", "rows"), each (N,).
        method: the verifier that answered.
        soundness: "real-arithmetic": sound up to floating-point rounding, against which `margin` is kept. All verifiers
            of this package; a registered one that bounds its rounding may say "rigorous".
        margin: the slack kept against rounding: HOLDS needs ``lower > margin``.
        dtype: the arithmetic used, such as "float64".
        parameters: (N, K) semantic parameters of the counterexamples (NaN elsewhere), None for boxes.
    """

    status: Tensor
    lower: Tensor
    seconds: Tensor
    counterexamples: Tensor
    work: dict[str, Tensor]
    method: str
    soundness: str = "real-arithmetic"
    margin: float = 0.0
    dtype: str = "float32"
    parameters: Tensor | None = None

    def __len__(self) -> int:
        return len(self.status)

    def to(self, device: torch.device | str) -> Certificate:
        """The same with all tensors on `device`."""
        return dataclasses.replace(
            self,
            status=self.status.to(device),
            lower=self.lower.to(device),
            seconds=self.seconds.to(device),
            counterexamples=self.counterexamples.to(device),
            work={kind: count.to(device) for kind, count in self.work.items()},
            parameters=None if self.parameters is None else self.parameters.to(device),
        )

    def counts(self) -> dict[str, int]:
        """How many images got each status, by lower-case name, in the order of `Status`."""
        return {s.name.lower(): int((self.status == s).sum()) for s in Status}

    def __str__(self) -> str:
        counts = ", ".join(f"{n} {name}" for name, n in self.counts().items() if n)
        return f"{len(self)} images by {self.method}: {counts}"


def join(parts: list[Certificate]) -> Certificate:
    """One certificate over the images of several, in order (all by the same verifier, on the same device)."""
    if not parts:
        raise ValueError("no certificates to join")
    first = parts[0]
    kinds = {k for part in parts for k in part.work}
    none = [torch.zeros(len(p), dtype=torch.int64, device=p.status.device) for p in parts]
    work = {k: torch.cat([p.work.get(k, zero) for p, zero in zip(parts, none)]) for k in sorted(kinds)}
    parameters = None
    if all(p.parameters is not None for p in parts):
        parameters = torch.cat([p.parameters for p in parts if p.parameters is not None])
    return dataclasses.replace(
        first,
        status=torch.cat([p.status for p in parts]),
        lower=torch.cat([p.lower for p in parts]),
        seconds=torch.cat([p.seconds for p in parts]),
        counterexamples=torch.cat([p.counterexamples for p in parts]),
        work=work,
        parameters=parameters,
    )
