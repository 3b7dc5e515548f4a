"""Dual ascent on the bounds of a `ReluNet`: slopes of undecided units, multipliers of split ones, many at once."""

from __future__ import annotations

import dataclasses
import math
import time

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
    """For every column the best bound (B,) with its parameters, and the coefficients of the last step.

    `kept` and `at_input` are as `ReluNet.pull` returns them.
    """

    lower: Tensor
    theta: Tensor
    weights: Tensor | None
    kept: Tensor
    at_input: Tensor

    def select(self, columns: Tensor) -> Ascended:
        """Some columns."""
        return Ascended(
            self.lower[columns],
            self.theta[:, columns],
            None if self.weights is None else self.weights[:, columns],
            self.kept[:, columns],
            self.at_input[:, columns],
        )

    def put(self, at: Tensor, other: Ascended) -> Ascended:
        """With other columns in the places `at`."""
        return Ascended(
            self.lower.index_copy(0, at, other.lower),
            self.theta.index_copy(1, at, other.theta),
            None if self.weights is None or other.weights is None else self.weights.index_copy(1, at, other.weights),
            self.kept.index_copy(1, at, other.kept),
            self.at_input.index_copy(1, at, other.at_input),
        )

    def step(self, bound: Tensor, tried: Problems, kept: Tensor, at_input: Tensor) -> Ascended:
        """After one more evaluation, which gave `bound`."""
        better = bound > self.lower
        weights = self.weights
        if weights is not None and tried.weights is not None:
            weights = torch.where(better, tried.weights, weights)
        theta = torch.where(better, tried.theta, self.theta)
        return Ascended(torch.maximum(bound, self.lower), theta, weights, kept, at_input)


def ascend(
    net: ReluNet,
    problems: Problems,
    steps: int,
    target: float,
    *,
    rate: float = 0.1,
    multiplier_rate: float = 0.3,
    patience: int | None = None,
) -> Ascended:
    """Adam on the dual; columns whose bound passes `target` are left as they are from then on.

    `rate` is the first step of slopes, `multiplier_rate` that of multipliers in units of the root mean square of the
    coefficients they are added to. With little momentum a handful of steps is enough: starts are warm. After `patience`
    steps only those columns go on that would reach the target in as many steps again at the pace of the last two.
    Returns the best bounds seen, never worse than the start.
    """
    now, running = problems, torch.arange(len(problems.constant), device=problems.constant.device)
    best: Ascended | None = None
    result: Ascended | None = None
    scale: Tensor | None = None
    first = second = now.theta.new_zeros(())
    paces: list[Tensor] = []
    for step in range(steps):
        functional, constant = now.functional, now.constant
        if now.weights is not None:
            functional, constant = net.start(now.weights)
        bound, c, at_input = net.pull(functional, constant, now.upto, now.lines, now.theta)
        before = bound if best is None else best.lower
        if best is None:
            best = Ascended(bound, now.theta, now.weights, c, at_input)
        else:
            best = best.step(bound, now, c, at_input)
        paces = [*paces[-1:], best.lower - before]
        last = step == steps - 1
        going = best.lower <= target
        if patience is not None and step >= patience:
            going &= best.lower + sum(paces) * (patience / 2) > target
        left = int(going.sum())
        if last or left <= 0.75 * len(running):
            result = best if result is None else result.put(running, best)
            if last or not left:
                break
            stay = going.nonzero().flatten()
            running, now, best = running[stay], now.select(stay), best.select(stay)
            c, at_input, paces = best.kept, best.at_input, [pace[stay] for pace in paces]
            if scale is not None:
                first, second, scale = first[:, stay], second[:, stay], scale[:, stay]
        g, values = net.gradient(at_input, c, now.upto, now.lines, now.theta)
        if scale is None:
            # Slopes live in [0, 1]; multipliers have the scale of the coefficients they are added to.
            typical = multiplier_rate * c.square().mean(0, keepdim=True).sqrt().clamp_min(1e-12)
            scale = torch.where(now.lines.undecided > 0, rate, typical)
        first = 0.5 * first + 0.5 * g
        second = 0.999 * second + 0.001 * g * g
        size = 0.98**step / (1 - 0.5 ** (step + 1))
        move = size * scale * first / ((second / (1 - 0.999 ** (step + 1))).sqrt() + 1e-12)
        now = dataclasses.replace(now, theta=(now.theta + move).clamp(now.low, now.high))
        if now.weights is not None:
            value = net.outputs(values)
            spread = (value.amax(0) - value.amin(0)).clamp_min(1e-12)
            now = dataclasses.replace(now, weights=torch.softmax(now.weights.clamp_min(1e-9).log() + value / spread, 0))
    assert result is not None
    return result


@dataclasses.dataclass
class Memory:
    """What tightening the root's bounds of one block found, for lower (0) and upper (1) bounds: (undecided units, U').

    `theta`: the parameters. `weight`: by how much each bound moves with the intercepts of the units below.
    """

    theta: tuple[Tensor, Tensor]
    weight: tuple[Tensor, Tensor]


Memories = dict[int, Memory]


def tighten(
    net: ReluNet,
    exact: ReluNet,
    k: int,
    lo: Tensor,
    hi: Tensor,
    steps: int,
    sign: Tensor | None = None,
    memories: Memories | None = None,
    deadline: float = math.inf,
    bytes_: int = 1 << 23,
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
        memories: parameters to start from. Without an entry for k the start is CROWN's, and what is found (for problem
            0, the root) is stored.
        deadline: `time.perf_counter` after which no more units are tightened.
        bytes_: bytes for working tensors.
    """
    span, below = net.span(k), net.offsets[k - 1]
    if not below:
        return
    open_ = (lo[span] < 0) & (hi[span] > 0)
    if sign is not None:
        open_ &= sign[span] == 0
    units, problem = open_.nonzero(as_tuple=True)
    memory = None if memories is None else memories.get(k)
    record = memory is None and memories is not None
    if memory is None:
        same = crown_slopes(lo[:below, 0], hi[:below, 0]).to(net.lo.dtype).repeat(lo[span].shape[0], 1)
        memory = Memory((same, same.clone()), (torch.zeros_like(same), torch.zeros_like(same)))
    if record and memories is not None:
        memories[k] = memory
    chunk = max(1, bytes_ // (net.lo.element_size() * (12 * below + 3 * len(net.middle))))
    for at in range(0, len(units), chunk):
        if time.perf_counter() > deadline:
            return
        u, b = units[at : at + chunk], problem[at : at + chunk]
        for side, way in enumerate((1.0, -1.0)):
            splits = None if sign is None else sign[:below, b]
            some_lo, some_hi = lo[:below, b], hi[:below, b]
            lines = Lines.make(some_lo.to(net.lo.dtype), some_hi.to(net.lo.dtype), splits)
            low, high = limits(lines, splits)
            functional, constant = net.start_units(k, u, torch.full_like(u, way, dtype=net.lo.dtype))
            theta = memory.theta[side][u].t().clamp(low, high)
            problems = Problems(k, functional, constant, lines, theta, low, high)
            best = ascend(net, problems, steps, target=0.0, rate=0.2 if record else 0.1)
            if record:
                memory.theta[side][u] = best.theta.t()
                memory.weight[side][u] = best.kept.clamp(max=0).neg().t()
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
