"""What the pruning of a CAR cell may say beyond the fields of its configuration."""

from __future__ import annotations

import dataclasses
from typing import Any

from methods.car import CARConfig
from methods.car.presets import changes
from methods.training.config import TrainingConfig


def fields(method: str, given: dict[str, Any]) -> dict[str, Any]:
    """Fields of the method's configuration from the settings of a cell.

    ``variant`` of "car" is a column of the paper's Tables 3 to 5 (`methods.car.presets.changes`) on top of what else is
    set, and ``mask_lr`` the rate of Adam in its mask stage. ``variant`` of "magnitude" is a name alone: "longer".

    Raises:
        ValueError: an unknown variant.
    """
    own = dict(given)
    if method == "magnitude":
        own.pop("variant", None)
    if method == "car":
        variant, rate = own.pop("variant", None), own.pop("mask_lr", None)
        if variant is not None:
            own |= _variant(str(variant))
        if rate is not None:
            own["mask_training"] = TrainingConfig(optimizer="adam", lr=float(rate))
    return own


def _variant(name: str) -> dict[str, Any]:
    from runs.suites.car import ABLATIONS, INITIALISATIONS, NOISES
    from runs.suites.plan import check

    check("variant of car", name, (*ABLATIONS, *INITIALISATIONS, *NOISES, "ce"))
    found: dict[str, Any] = changes(name)  # type: ignore[arg-type]
    if unknown := set(found) - {field.name for field in dataclasses.fields(CARConfig)}:
        raise ValueError(f"the variant {name!r} of car sets {unknown.pop()!r}, which CARConfig does not have")
    return found
