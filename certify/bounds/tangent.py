"""Rows of the output written exactly as a linear function of the input plus what each nonlinearity departs from its tangent.

Replace every nonlinearity f by its tangent ``slope v`` at one reference input and go back from the output once. Then,
for *every* input,

    C y  =  A_0 x  +  sum_l A_l (f_l(v_l) - slope_l v_l)  +  constant

with the same matrices A. Near the reference almost all departures are exactly zero (a ReLU on the side it was on), so
forward bounds of the few others bound the rows without multiplying absolute values of weights layer by layer. One
backward pass serves all sub-intervals of an image, which is what separates this from CROWN.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from certify.bounds.activations import Clamp, LeakyReLU, ReLU, SShaped
from certify.bounds.expectation import Expectation
from certify.bounds.forward import Band, Form, propagate
from certify.bounds.graph import Graph
from certify.bounds.op import Activation, Affine, Coefficients, UnsupportedOperation
from certify.bounds.pooling import MaxPool2d, PoolRelaxation


@dataclasses.dataclass(frozen=True)
class Departure:
    """One nonlinearity: its tangent at the reference, and the rows that weigh what it departs from it.

    `rows` is (N, size, R): values first, so that a few of them are quick to pick.
    """

    tangent: Tensor
    rows: Tensor


class Tangent:
    """The rows ``C y`` of a network around reference inputs x (N, ...), one for each image.

    Raises:
        UnsupportedOperation: for an operation that has no tangent.
    """

    def __init__(self, graph: Graph, x: Tensor, C: Tensor) -> None:
        values = graph.values(x)
        self.graph = graph
        self.departures: dict[int, Departure] = {}
        pending: dict[int, Coefficients] = {graph.output: Coefficients(C, None, 1)}
        start: Coefficients | None = None
        while pending:
            index = max(pending)
            c = pending.pop(index)
            node = graph.nodes[index]
            if node.op is None:
                start = c.dense()
                continue
            parts: tuple[Coefficients, ...]
            if isinstance(node.op, Affine):
                parts = node.op.adjoint(c)
            else:
                c = c.dense()
                v = values[node.inputs[0]]
                rows = c.data.flatten(2).transpose(1, 2).contiguous()
                if isinstance(node.op, Activation):
                    slope = slope_at(node.op, v)
                    parts = (c.replace(c.data * c.gather(slope)),)
                    self.departures[index] = Departure(slope, rows)
                elif isinstance(node.op, MaxPool2d):
                    pick = node.op.relax(v, v).pick
                    exact = torch.ones_like(pick, dtype=torch.bool)
                    parts = (node.op.backward(c, PoolRelaxation(pick, exact, torch.zeros_like(c.data[:, 0])))[0],)
                    self.departures[index] = Departure(pick, rows)
                elif isinstance(node.op, Expectation):
                    parts = (node.op.pull(c, v),)
                    self.departures[index] = Departure(v, rows)
                else:
                    raise UnsupportedOperation(f"{node.op.label} has no tangent here")
            for i, part in zip(node.inputs, parts):
                pending[i] = pending[i].plus(part) if i in pending else part
        at = (C @ values[graph.output].unsqueeze(2)).squeeze(2)
        self.entry = C.new_zeros(*C.shape[:2], x[0].numel()) if start is None else start.data.flatten(2)
        departed = sum(
            (
                torch.einsum("nsr,ns->nr", d.rows, self._at_reference(i, values).flatten(1))
                for i, d in self.departures.items()
            ),
            torch.zeros_like(at),
        )
        self.constant = at - (self.entry @ x.flatten(1).unsqueeze(2)).squeeze(2) - departed

    def _at_reference(self, index: int, values: list[Tensor]) -> Tensor:
        """The departure at the reference itself: what the tangent leaves out there."""
        v, f = values[self.graph.nodes[index].inputs[0]], values[index]
        op, d = self.graph.operation(index), self.departures[index]
        if isinstance(op, Activation):
            return f - d.tangent * v
        if isinstance(op, Expectation):
            return f - _jacobian(op, d.tangent, v)
        return torch.zeros_like(f)

    def bound(self, start: Form, image: Tensor, groups: list[slice]) -> tuple[Form, Form]:
        """Forms of the rows and of the outputs for inputs `start`, one entry of `image` (B,) for each of its batch.

        `groups`: the runs of equal images in `image`, in order.
        """
        centre = [
            torch.zeros(
                len(start.centre), len(image), self.constant.shape[1], dtype=start.centre.dtype, device=image.device
            )
        ]
        radius = [torch.zeros_like(centre[0][0])]

        def add(rows: Tensor, part: Form) -> None:
            """`rows` (N, size, R) times `part`, for each run of images."""
            c, r = part.centre.flatten(2), part.radius.flatten(1)
            for run in groups:
                which = image[run.start]
                matrix = rows[which]
                ci, ri = c[:, run], r[run]
                if not matrix.is_cuda:  # on a CPU it pays to look for the few departures that are not zero
                    live = ((ri != 0).any(0) | (ci != 0).any(0).any(0)).nonzero().squeeze(1)
                    if 2 * len(live) < matrix.shape[0]:
                        matrix, ci, ri = matrix[live], ci[..., live], ri[:, live]
                centre[0][:, run] += ci @ matrix
                radius[0][run] += ri @ matrix.abs()

        def visit(index: int, v: Form, band: Band | None, f: Form) -> None:
            d = self.departures.get(index)
            if d is not None:
                add(d.rows, self._departure(index, d.tangent[image], v, band, f))

        out = propagate(self.graph, start, visit)
        add(self.entry.transpose(1, 2), start)
        centre[0][0] += self.constant[image]
        return Form(centre[0], radius[0]), out

    def _departure(self, index: int, tangent: Tensor, v: Form, band: Band | None, f: Form) -> Form:
        op = self.graph.operation(index)
        if band is not None:
            return band.residual(v, tangent)
        if isinstance(op, MaxPool2d):
            return _pool_departure(op, tangent, v, f)
        assert isinstance(op, Expectation)
        return _mean_departure(op, tangent, v, f)


def slope_at(op: Activation, v: Tensor) -> Tensor:
    """The derivative of an activation at `v` (of one side, at a kink)."""
    if isinstance(op, ReLU):
        return (v > 0).to(v.dtype)
    if isinstance(op, LeakyReLU):
        return torch.where(v > 0, 1.0, op.slope).to(v.dtype)
    if isinstance(op, Clamp):
        return ((v > op.low) & (v < op.high)).to(v.dtype)
    if isinstance(op, SShaped):
        return op.derivative(v)
    raise UnsupportedOperation(f"{op.label} has no tangent here")


def _pool_departure(op: MaxPool2d, pick: Tensor, v: Form, f: Form) -> Form:
    """``max_j v_j - v_pick`` for the entry that was largest at the reference."""
    flat = pick.flatten(2)
    chosen = Form(
        torch.stack([c.flatten(2).gather(2, flat).reshape(pick.shape) for c in v.centre]),
        v.radius.flatten(2).gather(2, flat).reshape(pick.shape),
    )
    lead = Form(f.centre - chosen.centre, f.radius + chosen.radius)
    # Where no other entry can exceed it, the departure is zero; where one can, it is at most the largest excess.
    base, cuts, _ = op._slices(v.centre[0], pick)
    slopes, _, _ = op._slices(v.centre[1:].flatten(0, 1), pick)
    slopes = slopes.masked_fill(slopes == -torch.inf, 0).reshape(len(v.centre) - 1, *base.shape)
    radius, _, _ = op._slices(v.radius, pick)
    radius = radius.masked_fill(radius == -torch.inf, 0)
    height, width = v.radius.shape[2:]
    number = torch.arange(height * width, dtype=torch.float64, device=pick.device).reshape(1, 1, height, width)
    places, _, _ = op._slices(number, pick)
    excess = torch.zeros_like(chosen.radius)
    for a, b in cuts:
        ahead = base[:, :, a, b] - chosen.centre[0] + radius[:, :, a, b] + chosen.radius
        ahead = ahead + (slopes[..., a, b] - chosen.centre[1:]).abs().sum(0)
        excess = torch.maximum(excess, ahead.masked_fill(places[:, :, a, b] == pick, -torch.inf))
    box = excess / 2 < lead.radius
    centre = torch.where(box, torch.zeros_like(lead.centre), lead.centre)
    centre[0] = torch.where(box, excess / 2, lead.centre[0])
    return Form(centre, torch.where(box, excess / 2, lead.radius))


def _jacobian(op: Expectation, at: Tensor, v: Tensor) -> Tensor:
    """The derivative of the means at logits `at`, applied to `v` (both (..., n)): (..., out)."""
    p, y = op.tangent(at)
    return (p * v) @ op.weight.t() - (p * v).sum(-1, keepdim=True) * y


def _mean_departure(op: Expectation, at: Tensor, v: Form, f: Form) -> Form:
    """The means minus their tangent: the line of the means minus the tangent of the centre; the radius goes through
    the difference of the derivatives, bounded on the box, where that is the smaller one."""
    linear = torch.stack([_jacobian(op, at, c) for c in v.centre])
    p, y = op.tangent(at)
    weights = (p.unsqueeze(-2) * (op.weight - y.unsqueeze(-1))).abs()
    slack = (weights * v.radius.unsqueeze(-2)).sum(-1)
    return Form(f.centre - linear, f.radius + slack)
