"""The loss of CAR's mask stage (Eq. 9): three passes over a batch, under two noisy soft masks and the binary one."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from certify.perturbations import Perturbation
from methods.car.config import CARConfig
from methods.car.losses import consistency, discrepancy, margin, margin_ratio, stability
from methods.car.softmask import SoftMasked
from methods.training.bounding import held_statistics, no_dropout
from methods.training.losses import TaskLoss
from methods.training.natural import means
from methods.training.objective import Batch, Progress


@dataclasses.dataclass(frozen=True)
class CARObjective:
    """``lambda_stab L_stab + lambda_ratio L_ratio + lambda_consis L_consis + lambda_l1 L_L1`` (+ the task loss).

    The model is a `SoftMasked`. Batches are plain (x, y), or those of `methods.car.pairs.Paired.pairs`. L_stab and
    L_consis are means over the batch's own images, L_ratio over its pairs (0 in a batch without any). Edits go through
    the network with the images, so that all passes share one batch for batch normalisation, and passes differ by their
    masks alone. Running statistics record the pass of the binary mask only: they are those of the network that is
    going to be used.
    """

    config: CARConfig
    name: Literal["car"] = dataclasses.field(default="car", init=False)
    mixed_precision: ClassVar[bool] = False  # differences of probabilities are smaller than bfloat16 resolves

    def settled(self) -> CARObjective:
        return self

    def loss(
        self, model: nn.Module, x: Tensor, y: Tensor, task_loss: TaskLoss, progress: Progress
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        assert isinstance(model, SoftMasked)
        config = self.config
        if config.project:
            model.project()  # after the step before; `methods.car.method` does it after the last one
        x, labels, source = self._images(x, y)
        own, edited = (source < 0).to(x.dtype), (source >= 0).to(x.dtype)
        with self._mode(model):
            with held_statistics(model):
                first = model(x, model.noisy(config.delta, config.noise))
                two = config.lambda_stab > 0.0 or (config.compares_pairs and config.pair_mask == "independent")
                second = model(x, model.noisy(config.delta, config.noise)) if two else first
            through = config.lambda_consis > 0.0 or (config.lambda_ce > 0.0 and config.ce_on == "hard")
            with torch.set_grad_enabled(through):
                hard = model(x, model.hard(config.ratio, config.scope, config.ties))
        p, q = first.softmax(1), second.softmax(1)
        total = config.lambda_l1 * model.size(config.l1 == "mean")
        metrics = {"l1": model.size().detach(), "score": task_loss.score(hard.detach(), labels) / len(x)}
        if config.lambda_stab > 0.0:
            stab = _mean(stability(p, q), own)
            total, metrics["stab"] = total + config.lambda_stab * stab, stab.detach()
        if config.compares_pairs:
            moved = q if config.pair_mask == "independent" else p
            before = p.index_select(0, source.clamp_min(0))
            ratio = _mean(self._ratio(before, moved), edited)
            total, metrics["ratio"] = total + config.lambda_ratio * ratio, ratio.detach()
            with torch.no_grad():
                metrics["pairs"] = edited.mean()
                kept = discrepancy(before, moved, config.alignment) < margin(before)
                metrics["kept"] = (kept * edited).sum() / len(x)
        if config.lambda_consis > 0.0:
            consis = _mean(consistency(first, hard, config.consistency, config.consistency_gradient), own)
            total, metrics["consis"] = total + config.lambda_consis * consis, consis.detach()
        if config.lambda_ce > 0.0:
            task = task_loss(first if config.ce_on == "soft" else hard, labels)
            total, metrics["task"] = total + config.lambda_ce * task, task.detach()
        return total, metrics

    def validate(
        self, model: nn.Module, val: Iterable[Batch], task_loss: TaskLoss, progress: Progress
    ) -> Mapping[str, float]:
        """Accuracy and task loss under the binary mask, before any fine-tuning."""
        assert isinstance(model, SoftMasked)
        if self.config.project:
            model.project()
        masks = model.hard(self.config.ratio, self.config.scope, self.config.ties)
        sums: dict[str, list[Tensor]] = {"score": [], "loss": []}
        count = 0
        for x, y in val:
            outputs = model(x, masks)
            sums["score"].append(task_loss.score(outputs, y))
            sums["loss"].append(task_loss(outputs, y) * len(x))
            count += len(x)
        return means(sums, count)

    def _ratio(self, p: Tensor, moved: Tensor) -> Tensor:
        config = self.config
        return margin_ratio(
            p, moved, eta=config.eta, eps=config.margin_eps, hinge=config.hinge, alignment=config.alignment
        )

    def _images(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """All images of the passes, their labels, and for each the row it was made from (-1 for the batch's own)."""
        if y.ndim == 2:
            return x, y[:, 0], y[:, 1]
        own = torch.full_like(y, -1)
        if not self.config.compares_pairs or self.config.transform is None:
            return x, y, own
        rows = torch.arange(len(x), device=x.device)
        return torch.cat([x, edit(self.config, x)]), torch.cat([y, y]), torch.cat([own, rows])

    @contextlib.contextmanager
    def _mode(self, model: nn.Module) -> Iterator[None]:
        """Dropout and batch normalisation as configured."""
        fixed = self.config.statistics == "running"
        norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.training] if fixed else []
        for norm in norms:
            norm.eval()
        try:
            with contextlib.nullcontext() if self.config.dropout else no_dropout(model):
                yield
        finally:
            for norm in norms:
                norm.train()


def edit(config: CARConfig, x: Tensor) -> Tensor:
    """One edit of each image by ``config.transform``, with numbers from the global generator of the images' device."""
    if isinstance(config.transform, Perturbation):
        return config.transform.sample(x, 1).squeeze(0)
    assert config.transform is not None
    return config.transform(x, generator=global_generator(x.device))


def global_generator(device: torch.device) -> torch.Generator:
    """What torch draws from on `device` where it is told nothing; the CPU's for devices other than CUDA."""
    if device.type != "cuda":
        return torch.default_generator
    return torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index]


def _mean(values: Tensor, weights: Tensor) -> Tensor:
    """The weighted mean; 0 where no value has a weight."""
    return (values * weights).sum() / weights.sum().clamp_min(1.0)
