"""The rows of the NRSLoss paper as configurations, in two flavours.

"as_paper" is what Li et al. (TMLR 2022) print, "as_released" what the code they released does. Where they differ:

* Unstructured states: 17 (16 prunings of 20 %, .8^16 = .028 is left); released: 16 (.035 is left).
* RSLoss and NRSLoss: .01 of the mean over neurons; released: under FGSM over all ReLUs, fully connected ones too; in
  certified training .001 of the mean over channels of the ReLUs right behind a batch normalisation.
* Slimming's L1: 1e-4 for each gamma; released: 1e-4 of their mean.
* StructLTH's ranking: total magnitude; released: mean magnitude.
* Radius of certified training: full from epoch 80 of 200; released: from epoch 92.

What the released code does by mistake is not part of a flavour: ``rewind="aliased"`` is its rewinding in certified
training, ``rewind="finetune-frozen"`` its fine-tuning. Both flavours select epochs on validation data.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, get_args

from methods.dense import Dense, DenseConfig
from methods.errors import unknown
from methods.hydra import HYDRA, HYDRAConfig
from methods.hydra.config import SearchConfig
from methods.imp import IMP, IMPConfig
from methods.iterative import Iterative, IterativeConfig, Rewinding
from methods.nrs.config import NRSConfig
from methods.nrs.method import NRS
from methods.random import IterativeRandom
from methods.slimming import Slimming, SlimmingConfig
from methods.snip import SNIP, SNIPConfig
from methods.structlth import StructLTH, StructLTHConfig
from methods.taylor import Taylor, TaylorConfig
from methods.training.config import TrainingConfig
from methods.training.crown_ibp import CROWNIBP
from methods.training.eps import Linear, Smoothed
from methods.training.fast_ibp import fast_ibp
from methods.training.fgsm import FGSM
from methods.training.ibp import IBP
from methods.training.natural import Natural
from methods.training.objective import Objective
from methods.training.pgd import PGD
from methods.training.stability import NRSLoss, RSLoss
from methods.training.trades import TRADES

Flavour = Literal["as_paper", "as_released"]
Kind = Literal["fgsm", "crown-ibp", "fast-ibp", "natural", "pgd", "trades", "ibp"]
Row = Literal[
    "dense", "random", "imp", "snip", "taylor", "hydra", "hydra+nrs", "hydra+rs", "imp+rs", "imp+nrs", "slimming",
    "structlth",
]  # fmt: skip
_CERTIFIED = ("crown-ibp", "fast-ibp", "ibp")


def training(
    kind: Kind, eps: float, *, flavour: Flavour = "as_paper", penalised: bool = False, grad_align: float = 0.2
) -> TrainingConfig:
    """A training of the paper (section IV.A.3 and appendix), or another one under the same schedule.

    Args:
        kind: "fgsm" (FGSM + GradAlign), "crown-ibp" (auto-LiRPA with loss fusion), "fast-ibp" (Shi et al. 2021; the
            network should come from `methods.training.fast_ibp.initialise` and `normalise_linear`), or "natural",
            "pgd", "trades", "ibp".
        eps: target radius in pixel space: .1 for FashionMNIST, 2/255 or 8/255.
        flavour: see the module.
        penalised: RSLoss or NRSLoss is added; CROWN-IBP then has no weight decay.
        grad_align: its weight; Andriushchenko & Flammarion's own values are named at `FGSM`.

    200 epochs (300 at 8/255), batches of 128, gradient norms clipped at 8, rates times .1 at 70 % and 85 %.
    """
    _known(kind, Kind, "training")
    _known(flavour, Flavour, "flavour")
    ramp = Smoothed(10 / 200, (80 if flavour == "as_paper" else 92) / 200)
    objectives: dict[str, Objective] = {
        "fgsm": FGSM(eps, grad_align=grad_align),
        "crown-ibp": CROWNIBP(eps, schedule=ramp),
        "fast-ibp": fast_ibp(eps, ramp),
        "natural": Natural(),
        "pgd": PGD(eps),
        "trades": TRADES(eps),
        "ibp": IBP(eps, schedule=Linear(ramp.start, ramp.end)),
    }
    shared: dict[str, Any] = {"schedule": "step", "milestones": (0.7, 0.85), "gamma": 0.1, "clip_grad_norm": 8.0}
    if kind not in _CERTIFIED:
        return TrainingConfig(
            optimizer="sgd", lr=0.01, momentum=0.9, weight_decay=5e-4, objective=objectives[kind], **shared
        )
    rate = 5e-4 if kind == "fast-ibp" else 1e-3
    decay = 1e-5 if kind == "crown-ibp" and not penalised else 0.0
    return TrainingConfig(optimizer="adam", lr=rate, weight_decay=decay, objective=objectives[kind], **shared)


def preset(
    row: Row,
    kind: Kind,
    eps: float,
    *,
    flavour: Flavour = "as_paper",
    epochs: int = 200,
    rounds: int | None = None,
    rewind: Rewinding = "init",
    rewind_epoch: int = 1,
    finetune_epochs: int | None = None,
    search_epochs: int = 20,
) -> Dense | Iterative[Any]:
    """The method of a row of the paper's tables, ready for `fit` or `states`.

    Args:
        row: the pruning method, "+rs" and "+nrs" with that penalty in training.
        kind, eps, flavour: see `training` and the module.
        epochs: epochs of a state; 200, and 300 at 8/255.
        rounds: prunings; None for as many as the paper's. Fewer end at a lower sparsity of the same ladder: each one
            removes 20 % of what is left, or 11 % of the channels.
        rewind: see `methods.iterative.IterativeConfig`.
        rewind_epoch: for "late".
        finetune_epochs: for "finetune" and "finetune-frozen"; None for `epochs`. Fine-tuning keeps the decayed rate.
        search_epochs: HYDRA's epochs of scores.

    Raises:
        ValueError: unknown row, training or flavour, with close matches.
    """
    _known(row, Row, "row")
    base, _, penalty = row.partition("+")
    goal = training(kind, eps, flavour=flavour, penalised=bool(penalty))
    if base == "dense":
        return Dense(DenseConfig(epochs=epochs, training=goal, finetune_epochs=0, layers=("conv",)))
    structured = base in ("slimming", "structlth")
    rate = 0.11 if structured else 0.2
    if rounds is None:
        rounds = 11 if structured else (16 if flavour == "as_paper" else 15)
    tuned = rewind in ("finetune", "finetune-frozen")
    decayed = dataclasses.replace(
        goal, lr=goal.lr * goal.gamma**2, schedule="constant", objective=goal.objective.settled()
    )
    shared: dict[str, Any] = {
        "ratio": 1.0 - (1.0 - rate) ** rounds,
        "rounds": rounds,
        "epochs": epochs,
        "training": goal,
        "rewind": rewind,
        "rewind_epoch": rewind_epoch,
        "finetune_epochs": (epochs if finetune_epochs is None else finetune_epochs) if tuned else 0,
        "finetune": decayed if tuned else None,
        "structured": structured,
    }
    released = flavour == "as_released"
    search = SearchConfig(search_epochs)
    if penalty:
        hydra: dict[str, Any] = {"hydra": search, "scope": "layer"} if base == "hydra" else {}
        return NRS(NRSConfig(penalty=_penalty(penalty, kind, released), eps=eps, **hydra, **shared))
    if base == "hydra":
        return HYDRA(HYDRAConfig(search=search, **shared))
    if base == "slimming":
        return Slimming(SlimmingConfig(average=released, **shared))
    if base == "structlth":
        return StructLTH(StructLTHConfig(rank="mean" if released else "total", **shared))
    plain: dict[str, Iterative[Any]] = {
        "random": IterativeRandom(IterativeConfig(**shared)),
        "imp": IMP(IMPConfig(**shared)),
        "snip": SNIP(SNIPConfig(**shared)),
        "taylor": Taylor(TaylorConfig(**shared)),
    }
    return plain[base]


def one_shot(
    row: Literal["magnitude", "hydra"],
    keep: float,
    eps: float = 0.007,
    *,
    epochs: int = 200,
    finetune_epochs: int = 200,
) -> IMP | HYDRA:
    """Table VI: train with CROWN-IBP, prune once to `keep` of every layer, fine-tune at the full radius.

    HYDRA's setting, on its `cnn_large` and at its radius: 20 epochs of scores, fully connected layers pruned too. The
    paper keeps .1, .05 and .01. Its lengths are not stated; those of its other tables stand in.
    """
    goal = training("crown-ibp", eps)
    shared: dict[str, Any] = {
        "ratio": 1.0 - keep,
        "rounds": 1,
        "epochs": epochs,
        "training": goal,
        "rewind": "finetune",
        "finetune_epochs": finetune_epochs,
        "scope": "layer",
        "layers": ("conv", "linear"),
    }
    if row == "hydra":
        return HYDRA(HYDRAConfig(search=SearchConfig(20), **shared))
    if row == "magnitude":
        return IMP(IMPConfig(**shared))
    raise ValueError(f"row must be 'magnitude' or 'hydra', got {row!r}")


def _penalty(name: str, kind: Kind, released: bool) -> RSLoss | NRSLoss:
    certified = kind in _CERTIFIED
    if name == "rs":
        if released and certified:
            return RSLoss(0.001, average="channels", over="normalised")
        return RSLoss(0.01, over="all")
    if released and certified:
        return NRSLoss(0.001, average="channels", over="normalised")
    return NRSLoss(0.01, over="all" if released else "normalised")


def _known(name: str, names: Any, what: str) -> None:
    if name not in get_args(names):
        raise ValueError(unknown(what, name, get_args(names)))
