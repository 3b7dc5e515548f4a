"""MobileNetV2 and EfficientNet-Lite0 from timm, at any width. The only importer of timm.

The trunk is timm's ``EfficientNet`` built from timm's own block strings; at width 1 and 64 px or more it is
``mobilenetv2_100`` or ``efficientnet_lite0`` layer by layer. Two things differ:

* timm fuses batch-norm and activation into one module that is a *subclass* of batch-norm. Tools that look for
  ``nn.BatchNorm2d`` would overlook the activation inside, so each is taken apart into ``norm`` and ``act``.
* Below 64 px the first convolution has stride 1 (there never was a max-pool).
"""

from __future__ import annotations

from collections import OrderedDict
from functools import partial

import timm
from timm.layers import BatchNormAct2d
from timm.models._efficientnet_builder import decode_arch_def, round_channels
from timm.models.efficientnet import EfficientNet
from torch import Tensor, nn

from models.backbone import SMALL_IMAGE, SMALL_STEM, Backbone
from models.recipe import Recipe

_MOBILENETV2 = (
    "ds_r1_k3_s1_c16",
    "ir_r2_k3_s2_e6_c24",
    "ir_r3_k3_s2_e6_c32",
    "ir_r4_k3_s2_e6_c64",
    "ir_r3_k3_s1_e6_c96",
    "ir_r3_k3_s2_e6_c160",
    "ir_r1_k3_s1_e6_c320",
)
_EFFICIENTNET_LITE0 = (
    "ds_r1_k3_s1_e1_c16",
    "ir_r2_k3_s2_e6_c24",
    "ir_r2_k5_s2_e6_c40",
    "ir_r3_k3_s2_e6_c80",
    "ir_r3_k5_s1_e6_c112",
    "ir_r4_k5_s2_e6_c192",
    "ir_r1_k3_s1_e6_c320",
)


def mobilenetv2(recipe: Recipe) -> Backbone:
    """MobileNetV2 (Sandler et al., 2018): timm's ``mobilenetv2_100``, channels scaled and rounded to multiples of 8."""
    return _trunk(recipe, _MOBILENETV2)


def efficientnet_lite0(recipe: Recipe) -> Backbone:
    """EfficientNet-Lite0 (Tan and Le, 2019; ReLU6, no squeeze-and-excitation): timm's ``efficientnet_lite0``.

    ``width`` scales the stem and the last convolution too, which the published family keeps fixed.
    """
    return _trunk(recipe, _EFFICIENTNET_LITE0)


def mobilenetv2_weights() -> dict[str, Tensor]:
    """timm's published ImageNet weights, downloaded or from its cache."""
    return dict(timm.create_model("mobilenetv2_100", pretrained=True).state_dict())


def efficientnet_lite0_weights() -> dict[str, Tensor]:
    """timm's published ImageNet weights, downloaded or from its cache."""
    return dict(timm.create_model("efficientnet_lite0", pretrained=True).state_dict())


def _trunk(recipe: Recipe, blocks: tuple[str, ...]) -> Backbone:
    round_chs = partial(round_channels, multiplier=recipe.width)
    size = round_chs(1280)
    trunk = EfficientNet(
        block_args=decode_arch_def([[block] for block in blocks]),
        num_classes=0,
        num_features=size,
        in_chans=recipe.in_channels,
        stem_size=32,
        round_chs_fn=round_chs,
        norm_layer=nn.BatchNorm2d,
        act_layer=nn.ReLU6,
    )
    small = recipe.image_size < SMALL_IMAGE
    if small:
        trunk.conv_stem.stride = (1, 1)
    features = nn.Sequential(
        OrderedDict((name, getattr(trunk, name)) for name in ("conv_stem", "bn1", "blocks", "conv_head", "bn2"))
    )
    split = _split_activations(features)

    def rename(key: str) -> str:
        path, _, leaf = key.rpartition(".")
        if path == "classifier":
            return f"head.fc.{leaf}"
        return f"features.{path}.norm.{leaf}" if path in split else f"features.{key}"

    return Backbone(
        features,
        nn.Sequential(OrderedDict(global_pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten())),
        size,
        notes=(SMALL_STEM,) if small else (),
        stem="features.conv_stem.weight",
        rename=rename,
    )


def _split_activations(root: nn.Module) -> frozenset[str]:
    """Takes every fused batch-norm + activation below ``root`` apart; returns the paths that now have a ``norm``."""
    split = set()
    for path, module in list(root.named_modules()):
        if not isinstance(module, BatchNormAct2d):
            continue
        norm: nn.Module = nn.BatchNorm2d(module.num_features, eps=module.eps, momentum=module.momentum)
        norm.load_state_dict(module.state_dict())
        if not isinstance(module.act, nn.Identity):
            split.add(path)
            norm = nn.Sequential(OrderedDict(norm=norm, act=module.act))
        parent, _, name = path.rpartition(".")
        setattr(root.get_submodule(parent), name, norm)
    return frozenset(split)
