from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

import certify
import datasets
from datasets import semantic
from datasets.errors import CorruptData
from datasets.semantic import store as storage
from datasets.semantic.store import deltas, image_hash
from datasets.semantic.transform import quantise


@dataclass(frozen=True)
class Counting:
    """Brightness that counts the images it was asked for; `salt` makes it another generator."""

    made: list[int] = field(default_factory=list)
    salt: list[float] = field(default_factory=lambda: [0.0])
    name: str = "counting"

    def describe(self) -> dict:
        return {"name": self.name, "delta_1": "+0.5"}

    def edit(self, images: Tensor, index: Tensor, delta: Tensor) -> Tensor:
        self.made.append(len(images))
        return (images * 0.5 + 0.5 * delta[:, None, None, None] + self.salt[0]).clamp(0, 1)


@pytest.fixture
def image() -> Tensor:
    return torch.rand(3, 6, 5, generator=torch.Generator().manual_seed(3))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_strengths_are_uniform_and_a_longer_sequence_begins_with_the_shorter(image: Tensor) -> None:
    one = deltas(5, image_hash(image), 4000)
    assert torch.equal(one[:100], deltas(5, image_hash(image), 100))
    assert torch.equal(one[100:300], deltas(5, image_hash(image), 200, first=100))
    assert stats.kstest(one.numpy(), "uniform").pvalue > 1e-3
    assert not torch.equal(one[:9], deltas(6, image_hash(image), 9))
    assert not torch.equal(one[:9], deltas(5, image_hash(image.flip(2)), 9))


def test_images_are_made_once_and_topped_up(tmp_path: Path, image: Tensor) -> None:
    made = Counting()
    store = semantic.EditStore(tmp_path, made)
    first, strengths = store.take(image, 0, 7, 300)
    assert sum(made.made) == 300
    expected = quantise((image * 0.5 + 0.5 * strengths[:, None, None, None]).clamp(0, 1))
    assert torch.equal(first, expected)
    more, longer = semantic.EditStore(tmp_path, made).take(image, 0, 7, 700)
    assert sum(made.made) == 700
    assert torch.equal(more[:300], first)
    assert torch.equal(longer[:300], strengths)
    fewer, _ = semantic.EditStore(tmp_path, made).take(image, 0, 7, 10)
    assert sum(made.made) == 700
    assert torch.equal(fewer, first[:10])
    reopened = semantic.EditStore(tmp_path, made)
    assert len(reopened) == reopened.verify() == 700
    assert len(list((reopened.folder / "shards").iterdir())) == 3


def test_stores_filled_apart_are_equal_byte_for_byte(tmp_path: Path, image: Tensor) -> None:
    for name in ("a", "b"):
        store = semantic.EditStore(tmp_path / name, semantic.Warmth(), "train")
        store.take(image, 2, 0, 20)
        store.take(image.flip(1), 3, 0, 5)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert store.folder.name == "train"
    stated = json.loads((store.folder / "manifest.json").read_text())
    assert stated["transform"] == semantic.Warmth().describe()
    assert stated["fingerprint"] == semantic.fingerprint(semantic.Warmth())


def test_a_damaged_shard_is_noticed_and_made_again(tmp_path: Path, image: Tensor) -> None:
    made = Counting()
    store = semantic.EditStore(tmp_path, made)
    pixels, _ = store.take(image, 0, 1, 40)
    shard = next((store.folder / "shards").iterdir())
    sound = shard.read_bytes()
    shard.write_bytes(sound[:200] + bytes([sound[200] ^ 1]) + sound[201:])
    with pytest.raises(CorruptData):
        semantic.EditStore(tmp_path, made).verify()
    with pytest.warns(RuntimeWarning, match="the shard is made again"):
        again, _ = semantic.EditStore(tmp_path, made).take(image, 0, 1, 40)
    assert torch.equal(again, pixels)
    assert semantic.EditStore(tmp_path, made).verify() == 40


