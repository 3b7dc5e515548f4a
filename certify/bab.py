"""Complete verification on one image: attack, bound, then branch and bound until the answer is known.

`verify` decides whether linear conditions on the outputs hold for every perturbed version of an image. Networks of
ReLUs, leaky ReLUs, clamps and max-pools are decided by splitting ReLUs (`certify.branching`); inputs with few free
dimensions, and other activations, by splitting the input (`certify.splitting`). All verdicts rest on bounds computed in
float64; float32 only steers the search.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from certify import branching, splitting
from certify.arithmetic import full_float32
from certify.bounds import Graph, Region, attach, trace
from certify.bounds.ascent import Memories, tighten
from certify.bounds.crown import crown_intervals, crown_rows
from certify.bounds.interval import intervals
from certify.bounds.op import Interval, UnsupportedOperation
from certify.bounds.relunet import ReluNet, build
from certify.bounds.rewrite import relu_form
from certify.curves import Path
from certify.perturbations import L2, AffineFamily, Perturbation
from certify.specs import Linear
from certify.verdicts import Budget, Status

# What is kept for rounding in float64, relative to the size of the outputs and of `d`.
MARGIN = 1e-9
# How many batches of subproblems pass between two descents from their minimisers.
DESCEND_EVERY = 4


@dataclasses.dataclass(frozen=True)
class Settings:
    """How the verifier goes about it; no setting changes a verdict, only the time it takes.

    Attributes:
        root_steps: steps of dual ascent on every undecided unit's bounds before the first split.
        input_dimensions: inputs with at most this many free entries are split themselves.
        search: see `certify.branching.Settings`.
    """

    root_steps: int = 15
    input_dimensions: int = 8
    search: branching.Settings = dataclasses.field(default_factory=branching.Settings)


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The answer for one image.

    Attributes:
        status: a `certify.Status`.
        lower: certified lower bound on the smallest margin (for `any_row`, on the largest row's smallest value);
            whatever the status, no perturbed image has a margin below it. A proof stops as soon as every part is
            positive, so for HOLDS this is usually not tight.
        counterexample: (1, *input) in the model's dtype, None unless VIOLATED.
        work: "domains", "depth", "refreshed", "leaves" (ReLU splitting) or "domains", "depth" (input splitting).
        seconds: wall-clock seconds.
        margin: HOLDS means lower > margin.
    """

    status: Status
    lower: float
    counterexample: Tensor | None
    work: dict[str, int]
    seconds: float
    margin: float


@full_float32()
def verify(
    model: nn.Module,
    x: Tensor,
    p: Perturbation,
    C: Tensor,
    d: Tensor,
    budget: Budget | None = None,
    *,
    any_row: bool = False,
    attack: bool = True,
    seed: int = 0,
    settings: Settings | None = None,
) -> Verdict:
    """Decide whether ``C y + d > 0`` for the outputs y at every image in `p` around one image.

    Args:
        model: a module in evaluation mode.
        x: the image (1, ...), in the dtype the model computes in.
        p: what may change.
        C, d: (rows, outputs) and (rows,).
        budget: seconds and bytes of working memory.
        any_row: every image needs one positive row (the negation of a conjunction of unsafe conditions); else all rows
            must be positive.
        attack: look for counterexamples by gradient attacks before the search; the search looks on its own as well.
        seed: for the attack's random restarts.
        settings: how to search.

    Returns:
        HOLDS: proven. VIOLATED: `counterexample` is in the perturbation set and the model fails on it in a plain
        forward pass. TIMEOUT: the budget (seconds or memory) ran out. UNKNOWN: parts of the input whose smallest margin
        is 0 up to rounding, or a network that no splitting here applies to.

    Raises:
        ValueError: for a batch, bad images or shapes, or a model in training mode.
        UnsupportedOperation: for an operation without a sound bound.
    """
    budget, settings = budget or Budget(), settings or Settings()
    if len(x) != 1:
        raise ValueError(f"branch and bound takes one image at a time, got a batch of {len(x)}")
    if model.training:
        raise ValueError(
            "the model is in training mode, where its answer depends on the batch; call model.eval() first"
        )
    p.check(x)
    if isinstance(p, Path):
        raise ValueError(
            f"branch and bound searches boxes, balls and straight lines, not {p.describe()}; see certify.line"
        )
    with torch.no_grad():
        outputs = model(x)
        if C.ndim != 2 or C.shape[1] != outputs.shape[1] or d.shape != C.shape[:1] or not len(C):
            raise ValueError(
                f"C must be (rows, {outputs.shape[1]}) and d (rows,), at least one row; "
                f"got {tuple(C.shape)} and {tuple(d.shape)}"
            )
        with _one_thread(x):
            return _Run(model, x, p, C.double(), d.double(), budget, any_row, settings, outputs).decide(attack, seed)


