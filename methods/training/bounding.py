"""What objectives that take bounds share: one forward pass a step, and who else may read its intervals."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Literal, Protocol, runtime_checkable

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import certify
from certify.bounds import Propagation
from methods.training.losses import TaskLoss
from methods.training.objective import Progress

Kind = Literal["Linf", "Brightness", "Contrast"]


def perturbation(kind: Kind, radius: float) -> certify.Linf | certify.Brightness | certify.Contrast:
    """The perturbation of that name in `certify`, clipped to [0, 1]."""
    return {"Linf": certify.Linf, "Brightness": certify.Brightness, "Contrast": certify.Contrast}[kind](radius)


def check_perturbation(kind: str, eps: float) -> None:
    """Raise ValueError unless `perturbation` knows the kind and the radius is finite and >= 0."""
    if not 0.0 <= eps < float("inf"):
        raise ValueError(f"eps must be a finite radius >= 0 in pixel space, got {eps}")
    if kind not in ("Linf", "Brightness", "Contrast"):
        raise ValueError(f"perturbation must be Linf, Brightness or Contrast, got {kind!r}")


@dataclasses.dataclass(frozen=True)
class Step:
    """The loss of one batch, with the intervals it was made from.

    Attributes:
        loss: to minimise, a scalar.
        metrics: detached 0-d tensors to report, means over the batch.
        found: the intervals at this step's radius; None in steps that take no bounds.
        share: this step's radius over the target radius, in [0, 1].
    """

    loss: Tensor
    metrics: Mapping[str, Tensor]
    found: Propagation | None = None
    share: float = 1.0


@runtime_checkable
class Bounding(Protocol):
    """An objective whose intervals others may read, so that they are propagated once."""

    def step(self, model: nn.Module, x: Tensor, y: Tensor, task_loss: TaskLoss, progress: Progress) -> Step:
        """As `Objective.loss`, with the intervals."""
        ...


@contextlib.contextmanager
def no_dropout(model: nn.Module) -> Iterator[None]:
    """Dropout modules in eval mode: a random draw has no bound."""
    active = [m for m in model.modules() if isinstance(m, nn.modules.dropout._DropoutNd) and m.training]
    for module in active:
        module.eval()
    try:
        yield
    finally:
        for module in active:
            module.train()


@contextlib.contextmanager
def held_statistics(model: nn.Module) -> Iterator[None]:
    """Batch normalisation in training mode still uses the batch's statistics, but does not record them."""
    tracking = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.training and m.track_running_stats]
    for module in tracking:
        module.track_running_stats = False
    try:
        yield
    finally:
        for module in tracking:
            module.track_running_stats = True
