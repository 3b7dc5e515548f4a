"""Perturbation sets against their formulas, their own samples and scipy."""

import numpy as np
import pytest
import torch
from scipy import ndimage

from certify.curves import Curve
from certify.perturbations import (
    L2,
    LUMA,
    AffineFamily,
    BlurMix,
    Box,
    Brightness,
    BrightnessContrast,
    Contrast,
    Linf,
    Saturation,
)

EPS = torch.tensor([0.0, 0.05, 0.3])


def images(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    x = torch.rand(3, 3, 6, 5, generator=torch.Generator().manual_seed(0), dtype=dtype)
    x[1, :, :2] = 0.0
    x[2, :, :2] = 1.0
    return x


X = images()
ALL = [
    Linf(EPS),
    Linf(0.1, clip=False),
    L2(EPS * 5),
    L2(0.7, clip=False),
    Box(X * 0.5, X * 0.5 + 0.25),
    Brightness(EPS),
    Brightness(0.2, clip=False),
    Contrast(EPS),
    Contrast(0.3, about="mean"),
    Contrast(0.3, about="half"),
    BrightnessContrast(EPS, 0.2),
    Saturation(0.6),
    BlurMix(EPS, sigma=0.8),
]
AFFINE = [p for p in ALL if isinstance(p, AffineFamily)]


@pytest.mark.parametrize("p", ALL, ids=lambda p: p.describe())
def test_samples_lie_in_the_hull_and_come_again_with_the_seed(p):
    drawn = p.sample(X, 200, torch.Generator().manual_seed(1))
    assert drawn.shape == (200, *X.shape)
    lo, hi = p.hull(X)
    assert lo.shape == hi.shape == X.shape
    assert bool((lo <= hi).all())
    assert bool((drawn >= lo - 1e-6).all())
    assert bool((drawn <= hi + 1e-6).all())
    if p.clip:
        assert float(drawn.min()) >= 0
        assert float(drawn.max()) <= 1
    assert torch.equal(drawn, p.sample(X, 200, torch.Generator().manual_seed(1)))
    assert not torch.equal(drawn, p.sample(X, 200, torch.Generator().manual_seed(2)))


@pytest.mark.parametrize("p", AFFINE, ids=lambda p: p.describe())
def test_the_hull_of_an_affine_family_is_attained_at_its_corners(p):
    low, high = p.limits(X)
    corners = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * p.parameters).reshape(-1, 1, p.parameters)
    ends = p.apply(X, low + (high - low) * corners)
    lo, hi = p.hull(X)
    torch.testing.assert_close(ends.amin(0), lo, atol=1e-6, rtol=0)
    torch.testing.assert_close(ends.amax(0), hi, atol=1e-6, rtol=0)


@pytest.mark.parametrize("p", AFFINE, ids=lambda p: p.describe())
def test_zero_parameters_change_nothing(p):
    assert torch.equal(p.apply(X, torch.zeros(3, p.parameters)), X)


def test_formulas():
    t = torch.tensor([-0.2, 0.0, 0.25])
    s = t.reshape(3, 1, 1, 1)
    grey = sum(weight * X[:, i : i + 1] for i, weight in enumerate(LUMA))
    mean = X.mean((1, 2, 3), keepdim=True)
    cases = [
        (Brightness(0.3), X + s),
        (Contrast(0.3), (1 + s) * X),
        (Contrast(0.3, about="mean"), mean + (1 + s) * (X - mean)),
        (Contrast(0.3, about="half"), 0.5 + (1 + s) * (X - 0.5)),
        (Saturation(0.3), grey + (1 + s) * (X - grey)),
    ]
    for p, expected in cases:
        torch.testing.assert_close(p.apply(X, t), expected.clamp(0, 1), msg=p.describe())
    both = BrightnessContrast(0.3, 0.3).apply(X, torch.stack([t, -t], 1))
    torch.testing.assert_close(both, ((1 - s) * X + s).clamp(0, 1))


def test_blur_agrees_with_scipy():
    sigma = 0.8
    blurred = BlurMix(1.0, sigma=sigma).apply(X, torch.ones(3))
    reach = max(1, round(3 * sigma))
    for image, ours in zip(X.numpy(), blurred.numpy()):
        for channel, mine in zip(image, ours):
            expected = ndimage.gaussian_filter(channel.astype(np.float64), sigma, mode="nearest", radius=reach)
            np.testing.assert_allclose(mine, expected, atol=1e-5)
    half = BlurMix(1.0, sigma=sigma).apply(X, torch.full((3,), 0.5))
    torch.testing.assert_close(half, (X + blurred) / 2, atol=1e-6, rtol=0)


def test_parameters_may_be_given_with_leading_axes_for_any_batch_size():
    p = Brightness(0.3)
    for n in (1, 3):
        x = X[:n]
        t = torch.linspace(-0.3, 0.3, 7 * n).reshape(7, n)
        several = p.apply(x, t)
        assert several.shape == (7, *x.shape)
        assert torch.equal(several, p.apply(x, t.unsqueeze(2)))
        for one, values in zip(several, t):
            assert torch.equal(one, p.apply(x, values))
            assert torch.equal(one, p.apply(x, values.unsqueeze(1)))
    assert torch.equal(p.apply(X, torch.tensor(0.1)), p.apply(X, torch.full((3,), 0.1)))
    assert BrightnessContrast(0.1, 0.1).apply(X, torch.zeros(4, 3, 2)).shape == (4, *X.shape)


