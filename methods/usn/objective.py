"""The training loss of USN pruning: task loss and metrics from one forward pass (Algorithm 1, lines 5 to 13)."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from methods.training.history import EpochRecord
from methods.training.losses import TaskLoss
from methods.training.natural import means
from methods.training.objective import Batch, Progress
from methods.usn.config import USNConfig
from methods.usn.metrics import LayerMetrics, deterministic, observed
from methods.usn.pruner import Pruner
from methods.usn.sampling import draw

# A network whose predictions vary less than this, relative to the targets, predicts a constant.
CONSTANT = 0.05
# The copies of the validation images are the same in every epoch.
VALIDATION_SEED = 2510_00083


class CollapsedPredictor(RuntimeError):
    """The network predicts (nearly) the same for every image."""


class CollapsedPredictorWarning(UserWarning):
    """The network predicts (nearly) the same for every image."""


@dataclasses.dataclass(frozen=True)
class USNObjective:
    """``L_task + sum_i (lambda_u L_unbiased^i + lambda_s L_smooth^i + lambda_W L_W^i)`` (section III.D).

    A `Pruner` is attached to the network.

    Args:
        config: the method's settings.
        where: pairs (weight name, path of the module that gives its pre-activation), from `methods.usn.metrics.sites`.
    """

    config: USNConfig
    where: tuple[tuple[str, str], ...]
    name: Literal["usn"] = dataclasses.field(default="usn", init=False)
    mixed_precision: ClassVar[bool] = False  # the changes of neurons are smaller than bfloat16 resolves

    def settled(self) -> USNObjective:
        return self

    def loss(
        self, model: nn.Module, x: Tensor, y: Tensor, task_loss: TaskLoss, progress: Progress
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        pruner = Pruner.of(model)
        pruner.hold(model)
        clean, perturbed, found = self._forward(model, x)
        parts = [task_loss(outputs, y) for outputs in (clean, perturbed) if outputs is not None]
        task = torch.stack(parts).mean()
        seen = (clean if clean is not None else perturbed).detach()  # type: ignore[union-attr]
        metrics = {
            "task": task.detach(),
            "score": task_loss.score(seen, y) / len(x),
            "spread": spread(_moments(seen, y, task_loss), len(x)),
            "ratio": pruner.removed,
        }
        total = task
        if found:
            layers = list(found.values())
            pruner.observe({name: self._score(layer) for name, layer in found.items()}, self._sampled(len(x)))
            unbiased = torch.stack([self._norm(layer, "unbiased") for layer in layers]).sum()
            smooth = torch.stack([self._norm(layer, "smooth") for layer in layers]).sum()
            total = total + self.config.lambda_u * unbiased + self.config.lambda_s * smooth
            metrics |= {"unbiased": unbiased.detach(), "smooth": smooth.detach()}
            weight = self._lambda_w(progress)
            if self.config.lambda_w > 0:
                distance = torch.stack([self._distance(layer, progress) for layer in layers]).sum()
                total = total + weight * distance
                metrics["wasserstein"] = distance.detach()
        return total, metrics

    def validate(
        self, model: nn.Module, val: Iterable[Batch], task_loss: TaskLoss, progress: Progress
    ) -> Mapping[str, float]:
        """Minus the task loss on clean images and one fixed perturbed copy of each (section IV.A), and more.

        ``clean`` and ``perturbed`` are the task's own scores (accuracy, or minus px), ``ratio`` is the fraction of
        channels removed, ``spread`` how much predictions vary, relative to the targets.
        """
        pruner = Pruner.of(model)
        pruner.settle(model, progress.epoch)
        generator = torch.Generator().manual_seed(VALIDATION_SEED)
        sums: dict[str, list[Tensor]] = {"loss": [], "clean": [], "perturbed": []}
        moments: list[tuple[Tensor, ...]] = []
        count = 0
        for x, y in val:
            copies = draw(self.config.perturbation, x, 1, "iid", generator)[0]
            clean, perturbed = model(torch.cat([x, copies])).chunk(2)
            losses = {"clean": task_loss(clean, y), "perturbed": task_loss(perturbed, y)}
            chosen = [losses[part] for part in ("clean", "perturbed") if self.config.task_on in (part, "both")]
            sums["loss"].append(torch.stack(chosen).mean() * len(x))
            sums["clean"].append(task_loss.score(clean, y))
            sums["perturbed"].append(task_loss.score(perturbed, y))
            moments.append(_moments(clean, y, task_loss))
            count += len(x)
        result = means(sums, count)
        together = [torch.stack(parts).sum(0) for parts in zip(*moments)]
        result["spread"] = float(spread(together, count))
        result["ratio"] = float(pruner.removed)
        return {"score": -result["loss"]} | result

    def _sampled(self, images: int) -> int:
        return max(1, round(self.config.metric_fraction * images))

    def _forward(self, model: nn.Module, x: Tensor) -> tuple[Tensor | None, Tensor | None, dict[str, LayerMetrics]]:
        """Outputs on the clean and on a perturbed batch (None if the task loss does not want them), and the metrics.

        One forward pass of: the clean batch; m copies of its first images, the first of which doubles as their
        perturbed draw; one perturbed draw of the other images.
        """
        config, n = self.config, len(x)
        both = config.task_on != "clean"
        if not config.measures:
            if config.task_on == "clean":
                return model(x), None, {}
            copies = draw(config.perturbation, x, 1, "iid")[0]
            if config.task_on == "perturbed":
                return None, model(copies), {}
            clean, perturbed = model(torch.cat([x, copies])).chunk(2)
            return clean, perturbed, {}
        some = self._sampled(n)
        copies = draw(config.perturbation.select(slice(some), n), x[:some], config.m, config.sampling)
        batch = [x, copies.flatten(0, 1)]
        if both and some < n:
            batch.append(self._rest(x, some))
        with deterministic(model), observed(model, dict(self.where), n, some, config.m, config.metric) as found:
            outputs = model(torch.cat(batch))
        perturbed = torch.cat([outputs[n : n + some], outputs[n + config.m * some :]]) if both else None
        return (outputs[:n] if config.task_on != "perturbed" else None), perturbed, found

    def _rest(self, x: Tensor, some: int) -> Tensor:
        """One draw for the images without copies."""
        p = self.config.perturbation
        return draw(p.select(slice(some, None), len(x)), x[some:], 1, "iid")[0]

    def _score(self, layer: LayerMetrics) -> Tensor:
        """What channels are ranked by, (C,), large = unstable."""
        return layer.noise_to_signal() if self.config.prune == "snr" else layer.channel_importance(self.config.metric)

    def _norm(self, layer: LayerMetrics, which: Literal["unbiased", "smooth"]) -> Tensor:
        value: Tensor = getattr(layer, which)
        if self.config.loss_norm == "mean":
            return value.mean()
        if self.config.loss_norm == "sum":
            return value.sum()
        signal = layer.magnitude if which == "unbiased" else layer.signal
        return value.sum() / (signal.sum() + self.config.metric.eps)

    def _lambda_w(self, progress: Progress) -> float:
        if self.config.lambda_w_ramp == "constant" or self.config.ratio == 0.0:
            return self.config.lambda_w
        return self.config.lambda_w * self.config.schedule.fraction(progress.epoch + 1)

    def _distance(self, layer: LayerMetrics, progress: Progress) -> Tensor:
        current = self.config.wasserstein.ratio == "current"
        ratio = self.config.schedule(progress.epoch + 1) if current else self.config.ratio
        return self.config.wasserstein.loss(layer.importance(self.config.metric), ratio)


def _moments(outputs: Tensor, y: Tensor, task_loss: TaskLoss) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sums and sums of squares over the batch of predictions and of targets, per coordinate or class."""
    labels = task_loss.kind == "classification" and y.ndim == 1
    exact = torch.float32 if outputs.device.type == "mps" else torch.float64
    predicted = (outputs.softmax(1) if task_loss.kind == "classification" else outputs).to(exact)
    # Not F.one_hot, which looks at the labels.
    wanted = torch.zeros_like(predicted).scatter_(1, y.unsqueeze(1), 1.0) if labels else y.to(exact)
    return predicted.sum(0), predicted.square().sum(0), wanted.sum(0), wanted.square().sum(0)


