"""Batches of images with their edits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from methods.car import Paired, PairedBatches

N, Q = 20, 9
SOURCE = torch.tensor([3, 3, 3, 0, 19, 7, 7, 11, 12])


class Flip:
    """Horizontal flips of (N, H, W, C) images by a draw an image."""

    def draw(self, n: int, *, seed: int, epoch: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(100 * seed + epoch)
        return torch.randint(0, 2, (n, 1), generator=generator)

    def apply(self, images: Tensor, drawn: Tensor, index: Tensor | None = None) -> Tensor:
        assert index is not None
        taken = images[index]
        return torch.where(drawn[index].bool()[:, :, None, None], taken.flip(2), taken)


def data() -> tuple[Tensor, Tensor, Tensor]:
    """Images whose pixel (0, 0) is their number, and edits whose pixel (0, 0) is 100 plus theirs."""
    images = torch.zeros(N, 2, 3, 1, dtype=torch.uint8)
    images[:, 0, 0, 0] = torch.arange(N)
    edited = torch.full((Q, 2, 3, 1), 7, dtype=torch.uint8)
    edited[:, 0, 0, 0] = 100 + torch.arange(Q)
    return images, torch.arange(N) % 4, edited


def paired(**options: object) -> PairedBatches:
    images, targets, edited = data()
    return PairedBatches(images, targets, edited, SOURCE, 8, **options)


def numbers(x: Tensor) -> list[int]:
    return (255 * x[:, 0, 0, 0]).round().int().tolist()


def test_all_images_and_all_edits_once_an_epoch():
    batches = paired()
    assert isinstance(batches, Paired)
    assert [len(x) for x, _ in batches] == [8, 8, 8, 5]
    assert len(batches) == len(batches.pairs()) == 4
    seen = [n for x, _ in batches for n in numbers(x)]
    assert sorted(seen) == [*range(N), *range(100, 100 + Q)]
    for x, y in batches:
        assert x.dtype == torch.float32
        assert x.shape[1:] == (1, 2, 3)
        of = [n if n < 100 else int(SOURCE[n - 100]) for n in numbers(x)]
        assert y.tolist() == [n % 4 for n in of]


def test_images_bring_one_of_their_edits_along():
    batches = paired(seed=2)
    used = set()
    for epoch in range(12):
        batches.set_epoch(epoch)
        own, met = [], []
        for x, y in batches.pairs():
            ids, (label, source) = numbers(x), y.unbind(1)
            assert len(x) == len(y)
            for row, (name, of) in enumerate(zip(ids, source.tolist())):
                if of < 0:
                    own.append(name)
                else:
                    assert name >= 100
                    assert int(source[of]) == -1
                    assert ids[of] == int(SOURCE[name - 100])  # never the edit of an edit
                    assert int(label[row]) == int(label[of])
                    met.append(name)
        assert sorted(own) == [*range(N), *range(100, 100 + Q)]
        assert sorted(int(SOURCE[n - 100]) for n in met) == sorted(set(SOURCE.tolist()))
        used.update(met)
    assert used == set(range(100, 100 + Q))


def test_order_is_a_function_of_seed_and_epoch():
    def order(seed: int, epoch: int) -> list[int]:
        batches = paired(seed=seed)
        batches.pairs().set_epoch(epoch)
        return [n for x, _ in batches.pairs() for n in numbers(x)]

    assert order(1, 2) == order(1, 2)
    assert len({tuple(order(s, e)) for s in (0, 1) for e in (0, 1)}) == 4


def test_an_edit_is_augmented_as_its_image():
    images, targets, edited = data()
    images[:, 0, 2], edited[:, 0, 2] = 200, 200  # in the first column of a flipped image
    batches = PairedBatches(images, targets, edited, SOURCE, 8, augment=Flip())
    flips = []
    for epoch in range(4):
        batches.set_epoch(epoch)
        for x, y in batches.pairs():
            flipped = torch.tensor(numbers(x)) == 200
            edits = (y[:, 1] >= 0).nonzero().squeeze(1)
            assert torch.equal(flipped[edits], flipped[y[edits, 1]])
            flips += flipped[edits].tolist()
    assert 0 < sum(flips) < len(flips)


def test_float_images_and_no_edits():
    x = torch.rand(6, 3, 4, 4)
    batches = PairedBatches(x, torch.zeros(6, dtype=torch.int64), x[:0], torch.zeros(0, dtype=torch.int64), 4)
    assert torch.equal(torch.cat([b for b, _ in batches]).sort(0).values, x.sort(0).values)
    assert all(bool((y[:, 1] == -1).all()) for _, y in batches.pairs())
    assert "6 images and 0 edits" in repr(batches)


def test_pixels_are_the_nearest_floats():
    images = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1)
    one = torch.zeros(1, dtype=torch.int64)
    x, _ = next(iter(PairedBatches(images, one, images[:0], one[:0], 1)))
    expected = (torch.arange(256, dtype=torch.float64) / 255).float()
    assert torch.equal(x.flatten(), expected)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda i, t, e, s: (i, t, e[:, :1], s), "like the images"),
        (lambda i, t, e, s: (i, t, e.float(), s), "like the images"),
        (lambda i, t, e, s: (i, t[:-1], e, s), "int64 labels"),
        (lambda i, t, e, s: (i, t.float(), e, s), "int64 labels"),
        (lambda i, t, e, s: (i, t, e, s[:-1]), "which image it was made from"),
        (lambda i, t, e, s: (i, t, e, s + 1), r"spans \[1, 20\] but there are 20"),
        (lambda i, t, e, s: (i.float(), t, e.float(), s), r"expected pixels in \[0, 1\]"),
        (lambda i, t, e, s: (i.long(), t, e.long(), s), "uint8"),
    ],
)
def test_what_does_not_fit_is_refused(change, words):
    images, targets, edited = data()
    with pytest.raises(ValueError, match=words):
        PairedBatches(*change(images, targets, edited, SOURCE), 8)


def test_bad_sizes_are_refused():
    images, targets, edited = data()
    with pytest.raises(ValueError, match="batch_size"):
        PairedBatches(images, targets, edited, SOURCE, 0)
    with pytest.raises(ValueError, match="epoch"):
        paired().set_epoch(-1)
