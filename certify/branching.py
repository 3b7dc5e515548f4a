"""Branch and bound over the ReLUs of a `ReluNet`: batches of subproblems, bounded by dual ascent, split on one unit.

Best-first on the lower bound. A subproblem is a row of the specification and the signs of the units split so far; its
bound is an alpha,beta-CROWN bound (Wang et al., 2021) improved from its parent's parameters for a few steps. Candidate
units are scored by what their relaxation costs the bound and the best few are tried on both sides (filtered smart
branching, De Palma et al., 2021). Bounds that decide a subproblem are confirmed in float64; subproblems in which every
unit is decided go to a linear program.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable

import torch
from torch import Tensor

from certify.bounds.ascent import Problems, Memories, ascend, limits, tighten
from certify.bounds.relunet import Lines, ReluNet


@dataclasses.dataclass(frozen=True)
class Settings:
    """How the search goes about it; the answer does not depend on these.

    Attributes:
        columns: subproblems bounded at a time.
        steps: steps of dual ascent a subproblem.
        tried: units tried on both sides before a subproblem is split.
    """

    columns: int = 512
    steps: int = 4
    tried: int = 1
    root_steps: int = 20
    refresh_steps: int = 3
    refresh_every: int | None = None
    indirect: bool = True


@dataclasses.dataclass
class Tally:
    """What the search did."""

    domains: int = 0
    depth: int = 0
    leaves: int = 0
    refreshed: int = 0


@dataclasses.dataclass(frozen=True)
class Found:
    """How a search ended: `lower` bounds what is left (inf: all decided), `stuck` subproblems could not be decided."""

    lower: float
    proven: float
    left: int
    stuck: int
    witness: Tensor | None


class _Open:
    """Undecided subproblems, one a row, in arrays that grow."""

    def __init__(self, like: dict[str, Tensor]) -> None:
        self.count = 0
        self.arrays = {name: value[:0].clone() for name, value in like.items()}

    def push(self, rows: dict[str, Tensor]) -> None:
        n = len(rows["lower"])
        for name, value in rows.items():
            array = self.arrays[name]
            if self.count + n > len(array):
                grown = array.new_empty(max(1024, 2 * len(array), self.count + n), *array.shape[1:])
                grown[: self.count] = array[: self.count]
                self.arrays[name] = array = grown
            array[self.count : self.count + n] = value
        self.count += n

    def pop(self, n: int) -> dict[str, Tensor]:
        """Take the n rows with the smallest bounds."""
        n = min(n, self.count)
        lower = self.arrays["lower"][: self.count]
        taken = lower.topk(n, largest=False).indices
        out = {name: array[taken] for name, array in self.arrays.items()}
        # Rows from the tail that stay fill the holes.
        hole = torch.zeros(self.count, dtype=torch.bool, device=lower.device)
        hole[taken] = True
        rest = self.count - n
        fill = (~hole[rest:]).nonzero().flatten() + rest
        holes = hole[:rest].nonzero().flatten()
        for array in self.arrays.values():
            array[holes] = array[fill]
        self.count = rest
        return out

    @property
    def lower(self) -> float:
        return float(self.arrays["lower"][: self.count].min()) if self.count else float("inf")


class _Tables:
    """Bounds (U,) of all units in float64, shared by the subproblems of a subtree."""

    def __init__(self, lo: Tensor, hi: Tensor) -> None:
        self.count = 1
        self._lo, self._hi = lo.unsqueeze(0).clone(), hi.unsqueeze(0).clone()

    def add(self, lo: Tensor, hi: Tensor) -> Tensor:
        """Store bounds (n, U); their numbers."""
        end = self.count + len(lo)
        if end > len(self._lo):
            room = self._lo.new_empty(max(64, len(self._lo), len(lo)), lo.shape[1])
            self._lo, self._hi = torch.cat([self._lo, room]), torch.cat([self._hi, room])
        self._lo[self.count : end], self._hi[self.count : end] = lo, hi
        numbers = torch.arange(self.count, end, dtype=torch.int32, device=lo.device)
        self.count = end
        return numbers

    def read(self, number: Tensor, sign: Tensor) -> tuple[Tensor, Tensor]:
        """Bounds (U, B) of subproblems with these tables, cut at 0 where `sign` (B, U) says so."""
        number = number.long()
        lo, hi = self._lo[number], self._hi[number]
        lo, hi = torch.where(sign > 0, lo.clamp(min=0), lo), torch.where(sign < 0, hi.clamp(max=0), hi)
        return lo.t().contiguous(), hi.t().contiguous()


class Search:
    """The search on one image. `any_row`: a subproblem is decided when any row (or mixture of rows) is positive."""

    def __init__(
        self,
        net: ReluNet,
        exact: ReluNet,
        margin: float,
        any_row: bool,
        settings: Settings,
        leaf: Callable[[Tensor, int | None], tuple[float, Tensor | None]],
        attack: Callable[[Tensor], Tensor | None],
        memories: Memories,
    ) -> None:
        self.net, self.exact, self.margin, self.any_row, self.settings = net, exact, margin, any_row, settings
        self.leaf, self.attack = leaf, attack
        self.memories = memories
        self.tables = _Tables(exact.lo, exact.hi)
        # Tightening all bounds of a subproblem costs as much as bounding this many subproblems; doing it once in a
        # subtree of that size at most doubles the work, and shrinks the subtrees below.
        columns = 2 * sum(b.undecided for b in net.blocks[1:])
        cost = max(2.0, columns * settings.refresh_steps / settings.steps)
        self.refresh_every = settings.refresh_every or max(3, round(math.log2(cost)))
        self.refresh_at_once = max(1, 8192 // max(1, columns))
        self.tally = Tally()
        self.proven = float("inf")
        self.stuck = 0
        self.stuck_lower = float("inf")
        self.witness: Tensor | None = None

    def run(self, deadline: float, memory: int) -> Found:
        """Search until all is decided, a counterexample turns up, the deadline passes or memory runs out."""
        open_ = self._root()
        while open_.count and self.witness is None and time.perf_counter() < deadline:
            row_bytes = sum(a[0].numel() * a.element_size() for a in open_.arrays.values())
            if open_.count * row_bytes > memory:
                break
            self._step(open_)
        lower = min(open_.lower, self.stuck_lower)
        return Found(lower, self.proven, open_.count, self.stuck, self.witness)

    def _root(self) -> _Open:
        net, rows = self.net, len(self.net.rows.bias)
        columns = 1 if self.any_row else rows
        state = {
            "lower": torch.full((columns,), -torch.inf, dtype=net.lo.dtype, device=net.lo.device),
            "sign": torch.zeros(columns, net.units, dtype=torch.int8, device=net.lo.device),
            "theta": ((net.hi > -net.lo) & (net.lo < 0)).to(net.lo.dtype).expand(columns, -1),
            "weights": torch.full((1, rows), 1 / rows, dtype=net.lo.dtype, device=net.lo.device)
            if self.any_row
            else torch.eye(rows, dtype=net.lo.dtype, device=net.lo.device),
            "depth": torch.zeros(columns, dtype=torch.int32, device=net.lo.device),
            "since": torch.zeros(columns, dtype=torch.int32, device=net.lo.device),
            "table": torch.zeros(columns, dtype=torch.int32, device=net.lo.device),
        }
        open_ = _Open(self._store({**state, "unit": torch.zeros(columns, dtype=torch.int32, device=net.lo.device)}))
        self._bound(open_, state, self.settings.root_steps)
        return open_

    @staticmethod
    def _store(state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {**state, "theta": state["theta"].to(torch.float16)}

    def _step(self, open_: _Open) -> None:
        parents = open_.pop(max(1, self.settings.columns // 2))
        parents["theta"] = parents["theta"].to(self.net.lo.dtype)
        unit = parents.pop("unit").long()
        due = (parents["since"] >= self.refresh_every).nonzero().flatten()[: self.refresh_at_once]
        if len(due):
            self._refresh(open_, {name: value[due] for name, value in parents.items()})
            rest = torch.ones(len(unit), dtype=torch.bool, device=unit.device)
            rest[due] = False
            parents, unit = {name: value[rest] for name, value in parents.items()}, unit[rest]
            if not len(unit):
                return
        at = torch.arange(len(unit), device=unit.device)
        parents["theta"][at, unit] = 0
        parents["depth"] = parents["depth"] + 1
        parents["since"] = parents["since"] + 1
        children = {name: torch.cat([value, value]) for name, value in parents.items()}
        children["sign"][at, unit] = 1
        children["sign"][at + len(at), unit] = -1
        self._bound(open_, children, self.settings.steps)

    def _refresh(self, open_: _Open, state: dict[str, Tensor]) -> None:
        """Tighten the bounds of all undecided units of subproblems under their splits, then bound those again."""
        lo, hi = self.tables.read(state["table"], state["sign"])
        sign = state["sign"].t().contiguous()
        for k in range(2, len(self.net.blocks) + 1):
            tighten(self.net, self.exact, k, lo, hi, self.settings.refresh_steps, sign, self.memories)
        self.tally.refreshed += len(state["table"])
        # Bounds that cross by more than rounding can make them show that no input satisfies the splits.
        empty = (lo - hi > 1e-6 * (1 + lo.abs() + hi.abs())).any(0)
        middle = (lo + hi) / 2
        lo, hi = torch.where(lo > hi, middle, lo), torch.where(lo > hi, middle, hi)
        left = (~empty).nonzero().flatten()
        if not len(left):
            return
        state = {name: value[left] for name, value in state.items()}
        state["table"] = self.tables.add(lo[:, left].t(), hi[:, left].t())
        state["since"] = torch.zeros_like(state["since"])
        self._bound(open_, state, self.settings.steps)

    def _bound(self, open_: _Open, state: dict[str, Tensor], steps: int) -> None:
        """Bound subproblems, drop what is decided, and put the rest with their next unit into `open_`."""
        net = self.net
        sign = state["sign"].t()
        exact_lo, exact_hi = self.tables.read(state["table"], state["sign"])
        lines = Lines.make(exact_lo.to(net.lo.dtype), exact_hi.to(net.lo.dtype), sign)
        low, high = limits(lines, sign)
        theta = state["theta"].t().clamp(low, high)
        weights = state["weights"].t()
        functional, constant = net.start(weights)
        problems = Problems(
            len(net.blocks) + 1, functional, constant, lines, theta, low, high, weights if self.any_row else None
        )
        best = ascend(net, problems, steps, self.margin)
        self.tally.domains += len(constant)
        self.tally.depth = max(self.tally.depth, int(state["depth"].max()))
        if best.weights is not None:
            state["weights"] = best.weights.t()
        lower = torch.maximum(best.lower, state["lower"])
        passed = (best.lower > self.margin).nonzero().flatten()
        if len(passed):
            confirmed = self._confirm(
                exact_lo[:, passed], exact_hi[:, passed], sign[:, passed], best.theta[:, passed], state["weights"][passed]
            )
            ok = confirmed > self.margin
            if bool(ok.any()):
                self.proven = min(self.proven, float(confirmed[ok].min()))
            lower[passed] = torch.where(ok, torch.inf, confirmed.to(lower.dtype))
        left = (lower < torch.inf).nonzero().flatten()
        if not len(left):
            return
        worst = left[lower[left].topk(min(16, len(left)), largest=False).indices]
        self.witness = self.attack(best.x[:, worst])
        if self.witness is not None:
            return
        lines = lines.select(left)
        undecided = lines.undecided > 0
        final = ~undecided.any(0)
        for i in left[final].tolist():
            self._decide(state["sign"][i], None if self.any_row else int(state["weights"][i].argmax()))
            if self.witness is not None:
                return
        more = ~final
        left = left[more]
        if not len(left):
            return
        unit = self._choose(
            lines.select(more.nonzero().flatten()), best.theta[:, left], best.kept[:, left], exact_lo[:, left], exact_hi[:, left],
            {j: v[:, left] for j, v in (net.start(state["weights"].t())[0] if self.any_row else functional).items()},
            constant[left] if not self.any_row else net.start(state["weights"].t())[1][left], sign[:, left],
        )  # fmt: skip
        kept = {name: value[left] for name, value in state.items()}
        kept.update(lower=lower[left], theta=best.theta[:, left].t(), unit=unit.to(torch.int32))
        open_.push(self._store(kept))

    def _confirm(self, lo: Tensor, hi: Tensor, sign: Tensor, theta: Tensor, weights: Tensor) -> Tensor:
        exact = self.exact
        lines = Lines.make(lo, hi, sign)
        low, high = limits(lines, sign)
        functional, constant = exact.start(weights.t().double())
        lower, _, _ = exact.pull(functional, constant, len(exact.blocks) + 1, lines, theta.double().clamp(low, high))
        return lower

    def _decide(self, sign: Tensor, row: int | None) -> None:
        self.tally.leaves += 1
        value, x = self.leaf(sign, row)
        if value > self.margin:
            self.proven = min(self.proven, value)
            return
        if x is not None:
            self.witness = self.attack(x.to(self.net.lo.dtype).unsqueeze(1))
        if self.witness is None:
            self.stuck += 1
            self.stuck_lower = min(self.stuck_lower, value)

    def _choose(
        self, lines: Lines, theta: Tensor, c: Tensor, lo: Tensor, hi: Tensor, functional: dict[int, Tensor],
        constant: Tensor, sign: Tensor,
    ) -> Tensor:  # fmt: skip
        """The unit to split in each column."""
        effect = self._effects(lines, c, lo.to(c.dtype), hi.to(c.dtype))
        score = effect * lines.intercept
        score = torch.where(lines.undecided > 0, score + 1e-12, torch.full_like(score, -1.0))
        tried = min(self.settings.tried, len(score))
        top = score.topk(tried, dim=0).indices
        if tried == 1:
            return top[0]
        width = len(constant)
        columns = torch.arange(width, device=c.device)
        bounds = []
        for rank in range(tried):
            unit = top[rank]
            both = []
            for side in (1.0, 0.0):
                slope, intercept, undecided = lines.slope.clone(), lines.intercept.clone(), lines.undecided.clone()
                slope[unit, columns], intercept[unit, columns], undecided[unit, columns] = side, 0.0, 0.0
                at = theta.clone()
                at[unit, columns] = 0.0
                bound, _, _ = self.net.pull(
                    functional, constant, len(self.net.blocks) + 1, Lines(slope, intercept, undecided), at
                )
                both.append(bound)
            bounds.append(torch.minimum(both[0], both[1]))
        better = torch.stack(bounds)
        valid = score.gather(0, top) > 0
        better = torch.where(valid, better, torch.full_like(better, -torch.inf))
        return top.gather(0, better.argmax(0, keepdim=True)).squeeze(0)

    def _effects(self, lines: Lines, c: Tensor, lo: Tensor, hi: Tensor) -> Tensor:
        """By how much the bound falls with the intercept of each unit (U, B), to first order.

        Directly, through its coefficient, and through the bounds of the units above it, whose own intercepts
        ``-lo hi / (hi - lo)`` follow; how those bounds depend on intercepts below is taken from the root.
        """
        effect = -c.clamp(max=0)
        if not self.settings.indirect:
            return effect
        width = (hi - lo).clamp_min(1e-12)
        by_lo, by_hi = (hi / width) ** 2 * lines.undecided, (lo / width) ** 2 * lines.undecided
        for k in range(len(self.net.blocks), 1, -1):
            memory = self.memories.get(k)
            if memory is not None:
                span, below = self.net.span(k), self.net.offsets[k - 1]
                effect[:below] += memory.weight[0].t() @ (by_lo[span] * effect[span])
                effect[:below] += memory.weight[1].t() @ (by_hi[span] * effect[span])
        return effect
