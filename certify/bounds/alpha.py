"""alpha-CROWN: CROWN bounds whose free lines are optimised (Xu et al., 2021, "Fast and Complete").

Where an activation has a kink, every line through the kink with a slope between those of its two sides bounds it from
one side: from below for ReLU, leaky ReLU and the lower end of a clamp, from above for the upper end of a clamp. Each
row gets slopes of its own, improved by gradient steps on the bound. Any slopes give a sound bound, so what is returned
is the best bound seen, never looser than the CROWN bound it starts from.

Only the last backward pass is optimised for the rows of a specification; intervals inside the network are fixed
(`alpha_rows`), or were optimised in the same way beforehand, layer by layer, each neuron for itself
(`alpha_intervals`). No tape outlives a step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from certify.bounds.activations import Clamp, LeakyReLU, ReLU
from certify.bounds.crown import Lines, backward, relaxations, undecided
from certify.bounds.graph import Graph
from certify.bounds.op import Activation, Coefficients, Interval, Op, Relaxation
from certify.bounds.pooling import MaxPool2d
from certify.bounds.region import Region


@dataclasses.dataclass(frozen=True)
class Slopes:
    """Slopes of the free lines of one activation node, one set a row.

    Attributes:
        entries: (U,) flat places in the node that are free for some image.
        value: (N, R, U); entries that an image's interval decides are ignored.
    """

    entries: Tensor
    value: Tensor


@dataclasses.dataclass(frozen=True)
class _Kink:
    """Where lines of slope in [least, most] through (at, value) bound a function from one side; `where` (N, *shape)."""

    where: Tensor
    upper: bool
    at: float
    value: float
    least: float
    most: float


def _kinks(op: Op, lo: Tensor, hi: Tensor) -> _Kink | None:
    if isinstance(op, ReLU):
        return _Kink((lo < 0) & (hi > 0), False, 0.0, 0.0, 0.0, 1.0)
    if isinstance(op, LeakyReLU):
        return _Kink((lo < 0) & (hi > 0), False, 0.0, 0.0, op.slope, 1.0)
    if isinstance(op, Clamp):
        below, above = (lo < op.low) & (hi > op.low), (lo < op.high) & (hi > op.high)
        # Over both ends neither side is convex; of the two ends, the one that occurs more often is free.
        if int((below & ~above).sum()) >= int((above & ~below).sum()):
            return _Kink(below & ~above, False, op.low, op.low, 0.0, 1.0)
        return _Kink(above & ~below, True, op.high, op.high, 0.0, 1.0)
    return None


def start(lines: Lines, graph: Graph, found: list[Interval], rows: int) -> dict[int, Slopes]:
    """CROWN's own slopes for `rows` rows, where they are free."""
    slopes = {}
    for index, line in lines.items():
        lo, hi = found[graph.nodes[index].inputs[0]]
        kink = _kinks(graph.operation(index), lo, hi)
        if kink is None or not isinstance(line, Relaxation):
            continue
        entries = kink.where.flatten(1).any(0).nonzero().flatten()
        if len(entries):
            slope = line.slope_hi if kink.upper else line.slope_lo
            value = slope.flatten(1)[:, entries].clamp(kink.least, kink.most)
            slopes[index] = Slopes(entries, value.unsqueeze(1).repeat(1, rows, 1))
    return slopes


def with_slopes(lines: Lines, graph: Graph, found: list[Interval], slopes: dict[int, Slopes]) -> Lines:
    """The lines with these slopes in place of CROWN's, cut to their ranges."""
    changed = dict(lines)
    for index, free in slopes.items():
        line = lines[index]
        lo, hi = found[graph.nodes[index].inputs[0]]
        kink = _kinks(graph.operation(index), lo, hi)
        assert isinstance(line, Relaxation)
        assert kink is not None
        rows = free.value.shape[1]
        full = (len(lo), rows, *lo.shape[1:])
        slope = line.slope_hi if kink.upper else line.slope_lo
        bias = line.bias_hi if kink.upper else line.bias_lo
        where = kink.where.flatten(1)[:, None, free.entries]
        # Cut to the range whatever is passed in; at its ends the gradient still goes through.
        value = free.value + (free.value.clamp(kink.least, kink.most) - free.value).detach()
        old = slope.flatten(1)[:, None, free.entries]
        picked = torch.where(where, value, old)
        entries = free.entries.expand(len(lo), rows, -1)
        wide = slope.flatten(1).unsqueeze(1).expand(-1, rows, -1)
        new_slope = wide.scatter(2, entries, picked).reshape(full)
        new_bias = None if bias is None else bias.unsqueeze(1).expand(full)
        if kink.value or kink.at or bias is not None:
            base = torch.zeros_like(slope) if bias is None else bias
            through = kink.value - kink.at * value
            picked = torch.where(where, through, base.flatten(1)[:, None, free.entries])
            wide = base.flatten(1).unsqueeze(1).expand(-1, rows, -1)
            new_bias = wide.scatter(2, entries, picked).reshape(full)
        other = (line.slope_lo if kink.upper else line.slope_hi).unsqueeze(1)
        if kink.upper:
            changed[index] = Relaxation(other.expand(full), line.bias_lo, new_slope, new_bias)
        else:
            changed[index] = Relaxation(new_slope, new_bias, other.expand(full), line.bias_hi)
    return changed


