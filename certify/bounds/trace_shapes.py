"""Tracing rules for what moves numbers around: reshaping, permuting, padding, indexing, splitting, concatenation."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from certify.bounds.affine import Cat, NonNegative, Reshape
from certify.bounds.op import Op, UnsupportedOperation
from certify.bounds.trace_rules import Handled, Handlers, Recording

HANDLERS = Handlers()


def _blank(input: Tensor) -> Tensor:
    """A tensor of the same shape and no size, to read off what a reshape does."""
    return torch.empty(()).expand(input.shape)


def _merged(r: Recording, input: Tensor, after: tuple[int, ...]) -> Handled:
    if not after or after[0] != len(input):
        raise ValueError(
            f"a reshape in module {r.path!r} does not keep the batch axis: {tuple(input.shape)} to {after}"
        )
    return Reshape(tuple(input.shape[1:]), after[1:]), (input,)


@HANDLERS.handles("flatten")
def _flatten_op(r: Recording, input: Tensor, start_dim: int = 0, end_dim: int = -1) -> Handled:
    return _merged(r, input, tuple(_blank(input).flatten(start_dim, end_dim).shape))


@HANDLERS.handles("view", "reshape")
def _view(r: Recording, input: Tensor, *shape: Any) -> Handled:
    size = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
    return _merged(r, input, tuple(_blank(input).reshape(size).shape))


@HANDLERS.handles("squeeze")
def _squeeze(r: Recording, input: Tensor, dim: Any = None) -> Handled:
    if dim is None and len(input) == 1:
        raise UnsupportedOperation(f"squeeze() without dim in module {r.path!r} may drop the batch axis; give the axis")
    empty = _blank(input)
    return _merged(r, input, tuple((empty.squeeze() if dim is None else empty.squeeze(dim)).shape))


@HANDLERS.handles("unsqueeze")
def _unsqueeze(r: Recording, input: Tensor, dim: int) -> Handled:
    return _merged(r, input, tuple(_blank(input).unsqueeze(dim).shape))


@HANDLERS.handles("permute")
def _permute(r: Recording, input: Tensor, *dims: Any) -> Handled:
    order = tuple(d % input.ndim for d in (dims[0] if len(dims) == 1 and not isinstance(dims[0], int) else dims))
    if order[0] != 0:
        raise ValueError(f"a permutation in module {r.path!r} moves the batch axis")
    return NonNegative(lambda v: v.permute(order), tuple(input.shape[1:]), "permute"), (input,)


@HANDLERS.handles("transpose", "swapaxes")
def _transpose(r: Recording, input: Tensor, dim0: int, dim1: int) -> Handled:
    order = list(range(input.ndim))
    a, b = dim0 % input.ndim, dim1 % input.ndim
    order[a], order[b] = order[b], order[a]
    return _permute(r, input, order)


@HANDLERS.handles("pad")
def _pad(r: Recording, input: Tensor, pad: Any, mode: str = "constant", value: float | None = None) -> Handled:
    pad = tuple(int(p) for p in pad)
    if mode == "constant" and value not in (None, 0, 0.0):
        raise UnsupportedOperation(
            f"padding with {value} in module {r.path!r}; only zero padding and mode='replicate'/'reflect' are bounded"
        )
    if len(pad) > 2 * (input.ndim - 1):
        raise ValueError(f"padding in module {r.path!r} changes the batch axis")
    return NonNegative(lambda v: F.pad(v, pad, mode=mode), tuple(input.shape[1:]), "pad"), (input,)


@HANDLERS.handles("getitem", "__getitem__")
def _getitem(r: Recording, input: Tensor, index: Any) -> Handled:
    first = index[0] if isinstance(index, tuple) and index else index
    if not (first is Ellipsis or first == slice(None)):
        raise ValueError(f"indexing in module {r.path!r} does not keep the whole batch axis: {index!r}")
    return NonNegative(lambda v: v[index], tuple(input.shape[1:]), "indexing"), (input,)


@HANDLERS.handles("chunk")
def _chunk(r: Recording, input: Tensor, chunks: Any, dim: int = 0) -> Handled:
    return _pieces(r, input, "chunk", chunks, dim)


@HANDLERS.handles("split")
def _split(r: Recording, input: Tensor, split_size_or_sections: Any, dim: int = 0) -> Handled:
    return _pieces(r, input, "split", split_size_or_sections, dim)


@HANDLERS.handles("unbind")
def _unbind(r: Recording, input: Tensor, dim: int = 0) -> Handled:
    return _pieces(r, input, "unbind", dim)


def _pieces(r: Recording, input: Tensor, name: str, *arguments: Any) -> Handled:
    if arguments[-1] % input.ndim == 0:
        raise ValueError(f"{name} in module {r.path!r} cuts the batch axis")
    return NonNegative(lambda v: getattr(v, name)(*arguments), tuple(input.shape[1:]), name), (input,)


def piece(op: Op, position: int) -> Op:
    """One of the results of an operation that returns several."""
    assert isinstance(op, NonNegative)
    return NonNegative(lambda v: op.function(v)[position], op.before, op.name)


@HANDLERS.handles("cat", "concat", "concatenate")
def _cat(r: Recording, tensors: Any, dim: int = 0) -> Handled:
    tensors = tuple(tensors)
    if any(r.find(t) is None for t in tensors):
        raise UnsupportedOperation(f"concatenation with a constant in module {r.path!r}")
    axis = dim % tensors[0].ndim
    if axis == 0:
        raise ValueError(f"concatenation along the batch axis in module {r.path!r}")
    return Cat(axis, tuple(t.shape[axis] for t in tensors)), tensors
