"""A zoo of networks small enough to certify and the ImageNet nets that papers prune, all behind one interface.

``create`` builds, ``save`` and ``load`` keep, ``names`` and ``describe`` list, ``count`` and ``flops`` measure.
Images are (N, C, S, S) in [0, 1]; normalisation is a layer of the network. Importing this package imports no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from models.recipe import Recipe
from models.zoo import create, describe, names

if TYPE_CHECKING:
    from models.cost import count, flops
    from models.io import CheckpointError, load, save

__all__ = ["CheckpointError", "Recipe", "count", "create", "describe", "flops", "load", "names", "save"]

_LAZY = {
    "CheckpointError": "models.io",
    "count": "models.cost",
    "flops": "models.cost",
    "load": "models.io",
    "save": "models.io",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
