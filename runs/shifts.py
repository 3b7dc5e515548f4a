"""Keypoint batches whose images are moved by whole pixels, their targets with them: augmentation for keypoint sets.

Images are not mirrored: a network tells left from right by details such as the red and the green wing tip of an
aircraft, which a mirror would swap.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

PIXELS = 2
"""Farthest move in each direction; what comes in from outside repeats the border."""


@dataclass
class Shifted:
    """Batches (x, y) of images (N, C, H, W) and coordinates (N, 2K), every image moved by its own random offset.

    The draws are a function of (seed, epoch, number of the batch) alone, so that a resumed run sees the same images.
    These come in channels-last memory, in which networks of few channels train faster on a CPU.

    Args:
        batches: re-iterable of such pairs; ``set_epoch`` is handed on to it.
        seed: of the draws.
        pixels: farthest move in each direction, smaller than the images.
    """

    batches: Any
    seed: int
    pixels: int = PIXELS
    epoch: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        if self.pixels < 0:
            raise ValueError(f"pixels is the farthest move and must be >= 0, got {self.pixels}")

    def set_epoch(self, epoch: int) -> None:
        """Choose the moves, and the order of the batches, of the passes that start from now on."""
        self.epoch = epoch
        self.batches.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed((self.seed + 1) * 1_000_003 + self.epoch)
        for x, y in self.batches:
            moves = torch.randint(-self.pixels, self.pixels + 1, (len(x), 2), generator=generator)
            yield move(x, y, moves.to(x.device, non_blocking=True), self.pixels)


def move(x: Tensor, y: Tensor, moves: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Images (N, C, H, W) and coordinates (N, 2K) moved right and down by ``moves`` (N, 2), each at most ``most``."""
    height, width = x.shape[2:]
    padded = F.pad(x, (most, most, most, most), mode="replicate").permute(0, 2, 3, 1)
    columns = torch.arange(width, device=x.device) + most - moves[:, :1]
    rows = torch.arange(height, device=x.device) + most - moves[:, 1:]
    image = torch.arange(len(x), device=x.device)
    moved = padded[image[:, None, None], rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    moved = moved.contiguous(memory_format=torch.channels_last)
    return moved, y + moves.to(y.dtype).repeat(1, y.shape[1] // 2)
