"""What a builder hands to the zoo, and the network that the zoo makes of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.keypoint import DSNT, PixelScale, start_at_centre
from models.normalise import Normalise
from models.recipe import Recipe

# Below this side an ImageNet stem (stride 2, often a max-pool after it) leaves too little of the image.
SMALL_IMAGE = 64
SMALL_STEM = "3x3 stride-1 stem without max-pool (image below 64 px)"


@dataclass(frozen=True)
class Backbone:
    """A network without its input normalisation and last layer.

    Attributes:
        features: image (N, C, S, S) to the last feature map (N, channels, h, w); to (N, D) if there is no spatial map.
        neck: the last feature map to a vector (N, size), for every head but DSNT.
        size: length of that vector.
        notes: departures from the published architecture.
        stem: state-dict key of the first convolution's weight, the one that depends on the image's channels and size.
        rename: key of the published state dict to the key in :class:`Network`; None drops the entry.
    """

    features: nn.Sequential
    neck: nn.Sequential
    size: int
    notes: tuple[str, ...] = ()
    stem: str | None = None
    rename: Callable[[str], str | None] | None = None


class Network(nn.Module):
    """Normalisation, features, head: images (N, C, S, S) in [0, 1] to (N, num_outputs).

    ``recipe`` says what it was made from.
    """

    def __init__(self, recipe: Recipe, normalise: nn.Module, features: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.recipe = recipe
        self.normalise = normalise
        self.features = features
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(self.normalise(x)))


def assemble(recipe: Recipe, backbone: Backbone) -> Network:
    """Puts the recipe's normalisation before and its head behind a backbone.

    Raises:
        ValueError: a DSNT head on a net without a spatial feature map, or on a map of one row or column.
    """
    head: nn.Module
    if recipe.head == "dsnt":
        shape = feature_shape(backbone.features, recipe)
        if len(shape) != 3:
            raise ValueError(f"{recipe.name!r} has no spatial feature map for a DSNT head: use head='keypoints'")
        head = DSNT(shape[0], recipe.num_outputs // 2, (shape[1], shape[2]), recipe.image_size)
    else:
        head = backbone.neck
        last = nn.Linear(backbone.size, recipe.num_outputs)
        head.add_module("fc", last)
        if recipe.head == "keypoints":
            start_at_centre(last)
            head.add_module("pixels", PixelScale(recipe.image_size))
    return Network(recipe, Normalise(recipe.mean, recipe.std), backbone.features, head)


def feature_shape(features: nn.Module, recipe: Recipe) -> tuple[int, ...]:
    """Shape of one image's features, without the batch, seen by passing a blank image through in eval mode."""
    training = features.training
    features.eval()
    with torch.no_grad():
        out = features(torch.zeros(1, recipe.in_channels, recipe.image_size, recipe.image_size))
    features.train(training)
    return tuple(out.shape[1:])


def scaled(channels: int, width: float, least: int = 1) -> int:
    """``channels`` times ``width``, rounded, and never below ``least``."""
    return max(least, round(channels * width))
