"""What must hold of the outputs: linear conditions ``C y + d > 0``, all rows at once.

Each specification turns into `Linear` rows for a batch of reference outputs (`rows`); every deterministic verifier
works on those rows alone. A property that holds with margin exactly 0 does not count as holding.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol

import torch
from torch import Tensor


class Spec(Protocol):
    """A condition on the outputs of a network for each image of a batch."""

    def rows(self, reference: Tensor) -> Linear:
        """Linear rows for the outputs `reference` (N, outputs) at the unperturbed images."""
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class Linear:
    """All rows of ``C y + d`` are positive.

    `C`: (N, rows, outputs), or (rows, outputs) for every image alike; `d`: (N, rows), (rows,) or a number.
    """

    C: Tensor
    d: Tensor | float = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.C, Tensor):
            raise TypeError(f"C must be a tensor (N, rows, outputs) or (rows, outputs), got {type(self.C).__name__}")
        if self.C.ndim not in (2, 3) or self.C.shape[-2] == 0:
            raise ValueError(
                f"C must be (N, rows, outputs) or (rows, outputs) with at least one row, got {self.C.shape}"
            )

    def rows(self, reference: Tensor) -> Linear:
        if self.C.shape[-1] != reference.shape[1]:
            raise ValueError(f"C has {self.C.shape[-1]} columns but the network has {reference.shape[1]} outputs")
        C = self.C.to(reference)
        if C.ndim == 2:
            C = C.expand(len(reference), *C.shape)
        elif len(C) != len(reference):
            raise ValueError(f"C is for a batch of {len(C)}, but there are {len(reference)} images")
        d = torch.as_tensor(self.d, dtype=reference.dtype, device=reference.device)
        if d.ndim > 2 or any(a not in (1, b) for a, b in zip(reversed(d.shape), reversed(C.shape[:2]))):
            raise ValueError(f"d has shape {tuple(d.shape)}, but C has {C.shape[1]} rows for {len(C)} images")
        return Linear(C, d.expand(C.shape[:2]))


@dataclasses.dataclass(frozen=True, eq=False)
class Classification:
    """The label `y` (N,) scores strictly above every other class: rows ``y_label - y_other``."""

    y: Tensor

    def __post_init__(self) -> None:
        if not isinstance(self.y, Tensor):
            raise TypeError(
                f"labels must be a tensor of integers (N,), got {type(self.y).__name__}; torch.as_tensor makes one"
            )

    def rows(self, reference: Tensor) -> Linear:
        classes = reference.shape[1]
        if (
            self.y.shape != reference.shape[:1]
            or self.y.is_floating_point()
            or self.y.is_complex()
            or self.y.dtype == torch.bool
        ):
            raise ValueError(
                f"labels must be integers of shape ({len(reference)},), got {tuple(self.y.shape)} {self.y.dtype}"
            )
        if classes < 2:
            raise ValueError("a classification property needs a network with at least two outputs")
        if self.y.numel() and not (int(self.y.min()) >= 0 and int(self.y.max()) < classes):
            raise ValueError(
                f"labels span [{int(self.y.min())}, {int(self.y.max())}] but the network has {classes} classes"
            )
        return Linear(margin_rows(self.y, classes).to(reference), reference.new_zeros(len(reference), classes - 1))


@dataclasses.dataclass(frozen=True, eq=False)
class Deviation:
    """No output moves by `delta` or more from its reference (pixels, for keypoints).

    `norm`: "linf" bounds every coordinate on its own (the USN paper's Definition 2.4 with q = inf); "point_l2" bounds
    the Euclidean distance of every point (x, y) = outputs (2k, 2k + 1), which is not linear: verifiers check it through
    `directions` chords of the circle (sound: the polygon lies inside the disc). `reference`: (N, outputs), default the
    network's output at the unperturbed image. `delta`: a number, or one an output ("linf") or a point ("point_l2").
    """

    delta: float | Tensor
    norm: str = "linf"
    reference: Tensor | None = None
    directions: int = 16

    def __post_init__(self) -> None:
        if self.norm not in ("linf", "point_l2"):
            raise ValueError(f'norm must be "linf" or "point_l2", got {self.norm!r}')
        if not float(torch.as_tensor(self.delta).min()) > 0:
            raise ValueError(f"delta must be > 0, got {self.delta}")
        if self.directions < 4:
            raise ValueError(f"a polygon needs at least 4 directions, got {self.directions}")

    def rows(self, reference: Tensor) -> Linear:
        centre = reference if self.reference is None else self.reference.to(reference)
        if centre.shape != reference.shape:
            raise ValueError(f"the reference is {tuple(centre.shape)}, the outputs are {tuple(reference.shape)}")
        n, k = reference.shape
        delta = torch.as_tensor(self.delta, dtype=reference.dtype, device=reference.device)
        if self.norm == "point_l2" and k % 2:
            raise ValueError(f"point_l2 needs an even number of outputs (x, y pairs), got {k}")
        places = k if self.norm == "linf" else k // 2
        if tuple(delta.shape) not in ((), (1,), (places,)):
            raise ValueError(f"delta must be a number or {places} of them, got shape {tuple(delta.shape)}")
        if self.norm == "linf":
            eye = torch.eye(k, dtype=reference.dtype, device=reference.device)
            C = torch.cat([eye, -eye])
            delta = delta.expand(k).repeat(2)
        else:
            angles = torch.arange(self.directions, dtype=reference.dtype, device=reference.device)
            angles = 2 * torch.pi * (angles + 0.5) / self.directions
            unit = torch.stack([angles.cos(), angles.sin()], 1)
            C = torch.kron(torch.eye(k // 2, dtype=reference.dtype, device=reference.device), unit)
            # Staying below cos(pi / directions) along every normal keeps the point inside the inscribed polygon.
            delta = delta.expand(k // 2).repeat_interleave(self.directions) * torch.cos(
                angles.new_tensor(torch.pi / self.directions)
            )
        C = C.expand(n, *C.shape)
        return Linear(-C, delta + (C @ centre.unsqueeze(2)).squeeze(2))  # delta - C (y - centre)


def margin(spec: Spec, outputs: Tensor, reference: Tensor) -> Tensor:
    """How far `outputs` (..., N, outputs) are from breaking the property: (..., N), positive iff it holds there.

    This is the property itself, where `Spec.rows` may be stricter: the smallest row, but for ``Deviation`` with
    "point_l2" the smallest ``delta - distance``, so that only a true violation counts as one.
    """
    if not (isinstance(spec, Deviation) and spec.norm == "point_l2"):
        rows = spec.rows(reference)
        return (torch.einsum("nro,...no->...nr", rows.C, outputs) + torch.as_tensor(rows.d).to(outputs)).amin(-1)
    centre = reference if spec.reference is None else spec.reference.to(reference)
    distance = (outputs - centre).unflatten(-1, (-1, 2)).norm(dim=-1)
    return (torch.as_tensor(spec.delta, dtype=outputs.dtype, device=outputs.device) - distance).amin(-1)


def select(spec: Spec, reference: Tensor, index: Tensor) -> Spec:
    """The property for the images `index` alone, of a batch whose unperturbed outputs are `reference`."""
    if isinstance(spec, Deviation):
        centre = reference if spec.reference is None else spec.reference.to(reference)
        return dataclasses.replace(spec, reference=centre[index])
    if isinstance(spec, Classification):
        return Classification(spec.y.to(index.device)[index])
    rows = spec.rows(reference)
    return Linear(rows.C[index], torch.as_tensor(rows.d)[index])


def margin_rows(y: Tensor, classes: int) -> Tensor:
    """Rows (N, classes - 1, classes) of ``y_label - y_other``, others in ascending order."""
    y = y.long()  # labels of type uint8 would select as a mask does
    eye = torch.eye(classes, device=y.device)
    others = torch.arange(classes - 1, device=y.device).expand(len(y), -1)
    others = others + (others >= y.unsqueeze(1))
    return eye[y].unsqueeze(1) - eye[others]
