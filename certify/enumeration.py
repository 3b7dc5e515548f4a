"""Every linear piece of a network along a path of images: exact minima, no relaxation.

A piecewise linear network along a piecewise linear path is a piecewise linear function of t ("Computing Linear
Restrictions of Neural Networks", Sotoudeh and Thakur, 2019). Values are kept at breakpoints only: affine layers act on
them, a kinked activation inserts the places where its input meets a kink, a max-pool those where its largest input
changes. The path is walked in chunks short enough for the memory, depth first, so a violation ends the walk.

Weighted means over a softmax (DSNT heads) are smooth on a piece; there the minimum lies within a second-order remainder
of the ends, and pieces are halved until that is negligible.
"""

from __future__ import annotations

import dataclasses
import math
import time

import torch
from torch import Tensor

from certify.bounds.activations import Clamp, LeakyReLU, ReLU
from certify.bounds.expectation import Expectation
from certify.bounds.forward import bend
from certify.bounds.graph import Graph
from certify.bounds.op import Affine
from certify.bounds.pooling import MaxPool2d
from certify.motion import Motion


@dataclasses.dataclass(frozen=True)
class Listing:
    """What a walk along t found.

    Attributes:
        lower: no margin on the walked part is smaller (up to rounding).
        argmin: the breakpoint with the smallest margin.
        pieces: linear pieces walked.
        done: where the walk ended; the end of the interval unless it was stopped or ran out of time.
        timeout: whether it ran out of time.
    """

    lower: float
    argmin: float
    pieces: int
    done: float
    timeout: bool


def listable(graph: Graph) -> bool:
    """Whether the network is piecewise linear, up to weighted means over a softmax with affine layers behind them."""
    smooth = _smooth(graph)
    for index in range(1, len(graph.nodes)):
        op = graph.operation(index)
        if isinstance(op, Expectation):
            if graph.nodes[index].inputs[0] in smooth:
                return False
        elif index in smooth:
            if not isinstance(op, Affine):
                return False
        elif not isinstance(op, Affine | ReLU | LeakyReLU | Clamp | MaxPool2d):
            return False
    return True


def _smooth(graph: Graph) -> set[int]:
    """The weighted means and what depends on them."""
    found: set[int] = set()
    for index in range(1, len(graph.nodes)):
        if isinstance(graph.operation(index), Expectation) or found & set(graph.nodes[index].inputs):
            found.add(index)
    return found


