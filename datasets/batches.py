"""Mini-batches of uint8 images that live on the device and are augmented and converted there."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from datasets import splits
from datasets.augment import RandomCropFlip


def to_unit(images: Tensor) -> Tensor:
    """uint8 (N, H, W, C) to contiguous float32 (N, C, H, W) in [0, 1]: k becomes the float nearest to k/255.

    The divisor is a tensor on the device: CUDA multiplies by the reciprocal of a Python number, which is another float
    for 126 of the 256 values.
    """
    x = images.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    return x.div_(torch.full((), 255.0, device=images.device))


class Batches:
    """A re-iterable of (x, y): x float32 (B, C, H, W) in [0, 1], y the targets, both on `device`.

    Order and augmentation are functions of (seed, epoch) alone. Call `set_epoch(e)` before each epoch, as with torch's
    DistributedSampler: without it every pass is the same. The uint8 images are moved to the device once; an epoch moves
    its order (and draws of augmentation) there, a step moves nothing and waits for nothing.

    Args:
        images: (N, H, W, C) uint8.
        targets: (N, …).
        batch_size: at least 1; the last batch is smaller unless `drop_last`.
        device: where images stay and batches appear.
        seed: of order and augmentation, at least 0.
        shuffle: a new order each epoch, else the order of the pack.
        augment: applied to every sample, None for none.
        drop_last: leave out an incomplete last batch. Raises ValueError if that leaves none at all.
    """

    def __init__(
        self,
        images: Tensor,
        targets: Tensor,
        batch_size: int,
        *,
        device: str | torch.device = "cpu",
        seed: int = 0,
        shuffle: bool = True,
        augment: RandomCropFlip | None = None,
        drop_last: bool = False,
    ) -> None:
        if augment is not None and not hasattr(augment, "draw"):
            raise TypeError(f"augment must be a datasets.RandomCropFlip or None, got {augment!r}")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if seed < 0:
            raise ValueError(f"seed must be at least 0, got {seed}")
        if drop_last and batch_size > len(images):
            raise ValueError(f"drop_last with batch_size {batch_size} leaves no batch of {len(images)} images")
        self.images = images.to(device)
        self.targets = targets.to(device)
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = shuffle
        self.augment = augment
        self.drop_last = drop_last
        self.epoch = 0

    @property
    def device(self) -> torch.device:
        """Where the images are."""
        return self.images.device

    @property
    def num_samples(self) -> int:
        """Samples one pass yields."""
        return len(self) * self.batch_size if self.drop_last else len(self.images)

    def __len__(self) -> int:
        full, rest = divmod(len(self.images), self.batch_size)
        return full if self.drop_last or not rest else full + 1

    def __repr__(self) -> str:
        return f"Batches({self.num_samples} samples in {len(self)} batches of {self.batch_size} on {self.device})"

    def set_epoch(self, epoch: int) -> None:
        """Choose the order and augmentation of the passes that start from now on; `epoch` counts from 0."""
        if epoch < 0:
            raise ValueError(f"epoch must be at least 0, got {epoch}")
        self.epoch = epoch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        n = len(self.images)
        order = torch.arange(n)
        if self.shuffle:
            order = torch.from_numpy(splits.permutation(n, self.seed, splits.EPOCH_ORDER, self.epoch))
        order = order.to(self.device)
        drawn = None
        if self.augment is not None:
            drawn = self.augment.draw(n, seed=self.seed, epoch=self.epoch).to(self.device)
        for start in range(0, self.num_samples, self.batch_size):
            index = order[start : start + self.batch_size]
            if self.augment is not None and drawn is not None:
                images = self.augment.apply(self.images, drawn, index)
            else:
                images = self.images.index_select(0, index)
            yield to_unit(images), self.targets.index_select(0, index)
