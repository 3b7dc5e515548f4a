"""CAR: train, learn soft masks for robustness to semantic changes, binarise, fine-tune (Algorithm 1)."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from certify.perturbations import Perturbation
from methods import masks
from methods.base import Where, check_config, prunable
from methods.car.config import CARConfig
from methods.car.initialise import initial_values
from methods.car.objective import CARObjective, edit
from methods.car.pairs import Paired
from methods.car.recalibrate import recalibrate
from methods.car.softmask import SoftMasked, binarise
from methods.outcome import Outcome
from methods.training.checkpoint import Checkpoint
from methods.training.loop import Callback, Loss, device_of, first_batch, seeded, train, trained_copy
from methods.training.losses import TaskLoss, resolve
from methods.training.natural import Natural
from methods.training.objective import Batch, Progress


@dataclasses.dataclass(frozen=True)
class CAROutcome(Outcome):
    """A network pruned by CAR.

    Attributes:
        soft: the trained soft masks in [0, 1] by weight name, on the CPU; `mask` keeps their largest entries.
        density_all: fraction of *all* parameters that stays, biases and normalisation included; ``mask.density`` is
            that of the convolutions and fully connected layers.
        before: ``{"score", "loss"}`` (accuracy and task loss) of the pruned network before fine-tuning, on `val`, or on
            the training batches without one.
        after: the same, after fine-tuning.
    """

    soft: Mapping[str, Tensor]
    density_all: float
    before: Mapping[str, float]
    after: Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class CAR:
    """Compression-aware semantic robustness, a soft-mask pruning method for classifiers."""

    config: CARConfig = dataclasses.field(default_factory=CARConfig)

    def __post_init__(self) -> None:
        check_config(self, self.config, CARConfig)

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
    ) -> CAROutcome:
        """Prune a copy of `model`; phases "train", "mask" and "finetune".

        The arguments are those of `methods.training.train`; `checkpoint` is a folder to go on from after a kill. The
        network returns logits (N, classes). `batches` that know pairs of images and their edits
        (`methods.car.PairedBatches`) are used as such in the mask stage. Callbacks see a `SoftMasked` there.

        Raises:
            ValueError: L_ratio is on but there are no pairs; a transform or pairs of the wrong shape or range; targets
                that are not labels.
            methods.masks.MaskError: no prunable layer.
        """
        config, where, device = self.config, Checkpoint.of(checkpoint), device_of(model, device)
        network = trained_copy(model, device)
        with seeded(seed, device):
            x, y = first_batch(batches)
            task_loss = resolve(loss, y)
            if task_loss.kind != "classification" or y.ndim != 1 or y.dtype != torch.int64:
                raise ValueError(
                    f"CAR compares class probabilities: targets must be int64 labels (N,), got "
                    f"{y.dtype} {tuple(y.shape)}"
                )
            paired = self._paired(batches, x.to(device))
        names = prunable(network, config)
        history = train(
            network,
            batches,
            config.training.objective,
            config.training,
            epochs=config.epochs,
            val=val,
            loss=task_loss,
            seed=seed,
            device=device,
            checkpoint=where and where.child("train"),
            callbacks=callbacks,
        )
        start = initial_values(network, names, config.init, config.tau, config.sign, seed)
        masked = SoftMasked(copy.deepcopy(network), start, config.affine)
        training = config.mask_training
        if config.select == "last" and config.mask_epochs:
            # Epoch e (from 0) is eligible when e + 1 > select_after * epochs.
            training = dataclasses.replace(training, select_after=1.0 - 0.5 / config.mask_epochs)
        history += train(
            masked,
            paired,
            CARObjective(config),
            training,
            epochs=config.mask_epochs,
            val=val,
            loss=task_loss,
            seed=seed + 1,
            device=device,
            checkpoint=where and where.child("mask"),
            callbacks=callbacks,
            phase="mask",
            first_epoch=config.epochs,
        )
        masked.project()
        soft = {name: value.detach().cpu() for name, value in masked.soft().items()}
        mask = binarise(soft, config.ratio, config.scope, config.ties, dict(network.named_parameters()))
        self._take_over(network, masked)
        masks.apply(network, mask)
        first_epoch = config.epochs + config.mask_epochs
        if hasattr(batches, "set_epoch"):
            batches.set_epoch(first_epoch)
        with seeded(seed + 2, device):
            if config.recalibrate:
                recalibrate(network, batches, device)
            before = _accuracy(network, val if val is not None else batches, task_loss, device)
        history += train(
            network,
            batches,
            config.finetuning.objective,
            config.finetuning,
            epochs=config.finetune_epochs,
            val=val,
            loss=task_loss,
            mask=mask,
            seed=seed + 2,
            device=device,
            checkpoint=where and where.child("finetune"),
            callbacks=callbacks,
            phase="finetune",
            first_epoch=first_epoch,
        )
        after = _accuracy(network, val if val is not None else batches, task_loss, device)
        return CAROutcome(network, mask, history, soft, mask.density_over(network), before, after)

    def _paired(self, batches: Iterable[Batch], x: Tensor) -> Iterable[Batch]:
        """The batches of the mask stage, checked."""
        config = self.config
        if not config.compares_pairs:
            return batches
        if config.transform is not None:
            if isinstance(config.transform, Perturbation):
                config.transform.check(x)
            _check_edits(edit(config, x), x.shape, "the transform")
            return batches
        if not isinstance(batches, Paired):
            raise ValueError(
                "L_ratio compares images with their semantic edits, and these batches bring none: pass "
                "methods.car.PairedBatches, set CARConfig(transform=...) (such as certify.Brightness(0.1)), or turn "
                "the term off with lambda_ratio=0"
            )
        pairs = batches.pairs()
        found = False
        for images, targets in pairs:
            if targets.ndim != 2 or targets.shape != (len(images), 2) or targets.dtype != torch.int64:
                raise ValueError(
                    "pairs() must yield targets int64 (B, 2), the label and the row an edit was made from (-1: an "
                    f"image of the batch itself); got {targets.dtype} {tuple(targets.shape)} for {len(images)} images"
                )
            source = targets[:, 1]
            if bool(((source < -1) | (source >= len(images))).any()):
                raise ValueError(f"pairs() names rows {int(source.min())} to {int(source.max())} of {len(images)}")
            if bool((source[source.clamp_min(0)] >= 0)[source >= 0].any()):
                raise ValueError("pairs() pairs an edit with an edit: each pair needs an image of the batch itself")
            if found := bool((source >= 0).any()):
                _check_edits(images, (len(images), *x.shape[1:]), "pairs()")
                break
        if not found:
            raise ValueError(
                "L_ratio compares images with their semantic edits, and pairs() brings none: there are no edited "
                "images (q = 0); add some, set CARConfig(transform=...), or turn the term off with lambda_ratio=0"
            )
        return pairs

    def _take_over(self, network: nn.Module, masked: SoftMasked) -> None:
        """What fine-tuning starts from, besides the pretrained weights."""
        config = self.config
        with torch.no_grad():
            if config.affine:
                trained = dict(masked.network.named_modules())
                for path, module in network.named_modules():
                    if isinstance(module, _BatchNorm):
                        for one, other in zip(module.parameters(), trained[path].parameters(), strict=True):
                            one.copy_(other)
            if config.finetune_from == "soft":
                weights = dict(network.named_parameters())
                for name, value in masked.soft().items():
                    weights[name].mul_(value)


def _check_edits(moved: Tensor, shape: Sequence[int], what: str) -> None:
    if not isinstance(moved, Tensor) or not moved.is_floating_point() or tuple(moved.shape) != tuple(shape):
        got = f"{moved.dtype} {tuple(moved.shape)}" if isinstance(moved, Tensor) else type(moved).__name__
        raise ValueError(f"{what} must give float images {tuple(shape)}, got {got}")
    low, high = (float(v) for v in moved.detach().aminmax())
    if not (low >= -1e-6 and high <= 1.0 + 1e-6):  # False for NaN too
        raise ValueError(f"{what} gives images that span [{low:.4g}, {high:.4g}]; expected pixels in [0, 1]")


@torch.no_grad()
def _accuracy(
    network: nn.Module, batches: Iterable[Batch], task_loss: TaskLoss, device: torch.device
) -> Mapping[str, float]:
    there = ((x.to(device), y.to(device)) for x, y in batches)
    return Natural().validate(network.eval(), there, task_loss, Progress(0, 1))
