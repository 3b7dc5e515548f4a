"""Coupled channels and their physical removal: the only user of torch-pruning.

torch-pruning (Fang et al., "DepGraph: Towards Any Structural Pruning", CVPR 2023) traces which channels must be cut
together: the summands of a residual addition, a depthwise convolution and its input, the slices of a concatenation.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from certify.arithmetic import full_float32
from methods.wiring import LAYERS, ChannelGroup, Member, output_layers

if TYPE_CHECKING:
    from methods.masks import Mask

# Relative to the largest output: what removal may change through another order of float32 summation.
TOLERANCE = 1e-4


@dataclasses.dataclass(frozen=True)
class Removal:
    """What `remove` did.

    Attributes:
        before: output channels of each layer that was or should have been shrunk.
        after: output channels left.
        stayed: layer -> why channels that the mask removes are still there.
        difference: largest absolute difference of the outputs from the masked network's on the example.
    """

    before: dict[str, int]
    after: dict[str, int]
    stayed: dict[str, str]
    difference: float


@dataclasses.dataclass(frozen=True)
class _Found:
    """A `ChannelGroup`, and how to find it again in the dependency graph it came from."""

    group: ChannelGroup
    root: nn.Module
    prune: Any
    norms: tuple[Member, ...]


def _check_example(model: nn.Module, example: Tensor) -> Tensor:
    if not isinstance(example, Tensor) or not example.is_floating_point() or example.ndim < 2 or len(example) == 0:
        what = f"{example.dtype} {tuple(example.shape)}" if isinstance(example, Tensor) else type(example).__name__
        raise ValueError(f"example must be a float batch such as (1, C, H, W), got {what}")
    first = next(model.parameters(), None)
    return example.detach() if first is None else example.detach().to(first.device, first.dtype)


def _graph(model: nn.Module, example: Tensor) -> Any:
    """The dependency graph of `model`, which is left in eval mode with gradients on: pass a copy."""
    import torch_pruning

    model.eval()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    with torch.enable_grad():
        return torch_pruning.DependencyGraph().build_dependency(model, example_inputs=example[:1], verbose=False)


def _found(graph: Any, model: nn.Module) -> list[_Found]:
    """Every group of channels that can be cut: all producers are plain or depthwise layers and someone reads them."""
    paths = {module: path for path, module in model.named_modules()}
    outputs = output_layers(model)
    found = []
    for items in graph.get_all_groups(root_module_types=list(LAYERS)):
        members: list[Member] = []
        norms: list[Member] = []
        cuttable, read = True, False
        for item in items:
            module, cuts_output = item.dep.target.module, graph.is_out_channel_pruning_fn(item.dep.handler)
            if isinstance(module, LAYERS):
                grouped = isinstance(module, nn.modules.conv._ConvNd) and module.groups > 1
                if grouped and not module.groups == module.in_channels == module.out_channels:
                    cuttable = False
                if cuts_output:
                    cuttable &= paths[module] not in outputs
                    weight = f"{paths[module]}.weight"
                    members.append(Member(weight, tuple(item.idxs), tuple(item.root_idxs)))
                else:
                    read = True
            elif getattr(module, "concat_sizes", None) is not None and module.offsets is None:
                cuttable = False  # torch-pruning loses the slices of a concatenation that is flattened into a layer
            elif isinstance(module, _BatchNorm):
                norms.append(Member(paths[module], tuple(item.idxs), tuple(item.root_idxs)))
            elif isinstance(module, nn.Parameter) or (
                isinstance(module, nn.Module) and next(module.parameters(recurse=False), None) is not None
            ):
                cuttable = False  # a parameter of its own along the channels: zero in does not mean zero out
        if read and cuttable and members:
            root = items[0].dep.target.module
            units = 1 + max(max(member.units) for member in members)
            group = ChannelGroup(units, tuple(members))
            found.append(_Found(group, root, items[0].dep.handler, tuple(norms)))
    return found


def groups(model: nn.Module, example: Tensor) -> tuple[ChannelGroup, ...]:
    """The channel groups of `model` that can be removed physically.

    Args:
        model: a network of convolutions, linear layers, batch normalisation and parameter-free operations. Not changed.
        example: one input batch (1, C, H, W), pixel space; only its shape matters.

    Returns:
        The groups in order of the graph. Layers that produce the network's outputs, convolutions with groups (other
        than depthwise), channels with parameters of their own, and the parts of a concatenation that is flattened with
        more than one pixel a channel are in none.
    """
    model = copy.deepcopy(model)
    return tuple(f.group for f in _found(_graph(model, _check_example(model, example)), model))


def _silent(module: nn.Module) -> Tensor:
    """(channels,) bool: the output channels of `module` that are exactly zero (for a normalisation: given zeros)."""
    if isinstance(module, _BatchNorm):
        bias, scale, mean = module.bias, module.weight, module.running_mean
        quiet = torch.ones(module.num_features, dtype=torch.bool, device=None if mean is None else mean.device)
        if bias is not None:
            quiet = quiet.to(bias.device) & (bias == 0)
        if mean is not None:
            quiet = quiet & ((mean == 0) if scale is None else (mean == 0) | (scale == 0))
        return quiet.cpu()
    assert isinstance(module, LAYERS)
    quiet = (module.weight.flatten(1) == 0).all(1)
    return (quiet & (module.bias == 0) if module.bias is not None else quiet).cpu()


def _marked(rows: Tensor, member: Member, units: int, *, need_all: bool) -> Tensor:
    """(units,) bool: which units have all (or any) of their rows of `member` set in `rows`."""
    result = torch.full((units,), need_all)
    values, index = rows[list(member.rows)], torch.tensor(member.units)
    result[index[~values if need_all else values]] = not need_all
    return result


def remove(model: nn.Module, mask: Mask, example: Tensor) -> nn.Module:
    """A smaller copy of `model` without the channels that `mask` removes. See `methods.masks.remove`.

    A group of coupled channels goes only where all of its members are masked; one channel always stays. What could not
    go is still zero, and is named with the reason in the result's ``removal`` (a `Removal`).

    Args:
        model: the network; masked or not (the mask is applied to a copy). Not changed.
        mask: structured, for removal to have an effect.
        example: one input batch (N, C, H, W), pixel space. Used to trace and to compare the outputs.

    Returns:
        A network in the mode (train or eval) of `model`, outputs equal to the masked network's up to rounding.

    Raises:
        methods.masks.MaskError: the mask does not fit.
        RuntimeError: the outputs on `example` differ by more than rounding, as when an operation maps a zero channel
            to something else than zero.
    """
    from methods import masks  # masks imports this module on use

    example = _check_example(model, example)
    masked = masks.apply(copy.deepcopy(model), mask).eval()
    small = copy.deepcopy(masked)
    asked = {name: ~kept for name, kept in mask.channels.items()} if mask.structured else {}
    asked = {name: gone for name, gone in asked.items() if bool(gone.any())}
    before = {name: len(gone) for name, gone in asked.items()}
    after, stayed = dict(before), {}
    if asked:
        graph = _graph(small, example)
        modules = dict(small.named_modules())
        covered: set[str] = set()
        cuts: list[tuple[_Found, list[int]]] = []
        for found in _found(graph, small):
            members, units = found.group.members, found.group.channels
            names = [member.weight for member in members if member.weight in asked]
            covered.update(names)
            if not names:
                continue
            wanted = torch.zeros(units, dtype=torch.bool)
            silent = torch.ones(units, dtype=torch.bool)
            for member in members:
                if member.weight in asked:
                    wanted |= _marked(asked[member.weight], member, units, need_all=False)
                quiet = _silent(modules[member.weight.removesuffix(".weight")])
                silent &= _marked(quiet, member, units, need_all=True)
            loud: list[str] = []
            for norm in found.norms:
                quiet = _marked(_silent(modules[norm.weight]), norm, units, need_all=True)
                if bool((wanted & silent & ~quiet).any()):
                    loud.append(norm.weight)
                silent &= quiet
            cut = wanted & silent
            for name in names:
                if bool((wanted & ~silent).any()):
                    others = ", ".join(m.weight for m in members if m.weight != name)
                    stayed[name] = (
                        f"the normalisation {loud[0]} turns zero channels into a constant"
                        if loud
                        else f"coupled with {others or 'other channels'}, where the same channels are not all masked"
                    )
            if bool(cut.all()):
                cut[0] = False
                stayed.update(dict.fromkeys(names, "the last channel of a group has to stay"))
            cuts.append((found, cut.nonzero().flatten().tolist()))
        for found, indices in cuts:
            if indices:
                graph.get_pruning_group(found.root, found.prune, indices).prune()
        for name in asked:
            after[name] = dict(small.named_parameters())[name].shape[0]
            if name not in covered:
                stayed[name] = "an output layer, a grouped convolution, or not followed by torch-pruning"
    _restore_flags(small, model)
    with torch.no_grad(), full_float32():  # TF32 alone differs by more than the tolerance
        expected, got = masked(example), small.eval()(example)
    difference = float((got - expected).abs().max()) if got.shape == expected.shape else float("inf")
    if not difference <= TOLERANCE * max(1.0, float(expected.abs().max())):
        raise RuntimeError(
            f"removing channels changed the outputs by {difference:.3g}: some operation does not map a zero channel to "
            "zero (a sigmoid or an added constant, for instance), or depends on the number of channels. "
            "Evaluate the masked network instead"
        )
    small.removal = Removal(before, after, stayed, difference)  # type: ignore[assignment]
    return small.train(model.training)


def _restore_flags(small: nn.Module, model: nn.Module) -> None:
    """Give each parameter of `small` the requires_grad flag of its namesake, and drop gradients of the trace."""
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    for name, parameter in small.named_parameters():
        parameter.requires_grad_(flags[name])
        parameter.grad = None
