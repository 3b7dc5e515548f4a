"""CROWN-IBP with loss fusion: against auto-LiRPA, by hand, against sampled images, and as training."""

from __future__ import annotations

import importlib
import math
import types

import pytest
import torch
from method_toys import FAST, images, residual
from torch import nn

import certify
from certify import lirpa
from certify.bounds import cross_entropy
from certify.specs import margin_rows
from methods.training import CROWNIBP, IBP, CrossEntropy, KeypointMSE, Objective, Progress, train
from methods.training.eps import Linear, Smoothed

HALF = Progress(1, 2)


def net(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(),
            nn.Conv2d(4, 6, 4, stride=2, padding=1), nn.BatchNorm2d(6), nn.ReLU(),
            nn.Flatten(), nn.Linear(96, 12), nn.ReLU(), nn.Linear(12, 5),
        )  # fmt: skip
        model(torch.rand(64, 1, 8, 8))  # statistics that are not trivial
        return model.eval()


def batch(n: int = 7, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, 1, 8, 8, generator=generator), torch.randint(0, 5, (n,), generator=generator)


def fused(model: nn.Module, x: torch.Tensor, y: torch.Tensor, p: certify.Perturbation, crown: float) -> torch.Tensor:
    found = certify.Network(model, x, check=False).propagate(p, "crown-ibp")
    return cross_entropy(found, margin_rows(y, found.output[0].shape[1]).to(x), crown)


def library() -> types.ModuleType:
    if not lirpa.available():
        pytest.skip("auto-LiRPA is not installed")
    found = lirpa._library()
    # Release 0.3 exports at opset 12, whose gather its parser knows; a current torch loads such modules on demand only.
    for version in (10, 11, 12):
        importlib.import_module(f"torch.onnx._internal.torchscript_exporter.symbolic_opset{version}")
    return found


@pytest.mark.parametrize("eps", [0.001, 0.02, 0.1])
def test_the_fused_bound_is_auto_lirpas(eps):
    """Its IBP and CROWN-IBP bounds of the summed exponentials, and their mix, image by image."""
    auto = library()
    model, (x, y) = net(), batch()
    wrapped = auto.CrossEntropyWrapper(model).eval()
    options = {"loss_fusion": True, "conv_mode": "patches", "relu": "adaptive"}
    with lirpa._quiet(), torch.no_grad():
        bounded = auto.BoundedModule(wrapped, (x, y), bound_opts=options, device="cpu")
        ball = auto.PerturbationLpNorm(norm=math.inf, x_L=(x - eps).clamp(0, 1), x_U=(x + eps).clamp(0, 1))
        entry = auto.BoundedTensor(x, ball)
        theirs = {}
        for method in ("IBP", "CROWN-IBP"):
            _, upper = bounded.compute_bounds(x=(entry, y), method=method, bound_lower=False)
            top = next(m.max_input for m in bounded._modules.values() if type(m).__name__ == "BoundExp")
            theirs[method] = (upper * top.exp()).flatten()
        for crown in (0.0, 0.3, 1.0):
            expected = torch.log(crown * theirs["CROWN-IBP"] + (1 - crown) * theirs["IBP"])
            ours = fused(model, x, y, certify.Linf(eps), crown)
            torch.testing.assert_close(ours, expected, rtol=2e-5, atol=2e-5)
        assert (theirs["CROWN-IBP"] < theirs["IBP"]).all()


def test_the_fused_bound_of_a_linear_network_by_hand():
    model, (x, y) = nn.Sequential(nn.Flatten(), nn.Linear(64, 5)).double(), batch()
    x, eps = 0.3 + 0.4 * x.double(), 0.05
    w, b = model[1].weight, model[1].bias
    low, high = x.flatten(1) - eps, x.flatten(1) + eps
    for i in range(len(x)):
        total = torch.zeros(64, dtype=torch.float64)
        constant = torch.ones((), dtype=torch.float64)
        for k in set(range(5)) - {int(y[i])}:
            row, shift = w[k] - w[y[i]], b[k] - b[y[i]]
            middle, spread = row @ x[i].flatten() + shift, eps * row.abs().sum()
            l, u = middle - spread, middle + spread
            slope = (u.exp() - l.exp()) / (u - l)
            total = total + slope * row
            constant = constant + slope * (shift - l) + l.exp()
        value = constant + torch.where(total > 0, total * high[i], total * low[i]).sum()
        ours = fused(model, x[i : i + 1], y[i : i + 1], certify.Linf(eps), 1.0)
        assert float(ours.detach()) == pytest.approx(float(value.detach().log()), abs=1e-10)


@pytest.mark.parametrize("p", [certify.Linf(0.03), certify.Brightness(0.1), certify.Contrast(0.1)])
@pytest.mark.parametrize("crown", [0.0, 0.5, 1.0])
def test_no_perturbed_image_has_a_larger_loss(p, crown):
    model, (x, y) = net(), batch()
    bound = fused(model, x, y, p, crown)
    for image in p.sample(x, 50, torch.Generator().manual_seed(0)):
        loss = nn.functional.cross_entropy(model(image), y, reduction="none")
        assert (loss <= bound + 1e-5).all()


