"""Sound bounds on the outputs of a network over a set of perturbed images.

`bounds` is the front door. `Network` traces a model once and bounds it as often as wanted, also inside a training step.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from certify import inputs
from certify.arithmetic import full_float32
from certify.bounds import alpha, forward
from certify.bounds.crown import crown_intervals, crown_rows
from certify.bounds.graph import Graph
from certify.bounds.interval import intervals, rows_from_intervals
from certify.bounds.op import UnsupportedOperation
from certify.bounds.propagation import Propagation, Rectifier, cross_entropy
from certify.bounds.region import Region, attach
from certify.bounds.trace import trace
from certify.perturbations import Perturbation

__all__ = [
    "METHODS",
    "Graph",
    "Network",
    "Propagation",
    "Rectifier",
    "Region",
    "UnsupportedOperation",
    "attach",
    "bounds",
    "cross_entropy",
    "lower_rows",
    "trace",
]

METHODS = ("ibp", "crown-ibp", "crown", "alpha-crown", "alpha-crown-full", "forward")
Output = tuple[Tensor, Tensor]


class Network:
    """A model traced on a batch `x` (N, ...): its output there, and bounds around it.

    Attributes:
        graph: the bounded operations, batch normalisation folded into the layer before it.
        recorded: the same, every normalisation an operation of its own.
        output: the model's output on `x`, with gradients; in training mode the one forward pass of this step.

    In training mode batch normalisation uses the statistics of this batch; gradients flow through them as well, unless
    `detach_statistics` is set, which saves the backward pass through the clean network.

    A training step runs as fast as its user allows: tracing and `propagate` keep the precision of float32 that is set
    (TF32 by default on a GPU), where `bounds` takes all of it.

    Raises:
        UnsupportedOperation: for an operation without a sound bound, naming it and its module.
        ValueError: for non-finite weights, when `check` is set.
    """

    def __init__(self, model: nn.Module, x: Tensor, check: bool = True, detach_statistics: bool = False) -> None:
        self.recorded, self.output = trace(model, x, check, detach_statistics)
        self.graph = self.recorded.folded()
        self._x = x

    @full_float32()
    def bounds(
        self, p: Perturbation, method: str = "ibp", C: Tensor | None = None, memory: int = 1 << 28
    ) -> tuple[Tensor, Tensor]:
        """Bounds over `p` around the traced batch; see `certify.bounds` for arguments and result."""
        return bound_rows(self.graph, self._x, p, method, C, memory)

    def propagate(self, p: Perturbation, method: str = "ibp") -> Propagation:
        """Intervals of every node over `p` around the traced batch; see `Propagation.of` for `method`."""
        return Propagation.of(self.graph, self.recorded, self._x, p, method)


@full_float32()
def bounds(
    model: nn.Module,
    x: Tensor,
    p: Perturbation,
    method: str = "crown",
    C: Tensor | None = None,
    memory: int = 1 << 28,
) -> tuple[Tensor, Tensor]:
    """Lower and upper bounds of the model's outputs, or of ``C y``, for every image in `p` around `x`.

    Args:
        model: any module whose operations are supported; normalisation belongs inside it.
        x: images (N, ...) in pixel space.
        p: what may change.
        method: "ibp", "crown-ibp", "crown", "alpha-crown" (optimised slopes over CROWN's intervals),
            "alpha-crown-full" (those intervals optimised, too), "forward" (perturbations and boxes of few parameters),
            or "auto-lirpa:<method>" for auto-LiRPA's own.
        C: (N, rows, outputs) linear functions of the output; it is folded into the last affine layers.
        memory: bytes that working tensors should stay near.

    Returns:
        Two tensors (N, outputs), or (N, rows) with `C`, differentiable in the model's parameters.

    Raises:
        UnsupportedOperation: for an operation without a sound bound, naming it and its module.
        ValueError: for bad images, radii, weights, `C`, or an unknown method.
    """
    inputs.check(model, x, p)
    if method.startswith("auto-lirpa"):
        from certify import lirpa

        return lirpa.bounds(model, x, p, method.partition(":")[2] or "CROWN", C)
    # A few images are enough to trace; batch normalisation in training mode needs the statistics of all of them.
    saved = {name: value.clone() for name, value in model.named_buffers()} if model.training else {}
    try:
        graph, _ = trace(model, x if model.training else x[:2])
    except UnsupportedOperation:
        raise
    except RuntimeError:
        with torch.no_grad():
            inputs.outputs(model, x[:2])  # the model's own complaint, if it has one
        raise
    if saved:
        with torch.no_grad():
            for name, value in model.named_buffers():
                value.copy_(saved[name])
    return bound_rows(graph.folded(), x, p, method, C, memory)


def bound_rows(
    graph: Graph, x: Tensor, p: Perturbation, method: str, C: Tensor | None, memory: int = 1 << 28
) -> tuple[Tensor, Tensor]:
    """As `bounds`, for a graph."""
    if method not in METHODS:
        raise ValueError(f"unknown bound method {method!r}; choose one of {', '.join(METHODS)} or auto-lirpa:<method>")
    if len(graph.nodes[graph.output].shape) != 1:
        raise UnsupportedOperation(
            f"the network's output has shape {graph.nodes[graph.output].shape} an image; flatten it to one axis"
        )
    outputs = graph.nodes[graph.output].shape[0]
    if C is not None and (C.ndim != 3 or len(C) != len(x) or C.shape[2] != outputs):
        raise ValueError(f"C must be ({len(x)}, rows, {outputs}), got {tuple(C.shape)}")
    if method == "ibp" and C is None:
        attached, region = attach(graph, x, p, hull=True)
        return intervals(attached, region)[attached.output]
    rows = C.to(x) if C is not None else torch.eye(outputs, dtype=x.dtype, device=x.device).expand(len(x), -1, -1)
    lower = lower_rows(graph, x, p, method, torch.cat([rows, -rows], 1), memory)
    return lower[:, : rows.shape[1]], -lower[:, rows.shape[1] :]


def lower_rows(graph: Graph, x: Tensor, p: Perturbation, method: str, C: Tensor, memory: int = 1 << 28) -> Tensor:
    """Lower bounds (N, R) of ``C y`` for C (N, R, outputs); `method` as in `bounds`, without back ends."""
    attached, region = attach(graph, x, p, hull=method == "ibp")
    if method == "forward":
        return forward.lower_rows(attached, region, C)
    if method == "ibp":
        return rows_from_intervals(attached, region, intervals(attached, region), C)
    if method == "crown-ibp":
        return crown_rows(attached, region, intervals(attached, region), C, memory)
    found = crown_intervals(attached, region, memory)
    if method == "crown":
        return crown_rows(attached, region, found, C, memory)
    if method == "alpha-crown-full":
        found = alpha.alpha_intervals(attached, region, found, memory=memory)
    best, slopes = alpha.alpha_rows(attached, region, found, C, memory=memory)
    if not torch.is_grad_enabled():
        return best
    # The best slopes, once more, as a function of the weights.
    parts = []
    for i, own in enumerate(slopes):
        one = torch.tensor([i], device=C.device)
        part = [(lo[one], hi[one]) for lo, hi in found]
        parts.append(alpha.rows_with(attached.select(one), region.select(one), part, C[one], own))
    return torch.cat(parts)
