"""Which data sets there are, and what a loader is asked for. Imports nothing heavy: `--list` reads this file."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datasets.packs import Pack

Progress = Callable[[int, int], None]
"""Called as progress(done, total) while images are decoded or rendered."""


@dataclass(frozen=True)
class Request:
    """Everything a loader may need to know; see `datasets.load` for the meaning of each field.

    `title` is what the pack is called: the name, with the variant unless it is the default one. `limit` is a hint: a
    loader may return more images than that, which are then cut by `Pack.limited`.
    """

    name: str
    split: str
    root: Path
    cache: Path
    variant: str = ""
    image_size: int | None = None
    val_fraction: float | None = None
    download: bool = False
    workers: int | None = None
    progress: Progress | None = None
    limit: int | None = None
    title: str = ""


@dataclass(frozen=True)
class Source:
    """One data set: how it is called, what it is, what may be chosen, and the function that loads a split of it.

    Args:
        name: as given to `datasets.load`.
        description: one line.
        load: makes the pack of one split; imports its libraries itself, when called.
        variants: choices written "name:variant"; the first is the default.
        options: optional arguments of `datasets.load` that apply ("image_size", "val_fraction", "download").
    """

    name: str
    description: str
    load: Callable[[Request], Pack]
    variants: tuple[str, ...] = ()
    options: frozenset[str] = field(default_factory=frozenset)


def _vision(request: Request) -> Pack:
    from datasets import vision

    return vision.load(request)


def _flowers(request: Request) -> Pack:
    from datasets import flowers

    return flowers.load(request)


def _celeba(request: Request) -> Pack:
    from datasets import celeba

    return celeba.load(request)


def _faces(request: Request) -> Pack:
    from datasets import faces

    return faces.load(request)


def _digits(request: Request) -> Pack:
    from datasets import digits

    return digits.load(request)


def _aircraft(request: Request) -> Pack:
    from datasets import rendered

    return rendered.load_aircraft(request)


def _scenes(request: Request) -> Pack:
    from datasets import rendered

    return rendered.load_scenes(request)


_FILES = frozenset({"val_fraction", "download"})

SOURCES: dict[str, Source] = {
    source.name: source
    for source in (
        Source(
            "digits", "scikit-learn's handwritten digits, 8×8 grey, 10 classes, 1,797 real images, no download", _digits
        ),
        Source(
            "aircraft",
            "rendered airliners, 64×64 RGB, 24 named keypoints, 2,000/300/154 (aircraft:paper 8,000/800/154)",
            _aircraft,
            variants=("quick", "paper"),
            options=frozenset({"image_size"}),
        ),
        Source(
            "scenes_flowers",
            "rendered flowers, 64×64 RGB, known sun and warmth, 20 species, 1,000/200/200 (scenes_flowers:full 102)",
            _scenes,
            variants=("quick", "full"),
            options=frozenset({"image_size"}),
        ),
        Source(
            "scenes_faces",
            "rendered faces, 64×64 RGB, known smile and warmth, 20 people, 1,000/200/200 (scenes_faces:full 307)",
            _scenes,
            variants=("quick", "full"),
            options=frozenset({"image_size"}),
        ),
        Source("fashion_mnist", "FashionMNIST, 28×28 grey, 10 classes, 60,000 + 10,000", _vision, options=_FILES),
        Source("mnist", "MNIST, 28×28 grey, 10 classes, 60,000 + 10,000", _vision, options=_FILES),
        Source("cifar10", "CIFAR-10, 32×32 RGB, 10 classes, 50,000 + 10,000", _vision, options=_FILES),
        Source(
            "cifar10_subset",
            "a part of CIFAR-10: 1,500 training images a class, the first 2,000 test images",
            _vision,
            options=frozenset({"val_fraction"}),
        ),
        Source("svhn", "SVHN cropped digits, 32×32 RGB, 10 classes, 73,257 + 26,032", _vision, options=_FILES),
        Source(
            "flowers102",
            "Oxford Flowers-102 at 64×64 RGB, 102 classes, 6,552/818/819 (flowers102:official 1,020/1,020/6,149)",
            _flowers,
            variants=("paper_like", "official"),
            options=frozenset({"image_size", "download"}),
        ),
        Source(
            "celeba_hq",
            "CelebA-HQ faces by identity, from a folder of images and a manifest.csv, resized to 64×64 RGB",
            _celeba,
            options=frozenset({"image_size", "val_fraction"}),
        ),
        Source(
            "orl_faces",
            "Olivetti/AT&T faces, 40 people, cropped to 64×64 grey, split by shot 280/40/80",
            _faces,
            options=frozenset({"image_size"}),
        ),
    )
}


def register(source: Source) -> None:
    """Add a data set of your own to `names()` and `load`. Raises ValueError if the name is taken or cannot be typed."""
    if source.name in SOURCES:
        raise ValueError(f"there is a data set {source.name!r} already; choose another name")
    if not source.name.replace("_", "").isalnum():
        raise ValueError(f"{source.name!r}: a data set's name consists of letters, digits and underscores")
    SOURCES[source.name] = source


def find(title: str) -> tuple[Source, str]:
    """The source and variant meant by "name" or "name:variant". Raises ValueError naming close matches."""
    name, _, variant = title.partition(":")
    if name not in SOURCES:
        plain = {source.replace("_", ""): source for source in SOURCES}  # so that FashionMNIST is close as well
        asked = name.lower().replace("_", "").replace("-", "")
        close = [plain[match] for match in difflib.get_close_matches(asked, plain, n=3, cutoff=0.5)]
        hint = f"did you mean {' or '.join(close)}?" if close else f"there are {', '.join(sorted(SOURCES))}"
        raise ValueError(f"unknown data set {name!r}; {hint} (a path ending in .npz loads a data set of your own)")
    source = SOURCES[name]
    if variant and variant not in source.variants:
        choices = ", ".join(f"{name}:{choice}" for choice in source.variants) or f"only {name} itself"
        raise ValueError(f"unknown variant {variant!r} of {name}; there is {choices}")
    return source, variant or (source.variants[0] if source.variants else "")


def cache_folder(cache: str | Path | None) -> Path:
    """`cache`, else $CERTPRUNE_CACHE, else $XDG_CACHE_HOME/certprune, else ~/.cache/certprune. Not created here."""
    if cache is not None:
        return Path(cache).expanduser()
    if chosen := os.environ.get("CERTPRUNE_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "certprune"


def data_folder(root: str | Path | None, cache: Path) -> Path:
    """`root`, else $CERTPRUNE_DATA, else the folder `downloads` of the cache."""
    if root is not None:
        return Path(root).expanduser()
    if chosen := os.environ.get("CERTPRUNE_DATA"):
        return Path(chosen).expanduser()
    return cache / "downloads"
