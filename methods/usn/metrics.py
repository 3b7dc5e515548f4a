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
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from certify.perturbations import Perturbation
from methods.usn.sampling import Sampling, draw


@dataclasses.dataclass(frozen=True)
class Metric:
    """Which reading of Eqs. 11 to 19 is meant.

    Args:
        bias: ``u`` as "mean_abs", ``E|D|`` (Eq. 11, what Algorithm 1 uses), or "abs_mean", ``|E D|`` (Eqs. 13, 17).
            With antithetic copies the latter vanishes wherever a neuron is linear, and Eq. 19 explodes.
        ratio: "eq19", s / ((u + eps) d), or "squared", s / ((u + eps)^2 d), what the text above Eq. 19 says. The
            squared ratio is the same constant (4/3) for every linear neuron under uniform draws.
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
    """One layer's metrics, means over images. C channels of P neurons each (P = H W of a convolution, 1 if linear).

    Attributes:
        unbiased: u, (C, P).
        smooth: s, (C, P).
        signal: mean of ``f(x_0)^2``, (C, P), without gradient.
        magnitude: mean of ``|f(x_0)|``, (C, P), without gradient.
        ratios: mean over images of s / (u + eps) or s / (u + eps)^2, (C, P); None unless the metric needs it.
    """

    unbiased: Tensor
    smooth: Tensor
    signal: Tensor
    magnitude: Tensor
    ratios: Tensor | None

    def importance(self, metric: Metric) -> Tensor:
        """A of Eq. 19 in the metric's granularity: (C,) for channels, (C P,) for neurons."""
        channels, neurons = self.unbiased.shape
        if metric.granularity == "channel":
            if metric.aggregate == "ratio_of_means":
                return metric.importance(self.unbiased.mean(1), self.smooth.mean(1), channels)
            return self._ratios().mean(1) / channels
        if metric.aggregate == "ratio_of_means":
            return metric.importance(self.unbiased, self.smooth, channels * neurons).flatten()
        return (self._ratios() / (channels * neurons)).flatten()

    def _ratios(self) -> Tensor:
        if self.ratios is None:
            raise ValueError("these metrics were taken with aggregate='ratio_of_means'; take them anew")
        return self.ratios

    def channel_importance(self, metric: Metric) -> Tensor:
        """A for each channel, (C,), the mean over its units: what channels are ranked by."""
        return self.importance(metric).reshape(len(self.unbiased), -1).mean(1)

    def noise_to_signal(self, eps: float = 1e-6) -> Tensor:
        """``E D^2 / (E f(x_0)^2 + eps)`` of each channel, (C,).

        The smooth metric normalised by ``||f(x_0)||``, which is how section III.B of the paper describes the losses of
        its reference 29 (Wei et al., TMLR 2024).
        """
        return self.smooth.mean(1) / (self.signal.mean(1) + eps)

    @classmethod
    def of(cls, clean: Tensor, perturbed: Tensor, metric: Metric) -> LayerMetrics:
        """The metrics of one layer.

        Args:
            clean: pre-activations of the unperturbed images, (n, C, ...).
            perturbed: those of m copies, (m, n, C, ...).
            metric: the reading.
        """
        clean = clean.reshape(*clean.shape[:2], -1)
        change = perturbed.reshape(*perturbed.shape[:3], -1) - clean
        still = clean.detach()
        unbiased = change.abs().mean(0) if metric.bias == "mean_abs" else change.mean(0).abs()
        smooth = change.square().mean(0)
        ratios = None
        if metric.aggregate == "mean_of_ratios":
            ratios = metric.importance(unbiased, smooth, 1).mean(0)
        return cls(unbiased.mean(0), smooth.mean(0), still.square().mean(0), still.abs().mean(0), ratios)

    @classmethod
    def read(cls, output: Tensor, start: int, n: int, m: int, metric: Metric) -> LayerMetrics:
        """The metrics from the output (B, C, ...) of a layer for a whole batch laid out as in `observed`."""
        if metric.bias == "abs_mean" or metric.aggregate == "mean_of_ratios":
            return cls.of(output[:n], output[start : start + m * n].unflatten(0, (m, n)), metric)
        unbiased, smooth = _MeanChange.apply(output, start, n, m)
        still = output[:n].detach()
        found = (unbiased, smooth, still.square().mean(0), still.abs().mean(0))
        u, s, signal, magnitude = (part.reshape(len(part), -1) for part in found)
        return cls(u, s, signal, magnitude, None)

    @classmethod
    def joined(cls, parts: Sequence[LayerMetrics]) -> LayerMetrics:
        """The neurons of several runs of one layer side by side."""
        if len(parts) == 1:
            return parts[0]
        ratios = [part.ratios for part in parts if part.ratios is not None]
        return cls(
            torch.cat([part.unbiased for part in parts], 1),
            torch.cat([part.smooth for part in parts], 1),
            torch.cat([part.signal for part in parts], 1),
            torch.cat([part.magnitude for part in parts], 1),
            torch.cat(ratios, 1) if ratios else None,
        )

    def tensors(self) -> dict[str, Tensor]:
        """The fields that are there, by name."""
        named = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in named.items() if value is not None}


