"""The ONNX operators that feed-forward networks use, each as a torch module that works on batches.

A builder gets a `Node`, an operator with its constant inputs and a sample of its computed ones, and returns the module
over the computed inputs. Inputs to a network are independent of each other, so an operator that mixes the batch axis is
refused. Files without a batch axis work too: every tensor knows whether the file's version of it has one.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

Array = np.ndarray[Any, Any]


class ImportFailure(ValueError):
    """The file cannot become a module: unreadable, an operator outside the list, or a graph that mixes inputs."""


class Call(nn.Module):
    """A tensor function with fixed settings; `operand` is a constant that goes before or after the other argument."""

    operand: Tensor | None

    def __init__(
        self,
        function: Callable[..., Tensor],
        *settings: Any,
        operand: Tensor | None = None,
        first: bool = False,
        variadic: bool = False,
        **named: Any,
    ) -> None:
        super().__init__()
        self.function, self.settings, self.named, self.first, self.variadic = function, settings, named, first, variadic
        self.register_buffer("operand", operand)

    def forward(self, *x: Tensor) -> Tensor:
        if self.operand is not None:
            x = (self.operand, *x) if self.first else (*x, self.operand)
        if self.variadic:
            return self.function(list(x), *self.settings, **self.named)
        return self.function(*x, *self.settings, **self.named)

    def extra_repr(self) -> str:
        parts = [getattr(self.function, "__name__", str(self.function)), *map(str, self.settings)]
        return ", ".join([*parts, *(f"{k}={v}" for k, v in self.named.items())])


@dataclasses.dataclass(frozen=True)
class Value:
    """A tensor of the graph, run on one input: `sample` always has a batch axis, the file's tensor if `batched` too."""

    sample: Tensor
    batched: bool

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.sample.shape if self.batched else self.sample.shape[1:])

    def axis(self, node: Node, axis: int) -> int:
        """The torch axis of the file's `axis`; the batch axis itself is refused."""
        rank = len(self.shape)
        if not -rank <= axis < rank:
            raise node.failure(f"has axis {axis} for a tensor of rank {rank}")
        axis %= rank
        if self.batched and axis == 0:
            raise node.failure("works along the batch axis, so inputs would be mixed; export the network for one input")
        return axis if self.batched else axis + 1


@dataclasses.dataclass(frozen=True)
class Node:
    """One operator with its dynamic inputs (`values`, by position) and its constant ones (`constants`, by position)."""

    op: str
    name: str
    attributes: dict[str, Any]
    values: dict[int, Value]
    constants: dict[int, Array]
    opset: int

    def failure(self, problem: str) -> ImportFailure:
        return ImportFailure(f"{self.op} node {self.name!r} {problem}")

    @property
    def value(self) -> Value:
        """The only dynamic input, at position 0."""
        if set(self.values) != {0}:
            raise self.failure("needs its first input, and only that one, to depend on the network's input")
        return self.values[0]

    def tensor(self, position: int) -> Tensor:
        if position not in self.constants:
            raise self.failure(f"needs a constant as input {position}")
        array = self.constants[position]
        return torch.from_numpy(np.array(array, dtype=np.float32 if array.dtype.kind == "f" else array.dtype))

    def integers(self, attribute: str, position: int) -> list[int] | None:
        """A list given as an attribute (older opsets) or as a constant input (newer ones); None when absent."""
        if attribute in self.attributes:
            return [int(v) for v in self.attributes[attribute]]
        if position in self.constants:
            return [int(v) for v in self.constants[position].reshape(-1)]
        if position in self.values:
            raise self.failure(f"needs a constant as {attribute}")
        return None

    def number(self, attribute: str, position: int) -> float | None:
        if attribute in self.attributes:
            return float(self.attributes[attribute])
        if position in self.values:
            raise self.failure(f"needs a constant as {attribute}")
        return float(self.constants[position].reshape(())) if position in self.constants else None


# What a builder returns: the module over the dynamic inputs in order, and whether the file's output has a batch axis.
Built = tuple[nn.Module, bool]