@torch.no_grad()
def lowest(
    graph: Graph,
    motion: Motion,
    image: int,
    lo: float,
    hi: float,
    C: Tensor,
    d: Tensor,
    dtype: torch.dtype,
    *,
    stop: float = -math.inf,
    seconds: float = math.inf,
    memory: int = 1 << 30,
) -> Listing:
    """The smallest margin ``min_rows C y + d`` for t in [lo, hi].

    Args:
        graph: a network for which `listable` is true, behind the clipping of the perturbation (`Motion.network`).
        motion: how images move; piecewise linear in t.
        image: which image of the batch.
        lo: first parameter.
        hi: last parameter.
        C: rows (R, outputs).
        d: (R,).
        dtype: of the values; breakpoints in t are always float64.
        stop: a margin this small ends the walk.
        seconds: so does this time.
        memory: bytes for working tensors.
    """
    begin = time.perf_counter()
    walker = _Walker(graph, motion, image, C, d, dtype)
    widest = max(math.prod(n.shape) for n in graph.nodes)
    target = int(min(max(min(memory // 8, 1 << 26) // (2 * widest * torch.finfo(dtype).bits // 8), 8), 512))
    lower, argmin, pieces, at = math.inf, lo, 0, lo
    width = (hi - lo) / 16
    while True:
        end = hi if at + 1.001 * width >= hi else at + width
        found = walker.chunk(at, end, 4 * target)
        if found is None and end - at > 1e-12 * max(abs(lo), abs(hi)):
            width = (end - at) / 4
            continue
        if found is None:
            found = walker.chunk(at, end, 1 << 62)
            assert found is not None
        low, place, count = found
        pieces += count
        if low < lower:
            lower, argmin = low, place
        at = end
        if at >= hi or lower <= stop:
            return Listing(lower, argmin, pieces, at, False)
        if time.perf_counter() - begin > seconds:
            return Listing(lower, argmin, pieces, at, True)
        width *= min(max(target / (count + 1), 0.25), 4.0)


class _TooMany(Exception):
    """More breakpoints than the memory allows."""


class _Walker:
    def __init__(self, graph: Graph, motion: Motion, image: int, C: Tensor, d: Tensor, dtype: torch.dtype) -> None:
        self.graph, self.motion, self.image, self.C, self.d, self.dtype = graph, motion, image, C, d, dtype
        self.smooth = _smooth(graph)
        self.bends = motion.bends(image) if motion.bent else torch.zeros(0, dtype=torch.float64)
        self.readers = graph.consumers()
        # The values that the smooth part starts from: kept to the end.
        self.border = {i for s in self.smooth for i in graph.nodes[s].inputs if i not in self.smooth} or {graph.output}

    def chunk(self, lo: float, hi: float, most: int) -> tuple[float, float, int] | None:
        """Smallest margin, where, and the number of pieces on [lo, hi]; None for more than `most` breakpoints."""
        inner = self.bends[(self.bends > lo) & (self.bends < hi)]
        t = torch.cat([inner.new_tensor([lo]), inner, inner.new_tensor([hi])]).to(self.C.device)
        which = torch.full((len(t),), self.image)
        if len(t) > most:
            return None
        start = self.motion.raw(which, t.cpu().unsqueeze(1), self.dtype)
        values = _Values(t, {0: start}, most, self._grain(start, hi - lo))
        left = [len(r) for r in self.readers]
        try:
            for index in range(1, len(self.graph.nodes)):
                if index in self.smooth:
                    continue
                node = self.graph.nodes[index]
                values.at[index] = self._node(index, values)
                for i in node.inputs:
                    left[i] -= 1
                    if not left[i] and i not in self.border:
                        values.at.pop(i, None)
            return self._lowest(values)
        except _TooMany:
            return None

    def _grain(self, start: Tensor, width: float) -> float:
        """Breakpoints closer than this differ by rounding alone: a few units in the last place of the image.

        What counts is how far pixels travel, not where they end: a closed path ends where it starts.
        """
        travelled = float(start.double().diff(dim=0).abs().sum(0).max())
        return 4 * torch.finfo(self.dtype).eps * width / travelled if width > 0 and travelled > 0 else 0.0

    def _node(self, index: int, values: _Values) -> Tensor:
        op = self.graph.operation(index)
        inputs = self.graph.nodes[index].inputs
        if isinstance(op, Affine):
            return op.forward(*(values.at[i] for i in inputs))
        if isinstance(op, MaxPool2d):
            return self._max_pool(op, inputs[0], values)
        kinks = [op.low, op.high] if isinstance(op, Clamp) else [0.0]
        for kink in kinks:
            if math.isfinite(kink):
                v = values.at[inputs[0]]
                values.insert(v if kink == 0 else v - kink)
        return op.forward(values.at[inputs[0]])

    def _max_pool(self, op: MaxPool2d, source: int, values: _Values) -> Tensor:
        def entries() -> list[Tensor]:
            v = values.at[source]
            padded, cuts, _ = op._slices(v, shape)
            return [padded[:, :, a, b] for a, b in cuts]

        shape = op.forward(values.at[source][:1])
        found = entries()
        best = found[0]
        for j in range(1, len(found)):
            if values.insert(found[j] - best):
                found = entries()
                best = torch.stack(found[:j]).amax(0)
            best = torch.maximum(best, found[j])
        return best

    def _tail(self, values: _Values) -> tuple[Tensor, Tensor | None]:
        """Margins at the breakpoints (P, R), and how far below its ends a piece can dip (P - 1, R)."""
        at = dict(values.at)
        slack: dict[int, Tensor] = {}
        for index in sorted(self.smooth):
            op, inputs = self.graph.operation(index), self.graph.nodes[index].inputs
            at[index] = op.forward(*(at[i] for i in inputs))
            if isinstance(op, Expectation):
                step = at[inputs[0]].diff(dim=0)
                swing = step.amax(-1, keepdim=True) - step.amin(-1, keepdim=True)
                p = torch.softmax(at[inputs[0]][1:], -1)
                variance = (p * (step - (p * step).sum(-1, keepdim=True)) ** 2).sum(-1, keepdim=True)
                # A chord over length 1 is off by at most |y''| / 8, and |y''| <= range(g) Var_p(dz).
                slack[index] = op.span() * bend(swing, variance) / 8
            else:
                assert isinstance(op, Affine)
                parts = [slack[i] if i in slack else torch.zeros_like(at[i][1:]) for i in inputs]
                slack[index] = op.magnitude(*parts)
        margins = at[self.graph.output] @ self.C.t() + self.d
        dip = slack[self.graph.output] @ self.C.abs().t() if self.graph.output in slack else None
        return margins, dip

    def _lowest(self, values: _Values) -> tuple[float, float, int]:
        pieces = len(values.t) - 1
        for _ in range(40):
            margins, dip = self._tail(values)
            points = margins.amin(1).nan_to_num(nan=-math.inf, posinf=-math.inf)  # what overflowed proves nothing
            best = points.argmin()
            if dip is None or not len(dip):
                break
            floor = (torch.minimum(margins[1:], margins[:-1]) - dip).amin(1).nan_to_num(nan=-math.inf)
            size = float(points.abs().max()) + 1
            rough = (floor < points[best] - 1e-7 * size).nonzero().squeeze(1)
            if not len(rough):
                return min(float(points[best]), float(floor.min())), float(values.t[best]), pieces
            values.halve(rough)
        low = float(points[best]) if dip is None or not len(dip) else float(floor.min())
        return low, float(values.t[best]), pieces


class _Values:
    """Values of several nodes at increasing breakpoints t (P,), linear in between; `at[i]` is (P, *shape)."""

    def __init__(self, t: Tensor, at: dict[int, Tensor], most: int, grain: float) -> None:
        self.t, self.at, self.most, self.grain = t, at, most, grain

    def insert(self, v: Tensor) -> bool:
        """Make breakpoints of all places where an entry of v (P, ...), linear between breakpoints, passes 0."""
        v = v.flatten(1)
        below, above = v < 0, v > 0
        piece, entry = ((below[:-1] & above[1:]) | (above[:-1] & below[1:])).nonzero(as_tuple=True)
        if not len(piece):
            return False
        first, last = v[piece, entry].double(), v[piece + 1, entry].double()
        share = first / (first - last)
        place = self.t[piece] + share * (self.t[piece + 1] - self.t[piece])
        order = place.argsort()
        place, piece = place[order], piece[order]
        # One of each group of places that rounding alone tells apart, and none beside a breakpoint.
        group = torch.round(place / self.grain) if self.grain > 0 else place
        fresh = torch.ones_like(place, dtype=torch.bool)
        fresh[1:] = (group[1:] != group[:-1]) | (piece[1:] != piece[:-1])
        fresh &= (place > self.t[piece]) & (place < self.t[piece + 1])
        self._add(piece[fresh], place[fresh])
        return bool(fresh.any())

    def halve(self, piece: Tensor) -> None:
        """A breakpoint in the middle of each of these pieces."""
        self._add(piece, (self.t[piece] + self.t[piece + 1]) / 2)

    def _add(self, piece: Tensor, place: Tensor) -> None:
        if len(self.t) + len(piece) > self.most:
            raise _TooMany
        if not len(piece):
            return
        share = (place - self.t[piece]) / (self.t[piece + 1] - self.t[piece])
        old = torch.arange(len(self.t), device=self.t.device)
        old = old + torch.searchsorted(piece.contiguous(), old, right=False)
        new = piece + 1 + torch.arange(len(piece), device=piece.device)
        for i, v in self.at.items():
            full = torch.empty(len(self.t) + len(piece), *v.shape[1:], dtype=v.dtype, device=v.device)
            full[old] = v
            weight = share.to(v.dtype).reshape(-1, *[1] * (v.ndim - 1))
            full[new] = torch.lerp(v[piece], v[piece + 1], weight)
            self.at[i] = full
        t = torch.empty(len(self.t) + len(piece), dtype=self.t.dtype, device=self.t.device)
        t[old], t[new] = self.t, place
        self.t = t
