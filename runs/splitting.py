"""Complete verification of networks with few inputs: cut the box of inputs until CROWN bounds decide every piece.

With up to ten or so free inputs (controllers, collision avoidance) cutting inputs beats cutting neurons: the relaxation
tightens in every layer at once. Best first, batched, in float64; the axis to cut is the one along which the worst row
may change most (width times gradient, as in ReluVal, Wang et al., USENIX Security 2018).
"""

from __future__ import annotations

import copy
import dataclasses
import math
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from certify.bounds import bounds
from certify.perturbations import Box
from certify.verdicts import Status

ROUNDING = 1e-9
"""Slack against float64 rounding: a piece holds when its lower bound exceeds this, relative to the rows' constants."""


@dataclasses.dataclass(frozen=True)
class Split:
    """What splitting found: `lower` bounds the worst row over the whole box; `domains` counts the pieces bounded."""

    status: Status
    lower: float
    domains: int
    counterexample: Tensor | None = None


def split(
    model: nn.Module,
    lo: Tensor,
    hi: Tensor,
    C: Tensor,
    d: Tensor,
    *,
    seconds: float,
    confirm: Callable[[Tensor], bool] = lambda x: True,
    batch: int = 256,
    most: int = 1_000_000,
) -> Split:
    """Decide whether all rows ``C y + d`` are positive for every input between `lo` and `hi`.

    Args:
        model: maps (N, *shape) to (N, outputs); it is copied, not changed.
        lo, hi: the box, (*shape) each.
        C, d: (rows, outputs) and (rows,).
        seconds: when to give up (TIMEOUT).
        confirm: asked about a candidate (*shape) in float64 before it counts as a counterexample.
        batch: pieces cut at once.
        most: pieces kept before giving up (UNKNOWN).

    Returns:
        HOLDS, VIOLATED with a counterexample, TIMEOUT, or UNKNOWN when a piece became too small to cut.
    """
    deadline = time.monotonic() + seconds
    model = copy.deepcopy(model).double()
    low, high = lo.double().unsqueeze(0), hi.double().unsqueeze(0)
    C, d = C.to(low), d.to(low)
    with torch.no_grad():
        size = float((model((low + high) / 2).abs() @ C.abs().T + d.abs()).max())
    slack = ROUNDING * (1.0 + size)  # infinite or NaN where the outputs are: then nothing is proved
    smallest = 1e-12 * (1.0 + float(torch.maximum(low.abs(), high.abs()).max()))
    bound, score, found = _examine(model, low, high, C, d, confirm)
    domains, settled, stuck = 1, math.inf, math.inf
    while found is None:
        open_ = ~(bound > slack)
        settled = min([settled, *bound[~open_].tolist()])
        low, high, bound, score = low[open_], high[open_], bound[open_], score[open_]
        fixed = (high - low).flatten(1).amax(1) <= smallest
        stuck = min([stuck, *bound[fixed].tolist()])
        low, high, bound, score = low[~fixed], high[~fixed], bound[~fixed], score[~fixed]
        lower = min([settled, stuck, *bound.tolist()])
        if not len(low):
            return Split(Status.HOLDS if stuck == math.inf else Status.UNKNOWN, lower, domains)
        if time.monotonic() >= deadline:
            return Split(Status.TIMEOUT, lower, domains)
        if len(low) > most:
            return Split(Status.UNKNOWN, lower, domains)
        order = bound.argsort()
        chosen, rest = order[:batch], order[batch:]
        new_low, new_high = _cut(low[chosen], high[chosen], score[chosen])
        new_bound, new_score, found = _examine(model, new_low, new_high, C, d, confirm)
        domains += len(new_low)
        new_bound = torch.maximum(new_bound, bound[chosen].repeat(2))  # a part is never worse than the whole
        low, high = torch.cat([low[rest], new_low]), torch.cat([high[rest], new_high])
        bound, score = torch.cat([bound[rest], new_bound]), torch.cat([score[rest], new_score])
    return Split(Status.VIOLATED, min([settled, stuck, *bound.tolist()]), domains, found)


def _examine(
    model: nn.Module, lo: Tensor, hi: Tensor, C: Tensor, d: Tensor, confirm: Callable[[Tensor], bool]
) -> tuple[Tensor, Tensor, Tensor | None]:
    """For pieces (B, *shape): lower bounds (B,), how much each axis matters (B, inputs), and a confirmed violation."""
    centre = ((lo + hi) / 2).requires_grad_(True)
    margin = (model(centre) @ C.T + d).amin(1)
    (gradient,) = torch.autograd.grad(margin.sum(), centre)
    slope = gradient.abs().flatten(1)
    # Every axis keeps some weight, because the gradient at the centre says nothing about the rest of the piece.
    score = (hi - lo).flatten(1) * (slope + 0.1 * slope.mean(1, keepdim=True) + 1e-30)
    with torch.no_grad():
        corner = torch.where(gradient > 0, lo, hi)
        for points in (centre.detach(), corner):
            margins = (model(points) @ C.T + d).amin(1)
            for i in margins.argsort()[:4].tolist():
                if margins[i] <= 0 and confirm(points[i]):
                    return margins, score, points[i]
        lower, _ = bounds(model, centre.detach(), Box(lo, hi), "crown", C.expand(len(lo), *C.shape))
        # A bound that overflowed says nothing.
        return (lower + d).amin(1).nan_to_num(nan=-math.inf, posinf=-math.inf), score, None


def _cut(lo: Tensor, hi: Tensor, score: Tensor) -> tuple[Tensor, Tensor]:
    """Halve each piece (B, *shape) along the axis with the largest score: (2 B, *shape)."""
    axis = score.argmax(1, keepdim=True)
    flat_lo, flat_hi = lo.flatten(1), hi.flatten(1)
    middle = (flat_lo + flat_hi).gather(1, axis) / 2
    left_hi, right_lo = flat_hi.scatter(1, axis, middle), flat_lo.scatter(1, axis, middle)
    return torch.cat([lo, right_lo.reshape(lo.shape)]), torch.cat([left_hi.reshape(hi.shape), hi])