def _pointwise(make: Callable[[], nn.Module]) -> Callable[[Node], Built]:
    return lambda node: (make(), node.value.batched)


def _arithmetic(function: Callable[..., Tensor]) -> Callable[[Node], Built]:
    def build(node: Node) -> Built:
        if len(node.values) == 2:
            a, b = node.values[0], node.values[1]
            if a.sample.ndim != b.sample.ndim:
                raise node.failure(f"broadcasts between tensors of rank {len(a.shape)} and {len(b.shape)}")
            return Call(function), a.batched or b.batched
        position, value = next(iter(node.values.items()))
        operand = node.tensor(1 - position)
        # A constant may carry leading ones; what is left must not reach the batch axis.
        while operand.ndim >= value.sample.ndim and operand.ndim and operand.shape[0] == 1:
            operand = operand.squeeze(0)
        if operand.ndim >= value.sample.ndim:
            raise node.failure(f"has a constant of shape {tuple(operand.shape)} that reaches the batch axis")
        return Call(function, operand=operand, first=position == 1), value.batched

    return build


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    layer.weight.data = weight.contiguous()
    if bias is not None:
        layer.bias.data = bias.contiguous()
    return layer


def _gemm(node: Node) -> Built:
    if set(node.values) != {0} or node.attributes.get("transA", 0):
        raise node.failure("is supported as input @ constant (+ constant), without transA")
    weight = node.tensor(1) * float(node.attributes.get("alpha", 1.0))
    weight = weight if node.attributes.get("transB", 0) else weight.T
    bias = None
    if 2 in node.constants:
        bias = (node.tensor(2) * float(node.attributes.get("beta", 1.0))).reshape(-1).expand(weight.shape[0])
    return _linear(weight, bias), node.value.batched


def _matmul(node: Node) -> Built:
    if len(node.values) == 2:
        a, b = node.values[0], node.values[1]
        if min(len(a.shape), len(b.shape)) < 2 or a.sample.ndim != b.sample.ndim or a.sample.ndim < 3:
            raise node.failure("multiplies two computed tensors of different or too small rank")
        return Call(torch.matmul), a.batched or b.batched
    position, value = next(iter(node.values.items()))
    constant = node.tensor(1 - position)
    if position == 0 and constant.ndim == 2:
        return _linear(constant.T, None), value.batched
    if position == 1 and constant.ndim == 2 and len(value.shape) == 1:
        return _linear(constant, None), value.batched
    if constant.ndim < 2 or value.sample.ndim < 3 or constant.ndim >= value.sample.ndim:
        raise node.failure(
            f"multiplies shapes {value.shape} and {tuple(constant.shape)} in a way that is not supported"
        )
    return Call(torch.matmul, operand=constant, first=position == 1), value.batched


def _window(node: Node, kernel: Sequence[int]) -> tuple[list[int], list[int], list[int]]:
    """Strides, dilations and pads (begins then ends) of a convolution or pooling over the spatial axes."""
    n = len(kernel)
    value = node.value
    if not value.batched or len(value.shape) != n + 2:
        raise node.failure(f"needs an input (1, channels, {n} spatial axes), got {value.shape}")
    strides = list(node.attributes.get("strides", [1] * n))
    dilations = list(node.attributes.get("dilations", [1] * n))
    auto = node.attributes.get("auto_pad", b"NOTSET").decode()
    if auto in ("NOTSET", ""):
        return strides, dilations, list(node.attributes.get("pads", [0] * 2 * n))
    begins, ends = [0] * n, [0] * n
    if auto in ("SAME_UPPER", "SAME_LOWER"):
        for i, size in enumerate(value.shape[2:]):
            covered = (math.ceil(size / strides[i]) - 1) * strides[i] + (kernel[i] - 1) * dilations[i] + 1
            total = max(0, covered - size)
            small, large = total // 2, total - total // 2
            begins[i], ends[i] = (small, large) if auto == "SAME_UPPER" else (large, small)
    elif auto != "VALID":
        raise node.failure(f"has auto_pad {auto!r}")
    return strides, dilations, begins + ends


