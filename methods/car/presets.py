"""The rows of the CAR paper's tables as configurations: 1 (all methods), 2 (networks), 3 to 5 (variants of CAR).

Common to all rows (section 3, and the public recipe of its face data set where the paper is silent): networks
pretrained on ImageNet, 224 px, SGD at .01 with momentum .9, batches of 16, random flips, 50 epochs; 50 epochs of
fine-tuning at .001. Augmentation by 0, 1000 or 4000 edited images is a matter of the batches
(`methods.car.PairedBatches`).

The paper does not print the weights of its loss: `GRID` holds those to try, `CARConfig` neutral ones (README).
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, get_args

from methods.car.config import CARConfig, Transform
from methods.car.method import CAR
from methods.dense import Dense, DenseConfig
from methods.errors import unknown
from methods.hydra import HYDRA, HYDRAConfig, SearchConfig
from methods.magnitude import Magnitude, MagnitudeConfig
from methods.training.config import TrainingConfig
from methods.training.natural import Natural
from methods.training.objective import Objective
from methods.training.pgd import PGD
from methods.training.trades import TRADES

Row = Literal["vanilla", "advtrain", "lmp", "advtrain+lmp", "hydra", "car"]
Variant = Literal[
    "full", "no_stab", "no_ratio", "no_consis", "mse_consis", "no_l1",
    "init=random", "tau=50", "tau=40", "tau=30", "tau=20", "tau=10", "tau=0(full-scaled)",
    "delta=0", "delta=0.1", "delta=0.5", "delta=0.8",
    "eta=inf", "eta=0.95", "eta=0.98", "eta=1.0",
    "ce",
]  # fmt: skip

# Radii of the L2 attacks (section 4.1), in pixel space.
RADII = {"celeba_hq": 0.5, "flowers102": 2.0}

# What the paper leaves open: the values to try around those of `CARConfig`.
GRID: dict[str, tuple[float, ...]] = {
    "lambda_stab": (0.1, 1.0, 10.0),
    "lambda_ratio": (0.1, 1.0, 10.0),
    "lambda_consis": (0.1, 1.0, 10.0),
    "lambda_l1": (0.01, 0.1, 1.0),
    "lambda_ce": (0.0, 1.0),
    "lr": (1e-4, 1e-3, 1e-2),
}


def training(objective: Objective | None = None) -> TrainingConfig:
    """SGD at a constant .01 with momentum .9 (fine-tuning: .001); None for cross-entropy on the images as they are."""
    return TrainingConfig(optimizer="sgd", lr=0.01, momentum=0.9, schedule="constant", objective=objective or Natural())


def preset(
    row: Row,
    ratio: float = 0.5,
    eps: float = 2.0,
    *,
    variant: Variant = "full",
    epochs: int = 50,
    mask_epochs: int = 100,
    finetune_epochs: int = 50,
    search_epochs: int = 20,
    transform: Transform | None = None,
) -> Dense | Magnitude | HYDRA | CAR:
    """The method of a row, ready for `fit`.

    Args:
        row: "vanilla", "advtrain" (cross-entropy plus that under L2 PGD), "lmp" (one-shot magnitude pruning, each layer
            alike), "advtrain+lmp", "hydra" (TRADES throughout, each layer alike, trained, pruned and fine-tuned once),
            "car".
        ratio: fraction of weights removed, from convolutions and fully connected layers alike; .5 and .7 in the paper.
            Not read by "vanilla" and "advtrain".
        eps: radius of the L2 attacks of "advtrain", "advtrain+lmp" and "hydra": see `RADII`. The paper gives HYDRA's
            norm and radius nowhere; they are taken to be AdvTrain's.
        variant: of "car": the columns of Tables 3 to 5, as they are named in the printed numbers; "ce" adds
            cross-entropy to Eq. 9.
        epochs, mask_epochs, finetune_epochs: the paper's.
        search_epochs: of HYDRA's scores; 20 in its paper.
        transform: see `CARConfig`; None for batches with pairs.

    Raises:
        ValueError: unknown row or variant (with close matches), or a variant of another row than "car".
    """
    _known(row, Row, "row")
    _known(variant, Variant, "variant")
    if row != "car" and variant != "full":
        raise ValueError(f"variants are those of row 'car', got variant {variant!r} of row {row!r}")
    shared: dict[str, Any] = {"epochs": epochs, "finetune_epochs": finetune_epochs}
    attacked = training(PGD(eps, "L2", clean=1.0))
    if row in ("vanilla", "advtrain"):
        goal = training() if row == "vanilla" else attacked
        return Dense(DenseConfig(epochs=epochs, finetune_epochs=0, training=goal))
    if row in ("lmp", "advtrain+lmp"):
        goal = training() if row == "lmp" else attacked
        return Magnitude(MagnitudeConfig(ratio=ratio, scope="layer", training=goal, **shared))
    if row == "hydra":
        return HYDRA(
            HYDRAConfig(
                ratio=ratio, rounds=1, rewind="finetune", layers=("conv", "linear"),
                training=training(TRADES(eps, "L2")), search=SearchConfig(search_epochs), **shared,
            )
        )  # fmt: skip
    base = CARConfig(ratio=ratio, training=training(), mask_epochs=mask_epochs, transform=transform, **shared)
    return CAR(dataclasses.replace(base, **changes(variant)))


def changes(variant: Variant) -> dict[str, Any]:
    """What a variant of Tables 3 to 5 changes in `CARConfig`."""
    named: dict[str, dict[str, Any]] = {
        "full": {},
        "no_stab": {"lambda_stab": 0.0},
        "no_ratio": {"lambda_ratio": 0.0},
        "no_consis": {"lambda_consis": 0.0},
        "mse_consis": {"consistency": "mse"},
        "no_l1": {"lambda_l1": 0.0},
        "init=random": {"init": "random"},
        "tau=0(full-scaled)": {"init": "full"},
        "ce": {"lambda_ce": 1.0},
    }
    if variant in named:
        return named[variant]
    field, _, value = variant.partition("=")
    return {field: float(value) / 100 if field == "tau" else float(value)}


def _known(name: str, names: Any, what: str) -> None:
    if name not in get_args(names):
        raise ValueError(unknown(what, name, get_args(names)))
