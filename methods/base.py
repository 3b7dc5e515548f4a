"""What the baselines share: configuration fields, choosing a mask, and the train - prune once - fine-tune procedure."""

from __future__ import annotations

import dataclasses
import numbers
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from methods import masks
from methods.masks import ChannelGroup, Mask, Scope
from methods.outcome import Outcome
from methods.training.checkpoint import Checkpoint
from methods.training.config import TrainingConfig
from methods.training.loop import Callback, Loss, device_of, first_batch, seeded, train, trained_copy
from methods.training.objective import Batch

LayerKind = Literal["conv", "linear"]
Where = Checkpoint | str | os.PathLike[str] | None
Score = Callable[[nn.Module, Sequence[str]], Mapping[str, Tensor]]


@dataclasses.dataclass(frozen=True)
class PruningConfig:
    """Fields that the baselines have in common.

    Args:
        ratio: fraction removed, of the weights (unstructured) or channels (structured) of the prunable layers.
        epochs: epochs of training before pruning.
        training: how to train.
        finetune_epochs: epochs after pruning, with the mask held.
        finetune: how to fine-tune; None: as `training` at a tenth of its rate, without warm-up and ramps.
        structured: remove output channels rather than single weights. The output layer keeps its channels.
        scope: rank over all layers ("global") or remove the same fraction from each ("layer").
        coupled: structured only: channels tied by a residual addition or a depthwise convolution go together, so that
            they can be removed physically. Otherwise each layer's channels are chosen on their own.
        layers: kinds of layers that are pruned.
    """

    ratio: float = 0.5
    epochs: int = 50
    training: TrainingConfig = dataclasses.field(default_factory=TrainingConfig)
    finetune_epochs: int = 50
    finetune: TrainingConfig | None = None
    structured: bool = False
    scope: Scope = "layer"
    coupled: bool = True
    layers: tuple[LayerKind, ...] = ("conv", "linear")

    def __post_init__(self) -> None:
        if not isinstance(self.ratio, numbers.Real):
            raise TypeError(f"ratio is the fraction removed, a number in [0, 1), got {self.ratio!r}")
        if not 0.0 <= self.ratio < 1.0:
            raise ValueError(f"ratio is the fraction removed and must lie in [0, 1), got {self.ratio}")
        whole_numbers(self, "epochs", "finetune_epochs")
        for name in ("training", "finetune"):
            value = getattr(self, name)
            if not isinstance(value, TrainingConfig) and (value is not None or name == "training"):
                raise TypeError(
                    f"{name} must be a TrainingConfig, such as TrainingConfig(objective=PGD(0.1)), got {value!r:.80}"
                )
        if self.epochs < 0 or self.finetune_epochs < 0:
            raise ValueError(f"epochs must be >= 0, got {self.epochs} and {self.finetune_epochs}")
        if self.scope not in ("global", "layer"):
            raise ValueError(f"scope must be 'global' or 'layer', got {self.scope!r}")
        if not self.layers or any(kind not in ("conv", "linear") for kind in self.layers):
            raise ValueError(f"layers must be a tuple of 'conv' and 'linear', got {self.layers!r}")

    @property
    def finetuning(self) -> TrainingConfig:
        """How to fine-tune."""
        if self.finetune is not None:
            return self.finetune
        return dataclasses.replace(
            self.training,
            lr=0.1 * self.training.lr,
            warmup_epochs=0.0,
            objective=self.training.objective.settled(),
        )


def whole_numbers(config: object, *names: str) -> None:
    """Raise TypeError unless these fields of a configuration are whole numbers."""
    for name in names:
        if isinstance(value := getattr(config, name), bool) or not isinstance(value, numbers.Integral):
            raise TypeError(f"{name} must be a whole number, got {value!r}")


def check_config(method: object, config: object, kind: type) -> None:
    """Raise TypeError unless a method was given a configuration of its own kind."""
    if not isinstance(config, kind):
        given = "the class itself; call it" if config is kind else f"{type(config).__name__}"
        raise TypeError(f"{type(method).__name__} takes a {kind.__name__}, got {given}")


def prunable(model: nn.Module, config: PruningConfig) -> tuple[str, ...]:
    """Names of the weights that `config` may prune."""
    return masks.prunable(model, config.layers, structured=config.structured)


def coupled_groups(
    model: nn.Module, batches: Iterable[Batch], config: PruningConfig, seed: int = 0
) -> tuple[ChannelGroup, ...] | None:
    """The channel groups that a structured mask has to respect, or None when it need not."""
    if not (config.structured and config.coupled):
        return None
    with seeded(seed, torch.device("cpu")):
        x, _ = first_batch(batches)
    return masks.groups(model, x[:1])


def magnitude(model: nn.Module, names: Sequence[str], norm: Literal["l1", "l2"] = "l1") -> dict[str, Tensor]:
    """Per-weight scores: ``|w|``, or ``w**2`` for "l2". Their means over a channel rank it by its L1 or L2 norm.

    Averaged over the channel's weights, so that channels of different fan-in compare in a global ranking.
    """
    weights = dict(model.named_parameters())
    return {n: (weights[n].detach().abs() if norm == "l1" else weights[n].detach().square()) for n in names}


def fit_one_shot(
    model: nn.Module,
    batches: Iterable[Batch],
    config: PruningConfig,
    score: Score,
    *,
    val: Iterable[Batch] | None,
    loss: Loss | None,
    seed: int,
    device: torch.device | str | None,
    checkpoint: Where,
    callbacks: Sequence[Callback],
) -> Outcome:
    """Train, remove the ``config.ratio`` of lowest `score` at once, fine-tune with the mask held.

    `score(model, names)` gives scores of the weights' shapes for the trained model, larger = kept.
    """
    where, device = Checkpoint.of(checkpoint), device_of(model, device)
    model = trained_copy(model, device)
    groups = coupled_groups(model, batches, config, seed)
    history = train(
        model,
        batches,
        config.training.objective,
        config.training,
        epochs=config.epochs,
        val=val,
        loss=loss,
        seed=seed,
        device=device,
        checkpoint=where and where.child("train"),
        callbacks=callbacks,
    )
    scores = score(model, prunable(model, config))
    mask = Mask.from_scores(scores, config.ratio, config.scope, config.structured, groups=groups)
    masks.apply(model, mask)
    history += train(
        model,
        batches,
        config.finetuning.objective,
        config.finetuning,
        epochs=config.finetune_epochs,
        val=val,
        loss=loss,
        mask=mask,
        seed=seed + 1,
        device=device,
        checkpoint=where and where.child("finetune"),
        callbacks=callbacks,
        phase="finetune",
        first_epoch=config.epochs,
    )
    return Outcome(model, mask, history)
