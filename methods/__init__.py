"""Pruning methods. Each is a package of its own: ``from methods.magnitude import Magnitude, MagnitudeConfig``.

Every method is used as ``Method(config).fit(model, batches) -> Outcome(model, mask, history)`` on any network and any
re-iterable of (x, y) batches. This module lists them without importing torch.
"""

from __future__ import annotations

import importlib
from typing import Any

from methods.errors import unknown

# Name -> (class, configuration, one line). The package is methods.<name>.
_METHODS: dict[str, tuple[str, str, str]] = {
    "dense": ("Dense", "DenseConfig", "train only, nothing removed"),
    "random": ("Random", "RandomConfig", "train, remove at random, fine-tune"),
    "magnitude": ("Magnitude", "MagnitudeConfig", "LMP: train, remove the smallest weights once, fine-tune"),
    "imp": ("IMP", "IMPConfig", "iterative magnitude pruning with rewinding"),
    "nrs": ("NRS", "NRSConfig", "iterative pruning with stable ReLUs: IMP or HYDRA with RSLoss or NRSLoss"),
    "snip": ("SNIP", "SNIPConfig", "iterative pruning by connection sensitivity"),
    "taylor": ("Taylor", "TaylorConfig", "iterative pruning by first-order change of the loss"),
    "hydra": ("HYDRA", "HYDRAConfig", "iterative pruning by scores learned on the robust loss"),
    "slimming": ("Slimming", "SlimmingConfig", "channels with the smallest L1-penalised batch-norm weights"),
    "structlth": ("StructLTH", "StructLTHConfig", "structured lottery tickets: IMP ranks channels, then refills them"),
    "car": ("CAR", "CARConfig", "soft masks trained for stability under semantic changes, binarised, fine-tuned"),
    "usn": ("USN", "USNConfig", "channels unstable under semantic perturbations, removed progressively in training"),
}

# Methods from outside the tree: name -> (class, configuration, one line).
_OUTSIDE: dict[str, tuple[Any, Any, str]] = {}

__all__ = ["describe", "get", "names", "register"]


def register(name: str, method: Any, config: Any, line: str) -> None:
    """Add a method of your own to `names()` and `get`: its class, its configuration's class, one line about it.

    Raises:
        ValueError: the name is taken.
    """
    if name in names():
        raise ValueError(f"there is a method {name!r} already; choose another name")
    _OUTSIDE[name] = (method, config, line)


def names() -> tuple[str, ...]:
    """The methods' names."""
    return (*_METHODS, *_OUTSIDE)


def describe() -> dict[str, str]:
    """Name -> one line."""
    return {name: line for name, (_, _, line) in (_METHODS | _OUTSIDE).items()}


def get(name: str) -> tuple[Any, Any]:
    """The method's class and its configuration's class.

    Raises:
        KeyError: unknown name; the message offers close matches.
    """
    if name in _OUTSIDE:
        return _OUTSIDE[name][:2]
    if name not in _METHODS:
        raise KeyError(unknown("method", name, names()))
    method, config, _ = _METHODS[name]
    package = importlib.import_module(f"methods.{name}")
    return getattr(package, method), getattr(package, config)
