"""scikit-learn's copy of the UCI optical digits (Alpaydin & Kaynak, 1998): 1,797 real 8×8 images, no download."""

from __future__ import annotations

import numpy as np
import torch

from datasets import splits
from datasets.packs import Pack, channel_statistics
from datasets.registry import Request

SEED = 8
TEST, VAL = 360, 144


def load(request: Request) -> Pack:
    """The pack of one split: 1,293 / 144 / 360 images for train / val / test by a seeded permutation.

    Grey values 0..16 become `round(255 v / 16)`, which is one to one.
    """
    from sklearn.datasets import load_digits

    found = load_digits()
    pixels = np.rint(found.images * (255 / 16)).astype(np.uint8)[..., None]
    order = splits.permutation(len(pixels), SEED)
    parts = dict(zip(("test", "val", "train"), np.split(order, [TEST, TEST + VAL]), strict=True))
    mean, std = channel_statistics(torch.from_numpy(pixels[parts["train"]]))
    index = parts[request.split]
    meta = {
        "source": "sklearn.datasets.load_digits",
        "split_rule": f"1,293 / {VAL} / {TEST} by a permutation with seed {SEED}",
        "mean": list(mean),
        "std": list(std),
        "augmentation": {"padding": 1, "flip": False},
    }
    return Pack(
        request.title,
        request.split,
        torch.from_numpy(pixels[index]),
        torch.from_numpy(found.target[index].astype(np.int64)),
        tuple(str(name) for name in found.target_names),
        meta,
        {"source_index": torch.from_numpy(index)},
    )