class _MeanChange(torch.autograd.Function):
    """E|D| and E D^2 of each neuron over images and copies, from a layer's output for the whole batch.

    Equal to the same arithmetic on slices, at a third of its cost: one copy at a time, and a gradient written in place,
    where slices would make a dozen temporaries of the size of all copies.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, start: int, n: int, m: int) -> tuple[Tensor, Tensor]:
        clean = output[:n]
        unbiased, smooth = torch.zeros_like(clean[0]), torch.zeros_like(clean[0])
        # The output itself cannot be kept for the gradient: an activation in place may overwrite it.
        change = torch.empty_like(output[start : start + m * n]) if ctx.needs_input_grad[0] else None
        for k in range(m):
            rows = slice(start + k * n, start + (k + 1) * n)
            part = None if change is None else change[k * n : (k + 1) * n]
            part = torch.sub(output[rows], clean, out=part)
            unbiased += part.abs().sum(0)
            smooth += part.square().sum(0)
        if change is not None:
            ctx.save_for_backward(change)
        ctx.layout = (start, n, m, output.shape)
        return unbiased / (m * n), smooth / (m * n)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (change,) = ctx.saved_tensors
        start, n, m, shape = ctx.layout
        unbiased, smooth = (g / (m * n) for g in gradients)
        result = change.new_zeros(shape)
        for k in range(m):
            part, rows = change[k * n : (k + 1) * n], result[start + k * n : start + (k + 1) * n]
            torch.sign(part, out=rows)
            rows.mul_(unbiased).addcmul_(part, smooth, value=2.0)
            result[:n] -= rows
        return result, None, None, None


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
    """Metrics of layers from the forward pass that runs inside: ``with observed(...) as found: model(x)``.

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
    parts: dict[str, list[LayerMetrics]] = {name: [] for name in where}
    result: dict[str, LayerMetrics] = {}

    def read(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            # At once: an activation in place may overwrite the output right after this hook.
            if isinstance(module, nn.Linear):
                output = output.movedim(-1, 1)
            parts[name].append(LayerMetrics.read(output, start, n, m, metric))

        return hook

    handles = [modules[path].register_forward_hook(read(name)) for name, path in where.items()]
    try:
        yield result
    finally:
        for handle in handles:
            handle.remove()
    result.update({name: LayerMetrics.joined(found) for name, found in parts.items()})


@torch.no_grad()
def measure(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    p: Perturbation,
    layers: Sequence[str],
    *,
    m: int = 8,
    sampling: Sampling = "antithetic",
    metric: Metric | None = None,
    generator: torch.Generator | None = None,
) -> dict[str, LayerMetrics]:
    """The metrics of a network in eval mode over a data set, mean over its images.

    Args:
        model: any network; its mode is given back.
        batches: (x, y) pairs; the targets are not read. The images go to the model's device.
        p: the perturbation.
        layers: weight names, for instance ``masks.prunable(model, ("conv",))``.
        m: copies an image.
        sampling: "antithetic" or "iid".
        metric: the reading; None for the default.
        generator: source of the copies.

    Raises:
        ValueError: no batch, or images that the perturbation refuses.
    """
    metric = Metric() if metric is None else metric
    device = next(model.parameters()).device
    training = [module for module in model.modules() if module.training]
    where: dict[str, str] = {}
    totals: dict[str, dict[str, Tensor]] = {}
    count = 0
    try:
        for x, _ in batches:
            x = x.to(device)
            p.check(x)
            where = where or sites(model, x[:1], layers)
            model.eval()
            copies = draw(p, x, m, sampling, generator)
            with observed(model, where, len(x), len(x), m, metric) as found:
                model(torch.cat([x, copies.flatten(0, 1)]))
            for name, layer in found.items():
                sums = totals.setdefault(name, {})
                for field, value in layer.tensors().items():
                    sums[field] = sums.get(field, torch.zeros_like(value)) + value * len(x)
            count += len(x)
    finally:
        for module in training:
            module.training = True
    if not count:
        raise ValueError("the batches are empty: there is nothing to measure")
    return {name: LayerMetrics(**_complete(sums, count)) for name, sums in totals.items()}


def _complete(sums: Mapping[str, Tensor], count: int) -> dict[str, Any]:
    return {"ratios": None} | {field: value / count for field, value in sums.items()}
