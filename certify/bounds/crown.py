"""CROWN: linear bounds carried backward through the network (Zhang et al., 2018; Xu et al., 2020).

To bound a functional of the output from below, replace every activation, from the output back to the input, by the line
that bounds the functional from below, and minimise the functional of the input that remains over the input region.
The lines need intervals before each activation: *CROWN-IBP* takes them from interval propagation, *CROWN* computes them
by the same backward pass, layer by layer, for those neurons whose interval makes a difference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from certify.bounds.activations import LeakyReLU, ReLU
from certify.bounds.graph import Graph
from certify.bounds.op import Activation, Affine, Coefficients, Interval, Relaxation
from certify.bounds.pooling import MaxPool2d, PoolRelaxation
from certify.bounds.region import Region
from certify.bounds.windows import Maps, Neurons

# Bytes of one chunk's functionals on a processor: a few of these fit its last cache.
CACHE = 1 << 22

Lines = dict[int, Relaxation | PoolRelaxation]
# An adjustment of the functionals at a node, such as the multipliers of split constraints in beta-CROWN.
Adjust = Callable[[int, Coefficients], Coefficients]
Settle = Callable[[int, Coefficients, Tensor], Tensor | None]


def relaxations(graph: Graph, found: list[Interval], upto: int | None = None) -> Lines:
    """The lines of every activation below node `upto`, for the intervals `found`."""
    lines: Lines = {}
    for index in range(1, len(graph.nodes) if upto is None else upto):
        op = graph.operation(index)
        if isinstance(op, (Activation, MaxPool2d)):
            lines[index] = op.relax(*found[graph.nodes[index].inputs[0]])
    return lines


def backward(
    graph: Graph,
    region: Region,
    found: list[Interval],
    lines: Lines,
    start: int,
    c: Coefficients,
    adjust: Adjust | None = None,
) -> Tensor:
    """Lower bounds of the functionals `c` of node `start` over the region: the row axes of `c`.

    Nodes without lines (softmax) are bounded by their interval in `found`.
    """
    total, at_input = linear_bound(graph, found, lines, start, c, adjust)
    return total if at_input is None else total + region.lower(at_input)


def linear_bound(
    graph: Graph,
    found: list[Interval],
    lines: Lines,
    start: int,
    c: Coefficients,
    adjust: Adjust | None = None,
    settle: Settle | None = None,
) -> tuple[Tensor, Coefficients | None]:
    """A constant and functionals of the network's input that bound `c` (of node `start`) from below together.

    `settle` is asked wherever all functionals meet at an activation's input; it may return the entries to go on with.
    """
    pending: dict[int, Coefficients] = {start: c}
    total = c.data.new_zeros(c.lead)
    while pending:
        index = max(pending)
        c = pending.pop(index)
        if adjust is not None:
            c = adjust(index, c)
        node = graph.nodes[index]
        if node.op is None:
            return total, c
        parts: tuple[Coefficients, ...]
        if isinstance(node.op, Affine):
            offset = node.op.offset(c)
            total = total if offset is None else total + offset
            parts = node.op.adjoint(c)
        elif isinstance(node.op, Activation):
            line = lines[index]
            assert isinstance(line, Relaxation)
            part, constant = node.op.backward(c, line)
            total, parts = total + constant, (part,)
        elif isinstance(node.op, MaxPool2d):
            line = lines[index]
            assert isinstance(line, PoolRelaxation)
            part, constant = node.op.backward(c, line)
            total, parts = total + constant, (part,)
        else:
            lo, hi = found[index]
            total = total + Region(lo, hi).lower(c)
            parts = ()
        for i, part in zip(node.inputs, parts):
            pending[i] = pending[i].plus(part) if i in pending else part
        if settle is not None and len(pending) == 1 and isinstance(node.op, Activation):
            ((at, c),) = pending.items()
            left = settle(at, c, total)
            if left is not None:
                total, pending = total[left], {at: c.keep(left)}
                if not len(left):
                    return total, None
    return total, None


def crown_intervals(graph: Graph, region: Region, memory: int = 1 << 28, intersect: bool = True) -> list[Interval]:
    """Intervals for every node, tightened by CROWN wherever an activation is unstable on its interval.

    Only those neurons are bounded, each image's own, in chunks whose working tensors stay near `memory` bytes. On the
    way to later layers CROWN's own ends are used, as in auto-LiRPA. What is returned is also intersected with interval
    propagation, unless `intersect` is off, in such a way that no ReLU's lower line changes (`_meet`): narrower
    triangles over the same lower lines only take points from the relaxation that CROWN minimises over, so bounds that
    start from these intervals are never looser than from CROWN's alone (for networks of ReLUs, but for rounding).
    """
    own: list[Interval] = [(region.lo, region.hi)]
    met: list[Interval] = list(own)
    lines: Lines = {}
    readers = graph.consumers()
    for index, node in enumerate(graph.nodes[1:], 1):
        op = graph.operation(index)
        plain = graph.step(index, own)
        same = all(met[i] is own[i] for i in node.inputs)
        step = plain if same or not intersect else graph.step(index, met)
        own.append(plain)
        met.append(step)
        if isinstance(op, (Activation, MaxPool2d)):
            # A monotone function of tight intervals is as tight as a backward pass through its lines would be.
            lines[index] = op.relax(*own[node.inputs[0]])
        elif any(graph.nodes[i].op is not None for i in node.inputs):
            where = undecided(graph, readers, index, plain)
            if where is not None:
                own[index] = _tighten(graph, region, own, lines, readers, index, where, memory)
                met[index] = _meet(own[index], step)
    return met if intersect else own


def _meet(own: Interval, other: Interval) -> Interval:
    """The intersection of two intervals, widened within `own` where a ReLU would choose its other lower line on it."""
    (own_lo, own_hi), (lo, hi) = own, other
    lo, hi = torch.maximum(own_lo, lo), torch.minimum(own_hi, hi)
    # Both are sound, so crossing ends differ by rounding alone; their order is restored.
    lo, hi = torch.minimum(lo, hi), torch.maximum(lo, hi)
    unstable, steep = (own_lo < 0) & (own_hi > 0), own_hi > -own_lo
    past = torch.minimum(-lo * (1 + torch.finfo(lo.dtype).eps), own_hi)
    hi = torch.where(unstable & steep & (hi <= -lo), past, hi)
    # A point at 0 would count as active, with slope 1.
    before = torch.where(hi > 0, torch.maximum(-hi, own_lo), own_lo)
    return torch.where(unstable & ~steep & ((hi > -lo) | (lo >= 0)), before, lo), hi


def undecided(graph: Graph, readers: list[list[int]], index: int, interval: Interval) -> Tensor | None:
    """Which entries of a node need a tight interval: those that leave an activation or a pooling window undecided.

    None when nothing nonlinear reads the node.
    """
    where: Tensor | None = None
    for reader in readers[index]:
        op = graph.operation(reader)
        if isinstance(op, MaxPool2d):
            asked = op.contested(*interval)
        elif isinstance(op, Activation):
            asked = op.unstable(*interval)
            beyond = undecided(graph, readers, reader, op.interval(interval))
            asked = asked if beyond is None else asked | beyond
        else:
            continue
        where = asked if where is None else where | asked
    return where


def _tighten(
    graph: Graph,
    region: Region,
    found: list[Interval],
    lines: Lines,
    readers: list[list[int]],
    index: int,
    where: Tensor,
    memory: int,
) -> Interval:
    """The interval of node `index` in `found`, with CROWN's ends at the entries `where`."""
    lo, hi = found[index]
    image, entry = where.flatten(1).nonzero(as_tuple=True)
    if not len(image):
        return lo, hi
    widest = max(torch.Size(node.shape).numel() for node in graph.nodes[: index + 1])
    # Until it is seen how far windows grow, they are taken to cover their maps.
    first = min(memory // 16, 2 * _working_set(lo.device, memory))
    chunk, at = max(1, first // (lo.element_size() * widest)), 0
    lower, upper = [], []
    maps, shortcut = Maps(), _Shortcut(found, early=_sign_is_all(graph, readers[index]))
    while at < len(image):
        part = slice(at, at + chunk)
        start = Neurons.both_signs(image[part], entry[part], graph.nodes[index].shape, lo.dtype, maps)
        ends = shortcut.backward(graph, region, lines, index, start)
        lower.append(ends[:, 0])
        upper.append(-ends[:, 1])
        at += chunk
        if shortcut.widest:
            chunk = max(1, _working_set(lo.device, memory) // (lo.element_size() * shortcut.widest))
    flat = image * where[0].numel() + entry
    new_lo = lo.flatten().index_put((flat,), torch.cat(lower)).reshape(lo.shape)
    new_hi = hi.flatten().index_put((flat,), torch.cat(upper)).reshape(hi.shape)
    # Both ends are sound, so crossing ends differ by rounding alone; their order is restored.
    return torch.minimum(new_lo, new_hi), torch.maximum(new_lo, new_hi)


def _sign_is_all(graph: Graph, readers: Sequence[int]) -> bool:
    """Whether all who read a node are straight on either side of 0, so that a settled sign is all they need."""
    bent = [op for op in map(graph.operation, readers) if isinstance(op, (Activation, MaxPool2d))]
    return all(isinstance(op, (ReLU, LeakyReLU)) for op in bent)


def _working_set(device: torch.device, memory: int) -> int:
    """Bytes for the functionals of one chunk: half a dozen tensors of that size are alive at once.

    On a processor they are passed over again and again and best stay in its cache; on a GPU fewer, larger steps win.
    """
    return min(memory // 8, CACHE) if device.type == "cpu" else memory // 8


class _Shortcut:
    """Backward passes that stop early for neurons whose sign is settled on the way (GPUPoly, Mueller et al., 2021).

    At the input of an activation tight intervals are known, so the functionals that have come this far give bounds
    already. The first chunk of neurons is looked at everywhere; later ones only where that settled some. Nothing stops
    unless ``early``: a sigmoid or a pooling window needs more of its input than the sign.
    """

    def __init__(self, found: list[Interval], early: bool) -> None:
        self.found, self.early = found, early
        self.widest = 0  # numbers that one neuron's functionals took at most
        self._regions: dict[int, Region] = {}
        self._pays: dict[int, bool] = {}

    def backward(self, graph: Graph, region: Region, lines: Lines, index: int, start: Coefficients) -> Tensor:
        """Lower bounds of each neuron and of its negative (A, 2)."""
        best = start.data.new_full(start.lead, -torch.inf)
        alive = torch.arange(len(best), device=best.device)

        def settle(at: int, c: Coefficients, constant: Tensor) -> Tensor | None:
            nonlocal alive
            self.widest = max(self.widest, c.data[0].numel())
            if not (self.early and self._pays.get(at, True)):
                return None
            if at not in self._regions:
                self._regions[at] = Region(*self.found[at])
            bound = constant + self._regions[at].lower(c)
            left = (bound <= 0).all(1).nonzero().squeeze(1)
            self._pays[at] = len(left) < 0.8 * len(alive)
            if not self._pays[at]:
                return None
            best[alive] = bound
            alive = alive[left]
            return left

        total, at_input = linear_bound(graph, self.found, lines, index, start, settle=settle)
        if at_input is not None:
            total = total + region.lower(at_input)
        best[alive] = total
        return best


def crown_rows(graph: Graph, region: Region, found: list[Interval], C: Tensor, memory: int = 1 << 28) -> Tensor:
    """Lower bounds (N, R) of ``C y`` for C (N, R, outputs), given the intervals of all nodes."""
    lines = relaxations(graph, found, graph.output + 1)
    widest = max(torch.Size(n.shape).numel() for n in graph.nodes)
    chunk = max(1, memory // (8 * C.element_size() * widest * max(1, len(C))))
    parts = [
        backward(graph, region, found, lines, graph.output, Coefficients(C[:, at : at + chunk], None, 1))
        for at in range(0, C.shape[1], chunk)
    ]
    return torch.cat(parts, 1)
