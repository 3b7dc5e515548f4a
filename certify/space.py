"""The space that an attack searches: pixels for boxes and balls, the parameters ``t`` for affine families.

Ends are rounded inwards from float64 and L2 offsets towards the image, so that what an attack returns lies in the
perturbation set to the last bit, not just up to rounding.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from certify.arithmetic import constant
from certify.perturbations import L2, AffineFamily, Box, Linf, Perturbation


@dataclasses.dataclass(frozen=True)
class Space:
    """Where a search moves: points z between `lo` and `hi`, inside a ball for L2, and the image of each point."""

    p: Perturbation
    x: Tensor
    lo: Tensor
    hi: Tensor
    half: Tensor  # what a step size of 1 moves: half the width of the box before any clip
    radius: Tensor | None = None  # of the L2 ball, (N, 1, ...)
    bounded: bool = True

    @classmethod
    def of(cls, x: Tensor, p: Perturbation, exact: bool) -> Space:
        """`exact`: take the ends in float64 and round them inwards, so that every point is truly a member."""
        wide = x.double() if exact else x
        radius = None
        if isinstance(p, AffineFamily):
            lo, hi = p.limits(wide)
        else:
            lo, hi = p.hull(wide)
        if isinstance(p, L2):
            radius = constant(p.eps, x).reshape(-1, *[1] * (x.ndim - 1))
            radius = radius.expand(len(x), *[1] * (x.ndim - 1))
        if exact:
            lo, hi = _inwards(lo, hi, x.dtype)
        half = (hi - lo) / 2
        if isinstance(p, Linf):
            half = constant(p.eps, x).reshape(-1, *[1] * (x.ndim - 1)).expand_as(x)
        return cls(p, x, lo, hi, half, radius, isinstance(p, Linf | L2 | Box | AffineFamily))

    def at(self, index: Tensor) -> Space:
        radius = None if self.radius is None else self.radius[index]
        return Space(self.p, self.x[index], self.lo[index], self.hi[index], self.half[index], radius, self.bounded)

    @property
    def affine(self) -> bool:
        return isinstance(self.p, AffineFamily)

    def image(self, z: Tensor) -> Tensor:
        return self.p.apply(self.x, z) if self.affine else z

    def start(self) -> Tensor:
        """The point of the unperturbed image, or the nearest one in the set."""
        return torch.maximum(torch.minimum(torch.zeros_like(self.lo) if self.affine else self.x, self.hi), self.lo)

    def random(self, generator: torch.Generator | None) -> Tensor:
        device = self.lo.device if generator is None else generator.device
        u = torch.rand(self.lo.shape, dtype=self.lo.dtype, device=device, generator=generator).to(self.lo.device)
        return self.project(torch.lerp(self.lo, self.hi, u))

    def project(self, z: Tensor) -> Tensor:
        z = torch.maximum(torch.minimum(z, self.hi), self.lo)
        if self.radius is None:
            return z
        offset = z - self.x
        norm = offset.flatten(1).norm(dim=1).reshape(self.radius.shape)
        return self.x + offset * (self.radius / norm.clamp_min(1e-30)).clamp(max=1)

    def move(self, z: Tensor, gradient: Tensor, size: float) -> Tensor:
        """A step against `gradient`: signed for boxes, normalised for balls; `size` counts radii."""
        if self.radius is None:
            return self.project(z - gradient.sign() * self.half * size)
        norm = gradient.flatten(1).norm(dim=1).reshape(self.radius.shape)
        return self.project(z - gradient / norm.clamp_min(1e-30) * self.radius * size)

    def settle(self, z: Tensor) -> Tensor:
        """The member of the set nearest to `z` in the arithmetic of `x`: for balls, the offset rounded towards x."""
        if self.radius is None:
            return self.project(z)
        centre = self.x.double()
        offset = torch.maximum(torch.minimum(z, self.hi), self.lo).double() - centre
        eps = constant(getattr(self.p, "eps"), centre)  # noqa: B009
        eps = eps.reshape(-1, *[1] * (z.ndim - 1)).expand_as(self.radius)
        norm = offset.flatten(1).norm(dim=1).reshape(self.radius.shape)
        offset = torch.where(norm > eps, offset * (eps / norm.clamp_min(1e-300) * (1 - 1e-12)), offset)
        rounded = (centre + offset).to(z.dtype)
        past = (rounded.double() - centre).abs() > offset.abs()
        return torch.where(past, torch.nextafter(rounded, self.x), rounded)


def _inwards(lo: Tensor, hi: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Ends in `dtype` that lie inside the float64 ends; where no such number exists, both round to the nearest."""
    low, high = lo.to(dtype), hi.to(dtype)
    up = torch.nextafter(low, torch.full_like(low, float("inf")))
    down = torch.nextafter(high, torch.full_like(high, float("-inf")))
    inner_low = torch.where(low.double() < lo, up, low)
    inner_high = torch.where(high.double() > hi, down, high)
    empty = inner_low > inner_high
    return torch.where(empty, low, inner_low), torch.where(empty, high, inner_high)
