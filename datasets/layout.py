"""The plain layout of a whole data set in one npz: x_train y_train x_test y_test, and what may come with it.

| array | |
|---|---|
| `x_train x_test` (`x_val`) | uint8 (N, H, W, C) or (N, H, W) |
| `y_train y_test` (`y_val`) | integers (N,), or floats (N, 2K): keypoints in pixels |
| `class_names` | (classes,) or (K,) strings; numbers are used where it is missing |
| `train_index test_index` | optional (N,): the place of each image in the set it was taken from |
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from datasets import archive, packs, splits
from datasets.archive import Arrays
from datasets.errors import CorruptData
from datasets.packs import Pack
from datasets.registry import Request


def part_of(split: str, own_val: bool) -> str:
    """The part of the file ("train", "val" or "test") that `split` is made of."""
    return split if split == "test" or own_val else "train"


def needed(names: list[str], split: str) -> list[str]:
    """Which of the arrays called `names` the split is made of; the images and targets whether there or not."""
    part = part_of(split, "x_val" in names)
    return [f"x_{part}", f"y_{part}", *(name for name in ("class_names", f"{part}_index") if name in names)]


def load_file(path: Path, request: Request) -> Pack:
    """A split of the npz at `path`; mean and standard deviation are measured on its training images."""
    names = archive.members(path)
    wanted = needed(names, request.split)
    arrays, header = archive.read(path, sorted({*wanted, *needed(names, "train")}))
    return to_pack(arrays, request, own_val="x_val" in names, meta={"source": path.name, **header.get("meta", {})})


def to_pack(arrays: Arrays, request: Request, *, own_val: bool = False, meta: dict[str, Any]) -> Pack:
    """Make the pack of `request.split` from arrays of this layout.

    `own_val`: the set has x_val, so that nothing is taken off its training images. `meta` may carry "mean" and "std";
    they are measured on the training images otherwise. Raises `CorruptData`.
    """
    split, name = request.split, request.title or request.name
    part = part_of(split, own_val)
    images = _images(arrays[f"x_{part}"], f"{name}: x_{part}")
    targets = _targets(arrays[f"y_{part}"], f"{name}: y_{part}")
    if "x_train" in arrays and arrays["x_train"].shape[1:] != arrays[f"x_{part}"].shape[1:]:
        shapes = f"{arrays['x_train'].shape[1:]} in x_train but {arrays[f'x_{part}'].shape[1:]} in x_{part}"
        raise CorruptData(f"{name}: images of shape {shapes}; a network takes images of one size")
    if len(images) != len(targets):
        raise CorruptData(f"{name}: {len(images)} images in x_{part} but {len(targets)} rows in y_{part}")
    if "class_names" in arrays:
        classes = tuple(str(text) for text in arrays["class_names"].tolist())
    else:
        key = "y_train" if "y_train" in arrays else f"y_{part}"  # every split has the classes of the training images
        known = _targets(arrays[key], key)
        count = known.shape[1] // 2 if known.ndim == 2 else 1 + int(known.max(initial=0))
        classes = tuple(str(number) for number in range(count))
    stated = dict(meta)
    if own_val:
        if request.val_fraction is not None:
            raise ValueError(f"val_fraction={request.val_fraction} does not apply to {name}: it has its own x_val")
        stated["split_rule"] = f"x_{part} in the file's order"
        index = np.arange(len(images))
    else:
        index, rule = take(len(images), request)
        stated |= rule
    if "mean" not in stated and "x_train" in arrays:
        training = _images(arrays["x_train"], f"{name}: x_train")
        stated["mean"], stated["std"] = map(list, packs.channel_statistics(torch.from_numpy(training)))
    extras = {}
    if f"{part}_index" in arrays:
        extras["source_index"] = torch.from_numpy(arrays[f"{part}_index"].astype(np.int64)[index])
    whole = len(index) == len(images)
    return Pack(
        name,
        split,
        torch.from_numpy(images if whole else images[index]),
        torch.from_numpy(targets if whole else targets[index]),
        classes,
        stated,
        extras,
    )


def take(n: int, request: Request) -> tuple[np.ndarray, dict[str, Any]]:
    """Indices of `request.split` into n images of its part (training or test), and the rule, for `Pack.meta`."""
    if request.split == "test":
        return np.arange(n), {"split_rule": "the set's own test images, in their order"}
    fraction = splits.VAL_FRACTION if request.val_fraction is None else request.val_fraction
    train, val = splits.train_val(n, fraction)
    rule = f"{len(val)} of {n} training images are held out as val by a permutation with seed {splits.VAL_SEED}"
    stated = {"split_rule": rule, "val_fraction": fraction, "val_seed": splits.VAL_SEED}
    return (val if request.split == "val" else train), stated


def _images(array: np.ndarray, where: str) -> np.ndarray:
    if array.dtype != np.uint8 or array.ndim not in (3, 4):
        raise CorruptData(f"{where}: expected uint8 (N, H, W, C) or (N, H, W), got {array.dtype} {array.shape}")
    return np.ascontiguousarray(array if array.ndim == 4 else array[..., None])


def _targets(array: np.ndarray, where: str) -> np.ndarray:
    if np.issubdtype(array.dtype, np.integer) and array.ndim == 1:
        return array.astype(np.int64)
    if np.issubdtype(array.dtype, np.floating) and array.ndim == 2:
        return array.astype(np.float32)
    raise CorruptData(
        f"{where}: expected integer labels (N,) or float keypoints (N, 2K), got {array.dtype} {array.shape}"
    )
