"""Training data with semantic edits: plain batches for training, and batches in which images meet their edits."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from methods.training.objective import Batch


class Augmentation(Protocol):
    """Random augmentation whose draws can be shared, such as a random flip; images keep their layout and dtype."""

    def draw(self, n: int, *, seed: int, epoch: int = 0) -> Tensor:
        """Random numbers for n images, (n, ...) on the CPU, a function of (seed, epoch)."""
        ...

    def apply(self, images: Tensor, drawn: Tensor, index: Tensor | None = None) -> Tensor:
        """The images `index` (B,) of `images`, each augmented by its own row of `drawn`."""
        ...


@runtime_checkable
class Paired(Protocol):
    """Batches that know pairs (x, x_T) of an image and its semantic edit."""

    def __iter__(self) -> Iterator[Batch]:
        """Plain batches: x (B, C, H, W) in [0, 1], y (B,) int64."""
        ...

    def pairs(self) -> Iterable[Batch]:
        """The same images in batches that bring edits along: x (B + P, C, H, W), y (B + P, 2) int64.

        ``y[:, 0]`` is the label. ``y[:, 1]`` is -1 for an image of the batch itself and, for an edit brought along, the
        row of the image it was made from. An edit that is itself an image of the batch has no edit.
        """
        ...


class PairedBatches:
    """A training set with edits: `images` and `edited` together are the training images, and the pairs are known.

    Iterated, it yields (x, y) over all N + q images in a new order each epoch, for any method. `pairs` is for CAR.
    Order, augmentation and the choice among several edits are functions of (seed, epoch); an edit is augmented as the
    image it was made from. As in `datasets`, images stay where they are put and no step waits for the device.

    Args:
        images: (N, H, W, C) uint8, or (N, C, H, W) float in [0, 1].
        targets: labels (N,) int64.
        edited: (q, ...) in the format of `images`; none (q = 0) is allowed.
        source: (q,) int64, the image each edit was made from. An image may have several edits: a pass uses one of them.
        batch_size: images of a batch, at least 1; edits brought along come on top.
        device: where the images stay and batches appear.
        seed: at least 0.
        augment: `Augmentation` of all images, or None.

    Raises:
        ValueError: shapes, types or ranges that do not fit; `source` out of range.
    """

    def __init__(
        self,
        images: Tensor,
        targets: Tensor,
        edited: Tensor,
        source: Tensor,
        batch_size: int,
        *,
        device: str | torch.device = "cpu",
        seed: int = 0,
        augment: Augmentation | None = None,
    ) -> None:
        _check(images, targets, edited, source)
        if batch_size < 1 or seed < 0:
            raise ValueError(f"need batch_size >= 1 and seed >= 0, got {batch_size} and {seed}")
        source = source.cpu()
        self.images = torch.cat([images, edited]).to(device)
        self.targets = torch.cat([targets, targets[source.to(targets.device)]]).to(device)
        self.batch_size, self.seed, self.augment, self.epoch = batch_size, seed, augment, 0
        self.originals, self.edits = len(images), len(edited)
        # The edits of an image lie together: number first[i] to first[i] + count[i] of by_source.
        self._by_source = len(images) + torch.argsort(source, stable=True)
        self._count = torch.bincount(source, minlength=self.originals)
        self._first = self._count.cumsum(0) - self._count
        self._like = torch.cat([torch.arange(self.originals), source])

    @property
    def device(self) -> torch.device:
        """Where the images are."""
        return self.images.device

    def __len__(self) -> int:
        return -(-(self.originals + self.edits) // self.batch_size)

    def __repr__(self) -> str:
        return f"PairedBatches({self.originals} images and {self.edits} edits in {len(self)} batches on {self.device})"

    def set_epoch(self, epoch: int) -> None:
        """Choose order, augmentation and edits of the passes that start from now on; `epoch` counts from 0."""
        if epoch < 0:
            raise ValueError(f"epoch must be at least 0, got {epoch}")
        self.epoch = epoch

    def __iter__(self) -> Iterator[Batch]:
        order, _, drawn = self._epoch()
        for index in order.split(self.batch_size):
            yield self._take(index, drawn), self.targets.index_select(0, index.to(self.device))

    def pairs(self) -> Iterable[Batch]:
        """See `Paired.pairs`."""
        return _WithEdits(self)

    def _epoch(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Order (N + q,), an edit of each image (N,) or -1, and draws of the augmentation, for this epoch."""
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + self.epoch)
        order = torch.randperm(self.originals + self.edits, generator=generator)
        chosen = torch.full((self.originals,), -1, dtype=torch.int64)
        if self.edits:
            nth = (torch.rand(self.originals, generator=generator, dtype=torch.float64) * self._count).long()
            place = (self._first + nth).clamp(max=self.edits - 1)
            chosen = torch.where(self._count > 0, self._by_source[place], chosen)
        drawn = None
        if self.augment is not None:
            drawn = self.augment.draw(self.originals, seed=self.seed, epoch=self.epoch)[self._like].to(self.device)
        return order, chosen, drawn

    def _take(self, index: Tensor, drawn: Tensor | None) -> Tensor:
        index = index.to(self.device)
        if self.augment is not None and drawn is not None:
            images = self.augment.apply(self.images, drawn, index)
        else:
            images = self.images.index_select(0, index)
        if images.is_floating_point():
            return images
        x = images.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
        return x.div_(torch.full((), 255.0, device=x.device))  # by a tensor: the float nearest to k / 255 everywhere


