"""Configuration of HYDRA."""

from __future__ import annotations

import dataclasses

from methods.iterative import IterativeConfig
from methods.masks import Scope
from methods.training.bounding import Bounding
from methods.training.config import TrainingConfig
from methods.training.objective import Objective
from methods.training.regularised import Regularised


@dataclasses.dataclass(frozen=True)
class SearchConfig:
    """How scores are learned, with the weights frozen.

    Args:
        epochs: of training the scores.
        training: how; its objective is not read, scores are trained for what the weights were. None: Adam, rate times
            .1 at half and three quarters, at .01 for adversarial and natural objectives and .001 for certified ones
            (Li et al. 2022).
    """

    epochs: int = 20
    training: TrainingConfig | None = None

    def __post_init__(self) -> None:
        if self.epochs < 0:
            raise ValueError(f"epochs must be >= 0, got {self.epochs}")

    def resolved(self, objective: Objective) -> TrainingConfig:
        """The training of scores for `objective`."""
        if self.training is not None:
            return self.training
        core = objective.objective if isinstance(objective, Regularised) else objective
        certified = isinstance(core, Bounding)
        return TrainingConfig(
            optimizer="adam", lr=0.001 if certified else 0.01, schedule="step", milestones=(0.5, 0.75), gamma=0.1
        )


@dataclasses.dataclass(frozen=True)
class HYDRAConfig(IterativeConfig):
    """HYDRA in the iterative loop of the NRSLoss paper: the same fraction of every convolution.

    The original, trained once, pruned once and fine-tuned (Sehwag et al. 2020), is
    ``rounds=1, rewind="finetune", finetune_epochs=...``.

    Args:
        search: how scores are learned.
    """

    scope: Scope = "layer"
    search: SearchConfig = dataclasses.field(default_factory=SearchConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.structured:
            raise ValueError("HYDRA learns a score for every single weight: structured must be False")
        if self.scope != "layer":
            raise ValueError("HYDRA prunes each layer by the same fraction: scope must be 'layer'")

    @property
    def total_epochs(self) -> int:
        """Epochs of a whole run, those of the scores among them."""
        return super().total_epochs + self.rounds * self.search.epochs
