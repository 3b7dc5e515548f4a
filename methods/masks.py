"""Pruning masks: which weights, or which channels, of a network stay.

A `Mask` is data only: an immutable boolean tensor per pruned weight, ``True`` = kept. The functions of this module do
the work on a network:

* `apply` zeroes what a mask removes, in place;
* `freeze` keeps it zero while an optimiser runs;
* `remove` deletes fully pruned channels physically and returns a smaller network with the same outputs;
* `save` and `load` keep a mask in a checked safetensors file.

A *structured* mask removes whole output channels. A removed channel must be exactly zero further on, so its bias and
the affine parameters and running mean of the batch normalisation that reads it are zeroed along with its weights.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from methods import ranking, wiring
from methods.errors import MaskError
from methods.files import write_atomically
from methods.ranking import Scope
from methods.wiring import ChannelGroup

FORMAT = "certprune-mask"
VERSION = 1

__all__ = [
    "ChannelGroup",
    "Frozen",
    "Mask",
    "MaskError",
    "Scope",
    "apply",
    "freeze",
    "groups",
    "load",
    "prunable",
    "remove",
    "save",
]


class Mask(Mapping[str, Tensor]):
    """Per-layer boolean tensors, ``True`` = kept, keyed by parameter name (``"features.0.weight"``).

    Args:
        layers: parameter name -> bool tensor of the parameter's shape, dimension 0 = output channels. Copied.
        structured: whole output channels are removed: every ``layers[name][c]`` is all ``True`` or all ``False`` and
            at least one channel of each layer is kept.

    Reading ``mask[name]`` returns a copy on the CPU, so that a mask can be shared without being changed.

    Raises:
        MaskError: no layer, a tensor that is not boolean, is empty, or breaks the rule of a structured mask.
    """

    __slots__ = ("_layers", "structured")

    _layers: dict[str, Tensor]
    structured: bool

    def __init__(self, layers: Mapping[str, Tensor], structured: bool = False) -> None:
        if not layers:
            raise MaskError("a mask needs at least one layer; was the network free of prunable weights?")
        copied: dict[str, Tensor] = {}
        for name, kept in layers.items():
            if not isinstance(kept, Tensor) or kept.dtype != torch.bool:
                what = str(kept.dtype) if isinstance(kept, Tensor) else type(kept).__name__
                raise MaskError(f"mask of {name!r} must be a torch.bool tensor (True = kept), got {what}")
            if kept.ndim < 1 or kept.numel() == 0:
                raise MaskError(f"mask of {name!r} is empty (shape {tuple(kept.shape)})")
            kept = kept.detach().to("cpu", copy=True).contiguous()
            if structured:
                rows = kept.flatten(1) if kept.ndim > 1 else kept.unsqueeze(1)
                if bool((rows.any(1) != rows.all(1)).any()):
                    raise MaskError(f"structured mask of {name!r} splits a channel: keep or remove whole channels")
                if not bool(rows.any()):
                    raise MaskError(f"structured mask of {name!r} removes all of its channels; keep at least one")
            copied[name] = kept
        object.__setattr__(self, "_layers", copied)
        object.__setattr__(self, "structured", bool(structured))

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError("a Mask is immutable; build a new one")

    def __delattr__(self, name: str) -> None:
        raise AttributeError("a Mask is immutable; build a new one")

    def __reduce__(self) -> tuple[type[Mask], tuple[dict[str, Tensor], bool]]:
        return Mask, (dict(self._layers), self.structured)

    def __deepcopy__(self, memo: dict[int, Any]) -> Mask:
        return self  # immutable

    def __getitem__(self, name: str) -> Tensor:
        return self._layers[name].clone()

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Mask):
            return NotImplemented
        return (
            self.structured == other.structured
            and self._layers.keys() == other._layers.keys()
            and all(torch.equal(kept, other._layers[name]) for name, kept in self._layers.items())
        )

    def __hash__(self) -> int:
        return hash((self.structured, self.fingerprint))

    def __repr__(self) -> str:
        kind = "structured" if self.structured else "unstructured"
        return f"Mask({kind}, layers={len(self)}, kept={self.kept}/{self.total}, density={self.density:.4f})"

    # --- numbers ---------------------------------------------------------------------------------------------------
    @property
    def total(self) -> int:
        """Entries in all masked weights."""
        return sum(kept.numel() for kept in self._layers.values())

    @property
    def kept(self) -> int:
        """Entries that stay."""
        return sum(int(kept.sum()) for kept in self._layers.values())

    @property
    def density(self) -> float:
        """Fraction of the masked weights that stays, in (0, 1]."""
        return self.kept / self.total

    @property
    def layer_density(self) -> dict[str, float]:
        """Density of each layer."""
        return {name: int(kept.sum()) / kept.numel() for name, kept in self._layers.items()}

    @property
    def channels(self) -> dict[str, Tensor]:
        """The structured view: parameter name -> bool (out_channels,), ``True`` where any of the channel stays."""
        return {
            name: (kept.flatten(1).any(1) if kept.ndim > 1 else kept.clone()) for name, kept in self._layers.items()
        }

    @property
    def channel_density(self) -> float:
        """Fraction of the masked layers' output channels that stays."""
        channels = self.channels.values()
        return sum(int(c.sum()) for c in channels) / sum(c.numel() for c in channels)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over kind, names, shapes and entries."""
        digest = hashlib.sha256(b"structured" if self.structured else b"unstructured")
        for name in sorted(self._layers):
            kept = self._layers[name]
            digest.update(f"\0{name}\0{tuple(kept.shape)}\0".encode())
            digest.update(kept.numpy().tobytes())
        return digest.hexdigest()

    def density_over(self, model: nn.Module) -> float:
        """Fraction of *all* parameters of `model` that stays: biases, normalisation and unmasked layers included.

        A structured mask also removes the bias and the batch normalisation's affine pair of each removed channel.
        """
        full = _expand(model, self)
        params = dict(model.named_parameters())
        removed = sum(int((~kept).sum()) for name, kept in full.items() if name in params)
        return 1.0 - removed / sum(p.numel() for p in params.values())

    def check(self, model: nn.Module) -> None:
        """Raise `MaskError` unless every layer of the mask names a parameter of `model` of the same shape."""
        params = dict(model.named_parameters())
        for name, kept in self._layers.items():
            if name not in params:
                near = difflib.get_close_matches(name, params, n=3)
                hint = f"; did you mean {', '.join(near)}?" if near else ""
                raise MaskError(f"the mask has a layer {name!r} that the network lacks{hint}")
            if params[name].shape != kept.shape:
                raise MaskError(
                    f"the mask of {name!r} has shape {tuple(kept.shape)} but the parameter has "
                    f"{tuple(params[name].shape)}; was the mask made for another width or input size?"
                )

    # --- algebra ---------------------------------------------------------------------------------------------------
    def __and__(self, other: Mask) -> Mask:
        """Keep what both keep. The masks must cover the same layers."""
        self._same_layers(other)
        both = {name: kept & other._layers[name] for name, kept in self._layers.items()}
        return Mask(both, structured=self.structured and other.structured)

    def is_subset(self, other: Mask) -> bool:
        """Whether everything this mask keeps is kept by `other` as well (nested masks)."""
        self._same_layers(other)
        return all(not bool((kept & ~other._layers[name]).any()) for name, kept in self._layers.items())

    def _same_layers(self, other: Mask) -> None:
        for name, kept in self._layers.items():
            if name not in other._layers or other._layers[name].shape != kept.shape or len(self) != len(other):
                raise MaskError(f"the masks cover different layers (first difference at {name!r})")

    # --- constructors ----------------------------------------------------------------------------------------------
    @classmethod
    def dense(cls, model: nn.Module, *, kinds: Sequence[str] = ("conv", "linear"), structured: bool = False) -> Mask:
        """The mask that keeps every prunable weight of `model` (see `prunable`)."""
        params = dict(model.named_parameters())
        names = prunable(model, kinds, structured=structured)
        return cls({name: torch.ones(params[name].shape, dtype=torch.bool) for name in names}, structured)

    @classmethod
    def from_channels(cls, channels: Mapping[str, Tensor], model: nn.Module) -> Mask:
        """A structured mask from bool (out_channels,) vectors by parameter name, with the shapes of `model`."""
        params = dict(model.named_parameters())
        layers = {}
        for name, kept in channels.items():
            if name not in params or kept.shape != params[name].shape[:1] or kept.dtype != torch.bool:
                expected = tuple(params[name].shape[:1]) if name in params else "no such parameter"
                raise MaskError(f"channels of {name!r}: got {kept.dtype} {tuple(kept.shape)}, expected bool {expected}")
            layers[name] = _rows(kept, params[name].shape)
        return cls(layers, structured=True)

    @classmethod
    def from_scores(
        cls,
        scores: Mapping[str, Tensor],
        ratio: float,
        scope: Scope = "global",
        structured: bool = False,
        *,
        within: Mask | None = None,
        groups: Sequence[ChannelGroup] | None = None,
    ) -> Mask:
        """Remove the fraction `ratio` with the smallest scores; exact, by a stable sort (among equals the first goes).

        Args:
            scores: parameter name -> finite scores of the weight's shape; larger = more worth keeping.
            ratio: fraction to remove, of all entries (unstructured) or of all channels (structured), in [0, 1].
                The number removed is ``round(ratio * n)``.
            scope: rank over all layers at once ("global"), or remove the fraction from each layer ("layer").
            structured: rank channels by the mean score of their weights. At least one channel of each layer is kept,
                so a very high ratio may stop short.
            within: an earlier mask. What it removed stays removed and counts towards `ratio`, so masks nest.
            groups: for structured masks, the coupled channels of `methods.masks.groups`: channels that one addition or
                depthwise convolution ties together are ranked and removed as one, which makes `remove` able to
                delete them. `ratio` then counts coupled channels. Layers in `scores` outside all groups are kept.

        Raises:
            MaskError: NaN scores, a ratio out of range, an unknown scope, `groups` for an unstructured mask, or a
                `within` that keeps less than `ratio` asks for.
        """
        if not 0.0 <= ratio <= 1.0:
            raise MaskError(f"ratio is the fraction to remove and must lie in [0, 1], got {ratio}")
        if scope not in ("global", "layer"):
            raise MaskError(f"scope must be 'global' or 'layer', got {scope!r}")
        if groups is not None and not structured:
            raise MaskError("groups couple channels: pass structured=True, or leave groups out")
        if not scores:
            raise MaskError("no scores given: the network has no prunable layer of the kinds asked for")
        cpu = {name: s.detach().to("cpu") for name, s in scores.items()}
        for name, s in cpu.items():
            if bool(torch.isnan(s).any()):
                raise MaskError(f"the scores of {name!r} hold NaN; did training diverge?")
            if within is not None and (name not in within or within._layers[name].shape != s.shape):
                raise MaskError(f"the earlier mask does not cover {name!r} of shape {tuple(s.shape)}")
        if not structured:
            gone = {n: ~within._layers[n] if within is not None else torch.zeros(s.shape) > 0 for n, s in cpu.items()}
            return cls(ranking.entries(cpu, gone, ratio, scope))
        alive = within.channels if within is not None else {n: torch.ones(len(s)) > 0 for n, s in cpu.items()}
        channels = ranking.channels(cpu, {name: alive[name] for name in cpu}, ratio, scope, groups)
        return cls({n: _rows(c, cpu[n].shape) for n, c in channels.items()}, structured=True)


def _rows(channels: Tensor, shape: torch.Size) -> Tensor:
    """A (out_channels,) vector repeated over a weight's shape."""
    return channels.reshape(-1, *[1] * (len(shape) - 1)).expand(shape)


