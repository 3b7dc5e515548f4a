"""Forward linear bounds for inputs of few dimensions: a line per value instead of a backward pass per value.

The input is a box of K parameters, written ``s`` in [-1, 1]^K. Every value of the network is enclosed between two
parallel linear functions of s, ``centre(s) - radius <= v <= centre(s) + radius``. An affine layer maps the centre by W
and the radius by |W|, so the cost is K + 2 plain forward passes whatever the number of values; an activation is
enclosed between two parallel lines on the range its input has. With small boxes this is close to exact.

The affine arithmetic of DeepZ (Singh et al., 2018), with one noise symbol for each parameter and one interval for the
rest. Two lines of different slopes (K + 1 more passes) were measured to be no tighter on keypoint networks.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from certify.bounds.activations import Clamp, LeakyReLU, ReLU
from certify.bounds.affine import AffinePath
from certify.bounds.expectation import Expectation
from certify.bounds.graph import Graph
from certify.bounds.op import Activation, Affine, Op
from certify.bounds.pooling import MaxPool2d
from certify.bounds.region import Region

MAX_PARAMETERS = 512


@dataclasses.dataclass(frozen=True)
class Form:
    """Values within `radius` (B, *shape) of ``centre[0] + sum_k s_k centre[k]``; centre (1 + K, B, *shape)."""

    centre: Tensor
    radius: Tensor

    def sway(self) -> Tensor:
        """How far the centre moves over the box: (B, *shape)."""
        return self.centre[1].abs() if len(self.centre) == 2 else self.centre[1:].abs().sum(0)

    def interval(self) -> tuple[Tensor, Tensor]:
        """The smallest interval around all values."""
        reach = self.sway() + self.radius
        return self.centre[0] - reach, self.centre[0] + reach

    def select(self, index: Tensor) -> Form:
        """Some entries of the batch."""
        return Form(self.centre[:, index], self.radius[index])


class Band(NamedTuple):
    """Around an elementwise function on an interval: ``|f(v) - slope v - shift| <= slack`` for every v in it."""

    slope: Tensor
    shift: Tensor
    slack: Tensor

    def apply(self, v: Form) -> Form:
        """The form of f(v)."""
        centre = v.centre * self.slope
        centre[0] += self.shift
        return Form(centre, v.radius * self.slope.abs() + self.slack)

    def residual(self, v: Form, slope: Tensor) -> Form:
        """The form of ``f(v) - slope v``."""
        rest = self.slope - slope
        centre = v.centre * rest
        centre[0] += self.shift
        return Form(centre, v.radius * rest.abs() + self.slack)


def entry(region: Region) -> Form:
    """The network's own input as a form: one parameter for each entry that is free in some image.

    Raises:
        ValueError: for more than `MAX_PARAMETERS` free entries.
    """
    lo, hi = region.lo.flatten(1), region.hi.flatten(1)
    free = (hi > lo).any(0).nonzero().squeeze(1)
    if len(free) > MAX_PARAMETERS:
        raise ValueError(
            f"forward bounds carry one map for each of the {len(free)} free inputs (at most {MAX_PARAMETERS}); "
            'use method="crown", or a perturbation of few parameters'
        )
    slopes = torch.zeros(len(free), *lo.shape, dtype=lo.dtype, device=lo.device)
    slopes[torch.arange(len(free), device=lo.device), :, free] = ((hi - lo) / 2)[:, free].t()
    centre = torch.cat([((lo + hi) / 2).unsqueeze(0), slopes])
    return Form(centre.reshape(-1, *region.lo.shape), torch.zeros_like(region.lo))


def lower_rows(graph: Graph, region: Region, C: Tensor) -> Tensor:
    """Lower bounds (N, R) of ``C y`` over `region` for C (N, R, outputs)."""
    out = propagate(graph, entry(region))
    centre = (out.centre.unsqueeze(2) @ C.transpose(1, 2)).squeeze(2)
    return centre[0] - centre[1:].abs().sum(0) - (out.radius.unsqueeze(1) @ C.abs().transpose(1, 2)).squeeze(1)


# Told of each nonlinear node: its index, the form it reads, and its own.
Visit = Callable[[int, Form, Form], None]


def propagate(graph: Graph, start: Form, visit: Visit | None = None) -> Form:
    """The form of the network's output for inputs in `start`; intermediate forms are freed as soon as possible."""
    readers = [len(r) for r in graph.consumers()]
    forms: dict[int, Form] = {0: start}
    for index in range(1, len(graph.nodes)):
        node, op = graph.nodes[index], graph.operation(index)
        inputs = [forms[i] for i in node.inputs]
        if isinstance(op, Affine):
            forms[index] = affine(op, inputs)
        else:
            forms[index] = nonlinear(op, inputs)
            if visit is not None:
                visit(index, inputs[0], forms[index])
        for i in node.inputs:
            readers[i] -= 1
            if not readers[i] and i != graph.output:
                forms.pop(i, None)
        if index == graph.output:
            break
    return forms[graph.output]


