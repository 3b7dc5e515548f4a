from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor, nn

import certify
import datasets
from datasets import rendered, semantic
from datasets.registry import Request
from datasets.semantic import measures
from datasets.semantic.transform import quantise

ALL = semantic.standard()


@pytest.fixture
def images() -> Tensor:
    return torch.rand(3, 3, 12, 16, generator=torch.Generator().manual_seed(0))


def flowers(tmp_path: Path, limit: int = 4, name: str = "scenes_flowers") -> datasets.Pack:
    request = Request(
        name, "test", tmp_path, tmp_path, variant="quick", image_size=16, workers=1, limit=limit, title=name
    )
    return rendered.load_scenes(request)


@dataclass(frozen=True)
class Broken:
    """Returns whatever `result` makes of the images."""

    kind: str
    name: str = "broken"

    def describe(self) -> dict:
        return {"name": self.name, "kind": self.kind}

    def edit(self, images: Tensor, index: Tensor, delta: Tensor) -> Tensor:
        return {
            "range": images + 2,
            "nan": images * math.nan,
            "shape": images[:, :, :-1],
            "rows": images[:1],
            "dtype": images.double(),
            "type": images.numpy(),
        }[self.kind]


# --- photometric -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transform", ALL, ids=lambda t: t.name)
def test_delta_zero_is_the_identity_and_rows_are_independent(transform, images: Tensor) -> None:
    assert isinstance(transform, semantic.SemanticTransform)
    zero = semantic.apply(transform, images, range(3), 0.0)
    assert torch.allclose(zero, images, atol=1e-6)
    mixed = semantic.apply(transform, images, range(3), torch.tensor([0.0, 0.4, 1.0]))
    for row, delta in enumerate((0.0, 0.4, 1.0)):
        alone = semantic.apply(transform, images[row : row + 1], [row], delta)
        assert torch.allclose(mixed[row], alone[0], atol=1e-6)
    assert not torch.allclose(mixed[2], images[2], atol=1e-2)


def test_brightness_and_contrast_are_what_they_say(images: Tensor) -> None:
    out = semantic.Brightness(0.4).edit(images, torch.arange(3), torch.tensor([0.5, 0.5, 0.5]))
    assert torch.allclose(out, (images + 0.2).clamp(0, 1))
    out = semantic.Contrast(0.5).edit(images, torch.arange(3), torch.ones(3))
    assert torch.allclose(out, 0.25 + 0.5 * images)


def test_a_hue_turned_by_120_degrees_three_times_comes_back(images: Tensor) -> None:
    soft = 0.4 + 0.2 * images  # inside the cube, so that nothing is clipped
    once = semantic.Hue(120.0)
    out = soft
    for _ in range(3):
        out = once.edit(out, torch.arange(3), torch.ones(3))
    assert torch.allclose(out, soft, atol=1e-5)
    grey = torch.full((1, 3, 4, 4), 0.5)
    assert torch.allclose(once.edit(grey, torch.zeros(1), torch.ones(1)), grey, atol=1e-5)
    weights = torch.tensor([0.299, 0.587, 0.114])
    turned = once.edit(soft, torch.arange(3), torch.ones(3))
    assert torch.allclose(
        torch.einsum("c,bchw->bhw", weights, turned), torch.einsum("c,bchw->bhw", weights, soft), atol=1e-5
    )


def test_warmth_changes_the_ratio_of_red_to_blue_by_the_square_of_the_gain(images: Tensor) -> None:
    soft = 0.3 + 0.1 * images
    out = semantic.Warmth(1.5).edit(soft, torch.arange(3), torch.tensor([0.0, 0.5, 1.0]))
    ratio = (out[:, 0] / out[:, 2]) / (soft[:, 0] / soft[:, 2])
    for row, delta in enumerate((0.0, 0.5, 1.0)):
        assert torch.allclose(ratio[row], torch.tensor(1.5 ** (2 * delta)).expand(12, 16), atol=1e-4)


def test_a_rotation_by_a_right_angle_is_exact_and_others_agree_with_scipy() -> None:
    square = torch.rand(1, 1, 9, 9, generator=torch.Generator().manual_seed(1))
    quarter = semantic.Rotation(90.0).edit(square, torch.zeros(1), torch.ones(1))
    assert torch.allclose(quarter, square.rot90(1, (2, 3)), atol=1e-5)
    smooth = torch.from_numpy(ndimage.gaussian_filter(square[0, 0].numpy(), 1.5))[None, None]
    out = semantic.Rotation(30.0).edit(smooth, torch.zeros(1), torch.ones(1))[0, 0].numpy()
    ours = ndimage.rotate(smooth[0, 0].numpy(), 30, reshape=False, order=1)
    assert np.abs(out - ours)[3:6, 3:6].max() < 1e-4


