"""Branch and bound over the input box: halve it along the coordinate that matters most, bound the halves with CROWN.

Complete for few free inputs, whatever the activations: bounds get exact as boxes shrink. Sub-boxes are bounded in
batches, all intervals of the network anew for each.
"""

from __future__ import annotations

import dataclasses
import heapq
import itertools
import time
from collections.abc import Callable

import torch
from torch import Tensor

from certify.bounds.crown import crown_intervals, linear_bound, relaxations
from certify.bounds.graph import Graph
from certify.bounds.op import Coefficients
from certify.bounds.region import Region

# Boxes narrower than this fraction of the largest input are points up to rounding.
NARROW = 1e-12


@dataclasses.dataclass(frozen=True)
class Found:
    """How a search ended.

    `lower` bounds the margin from below; `left` boxes are open, `stuck` ones too narrow to split; `witness` is a
    counterexample or None; `domains` boxes were bounded, `depth` is the longest chain of halvings.
    """

    lower: float
    left: int
    stuck: int
    witness: Tensor | None
    domains: int
    depth: int


def search(
    graph: Graph,
    region: Region,
    C: Tensor,
    d: Tensor,
    margin: float,
    any_row: bool,
    replay: Callable[[Tensor], Tensor | None],
    deadline: float,
    memory: int,
    batch: int = 256,
) -> Found:
    """Decide ``C y + d > 0`` over a box, worst sub-box first.

    Args:
        graph, region: the network in float64, and the box of one image.
        C, d: (rows, outputs) and (rows,).
        margin: bounds above it decide a sub-box.
        any_row: a sub-box is decided when any row is positive; else when all are.
        replay: checks inputs (B, *shape) on the model; a counterexample or None.
        deadline: `time.perf_counter` at which to stop.
        memory: bytes that open boxes and working tensors should stay near.
        batch: sub-boxes bounded together.
    """
    widest = max(torch.Size(node.shape).numel() for node in graph.nodes)
    batch = max(1, min(batch, memory // (64 * widest * len(C))))
    room = max(batch, memory // (4 * region.lo.element_size() * region.lo.numel()))
    tie = itertools.count()
    heap = [(-float("inf"), next(tie), 0, region.lo[0], region.hi[0], 0)]
    decided, domains, deepest, stuck = float("inf"), 0, 0, 0
    first = True
    while heap and time.perf_counter() < deadline and len(heap) < room:
        taken = [heapq.heappop(heap) for _ in range(min(len(heap), max(1, batch // 2)))]
        lo, hi = torch.stack([t[3] for t in taken]), torch.stack([t[4] for t in taken])
        depth = [t[2] for t in taken]
        if not first:
            lo, hi = _halve(lo, hi, torch.tensor([t[5] for t in taken], device=lo.device))
            depth = [t + 1 for t in depth] * 2
        first = False
        lower, axis = _bound(graph, Region(lo, hi), C, d, any_row)
        domains, deepest = domains + len(lower), max(deepest, *depth)
        done = lower > margin
        if bool(done.any()):
            decided = min(decided, float(lower[done].min()))
        left = (~done).nonzero().flatten()
        if not len(left):
            continue
        witness = replay(((lo + hi) / 2)[left])
        if witness is not None:
            lowest = min(decided, float(lower.min()), heap[0][0] if heap else float("inf"))
            return Found(lowest, len(heap), stuck, witness, domains, deepest)
        width = (hi - lo).flatten(1).amax(1)
        size = torch.maximum(lo.abs(), hi.abs()).flatten(1).amax(1).clamp_min(1e-300)
        for i in left.tolist():
            if float(width[i]) <= NARROW * float(size[i]):
                stuck += 1
                decided = min(decided, float(lower[i]))
            else:
                heapq.heappush(heap, (float(lower[i]), next(tie), depth[i], lo[i], hi[i], int(axis[i])))
    lowest = min(decided, heap[0][0] if heap else float("inf"))
    return Found(lowest, len(heap), stuck, None, domains, deepest)


def _halve(lo: Tensor, hi: Tensor, axis: Tensor) -> tuple[Tensor, Tensor]:
    """Both halves of every box along its axis (a flat index)."""
    middle = ((lo + hi) / 2).flatten(1).gather(1, axis.unsqueeze(1))
    below = hi.flatten(1).scatter(1, axis.unsqueeze(1), middle).reshape(hi.shape)
    above = lo.flatten(1).scatter(1, axis.unsqueeze(1), middle).reshape(lo.shape)
    return torch.cat([lo, above]), torch.cat([below, hi])


def _bound(graph: Graph, region: Region, C: Tensor, d: Tensor, any_row: bool) -> tuple[Tensor, Tensor]:
    """The bound of each box (B,), and the coordinate whose halving promises most."""
    found = crown_intervals(graph, region)
    lines = relaxations(graph, found, graph.output + 1)
    start = Coefficients(C.expand(len(region.lo), -1, -1), None, 1)
    constant, at_input = linear_bound(graph, found, lines, graph.output, start)
    width = (region.hi - region.lo).flatten(1)
    if at_input is None:
        rows, effect = constant + d, width
    else:
        at_input = at_input.dense()
        rows = constant + region.lower(at_input) + d
        row = rows.argmax(1) if any_row else rows.argmin(1)
        effect = at_input.data.flatten(2)[torch.arange(len(row), device=row.device), row].abs() * width
        # A coordinate without a slope still matters through the relaxations.
        effect = effect + 0.1 * width * effect.sum(1, keepdim=True) / width.sum(1, keepdim=True).clamp_min(1e-300)
        effect = torch.where(effect.sum(1, keepdim=True) > 0, effect, width)
    lower = rows.amax(1) if any_row else rows.amin(1)
    return lower.nan_to_num(nan=-torch.inf, posinf=-torch.inf), effect.argmax(1)
