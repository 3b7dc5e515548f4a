from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from scipy import stats

import datasets
from datasets.augment import RandomCropFlip
from datasets.batches import to_unit


def ids(batches: datasets.Batches) -> list[int]:
    """Which images a pass yields, read off the marked corner."""
    return [round(float(value) * 255) for x, _ in batches for value in x[:, 0, 0, 0]]


def reference(image: np.ndarray, down: int, right: int, flip: int, padding: int) -> np.ndarray:
    """Pad, cut out, flip: one (H, W, C) image the plain way."""
    height, width = image.shape[:2]
    padded = np.pad(image, ((padding, padding), (padding, padding), (0, 0)))
    cut = padded[padding + down : padding + down + height, padding + right : padding + right + width]
    return cut[:, ::-1] if flip else cut


def test_a_pass_yields_every_image_once_with_its_own_target(pack: datasets.Pack) -> None:
    batches = pack.batches(8)
    assert len(batches) == 4
    assert [len(y) for _, y in batches] == [8, 8, 8, 6]
    order = ids(batches)
    assert sorted(order) == list(range(30))
    assert order != list(range(30))
    assert torch.equal(torch.cat([y for _, y in batches]), pack.targets[order])
    x = torch.cat([x for x, _ in batches])
    assert torch.equal(x, pack.tensors(order)[0])
    assert x.is_contiguous()


def test_order_is_a_function_of_seed_and_epoch(pack: datasets.Pack) -> None:
    batches = pack.batches(8, seed=3)
    first = ids(batches)
    assert ids(batches) == first  # nothing moves on by itself
    batches.set_epoch(1)
    second = ids(batches)
    batches.set_epoch(0)
    assert ids(batches) == first
    assert ids(pack.batches(7, seed=3)) == first  # not of the batch size
    assert ids(pack.batches(8, seed=4)) != first != second
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 - the global state must not matter
    assert ids(pack.batches(8, seed=3)) == first


def test_two_passes_at_once_do_not_disturb_each_other(pack: datasets.Pack) -> None:
    batches = pack.batches(10)
    expected = [y.tolist() for _, y in batches]
    outer = []
    for _, y in batches:
        outer.append(y.tolist())
        assert [z.tolist() for _, z in batches] == expected
    assert outer == expected


def test_unshuffled_and_drop_last(pack: datasets.Pack) -> None:
    assert ids(pack.batches(7, shuffle=False)) == list(range(30))
    dropped = pack.batches(7, shuffle=False, drop_last=True)
    assert (len(dropped), dropped.num_samples) == (4, 28)
    assert ids(dropped) == list(range(28))
    assert len(pack.batches(10, drop_last=True)) == len(pack.batches(10)) == 3


def test_bad_arguments(pack: datasets.Pack) -> None:
    for wrong in ({"batch_size": 0}, {"batch_size": 31, "drop_last": True}, {"batch_size": 2, "seed": -1}):
        with pytest.raises(ValueError, match=r"batch_size|seed"):
            pack.batches(**wrong)
    with pytest.raises(ValueError, match="epoch must be"):
        pack.batches(2).set_epoch(-1)
    points = dataclasses.replace(pack, targets=torch.zeros(30, 6))
    with pytest.raises(ValueError, match="leave the keypoints behind"):
        points.batches(4, augment=RandomCropFlip())
    with pytest.raises(ValueError, match="padding"):
        RandomCropFlip(padding=-1)
    with pytest.raises(ValueError, match="draws"):
        RandomCropFlip().apply(pack.images, torch.zeros(3, 3, dtype=torch.int64))


@pytest.mark.parametrize("padding", [0, 1, 4, 11])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_augmentation_equals_the_plain_reference(pack: datasets.Pack, padding: int, dtype: torch.dtype) -> None:
    augment = RandomCropFlip(padding=padding)
    drawn = augment.draw(30, seed=5, epoch=2)
    images = pack.images.to(dtype)
    out = augment.apply(images, drawn)
    assert out.dtype == dtype
    assert out.shape == images.shape
    for k in range(30):
        down, right, flip = drawn[k].tolist()
        assert np.array_equal(out[k].numpy(), reference(images[k].numpy(), down, right, flip, padding)), k
    index = torch.tensor([4, 29, 4])
    assert torch.equal(augment.apply(images, drawn, index), out[index])


def test_a_sample_is_augmented_alike_in_any_batch(pack: datasets.Pack) -> None:
    augment = RandomCropFlip(padding=2)
    for epoch in (0, 1):
        passes = []
        for size, shuffle in ((30, False), (7, False), (4, True)):
            batches = pack.batches(size, seed=9, shuffle=shuffle, augment=augment)
            batches.set_epoch(epoch)
            x = torch.cat([x for x, _ in batches])
            plain = pack.batches(size, seed=9, shuffle=shuffle)
            plain.set_epoch(epoch)
            passes.append(x[np.argsort(ids(plain))])
        expected = to_unit(augment.apply(pack.images, augment.draw(30, seed=9, epoch=epoch)))
        assert all(torch.equal(x, expected) for x in passes)


def test_draws_are_uniform_in_range_and_change_with_the_epoch() -> None:
    augment = RandomCropFlip(padding=2)
    drawn = augment.draw(20_000, seed=0)
    for column in (0, 1):
        values, counts = drawn[:, column].unique(return_counts=True)
        assert values.tolist() == [-2, -1, 0, 1, 2]
        assert stats.chisquare(counts.numpy()).pvalue > 1e-4
    assert abs(drawn[:, 2].float().mean().item() - 0.5) < 0.02
    assert not torch.equal(drawn, augment.draw(20_000, seed=0, epoch=1))
    assert not torch.equal(drawn, augment.draw(20_000, seed=1))
    assert RandomCropFlip(flip=False).draw(100, seed=0)[:, 2].sum() == 0


def test_images_stay_where_they_are(pack: datasets.Pack) -> None:
    """The meta device has no data: anything read back to the host, or left on the CPU, would fail here."""
    batches = pack.batches(8, device="meta", augment=RandomCropFlip())
    assert batches.images.dtype == torch.uint8
    assert batches.device.type == "meta"
    shapes = []
    for x, y in batches:
        assert x.device.type == y.device.type == "meta"
        shapes.append(tuple(x.shape))
    assert shapes == [(8, 3, 12, 10)] * 3 + [(6, 3, 12, 10)]
    assert pack.batches(8).images is pack.images  # and nothing is copied without need


@pytest.mark.gpu
def test_cuda_yields_the_same_numbers_without_a_sync(pack: datasets.Pack) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    host = pack.batches(8, seed=1, augment=RandomCropFlip())
    device = pack.batches(8, seed=1, augment=RandomCropFlip(), device="cuda")
    iterator = iter(device)
    found = [next(iterator)]  # the first step of an epoch moves the order there
    torch.cuda.set_sync_debug_mode("error")
    try:
        found.extend(iterator)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for (x, y), (x_device, y_device) in zip(host, found, strict=True):
        assert x_device.is_cuda
        assert torch.equal(x, x_device.cpu())
        assert torch.equal(y, y_device.cpu())
