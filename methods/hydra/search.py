"""Learning which weights to keep: a score for each weight, trained through the mask it implies.

Sehwag et al. 2020, "HYDRA: Pruning Adversarially Robust Neural Networks", section 3; the top-k mask with a
straight-through gradient is that of Ramanujan et al. 2020, "What's Hidden in a Randomly Weighted Neural Network?".
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from methods.hydra.config import SearchConfig
from methods.iterative import Trained
from methods.masks import Mask
from methods.training.history import History
from methods.training.loop import train


def search(trained: Trained, config: SearchConfig) -> tuple[Mask, History]:
    """The mask, and the history of training its scores.

    Weights, biases and normalisation parameters are frozen; scores start proportional to the weights, so that without
    training the mask is that of magnitudes within each layer. What ``trained.mask`` removed stays removed. The state
    itself is not changed.
    """
    network = copy.deepcopy(trained.network).requires_grad_(False)
    scored: dict[str, _Scored] = {}
    for name in trained.names:
        owner = network.get_submodule(name.rpartition(".")[0])
        weight = owner.weight
        assert isinstance(weight, Tensor)
        alive = trained.mask[name].to(weight.device)
        scored[name] = _Scored(initial_scores(weight), alive, trained.ratio)
        parametrize.register_parametrization(owner, "weight", scored[name])
    training = config.resolved(trained.objective)
    history = train(
        network,
        trained.batches,
        trained.objective.settled(),
        training,
        epochs=config.epochs,
        val=trained.val,
        loss=trained.loss,
        seed=trained.seed,
        device=trained.device,
        checkpoint=trained.where,
        callbacks=trained.callbacks,
        phase=f"round-{trained.round:02d}-mask",
    )
    scores = {name: module.scores.detach().abs() for name, module in scored.items()}
    return trained.select(scores, "layer", False), history


def initial_scores(weight: Tensor) -> Tensor:
    """``sqrt(6 / fan_in) * w / max |w|``, the scaled initialisation (section 3, Eq. 4)."""
    largest = weight.detach().abs().amax().clamp(min=torch.finfo(weight.dtype).tiny)
    return math.sqrt(6.0 / weight[0].numel()) * weight.detach() / largest


class _Scored(nn.Module):
    """A weight under the top-k mask of its scores, for `torch.nn.utils.parametrize`."""

    alive: Tensor

    def __init__(self, scores: Tensor, alive: Tensor, ratio: float) -> None:
        super().__init__()
        self.scores = nn.Parameter(scores)
        self.register_buffer("alive", alive)
        self.kept = scores.numel() - round(ratio * scores.numel())

    def forward(self, weight: Tensor) -> Tensor:
        # Removed for good: below every score.
        size = self.scores.abs().masked_fill(~self.alive, -1.0)
        return weight * _TopK.apply(size, self.kept)


class _TopK(torch.autograd.Function):
    """1 for the k largest entries and 0 for the others; the gradient passes straight through."""

    @staticmethod
    def forward(ctx: Any, size: Tensor, kept: int) -> Tensor:
        mask = torch.zeros_like(size).flatten()
        mask[size.flatten().topk(kept).indices] = 1.0
        return mask.reshape(size.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None
