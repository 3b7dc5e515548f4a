"""Iterative magnitude pruning."""

from methods.imp.config import IMPConfig
from methods.imp.method import IMP, IMPOutcome

__all__ = ["IMP", "IMPConfig", "IMPOutcome"]
