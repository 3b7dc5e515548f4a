"""Tracing rules for layers: convolution, linear maps, normalisation, activations, pooling, means, dropout."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from certify.bounds import activations
from certify.bounds.affine import BatchNorm, Conv2d, Linear, NonNegative
from certify.bounds.op import UnsupportedOperation
from certify.bounds.pooling import MaxPool2d
from certify.bounds.softmax import Softmax
from certify.bounds.trace_rules import Handled, Handlers, Recording, need_constant

HANDLERS = Handlers()


def _pair(value: Any) -> tuple[int, int]:
    return (int(value), int(value)) if isinstance(value, int) else (int(value[0]), int(value[-1]))


@HANDLERS.handles("conv2d")
def _conv2d(
    r: Recording, input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0,
    dilation: Any = 1, groups: int = 1,
) -> Handled:  # fmt: skip
    need_constant(r, weight, "the weight of a convolution")
    stride, dilation = _pair(stride), _pair(dilation)
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:])]
        if any(t % 2 for t in total):
            raise UnsupportedOperation(f"padding='same' with an even kernel in module {r.path!r}; pad explicitly")
        padding = (total[0] // 2, total[1] // 2)
    padding = (0, 0) if padding == "valid" else _pair(padding)
    return Conv2d(weight, bias, stride, padding, dilation, groups, tuple(input.shape[1:])), (input,)


@HANDLERS.handles("linear")
def _linear(r: Recording, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Handled:
    need_constant(r, weight, "the weight of a linear layer")
    return Linear(weight, bias), (input,)


@HANDLERS.handles("matmul", "__matmul__", "mm")
def _matmul(r: Recording, input: Tensor, other: Tensor) -> Handled:
    if r.find(input) is None or r.find(other) is not None or other.ndim != 2:
        raise UnsupportedOperation(f"matmul in module {r.path!r} is bounded only as (traced) @ (constant matrix)")
    return Linear(other.t(), None), (input,)


@HANDLERS.handles("addmm")
def _addmm(r: Recording, input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1) -> Handled:
    if r.find(mat1) is None or r.find(mat2) is not None or r.find(input) is not None or (beta, alpha) != (1, 1):
        raise UnsupportedOperation(
            f"addmm in module {r.path!r} is bounded only as constant + (traced) @ (constant matrix)"
        )
    return Linear(mat2.t(), input), (mat1,)


@HANDLERS.handles("batch_norm")
def _batch_norm(
    r: Recording, input: Tensor, running_mean: Tensor | None, running_var: Tensor | None, weight: Tensor | None = None,
    bias: Tensor | None = None, training: bool = False, momentum: float = 0.1, eps: float = 1e-5,
) -> Handled:  # fmt: skip
    shape = (-1, *[1] * (input.ndim - 2))
    value = None
    if training or running_mean is None or running_var is None:
        if not r.training:
            # Its answer on an image would depend on the other images, perturbed as they may be.
            raise UnsupportedOperation(
                f"batch_norm in module {r.path!r} uses the statistics of the batch although the model is in evaluation "
                "mode; give it running statistics (track_running_stats=True) and put it in evaluation mode, too"
            )
        # One pass gives the output and the statistics, whose gradient is then attached by hand.
        value, mean, inverse = torch.native_batch_norm(
            input, weight, bias, running_mean, running_var, True, momentum, eps
        )
        mean, inverse = _Statistics.apply(input.detach() if r.detach_statistics else input, mean, inverse)
    else:
        mean, inverse = running_mean, torch.rsqrt(running_var + eps)
    return (BatchNorm(mean, inverse, weight, bias, shape), (input,), value)


class _Statistics(torch.autograd.Function):
    """Batch mean and inverse deviation that are known already, as differentiable functions of the batch."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mean: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, mean, inverse)
        return mean.clone(), inverse.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        x, mean, inverse = ctx.saved_tensors
        count = x.numel() // x.shape[1]
        slope = -gradients[1] * inverse**3 / count
        shape = (-1, *[1] * (x.ndim - 2))
        constant = gradients[0] / count - slope * mean
        return torch.addcmul(constant.reshape(shape).expand_as(x), x, slope.reshape(shape)), None, None


@HANDLERS.handles("relu")
def _relu(r: Recording, input: Tensor, inplace: bool = False) -> Handled:
    return activations.ReLU(), (input,)


