"""Network slimming."""

from methods.slimming.config import SlimmingConfig
from methods.slimming.method import GammaL1, Slimming

__all__ = ["GammaL1", "Slimming", "SlimmingConfig"]
