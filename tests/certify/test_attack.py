"""Attacks: exact answers where they are known, exact membership everywhere, and verdicts that survive a replay."""

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from certify import attack as attacks
from certify import lirpa
from certify.perturbations import (
    L2,
    AffineFamily,
    BlurMix,
    Box,
    Brightness,
    BrightnessContrast,
    Contrast,
    Linf,
    Perturbation,
    Saturation,
)
from certify.specs import Classification, Deviation, Linear, margin


def network(outputs: int = 6) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 6, 3, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.5),
        nn.Linear(54, outputs),
    )
    return net.eval()


def images(n: int = 5) -> Tensor:
    x = torch.rand(n, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    x[0, :, :3] = 0.0
    x[1, :, :3] = 1.0
    return x


NET, X = network(), images()
Y = NET(X).argmax(1)
EPS = torch.tensor([0.001, 0.02, 0.05, 0.1, 1 / 3])
ALL = [
    Linf(EPS),
    Linf(0.03, clip=False),
    L2(EPS * 5),
    L2(0.3, clip=False),
    Box(X - 0.05, X + 0.1),
    Brightness(EPS),
    Contrast(EPS),
    Saturation(0.7),
    BlurMix(1.0),
    BrightnessContrast(EPS, 0.2),
]


def linear(weights: Tensor) -> nn.Module:
    net = nn.Sequential(nn.Flatten(), nn.Linear(weights.shape[1], len(weights)))
    net[1].weight.data.copy_(weights)
    net[1].bias.data.zero_()
    return net


def assert_member(p: Perturbation, x: Tensor, found: attacks.Attack) -> None:
    """Membership in exact arithmetic, as far as float64 goes."""
    inputs, wide = found.inputs.double(), x.double()
    if isinstance(p, AffineFamily):
        low, high = p.limits(wide)
        assert bool((found.parameters.double() >= low).all())
        assert bool((found.parameters.double() <= high).all())
        assert torch.equal(found.inputs, p.apply(x, found.parameters))
    elif isinstance(p, L2):
        distance = (inputs - wide).flatten(1).norm(dim=1)
        assert bool((distance <= torch.as_tensor(p.eps, dtype=torch.float64)).all())
    else:
        lo, hi = p.hull(wide)
        assert bool((inputs >= lo).all())
        assert bool((inputs <= hi).all())
    if p.clip:
        assert bool(((inputs >= 0) & (inputs <= 1)).all())


@pytest.mark.parametrize("spec", [Classification(Y), Deviation(0.05), Deviation(0.05, norm="point_l2")])
@pytest.mark.parametrize("p", ALL, ids=lambda p: p.describe())
def test_what_comes_back_is_a_member_with_the_margin_it_claims(p, spec):
    found = attacks.attack(NET, X, spec, p, strength="quick", seed=3)
    assert_member(p, X, found)
    with torch.no_grad():
        reference = NET(X)
        assert torch.equal(found.margin, margin(spec, NET(found.inputs), reference))
    assert torch.equal(found.success, found.margin <= 0)
    assert bool((found.margin <= margin(spec, reference, reference) + 1e-6).all())
    again = attacks.attack(NET, X, spec, p, strength="quick", seed=3)
    assert torch.equal(again.inputs, found.inputs)


@pytest.mark.parametrize("p", ALL, ids=lambda p: p.describe())
def test_the_search_beats_random_sampling(p):
    spec = Classification(Y)
    sampled = attacks.probe(NET, X, spec, p, 300)
    found = attacks.attack(NET, X, spec, p)
    assert bool((found.margin <= sampled + 1e-6).all())
    assert bool((sampled <= margin(spec, NET(X), NET(X))).all())


def test_linf_reaches_the_exact_minimum_of_a_linear_network():
    w = torch.randn(3, 48, generator=torch.Generator().manual_seed(0))
    x = torch.rand(4, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    net, y = linear(w), torch.tensor([0, 1, 2, 0])
    rows = Classification(y).rows(net(x)).C @ w
    for p in (Linf(EPS[:4]), Linf(0.2), Linf(0.2, clip=False), Box(x * 0.5, x * 0.5 + 0.25)):
        lo, hi = (v.flatten(1).unsqueeze(1) for v in p.hull(x))
        exact = torch.where(rows > 0, rows * lo, rows * hi).sum(2).amin(1) + 100
        # The offset keeps every image unbroken: broken ones are left alone.
        found = attacks.pgd(net, x, Linear(Classification(y).rows(net(x)).C, 100.0), p, steps=20, restarts=3)
        torch.testing.assert_close(found.margin, exact, atol=1e-4, rtol=0)


def test_fgsm_is_exact_where_one_row_decides():
    w = torch.randn(2, 48, generator=torch.Generator().manual_seed(0))
    x = torch.rand(4, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    net, y = linear(w), torch.tensor([0, 1, 1, 0])
    sign = torch.where(y == 0, 1.0, -1.0)
    row = sign.unsqueeze(1) * (w[0] - w[1])
    clean = (row * x.flatten(1)).sum(1) + 100
    spec = Linear(Classification(y).rows(net(x)).C, 100.0)
    found = attacks.fgsm(net, x, spec, Linf(0.07, clip=False))
    torch.testing.assert_close(found.margin, clean - 0.07 * row.abs().sum(1), atol=1e-4, rtol=0)
    found = attacks.fgsm(net, x, spec, L2(0.6, clip=False))
    torch.testing.assert_close(found.margin, clean - 0.6 * row.norm(dim=1), atol=1e-4, rtol=0)


def test_l2_respects_ball_and_box_together():
    # Minimise sum(x) from a corner-near point: the optimum moves only the pixel that has room.
    net = linear(torch.ones(1, 3))
    x = torch.tensor([[[[0.0, 0.0, 0.9]]]])
    found = attacks.pgd(net, x, Linear(torch.ones(1, 1)), L2(0.5), steps=50)
    torch.testing.assert_close(found.inputs.flatten(), torch.tensor([0.0, 0.0, 0.4]), atol=1e-4, rtol=0)


@pytest.mark.parametrize("p", [Brightness(0.4), Contrast(0.6), BlurMix(1.0)], ids=lambda p: p.describe())
def test_one_parameter_is_searched_to_the_bottom(p):
    net = network()
    for layer in net:
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.weight.data.mul_(4)  # many kinks along the path
    y = net(X).argmax(1)
    with torch.no_grad():
        low, high = (float(v[0, 0]) for v in p.limits(X))
        t = torch.linspace(low, high, 20001).reshape(-1, 1).expand(-1, len(X))
        outputs = torch.cat([net(p.apply(X, s).flatten(0, 1)) for s in t.split(1000)]).unflatten(0, (-1, len(X)))
        dense = margin(Classification(y), outputs, net(X)).amin(0)
    found = attacks.attack(net, X, Classification(y), p)
    scale = float(dense.abs().max())
    assert bool((found.margin <= dense + 1e-3 * scale).all())


def test_two_parameters_find_a_hidden_minimum():
    class Bowl(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            # Brightness and gain are read off two pixels; the minimum lies strictly inside, away from any grid point.
            b, c = x[:, 0, 0, 0], x[:, 0, 0, 1] - x[:, 0, 0, 0]
            return ((b - 0.0137).abs() * 10 + (c - 0.5577).abs() * 10).unsqueeze(1)

    x = torch.tensor([[[[0.0, 0.5]]]])
    found = attacks.attack(
        Bowl(), x, Linear(torch.ones(1, 1)), BrightnessContrast(0.1, 0.2, clip=False), strength="strong"
    )
    assert float(found.margin) < 0.02
    torch.testing.assert_close(found.parameters, torch.tensor([[0.0137, 0.1154]]), atol=3e-3, rtol=0)


def test_a_polygon_row_alone_is_not_a_violation():
    # The output moves to a distance between the inscribed polygon and the disc, along an edge's normal.
    spec = Deviation(1.0, norm="point_l2", directions=4)
    net = linear(torch.tensor([[1.0], [1.0]]))  # the direction of pi / 4 is a normal of the square
    x = torch.zeros(1, 1)
    reach = 0.9 / 2**0.5
    found = attacks.attack(net, x, spec, Linf(reach, clip=False))
    with torch.no_grad():
        rows = spec.rows(net(x))
        assert float((rows.C[0] @ net(torch.tensor([[reach]]))[0] + rows.d[0]).min()) < 0
    assert not bool(found.success)
    assert float(found.margin) == pytest.approx(0.1, abs=1e-5)
    assert bool(attacks.attack(net, x, spec, Linf(1.01 / 2**0.5, clip=False)).success)


def test_broken_images_do_not_stop_the_others():
    # The first image is wrong from the start; the second needs the search.
    y = torch.stack([(Y[0] + 1) % 6, Y[4]])
    found = attacks.attack(NET, X[[0, 4]], Classification(y), Linf(torch.tensor([1e-4, 0.3])), strength="strong")
    assert found.success.tolist() == [True, True]


def test_the_model_comes_back_as_it_was():
    net = network().train()
    net[1].eval()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    modes = [m.training for m in net.modules()]
    attacks.attack(net, X, Classification(Y), Linf(0.05), strength="quick")
    attacks.probe(net, X, Classification(Y), Linf(0.05), 10)
    assert [m.training for m in net.modules()] == modes
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert all(v.grad is None for v in net.parameters())


def test_float64_and_sets_that_float32_cannot_hit():
    found = attacks.attack(network().double(), X.double(), Classification(Y), Linf(0.1), strength="quick")
    assert found.inputs.dtype == torch.float64
    assert_member(Linf(0.1), X.double(), found)
    # A fixed pixel whose value float32 does not have: the nearest one is used.
    fixed = torch.full((1, 4), 0.1, dtype=torch.float64)
    wide = torch.cat([fixed[:, :3], fixed[:, 3:] + 1], 1)
    net = linear(torch.ones(2, 4))
    found = attacks.attack(net, fixed.float(), Linear(torch.ones(1, 2)), Box(fixed, wide))
    assert torch.equal(found.inputs[0, :3], fixed[0, :3].float())


def test_an_unknown_perturbation_is_sampled():
    @dataclasses.dataclass(frozen=True, eq=False)
    class Flip(Perturbation):
        clip: bool = True
        name = "flip"

        def hull(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return torch.minimum(x, x.flip(-1)), torch.maximum(x, x.flip(-1))

        def apply(self, x: Tensor, t: Tensor) -> Tensor:
            return torch.where(t.reshape(-1, 1, 1, 1) > 0.5, x.flip(-1), x)

        def sample(self, x: Tensor, n: int, generator: torch.Generator | None = None) -> Tensor:
            return torch.stack([self.apply(x, torch.rand(len(x), generator=generator)) for _ in range(n)])

    spec = Classification(Y)
    found = attacks.attack(NET, X, spec, Flip(), strength="quick")
    expected = torch.minimum(margin(spec, NET(X), NET(X)), margin(spec, NET(X.flip(-1)), NET(X)))
    torch.testing.assert_close(found.margin, expected, atol=1e-5, rtol=0)
    with pytest.raises(TypeError, match="PGD needs"):
        attacks.pgd(NET, X, spec, Flip())


@pytest.mark.parametrize("p", [Linf(EPS), L2(EPS * 5), Brightness(EPS), BrightnessContrast(0.05, EPS)])
@pytest.mark.skipif(not lirpa.available(), reason="auto-LiRPA is not installed")
def test_no_attack_passes_a_certified_bound(p):
    lower, _ = lirpa.bounds(NET, X, p, "CROWN", Classification(Y).rows(NET(X)).C)
    found = attacks.attack(NET, X, Classification(Y), p, strength="strong")
    assert bool((found.margin >= lower.amin(1) - 1e-4).all())


@pytest.mark.parametrize("p", ALL, ids=lambda p: p.describe())
@pytest.mark.parametrize("init", ["uniform", "zero"])
def test_adversarial_examples_are_members_and_raise_the_loss(p, init):
    net, y = network(), Y
    for objective in ("ce", "margin", lambda out, y: nn.functional.cross_entropy(out, y)):
        g = torch.Generator().manual_seed(0)
        moved = attacks.adversarial(net, X, y, p, objective=objective, steps=10, init=init, generator=g)
        assert not moved.requires_grad
        lo, hi = p.hull(X)
        assert bool((moved >= lo - 1e-6).all())
        assert bool((moved <= hi + 1e-6).all())
        if isinstance(p, L2):
            norms = (moved - X).flatten(1).norm(dim=1)
            assert bool((norms <= torch.as_tensor(p.eps) * (1 + 1e-5) + 1e-6).all())
        if isinstance(p, AffineFamily) and init == "uniform":
            continue  # one or two parameters: where a random start ends is a matter of luck
        random = p.sample(X, 50, g).flatten(0, 1)
        with torch.no_grad():
            usual = nn.functional.cross_entropy(net(random), y.repeat(50))
            assert float(nn.functional.cross_entropy(net(moved), y)) > float(usual)
    assert all(v.grad is None for v in net.parameters())


def test_one_step_from_zero_is_fgsm():
    x = X[2:].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(nn.functional.cross_entropy(NET(x), Y[2:]), x)
    expected = (X[2:] + 0.05 * gradient.sign()).clamp(0, 1)
    moved = attacks.adversarial(NET, X[2:], Y[2:], Linf(0.05), init="zero", step_size=1.0)
    torch.testing.assert_close(moved, expected)


def test_adversarial_starts_come_from_the_generator():
    make = [attacks.adversarial(NET, X, Y, Linf(0.05), generator=torch.Generator().manual_seed(s)) for s in (0, 0, 1)]
    assert torch.equal(make[0], make[1])
    assert not torch.equal(make[0], make[2])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: attacks.attack(NET, X, Classification(Y), Linf(0.1), strength="max"), ValueError, "unknown strength"),
        (lambda: attacks.attack(NET, X * 255, Classification(Y), Linf(0.1)), ValueError, "pixel space"),
        (lambda: attacks.pgd(NET, X, Classification(Y), Linf(0.1), steps=0), ValueError, "steps >= 1"),
        (lambda: attacks.grid(NET, X, Classification(Y), Linf(0.1)), TypeError, "affine family"),
        (lambda: attacks.grid(NET, X, Classification(Y), Brightness(0.1), points=1), ValueError, "2 points"),
        (lambda: attacks.adversarial(NET, X, Y, Linf(0.1), init="corner"), ValueError, "init must be"),
        (lambda: attacks.adversarial(NET, X, Y, Linf(0.1), objective="kl"), ValueError, "objective must be"),
    ],
)
def test_bad_arguments_are_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_nan_outputs_are_reported():
    net = network()
    net[-1].weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        attacks.attack(net, X, Classification(Y), Linf(0.1))
