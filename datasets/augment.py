"""Random crop with padding and horizontal flip, for a whole batch at once, on whatever device the images are.

The random numbers of an epoch are drawn once, for every sample of the set: (seed, epoch, sample) decide what happens to
a sample, not the batch it falls into, the batch size or the device. Nothing is read back from the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from datasets import splits


@dataclass(frozen=True)
class RandomCropFlip:
    """Pad with zeros by `padding` pixels, crop back to the size at a uniform position, then flip with probability 1/2.

    Equivalent in law to torchvision's `Compose([RandomCrop(size, padding=padding), RandomHorizontalFlip()])`, with one
    independent draw per sample. `flip=False` leaves the flip out (digits of house numbers and the like).
    """

    padding: int = 4
    flip: bool = True

    def __post_init__(self) -> None:
        if self.padding < 0:
            raise ValueError(f"padding must be at least 0 pixels, got {self.padding}")

    def draw(self, n: int, *, seed: int, epoch: int = 0) -> Tensor:
        """Draws for n samples, (n, 3) int64 on the CPU: rows down, columns right (-padding..padding), flip (0 or 1)."""
        words = splits.raw(3 * n, splits.EPOCH_AUGMENTATION, seed, epoch).reshape(n, 3)
        drawn = np.empty((n, 3), dtype=np.int64)
        drawn[:, :2] = (words[:, :2] % np.uint64(2 * self.padding + 1)).astype(np.int64) - self.padding
        drawn[:, 2] = (words[:, 2] >> np.uint64(63)).astype(np.int64) if self.flip else 0
        return torch.from_numpy(drawn)

    def apply(self, images: Tensor, drawn: Tensor, index: Tensor | None = None) -> Tensor:
        """Augment `images` (N, H, W, C), uint8 or float, with `drawn` (N, 3); the result has their dtype and device.

        With `index` (B,) only those samples are taken, each with its own row of `drawn`: the result is (B, H, W, C).
        """
        if images.ndim != 4 or drawn.shape != (len(images), 3):
            raise ValueError(
                f"expected images (N, H, W, C) and draws (N, 3), got {tuple(images.shape)} and {tuple(drawn.shape)}"
            )
        if index is None:
            index = torch.arange(len(images), device=images.device)
        height, width = images.shape[1:3]
        chosen = drawn[index]
        rows = chosen[:, 0:1] + torch.arange(height, device=images.device)
        columns = torch.arange(width, device=images.device).expand(len(index), width)
        columns = torch.where(chosen[:, 2:3] == 1, width - 1 - columns, columns) + chosen[:, 1:2]
        inside = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[:, None, :]
        # One row lookup in (N·H·W, C): on a CPU twice as fast for RGB as indexing with three tensors.
        pixel = rows.clamp(0, height - 1)[:, :, None] * width + columns.clamp(0, width - 1)[:, None, :]
        flat = (index[:, None, None] * (height * width) + pixel).reshape(-1)
        taken = images.reshape(-1, images.shape[3]).index_select(0, flat)
        return taken.reshape(len(index), height, width, -1) * inside[..., None]
