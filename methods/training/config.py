"""How a network is trained: optimiser, learning rate, objective. One frozen dataclass, passed explicitly."""

from __future__ import annotations

import dataclasses
import fnmatch
import math
from typing import Literal

import torch
from torch import nn

from methods.training.natural import Natural
from methods.training.objective import Objective, Progress


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """Everything about training but its length, which belongs to the method.

    Args:
        optimizer: "sgd" (with `momentum`, `nesterov`), "adam" or "adamw".
        lr: peak learning rate.
        weight_decay: L2 penalty (decoupled for "adamw"), on all parameters.
        schedule: "constant", "step" (times `gamma` at each of `milestones`) or "cosine" (to 0).
        milestones: fractions of the training, so that a short run keeps the shape of a long one.
        warmup_epochs: linear warm-up from 0 at the start, in epochs.
        clip_grad_norm: largest global gradient norm; None for no clipping.
        lr_scale: pairs (pattern of parameter names, factor), such as ``("fc1.*", 0.05)``; the first match counts.
        select_after: only epochs in the last ``1 - select_after`` of the training may be selected on validation.
        amp: bfloat16 autocast on CUDA devices that have it, for objectives that allow it. Off by default: a bfloat16
            coordinate of 64 px is rounded to a quarter of a pixel.
        channels_last: channels-last memory format on CUDA.
        objective: what is minimised.
    """

    optimizer: Literal["sgd", "adam", "adamw"] = "adam"
    lr: float = 1e-3
    momentum: float = 0.9
    nesterov: bool = False
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    schedule: Literal["constant", "step", "cosine"] = "cosine"
    milestones: tuple[float, ...] = (0.7, 0.85)
    gamma: float = 0.1
    warmup_epochs: float = 0.0
    clip_grad_norm: float | None = None
    lr_scale: tuple[tuple[str, float], ...] = ()
    select_after: float = 0.0
    amp: bool = False
    channels_last: bool = True
    objective: Objective = dataclasses.field(default_factory=Natural)

    def __post_init__(self) -> None:
        if self.optimizer not in ("sgd", "adam", "adamw"):
            raise ValueError(f"optimizer must be 'sgd', 'adam' or 'adamw', got {self.optimizer!r}")
        if self.schedule not in ("constant", "step", "cosine"):
            raise ValueError(f"schedule must be 'constant', 'step' or 'cosine', got {self.schedule!r}")
        if not 0.0 < self.lr < math.inf:
            raise ValueError(f"lr must be a finite number > 0, got {self.lr}")
        if self.weight_decay < 0 or self.warmup_epochs < 0:
            raise ValueError(
                f"weight_decay and warmup_epochs must be >= 0, got {self.weight_decay}, {self.warmup_epochs}"
            )
        if self.clip_grad_norm is not None and not self.clip_grad_norm > 0:
            raise ValueError(f"clip_grad_norm must be > 0 or None, got {self.clip_grad_norm}")
        if any(not 0.0 <= m <= 1.0 for m in self.milestones):
            raise ValueError(f"milestones are fractions of the training in [0, 1], got {self.milestones}")
        if not 0.0 <= self.select_after < 1.0:
            raise ValueError(f"select_after must lie in [0, 1), got {self.select_after}")

    def factor(self, progress: Progress) -> float:
        """The learning rate's factor at a step, relative to its peak."""
        if progress.position < self.warmup_epochs:
            return min(1.0, (progress.position + 1.0 / progress.steps) / self.warmup_epochs)
        if self.schedule == "step":
            # 1e-9: 0.7 * 10 epochs must mean epoch 7 in spite of rounding.
            return self.gamma ** sum(progress.fraction >= m - 1e-9 for m in self.milestones)
        if self.schedule == "cosine":
            length = max(progress.epochs - self.warmup_epochs, 1e-9)
            return 0.5 * (1.0 + math.cos(math.pi * min(1.0, (progress.position - self.warmup_epochs) / length)))
        return 1.0

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        """The optimiser over the trainable parameters; each group carries its peak rate as ``"peak"``."""
        by_rate: dict[float, list[nn.Parameter]] = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                scale = next((s for pattern, s in self.lr_scale if fnmatch.fnmatchcase(name, pattern)), 1.0)
                by_rate.setdefault(self.lr * scale, []).append(parameter)
        if not by_rate:
            raise ValueError("no parameter of the network requires gradients: there is nothing to train")
        groups = [{"params": params, "lr": rate, "peak": rate} for rate, params in by_rate.items()]
        if self.optimizer == "sgd":
            return torch.optim.SGD(
                groups, lr=self.lr, momentum=self.momentum, nesterov=self.nesterov, weight_decay=self.weight_decay
            )
        kind = torch.optim.Adam if self.optimizer == "adam" else torch.optim.AdamW
        return kind(groups, lr=self.lr, betas=self.betas, weight_decay=self.weight_decay)
