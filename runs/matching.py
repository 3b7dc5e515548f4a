"""Channel ratios at which structured pruning leaves the same share as unstructured pruning does.

Removing the fraction r of every layer's output channels takes the inputs of the next layer along, so that some
``(1 - r)**2`` of the weights are left, not ``1 - r``. A structured cell whose pruning says ``match`` therefore names
the share of parameters, or of executed multiply-adds, that is to go; the channel ratio that does it is found here, on
the network itself, by the counting that the record uses.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

import models
from methods import masks

MEASURES = ("parameters", "flops")
"""What may be matched: parameters left, or multiply-adds executed, after channels are removed physically."""

STEPS = 9
"""Halvings of the search: the ratio is known to 1/512, a channel of the widest layers of the zoo."""


@dataclasses.dataclass(frozen=True)
class Shares:
    """What is left of a network without its pruned channels, as fractions of the whole."""

    parameters: float
    flops: float


def shares(model: nn.Module, image: Tensor, ratio: float, layers: tuple[str, ...], scope: masks.Scope) -> Shares:
    """What a channel ratio leaves of `model`.

    Which channels go changes nothing within a layer; under a global ranking the layers' shares depend on scores, and
    the weights of `model` as they are stand in for those.

    Args:
        model: any network, not changed.
        image: one input (1, C, H, W).
        ratio: fraction of channels removed.
        layers: kinds of layers that are pruned, "conv" and "linear".
        scope: "layer", or "global".
    """
    names = masks.prunable(model, layers, structured=True)
    weights = dict(model.named_parameters())
    scores = {name: weights[name].detach().abs() for name in names}
    mask = masks.Mask.from_scores(scores, ratio, scope, True, groups=masks.groups(model, image))
    small, shape = masks.remove(model, mask, image), tuple(image.shape[1:])
    return Shares(models.count(small) / models.count(model), models.flops(small, shape) / models.flops(model, shape))


def channel_ratio(
    model: nn.Module, image: Tensor, removed: float, measure: str, layers: tuple[str, ...], scope: masks.Scope = "layer"
) -> float:
    """The channel ratio that comes closest to removing the share `removed` of parameters or of multiply-adds.

    Found by bisection: what is left falls with the ratio, in steps of a channel.

    Raises:
        ValueError: an unknown measure, or a share outside [0, 1).
    """
    if measure not in MEASURES:
        raise ValueError(f"match must be one of {', '.join(MEASURES)}, got {measure!r}")
    if not 0.0 <= removed < 1.0:
        raise ValueError(f"the share removed must lie in [0, 1), got {removed}")
    if removed == 0.0:
        return 0.0
    wanted = 1.0 - removed

    def left(ratio: float) -> float:
        return float(getattr(shares(model, image, ratio, layers, scope), measure))

    low, high = 0.0, 1.0
    for _ in range(STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if left(middle) > wanted else (low, middle)
    return min((low, high), key=lambda ratio: abs(left(ratio) - wanted))


def matched(config: Any, measure: str, model: nn.Module, image: Tensor) -> Any:
    """A structured method's configuration, its ``ratio`` (a share to remove) turned into a ratio of channels.

    Raises:
        ValueError: the method removes single weights: its ratio is the share of weights already.
    """
    if not getattr(config, "structured", hasattr(config, "coupled")):
        raise ValueError(
            f"{type(config).__name__} removes single weights, so its ratio needs no matching: leave match out"
        )
    training = model.training
    model.eval()
    with torch.no_grad():
        ratio = channel_ratio(model, image, config.ratio, measure, config.layers, config.scope)
    model.train(training)
    return dataclasses.replace(config, ratio=ratio)
