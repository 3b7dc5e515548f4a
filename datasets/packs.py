"""A data set in memory: uint8 images, their targets, and what is known about them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from datasets import archive, splits
from datasets.augment import RandomCropFlip
from datasets.batches import Batches, to_unit
from datasets.errors import CorruptData
from datasets.splits import SPLITS

Split = Literal["train", "val", "test"]
Task = Literal["classification", "keypoints"]


@dataclass(frozen=True, eq=False)
class Pack:
    """One split of a data set.

    Args:
        name: the data set's name, with its variant if that is not the default one ("flowers102:official").
        split: "train", "val" or "test".
        images: (N, H, W, C) uint8, C = 1 or 3.
        targets: (N,) int64 class indices, or (N, 2K) float32 keypoints x0, y0, x1, y1, … in pixels, pixel (row i,
            column j) covering [j, j+1) × [i, i+1).
        classes: names of the classes, or of the K keypoints.
        meta: JSON-able facts: how the split was made, `mean` and `std` per channel for a model's normalisation,
            `augmentation` customary for the set.
        extras: further tensors with one row per image, such as `visibility` (N, K).

    Raises `CorruptData` when any of this does not hold: wrong dtype or shape, no images, labels out of range,
    coordinates that are not finite.
    """

    name: str
    split: str
    images: Tensor
    targets: Tensor
    classes: tuple[str, ...]
    meta: dict[str, Any] = field(default_factory=dict)
    extras: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        where = f"{self.name} ({self.split})"
        if self.split not in SPLITS:
            raise ValueError(f"{self.name}: unknown split {self.split!r}, expected one of {', '.join(SPLITS)}")
        if self.images.ndim != 4 or self.images.dtype != torch.uint8 or self.images.shape[3] not in (1, 3):
            raise CorruptData(
                f"{where}: images must be uint8 (N, H, W, C) with 1 or 3 channels, "
                f"got {self.images.dtype} {tuple(self.images.shape)}"
            )
        if 0 in self.images.shape:
            raise CorruptData(f"{where}: the split is empty, images have shape {tuple(self.images.shape)}")
        if len(self.targets) != len(self.images):
            raise CorruptData(f"{where}: {len(self.images)} images but {len(self.targets)} targets")
        if self.targets.dtype == torch.int64 and self.targets.ndim == 1:
            self._check_labels(where)
        elif self.targets.dtype == torch.float32 and self.targets.ndim == 2 and self.targets.shape[1] % 2 == 0:
            if self.targets.shape[1] != 2 * len(self.classes):
                raise CorruptData(
                    f"{where}: {self.targets.shape[1]} coordinates but {len(self.classes)} keypoint names"
                )
            if not bool(torch.isfinite(self.targets).all()):
                raise CorruptData(f"{where}: keypoint coordinates contain NaN or infinity")
        else:
            raise CorruptData(
                f"{where}: targets must be int64 (N,) class indices or float32 (N, 2K) keypoints, "
                f"got {self.targets.dtype} {tuple(self.targets.shape)}"
            )
        for key, extra in self.extras.items():
            if len(extra) != len(self.images):
                raise CorruptData(f"{where}: extra {key!r} has {len(extra)} rows for {len(self.images)} images")

    def _check_labels(self, where: str) -> None:
        low, high = int(self.targets.min()), int(self.targets.max())
        if low < 0 or high >= len(self.classes):
            wrong = int(((self.targets < 0) | (self.targets >= len(self.classes))).sum())
            raise CorruptData(
                f"{where}: {wrong} label(s) out of range: found {low}..{high}, "
                f"expected 0..{len(self.classes) - 1} for {len(self.classes)} classes"
            )

    def __len__(self) -> int:
        return len(self.images)

    def __repr__(self) -> str:
        shape = "×".join(map(str, self.images.shape[1:]))
        return (
            f"Pack({self.name!r}, {self.split!r}, {len(self)} images {shape}, {self.task}, {self.num_outputs} outputs)"
        )

    @property
    def task(self) -> Task:
        """ "classification" or "keypoints"."""
        return "classification" if self.targets.ndim == 1 else "keypoints"

    @property
    def num_outputs(self) -> int:
        """Width a model's last layer needs: classes, or two per keypoint."""
        return len(self.classes) if self.task == "classification" else 2 * len(self.classes)

    @property
    def in_channels(self) -> int:
        """1 (grey) or 3 (RGB)."""
        return self.images.shape[3]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W), the shape of one input of a model."""
        height, width, channels = self.images.shape[1:]
        return channels, height, width

    @property
    def image_size(self) -> int:
        """Side of the square images in pixels. Raises ValueError if they are not square (see `image_shape`)."""
        _, height, width = self.image_shape
        if height != width:
            raise ValueError(f"{self.name}: images are {height}×{width}, not square; use image_shape or resize them")
        return height

    @property
    def mean(self) -> tuple[float, ...]:
        """Mean per channel in [0, 1], for the model's normalisation: the set's customary one, else this pack's own."""
        return tuple(self.meta["mean"]) if "mean" in self.meta else channel_statistics(self.images)[0]

    @property
    def std(self) -> tuple[float, ...]:
        """Standard deviation per channel; see `mean`."""
        return tuple(self.meta["std"]) if "std" in self.meta else channel_statistics(self.images)[1]

    @property
    def augmentation(self) -> RandomCropFlip | None:
        """The training augmentation customary for this set (`meta["augmentation"]`), None if there is none."""
        stated = self.meta.get("augmentation")
        return RandomCropFlip(padding=stated["padding"], flip=stated["flip"]) if stated else None

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) over shapes and bytes of images and targets: equal exactly when the data are."""
        sums = (archive.digest(tensor.cpu().numpy()) for tensor in (self.images, self.targets))
        return hashlib.sha256("".join(sums).encode()).hexdigest()

    def subset(self, indices: Sequence[int] | npt.NDArray[np.int64] | Tensor) -> Pack:
        """The images at `indices` (in that order, repeats allowed), with their targets and extras.

        Raises IndexError for an index outside 0..N-1 and ValueError for no index at all.
        """
        index = self._index(indices)
        extras = {key: extra[index] for key, extra in self.extras.items()}
        return replace(self, images=self.images[index], targets=self.targets[index], extras=extras)

    def limited(self, limit: int) -> Pack:
        """At most `limit` images: of "test" the first ones, else the first of a seeded class-balanced order.

        For keypoints it is a seeded permutation, or the set's own order where images are independent draws
        (`meta["exchangeable"]`). What a smaller limit chooses is a prefix of what a larger one does.
        """
        if limit < 1:
            raise ValueError(f"limit must be at least 1 image, got {limit}")
        if self.split == "test" or self.meta.get("exchangeable"):
            order, rule = np.arange(len(self)), "the first in the set's order"
        elif self.task == "classification":
            order, rule = (
                splits.balanced_order(self.targets.cpu().numpy()),
                "the first of a seeded class-balanced order",
            )
        else:
            order, rule = splits.permutation(len(self), splits.VAL_SEED), "the first of a seeded permutation"
        chosen = self.subset(order[:limit])
        return replace(chosen, meta={**self.meta, "limit": limit, "limit_rule": rule})

    def tensors(
        self,
        indices: Sequence[int] | npt.NDArray[np.int64] | Tensor | None = None,
        device: str | torch.device | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(x, y): x float32 (n, C, H, W) in [0, 1] and targets, of all images or those at `indices`, on `device`."""
        images, targets = self.images, self.targets
        if indices is not None:
            index = self._index(indices)
            images, targets = images[index], targets[index]
        return to_unit(images.to(device)), targets.to(device)

    def batches(
        self,
        batch_size: int,
        *,
        device: str | torch.device = "cpu",
        seed: int = 0,
        shuffle: bool = True,
        augment: RandomCropFlip | None = None,
        drop_last: bool = False,
    ) -> Batches:
        """Mini-batches (x, y) on `device`; see `Batches`. Raises ValueError for `augment` with keypoints."""
        if augment is not None and self.task == "keypoints":
            raise ValueError(f"{self.name}: crops and flips would leave the keypoints behind; use augment=None")
        return Batches(
            self.images,
            self.targets,
            batch_size,
            device=device,
            seed=seed,
            shuffle=shuffle,
            augment=augment,
            drop_last=drop_last,
        )

    def _index(self, indices: Sequence[int] | npt.NDArray[np.int64] | Tensor) -> Tensor:
        index = indices if isinstance(indices, Tensor) else torch.as_tensor(np.asarray(indices))
        if index.ndim != 1 or len(index) == 0:
            raise ValueError(
                f"{self.name}: expected a list of indices with at least one, got shape {tuple(index.shape)}"
            )
        if index.dtype == torch.bool or index.is_floating_point():
            raise ValueError(f"{self.name}: indices must be integers, got {index.dtype}")
        index = index.to(device=self.images.device, dtype=torch.int64)
        if int(index.min()) < 0 or int(index.max()) >= len(self):
            raise IndexError(f"{self.name}: index {int(index.min())}..{int(index.max())} outside 0..{len(self) - 1}")
        return index


