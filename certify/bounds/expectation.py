"""Softmax followed by a constant linear map, bounded as one operation: the head of a DSNT keypoint network.

Bounding the weights one by one forgets that they sum to one. Here the weighted means themselves are bounded, exactly
for a box of logits, so no bound ever leaves the range of the coordinates.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from certify.bounds.op import Coefficients, Interval, Op


class Expectation(Op):
    """``softmax(z) @ weight.T + bias`` over the last axis; weight (out, n), z (N, ..., n)."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight, self.bias = weight, bias

    def forward(self, *inputs: Tensor) -> Tensor:
        mean = torch.softmax(inputs[0], -1) @ self.weight.t()
        return mean if self.bias is None else mean + self.bias

    def interval(self, *inputs: Interval) -> Interval:
        ((lo, hi),) = inputs
        low, high = extremes(lo, hi, self.weight)
        return (low, high) if self.bias is None else (low + self.bias, high + self.bias)

    def span(self) -> Tensor:
        """How far apart the largest and smallest coordinate are: (out,)."""
        return self.weight.amax(1) - self.weight.amin(1)

    def tangent(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """The weights p and the means y at logits `z`; ``dy_o / dz_i = p_i (weight_oi - y_o)``."""
        p = torch.softmax(z, -1)
        return p, p @ self.weight.t()

    def pull(self, c: Coefficients, z: Tensor) -> Coefficients:
        """Functionals of the means, through the derivative at logits `z` (N, ..., n), as functionals of the logits."""
        p, y = self.tangent(z)
        c = c.dense()
        means = (c.data * c.gather(y)).sum(-1, keepdim=True)
        return Coefficients(c.gather(p) * (c.data @ self.weight - means), c.image, c.rank)


class MeanBounds(NamedTuple):
    """The smallest and the largest weighted mean, (..., out) each."""

    low: Tensor
    high: Tensor


def extremes(lo: Tensor, hi: Tensor, weight: Tensor) -> MeanBounds:
    """The exact range of ``sum_i w_i g_i / sum_i w_i`` over ``w_i`` in ``[exp(lo_i), exp(hi_i)]``, rows g of `weight`.

    The mean is quasi-linear in w, so an extreme is at a corner, and at a largest mean every coordinate above the mean
    has its largest weight and every one below its smallest: with the coordinates sorted, one of n + 1 thresholds.

    Args:
        lo: smallest logits (..., n).
        hi: largest logits (..., n).
        weight: coordinates (out, n).
    """
    top = hi.amax(-1, keepdim=True)
    light, heavy = torch.exp(lo - top), torch.exp(hi - top)
    order = weight.argsort(1)
    g = weight.gather(1, order)
    base = g[:, :1]  # differences from the smallest coordinate are sums without cancellation
    light, heavy = light[..., order], heavy[..., order]  # (..., out, n)

    def means(below: Tensor, above: Tensor) -> Tensor:
        """Weighted means with `below` up to a threshold and `above` beyond it, for all n + 1 thresholds."""
        values = torch.stack([torch.ones_like(g), g - base]).reshape(2, *[1] * (below.ndim - 2), *g.shape)
        zero = torch.zeros_like(below[..., :1]).expand(2, *below.shape[:-1], 1)
        first = torch.cat([zero, (below * values).cumsum(-1)], -1)
        last = torch.cat([(above * values).flip(-1).cumsum(-1).flip(-1), zero], -1)
        mass, moment = first + last
        return torch.where(mass > least, moment / mass.clamp(min=least), torch.nan)

    # Where all weights of a threshold underflow, its mean is lost. The threshold of the extreme has it between
    # the coordinates on its two sides, so the coordinate beyond stands in; without one the threshold attains nothing.
    least = torch.finfo(lo.dtype).tiny / torch.finfo(lo.dtype).eps
    offset, none = g - base, torch.full_like(base, torch.inf)
    above, below = means(light, heavy), means(heavy, light)
    high = torch.where(above.isnan(), torch.cat([offset, -none], -1), above).amax(-1)
    low = torch.where(below.isnan(), torch.cat([none, offset], -1), below).amin(-1)
    return MeanBounds(low + base[:, 0], high + base[:, 0])