@contextlib.contextmanager
def _one_thread(x: Tensor) -> Iterator[None]:
    """One thread inside operations on the CPU.

    They are so short that waiting for a second one costs more than it brings, many times more where its core is busy.
    """
    threads = torch.get_num_threads()
    if x.device.type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class _Run:
    """One call of `verify`."""

    def __init__(
        self, model: nn.Module, x: Tensor, p: Perturbation, C: Tensor, d: Tensor, budget: Budget, any_row: bool,
        settings: Settings, outputs: Tensor,
    ) -> None:  # fmt: skip
        self.began = time.perf_counter()
        self.deadline = self.began + budget.seconds
        self.model, self.x, self.p, self.C, self.d = model, x, p, C, d
        self.budget, self.any_row, self.settings = budget, any_row, settings
        self.lo, self.hi = _inward(*p.hull(x.double()), x.dtype)
        size = (C.abs() @ outputs[0].double().abs() + d.abs()).max()
        self.margin = MARGIN * max(1e-3, float(size))
        self.work: dict[str, int] = {}

    def answer(self, status: Status, lower: float, counterexample: Tensor | None = None) -> Verdict:
        return Verdict(status, lower, counterexample, self.work, time.perf_counter() - self.began, self.margin)

    def decide(self, attack: bool, seed: int) -> Verdict:
        found = self._attack(seed, "quick") if attack else self.replay(self.x)
        if found is not None:
            return self.answer(Status.VIOLATED, -math.inf, found)
        model = self.model if self.x.dtype == torch.float64 else copy.deepcopy(self.model).double()
        graph, region = attach(trace(model, self.x.double())[0].folded(), self.x.double(), self.p)
        free = int((region.lo < region.hi).sum())
        if not free:
            return self._point(graph, region)
        found_intervals = crown_intervals(graph, region, self.budget.memory // 4)
        rows = crown_rows(graph, region, found_intervals, self.C.unsqueeze(0))[0] + self.d
        lower = float(rows.max() if self.any_row else rows.min())
        if lower > self.margin:
            return self.answer(Status.HOLDS, lower)
        found = self._attack(seed + 1, "strong") if attack else None
        if found is not None:
            return self.answer(Status.VIOLATED, lower, found)
        if free <= self.settings.input_dimensions and not isinstance(self.p, (AffineFamily, L2)):
            return self._split_inputs(graph, region, lower)
        try:
            return self._split_relus(graph, region, found_intervals, rows, lower)
        except UnsupportedOperation:
            if isinstance(self.p, (AffineFamily, L2)):
                return self.answer(Status.UNKNOWN, lower)
            return self._split_inputs(graph, region, lower)

    def _point(self, graph: Graph, region: Region) -> Verdict:
        """Nothing may change: the network's value, in float64, is the answer."""
        rows = self.C @ graph.forward(region.lo)[0] + self.d
        lower = float(rows.max() if self.any_row else rows.min())
        return self.answer(Status.HOLDS if lower > self.margin else Status.UNKNOWN, lower)

    def _attack(self, seed: int, strength: str) -> Tensor | None:
        from certify.attack import attack, pgd

        model, C, d = self.model, self.C.to(self.x), self.d.to(self.x)
        if self.any_row:
            # An image fails where the largest row is not positive: one output, one row.
            model, C, d = _LargestRow(self.model, C, d), C.new_ones(1, 1), d.new_zeros(1)
        spec = Linear(C, d)
        found = attack(model, self.x, spec, self.p, seed=seed, strength=strength)
        if strength == "strong" and not bool(found.success.any()) and not isinstance(self.p, AffineFamily):
            # Leaps from corner to corner of a box reach basins that small steps do not.
            restarts = 1 + 8 * len(C)
            found = pgd(model, self.x, spec, self.p, steps=20, restarts=restarts, step_size=2.0, seed=seed)
        return self.replay(found.inputs) if bool(found.success.any()) else None

    def replay(self, images: Tensor) -> Tensor | None:
        """The first of these perturbed images (B, *input) on which the model itself fails, as (1, *input)."""
        images = images.to(self.x.dtype)
        if not isinstance(self.p, AffineFamily):
            images = torch.maximum(torch.minimum(images, self.hi), self.lo)
        if isinstance(self.p, L2):
            images = self.p.apply(self.x, images - self.x)
        rows = self.model(images).double() @ self.C.t() + self.d
        worst = rows.amax(1) if self.any_row else rows.amin(1)
        at = int(worst.argmin())
        return images[at : at + 1] if float(worst[at]) <= 0 else None

    def _candidates(self, inputs: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor | None]:
        """What replays candidate inputs of the graph: images, or the parameters of an affine family.

        Every few calls the images are also starts of a descent: where bounds are lowest, other basins are than those
        that random starts fall into.
        """
        calls = itertools.count()

        def check(columns: Tensor) -> Tensor | None:
            points = inputs(columns)
            if isinstance(self.p, AffineFamily):
                return self.replay(torch.cat([self.p.apply(self.x, t.unsqueeze(0).to(self.x)) for t in points]))
            found = self.replay(points)
            if found is None and next(calls) % DESCEND_EVERY == 0:
                found = self.replay(self._descend(points.to(self.x.dtype)))
            return found

        return check

    def _descend(self, x: Tensor, steps: int = 20) -> Tensor:
        """Signed-gradient descent on the worst row (largest, for `any_row`) inside the box, in falling steps."""
        C, d = self.C.to(x), self.d.to(x)
        for step in range(steps):
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                rows = self.model(x) @ C.t() + d
                (gradient,) = torch.autograd.grad((rows.amax(1) if self.any_row else rows.amin(1)).sum(), x)
            length = (self.hi - self.lo) * (1 - step / steps)
            x = torch.maximum(torch.minimum(x.detach() - length * gradient.sign(), self.hi), self.lo)
        return x

    def _split_inputs(self, graph: Graph, region: Region, lower: float) -> Verdict:
        found = splitting.search(
            graph, region, self.C, self.d, self.margin, self.any_row, self.replay, self.deadline, self.budget.memory
        )
        self.work = {"domains": found.domains, "depth": found.depth}
        return self._conclude(lower, found.lower, found.left, found.stuck, found.witness)

    def _split_relus(self, graph: Graph, region: Region, found: list[Interval], rows: Tensor, lower: float) -> Verdict:
        relus = relu_form(graph, intervals(graph, region))
        if len(relus.nodes) != len(graph.nodes):
            found = crown_intervals(relus, region, self.budget.memory // 4)
        left = torch.ones_like(rows, dtype=torch.bool) if self.any_row else rows <= self.margin
        proven = math.inf if bool(left.all()) else float(rows[~left].min())
        C, d = self.C[left], self.d[left]
        net, _ = self._tightened(build(relus, region, found, C, d))
        # Units that are decided now leave the network.
        net, memories = self._tightened(build(relus, region, _with_bounds(relus, found, net), C, d))
        search = branching.Search(
            net.cast(torch.float32) if self.x.dtype != torch.float64 else net,
            net,
            self.margin,
            self.any_row,
            self.settings.search,
            self._candidates(net.inputs),
            memories,
        )
        result = search.run(self.deadline, self.budget.memory // 2)
        self.work = dataclasses.asdict(search.tally)
        return self._conclude(lower, min(result.lower, proven), result.left, result.stuck, result.witness)

    def _tightened(self, net: ReluNet) -> tuple[ReluNet, Memories]:
        """The network with the bounds of its undecided units improved at the root, and how."""
        memories: Memories = {}
        lo, hi = net.lo.clone().unsqueeze(1), net.hi.clone().unsqueeze(1)
        rough = net if self.x.dtype == torch.float64 else net.cast(torch.float32)  # what the search runs in
        for k in range(2, len(net.blocks) + 1):
            tighten(rough, net, k, lo, hi, self.settings.root_steps, memories=memories, deadline=self.deadline)
        # Both ends are sound and the region is not empty, so crossing ends differ by rounding alone.
        lo, hi = torch.minimum(lo, hi)[:, 0], torch.maximum(lo, hi)[:, 0]
        return dataclasses.replace(net, lo=lo, hi=hi), memories

    def _conclude(self, root: float, reached: float, left: int, stuck: int, witness: Tensor | None) -> Verdict:
        if witness is not None:
            return self.answer(Status.VIOLATED, root, witness)
        lower = max(root, reached)
        if left:
            return self.answer(Status.TIMEOUT, lower)
        return self.answer(Status.UNKNOWN if stuck else Status.HOLDS, lower)


class _LargestRow(nn.Module):
    """The largest entry of ``C y + d`` as the only output."""

    def __init__(self, model: nn.Module, C: Tensor, d: Tensor) -> None:
        super().__init__()
        self.model, self.C, self.d = model, C, d
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return (self.model(x) @ self.C.t() + self.d).amax(1, keepdim=True)


def _inward(lo: Tensor, hi: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The ends of a float64 box in `dtype`, moved inside the box where rounding left it and room allows."""
    low, high = lo.to(dtype), hi.to(dtype)
    low = torch.where(low.double() < lo, torch.nextafter(low, torch.full_like(low, math.inf)), low)
    high = torch.where(high.double() > hi, torch.nextafter(high, torch.full_like(high, -math.inf)), high)
    crossed = low > high
    return torch.where(crossed, lo.to(dtype), low), torch.where(crossed, lo.to(dtype), high)


def _with_bounds(graph: Graph, found: list[Interval], net: ReluNet) -> list[Interval]:
    """`found` with the bounds of the network's units put in."""
    found = list(found)
    for k, block in enumerate(net.blocks, 1):
        node = graph.nodes[block.node].inputs[0]
        ends = []
        for end, new in zip(found[node], (net.lo, net.hi), strict=True):
            flat = end.flatten().index_copy(0, block.index[: block.undecided], new[net.span(k)])
            ends.append(flat.reshape(end.shape))
        found[node] = (ends[0], ends[1])
    return found
