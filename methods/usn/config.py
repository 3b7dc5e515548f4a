"""Configuration of USN pruning."""

from __future__ import annotations

import dataclasses
import numbers
from typing import Literal

from certify.perturbations import BrightnessContrast, Perturbation
from methods.base import whole_numbers
from methods.masks import Scope
from methods.training.config import TrainingConfig
from methods.training.natural import Natural
from methods.usn.metrics import Metric
from methods.usn.sampling import Sampling
from methods.usn.schedule import Progressive
from methods.usn.wasserstein import WassersteinTarget

Prune = Literal["high", "low", "literal", "random", "magnitude", "snr"]


@dataclasses.dataclass(frozen=True)
class USNConfig:
    """USN pruning (arXiv 2510.00083). Defaults: section IV.A of the paper; README.md lists what it leaves open.

    Args:
        ratio: rho, the fraction of each layer's channels that is removed.
        epochs: passes over the data, pruning included.
        training: optimiser and schedule. Its objective must be the natural one: the USN loss takes its place.
        m: perturbed copies of an image for the metrics.
        lambda_u: weight of the unbiased loss (Eq. 11).
        lambda_s: weight of the smooth loss (Eq. 12).
        lambda_w: weight of the Wasserstein loss (Eq. 21).
        metric_fraction: part of each batch that the metrics are taken on.
        prune: which channels go first. "high": large importance A, the unstable ones. "low": small A. "literal":
            Algorithm 1 by the letter, which keeps A >= percentile(1 - rho): only the top rho stay, ``1 - rho`` are
            removed. "random": by chance, the baseline. "magnitude": small mean ``|w|``. "snr": large noise-to-signal
            ratio, the metric normalised by the pre-activation as in the paper's reference 29.
        perturbation: what the copies are drawn from, in training.
        sampling: "antithetic" pairs or "iid" draws.
        metric: reading of Eqs. 11 to 19.
        wasserstein: reading of Eqs. 20, 21.
        loss_norm: "mean" over a layer's neurons, "sum" (Eqs. 11, 12 by the letter), or "signal": the sum divided by
            that of the unperturbed pre-activations (or their squares), the losses of reference 29.
        lambda_w_ramp: "constant", or "progressive": lambda_w grows with rho(t) / rho.
        task_on: what the task loss sees: the clean batch and one perturbed draw ("both", the mean), or one of the two.
        prune_start: last epoch, from 1, before pruning begins (t_start of Eq. 22).
        prune_interval: epochs between pruning steps (t_interval).
        prune_steps: N_steps; None: as many as end pruning after `prune_end` of the epochs. The paper's 200 of 200
            epochs leave none to train the pruned network.
        prune_end: fraction of the epochs after which pruning is over, when `prune_steps` is None.
        scope: rank within each layer ("layer", the paper) or over all of them ("global").
        coupled: channels tied by a residual addition or a depthwise convolution go together, so that they can be
            removed physically; layers whose channels cannot be removed are kept whole.
        layers: kinds of layers that are regularised and pruned.
        select: "final": only epochs at the final ratio may be chosen on validation; "literal": any epoch.
        on_collapse: when the network predicts the same for every image: "raise", "warn" or "ignore". Recorded anyhow.
        collapse_after: part of the training after which that counts.
        wide_lr_scale: factor of the learning rate of hidden linear layers with at least `wide_inputs` inputs. At the
            paper's rate of 0.01 such a layer drives the CNN7 into predicting the mean. 1.0 turns it off.
        wide_inputs: see `wide_lr_scale`.
    """

    ratio: float = 0.2
    epochs: int = 200
    training: TrainingConfig = dataclasses.field(
        default_factory=lambda: TrainingConfig(optimizer="adam", lr=0.01, schedule="constant")
    )
    m: int = 8
    lambda_u: float = 0.01
    lambda_s: float = 0.01
    lambda_w: float = 10.0
    metric_fraction: float = 1.0
    prune: Prune = "high"
    perturbation: Perturbation = dataclasses.field(default_factory=lambda: BrightnessContrast(1 / 255, 0.01))
    sampling: Sampling = "antithetic"
    metric: Metric = dataclasses.field(default_factory=Metric)
    wasserstein: WassersteinTarget = dataclasses.field(default_factory=WassersteinTarget)
    loss_norm: Literal["mean", "sum", "signal"] = "mean"
    lambda_w_ramp: Literal["constant", "progressive"] = "constant"
    task_on: Literal["both", "clean", "perturbed"] = "both"
    prune_start: int = 0
    prune_interval: int = 1
    prune_steps: int | None = None
    prune_end: float = 0.8
    scope: Scope = "layer"
    coupled: bool = True
    layers: tuple[Literal["conv", "linear"], ...] = ("conv",)
    select: Literal["final", "literal"] = "final"
    on_collapse: Literal["raise", "warn", "ignore"] = "warn"
    collapse_after: float = 0.25
    wide_lr_scale: float = 0.05
    wide_inputs: int = 1024

    def __post_init__(self) -> None:
        self._check_types()
        choices = {
            "prune": ("high", "low", "literal", "random", "magnitude", "snr"),
            "sampling": ("antithetic", "iid"),
            "loss_norm": ("mean", "sum", "signal"),
            "lambda_w_ramp": ("constant", "progressive"),
            "task_on": ("both", "clean", "perturbed"),
            "scope": ("global", "layer"),
            "select": ("final", "literal"),
            "on_collapse": ("raise", "warn", "ignore"),
        }
        for field, allowed in choices.items():
            if getattr(self, field) not in allowed:
                raise ValueError(f"{field} must be one of {', '.join(allowed)}, got {getattr(self, field)!r}")
        if not 0.0 <= self.ratio < 1.0:
            raise ValueError(f"ratio is the fraction removed and must lie in [0, 1), got {self.ratio}")
        if self.epochs < 1:
            raise ValueError(f"epochs must be >= 1, got {self.epochs}")
        for field in ("lambda_u", "lambda_s", "lambda_w"):
            if not 0.0 <= getattr(self, field) < float("inf"):
                raise ValueError(f"{field} must be a finite weight >= 0, got {getattr(self, field)}")
        if self.m < 1 or (self.sampling == "antithetic" and self.m % 2):
            raise ValueError(f"m must be >= 1, and even for antithetic pairs (or sampling='iid'), got {self.m}")
        for field in ("metric_fraction", "prune_end", "wide_lr_scale"):
            if not 0.0 < getattr(self, field) <= 1.0:
                raise ValueError(f"{field} must lie in (0, 1], got {getattr(self, field)}")
        if not 0.0 <= self.collapse_after <= 1.0:
            raise ValueError(f"collapse_after is a fraction of the training in [0, 1], got {self.collapse_after}")
        if self.wide_inputs < 1:
            raise ValueError(f"wide_inputs must be >= 1, got {self.wide_inputs}")
        if not self.layers or any(kind not in ("conv", "linear") for kind in self.layers):
            raise ValueError(f"layers must be a tuple of 'conv' and 'linear', got {self.layers!r}")
        if self.prune == "literal" and self.ratio == 0.0:
            raise ValueError("prune='literal' keeps the fraction `ratio`: with ratio=0 nothing would be left")
        if self.metric.bias == "abs_mean" and self.sampling == "antithetic":
            raise ValueError(
                "bias='abs_mean' with antithetic copies is 0 wherever the network is linear, and Eq. 19 explodes: "
                "pass sampling='iid'"
            )
        if not isinstance(self.training.objective, Natural):
            raise ValueError("training.objective is not read: the USN loss takes its place; leave it at Natural()")
        if self.schedule.end > self.epochs:
            raise ValueError(
                f"pruning would end after epoch {self.schedule.end} of {self.epochs}: fewer prune_steps, a smaller "
                "prune_interval or an earlier prune_start are needed"
            )

    def _check_types(self) -> None:
        reals = ("ratio", "lambda_u", "lambda_s", "lambda_w", "metric_fraction", "prune_end", "collapse_after",
                 "wide_lr_scale")  # fmt: skip
        parts = {"training": TrainingConfig, "perturbation": Perturbation, "metric": Metric,
                 "wasserstein": WassersteinTarget}  # fmt: skip
        for field in reals:
            if not isinstance(value := getattr(self, field), numbers.Real):
                raise TypeError(f"{field} must be a number, got {value!r}")
        whole_numbers(self, "epochs", "m", "prune_start", "prune_interval", "wide_inputs")
        if self.prune_steps is not None and not isinstance(self.prune_steps, numbers.Integral):
            raise TypeError(f"prune_steps must be a whole number or None, got {self.prune_steps!r}")
        for field, kind in parts.items():
            if not isinstance(value := getattr(self, field), kind):
                raise TypeError(f"{field} must be a {kind.__name__}, got {value!r:.80}")

    @property
    def schedule(self) -> Progressive:
        """Eq. 22 with these numbers."""
        if self.prune_interval < 1:
            raise ValueError(f"prune_interval must be >= 1, got {self.prune_interval}")
        steps = self.prune_steps
        if steps is None:
            steps = max(1, (round(self.prune_end * self.epochs) - self.prune_start) // self.prune_interval)
        return Progressive(self.ratio, steps, self.prune_start, self.prune_interval)

    @property
    def removed(self) -> float:
        """The fraction of channels that is removed in the end."""
        return 1.0 - self.ratio if self.prune == "literal" else self.ratio

    @property
    def regularised(self) -> bool:
        """Whether any of the USN losses is on."""
        return self.lambda_u > 0 or self.lambda_s > 0 or self.lambda_w > 0

    @property
    def measures(self) -> bool:
        """Whether training needs the metrics at all."""
        return self.regularised or (self.ratio > 0 and self.prune in ("high", "low", "literal", "snr"))

    def task_only(self) -> USNConfig:
        """These settings with the USN losses off: only the task loss trains, and the choice prunes."""
        return dataclasses.replace(self, lambda_u=0.0, lambda_s=0.0, lambda_w=0.0)
