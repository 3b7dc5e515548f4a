"""Random pruning: the control that any ranking has to beat."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from methods.base import Where, check_config, fit_one_shot
from methods.outcome import Outcome
from methods.random.config import RandomConfig
from methods.training.loop import Callback, Loss
from methods.training.objective import Batch


@dataclasses.dataclass(frozen=True)
class Random:
    """Trains, removes weights or channels at random, and fine-tunes the rest."""

    config: RandomConfig = dataclasses.field(default_factory=RandomConfig)

    def __post_init__(self) -> None:
        check_config(self, self.config, RandomConfig)

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
        """Train, prune and fine-tune a copy of `model`. The mask is a function of `seed` and the layers' shapes only.

        The arguments are those of `methods.training.train`; `checkpoint` is a folder to go on from after a kill.
        """

        def score(trained: nn.Module, names: Sequence[str]) -> dict[str, Tensor]:
            generator = torch.Generator().manual_seed(seed)  # on the CPU: the same mask on every device
            weights = dict(trained.named_parameters())
            return {name: torch.rand(weights[name].shape, generator=generator) for name in names}

        return fit_one_shot(
            model, batches, self.config, score,
            val=val, loss=loss, seed=seed, device=device, checkpoint=checkpoint, callbacks=callbacks,
        )  # fmt: skip
