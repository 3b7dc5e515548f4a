"""Adversarial training with projected gradient descent.

A. Madry et al. 2018, "Towards Deep Learning Models Resistant to Adversarial Attacks".
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from torch import Tensor, nn

from methods.training.adversarial import Adversarial
from methods.training.losses import TaskLoss
from methods.training.objective import Progress


@dataclasses.dataclass(frozen=True)
class PGD(Adversarial):
    """The task loss on images found by PGD from a uniform start, and optionally that on the images themselves.

    Args:
        eps, perturbation, schedule, val_steps: see `Adversarial`.
        steps: gradient steps; 7 in the paper's CIFAR-10 training.
        step_size: of each, in radii; the paper's 2/255 at a radius of 8/255.
        clean: weight of the task loss on the images themselves, added to the adversarial one; none in the paper. It
            takes a forward pass of its own.
    """

    steps: int = 7
    step_size: float = 0.25
    clean: float = 0.0

    name: str = dataclasses.field(default="pgd", init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 1 or not self.step_size > 0.0:
            raise ValueError(f"need steps >= 1 and step_size > 0, got {self.steps} and {self.step_size}")
        if not 0.0 <= self.clean < float("inf"):
            raise ValueError(f"clean must be a finite weight >= 0, got {self.clean}")

    def loss(
        self, model: nn.Module, x: Tensor, y: Tensor, task_loss: TaskLoss, progress: Progress
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        images = self.craft(
            model, x, y, task_loss, self.radius(progress), steps=self.steps, step_size=self.step_size, init="uniform"
        )
        outputs = model(images)
        robust = task_loss(outputs, y)
        metrics = {"robust": robust.detach(), "score": task_loss.score(outputs.detach(), y) / len(x)}
        if self.clean == 0.0:
            return robust, metrics
        natural = task_loss(model(x), y)
        return robust + self.clean * natural, metrics | {"natural": natural.detach()}
