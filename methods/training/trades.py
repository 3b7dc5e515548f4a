"""TRADES: the clean loss plus how far the prediction moves under attack.

H. Zhang et al. 2019, "Theoretically Principled Trade-off between Robustness and Accuracy", Eq. 5 and Algorithm 1.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from certify.attack import adversarial
from methods.training.adversarial import Adversarial, perturbation
from methods.training.bounding import held_statistics
from methods.training.losses import TaskLoss
from methods.training.objective import Progress


@dataclasses.dataclass(frozen=True)
class TRADES(Adversarial):
    """``CE(f(x), y) + beta KL(f(x) || f(x'))`` with the x' in the set that maximises the divergence.

    Args:
        eps, perturbation, schedule, val_steps: see `Adversarial`.
        beta: weight of the divergence (1 / lambda); 6 in the paper's CIFAR-10 training.
        steps: gradient steps; 10 in the paper.
        step_size: of each, in radii; .007 at .031 in the paper.

    Differs from the authors' code in the start, uniform in the set instead of a Gaussian of .001 around the image, and
    in crafting with the batch's own statistics instead of the running ones. Classification only: the divergence is one
    of class probabilities.
    """

    beta: float = 6.0
    steps: int = 10
    step_size: float = 0.25

    name: str = dataclasses.field(default="trades", init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.beta < float("inf"):
            raise ValueError(f"beta must be a finite weight >= 0, got {self.beta}")
        if self.steps < 1 or not self.step_size > 0.0:
            raise ValueError(f"need steps >= 1 and step_size > 0, got {self.steps} and {self.step_size}")

    def loss(
        self, model: nn.Module, x: Tensor, y: Tensor, task_loss: TaskLoss, progress: Progress
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        if task_loss.kind != "classification":
            raise ValueError("TRADES compares class probabilities; train keypoints with PGD")
        radius = self.radius(progress)
        images = x
        if radius > 0.0:
            with held_statistics(model):
                with torch.no_grad():
                    centre = F.softmax(model(x), 1)
                images = adversarial(
                    model, x, centre, perturbation(self.perturbation, radius),
                    objective=_divergence, steps=self.steps, step_size=self.step_size, init="uniform",
                )  # fmt: skip
        outputs = model(x)
        natural = task_loss(outputs, y)
        metrics = {"natural": natural.detach(), "score": task_loss.score(outputs.detach(), y) / len(x)}
        if radius == 0.0:
            return natural, metrics
        with held_statistics(model):
            moved = _divergence(model(images), F.softmax(outputs, 1))
        return natural + self.beta * moved, metrics | {"moved": moved.detach()}


def _divergence(outputs: Tensor, probabilities: Tensor) -> Tensor:
    """KL(probabilities || softmax(outputs)), the mean over the batch."""
    return F.kl_div(F.log_softmax(outputs, 1), probabilities, reduction="batchmean")
