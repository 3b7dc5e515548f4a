"""A perturbation as the bound engine sees it: a box (perhaps a ball) of inputs to a graph."""

from __future__ import annotations

import dataclasses
import functools

import torch
from torch import Tensor

from certify.arithmetic import constant
from certify.bounds.activations import Clamp
from certify.bounds.affine import AffinePath
from certify.bounds.graph import Graph
from certify.bounds.op import Coefficients, Op
from certify.perturbations import L2, AffineFamily, Perturbation


@dataclasses.dataclass(frozen=True)
class Region:
    """Inputs between `lo` and `hi` (N, *shape), and, where `radius` (N,) is set, within that distance of `centre`."""

    lo: Tensor
    hi: Tensor
    centre: Tensor | None = None
    radius: Tensor | None = None

    @functools.cached_property
    def middle(self) -> Tensor:
        """The middle of the box."""
        return torch.lerp(self.lo, self.hi, 0.5)  # the sum of the ends may overflow

    @functools.cached_property
    def half(self) -> Tensor:
        """Half its width."""
        return (self.hi - self.lo) / 2

    def lower(self, c: Coefficients) -> Tensor:
        """The smallest value of each functional over the region (a lower bound of it for a ball cut by a box)."""
        value = c.dot(self.middle) - c.replace(c.data.abs()).dot(self.half)
        if self.centre is None or self.radius is None:
            return value
        c = c.dense()
        radius = self.radius if c.image is None else self.radius[c.image]
        ball = c.dot(self.centre) - radius.unsqueeze(1) * c.data.flatten(2).norm(dim=-1)
        return torch.maximum(value, ball)

    def select(self, index: Tensor) -> Region:
        """The regions of some images."""
        return Region(
            self.lo[index],
            self.hi[index],
            None if self.centre is None else self.centre[index],
            None if self.radius is None else self.radius[index],
        )


def attach(graph: Graph, x: Tensor, p: Perturbation, hull: bool = False) -> tuple[Graph, Region]:
    """The graph and input region that stand for `p` around images `x`.

    Affine families put their path, and the clipping to [0, 1], in front of the network: the input becomes the parameter
    vector t (N, K), and linear bounds keep track of it. ``hull=True`` forgets the path and takes the box of pixels.
    """
    if isinstance(p, AffineFamily) and not hull:
        lo, hi = p.limits(x)
        ops: list[Op] = [AffinePath(x, p.directions(x))]
        shape = tuple(x.shape[1:])
        shapes = [(p.parameters,), shape]
        if p.clip:
            ops.append(Clamp(0.0, 1.0))
            shapes.append(shape)
        for op in ops:
            op.path = f"({p.name})"
        return graph.prefixed(ops, shapes), Region(lo, hi)
    lo, hi = p.hull(x)
    if isinstance(p, L2):
        return graph, Region(lo, hi, x, constant(p.eps, x).expand(len(x)))
    return graph, Region(lo, hi)