def affine(op: Affine, inputs: list[Form]) -> Form:
    """An affine layer: the centre through W, the radius through |W|."""
    lead = inputs[0].centre.shape[:2]
    if isinstance(
        op, AffinePath
    ):  # its matrix differs from entry to entry, so coefficients cannot share its batch axis
        centre = torch.stack([op.linear(*(v.centre[k] for v in inputs)) for k in range(lead[0])])
    else:
        flat = op.linear(*(v.centre.flatten(0, 1) for v in inputs))
        centre = flat.reshape(*lead, *flat.shape[1:])
    bias = op.bias()
    if bias is not None:
        centre = torch.cat([(centre[0] + bias).unsqueeze(0), centre[1:]])
    return Form(centre, op.magnitude(*(v.radius for v in inputs)))


def nonlinear(op: Op, inputs: list[Form]) -> Form:
    """A nonlinear operation; one without lines of its own becomes an interval."""
    if isinstance(op, Activation):
        return activation(op, inputs[0])
    if isinstance(op, MaxPool2d):
        return max_pool(op, inputs[0])
    if isinstance(op, Expectation):
        return expectation(op, inputs[0])
    lo, hi = op.interval(*(v.interval() for v in inputs))
    return _constant(lo, hi, len(inputs[0].centre))


def _constant(lo: Tensor, hi: Tensor, coefficients: int) -> Form:
    centre = torch.zeros(coefficients, *lo.shape, dtype=lo.dtype, device=lo.device)
    centre[0] = (lo + hi) / 2
    return Form(centre, (hi - lo) / 2)


def activation(op: Activation, v: Form) -> Form:
    """An elementwise function."""
    if isinstance(op, ReLU):
        return rectify(v)
    if isinstance(op, LeakyReLU):
        part = rectify(v)
        rest = 1 - op.slope
        return Form(op.slope * v.centre + rest * part.centre, op.slope * v.radius + rest * part.radius)
    return band(op, v).apply(v)


def departure(op: Activation, v: Form, slope: Tensor) -> Form:
    """The form of ``f(v) - slope v`` for a derivative `slope` of f (at any point, not necessarily one in v)."""
    if isinstance(op, ReLU | LeakyReLU):
        # relu(v) - v = relu(-v), and a leaky ReLU is its smaller slope and a share of the ReLU.
        rest = 1.0 if isinstance(op, ReLU) else 1 - op.slope
        part = rectify(Form(torch.where(slope == 1, -v.centre, v.centre), v.radius))
        return part if rest == 1 else Form(rest * part.centre, rest * part.radius)
    return band(op, v).residual(v, slope)


def rectify(v: Form) -> Form:
    """``max(v, 0)`` between the chord over the range of the *upper* line of v, and the line of that slope through 0.

    ``relu(v) <= relu(upper(s))`` needs the chord only where the upper line itself changes sign, which is tighter than
    the chord over all of v; a constant interval is used where that is narrower. Branch-free: stable neurons get slope 0
    or 1 and no slack.
    """
    sway = v.sway()
    high = v.centre[0] + v.radius + sway
    slope = (high / (2 * sway + torch.finfo(high.dtype).tiny)).clamp(0, 1)
    high = high.clamp(min=0)
    half = high * (1 - slope) / 2
    box = high < 2 * (slope * v.radius + half)
    half = torch.where(box, high / 2, half)
    slope = slope.masked_fill(box, 0)
    centre = v.centre * slope
    centre[0] += half
    return Form(centre, v.radius * slope + half)


def band(op: Activation, v: Form) -> Band:
    """Parallel lines around a function on the range of `v`, or a constant interval where that is narrower."""
    lo, hi = v.interval()
    if isinstance(op, Clamp):
        # The chord; the function departs from it most at a kink or an end.
        f_lo, f_hi = op.forward(lo), op.forward(hi)
        slope = (f_hi - f_lo) / (hi - lo).clamp(min=torch.finfo(lo.dtype).tiny)
        kinks = [torch.minimum(lo.clamp(min=k), hi) for k in (op.low, op.high) if math.isfinite(k)]
        gaps = torch.stack([op.forward(k) - slope * k for k in (lo, hi, *kinks)])
        least, most = gaps.amin(0), gaps.amax(0)
    else:
        r = op.relax(lo, hi)
        slope = (r.slope_lo + r.slope_hi) / 2
        ends = torch.stack([lo, hi])
        least = ((r.slope_lo - slope) * ends).amin(0) + (0 if r.bias_lo is None else r.bias_lo)
        most = ((r.slope_hi - slope) * ends).amax(0) + (0 if r.bias_hi is None else r.bias_hi)
        f_lo, f_hi = op.interval((lo, hi))
    slack = (most - least) / 2
    box = (f_hi - f_lo) / 2 < slope.abs() * v.radius + slack
    zero = torch.zeros_like(slope)
    return Band(
        torch.where(box, zero, slope),
        torch.where(box, (f_hi + f_lo) / 2, (most + least) / 2),
        torch.where(box, (f_hi - f_lo) / 2, slack),
    )


