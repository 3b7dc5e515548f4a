"""Flowers-102, CelebA-HQ, ORL faces and digits; resizing against torchvision's transforms."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
import torchvision.datasets as sources
from PIL import Image
from torchvision.transforms import CenterCrop, Compose, Resize

import datasets
from datasets import celeba, flowers, images
from datasets.errors import CorruptData, MissingData

COUNT = 30


@pytest.fixture
def flower_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """30 JPEG files of several sizes in torchvision's layout, 10 in each official split."""
    folder = tmp_path / "root" / "flowers-102"
    (folder / "jpg").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(1, COUNT + 1):
        pixels = rng.integers(0, 256, (40 + number, 70, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "jpg" / f"image_{number:05d}.jpg", quality=95)
    order = rng.permutation(np.arange(1, COUNT + 1))
    scipy.io.savemat(folder / "imagelabels.mat", {"labels": 1 + np.arange(COUNT)[None] % 102})
    ids = {key: order[k * 10 : k * 10 + 10][None] for k, key in enumerate(("trnid", "valid", "tstid"))}
    scipy.io.savemat(folder / "setid.mat", ids)
    listed = dict(sources.Flowers102._file_dict)
    for key, name in (("label", "imagelabels.mat"), ("setid", "setid.mat")):
        listed[key] = (name, hashlib.md5((folder / name).read_bytes(), usedforsecurity=False).hexdigest())
    monkeypatch.setattr(sources.Flowers102, "_file_dict", listed)
    return tmp_path / "root"


@pytest.mark.parametrize("size", [(70, 41), (41, 70), (64, 64), (32, 32), (500, 667), (65, 64)])
@pytest.mark.parametrize("target", [64, 33])
def test_fit_equals_torchvisions_transforms(size: tuple[int, int], target: int) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    expected = Compose([Resize(target), CenterCrop(target)])(image)
    assert np.array_equal(np.asarray(images.fit(image, target)), np.asarray(expected))


def test_flowers_official(flower_root: Path) -> None:
    for split in ("train", "val", "test"):
        pack = datasets.load("flowers102:official", flower_root, split, image_size=48)
        found = sources.Flowers102(flower_root, split=split, transform=Compose([Resize(48), CenterCrop(48)]))
        assert len(pack) == len(found) == 10
        for k in range(10):
            image, label = found[k]
            assert np.array_equal(pack.images[k].numpy(), np.asarray(image))
            assert pack.targets[k] == label
            assert pack.extras["image_id"][k] == label + 1  # the fixture's labels follow the numbers
        assert pack.name == "flowers102:official"
    assert (pack.num_outputs, pack.classes[0], pack.image_size) == (102, "pink primrose", 48)


def test_flowers_paper_like_is_a_partition_in_the_same_images(flower_root: Path) -> None:
    packs = {
        split: datasets.load("flowers102", flower_root, split, image_size=16) for split in ("train", "val", "test")
    }
    assert [len(pack) for pack in packs.values()] == [24, 3, 3]
    ids = torch.cat([pack.extras["image_id"] for pack in packs.values()])
    assert sorted(ids.tolist()) == list(range(1, COUNT + 1))
    assert all(torch.equal(pack.targets, pack.extras["image_id"] - 1) for pack in packs.values())
    assert packs["test"].name == "flowers102"
    official = datasets.load("flowers102:official", flower_root, "test", image_size=16)
    shared = set(official.extras["image_id"].tolist()) & set(packs["train"].extras["image_id"].tolist())
    for number in shared:
        a = packs["train"].images[packs["train"].extras["image_id"] == number]
        b = official.images[official.extras["image_id"] == number]
        assert torch.equal(a, b)
    assert shared


def test_the_flowers_manifest_is_pinned() -> None:
    ids = np.arange(1, 8190)
    parts = flowers.manifest(ids)
    assert [len(part) for part in parts.values()] == [6552, 818, 819]
    assert np.array_equal(np.sort(np.concatenate(list(parts.values()))), ids)
    text = ";".join(f"{split}:{','.join(map(str, part))}" for split, part in parts.items())
    assert (
        hashlib.sha256(text.encode()).hexdigest() == "f83a192243f0e5324496bf0c69b6cd180f74d5f0a011bc4efcf8a587d3ece99c"
    )
    shuffled = flowers.manifest(np.random.default_rng(0).permutation(ids))
    assert all(np.array_equal(shuffled[split], parts[split]) for split in parts)


def test_flowers_progress_cache_and_errors(flower_root: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    datasets.load("flowers102", flower_root, image_size=16, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (COUNT, COUNT)
    seen.clear()
    datasets.load(
        "flowers102", flower_root, "val", image_size=16, progress=lambda done, total: seen.append((done, total))
    )
    assert not seen  # from the cache
    jpeg = flower_root / "flowers-102" / "jpg" / "image_00007.jpg"
    jpeg.write_bytes(jpeg.read_bytes()[:300])
    with pytest.raises(CorruptData, match=r"image_00007\.jpg: truncated"):
        datasets.load("flowers102", flower_root, image_size=16)
    jpeg.unlink()
    with pytest.raises(MissingData, match=r"image_00007\.jpg: no such image"):
        datasets.load("flowers102", flower_root, image_size=16)
    (flower_root / "flowers-102" / "setid.mat").write_bytes(b"nothing")
    with pytest.raises(CorruptData, match=r"setid\.mat in .* cannot be used"):
        datasets.load("flowers102", flower_root, image_size=16)
    with pytest.raises(MissingData, match=r"lacks imagelabels\.mat, setid\.mat, jpg.*download=True"):
        datasets.load("flowers102", tmp_path / "nowhere")


def test_flowers_download_goes_through_torchvision(flower_root: Path, tmp_path: Path, monkeypatch) -> None:
    target = tmp_path / "fresh"

    def fetch(self: sources.Flowers102) -> None:
        (flower_root / "flowers-102").rename(Path(self.root) / "flowers-102")

    monkeypatch.setattr(sources.Flowers102, "download", fetch)
    assert len(datasets.load("flowers102", target, image_size=16, download=True)) == 24
    monkeypatch.setattr(sources.Flowers102, "download", lambda self: (_ for _ in ()).throw(OSError("no route")))
    with pytest.raises(MissingData, match="no route"):
        datasets.load("flowers102", tmp_path / "other", download=True)


def test_real_flowers_pass_torchvisions_check(real_data: Path) -> None:
    if not (real_data / "flowers-102").is_dir():
        pytest.skip("no flowers-102")
    parts = [sources.Flowers102(real_data, split=split) for split in ("train", "val", "test")]
    assert [len(part) for part in parts] == [1020, 1020, 6149]


@pytest.mark.slow
def test_real_flowers_packs(real_data: Path) -> None:
    sizes = {}
    for name in ("flowers102", "flowers102:official"):
        sizes[name] = [len(datasets.load(name, real_data, split)) for split in ("train", "val", "test")]
    assert sizes == {"flowers102": [6552, 818, 819], "flowers102:official": [1020, 1020, 6149]}
    pack = datasets.load("flowers102", real_data, "test", limit=1)
    path = real_data / "flowers-102" / "jpg" / f"image_{int(pack.extras['image_id'][0]):05d}.jpg"
    assert np.array_equal(pack.images[0].numpy(), np.asarray(Image.open(path).convert("RGB")))


def write_faces(folder: Path, layout: dict[str, list[str]], rows: str = "") -> dict[str, np.ndarray]:
    """Images `<split>/<identity>/<k>.png`, 40×32; returns pixels by relative path."""
    rng, pixels = np.random.default_rng(0), {}
    for split, identities in layout.items():
        for k, identity in enumerate(identities):
            path = folder / split / identity / f"{k}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels[path.relative_to(folder).as_posix()] = rng.integers(0, 256, (40, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels[path.relative_to(folder).as_posix()]).save(path)
    if rows:
        (folder / "manifest.csv").write_text(rows)
    return pixels


def test_celeba_by_manifest(tmp_path: Path) -> None:
    folder = tmp_path / "celeba_hq"
    pixels = write_faces(folder, {"train": ["9", "10", "9", "10"], "val": ["10"], "test": ["10", "9"]})
    manifest = celeba.write_manifest(folder)
    assert manifest.read_text().splitlines()[:3] == [
        "file,identity,split",
        "train/10/1.png,10,train",
        "train/10/3.png,10,train",
    ]
    packs = {split: datasets.load("celeba_hq", tmp_path, split, image_size=32) for split in ("train", "val", "test")}
    assert [len(pack) for pack in packs.values()] == [4, 1, 2]
    assert packs["test"].classes == ("9", "10")  # by number, not by letter
    assert packs["train"].targets.tolist() == [1, 1, 0, 0]
    # 40×32 at size 32 is the centre, untouched
    assert np.array_equal(packs["test"].images[0].numpy(), pixels["test/10/0.png"][4:36])
    with pytest.raises(ValueError, match=r"val_fraction=0\.5 does not apply to celeba_hq"):
        datasets.load("celeba_hq", tmp_path, "val", val_fraction=0.5)


def test_celeba_without_val_rows_holds_some_out(tmp_path: Path) -> None:
    folder = tmp_path / "celeba_hq"
    write_faces(folder, {"train": ["a"] * 10 + ["b"] * 10, "test": ["b"]})
    celeba.write_manifest(folder)
    train, val = (
        datasets.load("celeba_hq", tmp_path, split, image_size=8, val_fraction=0.25) for split in ("train", "val")
    )
    assert (len(train), len(val)) == (15, 5)
    rows = {image.numpy().tobytes() for image in train.images} & {image.numpy().tobytes() for image in val.images}
    assert not rows
    assert "5 of 20" in val.meta["split_rule"]


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        ("file,who,split\n", CorruptData, "no column identity"),
        ("file,identity,split\ntrain/a/0.png,a,dev\n", CorruptData, "line 2: split 'dev'"),
        ("file,identity,split\ntrain/a/0.png,,train\n", CorruptData, "line 2: file and identity"),
        ("file,identity,split\n../a.png,a,train\n", CorruptData, "leaves the manifest's folder"),
        ("file,identity,split\ntrain/a/0.png,a,train\ntrain/a/0.png,a,test\n", CorruptData, "listed before, in line 2"),
        (
            "file,identity,split\ntrain/a/9.png,a,train\ntest/a/0.png,a,test\n",
            MissingData,
            "1 of 2 images are not there",
        ),
        ("file,identity,split\ntrain/a/0.png,a,train\n", CorruptData, "no row with split 'test'"),
        ("file,identity,split\ntrain/a/0.png,a,train\ntest/a/0.png,z,test\n", CorruptData, "no training image.*'z'"),
    ],
)
def test_celeba_manifest_errors(tmp_path: Path, rows: str, error: type[Exception], message: str) -> None:
    write_faces(tmp_path / "celeba_hq", {"train": ["a"], "test": ["a"]}, rows)
    with pytest.raises(error, match=message):
        datasets.load("celeba_hq", tmp_path)


def test_celeba_missing_and_as_a_pack(tmp_path: Path) -> None:
    with pytest.raises(MissingData, match=r"celeba_hq/manifest\.csv.*write_manifest"):
        datasets.load("celeba_hq", tmp_path)
    with pytest.raises(MissingData, match="no image in folders"):
        celeba.write_manifest(tmp_path)
    x = np.random.default_rng(0).integers(0, 256, (20, 64, 64, 3), dtype=np.uint8)
    np.savez(tmp_path / "celeba_hq.npz", x_train=x, y_train=np.arange(20) % 2, x_test=x[:2], y_test=np.array([0, 1]))
    pack = datasets.load("celeba_hq", tmp_path, "test")
    assert np.array_equal(pack.images.numpy(), x[:2])
    assert pack.classes == ("0", "1")


def test_orl_faces_by_shot(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (30, 112, 92, 1), dtype=np.uint8)
    y, shot = np.repeat(np.arange(3), 10), np.tile(np.arange(1, 11), 3)
    np.savez_compressed(tmp_path / "orl_faces.npz", x=x, y=y, shot=shot)
    packs = {split: datasets.load("orl_faces", tmp_path, split, image_size=92) for split in ("train", "val", "test")}
    assert [len(pack) for pack in packs.values()] == [21, 3, 6]
    assert packs["test"].targets.tolist() == [0, 1, 2, 0, 1, 2]
    assert packs["test"].extras["shot"].tolist() == [9, 9, 9, 10, 10, 10]
    assert np.array_equal(packs["val"].images[1].numpy(), x[17, 10:102])  # the centre, not resampled
    assert packs["val"].mean == packs["test"].mean  # of the training images, whatever is loaded
    assert packs["train"].num_outputs == 40
    np.savez(tmp_path / "orl_faces.npz", x=x[:20], y=y[:20], shot=np.ones(20, int))
    with pytest.raises(CorruptData, match=r"no image with shot in \(8,\)"):
        datasets.load("orl_faces", tmp_path)
    with pytest.raises(MissingData, match=r"orl_faces: no pack .*nowhere/orl_faces\.npz"):
        datasets.load("orl_faces", tmp_path / "nowhere")


def test_real_orl_faces(real_data: Path) -> None:
    if not (real_data / "orl_faces.npz").exists():
        pytest.skip("no orl_faces.npz")
    packs = [datasets.load("orl_faces", real_data, split) for split in ("train", "val", "test")]
    assert [len(pack) for pack in packs] == [280, 40, 80]
    for pack, each in zip(packs, (7, 1, 2), strict=True):
        assert torch.bincount(pack.targets).tolist() == [each] * 40


def test_digits_are_scikit_learns() -> None:
    from sklearn.datasets import load_digits

    found = load_digits()
    packs = [datasets.load("digits", split=split) for split in ("train", "val", "test")]
    assert [len(pack) for pack in packs] == [1293, 144, 360]
    index = torch.cat([pack.extras["source_index"] for pack in packs])
    assert sorted(index.tolist()) == list(range(1797))
    values = torch.cat([pack.images for pack in packs])[..., 0].numpy()
    assert values.max() == 255
    assert np.array_equal(np.rint(values * (16 / 255)), found.images[index.numpy()])  # nothing is lost
    assert np.array_equal(torch.cat([pack.targets for pack in packs]).numpy(), found.target[index.numpy()])
    assert packs[0].mean == packs[2].mean
    assert min(torch.bincount(packs[2].targets)) >= 25
    with pytest.raises(ValueError, match="image_size=16 does not apply to digits"):
        datasets.load("digits", image_size=16)
