"""Perturbations of few parameters decided exactly: verdicts just above and below the truth, deviations, budgets."""

import itertools
import math

import pytest
import torch
from test_bounds import NETS, build, conv, images
from test_forward import heat_map_net
from torch import nn

import certify
from certify import Status
from certify.curves import Path

F64 = torch.float64
EXACT = ["relu", "max-pool", "residual, strided", "leaky", "relu6", "cat"]


def color_net(seed=0):
    torch.manual_seed(seed)
    features = (conv(3, 8, padding=1), nn.ReLU(), nn.MaxPool2d(2), conv(8, 8), nn.ReLU(), nn.Flatten())
    return nn.Sequential(*features, nn.Linear(32, 20), nn.ReLU(), nn.Linear(20, 6)).eval()


def color(n=3, dtype=torch.float32):
    x = torch.rand(n, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=dtype)
    x[0, :, :3] = 1.0
    return x


def outputs(net, p, x, count):
    """The network along a dense grid of parameters: (points, N, outputs)."""
    low, high = p.limits(x)
    side = count if p.parameters == 1 else math.isqrt(count)
    share = torch.linspace(0, 1, side, dtype=x.dtype)
    share = share.unsqueeze(1) if p.parameters == 1 else torch.cartesian_prod(share, share)
    t = low + (high - low) * share.unsqueeze(1)
    with torch.no_grad():
        parts = [net(p.apply(x, part[..., 0] if p.parameters == 1 else part).flatten(0, 1)) for part in t.split(500)]
    return torch.cat(parts).unflatten(0, (-1, len(x)))


def dense(net, x, p, count=2001, norm="linf"):
    """The largest deviation on a dense grid of parameters: (N,)."""
    moved = outputs(net, p, x, count) - net(x).detach()
    if norm == "point_l2":
        return moved.unflatten(-1, (-1, 2)).norm(dim=-1).amax((0, 2))
    return moved.abs().amax((0, 2))


FRAMES = torch.rand(3, 3, 3, 8, 8, generator=torch.Generator().manual_seed(5))
PERTURBATIONS = {
    "brightness": certify.Brightness(0.1),
    "unclipped": certify.Brightness(0.1, clip=False),
    "own radii": certify.Brightness(torch.tensor([0.0, 0.02, 0.2])),
    "contrast": certify.Contrast(0.2),
    "contrast about mean": certify.Contrast(0.2, about="mean"),
    "blur": certify.BlurMix(0.6),
    "saturation": certify.Saturation(0.3),
    "hue": certify.Hue(0.1),
    "curve": certify.Curve(torch.tensor([-1.0, 0.2, 1.0]), FRAMES),
    "rotation": certify.Rotation(3.0),
    "scale": certify.Scale(0.05),
    "both": certify.BrightnessContrast(0.02, 0.05),
}  # fmt: skip


