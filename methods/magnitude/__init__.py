"""One-shot magnitude pruning (LMP)."""

from methods.magnitude.config import MagnitudeConfig
from methods.magnitude.method import Magnitude

__all__ = ["Magnitude", "MagnitudeConfig"]
