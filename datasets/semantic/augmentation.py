"""Training data with semantic augmentation: the original images and q edited ones, each knowing its original."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from datasets import splits
from datasets.packs import Pack
from datasets.semantic.store import EditStore, deltas, image_hash
from datasets.semantic.transform import SemanticTransform, fingerprint, law, make_each

ORIGINAL, DELTA = "original", "delta"
BATCH = 64
"""Images edited together: generators are slow one image at a time, on a GPU above all."""


def augment(
    pack: Pack, transform: SemanticTransform, count: int, *, seed: int = 0, store: EditStore | None = None
) -> Pack:
    """`pack` followed by `count` edited images with the labels of their originals.

    Originals are taken in a seeded order, all once before any twice; delta is uniform on [0, 1]. A larger count begins
    with the same edited images. An edited image is always made from an original, never from an edited one.

    Args:
        pack: the images the transform was made for.
        transform: the semantic transform.
        count: edited images to add; 0 adds none, but the columns below are there.
        seed: of originals and deltas.
        store: where edited images are kept and found again.

    Returns:
        A pack with `extras["original"]` int64 (N,), for each image its position among the originals (an original is
        its own), and `extras["delta"]` float32 (N,), 0 for originals. `pairs` reads them.

    Raises:
        ValueError: count below 0, labels that an edit could not keep (keypoints), a pack that is augmented already, a
            transform that fails its checks, or a store of another transform.
    """
    if count < 0:
        raise ValueError(f"count must be at least 0 edited images, got {count}")
    if pack.task != "classification":
        raise ValueError(f"{pack.name}: an edit might move keypoints; augment classification sets only")
    if ORIGINAL in pack.extras:
        raise ValueError(f"{pack.name} holds edited images already; augment the pack of originals once")
    if store is not None and store.fingerprint != fingerprint(transform):
        raise ValueError(f"the store at {store.folder} holds images of another transform than {transform.name!r}")
    n = len(pack)
    rounds = [splits.permutation(n, seed, epoch=r) for r in range(-(-count // n))]
    chosen = np.concatenate(rounds)[:count] if rounds else np.empty(0, dtype=np.int64)
    times = np.arange(count) // n  # the k-th edit of an image is its k-th draw
    images, strengths = [pack.images[:0].cpu()], [torch.zeros(0)]
    for start in range(0, count, BATCH):
        positions, draws = (part[start : start + BATCH].tolist() for part in (chosen, times))
        originals = pack.tensors(positions)[0]
        if store is not None:
            store.fill(originals, positions, seed)
            taken = [store.take(x, i, seed, draw + 1) for x, i, draw in zip(originals, positions, draws)]
            pixels, delta = (torch.stack([part[k][-1] for part in taken]) for k in (0, 1))
        else:
            own = [deltas(seed, image_hash(image), draw + 1)[-1] for image, draw in zip(originals, draws)]
            delta = torch.stack(own)
            pixels = make_each(transform, originals, positions, delta)
        images.append(pixels.permute(0, 2, 3, 1).cpu())
        strengths.append(delta)
    index = torch.from_numpy(np.concatenate([np.arange(n), chosen]))
    added = torch.cat(images)
    extras = {key: torch.cat([extra.cpu(), extra.cpu()[index[n:]]]) for key, extra in pack.extras.items()}
    extras |= {ORIGINAL: index, DELTA: torch.cat([torch.zeros(n), *strengths])}
    stated: dict[str, Any] = {"count": count, "seed": seed, "law": law(transform), "transform": transform.describe()}
    return replace(
        pack,
        images=torch.cat([pack.images.cpu(), added]),
        targets=torch.cat([pack.targets.cpu(), pack.targets.cpu()[index[n:]]]),
        extras=extras,
        meta={**pack.meta, "semantic": stated},
    )


def pairs(pack: Pack) -> tuple[Tensor, Tensor]:
    """Positions (P,) and (P,) of edited images and of their originals in an augmented pack.

    Raises ValueError for a pack without pairs, or whose originals were removed (a subset, a limit).
    """
    if ORIGINAL not in pack.extras or DELTA not in pack.extras:
        raise ValueError(f"{pack.name} has no pairs of originals and edited images; make them with semantic.augment")
    original = pack.extras[ORIGINAL]
    n = len(pack) - int(pack.meta["semantic"]["count"])
    own = torch.arange(n)
    if n < 1 or not torch.equal(original[:n], own) or bool(((original[n:] < 0) | (original[n:] >= n)).any()):
        raise ValueError(f"{pack.name}: originals are missing; augment after taking subsets and limits, not before")
    if not len(original) > n:
        raise ValueError(f"{pack.name} was augmented with 0 images and has no pairs")
    return torch.arange(n, len(pack)), original[n:]
