"""The networks and images of the bench."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

TRAINING_STEPS, TRAINING_EPOCHS, TRAINING_BATCH = 400, 10, 16
EPS = {"cnn7-ibp": 0.05}
DEFAULT_EPS = 2 / 255
NETS = {
    "mlp": "two hidden layers of 100, 28×28",
    "resnet-small": "ResNet18 at 1/16 of its width, 3×32×32",
    "cnn7-ibp": "CNN7 trained by IBP, 28×28, ε = 0.05",
    "cnn7-random": "CNN7 with random weights, 28×28",
    "resnet18": "ResNet18 at a quarter of its width, 3×32×32",
}


def digits_at(size: int, device: torch.device, channels: int = 1) -> tuple[Tensor, Tensor]:
    """scikit-learn's digits enlarged to ``size`` pixels: real images that need no download."""
    import torch.nn.functional as F

    from runs.packages import ours

    x, y = ours("datasets").load("digits", split="train").tensors(device=device)
    large = F.interpolate(x, size=(size, size), mode="bilinear", align_corners=False).clamp(0, 1)
    return large.expand(-1, channels, -1, -1).contiguous(), y


def cnn7(device: torch.device, width: float) -> nn.Module:
    """The CNN7 of the bench at 28×28."""
    import models

    return models.create("cnn7_nrs", num_outputs=10, in_channels=1, image_size=28, width=width, seed=0).to(device)


@functools.lru_cache(maxsize=2)
def trained_with_ibp(device: torch.device, width: float, eps: float) -> nn.Module:
    """CNN7 trained with interval bounds on the enlarged digits; once a process.

    Starts from Fast-IBP's initialisation: from the usual one so short a training ends in a constant network, whose
    bounds are all alike.
    """
    from methods.dense import Dense, DenseConfig
    from methods.training.config import TrainingConfig
    from methods.training.eps import Linear
    from methods.training.fast_ibp import initialise
    from methods.training.ibp import IBP

    x, y = digits_at(28, device)
    x = x[: TRAINING_BATCH * TRAINING_STEPS // TRAINING_EPOCHS]
    batches = [(x[i : i + TRAINING_BATCH], y[i : i + TRAINING_BATCH]) for i in range(0, len(x), TRAINING_BATCH)]
    objective = IBP(eps=eps, schedule=Linear(0.1, 0.6))
    training = TrainingConfig(lr=5e-4, clip_grad_norm=8.0, objective=objective)
    config = DenseConfig(epochs=TRAINING_EPOCHS, training=training)
    return Dense(config).fit(initialise(cnn7(device, width)), batches, seed=0, device=device).model.eval()


def accuracy(net: nn.Module, x: Tensor, y: Tensor) -> float:
    """Share of images that the network classifies correctly."""
    import torch

    with torch.no_grad():
        return float((net(x).argmax(1) == y).float().mean())


def build(name: str, device: torch.device, width: float, images: int) -> tuple[nn.Module, Tensor, float]:
    """The network, `images` images for it and a radius."""
    import models

    eps = EPS.get(name, DEFAULT_EPS)
    net: nn.Module
    if name == "mlp":
        net = models.create("mlp", num_outputs=10, in_channels=1, image_size=28, width=width, seed=0).to(device)
    elif name == "cnn7-ibp":
        net = trained_with_ibp(device, width, eps)
    elif name == "cnn7-random":
        net = cnn7(device, width)
    else:
        share = width / 16 if name == "resnet-small" else width / 4
        net = models.create("resnet18", num_outputs=10, in_channels=3, image_size=32, width=share, seed=0).to(device)
    size, channels = (32, 3) if "resnet" in name else (28, 1)
    x, _ = digits_at(size, device, channels)
    return net.eval().requires_grad_(False), x[-images:], eps
