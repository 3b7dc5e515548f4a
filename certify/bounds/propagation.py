"""One interval propagation that several questions share: rows of the output, the loss, the ReLUs' intervals.

Training takes bounds in every step. The margins, the fused loss and the regularisers that look at ReLU inputs then read
the same intervals instead of propagating anew.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from certify.bounds.activations import Clamp, ReLU
from certify.bounds.affine import BatchNorm, Conv2d, Linear
from certify.bounds.crown import crown_intervals, crown_rows
from certify.bounds.graph import Graph
from certify.bounds.interval import intervals, rows_from_intervals
from certify.bounds.op import Interval
from certify.bounds.region import Region, attach
from certify.perturbations import Perturbation

__all__ = ["Propagation", "Rectifier", "cross_entropy"]


@dataclasses.dataclass(frozen=True)
class Rectifier:
    """A layer of ReLUs and what reaches it over the region.

    Attributes:
        path: dotted path of the module that runs it.
        lower, upper: the pre-activation interval, (N, *shape).
        norm: the batch normalisation that feeds it directly, None without one.
    """

    path: str
    lower: Tensor
    upper: Tensor
    norm: BatchNorm | None

    @property
    def unstable(self) -> Tensor:
        """Where the interval has 0 inside: bool (N, *shape)."""
        return (self.lower < 0) & (self.upper > 0)


@dataclasses.dataclass(frozen=True)
class Propagation:
    """Intervals of every node of a network over a region around a batch.

    Attributes:
        graph: the network behind its perturbation.
        region: the inputs, a batch of N regions.
        found: an interval for every node, differentiable in the parameters.
        norms: for ReLUs right behind a batch normalisation, that normalisation (by identity of the operation).
    """

    graph: Graph
    region: Region
    found: list[Interval]
    norms: Mapping[int, BatchNorm]

    @classmethod
    def of(cls, graph: Graph, recorded: Graph, x: Tensor, p: Perturbation, method: str = "ibp") -> Propagation:
        """Intervals of `graph` over `p` around `x`.

        Args:
            graph: the network to bound, normalisations folded.
            recorded: the same network as traced, where normalisations are nodes of their own.
            x: images (N, ...).
            p: what may change.
            method: "ibp" propagates the box hull of `p`; "crown-ibp" propagates intervals too, but keeps an affine
                family's parameters as the input, for CROWN rows on top; "crown" tightens what leaves a ReLU undecided.
        """
        if method not in ("ibp", "crown-ibp", "crown"):
            raise ValueError(f"intervals are propagated by 'ibp', 'crown-ibp' or 'crown', not {method!r}")
        attached, region = attach(graph, x, p, hull=method == "ibp")
        found = crown_intervals(attached, region) if method == "crown" else intervals(attached, region)
        return cls(attached, region, found, _norms(recorded))

    @property
    def output(self) -> Interval:
        """The interval of the network's output, (N, outputs) each."""
        return self.found[self.graph.output]

    @property
    def input(self) -> Interval:
        """The interval of what is perturbed: pixels, or the parameters of an affine family."""
        return self.found[0]

    @property
    def entry(self) -> Interval:
        """The interval that the first convolution or linear layer reads: pixels behind the input normalisation."""
        for index in range(1, len(self.graph.nodes)):
            if isinstance(self.graph.operation(index), (Conv2d, Linear)):
                return self.found[self.graph.nodes[index].inputs[0]]
        return self.found[0]

    def lower(self, C: Tensor, method: str = "ibp") -> Tensor:
        """Lower bounds (N, R) of ``C y`` for C (N, R, outputs): by "ibp" folded into the last layers, or "crown"."""
        if method == "ibp":
            return rows_from_intervals(self.graph, self.region, self.found, C)
        if method == "crown":
            return crown_rows(self.graph, self.region, self.found, C)
        raise ValueError(f"rows are bounded by 'ibp' or 'crown' on top of the intervals, not {method!r}")

    def rectifiers(self) -> tuple[Rectifier, ...]:
        """Every layer of ReLUs (ReLU6 too), in the order of evaluation."""
        layers = []
        for index in range(1, len(self.graph.nodes)):
            op = self.graph.operation(index)
            kink = isinstance(op, ReLU) or (isinstance(op, Clamp) and op.low == 0 and not op.path.startswith("("))
            if kink:  # a path in brackets is the clip to [0, 1] of a perturbation, not a layer of the network
                lower, upper = self.found[self.graph.nodes[index].inputs[0]]
                layers.append(Rectifier(op.path, lower, upper, self.norms.get(id(op))))
        return tuple(layers)


def _norms(recorded: Graph) -> dict[int, BatchNorm]:
    norms = {}
    for node in recorded.nodes[1:]:
        source = recorded.nodes[node.inputs[0]].op if node.inputs else None
        if isinstance(node.op, (ReLU, Clamp)) and isinstance(source, BatchNorm):
            norms[id(node.op)] = source
    return norms


def cross_entropy(found: Propagation, rows: Tensor, crown: float) -> Tensor:
    """Upper bounds (N,) of the cross-entropy over the region, by loss fusion (Xu et al. 2020, section 3.3).

    The loss is ``log S`` with ``S = 1 + sum_i exp(z_i)`` and ``z_i = y_i - y_label``. On the interval of ``z_i`` the
    exponential lies below its chord, so S lies below *one* linear functional of the output, and CROWN takes a single
    backward pass where the margins would take one an output. Intervals of ``z`` are IBP's with the last layer folded.
    The bound is ``log(crown * S_CROWN + (1 - crown) * S_IBP)``, the mix of auto-LiRPA's training; both parts are sound.

    Equivalent to auto-LiRPA's ``CrossEntropyWrapper`` with ``loss_fusion``, which keeps slopes of the chord at 1e-6 or
    more while it trains.

    Args:
        found: IBP intervals of the network.
        rows: (N, K - 1, K) margin rows ``y_label - y_other`` (`certify.specs.margin_rows`).
        crown: weight of the CROWN bound in [0, 1]; 0 leaves out its backward pass.
    """
    if not 0.0 <= crown <= 1.0:
        raise ValueError(f"crown is the weight of the CROWN bound and must lie in [0, 1], got {crown}")
    if crown == 0.0:
        worst = -found.lower(rows)
        return torch.logsumexp(torch.cat([torch.zeros_like(worst[:, :1]), worst], 1), 1)
    count = rows.shape[1]
    ends = found.lower(torch.cat([rows, -rows], 1))
    low, high = ends[:, count:], -ends[:, :count]
    # Everything relative to the largest exponent: log S = top + log(S exp(-top)).
    top = high.detach().amax(1, keepdim=True).clamp(min=0)
    exp_high, one = torch.exp(high - top), torch.exp(-top).squeeze(1)
    width = high - low
    point = width <= 1e-6
    # The chord through the upper end without cancellation; on a vanishing interval a slope that is surely not above it.
    chord = -torch.expm1(-width) / torch.where(point, torch.ones_like(width), width)
    slope = exp_high * torch.where(point, torch.exp(-width), chord)
    offset = exp_high - slope * high
    functional = (slope.unsqueeze(1) @ rows).to(rows)  # sum_i slope_i (y_label - y_i), one row an image
    fused = offset.sum(1) - found.lower(functional, "crown").squeeze(1)
    plain = exp_high.sum(1)
    # A bound of a sum of exponentials is positive but for rounding.
    mixed = crown * fused.clamp(min=torch.finfo(fused.dtype).tiny) + (1.0 - crown) * plain
    return top.squeeze(1) + torch.log(one + mixed)
