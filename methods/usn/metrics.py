"""The unbiased and smooth neuron metrics (arXiv 2510.00083, Definition 3.2 and Eqs. 11, 12, 17 to 19).

With ``D = f(x_k) - f(x_0)`` the change of a pre-activation under the k-th perturbed copy of an image,

* *unbiased*: ``u = E|D|`` (Eq. 11, per neuron) or ``|E D|`` (Eq. 17), means over the copies;
* *smooth*: ``s = E D^2 = Var D + (E D)^2`` (Eqs. 12 and 18 agree);
* *importance*: ``A = s / ((u + eps) d)`` (Eq. 19), large for the neurons that Algorithm 1 calls unstable.

Everything is computed inside forward hooks, on the output of a layer or of the batch normalisation that reads it alone
(which folds into it), before any activation that works in place can overwrite it.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from certify.perturbations import Perturbation
from methods.usn.sampling import Sampling, draw


@dataclasses.dataclass(frozen=True)
class Metric:
    """Which reading of Eqs. 11 to 19 is meant.

    Args:
        bias: ``u`` as "mean_abs", E|D| (Eq. 11, what Algorithm 1 uses), or "abs_mean", \\|E D\\| (Eqs. 13, 17). With
            antithetic copies the latter vanishes wherever a neuron is linear, and Eq. 19 explodes.
        ratio: "eq19", s / ((u + eps) d), or "squared", s / ((u + eps)^2 d), what the text above Eq. 19 says. The squared
            ratio is the same constant (4/3) for every linear neuron under uniform draws.
        granularity: what is one unit in Eqs. 19 and 20: a "channel" of a convolution, with d channels, or a "neuron".
        aggregate: a channel's ratio from its mean u and s over images and neurons ("ratio_of_means"), or the mean of
            its neurons' ratios image by image ("mean_of_ratios").
        eps: keeps the denominator away from zero.
    """

    bias: Literal["mean_abs", "abs_mean"] = "mean_abs"
    ratio: Literal["eq19", "squared"] = "eq19"
    granularity: Literal["channel", "neuron"] = "channel"
    aggregate: Literal["ratio_of_means", "mean_of_ratios"] = "ratio_of_means"
    eps: float = 1e-6

    def __post_init__(self) -> None:
        choices = {
            "bias": ("mean_abs", "abs_mean"),
            "ratio": ("eq19", "squared"),
            "granularity": ("channel", "neuron"),
            "aggregate": ("ratio_of_means", "mean_of_ratios"),
        }
        for field, allowed in choices.items():
            if getattr(self, field) not in allowed:
                raise ValueError(f"{field} must be {' or '.join(map(repr, allowed))}, got {getattr(self, field)!r}")
        if not 0.0 < self.eps < 1.0:
            raise ValueError(f"eps keeps the denominator positive and must lie in (0, 1), got {self.eps}")

    def importance(self, unbiased: Tensor, smooth: Tensor, d: int) -> Tensor:
        """Eq. 19, elementwise."""
        bias = unbiased + self.eps
        return smooth / ((bias if self.ratio == "eq19" else bias.square()) * d)


@dataclasses.dataclass(frozen=True)
class LayerMetrics:
    """One layer's metrics. C channels of P neurons each (P = H W for a convolution, 1 for a linear layer).

    Attributes:
        unbiased: u, (C, P), mean over images.
        smooth: s, (C, P), mean over images.
        signal: mean of ``f(x_0)^2`` over images, (C, P).
        magnitude: mean of ``|f(x_0)|``, (C, P).
        importance: A in the metric's granularity: (C,) or (C * P,).
    """

    unbiased: Tensor
    smooth: Tensor
    signal: Tensor
    magnitude: Tensor
    importance: Tensor

    @property
    def channel_importance(self) -> Tensor:
        """A for each channel, (C,): what channels are ranked by."""
        return self.importance.reshape(len(self.unbiased), -1).mean(1)

    def noise_to_signal(self, eps: float) -> Tensor:
        """E D^2 / E f(x_0)^2 for each channel, (C,): the metric normalised as in the losses of Wei et al. (TMLR 2024)."""
        return self.smooth.mean(1) / (self.signal.mean(1) + eps)


def layer_metrics(clean: Tensor, perturbed: Tensor, metric: Metric) -> LayerMetrics:
    """The metrics of one layer.

    Args:
        clean: pre-activations of the unperturbed images, (n, C, ...).
        perturbed: those of m copies, (m, n, C, ...).
        metric: the reading.
    """
    clean, perturbed = clean.reshape(*clean.shape[:2], -1), perturbed.reshape(*perturbed.shape[:3], -1)
    change = perturbed - clean
    channels, neurons = clean.shape[1:]
    unbiased = change.abs().mean(0) if metric.bias == "mean_abs" else change.mean(0).abs()
    smooth = change.square().mean(0)
    u, s = unbiased.mean(0), smooth.mean(0)
    if metric.granularity == "channel":
        if metric.aggregate == "ratio_of_means":
            importance = metric.importance(u.mean(1), s.mean(1), channels)
        else:
            importance = metric.importance(unbiased, smooth, channels).mean((0, 2))
    elif metric.aggregate == "ratio_of_means":
        importance = metric.importance(u, s, channels * neurons).flatten()
    else:
        importance = metric.importance(unbiased, smooth, channels * neurons).mean(0).flatten()
    still = clean.detach()
    return LayerMetrics(u, s, still.square().mean(0), still.abs().mean(0), importance)


@contextlib.contextmanager
def deterministic(model: nn.Module) -> Iterator[None]:
    """Everything but normalisation in eval mode: copies of an image may differ by their perturbation only.

    Dropout, stochastic depth and the like would otherwise show up as changes of neurons.
    """
    active = [m for m in model.modules() if m.training and not isinstance(m, (_BatchNorm, _InstanceNorm))]
    for module in active:
        module.training = False
    try:
        yield
    finally:
        for module in active:
            module.training = True


def sites(model: nn.Module, x: Tensor, layers: Sequence[str]) -> dict[str, str]:
    """Where to read the pre-activation of each layer: weight name -> module path.

    It is the batch normalisation that takes the layer's output as it is, else the layer itself.

    Args:
        model: any network; runs once on `x` in eval mode without gradients.
        x: one or a few images.
        layers: weight names such as "features.conv1.weight".

    Raises:
        ValueError: a layer does not run in a forward pass.
    """
    modules = dict(model.named_modules())
    paths = {name: name.removesuffix("weight").removesuffix(".") for name in layers}
    outputs: dict[str, list[Tensor]] = {path: [] for path in paths.values()}
    found: dict[str, str] = {}
    handles: list[Any] = []

    def keep(path: str) -> Any:
        return lambda module, args, output: outputs[path].append(output)

    def match(norm: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            for path, tensors in outputs.items():
                if any(tensor is args[0] for tensor in tensors):
                    found[path] = norm

        return hook

    training = [module for module in model.modules() if module.training]
    try:
        for path in paths.values():
            handles.append(modules[path].register_forward_hook(keep(path)))
        for path, module in modules.items():
            if isinstance(module, _BatchNorm):
                handles.append(module.register_forward_pre_hook(match(path)))
        with torch.no_grad():
            model.eval()(x)
    finally:
        for handle in handles:
            handle.remove()
        for module in training:
            module.training = True
    for path, tensors in outputs.items():
        if not tensors:
            raise ValueError(f"layer {path!r} does not run in a forward pass: leave it out of the layers to prune")
    # A normalisation shared by several layers, or a layer that runs twice, has no single place behind it.
    shared = [norm for norm in found.values() if list(found.values()).count(norm) > 1]
    once = {path for path, tensors in outputs.items() if len(tensors) == 1}
    return {
        name: found[path] if path in found and path in once and found[path] not in shared else path
        for name, path in paths.items()
    }


@contextlib.contextmanager
def observed(
    model: nn.Module, where: Mapping[str, str], start: int, n: int, m: int, metric: Metric
) -> Iterator[dict[str, LayerMetrics]]:
    """Compute the metrics of layers during the forward pass that runs inside: ``with observed(...) as found: model(x)``.

    Args:
        model: the network.
        where: weight name -> module path, from `sites`.
        start: where in the batch the copies begin; rows 0 to n - 1 are their unperturbed images.
        n: number of images with copies.
        m: copies an image, copy by copy: row ``start + k * n + i`` is copy k of image i.
        metric: the reading.

    Yields:
        A dictionary, filled when the pass is over: weight name -> `LayerMetrics`. The neurons of a layer that runs more
        than once are those of all its runs.
    """
    modules = dict(model.named_modules())
    changes: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in where}
    result: dict[str, LayerMetrics] = {}

    def read(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            # Copies now: an activation in place may overwrite the output right after this hook.
            clean = output[:n].flatten(2) if output.ndim > 2 else output[:n].unsqueeze(2)
            copies = output[start : start + m * n]
            copies = copies.flatten(2) if output.ndim > 2 else copies.unsqueeze(2)
            change = copies.unflatten(0, (m, n)) - clean
            changes[name].append((change, clean.detach().clone()))

        return hook

    handles = [modules[path].register_forward_hook(read(name)) for name, path in where.items()]
    try:
        yield result
    finally:
        for handle in handles:
            handle.remove()
    for name, parts in changes.items():
        change, clean = (torch.cat(side, -1) if len(parts) > 1 else side[0] for side in zip(*parts))
        result[name] = _from_change(change, clean, metric)
