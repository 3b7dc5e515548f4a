"""NRSLoss: pruning with stable ReLUs."""

from methods.nrs.config import NRSConfig
from methods.nrs.method import NRS
from methods.nrs.metrics import Remaining, Stability, remaining, stability
from methods.nrs.presets import Row, one_shot, preset, training
from methods.training.stability import NRSLoss, RSLoss

__all__ = [
    "NRS",
    "NRSConfig",
    "NRSLoss",
    "RSLoss",
    "Remaining",
    "Row",
    "Stability",
    "one_shot",
    "preset",
    "remaining",
    "stability",
    "training",
]
