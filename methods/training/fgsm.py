"""Fast adversarial training with one gradient step, kept honest by gradient alignment.

* I. Goodfellow et al. 2015, "Explaining and Harnessing Adversarial Examples": one signed step.
* E. Wong et al. 2020, "Fast is better than free": a uniform start and steps of 1.25 eps.
* M. Andriushchenko, N. Flammarion 2020, "Understanding and Improving Fast Adversarial Training", section 4: GradAlign.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from methods.training.adversarial import Adversarial
from methods.training.bounding import held_statistics, perturbation
from methods.training.losses import TaskLoss
from methods.training.objective import Progress


@dataclasses.dataclass(frozen=True)
class FGSM(Adversarial):
    """The task loss on one-step adversarial images, plus ``grad_align * (1 - cos)`` of two input gradients.

    Args:
        eps, perturbation, schedule, val_steps: see `Adversarial`.
        step_size: of the step, in radii; the result is projected back. 1.25 from "zero" is therefore plain FGSM.
        init: "zero" (the image) or "uniform" (in the set).
        grad_align: weight of ``1 - cos(grad l(x), grad l(x + eta))``, eta uniform in the set, which keeps single-step
            training from catastrophic overfitting. The gradient at x is a constant, as in the authors' code; images
            with a zero gradient are left out of the mean. 0 for none. Needs "Linf".

    The values of Li et al. (TMLR 2022) on all data sets are the defaults. Andriushchenko & Flammarion use .036 on
    CIFAR-10 at 2/255, .2 at 8/255, and 1.757 on SVHN at 2/255 with the radius ramped over the first five epochs.
    """

    step_size: float = 1.25
    init: Literal["zero", "uniform"] = "zero"
    grad_align: float = 0.2

    name: str = dataclasses.field(default="fgsm", init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.step_size > 0.0:
            raise ValueError(f"step_size must be > 0, got {self.step_size}")
        if self.init not in ("zero", "uniform"):
            raise ValueError(f"init must be 'zero' or 'uniform', got {self.init!r}")
        if not 0.0 <= self.grad_align < float("inf"):
            raise ValueError(f"grad_align must be a finite weight >= 0, got {self.grad_align}")
        if self.grad_align and self.perturbation != "Linf":
            raise ValueError(f"gradient alignment is defined for Linf; set grad_align=0 for {self.perturbation}")

    def loss(
        self, model: nn.Module, x: Tensor, y: Tensor, task_loss: TaskLoss, progress: Progress
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        radius = self.radius(progress)
        images = self.craft(model, x, y, task_loss, radius, steps=1, step_size=self.step_size, init=self.init)
        outputs = model(images)
        loss = task_loss(outputs, y)
        metrics = {"robust": loss.detach(), "score": task_loss.score(outputs.detach(), y) / len(x)}
        if self.grad_align and radius > 0.0:
            misaligned = gradient_misalignment(model, x, y, task_loss, radius)
            loss = loss + self.grad_align * misaligned
            metrics["misaligned"] = misaligned.detach()
        return loss, metrics


def gradient_misalignment(model: nn.Module, x: Tensor, y: Tensor, task_loss: TaskLoss, radius: float) -> Tensor:
    """``1 - mean cos(grad_x l(x), grad_x l(x + eta))`` with eta uniform in [-radius, radius], for training.

    Only the gradient at x + eta is differentiated (Andriushchenko & Flammarion 2020, section 4 and code). Statistics of
    both passes are the batch's own and are not recorded.
    """
    noisy = perturbation("Linf", radius).sample(x, 1, None).squeeze(0)
    with held_statistics(model):
        at_x = _input_gradient(model, x, y, task_loss, create_graph=False)
        at_noise = _input_gradient(model, noisy, y, task_loss, create_graph=True)
    one, two = at_x.flatten(1), at_noise.flatten(1)
    squares = torch.stack([one.square().sum(1), two.square().sum(1)])
    alive = (squares > 0).all(0)
    norms = torch.where(alive, squares, torch.ones_like(squares)).sqrt()
    cosine = (one / norms[0].unsqueeze(1) * two).sum(1) / norms[1]
    return 1.0 - (cosine * alive).sum() / alive.sum().clamp(min=1)


def _input_gradient(model: nn.Module, x: Tensor, y: Tensor, task_loss: TaskLoss, create_graph: bool) -> Tensor:
    x = x.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(task_loss(model(x), y), x, create_graph=create_graph)
    return gradient
