"""How much the training loss of a state depends on each weight: the gradient that SNIP and Taylor pruning rank by."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor

from methods import masks
from methods.iterative import Trained
from methods.training.loop import seeded
from methods.training.losses import resolve
from methods.training.natural import Natural
from methods.training.objective import Batch, Progress

Objective = Literal["training", "natural"]
At = Literal["trained", "init"]


def weight_times_gradient(
    trained: Trained, *, images: int, objective: Objective = "training", at: At = "trained", drawn: int = 0
) -> dict[str, Tensor]:
    """``w * dL/dw`` of every prunable weight, which is also dL/dm of a mask m on it at m = 1; signed.

    Args:
        trained: the state.
        images: how many images to average L over.
        objective: "training": what the state is trained for, its ramps done; "natural": the clean task loss.
        at: "trained" weights, or those at "init" that survivors go back to, under the present mask.
        drawn: which pass over the batches, counted from the end of training, the images are the first of; only loaders
            that shuffle (``set_epoch``) give other images for another number.

    Batch normalisation uses the statistics of the drawn batch.
    """
    network = copy.deepcopy(trained.network)
    if at == "init":
        network.load_state_dict(trained.initial)
        masks.apply(network, trained.mask)
    parameters = dict(network.named_parameters())
    weights = [parameters[name] for name in trained.names]
    for parameter in weights:
        parameter.requires_grad_(True)
    with seeded(trained.seed, trained.device):
        x, y = draw(trained.batches, images, trained.round * 1000 + drawn)
        task_loss = resolve(trained.loss, y)
        goal = Natural() if objective == "natural" else trained.objective.settled()
        x, y = x.to(trained.device), y.to(trained.device)
        loss, _ = goal.loss(network.train(), x, y, task_loss, Progress(1, 1))
        gradients = torch.autograd.grad(loss, weights)
    return {name: (w * g).detach() for name, w, g in zip(trained.names, weights, gradients)}


def draw(batches: Iterable[Batch], images: int, epoch: int) -> Batch:
    """The first `images` images of a pass over `batches`, all of them when there are fewer."""
    if hasattr(batches, "set_epoch"):
        batches.set_epoch(epoch)
    parts: list[Batch] = []
    count = 0
    for x, y in batches:
        parts.append((x[: images - count], y[: images - count]))
        count += len(parts[-1][0])
        if count >= images:
            break
    xs, ys = zip(*parts)
    return torch.cat(xs), torch.cat(ys)


def check(images: int, objective: str, at: str = "trained") -> None:
    """Raise ValueError for settings that `weight_times_gradient` does not know."""
    if images < 1:
        raise ValueError(f"images must be >= 1, got {images}")
    if objective not in ("training", "natural"):
        raise ValueError(f"objective must be 'training' or 'natural', got {objective!r}")
    if at not in ("trained", "init"):
        raise ValueError(f"at must be 'trained' or 'init', got {at!r}")
