"""SNIP: pruning by connection sensitivity."""

from methods.snip.config import SNIPConfig
from methods.snip.method import SNIP

__all__ = ["SNIP", "SNIPConfig"]
