"""How stable a network's ReLUs are over a perturbation, and what a mask leaves of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

import certify
from certify.bounds import Rectifier
from certify.perturbations import Perturbation
from methods.masks import Mask
from methods.training.objective import Batch
from methods.training.stability import normalised_product

_CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclasses.dataclass(frozen=True)
class Instability:
    """``-l u`` of ReLU inputs (Li et al. 2022, Eq. 3: called an average, printed as a sum, stable neurons subtract).

    Attributes:
        total: summed over the neurons of an image, mean over images. Stable neurons subtract, as printed.
        mean: over all neurons and images.
        unstable: mean over the unstable neurons alone; 0 when there is none.
    """

    total: float
    mean: float
    unstable: float


@dataclasses.dataclass(frozen=True)
class Stability:
    """ReLU stability of a network over a perturbation of a set of images.

    Attributes:
        images, neurons: images looked at, ReLU neurons of the network.
        unstable_ratio: fraction of neurons (over all images) whose pre-activation interval has 0 inside.
        by_layer: that fraction layer by layer, in order: dotted path of the module that runs the ReLU -> fraction (with
            "#1", "#2", ... where one module runs several).
        pre_activation: instability of l and u themselves.
        pre_bn: that of the normalised intervals before the batch normalisation's weight, ``-l u / gamma^2``, over the
            ReLUs that have one; None without any. Channels whose gamma is 0 are constants and left out.
    """

    images: int
    neurons: int
    unstable_ratio: float
    by_layer: dict[str, float]
    pre_activation: Instability
    pre_bn: Instability | None


@torch.no_grad()
def stability(
    model: nn.Module, batches: Iterable[Batch], p: Perturbation, *, method: Literal["ibp", "crown"] = "ibp"
) -> Stability:
    """Stability of `model` (in eval mode) over `p` around the images of `batches`.

    Args:
        model: the network.
        batches: (x, y) or x batches, on the model's device.
        p: the perturbation.
        method: how pre-activation intervals are bounded: "ibp", or "crown", tighter and dearer.

    Raises:
        ValueError: the model is in training mode, has no ReLU, or `batches` is empty.
    """
    if model.training:
        raise ValueError("the model is in training mode, where bounds depend on the batch; call model.eval() first")
    here, before = _Sums(), _Sums()
    layers: dict[str, list[Tensor]] = {}
    images = neurons = 0
    for batch in batches:
        x = batch if isinstance(batch, Tensor) else batch[0]
        rectifiers = certify.Network(model, x).propagate(p, method).rectifiers()
        if not rectifiers:
            raise ValueError("the network has no ReLU whose stability could be told")
        images += len(x)
        neurons = sum(layer.lower[0].numel() for layer in rectifiers)
        for index, layer in enumerate(rectifiers):
            here.add(layer.lower * layer.upper, layer.unstable)
            if layer.norm is not None and layer.norm.weight is not None:
                alive = _alive(layer)
                before.add(normalised_product(layer)[alive], layer.unstable[alive])
            layers.setdefault(_label(index, layer, rectifiers), []).append(layer.unstable.double().mean() * len(x))
    if not images:
        raise ValueError("batches are empty: there is no image to look at")
    by_layer = {name: float(torch.stack(parts).sum()) / images for name, parts in layers.items()}
    pre_bn = before.instability(images) if before.count else None
    return Stability(images, neurons, here.ratio(), by_layer, here.instability(images), pre_bn)


def _label(index: int, layer: Rectifier, layers: Sequence[Rectifier]) -> str:
    same = [i for i, other in enumerate(layers) if other.path == layer.path]
    return layer.path if len(same) == 1 else f"{layer.path}#{same.index(index) + 1}"


def _alive(layer: Rectifier) -> Tensor:
    assert layer.norm is not None
    gamma = layer.norm.weight
    assert gamma is not None
    return (gamma != 0).reshape(-1, *[1] * (layer.lower.ndim - 2)).expand_as(layer.lower)


class _Sums:
    """Sums over neurons and images, in float64 on the device."""

    def __init__(self) -> None:
        self.count = 0
        self._parts: list[Tensor] = []

    def add(self, product: Tensor, unstable: Tensor) -> None:
        product = -product.double()
        self.count += product.numel()
        self._parts.append(torch.stack([product.sum(), (product * unstable).sum(), unstable.double().sum()]))

    def _sums(self) -> list[float]:
        return torch.stack(self._parts).sum(0).tolist()

    def ratio(self) -> float:
        return self._sums()[2] / self.count

    def instability(self, images: int) -> Instability:
        total, of_unstable, unstable = self._sums()
        return Instability(total / images, total / self.count, of_unstable / unstable if unstable else 0.0)


@dataclasses.dataclass(frozen=True)
class Remaining:
    """What a mask leaves.

    Attributes:
        conv: fraction of the convolutions' weights that stays: the papers' "remain ratio".
        total: fraction of all parameters that stays, biases, normalisation and fully connected layers included.
        channels: fraction of the masked layers' output channels with a weight left.
    """

    conv: float
    total: float
    channels: float


def remaining(model: nn.Module, mask: Mask) -> Remaining:
    """The remain ratios of `mask` on `model` (not made smaller).

    Raises:
        ValueError: the network has no convolution.
        methods.masks.MaskError: the mask does not fit the network.
    """
    mask.check(model)
    kept = total = 0
    for path, module in model.named_modules():
        if isinstance(module, _CONV):
            name = f"{path}.weight" if path else "weight"
            total += module.weight.numel()
            kept += int(mask[name].sum()) if name in mask else module.weight.numel()
    if not total:
        raise ValueError("the network has no convolution, so there is no ratio of remaining convolution weights")
    rows = torch.cat([mask[name].flatten(1).any(1) if mask[name].ndim > 1 else mask[name] for name in mask])
    return Remaining(kept / total, mask.density_over(model), float(rows.double().mean()))
