"""Taylor pruning."""

from methods.taylor.config import TaylorConfig
from methods.taylor.method import Taylor

__all__ = ["Taylor", "TaylorConfig"]
