"""Hue, user-given curves, rotation: against references, and enclosures against dense sampling."""

import colorsys
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms.functional as TF

import certify

F64 = torch.float64


def photo(n=2, size=7, seed=0):
    x = torch.rand(n, 3, size, size, dtype=F64, generator=torch.Generator().manual_seed(seed))
    x[0, :, 0] = 0.5  # grey pixels have no hue
    x[0, :, 1] = torch.tensor([1.0, 0.0, 0.0], dtype=F64).reshape(3, 1)
    x[0, :, 2] = 0.0
    return x


def curve(n=2, size=7):
    knots = torch.tensor([-0.2, 0.0, 0.05, 0.4], dtype=F64)
    points = torch.rand(n, 4, 3, size, size, dtype=F64, generator=torch.Generator().manual_seed(3)) * 1.4 - 0.2
    return certify.Curve(knots, points)


PATHS = {
    "hue": certify.Hue(0.4),
    "narrow hue": certify.Hue(torch.tensor([0.01, 0.003], dtype=F64)),
    "curve": curve(),
    "rotation": certify.Rotation(5.0),
    "wide rotation": certify.Rotation(120.0),
    "scale": certify.Scale(0.1),
    "wide scale": certify.Scale(0.7),
}


def test_hue_is_that_of_colorsys():
    x = photo()
    for t in (-0.37, -0.1, 0.0, 0.02, 0.5):
        turned = certify.Hue(0.5).apply(x, torch.full((2,), t, dtype=F64))
        for pixel, got in zip(x.permute(0, 2, 3, 1).reshape(-1, 3), turned.permute(0, 2, 3, 1).reshape(-1, 3)):
            h, s, v = colorsys.rgb_to_hsv(*pixel.tolist())
            np.testing.assert_allclose(got, colorsys.hsv_to_rgb((h + t) % 1, s, v), atol=1e-12)


def test_hue_is_that_of_torchvision():
    x = photo().float()
    turned = certify.Hue(0.5).apply(x, torch.tensor([0.1, 0.1]))
    torch.testing.assert_close(turned, TF.adjust_hue(x, 0.1), atol=2e-6, rtol=0)


def test_a_curve_interpolates():
    p, x = curve(), photo()
    for t in (-0.2, -0.13, 0.0, 0.03, 0.3, 0.4):
        got = p.apply(x, torch.full((2,), t, dtype=F64))
        points = p.images.flatten(2).numpy()
        expected = [[np.interp(t, p.knots.numpy(), points[i, :, j]) for j in range(points.shape[2])] for i in range(2)]
        np.testing.assert_allclose(got.flatten(1), np.clip(expected, 0, 1), atol=1e-12)


def test_rotation_is_that_of_grid_sample():
    x = photo(size=9)
    for degrees in (-33.0, 0.0, 4.0, 90.0):
        got = certify.Rotation(90.0).apply(x, torch.full((2,), degrees, dtype=F64))
        a = np.deg2rad(degrees)
        theta = torch.tensor([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0]], dtype=F64).expand(2, -1, -1)
        grid = F.affine_grid(theta, [2, 3, 9, 9], align_corners=True)
        torch.testing.assert_close(got, F.grid_sample(x, grid, align_corners=True), atol=1e-9, rtol=0)
    torch.testing.assert_close(certify.Rotation(5.0).apply(x, torch.zeros(2, dtype=F64)), x)
    quarter = certify.Rotation(90.0).apply(x, torch.full((2,), 90.0, dtype=F64))
    torch.testing.assert_close(quarter, torch.rot90(x, 1, (2, 3)))


def test_scaling_is_that_of_grid_sample():
    x = photo(size=9)
    for t in (-0.6, -0.1, 0.0, 0.03, 0.8):
        got = certify.Scale(0.9).apply(x, torch.full((2,), t, dtype=F64))
        theta = torch.tensor([[1 / (1 + t), 0, 0], [0, 1 / (1 + t), 0]], dtype=F64).expand(2, -1, -1)
        grid = F.affine_grid(theta, [2, 3, 9, 9], align_corners=True)
        torch.testing.assert_close(got, F.grid_sample(x, grid, align_corners=True), atol=1e-9, rtol=0)
    larger = certify.Scale(0.5).apply(x[..., 4:5, 4:5].expand(-1, -1, 9, 9), torch.full((2,), 0.5, dtype=F64))
    torch.testing.assert_close(larger, x[..., 4:5, 4:5].expand(-1, -1, 9, 9))  # a flat image stays flat as it grows


