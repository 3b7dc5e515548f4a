"""Rows of the output as a linear function of the input plus what each nonlinearity departs from its tangent: exact.

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
from certify.bounds.forward import Form, departure, propagate
from certify.bounds.graph import Graph
from certify.bounds.op import Activation, Affine, Coefficients, Op, UnsupportedOperation
from certify.bounds.pooling import MaxPool2d, PoolRelaxation


@dataclasses.dataclass(frozen=True)
class Departure:
    """One nonlinearity: its tangent at the reference, and the rows (size, R) that weigh what it departs from it.

    `tangent` is a slope, the picks of a max-pool, or the logits of an expectation, each (1, ...).
    """

    tangent: Tensor
    rows: Tensor


class Tangent:
    """The rows ``C y`` of a network around one reference input x (1, ...); C is (1, R, outputs).

    Raises:
        UnsupportedOperation: for an operation that has no tangent.
    """

    def __init__(self, graph: Graph, x: Tensor, C: Tensor) -> None:
        values = graph.values(x)
        self.graph = graph
        self.departures: dict[int, Departure] = {}
        pending: dict[int, Coefficients] = {graph.output: Coefficients(C, None, 1)}
        self.entry = C.new_zeros(x[0].numel(), C.shape[1])
        constant = (C @ values[graph.output].unsqueeze(2)).reshape(-1)
        while pending:
            index = max(pending)
            c = pending.pop(index)
            node = graph.nodes[index]
            if node.op is None:
                self.entry = _rows(c)
                constant = constant - x.flatten() @ self.entry
                continue
            if isinstance(node.op, Affine):
                parts = node.op.adjoint(c)
            else:
                c = c.dense()
                v = values[node.inputs[0]]
                part, tangent, at = _linearise(node.op, c, v, values[index])
                parts, rows = (part,), _rows(c)
                constant = constant - at.flatten() @ rows
                self.departures[index] = Departure(tangent, rows)
            for i, part in zip(node.inputs, parts):
                pending[i] = pending[i].plus(part) if i in pending else part
        self.constant = constant

    def bound(self, start: Form) -> tuple[Form, Form]:
        """Forms of the rows and of the outputs for inputs `start` (any batch: sub-intervals of the one image)."""
        lead = start.centre.shape[:2]
        centre = self.entry.new_zeros(*lead, self.entry.shape[1])
        radius = self.entry.new_zeros(lead[1], self.entry.shape[1])

        def add(rows: Tensor, part: Form) -> None:
            c, r = part.centre.flatten(2), part.radius.flatten(1)
            if not rows.is_cuda:  # on a CPU it pays to look for the few departures that are not zero
                live = ((r != 0).any(0) | (c != 0).any(0).any(0)).nonzero().squeeze(1)
                if 2 * len(live) < len(rows):
                    rows, c, r = rows[live], c[..., live], r[:, live]
            centre.add_(c @ rows)
            radius.add_(r @ rows.abs())

        def visit(index: int, v: Form, f: Form) -> None:
            d = self.departures.get(index)
            if d is None:
                return
            op = self.graph.operation(index)
            if isinstance(op, ReLU | LeakyReLU) and not d.rows.is_cuda:
                live, part = _live_departure(op, d.tangent, v)
                add(d.rows[live], part)
            else:
                add(d.rows, _departure(op, d.tangent, v, f))

        out = propagate(self.graph, start, visit)
        add(self.entry, start)
        centre[0] += self.constant
        return Form(centre, radius), out


def _rows(c: Coefficients) -> Tensor:
    return c.dense().data.flatten(2)[0].t().contiguous()


def _linearise(op: Op, c: Coefficients, v: Tensor, f: Tensor) -> tuple[Coefficients, Tensor, Tensor]:
    """`c` taken back through the tangent of `op` at input v and value f; the tangent; and what it leaves out there."""
    if isinstance(op, Activation):
        slope = slope_at(op, v)
        return c.replace(c.data * c.gather(slope)), slope, f - slope * v
    if isinstance(op, MaxPool2d):
        pick = op.relax(v, v).pick
        exact = PoolRelaxation(pick, torch.ones_like(pick, dtype=torch.bool), torch.zeros_like(f))
        return op.backward(c, exact)[0], pick, torch.zeros_like(f)
    if isinstance(op, Expectation):
        return op.pull(c, v), v, f - _jacobian(op, v, v)
    raise UnsupportedOperation(f"{op.label} has no tangent here")


def _departure(op: Op, tangent: Tensor, v: Form, f: Form) -> Form:
    """The form of f(v) minus its tangent."""
    if isinstance(op, Activation):
        return departure(op, v, tangent)
    if isinstance(op, MaxPool2d):
        return _pool_departure(op, tangent.expand_as(f.radius), v, f)
    assert isinstance(op, Expectation)
    return _mean_departure(op, tangent, v, f)


def _live_departure(op: ReLU | LeakyReLU, tangent: Tensor, v: Form) -> tuple[Tensor, Form]:
    """The entries that may leave the side they were on at the reference, and the form of their departure."""
    sway, on = v.sway(), tangent == 1
    crossing = torch.where(on, v.centre[0] - sway < v.radius, v.centre[0] + sway > -v.radius)
    live = crossing.flatten(1).any(0).nonzero().squeeze(1)
    few = Form(v.centre.flatten(2)[..., live], v.radius.flatten(1)[:, live])
    return live, departure(op, few, tangent.flatten()[live])


def slope_at(op: Activation, v: Tensor) -> Tensor:
    """The derivative of an activation at `v` (of one side, at a kink)."""
    if isinstance(op, ReLU):
        return (v > 0).to(v.dtype)
    if isinstance(op, LeakyReLU):
        return torch.where(v > 0, v.new_ones(()), v.new_tensor(op.slope))
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