def test_linf_cuts_offsets_and_l2_projects_them():
    offset = torch.randn(3, 3, 6, 5, generator=torch.Generator().manual_seed(3))
    moved = Linf(EPS, clip=False).apply(X, offset)
    assert bool(((moved - X).abs() <= EPS.reshape(3, 1, 1, 1) + 1e-6).all())
    assert torch.equal(moved[0], X[0])
    ball = L2(EPS, clip=False)
    norms = (ball.apply(X, offset) - X).flatten(1).norm(dim=1)
    torch.testing.assert_close(norms, EPS, atol=1e-5, rtol=1e-4)
    short = offset * 1e-3 / offset.flatten(1).norm(dim=1).reshape(3, 1, 1, 1)
    torch.testing.assert_close(ball.apply(X, short)[1:], (X + short)[1:])
    assert ball.apply(X, offset.expand(4, *offset.shape)).shape == (4, *X.shape)


def test_l2_samples_fill_the_ball_uniformly():
    x = torch.zeros(1, 2)
    norms = L2(1.0, clip=False).sample(x, 4000, torch.Generator().manual_seed(0)).norm(dim=2).flatten()
    assert float(norms.max()) <= 1 + 1e-6
    # Uniform on a disc: half of the mass lies within 1 / sqrt(2).
    assert abs(float((norms < 0.5**0.5).float().mean()) - 0.5) < 0.03


def test_box_keeps_fixed_pixels_and_interpolates():
    lo, hi = torch.zeros(3, 6, 5), torch.ones(3, 6, 5)
    hi[:, 0] = 0.0
    p = Box(lo, hi)
    drawn = p.sample(X, 20, torch.Generator().manual_seed(0))
    assert bool((drawn[:, :, :, 0] == 0).all())
    torch.testing.assert_close(p.apply(X, torch.full_like(X, 0.25))[:, :, 1:], torch.full((3, 3, 5, 5), 0.25))
    assert p.describe() == "Box(75 free of 90)"


class Elsewhere(torch.Tensor):
    """Stands for an index on another device: a tensor here cannot be indexed with it before it is brought here."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        assert func is not torch.Tensor.__getitem__, "indices should be on the same device as the indexed tensor"
        found = super().__torch_function__(func, types, args, kwargs or {})
        return found.as_subclass(torch.Tensor) if func is torch.Tensor.to else found


def test_radii_and_boxes_need_not_be_where_the_index_is():
    index, x = torch.tensor([2, 0]), images()
    curve = Curve(torch.tensor([0.0, 1.0]), torch.stack([x, 1 - x], 1))
    for p in (Linf(EPS), Brightness(EPS), BrightnessContrast(0.1, EPS), Box(0.5 * x, x), curve):
        here, there = p.select(index, 3), p.select(index.as_subclass(Elsewhere), 3)
        for a, b in zip(here.hull(x[index]), there.hull(x[index]), strict=True):
            assert torch.equal(a, b)


def test_describe_is_short():
    assert Linf(8 / 255).describe() == "Linf(0.03137)"
    assert Brightness(torch.tensor([0.1, 0.2])).describe() == "Brightness(0.1..0.2)"
    assert Contrast(0.02, about="mean").describe() == "Contrast(0.02, about=mean)"
    assert L2(0.5, clip=False).describe() == "L2(0.5, clip=False)"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Linf(-0.1), "finite number >= 0"),
        (lambda: Linf(float("nan")), "finite number >= 0"),
        (lambda: L2(torch.tensor([0.1, float("inf")])), "finite number >= 0"),
        (lambda: BrightnessContrast(0.1, -1.0), "eps_contrast"),
        (lambda: Box(torch.ones(2), torch.zeros(2)), "inverted box"),
        (lambda: Box(torch.tensor([float("nan")]), torch.ones(1)), "inverted box"),
        (lambda: Contrast(0.1, about="median"), "about must be"),
        (lambda: BlurMix(1.5), "eps <= 1"),
        (lambda: BlurMix(0.5, sigma=0.0), "sigma"),
        (lambda: Saturation(0.1).hull(X[:, :1]), "RGB"),
    ],
)
def test_bad_parameters_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("x", "p", "message"),
    [
        (X * 255, Linf(0.1), "pixel space"),
        ((X * 255).byte(), Linf(0.1), "divided by 255"),
        (X[0, 0, 0], Linf(0.1), "batch axis"),
        (X / 0, Linf(0.1), "NaN or infinity"),
        (X, Linf(torch.tensor([0.1, 0.2])), "2 radii for a batch of 3"),
    ],
)
def test_bad_images_are_refused(x, p, message):
    with pytest.raises(ValueError, match=message):
        p.check(x)


def test_images_outside_the_unit_range_are_fine_without_clipping():
    Linf(0.1, clip=False).check(X * 255)
    Box(X * 255, X * 255 + 1).check(X * 255)
