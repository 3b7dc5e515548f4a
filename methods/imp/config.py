"""Configuration of iterative magnitude pruning."""

from __future__ import annotations

import dataclasses
from typing import Literal

from methods.base import LayerKind, PruningConfig
from methods.masks import Scope
from methods.training.config import TrainingConfig


@dataclasses.dataclass(frozen=True)
class IMPConfig(PruningConfig):
    """Iterative magnitude pruning.

    Defaults: the loop of the NRSLoss paper (Li et al. 2022, section 4.1 and appendix): 16 prunings of 20 % of what is
    left, ranked globally over convolutions, survivors rewound to their initial values, 200 epochs a state, SGD .01 with
    momentum .9 and weight decay 5e-4, rate times .1 at 140 and 170 epochs, gradient norm clipped at 8. Its structured
    loop is ``structured=True, rounds=11, ratio=1 - 0.89**11``.

    Args:
        ratio: fraction removed after the last round. Each round removes the same fraction of what is left,
            ``1 - (1 - ratio) ** (1 / rounds)``.
        rounds: how often to prune; there are ``rounds + 1`` trained states, the dense one first.
        epochs: epochs of each state.
        rewind: what the survivors of a pruning go back to: "init", their values in the network given (Frankle & Carbin
            2019); "late", those after `rewind_epoch` epochs of the dense state, from where ``epochs - rewind_epoch``
            epochs follow (Frankle et al. 2020, section 2); "finetune", nothing: `finetune_epochs` epochs with the
            `finetune` settings follow each pruning (Han et al. 2015).
        norm: structured only: L1 or L2 norm of a channel's weights, divided by their number.
    """

    ratio: float = 1.0 - 0.8**16
    epochs: int = 200
    training: TrainingConfig = dataclasses.field(
        default_factory=lambda: TrainingConfig(
            optimizer="sgd", lr=0.01, momentum=0.9, weight_decay=5e-4, schedule="step", clip_grad_norm=8.0
        )
    )
    finetune_epochs: int = 0
    scope: Scope = "global"
    layers: tuple[LayerKind, ...] = ("conv",)
    rounds: int = 16
    rewind: Literal["init", "late", "finetune"] = "init"
    rewind_epoch: int = 1
    norm: Literal["l1", "l2"] = "l1"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rounds < 1:
            raise ValueError(f"rounds must be >= 1, got {self.rounds}; train without pruning with methods.dense")
        if self.rewind not in ("init", "late", "finetune"):
            raise ValueError(f"rewind must be 'init', 'late' or 'finetune', got {self.rewind!r}")
        if self.rewind == "late" and not 0 < self.rewind_epoch < self.epochs:
            raise ValueError(f"rewind_epoch must lie between 0 and epochs={self.epochs}, got {self.rewind_epoch}")
        if self.rewind != "finetune" and self.finetune_epochs:
            raise ValueError("finetune_epochs is for rewind='finetune': rewound states are trained for `epochs` epochs")
        if self.norm not in ("l1", "l2"):
            raise ValueError(f"norm must be 'l1' or 'l2', got {self.norm!r}")

    def removed(self, rounds: int) -> float:
        """Fraction removed after so many rounds."""
        return self.ratio if rounds == self.rounds else 1.0 - (1.0 - self.ratio) ** (rounds / self.rounds)

    @property
    def total_epochs(self) -> int:
        """Epochs of a whole run."""
        later = {"init": self.epochs, "late": self.epochs - self.rewind_epoch, "finetune": self.finetune_epochs}
        return self.epochs + self.rounds * later[self.rewind]
