"""One-parameter perturbations whose images follow a curve rather than a line: hue, and user-given paths.

Each image is a continuous function of ``t``. `Path.enclose` puts it, over any interval of t, inside a line with a
radius around it, which shrinks to nothing with the interval; that is all a verifier needs. Where the image is
piecewise linear in t, `Path.bends` tells where its pixels bend, and verdicts can be exact.
"""

from __future__ import annotations

import abc
import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from certify.arithmetic import constant
from certify.perturbations import Perturbation, Radius, _check_radius, _clip, _picked, _symmetric, _uniform


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
        first = torch.stack([constant(place, x) for place in (5.0, 3.0, 1.0)])
        return value, chroma, torch.remainder(hue + first.reshape(1, 3, 1, 1), 6)

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
        return dataclasses.replace(self, images=_picked(self.images, index))

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