def test_extremes_stay_finite_and_sound():
    """Vanishing intervals, and margins whose exponentials overflow."""
    model, (x, y) = net(), batch()
    plain = nn.functional.cross_entropy(model(x), y, reduction="none")
    for crown in (0.0, 1.0):
        torch.testing.assert_close(fused(model, x, y, certify.Linf(1e-9), crown), plain, rtol=1e-5, atol=1e-5)
        with torch.no_grad():
            scaled = nn.Sequential(model, nn.Linear(5, 5))
            scaled[1].weight.copy_(1e4 * torch.eye(5))
            scaled[1].bias.zero_()
        far = fused(scaled, x, y, certify.Linf(0.1), crown)
        assert torch.isfinite(far).all()
        far.sum().backward()
        assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_gradients_are_those_of_the_bound():
    model, (x, y) = net().double(), batch(3)
    x = x.double()
    weight = model[0].weight

    def value() -> torch.Tensor:
        return fused(model, x, y, certify.Linf(0.02), 0.7).mean()

    value().backward()
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    slope, step = float((weight.grad * direction).sum()), 1e-7
    with torch.no_grad():
        weight += step * direction
        ahead = float(value())
        weight -= 2 * step * direction
        behind = float(value())
    assert slope == pytest.approx((ahead - behind) / (2 * step), rel=1e-4)


def test_the_mix_follows_the_radius():
    model, (x, y) = net(), batch()
    objective = CROWNIBP(0.04, schedule=Linear(0.0, 1.0))
    assert isinstance(objective, Objective)
    assert objective.name == "crown-ibp"
    loss, metrics = objective.loss(model, x, y, CrossEntropy(), HALF)  # radius .02, half CROWN, half IBP
    torch.testing.assert_close(loss, fused(model, x, y, certify.Linf(0.02), 0.5).mean())
    rows = margin_rows(y, 5)
    lower, _ = certify.bounds(model, x, certify.Linf(0.02), "ibp", C=rows)
    assert float(metrics["certified"]) == pytest.approx(float((lower > 0).all(1).float().mean()))
    # At the end it is IBP training without clean loss; at radius 0 it is natural training.
    end, _ = objective.settled().loss(model, x, y, CrossEntropy(), HALF)
    same, _ = IBP(0.04, kappa_start=0.0, kappa_end=0.0).loss(model, x, y, CrossEntropy(), Progress(1, 1))
    torch.testing.assert_close(end, same)
    start, metrics = objective.loss(model, x, y, CrossEntropy(), Progress(0, 2))
    torch.testing.assert_close(start, nn.functional.cross_entropy(model(x), y))
    assert "robust" not in metrics


def test_unfused_margins_are_the_mixed_ones():
    model, (x, y) = net(), batch()
    objective = CROWNIBP(0.04, schedule=Linear(0.0, 1.0), fused=False)
    loss, _ = objective.loss(model, x, y, CrossEntropy(), HALF)
    rows, p = margin_rows(y, 5), certify.Linf(0.02)
    mixed = sum(0.5 * certify.bounds(model, x, p, method, C=rows)[0] for method in ("ibp", "crown-ibp"))
    logits = torch.cat([torch.zeros(len(x), 1), -mixed], 1)
    torch.testing.assert_close(loss, torch.logsumexp(logits, 1).mean())


def test_keypoints_take_the_mixed_corner():
    model, (x, _) = nn.Sequential(net(), nn.ReLU(), nn.Linear(5, 4)).eval(), batch()
    y = torch.randn(len(x), 4, generator=torch.Generator().manual_seed(3))
    objective = CROWNIBP(0.04, schedule=Linear(0.0, 1.0))
    worst, _ = objective.loss(model, x, y, KeypointMSE(), HALF)
    ends = [certify.bounds(model, x, certify.Linf(0.02), method) for method in ("ibp", "crown-ibp")]
    low, high = (sum(end[i] for end in ends) / 2 for i in (0, 1))
    expected = torch.maximum((low - y).square(), (high - y).square()).mean()
    torch.testing.assert_close(worst, expected, rtol=1e-5, atol=1e-5)


def test_statistics_are_recorded_once_and_published_defaults_hold():
    x, y = images(12)[0]
    one, two = residual().train(), residual().train()
    for model in (one, two):
        model.drop.p = 0.0
    CROWNIBP(0.02).loss(one, x, y, CrossEntropy(), HALF)
    two(x)
    for (name, a), (_, b) in zip(one.named_buffers(), two.named_buffers()):
        torch.testing.assert_close(a, b, msg=name)
    default = CROWNIBP(2 / 255)
    assert default.schedule == Smoothed(10 / 200, 80 / 200, mid=0.4, beta=4.0)
    assert (default.kappa_start, default.kappa_end) == (0.0, 0.0)
    with pytest.raises(ValueError, match="eps"):
        CROWNIBP(-1.0)
    with pytest.raises(ValueError, match="crown"):
        cross_entropy(certify.Network(two.eval(), x).propagate(certify.Linf(0.1)), margin_rows(y, 3), 1.5)
    with pytest.raises(ValueError, match="propagated by"):
        certify.Network(two, x).propagate(certify.Linf(0.1), "forward")


def test_it_certifies():
    batches, test = images(48), images(24, seed=1)
    model = residual()
    objective = CROWNIBP(0.1, schedule=Linear(0.1, 0.6))
    history = train(model, batches, objective, FAST, epochs=15, val=test)
    x, y = (torch.cat(part) for part in zip(*test))
    low, _ = certify.bounds(model, x, certify.Linf(0.1), method="ibp", C=margin_rows(y, 3))
    verified = float((low > 0).all(1).float().mean())
    assert verified > 0.7
    assert history.selected().validation["certified"] == pytest.approx(verified, abs=1e-6)
