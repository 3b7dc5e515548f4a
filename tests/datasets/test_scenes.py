from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import datasets
from datasets import scenes, scenes_drawing, scenes_faces, scenes_flowers
from datasets.semantic import measures

KINDS = list(scenes.FAMILIES)


def unit(pictures: np.ndarray) -> np.ndarray:
    return pictures.astype(np.float64) / 255


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_is_a_function_of_seed_split_and_number_alone(kind: str) -> None:
    some = scenes.render_split(kind, "test", limit=6, image_size=32, workers=1)
    more = scenes.render_split(kind, "test", limit=9, image_size=32, workers=1)
    assert np.array_equal(some["images"], more["images"][:6])
    assert np.array_equal(some["extras"]["attributes"], more["extras"]["attributes"][:6])
    for changed in ({"split": "val"}, {"seed": 1}):
        other = scenes.render_split(kind, **{"split": "test", "limit": 6, "image_size": 32, "workers": 1, **changed})
        assert (other["images"] != some["images"]).any((1, 2, 3)).all()
    assert some["images"].shape == (6, 32, 32, 3)
    assert some["images"].dtype == np.uint8
    assert json.loads(json.dumps(some["meta"])) == some["meta"]
    assert some["meta"]["classes"][3].endswith(" 003")


@pytest.mark.parametrize("kind", KINDS)
def test_workers_do_not_change_images(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scenes, "_CHUNK", 2)
    seen: list[tuple[int, int]] = []
    alone = scenes.render_split(kind, "val", limit=4, image_size=16, workers=1)
    shared = scenes.render_split(
        kind, "val", limit=4, image_size=16, workers=2, progress=lambda done, total: seen.append((done, total))
    )
    assert np.array_equal(alone["images"], shared["images"])
    assert seen == [(2, 4), (4, 4)]


@pytest.mark.parametrize("kind", KINDS)
def test_an_edit_at_the_own_value_is_the_image_and_elsewhere_is_not(kind: str) -> None:
    family = scenes.family(kind)
    scene = family.sample(0, "train", 7, 20)
    own = family.render(scene, 32, None)
    for name in family.attributes:
        values = np.array([getattr(scene, name), 1.0])
        again = family.edit(scene, 32, {name: values})
        assert again.shape == (2, 32, 32, 3)
        assert np.array_equal(again[0], own[0])
        assert (again[1] != own[0]).any()
    both = {name: np.array([0.3, 0.9]) for name in family.attributes}
    together = family.edit(scene, 32, both)
    apart = [family.edit(scene, 32, {name: v[k : k + 1] for name, v in both.items()})[0] for k in (0, 1)]
    assert np.array_equal(together, np.stack(apart))


@pytest.mark.parametrize("kind", KINDS)
def test_warmth_grows_along_its_edit_and_luminance_hardly_moves(kind: str) -> None:
    family = scenes.family(kind)
    for index in range(4):
        pictures = unit(family.edit(family.sample(0, "train", index, 100), 48, {"warmth": np.linspace(0, 1, 6)}))
        ratio = pictures[..., 0].mean((1, 2)) / pictures[..., 2].mean((1, 2))
        assert (np.diff(ratio) > 0).all()
        assert ratio[-1] / ratio[0] > 1.5
    luma = scenes_drawing.light_colour(np.linspace(0, 1, 9)) @ np.array([0.2126, 0.7152, 0.0722])
    assert np.allclose(luma, 1, atol=1e-6)


def test_a_higher_sun_gives_more_light_and_shorter_shadows() -> None:
    family = scenes.family("flowers")
    for index in range(4):
        scene = family.sample(0, "train", index, 100)
        pictures = unit(family.edit(scene, 48, {"sun": np.linspace(0, 1, 6)}))
        assert (np.diff(pictures.mean((1, 2, 3))) > 0).all()
        ground = scenes_flowers._plant(scene, 48).height
        horizon = scenes_flowers._horizon(ground, scene.azimuth)
        low, high = (float((horizon > np.tan(np.radians(e))).mean()) for e in (7, 69))
        assert low > high
        assert high < 0.05


def test_the_horizon_of_a_wall_is_its_height_over_its_distance() -> None:
    ground = np.zeros((64, 64), dtype=np.float32)
    ground[:, 40:] = 1.0
    horizon = scenes_flowers._horizon(ground, 0.0)  # the sun stands to the right, behind the wall
    reaches = [0.025 * k**1.5 for k in range(1, scenes_flowers._HORIZON_STEPS + 1)]
    column = 37  # the wall begins 3 samples ahead, 3/32 of a unit
    nearest = min(r for r in reaches if round(r * 32) >= 3)
    assert horizon[5, column] == pytest.approx(0.55 / nearest, rel=1e-5)
    assert horizon[5, 50] == 0  # on top of the wall nothing stands in the way
    assert (scenes_flowers._horizon(ground, np.pi)[:, :40] == 0).all()  # and nothing does with the sun on the left


