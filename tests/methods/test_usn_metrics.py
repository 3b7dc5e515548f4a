"""Metrics, sampling, Wasserstein regulariser and schedule of USN pruning, against closed forms, loops and POT."""

from __future__ import annotations

import math

import numpy as np
import ot
import pytest
import torch
from method_toys import residual
from torch import Tensor, nn

import certify
from certify.curves import Hue
from methods import masks
from methods.usn import Metric, Progressive, WassersteinTarget, measure
from methods.usn.metrics import LayerMetrics, deterministic, observed, sites
from methods.usn.sampling import draw
from methods.usn.wasserstein import target, wasserstein2_squared


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(n: int = 4, channels: int = 3, size: int = 6, seed: int = 0) -> Tensor:
    return 0.3 + 0.4 * torch.rand(n, channels, size, size, generator=generator(seed))


# --- sampling ------------------------------------------------------------
PERTURBATIONS = [
    certify.Brightness(0.1),
    certify.Contrast(0.2, about="mean"),
    certify.BrightnessContrast(0.05, 0.1),
    certify.BlurMix(0.5),
    certify.Saturation(0.3),
    certify.Linf(0.1),
    certify.L2(0.5),
    certify.Box(torch.zeros(3, 6, 6), torch.ones(3, 6, 6)),
    Hue(0.1),
]


@pytest.mark.parametrize("p", PERTURBATIONS, ids=lambda p: p.name)
@pytest.mark.parametrize("n", [1, 3])
def test_draws_lie_in_the_set_and_repeat(p, n):
    x = pictures(n)
    for sampling in ("iid", "antithetic"):
        copies = draw(p, x, 4, sampling, generator(1))
        assert copies.shape == (4, *x.shape)
        lo, hi = p.hull(x)
        assert bool((copies >= lo - 1e-6).all() and (copies <= hi + 1e-6).all())
        assert torch.equal(copies, draw(p, x, 4, sampling, generator(1)))
        assert not torch.equal(copies, draw(p, x, 4, sampling, generator(2)))


@pytest.mark.parametrize("p", [p for p in PERTURBATIONS if p.name not in ("hue", "blur", "box")], ids=lambda p: p.name)
def test_antithetic_pairs_mirror_each_other(p):
    x = pictures()
    copies = draw(p, x, 6, "antithetic", generator())
    torch.testing.assert_close(copies[:3] + copies[3:], 2 * x.expand(3, *x.shape), rtol=0, atol=1e-6)


def test_antithetic_pairs_of_other_sets_mirror_in_their_centre():
    x = pictures()
    box = draw(PERTURBATIONS[7], x, 4, "antithetic", generator())
    torch.testing.assert_close(box[:2] + box[2:], torch.ones_like(box[:2]))
    blur = certify.BlurMix(0.5)
    copies = draw(blur, x, 4, "antithetic", generator())
    middle = blur.apply(x, torch.full((len(x),), 0.25))
    torch.testing.assert_close(copies[:2] + copies[2:], 2 * middle.expand(2, *x.shape), rtol=0, atol=1e-6)
    hue = Hue(0.1)
    turned = draw(hue, x, 2, "antithetic", generator())
    t = (2 * torch.rand((1, len(x), 1), generator=generator()) - 1)[0, :, 0] * 0.1
    torch.testing.assert_close(turned[0], hue.apply(x, t), rtol=0, atol=1e-5)
    torch.testing.assert_close(turned[1], hue.apply(x, -t), rtol=0, atol=1e-5)


def test_bad_draws_are_refused():
    x = pictures(1)
    with pytest.raises(ValueError, match="even"):
        draw(PERTURBATIONS[0], x, 3)
    with pytest.raises(ValueError, match="m is"):
        draw(PERTURBATIONS[0], x, 0, "iid")
    with pytest.raises(ValueError, match="sampling"):
        draw(PERTURBATIONS[0], x, 2, "halton")

    class Odd(certify.Perturbation):
        name, clip = "odd", True
        hull = apply = sample = None

    with pytest.raises(TypeError, match="iid"):
        draw(Odd(), x, 2)


