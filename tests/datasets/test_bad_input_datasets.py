"""Wrong arguments to `datasets.load` and data of one's own that does not fit together."""

from pathlib import Path

import numpy as np
import pytest

import datasets

LABELS = np.arange(20) % 4


def write(folder: Path, **changes: np.ndarray) -> Path:
    images = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 3), dtype=np.uint8)
    given = {"x_train": images, "y_train": LABELS, "x_test": images[:8], "y_test": LABELS[:8]}
    np.savez(folder / "own.npz", **(given | changes))
    return folder / "own.npz"


def test_a_path_object_is_as_good_as_a_string(tmp_path: Path) -> None:
    path = write(tmp_path)
    by_path, by_text = datasets.load(path, split="val"), datasets.load(str(path), split="val")
    assert by_path.fingerprint == by_text.fingerprint
    assert len(by_path) == 2


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_splits_of_different_sizes_are_refused_before_anything_is_trained(tmp_path: Path, split: str) -> None:
    path = write(tmp_path, x_test=np.zeros((8, 6, 8, 3), np.uint8))
    if split != "test":
        assert datasets.load(path, split=split).images.shape[1:] == (8, 8, 3)
        return
    with pytest.raises(datasets.CorruptData, match=r"\(8, 8, 3\) in x_train but \(6, 8, 3\) in x_test"):
        datasets.load(path, split=split)


def test_every_split_has_the_classes_of_the_training_images(tmp_path: Path) -> None:
    path = write(tmp_path, y_test=LABELS[:8] // 2)
    assert datasets.load(path, split="test").num_outputs == 4
    path = write(tmp_path, y_test=LABELS[:8] + 3)
    with pytest.raises(datasets.CorruptData, match=r"found 3\.\.6, expected 0\.\.3 for 4 classes"):
        datasets.load(path, split="test")


@pytest.mark.parametrize(
    ("name", "meant"),
    [("FashionMNIST", "fashion_mnist"), ("CIFAR-10", "cifar10"), ("SVHN", "svhn"), ("flowers-102", "flowers102")],
)
def test_other_spellings_lead_to_the_name(name: str, meant: str) -> None:
    with pytest.raises(ValueError, match=rf"did you mean .*\b{meant}\b"):
        datasets.load(name)


def test_an_augmentation_by_name_is_refused_at_once(tmp_path: Path) -> None:
    pack = datasets.load(write(tmp_path))
    with pytest.raises(TypeError, match="RandomCropFlip or None, got 'flip'"):
        pack.batches(4, augment="flip")  # type: ignore[arg-type]