def test_other_images_in_place_of_a_lost_shard_are_refused(tmp_path: Path, image: Tensor) -> None:
    made = Counting()
    store = semantic.EditStore(tmp_path, made)
    store.take(image, 0, 1, 8)
    next((store.folder / "shards").iterdir()).unlink()
    made.salt[0] = 0.1  # says it is the same generator and is not
    with pytest.warns(RuntimeWarning), pytest.raises(CorruptData, match="are not the ones it held"):
        semantic.EditStore(tmp_path, made).take(image, 0, 1, 8)


def test_a_line_cut_short_by_a_kill_is_dropped_and_others_are_not_guessed(tmp_path: Path, image: Tensor) -> None:
    made = Counting()
    store = semantic.EditStore(tmp_path, made)
    first, _ = store.take(image, 0, 1, 8)
    store.take(image, 0, 2, 8)
    lines = store.folder / "shards.jsonl"
    lines.write_bytes(lines.read_bytes()[:-20])
    reopened = semantic.EditStore(tmp_path, made)
    assert len(reopened) == 8
    assert torch.equal(reopened.take(image, 0, 1, 8)[0], first)
    assert sum(made.made) == 16
    reopened.take(image, 0, 2, 8)
    assert semantic.EditStore(tmp_path, made).verify() == 16
    lines.write_text("{}\n")
    with pytest.raises(CorruptData, match=r"shards\.jsonl, line 1: not a shard's line"):
        semantic.EditStore(tmp_path, made)
    (store.folder / "manifest.json").write_text("{")
    with pytest.raises(CorruptData, match="not a manifest"):
        semantic.EditStore(tmp_path, made)


def test_a_shard_of_another_draw_is_not_taken_for_this_one(tmp_path: Path, image: Tensor) -> None:
    store = semantic.EditStore(tmp_path, semantic.Warmth())
    store.take(image, 0, 1, 8)
    store.take(image, 0, 2, 8)
    a, b = sorted((store.folder / "shards").iterdir())
    a.write_bytes(b.read_bytes())  # sound by itself
    with pytest.raises(CorruptData, match=r"not the images that shards\.jsonl lists"):
        semantic.EditStore(tmp_path, semantic.Warmth()).verify()


def test_bad_requests(tmp_path: Path, image: Tensor) -> None:
    store = semantic.EditStore(tmp_path, semantic.Warmth())
    for stream, count in ((-1, 5), (0, 0)):
        with pytest.raises(ValueError, match="stream must be >= 0 and count >= 1"):
            store.take(image, 0, stream, count)
    with pytest.raises(ValueError, match="holds images of another transform than 'hue'"):
        semantic.Draws(semantic.Hue(), store=store)


