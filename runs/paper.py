"""Numbers printed in the three papers, and whether one of ours may stand next to one of theirs.

The CSV files in ``runs/paper_numbers/`` hold every row of the printed tables. :func:`compare` finds the printed number
closest to a configuration and lists every condition in which the two differ. Only when there is none is a difference
shown; otherwise the leaderboard says "n/c" (not comparable) and why.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from importlib import resources
from typing import Any

from runs.cell import Cell, Perturb

CERTIFIED = ("ibp", "crown-ibp", "fast-ibp")
"""Trainings that minimise a certified bound."""

USN, NRS, CAR = "USN pruning", "NRSLoss pruning", "CAR"


@dataclass(frozen=True)
class Printed:
    """One printed number. Ratios are fractions removed; ``value`` is a fraction of test images in [0, 1].

    ``images`` is the number of test images behind it, ``epochs`` the training length of each network, None where the
    paper does not say. ``own_data`` marks data that nobody outside can load.
    """

    paper: str
    table: str
    data: str
    network: str | None
    method: str
    ratio: float | None
    training: str
    perturbation: Perturb | None
    verifier: str
    value: float
    images: int | None
    epochs: int | None
    own_data: bool
    note: str

    @property
    def source(self) -> str:
        return f"{self.paper}, Table {self.table}"


@dataclass(frozen=True)
class Comparison:
    """A printed number beside ours: ``reasons`` is empty exactly when the two are comparable."""

    printed: Printed
    reasons: tuple[str, ...]

    @property
    def comparable(self) -> bool:
        return not self.reasons


_NRS_METHODS: Mapping[str, str] = {
    "Dense": "dense",
    "IMP": "imp",
    "SNIP": "snip",
    "TP": "taylor",
    "HYDRA": "hydra",
    "HYDRA+NRSLoss": "hydra+nrs",
    "IMP+RSLoss": "imp+rs",
    "IMP+NRSLoss": "imp+nrs",
    "StructLTH": "structlth",
    "Slim": "slimming",
    "LWM": "magnitude",
}
_NRS_TRAININGS: Mapping[str, str] = {
    "FGSM": "fgsm",
    "auto-LiRPA": "crown-ibp",
    "FastIBP": "fast-ibp",
    "CROWN-IBP (HYDRA code)": "crown-ibp",
}
_CAR_METHODS: Mapping[str, tuple[str, str]] = {
    "Vanilla": ("dense", "natural"),
    "AdvTrain": ("dense", "pgd"),
    "LMP": ("magnitude", "natural"),
    "AdvTrain+LMP": ("magnitude", "pgd"),
    "HYDRA": ("hydra", "trades"),
    "CAR": ("car", "natural"),
}
_DATA: Mapping[str, str] = {
    "FashionMNIST": "fashion_mnist",
    "SVHN": "svhn",
    "CIFAR10": "cifar10",
    "celeba-hq": "celeba_hq",
}
_COMPLETE = ("auto", "bab", "complete", "milp", "line", "deviation")


def rows(name: str) -> list[dict[str, str]]:
    """The rows of one CSV file, as printed."""
    text = resources.files("runs").joinpath("paper_numbers", name).read_text(encoding="utf-8")
    return list(csv.DictReader(text.splitlines()))


def _number(text: str) -> float:
    return float(Fraction(text)) if "/" in text else float(text)


def _usn() -> list[Printed]:
    printed = []
    for row in rows("usn.csv"):
        magnitude = float(row["magnitude"])
        if row["perturbation"] == "brightness":
            magnitude /= 255
        weight = f", λ_W={row['lambda_w']}" if row["lambda_w"] else ""
        method = "random" if row["rule"] == "random" else "usn"
        printed.append(
            Printed(
                USN,
                row["table"],
                "aircraft",
                {"CNN7": "cnn7_cw", "ResNet18": "resnet18"}[row["model"]],
                method,
                float(row["rho"]),
                "natural",
                Perturb(row["perturbation"], magnitude),
                "complete",
                float(row["value"]),
                154,
                200,
                True,
                f"rule {row['rule']}{weight}",
            )
        )
    return printed


def _nrs() -> list[Printed]:
    printed = []
    for row in rows("certified_pruning.csv"):
        remain = float(row["remain_ratio"]) if row["remain_ratio"] else None
        small = row["table"] == "VI"
        printed.append(
            Printed(
                NRS,
                row["table"],
                _DATA[row["dataset"]],
                "cnn_large" if small else "cnn7_nrs",
                _NRS_METHODS[row["method"]],
                None if remain is None else 1 - remain,
                _NRS_TRAININGS[row["training"]],
                Perturb("linf", _number(row["eps"])) if row["eps"] else None,
                row["verifier"],
                float(row["ver"]) / 100,
                None if small else 200,
                None if small else 200,
                False,
                row["note"],
            )
        )
    return printed


def _car() -> list[Printed]:
    printed = []
    for row in rows("car.csv"):
        method, training = _CAR_METHODS[row["method"]]
        details = [text for text in (f"{row['n_aug']} augmented" if row["n_aug"] else "", row["variant"]) if text]
        network = {"mobilenet_v2": "mobilenetv2"}.get(row["model"], row["model"])
        printed.append(
            Printed(
                CAR,
                row["table"],
                _DATA.get(row["dataset"], row["dataset"]),
                network,
                method,
                float(row["prune_ratio"]),
                training,
                None,
                "probabilistic",
                float(row["pca"]) / 100,
                None,
                None,
                False,
                ", ".join(details),
            )
        )
    return printed


@cache
def load() -> tuple[Printed, ...]:
    """Every printed row of the three CSV files (80 + 111 + 86)."""
    return (*_usn(), *_nrs(), *_car())


def compare(cell: Cell, perturbation: Perturb) -> Comparison | None:
    """The printed number with the fewest differences from this configuration, or None where no paper has the row.

    A row bears on a cell when method, data family and perturbation kind agree; everything else that differs is a reason
    against comparing.
    """
    family = cell.data.name.partition(":")[0]
    found: list[tuple[tuple[float, ...], Comparison]] = []
    ours = {"none": "usn", "usn-w0": "usn"}.get(cell.pruning.label, cell.pruning.label)
    for printed in load():
        if printed.method != ours or printed.perturbation is None:
            continue
        if printed.data != family and not family.startswith(f"{printed.data}_"):
            continue
        if printed.perturbation.kind != perturbation.kind:
            continue
        reasons = _differences(printed, cell, perturbation)
        kind = (printed.training in CERTIFIED) != (cell.training.objective in CERTIFIED)
        gap = abs((printed.ratio or 0.0) - cell.pruning.ratio)
        found.append(((len(reasons), kind, gap), Comparison(printed, tuple(reasons))))
    return min(found, key=lambda item: item[0])[1] if found else None


def _differences(printed: Printed, cell: Cell, perturbation: Perturb) -> list[str]:
    assert printed.perturbation is not None
    checks: list[tuple[bool, str]] = [
        (printed.own_data, "the paper's images are not public"),
        (printed.data != cell.data.name or cell.data.limit is not None, f"data: {cell.data.label}, not {printed.data}"),
        (
            printed.network is not None and (printed.network != cell.network.name or cell.network.width != 1.0),
            f"network: {cell.network.label}, not {printed.network} at full width",
        ),
        (
            abs(printed.perturbation.magnitude - perturbation.magnitude) > 1e-9,
            f"magnitude: {perturbation.label}, not {printed.perturbation.label}",
        ),
        (
            printed.training != cell.training.objective,
            f"training: {cell.training.objective}, not {printed.training}",
        ),
        (
            cell.training.objective != "natural"
            and cell.training.eps is not None
            and abs(cell.training.eps - printed.perturbation.magnitude) > 1e-9
            and printed.training != "natural",
            f"training radius: {cell.training.label}, not {printed.perturbation.label}",
        ),
        (
            printed.paper == USN and f"rule {_rule(cell)}" != printed.note,
            f"{_rule(cell)}, not {printed.note.removeprefix('rule ')}",
        ),
        (
            printed.epochs is not None and printed.epochs != cell.training.epochs,
            f"epochs: {cell.training.epochs}, not {printed.epochs}",
        ),
        (
            printed.images is not None and printed.images != cell.verifier.images,
            f"images: {cell.verifier.images}, not {printed.images}",
        ),
        (
            not _same_verifier(printed.verifier, cell.verifier.method),
            f"verifier: {cell.verifier.method}, not {printed.verifier}",
        ),
        (printed.ratio is None, "the paper does not give the sparsity"),
        (
            printed.ratio is not None and abs(printed.ratio - cell.pruning.ratio) > 0.005,
            f"sparsity: {cell.pruning.ratio:g}, not {printed.ratio or 0.0:.2g}",
        ),
    ]
    return [text for differs, text in checks if differs]


def _rule(cell: Cell) -> str:
    """The pruning rule and λ_W of a cell as the USN paper's tables name them."""
    name = {"none": "none, λ_W=10", "usn": "usn, λ_W=10", "usn-w0": "usn, λ_W=0"}
    return name.get(cell.pruning.label, cell.pruning.label)


def _same_verifier(printed: str, ours: str) -> bool:
    if printed.startswith("beta-CROWN") or printed == "complete":
        return ours in _COMPLETE
    return printed.lower() == ours.lower()


def describe(comparison: Comparison | None, verified: float) -> dict[str, Any]:
    """The paper columns of one row as plain values: printed number, difference, comparable, reason, source."""
    if comparison is None:
        return {
            "printed": None,
            "difference": None,
            "comparable": False,
            "reason": "no such row in the papers",
            "source": None,
        }
    printed = comparison.printed
    return {
        "printed": printed.value,
        "difference": verified - printed.value if comparison.comparable else None,
        "comparable": comparison.comparable,
        "reason": "; ".join(comparison.reasons) or None,
        "source": printed.source + (f" ({printed.note})" if printed.note else ""),
    }
