from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import datasets
from datasets import packs
from datasets.errors import CorruptData


def make(images: torch.Tensor, targets: torch.Tensor, classes: tuple[str, ...] = ("a", "b"), **more) -> datasets.Pack:
    return datasets.Pack("mine", "train", images, targets, classes, **more)


IMAGES = torch.zeros(4, 8, 8, 3, dtype=torch.uint8)
LABELS = torch.tensor([0, 1, 1, 0])


@pytest.mark.parametrize(
    ("images", "targets", "message"),
    [
        (IMAGES.float(), LABELS, "images must be uint8"),
        (IMAGES[..., 0], LABELS, "images must be uint8"),
        (IMAGES.permute(0, 3, 1, 2), LABELS, "1 or 3 channels"),
        (IMAGES[:0], LABELS[:0], "the split is empty"),
        (IMAGES, LABELS[:3], "4 images but 3 targets"),
        (IMAGES, torch.tensor([0, 1, 2, -1]), r"2 label\(s\) out of range: found -1..2, expected 0..1"),
        (IMAGES, LABELS.int(), "targets must be int64"),
        (IMAGES, torch.zeros(4, 3), "targets must be int64"),
        (IMAGES, torch.zeros(4, 6), "6 coordinates but 2 keypoint names"),
        (IMAGES, torch.full((4, 4), torch.nan), "NaN"),
    ],
)
def test_bad_input_is_named(images: torch.Tensor, targets: torch.Tensor, message: str) -> None:
    with pytest.raises(CorruptData, match=message):
        make(images, targets)


def test_bad_extras_and_split() -> None:
    with pytest.raises(CorruptData, match="'visibility' has 3 rows for 4 images"):
        make(IMAGES, LABELS, extras={"visibility": torch.ones(3)})
    with pytest.raises(ValueError, match="unknown split 'dev'"):
        datasets.Pack("mine", "dev", IMAGES, LABELS, ("a", "b"))


def test_properties(pack: datasets.Pack) -> None:
    assert (pack.num_outputs, pack.in_channels, pack.image_shape, pack.task) == (3, 3, (3, 12, 10), "classification")
    with pytest.raises(ValueError, match="not square"):
        _ = pack.image_size
    points = make(IMAGES, torch.zeros(4, 4))
    assert (points.num_outputs, points.task, points.image_size) == (4, "keypoints", 8)
    with pytest.raises(dataclasses.FrozenInstanceError):
        pack.name = "other"  # type: ignore[misc]


def test_statistics_are_those_of_the_pixels(pack: datasets.Pack) -> None:
    x, _ = pack.tensors()
    mean, std = packs.channel_statistics(pack.images)
    assert mean == pytest.approx(x.double().mean((0, 2, 3)).tolist(), abs=1e-7)
    assert std == pytest.approx(x.double().std((0, 2, 3), correction=0).tolist(), abs=1e-7)
    assert pack.mean == (0.5, 0.5, 0.5)  # stated
    assert pack.std == std  # measured, as nothing is stated


def test_tensors_are_unit_floats_channels_first(pack: datasets.Pack) -> None:
    x, y = pack.tensors([5, 2])
    expected = pack.images[[5, 2]].numpy().astype(np.float32).transpose(0, 3, 1, 2) / np.float32(255)
    assert x.dtype == torch.float32
    assert x.is_contiguous()
    assert np.array_equal(x.numpy(), expected)
    assert torch.equal(y, pack.targets[[5, 2]])
    full, labels = pack.tensors()
    assert full.shape == (30, 3, 12, 10)
    assert labels is pack.targets
    assert pack.images.dtype == torch.uint8


def test_every_grey_value_is_the_nearest_float() -> None:
    ramp = make(torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1), torch.tensor([0]))
    x, _ = ramp.tensors()
    assert np.array_equal(x.numpy().ravel(), (np.arange(256) / 255).astype(np.float32))


def test_subset(pack: datasets.Pack) -> None:
    pack = dataclasses.replace(pack, extras={"row": torch.arange(30)})
    part = pack.subset(np.array([7, 3, 7]))
    assert part.images[:, 0, 0, 0].tolist() == [7, 3, 7]
    assert part.extras["row"].tolist() == [7, 3, 7]
    assert torch.equal(part.targets, pack.targets[[7, 3, 7]])
    assert pack.subset(range(30)).fingerprint == pack.fingerprint
    for wrong, error in (([30], IndexError), ([-1], IndexError), ([], ValueError), ([0.5], ValueError)):
        with pytest.raises(error, match="tiny"):
            pack.subset(wrong)
    with pytest.raises(ValueError, match="integers"):
        pack.subset(torch.ones(30, dtype=torch.bool))


def test_fingerprint_sees_every_pixel_and_label_and_nothing_else(pack: datasets.Pack) -> None:
    images, targets = pack.images.clone(), pack.targets.clone()
    images[29, 11, 9, 2] ^= 1
    targets[0] = (targets[0] + 1) % 3
    same = dataclasses.replace(pack, name="renamed", images=pack.images.clone(), meta={})
    assert same.fingerprint == pack.fingerprint
    others = [dataclasses.replace(pack, images=images), dataclasses.replace(pack, targets=targets)]
    reshaped = dataclasses.replace(pack, images=pack.images.reshape(30, 10, 12, 3))
    assert len({p.fingerprint for p in (pack, *others, reshaped)}) == 4


def test_limited(pack: datasets.Pack) -> None:
    small, large = pack.limited(6), pack.limited(12)
    assert torch.equal(large.images[:6], small.images)
    assert torch.bincount(small.targets, minlength=3).tolist() == [2, 2, 2]
    assert small.meta["limit"] == 6
    assert len(pack.limited(1000)) == 30
    test = dataclasses.replace(pack, split="test").limited(4)
    assert test.images[:, 0, 0, 0].tolist() == [0, 1, 2, 3]
    points = dataclasses.replace(pack, targets=torch.zeros(30, 6))
    assert points.limited(30).images[:, 0, 0, 0].tolist() != list(range(30))
    assert sorted(points.limited(30).images[:, 0, 0, 0].tolist()) == list(range(30))
    drawn = dataclasses.replace(points, meta={"exchangeable": True}).limited(3)
    assert drawn.images[:, 0, 0, 0].tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="limit must be at least 1"):
        pack.limited(0)


def test_save_and_restore(pack: datasets.Pack, tmp_path: Path) -> None:
    pack = dataclasses.replace(pack, extras={"shot": torch.arange(30)}, meta={"mean": [0.1, 0.2, 0.3], "note": "é"})
    datasets.save(pack, tmp_path / "a.npz")
    again = datasets.restore(tmp_path / "a.npz")
    assert again.fingerprint == pack.fingerprint
    assert (again.name, again.split, again.classes, again.meta) == (pack.name, pack.split, pack.classes, pack.meta)
    assert torch.equal(again.extras["shot"], pack.extras["shot"])
    np.savez(tmp_path / "b.npz", images=np.zeros(3))
    with pytest.raises(CorruptData, match="it lacks classes, meta, name, split, targets"):
        datasets.restore(tmp_path / "b.npz")


def test_importing_and_listing_needs_no_torch() -> None:
    code = (
        "import sys, datasets; assert datasets.names() == list(datasets.describe()); assert 'Pack' in dir(datasets);"
        "heavy = {'torch', 'torchvision', 'sklearn', 'scipy', 'numpy', 'PIL'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    root = Path(datasets.__file__).parents[1]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root, timeout=60)
    assert datasets.Pack is packs.Pack
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = datasets.nothing
