"""CAR: compression-aware robust training, soft-mask pruning for networks that withstand semantic changes."""

from methods.car.config import CARConfig
from methods.car.initialise import initial_values
from methods.car.losses import consistency, margin, margin_ratio, stability
from methods.car.method import CAR, CAROutcome
from methods.car.pairs import Paired, PairedBatches
from methods.car.presets import Row, Variant, preset, training
from methods.car.recalibrate import recalibrate

__all__ = [
    "CAR",
    "CARConfig",
    "CAROutcome",
    "Paired",
    "PairedBatches",
    "Row",
    "Variant",
    "consistency",
    "initial_values",
    "margin",
    "margin_ratio",
    "preset",
    "recalibrate",
    "stability",
    "training",
]
