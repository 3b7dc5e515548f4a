"""From a module to a graph: run it once and record what it does.

The module runs on the real batch under a torch function mode, so any Python control flow, functional forms and shared
modules work, and the shapes are concrete. A step that has no sound bound raises `UnsupportedOperation` with the path of
its module; a value-dependent branch (``if x.sum() > 0``) raises too, because one run cannot show the other branch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from certify.bounds import activations
from certify.bounds.affine import Add, BatchNorm, Cat, Conv2d, Linear, NonNegative, Reshape, Scale
from certify.bounds.graph import Graph, Node
from certify.bounds.op import Op, UnsupportedOperation
from certify.bounds.pooling import MaxPool2d
from certify.bounds.softmax import Softmax

# The operation (None: it changes nothing), the values it reads, and its result where that is known already.
Handled = tuple[Op | None, tuple[Tensor, ...]] | tuple[Op | None, tuple[Tensor, ...], Tensor | None]
Handler = Callable[..., Handled]
HANDLERS: dict[str, Handler] = {}

# What may be asked of a traced value without making a new one.
METADATA = {
    "size", "dim", "ndimension", "numel", "nelement", "stride", "is_floating_point", "is_complex", "is_contiguous",
    "element_size", "get_device", "storage_offset", "__len__", "is_nonzero", "requires_grad_", "is_inference",
    "data_ptr", "type",
}  # fmt: skip
PROPERTIES = {
    "shape", "dtype", "device", "ndim", "requires_grad", "is_cuda", "layout", "is_leaf", "grad_fn", "is_quantized",
    "is_mkldnn", "is_sparse", "is_meta", "is_nested", "names", "is_mps", "is_cpu", "itemsize", "nbytes",
}  # fmt: skip
VALUE_DEPENDENT = {"__bool__", "__float__", "__int__", "item", "tolist", "__index__", "numpy", "is_nonzero"}


def trace(model: nn.Module, x: Tensor, check: bool = True, detach_statistics: bool = False) -> tuple[Graph, Tensor]:
    """The graph of `model` in its present mode, and its output on `x` (N, ...).

    In training mode batch normalisation uses the statistics of this batch, as the forward pass does, and updates its
    running statistics; gradients reach the parameters through the graph's tensors, also by way of those statistics
    unless `detach_statistics` (a third cheaper, and not the gradient of the bound). `check` looks at the weights, and
    holds the graph against the model on `x` (in evaluation mode); a training step leaves both out.

    Raises:
        UnsupportedOperation: for a step without a sound bound, naming it and its module.
        ValueError: for non-finite weights, or a model that mixes the entries of a batch.
    """
    for name, value in [*model.named_parameters(), *model.named_buffers()] if check else []:
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise ValueError(f"{name} holds NaN or infinity; no bound is meaningful. Reload or retrain the model")
    graph, output = _record(model, x, detach_statistics)
    if check and not model.training:
        with torch.no_grad():
            difference = (graph.forward(x) - output).abs().amax().item()
            if not difference <= 1e-3 * (1 + output.abs().amax().item()):
                raise UnsupportedOperation(
                    f"the recorded operations compute something else than the model (off by {difference:.3g}); "
                    "it may write into a tensor that it has a view of, or draw random numbers"
                )
    return graph, output


def _record(model: nn.Module, x: Tensor, detach_statistics: bool) -> tuple[Graph, Tensor]:
    recorder = _Recorder(len(x), detach_statistics)
    x = x.detach()
    recorder.add(None, (), x)
    hooks = []
    for name, module in model.named_modules():
        hooks.append(module.register_forward_pre_hook(recorder.entering(name)))
        hooks.append(module.register_forward_hook(recorder.leaving, always_call=True))
    try:
        with recorder:
            output = model(x)
    finally:
        for hook in hooks:
            hook.remove()
    if not isinstance(output, Tensor):
        raise UnsupportedOperation(f"the model returns {type(output).__name__}; bounds need a single tensor")
    index = recorder.find(output)
    if index is None:
        raise UnsupportedOperation("the output does not depend on the input through operations that were seen")
    return Graph(recorder.nodes, index), output


class _Recorder(TorchFunctionMode):
    """Records a node for every operation on a traced value and lets everything else run."""

    def __init__(self, batch: int, detach_statistics: bool) -> None:
        super().__init__()
        self.batch, self.detach_statistics = batch, detach_statistics
        self.nodes: list[Node] = []
        self._index: dict[int, int] = {}
        self._alive: list[Tensor] = []  # ids stay unique only while the tensors live
        self._version: dict[int, int] = {}  # how often each had been written to when it was recorded
        self._paths: list[str] = [""]

    def entering(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            self._paths.append(name)

        return hook

    def leaving(self, module: nn.Module, args: Any, output: Any) -> None:
        self._paths.pop()

    @property
    def path(self) -> str:
        return self._paths[-1]

    def find(self, value: object) -> int | None:
        """The node of a traced tensor, None for everything else."""
        return self._index.get(id(value)) if isinstance(value, Tensor) else None

    def add(self, op: Op | None, inputs: tuple[int, ...], value: Tensor) -> None:
        if op is not None:
            op.path = self.path
        if value.ndim == 0 or len(value) != self.batch:
            raise ValueError(f"a step in module {self.path!r} does not keep the batch axis first: {tuple(value.shape)}")
        self.nodes.append(Node(op, inputs, tuple(value.shape[1:])))
        self._know(value, len(self.nodes) - 1)

    def _know(self, value: Tensor, index: int) -> None:
        self._index[id(value)] = index
        self._alive.append(value)
        if not value.is_inference():
            self._version[id(value)] = value._version

    def _overwritten(self, value: object) -> bool:
        """Whether a traced tensor has been written to, through another one of its memory, since it was recorded."""
        known = self._version.get(id(value))
        return isinstance(value, Tensor) and known is not None and value._version != known

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", str(func))
        if name == "__get__":
            name = getattr(getattr(func, "__self__", None), "__name__", name)
        traced = any(self.find(v) is not None for v in _flatten((args, kwargs)))
        asks_type = name in ("to", "type_as") and self.find(args[0]) is None  # a constant takes on the input's type
        if not traced or asks_type or name in METADATA or name in PROPERTIES:
            return func(*args, **kwargs)
        if name in VALUE_DEPENDENT:
            raise UnsupportedOperation(
                f"module {self.path!r} looks at the values of its input ({name}); a branch on values cannot be bounded"
            )
        handler = HANDLERS.get(name.rstrip("_") if not name.startswith("__") else name)
        if handler is None:
            raise UnsupportedOperation(
                f"operation {name!r} in module {self.path or '(root)'!r} has no sound bound; "
                f"supported: {', '.join(sorted(k for k in HANDLERS if not k.startswith('__')))}"
            )
        view_write = (
            name.endswith("_")
            and not name.startswith("__")
            and args
            and isinstance(args[0], Tensor)
            and args[0]._is_view()
        )
        if view_write:
            raise UnsupportedOperation(
                f"operation {name!r} in module {self.path!r} writes into a view; use the out-of-place form"
            )
        if any(self._overwritten(v) for v in _flatten((args, kwargs))):
            raise UnsupportedOperation(
                f"operation {name!r} in module {self.path!r} reads a view whose memory was written to after the view "
                "was made; use the out-of-place form of what writes"
            )
        try:
            op, sources, *known = handler(self, *args, **kwargs)
        except TypeError as error:
            raise UnsupportedOperation(
                f"operation {name!r} in module {self.path!r} is called in an unknown form: {error}"
            ) from error
        value = known[0] if known and known[0] is not None else func(*args, **kwargs)
        if op is None:
            source = self.find(sources[0])
            assert source is not None
            self._know(value, source)
        elif isinstance(value, (list, tuple)):
            for position, part in enumerate(value):
                self.add(_piece(op, position), self._sources(sources), part)
        else:
            self.add(op, self._sources(sources), value)
        return value

    def _sources(self, sources: tuple[Tensor, ...]) -> tuple[int, ...]:
        found = tuple(self.find(s) for s in sources)
        assert all(i is not None for i in found)
        return found  # type: ignore[return-value]


def _flatten(value: Any) -> list[Any]:
    if isinstance(value, (list, tuple)):
        return [leaf for item in value for leaf in _flatten(item)]
    if isinstance(value, dict):
        return [leaf for item in value.values() for leaf in _flatten(item)]
    return [value]


def _handles(*names: str) -> Callable[[Handler], Handler]:
    def register(handler: Handler) -> Handler:
        for name in names:
            HANDLERS[name] = handler
        return handler

    return register


def _pair(value: Any) -> tuple[int, int]:
    return (int(value), int(value)) if isinstance(value, int) else (int(value[0]), int(value[-1]))


def _need_constant(recorder: _Recorder, value: Any, what: str) -> None:
    if recorder.find(value) is not None:
        raise UnsupportedOperation(
            f"{what} in module {recorder.path!r} depends on the input; products of inputs have no bound"
        )


def _constant(recorder: _Recorder, value: Any, x: Tensor) -> Tensor:
    """A number or tensor that is combined elementwise with `x`, without its batch axis."""
    value = torch.as_tensor(value, dtype=x.dtype, device=x.device) if not isinstance(value, Tensor) else value.to(x)
    if value.ndim >= x.ndim:
        if value.ndim > x.ndim or value.shape[0] != 1:
            raise UnsupportedOperation(
                f"module {recorder.path!r} combines its input with a constant of shape {tuple(value.shape)}; "
                "the batch axis of a constant must be 1"
            )
        value = value[0]
    return value


@_handles("conv2d")
def _conv2d(
    r: _Recorder, input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0,
    dilation: Any = 1, groups: int = 1,
) -> Handled:  # fmt: skip
    _need_constant(r, weight, "the weight of a convolution")
    stride, dilation = _pair(stride), _pair(dilation)
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:])]
        if any(t % 2 for t in total):
            raise UnsupportedOperation(f"padding='same' with an even kernel in module {r.path!r}; pad explicitly")
        padding = (total[0] // 2, total[1] // 2)
    padding = (0, 0) if padding == "valid" else _pair(padding)
    return Conv2d(weight, bias, stride, padding, dilation, groups, tuple(input.shape[1:])), (input,)


@_handles("linear")
def _linear(r: _Recorder, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Handled:
    _need_constant(r, weight, "the weight of a linear layer")
    return Linear(weight, bias), (input,)


@_handles("matmul", "__matmul__", "mm")
def _matmul(r: _Recorder, input: Tensor, other: Tensor) -> Handled:
    if r.find(input) is None or r.find(other) is not None or other.ndim != 2:
        raise UnsupportedOperation(f"matmul in module {r.path!r} is bounded only as (traced) @ (constant matrix)")
    return Linear(other.t(), None), (input,)


@_handles("addmm")
def _addmm(r: _Recorder, input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1) -> Handled:
    if r.find(mat1) is None or r.find(mat2) is not None or r.find(input) is not None or (beta, alpha) != (1, 1):
        raise UnsupportedOperation(
            f"addmm in module {r.path!r} is bounded only as constant + (traced) @ (constant matrix)"
        )
    return Linear(mat2.t(), input), (mat1,)


@_handles("batch_norm")
def _batch_norm(
    r: _Recorder, input: Tensor, running_mean: Tensor | None, running_var: Tensor | None, weight: Tensor | None = None,
    bias: Tensor | None = None, training: bool = False, momentum: float = 0.1, eps: float = 1e-5,
) -> Handled:  # fmt: skip
    shape = (-1, *[1] * (input.ndim - 2))
    value = None
    if training or running_mean is None or running_var is None:
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


@_handles("relu")
def _relu(r: _Recorder, input: Tensor, inplace: bool = False) -> Handled:
    return activations.ReLU(), (input,)


@_handles("leaky_relu")
def _leaky_relu(r: _Recorder, input: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> Handled:
    return activations.LeakyReLU(negative_slope), (input,)


@_handles("relu6")
def _relu6(r: _Recorder, input: Tensor, inplace: bool = False) -> Handled:
    return activations.Clamp(0.0, 6.0), (input,)


@_handles("hardtanh")
def _hardtanh(
    r: _Recorder, input: Tensor, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False
) -> Handled:
    return activations.Clamp(float(min_val), float(max_val)), (input,)


@_handles("clamp", "clip")
def _clamp(r: _Recorder, input: Tensor, min: Any = None, max: Any = None) -> Handled:
    ends = []
    for value, default in ((min, -math.inf), (max, math.inf)):
        if isinstance(value, Tensor) and value.numel() != 1:
            raise UnsupportedOperation(f"clamp with tensor bounds in module {r.path!r}; use numbers")
        ends.append(default if value is None else float(value))
    return activations.ReLU() if ends == [0.0, math.inf] else activations.Clamp(*ends), (input,)


@_handles("clamp_min")
def _clamp_min(r: _Recorder, input: Tensor, min: Any) -> Handled:
    return _clamp(r, input, min)


@_handles("clamp_max")
def _clamp_max(r: _Recorder, input: Tensor, max: Any) -> Handled:
    return _clamp(r, input, None, max)


@_handles("sigmoid")
def _sigmoid(r: _Recorder, input: Tensor) -> Handled:
    return activations.sigmoid(), (input,)


@_handles("tanh")
def _tanh(r: _Recorder, input: Tensor) -> Handled:
    return activations.tanh(), (input,)


@_handles("softmax")
def _softmax(r: _Recorder, input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: Any = None) -> Handled:
    if dim is None:
        raise UnsupportedOperation(f"softmax without dim in module {r.path!r}; give the axis")
    axis = dim % input.ndim
    if axis == 0:
        raise ValueError(f"softmax over the batch axis in module {r.path!r} mixes the entries of a batch")
    return Softmax(axis), (input,)


@_handles("max_pool2d")
def _max_pool2d(
    r: _Recorder, input: Tensor, kernel_size: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1,
    ceil_mode: bool = False, return_indices: bool = False,
) -> Handled:  # fmt: skip
    if return_indices:
        raise UnsupportedOperation(f"max_pool2d with return_indices in module {r.path!r}")
    kernel = _pair(kernel_size)
    stride = kernel if stride is None or stride == [] else _pair(stride)
    return MaxPool2d(kernel, stride, _pair(padding), _pair(dilation), ceil_mode, tuple(input.shape[1:])), (input,)


@_handles("avg_pool2d")
def _avg_pool2d(
    r: _Recorder, input: Tensor, kernel_size: Any, stride: Any = None, padding: Any = 0, ceil_mode: bool = False,
    count_include_pad: bool = True, divisor_override: int | None = None,
) -> Handled:  # fmt: skip
    def pool(v: Tensor) -> Tensor:
        return F.avg_pool2d(v, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)

    return NonNegative(pool, tuple(input.shape[1:]), "avg_pool2d"), (input,)


@_handles("adaptive_avg_pool2d")
def _adaptive_avg_pool2d(r: _Recorder, input: Tensor, output_size: Any) -> Handled:
    return NonNegative(
        lambda v: F.adaptive_avg_pool2d(v, output_size), tuple(input.shape[1:]), "adaptive_avg_pool2d"
    ), (input,)


def _axes(r: _Recorder, dim: Any, input: Tensor) -> tuple[int, ...]:
    axes = (
        tuple(range(input.ndim))
        if dim is None
        else tuple(d % input.ndim for d in ((dim,) if isinstance(dim, int) else dim))
    )
    if 0 in axes:
        raise ValueError(f"a mean or sum over the batch axis in module {r.path!r} mixes the entries of a batch")
    return axes


@_handles("mean")
def _mean(r: _Recorder, input: Tensor, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> Handled:
    axes = _axes(r, dim, input)
    return NonNegative(lambda v: v.mean(axes, keepdim), tuple(input.shape[1:]), "mean"), (input,)


@_handles("sum")
def _sum(r: _Recorder, input: Tensor, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> Handled:
    axes = _axes(r, dim, input)
    return NonNegative(lambda v: v.sum(axes, keepdim), tuple(input.shape[1:]), "sum"), (input,)


@_handles("dropout", "dropout1d", "dropout2d", "feature_dropout", "alpha_dropout")
def _dropout(r: _Recorder, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Handled:
    if training and p > 0:
        raise UnsupportedOperation(
            f"dropout in module {r.path!r} is active; its random mask has no bound. Call model.eval() or set p = 0"
        )
    return None, (input,)


@_handles("identity", "contiguous", "clone", "to", "float", "double", "detach", "alias")
def _identity(r: _Recorder, input: Tensor, *args: Any, **kwargs: Any) -> Handled:
    return None, (input,)


def _blank(input: Tensor) -> Tensor:
    """A tensor of the same shape and no size, to read off what a reshape does."""
    return torch.empty(()).expand(input.shape)


def _merged(r: _Recorder, input: Tensor, after: tuple[int, ...]) -> Handled:
    if not after or after[0] != len(input):
        raise ValueError(
            f"a reshape in module {r.path!r} does not keep the batch axis: {tuple(input.shape)} to {after}"
        )
    return Reshape(tuple(input.shape[1:]), after[1:]), (input,)


@_handles("flatten")
def _flatten_op(r: _Recorder, input: Tensor, start_dim: int = 0, end_dim: int = -1) -> Handled:
    return _merged(r, input, tuple(_blank(input).flatten(start_dim, end_dim).shape))


@_handles("view", "reshape")
def _view(r: _Recorder, input: Tensor, *shape: Any) -> Handled:
    size = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
    return _merged(r, input, tuple(_blank(input).reshape(size).shape))


@_handles("squeeze")
def _squeeze(r: _Recorder, input: Tensor, dim: Any = None) -> Handled:
    if dim is None and len(input) == 1:
        raise UnsupportedOperation(f"squeeze() without dim in module {r.path!r} may drop the batch axis; give the axis")
    empty = _blank(input)
    return _merged(r, input, tuple((empty.squeeze() if dim is None else empty.squeeze(dim)).shape))


@_handles("unsqueeze")
def _unsqueeze(r: _Recorder, input: Tensor, dim: int) -> Handled:
    return _merged(r, input, tuple(_blank(input).unsqueeze(dim).shape))


@_handles("permute")
def _permute(r: _Recorder, input: Tensor, *dims: Any) -> Handled:
    order = tuple(d % input.ndim for d in (dims[0] if len(dims) == 1 and not isinstance(dims[0], int) else dims))
    if order[0] != 0:
        raise ValueError(f"a permutation in module {r.path!r} moves the batch axis")
    return NonNegative(lambda v: v.permute(order), tuple(input.shape[1:]), "permute"), (input,)


@_handles("transpose", "swapaxes")
def _transpose(r: _Recorder, input: Tensor, dim0: int, dim1: int) -> Handled:
    order = list(range(input.ndim))
    a, b = dim0 % input.ndim, dim1 % input.ndim
    order[a], order[b] = order[b], order[a]
    return _permute(r, input, order)


@_handles("pad")
def _pad(r: _Recorder, input: Tensor, pad: Any, mode: str = "constant", value: float | None = None) -> Handled:
    pad = tuple(int(p) for p in pad)
    if mode == "constant" and value not in (None, 0, 0.0):
        raise UnsupportedOperation(
            f"padding with {value} in module {r.path!r}; only zero padding and mode='replicate'/'reflect' are bounded"
        )
    if len(pad) > 2 * (input.ndim - 1):
        raise ValueError(f"padding in module {r.path!r} changes the batch axis")
    return NonNegative(lambda v: F.pad(v, pad, mode=mode), tuple(input.shape[1:]), "pad"), (input,)


@_handles("getitem", "__getitem__")
def _getitem(r: _Recorder, input: Tensor, index: Any) -> Handled:
    first = index[0] if isinstance(index, tuple) and index else index
    if not (first is Ellipsis or first == slice(None)):
        raise ValueError(f"indexing in module {r.path!r} does not keep the whole batch axis: {index!r}")
    return NonNegative(lambda v: v[index], tuple(input.shape[1:]), "indexing"), (input,)


@_handles("chunk", "tensor_split")
def _chunk(r: _Recorder, input: Tensor, chunks: Any, dim: int = 0) -> Handled:
    return _pieces(r, input, "chunk", chunks, dim)


@_handles("split")
def _split(r: _Recorder, input: Tensor, split_size_or_sections: Any, dim: int = 0) -> Handled:
    return _pieces(r, input, "split", split_size_or_sections, dim)


@_handles("unbind")
def _unbind(r: _Recorder, input: Tensor, dim: int = 0) -> Handled:
    return _pieces(r, input, "unbind", dim)


def _pieces(r: _Recorder, input: Tensor, name: str, *arguments: Any) -> Handled:
    if arguments[-1] % input.ndim == 0:
        raise ValueError(f"{name} in module {r.path!r} cuts the batch axis")
    return NonNegative(lambda v: getattr(v, name)(*arguments), tuple(input.shape[1:]), name), (input,)


def _piece(op: Op, position: int) -> Op:
    """One of the results of an operation that returns several."""
    assert isinstance(op, NonNegative)
    return NonNegative(lambda v: op.function(v)[position], op.before, op.name)


@_handles("cat", "concat", "concatenate")
def _cat(r: _Recorder, tensors: Any, dim: int = 0) -> Handled:
    tensors = tuple(tensors)
    if any(r.find(t) is None for t in tensors):
        raise UnsupportedOperation(f"concatenation with a constant in module {r.path!r}")
    axis = dim % tensors[0].ndim
    if axis == 0:
        raise ValueError(f"concatenation along the batch axis in module {r.path!r}")
    return Cat(axis, tuple(t.shape[axis] for t in tensors)), tensors


def _sum_of(r: _Recorder, a: Any, b: Any, sign: float) -> Handled:
    if r.find(a) is not None and r.find(b) is not None:
        if a.ndim != b.ndim:
            raise UnsupportedOperation(f"a sum in module {r.path!r} broadcasts over the batch axis")
        return Add((tuple(a.shape[1:]), tuple(b.shape[1:])), sign), (a, b)
    if r.find(a) is not None:
        return _shifted(r, a, None, sign * _constant(r, b, a))
    return _shifted(r, b, torch.as_tensor(sign, dtype=b.dtype, device=b.device), _constant(r, a, b))


def _shifted(r: _Recorder, x: Tensor, scale: Tensor | None, shift: Tensor) -> Handled:
    if np.broadcast_shapes(shift.shape, x.shape[1:]) != x.shape[1:]:
        raise UnsupportedOperation(
            f"a sum in module {r.path!r} broadcasts its input from {tuple(x.shape[1:])} to a larger shape"
        )
    return Scale(None if scale is not None and scale.ndim == 0 and float(scale) == 1 else scale, shift), (x,)


@_handles("add", "__add__", "__radd__", "__iadd__")
def _add(r: _Recorder, input: Any, other: Any, *, alpha: float = 1) -> Handled:
    if alpha != 1:
        raise UnsupportedOperation(f"add with alpha={alpha} in module {r.path!r}")
    return _sum_of(r, input, other, 1.0)


@_handles("sub", "subtract", "__sub__", "__isub__")
def _sub(r: _Recorder, input: Any, other: Any, *, alpha: float = 1) -> Handled:
    if alpha != 1:
        raise UnsupportedOperation(f"sub with alpha={alpha} in module {r.path!r}")
    return _sum_of(r, input, other, -1.0)


@_handles("rsub", "__rsub__")
def _rsub(r: _Recorder, input: Any, other: Any) -> Handled:
    return _sum_of(r, other, input, -1.0)


@_handles("mul", "multiply", "__mul__", "__rmul__", "__imul__")
def _mul(r: _Recorder, input: Any, other: Any) -> Handled:
    x, factor = (input, other) if r.find(input) is not None else (other, input)
    _need_constant(r, factor, "a product")
    return _scaled(r, x, _constant(r, factor, x))


@_handles("div", "true_divide", "__truediv__", "__itruediv__")
def _div(r: _Recorder, input: Any, other: Any, *, rounding_mode: str | None = None) -> Handled:
    if rounding_mode is not None or r.find(input) is None:
        raise UnsupportedOperation(f"division in module {r.path!r} is bounded only as (traced) / (constant)")
    _need_constant(r, other, "a divisor")
    return _scaled(r, input, 1 / _constant(r, other, input))


def _scaled(r: _Recorder, x: Tensor, factor: Tensor) -> Handled:
    if np.broadcast_shapes(factor.shape, x.shape[1:]) != x.shape[1:]:
        raise UnsupportedOperation(
            f"a product in module {r.path!r} broadcasts its input from {tuple(x.shape[1:])} to a larger shape"
        )
    return Scale(factor, None), (x,)


@_handles("neg", "negative", "__neg__")
def _neg(r: _Recorder, input: Tensor) -> Handled:
    return Scale(torch.tensor(-1.0, dtype=input.dtype, device=input.device), None), (input,)
