"""Branch and bound over the ReLUs of a `ReluNet`: batches of subproblems, bounded by dual ascent, split on one unit.

Best-first on the lower bound. A subproblem is a row of the specification and the signs of the units split so far; its
bound is an alpha,beta-CROWN bound (Wang et al., 2021), improved from its parent's parameters for a few steps. The unit
to split is the one whose relaxation costs the bound most, as in BaBSR (Bunel et al., 2020), where not only its direct
effect counts but also the effect through the bounds of all units above it. To reap the latter, subproblems get their
units' bounds tightened under their splits from time to time, as often as that pays on the problem at hand. Bounds that
decide a subproblem are confirmed in float64; where every unit is decided, a linear program does.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from certify.bounds.ascent import Memories, Problems, ascend, limits, tighten
from certify.bounds.relunet import Lines, ReluNet

State = dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class Settings:
    """How the search goes about it; the answer does not depend on these.

    Attributes:
        columns: subproblems bounded at a time.
        steps: most steps of dual ascent a subproblem, `root_steps` for the first.
        patience: steps after which those without prospects are given up and split.
        refresh_steps: steps of ascent a unit when the bounds of a subproblem's units are tightened.
        refresh_every: splits between two tightenings at first; the search adapts it.
        refresh_share: share of the work that tightening should take while it helps.
    """

    columns: int = 512
    steps: int = 12
    patience: int = 4
    root_steps: int = 30
    refresh_steps: int = 2
    refresh_every: int = 3
    refresh_share: float = 0.7


@dataclasses.dataclass
class Tally:
    """What a search did: subproblems bounded, splits on the longest path, tightenings, linear programs."""

    domains: int = 0
    depth: int = 0
    refreshed: int = 0
    leaves: int = 0


@dataclasses.dataclass(frozen=True)
class Found:
    """How a search ended.

    `lower` bounds the margin from below; `left` subproblems are open, `stuck` ones could not be decided; `witness` is a
    counterexample or None.
    """

    lower: float
    left: int
    stuck: int
    witness: Tensor | None


class Search:
    """The search on one image.

    Args:
        net: the network in the dtype to search in.
        exact: the same in float64.
        margin: bounds above it decide a subproblem.
        any_row: a subproblem is decided when any mixture of rows is positive; else rows are decided one by one.
        settings: see `Settings`.
        attack: checks candidate inputs (inputs, B) on the model; a counterexample or None.
        memories: what tightening the root found.
    """

    def __init__(
        self,
        net: ReluNet,
        exact: ReluNet,
        margin: float,
        any_row: bool,
        settings: Settings,
        attack: Callable[[Tensor], Tensor | None],
        memories: Memories,
    ) -> None:
        self.net, self.exact, self.margin, self.any_row, self.settings = net, exact, margin, any_row, settings
        self.attack, self.memories = attack, memories
        self.tally = Tally()
        self.tables = _Tables(exact.lo, exact.hi)
        self.open = _Open()
        self.refresh_every = settings.refresh_every
        columns = 2 * sum(b.undecided for b in net.blocks[1:])
        self._refresh_at_once = max(1, 8192 // max(1, columns))
        self._refresh_cost = columns * settings.refresh_steps
        # Splits needed below a subproblem from which on tightening it first is cheaper: a guess, corrected as we go.
        self._worth = math.log2(max(2.0, self._refresh_cost / (2 * settings.patience)))
        self._refreshing = self._splitting = 0  # steps of ascent spent on either

        self._gain = 0.0  # what a split brings, a running mean
        self._decided = math.inf  # smallest bound of a decided subproblem
        self._stuck = 0
        self._witness: Tensor | None = None

    def run(self, deadline: float, memory: int) -> Found:
        """Search until all is decided, a counterexample turns up, the deadline passes or memory runs out."""
        self.start()
        while self.open.count and self._witness is None and time.perf_counter() < deadline:
            if self.open.bytes + self.tables.bytes > memory:
                break
            self.step()
        return Found(min(self.open.lower, self._decided), self.open.count, self._stuck, self._witness)

    def start(self) -> None:
        """Bound the root, one subproblem a row (or one for all, with `any_row`)."""
        net, rows = self.net, len(self.net.rows.bias)
        count = 1 if self.any_row else rows
        weights = torch.full((1, rows), 1 / rows) if self.any_row else torch.eye(rows)
        zeros = torch.zeros(count, dtype=torch.int32, device=net.lo.device)
        state = {
            "lower": torch.full((count,), -math.inf, dtype=net.lo.dtype, device=net.lo.device),
            "sign": torch.zeros(count, net.units, dtype=torch.int8, device=net.lo.device),
            "theta": ((net.hi > -net.lo) & (net.lo < 0)).to(net.lo.dtype).expand(count, -1),
            "weights": weights.to(net.lo),
            **{name: zeros.clone() for name in ("depth", "since", "table")},
        }
        self._bound(state, root=True)

    def step(self) -> None:
        """Take the worst subproblems; tighten those that are due and split the others."""
        parents = self.open.pop(max(1, self.settings.columns // 2))
        unit = parents.pop("unit").long()
        # Tightening pays where the splits that are still needed would cost more.
        due = (parents["since"] >= self.refresh_every) & (-parents["lower"] > self._worth * self._gain)
        if bool(due.any()):
            now = due.nonzero().flatten()
            later = now[self._refresh_at_once :]
            if len(later):
                self.open.push({name: value[later] for name, value in {**parents, "unit": unit}.items()})
            now = now[: self._refresh_at_once]
            self._refreshing += len(now) * self._refresh_cost
            self._refresh({name: value[now] for name, value in parents.items()})
            parents, unit = {name: value[~due] for name, value in parents.items()}, unit[~due]
        self._worth *= (
            1.03 if self._refreshing > self.settings.refresh_share * (self._refreshing + self._splitting) else 0.97
        )
        if not len(unit) or self._witness is not None:
            return
        at = torch.arange(len(unit), device=unit.device)
        parents["theta"][at, unit] = 0
        parents["depth"] = parents["depth"] + 1
        parents["since"] = parents["since"] + 1
        children = {name: torch.cat([value, value]) for name, value in parents.items()}
        children["sign"][at, unit] = 1
        children["sign"][at + len(at), unit] = -1
        self._splitting += 2 * len(unit) * self.settings.patience
        gain = self._bound(children)
        self._gain = gain if not self._gain else 0.9 * self._gain + 0.1 * gain

    def _refresh(self, state: State) -> None:
        """Tighten the bounds of all undecided units of subproblems under their splits, then bound those again."""
        lo, hi = self.tables.read(state["table"], state["sign"])
        sign = state["sign"].t().contiguous()
        for k in range(2, len(self.net.blocks) + 1):
            tighten(self.net, self.exact, k, lo, hi, self.settings.refresh_steps, sign, self.memories)
        self.tally.refreshed += len(sign[0])
        # Ends that cross by more than rounding show that no input satisfies the splits.
        possible = (lo - hi <= 1e-6 * (1 + lo.abs() + hi.abs())).all(0).nonzero().flatten()
        if not len(possible):
            return
        middle = (lo + hi) / 2
        lo, hi = torch.where(lo > hi, middle, lo)[:, possible], torch.where(lo > hi, middle, hi)[:, possible]
        state = {name: value[possible] for name, value in state.items()}
        state["table"] = self.tables.add(lo.t(), hi.t())
        state["since"] = torch.zeros_like(state["since"])
        gain = self._bound(state)
        # Where it brings no more than a single split it is done less often.
        if gain < 0.5 * self._gain:
            self.refresh_every = min(2 * self.refresh_every, 1 << 20)
        elif gain > 2 * self._gain:
            self.refresh_every = max(2, self.refresh_every - 1)

    def _bound(self, state: State, root: bool = False) -> float:
        """Bound subproblems, drop what is decided, put the rest with their next unit back.

        Returns:
            The mean improvement over the bounds so far (counted up to 0), 0 when there were none.
        """
        net = self.net
        sign = state["sign"].t()
        exact_lo, exact_hi = self.tables.read(state["table"], state["sign"])
        lo, hi = exact_lo.to(net.lo.dtype), exact_hi.to(net.lo.dtype)
        lines = Lines.make(lo, hi, sign)
        low, high = limits(lines, sign)
        weights = state["weights"].t()
        functional, constant = net.start(weights)
        theta = state["theta"].t().to(lo.dtype).clamp(low, high)
        mixed = weights if self.any_row else None
        problems = Problems(len(net.blocks) + 1, functional, constant, lines, theta, low, high, mixed)
        if root:
            best = ascend(net, problems, self.settings.root_steps, self.margin, rate=0.2)
        else:
            best = ascend(net, problems, self.settings.steps, self.margin, patience=self.settings.patience)
        self.tally.domains += len(constant)
        self.tally.depth = max(self.tally.depth, int(state["depth"].max()))
        if best.weights is not None:
            state["weights"] = best.weights.t()
        # A bound that overflowed (NaN) says nothing; its parent's stays.
        lower = torch.fmax(best.lower, state["lower"])
        gain = (
            float((lower.clamp(max=0) - state["lower"].clamp(max=0)).mean())
            if bool((state["lower"] > -math.inf).all())
            else 0.0
        )
        passed = (best.lower > self.margin).nonzero().flatten()
        if len(passed):
            bound = self._confirm(
                exact_lo[:, passed],
                exact_hi[:, passed],
                sign[:, passed],
                best.theta[:, passed],
                state["weights"][passed],
            )
            sure = bound > self.margin
            self._decided = min(self._decided, float(torch.where(sure, bound, math.inf).min()))
            # What only rounding put above the margin stays open, with the bound that was confirmed.
            lower[passed] = torch.where(sure, math.inf, bound.clamp(max=self.margin)).to(lower.dtype)
        left = (lower < math.inf).nonzero().flatten()
        if not len(left):
            return gain
        worst = left[lower[left].topk(min(16, len(left)), largest=False).indices]
        self._witness = self.attack(net.minimiser(best.at_input[:, worst]))
        if self._witness is not None:
            return gain
        undecided = lines.undecided[:, left] > 0
        final = ~undecided.any(0)
        for i in left[final].tolist():
            self._decide(state["sign"][i], exact_lo[:, i], state["weights"][i])
            if self._witness is not None:
                return gain
        left, undecided = left[~final], undecided[:, ~final]
        if len(left):
            effect = self._effects(best.kept[:, left], lines.undecided[:, left], lo[:, left], hi[:, left])
            score = torch.where(undecided, effect * lines.intercept[:, left], -1.0)
            state = {name: value[left] for name, value in state.items()}
            # Half precision is enough to start the children from.
            theta = best.theta[:, left].t().to(torch.float16)
            self.open.push({**state, "lower": lower[left], "theta": theta, "unit": score.argmax(0).to(torch.int32)})
        return gain

    def _effects(self, c: Tensor, undecided: Tensor, lo: Tensor, hi: Tensor) -> Tensor:
        """By how much the bound falls with the intercept of each unit's upper line (U, B), to first order.

        Directly, through its coefficient, and through the bounds of the units above it, whose own intercepts
        ``-lo hi / (hi - lo)`` follow; how those bounds depend on intercepts below is taken from the root.
        """
        effect = -c.clamp(max=0)
        width = (hi - lo).clamp_min(1e-12)
        by_lo, by_hi = (hi / width) ** 2 * undecided, (lo / width) ** 2 * undecided
        for k in range(len(self.net.blocks), 1, -1):
            memory = self.memories.get(k)
            if memory is not None:
                span, below = self.net.span(k), self.net.offsets[k - 1]
                effect[:below] += memory.weight[0].t() @ (by_lo[span] * effect[span])
                effect[:below] += memory.weight[1].t() @ (by_hi[span] * effect[span])
        return effect

    def _confirm(self, lo: Tensor, hi: Tensor, sign: Tensor, theta: Tensor, weights: Tensor) -> Tensor:
        """The bounds that these parameters give in float64."""
        lines = Lines.make(lo, hi, sign)
        low, high = limits(lines, sign)
        # A mixture of rows has weights that sum to one in float64 as well.
        weights = weights.t().double()
        functional, constant = self.exact.start(weights / weights.sum(0))
        theta = theta.double().clamp(low, high)
        return self.exact.pull(functional, constant, len(self.exact.blocks) + 1, lines, theta)[0]

    def _decide(self, sign: Tensor, lo: Tensor, weights: Tensor) -> None:
        """Settle a subproblem in which the network is affine by a linear program."""
        self.tally.leaves += 1
        value, x = _affine_minimum(self.exact, sign, lo, None if self.any_row else int(weights.argmax()))
        self._decided = min(self._decided, value)
        if value > self.margin:
            return
        if x is not None:
            self._witness = self.attack(x.unsqueeze(1))
        if self._witness is None:
            self._stuck += 1


class _Open:
    """Open subproblems, one a row, in arrays that grow."""

    def __init__(self) -> None:
        self.count = 0
        self._arrays: State = {}

    @property
    def bytes(self) -> int:
        """Memory of the rows in use."""
        return sum(a[: self.count].numel() * a.element_size() for a in self._arrays.values())

    @property
    def lower(self) -> float:
        """The smallest bound; inf when nothing is open."""
        return float(self._arrays["lower"][: self.count].min()) if self.count else math.inf

    def push(self, rows: State) -> None:
        """Add subproblems."""
        n = len(rows["lower"])
        for name, value in rows.items():
            array = self._arrays.get(name, value[:0])
            if self.count + n > len(array):
                grown = array.new_empty(max(1024, 2 * len(array), self.count + n), *array.shape[1:])
                grown[: self.count] = array[: self.count]
                array = grown
            array[self.count : self.count + n] = value
            self._arrays[name] = array
        self.count += n

    def pop(self, n: int) -> State:
        """Take the n subproblems with the smallest bounds."""
        n = min(n, self.count)
        lower = self._arrays["lower"][: self.count]
        taken = lower.topk(n, largest=False).indices
        out = {name: array[taken] for name, array in self._arrays.items()}
        # Rows of the tail that stay fill the holes.
        hole = torch.zeros(self.count, dtype=torch.bool, device=lower.device)
        hole[taken] = True
        self.count -= n
        fill = (~hole[self.count :]).nonzero().flatten() + self.count
        holes = hole[: self.count].nonzero().flatten()
        for array in self._arrays.values():
            array[holes] = array[fill]
        return out


class _Tables:
    """Bounds (U,) of all units in float64, each shared by the subproblems of a subtree."""

    def __init__(self, lo: Tensor, hi: Tensor) -> None:
        self._count = 1
        self._lo, self._hi = lo.unsqueeze(0).clone(), hi.unsqueeze(0).clone()

    @property
    def bytes(self) -> int:
        """Memory in use."""
        return 2 * self._count * self._lo.shape[1] * self._lo.element_size()

    def add(self, lo: Tensor, hi: Tensor) -> Tensor:
        """Store bounds (n, U); their numbers."""
        end = self._count + len(lo)
        if end > len(self._lo):
            room = self._lo.new_empty(max(64, len(self._lo), len(lo)), lo.shape[1])
            self._lo, self._hi = torch.cat([self._lo, room]), torch.cat([self._hi, room])
        self._lo[self._count : end], self._hi[self._count : end] = lo, hi
        numbers = torch.arange(self._count, end, dtype=torch.int32, device=lo.device)
        self._count = end
        return numbers

    def read(self, number: Tensor, sign: Tensor) -> tuple[Tensor, Tensor]:
        """Bounds (U, B) of subproblems with these tables, cut at 0 where `sign` (B, U) says so."""
        lo, hi = self._lo[number.long()], self._hi[number.long()]
        lo, hi = torch.where(sign > 0, lo.clamp(min=0), lo), torch.where(sign < 0, hi.clamp(max=0), hi)
        return lo.t().contiguous(), hi.t().contiguous()


def _affine_minimum(net: ReluNet, sign: Tensor, lo: Tensor, row: int | None) -> tuple[float, Tensor | None]:
    """The smallest value of a row (of the largest row, for None) where every unit has a known sign.

    Args:
        net: the network in float64.
        sign: (U,) signs of split units, which are constraints; 0 for units that their bounds decide.
        lo: (U,) bounds that decide those.
        row: which row of the network.

    Returns:
        The minimum and where it is; inf and None when no input has these signs; -inf and None when the solver fails.
    """
    from scipy.optimize import linprog

    count = len(net.middle)
    # Column i is the coefficient of input i in every value, the last column the constant.
    unit = torch.eye(count, count + 1, dtype=torch.float64, device=net.middle.device)
    constant = unit.new_zeros(count + 1)
    constant[count] = 1
    values = [unit]
    above, below = [unit[:0]], [unit[:0]]
    for k, block in enumerate(net.blocks, 1):
        z = block.bias.unsqueeze(1) * constant
        for j, link in block.links.items():
            z = z + link.push(values[j])
        n, span = block.undecided, net.span(k)
        on = torch.where(sign[span] == 0, lo[span] >= 0, sign[span] > 0)
        above.append(z[:n][sign[span] > 0])
        below.append(z[:n][sign[span] < 0])
        values.append(torch.cat([z[:n] * on.unsqueeze(1), z[n:]]))
    rows = net.rows.bias.unsqueeze(1) * constant
    for j, link in net.rows.links.items():
        rows = rows + link.push(values[j])
    if row is not None:
        rows = rows[row : row + 1]
    # Variables: the inputs and t, the largest of the rows, which is minimised.
    less = torch.cat([torch.cat(below), -torch.cat(above), rows]).cpu().numpy()
    t = np.concatenate([np.zeros(len(less) - len(rows)), -np.ones(len(rows))])
    ends = torch.stack([net.middle - net.half, net.middle + net.half], 1).cpu().numpy()
    result = linprog(
        np.append(np.zeros(count), 1.0),
        A_ub=np.column_stack([less[:, :count], t]),
        b_ub=-less[:, count],
        bounds=np.vstack([ends, [[-np.inf, np.inf]]]),
        method="highs",
    )
    if result.status == 2:
        return math.inf, None
    if result.status != 0:
        return -math.inf, None
    return float(result.fun), torch.from_numpy(result.x[:count]).to(net.middle)
