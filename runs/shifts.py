"""Keypoint batches whose images are moved and mirrored, their targets with them: augmentation for keypoint sets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
    The images come in channels-last memory, in which networks of few channels train almost twice as fast on a CPU.

    Args:
        batches: re-iterable of such pairs; ``set_epoch`` is handed on to it.
        seed: of the draws.
        pixels: farthest move in each direction, smaller than the images.
        mirror: where given, half of the images are mirrored left to right: keypoint k becomes ``mirror[k]``, see
            :func:`mirrored`.
    """

    batches: Any
    seed: int
    pixels: int = PIXELS
    mirror: tuple[int, ...] | None = None
    epoch: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        if self.pixels < 0:
            raise ValueError(f"pixels is the farthest move and must be >= 0, got {self.pixels}")
        every = list(range(len(self.mirror or ())))
        if self.mirror is not None and (sorted(self.mirror) != every or [self.mirror[k] for k in self.mirror] != every):
            raise ValueError(f"mirror must pair the keypoints up, each with its mirror image, got {self.mirror}")

    def set_epoch(self, epoch: int) -> None:
        """Choose the moves, and the order of the batches, of the passes that start from now on."""
        self.epoch = epoch
        self.batches.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed((self.seed + 1) * 1_000_003 + self.epoch)
        order: Tensor | None = None
        for x, y in self.batches:
            moves = torch.randint(-self.pixels, self.pixels + 1, (len(x), 2), generator=generator)
            if self.mirror is not None:
                order = torch.tensor(self.mirror, device=y.device) if order is None else order
                which = torch.rand(len(x), generator=generator) < 0.5
                x, y = reflect(x, y, which.to(x.device, non_blocking=True), order)
            yield move(x, y, moves.to(x.device, non_blocking=True), self.pixels)


def mirrored(names: Sequence[str]) -> tuple[int, ...] | None:
    """Index of each keypoint's mirror image, by their names: "left" and "right" change places.

    None where a name's counterpart is missing, or where no name says left or right: nothing is then known of mirror
    images.
    """
    places = {name: k for k, name in enumerate(names)}
    wanted = [name.replace("left", "\0").replace("right", "left").replace("\0", "right") for name in names]
    if wanted == list(names) or not all(name in places for name in wanted):
        return None
    return tuple(places[name] for name in wanted)


def reflect(x: Tensor, y: Tensor, which: Tensor, mirror: Tensor) -> tuple[Tensor, Tensor]:
    """Images (N, C, H, W) and coordinates (N, 2K), those chosen by ``which`` (N,) mirrored left to right.

    Column j covers [j, j + 1), so that a coordinate x becomes ``W - x``; keypoint k becomes ``mirror[k]``, (K,).
    """
    points = y.unflatten(1, (-1, 2))[:, mirror]
    turned = torch.stack([x.shape[3] - points[..., 0], points[..., 1]], -1).flatten(1)
    return torch.where(which[:, None, None, None], x.flip(3), x), torch.where(which[:, None], turned, y)


def move(x: Tensor, y: Tensor, moves: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Images (N, C, H, W) and coordinates (N, 2K) moved right and down by ``moves`` (N, 2), each at most ``most``."""
    height, width = x.shape[2:]
    padded = F.pad(x, (most, most, most, most), mode="replicate").permute(0, 2, 3, 1)
    columns = torch.arange(width, device=x.device) + most - moves[:, :1]
    rows = torch.arange(height, device=x.device) + most - moves[:, 1:]
    image = torch.arange(len(x), device=x.device)
    moved = padded[image[:, None, None], rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    return moved.contiguous(memory_format=torch.channels_last), y + moves.to(y.dtype).repeat(1, y.shape[1] // 2)
