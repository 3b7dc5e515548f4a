"""Any objective with penalties added: on the stability of ReLUs, on normalisation weights, on the tightness of bounds.

A `Regulariser` sees the network and, if it asks for them, the intervals of this step. A certified objective propagates
those anyway and shares them; beside any other objective they are propagated for the penalty alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Mapping
from typing import Protocol, Self, runtime_checkable

import torch
from torch import Tensor, nn

import certify
from certify.bounds import Propagation
from methods.training.bounding import (
    Bounding,
    Kind,
    Step,
    check_perturbation,
    held_statistics,
    no_dropout,
    perturbation,
)
from methods.training.losses import TaskLoss
from methods.training.objective import Batch, Objective, Progress


@runtime_checkable
class Regulariser(Protocol):
    """A penalty on a network in training; a frozen dataclass."""

    @property
    def name(self) -> str:
        """Short name for tables, such as "nrs"."""
        ...

    @property
    def bounded(self) -> bool:
        """Whether it reads intervals. It is then left out of steps at radius 0."""
        ...

    def penalty(self, model: nn.Module, found: Propagation | None, share: float) -> Tensor:
        """The weighted penalty, a scalar. `found` is there if `bounded`; `share` is the radius over its target."""
        ...


@dataclasses.dataclass(frozen=True)
class Regularised:
    """`objective` plus `regularisers`. Validation is the objective's own.

    Args:
        objective: what is trained for.
        regularisers: the penalties.
        eps: radius of the intervals beside an objective that takes none; None for the objective's own ``eps``.
            Certified objectives lend their intervals at the scheduled radius, and this is not read.
        perturbation: kind of those intervals.

    Beside an objective without bounds, the intervals are around the clean images with the statistics of the clean
    batch, which are not recorded a second time.
    """

    objective: Objective
    regularisers: tuple[Regulariser, ...]
    eps: float | None = None
    perturbation: Kind = "Linf"

    def __post_init__(self) -> None:
        if not self.regularisers:
            raise ValueError("regularisers is empty; use the objective itself")
        if self._needs_bounds and not isinstance(self.objective, Bounding):
            check_perturbation(self.perturbation, self.radius)

    @property
    def name(self) -> str:
        """Such as "crown-ibp+nrs"."""
        return "+".join([self.objective.name, *(r.name for r in self.regularisers)])

    @property
    def mixed_precision(self) -> bool:
        """As the objective, but never with bounds."""
        return self.objective.mixed_precision and not self._needs_bounds

    @property
    def radius(self) -> float:
        """The radius of intervals beside an objective that takes none."""
        eps = self.eps if self.eps is not None else getattr(self.objective, "eps", None)
        if eps is None:
            raise ValueError(f"{self.objective.name} training has no radius of its own: pass eps to Regularised")
        return float(eps)

    @property
    def _needs_bounds(self) -> bool:
        return any(r.bounded for r in self.regularisers)

    def loss(
        self, model: nn.Module, x: Tensor, y: Tensor, task_loss: TaskLoss, progress: Progress
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        step = self.step(model, x, y, task_loss, progress)
        return step.loss, step.metrics

    def step(self, model: nn.Module, x: Tensor, y: Tensor, task_loss: TaskLoss, progress: Progress) -> Step:
        """The objective's step with the penalties added."""
        if isinstance(self.objective, Bounding):
            step = self.objective.step(model, x, y, task_loss, progress)
        else:
            step = Step(*self.objective.loss(model, x, y, task_loss, progress))
            if self._needs_bounds and self.radius > 0.0:
                step = dataclasses.replace(step, found=self._propagated(model, x, self.radius))
        if step.found is None and self._needs_bounds and progress.position == 0.0:
            # The radius may stay 0 for epochs. A penalty that finds nothing to read in this network says so now.
            with torch.no_grad():
                found = self._propagated(model, x, 0.0)
            for regulariser in self.regularisers:
                if regulariser.bounded:
                    regulariser.penalty(model, found, 0.0)
        loss, metrics = step.loss, dict(step.metrics)
        for regulariser in self.regularisers:
            if not regulariser.bounded or step.found is not None:
                penalty = regulariser.penalty(model, step.found, step.share)
                loss = loss + penalty
                metrics[regulariser.name] = penalty.detach()
        return dataclasses.replace(step, loss=loss, metrics=metrics)

    def _propagated(self, model: nn.Module, x: Tensor, radius: float) -> Propagation:
        """Intervals around `x` with the statistics of this batch, which are not recorded a second time."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(no_dropout(model))
            stack.enter_context(held_statistics(model))
            traced = certify.Network(model, x, check=False)
        return traced.propagate(perturbation(self.perturbation, radius))

    def validate(
        self, model: nn.Module, val: Iterable[Batch], task_loss: TaskLoss, progress: Progress
    ) -> Mapping[str, float]:
        return self.objective.validate(model, val, task_loss, progress)

    def settled(self) -> Self:
        return dataclasses.replace(self, objective=self.objective.settled())
