"""Task losses: what a network is trained to do, and the score it is selected by.

A task loss is called ``loss(outputs, targets) -> scalar`` (mean over the batch) and has ``score(outputs, targets)``,
the *sum* over the batch of a per-image score, higher is better, for validation. Keypoint outputs and targets are pixel
coordinates ``x0, y0, x1, y1, ...``, (N, 2K).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

Kind = Literal["classification", "regression"]


@runtime_checkable
class TaskLoss(Protocol):
    """Loss and validation score of a task."""

    @property
    def kind(self) -> Kind:
        """ "classification" (integer labels (N,)) or "regression" (float targets of the outputs' shape)."""
        ...

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Mean loss over the batch, a scalar."""
        ...

    def score(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Sum over the batch of the per-image score, a scalar; higher is better."""
        ...


@dataclasses.dataclass(frozen=True)
class CrossEntropy:
    """Cross-entropy for integer labels (N,); the score is the number of correct predictions."""

    label_smoothing: float = 0.0
    kind: Kind = dataclasses.field(default="classification", init=False)

    def __post_init__(self) -> None:
        if not 0.0 <= self.label_smoothing < 1.0:
            raise ValueError(f"label_smoothing must lie in [0, 1), got {self.label_smoothing}")

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets, label_smoothing=self.label_smoothing)

    def score(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs.argmax(1) == targets).sum().float()


def point_distance(outputs: Tensor, targets: Tensor) -> Tensor:
    """Euclidean distance of each keypoint in pixels: (N, 2K), (N, 2K) -> (N, K), with a finite gradient at zero."""
    squared = (outputs - targets).reshape(len(outputs), -1, 2).square().sum(-1)
    return (squared + 1e-12).sqrt()


@dataclasses.dataclass(frozen=True)
class KeypointMSE:
    """Mean squared error per coordinate, px²; the score is minus the mean Euclidean keypoint error in px."""

    kind: Kind = dataclasses.field(default="regression", init=False)

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.mse_loss(outputs, targets)

    def score(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return -point_distance(outputs, targets).mean(1).sum()


@dataclasses.dataclass(frozen=True)
class KeypointEuclidean:
    """Mean Euclidean keypoint distance in px, the loss of DSNT (Nibali et al. 2018, Eq. 6, without regulariser).

    Equivalent to `KeypointMSE` at its minimum, but linear in the error: far-off keypoints weigh less.
    """

    kind: Kind = dataclasses.field(default="regression", init=False)

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return point_distance(outputs, targets).mean()

    def score(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return -point_distance(outputs, targets).mean(1).sum()


@dataclasses.dataclass(frozen=True)
class Custom:
    """Any ``function(outputs, targets) -> mean loss`` as a task loss; the score is minus the loss."""

    function: Callable[[Tensor, Tensor], Tensor]
    kind: Kind = "regression"

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self.function(outputs, targets)

    def score(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return -self.function(outputs, targets) * len(outputs)


def resolve(loss: TaskLoss | Callable[[Tensor, Tensor], Tensor] | None, targets: Tensor) -> TaskLoss:
    """The task loss for `targets`: `loss` itself (a bare function is wrapped), or the default for None.

    The default is `CrossEntropy` for integer targets (N,) and `KeypointMSE` for float targets (N, 2K).

    Raises:
        ValueError: None, with targets of any other kind.
    """
    if loss is None:
        if targets.dtype == torch.int64 and targets.ndim == 1:
            return CrossEntropy()
        if targets.is_floating_point() and targets.ndim == 2 and targets.shape[1] % 2 == 0:
            return KeypointMSE()
        raise ValueError(
            f"no default loss for targets {targets.dtype} {tuple(targets.shape)}: expected int64 labels (N,) or float "
            "keypoints (N, 2K); pass loss="
        )
    if isinstance(loss, TaskLoss):
        return loss
    if not callable(loss):
        raise ValueError(f"loss must be callable as loss(outputs, targets), got {type(loss).__name__}")
    return Custom(loss, "regression" if targets.is_floating_point() else "classification")
