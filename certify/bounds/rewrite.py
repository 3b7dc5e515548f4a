"""Piecewise-linear operations written as ReLUs and affine maps: the same function with one kind of nonlinearity.

Branch and bound and mixed-integer programs then need to know ReLU alone, and splitting ReLUs decides every such
network.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from certify.bounds.activations import Clamp, LeakyReLU, ReLU
from certify.bounds.affine import Add, NonNegative, Scale
from certify.bounds.graph import Graph, Node
from certify.bounds.op import Affine, Interval, Op, UnsupportedOperation
from certify.bounds.pooling import MaxPool2d

# How far, relative to the outputs, rounding may put the rewritten network from the one that it stands for.
SAME = 1e-8
# From this ratio on float64 has too few digits for a small number beside a large one.
SWALLOWED = 1e7
DIFFERENT = "maxima cannot be written as ReLUs in float64 where numbers of very different size meet in them"


def relu_form(graph: Graph, found: list[Interval]) -> Graph:
    """`graph` with every leaky ReLU, clamp and max-pool replaced by ReLUs; equal to it on the region of `found`.

    Args:
        graph: any graph of bounded operations.
        found: an interval for every node, as `certify.bounds.interval.intervals` gives; padding of max-pools is
            replaced by a value that no input falls below.

    Raises:
        UnsupportedOperation: for a nonlinearity that is not piecewise linear, naming it and its module; and where the
            rewritten network differs by rounding, because numbers of very different size meet in a maximum.
    """
    builder = _Builder(graph.nodes[0], found[0][0])
    number = {0: 0}
    for index in range(1, len(graph.nodes)):
        node, op = graph.nodes[index], graph.operation(index)
        inputs = tuple(number[i] for i in node.inputs)
        builder.path = op.path
        if isinstance(op, (Affine, ReLU)):
            number[index] = builder.add(op, inputs, node.shape)
        elif isinstance(op, LeakyReLU):
            number[index] = _leaky(builder, inputs[0], op.slope)
        elif isinstance(op, Clamp):
            largest = max(float(end.abs().max()) for end in found[node.inputs[0]])
            number[index] = _clamp(builder, inputs[0], op.low, op.high, largest)
        elif isinstance(op, MaxPool2d):
            number[index] = _max_pool(builder, inputs[0], op, float(found[node.inputs[0]][0].min()), node.shape)
        else:
            raise UnsupportedOperation(
                f"{op.label} is not piecewise linear, so it cannot be decided by splitting ReLUs"
            )
    rewritten = Graph(builder.nodes, number[graph.output])
    for point in (found[0][0], torch.lerp(*found[0], 0.5), found[0][1]):
        value = graph.forward(point)
        if not bool((rewritten.forward(point) - value).abs().amax() <= SAME * value.abs().amax()):
            raise UnsupportedOperation(DIFFERENT)
    return rewritten


class _Builder:
    def __init__(self, entry: Node, like: Tensor) -> None:
        self.nodes = [entry]
        self.path = ""
        self._like = like

    def add(self, op: Op, inputs: tuple[int, ...], shape: tuple[int, ...]) -> int:
        op.path = self.path
        self.nodes.append(Node(op, inputs, shape))
        return len(self.nodes) - 1

    def scale(self, source: int, scale: float | None, shift: float | None) -> int:
        """``scale * v + shift`` of node `source`; None for 1 and 0."""
        op = Scale(
            None if scale is None else self._like.new_tensor(scale),
            None if shift is None else self._like.new_tensor(shift),
        )
        return self.add(op, (source,), self.nodes[source].shape)

    def relu(self, source: int) -> int:
        return self.add(ReLU(), (source,), self.nodes[source].shape)

    def sum(self, a: int, b: int, sign: float = 1.0) -> int:
        shape = self.nodes[a].shape
        return self.add(Add((shape, shape), sign), (a, b), shape)


def _leaky(builder: _Builder, source: int, slope: float) -> int:
    """``slope * v + (1 - slope) * relu(v)``."""
    rectified = builder.scale(builder.relu(source), 1 - slope, None)
    return builder.sum(builder.scale(source, slope, None), rectified)


def _clamp(builder: _Builder, source: int, low: float, high: float, largest: float) -> int:
    """``low + relu(v - low) - relu(v - high)``; an infinite end drops its part.

    Refused where the `largest` values would swallow the ends in that difference.
    """
    if math.isinf(low) and math.isinf(high):
        return source
    if largest > SWALLOWED * max(abs(end) for end in (low, high) if math.isfinite(end)) and largest > SWALLOWED:
        raise UnsupportedOperation(DIFFERENT)
    above = builder.relu(builder.scale(source, None, -high)) if math.isfinite(high) else None
    if math.isinf(low):
        assert above is not None
        return builder.sum(source, above, -1.0)
    raised = builder.scale(builder.relu(builder.scale(source, None, -low)), None, low)
    return raised if above is None else builder.sum(raised, above, -1.0)


def _max_pool(builder: _Builder, source: int, op: MaxPool2d, floor: float, shape: tuple[int, ...]) -> int:
    """Pairwise maxima ``b + relu(a - b)`` over the entries of each window, as a tournament."""
    # Shifted by a lower bound of every input, zero padding never wins.
    shifted = builder.scale(source, None, -floor)
    level = [
        builder.add(NonNegative(pick, builder.nodes[source].shape, "max_pool2d"), (shifted,), shape)
        for pick in _window_entries(op, shape)
    ]
    while len(level) > 1:
        pairs = zip(level[0::2], level[1::2])
        merged = [builder.sum(b, builder.relu(builder.sum(a, b, -1.0))) for a, b in pairs]
        level = merged + level[len(level) - len(level) % 2 :]
    return builder.scale(level[0], None, floor)


def _window_entries(op: MaxPool2d, shape: tuple[int, ...]) -> list[Callable[[Tensor], Tensor]]:
    """For each place in the window, the map (N, C, H, W) -> (N, *shape) that picks it, zero outside the input."""
    rows, cols = shape[1:]
    height, width = op.input_shape[1:]
    far = [
        max(0, (out - 1) * s + d * (k - 1) + 1 - size - p)
        for out, s, d, k, size, p in zip(
            (rows, cols), op.stride, op.dilation, op.kernel, (height, width), op.padding, strict=True
        )
    ]
    pads = (op.padding[1], far[1], op.padding[0], far[0])

    def entry(top: int, left: int) -> Callable[[Tensor], Tensor]:
        down = slice(top, top + (rows - 1) * op.stride[0] + 1, op.stride[0])
        right = slice(left, left + (cols - 1) * op.stride[1] + 1, op.stride[1])
        return lambda x: F.pad(x, pads)[:, :, down, right]

    return [entry(i * op.dilation[0], j * op.dilation[1]) for i in range(op.kernel[0]) for j in range(op.kernel[1])]


__all__ = ["relu_form"]
