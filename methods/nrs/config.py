"""Configuration of pruning with a stability penalty."""

from __future__ import annotations

import dataclasses

from methods.hydra.config import SearchConfig
from methods.iterative import IterativeConfig
from methods.masks import Scope
from methods.training.config import TrainingConfig
from methods.training.fgsm import FGSM
from methods.training.stability import NRSLoss, RSLoss


@dataclasses.dataclass(frozen=True)
class NRSConfig(IterativeConfig):
    """IMP or HYDRA with RSLoss or NRSLoss in training; see `IterativeConfig` for the rest.

    Defaults: IMP+NRSLoss under FGSM + GradAlign at 2/255 (Li et al. 2022, section IV.A, CIFAR-10 and SVHN).

    Args:
        penalty: `NRSLoss` or `RSLoss`, added to ``training.objective`` in every state, and to HYDRA's search.
        eps: radius of the intervals that the penalty reads beside a training without bounds of its own; None for the
            objective's.
        hydra: learn the masks with HYDRA, `scope` is then per layer; None for magnitudes.
    """

    training: TrainingConfig = dataclasses.field(
        default_factory=lambda: TrainingConfig(
            optimizer="sgd", lr=0.01, momentum=0.9, weight_decay=5e-4, schedule="step", clip_grad_norm=8.0,
            objective=FGSM(2 / 255),
        )
    )  # fmt: skip
    penalty: NRSLoss | RSLoss = dataclasses.field(default_factory=NRSLoss)
    eps: float | None = None
    hydra: SearchConfig | None = None
    scope: Scope = "global"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hydra is not None and (self.structured or self.scope != "layer"):
            raise ValueError("HYDRA prunes single weights, each layer by the same fraction: set scope='layer'")

    @property
    def total_epochs(self) -> int:
        """Epochs of a whole run, those of HYDRA's scores among them."""
        return super().total_epochs + (self.rounds * self.hydra.epochs if self.hydra is not None else 0)
