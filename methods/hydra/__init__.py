"""HYDRA: learned pruning scores."""

from methods.hydra.config import HYDRAConfig, SearchConfig
from methods.hydra.method import HYDRA
from methods.hydra.search import search

__all__ = ["HYDRA", "HYDRAConfig", "SearchConfig", "search"]
