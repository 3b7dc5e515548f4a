"""What an objective is: the loss of one batch, and the validation score a network is selected by."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Protocol, runtime_checkable

from torch import Tensor, nn

from methods.training.losses import TaskLoss

Batch = tuple[Tensor, Tensor]


@dataclasses.dataclass(frozen=True)
class Progress:
    """Where training is.

    Attributes:
        epoch: current epoch, from 0.
        epochs: epochs in all.
        step: current step of the epoch, from 0.
        steps: steps of an epoch.
    """

    epoch: int
    epochs: int
    step: int = 0
    steps: int = 1

    @property
    def position(self) -> float:
        """Epochs done so far, in fractions: in [0, epochs]."""
        return self.epoch + self.step / self.steps

    @property
    def fraction(self) -> float:
        """Part of the training done so far, in [0, 1]."""
        return self.position / self.epochs if self.epochs else 1.0


@runtime_checkable
class Objective(Protocol):
    """How a network is trained; a frozen dataclass. Natural and certified training ship here; any other fits in."""

    @property
    def name(self) -> str:
        """Short name for tables, such as "natural" or "ibp"."""
        ...

    @property
    def mixed_precision(self) -> bool:
        """Whether the loss may be computed under bfloat16 autocast. Bounds may not: their rounding is not sound."""
        ...

    def loss(
        self, model: nn.Module, x: Tensor, y: Tensor, task_loss: TaskLoss, progress: Progress
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The loss to minimise on one batch, and detached 0-d tensors to report (means over the batch).

        `model` is in train mode, `x` (N, C, H, W) in [0, 1]. Must not move data to the host.
        """
        ...

    def validate(
        self, model: nn.Module, val: Iterable[Batch], task_loss: TaskLoss, progress: Progress
    ) -> Mapping[str, float]:
        """Metrics over `val`, ``"score"`` among them: higher is better, comparable between epochs.

        `model` is in eval mode and gradients are off; the batches are on the model's device.
        """
        ...

    def settled(self) -> Objective:
        """The objective without its ramps, as at the end of training: what a fine-tuning phase uses."""
        ...
