"""What sampling answers: a bound on the flip probability of every image, and everything it rests on."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from certify.verdicts import Status


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Probabilistic certificates for N images; per-image tensors are (N,) and on the CPU.

    The statement of a certified image: *over the transform's own draws, the model gives this image another label than
    `y` with probability at most `eps`; a procedure that says so is wrong with probability at most 1 - `confidence`*,
    for each image on its own, or for all `joint` images at once.

    Attributes:
        upper: float64, the upper confidence bound on the flip probability.
        flips: int64, draws whose label was not `y`, among the `n` that the bound uses.
        n: int64, draws that the bound uses. It ends with the flip that made certifying impossible.
        drawn: int64, images drawn and classified, up to a block more than `n`.
        correct: bool, the untransformed image gets the label `y`.
        refuted: bool, the flip probability is above `eps` at the same confidence (a statement of its own).
        supported: float64, the highest confidence at which a fixed sample with these counts could show `eps`.
        seconds: float64 wall-clock seconds an image.
        eps: the flip probability to stay below.
        confidence: what the certificates hold with. For "cccert" the most its sample can support.
        joint: how many images share the confidence; None when every image has it on its own.
        bound: the name of the bound.
        valid: whether the confidence statement is true.
        why: why it is, or is not.
        law: the distribution the transform draws from.
        population: "distribution", or "finite set" when all members were enumerated.
        outputs: how the model's outputs were read, "logits" or "probabilities".
        seed, batch, n_max: of the sampling; the same three give the same draws.
        images: sha256 over the images and labels.
        fingerprint: sha256 over `images`, seed, batch, law, the transform's name and own fingerprint, and the pixels of
            a few of its draws, so that changed weights of a generator are seen.
    """

    upper: Tensor
    flips: Tensor
    n: Tensor
    drawn: Tensor
    correct: Tensor
    refuted: Tensor
    supported: Tensor
    seconds: Tensor
    eps: float
    confidence: float
    joint: int | None
    bound: str
    valid: bool
    why: str
    law: str
    population: str
    outputs: str
    seed: int
    batch: int
    n_max: int
    images: str
    fingerprint: str

    def __len__(self) -> int:
        return len(self.upper)

    @property
    def certified(self) -> Tensor:
        """(N,) bool: the untransformed image is classified correctly and ``upper <= eps``."""
        return (self.upper <= self.eps) & self.correct

    @property
    def status(self) -> Tensor:
        """(N,) int64 of `certify.Status`: HOLDS when certified by a valid bound, VIOLATED when refuted or wrong
        untransformed, else UNKNOWN."""
        status = torch.full((len(self),), int(Status.UNKNOWN))
        if self.valid:
            status[self.certified] = int(Status.HOLDS)
        status[self.refuted | ~self.correct] = int(Status.VIOLATED)
        return status

    def record(self) -> dict[str, Any]:
        """All fields as JSON-able values, per-image ones as lists, with `certified` beside them."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)} | {"certified": self.certified}
        return {name: v.tolist() if isinstance(v, Tensor) else v for name, v in fields.items()}

    def __str__(self) -> str:
        scope = "per image" if self.joint is None else f"joint over {self.joint}"
        valid = "" if self.valid else ", NOT VALID"
        return (
            f"{int(self.certified.sum())} of {len(self)} images certified: P(flip) <= {self.eps:g} with "
            f"{100 * self.confidence:.4g} % confidence, {scope} ({self.bound}, {int(self.n.sum())} draws{valid})"
        )


def join(parts: list[Estimate]) -> Estimate:
    """One estimate over the images of several, in order; they must share every setting.

    The fingerprints are hashed together in order. A joint confidence must already count all images: pass `joint` as
    their number to `certify.estimate`.

    Raises:
        ValueError: for no parts, or parts with different settings.
    """
    import hashlib

    if not parts:
        raise ValueError("no estimates to join")
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(Estimate):
        values = [getattr(part, field.name) for part in parts]
        if isinstance(values[0], Tensor):
            changes[field.name] = torch.cat(values)
        elif field.name in ("images", "fingerprint"):
            changes[field.name] = values[0] if len(parts) == 1 else hashlib.sha256("".join(values).encode()).hexdigest()
        elif any(v != values[0] for v in values):
            raise ValueError(f"estimates with different {field.name} do not join: {sorted({str(v) for v in values})}")
    joined = dataclasses.replace(parts[0], **changes)
    if joined.joint is not None and joined.joint < len(joined):
        raise ValueError(
            f"a confidence joint over {joined.joint} images does not cover the {len(joined)} joined; "
            f"estimate every part with joint={len(joined)}"
        )
    return joined
