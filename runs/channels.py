"""The USN metrics of every channel of a finished network, for the maps and histograms of the USN suite."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from methods import masks
from methods.usn import USNConfig, measure

IMAGES = 64
"""Validation images that the metrics are taken on."""

COPIES = 16
"""Perturbed copies of each, in antithetic pairs: the same for every network, whatever it was trained with."""

SEED = 19
_BATCH = 16


def describe(config: USNConfig, model: nn.Module, mask: masks.Mask, val: Any, device: torch.device) -> dict[str, Any]:
    """Layer name -> lists over its channels: ``unbiased`` (u, Eq. 11), ``smooth`` (s, Eq. 12), ``importance``
    (A, Eq. 19), and ``kept`` (bits).

    Args:
        config: names the layers, the perturbation of training and the reading of the metrics.
        model: the network, in evaluation mode, removed channels at zero.
        mask: which channels are left.
        val: validation pack; its first ``IMAGES`` images are used.
        device: where the network is.
    """
    names = masks.prunable(model, config.layers, structured=True)
    batches = val.subset(range(min(IMAGES, len(val)))).batches(_BATCH, device=device, shuffle=False)
    found = measure(
        model,
        batches,
        config.perturbation,
        names,
        m=COPIES,
        metric=config.metric,
        generator=torch.Generator().manual_seed(SEED),
    )
    return {name: _layer(name, layer, config, mask) for name, layer in found.items()}


def _layer(name: str, layer: Any, config: USNConfig, mask: masks.Mask) -> dict[str, Any]:
    channels = len(layer.unbiased)
    kept = mask.channels[name].tolist() if mask.structured and name in mask.channels else [True] * channels
    return {
        "unbiased": layer.unbiased.mean(1).tolist(),
        "smooth": layer.smooth.mean(1).tolist(),
        "importance": layer.channel_importance(config.metric).tolist(),
        "kept": "".join("1" if bit else "0" for bit in kept),
    }