def prunable(
    model: nn.Module, kinds: Sequence[str] = ("conv", "linear"), *, structured: bool = False
) -> tuple[str, ...]:
    """Names of the weights that can be masked, in registration order.

    Args:
        model: any network.
        kinds: "conv" (1d, 2d and 3d convolutions) and "linear".
        structured: leave out layers whose output channels are the network's outputs.

    Raises:
        MaskError: unknown kind, or no layer found.
    """
    types: list[type[nn.Module]] = []
    for kind in kinds:
        if kind not in ("conv", "linear"):
            raise MaskError(f"unknown layer kind {kind!r}; expected 'conv' or 'linear'")
        types += [nn.Conv1d, nn.Conv2d, nn.Conv3d] if kind == "conv" else [nn.Linear]
    outputs = wiring.output_layers(model) if structured else frozenset()
    names = tuple(
        f"{path}.weight" if path else "weight"
        for path, module in model.named_modules()
        if isinstance(module, tuple(types)) and path not in outputs
    )
    if not names:
        what = " besides the output layer" if structured else ""
        raise MaskError(f"the network has no layer of kind {' or '.join(kinds)}{what} that could be pruned")
    return names


def groups(model: nn.Module, example: Tensor) -> tuple[ChannelGroup, ...]:
    """The coupled channels of `model`: see `methods.coupling.groups` (uses torch-pruning)."""
    from methods import coupling  # torch-pruning is loaded on use only

    return coupling.groups(model, example)


