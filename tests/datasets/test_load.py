"""`datasets.load` as a whole: names, options, folders, limits, data of your own, rendered data."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import datasets
from datasets import aircraft, registry
from datasets.errors import CorruptData, MissingData


def write_own(path: Path, **more: np.ndarray) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    arrays = {
        "x_train": rng.integers(0, 256, (50, 6, 6, 3), dtype=np.uint8),
        "y_train": np.arange(50) % 4,
        "x_test": rng.integers(0, 256, (9, 6, 6, 3), dtype=np.uint8),
        "y_test": np.arange(9) % 4,
        **more,
    }
    np.savez(path, **arrays)
    return arrays


def test_unknown_names_variants_splits_and_options() -> None:
    with pytest.raises(ValueError, match="unknown data set 'fashionmnist'; did you mean fashion_mnist"):
        datasets.load("fashionmnist")
    with pytest.raises(ValueError, match="there are aircraft, celeba_hq, "):
        datasets.load("zzz")
    with pytest.raises(ValueError, match="there is flowers102:paper_like, flowers102:official"):
        datasets.load("flowers102:mine")
    with pytest.raises(ValueError, match="there is only digits itself"):
        datasets.load("digits:mine")
    with pytest.raises(ValueError, match="unknown split 'valid', expected one of train, val, test"):
        datasets.load("digits", split="valid")
    with pytest.raises(ValueError, match=r"val_fraction=0.2 does not apply to digits; it takes no such options"):
        datasets.load("digits", val_fraction=0.2)
    with pytest.raises(ValueError, match="does not apply to mnist; it takes download, val_fraction"):
        datasets.load("mnist", image_size=32)
    with pytest.raises(ValueError, match="limit must be at least 1"):
        datasets.load("digits", limit=0)
    with pytest.raises(ValueError, match="image_size must be at least 1"):
        datasets.load("aircraft", image_size=0)


def test_every_name_has_one_line() -> None:
    assert datasets.names() == list(datasets.describe())
    for name, line in datasets.describe().items():
        assert line
        assert "\n" not in line
        assert registry.find(name)[0].name == name


def test_limits_are_nested_and_the_test_order_is_kept() -> None:
    whole, some, few = (datasets.load("digits", split="train", limit=limit) for limit in (None, 100, 10))
    assert sorted(few.targets.tolist()) == list(range(10))
    assert torch.equal(some.images[:10], few.images)
    assert torch.bincount(some.targets).tolist() == [10] * 10
    assert len(whole) == 1293
    test, first = datasets.load("digits", split="test"), datasets.load("digits", split="test", limit=7)
    assert torch.equal(test.images[:7], first.images)
    assert first.meta["limit"] == 7


def test_an_npz_of_your_own(tmp_path: Path) -> None:
    path = tmp_path / "birds.npz"
    arrays = write_own(path)
    train, val, test = (datasets.load(str(path), split=split) for split in ("train", "val", "test"))
    assert (train.name, len(train), len(val), len(test)) == ("birds", 45, 5, 9)
    assert (train.classes, train.augmentation) == (("0", "1", "2", "3"), None)
    assert np.array_equal(test.images.numpy(), arrays["x_test"])
    expected = (arrays["x_train"] / 255).mean((0, 1, 2))
    assert test.mean == train.mean == pytest.approx(expected.tolist())
    own_val = write_own(path, x_val=arrays["x_test"], y_val=arrays["y_test"], class_names=np.array(list("wxyz")))
    assert len(datasets.load(str(path))) == 50
    assert np.array_equal(datasets.load(str(path), split="val").images.numpy(), own_val["x_val"])
    assert datasets.load(str(path), split="val").classes == ("w", "x", "y", "z")


def test_keypoints_of_your_own(tmp_path: Path) -> None:
    points = np.random.default_rng(0).uniform(0, 6, (50, 8))
    write_own(tmp_path / "k.npz", y_train=points, y_test=points[:9])
    pack = datasets.load(str(tmp_path / "k.npz"), split="test")
    assert (pack.task, pack.num_outputs, pack.classes) == ("keypoints", 8, ("0", "1", "2", "3"))
    assert np.array_equal(pack.targets.numpy(), points[:9].astype(np.float32))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"x_train": np.zeros((50, 6, 6, 3))}, "x_train: expected uint8"),
        ({"y_train": np.zeros(50)}, "y_train: expected integer labels"),
        ({"y_train": np.zeros(49, int)}, "50 images in x_train but 49 rows in y_train"),
        ({"y_train": np.full(50, -1)}, "out of range"),
        ({"class_names": np.array(["only"])}, "out of range: found 0..3, expected 0..0"),
        ({"x_train": np.zeros((50, 6, 6, 2), np.uint8)}, "1 or 3 channels"),
    ],
)
def test_bad_files_of_your_own(tmp_path: Path, more: dict[str, np.ndarray], message: str) -> None:
    write_own(tmp_path / "mine.npz", **more)
    with pytest.raises(CorruptData, match=message):
        datasets.load(str(tmp_path / "mine.npz"))


def test_files_of_your_own_missing_incomplete_or_empty(tmp_path: Path) -> None:
    with pytest.raises(MissingData, match=r"none\.npz: no such file"):
        datasets.load(str(tmp_path / "none.npz"))
    np.savez(tmp_path / "part.npz", x_train=np.zeros((3, 4, 4), np.uint8), y_train=np.zeros(3, int))
    with pytest.raises(CorruptData, match=r"part\.npz: lacks x_test, y_test"):
        datasets.load(str(tmp_path / "part.npz"), split="test")
    write_own(tmp_path / "empty.npz", x_test=np.zeros((0, 6, 6, 3), np.uint8), y_test=np.zeros(0, int))
    with pytest.raises(CorruptData, match=r"empty \(test\): the split is empty"):
        datasets.load(str(tmp_path / "empty.npz"), split="test")


def test_folders_by_argument_and_environment(tmp_path: Path, monkeypatch) -> None:
    for name in ("CERTPRUNE_DATA", "CERTPRUNE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert registry.cache_folder(None) == tmp_path / ".cache" / "certprune"
    assert registry.data_folder(None, Path("c")) == Path("c/downloads")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert registry.cache_folder(None) == Path("/xdg/certprune")
    monkeypatch.setenv("CERTPRUNE_CACHE", "/mine")
    assert registry.cache_folder(None) == Path("/mine")
    assert registry.cache_folder("~/there") == tmp_path / "there"
    monkeypatch.setenv("CERTPRUNE_DATA", "/data")
    assert registry.data_folder(None, Path("c")) == Path("/data")
    assert registry.data_folder("here", Path("c")) == Path("here")
    with pytest.raises(MissingData, match=r"/data/mnist\.npz"):
        datasets.load("mnist")


def test_register_a_data_set(pack: datasets.Pack) -> None:
    asked = []

    def load(request: datasets.Request) -> datasets.Pack:
        asked.append(request)
        return pack

    datasets.register(datasets.Source("dots", "dots", load, variants=("small", "big")))
    try:
        assert "dots" in datasets.names()
        assert len(datasets.load("dots:big", limit=5)) == 5
        assert (asked[0].variant, asked[0].title, asked[0].limit) == ("big", "dots:big", 5)
        datasets.load("dots")
        assert (asked[1].variant, asked[1].title) == ("small", "dots")
        with pytest.raises(ValueError, match="there is a data set 'dots' already"):
            datasets.register(datasets.Source("dots", "again", load))
        with pytest.raises(ValueError, match="letters, digits and underscores"):
            datasets.register(datasets.Source("a:b", "", load))
    finally:
        registry.SOURCES.pop("dots")


def test_aircraft_are_rendered_once_and_a_limit_renders_less(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(aircraft.SIZES, "quick", {"train": 8, "val": 3, "test": 3})
    few = datasets.load("aircraft", split="train", cache=tmp_path, limit=3, workers=1, image_size=32)
    assert (len(few), few.task, few.num_outputs, few.image_size) == (3, "keypoints", 48, 32)
    assert len(few.classes) == few.extras["visibility"].shape[1] == 24
    assert few.meta["source"] == "datasets.aircraft"
    seen: list[int] = []
    whole = datasets.load(
        "aircraft",
        split="train",
        cache=tmp_path,
        workers=1,
        image_size=32,
        progress=lambda done, total: seen.append(done),
    )
    assert len(whole) == seen[-1] == 8
    assert torch.equal(whole.images[:3], few.images)
    assert torch.equal(whole.targets[:3], few.targets)

    def again(*_: object, **__: object) -> None:
        raise AssertionError("rendered a second time")

    monkeypatch.setattr(aircraft, "render_split", again)
    cached = datasets.load("aircraft", split="train", cache=tmp_path, workers=1, image_size=32)
    assert cached.fingerprint == whole.fingerprint
    assert torch.equal(cached.extras["pose"], whole.extras["pose"])
    part = datasets.load("aircraft", split="train", cache=tmp_path, limit=5, image_size=32)
    assert torch.equal(part.images, whole.images[:5])  # a prefix of what is there
    with pytest.raises(AssertionError, match="second time"):
        datasets.load("aircraft:paper", split="train", cache=tmp_path, image_size=32)


def test_the_readmes_example_runs(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = (Path(datasets.__file__).parent / "README.md").read_text(encoding="utf-8")
    blocks = [block.split("```")[0] for block in text.split("```python\n")[1:]]
    assert len(blocks) >= 2
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {"__name__": "__readme__"})