def spread(moments: Sequence[Tensor], count: int) -> Tensor:
    """Standard deviation of predictions over images, relative to that of the targets: 0 for a constant predictor.

    1 where the targets themselves do not vary, for then it says nothing.
    """
    total, squares, wanted, wanted_squares = moments
    variance = (squares / count - (total / count).square()).clamp_min(0).sum()
    of_targets = (wanted_squares / count - (wanted / count).square()).clamp_min(0).sum()
    return torch.where(of_targets > 0, (variance / of_targets.clamp_min(1e-30)).sqrt(), 1.0)


@dataclasses.dataclass
class EndOfEpoch:
    """Callback that ends an epoch: prunes when validation has not done so, and watches for a constant predictor."""

    config: USNConfig
    warned: bool = False

    def __call__(self, model: nn.Module, record: EpochRecord) -> None:
        Pruner.of(model).settle(model, record.epoch + 1)
        seen = record.validation.get("spread", record.metrics["spread"])
        late = record.epoch + 1 > self.config.collapse_after * self.config.epochs
        if self.config.on_collapse == "ignore" or not late or not collapsed(seen):
            return
        words = (
            f"after epoch {record.epoch + 1} the network predicts nearly the same for every image (its predictions "
            f"vary {seen:.2g} times as much as the targets): lower training.lr or wide_lr_scale, or add warm-up"
        )
        if self.config.on_collapse == "raise":
            raise CollapsedPredictor(words)
        if not self.warned:
            self.warned = True
            warnings.warn(words, CollapsedPredictorWarning, stacklevel=2)


def collapsed(value: float) -> bool:
    """Whether a spread is that of a constant predictor."""
    return math.isnan(value) or value < CONSTANT
