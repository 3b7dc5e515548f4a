"""Branch and bound over the sub-intervals of t of all images at once, and the hand-over to exact enumeration."""

from __future__ import annotations

import dataclasses
import math
import time
from typing import Protocol

import torch
from torch import Tensor, nn

from certify import enumeration
from certify.bounds.graph import Graph
from certify.bounds.op import UnsupportedOperation
from certify.line_engine import Engine, Left, Open, Rows
from certify.motion import Motion, Parametric
from certify.precisions import apart
from certify.specs import Spec, margin, select
from certify.verdicts import Budget

# What is kept for rounding, relative to the size of the margins: in float32, and in float64. Bounds in float32 were
# seen to differ from those in float64 by less than 1e-6 of that size. Networks whose outputs themselves differ by more
# get more: these multiples of the difference that the images as they are show.
SCREEN, SCREEN_SEEN = 1e-4, 100.0
MARGIN, MARGIN_SEEN = 1e-9, 1e-6

METHODS = ("auto", "branch", "enumerate")

# In units of one plain forward pass, what a sub-interval costs.
_FORM_COST = 5.0


class Networks(Protocol):
    """A model and its graphs in both precisions."""

    model: nn.Module

    @property
    def given(self) -> Graph:
        """The graph in the images' precision."""
        ...

    @property
    def double(self) -> Graph:
        """The graph in float64."""
        ...


@dataclasses.dataclass(frozen=True)
class Minimum:
    """The smallest margin ``min_t min_rows C y(t) + d`` of every image.

    Attributes:
        lower: (N,) float64, no margin along the path is smaller (up to rounding).
        upper: (N,) float64, the smallest margin that was seen, at
        argmin: (N, K) float64.
        timeout: (N,) bool, the budget ended the search.
        seconds: (N,) float64, wall-clock time, shared out by the work done for each image.
        work: "sub-intervals" and "pieces", (N,) each.
    """

    lower: Tensor
    upper: Tensor
    argmin: Tensor
    timeout: Tensor
    seconds: Tensor
    work: dict[str, Tensor]


def margin_size(reference: Tensor, C: Tensor, d: Tensor) -> Tensor:
    """The size of the numbers that make up the margins, (N,) float64 on the CPU; rounding errors are relative to it."""
    return ((C.abs() @ reference.abs().unsqueeze(2)).squeeze(2) + d.abs()).amax(1).double().cpu()


