"""Rendered data sets as packs: rendered once, then read from the cache."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from datasets import aircraft, archive, scenes
from datasets.archive import Arrays
from datasets.packs import Pack
from datasets.registry import Request

SEED = 0
# Fixed numbers instead of measured ones: they must not depend on which split happens to be rendered already.
_AIRCRAFT_MEAN, _SCENES_MEAN, _STD = (0.5, 0.5, 0.5), (0.4, 0.4, 0.4), (0.25, 0.25, 0.25)


def load_aircraft(request: Request) -> Pack:
    """One split of the airliners ("quick" or "paper" size; see `datasets.aircraft` for pixels, poses and light).

    With a limit and nothing in the cache only the images asked for are rendered: image i is the same either way.
    """
    size = request.image_size or 64
    render = partial(aircraft.render_split, request.split, size=request.variant)
    facts = {
        "source": "datasets.aircraft",
        "split_rule": "rendered apart: each split has random numbers of its own",
        "exchangeable": True,
        "mean": list(_AIRCRAFT_MEAN),
        "std": list(_STD),
    }
    count = aircraft.SIZES[request.variant][request.split]
    return _pack(request, size, count, _source("aircraft*.py"), render, "keypoints", facts)


def load_scenes(request: Request) -> Pack:
    """One split of "scenes_flowers" or "scenes_faces"; see `datasets.scenes` for classes, attributes and seeds.

    With a limit and nothing in the cache only the images asked for are rendered: image i is the same either way.
    """
    kind = request.name.removeprefix("scenes_")
    size = request.image_size or 64
    render = partial(scenes.render_split, kind, request.split, variant=request.variant)
    facts = {
        "source": "datasets.scenes",
        "split_rule": "rendered apart: each split has random numbers of its own; the classes are the same",
        "exchangeable": True,
        "mean": list(_SCENES_MEAN),
        "std": list(_STD),
        "augmentation": {"padding": size // 16, "flip": kind == "flowers"},
    }
    count = scenes.family(kind).counts[request.variant][1][request.split]
    return _pack(request, size, count, scenes_code(), render, "classes", facts)


def scenes_code() -> str:
    """12 hex digits over the source of the scenes' renderers."""
    return _source("scenes*.py")


def _pack(
    request: Request,
    size: int,
    count: int,
    code: str,
    render: Callable[..., dict[str, Any]],
    names: str,
    facts: dict[str, Any],
) -> Pack:
    """The pack of a split of `count` images from the cache, rendered first where it is not there.

    `render` takes seed, image_size, workers, limit and progress, and gives images, targets, extras and meta.
    `names` is the entry of the meta data with the names of the classes or keypoints; `facts` join the meta data.
    """
    limit = None if request.limit is None or request.limit >= count else request.limit
    stem = f"{request.name}-{request.variant}-{request.split}-{size}px-{code}"
    folder = request.cache / "packs"
    whole = folder / f"{stem}.npz"
    path = whole if limit is None or whole.exists() else folder / f"{stem}-first{limit}.npz"

    def build() -> tuple[Arrays, dict[str, Any]]:
        drawn = render(seed=SEED, image_size=size, workers=request.workers, limit=limit, progress=request.progress)
        extras = {f"extras.{key}": array for key, array in drawn["extras"].items()}
        return {"images": drawn["images"], "targets": drawn["targets"], **extras}, {"meta": drawn["meta"]}

    arrays, header = archive.cached(path, build)
    meta = {**header["meta"], **facts}
    return Pack(
        request.title,
        request.split,
        torch.from_numpy(arrays["images"]),
        torch.from_numpy(arrays["targets"]),
        tuple(meta[names]),
        meta,
        {key.removeprefix("extras."): torch.from_numpy(a) for key, a in arrays.items() if key.startswith("extras.")},
    )


def _source(pattern: str) -> str:
    """12 hex digits over a renderer's own source, so that no picture of an older renderer is ever served."""
    sha = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob(pattern)):
        sha.update(path.read_bytes())
    return sha.hexdigest()[:12]
