"""Geometric perturbations of one parameter: the image turns, or grows and shrinks, about its centre.

Both read every output pixel bilinearly at a point of the input that moves smoothly with ``t``. Over an interval of t a
pixel lies within a chord and a remainder ``(largest - smallest derivative) * width / 4``, from bounds of the derivative
in every cell the sampling point can visit; that covers the curvature inside cells and the bends at their borders.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from certify.curves import Path
from certify.perturbations import Radius, _check_radius, _symmetric

Ends = tuple[Tensor, Tensor]
"""The ends of an interval, for images and pixels: (B, H, W) each."""


@dataclasses.dataclass(frozen=True, eq=False)
class _Resampled(Path):
    """Equal to `torch.nn.functional.grid_sample`, bilinear, ``align_corners=True``, zeros outside the image."""

    eps: Radius
    clip: bool = True

    @abc.abstractmethod
    def _source(self, columns: Tensor, rows: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Where output pixels are read: columns (1, W) and rows (H, 1) from the centre, t (B, 1, 1)."""

    @abc.abstractmethod
    def _travel(self, columns: Tensor, rows: Tensor, lo: Tensor, hi: Tensor) -> tuple[Ends, Ends, Ends, Ends]:
        """Where they can be read for t in [lo, hi] (B, 1, 1), and how fast that moves with t: columns and rows, then
        their derivatives."""

    @abc.abstractmethod
    def _way(self, lo: Tensor, hi: Tensor) -> Tensor:
        """Most that a sampling point moves from lo to hi (B,), per pixel of distance from the centre: (B,)."""

    def _cut(self, lo: Tensor, hi: Tensor, share: float) -> Tensor:
        """The parameter (B,) at a share of that way."""
        return lo + (hi - lo) * share

    def limits(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if x.ndim != 4:
            raise ValueError(f"{type(self).__name__} needs images (N, C, H, W), got {tuple(x.shape)}")
        return _symmetric(self.eps, x)

    def trace(self, x: Tensor, t: Tensor, image: Tensor) -> Tensor:
        padded = F.pad(x, (1, 1, 1, 1))
        height, width = x.shape[2:]
        u, v = self._source(*_grid(x), t.reshape(-1, 1, 1))
        u = (u + (width + 1) / 2).clamp(0, width + 1).expand(-1, height, -1)
        v = (v + (height + 1) / 2).clamp(0, height + 1).expand(-1, -1, width)
        column, row = u.floor().clamp(max=width).long(), v.floor().clamp(max=height).long()
        a, b, c, d = _corners(padded, row, column)
        du, dv = (u - column).unsqueeze(1), (v - row).unsqueeze(1)
        return (1 - dv) * ((1 - du) * a + du * b) + dv * ((1 - du) * c + du * d)

    def enclose(self, x: Tensor, lo: Tensor, hi: Tensor, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        farthest = math.hypot(x.shape[2] - 1, x.shape[3] - 1) / 2
        # Each part is short enough for a sampling point to stay within two by two cells.
        longest = float(self._way(lo, hi).max()) if len(lo) else 0.0
        parts = max(1, math.ceil(longest * farthest / 0.9))
        start, end = self.trace(x, lo, image), self.trace(x, hi, image)
        least, most = torch.zeros_like(start), torch.zeros_like(start)
        before, a = start, lo
        for part in range(parts):
            last = part == parts - 1
            b = hi if last else self._cut(lo, hi, (part + 1) / parts)
            after = end if last else self.trace(x, b, image)
            remainder = self._remainder(x, a, b)
            for t, value in ((a, before), (b, after)):
                at = torch.where(hi > lo, (t - lo) / (hi - lo), 0.0).reshape(-1, 1, 1, 1)
                departure = value - start - (end - start) * at
                least, most = torch.minimum(least, departure - remainder), torch.maximum(most, departure + remainder)
            before, a = after, b
        return (start + end) / 2 + (least + most) / 2, (end - start) / 2, (most - least) / 2

    def _remainder(self, x: Tensor, lo: Tensor, hi: Tensor) -> Tensor:
        """How far pixels can leave the chord over parameters [lo, hi], (B, C, H, W)."""
        padded = F.pad(x, (1, 1, 1, 1))
        height, width = x.shape[2:]
        lo, hi = lo.reshape(-1, 1, 1), hi.reshape(-1, 1, 1)
        span_u, span_v, du, dv = self._travel(*_grid(x), lo, hi)
        read_u = tuple((e + (width + 1) / 2).expand(-1, height, -1) for e in span_u)
        read_v = tuple((e + (height + 1) / 2).expand(-1, -1, width) for e in span_v)
        outside = (read_u[0] < 0) | (read_u[1] > width + 1) | (read_v[0] < 0) | (read_v[1] > height + 1)
        ends_u, ends_v = ([e.clamp(0, size + 1) for e in ends] for ends, size in ((read_u, width), (read_v, height)))
        column = [e.floor().clamp(max=width).long() for e in ends_u]
        row = [e.floor().clamp(max=height).long() for e in ends_v]
        least = torch.full((len(x), x.shape[1], height, width), torch.inf, dtype=x.dtype, device=x.device)
        most = -least
        for r in row:
            for c in column:
                a, b, e, f = _corners(padded, r, c)
                share_u = [(s - c).clamp(0, 1).unsqueeze(1) for s in ends_u]
                share_v = [(s - r).clamp(0, 1).unsqueeze(1) for s in ends_v]
                along_u = [(b - a) * (1 - s) + (f - e) * s for s in share_v]
                along_v = [(e - a) * (1 - s) + (f - b) * s for s in share_u]
                low, high = _interval_product(along_u, du)
                low_v, high_v = _interval_product(along_v, dv)
                least, most = torch.minimum(least, low + low_v), torch.maximum(most, high + high_v)
        # Beyond the border the image is constant zero.
        least = torch.where(outside.unsqueeze(1), least.clamp(max=0), least)
        most = torch.where(outside.unsqueeze(1), most.clamp(min=0), most)
        return (most - least) * (hi - lo).unsqueeze(1) / 4


@dataclasses.dataclass(frozen=True, eq=False)
class Rotation(_Resampled):
    """The image turns about its centre by ``t`` degrees, |t| <= eps <= 180, bilinear, with zeros outside.

    Equal to `torch.nn.functional.grid_sample` with ``align_corners=True`` on a rotated grid.
    """

    name: ClassVar[str] = "rotation"

    def __post_init__(self) -> None:
        _check_radius(self.eps)
        if float(torch.as_tensor(self.eps).max()) > 180:
            raise ValueError(f"a rotation radius is in degrees, at most 180; got {self.eps}")

    def _source(self, columns: Tensor, rows: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        angle = torch.deg2rad(t)
        return columns * angle.cos() - rows * angle.sin(), columns * angle.sin() + rows * angle.cos()

    def _travel(self, columns: Tensor, rows: Tensor, lo: Tensor, hi: Tensor) -> tuple[Ends, Ends, Ends, Ends]:
        u, v = self._source(columns, rows, (lo + hi) / 2)
        # Both coordinates and, in radians, both derivatives (-v and u) move by at most `reach` over the interval.
        reach = torch.sqrt(columns**2 + rows**2) * torch.deg2rad((hi - lo) / 2)
        degree = math.radians(1.0)
        return (
            (u - reach, u + reach),
            (v - reach, v + reach),
            ((-v - reach) * degree, (-v + reach) * degree),
            ((u - reach) * degree, (u + reach) * degree),
        )

    def _way(self, lo: Tensor, hi: Tensor) -> Tensor:
        return torch.deg2rad(hi - lo)


@dataclasses.dataclass(frozen=True, eq=False)
class Scale(_Resampled):
    """The image grows about its centre by a factor ``1 + t``, |t| <= eps < 1, bilinear, with zeros outside.

    Equal to `torch.nn.functional.grid_sample` with ``align_corners=True`` on a grid divided by ``1 + t``. Beyond the
    border of an image that shrinks is zero.
    """

    name: ClassVar[str] = "scale"

    def __post_init__(self) -> None:
        _check_radius(self.eps)
        if float(torch.as_tensor(self.eps).max()) >= 1:
            raise ValueError(f"a scale radius is a share of the size, below 1 (.1 is 10 %); got {self.eps}")

    def _source(self, columns: Tensor, rows: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return columns / (1 + t), rows / (1 + t)

    def _travel(self, columns: Tensor, rows: Tensor, lo: Tensor, hi: Tensor) -> tuple[Ends, Ends, Ends, Ends]:
        # Every coordinate and every derivative is monotone in t.
        return (
            _ordered(columns / (1 + lo), columns / (1 + hi)),
            _ordered(rows / (1 + lo), rows / (1 + hi)),
            _ordered(-columns / (1 + lo) ** 2, -columns / (1 + hi) ** 2),
            _ordered(-rows / (1 + lo) ** 2, -rows / (1 + hi) ** 2),
        )

    def _way(self, lo: Tensor, hi: Tensor) -> Tensor:
        return 1 / (1 + lo) - 1 / (1 + hi)

    def _cut(self, lo: Tensor, hi: Tensor, share: float) -> Tensor:
        start, end = 1 / (1 + lo), 1 / (1 + hi)
        return (1 / (start + (end - start) * share) - 1).clamp(lo, hi)


def _ordered(a: Tensor, b: Tensor) -> Ends:
    return torch.minimum(a, b), torch.maximum(a, b)


def _grid(x: Tensor) -> tuple[Tensor, Tensor]:
    """Pixel coordinates relative to the centre: columns (1, W) and rows (H, 1)."""
    height, width = x.shape[2:]
    columns = torch.arange(width, dtype=x.dtype, device=x.device) - (width - 1) / 2
    rows = torch.arange(height, dtype=x.dtype, device=x.device) - (height - 1) / 2
    return columns.reshape(1, -1), rows.reshape(-1, 1)


def _corners(padded: Tensor, row: Tensor, column: Tensor) -> list[Tensor]:
    """The four corners of cells (B, H, W): values (B, C, H, W) at (0, 0), (0, 1), (1, 0), (1, 1)."""
    flat, wide = padded.flatten(2), padded.shape[3]
    found = []
    for i in (0, 1):
        for j in (0, 1):
            index = ((row + i) * wide + column + j).flatten(1).unsqueeze(1).expand(-1, padded.shape[1], -1)
            found.append(flat.gather(2, index).reshape(len(padded), padded.shape[1], *row.shape[1:]))
    return found


def _interval_product(ends: list[Tensor], speed: Ends) -> tuple[Tensor, Tensor]:
    """The range of ``g w`` for g between the two `ends` (B, C, H, W) and w between those of `speed`."""
    products = torch.stack([g * w.unsqueeze(1) for g in ends for w in speed])
    return products.amin(0), products.amax(0)
