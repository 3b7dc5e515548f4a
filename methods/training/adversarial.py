"""What adversarial objectives share: crafting examples in a training step, and validation under attack."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import ClassVar, Literal, Self

from torch import Tensor, nn

import certify
from certify.attack import adversarial
from methods.training import bounding
from methods.training.bounding import held_statistics
from methods.training.eps import Linear, Smoothed
from methods.training.losses import TaskLoss
from methods.training.natural import means
from methods.training.objective import Batch, Progress

Kind = Literal["Linf", "L2", "Brightness", "Contrast"]


def perturbation(kind: Kind, radius: float) -> certify.Perturbation:
    """The perturbation of that name in `certify`, clipped to [0, 1]."""
    return certify.L2(radius) if kind == "L2" else bounding.perturbation(kind, radius)


@dataclasses.dataclass(frozen=True)
class Adversarial:
    """Fields and validation of the adversarial objectives.

    Args:
        eps: target radius in pixel space.
        perturbation: "Linf", "L2" (steps along the normalised gradient, projected to the ball), or "Brightness" or
            "Contrast" (searched over their parameter).
        schedule: ramp of the radius over training; at once by default.
        val_steps: steps of the PGD attack of validation at the full radius, from the clean image.

    Examples are crafted with the statistics of the batch they are crafted from, which are not recorded: running
    statistics see one pass a step, that of the loss. The validation score is the accuracy under attack (keypoints:
    minus the px error).
    """

    eps: float
    perturbation: Kind = "Linf"
    schedule: Linear | Smoothed = dataclasses.field(default_factory=lambda: Linear(0.0, 0.0))
    val_steps: int = 10

    mixed_precision: ClassVar[bool] = False

    def __post_init__(self) -> None:
        bounding.check_perturbation("Linf" if self.perturbation == "L2" else self.perturbation, self.eps)
        if self.val_steps < 1:
            raise ValueError(f"val_steps must be >= 1, got {self.val_steps}")

    def radius(self, progress: Progress) -> float:
        """The scheduled radius."""
        return self.eps * self.schedule(progress.fraction)

    def craft(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        task_loss: TaskLoss,
        radius: float,
        *,
        steps: int,
        step_size: float,
        init: str,
    ) -> Tensor:
        """Images within `radius` of x that raise the task loss; `step_size` counts radii. Detached."""
        if radius == 0.0:
            return x
        with held_statistics(model):
            return adversarial(
                model, x, y, perturbation(self.perturbation, radius),
                objective=task_loss, steps=steps, step_size=step_size, init=init,
            )  # fmt: skip

    def validate(
        self, model: nn.Module, val: Iterable[Batch], task_loss: TaskLoss, progress: Progress
    ) -> Mapping[str, float]:
        clean, attacked, count = [], [], 0
        step_size = 2.5 / self.val_steps if self.val_steps > 1 else 1.0
        for x, y in val:
            bad = self.craft(model, x, y, task_loss, self.eps, steps=self.val_steps, step_size=step_size, init="zero")
            clean.append(task_loss.score(model(x), y))
            attacked.append(task_loss.score(model(bad), y))
            count += len(x)
        result = means({"clean": clean, "attacked": attacked}, count)
        return {"score": result["attacked"]} | result

    def settled(self) -> Self:
        return dataclasses.replace(self, schedule=Linear(0.0, 0.0))