@pytest.mark.parametrize("name", PATHS)
def test_enclosures_contain_the_path(name):
    p, x = PATHS[name], photo()
    low, high = (end[:, 0] for end in p.limits(x))
    generator = torch.Generator().manual_seed(0)
    image = torch.arange(2)
    for width in (1.0, 0.3, 0.05, 0.002):
        for _ in range(6):
            lo = low + (high - low) * (1 - width) * torch.rand(2, dtype=F64, generator=generator)
            hi = lo + (high - low) * width
            centre, slope, radius = p.enclose(x, lo, hi, image)
            for s in torch.linspace(-1, 1, 61, dtype=F64):
                t = (lo + hi) / 2 + s * (hi - lo) / 2
                gap = (p.trace(x, t, image) - centre - s * slope).abs()
                assert (gap <= radius + 1e-9).all(), (width, float(s), (gap - radius).max())


@pytest.mark.parametrize("name", PATHS)
def test_the_hull_contains_samples_and_the_clip(name):
    p, x = PATHS[name], photo()
    lo, hi = p.hull(x)
    samples = p.sample(x, 200, torch.Generator().manual_seed(0))
    assert samples.shape == (200, *x.shape)
    assert ((samples >= lo - 1e-9) & (samples <= hi + 1e-9)).all()
    assert lo.min() >= 0
    assert hi.max() <= 1
    assert torch.equal(samples, p.sample(x, 200, torch.Generator().manual_seed(0)))


@pytest.mark.parametrize(
    ("p", "start", "widths"), [(certify.Rotation(20.0), 10.0, (0.1, 0.01)), (certify.Scale(0.5), 0.1, (2e-3, 2e-4))]
)
def test_remainders_fall_with_the_square_of_the_width_inside_cells(p, start, widths):
    x = photo(1, 9)
    image = torch.zeros(1, dtype=torch.int64)
    at = torch.tensor([start], dtype=F64)
    radii = [p.enclose(x, at, at + w, image)[2].median().item() for w in widths]
    assert 0 < radii[1] < radii[0] / 50


@pytest.mark.parametrize("name", ["hue", "curve"])
def test_between_bends_every_pixel_is_linear(name):
    p, x = PATHS[name], photo(size=4)
    if name == "curve":
        p = curve(size=4)
    low, high = (end[0, 0].item() for end in p.limits(x))
    bends = p.bends(x[:1], torch.tensor([0]))
    bends = torch.cat([torch.tensor([low, high], dtype=F64), bends[(bends > low) & (bends < high)]]).sort().values
    for a, b in itertools.pairwise(bends):
        if b - a > 1e-9:
            at = torch.stack([a, a + 0.37 * (b - a), b]) if b - a > 1e-6 else torch.stack([a, a, a])
            y = p.apply(x[:1], at.unsqueeze(1))
            torch.testing.assert_close(y[1], torch.lerp(y[0], y[2], 0.37 if b - a > 1e-6 else 0.0), atol=1e-9, rtol=0)
    assert len(bends) > 20


def test_bad_input_is_explained():
    x = photo()
    with pytest.raises(ValueError, match="half a turn"):
        certify.Hue(0.6)
    with pytest.raises(ValueError, match="RGB"):
        certify.Hue(0.1).apply(x[:, :1], torch.zeros(2))
    with pytest.raises(ValueError, match="below 1"):
        certify.Scale(torch.tensor([0.1, 1.0]))
    with pytest.raises(ValueError, match="Scale needs images"):
        certify.Scale(0.1).limits(x[0])
    with pytest.raises(ValueError, match="180"):
        certify.Rotation(200.0)
    with pytest.raises(ValueError, match="increasing"):
        certify.Curve(torch.tensor([0.0, 0.0]), torch.rand(1, 2, 3, 4, 4))
    with pytest.raises(ValueError, match="one for each knot"):
        certify.Curve(torch.tensor([0.0, 1.0]), torch.rand(1, 3, 3, 4, 4))
    with pytest.raises(ValueError, match="does not fit"):
        curve().check(x[:1])


def test_a_scale_near_one_is_enclosed_in_few_parts(monkeypatch):
    """Parts of equal length in t were as short everywhere as they have to be where points move fastest."""
    x, p = torch.rand(1, 1, 8, 8, dtype=torch.float64), certify.Scale(0.97)
    traced = []
    real = certify.Scale.trace
    monkeypatch.setattr(certify.Scale, "trace", lambda self, *a: (traced.append(1), real(self, *a))[1])
    low, high, image = torch.tensor([-0.97]).double(), torch.tensor([0.97]).double(), torch.tensor([0])
    centre, slope, width = p.enclose(x, low, high, image)
    assert len(traced) < 250
    for t in torch.linspace(-0.97, 0.97, 2001, dtype=torch.float64):
        line = centre + slope * (t / 0.97)
        assert bool(((real(p, x, t.reshape(1), image) - line).abs() <= width + 1e-9).all())
