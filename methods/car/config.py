"""Configuration of CAR."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal, get_args

from torch import Tensor

from certify.perturbations import Perturbation
from methods.base import PruningConfig, whole_numbers
from methods.car.initialise import Initialisation, Sign
from methods.car.losses import Alignment, Consistency, Gradient, Hinge
from methods.car.softmask import Noise, Ties
from methods.training.config import TrainingConfig
from methods.training.natural import Natural

Transform = Perturbation | Callable[..., Tensor]


@dataclasses.dataclass(frozen=True)
class CARConfig(PruningConfig):
    """Compression-aware robustness (the CAR paper, sections 2.2 and 3); single weights only.

    Three stages: `epochs` of training with `training`; `mask_epochs` of training soft masks on

        lambda_stab L_stab + lambda_ratio L_ratio + lambda_consis L_consis + lambda_l1 L_L1      (Eq. 9)

    with the weights frozen; `finetune_epochs` with `finetune` under the binary mask. Defaults are the paper's where it
    gives a value. What it leaves open is a field whose default is the reading taken here; see the README.

    Args:
        ratio, epochs, training, finetune_epochs, finetune, scope, layers: see `methods.base.PruningConfig`.
        mask_epochs: of training the masks.
        mask_training: how; its objective is not read.
        init: "partial", "full" or "random" (`methods.car.initialise`).
        tau: fraction of each layer's masks that starts at 1, for "partial".
        sign: "magnitude" starts from |w|; "signed" from w, which the clip to [0, 1] turns into deleting every negative
            weight.
        delta: half-width of the noise on the masks.
        noise: drawn for every "element", or one number a "layer"; anew for each batch and each of the two draws.
        project: clip the masks to [0, 1] after every step; otherwise only what multiplies the weights is clipped.
        lambda_stab, lambda_ratio, lambda_consis, lambda_l1: weights of Eq. 9.
        lambda_ce: weight of the task loss, which Eq. 9 does not have: without it a mask with a constant output is a
            global minimum.
        ce_on: the task loss is that of the first noisy "soft" mask or of the "hard" one.
        eta: safety factor of Eq. 7; infinity turns L_ratio off.
        margin_eps: epsilon of Eq. 6.
        hinge, alignment: see `methods.car.losses.margin_ratio`.
        pair_mask: an image and its edit are seen under the "same" draw of the mask, or under two "independent" draws.
        transform: makes the edits of L_ratio: a perturbation of `certify` (a fresh uniform draw for each image and
            step), or ``transform(batch, generator=g) -> batch`` (its ``repr`` should say what it does: checkpoints
            compare it). None: the pairs that the batches bring (`methods.car.PairedBatches`).
        consistency: "kl" (Eq. 8) or "mse" (Table 3).
        consistency_gradient: into "both" predictions, or into the "hard" one only.
        l1: "mean" over all entries, or the "sum" that a norm is.
        ties: of entries with equal masks, as many are at 1, the smallest weights go first ("magnitude"), the first ones
            ("position"), or all that are not strictly above the percentile, more than the ratio ("drop").
        statistics: batch normalisation in the mask stage uses the "batch" or the "running" statistics.
        affine: train the affine parameters of batch normalisations along with the masks, and keep them.
        dropout: leave dropout on in the mask stage; it then makes predictions differ as the noise on masks does.
        select: what `val` picks in the mask stage: the "last" epoch, or the "best" by accuracy under the binary mask.
        recalibrate: measure the statistics of batch normalisation anew under the binary mask.
        finetune_from: the "pretrained" weights, or those multiplied by their "soft" masks.
    """

    training: TrainingConfig = dataclasses.field(
        default_factory=lambda: TrainingConfig(optimizer="sgd", lr=0.01, momentum=0.9, schedule="constant")
    )
    mask_epochs: int = 100
    mask_training: TrainingConfig = dataclasses.field(default_factory=lambda: TrainingConfig(optimizer="adam", lr=1e-3))
    init: Initialisation = "partial"
    tau: float = 0.3
    sign: Sign = "magnitude"
    delta: float = 0.5
    noise: Noise = "element"
    project: bool = True
    lambda_stab: float = 1.0
    lambda_ratio: float = 1.0
    lambda_consis: float = 1.0
    lambda_l1: float = 0.1
    lambda_ce: float = 0.0
    ce_on: Literal["soft", "hard"] = "soft"
    eta: float = 1.0
    margin_eps: float = 1e-2
    hinge: Hinge = "literal"
    alignment: Alignment = "class"
    pair_mask: Literal["same", "independent"] = "same"
    transform: Transform | None = None
    consistency: Consistency = "kl"
    consistency_gradient: Gradient = "both"
    l1: Literal["mean", "sum"] = "mean"
    ties: Ties = "magnitude"
    statistics: Literal["batch", "running"] = "batch"
    affine: bool = False
    dropout: bool = False
    select: Literal["last", "best"] = "last"
    recalibrate: bool = True
    finetune_from: Literal["pretrained", "soft"] = "pretrained"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.structured:
            raise ValueError("CAR learns a mask entry for every single weight: structured must be False")
        whole_numbers(self, "mask_epochs")
        if not isinstance(self.mask_training, TrainingConfig):
            raise TypeError(f"mask_training must be a TrainingConfig, got {self.mask_training!r:.80}")
        if self.mask_epochs < 0:
            raise ValueError(f"mask_epochs must be >= 0, got {self.mask_epochs}")
        for field, choices in _CHOICES.items():
            if getattr(self, field) not in choices:
                raise ValueError(
                    f"{field} must be one of {', '.join(map(repr, choices))}, got {getattr(self, field)!r}"
                )
        for field in ("tau", "delta"):
            if not 0.0 <= getattr(self, field) <= 1.0:
                raise ValueError(f"{field} must lie in [0, 1], got {getattr(self, field)}")
        for field in ("lambda_stab", "lambda_ratio", "lambda_consis", "lambda_l1", "lambda_ce"):
            if not 0.0 <= getattr(self, field) < math.inf:
                raise ValueError(f"{field} must be a finite weight >= 0, got {getattr(self, field)}")
        if not self.eta > 0.0:
            raise ValueError(f"eta must be > 0 (the paper's lies in (0, 1]; infinity is no L_ratio), got {self.eta}")
        if not 0.0 < self.margin_eps < math.inf:
            raise ValueError(f"margin_eps must be finite and > 0, or a zero margin divides by zero: {self.margin_eps}")
        if self.transform is not None and not isinstance(self.transform, Perturbation) and not callable(self.transform):
            raise ValueError(
                "transform must be a perturbation of certify or a function transform(batch, generator=g), got "
                f"{type(self.transform).__name__}"
            )
        if not isinstance(self.mask_training.objective, Natural):
            raise ValueError("mask_training.objective is not read: CAR's loss takes its place; leave it at Natural()")

    @property
    def compares_pairs(self) -> bool:
        """Whether L_ratio is on, so that pairs of images and their edits are needed."""
        return self.lambda_ratio > 0.0 and self.eta < math.inf

    @property
    def total_epochs(self) -> int:
        """Epochs of a whole run, those of the masks among them."""
        return self.epochs + self.mask_epochs + self.finetune_epochs


_CHOICES: dict[str, tuple[Any, ...]] = {
    "init": get_args(Initialisation),
    "sign": get_args(Sign),
    "noise": get_args(Noise),
    "ce_on": ("soft", "hard"),
    "hinge": get_args(Hinge),
    "alignment": get_args(Alignment),
    "pair_mask": ("same", "independent"),
    "consistency": get_args(Consistency),
    "consistency_gradient": get_args(Gradient),
    "l1": ("mean", "sum"),
    "ties": get_args(Ties),
    "statistics": ("batch", "running"),
    "select": ("last", "best"),
    "finetune_from": ("pretrained", "soft"),
}
