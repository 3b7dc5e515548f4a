"""Certified training with interval bounds.

Gowal et al. 2018, "On the Effectiveness of Interval Bound Propagation for Training Verifiably Robust Models": a mix of
the task loss on the clean image (weight kappa) and on the worst output that interval bounds allow (weight 1 - kappa).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import certify
from certify.bounds import Propagation
from certify.specs import margin_rows
from methods.training.bounding import Kind, Step, check_perturbation, no_dropout, perturbation
from methods.training.eps import Linear, Smoothed
from methods.training.losses import TaskLoss
from methods.training.natural import means
from methods.training.objective import Batch, Progress


@dataclasses.dataclass(frozen=True)
class IBP:
    """Interval bound propagation training.

    Args:
        eps: target radius in pixel space ([0, 1] units).
        perturbation: the perturbation's class in `certify`: "Linf", or a one-parameter one such as "Brightness" or
            "Contrast", whose box hull is propagated.
        schedule: ramp of the radius over training.
        kappa_start, kappa_end: weight of the clean loss while the radius is 0, and at the full radius; linear in the
            radius in between (section 3: 1 to 0.5).
        detach_statistics: take batch normalisation's statistics as constants in the bounds. With ``kappa_end=0`` this
            saves the backward pass through the clean network; it is not the gradient that was published.

    Classification: cross-entropy of the worst logits, which are minus the lower bounds of the margins against the label
    (folded into the last layer, section 3). Keypoints: the task loss at the output corner farthest from the target,
    an upper bound of the loss of every perturbed image. Batch normalisation uses the statistics of the clean batch;
    dropout is off in steps that take bounds.
    The validation score is ``kappa_end * clean + (1 - kappa_end) * certified`` at the full radius in every epoch, with
    clean accuracy (or minus px error) and certified accuracy (or minus the worst-case px error).
    """

    eps: float
    perturbation: Kind = "Linf"
    schedule: Linear | Smoothed = dataclasses.field(default_factory=Linear)
    kappa_start: float = 1.0
    kappa_end: float = 0.5
    detach_statistics: bool = False

    name: str = dataclasses.field(default="ibp", init=False)
    mixed_precision: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_perturbation(self.perturbation, self.eps)
        for kappa in (self.kappa_start, self.kappa_end):
            if not 0.0 <= kappa <= 1.0:
                raise ValueError(f"kappa is the weight of the clean loss and must lie in [0, 1], got {kappa}")

    def radius(self, progress: Progress) -> float:
        """The scheduled radius."""
        return self.eps * self.schedule(progress.fraction)

    def kappa(self, progress: Progress) -> float:
        """The scheduled weight of the clean loss."""
        return self.kappa_start + self.schedule(progress.fraction) * (self.kappa_end - self.kappa_start)

    def loss(
        self, model: nn.Module, x: Tensor, y: Tensor, task_loss: TaskLoss, progress: Progress
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        step = self.step(model, x, y, task_loss, progress)
        return step.loss, step.metrics

    def step(self, model: nn.Module, x: Tensor, y: Tensor, task_loss: TaskLoss, progress: Progress) -> Step:
        """The loss, and the intervals for those who look at them too (`methods.training.regularised`)."""
        radius, kappa, share = self.radius(progress), self.kappa(progress), self.schedule(progress.fraction)
        if radius == 0.0 or kappa == 1.0:
            outputs = model(x)
            natural = task_loss(outputs, y)
            return Step(natural, self._clean(natural, outputs, y, task_loss), share=share)
        # One forward pass gives the clean outputs and, traced, the graph to bound: normalisation sees the batch once.
        with no_dropout(model):
            traced = certify.Network(model, x, check=False, detach_statistics=self.detach_statistics)
        natural = task_loss(traced.output, y)
        found = self._propagate(traced, radius)
        worst, certified = self._worst(found, y, share, task_loss)
        metrics = self._clean(natural, traced.output, y, task_loss)
        metrics |= {"robust": worst.detach(), "certified": certified.detach() / len(x)}
        # A weight of zero is left out, so that nothing is carried back through the clean network in vain.
        total = worst if kappa == 0.0 else kappa * natural + (1.0 - kappa) * worst
        return Step(total, metrics, found, share)

    def validate(
        self, model: nn.Module, val: Iterable[Batch], task_loss: TaskLoss, progress: Progress
    ) -> Mapping[str, float]:
        clean, certified, count = [], [], 0
        for x, y in val:
            traced = certify.Network(model, x, check=False)
            clean.append(task_loss.score(traced.output, y))
            certified.append(self._worst(self._propagate(traced, self.eps), y, 1.0, task_loss)[1])
            count += len(x)
        result = means({"clean": clean, "certified": certified}, count)
        score = self.kappa_end * result["clean"] + (1.0 - self.kappa_end) * result["certified"]
        return {"score": score} | result

    def settled(self) -> Self:
        return dataclasses.replace(self, schedule=Linear(0.0, 0.0))

    def _clean(self, natural: Tensor, outputs: Tensor, y: Tensor, task_loss: TaskLoss) -> dict[str, Tensor]:
        return {"natural": natural.detach(), "score": task_loss.score(outputs.detach(), y) / len(outputs)}

    def _propagate(self, traced: certify.Network, radius: float) -> Propagation:
        return traced.propagate(perturbation(self.perturbation, radius))

    def _worst(self, found: Propagation, y: Tensor, share: float, task_loss: TaskLoss) -> tuple[Tensor, Tensor]:
        """Mean loss at the worst output, and the sum of its score (certified images; minus px)."""
        if task_loss.kind == "classification":
            margins = self._rows(found, margin_rows(y, found.output[0].shape[1]).to(found.output[0]), share)
            logits = F.pad(-margins, (1, 0))  # the label's own logit is the reference, 0
            return F.cross_entropy(logits, torch.zeros_like(y)), (margins > 0).all(1).sum().float()
        lower, upper = self._ends(found, share)
        corner = torch.where((upper - y).abs() > (lower - y).abs(), upper, lower)
        return task_loss(corner, y), task_loss.score(corner.detach(), y)

    def _rows(self, found: Propagation, C: Tensor, share: float) -> Tensor:
        """Lower bounds of ``C y`` at this share of the radius."""
        return found.lower(C)

    def _ends(self, found: Propagation, share: float) -> tuple[Tensor, Tensor]:
        """Bounds of the outputs at this share of the radius."""
        return found.output
