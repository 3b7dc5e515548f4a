"""Seeded orders: validation splits and limits that are the same for every caller, machine and library version.

All draws are raw 64-bit words of NumPy's PCG64 seeded through a SeedSequence. NumPy guarantees these streams for good
(NEP 19), which it does not for `Generator.permutation` or `Generator.integers`; torch's generators play no part.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]

SPLITS: tuple[str, ...] = ("train", "val", "test")
VAL_FRACTION = 0.1
VAL_SEED = 0

# A word in front of the seed keeps the streams of different uses apart.
_PERMUTATION, _BALANCE, EPOCH_ORDER, EPOCH_AUGMENTATION = range(4)


def raw(count: int, *key: int) -> npt.NDArray[np.uint64]:
    """`count` independent 64-bit words, a function of `key` (non-negative integers) alone."""
    return np.random.PCG64(np.random.SeedSequence(key)).random_raw(count)


def permutation(n: int, seed: int, stream: int = _PERMUTATION, epoch: int = 0) -> Indices:
    """A uniform permutation of range(n), (n,) int64; `stream` and `epoch` choose independent ones for one seed."""
    return np.argsort(raw(n, stream, seed, epoch), kind="stable").astype(np.int64)


def train_val(n: int, fraction: float = VAL_FRACTION, seed: int = VAL_SEED) -> tuple[Indices, Indices]:
    """Split range(n) into training and validation indices, each ascending; `round(fraction * n)` go to validation."""
    if not 0 < fraction < 1:
        raise ValueError(f"val_fraction must lie strictly between 0 and 1, got {fraction}")
    size = round(fraction * n)
    if not 0 < size < n:
        raise ValueError(f"val_fraction {fraction} of {n} images leaves an empty split; choose another fraction")
    order = permutation(n, seed)
    return np.sort(order[size:]), np.sort(order[:size])


def balanced_order(labels: npt.NDArray[np.int64], seed: int = VAL_SEED) -> Indices:
    """An order of all samples whose every prefix is as class-balanced as the classes' sizes allow, (N,) int64.

    Samples are dealt in rounds, one of each class that has any left, in a shuffled order of classes; so the first n are
    contained in the first m for n < m.
    """
    shuffled = permutation(len(labels), seed)
    by_class = np.argsort(labels[shuffled], kind="stable")
    sizes = np.unique(labels, return_counts=True)[1]
    starts = np.repeat(np.cumsum(sizes) - sizes, sizes)
    rank = np.empty(len(labels), dtype=np.int64)
    rank[by_class] = np.arange(len(labels)) - starts
    return shuffled[np.lexsort((raw(len(labels), _BALANCE, seed), rank))]
