"""Structured lottery tickets by refilling."""

from methods.structlth.config import StructLTHConfig
from methods.structlth.method import StructLTH

__all__ = ["StructLTH", "StructLTHConfig"]
