"""How the layers of a network hang together, read from a symbolic trace (torch.fx) without running it.

Two questions matter to structured pruning: which per-channel tensors belong to an output channel of a convolution or
linear layer (`tied_tensors`), and which layers produce the network's outputs (`output_layers`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)

# Modules, functions and methods that keep channels apart and map a zero channel to zero.
_ZERO_MODULES = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Hardswish, nn.Tanh, nn.Identity,
    nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d,
    nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.Flatten,
)  # fmt: skip
_ZERO_FUNCTIONS: tuple[Callable[..., object], ...] = (
    F.relu, torch.relu, F.relu6, F.leaky_relu, F.elu, F.gelu, F.silu, F.hardswish, F.tanh, torch.tanh, F.dropout,
    F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d, torch.flatten,
)  # fmt: skip
_ZERO_METHODS = ("relu", "relu_", "tanh", "contiguous", "flatten", "view", "reshape", "squeeze")


class WiringError(ValueError):
    """The network's structure cannot be read."""


@dataclasses.dataclass(frozen=True)
class Member:
    """Rows of one weight that belong to a `ChannelGroup`: row ``rows[i]`` is part of the group's unit ``units[i]``."""

    weight: str
    rows: tuple[int, ...]
    units: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class ChannelGroup:
    """Output channels that can only be removed together (residual additions, depthwise convolutions).

    Attributes:
        channels: number of coupled channels, the units that are removed as one.
        members: the convolution and linear weights that produce them.
    """

    channels: int
    members: tuple[Member, ...]


class _Tracer(fx.Tracer):
    """Leaves layers and normalisations whole, so that subclasses with code of their own are recognised too."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, (*LAYERS, _BatchNorm)) or super().is_leaf_module(m, module_qualified_name)


def _trace(model: nn.Module) -> fx.Graph:
    try:
        return _Tracer().trace(model)
    except Exception as error:  # tracing runs the user's forward, which may raise anything
        raise WiringError(
            f"structured masks need the order of layers, but torch.fx cannot trace {type(model).__name__}: {error}. "
            "Rewrite control flow that depends on tensor values, wrap it with torch.fx.wrap, or use unstructured masks"
        ) from error


def _keeps_zero(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    if node.op == "call_module":
        return isinstance(modules[str(node.target)], _ZERO_MODULES)
    if node.op == "call_function":
        return node.target in _ZERO_FUNCTIONS
    return node.op == "call_method" and node.target in _ZERO_METHODS


def tied_tensors(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Layer path -> names of the (out_channels,) parameters and buffers that belong to its output channels.

    These are the layer's own bias and the ``weight``, ``bias`` and ``running_mean`` of every batch normalisation that
    reads this layer alone (directly or through activations and pooling). With all of them zero, a channel whose weights
    are zero is zero behind the normalisation as well, in train and eval mode.

    Raises:
        WiringError: torch.fx cannot trace the network.
    """
    modules = dict(model.named_modules())
    ties: dict[str, list[str]] = {}
    for path, module in modules.items():
        if isinstance(module, LAYERS) and module.bias is not None:
            ties[path] = [f"{path}.bias" if path else "bias"]
    if not any(isinstance(module, _BatchNorm) for module in modules.values()):
        return {path: tuple(names) for path, names in ties.items()}
    sources: dict[str, set[str]] = {}
    for node in _trace(model).nodes:
        if node.op != "call_module" or not isinstance(modules.get(str(node.target)), _BatchNorm):
            continue
        origin = node.args[0] if node.args else node.kwargs.get("input")
        while isinstance(origin, fx.Node) and _keeps_zero(origin, modules) and origin.args:
            origin = origin.args[0]
        found = isinstance(origin, fx.Node) and origin.op == "call_module"
        sources.setdefault(str(node.target), set()).add(str(origin.target) if found else "")
    for path, origins in sources.items():
        norm, layer = modules[path], modules.get(next(iter(origins)))
        if len(origins) != 1 or not isinstance(layer, LAYERS) or layer.weight.shape[0] != norm.num_features:
            continue  # fed by a sum, by a concatenation or by several layers: no single layer owns its channels
        for name in ("weight", "bias", "running_mean"):
            if getattr(norm, name) is not None:
                ties.setdefault(next(iter(origins)), []).append(f"{path}.{name}")
    return {path: tuple(names) for path, names in ties.items()}


def output_layers(model: nn.Module) -> frozenset[str]:
    """Paths of the layers whose output reaches the network's output with no other layer in between.

    Raises:
        WiringError: torch.fx cannot trace the network.
    """
    modules = dict(model.named_modules())
    if isinstance(model, LAYERS):
        return frozenset({""})
    graph = _trace(model)
    pending = [node for node in graph.nodes if node.op == "output"]
    seen: set[fx.Node] = set(pending)
    found: set[str] = set()
    while pending:
        for node in pending.pop().all_input_nodes:
            if node in seen:
                continue
            seen.add(node)
            if node.op == "call_module" and isinstance(modules[str(node.target)], LAYERS):
                found.add(str(node.target))
            elif node.target is not getattr and node.target not in ("size", "dim"):  # shapes carry no values
                pending.append(node)
    return frozenset(found)