class Search:
    """Branch and bound over the sub-intervals of all images at once."""

    def __init__(
        self, nets: Networks, x: Tensor, reference: Tensor, spec: Spec, p: Parametric, budget: Budget, method: str,
        seed: int,
    ) -> None:  # fmt: skip
        if method not in METHODS:
            raise ValueError(f"unknown method {method!r}; choose one of {', '.join(METHODS)}")
        self.nets, self.x, self.budget, self.method, self.seed = nets, x, budget, method, seed
        self.reference, self.spec = reference, spec
        self.motion = Motion(p, x)
        rows = spec.rows(reference.double())
        self.rows = Rows(rows.C, torch.as_tensor(rows.d))
        self.size = margin_size(reference.double(), self.rows.C, self.rows.d)
        seen = self._rounding() if x.dtype != torch.float64 else torch.zeros(len(x), dtype=torch.float64)
        self.screen = torch.maximum(SCREEN * self.size, SCREEN_SEEN * seen)
        self.margin = torch.maximum(MARGIN * self.size, MARGIN_SEEN * seen)
        self._engines: dict[bool, Engine] = {}
        n = len(x)
        self.stop_at = torch.full((n,), -math.inf, dtype=torch.float64)  # seeing a margin this small ends the search
        self.prune_at: Tensor | None = None  # sub-intervals above it are done; None: within `tol` of the smallest seen
        self.tol = 0.0
        self.upper = torch.full((n,), math.inf, dtype=torch.float64)
        self.argmin = self.motion.lo.clone()
        self.lower = torch.full((n,), math.inf, dtype=torch.float64)
        self.timeout = torch.zeros(n, dtype=torch.bool)
        self.seconds = torch.zeros(n, dtype=torch.float64)
        self.forms = torch.zeros(n, dtype=torch.int64)
        self.pieces = torch.zeros(n, dtype=torch.int64)
        self.listable = enumeration.listable(nets.given)
        self.density: dict[int, float] = {}  # pieces a unit of t, once known

    def engine(self, double: bool) -> Engine:
        if double not in self._engines:
            dtype = torch.float64 if double else self.x.dtype
            graph = self.nets.double if double else self.nets.given
            self._engines[double] = Engine(graph, self.motion, self.rows.to(dtype), dtype)
        return self._engines[double]

    def _rounding(self) -> Tensor:
        """How far float32 was seen to put the margins off, at the ends and the middle of the path (N,)."""
        every = torch.arange(len(self.x))
        places = [torch.lerp(self.motion.lo, self.motion.hi, share) for share in (0.0, 0.5, 1.0)]
        rough, precise = (
            torch.stack([self.motion.images(every, t, dtype) for t in places])
            for dtype in (self.x.dtype, torch.float64)
        )
        found = apart(self.nets.given, self.nets.double, self.rows.C, rough, precise)
        return found.nan_to_num(nan=math.inf).cpu()

    def threshold(self, image: Tensor) -> Tensor:
        """What a lower bound must exceed for a sub-interval of these images to be done."""
        return (self.upper - self.tol if self.prune_at is None else self.prune_at)[image]

    # -- points ----------------------------------------------------------------------------------------------------

    def look(self, image: Tensor, t: Tensor) -> None:
        """Evaluate the model at parameters t (B, K) and remember the smallest margins."""
        for at in range(0, len(image), 32):
            i, s = image[at : at + 32], t[at : at + 32]
            y = self.nets.model(self.motion.images(i, s, self.x.dtype))
            where = i.to(y.device)
            seen = margin(select(self.spec, self.reference, where), y, self.reference[where])
            self.note(i, s, seen.double().cpu())

    def note(self, image: Tensor, t: Tensor, seen: Tensor) -> None:
        """Remember the margins `seen` (B,) at t (B, K)."""
        for i in image.unique().tolist():
            mine = (image == i).nonzero().squeeze(1)
            best = mine[seen[mine].argmin()]
            if seen[best] < self.upper[i]:
                self.upper[i], self.argmin[i] = seen[best], t[best]

    def grid(self) -> tuple[Tensor, Tensor]:
        """The first points: the ends, the middle and an even grid; for more parameters corners and random points."""
        n, k = self.motion.lo.shape
        if k == 1:
            share = torch.linspace(0, 1, 9, dtype=torch.float64).unsqueeze(1)
        else:
            corners = torch.cartesian_prod(*[torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)] * k)
            draws = torch.rand(8, k, dtype=torch.float64, generator=torch.Generator().manual_seed(self.seed))
            share = torch.cat([corners.reshape(-1, k), draws])
        image = torch.arange(n).repeat_interleave(len(share))
        t = self.motion.lo[image] + share.repeat(n, 1) * (self.motion.hi - self.motion.lo)[image]
        return image, t

    # -- intervals -------------------------------------------------------------------------------------------------

    def start(self) -> Open:
        """The first sub-intervals: between heavy bends, and at least four."""
        parts = []
        for i in range(len(self.x)):
            lo, hi = self.motion.lo[i], self.motion.hi[i]
            if self.motion.parameters == 1:
                cuts = torch.cat([lo, self.motion.knots[i], hi])
                while len(cuts) < 5:
                    cuts = torch.cat([cuts, (cuts[:-1] + cuts[1:]) / 2]).sort().values
                low, high = cuts[:-1].unsqueeze(1), cuts[1:].unsqueeze(1)
            else:
                low, high = lo.unsqueeze(0), hi.unsqueeze(0)
            n = len(low)
            bound = torch.full((n,), -math.inf, dtype=torch.float64)
            parts.append(Open(torch.full((n,), i), low, high, torch.full((n,), self._only_double), bound))
        return Open.join(parts)

    @property
    def _only_double(self) -> bool:
        return self.x.dtype == torch.float64

    def run(self) -> Minimum:
        begin = time.perf_counter()
        image, t = self.grid()
        self.look(image, t)
        self.seconds += (time.perf_counter() - begin) / len(self.x)
        pending = self.start()
        if self.method != "enumerate":
            left = self.step(self.alive(pending), tangent=False)
        for i in range(len(self.x)):
            if self.method == "enumerate":
                self.enumerate(i, self.alive(pending.pick((pending.image == i).nonzero().squeeze(1))))
                continue
            for engine in self._engines.values():
                engine.tangents.clear()
            self.settle(i, left.pick((left.part.image == i).nonzero().squeeze(1)))
        return Minimum(
            torch.minimum(self.lower, self.upper), self.upper, self.argmin, self.timeout, self.seconds,
            {"sub-intervals": self.forms, "pieces": self.pieces},
        )  # fmt: skip

    def alive(self, pending: Open) -> Open:
        """Without the sub-intervals of images that are decided."""
        return pending.pick((self.upper[pending.image] > self.stop_at[pending.image]).nonzero().squeeze(1))

    def settle(self, i: int, left: Left) -> None:
        """Work on one image until it is decided."""
        tangent = False
        affordable = self.engine(self._only_double).tangent_bytes() <= self.budget.memory
        while len(left.part):
            if self.upper[i] <= self.stop_at[i]:
                return
            if self.seconds[i] > self.budget.seconds:
                self.timeout[i] = True
                self._keep(left.part.image, left.part.bound)
                return
            wanted = self.wanted(left)
            if self.method == "auto":
                stay = self.hand_over(i, left, wanted)
                left, wanted = left.pick(stay), wanted[stay]
            # One backward pass for the tangent costs about as much as this many sub-intervals.
            switch = not tangent and float(wanted.sum()) > 24 and affordable
            tangent = tangent or switch
            left = self.step(self.split(left, wanted.clamp(max=2) if switch else wanted), tangent)

    def step(self, pending: Open, tangent: bool) -> Left:
        """Bound all sub-intervals once; what is left over."""
        parts = [Left.none(pending, self.motion.parameters)]
        per = max(1, self.budget.memory // (24 * 8 * self.engine(self._only_double).nodes))
        per = min(per, 256 if self.x.is_cuda else 8)
        for double in (False, True):
            queue = pending.pick((pending.double == double).nonzero().squeeze(1))
            for at in range(0, len(queue), per):
                part = self.alive(queue.pick(torch.arange(at, min(at + per, len(queue)))))
                part = self._in_time(part)
                if not len(part):
                    continue
                begin = time.perf_counter()
                parts.append(self._bound(part, double, tangent))
                share = (time.perf_counter() - begin) / len(part)
                self.seconds.index_add_(0, part.image, torch.full((len(part),), share, dtype=torch.float64))
        return Left.join(parts)

    def _in_time(self, part: Open) -> Open:
        """Without the sub-intervals of images whose time is spent."""
        late = self.seconds[part.image] > self.budget.seconds
        self.timeout[part.image[late]] = True
        self._keep(part.image[late], part.bound[late])
        return part.pick((~late).nonzero().squeeze(1))

    def _bound(self, part: Open, double: bool, tangent: bool) -> Left:
        base, slopes, radius = self.engine(double).lines(part, tangent)
        self.forms.index_add_(0, part.image, torch.ones_like(part.image))
        sway = slopes.abs().sum(0)
        row = (base - sway - radius).argmin(1)
        pick = (torch.arange(len(row), device=row.device), row)
        line = torch.stack([base[pick], sway[pick], radius[pick], *slopes[:, pick[0], row]]).double().cpu()
        slack = (self.margin if double else self.screen)[part.image]
        # A line that overflowed says nothing.
        valid = torch.isfinite(line).all(0)
        line = torch.where(valid, line, 0.0)
        line[2, ~valid] = math.inf
        bound = line[0] - line[1] - line[2] - (0 if double else slack)
        part = dataclasses.replace(part, bound=torch.maximum(bound, part.bound))
        done = part.bound > self.threshold(part.image)
        self._keep(part.image[done], part.bound[done])
        left = Left(part, line[0] - line[1], line[2], line[3:].t(), slack).pick((~done).nonzero().squeeze(1))
        if len(left.part):
            self._peek(left)
        return left

    def _keep(self, image: Tensor, bound: Tensor) -> None:
        self.lower.scatter_reduce_(0, image, bound, "amin")

    def _peek(self, left: Left) -> None:
        """Evaluate the network where the worst line of each image is lowest."""
        part, rows = left.part, []
        for i in part.image.unique().tolist():
            mine = (part.image == i).nonzero().squeeze(1)
            rows.append(mine[left.best[mine].argmin()])
        index = torch.stack(rows)
        middle, half = (part.lo + part.hi)[index] / 2, (part.hi - part.lo)[index] / 2
        self.look(part.image[index], middle - half * left.steps[index].sign())

    def wanted(self, left: Left) -> Tensor:
        """Into how many parts each sub-interval must be cut: the remainder falls with the square of the length."""
        floor = 1e-3 * self.size[left.part.image]
        return torch.sqrt(left.remainder / torch.maximum(0.8 * self._room(left), floor)).clamp(min=2)

    def _room(self, left: Left) -> Tensor:
        """How far the worst centre line stays above the threshold."""
        return left.best - self.threshold(left.part.image) - torch.where(left.part.double, 0.0, left.slack)

    def split(self, left: Left, wanted: Tensor) -> Open:
        """The next sub-intervals. What is within rounding of the threshold goes to float64 as it is."""
        part, room = left.part, self._room(left).abs()
        near = (left.remainder + room < 2 * left.slack) | ((room < left.slack) & (left.remainder < left.slack))
        near |= left.remainder == math.inf  # float32 overflows here
        precise = part.double | near
        count = torch.where(near & ~part.double, 1, wanted.clamp(max=12).ceil()).long()
        scale = torch.maximum(part.hi.abs(), part.lo.abs()).amax(1).clamp(min=1e-12)
        narrow = ((part.hi - part.lo).amax(1) < 1e-11 * scale) & part.double
        if self.prune_at is not None:
            # The rows fail here, although the model was not seen to (rounding, or the chords of a circle).
            narrow |= part.double & (self._room(left) < -1e3 * left.remainder)
        self._keep(part.image[narrow], part.bound[narrow])
        pieces = [part.pick(torch.zeros(0, dtype=torch.int64))]
        for j in (~narrow).nonzero().squeeze(1).tolist():
            axis = int(((part.hi[j] - part.lo[j]) > 0).double().mul(left.steps[j].abs() + 1e-30).argmax())
            n = int(count[j])
            cuts = torch.lerp(part.lo[j, axis], part.hi[j, axis], torch.linspace(0, 1, n + 1, dtype=torch.float64))
            cuts[0], cuts[-1] = part.lo[j, axis], part.hi[j, axis]
            lo, hi = part.lo[j].repeat(n, 1), part.hi[j].repeat(n, 1)
            lo[:, axis], hi[:, axis] = cuts[:-1], cuts[1:]
            pieces.append(Open(part.image[j].repeat(n), lo, hi, precise[j].repeat(n), part.bound[j].repeat(n)))
        return Open.join(pieces)

    # -- pieces ----------------------------------------------------------------------------------------------------

    def hand_over(self, i: int, left: Left, wanted: Tensor) -> Tensor:
        """List the pieces of the sub-intervals where that costs less than cutting on; the indices of the others."""
        everything = torch.arange(len(wanted))
        if not (self.motion.exact and self.listable):
            return everything
        part = left.part
        width = (part.hi - part.lo)[:, 0]
        if i not in self.density:
            if float(wanted.max()) < 64:
                return everything
            first = part.pick(wanted.argmax().reshape(1))
            self.enumerate(i, dataclasses.replace(first, hi=first.lo + (first.hi - first.lo) / 64))
        cheap = self.density.get(i, math.inf) * width + 2 < _FORM_COST * wanted
        for j in cheap.nonzero().squeeze(1).tolist():
            if self.upper[i] <= self.stop_at[i] or self.timeout[i]:
                break
            self.enumerate(i, part.pick(torch.tensor([j])))
        if self.timeout[i]:
            self._keep(part.image, part.bound)
        return (~cheap).nonzero().squeeze(1)

    def enumerate(self, i: int, pending: Open) -> None:
        """Decide sub-intervals of image i by listing their linear pieces."""
        if not self.motion.exact:
            raise UnsupportedOperation(f"{self.motion.p.describe()} is not piecewise linear; use branch and bound")
        if not self.listable:
            raise UnsupportedOperation("the network is not piecewise linear; use branch and bound")
        for j in range(len(pending)):
            lo, hi = float(pending.lo[j, 0]), float(pending.hi[j, 0])
            double = bool(pending.double[j])
            begin = time.perf_counter()
            left = self.budget.seconds - float(self.seconds[i])
            stop = float(self.stop_at[i]) if self.prune_at is not None else -math.inf
            found = self._list(i, lo, hi, double, stop, left)
            slack = 0.0 if double else float(self.screen[i])
            threshold = float(self.threshold(torch.tensor([i])))
            if found.lower - slack <= threshold and not double and not found.timeout:
                self.look(torch.tensor([i]), torch.tensor([[found.argmin]], dtype=torch.float64))
                if self.upper[i] > self.stop_at[i]:
                    found, slack = self._list(i, lo, hi, True, stop, left), 0.0
            self.pieces[i] += found.pieces
            if hi > lo and found.done > lo:
                self.density[i] = found.pieces / (found.done - lo)
            self.look(torch.tensor([i]), torch.tensor([[found.argmin]], dtype=torch.float64))
            self._keep(torch.tensor([i]), torch.tensor([found.lower - slack], dtype=torch.float64))
            self.seconds[i] += time.perf_counter() - begin
            if found.timeout:
                self.timeout[i] = True
                self._keep(pending.image[j:], pending.bound[j:])
                return
            if self.upper[i] <= self.stop_at[i]:
                return

    def _list(self, i: int, lo: float, hi: float, double: bool, stop: float, seconds: float) -> enumeration.Listing:
        engine = self.engine(double or self._only_double)
        rows = engine.rows
        return enumeration.lowest(
            engine.graph, self.motion, i, lo, hi, rows.C[i], rows.d[i], engine.dtype,
            stop=stop, seconds=seconds, memory=self.budget.memory,
        )  # fmt: skip
