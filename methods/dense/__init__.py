"""The dense baseline."""

from methods.dense.config import DenseConfig
from methods.dense.method import Dense

__all__ = ["Dense", "DenseConfig"]
