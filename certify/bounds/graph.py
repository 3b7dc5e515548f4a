"""A network as a graph of bounded operations."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from certify.bounds.affine import Conv2d, Linear, Scale
from certify.bounds.expectation import Expectation
from certify.bounds.op import Interval, Op
from certify.bounds.softmax import Softmax


@dataclasses.dataclass(frozen=True)
class Node:
    """One value: the operation that makes it (None for the input), the nodes it reads, its shape without batch axis."""

    op: Op | None
    inputs: tuple[int, ...]
    shape: tuple[int, ...]


class Graph:
    """Nodes in topological order; node 0 is the input and the last node the output (unless `output` says otherwise)."""

    def __init__(self, nodes: Sequence[Node], output: int | None = None) -> None:
        self.nodes = tuple(nodes)
        self.output = len(self.nodes) - 1 if output is None else output

    def operation(self, index: int) -> Op:
        """The operation that makes node `index` (not the input)."""
        op = self.nodes[index].op
        assert op is not None
        return op

    def forward(self, x: Tensor) -> Tensor:
        """The network's output for inputs x (N, ...)."""
        return self.values(x)[self.output]

    def values(self, x: Tensor) -> list[Tensor]:
        """Every node's value for inputs x (N, ...)."""
        values = [x]
        for index in range(1, len(self.nodes)):
            values.append(self.operation(index).forward(*(values[i] for i in self.nodes[index].inputs)))
        return values

    def step(self, index: int, intervals: Sequence[Interval | None]) -> Interval:
        """The interval of node `index` from those of the nodes it reads."""
        inputs = []
        for i in self.nodes[index].inputs:
            interval = intervals[i]
            assert interval is not None
            inputs.append(interval)
        return self.operation(index).interval(*inputs)

    def consumers(self) -> list[list[int]]:
        """For each node, the nodes that read it."""
        readers: list[list[int]] = [[] for _ in self.nodes]
        for index, node in enumerate(self.nodes):
            for i in node.inputs:
                readers[i].append(index)
        return readers

    def select(self, index: Tensor) -> Graph:
        """This network for some images of the batch."""
        nodes = [Node(node.op and node.op.select(index), node.inputs, node.shape) for node in self.nodes]
        return Graph(nodes, self.output)

    def prefixed(self, ops: Sequence[Op], shapes: Sequence[tuple[int, ...]]) -> Graph:
        """This network after `ops`, which map a new input of shape ``shapes[0]`` to the old one, one op a shape."""
        nodes = [Node(None, (), tuple(shapes[0]))]
        for op, shape in zip(ops, shapes[1:], strict=True):
            nodes.append(Node(op, (len(nodes) - 1,), tuple(shape)))
        shift = len(nodes) - 1
        for node in self.nodes[1:]:
            nodes.append(Node(node.op, tuple(i + shift for i in node.inputs), node.shape))
        return Graph(nodes, self.output + shift)

    def folded(self) -> Graph:
        """The same function with fewer nodes: every channel-wise `Scale` merged into the convolution or linear map
        before it, and every softmax that only a linear map reads merged with that map."""
        readers = self.consumers()
        ops = [node.op for node in self.nodes]
        alias = list(range(len(self.nodes)))
        skipped: dict[int, int] = {}
        for index, node in enumerate(self.nodes):
            if not isinstance(node.op, Scale):
                continue
            source = alias[node.inputs[0]]
            merged = _fold(ops[source], node.op)
            if merged is not None and len(readers[node.inputs[0]]) == 1 and node.inputs[0] != self.output:
                ops[source] = merged
                alias[index] = source
        for index, node in enumerate(self.nodes):
            mean = ops[index]
            source = node.inputs[0] if node.inputs else 0
            softmax = ops[source]
            if isinstance(mean, Linear) and isinstance(softmax, Softmax) and alias[index] == index:
                alone = len(readers[source]) == 1 and softmax.axis == len(self.nodes[source].shape)
                if alone and source != self.output:
                    fused = Expectation(mean.weight, mean.bias())
                    fused.path = softmax.path
                    ops[index] = fused
                    skipped[source] = self.nodes[source].inputs[0]
        kept = [i for i in range(len(self.nodes)) if alias[i] == i and i not in skipped]
        number = {old: new for new, old in enumerate(kept)}
        nodes = [
            Node(ops[i], tuple(number[alias[skipped.get(j, j)]] for j in self.nodes[i].inputs), self.nodes[i].shape)
            for i in kept
        ]
        return Graph(nodes, number[alias[self.output]])


def _fold(op: Op | None, scale: Scale) -> Op | None:
    """`scale` after a convolution or linear map as one map, or None where that is not a channel-wise factor."""
    if isinstance(op, Conv2d):
        channels = op.weight.shape[0]
        factor = _per_channel(scale.scale, channels, 2, 1.0, op.weight)
        shift = _per_channel(scale.shift, channels, 2, 0.0, op.weight)
        if factor is None or shift is None:
            return None
        bias = shift if op._bias is None else op._bias * factor + shift
        merged: Op = Conv2d(
            op.weight * factor.reshape(-1, 1, 1, 1), bias, op.stride, op.padding, op.dilation, op.groups, op.input_shape
        )
    elif isinstance(op, Linear):
        outputs = op.weight.shape[0]
        factor = _per_channel(scale.scale, outputs, 0, 1.0, op.weight)
        shift = _per_channel(scale.shift, outputs, 0, 0.0, op.weight)
        if factor is None or shift is None:
            return None
        bias = shift if op._bias is None else op._bias * factor + shift
        merged = Linear(op.weight * factor.unsqueeze(1), bias)
    else:
        return None
    merged.path = op.path
    return merged


def _per_channel(value: Tensor | None, channels: int, trailing: int, default: float, like: Tensor) -> Tensor | None:
    """`value` as (channels,), or None when it varies along the `trailing` axes or has axes before the channel."""
    if value is None:
        return torch.full((channels,), default, dtype=like.dtype, device=like.device)
    if value.numel() == 1:
        return value.reshape(1).expand(channels)
    shape = value.shape[value.ndim - trailing - 1 :]
    if value.numel() == channels and len(shape) == trailing + 1 and shape[0] == channels:
        return value.reshape(channels)
    return None
