"""A frozen network under masks in [0, 1] that are trained: noisy draws, and the binary mask they imply."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from methods.masks import Mask, MaskError, Scope

Noise = Literal["element", "layer"]
Ties = Literal["magnitude", "position", "drop"]
Masks = Mapping[str, Tensor]


def keep_largest(values: Tensor, removed: int, drop: bool = False) -> Tensor:
    """A boolean vector (n,), ``False`` for the `removed` smallest of `values` (n,).

    Exactly so many, among equals the first go: what ``argsort(stable=True)`` would remove, without sorting and without
    reading a value on the host. With `drop`, whatever is not strictly above the largest removed value goes too.
    """
    if removed == 0:
        return torch.ones_like(values, dtype=torch.bool)
    # A single kthvalue runs on one block of a GPU; a sort uses them all.
    threshold = values.sort().values[removed - 1] if values.is_cuda else values.kthvalue(removed).values
    above, equal = values > threshold, values == threshold
    if drop:
        return above
    surplus = removed - (values < threshold).sum()
    return above | (equal & (equal.cumsum(0, dtype=torch.int32) > surplus))


def chosen(
    values: Masks, ratio: float, scope: Scope = "layer", ties: Ties = "magnitude", orders: Masks | None = None
) -> dict[str, Tensor]:
    """Boolean masks that keep the largest ``1 - ratio`` of ``|values|``, of each layer or of all of them.

    Args:
        values: soft masks by name.
        ratio, scope: how much is removed, of what.
        ties: which of equal entries go: see `binarise`.
        orders: permutations of `order_of`, needed for "magnitude".
    """
    flat = {name: value.detach().abs().flatten() for name, value in values.items()}
    groups = {name: [name] for name in flat} if scope == "layer" else {"": list(flat)}
    result: dict[str, Tensor] = {}
    for key, names in groups.items():
        together = torch.cat([flat[name] for name in names])
        removed = round(ratio * together.numel())
        if ties == "magnitude":
            assert orders is not None
            kept = torch.empty_like(together, dtype=torch.bool)
            kept[orders[key]] = keep_largest(together[orders[key]], removed)
        else:
            kept = keep_largest(together, removed, drop=ties == "drop")
        sizes = [flat[name].numel() for name in names]
        result |= {name: part.reshape(values[name].shape) for name, part in zip(names, kept.split(sizes), strict=True)}
    return result


@torch.no_grad()
def orders_of(weights: Masks, scope: Scope = "layer") -> dict[str, Tensor]:
    """Permutations that put the weights in ascending order of magnitude: by name for "layer", under "" for "global".

    Layers are made comparable by their mean magnitude. Equal weights stay in the order of their positions.
    """
    flat = {name: weight.abs().flatten() for name, weight in weights.items()}
    if scope == "layer":
        return {name: size.argsort(stable=True) for name, size in flat.items()}
    relative = [size / size.mean().clamp_min(torch.finfo(size.dtype).tiny) for size in flat.values()]
    return {"": torch.cat(relative).argsort(stable=True)}


class SoftMasked(nn.Module):
    """`network` with each weight of `values` multiplied by a mask; only the masks (and, if asked, gammas) are trained.

    Called as ``masked(x)`` it uses the soft masks, as ``masked(x, masks)`` the ones given. Nothing of the network but
    the statistics of its batch normalisations changes.

    Args:
        network: taken over, not copied; its parameters are frozen.
        values: initial masks by parameter name.
        affine: let the affine parameters of batch normalisations be trained too.
    """

    _orders: dict[Scope, dict[str, Tensor]]

    def __init__(self, network: nn.Module, values: Masks, affine: bool = False) -> None:
        super().__init__()
        self._orders = {}  # of the frozen weights, found when first needed
        self.network = network.requires_grad_(False)
        if affine:
            for module in network.modules():
                if isinstance(module, _BatchNorm):
                    module.requires_grad_(True)
        self.names = tuple(values)
        self.values = nn.ParameterList([nn.Parameter(value.detach().clone()) for value in values.values()])

    def forward(self, x: Tensor, masks: Masks | None = None) -> Any:
        masks = self.soft() if masks is None else masks
        weights = self.weights()
        return functional_call(self.network, {name: weights[name] * masks[name] for name in self.names}, (x,))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._orders.clear()  # they are on the device that is being left
        return super()._apply(fn, recurse)

    def weights(self) -> dict[str, Tensor]:
        """The frozen weights that are masked."""
        parameters = dict(self.network.named_parameters())
        return {name: parameters[name] for name in self.names}

    def _raw(self) -> dict[str, Tensor]:
        return dict(zip(self.names, self.values, strict=True))

    @torch.no_grad()
    def project(self) -> None:
        """Clip the masks to [0, 1]."""
        for value in self.values:
            value.clamp_(0.0, 1.0)

    def soft(self) -> dict[str, Tensor]:
        """The masks without noise."""
        return {name: value.clamp(0.0, 1.0) for name, value in self._raw().items()}

    def noisy(self, delta: float, noise: Noise = "element") -> dict[str, Tensor]:
        """``clip(m + U(-delta, delta), 0, 1)``: one draw, with noise for each entry or one number a layer."""
        if delta == 0.0:
            return self.soft()
        drawn = {}
        for name, value in self._raw().items():
            shape = value.shape if noise == "element" else (1,) * value.ndim
            shift = torch.empty(shape, dtype=value.dtype, device=value.device).uniform_(-delta, delta)
            drawn[name] = (value + shift).clamp(0.0, 1.0)
        return drawn

    def hard(self, ratio: float, scope: Scope = "layer", ties: Ties = "magnitude") -> dict[str, Tensor]:
        """The binary masks of `binarise`, as numbers; gradients pass straight through to the soft masks."""
        raw = self._raw()
        if ties == "magnitude" and scope not in self._orders:
            self._orders[scope] = orders_of(self.weights(), scope)
        # value - value.detach() is exactly 0 with gradient 1 (Bengio et al. 2013).
        return {
            name: kept.to(raw[name].dtype) + (raw[name] - raw[name].detach())
            for name, kept in chosen(raw, ratio, scope, ties, self._orders.get(scope)).items()
        }

    def size(self, average: bool = True) -> Tensor:
        """``||m||_1`` before any noise, a scalar; divided by the number of entries if `average`."""
        total = torch.stack([value.abs().sum() for value in self.values]).sum()
        return total / sum(value.numel() for value in self.values) if average else total


def binarise(
    values: Masks, ratio: float, scope: Scope = "layer", ties: Ties = "magnitude", weights: Masks | None = None
) -> Mask:
    """The mask that keeps the largest ``1 - ratio`` of the soft masks' entries (Algorithm 1, line 4).

    Args:
        values: soft masks by weight name.
        ratio: fraction removed: exactly ``round(ratio n)`` of a layer's n entries (scope "layer") or of all entries
            (scope "global").
        scope: see `ratio`.
        ties: which of equal entries go (many are exactly 1): those of the smallest weights ("magnitude"), the first
            ("position"), or, as Algorithm 1 has it with a strict >, all of them ("drop"), which can remove more.
        weights: for "magnitude".

    Raises:
        methods.masks.MaskError: NaN among the values; no weights for "magnitude".
    """
    for name, value in values.items():
        if bool(torch.isnan(value).any()):
            raise MaskError(f"the soft mask of {name!r} holds NaN; did training diverge?")
    if ties != "magnitude":
        return Mask(chosen(values, ratio, scope, ties))
    if weights is None:
        raise MaskError("ties='magnitude' ranks equal entries by their weights: pass weights=")
    orders = orders_of({name: weights[name].to(values[name].device) for name in values}, scope)
    return Mask(chosen(values, ratio, scope, ties, orders))
