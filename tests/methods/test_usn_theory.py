"""Lipschitz constants, Theorem 3.1 and Corollary 3.1: the corrected statements hold, the printed ones fail."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from method_toys import residual
from torch import Tensor, nn

import certify
from certify.bounds.affine import Conv2d
from certify.bounds.op import UnsupportedOperation
from methods.usn.lipschitz import constants, spectral_norm
from methods.usn.theory import certificate, corollary, failure_probability, moments


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def chain(activation: type[nn.Module] = nn.ReLU, pool: nn.Module | None = None) -> nn.Sequential:
    """conv-BN, conv, pool, linear, linear with statistics that are not trivial."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4), activation(), nn.Conv2d(4, 3, 3), activation(),
        pool or nn.MaxPool2d(2), nn.Flatten(), nn.Linear(3 * 9, 6) if pool is None else nn.LazyLinear(6), activation(),
        nn.Linear(6, 2),
    ).eval()  # fmt: skip
    norm = model[1]
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    norm.running_var.uniform_(0.5, 2.0)
    return model


def images(n: int = 3) -> Tensor:
    return 0.2 + 0.6 * torch.rand(n, 2, 16, 16, generator=generator())


# --- spectral norms ------------------------------------------------------------
@pytest.mark.parametrize(("stride", "padding", "groups"), [(1, 1, 1), (2, 0, 1), (2, 1, 2), (1, 2, 4)])
def test_a_convolutions_norm_is_that_of_its_matrix(stride, padding, groups):
    weight = torch.randn(8, 4 // groups, 3, 3, generator=generator())
    op = Conv2d(weight, None, (stride, stride), (padding, padding), (1, 1), groups, (4, 7, 5))
    eye = torch.eye(4 * 35).reshape(-1, 4, 7, 5)
    matrix = F.conv2d(eye, weight, None, stride, padding, 1, groups).flatten(1)
    exact = float(torch.linalg.svdvals(matrix.double())[0])
    found = spectral_norm(op, (4, 7, 5))
    assert found == pytest.approx(exact, rel=1e-4)
    assert found <= exact * (1 + 1e-6)
    # The norm of the reshaped kernel is another number.
    assert abs(float(torch.linalg.matrix_norm(weight.flatten(1), 2)) - exact) > 0.01 * exact


def test_a_zero_layer_has_norm_zero():
    assert spectral_norm(Conv2d(torch.zeros(2, 1, 3, 3), None, (1, 1), (1, 1), (1, 1), 1, (1, 5, 5)), (1, 5, 5)) == 0.0


# --- Lemma 3.1 ------------------------------------------------------------
@pytest.mark.parametrize("activation", [nn.ReLU, nn.LeakyReLU, nn.Tanh, nn.Sigmoid])
def test_lemma_3_1_holds_with_the_corrected_constants(activation):
    model, x = chain(activation), images()
    known = constants(model, x)
    assert known.layers == ("0", "3", "7")
    assert known.neurons == (4 * 64, 3 * 36, 6)
    assert known.after == (3, 2, 1)
    slope = {nn.Tanh: 1.0, nn.Sigmoid: 0.25}.get(activation, 1.0)
    norms = [known.norms[1], known.norms[2], float(torch.linalg.matrix_norm(model[9].weight.detach().double(), 2))]
    expected = [math.prod(norms[i:]) * slope ** (3 - i) for i in range(3)]
    assert known.to_output == pytest.approx(expected, rel=1e-5)
    # Printed: one norm too many, and each activation but the first counted twice.
    surplus = [known.norms[i] * slope ** (2 - i) for i in range(3)]
    assert known.printed == pytest.approx([c * s for c, s in zip(known.to_output, surplus)], rel=1e-5)
    with torch.no_grad():
        for scale in (0.01, 1.0):
            other = (x + scale * torch.randn(x.shape, generator=generator(1))).clamp(0, 1)
            out = (model(other) - model(x)).norm(dim=1)
            for c, a, b in zip(known.to_output, known.preactivations(x), known.preactivations(other)):
                assert bool((out <= c * (a - b).norm(dim=1) * (1 + 1e-4)).all())
    # What is listed is the pre-activation behind the normalisation.
    torch.testing.assert_close(known.preactivations(x)[0], model[:2](x).flatten(1), rtol=1e-4, atol=1e-5)


def test_lemma_3_1_as_printed_fails_where_a_norm_is_below_one():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    with torch.no_grad():
        for layer, scale in zip((model[0], model[2], model[4]), (0.1, 2.0, 3.0)):
            layer.weight.copy_(scale * torch.eye(2))
            layer.bias.zero_()
    x, other = torch.tensor([[0.5, 0.5]]), torch.tensor([[0.9, 0.5]])
    known = constants(model, x)
    assert known.to_output == pytest.approx([6.0, 3.0])
    assert known.printed == pytest.approx([0.6, 6.0])
    moved = float((model(other) - model(x)).detach().norm())
    first = float((model[0](other) - model[0](x)).detach().norm())
    assert moved <= known.to_output[0] * first * (1 + 1e-6)
    assert moved > 9 * known.printed[0] * first


def test_pools_softmax_and_keypoint_heads():
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.maps = nn.Conv2d(4, 2, 1)
            self.register_buffer("grid", torch.rand(9, 2, generator=generator()))

        def forward(self, x: Tensor) -> Tensor:
            return (self.maps(x).flatten(2).softmax(-1) @ self.grid).flatten(1)

    torch.manual_seed(0)
    for pool in (nn.MaxPool2d(3, 2), nn.MaxPool2d(2), nn.AvgPool2d(3, 2), nn.AdaptiveAvgPool2d(4)):
        model = nn.Sequential(nn.Conv2d(2, 4, 3), pool, nn.Conv2d(4, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(3), Head())
        model, x = model.eval(), images(8)
        known = constants(model, x)
        with torch.no_grad():
            for scale in (0.03, 1.0):
                other = x + scale * torch.randn(x.shape, generator=generator(2))
                out = (model(other) - model(x)).norm(dim=1)
                for c, a, b in zip(known.to_output, known.preactivations(x), known.preactivations(other)):
                    assert bool((out <= c * (a - b).norm(dim=1) * (1 + 1e-4)).all())
        assert len(known.layers) == 3


def test_residual_networks_list_the_layers_that_nothing_bypasses():
    model = residual()
    x = torch.rand(4, 1, 6, 6, generator=generator())
    known = constants(model, x)
    # branch.0 is bypassed by its skip, left and right by each other; the sum runs in the root module.
    assert known.layers == ("stem.0", "", "depthwise.0")
    assert math.isnan(known.norms[1])
    assert math.isnan(known.printed[1])
    with torch.no_grad():
        other = x + 0.1 * torch.randn(x.shape, generator=generator(1))
        out = (model(other) - model(x)).norm(dim=1)
        for c, a, b in zip(known.to_output, known.preactivations(x), known.preactivations(other)):
            assert bool((out <= c * (a - b).norm(dim=1) * (1 + 1e-4)).all())


def test_a_sum_that_broadcasts_counts_each_copy():
    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Conv2d(2, 3, 1), nn.Linear(3 * 256, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            return self.last((x + x.mean((2, 3), keepdim=True)).flatten(1))

    model, x = Gate().eval(), images()
    known = constants(model, x)
    other = x + 0.5  # along the mean
    out = (model(other) - model(x)).norm(dim=1)
    a, b = known.preactivations(x)[0], known.preactivations(other)[0]
    assert bool((out <= known.to_output[0] * (a - b).norm(dim=1) * (1 + 1e-4)).all())


def test_what_has_no_constant_is_refused():
    class Product(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * x

    with pytest.raises(UnsupportedOperation):
        constants(nn.Sequential(nn.Flatten(), nn.Linear(512, 3), Product(), nn.Linear(3, 2)), images())
    with pytest.raises(ValueError, match="no hidden layer"):
        constants(nn.Sequential(nn.Flatten(), nn.Linear(512, 3)), images())


# --- Theorem 3.1 ------------------------------------------------------------
def tiny(first: float, last: float) -> nn.Sequential:
    """One pixel -> first * x (positive) -> last * that."""
    model = nn.Sequential(nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 1))
    with torch.no_grad():
        for layer, weight in ((model[0], first), (model[2], last)):
            layer.weight.fill_(weight)
            layer.bias.zero_()
    return model


def test_the_printed_theorem_certifies_what_does_not_hold():
    """y = 100 (0.01 x): brightness moves the output by up to 0.5, evenly, so P(|dy| <= 0.1) = 0.2."""
    model, x, p = tiny(0.01, 100.0), torch.tensor([[0.5]]), certify.Brightness(0.5)
    cert = certificate(model, x, p, delta=0.1, alpha=0.05, samples=512, generator=generator())
    with torch.no_grad():
        actual = ((model(p.sample(x, 4000, generator(1)).flatten(0, 1)) - model(x)).abs() <= 0.1).float().mean()
    assert actual < 0.25
    assert bool(cert.printed[0])
    assert not bool(cert.holds[0])
    assert not bool(cert.holds_smooth[0])


def test_the_corrected_theorem_is_true_where_it_certifies():
    model, x = chain(), images(6)
    p = certify.BrightnessContrast(0.05, 0.05)
    with torch.no_grad():
        change = (model(p.sample(x, 4000, generator(1)).flatten(0, 1)).unflatten(0, (4000, 6)) - model(x)).norm(dim=2)
    known = constants(model, x)
    certified = smooth = 0
    for delta in (0.001, 0.02, 0.2, 1.0, 5.0, 20.0):
        cert = certificate(model, x, p, delta, 0.1, samples=256, generator=generator(2), known=known)
        failed = (change > delta).float().mean(0)
        # Every alpha that is claimed bounds the observed rate (4000 draws: a standard error below .008).
        for alphas in (cert.alpha, cert.alpha_smooth):
            assert bool((failed.unsqueeze(1) <= alphas + 0.03).all())
        assert bool((failed[cert.holds] <= 0.13).all())
        assert torch.equal(cert.holds, (cert.alpha <= 0.1).any(1))
        certified += int(cert.holds.sum())
        smooth += int(cert.holds_smooth.sum())
        # Markov on the smooth metric asks for less than Eqs. 7 and 8 with the union over neurons.
        assert bool((cert.alpha_smooth <= 0.25 * cert.alpha + 0.25)[torch.isfinite(cert.alpha)].all())
    assert 0 < certified <= smooth < 36


def test_the_union_over_layers_adds_up_to_more_than_alpha():
    assert failure_probability((2, 1), 0.1) == pytest.approx(0.15)
    assert failure_probability((6, 5, 4, 3, 2, 1), 0.05) == pytest.approx(0.05 * 2.45)
    assert failure_probability((1,), 0.1) == 0.1


def test_moments_satisfy_lemma_3_2_with_an_inequality():
    model, x, p = chain(), images(), certify.Contrast(0.2)
    known = constants(model, x)
    found = moments(known, x, p, samples=40, generator=generator(3))
    g = generator(3)
    t = [0.2 * (2 * torch.rand((n // 2, 3, 1), generator=g) - 1) for n in (16, 16, 8)]
    t = torch.cat([torch.cat([part, -part]) for part in t])
    for layer, clean, i in zip(found, known.preactivations(x), range(3)):
        change = torch.stack([known.preactivations(p.apply(x, row))[i] - clean for row in t]).double()
        torch.testing.assert_close(layer.bias, change.mean(0), rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(layer.variance, change.var(0, unbiased=False), rtol=1e-3, atol=1e-7)
        torch.testing.assert_close(layer.smooth, change.square().sum(2).mean(0), rtol=1e-3, atol=1e-7)
        torch.testing.assert_close(layer.unbiased, change.abs().sum(2).mean(0), rtol=1e-3, atol=1e-6)
        assert bool((layer.unbiased > 1.5 * layer.unbiased_of_means).all())


# --- Corollary 3.1 ------------------------------------------------------------
def two_point(rare: float, bias: float, variance: float) -> tuple[float, float]:
    """E|D| and E D^2 of a variable with this mean and variance that is far below with probability `rare`."""
    spread = math.sqrt(variance / (rare * (1 - rare)))
    low, high = bias - (1 - rare) * spread, bias + rare * spread
    assert rare * low + (1 - rare) * high == pytest.approx(bias)
    return rare * abs(low) + (1 - rare) * abs(high), rare * low**2 + (1 - rare) * high**2


@pytest.mark.parametrize(("neurons", "after", "alpha"), [(1, 1, 0.5), (3, 2, 0.9), (10, 6, 0.05)])
def test_corollary_3_1_holds_corrected_and_fails_as_printed(neurons, after, alpha):
    """Neurons at the very limits of Eqs. 7 and 8, with a skewed distribution."""
    delta, c = 0.7, 1.9
    bounds = corollary(delta, alpha, c, neurons, after)
    bias = delta / (2 * c * math.sqrt(neurons))
    variance = alpha * delta**2 / (4 * c**2 * neurons**2 * after)
    violated = False
    for rare in (1e-4, 0.001, 0.01, 0.05, 0.2, 0.5):
        absolute, square = two_point(rare, bias, variance)
        assert neurons * absolute <= bounds.unbiased * (1 + 1e-9)
        assert neurons * square <= bounds.smooth * (1 + 1e-9)
        assert neurons * abs(bias) <= bounds.unbiased_printed * (1 + 1e-9)
        violated |= neurons * absolute > bounds.unbiased_printed * (1 + 1e-6)
    assert violated
    # The corrected bounds are the limits: a neuron with constant |D| attains both.
    assert bounds.smooth == pytest.approx(neurons * (variance + bias**2))
    assert bounds.unbiased == pytest.approx(neurons * math.sqrt(variance + bias**2))


def test_numbers_out_of_range_are_refused():
    with pytest.raises(ValueError, match="expected delta"):
        corollary(0.0, 0.1, 1.0, 3)
    with pytest.raises(ValueError, match="expected delta"):
        certificate(tiny(1, 1), torch.tensor([[0.5]]), certify.Brightness(0.1), delta=1.0, alpha=0.0)
    with pytest.raises(ValueError, match="span"):
        certificate(tiny(1, 1), torch.tensor([[50.0]]), certify.Brightness(0.1), delta=1.0)