def test_exactly_the_stored_pixels_are_certified(tmp_path: Path) -> None:
    x = torch.rand(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    seen: list[Tensor] = []

    class Watch(torch.nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            seen.append(images.clone())
            return images.mean((1, 2, 3))[:, None] * torch.tensor([0.0, 1.0])

    made = Counting()
    y = torch.ones(2, dtype=torch.int64)
    draws = semantic.Draws(made, store=semantic.EditStore(tmp_path, made))
    cert = certify.estimate(Watch().eval(), x, y, draws, eps=0.05, n_max=100, batch=32)
    stored = semantic.EditStore(tmp_path, made)
    stored.verify()
    kept = {
        p.tobytes()
        for shard in (stored.folder / "shards").iterdir()
        for p in np.load(shard, allow_pickle=False)["images"]
    }
    transformed = torch.cat(seen[1:])
    assert len(transformed) == 200
    assert {p.numpy().tobytes() for p in quantise(transformed)} <= kept
    assert torch.equal(quantise(transformed).float() / 255, transformed)
    before = sum(made.made)
    again = certify.estimate(Watch().eval(), x, y, draws, eps=0.05, n_max=100, batch=32)
    assert sum(made.made) == before
    assert again.fingerprint == cert.fingerprint
    more = certify.estimate(Watch().eval(), x, y, draws, eps=0.05, n_max=150, batch=32)  # 1 + 22 rows a block more
    assert sum(made.made) == before + 2 * 50
    assert more.flips.tolist() == [0, 0]
    unstored = certify.estimate(Watch().eval(), x, y, semantic.Draws(made), eps=0.05, n_max=100, batch=32)
    assert unstored.fingerprint == cert.fingerprint


# --- augmentation ----------------------------------------------------------------------------------------------------


def test_augmented_packs_pair_every_edited_image_with_an_original(tmp_path: Path, pack: datasets.Pack) -> None:
    store = semantic.EditStore(tmp_path, semantic.Brightness(0.5), "train")
    more = semantic.augment(pack, semantic.Brightness(0.5), 75, seed=4, store=store)
    assert len(more) == 105
    assert torch.equal(more.images[:30], pack.images)
    edited, originals = semantic.pairs(more)
    assert edited.tolist() == list(range(30, 105))
    assert torch.equal(more.targets[edited], pack.targets[originals])
    assert sorted(originals[:30].tolist()) == list(range(30))  # all once before any twice
    assert torch.bincount(originals, minlength=30).max() == 3
    delta = more.extras["delta"]
    assert (delta[:30] == 0).all()
    expected = (pack.images[originals].float() / 255 + 0.5 * delta[edited][:, None, None, None]).clamp(0, 1)
    assert (more.images[edited].float() - 255 * expected).abs().max() <= 0.501
    assert len(delta[edited].unique()) == 75
    fewer = semantic.augment(pack, semantic.Brightness(0.5), 40, seed=4)
    assert torch.equal(fewer.images, more.images[:70])
    assert more.meta["semantic"]["count"] == 75
    assert json.loads(json.dumps(more.meta)) == more.meta
    other = semantic.augment(pack, semantic.Brightness(0.5), 40, seed=5)
    assert not torch.equal(other.extras["original"], fewer.extras["original"])


def test_images_are_edited_together_once_and_one_that_is_lost_is_made_alone(
    tmp_path: Path, pack: datasets.Pack
) -> None:
    made = Counting()
    without = semantic.augment(pack, made, 30)
    assert made.made == [30]
    first = semantic.augment(pack, made, 30, store=semantic.EditStore(tmp_path, made, "train"))
    assert made.made == [30, 30]
    assert torch.equal(first.images, without.images)
    store = semantic.EditStore(tmp_path, made, "train")
    assert torch.equal(semantic.augment(pack, made, 30, store=store).images, first.images)
    assert made.made == [30, 30]  # all found
    lines = (store.folder / "shards.jsonl").read_text().splitlines(keepends=True)
    (store.folder / "shards.jsonl").write_text("".join(lines[:-1]))  # as if killed before the last line
    again = semantic.augment(pack, made, 30, store=semantic.EditStore(tmp_path, made, "train"))
    assert made.made == [30, 30, 1]
    assert torch.equal(again.images, first.images)


def test_missing_pairs(pack: datasets.Pack) -> None:
    with pytest.raises(ValueError, match="no pairs of originals and edited images"):
        semantic.pairs(pack)
    none = semantic.augment(pack, semantic.Warmth(), 0)
    assert len(none) == 30
    with pytest.raises(ValueError, match="augmented with 0 images"):
        semantic.pairs(none)
    some = semantic.augment(pack, semantic.Warmth(), 10)
    with pytest.raises(ValueError, match="originals are missing"):
        semantic.pairs(some.subset(range(20, 40)))
    with pytest.raises(ValueError, match="holds edited images already"):
        semantic.augment(some, semantic.Warmth(), 5)
    with pytest.raises(ValueError, match="count must be at least 0"):
        semantic.augment(pack, semantic.Warmth(), -1)
    points = datasets.Pack("k", "train", pack.images, torch.zeros(30, 4), ("a", "b"))
    with pytest.raises(ValueError, match="might move keypoints"):
        semantic.augment(points, semantic.Warmth(), 1)


def test_rows_a_shard_is_part_of_the_layout() -> None:
    assert (storage.ROWS, storage.VERSION) == (256, 1)


def test_the_readme_works_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = (Path(semantic.__file__).parent / "README.md").read_text()
    code = text.split("```python\n")[1].split("```")[0]
    exec(compile(code, "README.md", "exec"), {})
    assert list((tmp_path / "edits").glob("*/test/manifest.json"))
