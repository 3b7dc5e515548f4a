"""Size and cost of any module: parameters and multiply-adds, all of them or those that pruning left."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def count(model: nn.Module, nonzero: bool = False) -> int:
    """Number of parameters (buffers such as batch-norm statistics are none); only those unlike 0 if ``nonzero``."""
    return sum(int(torch.count_nonzero(p)) if nonzero else p.numel() for p in model.parameters())


def flops(model: nn.Module, image_shape: Sequence[int], nonzero: bool = False) -> int:
    """Multiply-adds of the convolutions and linear layers for one image.

    One multiply-add counts once, as in the "FLOPs" of most pruning papers (tools that count multiplications and
    additions apart give twice this). Biases, normalisation, activations, pooling and the fixed maps of keypoint heads
    are left out. A layer that runs k times counts k times.

    Args:
        model: any module; its mode, weights and statistics are left as they are.
        image_shape: (C, H, W).
        nonzero: count only weights unlike 0: what a network with masked weights would cost if zeros were skipped.

    Raises:
        ValueError: ``image_shape`` is not (C, H, W).
    """
    if len(image_shape) != 3 or min(image_shape) < 1:
        raise ValueError(f"image_shape must be (channels, height, width), got {tuple(image_shape)}")
    total = 0

    def add(module: nn.Module, args: object, output: Tensor) -> None:
        nonlocal total
        assert isinstance(module, nn.Conv2d | nn.Linear)
        outputs = module.out_channels if isinstance(module, nn.Conv2d) else module.out_features
        weights = int(torch.count_nonzero(module.weight)) if nonzero else module.weight.numel()
        total += weights * (output.numel() // outputs)

    modes = {module: module.training for module in model.modules()}
    layers = [module for module in modes if isinstance(module, nn.Conv2d | nn.Linear)]
    hooks = [module.register_forward_hook(add) for module in layers]
    like = next(model.parameters(), torch.zeros(()))
    try:
        model.eval()
        with torch.no_grad():
            model(torch.zeros(1, *image_shape, device=like.device, dtype=like.dtype))
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in modes.items():
            module.training = training
    return total