# --- the metrics ------------------------------------------------------------
def test_metrics_are_what_the_equations_say():
    """Eqs. 11, 12, 14, 17, 18 by loops over copies, images, channels and neurons."""
    clean, copies = torch.randn(3, 4, 2, 2, generator=generator()), torch.randn(6, 3, 4, 2, 2, generator=generator(1))
    for bias in ("mean_abs", "abs_mean"):
        found = LayerMetrics.of(clean, copies, Metric(bias=bias))
        for c in range(4):
            for j in range(4):
                u = s = variance = square = 0.0
                for i in range(3):
                    change = [float(copies[k, i, c].flatten()[j] - clean[i, c].flatten()[j]) for k in range(6)]
                    u += (np.mean(np.abs(change)) if bias == "mean_abs" else abs(np.mean(change))) / 3
                    s += np.mean(np.square(change)) / 3
                    variance += np.var(change) / 3
                    square += np.mean(change) ** 2 / 3
                assert float(found.unbiased[c, j]) == pytest.approx(u, rel=1e-5)
                assert float(found.smooth[c, j]) == pytest.approx(s, rel=1e-5)
                assert s == pytest.approx(variance + square)
        torch.testing.assert_close(found.signal, clean.flatten(2).square().mean(0))
        torch.testing.assert_close(found.magnitude, clean.flatten(2).abs().mean(0))


@pytest.mark.parametrize("bias", ["mean_abs", "abs_mean"])
@pytest.mark.parametrize("ratio", ["eq19", "squared"])
def test_every_reading_of_the_importance(bias, ratio):
    clean, copies = torch.randn(3, 4, 2, 2, generator=generator()), torch.randn(6, 3, 4, 2, 2, generator=generator(1))
    change = (copies - clean).flatten(3).double()
    u = change.abs().mean(0) if bias == "mean_abs" else change.mean(0).abs()
    s = change.square().mean(0)

    def formula(u: Tensor, s: Tensor, d: int) -> Tensor:
        return s / ((u + 1e-3) ** (1 if ratio == "eq19" else 2) * d)

    expected = {
        ("channel", "ratio_of_means"): formula(u.mean((0, 2)), s.mean((0, 2)), 4),
        ("channel", "mean_of_ratios"): formula(u, s, 4).mean((0, 2)),
        ("neuron", "ratio_of_means"): formula(u.mean(0), s.mean(0), 16).flatten(),
        ("neuron", "mean_of_ratios"): formula(u, s, 16).mean(0).flatten(),
    }
    for (granularity, aggregate), values in expected.items():
        metric = Metric(bias, ratio, granularity, aggregate, eps=1e-3)
        layer = LayerMetrics.of(clean, copies, metric)
        torch.testing.assert_close(layer.importance(metric), values.float(), rtol=1e-4, atol=1e-6)
        per_channel = values if granularity == "channel" else values.reshape(4, 4).mean(1)
        torch.testing.assert_close(layer.channel_importance(metric), per_channel.float(), rtol=1e-4, atol=1e-6)


def test_reading_a_batch_in_place_gives_the_metrics_and_their_gradients():
    """The pass over whole outputs against slices and autograd; rows that are no copies get no gradient."""
    output = torch.randn(3 + 2 + 8 + 1, 4, 5, 2, dtype=torch.float64, generator=generator())
    output[6] = output[1]  # no change: the sign of 0
    for neurons in (output, output.flatten(2)[..., 0]):
        found = []
        for read in (True, False):
            rows = neurons.clone().requires_grad_(True)
            if read:
                layer = LayerMetrics.read(rows, 5, 2, 4, Metric())
            else:
                layer = LayerMetrics.of(rows[:2], rows[5:13].unflatten(0, (4, 2)), Metric())
            total = (layer.importance(Metric()).square().sum() + 2 * layer.unbiased.mean() + 3 * layer.smooth).sum()
            (gradient,) = torch.autograd.grad(total, rows)
            found.append((layer, gradient))
        for name, value in found[0][0].tensors().items():
            torch.testing.assert_close(value, found[1][0].tensors()[name], msg=name)
        torch.testing.assert_close(found[0][1], found[1][1])
        assert not found[0][1][[2, 3, 4, 13]].any()


def test_the_squared_ratio_says_nothing_about_linear_neurons():
    """Uniform draws on [-w, w]: E D^2 / (E|D|)^2 = (w^2 / 3) / (w / 2)^2 = 4/3, whatever w."""
    w = torch.tensor([0.1, 1.0, 30.0])
    t = torch.linspace(-1, 1, 200_001).reshape(-1, 1, 1, 1)
    layer = LayerMetrics.of(torch.zeros(1, 3, 1), t * w.reshape(1, 1, 3, 1), Metric(ratio="squared", eps=1e-9))
    torch.testing.assert_close(3 * layer.importance(Metric(ratio="squared", eps=1e-9)), torch.full((3,), 4 / 3))
    plain = 3 * layer.importance(Metric(eps=1e-9))
    torch.testing.assert_close(plain, w * 2 / 3, rtol=1e-4, atol=0)


