"""One-shot magnitude pruning: train, remove the smallest weights at once, fine-tune."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Sequence

import torch
from torch import nn

from methods.base import Where, check_config, fit_one_shot, magnitude
from methods.magnitude.config import MagnitudeConfig
from methods.outcome import Outcome
from methods.training.loop import Callback, Loss
from methods.training.objective import Batch


@dataclasses.dataclass(frozen=True)
class Magnitude:
    """Least-weight-magnitude pruning (Han et al. 2015, "Learning both Weights and Connections", section 3)."""

    config: MagnitudeConfig = dataclasses.field(default_factory=MagnitudeConfig)

    def __post_init__(self) -> None:
        check_config(self, self.config, MagnitudeConfig)

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
        """Train, prune and fine-tune a copy of `model`.

        The arguments are those of `methods.training.train`; `checkpoint` is a folder to go on from after a kill.
        """
        return fit_one_shot(
            model, batches, self.config, functools.partial(magnitude, norm=self.config.norm),
            val=val, loss=loss, seed=seed, device=device, checkpoint=checkpoint, callbacks=callbacks,
        )  # fmt: skip
