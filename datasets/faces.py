"""The ORL (Olivetti/AT&T) faces (Samaria & Harter, 1994): 40 people, 10 shots each, split by shot.

Reads `orl_faces.npz` with `x` (400, 112, 92, 1) uint8, `y` (400,) identities 0..39 and `shot` (400,) 1..10.
"""

from __future__ import annotations

import numpy as np
import torch

from datasets import archive, images
from datasets.errors import CorruptData, MissingData
from datasets.packs import Pack, channel_statistics
from datasets.registry import Request

DEFAULT_SIZE = 64
SHOTS = {"train": (1, 2, 3, 4, 5, 6, 7), "val": (8,), "test": (9, 10)}


def load(request: Request) -> Pack:
    """The pack of one split: shots 1-7 train, 8 val, 9 and 10 test, so that everybody is in each split.

    Ordered by shot, then identity: the first 40 test images show every person once. Images are 112×92; `image_size=92`
    cuts out the centre without resampling, other sizes are resized first.
    """
    path = request.root / "orl_faces.npz"
    if not path.is_file():
        raise MissingData(
            f"orl_faces: no pack {path}. It is an npz with x (400, 112, 92, 1) uint8, y (400,) and shot (400,) made "
            "from AT&T's `att_faces` folders s1..s40 of 1.pgm..10.pgm; give the folder that holds it"
        )
    arrays, _ = archive.read(path, ("x", "y", "shot"))
    pixels, identity, shot = arrays["x"], arrays["y"], arrays["shot"]
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or not len(pixels) == len(identity) == len(shot):
        raise CorruptData(
            f"{path}: expected x uint8 (N, H, W, 1), y (N,), shot (N,), got {pixels.dtype} {pixels.shape}"
        )
    size = request.image_size or DEFAULT_SIZE
    pixels = images.fit_array(pixels, size)
    order = np.lexsort((identity, shot))
    parts = {split: order[np.isin(shot[order], numbers)] for split, numbers in SHOTS.items()}
    if empty := [split for split, part in parts.items() if not len(part)]:
        raise CorruptData(f"{path}: no image with shot in {SHOTS[empty[0]]}, which make up {empty[0]!r}")
    mean, std = channel_statistics(torch.from_numpy(pixels[parts["train"]]))
    index = parts[request.split]
    meta = {
        "source": path.name,
        "split_rule": "by shot: 1-7 train, 8 val, 9 and 10 test; ordered by shot, then identity",
        "resize_rule": images.RULE,
        "mean": list(mean),
        "std": list(std),
        "augmentation": {"padding": size // 16, "flip": True},
    }
    return Pack(
        request.title,
        request.split,
        torch.from_numpy(pixels[index]),
        torch.from_numpy(identity[index].astype(np.int64)),
        tuple(f"s{number}" for number in range(1, 41)),
        meta,
        {"shot": torch.from_numpy(shot[index].astype(np.int64))},
    )