def test_lemma_3_2_is_an_inequality():
    """E|D| >= |E D|, strictly for a neuron that moves both ways: the equality of Eq. 13 fails."""
    copies = torch.tensor([-1.0, 2.0]).reshape(2, 1, 1)
    one = LayerMetrics.of(torch.zeros(1, 1), copies, Metric(bias="mean_abs"))
    other = LayerMetrics.of(torch.zeros(1, 1), copies, Metric(bias="abs_mean"))
    assert float(one.unbiased) == 1.5
    assert float(other.unbiased) == 0.5


def test_antithetic_copies_have_no_bias_in_a_linear_layer():
    net = nn.Conv2d(3, 4, 3)
    p = certify.Brightness(0.1)
    batch = [(pictures(), None)]
    for sampling, low, high in (("antithetic", 0.0, 1e-6), ("iid", 1e-3, 1.0)):
        metric = Metric(bias="abs_mean")
        found = measure(net, batch, p, ["weight"], m=4, sampling=sampling, metric=metric, generator=generator(3))
        assert low <= float(found["weight"].unbiased.max()) <= high


def test_noise_to_signal_is_blind_to_scale_and_the_importance_is_not():
    clean, copies = torch.randn(3, 4, 5, generator=generator()), torch.randn(6, 3, 4, 5, generator=generator(1))
    small, large = (LayerMetrics.of(f * clean, f * copies, Metric()) for f in (1.0, 10.0))
    torch.testing.assert_close(small.noise_to_signal(0.0), large.noise_to_signal(0.0))
    torch.testing.assert_close(10 * small.importance(Metric()), large.importance(Metric()), rtol=1e-4, atol=0)
    torch.testing.assert_close(
        small.noise_to_signal(0.0), (copies - clean).square().mean((0, 1, 3)) / clean.square().mean((0, 2))
    )


