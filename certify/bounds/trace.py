"""From a module to a graph: run it once and record what it does.

The module runs on the real batch under a torch function mode, so any Python control flow, functional forms and shared
modules work, and the shapes are concrete. A step that has no sound bound raises `UnsupportedOperation` with the path of
its module; a value-dependent branch (``if x.sum() > 0``) raises too, because one run cannot show the other branch.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from certify.bounds import trace_arithmetic, trace_layers, trace_shapes
from certify.bounds.graph import Graph, Node
from certify.bounds.op import Op, UnsupportedOperation
from certify.bounds.trace_rules import Handler

# What each function does to its input, by name.
HANDLERS: dict[str, Handler] = {**trace_layers.HANDLERS, **trace_shapes.HANDLERS, **trace_arithmetic.HANDLERS}

# What may be asked of a traced value without making a new one.
METADATA = {
    "size", "dim", "ndimension", "numel", "nelement", "stride", "is_floating_point", "is_complex", "is_contiguous",
    "element_size", "get_device", "storage_offset", "__len__", "is_nonzero", "requires_grad_", "is_inference",
    "data_ptr",
}  # fmt: skip
PROPERTIES = {
    "shape", "dtype", "device", "ndim", "requires_grad", "is_cuda", "layout", "is_leaf", "grad_fn", "is_quantized",
    "is_mkldnn", "is_sparse", "is_meta", "is_nested", "names", "is_mps", "is_cpu", "itemsize", "nbytes",
}  # fmt: skip
POINTS = 4
_CHECKED: WeakKeyDictionary[nn.Module, Hashable] = WeakKeyDictionary()
"""Models that have been held against their graphs on other images, and in which state."""

VALUE_DEPENDENT = {"__bool__", "__float__", "__int__", "item", "tolist", "__index__", "numpy", "is_nonzero"}


def trace(model: nn.Module, x: Tensor, check: bool = True, detach_statistics: bool = False) -> tuple[Graph, Tensor]:
    """The graph of `model` in its present mode, and its output on `x` (N, ...).

    In training mode batch normalisation uses the statistics of this batch, as the forward pass does, and updates its
    running statistics; gradients reach the parameters through the graph's tensors, also by way of those statistics
    unless `detach_statistics` (a third cheaper, and not the gradient of the bound). `check` looks at the weights, and
    (in evaluation mode) holds the graph against the model, on `x` and, once for a model as it is, on other images: what
    escapes the recorder, or is drawn at random, is a constant of the graph that only those tell. A training step leaves
    both out.

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
            _agree(graph.forward(x), output)
            state = _state(model, x, graph)
            if state is None or _CHECKED.get(model) != state:
                if state is not None and not torch.is_inference_mode_enabled():
                    _watch(model, x[:1])
                for points in _elsewhere(x[:POINTS]):
                    _agree(graph.select(torch.arange(len(points), device=x.device)).forward(points), model(points))
                if state is not None:
                    _CHECKED[model] = state
    return graph, output


def _agree(found: Tensor, wanted: Tensor) -> None:
    same = (found == wanted) | (found.isnan() & wanted.isnan())  # where both overflow
    difference = (found - wanted).abs().masked_fill(same, 0.0).amax().item()
    if not difference <= 1e-4 * (1 + wanted.nan_to_num(0.0, 0.0, 0.0).abs().amax().item()):
        raise UnsupportedOperation(
            f"the recorded operations compute something else than the model (off by {difference:.3g}); it may compute "
            "with values that are not seen (torch.jit, torch.vmap, a new Parameter), write into a tensor that it has a "
            "view of, or draw random numbers"
        )


def _watch(model: nn.Module, x: Tensor) -> None:
    """Record once more, for one image (1, ...), with the eyes of autograd on what the recorder takes for constants."""
    with torch.enable_grad():
        leaf = x.detach().clone().requires_grad_()
        _record(model, leaf.clone(), False, leaf)  # a copy, which the model may write into


def _elsewhere(x: Tensor) -> Iterator[Tensor]:
    """Other images than `x` (N, ...), in the range of its values."""
    generator = torch.Generator().manual_seed(0)
    low, high = x.amin(), x.amax()
    high = torch.where(high > low, high, low + 1)
    yield low + high - x
    for _ in range(3):
        yield low + (high - low) * torch.rand(x.shape, generator=generator).to(x)