@HANDLERS.handles("leaky_relu")
def _leaky_relu(r: Recording, input: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> Handled:
    return activations.LeakyReLU(negative_slope), (input,)


@HANDLERS.handles("relu6")
def _relu6(r: Recording, input: Tensor, inplace: bool = False) -> Handled:
    return activations.Clamp(0.0, 6.0), (input,)


@HANDLERS.handles("hardtanh")
def _hardtanh(
    r: Recording, input: Tensor, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False
) -> Handled:
    return activations.Clamp(float(min_val), float(max_val)), (input,)


@HANDLERS.handles("clamp", "clip")
def _clamp(r: Recording, input: Tensor, min: Any = None, max: Any = None) -> Handled:
    ends = []
    for value, default in ((min, -math.inf), (max, math.inf)):
        if isinstance(value, Tensor) and value.numel() != 1:
            raise UnsupportedOperation(f"clamp with tensor bounds in module {r.path!r}; use numbers")
        ends.append(default if value is None else float(value))
    return activations.ReLU() if ends == [0.0, math.inf] else activations.Clamp(*ends), (input,)


@HANDLERS.handles("clamp_min")
def _clamp_min(r: Recording, input: Tensor, min: Any) -> Handled:
    return _clamp(r, input, min)


@HANDLERS.handles("clamp_max")
def _clamp_max(r: Recording, input: Tensor, max: Any) -> Handled:
    return _clamp(r, input, None, max)


@HANDLERS.handles("sigmoid")
def _sigmoid(r: Recording, input: Tensor) -> Handled:
    return activations.sigmoid(), (input,)


@HANDLERS.handles("tanh")
def _tanh(r: Recording, input: Tensor) -> Handled:
    return activations.tanh(), (input,)


@HANDLERS.handles("softmax")
def _softmax(r: Recording, input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: Any = None) -> Handled:
    if dim is None:
        raise UnsupportedOperation(f"softmax without dim in module {r.path!r}; give the axis")
    axis = dim % input.ndim
    if axis == 0:
        raise ValueError(f"softmax over the batch axis in module {r.path!r} mixes the entries of a batch")
    return Softmax(axis), (input,)


@HANDLERS.handles("max_pool2d")
def _max_pool2d(
    r: Recording, input: Tensor, kernel_size: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1,
    ceil_mode: bool = False, return_indices: bool = False,
) -> Handled:  # fmt: skip
    if return_indices:
        raise UnsupportedOperation(f"max_pool2d with return_indices in module {r.path!r}")
    kernel = _pair(kernel_size)
    stride = kernel if stride is None or stride == [] else _pair(stride)
    return MaxPool2d(kernel, stride, _pair(padding), _pair(dilation), ceil_mode, tuple(input.shape[1:])), (input,)


@HANDLERS.handles("avg_pool2d")
def _avg_pool2d(
    r: Recording, input: Tensor, kernel_size: Any, stride: Any = None, padding: Any = 0, ceil_mode: bool = False,
    count_include_pad: bool = True, divisor_override: int | None = None,
) -> Handled:  # fmt: skip
    def pool(v: Tensor) -> Tensor:
        return F.avg_pool2d(v, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)

    return NonNegative(pool, tuple(input.shape[1:]), "avg_pool2d"), (input,)


@HANDLERS.handles("adaptive_avg_pool2d")
def _adaptive_avg_pool2d(r: Recording, input: Tensor, output_size: Any) -> Handled:
    return NonNegative(
        lambda v: F.adaptive_avg_pool2d(v, output_size), tuple(input.shape[1:]), "adaptive_avg_pool2d"
    ), (input,)


def _axes(r: Recording, dim: Any, input: Tensor) -> tuple[int, ...]:
    axes = (
        tuple(range(input.ndim))
        if dim is None
        else tuple(d % input.ndim for d in ((dim,) if isinstance(dim, int) else dim))
    )
    if 0 in axes:
        raise ValueError(f"a mean or sum over the batch axis in module {r.path!r} mixes the entries of a batch")
    return axes


@HANDLERS.handles("mean")
def _mean(r: Recording, input: Tensor, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> Handled:
    axes = _axes(r, dim, input)
    return NonNegative(lambda v: v.mean(axes, keepdim), tuple(input.shape[1:]), "mean"), (input,)


@HANDLERS.handles("sum")
def _sum(r: Recording, input: Tensor, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> Handled:
    axes = _axes(r, dim, input)
    return NonNegative(lambda v: v.sum(axes, keepdim), tuple(input.shape[1:]), "sum"), (input,)


@HANDLERS.handles("dropout", "dropout1d", "dropout2d", "feature_dropout", "alpha_dropout")
def _dropout(r: Recording, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Handled:
    if training and p > 0:
        raise UnsupportedOperation(
            f"dropout in module {r.path!r} is active; its random mask has no bound. Call model.eval() or set p = 0"
        )
    return None, (input,)


@HANDLERS.handles("identity", "contiguous", "clone", "to", "type", "float", "double", "detach", "alias")
def _identity(r: Recording, input: Tensor, *args: Any, **kwargs: Any) -> Handled:
    return None, (input,)
