"""Semantic changes of images: a smile, warmer light, a higher sun. Exact, photometric or generated.

    from datasets import semantic
    edit = semantic.SceneEdit(pack, "sun")                  # rendered again: exact
    edit = semantic.Warmth(1.4)                             # on the pixels
    edit = semantic.DiffAEEdit(semantic.load("flowers"))    # an accepted diffusion autoencoder
    cert = certify.estimate(model, x, y, semantic.Draws(edit))

Importing this package imports neither torch nor diffusers; using a name does.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets.semantic.acceptance import Criteria, Report, accept, judge
    from datasets.semantic.augmentation import augment, pairs
    from datasets.semantic.diffae import DiffAE, DiffAEConfig, NotAccepted, State, load
    from datasets.semantic.generated import DiffAEEdit
    from datasets.semantic.grid import draw_grid
    from datasets.semantic.photometric import Blur, Brightness, Contrast, Hue, Rotation, Warmth, standard
    from datasets.semantic.scene_edits import SceneEdit
    from datasets.semantic.store import EditStore
    from datasets.semantic.text import TextConfig, TextEdit
    from datasets.semantic.training import TrainingConfig, train
    from datasets.semantic.transform import Draws, SemanticTransform, apply, fingerprint, law

_LAZY = {
    "acceptance": ("Criteria", "Report", "accept", "judge"),
    "diffae": ("DiffAE", "DiffAEConfig", "NotAccepted", "State", "load"),
    "generated": ("DiffAEEdit",),
    "grid": ("draw_grid",),
    "augmentation": ("augment", "pairs"),
    "photometric": ("Blur", "Brightness", "Contrast", "Hue", "Rotation", "Warmth", "standard"),
    "scene_edits": ("SceneEdit",),
    "store": ("EditStore",),
    "text": ("TextConfig", "TextEdit"),
    "training": ("TrainingConfig", "train"),
    "transform": ("Draws", "SemanticTransform", "apply", "fingerprint", "law"),
}
_HOME = {name: module for module, names in _LAZY.items() for name in names}

__all__ = [
    "Blur",
    "Brightness",
    "Contrast",
    "Criteria",
    "DiffAE",
    "DiffAEConfig",
    "DiffAEEdit",
    "Draws",
    "EditStore",
    "Hue",
    "NotAccepted",
    "Report",
    "Rotation",
    "SceneEdit",
    "SemanticTransform",
    "State",
    "TextConfig",
    "TextEdit",
    "TrainingConfig",
    "Warmth",
    "accept",
    "apply",
    "augment",
    "draw_grid",
    "fingerprint",
    "judge",
    "law",
    "load",
    "pairs",
    "standard",
    "train",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"datasets.semantic.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_HOME))
