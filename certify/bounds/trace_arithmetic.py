"""Tracing rules for arithmetic: sums of values, sums and products with constants."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from certify.arithmetic import constant
from certify.bounds.affine import Add, Scale
from certify.bounds.op import UnsupportedOperation
from certify.bounds.trace_rules import Handled, Handlers, Recording, need_constant

HANDLERS = Handlers()


def _constant(recording: Recording, value: Any, x: Tensor) -> Tensor:
    """A number or tensor that is combined elementwise with `x`, without its batch axis."""
    known = isinstance(value, Tensor | int | float)
    value = constant(value, x) if known else torch.as_tensor(value, dtype=x.dtype, device=x.device)
    if value.ndim >= x.ndim:
        if value.ndim > x.ndim or value.shape[0] != 1:
            raise UnsupportedOperation(
                f"module {recording.path!r} combines its input with a constant of shape {tuple(value.shape)}; "
                "the batch axis of a constant must be 1"
            )
        value = value[0]
    return value


def _sum_of(r: Recording, a: Any, b: Any, sign: float) -> Handled:
    if r.find(a) is not None and r.find(b) is not None:
        if a.ndim != b.ndim:
            raise UnsupportedOperation(f"a sum in module {r.path!r} broadcasts over the batch axis")
        return Add((tuple(a.shape[1:]), tuple(b.shape[1:])), sign), (a, b)
    if r.find(a) is not None:
        return _shifted(r, a, 1.0, sign * _constant(r, b, a))
    return _shifted(r, b, sign, _constant(r, a, b))


def _shifted(r: Recording, x: Tensor, sign: float, shift: Tensor) -> Handled:
    if np.broadcast_shapes(shift.shape, x.shape[1:]) != x.shape[1:]:
        raise UnsupportedOperation(
            f"a sum in module {r.path!r} broadcasts its input from {tuple(x.shape[1:])} to a larger shape"
        )
    return Scale(None if sign == 1 else constant(sign, x), shift), (x,)


@HANDLERS.handles("add", "__add__", "__radd__", "__iadd__")
def _add(r: Recording, input: Any, other: Any, *, alpha: float = 1) -> Handled:
    if alpha != 1:
        raise UnsupportedOperation(f"add with alpha={alpha} in module {r.path!r}")
    return _sum_of(r, input, other, 1.0)


@HANDLERS.handles("sub", "subtract", "__sub__", "__isub__")
def _sub(r: Recording, input: Any, other: Any, *, alpha: float = 1) -> Handled:
    if alpha != 1:
        raise UnsupportedOperation(f"sub with alpha={alpha} in module {r.path!r}")
    return _sum_of(r, input, other, -1.0)


@HANDLERS.handles("rsub", "__rsub__")
def _rsub(r: Recording, input: Any, other: Any) -> Handled:
    return _sum_of(r, other, input, -1.0)


@HANDLERS.handles("mul", "multiply", "__mul__", "__rmul__", "__imul__")
def _mul(r: Recording, input: Any, other: Any) -> Handled:
    x, factor = (input, other) if r.find(input) is not None else (other, input)
    need_constant(r, factor, "a product")
    return _scaled(r, x, _constant(r, factor, x))


@HANDLERS.handles("div", "true_divide", "__truediv__", "__itruediv__")
def _div(r: Recording, input: Any, other: Any, *, rounding_mode: str | None = None) -> Handled:
    if rounding_mode is not None or r.find(input) is None:
        raise UnsupportedOperation(f"division in module {r.path!r} is bounded only as (traced) / (constant)")
    need_constant(r, other, "a divisor")
    return _scaled(r, input, 1 / _constant(r, other, input))


def _scaled(r: Recording, x: Tensor, factor: Tensor) -> Handled:
    if np.broadcast_shapes(factor.shape, x.shape[1:]) != x.shape[1:]:
        raise UnsupportedOperation(
            f"a product in module {r.path!r} broadcasts its input from {tuple(x.shape[1:])} to a larger shape"
        )
    return Scale(factor, None), (x,)


@HANDLERS.handles("neg", "negative", "__neg__")
def _neg(r: Recording, input: Tensor) -> Handled:
    return Scale(constant(-1.0, input), None), (input,)
