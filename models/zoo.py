"""The zoo: names, one line each, and how to build them. Imports torch only when a network is built."""

from __future__ import annotations

import contextlib
import difflib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from models.recipe import Recipe, canonical_head, per_channel, positive, whole

if TYPE_CHECKING:
    from torch import Tensor

    from models.backbone import Backbone, Network

    Builder: TypeAlias = Callable[[Recipe], Backbone]
    Download: TypeAlias = Callable[[], Mapping[str, Tensor]]

Channels: TypeAlias = "float | Sequence[float] | Tensor"

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@dataclass(frozen=True)
class Entry:
    """One network of the zoo.

    Attributes:
        description: one line.
        minimum: smallest image side in pixels.
        builder: imports the module that holds the network and returns its builder.
        download: imports that module and returns the function that fetches published weights; None if there are none.
        statistics: (mean, std) that the published weights were trained with.
    """

    description: str
    minimum: int
    builder: Callable[[], Builder]
    download: Callable[[], Download] | None = None
    statistics: tuple[tuple[float, ...], tuple[float, ...]] = IMAGENET


def _cnn7_nrs() -> Builder:
    from models.cnn7 import cnn7_nrs

    return cnn7_nrs


def _cnn7_cw() -> Builder:
    from models.cnn7 import cnn7_cw

    return cnn7_cw


def _cnn_large() -> Builder:
    from models.cnn7 import cnn_large

    return cnn_large


def _mlp() -> Builder:
    from models.cnn7 import mlp

    return mlp


def _resnet18() -> Builder:
    from models.torchvision import resnet18

    return resnet18


def _resnet18_weights() -> Download:
    from models.torchvision import resnet18_weights

    return resnet18_weights


def _googlenet() -> Builder:
    from models.torchvision import googlenet

    return googlenet


def _googlenet_weights() -> Download:
    from models.torchvision import googlenet_weights

    return googlenet_weights


def _mobilenetv2() -> Builder:
    from models.timm import mobilenetv2

    return mobilenetv2


def _mobilenetv2_weights() -> Download:
    from models.timm import mobilenetv2_weights

    return mobilenetv2_weights


def _efficientnet_lite0() -> Builder:
    from models.timm import efficientnet_lite0

    return efficientnet_lite0


def _efficientnet_lite0_weights() -> Download:
    from models.timm import efficientnet_lite0_weights

    return efficientnet_lite0_weights


ZOO: dict[str, Entry] = {
    "cnn7_nrs": Entry("5 conv-BN-ReLU blocks + 2 FC, the CNN7 of NRSLoss pruning", 8, _cnn7_nrs),
    "cnn7_cw": Entry("4 conv + 3 FC with max-pooling (Carlini-Wagner), the CNN7 of USN pruning", 16, _cnn7_cw),
    "cnn_large": Entry("4 conv + 3 FC without batch-norm, HYDRA's verification network", 4, _cnn_large),
    "mlp": Entry("2 hidden layers of 100 ReLUs", 1, _mlp),
    "resnet18": Entry("ResNet-18 (torchvision blocks)", 8, _resnet18, _resnet18_weights),
    "googlenet": Entry(
        "GoogLeNet without auxiliary heads (torchvision blocks)", 15, _googlenet, _googlenet_weights, HALF
    ),
    "mobilenetv2": Entry("MobileNetV2 (timm mobilenetv2_100)", 16, _mobilenetv2, _mobilenetv2_weights),
    "efficientnet_lite0": Entry(
        "EfficientNet-Lite0 with ReLU6 (timm)", 16, _efficientnet_lite0, _efficientnet_lite0_weights
    ),
}


def names() -> tuple[str, ...]:
    """The networks that :func:`create` knows. Cheap: imports no torch."""
    return tuple(ZOO)


def describe() -> dict[str, str]:
    """One line per network. Cheap: imports no torch."""
    return {name: entry.description for name, entry in ZOO.items()}


def entry(name: str) -> Entry:
    """The registry's entry for a name; ValueError with close matches when there is none."""
    if name not in ZOO:
        close = difflib.get_close_matches(str(name).lower(), ZOO, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(map(repr, close))}? " if close else ""
        raise ValueError(f"unknown model {name!r}: {hint}Known models: {', '.join(ZOO)}")
    return ZOO[name]


