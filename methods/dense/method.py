"""The dense baseline: training without pruning."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import torch
from torch import nn

from methods.base import Where, check_config, fit_one_shot, magnitude
from methods.dense.config import DenseConfig
from methods.outcome import Outcome
from methods.training.loop import Callback, Loss
from methods.training.objective import Batch


@dataclasses.dataclass(frozen=True)
class Dense:
    """Trains a network and keeps all of it."""

    config: DenseConfig = dataclasses.field(default_factory=DenseConfig)

    def __post_init__(self) -> None:
        check_config(self, self.config, DenseConfig)

    def fit(
        self,
        model: nn.Module,
        batches: Iterable[Batch],
        *,
        val: Iterable[Batch] | None = None,
        loss: Loss | None = None,
        seed: int = 0,
        device: torch.device | str | None = None,
        checkpoint: Where = None,
        callbacks: Sequence[Callback] = (),
    ) -> Outcome:
        """Train a copy of `model` on `batches` of (x, y); the mask keeps everything.

        The arguments are those of `methods.training.train`; `checkpoint` is a folder to go on from after a kill.
        """
        return fit_one_shot(
            model, batches, self.config, magnitude,
            val=val, loss=loss, seed=seed, device=device, checkpoint=checkpoint, callbacks=callbacks,
        )  # fmt: skip