def _state(model: nn.Module, x: Tensor, graph: Graph) -> Hashable | None:
    """What changes when weights are replaced or written to, or steps exchanged; None where that cannot be told."""
    values = [*model.parameters(), *model.buffers()]
    if any(value.is_inference() for value in values):
        return None
    steps = tuple((type(node.op), node.inputs, node.shape) for node in graph.nodes)
    return tuple((v.data_ptr(), v._version) for v in values), steps, x.dtype, x.device


def _record(model: nn.Module, x: Tensor, detach_statistics: bool, leaf: Tensor | None = None) -> tuple[Graph, Tensor]:
    recorder = _Recorder(len(x), detach_statistics, model.training, leaf)
    x = x.detach() if leaf is None else x
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
    """Records a node for every operation on a traced value and lets everything else run.

    With a ``leaf`` that the input was made from under autograd, constants that depend on it all the same are refused.
    """

    def __init__(self, batch: int, detach_statistics: bool, training: bool, leaf: Tensor | None = None) -> None:
        super().__init__()
        self.leaf = leaf
        self._memory: set[int] = set()  # of traced values, kept only with a leaf
        self.batch, self.detach_statistics, self.training = batch, detach_statistics, training
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
        if self.leaf is not None:
            self._memory.add(value.untyped_storage().data_ptr())
        if not value.is_inference():
            self._version[id(value)] = value._version

    def _overwritten(self, value: object) -> bool:
        """Whether a traced tensor has been written to, through another one of its memory, since it was recorded."""
        known = self._version.get(id(value))
        return isinstance(value, Tensor) and known is not None and value._version != known

    def _escaped(self, value: object) -> bool:
        """Whether something that looks like a constant was made from the input, or holds it."""
        if not isinstance(value, Tensor) or self.find(value) is not None:
            return False
        if self._shares(value):
            return True
        ahead, seen = [value.grad_fn], set()
        while ahead:
            function = ahead.pop()
            if function is None or function in seen:
                continue
            variable = getattr(function, "variable", None)
            if variable is not None and (variable is self.leaf or self._shares(variable)):
                return True
            seen.add(function)
            ahead += [before for before, _ in function.next_functions]
        return False

    def _shares(self, value: Tensor) -> bool:
        """Whether a tensor lies in the memory of a traced one."""
        return value.numel() > 0 and value.untyped_storage().data_ptr() in self._memory

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", str(func))
        if name == "__get__":
            name = getattr(getattr(func, "__self__", None), "__name__", name)
        traced = any(self.find(v) is not None for v in _flatten((args, kwargs)))
        asks_type = name in ("to", "type_as") and self.find(args[0]) is None  # a constant takes on the input's type
        if not traced or asks_type or name in METADATA or name in PROPERTIES:
            return func(*args, **kwargs)
        if torch.is_autocast_enabled(_device_type(args, kwargs)):
            raise UnsupportedOperation(
                f"module {self.path!r} runs under autocast, which rounds to half precision; bounds are made for "
                "float32 and float64"
            )
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
        if self.leaf is not None and any(self._escaped(v) for v in _flatten((args, kwargs))):
            raise UnsupportedOperation(
                f"operation {name!r} in module {self.path!r} reads a value that was computed from the input "
                "by a step that is not seen (torch.jit, torch.vmap, a new Parameter, a subclass of Tensor)"
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
            self._keeps_values(name, sources[0], value)
            self._know(value, source)
        elif isinstance(value, (list, tuple)):
            for position, part in enumerate(value):
                self.add(trace_shapes.piece(op, position), self._sources(sources), part)
        else:
            self.add(op, self._sources(sources), value)
        return value

    def _keeps_values(self, name: str, before: Tensor, after: Tensor) -> None:
        """A change of type must not round by more than float32 does."""
        narrow = not after.is_floating_point() or torch.finfo(after.dtype).bits < 32
        if narrow and after.dtype != before.dtype:
            raise UnsupportedOperation(
                f"{name!r} in module {self.path!r} rounds its input to {after.dtype}; bounds are made for float32 and "
                "float64"
            )

    def _sources(self, sources: tuple[Tensor, ...]) -> tuple[int, ...]:
        found = tuple(self.find(s) for s in sources)
        assert all(i is not None for i in found)
        return found  # type: ignore[return-value]


def _device_type(*values: Any) -> str:
    return next(value.device.type for value in _flatten(values) if isinstance(value, Tensor))


def _flatten(value: Any) -> list[Any]:
    if isinstance(value, (list, tuple)):
        return [leaf for item in value for leaf in _flatten(item)]
    if isinstance(value, dict):
        return [leaf for item in value.values() for leaf in _flatten(item)]
    return [value]