def channel_statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel, in [0, 1], of uint8 (N, H, W, C) images; exact, from the histograms."""
    values = np.arange(256) / 255
    means, deviations = [], []
    for channel in range(images.shape[3]):
        counts = (
            np.bincount(images[..., channel].reshape(-1).cpu().numpy(), minlength=256) / images[..., channel].numel()
        )
        mean = float(counts @ values)
        means.append(mean)
        deviations.append(float(np.sqrt(counts @ (values - mean) ** 2)))
    return tuple(means), tuple(deviations)


def save(pack: Pack, path: str | Path) -> None:
    """Write one split to a checked npz (see `datasets.archive`), atomically."""
    arrays = {"images": pack.images.cpu().numpy(), "targets": pack.targets.cpu().numpy()}
    arrays |= {f"extras.{key}": extra.cpu().numpy() for key, extra in pack.extras.items()}
    stated = {"name": pack.name, "split": pack.split, "classes": list(pack.classes), "meta": pack.meta}
    archive.write(path, arrays, json.loads(json.dumps(stated)))


def restore(path: str | Path) -> Pack:
    """Read what `save` wrote, checksums verified. Raises `MissingData` or `CorruptData`."""
    arrays, header = archive.read(path)
    if absent := {"name", "split", "classes", "meta"} - header.keys() | {"images", "targets"} - arrays.keys():
        raise CorruptData(f"{path}: not one split written by packs.save, it lacks {', '.join(sorted(absent))}")
    return Pack(
        header["name"],
        header["split"],
        torch.from_numpy(arrays["images"]),
        torch.from_numpy(arrays["targets"]),
        tuple(header["classes"]),
        header["meta"],
        {key.removeprefix("extras."): torch.from_numpy(a) for key, a in arrays.items() if key.startswith("extras.")},
    )
