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
    """The task loss on images found by PGD from a uniform start.

    Args:
        eps, perturbation, schedule, val_steps: see `Adversarial`.
        steps: gradient steps; 7 in the paper's CIFAR-10 training.
        step_size: of each, in radii; the paper's 2/255 at a radius of 8/255.
    """

    steps: int = 7
    step_size: float = 0.25

    name: str = dataclasses.field(default="pgd", init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 1 or not self.step_size > 0.0:
            raise ValueError(f"need steps >= 1 and step_size > 0, got {self.steps} and {self.step_size}")

    def loss(
        self, model: nn.Module, x: Tensor, y: Tensor, task_loss: TaskLoss, progress: Progress
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        images = self.craft(
            model, x, y, task_loss, self.radius(progress), steps=self.steps, step_size=self.step_size, init="uniform"
        )
        outputs = model(images)
        loss = task_loss(outputs, y)
        return loss, {"robust": loss.detach(), "score": task_loss.score(outputs.detach(), y) / len(x)}
