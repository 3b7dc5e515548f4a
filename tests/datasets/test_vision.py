"""FashionMNIST, MNIST, CIFAR-10 and SVHN from tiny files in their real formats, read by torchvision itself."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import pickle
import struct
import warnings
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
import torchvision.datasets as sources

import datasets
from datasets import vision
from datasets.errors import CorruptData, MissingData
from datasets.packs import channel_statistics

TRAIN, TEST = 40, 12


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the published counts be those of the tiny files."""
    for name, spec in vision.SPECS.items():
        monkeypatch.setitem(vision.SPECS, name, dataclasses.replace(spec, counts=(TRAIN, TEST)))


def random_set(name: str) -> dict[str, np.ndarray]:
    shape = vision.SPECS[name].shape
    rng = np.random.default_rng(7)
    return {
        "x_train": rng.integers(0, 256, (TRAIN, *shape), dtype=np.uint8),
        "y_train": np.arange(TRAIN) % 10,
        "x_test": rng.integers(0, 256, (TEST, *shape), dtype=np.uint8),
        "y_test": np.arange(TEST)[::-1] % 10,
    }


def idx(array: np.ndarray) -> bytes:
    """The IDX format: two zero bytes, type 8 (unsigned byte), dimensions, big-endian sizes, bytes."""
    data = array.astype(np.uint8)
    return struct.pack(f">BBBB{data.ndim}I", 0, 0, 8, data.ndim, *data.shape) + data.tobytes()


def write_idx(root: Path, folder: str, data: dict[str, np.ndarray], *, compress: bool = False) -> Path:
    raw = root / folder / "raw"
    raw.mkdir(parents=True)
    for part, prefix in (("train", "train"), ("test", "t10k")):
        for key, kind in ((f"x_{part}", "images-idx3"), (f"y_{part}", "labels-idx1")):
            content = idx(data[key][..., 0] if key.startswith("x") else data[key])
            name = raw / f"{prefix}-{kind}-ubyte"
            if compress:
                name.with_name(name.name + ".gz").write_bytes(gzip.compress(content))
            else:
                name.write_bytes(content)
    return raw


def write_cifar(root: Path, data: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = root / "cifar-10-batches-py"
    folder.mkdir()
    files = [f"data_batch_{k}" for k in range(1, 6)] + ["test_batch"]
    parts = [*np.split(np.arange(TRAIN), 5), np.arange(TEST)]
    for name, index in zip(files, parts, strict=True):
        part = "test" if name == "test_batch" else "train"
        rows = data[f"x_{part}"][index].transpose(0, 3, 1, 2).reshape(len(index), -1)
        (folder / name).write_bytes(pickle.dumps({"data": rows, "labels": data[f"y_{part}"][index].tolist()}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list(vision.SPECS["cifar10"].classes)}))
    monkeypatch.setattr(sources.CIFAR10, "train_list", [[name, md5(folder / name)] for name in files[:5]])
    monkeypatch.setattr(sources.CIFAR10, "test_list", [[files[5], md5(folder / files[5])]])
    meta = {**sources.CIFAR10.meta, "md5": md5(folder / "batches.meta")}
    monkeypatch.setattr(sources.CIFAR10, "meta", meta)
    return folder


def write_svhn(root: Path, data: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch) -> None:
    listed = {}
    for part in ("train", "test"):
        path = root / f"{part}_32x32.mat"
        labels = np.where(data[f"y_{part}"] == 0, 10, data[f"y_{part}"]).astype(np.uint8)[:, None]  # 10 stands for 0
        scipy.io.savemat(path, {"X": data[f"x_{part}"].transpose(1, 2, 3, 0), "y": labels})
        listed[part] = ["https://example.org/", path.name, md5(path)]
    monkeypatch.setattr(sources.SVHN, "split_list", listed)


def write(name: str, root: Path, data: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch) -> None:
    root.mkdir(exist_ok=True)
    if name == "cifar10":
        write_cifar(root, data, monkeypatch)
    elif name == "svhn":
        write_svhn(root, data, monkeypatch)
    else:
        write_idx(root, vision.SPECS[name].torchvision, data)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("name", ["fashion_mnist", "mnist", "cifar10", "svhn"])
