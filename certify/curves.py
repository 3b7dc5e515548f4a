"""One-parameter perturbations whose images follow a curve rather than a line: hue, user-given paths, rotation.

Each image is a continuous function of ``t``. `Path.enclose` puts it, over any interval of t, inside a line with a
radius around it, which shrinks to nothing with the interval; that is all a verifier needs. Where the image is
piecewise linear in t, `Path.bends` tells where its pixels bend, and verdicts can be exact.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from certify.perturbations import Perturbation, Radius, _check_radius, _clip, _symmetric, _uniform


class Path(Perturbation):
    """Images that depend on one parameter. `apply` takes t as (N,) or with leading axes (..., N)."""

    parameters: ClassVar[int] = 1
    piecewise: ClassVar[bool] = False

    @abc.abstractmethod
    def limits(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The ends of the parameter interval for images (N, ...), each (N, 1)."""

    @abc.abstractmethod
    def trace(self, x: Tensor, t: Tensor, image: Tensor) -> Tensor:
        """The images before clipping: x (B, C, H, W), t (B,), and `image` (B,), which entry of the batch each is."""

    @abc.abstractmethod
    def enclose(self, x: Tensor, lo: Tensor, hi: Tensor, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """For t in [lo, hi] (B,), written ``t = mid + s (hi - lo) / 2``: centre, slope and radius (B, C, H, W) with
        ``|image(t) - centre - s slope| <= radius`` for all s in [-1, 1], before clipping."""

    def bends(self, x: Tensor, image: Tensor) -> Tensor:
        """Where pixels of one image x (1, C, H, W) bend, in any order: (M,); for paths that are piecewise linear."""
        raise NotImplementedError(f"{type(self).__name__} is not piecewise linear in its parameter")

    def apply(self, x: Tensor, t: Tensor) -> Tensor:
        t = t.to(x).expand(*t.shape[:-1], len(x)) if t.ndim else t.to(x).expand(len(x))
        lead = t.shape[:-1]
        image = torch.arange(len(x), device=x.device).expand(t.shape).reshape(-1)
        return _clip(self.trace(x[image], t.reshape(-1), image), self.clip).reshape(*lead, *x.shape)

    def sample(self, x: Tensor, n: int, generator: torch.Generator | None = None) -> Tensor:
        low, high = (end[:, 0] for end in self.limits(x))
        return self.apply(x, low + (high - low) * _uniform((n, len(x)), x, generator))

    def hull(self, x: Tensor) -> tuple[Tensor, Tensor]:
        low, high = (end[:, 0] for end in self.limits(x))
        image = torch.arange(len(x), device=x.device)
        lower, upper = x.clone(), x.clone()
        parts = 32
        for part in range(parts):
            start, end = (low + (high - low) * (part + k) / parts for k in (0, 1))
            centre, slope, radius = self.enclose(x, start, end, image)
            reach = slope.abs() + radius
            lower, upper = torch.minimum(lower, centre - reach), torch.maximum(upper, centre + reach)
        return _clip(lower, self.clip), _clip(upper, self.clip)


def _chord(start: Tensor, end: Tensor, departures: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Centre, slope and radius of the chord from `start` to `end`, for a piecewise linear function that departs from it
    by `departures` at its bends."""
    least, most = torch.zeros_like(start), torch.zeros_like(start)
    for d in departures:
        least, most = torch.minimum(least, d), torch.maximum(most, d)
    return (start + end) / 2 + (least + most) / 2, (end - start) / 2, (most - least) / 2


def _wide(t: Tensor, like: Tensor) -> Tensor:
    return t.reshape(-1, *[1] * (like.ndim - 1))


@dataclasses.dataclass(frozen=True, eq=False)
class Hue(Path):
    """The hue of every pixel turns by ``t``, |t| <= eps <= 1/2 (1 is a full turn), saturation and value kept.

    Equal to `torchvision.transforms.functional.adjust_hue` up to that function's rounding. In HSV each channel is a
    trapezoid function of the hue, so every pixel is piecewise linear in t.
    """

    eps: Radius
    clip: bool = True
    name: ClassVar[str] = "hue"
    piecewise: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_radius(self.eps)
        if float(torch.as_tensor(self.eps).max()) > 0.5:
            raise ValueError(f"a hue radius above half a turn covers the circle twice; got {self.eps}")

    def check(self, x: Tensor) -> None:
        super().check(x)
        self._split(x[:1])

    def limits(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return _symmetric(self.eps, x)

    @staticmethod
    def _split(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Largest channel, chroma, and the place of each channel on its trapezoid in sixths of a turn, [0, 6)."""
        if x.ndim != 4 or x.shape[1] != 3:
            raise ValueError(f"Hue needs RGB images (N, 3, H, W), got {tuple(x.shape)}")
        value, chroma = x.amax(1, keepdim=True), x.amax(1, keepdim=True) - x.amin(1, keepdim=True)
        safe = chroma.clamp(min=torch.finfo(x.dtype).tiny)
        r, g, b = x.split(1, 1)
        hue = torch.where(value == r, (g - b) / safe, torch.where(value == g, 2 + (b - r) / safe, 4 + (r - g) / safe))
        return value, chroma, torch.remainder(hue + x.new_tensor([5.0, 3.0, 1.0]).reshape(1, 3, 1, 1), 6)

    @staticmethod
    def _trapezoid(place: Tensor) -> Tensor:
        place = torch.remainder(place, 6)
        return torch.minimum(place, 4 - place).clamp(0, 1)

    def trace(self, x: Tensor, t: Tensor, image: Tensor) -> Tensor:
        value, chroma, place = self._split(x)
        return value - chroma * self._trapezoid(place + 6 * _wide(t, x))

    def enclose(self, x: Tensor, lo: Tensor, hi: Tensor, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        value, chroma, place = self._split(x)
        first, last = place + 6 * _wide(lo, x), place + 6 * _wide(hi, x)
        start, end = self._trapezoid(first), self._trapezoid(last)
        width = (last - first).clamp(min=torch.finfo(x.dtype).tiny)
        departures = []
        for bend, height in ((0.0, 0.0), (1.0, 1.0), (3.0, 1.0), (4.0, 0.0)):
            at = torch.remainder(bend - first, 6)  # the next time this bend is met, at most one turn later
            inside = at < width
            departures.append(torch.where(inside, height - start - (end - start) * at / width, torch.zeros_like(start)))
        centre, slope, radius = _chord(start, end, departures)
        return value - chroma * centre, -chroma * slope, chroma * radius

    def bends(self, x: Tensor, image: Tensor) -> Tensor:
        _, chroma, place = self._split(x)
        coloured = place[(chroma > 0).expand_as(place)]
        return torch.cat([(b - coloured + 6 * turn) / 6 for b in (0.0, 1.0, 3.0, 4.0) for turn in (-1, 0, 1)])


@dataclasses.dataclass(frozen=True, eq=False)
class Curve(Path):
    """Any path: images given at knots ``t_0 < ... < t_m`` and interpolated linearly in between.

    `knots` (m + 1,); `images` (N, m + 1, C, H, W), one path for each image of the batch. The images passed beside it
    are reference points only. With m = 1 it is a straight line between two images.
    """

    knots: Tensor
    images: Tensor
    clip: bool = True
    name: ClassVar[str] = "curve"
    piecewise: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.knots.ndim != 1 or len(self.knots) < 2 or not bool((self.knots.diff() > 0).all()):
            raise ValueError(f"knots must be at least two increasing numbers, got {self.knots}")
        if self.images.ndim < 3 or self.images.shape[1] != len(self.knots):
            raise ValueError(
                f"images must be (N, {len(self.knots)}, ...), one for each knot, got {tuple(self.images.shape)}"
            )
        if not bool(torch.isfinite(self.images).all()):
            raise ValueError("the images of a curve hold NaN or infinity")

    def check(self, x: Tensor) -> None:
        super().check(x)
        if (len(self.images), *self.images.shape[2:]) != tuple(x.shape):
            raise ValueError(f"a curve of images {tuple(self.images.shape)} does not fit a batch {tuple(x.shape)}")

    def select(self, index: Tensor | slice, n: int) -> Curve:
        return dataclasses.replace(self, images=self.images[index])

    def describe(self) -> str:
        return f"Curve({len(self.knots)} knots)"

    def limits(self, x: Tensor) -> tuple[Tensor, Tensor]:
        low, high = (self.knots[k].to(x).expand(len(x), 1) for k in (0, -1))
        return low, high

    def trace(self, x: Tensor, t: Tensor, image: Tensor) -> Tensor:
        knots = self.knots.to(t)
        part = torch.searchsorted(knots, t.contiguous(), right=True).clamp(1, len(knots) - 1)
        weight = _wide((t - knots[part - 1]) / (knots[part] - knots[part - 1]), x)
        images = self.images.to(x)
        return (1 - weight) * images[image, part - 1] + weight * images[image, part]

    def enclose(self, x: Tensor, lo: Tensor, hi: Tensor, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        start, end = self.trace(x, lo, image), self.trace(x, hi, image)
        images, width = self.images.to(x), (hi - lo).clamp(min=torch.finfo(lo.dtype).tiny)
        departures = []
        for k in range(1, len(self.knots) - 1):
            at = (self.knots[k].to(lo) - lo) / width
            inside = _wide((at > 0) & (at < 1), x)
            departures.append(torch.where(inside, images[image, k] - start - (end - start) * _wide(at, x), 0.0))
        return _chord(start, end, departures)

    def bends(self, x: Tensor, image: Tensor) -> Tensor:
        inner = self.knots[1:-1].to(device=x.device, dtype=torch.float64)
        if not self.clip:
            return inner
        points = self.images[int(image[0])].to(x).flatten(1)
        found = [inner]
        for k in range(len(self.knots) - 1):
            step = points[k + 1] - points[k]
            for level in (0.0, 1.0):
                share = (level - points[k]) / step
                share = share[torch.isfinite(share) & (share > 0) & (share < 1)]
                found.append(self.knots[k].to(x) + share * (self.knots[k + 1] - self.knots[k]).to(x))
        return torch.cat(found)


@dataclasses.dataclass(frozen=True, eq=False)
class Rotation(Path):
    """The image turns about its centre by ``t`` degrees, |t| <= eps <= 180, bilinear, with zeros outside.

    Equal to `torch.nn.functional.grid_sample` with ``align_corners=True`` on a rotated grid. Over an interval of angles
    a pixel lies within a chord and a remainder ``(largest - smallest derivative) * width / 4``, from bounds of the
    derivative in every cell the sampling point can visit; that covers the curvature inside cells and the bends at
    their borders.
    """

    eps: Radius
    clip: bool = True
    name: ClassVar[str] = "rotation"

    def __post_init__(self) -> None:
        _check_radius(self.eps)
        if float(torch.as_tensor(self.eps).max()) > 180:
            raise ValueError(f"a rotation radius is in degrees, at most 180; got {self.eps}")

    def limits(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if x.ndim != 4:
            raise ValueError(f"Rotation needs images (N, C, H, W), got {tuple(x.shape)}")
        return _symmetric(self.eps, x)

    @staticmethod
    def _grid(x: Tensor) -> tuple[Tensor, Tensor]:
        """Pixel coordinates relative to the centre: columns (1, W) and rows (H, 1)."""
        height, width = x.shape[2:]
        columns = torch.arange(width, dtype=x.dtype, device=x.device) - (width - 1) / 2
        rows = torch.arange(height, dtype=x.dtype, device=x.device) - (height - 1) / 2
        return columns.reshape(1, -1), rows.reshape(-1, 1)

    def _source(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Where output pixels are read, in columns and rows of the image padded by one zero: (B, H, W) each."""
        columns, rows = self._grid(x)
        angle = torch.deg2rad(t).reshape(-1, 1, 1)
        u = columns * angle.cos() - rows * angle.sin() + (x.shape[3] + 1) / 2
        v = columns * angle.sin() + rows * angle.cos() + (x.shape[2] + 1) / 2
        return u, v

    @staticmethod
    def _corners(padded: Tensor, row: Tensor, column: Tensor) -> list[Tensor]:
        """The four corners of cells (B, H, W): values (B, C, H, W) at (0, 0), (0, 1), (1, 0), (1, 1)."""
        flat, wide = padded.flatten(2), padded.shape[3]
        found = []
        for i in (0, 1):
            for j in (0, 1):
                index = ((row + i) * wide + column + j).flatten(1).unsqueeze(1).expand(-1, padded.shape[1], -1)
                found.append(flat.gather(2, index).reshape(len(padded), padded.shape[1], *row.shape[1:]))
        return found

    def trace(self, x: Tensor, t: Tensor, image: Tensor) -> Tensor:
        padded = F.pad(x, (1, 1, 1, 1))
        u, v = self._source(x, t)
        u, v = u.clamp(0, x.shape[3] + 1), v.clamp(0, x.shape[2] + 1)
        column, row = u.floor().clamp(max=x.shape[3]).long(), v.floor().clamp(max=x.shape[2]).long()
        a, b, c, d = self._corners(padded, row, column)
        du, dv = (u - column).unsqueeze(1), (v - row).unsqueeze(1)
        return (1 - dv) * ((1 - du) * a + du * b) + dv * ((1 - du) * c + du * d)

    def enclose(self, x: Tensor, lo: Tensor, hi: Tensor, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        farthest = math.hypot(x.shape[2] - 1, x.shape[3] - 1) / 2
        # Each part is short enough for a sampling point to stay within two by two cells.
        longest = float(torch.deg2rad(hi - lo).max()) if len(lo) else 0.0
        parts = max(1, math.ceil(longest * farthest / 0.9))
        start, end = self.trace(x, lo, image), self.trace(x, hi, image)
        least, most = torch.zeros_like(start), torch.zeros_like(start)
        before = start
        for part in range(parts):
            a, b = lo + (hi - lo) * part / parts, lo + (hi - lo) * (part + 1) / parts
            after = end if part == parts - 1 else self.trace(x, b, image)
            remainder = self._remainder(x, a, b)
            for at, value in ((part / parts, before), ((part + 1) / parts, after)):
                departure = value - start - (end - start) * at
                least, most = torch.minimum(least, departure - remainder), torch.maximum(most, departure + remainder)
            before = after
        return (start + end) / 2 + (least + most) / 2, (end - start) / 2, (most - least) / 2

    def _remainder(self, x: Tensor, lo: Tensor, hi: Tensor) -> Tensor:
        """How far pixels can leave the chord over angles [lo, hi], (B, C, H, W)."""
        padded = F.pad(x, (1, 1, 1, 1))
        height, width = x.shape[2:]
        columns, rows = self._grid(x)
        middle, half = torch.deg2rad((lo + hi) / 2).reshape(-1, 1, 1), torch.deg2rad((hi - lo) / 2).reshape(-1, 1, 1)
        reach = torch.sqrt(columns**2 + rows**2) * half
        u, v = self._source(x, (lo + hi) / 2)
        # du/dt = -(v - centre), dv/dt = u - centre, in radians; both move by at most `reach` over the interval.
        du = (-(columns * middle.sin() + rows * middle.cos()), reach)
        dv = (columns * middle.cos() - rows * middle.sin(), reach)
        ends_u = ((u - reach).clamp(0, width + 1), (u + reach).clamp(0, width + 1))
        ends_v = ((v - reach).clamp(0, height + 1), (v + reach).clamp(0, height + 1))
        outside = (u - reach < 0) | (u + reach > width + 1) | (v - reach < 0) | (v + reach > height + 1)
        column = [e.floor().clamp(max=width).long() for e in ends_u]
        row = [e.floor().clamp(max=height).long() for e in ends_v]
        least = torch.full((len(x), x.shape[1], height, width), torch.inf, dtype=x.dtype, device=x.device)
        most = -least
        for r in row:
            for c in column:
                a, b, e, f = self._corners(padded, r, c)
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
        return (most - least) * (2 * half).unsqueeze(1) / 4


def _interval_product(ends: list[Tensor], speed: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The range of ``g w`` for g between the two `ends` (B, C, H, W) and w within ``speed = (middle, reach)``."""
    middle, reach = speed
    products = torch.stack([g * w.unsqueeze(1) for g in ends for w in (middle - reach, middle + reach)])
    return products.amin(0), products.amax(0)