def test_blur_agrees_with_scipy(images: Tensor) -> None:
    out = semantic.Blur(1.2).edit(images, torch.arange(3), torch.tensor([0.5, 0.75, 1.0]))
    for row, delta in enumerate((0.5, 0.75, 1.0)):
        expected = ndimage.gaussian_filter(
            images[row].numpy().astype(np.float64), (0, 1.2 * delta, 1.2 * delta), mode="mirror", radius=(0, 4, 4)
        )
        assert np.abs(out[row].numpy() - expected).max() < 1e-5


@pytest.mark.parametrize(
    "make",
    [
        lambda: semantic.Brightness(2.0),
        lambda: semantic.Contrast(0.0),
        lambda: semantic.Hue(400.0),
        lambda: semantic.Warmth(0.0),
        lambda: semantic.Rotation(math.nan),
        lambda: semantic.Blur(0.0),
    ],
)
def test_amounts_out_of_range(make) -> None:
    with pytest.raises(ValueError, match=r"must lie in \["):
        make()


def test_colour_changes_refuse_grey_images() -> None:
    grey = torch.full((1, 1, 8, 8), 0.5)
    for transform in (semantic.Hue(), semantic.Warmth()):
        with pytest.raises(ValueError, match="needs RGB images, got 1 channel"):
            semantic.apply(transform, grey, [0], 0.5)


# --- checks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("range", r"'broken' returned span \[2, 3\]; .* lie in \[0, 1\]"),
        ("nan", "returned span"),
        ("shape", r"'broken' returned \(3, 3, 11, 16\) for images \(3, 3, 12, 16\)"),
        ("rows", r"returned \(1, 3, 12, 16\)"),
        ("dtype", "returned torch.float64"),
        ("type", "returned ndarray"),
    ],
)
def test_transforms_that_misbehave(kind: str, message: str, images: Tensor) -> None:
    with pytest.raises(ValueError, match=message):
        semantic.apply(Broken(kind), images, range(3), 0.5)


def test_bad_input(images: Tensor) -> None:
    warm = semantic.Warmth()
    with pytest.raises(ValueError, match=r"delta must lie in \[0, 1\], got 0.5 .. 1.5"):
        semantic.apply(warm, images, range(3), torch.tensor([0.5, 1.0, 1.5]))
    with pytest.raises(ValueError, match="delta must lie"):
        semantic.apply(warm, images, range(3), math.nan)
    with pytest.raises(ValueError, match=r"delta must have one entry for each of the 3 images, got \(2,\)"):
        semantic.apply(warm, images, range(3), torch.tensor([0.5, 1.0]))
    with pytest.raises(ValueError, match=r"index must have one entry for each of the 3"):
        semantic.apply(warm, images, [0], 0.5)
    with pytest.raises(ValueError, match="expected float images"):
        semantic.apply(warm, quantise(images), range(3), 0.5)
    with pytest.raises(ValueError, match=r"the images span \[1, 2\]"):
        semantic.apply(warm, images + 1, range(3), 0.5)


def test_fingerprints_tell_transforms_apart() -> None:
    prints = [semantic.fingerprint(t) for t in (*ALL, semantic.Warmth(1.5), semantic.Warmth(1.4))]
    assert len(set(prints)) == len(ALL) + 1
    assert prints[-1] == semantic.fingerprint(semantic.Warmth())
    assert "red light times 1.5" in semantic.law(semantic.Warmth(1.5))


# --- rendered again --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "attribute"), [("scenes_flowers", "sun"), ("scenes_faces", "smile")])
def test_scene_edits_begin_with_the_image_itself(tmp_path: Path, name: str, attribute: str) -> None:
    pack = flowers(tmp_path, name=name)
    edit = semantic.SceneEdit(pack, attribute)
    x, _ = pack.tensors()
    assert torch.equal(semantic.apply(edit, x, range(4), 0.0), x)
    out = semantic.apply(edit, x, range(4), 1.0)
    assert (quantise(out) != quantise(x)).flatten(1).any(1).all()
    shuffled = pack.subset([2, 0])
    x2, _ = shuffled.tensors()
    again = semantic.apply(semantic.SceneEdit(shuffled, attribute), x2, [0, 1], 1.0)
    assert torch.equal(again, out[[2, 0]])


def test_scene_edits_refuse_what_they_cannot_render(tmp_path: Path, pack: datasets.Pack) -> None:
    with pytest.raises(ValueError, match="tiny is not a set of rendered scenes"):
        semantic.SceneEdit(pack, "sun")
    scenes = flowers(tmp_path)
    with pytest.raises(ValueError, match="unknown attribute of flowers 'smile'"):
        semantic.SceneEdit(scenes, "smile")
    with pytest.raises(ValueError, match=r"span must lie in \(0, 0.5\]"):
        semantic.SceneEdit(scenes, "sun", 0.7)
    edit = semantic.SceneEdit(scenes, "sun")
    x, _ = scenes.tensors()
    with pytest.raises(ValueError, match="the images are not number 1 of scenes_flowers"):
        semantic.apply(edit, x[:1], [1], 0.5)
    with pytest.raises(IndexError, match="no image 9, the pack has 4"):
        semantic.apply(edit, x[:1], [9], 0.5)


