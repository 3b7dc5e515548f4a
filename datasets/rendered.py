"""Rendered data sets as packs: rendered once, then read from the cache."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch

from datasets import aircraft, archive
from datasets.archive import Arrays
from datasets.packs import Pack
from datasets.registry import Request

SEED = 0
# Fixed numbers instead of measured ones: they must not depend on which split happens to be rendered already.
_MEAN, _STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


def load_aircraft(request: Request) -> Pack:
    """One split of the airliners ("quick" or "paper" size; see `datasets.aircraft` for pixels, poses and light).

    With a limit and nothing in the cache only the images asked for are rendered: image i is the same either way.
    """
    size = request.image_size or 64
    count = aircraft.SIZES[request.variant][request.split]
    limit = None if request.limit is None or request.limit >= count else request.limit
    stem = f"aircraft-{request.variant}-{request.split}-{size}px-{_code()}"
    folder = request.cache / "packs"
    whole = folder / f"{stem}.npz"
    path = whole if limit is None or whole.exists() else folder / f"{stem}-first{limit}.npz"

    def build() -> tuple[Arrays, dict[str, Any]]:
        drawn = aircraft.render_split(
            request.split,
            size=request.variant,
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
        "source": "datasets.aircraft",
        "split_rule": "rendered apart: each split has random numbers of its own",
        "exchangeable": True,
        "mean": list(_MEAN),
        "std": list(_STD),
    }
    return Pack(
        request.title,
        request.split,
        torch.from_numpy(arrays["images"]),
        torch.from_numpy(arrays["targets"]),
        tuple(meta["keypoints"]),
        meta,
        {key.removeprefix("extras."): torch.from_numpy(a) for key, a in arrays.items() if key.startswith("extras.")},
    )


def _code() -> str:
    """12 hex digits over the renderer's own source, so that no picture of an older renderer is ever served."""
    sha = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("aircraft*.py")):
        sha.update(path.read_bytes())
    return sha.hexdigest()[:12]
