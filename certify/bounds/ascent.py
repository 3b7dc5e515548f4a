"""Dual ascent on the bounds of a `ReluNet`: slopes of undecided units and multipliers of split units, many problems at once."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from certify.bounds.relunet import Lines, ReluNet


@dataclasses.dataclass(frozen=True)
class Problems:
    """B lower-bounding problems: a functional of the units below block `upto` in every column.

    `functional` and `constant` as for `ReluNet.pull`; `theta` (U', B) parameters to start from, kept in [low, high].
    With `weights` (rows, B) the functional is that convex combination of the network's rows, improved along with theta.
    """

    upto: int
    functional: dict[int, Tensor]
    constant: Tensor
    lines: Lines
    theta: Tensor
    low: Tensor
    high: Tensor
    weights: Tensor | None = None

    def select(self, columns: Tensor) -> Problems:
        """Some columns."""
        return Problems(
            self.upto,
            {j: v[:, columns] for j, v in self.functional.items()},
            self.constant[columns],
            self.lines.select(columns),
            self.theta[:, columns],
            self.low if self.low.shape[1] == 1 else self.low[:, columns],
            self.high if self.high.shape[1] == 1 else self.high[:, columns],
            None if self.weights is None else self.weights[:, columns],
        )


def limits(lines: Lines, sign: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The range of theta: [0, 1] for slopes, a half-line for the multiplier of a split unit, 0 for decided units."""
    low, high = torch.zeros_like(lines.undecided), lines.undecided.clone()
    if sign is not None:
        low.masked_fill_(sign > 0, -torch.inf)
        high.masked_fill_(sign < 0, torch.inf)
    return low, high


@dataclasses.dataclass(frozen=True)
class Ascended:
    """For every column: the best bound (B,), its parameters, and coefficients, pre-activations and inputs there."""

    lower: Tensor
    theta: Tensor
    weights: Tensor | None
    kept: Tensor
    gradient: Tensor
    x: Tensor


def ascend(net: ReluNet, problems: Problems, iterations: int, target: float, rate: float = 0.1) -> Ascended:
    """Adam on the dual; columns whose bound passes `target` are left as they are from then on.

    Returns what belongs to the best bound of each column, never worse than the start.
    """
    width = len(problems.constant)
    running = torch.arange(width, device=problems.constant.device)
    lower = torch.full_like(problems.constant, -torch.inf)
    theta = problems.theta.clone()
    weights = None if problems.weights is None else problems.weights.clone()
    kept, gradient = torch.zeros_like(theta), torch.zeros_like(theta)
    best_x = theta.new_zeros(len(net.middle), width)
    now = problems
    first = second = now.theta.new_zeros(())
    scale: Tensor | None = None
    for step in range(iterations):
        functional, constant = now.functional, now.constant
        if now.weights is not None:
            functional, constant = net.start(now.weights)
        bound, c, x = net.pull(functional, constant, now.upto, now.lines, now.theta)
        g, values = net.gradient(x, c, now.upto, now.lines, now.theta)
        better = bound > lower[running]
        whole = bool(better.all()) if step else True
        if whole and len(running) == width:
            lower, theta, kept, gradient, best_x = bound, now.theta, c, g, x
            weights = now.weights
        else:
            at = running[better]
            lower = lower.index_copy(0, at, bound[better])
            theta, kept = theta.index_copy(1, at, now.theta[:, better]), kept.index_copy(1, at, c[:, better])
            gradient, best_x = gradient.index_copy(1, at, g[:, better]), best_x.index_copy(1, at, x[:, better])
            if weights is not None and now.weights is not None:
                weights = weights.index_copy(1, at, now.weights[:, better])
        if step == iterations - 1:
            break
        if scale is None:
            # Slopes live in [0, 1]; multipliers have the scale of the coefficients they are added to.
            typical = c.abs().amax(0, keepdim=True).clamp_min(1e-12)
            scale = torch.where(now.lines.undecided > 0, torch.ones_like(c), typical)
        if now.weights is not None:
            value = net.outputs(values)
            spread = (value.amax(0) - value.amin(0)).clamp_min(1e-12)
            now = dataclasses.replace(now, weights=torch.softmax(now.weights.clamp_min(1e-9).log() + value / spread, 0))
        first = 0.9 * first + 0.1 * g
        second = 0.999 * second + 0.001 * g * g
        size = rate * 0.98**step / (1 - 0.9 ** (step + 1))
        move = size * scale * first / ((second / (1 - 0.999 ** (step + 1))).sqrt() + 1e-12)
        now = dataclasses.replace(now, theta=(now.theta + move).clamp(now.low, now.high))
        open_ = bound <= target
        if int(open_.sum()) <= 0.75 * len(running):
            left = open_.nonzero().flatten()
            if not len(left):
                break
            running, now = running[left], now.select(left)
            first, second, scale = first[:, left], second[:, left], scale[:, left]
    return Ascended(lower, theta, weights, kept, gradient, best_x)


Slopes = dict[int, tuple[Tensor, Tensor]]


def tighten(
    net: ReluNet,
    exact: ReluNet,
    k: int,
    lo: Tensor,
    hi: Tensor,
    steps: int,
    sign: Tensor | None = None,
    slopes: Slopes | None = None,
    memory: int = 1 << 26,
) -> None:
    """Tighten the bounds of block k's undecided units by dual ascent, confirmed in the arithmetic of `exact`.

    Args:
        net: the network in the dtype that is searched in.
        exact: the same network in float64.
        k: the block.
        lo, hi: (U, B) float64 bounds of all undecided units in B subproblems; block k's rows are updated in place, and
            may cross where a subproblem is empty.
        steps: steps of ascent.
        sign: (U, B) the splits of each subproblem, None for none.
        slopes: parameters to start from, for lower and upper bounds of each block: (undecided units of k, units below).
            Where they have no entry for k they are started at CROWN's and the ones found for problem 0 are stored.
        memory: bytes for working tensors.
    """
    span, below = net.span(k), net.offsets[k - 1]
    if not below:
        return
    open_ = (lo[span] < 0) & (hi[span] > 0)
    if sign is not None:
        open_ &= sign[span] == 0
    units, problem = open_.nonzero(as_tuple=True)
    start = (slopes or {}).get(k)
    record = start is None and slopes is not None
    if start is None:
        same = crown_slopes(lo[:below, 0], hi[:below, 0]).to(net.lo.dtype).repeat(lo[span].shape[0], 1)
        start = (same, same.clone())
    if record and slopes is not None:
        slopes[k] = start
    chunk = max(1, memory // (net.lo.element_size() * (12 * below + 3 * len(net.middle))))
    for at in range(0, len(units), chunk):
        u, b = units[at : at + chunk], problem[at : at + chunk]
        for side, way in enumerate((1.0, -1.0)):
            splits = None if sign is None else sign[:below, b]
            some_lo, some_hi = lo[:below, b], hi[:below, b]
            lines = Lines.make(some_lo.to(net.lo.dtype), some_hi.to(net.lo.dtype), splits)
            low, high = limits(lines, splits)
            functional, constant = net.start_units(k, u, torch.full_like(u, way, dtype=net.lo.dtype))
            theta = start[side][u].t().clamp(low, high)
            best = ascend(net, Problems(k, functional, constant, lines, theta, low, high), steps, target=0.0)
            if record:
                start[side][u] = best.theta.t()
            functional, constant = exact.start_units(k, u, torch.full_like(u, way, dtype=lo.dtype))
            lines = Lines.make(some_lo, some_hi, splits)
            low, high = limits(lines, splits)
            bound, _, _ = exact.pull(functional, constant, k, lines, best.theta.double().clamp(low, high))
            row = u + span.start
            if way > 0:
                lo[row, b] = torch.maximum(lo[row, b], bound)
            else:
                hi[row, b] = torch.minimum(hi[row, b], -bound)


def crown_slopes(lo: Tensor, hi: Tensor) -> Tensor:
    """CROWN's choice of lower slopes for undecided units, 0 for decided ones."""
    return ((lo < 0) & (hi > 0) & (hi > -lo)).to(lo.dtype)