class _WithEdits:
    """`PairedBatches.pairs`."""

    def __init__(self, parent: PairedBatches) -> None:
        self.parent = parent

    def __len__(self) -> int:
        return len(self.parent)

    def set_epoch(self, epoch: int) -> None:
        self.parent.set_epoch(epoch)

    def __iter__(self) -> Iterator[Batch]:
        parent = self.parent
        order, chosen, drawn = parent._epoch()
        for index in order.split(parent.batch_size):
            own = torch.full_like(index, -1)
            rows = (index < parent.originals).nonzero().squeeze(1)  # on the CPU
            edit = chosen[index[rows]]
            rows, edit = rows[edit >= 0], edit[edit >= 0]
            both = torch.cat([index, edit])
            labels = parent.targets.index_select(0, both.to(parent.device))
            yield parent._take(both, drawn), torch.stack([labels, torch.cat([own, rows]).to(parent.device)], 1)


def _check(images: Tensor, targets: Tensor, edited: Tensor, source: Tensor) -> None:
    if images.ndim != 4 or not (images.dtype == torch.uint8 or images.is_floating_point()):
        raise ValueError(
            f"images must be uint8 (N, H, W, C) or float (N, C, H, W), got {images.dtype} {tuple(images.shape)}"
        )
    if edited.shape[1:] != images.shape[1:] or edited.dtype != images.dtype:
        raise ValueError(
            f"edited images must be like the images, {images.dtype} (q, {', '.join(map(str, images.shape[1:]))}); "
            f"got {edited.dtype} {tuple(edited.shape)}"
        )
    if targets.dtype != torch.int64 or targets.shape != images.shape[:1]:
        raise ValueError(f"targets must be int64 labels ({len(images)},), got {targets.dtype} {tuple(targets.shape)}")
    if source.dtype != torch.int64 or source.shape != edited.shape[:1]:
        raise ValueError(
            f"source must say for each of the {len(edited)} edited images which image it was made from, int64 (q,); "
            f"got {source.dtype} {tuple(source.shape)}"
        )
    if len(source) and not 0 <= int(source.min()) <= int(source.max()) < len(images):
        raise ValueError(f"source spans [{int(source.min())}, {int(source.max())}] but there are {len(images)} images")
    for what, part in (("images", images), ("edited images", edited)):
        if part.is_floating_point() and part.numel():
            low, high = (float(v) for v in part.aminmax())
            if not (low >= 0.0 and high <= 1.0):
                raise ValueError(f"the {what} span [{low:.4g}, {high:.4g}]; expected pixels in [0, 1]")
