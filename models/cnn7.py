"""The small networks of the certification literature, written out layer by layer.

All weights start from PyTorch's default initialisation, as in the code the papers released. ``width`` scales every
hidden layer, convolutional or not.
"""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from models.backbone import Backbone, feature_shape, scaled
from models.recipe import Recipe

# (output channels at width 1, kernel, stride); padding 1 throughout
_NRS = ((32, 3, 1), (64, 4, 2), (64, 3, 1), (128, 4, 2), (128, 4, 2))
_HYDRA = ((32, 3, 1), (32, 4, 2), (64, 3, 1), (64, 4, 2))


def cnn7_nrs(recipe: Recipe) -> Backbone:
    """Five Conv-BN-ReLU blocks and two fully connected layers (Li et al., TMLR 2022, the paper's CNN7).

    463,712 convolution weights at width 1 and three input channels.
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    previous = recipe.in_channels
    for i, (channels, kernel, stride) in enumerate(_NRS, start=1):
        channels = scaled(channels, recipe.width)
        layers[f"conv{i}"] = nn.Conv2d(previous, channels, kernel, stride, padding=1)
        layers[f"bn{i}"] = nn.BatchNorm2d(channels)
        layers[f"relu{i}"] = nn.ReLU()
        previous = channels
    return _fully_connected(nn.Sequential(layers), recipe, (100,))


def cnn7_cw(recipe: Recipe) -> Backbone:
    """Four convolutions with max-pooling and three fully connected layers (Carlini and Wagner, 2017, Table 1).

    conv 32, conv 32, pool, conv 64, conv 64, pool, fc 200, fc 200, fc out; 3x3 kernels without padding, no
    batch-norm. Differs from the paper in having no dropout.
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    previous = recipe.in_channels
    for i, channels in enumerate((32, 32, 64, 64), start=1):
        channels = scaled(channels, recipe.width)
        layers[f"conv{i}"] = nn.Conv2d(previous, channels, 3)
        layers[f"relu{i}"] = nn.ReLU()
        if i % 2 == 0:
            layers[f"pool{i // 2}"] = nn.MaxPool2d(2)
        previous = channels
    return _fully_connected(nn.Sequential(layers), recipe, (200, 200))


def cnn_large(recipe: Recipe) -> Backbone:
    """Four convolutions and three fully connected layers, no batch-norm (Sehwag et al., HYDRA, 2020: cnn_large)."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    previous = recipe.in_channels
    for i, (channels, kernel, stride) in enumerate(_HYDRA, start=1):
        channels = scaled(channels, recipe.width)
        layers[f"conv{i}"] = nn.Conv2d(previous, channels, kernel, stride, padding=1)
        layers[f"relu{i}"] = nn.ReLU()
        previous = channels
    return _fully_connected(nn.Sequential(layers), recipe, (512, 512))


def mlp(recipe: Recipe) -> Backbone:
    """Two hidden layers of 100 ReLUs on the flattened image."""
    return _fully_connected(nn.Sequential(OrderedDict(flatten=nn.Flatten())), recipe, (100, 100))


def _fully_connected(features: nn.Sequential, recipe: Recipe, hidden: tuple[int, ...]) -> Backbone:
    """Flatten and hidden ReLU layers behind ``features``; the last layer is the head's."""
    shape = feature_shape(features, recipe)
    neck: OrderedDict[str, nn.Module] = OrderedDict()
    if len(shape) > 1:
        neck["flatten"] = nn.Flatten()
    previous = 1
    for n in shape:
        previous *= n
    for i, size in enumerate(hidden, start=1):
        size = scaled(size, recipe.width)
        neck[f"fc{i}"] = nn.Linear(previous, size)
        neck[f"relu{i}"] = nn.ReLU()
        previous = size
    stem = "features.conv1.weight" if len(shape) > 1 else None
    return Backbone(features, nn.Sequential(neck), previous, stem=stem)
