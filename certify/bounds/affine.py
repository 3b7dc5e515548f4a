"""Affine operations: convolution, linear, elementwise scaling, reshaping, pooling by averages, sums, concatenation."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from certify.bounds.op import Affine, Coefficients, Interval
from certify.bounds.windows import Neurons, Window, transposed


class Linear(Affine):
    """``x W^T + b`` over the last axis; W (out, in)."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight, self._bias = weight, bias

    def bias(self) -> Tensor | None:
        return self._bias

    def forward(self, *inputs: Tensor) -> Tensor:
        return F.linear(inputs[0], self.weight, self._bias)

    def linear(self, *inputs: Tensor) -> Tensor:
        return F.linear(inputs[0], self.weight)

    def magnitude(self, *radii: Tensor) -> Tensor:
        return F.linear(radii[0], self.weight.abs())

    def adjoint(self, c: Coefficients) -> tuple[Coefficients, ...]:
        if isinstance(c, Neurons) and c.rank == 1:
            return (c.rows(self.weight),)
        c = c.dense()
        return (c.replace(c.data @ self.weight),)

    def offset(self, c: Coefficients) -> Tensor | None:
        return None if self._bias is None else c.sum(self._bias)


class Conv2d(Affine):
    """A two-dimensional convolution with zero padding; W (out, in / groups, kh, kw)."""

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        stride: tuple[int, int],
        padding: tuple[int, int],
        dilation: tuple[int, int],
        groups: int,
        input_shape: tuple[int, ...],
    ) -> None:
        self.weight, self._bias = weight, bias
        self.stride, self.padding, self.dilation, self.groups = stride, padding, dilation, groups
        self.input_shape = input_shape

    def bias(self) -> Tensor | None:
        return None if self._bias is None else self._bias.reshape(-1, 1, 1)

    def _conv(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self._conv(inputs[0], self.weight, self._bias)

    def linear(self, *inputs: Tensor) -> Tensor:
        return self._conv(inputs[0], self.weight)

    def magnitude(self, *radii: Tensor) -> Tensor:
        return self._conv(radii[0], self.weight.abs())

    def adjoint(self, c: Coefficients) -> tuple[Coefficients, ...]:
        if isinstance(c, (Window, Neurons)):
            grown = c.through_conv(self.weight, self.stride, self.padding, self.dilation, self.groups, self.input_shape)
            if grown is not None:
                return (grown,)
        c = c.dense()
        size = (self.input_shape[1], self.input_shape[2])
        back = transposed(c.flat(), self.weight, self.stride, self.padding, self.dilation, self.groups, size)
        return (c.like(back),)

    def offset(self, c: Coefficients) -> Tensor | None:
        if self._bias is None:
            return None
        if isinstance(c, (Window, Neurons)):
            return c.sum(self._bias.reshape(-1, 1, 1))
        return c.data.sum((-2, -1)) @ self._bias


class Scale(Affine):
    """Elementwise ``scale * x + shift``; both broadcast over the shape, without batch axis; None for 1 and 0.

    Batch normalisation, input normalisation, and arithmetic with constants all end here.
    """

    def __init__(self, scale: Tensor | None, shift: Tensor | None) -> None:
        self.scale, self.shift = scale, shift

    def bias(self) -> Tensor | None:
        return self.shift

    def linear(self, *inputs: Tensor) -> Tensor:
        return inputs[0] if self.scale is None else inputs[0] * self.scale

    def magnitude(self, *radii: Tensor) -> Tensor:
        return radii[0] if self.scale is None else radii[0] * self.scale.abs()

    def adjoint(self, c: Coefficients) -> tuple[Coefficients, ...]:
        if self.scale is None:
            return (c,)
        c = c.spread() if isinstance(c, Neurons) else c
        return (c.replace(c.data * c.constant(self.scale)),)

    def offset(self, c: Coefficients) -> Tensor | None:
        return None if self.shift is None else c.sum(self.shift)


class BatchNorm(Scale):
    """Batch normalisation ``(x - mean) * inverse * weight + bias`` with statistics that are known by now.

    The parts stay at hand for those who ask about the value before the affine pair: `mean`, `inverse` (1 / sqrt(var +
    eps)), `weight` and `offsets` (the affine pair), (channels,) each, the last two None when the layer has none.
    """

    def __init__(
        self, mean: Tensor, inverse: Tensor, weight: Tensor | None, bias: Tensor | None, shape: tuple[int, ...]
    ) -> None:
        scale = inverse if weight is None else inverse * weight
        shift = -mean * scale if bias is None else bias - mean * scale
        super().__init__(scale.reshape(shape), shift.reshape(shape))
        self.mean, self.inverse, self.weight, self.offsets = mean, inverse, weight, bias


class Reshape(Affine):
    """The same numbers in another shape (flatten, view, squeeze)."""

    def __init__(self, before: tuple[int, ...], after: tuple[int, ...]) -> None:
        self.before, self.after = before, after

    def linear(self, *inputs: Tensor) -> Tensor:
        return inputs[0].reshape(len(inputs[0]), *self.after)

    def magnitude(self, *radii: Tensor) -> Tensor:
        return self.linear(*radii)

    def interval(self, *inputs: Interval) -> Interval:
        ((lo, hi),) = inputs
        return self.linear(lo), self.linear(hi)

    def adjoint(self, c: Coefficients) -> tuple[Coefficients, ...]:
        c = c.dense()
        return (c.like(c.data.reshape(c.lead.numel(), *self.before)),)


class NonNegative(Affine):
    """A linear map whose matrix has no negative entry, given as a function on batches, such as average pooling.

    The adjoint is the function's gradient, so slicing, permuting, padding, means and (adaptive) average
    pooling need no formula of their own.
    """

    def __init__(self, function: Callable[[Tensor], Tensor], before: tuple[int, ...], name: str) -> None:
        self.function, self.before, self.name = function, before, name

    @property
    def label(self) -> str:
        return f"{self.name} in module {self.path or '(root)'!r}"

    def linear(self, *inputs: Tensor) -> Tensor:
        return self.function(inputs[0])

    def magnitude(self, *radii: Tensor) -> Tensor:
        return self.function(radii[0])

    def interval(self, *inputs: Interval) -> Interval:
        ((lo, hi),) = inputs
        return self.function(lo), self.function(hi)

    def adjoint(self, c: Coefficients) -> tuple[Coefficients, ...]:
        c = c.dense()
        flat = c.flat()
        at = torch.zeros(len(flat), *self.before, dtype=flat.dtype, device=flat.device, requires_grad=True)
        with torch.enable_grad():
            value = self.function(at)
        (pulled,) = torch.autograd.grad(value, at, flat, create_graph=flat.requires_grad)
        return (c.like(pulled),)


class Add(Affine):
    """``x + sign * y`` of two inputs whose shapes broadcast."""

    def __init__(self, shapes: tuple[tuple[int, ...], tuple[int, ...]], sign: float = 1.0) -> None:
        self.shapes, self.sign = shapes, sign

    def linear(self, *inputs: Tensor) -> Tensor:
        return inputs[0] + inputs[1] if self.sign == 1 else inputs[0] - inputs[1]

    def magnitude(self, *radii: Tensor) -> Tensor:
        return radii[0] + radii[1]

    def interval(self, *inputs: Interval) -> Interval:
        (a, b), (c, d) = inputs
        return (a + c, b + d) if self.sign == 1 else (a - d, b - c)

    def adjoint(self, c: Coefficients) -> tuple[Coefficients, ...]:
        if isinstance(c, Neurons):
            c = c.spread()
        if self.shapes[0] != self.shapes[1]:
            c = c.dense()
        first = (
            c
            if tuple(c.shape) == self.shapes[0] or self.shapes[0] == self.shapes[1]
            else _unbroadcast(c, self.shapes[0])
        )
        second = (
            c
            if tuple(c.shape) == self.shapes[1] or self.shapes[0] == self.shapes[1]
            else _unbroadcast(c, self.shapes[1])
        )
        return first, second if self.sign == 1 else second.replace(-second.data)


def _unbroadcast(c: Coefficients, shape: tuple[int, ...]) -> Coefficients:
    flat = c.flat()
    full = (1,) * (flat.ndim - 1 - len(shape)) + shape
    for axis, size in enumerate(full, 1):
        if size == 1 and flat.shape[axis] != 1:
            flat = flat.sum(axis, keepdim=True)
    return c.like(flat.reshape(len(flat), *shape))


class Cat(Affine):
    """Concatenation along `axis` (counted with the batch axis)."""

    def __init__(self, axis: int, sizes: tuple[int, ...]) -> None:
        self.axis, self.sizes = axis, sizes

    def linear(self, *inputs: Tensor) -> Tensor:
        return torch.cat(inputs, self.axis)

    def magnitude(self, *radii: Tensor) -> Tensor:
        return torch.cat(radii, self.axis)

    def interval(self, *inputs: Interval) -> Interval:
        return torch.cat([lo for lo, _ in inputs], self.axis), torch.cat([hi for _, hi in inputs], self.axis)

    def adjoint(self, c: Coefficients) -> tuple[Coefficients, ...]:
        if isinstance(c, Neurons):
            c = c.spread()
        if self.axis != 1:
            c = c.dense()
        return tuple(c.replace(part) for part in c.data.split(self.sizes, self.axis + 1))


class AffinePath(Affine):
    """``base + sum_k t_k direction_k`` with an image and directions of each batch entry's own: the prefix through which
    semantic perturbations enter. `base` (N, *shape), `directions` (N, K, *shape); the input is t (N, K)."""

    def __init__(self, base: Tensor, directions: Tensor) -> None:
        self.base, self.directions = base, directions

    def select(self, index: Tensor) -> AffinePath:
        chosen = AffinePath(self.base[index], self.directions[index])
        chosen.path = self.path
        return chosen

    def bias(self) -> Tensor | None:
        return self.base

    def _weigh(self, t: Tensor, directions: Tensor) -> Tensor:
        return (t.reshape(*t.shape, *[1] * (directions.ndim - 2)) * directions).sum(1)

    def linear(self, *inputs: Tensor) -> Tensor:
        return self._weigh(inputs[0], self.directions)

    def magnitude(self, *radii: Tensor) -> Tensor:
        return self._weigh(radii[0], self.directions.abs())

    def adjoint(self, c: Coefficients) -> tuple[Coefficients, ...]:
        rows = [c.dot(self.directions[:, k].expand_as(self.base)) for k in range(self.directions.shape[1])]
        return (Coefficients(torch.stack(rows, -1), c.image, 1),)

    def offset(self, c: Coefficients) -> Tensor | None:
        return c.dot(self.base)