# --- where they are read ------------------------------------------------------------
class Awkward(nn.Module):
    """An in-place activation, a layer that runs twice, a normalisation behind an activation, dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.again = nn.Conv2d(4, 4, 3, padding=1)
        self.late = nn.BatchNorm2d(4)
        self.idle = nn.Conv2d(4, 4, 1)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x)).relu_()
        x = self.late(self.again(self.again(x).relu()).relu())
        return self.head(self.drop(x.mean((2, 3))))


def awkward() -> Awkward:
    torch.manual_seed(0)
    model = Awkward().eval()
    nn.init.uniform_(model.norm.weight, 0.5, 1.5)
    nn.init.normal_(model.norm.bias)
    model.norm.running_mean.normal_()
    return model


def test_pre_activations_are_taken_behind_the_normalisation_that_folds_in():
    model = awkward()
    found = sites(model, pictures(1), ["first.weight", "again.weight", "head.weight"])
    assert found == {"first.weight": "norm", "again.weight": "again", "head.weight": "head"}
    with pytest.raises(ValueError, match="'idle' does not run"):
        sites(model, pictures(1), ["idle.weight"])
    assert sites(nn.Conv2d(3, 2, 1), pictures(1), ["weight"]) == {"weight": ""}
    names = masks.prunable(residual(), ("conv",), structured=True)
    places = sites(residual(), pictures(1, 1), names)
    assert places == {
        "stem.0.weight": "stem.1",
        "branch.0.weight": "branch.1",
        "depthwise.0.weight": "depthwise.1",
        "left.weight": "left",
        "right.weight": "right",
    }


def test_a_shared_normalisation_folds_into_neither_layer():
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.norm = nn.Conv2d(3, 2, 1), nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2)

        def forward(self, x: Tensor) -> Tensor:
            return (self.norm(self.a(x)) + self.norm(self.b(x))).flatten(1)

    assert sites(Shared(), pictures(1), ["a.weight", "b.weight"]) == {"a.weight": "a", "b.weight": "b"}


def test_hooks_see_what_an_in_place_activation_overwrites():
    model, x, p = awkward(), pictures(), certify.Brightness(0.1)
    found = measure(model, [(x, None)], p, ["first.weight"], m=4, generator=generator(5))["first.weight"]
    copies = draw(p, x, 4, "antithetic", generator(5))
    with torch.no_grad():
        clean = model.norm(model.first(x))
        moved = model.norm(model.first(copies.flatten(0, 1))).unflatten(0, (4, 4))
    expected = LayerMetrics.of(clean, moved, Metric())
    assert bool((clean < 0).any())  # an activation would have shown
    torch.testing.assert_close(found.unbiased, expected.unbiased, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(found.signal, expected.signal)


def test_a_layer_that_runs_twice_has_the_neurons_of_both_runs():
    model, x = awkward(), pictures()
    for aggregate in ("ratio_of_means", "mean_of_ratios"):
        metric = Metric(aggregate=aggregate)
        found = measure(model, [(x, None)], certify.Brightness(0.1), ["again.weight"], m=2, metric=metric)
        assert found["again.weight"].unbiased.shape == (4, 2 * 36)
        assert found["again.weight"].importance(metric).shape == (4,)


def test_measuring_averages_over_batches_and_leaves_the_model_alone():
    model = awkward().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x = pictures(6)
    names = ["first.weight", "head.weight"]
    p = certify.Brightness(0.1)
    fixed = {"m": 2, "sampling": "antithetic"}
    whole = measure(model, [(x[:4], None), (x[4:], None)], p, names, **fixed, generator=generator(1))
    g = generator(1)
    parts = [measure(model, [(x[s], None)], p, names, **fixed, generator=g) for s in (slice(4), slice(4, 6))]
    for name in names:
        mean = (4 * parts[0][name].unbiased + 2 * parts[1][name].unbiased) / 6
        torch.testing.assert_close(whole[name].unbiased, mean)
    assert whole["head.weight"].unbiased.shape == (2, 1)
    assert model.training
    assert model.drop.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match="empty"):
        measure(model, [], p, names)
    with pytest.raises(ValueError, match="span"):
        measure(model, [(255 * x, None)], p, names)


def test_chance_in_the_network_is_off_while_copies_are_compared():
    model = awkward().train()
    with deterministic(model):
        assert not model.drop.training
        assert model.norm.training
        # Without a perturbation, copies change nothing.
        x = pictures()
        with observed(model, {"head.weight": "head"}, 4, 4, 2, Metric()) as found:
            model(torch.cat([x, x, x]))
    assert float(found["head.weight"].smooth.detach().max()) < 1e-10
    assert model.drop.training


def test_more_copies_mean_less_sampling_noise():
    model, x, p = residual(), pictures(1, 1), certify.Brightness(0.1)
    values = {m: [] for m in (2, 32)}
    for m, found in values.items():
        for seed in range(12):
            layer = measure(model, [(x, None)], p, ["left.weight"], m=m, sampling="iid", generator=generator(seed))
            found.append(layer["left.weight"].importance(Metric()))
    noise = {m: torch.stack(found).std(0).mean() for m, found in values.items()}
    assert noise[32] < 0.5 * noise[2]


@pytest.mark.parametrize("field", ["bias", "ratio", "granularity", "aggregate"])
def test_unknown_readings_are_refused(field):
    with pytest.raises(ValueError, match=field):
        Metric(**{field: "other"})
    with pytest.raises(ValueError, match="eps"):
        Metric(eps=0.0)


# --- Wasserstein ------------------------------------------------------------
def test_the_closed_form_agrees_with_pot():
    for n in (1, 2, 7, 64):
        a, b = torch.rand(n, dtype=torch.float64, generator=generator(n)), torch.rand(n, dtype=torch.float64)
        ours = float(wasserstein2_squared(a, b))
        assert ours == pytest.approx(float(ot.wasserstein_1d(a.numpy(), b.numpy(), p=2)), rel=1e-9)
        cost = (a.unsqueeze(1) - b).square().numpy()
        uniform = np.full(n, 1 / n)
        assert ours == pytest.approx(float(ot.emd2(uniform, uniform, cost)), rel=1e-7)
    with pytest.raises(ValueError, match="same length"):
        wasserstein2_squared(torch.rand(3), torch.rand(4))


def test_the_target_is_equation_20():
    for n in (5, 16, 32):
        for rho in (0.0, 0.1, 0.2, 0.3, 0.55):
            a = torch.rand(n, dtype=torch.float64, generator=generator(n))
            expected = np.where(a.numpy() > np.percentile(a.numpy(), 100 * (1 - rho)), 1 / n, 0)
            np.testing.assert_allclose(target(a, rho).numpy(), expected)
    assert float(target(torch.rand(8), 0.0).sum()) == 0.0


def test_the_loss_is_the_distance_of_importances_and_target():
    a = (0.2 * torch.rand(16, dtype=torch.float64, generator=generator())).requires_grad_(True)
    squared = WassersteinTarget(power="squared").loss(a, 0.25)
    expected = ot.wasserstein_1d(a.detach().numpy(), target(a, 0.25).numpy(), p=2)
    assert float(squared.detach()) == pytest.approx(float(expected), rel=1e-9)
    assert float(WassersteinTarget().loss(a, 0.25).detach()) == pytest.approx(math.sqrt(float(expected)), rel=1e-6)
    (gradient,) = torch.autograd.grad(squared, a)
    torch.testing.assert_close(gradient, 2 * (a.detach() - target(a, 0.25)) / 16)
    # rho = 0: the target is zero and the loss shrinks everything.
    (shrinks,) = torch.autograd.grad(WassersteinTarget(power="squared").loss(a, 0.0), a)
    assert bool((shrinks > 0).all())


def test_the_root_has_a_finite_gradient_at_zero():
    a = torch.zeros(8, requires_grad=True)
    (gradient,) = torch.autograd.grad(WassersteinTarget().loss(a, 0.0), a)
    assert torch.isfinite(gradient).all()


def test_weights_on_channel_numbers_go_through_pot():
    a = (0.1 + torch.rand(10, dtype=torch.float64, generator=generator())).requires_grad_(True)
    goal = target(a, 0.3)
    loss = WassersteinTarget(support="index", power="squared").loss(a, 0.3)
    places = np.arange(10) / 10
    p, q = a.detach().numpy() / a.detach().numpy().sum(), goal.numpy() / goal.numpy().sum()
    assert float(loss.detach()) == pytest.approx(ot.emd2_1d(places, places, p, q, metric="sqeuclidean"), rel=1e-6)
    # The gradient, against differences of the closed form.
    (gradient,) = torch.autograd.grad(loss, a)
    for j in range(10):
        ends = []
        for step in (-1e-5, 1e-5):
            moved = a.detach().clone()
            moved[j] += step
            p = (moved / moved.sum()).numpy()
            ends.append(ot.emd2_1d(places, places, p / p.sum(), q, metric="sqeuclidean"))
        assert float(gradient[j]) == pytest.approx((ends[1] - ends[0]) / 2e-5, rel=1e-3, abs=1e-6)
    # It depends on the order of channels; the other support does not.
    shuffled = a.detach()[torch.randperm(10, generator=generator(4))]
    assert float(WassersteinTarget(support="index").loss(shuffled, 0.3)) != pytest.approx(
        math.sqrt(float(loss.detach()))
    )
    value = WassersteinTarget()
    assert float(value.loss(shuffled, 0.3)) == pytest.approx(float(value.loss(a, 0.3).detach()))
    # Nothing to transport.
    assert float(WassersteinTarget(support="index", power="squared").loss(a, 0.0).detach()) == 0.0


def test_unknown_targets_are_refused():
    for field in ("support", "power", "ratio"):
        with pytest.raises(ValueError, match=field):
            WassersteinTarget(**{field: "other"})


# --- the schedule ------------------------------------------------------------
def test_the_schedule_is_equation_22():
    schedule = Progressive(ratio=0.3, steps=4, start=2, interval=3)
    assert schedule.end == 14
    for t in range(0, 20):
        if t < 2:
            expected = 0.0
        elif t <= 14:
            expected = 0.3 / 4 * math.floor((t - 2) / 3)
        else:
            expected = 0.3
        assert schedule(t) == pytest.approx(expected, abs=1e-12)
    assert [t for t in range(20) if schedule.prunes(t)] == [5, 8, 11, 14]
    assert schedule(14) == 0.3
    paper = Progressive(0.2, 200)
    assert paper(199) == pytest.approx(0.199)
    assert paper(200) == 0.2
    for bad in ({"ratio": 1.0}, {"steps": 0}, {"interval": 0}, {"start": -1}):
        with pytest.raises(ValueError, match=r"ratio|schedule"):
            Progressive(**({"ratio": 0.1, "steps": 2} | bad))
