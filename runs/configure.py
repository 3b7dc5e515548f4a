"""From a cell to a method with its settings and its training objective."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

import methods
from methods.hydra import SearchConfig
from methods.training.config import TrainingConfig
from methods.training.crown_ibp import CROWNIBP
from methods.training.fast_ibp import fast_ibp
from methods.training.fgsm import FGSM
from methods.training.ibp import IBP
from methods.training.natural import Natural
from methods.training.objective import Objective
from methods.training.pgd import PGD
from methods.training.stability import NRSLoss, RSLoss
from methods.training.trades import TRADES
from runs import car_methods, matching, measure
from runs.cell import Cell, Perturb, Training

OBJECTIVES: dict[str, Callable[..., Objective]] = {
    "natural": Natural,
    "fgsm": FGSM,
    "pgd": PGD,
    "trades": TRADES,
    "ibp": IBP,
    "crown-ibp": CROWNIBP,
    "fast-ibp": fast_ibp,
}
"""Trainings that a cell can name."""

PENALTIES: dict[str, Callable[[], NRSLoss | RSLoss]] = {"nrs": NRSLoss, "rs": RSLoss}
"""Stability penalties that a cell can name."""


def build_objective(training: Training, own: dict[str, Any]) -> Objective:
    """The training objective by name.

    Raises:
        ValueError: unknown name or setting, or a radius missing or given where there is none.
    """
    from runs.suites.plan import check

    check("training", training.objective, OBJECTIVES)
    kind = OBJECTIVES[training.objective]
    known = inspect.signature(kind).parameters
    if ("eps" in known) != (training.eps is not None):
        need = "needs a radius (eps)" if "eps" in known else "takes no radius (eps)"
        raise ValueError(f"training {training.objective!r} {need}, got eps={training.eps}")
    for name in own:
        check(f"setting of training {training.objective}", name, (n for n in known if n != "eps"))
    return kind(**own, **({"eps": training.eps} if "eps" in known else {}))


def build_config(cell: Cell) -> Any:
    """The method's configuration. Settings of the training go to its fields, or to those of its objective.

    A setting ``match`` of the pruning is not among them: see `runs.matching`.

    Raises:
        ValueError: a setting that neither has.
    """
    from runs.suites.plan import check

    _, config_class = methods.get(cell.pruning.method)
    training_fields = {item.name for item in dataclasses.fields(TrainingConfig)} - {"objective"}
    given: dict[str, Any] = dict(cell.training.settings)
    objective = build_objective(cell.training, {k: v for k, v in given.items() if k not in training_fields})
    training = TrainingConfig(objective=objective, **{k: v for k, v in given.items() if k in training_fields})
    fields = {item.name for item in dataclasses.fields(config_class)}
    own = car_methods.fields(
        cell.pruning.method, {name: value for name, value in cell.pruning.settings if name != "match"}
    )
    if unknown := sorted(set(own) - fields):
        raise ValueError(f"{config_class.__name__} has no field {unknown[0]!r}; it has {', '.join(sorted(fields))}")
    if isinstance(layers := own.get("layers"), str):
        own["layers"] = tuple(layers.split("+"))
    for name in ("perturbation", "transform"):
        if isinstance(named := own.get(name), str):
            own[name] = measure.perturbation(Perturb.parse(named))
    if isinstance(named := own.get("penalty"), str):
        check("stability penalty", named, PENALTIES)
        own["penalty"] = PENALTIES[named]()
    if isinstance(epochs := own.get("search"), int):
        own["search"] = SearchConfig(epochs)
    return config_class(ratio=cell.pruning.ratio, epochs=cell.training.epochs, training=training, **own)


def match(cell: Cell) -> str | None:
    """What a cell's ratio is a share of where it is not one of weights or channels: see `runs.matching`."""
    value = dict(cell.pruning.settings).get("match")
    return None if value is None else str(value)


def build_method(cell: Cell, network: nn.Module, train: Any) -> Any:
    """The method of a cell, ready to run on `network`; a ratio to be matched becomes one of channels."""
    kind, config = methods.get(cell.pruning.method)[0], build_config(cell)
    if (wanted := match(cell)) is not None:
        device = next(network.parameters()).device
        config = matching.matched(config, wanted, network, train.tensors([0], device=device)[0])
    return kind(config)


def total_epochs(config: Any) -> int:
    """Epochs that a configuration pays for in all."""
    total = getattr(config, "total_epochs", None)
    return int(total) if total is not None else int(config.epochs + getattr(config, "finetune_epochs", 0))