def _expand(model: nn.Module, mask: Mask) -> dict[str, Tensor]:
    """Everything `mask` zeroes in `model`: its weights and, if structured, the tied per-channel tensors."""
    mask.check(model)
    full = {name: mask[name] for name in mask}
    if not mask.structured or all(bool(c.all()) for c in mask.channels.values()):
        return full
    ties = wiring.tied_tensors(model)
    for name, channels in mask.channels.items():
        for tied in ties.get(name.removesuffix(".weight").removesuffix("weight"), ()):
            full[tied] = full[tied] & channels if tied in full else channels.clone()
    return full


@torch.no_grad()
def apply(model: nn.Module, mask: Mask) -> nn.Module:
    """Zero what `mask` removes, in place, and return `model`.

    For a structured mask the removed channels' biases and the affine parameters and running means of the batch
    normalisation behind them are zeroed too, so that the channel carries exactly 0.

    Raises:
        MaskError: the mask does not fit the network.
        methods.wiring.WiringError: a structured mask on a network that torch.fx cannot trace.
    """
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    for name, kept in _expand(model, mask).items():
        tensors[name].masked_fill_(~kept.to(tensors[name].device), 0)
    return model


class Frozen:
    """Keeps what a mask removed at exactly zero while an optimiser runs; made by `freeze`."""

    def __init__(self, model: nn.Module, mask: Mask, optimizer: torch.optim.Optimizer | None) -> None:
        params = dict(model.named_parameters())
        self._zeroed = [
            (params[name], ~kept.to(params[name].device))
            for name, kept in _expand(model, mask).items()
            if name in params and not bool(kept.all())
        ]
        self._handles: list[Any] = [
            parameter.register_hook(lambda grad, drop=drop: grad.masked_fill(drop, 0))
            for parameter, drop in self._zeroed
            if parameter.requires_grad
        ]
        if optimizer is not None:
            # Momentum, Adam's moments or weight decay may still move an entry whose gradient is zero.
            self._handles.append(optimizer.register_step_post_hook(lambda *_: self.rezero()))
        self.rezero()

    @torch.no_grad()
    def rezero(self) -> None:
        """Set every removed entry to zero; called after each optimiser step."""
        for parameter, drop in self._zeroed:
            parameter.masked_fill_(drop, 0)

    def remove(self) -> None:
        """Take the hooks off; the weights stay as they are."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


def freeze(model: nn.Module, mask: Mask, optimizer: torch.optim.Optimizer | None = None) -> Frozen:
    """Hold the entries that `mask` removes at zero: ``with freeze(model, mask, optimizer): ...`` or ``.remove()``.

    Gradients are masked as they arise; with `optimizer`, the entries are also set back to zero after each of its steps,
    so that momentum, adaptive moments and weight decay cannot revive them.
    """
    apply(model, mask)
    return Frozen(model, mask, optimizer)


def remove(model: nn.Module, mask: Mask, example: Tensor) -> nn.Module:
    """A smaller network without the channels that `mask` removes; see `methods.coupling.remove` (uses torch-pruning).

    The result computes what the masked network computes (checked on `example` in eval mode). Its attribute ``removal``
    says per layer how many channels went and why others had to stay. `model` is not changed. An unstructured mask
    removes nothing: the result is a masked copy.
    """
    from methods import coupling

    return coupling.remove(model, mask, example)


def save(mask: Mask, path: str | os.PathLike[str]) -> Path:
    """Write `mask` to `path` (safetensors, boolean tensors, JSON header), atomically. Returns the path."""
    from safetensors.torch import save as to_bytes

    path = Path(path)
    header = {
        "format": FORMAT,
        "version": VERSION,
        "structured": mask.structured,
        "density": mask.density,
        "sha256": mask.fingerprint,
    }
    data = to_bytes({name: mask[name] for name in mask}, metadata={"mask": json.dumps(header)})
    write_atomically(path, data)
    return path


def load(path: str | os.PathLike[str], model: nn.Module | None = None) -> Mask:
    """Read a mask written by `save`; with `model`, also check that it fits.

    Raises:
        FileNotFoundError: no such file.
        MaskError: not a mask file, a version of the future, truncated or altered contents, or a misfit with `model`.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no mask at {path}; expected a file written by methods.masks.save")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            layers = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        header = json.loads(metadata["mask"])
        version, structured, digest = header["version"], header["structured"], header["sha256"]
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise MaskError(f"{path} is not a readable mask file ({error}); it is damaged or of another kind") from error
    if header.get("format") != FORMAT or version != VERSION:
        raise MaskError(f"{path} has format {header.get('format')!r} version {version}, expected {FORMAT!r} {VERSION}")
    mask = Mask(layers, structured)
    if mask.fingerprint != digest:
        raise MaskError(f"{path} does not match its own checksum: the file was damaged or altered; write it anew")
    if model is not None:
        mask.check(model)
    return mask
