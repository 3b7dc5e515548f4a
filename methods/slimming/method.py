"""Network slimming: an L1 penalty on normalisation weights, and the channels with the smallest ones go."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from certify.bounds import Propagation
from methods import wiring
from methods.base import prunable
from methods.iterative import Iterative, Trained
from methods.masks import Mask
from methods.slimming.config import SlimmingConfig
from methods.training.history import History
from methods.training.objective import Objective
from methods.training.regularised import Regularised


@dataclasses.dataclass(frozen=True)
class GammaL1:
    """``weight * sum |gamma|`` over the weights of all batch normalisations, or their mean with `average`."""

    weight: float = 1e-4
    average: bool = False

    name: str = dataclasses.field(default="gamma-l1", init=False)
    bounded: ClassVar[bool] = False

    def penalty(self, model: nn.Module, found: Propagation | None, share: float) -> Tensor:
        gammas = [m.weight.flatten() for m in model.modules() if isinstance(m, _BatchNorm) and m.weight is not None]
        if not gammas:
            raise ValueError("the network has no batch normalisation with weights to slim")
        size = torch.cat(gammas).abs()
        return self.weight * (size.mean() if self.average else size.sum())


@dataclasses.dataclass(frozen=True)
class Slimming(Iterative[SlimmingConfig]):
    """Network slimming (Liu et al. 2017, "Learning Efficient Convolutional Networks through Network Slimming").

    Channels are ranked by ``|gamma|`` of the batch normalisation right behind them. Layers without one stay whole.
    """

    config: SlimmingConfig = dataclasses.field(default_factory=SlimmingConfig)

    def objective(self, objective: Objective) -> Objective:
        return Regularised(objective, (GammaL1(self.config.l1, self.config.average),))

    def names(self, network: nn.Module) -> tuple[str, ...]:
        gammas = _gammas(network)
        names = tuple(name for name in prunable(network, self.config) if name in gammas)
        if not names:
            raise ValueError(
                "network slimming needs a batch normalisation right behind a prunable layer; there is none"
            )
        return names

    def prune(self, trained: Trained) -> tuple[Mask, History]:
        gammas = _gammas(trained.network)
        parameters = dict(trained.network.named_parameters())
        scores = {}
        for name in trained.names:
            weight = parameters[name]
            size = gammas[name].detach().abs()
            scores[name] = size.reshape(-1, *[1] * (weight.ndim - 1)).expand(weight.shape)
        return trained.select(scores, self.config.scope, True), History()


def _gammas(network: nn.Module) -> dict[str, Tensor]:
    """Name of a layer's weight -> the weight of the batch normalisation that reads it alone."""
    parameters = dict(network.named_parameters())
    modules = dict(network.named_modules())
    found: dict[str, Tensor] = {}
    for path, tied in wiring.tied_tensors(network).items():
        for name in tied:
            owner, _, kind = name.rpartition(".")
            if kind == "weight" and isinstance(modules[owner], _BatchNorm):
                found[f"{path}.weight" if path else "weight"] = parameters[name]
    return found
