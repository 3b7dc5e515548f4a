"""ReLU stability as a penalty: RSLoss and NRSLoss.

* K. Y. Xiao et al. 2019, "Training for Faster Adversarial Robustness Verification via Inducing ReLU Stability",
  section 4.2: ``-tanh(1 + l u)`` of each ReLU's pre-activation interval [l, u].
* Z. Li et al. 2022, "Can pruning improve certified robustness of neural networks?", Eq. 5: ``-tanh(1 + l u / gamma^2)``
  with the batch normalisation's weight gamma, without a gradient into gamma.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from certify.bounds import Propagation, Rectifier

Average = Literal["neurons", "channels"]
# Stands for the interval of a dead channel, whose normalised value is a constant: as stable as can be.
_STABLE = 1e4


def _check(weight: float, average: str, over: str) -> None:
    if not 0.0 <= weight < float("inf"):
        raise ValueError(f"weight must be a finite number >= 0, got {weight}")
    if average not in ("neurons", "channels"):
        raise ValueError(f"average must be 'neurons' or 'channels', got {average!r}")
    if over not in ("all", "normalised"):
        raise ValueError(f"over must be 'all' or 'normalised', got {over!r}")


def _layers(found: Propagation | None, over: str) -> list[Rectifier]:
    assert found is not None
    layers = [layer for layer in found.rectifiers() if over == "all" or layer.norm is not None]
    if not layers:
        what = "ReLU" if over == "all" else "ReLU right behind a batch normalisation; over='all' takes any"
        raise ValueError(f"the stability penalty finds no {what}")
    return layers


def _mean(terms: list[Tensor], average: Average) -> Tensor:
    """The mean over all neurons, or over all channels (or features) of their means, and over the batch."""
    if average == "channels":
        terms = [term.transpose(0, 1).flatten(1).mean(1) for term in terms]
    return torch.cat([term.flatten() for term in terms]).mean()


@dataclasses.dataclass(frozen=True)
class RSLoss:
    """``weight * mean(-tanh(1 + l u))`` over ReLU neurons and the batch (Xiao et al. 2019).

    Args:
        weight: of the penalty. The mean keeps it comparable between networks; Xiao et al. sum over neurons.
        average: "neurons": every neuron weighs the same; "channels": every channel does.
        over: "all" ReLUs, or only "normalised" ones, right behind a batch normalisation.
    """

    weight: float = 0.01
    average: Average = "neurons"
    over: Literal["all", "normalised"] = "all"

    name: str = dataclasses.field(default="rs", init=False)
    bounded: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check(self.weight, self.average, self.over)

    def penalty(self, model: nn.Module, found: Propagation | None, share: float) -> Tensor:
        terms = [-torch.tanh(1.0 + layer.lower * layer.upper) for layer in _layers(found, self.over)]
        return self.weight * _mean(terms, self.average)


@dataclasses.dataclass(frozen=True)
class NRSLoss:
    """``weight * mean(-tanh(1 + l u / gamma^2))`` over ReLU neurons and the batch (Li et al. 2022, Eq. 5).

    ``l u / gamma^2`` is the product of the ends of the normalised pre-BN interval ``(z - mu) / sigma + beta / gamma``:
    the statistics and beta stay part of it, and are trained by it; gamma only says where beta puts the kink.

    Args:
        weight: of the penalty.
        average: as for `RSLoss`.
        over: only "normalised" ReLUs, right behind a batch normalisation, or "all", those without one with gamma = 1.
        gamma: "stopped": gamma is a constant of the penalty, in this layer and, through the intervals and statistics
            that later layers read, in every layer: no gradient of the penalty reaches any gamma. "denominator": only
            the divisor is detached; l and u still depend on gamma, so the penalty trains it, by a gradient that the
            penalty as a whole does not have. "free": nothing is stopped.

    "stopped" takes a backward pass of its own, because the training loss, which shares the intervals, does train gamma.
    Neurons of a channel with gamma = 0 are constants and count as stable.
    """

    weight: float = 0.01
    average: Average = "neurons"
    over: Literal["all", "normalised"] = "normalised"
    gamma: Literal["stopped", "denominator", "free"] = "stopped"

    name: str = dataclasses.field(default="nrs", init=False)
    bounded: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check(self.weight, self.average, self.over)
        if self.gamma not in ("stopped", "denominator", "free"):
            raise ValueError(f"gamma must be 'stopped', 'denominator' or 'free', got {self.gamma!r}")

    def penalty(self, model: nn.Module, found: Propagation | None, share: float) -> Tensor:
        terms = [-torch.tanh(1.0 + self._product(layer)) for layer in _layers(found, self.over)]
        value = self.weight * _mean(terms, self.average)
        return _without_gamma(value, model) if self.gamma == "stopped" else value

    def _product(self, layer: Rectifier) -> Tensor:
        return normalised_product(layer, free=self.gamma == "free")


def normalised_product(layer: Rectifier, free: bool = False) -> Tensor:
    """``l u / gamma^2``, (N, *shape): the product of the ends of the normalised pre-BN interval.

    ``l u`` itself where there is no normalisation or it has no gamma; a large positive number where gamma is 0. The
    divisor carries a gradient only if `free`.
    """
    product = layer.lower * layer.upper
    if layer.norm is None or layer.norm.weight is None:
        return product
    gamma = layer.norm.weight if free else layer.norm.weight.detach()
    square = gamma.square().reshape(-1, *[1] * (product.ndim - 2))
    dead = square == 0
    return torch.where(dead, torch.full_like(product, _STABLE), product / torch.where(dead, 1.0, square))


def _without_gamma(value: Tensor, model: nn.Module) -> Tensor:
    """`value` with its gradient in all parameters but the normalisations' weights, for which it is a constant."""
    gammas = {id(m.weight) for m in model.modules() if isinstance(m, _BatchNorm) and m.weight is not None}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in gammas]
    if not value.requires_grad or not others:
        return value.detach()
    gradients = torch.autograd.grad(value, others, retain_graph=True, allow_unused=True)
    carrier = [((p - p.detach()) * g).sum() for p, g in zip(others, gradients) if g is not None]
    return value.detach() + torch.stack(carrier).sum() if carrier else value.detach()
