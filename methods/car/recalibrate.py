"""Recalibrating batch normalisation: the running statistics of a pruned network, measured anew."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from methods.training.loop import device_of
from methods.training.objective import Batch


@torch.no_grad()
def recalibrate(model: nn.Module, batches: Iterable[Batch], device: torch.device | str | None = None) -> nn.Module:
    """Replace the running statistics of every batch normalisation by their mean over one pass of `batches`.

    In place; returns `model` in eval mode. Batches count by their size. Layers see what the layers before them make
    of the batch's own statistics, as in training; dropout is off. Networks without batch normalisation stay as they
    are.

    Raises:
        ValueError: no batch at all.
    """
    model.eval()
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    if not norms:
        return model
    device = device_of(model, device)
    momenta, seen = [norm.momentum for norm in norms], 0
    try:
        for norm in norms:
            norm.train()
        for x, _ in batches:
            if not seen:
                for norm in norms:
                    norm.reset_running_stats()
            seen += len(x)
            for norm in norms:
                norm.momentum = len(x) / seen  # the running value becomes the mean over all images so far
            model(x.to(device))
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        model.eval()
    if not seen:
        raise ValueError("batches are empty: there is nothing to measure the statistics of batch normalisation on")
    return model
