"""FGSM with GradAlign, PGD and TRADES: closed forms on linear networks, gradients, and what they buy."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from method_toys import FAST, images, residual
from torch import nn

import certify
from certify.attack import pgd
from methods.training import FGSM, PGD, TRADES, CrossEntropy, KeypointMSE, Natural, Objective, Progress, train
from methods.training.eps import Linear
from methods.training.fgsm import gradient_misalignment

END = Progress(1, 1)


def linear(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(36, 2)).double()


def data(seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = 0.3 + 0.4 * torch.rand(5, 1, 6, 6, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 2, (5,), generator=generator)


def small() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 3)
        )


def worst_of_linear(model: nn.Sequential, x: torch.Tensor, y: torch.Tensor, eps: float) -> torch.Tensor:
    """The exact worst images of a linear two-class network: every pixel moves towards the other class."""
    row = model[1].weight[1 - y] - model[1].weight[y]
    return x + eps * row.sign().reshape(x.shape)


@pytest.mark.parametrize(
    "objective",
    [FGSM(0.1), FGSM(0.1, step_size=1.0), FGSM(0.1, init="uniform", step_size=2.0), PGD(0.1, steps=10), PGD(0.1)],
    ids=repr,
)
def test_on_a_linear_network_the_attack_is_exact(objective):
    model, (x, y) = linear(), data()
    loss, metrics = objective.loss(model, x, y, CrossEntropy(), END)
    expected = F.cross_entropy(model(worst_of_linear(model, x, y, 0.1)), y)
    # PGD with 7 steps of a quarter radius reaches every corner from every start but those far off; FGSM does at once.
    tolerance = 0.02 if objective == PGD(0.1) else 1e-9
    assert float(metrics["robust"]) == pytest.approx(float(expected.detach()), rel=tolerance)
    assert isinstance(objective, Objective)
    assert float(loss.detach()) >= float(metrics["robust"]) - 1e-12


def test_clipping_keeps_pixels_in_range():
    x = torch.zeros(3, 1, 6, 6, dtype=torch.float64)
    images_ = FGSM(0.2).craft(
        linear(), x, torch.tensor([0, 1, 0]), CrossEntropy(), 0.2, steps=1, step_size=1.25, init="zero"
    )
    assert images_.min() >= 0.0
    assert images_.max() <= 0.2 + 1e-12


def test_trades_is_its_formula():
    model, (x, y) = linear(), data()
    torch.manual_seed(0)
    loss, metrics = TRADES(0.1, beta=3.0, steps=20).loss(model, x, y, CrossEntropy(), END)
    outputs = model(x)
    assert float(metrics["natural"]) == pytest.approx(float(F.cross_entropy(outputs, y).detach()))
    torch.testing.assert_close(loss.detach(), metrics["natural"] + 3.0 * metrics["moved"])
    # The divergence of a linear two-class network is largest at one of the two extremes of its logit difference.
    row = (model[1].weight[1] - model[1].weight[0]).sign().reshape(1, 1, 6, 6)
    p = F.softmax(outputs, 1)
    extremes = torch.stack(
        [(p * (p.log() - F.log_softmax(model(x + s * 0.1 * row), 1))).sum(1) for s in (-1, 1)]
    ).detach()
    assert float(extremes.amin(0).mean()) <= float(metrics["moved"]) <= float(extremes.amax(0).mean()) + 1e-9
    assert float(metrics["moved"]) > 0.9 * float(extremes.amax(0).mean())
    zero, _ = TRADES(0.1, beta=0.0).loss(model, x, y, CrossEntropy(), END)
    torch.testing.assert_close(zero, F.cross_entropy(outputs, y))
    with pytest.raises(ValueError, match="keypoints"):
        TRADES(0.1).loss(model, x, outputs.detach(), KeypointMSE(), END)


def test_gradients_of_a_linear_network_are_aligned():
    """With two classes the input gradient keeps its direction everywhere, so that GradAlign is zero."""
    model, (x, y) = linear(), data()
    value = gradient_misalignment(model, x, y, CrossEntropy(), 0.1)
    assert float(value.detach()) == pytest.approx(0.0, abs=1e-9)
    flat = nn.Sequential(nn.Flatten(), nn.Linear(36, 2)).double()
    nn.init.zeros_(flat[1].weight)
    value = gradient_misalignment(flat, x, y, CrossEntropy(), 0.1)  # no gradient at all: no image to average over
    assert torch.isfinite(value)
    (gradient,) = torch.autograd.grad(value, flat[1].weight)
    assert torch.isfinite(gradient).all()


def test_grad_align_is_its_formula_and_has_its_gradient():
    """Against a plain computation with the same noise, and finite differences with the first gradient held."""
    with torch.random.fork_rng():
        torch.manual_seed(2)
        model = nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.Softplus(), nn.Linear(8, 3)).double()
    x, _ = data()
    y = torch.tensor([0, 1, 2, 0, 1])
    torch.manual_seed(3)
    value = gradient_misalignment(model, x, y, CrossEntropy(), 0.1)
    (gradient,) = torch.autograd.grad(value, model[1].weight)
    torch.manual_seed(3)
    noisy = certify.Linf(0.1).sample(x, 1, None)[0]

    def input_gradient(at: torch.Tensor) -> torch.Tensor:
        at = at.clone().requires_grad_()
        with torch.enable_grad():
            return torch.autograd.grad(F.cross_entropy(model(at), y), at)[0].flatten(1)

    held = input_gradient(x)

    def formula() -> float:
        return float(1 - F.cosine_similarity(held, input_gradient(noisy)).mean())

    assert float(value.detach()) == pytest.approx(formula(), abs=1e-10)
    direction = torch.randn(model[1].weight.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    step = 1e-6
    with torch.no_grad():
        model[1].weight += step * direction
        ahead = formula()
        model[1].weight -= 2 * step * direction
        behind = formula()
    assert float((gradient * direction).sum()) == pytest.approx((ahead - behind) / (2 * step), rel=1e-4)
    torch.manual_seed(3)
    with_it, metrics = FGSM(0.1, grad_align=0.5).loss(model, x, y, CrossEntropy(), END)
    assert float(with_it.detach()) == pytest.approx(float(metrics["robust"] + 0.5 * metrics["misaligned"]))


@pytest.mark.parametrize("objective", [FGSM(0.05), PGD(0.05, steps=2), TRADES(0.05, steps=2)], ids=lambda o: o.name)
def test_statistics_see_one_pass_and_parameters_keep_no_gradient(objective):
    x, y = images(12)[0]
    model = residual().train()
    model.drop.p = 0.0
    objective.loss(model, x, y, CrossEntropy(), END)
    assert {int(b) for name, b in model.named_buffers() if name.endswith("num_batches_tracked")} == {1}
    assert all(m.track_running_stats for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    assert all(p.grad is None for p in model.parameters())


def test_the_radius_ramps():
    x, y = data()
    objective = FGSM(0.1, schedule=Linear(0.0, 0.5))
    model = linear()
    losses = [float(objective.loss(model, x, y, CrossEntropy(), Progress(e, 4))[1]["robust"]) for e in range(4)]
    assert losses[0] == pytest.approx(float(F.cross_entropy(model(x), y).detach()))
    assert losses[0] < losses[1] < losses[2] == losses[3]
    assert objective.settled().radius(Progress(0, 4)) == 0.1


def test_validation_is_accuracy_under_pgd():
    test = images(24, seed=1)
    model = residual()
    found = PGD(0.1, val_steps=5).validate(model, test, CrossEntropy(), END)
    assert found["score"] == found["attacked"] <= found["clean"]
    x, y = (torch.cat(part) for part in zip(*test))
    assert found["clean"] == pytest.approx(float((model(x).argmax(1) == y).float().mean()))


@pytest.mark.parametrize(
    "objective", [FGSM(0.25, grad_align=0.0), PGD(0.25, steps=3), TRADES(0.25, steps=3)], ids=lambda o: o.name
)
def test_adversarial_training_resists_an_attack_that_natural_training_does_not(objective):
    batches, test = images(48), images(48, seed=1)
    robust = {}
    for goal in (Natural(), objective):
        model = small()
        train(model, batches, goal, FAST, epochs=12)
        x, y = (torch.cat(part) for part in zip(*test))
        attacked = pgd(model, x, certify.Classification(y), certify.Linf(0.25), steps=10)
        robust[goal.name] = float((~attacked.success).float().mean())
    assert robust[objective.name] > robust["natural"] + 0.1


def test_training_with_grad_align_aligns_gradients():
    x, y = images(48, seed=1)[0]
    misaligned = []
    for weight in (0.0, 1.0):
        model = small()
        train(model, images(48), FGSM(0.2, grad_align=weight), FAST, epochs=12)
        torch.manual_seed(0)
        misaligned.append(float(gradient_misalignment(model, x, y, CrossEntropy(), 0.2).detach()))
    assert misaligned[1] < 0.7 * misaligned[0]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: FGSM(-0.1), "eps"),
        (lambda: FGSM(0.1, init="random"), "init"),
        (lambda: FGSM(0.1, step_size=0.0), "step_size"),
        (lambda: FGSM(0.1, perturbation="Brightness"), "grad_align=0"),
        (lambda: PGD(0.1, steps=0), "steps"),
        (lambda: TRADES(0.1, beta=-1.0), "beta"),
        (lambda: PGD(0.1, val_steps=0), "val_steps"),
    ],
)
def test_bad_settings_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()