def _torch_pads(pads: Sequence[int]) -> list[int]:
    """ONNX pads (all begins, then all ends, first axis first) in the order of `F.pad` (last axis first, in pairs)."""
    n = len(pads) // 2
    return [p for i in reversed(range(n)) for p in (pads[i], pads[n + i])]


def _symmetric(pads: Sequence[int]) -> bool:
    return list(pads[: len(pads) // 2]) == list(pads[len(pads) // 2 :])


def _conv(node: Node) -> Built:
    weight = node.tensor(1)
    kernel = weight.shape[2:]
    if len(kernel) not in (1, 2):
        raise node.failure(f"is a convolution over {len(kernel)} axes; 1 and 2 are supported")
    strides, dilations, pads = _window(node, kernel)
    symmetric = _symmetric(pads)
    groups = int(node.attributes.get("group", 1))
    convolution: Any = nn.Conv1d if len(kernel) == 1 else nn.Conv2d
    layer = convolution(
        weight.shape[1] * groups,
        weight.shape[0],
        tuple(kernel),
        stride=tuple(strides),
        padding=tuple(pads[: len(kernel)]) if symmetric else 0,
        dilation=tuple(dilations),
        groups=groups,
        bias=2 in node.constants,
    )
    layer.weight.data = weight
    if 2 in node.constants:
        layer.bias.data = node.tensor(2)
    return (layer if symmetric else nn.Sequential(Call(F.pad, _torch_pads(pads)), layer)), True


def _pool(node: Node) -> Built:
    kernel = [int(k) for k in node.attributes["kernel_shape"]]
    if len(kernel) != 2:
        raise node.failure(f"pools over {len(kernel)} axes; 2 are supported")
    strides, dilations, pads = _window(node, kernel)
    ceil = bool(node.attributes.get("ceil_mode", 0))
    symmetric = _symmetric(pads)
    inner = tuple(pads[:2]) if symmetric else (0, 0)
    pooling: nn.Module
    if node.op == "MaxPool":
        pooling = nn.MaxPool2d(tuple(kernel), tuple(strides), inner, tuple(dilations), ceil_mode=ceil)
        outside = -math.inf
    else:
        include = bool(node.attributes.get("count_include_pad", 0))
        if dilations != [1, 1] or not (symmetric or include):
            raise node.failure("averages with dilations, or with uneven pads that do not count")
        pooling = nn.AvgPool2d(tuple(kernel), tuple(strides), inner, ceil, include)  # type: ignore[arg-type]
        outside = 0.0
    return (pooling if symmetric else nn.Sequential(Call(F.pad, _torch_pads(pads), value=outside), pooling)), True


def _global_average(node: Node) -> Built:
    if not node.value.batched or len(node.value.shape) != 4:
        raise node.failure(f"needs an input (1, channels, height, width), got {node.value.shape}")
    return nn.AdaptiveAvgPool2d(1), True


def _batch_norm(node: Node) -> Built:
    rank = len(node.value.shape)
    if not node.value.batched or rank not in (2, 3, 4) or node.attributes.get("training_mode", 0):
        raise node.failure(
            f"needs inference mode and an input of rank 2 to 4 with a batch axis, got {node.value.shape}"
        )
    scale, shift, mean, variance = (node.tensor(i) for i in range(1, 5))
    eps = float(node.attributes.get("epsilon", 1e-5))
    layer = (nn.BatchNorm2d if rank == 4 else nn.BatchNorm1d)(len(scale), eps=eps)
    layer.weight.data, layer.bias.data = scale, shift
    layer.running_mean, layer.running_var = mean, variance
    return layer, True


def _reshaping(node: Node, target: Sequence[int]) -> Built:
    """A reshape to the file's `target` shape; its leading 1 (if any) is where the batch goes."""
    batched = len(target) > 1 and target[0] == 1
    rest = tuple(target[1:] if batched else target)
    if node.value.sample[0].shape == rest:
        return nn.Identity(), batched
    return (nn.Flatten() if len(rest) == 1 else Call(torch.reshape, (-1, *rest))), batched


def _reshape(node: Node) -> Built:
    target = node.integers("shape", 1)
    if target is None:
        raise node.failure("has no target shape")
    shape = node.value.shape
    if not node.attributes.get("allowzero", 0):
        target = [shape[i] if t == 0 and i < len(shape) else t for i, t in enumerate(target)]
    size = math.prod(shape)
    known = math.prod(t for t in target if t != -1)
    if target.count(-1) > 1 or known <= 0 or size % known:
        raise node.failure(f"cannot make {target} of {shape}")
    return _reshaping(node, [size // known if t == -1 else t for t in target])


def _flatten(node: Node) -> Built:
    shape, axis = node.value.shape, int(node.attributes.get("axis", 1))
    axis = axis if axis >= 0 else axis + len(shape)
    return _reshaping(node, [math.prod(shape[:axis]), math.prod(shape[axis:])])


def _squeeze(node: Node) -> Built:
    shape, axes = node.value.shape, node.integers("axes", 1)
    drop = {a % len(shape) for a in axes} if axes is not None else {i for i, s in enumerate(shape) if s == 1}
    if any(shape[a] != 1 for a in drop):
        raise node.failure(f"drops axes {sorted(drop)} of shape {shape}, which are not all 1")
    return _kept_batch(node, [s for i, s in enumerate(shape) if i not in drop], node.value.batched and 0 not in drop)


def _unsqueeze(node: Node) -> Built:
    axes = node.integers("axes", 1)
    if not axes:
        raise node.failure("has no axes")
    rest, rank = list(node.value.shape), len(node.value.shape) + len(axes)
    added = {a % rank for a in axes}
    target = [1 if i in added else rest.pop(0) for i in range(rank)]
    return _kept_batch(node, target, 0 in added or node.value.batched)


def _kept_batch(node: Node, target: Sequence[int], batched: bool) -> Built:
    rest = tuple(target[1:] if batched else target)
    if node.value.sample[0].shape == rest:
        return nn.Identity(), batched
    return (nn.Flatten() if len(rest) == 1 else Call(torch.reshape, (-1, *rest))), batched


def _transpose(node: Node) -> Built:
    value = node.value
    order = [int(i) for i in node.attributes.get("perm", reversed(range(len(value.shape))))]
    if value.batched and order[0] != 0:
        raise node.failure(f"moves the batch axis (perm {order})")
    order = order if value.batched else [0, *(i + 1 for i in order)]
    return (nn.Identity() if order == sorted(order) else Call(torch.permute, tuple(order))), value.batched


def _concat(node: Node) -> Built:
    if node.constants:
        raise node.failure("joins constants to computed tensors, which is not supported")
    values = list(node.values.values())
    if len({v.batched for v in values}) > 1:
        raise node.failure("joins tensors with and without a batch axis")
    axis = values[0].axis(node, int(node.attributes["axis"]))
    return Call(torch.cat, variadic=True, dim=axis), values[0].batched


def _pad(node: Node) -> Built:
    if node.attributes.get("mode", b"constant") != b"constant":
        raise node.failure(f"has mode {node.attributes['mode']!r}; only constant padding is supported")
    value, pads = node.value, node.integers("pads", 1)
    if pads is None or 3 in node.constants or len(pads) != 2 * len(value.shape):
        raise node.failure("needs pads for every axis of its input")
    fill = node.number("value", 2) or 0.0
    if value.batched:
        half = len(pads) // 2
        if pads[0] or pads[half]:
            raise node.failure("pads the batch axis")
        pads = pads[1:half] + pads[half + 1 :]
    return Call(F.pad, _torch_pads(pads), value=fill), value.batched


def _clip(node: Node) -> Built:
    return Call(torch.clamp, node.number("min", 1), node.number("max", 2)), node.value.batched


def _softmax(node: Node) -> Built:
    axis = int(node.attributes.get("axis", -1 if node.opset >= 13 else 1))
    torch_axis = node.value.axis(node, axis)
    if node.opset < 13 and torch_axis != node.value.sample.ndim - 1:
        raise node.failure(f"is a softmax over several axes at once (opset {node.opset}, axis {axis})")
    return nn.Softmax(torch_axis), node.value.batched


def _reduce(function: Callable[..., Tensor]) -> Callable[[Node], Built]:
    def build(node: Node) -> Built:
        axes = node.integers("axes", 1)
        if axes is None:
            raise node.failure("reduces over every axis, the batch axis included")
        keep = bool(node.attributes.get("keepdims", 1))
        dims = sorted(node.value.axis(node, a) for a in axes)
        return Call(function, dim=dims, keepdim=keep), node.value.batched

    return build


def _index(axis: int, chosen: Any) -> Call:
    return Call(operator.getitem, (*[slice(None)] * axis, chosen))


def _gather(node: Node) -> Built:
    value, indices = node.value, node.tensor(1)
    axis = value.axis(node, int(node.attributes.get("axis", 0)))
    size = value.sample.shape[axis]
    if indices.ndim > 1 or indices.numel() == 0 or not bool(((indices >= -size) & (indices < size)).all()):
        raise node.failure(
            f"picks {indices.tolist()} of {size} entries; a number or a list inside the axis is supported"
        )
    chosen = (indices % size).tolist()
    return _index(axis, chosen), value.batched


def _slice(node: Node) -> Built:
    value = node.value
    starts, ends = node.integers("starts", 1), node.integers("ends", 2)
    if starts is None or ends is None:
        raise node.failure("has no starts or ends")
    axes = node.integers("axes", 3) or list(range(len(starts)))
    steps = node.integers("steps", 4) or [1] * len(starts)
    parts: list[nn.Module] = []
    for start, end, axis, step in zip(starts, ends, axes, steps):
        size = value.shape[axis]
        chosen = range(size)[slice(start, end, step)] if step > 0 else range(0)
        if not len(chosen):
            raise node.failure("keeps nothing, or runs backwards")
        if len(chosen) < size:
            parts.append(_index(value.axis(node, axis), slice(chosen[0], chosen[-1] + 1, step)))
    return (parts[0] if len(parts) == 1 else nn.Sequential(*parts)), value.batched


def _leaky(node: Node) -> Built:
    return nn.LeakyReLU(float(node.attributes.get("alpha", 0.01))), node.value.batched


def _cast(node: Node) -> Built:
    if int(node.attributes["to"]) not in (1, 10, 11, 16):
        raise node.failure("turns a computed tensor into integers; only floating types are supported")
    return nn.Identity(), node.value.batched


BUILDERS: dict[str, Callable[[Node], Built]] = {
    "Add": _arithmetic(torch.add),
    "AveragePool": _pool,
    "BatchNormalization": _batch_norm,
    "Cast": _cast,
    "Clip": _clip,
    "Concat": _concat,
    "Conv": _conv,
    "Div": _arithmetic(torch.div),
    "Dropout": _pointwise(nn.Identity),
    "Flatten": _flatten,
    "Gather": _gather,
    "Gemm": _gemm,
    "GlobalAveragePool": _global_average,
    "Identity": _pointwise(nn.Identity),
    "LeakyRelu": _leaky,
    "MatMul": _matmul,
    "MaxPool": _pool,
    "Mul": _arithmetic(torch.mul),
    "Neg": _pointwise(lambda: Call(torch.neg)),
    "Pad": _pad,
    "ReduceMean": _reduce(torch.mean),
    "ReduceSum": _reduce(torch.sum),
    "Relu": _pointwise(nn.ReLU),
    "Reshape": _reshape,
    "Sigmoid": _pointwise(nn.Sigmoid),
    "Slice": _slice,
    "Softmax": _softmax,
    "Squeeze": _squeeze,
    "Sub": _arithmetic(torch.sub),
    "Tanh": _pointwise(nn.Tanh),
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
}