def test_torchvision_layout_becomes_a_pack_and_stays_one(name: str, tmp_path: Path, monkeypatch) -> None:
    root, cache, data = tmp_path / "root", tmp_path / "cache", random_set(name)
    write(name, root, data, monkeypatch)
    before = sorted(root.rglob("*"))
    test = datasets.load(name, root, "test", cache=cache)
    assert np.array_equal(test.images.numpy(), data["x_test"])
    assert test.targets.tolist() == data["y_test"].tolist()
    assert sorted(root.rglob("*")) == before  # the user's folder is only read
    train, val = (datasets.load(name, root, split, cache=cache) for split in ("train", "val"))
    assert (len(train), len(val)) == (36, 4)
    assert train.tensors()[0].shape == (36, *test.image_shape)
    order = {row.tobytes(): k for k, row in enumerate(data["x_train"])}
    places = [order[row.tobytes()] for part in (train, val) for row in part.images.numpy()]
    assert sorted(places) == list(range(TRAIN))
    assert torch.cat([train.targets, val.targets]).tolist() == data["y_train"][places].tolist()
    assert (test.mean, test.std, test.classes) == (
        vision.SPECS[name].mean,
        vision.SPECS[name].std,
        vision.SPECS[name].classes,
    )
    assert "4 of 40" in val.meta["split_rule"]
    # torchvision is not asked again: the cache answers.
    (stored,) = (cache / "packs").iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(vision, "_torchvision", None)
        assert datasets.load(name, root, "test", cache=cache).fingerprint == test.fingerprint
    # A damaged cache is rebuilt, not trusted.
    stored.write_bytes(stored.read_bytes()[:1000])
    with pytest.warns(RuntimeWarning, match="cache is rebuilt"):
        assert datasets.load(name, root, "test", cache=cache).fingerprint == test.fingerprint


@pytest.mark.usefixtures("small")
def test_changed_files_are_not_answered_from_the_cache(tmp_path: Path) -> None:
    data = random_set("mnist")
    raw = write_idx(tmp_path / "root", "MNIST", data)
    first = datasets.load("mnist", tmp_path / "root", "test")
    data["x_test"] = 255 - data["x_test"]
    (raw / "t10k-images-idx3-ubyte").write_bytes(idx(data["x_test"][..., 0]))
    second = datasets.load("mnist", tmp_path / "root", "test")
    assert torch.equal(second.images, 255 - first.images)


@pytest.mark.usefixtures("small")
def test_idx_files_still_in_gz(tmp_path: Path, monkeypatch) -> None:
    data = random_set("fashion_mnist")
    raw = write_idx(tmp_path / "root", "FashionMNIST", data, compress=True)
    with pytest.raises(CorruptData, match="MD5 is not the published one"):
        datasets.load("fashion_mnist", tmp_path / "root", "test")
    monkeypatch.setattr(sources.FashionMNIST, "resources", [(path.name, md5(path)) for path in raw.iterdir()])
    pack = datasets.load("fashion_mnist", tmp_path / "root", "test")
    assert np.array_equal(pack.images.numpy(), data["x_test"])
    assert all(path.suffix == ".gz" for path in raw.iterdir())


@pytest.mark.usefixtures("small")
def test_truncated_and_damaged_files(tmp_path: Path, monkeypatch) -> None:
    raw = write_idx(tmp_path, "MNIST", random_set("mnist"))
    image_file = raw / "train-images-idx3-ubyte"
    image_file.write_bytes(image_file.read_bytes()[:-5])
    with pytest.raises(CorruptData, match="mnist: the files of torchvision"):
        datasets.load("mnist", tmp_path)
    folder = write_cifar(tmp_path, random_set("cifar10"), monkeypatch)
    (folder / "data_batch_3").write_bytes(b"x" + (folder / "data_batch_3").read_bytes()[1:])
    with pytest.raises(CorruptData, match="fetch them again"):
        datasets.load("cifar10", tmp_path)