def max_pool(op: MaxPool2d, v: Form) -> Form:
    """Lines of one slope around each maximum: that of the chord between the maxima at both ends of a parameter.

    Any slope p gives sound lines, ``max_j min_s (v_j - p s) <= max_j v_j - p s <= max_j max_s (v_j - p s)``.
    """
    pool = op.forward
    ahead = [(pool(v.centre[0] + c) - pool(v.centre[0] - c)) / 2 for c in v.centre[1:]]
    pick = op.relax(*v.interval()).pick
    slope = torch.stack(ahead) if ahead else v.centre.new_zeros(0, *pick.shape)
    low = torch.full_like(pick, -torch.inf, dtype=v.radius.dtype)
    high = low.clone()
    cuts = _places(op, v, pick)
    for base, coefficients, radius in cuts:
        sway = (coefficients - slope).abs().sum(0)
        low = torch.maximum(low, base - sway - radius)
        high = torch.maximum(high, base + sway + radius)
    return Form(torch.cat([((low + high) / 2).unsqueeze(0), slope]), (high - low) / 2)


def _places(op: MaxPool2d, v: Form, pick: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    """For each place in the window: constant, slopes and radius of the entries there; padding is -inf, 0, 0."""
    base, cuts, _ = op._slices(v.centre[0], pick)
    lead = v.centre.shape[1:3]
    slopes, _, _ = op._slices(v.centre[1:].flatten(0, 1), pick)
    slopes = slopes.masked_fill(slopes == -torch.inf, 0).reshape(-1, *lead, *slopes.shape[2:])
    radius, _, _ = op._slices(v.radius, pick)
    radius = radius.masked_fill(radius == -torch.inf, 0)
    return [(base[:, :, a, b], slopes[..., a, b], radius[:, :, a, b]) for a, b in cuts]


def bend(swing: Tensor, variance: Tensor) -> Tensor:
    """The largest variance of logit changes along a segment, from their range `swing` over the whole segment and their
    `variance` at one point of it: no weight grows by more than ``exp(swing)``, no variance exceeds ``swing^2 / 4``."""
    grown = torch.where(swing < 50, torch.exp(swing) * variance, torch.inf)
    return torch.minimum(swing**2 / 4, grown)


def expectation(op: Expectation, v: Form) -> Form:
    """Weighted means over a softmax: a tangent line with a second-order remainder, or the exact range of the box.

    Along a direction d of the logits, ``|y''| <= range(g) Var_p(d)`` (see `bend`); the radius of the logits enters
    through bounds of the first derivative on the whole box.
    """
    lo, hi = v.interval()
    box_lo, box_hi = op.interval((lo, hi))
    p, y = op.tangent(v.centre[0])
    steps = v.centre[1:]
    slopes = (p * steps) @ op.weight.t() - (p * steps).sum(-1, keepdim=True) * y
    swing = (steps.amax(-1, keepdim=True) - steps.amin(-1, keepdim=True)).sum(0)
    deviation = ((p * (steps - (p * steps).sum(-1, keepdim=True)) ** 2).sum(-1, keepdim=True)).sqrt().sum(0)
    bent = op.span() * bend(swing, deviation**2) / 2
    far = torch.maximum(hi - lo, torch.zeros_like(lo)).amax(-1, keepdim=True)
    most = torch.log_softmax(v.centre[0], -1) + far  # no log weight grows by more than this over the box
    bias = 0 if op.bias is None else op.bias
    means = torch.maximum((box_hi - bias).unsqueeze(-1) - op.weight, op.weight - (box_lo - bias).unsqueeze(-1))
    drift = ((most.clamp(max=0).exp() * v.radius).unsqueeze(-2) * means).sum(-1)
    line = Form(torch.cat([(y + bias).unsqueeze(0), slopes]), bent + drift)
    flat = _constant(box_lo, box_hi, len(v.centre))
    use = flat.radius < line.radius
    return Form(torch.where(use, flat.centre, line.centre), torch.where(use, flat.radius, line.radius))
