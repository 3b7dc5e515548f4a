"""ResNet-18 and GoogLeNet from torchvision's blocks, at any width. The only importer of torchvision's models.

At width 1 and 64 px or more the layers and their names are torchvision's own. Below 64 px the stem is a 3x3 convolution
of stride 1 without max-pool, which keeps a useful feature map.
"""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn
from torchvision.models import GoogLeNet_Weights, ResNet18_Weights
from torchvision.models.googlenet import BasicConv2d, Inception
from torchvision.models.resnet import BasicBlock

from models.backbone import SMALL_IMAGE, SMALL_STEM, Backbone, scaled
from models.recipe import Recipe

_LEAST = 8

# torchvision's channel numbers per module: 1x1, 3x3 reduce, 3x3, 5x5 reduce, 5x5, pool projection; None is a max-pool
_INCEPTION: dict[str, tuple[int, int, int, int, int, int] | None] = {
    "inception3a": (64, 96, 128, 16, 32, 32),
    "inception3b": (128, 128, 192, 32, 96, 64),
    "maxpool3": None,
    "inception4a": (192, 96, 208, 16, 48, 64),
    "inception4b": (160, 112, 224, 24, 64, 64),
    "inception4c": (128, 128, 256, 24, 64, 64),
    "inception4d": (112, 144, 288, 32, 64, 64),
    "inception4e": (256, 160, 320, 32, 128, 128),
    "maxpool4": None,
    "inception5a": (256, 160, 320, 32, 128, 128),
    "inception5b": (384, 192, 384, 48, 128, 128),
}


def resnet18(recipe: Recipe) -> Backbone:
    """ResNet-18 (He et al., 2016) as in torchvision, every stage scaled by ``width``."""
    widths = [scaled(c, recipe.width, _LEAST) for c in (64, 128, 256, 512)]
    small = recipe.image_size < SMALL_IMAGE
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    kernel, stride = (3, 1) if small else (7, 2)
    layers["conv1"] = nn.Conv2d(recipe.in_channels, widths[0], kernel, stride, padding=kernel // 2, bias=False)
    layers["bn1"] = nn.BatchNorm2d(widths[0])
    layers["relu"] = nn.ReLU(inplace=True)
    if not small:
        layers["maxpool"] = nn.MaxPool2d(3, stride=2, padding=1)
    previous = widths[0]
    for i, channels in enumerate(widths, start=1):
        stride = 1 if i == 1 else 2
        downsample = None
        if stride != 1 or previous != channels:
            downsample = nn.Sequential(
                nn.Conv2d(previous, channels, 1, stride=stride, bias=False), nn.BatchNorm2d(channels)
            )
        layers[f"layer{i}"] = nn.Sequential(
            BasicBlock(previous, channels, stride, downsample), BasicBlock(channels, channels)
        )
        previous = channels
    features = nn.Sequential(layers)
    _he_initialisation(features)
    return Backbone(
        features,
        _pooled(),
        previous,
        notes=(SMALL_STEM,) if small else (),
        stem="features.conv1.weight",
        rename=_rename,
    )


def googlenet(recipe: Recipe) -> Backbone:
    """GoogLeNet (Szegedy et al., 2015) as in torchvision, with batch-norm and without auxiliary heads.

    torchvision's "5x5" branches have 3x3 kernels, and so have these. The 20 % dropout before the last layer is kept for
    class scores and left out for coordinates. Convolutions start as in torchvision's ResNet (He): with torchvision's
    standard deviation of 0.01 an untrained net in eval mode is a constant, and at small widths the variance before
    batch-norm falls below batch-norm's epsilon.
    """

    def channels(c: int) -> int:
        return scaled(c, recipe.width, _LEAST)

    small = recipe.image_size < SMALL_IMAGE
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    kernel, stride = (3, 1) if small else (7, 2)
    layers["conv1"] = BasicConv2d(
        recipe.in_channels, channels(64), kernel_size=kernel, stride=stride, padding=kernel // 2
    )
    if not small:
        layers["maxpool1"] = nn.MaxPool2d(3, stride=2, ceil_mode=True)
    layers["conv2"] = BasicConv2d(channels(64), channels(64), kernel_size=1)
    layers["conv3"] = BasicConv2d(channels(64), channels(192), kernel_size=3, padding=1)
    layers["maxpool2"] = nn.MaxPool2d(3, stride=2, ceil_mode=True)
    previous = channels(192)
    for name, numbers in _INCEPTION.items():
        if numbers is None:
            layers[name] = nn.MaxPool2d(3 if name == "maxpool3" else 2, stride=2, ceil_mode=True)
            continue
        one, three_in, three, five_in, five, pool = (channels(c) for c in numbers)
        layers[name] = Inception(previous, one, three_in, three, five_in, five, pool)
        previous = one + three + five + pool
    features = nn.Sequential(layers)
    _he_initialisation(features)
    neck = _pooled()
    if recipe.head is None:
        neck.add_module("dropout", nn.Dropout(0.2))
    return Backbone(
        features,
        neck,
        previous,
        notes=(SMALL_STEM,) if small else (),
        stem="features.conv1.conv.weight",
        rename=_rename,
    )


def resnet18_weights() -> dict[str, Tensor]:
    """torchvision's published ImageNet weights, downloaded or from its cache."""
    return dict(ResNet18_Weights.DEFAULT.get_state_dict(progress=False, check_hash=True))


def googlenet_weights() -> dict[str, Tensor]:
    """torchvision's published ImageNet weights, downloaded or from its cache. They expect (x - .5) / .5."""
    return dict(GoogLeNet_Weights.DEFAULT.get_state_dict(progress=False, check_hash=True))


def _he_initialisation(features: nn.Module) -> None:
    for module in features.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def _pooled() -> nn.Sequential:
    return nn.Sequential(OrderedDict(avgpool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten()))


def _rename(key: str) -> str | None:
    if key.startswith(("aux1.", "aux2.")):
        return None
    return f"head.{key}" if key.startswith("fc.") else f"features.{key}"