def test_missing_data_names_the_paths_and_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        datasets.load("svhn", tmp_path)
    text = str(caught.value)
    assert str(tmp_path / "svhn.npz") in text
    assert str(tmp_path / "train_32x32.mat") in text
    assert "download=True" in text
    (tmp_path / "train_32x32.mat").write_bytes(b"")
    with pytest.raises(MissingData, match=r"lacks test_32x32\.mat"):
        datasets.load("svhn", tmp_path)
    write_idx(tmp_path, "MNIST", random_set("mnist"))
    (tmp_path / "MNIST" / "raw" / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(MissingData, match="lacks MNIST/raw/t10k-labels-idx1-ubyte"):
        datasets.load("mnist", tmp_path)


@pytest.mark.usefixtures("small")
def test_a_subset_is_never_the_set(tmp_path: Path) -> None:
    data = random_set("cifar10_subset")
    np.savez_compressed(tmp_path / "cifar10_subset.npz", **data, train_index=np.arange(TRAIN) * 3)
    with pytest.raises(MissingData, match="there is cifar10_subset, which is a data set of its own"):
        datasets.load("cifar10", tmp_path)
    subset = datasets.load("cifar10_subset", tmp_path, "val")
    assert subset.name == "cifar10_subset"
    assert all(index % 3 == 0 for index in subset.extras["source_index"].tolist())
    assert np.array_equal(subset.images.numpy(), data["x_train"][subset.extras["source_index"].numpy() // 3])
    with pytest.raises(MissingData, match=r"cifar10_subset: no pack .*/nowhere/cifar10_subset\.npz"):
        datasets.load("cifar10_subset", tmp_path / "nowhere")
    with pytest.raises(ValueError, match="download=True does not apply to cifar10_subset"):
        datasets.load("cifar10_subset", tmp_path, download=True)


def test_a_pack_of_the_wrong_size_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "cifar10.npz", **random_set("cifar10"))
    with pytest.raises(CorruptData, match=r"cifar10\.npz as found has 40 train images, the set has 50,000"):
        datasets.load("cifar10", tmp_path)
    np.savez(tmp_path / "mnist.npz", **random_set("cifar10"))
    with pytest.raises(CorruptData, match=r"shape \(32, 32, 3\), expected \(28, 28, 1\)"):
        datasets.load("mnist", tmp_path)


@pytest.mark.usefixtures("small")
def test_a_pack_in_the_root_comes_first(tmp_path: Path) -> None:
    data = random_set("mnist")
    write_idx(tmp_path, "MNIST", {**data, "x_test": 255 - data["x_test"]})
    np.savez(tmp_path / "mnist.npz", **{**data, "x_test": data["x_test"][..., 0]})  # (N, H, W) will do for grey
    pack = datasets.load("mnist", tmp_path, "test")
    assert np.array_equal(pack.images.numpy(), data["x_test"])
    assert pack.meta["source"] == "mnist.npz as found"


@pytest.mark.usefixtures("small")
def test_labels_out_of_range_in_a_pack(tmp_path: Path) -> None:
    data = random_set("mnist")
    data["y_train"][5] = 10
    np.savez(tmp_path / "mnist.npz", **data)
    with pytest.raises(CorruptData, match=r"label\(s\) out of range: found 0..10, expected 0..9 for 10 classes"):
        [datasets.load("mnist", tmp_path, split) for split in ("train", "val")]


@pytest.mark.usefixtures("small")
def test_download_goes_through_torchvision_into_the_root(tmp_path: Path, monkeypatch) -> None:
    root, data, asked = tmp_path / "new" / "root", random_set("mnist"), []

    def fetch(self: sources.MNIST) -> None:
        asked.append(Path(self.root))
        if not (Path(self.root) / "MNIST").exists():
            write_idx(Path(self.root), "MNIST", data)

    monkeypatch.setattr(sources.MNIST, "download", fetch)
    pack = datasets.load("mnist", root, "test", download=True)
    assert np.array_equal(pack.images.numpy(), data["x_test"])
    assert set(asked) == {root}
    asked.clear()
    datasets.load("mnist", root, "train", download=True)
    assert not asked  # what is there is not fetched again


def test_a_failed_download_says_so(tmp_path: Path, monkeypatch) -> None:
    def fetch(self: sources.MNIST) -> None:
        raise RuntimeError("Error downloading train-images-idx3-ubyte.gz")

    monkeypatch.setattr(sources.MNIST, "download", fetch)
    with pytest.raises(MissingData, match=r"the download into .* failed \(Error downloading"):
        datasets.load("mnist", tmp_path, download=True)


@pytest.mark.usefixtures("small")
def test_a_cache_that_cannot_be_written_costs_a_warning_only(tmp_path: Path) -> None:
    write_idx(tmp_path / "root", "MNIST", random_set("mnist"))
    (tmp_path / "file").write_text("not a folder")
    with pytest.warns(RuntimeWarning, match="not cached"):
        pack = datasets.load("mnist", tmp_path / "root", "test", cache=tmp_path / "file")
    assert len(pack) == TEST


def test_real_fashion_mnist(real_data: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        test = datasets.load("fashion_mnist", real_data, "test", limit=200)
        val = datasets.load("fashion_mnist", real_data, "val")
    assert test.targets[:12].tolist() == [9, 2, 1, 1, 6, 1, 4, 6, 5, 7, 4, 5]
    assert (len(test), test.num_outputs, test.in_channels, test.image_size) == (200, 10, 1, 28)
    assert len(val) == 6000
    mean, _ = channel_statistics(val.images)
    assert mean[0] == pytest.approx(test.mean[0], abs=0.005)


def test_real_fashion_mnist_through_torchvision_is_the_same(real_data: Path, tmp_path: Path) -> None:
    with np.load(real_data / "fashion_mnist.npz", allow_pickle=False) as stored:
        write_idx(tmp_path, "FashionMNIST", {name: stored[name] for name in stored.files})
    for split in ("train", "test"):
        rebuilt = datasets.load("fashion_mnist", tmp_path, split)
        assert rebuilt.fingerprint == datasets.load("fashion_mnist", real_data, split).fingerprint


def test_real_cifar10_subset(real_data: Path) -> None:
    if not (real_data / "cifar10_subset.npz").exists() or (real_data / "cifar10.npz").exists():
        pytest.skip("needs the subset, and not the set")
    test = datasets.load("cifar10_subset", real_data, "test", limit=100)
    assert test.targets[:10].tolist() == [3, 8, 8, 0, 6, 6, 1, 6, 3, 1]
    train = datasets.load("cifar10_subset", real_data, "train", limit=500)
    assert torch.bincount(train.targets).tolist() == [50] * 10
    with pytest.raises(MissingData, match="cifar10_subset"):
        datasets.load("cifar10", real_data)