def test_a_smile_changes_the_face_and_nothing_else() -> None:
    family = scenes.family("faces")
    for index in range(4):
        scene = family.sample(0, "train", index, 100)
        pictures = family.edit(scene, 64, {"smile": np.array([0.0, 0.5, 1.0])}).astype(int)
        changed = np.abs(pictures[2] - pictures[0]).sum(-1) > 6
        assert 0.01 < changed.mean() < 0.35
        assert not changed[:12].any()
        assert not changed[:, :6].any()
        assert not changed[:, -6:].any()
        half, whole = (np.abs(pictures[k] - pictures[0]).mean() for k in (1, 2))
        assert 0 < half < whole
        rows = np.flatnonzero(changed.any(1))
        assert rows.max() > 36  # the mouth is in the lower half


@pytest.mark.parametrize(
    ("kind", "of"), [("flowers", scenes_flowers.species), ("faces", scenes_faces.identity)], ids=KINDS
)
def test_there_are_more_than_a_hundred_distinct_classes(kind: str, of) -> None:
    kinds = [of(k) for k in range(320)]
    assert len(set(kinds)) == 320
    assert of(7) == kinds[7]
    drawn = scenes.render_split(kind, "train", classes=130, limit=3, image_size=16, workers=1)
    assert drawn["targets"].tolist() == [0, 1, 2]
    assert len(drawn["meta"]["classes"]) == 130


@pytest.mark.parametrize("kind", KINDS)
def test_classes_can_be_told_apart(kind: str) -> None:
    """Nearest class mean on coarse pixels, trained on 8 images a class, does far better than chance on others."""

    def data(split: str, n: int) -> tuple[np.ndarray, np.ndarray]:
        drawn = scenes.render_split(kind, split, classes=6, limit=n, image_size=16, workers=1)
        return unit(drawn["images"]).reshape(n, -1), drawn["targets"]

    (x, y), (tx, ty) = data("train", 48), data("test", 24)
    means = np.stack([x[y == k].mean(0) for k in range(6)])
    guess = ((tx[:, None] - means) ** 2).sum(2).argmin(1)
    assert (guess == ty).mean() > 0.4


def test_resolutions_show_the_same_scene() -> None:
    import torch

    for kind, large_size in (("flowers", 224), ("faces", 128)):
        family = scenes.family(kind)
        scene = family.sample(0, "train", 3, 20)
        small, large = (
            torch.from_numpy(unit(family.render(scene, s, None))).permute(0, 3, 1, 2) for s in (64, large_size)
        )
        assert large.shape[-1] == large_size
        pooled = torch.nn.functional.interpolate(large, size=64, mode="area")
        assert float(measures.psnr(small, pooled)) > 22


def test_points_of_the_recurrence_are_spread_evenly() -> None:
    points = np.stack([scenes_drawing.spread(k, 2, 0) for k in range(256)])
    counts = np.histogram2d(*points.T, bins=8, range=[[0, 1], [0, 1]])[0]
    assert counts.min() >= 2  # random points leave about one of 64 cells empty and several with one
    assert counts.max() <= 7
    with_more = np.stack([scenes_drawing.spread(k, 2, 0) for k in range(300)])
    assert np.array_equal(points, with_more[:256])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"kind": "flower"},
            "unknown family of scenes 'flower', expected one of flowers, faces; did you mean 'flowers'",
        ),
        ({"split": "tset"}, "did you mean 'test'"),
        ({"variant": "paper"}, "unknown variant 'paper', expected one of quick, full"),
        ({"image_size": 8}, "16 to 512"),
        ({"limit": 0}, "limit must be at least 1"),
        ({"classes": 1}, "classes must be at least 2"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"workers": 0}, "workers must be at least 1"),
    ],
)
def test_bad_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        scenes.render_split(**{"kind": "flowers", "split": "test", **arguments})


def test_bad_edits() -> None:
    family = scenes.family("faces")
    scene = family.sample(0, "test", 0, 20)
    with pytest.raises(ValueError, match=r"unknown attribute of faces 'smiel', .* did you mean 'smile'"):
        family.edit(scene, 32, {"smiel": np.array([0.5])})
    for bad in (1.2, -0.1, float("nan")):
        with pytest.raises(ValueError, match=r"smile must lie in \[0, 1\]"):
            family.edit(scene, 32, {"smile": np.array([bad])})


def test_packs_come_from_the_cache_the_second_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = datasets.load("scenes_flowers", split="test", limit=5, image_size=16, cache=tmp_path, workers=1)
    monkeypatch.setattr(scenes, "render_split", lambda *a, **k: pytest.fail("rendered again"))
    again = datasets.load("scenes_flowers", split="test", limit=5, image_size=16, cache=tmp_path)
    assert first.fingerprint == again.fingerprint
    assert (first.num_outputs, first.image_size, first.task) == (20, 16, "classification")
    assert first.extras["attributes"].shape == (5, 2)
    assert first.extras["index"].tolist() == [0, 1, 2, 3, 4]
    assert first.meta["attributes"] == ["sun", "warmth"]
    with pytest.raises(ValueError, match="there is scenes_faces:quick, scenes_faces:full"):
        datasets.load("scenes_faces:half")
