"""What a network was made from: a frozen, JSON-able record. Imports no torch."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

HEADS = ("keypoints", "dsnt")
HEAD_ALIASES = {"linear": "keypoints"}


@dataclass(frozen=True)
class Recipe:
    """Every argument of :func:`models.create`, resolved, and what was done that the arguments do not say.

    ``mean`` and ``std`` are the values really used, one per channel. ``pretrained`` is False, True (published weights)
    or the file name (without its folder) of a local checkpoint. ``notes`` states departures: a changed stem, a fresh
    head.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument has the wrong value; the message says what was expected.
    """

    name: str
    num_outputs: int
    in_channels: int
    image_size: int
    width: float
    pretrained: bool | str
    head: str | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    seed: int | None
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for field in ("num_outputs", "in_channels", "image_size"):
            value = whole(field, getattr(self, field))
            if value < 1:
                raise ValueError(f"{field} must be at least 1, got {value}")
            object.__setattr__(self, field, value)
        object.__setattr__(self, "width", positive("width", self.width))
        if self.seed is not None:
            object.__setattr__(self, "seed", whole("seed", self.seed))
        object.__setattr__(self, "head", canonical_head(self.head, self.num_outputs))
        for field in ("mean", "std"):
            object.__setattr__(self, field, per_channel(field, getattr(self, field), self.in_channels))
        if not all(0 <= value <= 1 for value in self.mean):
            raise ValueError(f"mean is that of images in [0, 1], got {self.mean}; divide statistics of 0..255 by 255")
        if min(self.std) <= 0:
            raise ValueError(f"std must be positive in every channel, got {self.std}")
        object.__setattr__(self, "notes", tuple(self.notes))

    def to_dict(self) -> dict[str, Any]:
        """A dict of plain JSON types (tuples become lists)."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Recipe:
        """The inverse of :meth:`to_dict`; strict about missing and unknown fields (ValueError)."""
        known = {field.name for field in fields(cls)}
        missing, unknown = sorted(known - set(data)), sorted(set(data) - known)
        if missing or unknown:
            raise ValueError(f"not a model recipe: missing fields {missing}, unknown fields {unknown}")
        return cls(**data)


def canonical_head(head: str | None, num_outputs: int) -> str | None:
    """None (class scores), "keypoints" (also called "linear") or "dsnt"; keypoint heads need x, y pairs."""
    if head is None:
        return None
    head = HEAD_ALIASES.get(head, head)
    if head not in HEADS:
        raise ValueError(
            f"unknown head {head!r}: expected None (class scores), 'keypoints' (linear, pixel coordinates; 'linear' is "
            "the same) or 'dsnt' (soft-argmax of heat maps)"
        )
    if num_outputs % 2:
        raise ValueError(
            f"head={head!r} predicts coordinates x0, y0, x1, y1, ...: num_outputs must be even, got {num_outputs}; "
            "for class scores leave head=None"
        )
    return head


def whole(name: str, value: object) -> int:
    """``value`` as an int; TypeError for anything that is not a whole number type."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be a whole number, got {value!r}")
    return int(value)


def positive(name: str, value: object) -> float:
    """``value`` as a finite float above zero."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not math.isfinite(value) or value <= 0:
        raise ValueError(f"{name} must be finite and above 0, got {value}")
    return float(value)


def per_channel(name: str, value: Any, channels: int) -> tuple[float, ...]:
    """A number or a sequence (list, tuple, array, tensor) as one finite float per channel."""
    if isinstance(value, numbers.Real):
        values = (float(value),) * channels
    else:
        values = tuple(float(v) for v in value)
    if len(values) != channels:
        raise ValueError(
            f"{name} has {len(values)} values for {channels} input channels; give one number or {channels}"
        )
    if not all(math.isfinite(v) for v in values):
        raise ValueError(f"{name} must be finite, got {values}")
    return values