def rows_with(graph: Graph, region: Region, found: list[Interval], C: Tensor, slopes: dict[int, Slopes]) -> Tensor:
    """Lower bounds (N, R) of ``C y`` with given slopes, differentiable in the network, the intervals and the slopes."""
    lines = with_slopes(relaxations(graph, found, graph.output + 1), graph, found, slopes)
    return backward(graph, region, found, lines, graph.output, Coefficients(C, None, 1))


def alpha_rows(
    graph: Graph,
    region: Region,
    found: list[Interval],
    C: Tensor,
    steps: int = 20,
    rate: float = 0.1,
    memory: int = 1 << 28,
) -> tuple[Tensor, list[dict[int, Slopes]]]:
    """Lower bounds (N, R) of ``C y`` for C (N, R, outputs), slopes optimised, intervals `found` fixed.

    Args:
        graph, region, found: as for `certify.bounds.crown.crown_rows`.
        C: (N, R, outputs).
        steps: gradient steps (Adam, `rate` falling by 2 % a step).
        rate: the first step; slopes lie in [0, 1].
        memory: bytes that working tensors should stay near; images are taken in chunks.

    Returns:
        The bounds, no gradients attached, and for every image its slopes (batch size 1), for `rows_with`.
    """
    widest = sum(torch.Size(n.shape).numel() for n in graph.nodes)
    chunk = max(1, memory // (8 * C.element_size() * widest * C.shape[1]))
    bounds, slopes = [], []
    for at in range(0, len(C), chunk):
        some = torch.arange(at, min(at + chunk, len(C)), device=C.device)
        part = [(lo[some].detach(), hi[some].detach()) for lo, hi in found]
        own = graph.select(some)
        lines = relaxations(own, part, own.output + 1)
        bound, best = _optimise(own, region.select(some), part, lines, own.output, C[some].detach(), steps, rate)
        bounds.append(bound)
        for i in range(len(some)):
            slopes.append({k: Slopes(v.entries, v.value[i : i + 1]) for k, v in best.items()})
    return torch.cat(bounds), slopes


class _Adam:
    """Adam's steps for one tensor (Kingma and Ba, 2015). PyTorch's own takes seconds to import its compiler first."""

    def __init__(self, like: Tensor) -> None:
        self.first, self.second, self.count = torch.zeros_like(like), torch.zeros_like(like), 0

    def move(self, gradient: Tensor, rate: float) -> Tensor:
        """The step up `gradient`."""
        self.count += 1
        self.first.lerp_(gradient, 0.1)
        self.second.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
        root = (self.second / (1 - 0.999**self.count)).sqrt_().add_(1e-8)
        return self.first.div(root).mul_(rate / (1 - 0.9**self.count))


def _optimise(
    graph: Graph, region: Region, found: list[Interval], lines: Lines, node: int, rows: Tensor, steps: int, rate: float
) -> tuple[Tensor, dict[int, Slopes]]:
    """The best bounds (N, R) of functionals `rows` (N, R, *shape of node) that `steps` steps find, and their slopes."""
    c = Coefficients(rows, None, rows.ndim - 2)
    begin = start({k: v for k, v in lines.items() if k <= node}, graph, found, rows.shape[1])

    def bound(slopes: dict[int, Slopes]) -> Tensor:
        return backward(graph, region, found, with_slopes(lines, graph, found, slopes), node, c)

    best = bound({}).detach()
    if not begin or steps < 1:
        return best, begin
    kept = {k: v.value.clone() for k, v in begin.items()}
    value = {k: v.value.clone().requires_grad_() for k, v in begin.items()}
    ascents = {k: _Adam(v) for k, v in value.items()}
    for step in range(steps):
        with torch.enable_grad():
            now = bound({k: Slopes(v.entries, value[k]) for k, v in begin.items()})
            if not now.requires_grad:
                break  # every free line lies below an operation that is bounded by its interval
            gradients = torch.autograd.grad(now.sum(), list(value.values()), allow_unused=True)
        with torch.no_grad():
            better = now > best
            best = torch.where(better, now, best)
            for k, v in value.items():
                kept[k] = torch.where(better.unsqueeze(2), v, kept[k])
            for (k, v), gradient in zip(value.items(), gradients, strict=True):
                if gradient is not None:
                    v.add_(ascents[k].move(gradient, rate * 0.98**step)).clamp_(0, 1)
    with torch.no_grad():
        now = bound({k: Slopes(v.entries, value[k]) for k, v in begin.items()})
        better = now > best
        best = torch.where(better, now, best)
        final = {k: Slopes(v.entries, torch.where(better.unsqueeze(2), value[k], kept[k])) for k, v in begin.items()}
    return best, {k: Slopes(v.entries, v.value.detach()) for k, v in final.items()}


@torch.no_grad()
def alpha_intervals(
    graph: Graph,
    region: Region,
    found: list[Interval],
    steps: int = 10,
    rate: float = 0.1,
    memory: int = 1 << 28,
    progress: Callable[[int], None] | None = None,
) -> list[Interval]:
    """`found` tightened layer by layer: the ends of each undecided neuron's interval with slopes of their own.

    Costs 2 x `steps` backward passes for every undecided neuron; later layers use the intervals of earlier ones.

    Args:
        graph, region, found: as for `alpha_rows`; `found` needs to be sound, no more.
        steps, rate, memory: as for `alpha_rows`.
        progress: called with the index of each node that is done.
    """
    readers = graph.consumers()
    tight: list[Interval] = [found[0]]
    for index in range(1, len(graph.nodes)):
        lo, hi = graph.step(index, tight)
        lo, hi = torch.maximum(lo, found[index][0]), torch.minimum(hi, found[index][1])
        tight.append((torch.minimum(lo, hi), torch.maximum(lo, hi)))
        nonlinear = isinstance(graph.operation(index), (Activation, MaxPool2d))
        if nonlinear or all(graph.nodes[i].op is None for i in graph.nodes[index].inputs):
            continue
        where = undecided(graph, readers, index, tight[index])
        if where is not None:
            for image in range(len(lo)):
                _tighten_image(graph, region, tight, index, where, image, steps, rate, memory)
        if progress is not None:
            progress(index)
    return tight


def _tighten_image(
    graph: Graph, region: Region, tight: list[Interval], index: int, where: Tensor, image: int, steps: int, rate: float,
    memory: int,
) -> None:  # fmt: skip
    """Tighten the marked entries of one node for one image, in place in `tight`."""
    entries = where[image].flatten().nonzero().flatten()
    shape = graph.nodes[index].shape
    widest = sum(torch.Size(n.shape).numel() for n in graph.nodes[: index + 1])
    lo, hi = tight[index]
    lo, hi = lo.flatten(1).clone(), hi.flatten(1).clone()
    some = torch.tensor([image], device=lo.device)
    part = [(a[some], b[some]) for a, b in tight]
    graph = graph.select(some)
    lines = relaxations(graph, part, index)
    chunk = max(1, memory // (16 * lo.element_size() * widest))
    for at in range(0, len(entries), chunk):
        places = entries[at : at + chunk]
        unit = torch.zeros(1, len(places), lo.shape[1], dtype=lo.dtype, device=lo.device)
        unit = unit.scatter(2, places.reshape(1, -1, 1), 1.0).reshape(1, len(places), *shape)
        rows = torch.cat([unit, -unit], 1)
        bound, _ = _optimise(graph, region.select(some), part, lines, index, rows, steps, rate)
        down, up = bound[0].split(len(places))
        lo[image, places] = torch.maximum(lo[image, places], down)
        hi[image, places] = torch.minimum(hi[image, places], -up)
    # Both ends are sound, so crossing ends differ by rounding alone; their order is restored.
    lo, hi = torch.minimum(lo, hi).reshape(-1, *shape), torch.maximum(lo, hi).reshape(-1, *shape)
    tight[index] = (lo, hi)