def create(
    name: str,
    num_outputs: int,
    in_channels: int = 3,
    image_size: int = 32,
    width: float = 1.0,
    pretrained: bool | str | os.PathLike[str] = False,
    head: str | None = None,
    mean: Channels | None = None,
    std: Channels | None = None,
    seed: int | None = None,
) -> Network:
    """A network of the zoo on the CPU, in training mode: (N, in_channels, S, S) in [0, 1] to (N, num_outputs).

    Args:
        name: one of :func:`names`.
        num_outputs: classes, or twice the keypoints.
        in_channels: image channels.
        image_size: side S of the square image in pixels. Below 64 the ImageNet nets get a 3x3 stride-1 stem without
            max-pool, and the recipe's notes say so.
        width: factor on every hidden layer's channels. The ImageNet nets keep at least 8 per layer.
        pretrained: True for the published weights (width 1 only) or the path of a local checkpoint (safetensors or a
            .pth state dict, in the published layout or written by :func:`models.save`). Everything but the stem and the
            head must fit exactly; what was not taken over is in the notes.
        head: None for class scores; "keypoints" (or "linear") for a linear layer to pixel coordinates x0, y0, x1, y1,
            ...; "dsnt" for the soft-argmax of heat maps, same output.
        mean: normalisation in pixel space, one number or one per channel. Default: what pretrained weights were
            trained with, else ImageNet's for three channels and 0.5 otherwise.
        std: likewise.
        seed: makes the initial weights a function of the arguments, without touching the global random state. None
            draws from the global CPU generator. Weights are drawn on the CPU, so they do not depend on a device.

    Returns:
        An ``nn.Module`` whose attribute ``recipe`` is a :class:`models.Recipe`.

    Raises:
        TypeError, ValueError: an argument is wrong; the message says what was expected.
        FileNotFoundError: the local checkpoint does not exist.
        RuntimeError: published weights could not be fetched.
        CheckpointError: the checkpoint is damaged or does not fit the network.
    """
    import torch

    from models.pretrained import fetch, transfer

    known = entry(name)
    in_channels = whole("in_channels", in_channels)
    weights = None
    if pretrained is not False:
        # Refuse what can be refused before anything is downloaded.
        canonical_head(head, whole("num_outputs", num_outputs))
        if pretrained is True and positive("width", width) != 1.0:
            raise ValueError(f"published weights exist for width 1 only, got width={width}")
        weights = fetch(name, known.download, None if pretrained is True else Path(pretrained))
    default_mean, default_std = _statistics(known, in_channels, weights.state if weights else None)
    recipe = Recipe(
        name=name,
        num_outputs=num_outputs,
        in_channels=in_channels,
        image_size=image_size,
        width=width,
        pretrained=pretrained if isinstance(pretrained, bool) else Path(pretrained).name,
        head=head,
        mean=per_channel("mean", default_mean if mean is None else mean, max(in_channels, 1)),
        std=per_channel("std", default_std if std is None else std, max(in_channels, 1)),
        seed=seed,
    )
    # The generator is seeded directly: torch.manual_seed would also reseed every accelerator.
    fork = torch.random.fork_rng(devices=[]) if recipe.seed is not None else contextlib.nullcontext()
    with fork, torch.device("cpu"):
        if recipe.seed is not None:
            torch.default_generator.manual_seed(recipe.seed)
        model, backbone = build(recipe)
    if weights is not None:
        notes = transfer(model, backbone, weights)
        model.recipe = replace(model.recipe, notes=model.recipe.notes + notes)
    return model


def build(recipe: Recipe) -> tuple[Network, Backbone]:
    """The recipe's architecture with fresh weights on torch's current default device, and the backbone it came from.

    Raises:
        ValueError: unknown name, image below the architecture's minimum, or a head it cannot have.
    """
    from models.backbone import assemble

    known = entry(recipe.name)
    if recipe.image_size < known.minimum:
        raise ValueError(f"{recipe.name!r} needs images of at least {known.minimum} px, got {recipe.image_size}")
    backbone = known.builder()(recipe)
    return assemble(replace(recipe, notes=backbone.notes), backbone), backbone


def _statistics(
    known: Entry, channels: int, state: Mapping[str, Tensor] | None
) -> tuple[tuple[float, ...] | float, tuple[float, ...] | float]:
    """Default (mean, std): the checkpoint's own, else those of the published weights, else by channel count."""
    if state is not None:
        own = [state.get("normalise.mean"), state.get("normalise.std")]
        if own[0] is not None and own[1] is not None and own[0].numel() == channels == own[1].numel():
            return tuple(own[0].flatten().tolist()), tuple(own[1].flatten().tolist())
        mean, std = known.statistics
    elif channels == 3:
        mean, std = IMAGENET
    else:
        return 0.5, 0.5
    return (mean, std) if channels == 3 else (sum(mean) / len(mean), sum(std) / len(std))