# --- certificates ----------------------------------------------------------------------------------------------------


class Bright(nn.Module):
    """Class 1 exactly when the mean of an image exceeds a level."""

    def __init__(self, level: float) -> None:
        super().__init__()
        self.level = level

    def forward(self, x: Tensor) -> Tensor:
        margin = x.mean((1, 2, 3)) - self.level
        return torch.stack([-margin, margin], 1)


def test_a_certificate_over_draws_has_the_flip_rate_of_a_uniform_delta() -> None:
    x = torch.full((2, 3, 8, 8), 0.5)
    model = Bright(0.55 - 1 / 1000).eval()  # brightness rises by 0.2 * delta: labels flip for delta > 0.245
    draws = semantic.Draws(semantic.Brightness(0.2))
    cert = certify.estimate(model, x, torch.zeros(2, dtype=torch.int64), draws, eps=0.5, n_max=2000, early_stop=False)
    assert cert.n.tolist() == [2000, 2000]
    rate = cert.flips.double() / 2000
    # 8-bit pixels: 127.5 rounds to 128, and 0.549 is passed by 140 and above, so delta > (139.5 / 255 - .5) / .2
    expected = 1 - (139.5 / 255 - 0.5) / 0.2
    assert torch.allclose(rate, torch.full((2,), expected, dtype=torch.float64), atol=0.045)  # four deviations
    assert "delta uniform on [0, 1]" in cert.law
    again = certify.estimate(model, x, torch.zeros(2, dtype=torch.int64), draws, eps=0.5, n_max=2000, early_stop=False)
    assert again.fingerprint == cert.fingerprint
    assert torch.equal(again.flips, cert.flips)


def test_scenes_are_certified_by_their_place_in_the_pack(tmp_path: Path) -> None:
    pack = flowers(tmp_path)
    edit = semantic.SceneEdit(pack, "sun")
    chosen = [3, 1]
    x, _ = pack.tensors(chosen)
    draws = semantic.Draws(edit, indices=chosen)
    model = Bright(0.0).eval()  # always class 1
    cert = certify.estimate(model, x, torch.ones(2, dtype=torch.int64), draws, eps=0.2, n_max=32)
    assert cert.flips.tolist() == [0, 0]
    with pytest.raises(ValueError, match="the images are not number 0"):
        certify.estimate(model, x, torch.ones(2, dtype=torch.int64), semantic.Draws(edit), eps=0.2, n_max=32)
    with pytest.raises(IndexError, match="image 1 of the batch has no entry among the 1 indices"):
        semantic.Draws(edit, indices=[3]).for_image(1)


def test_draws_need_to_know_the_image(images: Tensor) -> None:
    draws = semantic.Draws(semantic.Warmth())
    with pytest.raises(ValueError, match="which image is this"):
        draws(images, generator=torch.Generator())
    with pytest.raises(ValueError, match="must be that image"):
        draws.for_image(0)(images, generator=torch.Generator())


# --- the picture -----------------------------------------------------------------------------------------------------


def test_the_grid_shows_every_edit_and_measures_it(tmp_path: Path) -> None:
    from PIL import Image

    pack = flowers(tmp_path)
    edits = [semantic.SceneEdit(pack, "warmth"), semantic.Warmth(), semantic.Warmth(2.0)]
    numbers = semantic.draw_grid(tmp_path / "out" / "grid.png", pack, edits, indices=[1, 2], deltas=[0, 0.5, 1])
    assert list(numbers) == ["flowers warmth", "warmth", "warmth (2)"]
    for measured in numbers.values():
        assert measured["warmth"][0] < measured["warmth"][1] < measured["warmth"][2]
    assert numbers["warmth"]["warmth"][0] == pytest.approx(float(measures.warmth(pack.tensors([1, 2])[0]).mean()))
    with Image.open(tmp_path / "out" / "grid.png") as picture:
        pixels = np.asarray(picture)
    assert pixels.shape[1] == 4 * 18
    first = pixels[28:44, 0:16]
    assert np.array_equal(first, pack.images[1].numpy())
    with pytest.raises(ValueError, match="at least one transform"):
        semantic.draw_grid(tmp_path / "none.png", pack, [])


def test_structure_ignores_light_and_sees_shapes(images: Tensor) -> None:
    smooth = torch.nn.functional.interpolate(images, size=(32, 32), mode="bilinear")
    lit = (0.6 * smooth + 0.1).clamp(0, 1)
    assert float(measures.structure(smooth, smooth).min()) == pytest.approx(1, abs=1e-5)
    assert float(measures.structure(smooth, lit).min()) > 0.95
    assert float(measures.structure(smooth, smooth.flip(0)).abs()[0]) < 0.4
    assert float(measures.psnr(smooth, smooth + 0.1).mean()) == pytest.approx(20, abs=1e-3)
    with pytest.raises(ValueError, match="did you mean 'warmth'"):
        measures.measure("warmt")
    with pytest.raises(ValueError, match="RGB images"):
        measures.warmth(smooth[:, :1])
