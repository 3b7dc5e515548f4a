"""Random pruning."""

from methods.random.config import RandomConfig
from methods.random.method import Random

__all__ = ["Random", "RandomConfig"]
