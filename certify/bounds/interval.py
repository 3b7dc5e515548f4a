"""Interval bound propagation (Gowal et al., 2018): the cheapest bounds, differentiable, about two forward passes."""

from __future__ import annotations

import torch
from torch import Tensor

from certify.bounds.graph import Graph
from certify.bounds.op import Affine, Coefficients, Interval
from certify.bounds.region import Region


def intervals(graph: Graph, region: Region) -> list[Interval]:
    """An interval for every node of the graph."""
    found: list[Interval] = [(region.lo, region.hi)]
    for index in range(1, len(graph.nodes)):
        found.append(graph.step(index, found))
    return found


def rows_from_intervals(graph: Graph, region: Region, found: list[Interval], C: Tensor) -> Tensor:
    """Lower bounds (N, R) of ``C y`` with C (N, R, outputs) folded through the affine layers at the end of the network.

    Folding keeps the correlation between outputs up to the last activation; it is never looser than combining the
    intervals of the outputs.
    """
    pending: dict[int, Coefficients] = {graph.output: Coefficients(C, None, 1)}
    total = torch.zeros(C.shape[:2], dtype=C.dtype, device=C.device)
    while pending:
        index = max(pending)
        c = pending.pop(index)
        node = graph.nodes[index]
        if node.op is None:
            total = total + region.lower(c)
        elif isinstance(node.op, Affine):
            offset = node.op.offset(c)
            total = total if offset is None else total + offset
            for i, part in zip(node.inputs, node.op.adjoint(c)):
                pending[i] = pending[i].plus(part) if i in pending else part
        else:
            lo, hi = found[index]
            total = total + Region(lo, hi).lower(c)
    return total
