"""Rendered scenes as packs: rendered once, then read from the cache."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch

from datasets import archive, scenes
from datasets.archive import Arrays
from datasets.packs import Pack
from datasets.registry import Request

SEED = 0
# Fixed numbers instead of measured ones: they must not depend on which split happens to be rendered already.
_MEAN, _STD = (0.4, 0.4, 0.4), (0.25, 0.25, 0.25)


def load(request: Request) -> Pack:
    """One split of "scenes_flowers" or "scenes_faces"; see `datasets.scenes` for classes, attributes and seeds.

    With a limit and nothing in the cache only the images asked for are rendered: image i is the same either way.
    """
    kind = request.name.removeprefix("scenes_")
    size = request.image_size or 64
    count = scenes.family(kind).counts[request.variant][1][request.split]
    limit = None if request.limit is None or request.limit >= count else request.limit
    stem = f"{request.name}-{request.variant}-{request.split}-{size}px-{code()}"
    folder = request.cache / "packs"
    whole = folder / f"{stem}.npz"
    path = whole if limit is None or whole.exists() else folder / f"{stem}-first{limit}.npz"

    def build() -> tuple[Arrays, dict[str, Any]]:
        drawn = scenes.render_split(
            kind,
            request.split,
            variant=request.variant,
            seed=SEED,
            image_size=size,
            workers=request.workers,
            limit=limit,
            progress=request.progress,
        )
        extras = {f"extras.{key}": array for key, array in drawn["extras"].items()}
        return {"images": drawn["images"], "targets": drawn["targets"], **extras}, {"meta": drawn["meta"]}

    arrays, header = archive.cached(path, build)
    meta = {
        **header["meta"],
        "source": "datasets.scenes",
        "split_rule": "rendered apart: each split has random numbers of its own; the classes are the same",
        "exchangeable": True,
        "mean": list(_MEAN),
        "std": list(_STD),
        "augmentation": {"padding": size // 16, "flip": kind == "flowers"},
    }
    return Pack(
        request.title,
        request.split,
        torch.from_numpy(arrays["images"]),
        torch.from_numpy(arrays["targets"]),
        tuple(meta["classes"]),
        meta,
        {key.removeprefix("extras."): torch.from_numpy(a) for key, a in arrays.items() if key.startswith("extras.")},
    )


def code() -> str:
    """12 hex digits over the renderers' own source, so that no picture of an older renderer is ever served."""
    sha = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("scenes*.py")):
        sha.update(path.read_bytes())
    return sha.hexdigest()[:12]
