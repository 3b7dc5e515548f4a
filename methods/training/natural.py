"""Natural training: the task loss on clean images."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from methods.training.losses import TaskLoss
from methods.training.objective import Batch, Progress


@dataclasses.dataclass(frozen=True)
class Natural:
    """Empirical risk minimisation on clean images. The validation score is accuracy, or minus the error in px."""

    name: Literal["natural"] = dataclasses.field(default="natural", init=False)
    mixed_precision: ClassVar[bool] = True

    def loss(
        self, model: nn.Module, x: Tensor, y: Tensor, task_loss: TaskLoss, progress: Progress
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        outputs = model(x).float()
        return task_loss(outputs, y), {"score": task_loss.score(outputs.detach(), y) / len(x)}

    def validate(
        self, model: nn.Module, val: Iterable[Batch], task_loss: TaskLoss, progress: Progress
    ) -> Mapping[str, float]:
        scores, losses, count = [], [], 0
        for x, y in val:
            outputs = model(x).float()
            scores.append(task_loss.score(outputs, y))
            losses.append(task_loss(outputs, y) * len(x))
            count += len(x)
        return means({"score": scores, "loss": losses}, count)

    def settled(self) -> Natural:
        return self


def means(sums: Mapping[str, list[Tensor]], count: int) -> dict[str, float]:
    """Per-image means of per-batch sums, read from the device in one transfer.

    Raises:
        ValueError: no image at all.
    """
    if not count:
        raise ValueError("the validation batches are empty; pass val=None to train without selection")
    totals = torch.stack([torch.stack(values).double().sum() for values in sums.values()]).tolist()
    return {name: total / count for name, total in zip(sums, totals)}
