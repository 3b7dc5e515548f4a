"""Random pruning."""

from methods.random.config import RandomConfig
from methods.random.iterative import IterativeRandom
from methods.random.method import Random

__all__ = ["IterativeRandom", "Random", "RandomConfig"]