@pytest.mark.parametrize("name", PERTURBATIONS)
def test_the_largest_deviation_is_enclosed(name):
    net, x, p = color_net(), color(), PERTURBATIONS[name]
    found = certify.deviation(net, x, p, tol=1e-4)
    seen = dense(net, x, p, 2001 if p.parameters == 1 else 961)
    assert not found.timeout.any()
    assert (found.upper >= seen - 2e-6).all()
    assert (found.upper - found.lower <= 1e-4 + 1e-6).all()
    assert (found.lower <= seen + 5e-3 * (1 + seen)).all()
    low, high = p.limits(x)
    assert ((found.argmax >= low - 1e-9) & (found.argmax <= high + 1e-9)).all()
    at = found.argmax[:, 0] if p.parameters == 1 else found.argmax
    with torch.no_grad():
        there = (net(p.apply(x, at.float())) - net(x)).abs().amax(1).double()
    torch.testing.assert_close(there, found.lower, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", EXACT)
def test_branching_and_enumeration_agree(name):
    net = build(name)
    x = images(net)
    p = certify.Contrast(0.3, about="half")
    branch = certify.deviation(net, x, p, tol=1e-7, method="branch")
    listed = certify.deviation(net, x, p, tol=1e-7, method="enumerate")
    assert (branch.lower <= listed.upper + 1e-9).all()
    assert (listed.lower <= branch.upper + 1e-9).all()
    assert (listed.upper - listed.lower <= 1e-9).all()
    assert (branch.upper - branch.lower <= 1.1e-7).all()
    assert (branch.work["pieces"] == 0).all()
    assert (listed.work["sub-intervals"] == 0).all()


@pytest.mark.parametrize("method", ["line", "line-branch", "line-enumerate"])
@pytest.mark.parametrize("name", ["residual, strided", "max-pool overlapping"])
def test_verdicts_just_above_and_below_the_truth(name, method):
    net = build(name).float()
    x = images(net).float()
    p = certify.Brightness(0.15)
    true = certify.deviation(net, x, p, tol=1e-6)
    for i in range(len(x)):
        for factor, status in ((1.01, Status.HOLDS), (0.999, Status.VIOLATED), (0.5, Status.VIOLATED)):
            spec = certify.Deviation(factor * true.lower[i].item())
            cert = certify.verify(net, x[i : i + 1], spec, p, method=method)
            assert cert.status.tolist() == [status], (i, factor)
            if status == Status.HOLDS:
                assert 0 < cert.lower.item() <= 0.01 * true.upper[i].item() * 1.001
            else:
                moved = net(cert.counterexamples) - net(x[i : i + 1])
                assert moved.abs().max() >= spec.delta
                replay = p.apply(x[i : i + 1], cert.parameters[:, 0])
                torch.testing.assert_close(replay, cert.counterexamples, atol=1e-6, rtol=0)
                assert cert.parameters.abs().item() <= 0.15 + 1e-7


def test_verdicts_are_monotone_in_the_radius_and_auto_is_the_line():
    net, x = color_net(), color(6)
    spec = certify.Deviation(0.005)
    held = []
    for eps in (0.0, 0.005, 0.01, 0.02, 0.1, 0.3):
        cert = certify.verify(net, x, spec, certify.Brightness(eps))
        assert cert.method == "auto"
        assert set(cert.work) == {"sub-intervals", "pieces"}
        assert ((cert.status == Status.HOLDS) | (cert.status == Status.VIOLATED)).all()
        held.append(cert.status == Status.HOLDS)
    for smaller, larger in itertools.pairwise(held):
        assert (larger <= smaller).all()
    assert held[0].all()
    assert not held[-1].any()


def test_classification_along_a_path():
    net, x = color_net(), color(8)
    y = net(x).argmax(1)
    p = certify.Contrast(0.6)
    cert = certify.verify(net, x, certify.Classification(y), p)
    seen = (outputs(net, p, x, 2001).argmax(2) == y).all(0)
    assert torch.equal(cert.status == Status.HOLDS, seen)
    broken = cert.status == Status.VIOLATED
    assert torch.equal(broken, ~seen)
    assert (net(cert.counterexamples[broken]).argmax(1) != y[broken]).all()


@pytest.mark.parametrize("factor", [1.02, 0.995])
def test_two_parameters_against_a_dense_grid(factor):
    net, x = color_net(), color()
    p = certify.BrightnessContrast(0.03, 0.06)
    true = certify.deviation(net, x, p, tol=1e-5)
    assert (dense(net, x, p, 41 * 41) <= true.upper + 1e-6).all()
    for i in range(len(x)):
        cert = certify.verify(net, x[i : i + 1], certify.Deviation(factor * true.lower[i].item()), p)
        assert cert.status.item() == (Status.HOLDS if factor > 1 else Status.VIOLATED)


def test_euclidean_deviations():
    net, x, p = color_net(), color(), certify.Brightness(0.1)
    found = certify.deviation(net, x, p, norm="point_l2", tol=1e-4)
    seen = dense(net, x, p, norm="point_l2")
    assert (found.upper >= seen - 2e-6).all()
    assert (found.upper - found.lower <= 1e-4 + 4e-4 * found.lower).all()
    for i in range(len(x)):
        for factor, status in ((1.01, Status.HOLDS), (0.999, Status.VIOLATED)):
            spec = certify.Deviation(factor * found.lower[i].item(), norm="point_l2")
            assert certify.verify(net, x[i : i + 1], spec, p).status.item() == status


def test_between_circle_and_polygon_it_is_unknown_not_wrong():
    """A straight motion of length 0.1 in the direction where the polygon of 128 chords is closest to the centre."""
    angle = torch.tensor(math.pi / 128)
    net = nn.Sequential(nn.Flatten(), nn.Linear(1, 2, bias=False)).eval()
    net[1].weight.data = torch.stack([angle.cos(), angle.sin()]).unsqueeze(1)
    x = torch.full((1, 1, 1, 1), 0.5)
    spec = certify.Deviation(0.1, norm="point_l2")
    status = [certify.verify(net, x, spec, certify.Brightness(0.1 * f)).status.item() for f in (0.9995, 0.9999, 1.001)]
    assert status == [Status.HOLDS, Status.UNKNOWN, Status.VIOLATED]


@pytest.mark.parametrize("name", ["sigmoid", "tanh"])
def test_smooth_networks_are_decided_by_branching(name):
    net = build(name)
    x = images(net)
    p = certify.Brightness(0.2)
    found = certify.deviation(net, x, p, tol=1e-5)
    seen = dense(net, x, p)
    assert (found.upper >= seen - 1e-9).all()
    assert (found.upper - found.lower <= 1.1e-5).all()
    with pytest.raises(certify.UnsupportedOperation, match="piecewise linear"):
        certify.deviation(net, x, p, method="enumerate")


def test_heat_map_heads():
    net = heat_map_net()
    x = torch.rand(3, 2, 8, 8, dtype=F64, generator=torch.Generator().manual_seed(7))
    p = certify.Brightness(0.3)
    for method in ("auto", "branch", "enumerate"):
        found = certify.deviation(net, x, p, tol=1e-5, method=method)
        seen = dense(net, x, p)
        assert (found.upper >= seen - 1e-9).all()
        assert (found.upper - found.lower <= 1.5e-5).all(), method


def test_a_pruned_network_masked_and_removed_are_the_same():
    net, x = color_net(), color()
    keep = torch.tensor([0, 2, 3, 6])
    masked = color_net()
    with torch.no_grad():
        gone = torch.ones(8, dtype=torch.bool)
        gone[keep] = False
        masked[0].weight[gone], masked[0].bias[gone] = 0, 0
        small = nn.Sequential(conv(3, 4, padding=1), *net[1:3], conv(4, 8), *net[4:]).eval()
        small[0].weight.copy_(net[0].weight[keep])
        small[0].bias.copy_(net[0].bias[keep])
        small[3].weight.copy_(net[3].weight[:, keep])
        small[3].bias.copy_(net[3].bias)
    p = certify.Brightness(0.1)
    for method in ("forward", "crown"):
        for a, b in zip(certify.bounds(masked, x, p, method), certify.bounds(small, x, p, method)):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
    one, two = (certify.deviation(m, x, p, tol=1e-4) for m in (masked, small))
    torch.testing.assert_close(one.lower, two.lower, atol=1e-5, rtol=0)
    torch.testing.assert_close(one.upper, two.upper, atol=1.5e-4, rtol=0)
    spec = certify.Deviation(one.lower.median().item() * 1.01)
    assert torch.equal(certify.verify(masked, x, spec, p).status, certify.verify(small, x, spec, p).status)


def test_batches_decide_as_single_images_do():
    net, x = color_net(), color(5)
    p = certify.Brightness(torch.tensor([0.01, 0.02, 0.04, 0.08, 0.16]))
    spec = certify.Deviation(0.03)
    together = certify.verify(net, x, spec, p, chunk=2)
    for i in range(5):
        alone = certify.verify(net, x[i : i + 1], spec, certify.Brightness(float(p.eps[i])))
        assert alone.status.item() == together.status[i].item()


def test_out_of_time_is_a_time_out():
    net, x = color_net(), color()
    found = certify.deviation(net, x, certify.Brightness(0.2), tol=1e-6, budget=certify.Budget(seconds=1e-9))
    assert found.timeout.all()
    assert (found.upper >= dense(net, x, certify.Brightness(0.2), 301)).all()
    p = certify.Brightness(0.2)
    exact = certify.deviation(net, x, p, tol=1e-4)
    spec = certify.Deviation(exact.upper.max().item() * 1.01)
    for method in ("line-branch", "line-enumerate"):
        late = certify.verify(net, x, spec, p, method=method, budget=certify.Budget(seconds=1e-9), attack=False)
        assert (late.status == Status.TIMEOUT).all()


def test_close_to_the_threshold_nothing_is_claimed():
    """The margin at t = 0.1 is exactly 0 in real arithmetic and lost in rounding: not HOLDS, whatever else."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(1, 1)).to(F64).eval()
    x = torch.full((1, 1, 1, 1), 0.5, dtype=F64)
    rows = torch.ones(1, 1, dtype=F64)
    with torch.no_grad():
        least = net(x - 0.1).item() if net[1].weight.item() > 0 else net(x + 0.1).item()
    p = certify.Brightness(0.1, clip=False)
    unsure = {Status.VIOLATED, Status.UNKNOWN}
    for shift, allowed in ((-1e-12, unsure), (0.0, unsure), (1e-12, {Status.UNKNOWN}), (1e-6, {Status.HOLDS})):
        assert certify.verify(net, x, certify.Linear(rows, -least + shift), p).status.item() in allowed


class Shift(Path):
    """A path of one's own: columns roll in, weighted; not declared piecewise linear."""

    clip = True
    name = "shift"

    def limits(self, x):
        return x.new_zeros(len(x), 1), x.new_ones(len(x), 1)

    def trace(self, x, t, image):
        return x + t.reshape(-1, 1, 1, 1) ** 2 * (x.roll(1, 3) - x)

    def enclose(self, x, lo, hi, image):
        start, end = self.trace(x, lo, image), self.trace(x, hi, image)
        radius = (x.roll(1, 3) - x).abs() * ((hi - lo) ** 2 / 4).reshape(-1, 1, 1, 1)
        return (start + end) / 2, (end - start) / 2, radius

    def describe(self):
        return "Shift()"

    def select(self, index, n):
        return self

    def check(self, x):
        return None


def test_a_path_of_ones_own():
    net, x = color_net(), color()
    found = certify.deviation(net, x, Shift(), tol=1e-3)
    seen = dense(net, x, Shift())
    assert (found.upper >= seen - 2e-6).all()
    assert (found.lower <= seen + 1e-3).all()


def test_bad_input_is_explained():
    net, x = color_net(), color()
    with pytest.raises(ValueError, match="few parameters"):
        certify.verify(net, x, certify.Deviation(1.0), certify.Linf(0.1), method="line")
    with pytest.raises(ValueError, match="few parameters"):
        certify.deviation(net, x, certify.Linf(0.1))
    with pytest.raises(ValueError, match="tol"):
        certify.deviation(net, x, certify.Brightness(0.1), tol=0.0)
    with pytest.raises(ValueError, match="norm"):
        certify.deviation(net, x, certify.Brightness(0.1), norm="l7")
    with pytest.raises(ValueError, match="unknown method"):
        certify.deviation(net, x, certify.Brightness(0.1), method="guess")
    with pytest.raises(ValueError, match="training mode"):
        certify.deviation(color_net().train(), x, certify.Brightness(0.1))
    with pytest.raises(ValueError, match="empty"):
        certify.deviation(net, x[:0], certify.Brightness(0.1))


def test_every_supported_network_has_a_verdict():
    p = certify.Brightness(0.02)
    for name in NETS:
        net = build(name)
        x = images(net)[1:2]
        cert = certify.verify(net, x, certify.Deviation(10.0), p, method="line")
        assert cert.status.item() == Status.HOLDS, name


def random_case(seed):
    """A random small network, images and perturbation."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)

    def choose(*options):
        return options[int(torch.randint(len(options), (1,), generator=generator))]

    layers, width = [], 3
    for _ in range(choose(1, 2, 3)):
        out = choose(3, 5, 8)
        layers += [conv(width, out, padding=1, stride=choose(1, 1, 2))]
        layers += [nn.BatchNorm2d(out)] if choose(True, False) else []
        layers += [choose(nn.ReLU(), nn.ReLU(), nn.LeakyReLU(0.2), nn.ReLU6(), nn.Hardtanh(-0.3, 0.4))]
        width = out
    layers += [choose(nn.Identity(), nn.MaxPool2d(2, ceil_mode=True), nn.MaxPool2d(3, 2, padding=1)), nn.Flatten()]
    features = nn.Sequential(*layers)
    with torch.no_grad():
        for _ in range(5):
            size = features(torch.rand(16, 3, 8, 8)).shape[1]
    net = nn.Sequential(*features, nn.Linear(size, 12), nn.ReLU(), nn.Linear(12, 4)).eval()
    x = (torch.rand(2, 3, 8, 8, generator=generator) * 255).round() / 255
    size = choose(0.003, 0.03, 0.2)
    p = choose(
        certify.Brightness(size), certify.Contrast(size, about=choose("zero", "mean", "half")), certify.BlurMix(size),
        certify.Saturation(size), certify.Hue(size), certify.Rotation(20 * size), certify.Scale(size),
        certify.BrightnessContrast(size / 4, size / 4),
    )  # fmt: skip
    return net, x, p


def check_random_case(seed):
    net, x, p = random_case(seed)
    seen = dense(net, x, p, 1500)
    found = certify.deviation(net, x, p, tol=1e-4, norm="linf")
    assert (found.upper >= seen - 2e-6).all(), seed
    assert (found.upper - found.lower <= 1.1e-4 + 1e-4 * found.lower).all(), seed
    for i in range(len(x)):
        spec = certify.Deviation(max(found.upper[i].item() * 1.003, 1e-4))
        assert certify.verify(net, x[i : i + 1], spec, p).status.item() == Status.HOLDS, seed
        if found.lower[i] > 1e-3:
            spec = certify.Deviation(found.lower[i].item() * 0.998)
            assert certify.verify(net, x[i : i + 1], spec, p).status.item() == Status.VIOLATED, seed


@pytest.mark.parametrize("seed", range(8))
def test_random_networks(seed):
    check_random_case(seed)


@pytest.mark.slow
def test_many_random_networks():
    for seed in range(1000, 1200):
        check_random_case(seed)
