"""Parametric perturbations as verifiers of few parameters see them: images at t, and enclosures over boxes of t."""

from __future__ import annotations

from typing import TypeGuard

import torch
from torch import Tensor

from certify.bounds.activations import Clamp
from certify.bounds.forward import Form
from certify.bounds.graph import Graph
from certify.curves import Path
from certify.perturbations import AffineFamily, Perturbation

Parametric = AffineFamily | Path


class Motion:
    """How the images x (N, ...) of a batch move with t (K parameters).

    Attributes:
        lo, hi: the ends of every image's parameter box, (N, K) float64 on the CPU.
        knots: for each image, parameters in increasing order at which many pixels bend at once (K = 1; else none).
    """

    def __init__(self, p: Parametric, x: Tensor) -> None:
        self.p, self.x = p, x
        self._double = x.double()
        low, high = p.limits(self._double)
        self.lo, self.hi = low.detach().cpu(), high.detach().cpu()
        self.parameters = self.lo.shape[1]
        self._directions = p.directions(self._double) if isinstance(p, AffineFamily) else None
        self.knots = [self._heavy(i) for i in range(len(x))]

    @property
    def exact(self) -> bool:
        """Whether images are piecewise linear in t, so that a piecewise linear network is, too."""
        return self.parameters == 1 and (self._directions is not None or bool(getattr(self.p, "piecewise", False)))

    @property
    def bent(self) -> bool:
        """Whether images bend before they are clipped."""
        return self._directions is None

    def network(self, graph: Graph) -> Graph:
        """`graph` behind the clipping of this perturbation."""
        if not self.p.clip:
            return graph
        shape = graph.nodes[0].shape
        clamp = Clamp(0.0, 1.0)
        clamp.path = f"({self.p.name})"
        return graph.prefixed([clamp], [shape, shape])

    def raw(self, image: Tensor, t: Tensor, dtype: torch.dtype) -> Tensor:
        """The images (B, ...) before clipping, for images by number (B,) and parameters (B, K)."""
        image = image.to(self.x.device)
        t = t.to(self.x.device)
        if self._directions is None:
            assert isinstance(self.p, Path)
            return self.p.trace(self._double[image], t[:, 0], image).to(dtype)
        move = (t.reshape(*t.shape, *[1] * (self.x.ndim - 1)) * self._directions[image]).sum(1)
        return (self._double[image] + move).to(dtype)

    def images(self, image: Tensor, t: Tensor, dtype: torch.dtype) -> Tensor:
        """The perturbed images (B, ...), clipped where the perturbation clips."""
        raw = self.raw(image, t, dtype)
        return raw.clamp(0, 1) if self.p.clip else raw

    def form(self, image: Tensor, lo: Tensor, hi: Tensor, dtype: torch.dtype) -> Form:
        """A form of the images before clipping for t anywhere in [lo, hi], (B, K) each."""
        image, lo, hi = (v.to(self.x.device) for v in (image, lo, hi))
        middle, half = (lo + hi) / 2, (hi - lo) / 2
        if self._directions is None:
            assert isinstance(self.p, Path)
            centre, slope, radius = self.p.enclose(self._double[image], lo[:, 0], hi[:, 0], image)
            return Form(torch.stack([centre, slope]).to(dtype), radius.to(dtype))
        directions = self._directions[image]
        ones = [1] * (self.x.ndim - 1)
        centre = self._double[image] + (middle.reshape(*middle.shape, *ones) * directions).sum(1)
        slopes = (half.reshape(*half.shape, *ones) * directions).transpose(0, 1)
        form = torch.cat([centre.unsqueeze(0), slopes]).to(dtype)
        return Form(form, torch.zeros_like(form[0]))

    def bends(self, image: int) -> Tensor:
        """All parameters, increasing, at which a pixel of one image bends: (M,) float64 (K = 1, piecewise linear)."""
        if self._directions is None:
            assert isinstance(self.p, Path)
            found = self.p.bends(self._double[image : image + 1], torch.tensor([image], device=self.x.device))
        elif self.p.clip:
            direction = self._directions[image, 0]
            ends = torch.cat([((e - self._double[image]) / direction).flatten() for e in (0.0, 1.0)])
            found = ends[torch.isfinite(ends)]
        else:
            return torch.zeros(0, dtype=torch.float64)
        found = found.cpu()
        return found[(found > self.lo[image, 0]) & (found < self.hi[image, 0])].sort().values

    def _heavy(self, image: int, most: int = 16) -> Tensor:
        """Bends shared by at least a thousandth of the pixels: splitting there makes each side simple."""
        if not self.exact:
            return torch.zeros(0, dtype=torch.float64)
        bends = self.bends(image)
        span = float(self.hi[image, 0] - self.lo[image, 0])
        if not len(bends) or not span:
            return bends[:0]
        # Bends at the same place up to the rounding of 8-bit pixels in float32 count as one.
        bins = (bends / (1e-6 * span)).round()
        _, where, count = bins.unique_consecutive(return_inverse=True, return_counts=True)
        first = torch.searchsorted(where, torch.arange(len(count)))
        heavy = count >= max(2, self.x[0].numel() // 1000)
        places, weight = bends[first[heavy]], count[heavy]
        return places[weight.argsort(descending=True)[:most]].sort().values


def parametric(p: Perturbation) -> TypeGuard[Parametric]:
    """Whether `p` moves images along a few parameters."""
    return isinstance(p, AffineFamily | Path)
