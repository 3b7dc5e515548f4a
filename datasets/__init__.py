"""Data sets as packs of uint8 images: real ones, rendered ones, and your own.

    import datasets
    train = datasets.load("fashion_mnist", root="data", split="train")
    for x, y in train.batches(128, device="cuda", augment=train.augmentation): ...

Importing this package imports neither torch nor torchvision; loading does.
"""

from __future__ import annotations

import os
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasets.errors import CorruptData, MissingData
from datasets.registry import SOURCES, Progress, Request, Source, cache_folder, data_folder, find, register

if TYPE_CHECKING:
    from datasets.augment import RandomCropFlip
    from datasets.batches import Batches
    from datasets.packs import Pack, restore, save

__all__ = [
    "Batches",
    "CorruptData",
    "MissingData",
    "Pack",
    "RandomCropFlip",
    "Request",
    "Source",
    "describe",
    "load",
    "names",
    "register",
    "restore",
    "save",
]

_LAZY = {
    "Batches": "datasets.batches",
    "Pack": "datasets.packs",
    "RandomCropFlip": "datasets.augment",
    "restore": "datasets.packs",
    "save": "datasets.packs",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_LAZY))


def names() -> list[str]:
    """Names that `load` knows."""
    return list(SOURCES)


def describe() -> dict[str, str]:
    """One line for each name."""
    return {name: source.description for name, source in SOURCES.items()}


def load(
    name: str | os.PathLike[str],
    root: str | Path | None = None,
    split: str = "train",
    *,
    limit: int | None = None,
    cache: str | Path | None = None,
    image_size: int | None = None,
    val_fraction: float | None = None,
    download: bool = False,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Pack:
    """Load one split of a data set.

    Looks for `<root>/<name>.npz`, then for the set's usual layout under `root` (for instance torchvision's), which is
    used as it is and kept as one uint8 pack in the cache.

    Args:
        name: one of `names()`, "name:variant" where a set has variants, or the path of an npz of your own with `x_train
            y_train x_test y_test` (and optionally `x_val y_val class_names`): uint8 (N, H, W, C) images, integer labels
            (N,) or float keypoints (N, 2K).
        root: folder of the data; $CERTPRUNE_DATA if None, else the cache's `downloads`.
        split: "train", "val" or "test". Validation images come off the training data by a permutation that is the same
            for every caller, unless the set has a validation split of its own; `Pack.meta["split_rule"]` says which.
        limit: keep this many images: for "test" the first ones in the set's own order, else the first ones of a seeded
            class-balanced order (so that a smaller limit is a part of a larger one). More than there are keeps all.
        cache: folder for packs; $CERTPRUNE_CACHE if None, else $XDG_CACHE_HOME/certprune or ~/.cache/certprune.
        image_size: side in pixels, for sets that are resized or rendered (default 64).
        val_fraction: share of the training data that becomes "val" (default 0.1), for sets without one of their own.
        download: fetch missing files with torchvision, into `root`.
        workers: threads that decode or processes that render; None for one per core.
        progress: called as progress(done, total) while images are decoded or rendered.

    Raises:
        MissingData: (a FileNotFoundError) naming the paths looked at and how to get the files.
        CorruptData: (a ValueError) for truncated files, wrong checksums, shapes, counts or labels.
        ValueError: unknown name, variant or split, or an argument that does not apply to this set.
    """
    from datasets.splits import SPLITS

    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}, expected one of {', '.join(SPLITS)}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1 image, got {limit}")
    if image_size is not None and image_size < 1:
        raise ValueError(f"image_size must be at least 1 pixel, got {image_size}")
    name = os.fspath(name)
    if name.endswith(".npz"):
        source, variant = _own(name), ""
    else:
        source, variant = find(name)
    given = {"image_size": image_size, "val_fraction": val_fraction, "download": download or None}
    for option, value in given.items():
        if value is not None and option not in source.options:
            accepted = f"it takes {', '.join(sorted(source.options))}" if source.options else "it takes no such options"
            raise ValueError(f"{option}={value} does not apply to {source.name}; {accepted}")
    folder = cache_folder(cache)
    is_default = not source.variants or variant == source.variants[0]
    pack = source.load(
        Request(
            name=source.name,
            split=split,
            root=data_folder(root, folder),
            cache=folder,
            variant=variant,
            image_size=image_size,
            val_fraction=val_fraction,
            download=download,
            workers=workers,
            progress=progress,
            limit=limit,
            title=source.name if is_default else f"{source.name}:{variant}",
        )
    )
    return pack if limit is None else pack.limited(limit)


def _own(path: str) -> Source:
    def load_own(request: Request) -> Pack:
        from datasets import layout

        return layout.load_file(Path(path).expanduser(), request)

    return Source(Path(path).stem, f"the file {path}", load_own, options=frozenset({"val_fraction"}))
