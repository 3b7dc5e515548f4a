"""RSLoss and NRSLoss: closed forms, the stop-gradient, and how penalties combine with objectives."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from method_toys import FAST, images, mlp, points, residual
from torch import nn
from torch.func import functional_call

import certify
from methods.training import (
    CROWNIBP,
    FGSM,
    IBP,
    PGD,
    CrossEntropy,
    Natural,
    NRSLoss,
    Objective,
    Progress,
    Regularised,
    RSLoss,
    train,
)  # fmt: skip
from methods.training.eps import Linear

END = Progress(1, 1)
EPS = 0.02


def net(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(),
            nn.Conv2d(3, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU(),
            nn.Flatten(), nn.Linear(16, 5), nn.ReLU(), nn.Linear(5, 3),
        )  # fmt: skip
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.4, 1.6)
                nn.init.normal_(module.bias, std=0.5)
        with torch.no_grad():
            model[1].weight[1] *= -1  # gamma may be negative: the ends of the interval then swap
    return model.double()


def data() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(6, 1, 6, 6, generator=generator, dtype=torch.float64), torch.randint(
        0, 3, (6,), generator=generator
    )


def found(model: nn.Module, x: torch.Tensor):
    return certify.Network(model, x, check=False).propagate(certify.Linf(EPS))


def by_hand(model: nn.Sequential, x: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(l, u) normalised before gamma of both BN layers, then of the fully connected ReLU; statistics of the batch."""
    low, high, clean = (x - EPS).clamp(0, 1), (x + EPS).clamp(0, 1), x
    ends = []
    for conv, norm in ((model[0], model[1]), (model[3], model[4])):
        z = nn.functional.conv2d(clean, conv.weight, conv.bias, conv.stride, conv.padding)
        mid, rad = (low + high) / 2, (high - low) / 2
        mid = nn.functional.conv2d(mid, conv.weight, conv.bias, conv.stride, conv.padding)
        rad = nn.functional.conv2d(rad, conv.weight.abs(), None, conv.stride, conv.padding)
        shape = (-1, 1, 1)
        mean, var = z.mean((0, 2, 3)).reshape(shape), z.var((0, 2, 3), unbiased=False).reshape(shape)
        sigma, gamma, beta = (var + norm.eps).sqrt(), norm.weight.reshape(shape), norm.bias.reshape(shape)
        a, b = ((mid - rad - mean) / sigma + beta / gamma, (mid + rad - mean) / sigma + beta / gamma)
        ends.append((a, b))
        first, second = ((v - mean) / sigma * gamma + beta for v in (mid - rad, mid + rad))
        low, high = torch.minimum(first, second).relu(), torch.maximum(first, second).relu()
        clean = ((z - mean) / sigma * gamma + beta).relu()
    linear = model[7]
    mid, rad = (low + high).flatten(1) / 2, (high - low).flatten(1) / 2
    mid, rad = nn.functional.linear(mid, linear.weight, linear.bias), nn.functional.linear(rad, linear.weight.abs())
    ends.append((mid - rad, mid + rad))
    return ends


@pytest.mark.parametrize("over", ["normalised", "all"])
@pytest.mark.parametrize("average", ["neurons", "channels"])
def test_nrs_is_the_formula_on_normalised_pre_bn_intervals(over, average):
    model, (x, _) = net().train(), data()
    products = [a * b for a, b in by_hand(model, x)]
    products = products if over == "all" else products[:2]
    terms = [-torch.tanh(1 + v) for v in products]
    if average == "neurons":
        expected = torch.cat([t.flatten() for t in terms]).mean()
    else:
        expected = torch.cat([t.mean((0, 2, 3)) if t.ndim == 4 else t.mean(0) for t in terms]).mean()
    for gamma in ("stopped", "denominator", "free"):
        penalty = NRSLoss(0.01, average=average, over=over, gamma=gamma).penalty(model, found(model, x), 1.0)
        torch.testing.assert_close(penalty, 0.01 * expected)


def test_rs_is_the_formula_on_pre_activation_intervals():
    model, (x, _) = net().train(), data()
    gammas = [model[1].weight.reshape(-1, 1, 1), model[4].weight.reshape(-1, 1, 1), torch.ones(())]
    products = [a * b * g.square() for (a, b), g in zip(by_hand(model, x), gammas)]
    for over, used in (("all", products), ("normalised", products[:2])):
        expected = torch.cat([-torch.tanh(1 + v).flatten() for v in used]).mean()
        torch.testing.assert_close(RSLoss(0.1, over=over).penalty(model, found(model, x), 1.0), 0.1 * expected)


def gradients(model: nn.Module, value: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    value.backward()
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}


@pytest.mark.parametrize("training", [True, False])
def test_no_gradient_reaches_any_gamma_and_all_others_are_exact(training):
    """The oracle runs the whole network with gamma cut off, by torch.func; nothing else may change."""
    model, (x, _) = net().train(training), data()
    ours = gradients(model, NRSLoss().penalty(model, found(model, x), 1.0))
    gammas = ("1.weight", "4.weight")
    assert all(bool((ours[name] == 0).all()) for name in gammas)

    state = {n: p.detach() if n in gammas else p for n, p in model.named_parameters()}

    class Cut(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return functional_call(model, state, (images,))

    cut = Cut().train(training)
    oracle = gradients(model, NRSLoss(gamma="free").penalty(cut, found(cut, x), 1.0))
    for name, gradient in oracle.items():
        torch.testing.assert_close(ours[name], gradient, msg=name)
    assert ours["0.weight"].abs().max() > 0
    assert ours["4.bias"].abs().max() > 0  # beta moves the kink, and is trained


def test_detaching_the_denominator_alone_trains_gamma():
    model, (x, _) = net().train(), data()
    half = gradients(model, NRSLoss(gamma="denominator").penalty(model, found(model, x), 1.0))
    free = gradients(model, NRSLoss(gamma="free").penalty(model, found(model, x), 1.0))
    assert half["1.weight"].abs().max() > 1e-5
    assert half["4.weight"].abs().max() > 1e-5
    # In the last normalised layer l u / gamma^2 depends on gamma through beta / gamma alone: without beta not at all.
    with torch.no_grad():
        model[4].bias.zero_()
    half = gradients(model, NRSLoss(gamma="denominator").penalty(model, found(model, x), 1.0))
    free = gradients(model, NRSLoss(gamma="free").penalty(model, found(model, x), 1.0))
    torch.testing.assert_close(free["4.weight"], torch.zeros_like(free["4.weight"]), rtol=0, atol=1e-12)
    assert half["4.weight"].abs().max() > 1e-5


def test_scaling_a_convolution_changes_nothing_that_nrs_sees():
    """The statistics stay part of the penalty, so it has no gradient along the weights of a normalised layer."""
    model, (x, _) = net().train(), data()
    model[0].bias = None
    for module in (model[1], model[4]):
        module.eps = 0.0
    before = NRSLoss().penalty(model, found(model, x), 1.0)
    grads = gradients(model, before)
    assert abs(float((grads["0.weight"] * model[0].weight.detach()).sum())) < 1e-10
    with torch.no_grad():
        model[0].weight *= 3.0
    torch.testing.assert_close(NRSLoss().penalty(model, found(model, x), 1.0), before)


def test_a_dead_channel_is_stable():
    model, (x, _) = net().train(), data()
    with torch.no_grad():
        model[1].weight[0] = 0.0
    penalty = NRSLoss(1.0, over="normalised").penalty(model, found(model, x), 1.0)
    grads = gradients(model, penalty)
    assert torch.isfinite(penalty)
    assert all(torch.isfinite(g).all() for g in grads.values())
    products = [a * b for a, b in by_hand(model, x)[1:2]]
    first = [torch.tanh(1 + a * b)[:, 1:] for a, b in by_hand(model, x)[:1]]
    total = torch.tanh(1 + products[0]).sum() + first[0].sum() + 6 * 36  # 36 neurons of the dead channel, each at 1
    torch.testing.assert_close(-penalty, total / (6 * (3 * 36 + 4 * 4)))


# --- with objectives ------------------------------------------------------------
@pytest.mark.parametrize("penalty", [RSLoss(0.3), NRSLoss(0.3)])
@pytest.mark.parametrize(
    "objective",
    [Natural(), FGSM(EPS, grad_align=0.0), PGD(EPS, steps=2), IBP(EPS), CROWNIBP(EPS)],
    ids=lambda o: o.name,
)
def test_penalties_add_to_every_objective(objective, penalty):
    x, y = data()
    model, alone = net().train(), net().train()
    both = Regularised(objective, (penalty,), eps=EPS)
    assert isinstance(both, Objective)
    assert both.name == f"{objective.name}+{penalty.name}"
    assert not both.mixed_precision
    torch.manual_seed(0)
    loss, metrics = both.loss(model, x, y, CrossEntropy(), Progress(3, 10))
    torch.manual_seed(0)
    plain, _ = objective.loss(alone, x, y, CrossEntropy(), Progress(3, 10))
    radius = objective.radius(Progress(3, 10)) if isinstance(objective, IBP) else EPS
    intervals = certify.Network(net().train(), x, check=False).propagate(certify.Linf(radius))
    torch.testing.assert_close(loss, plain + penalty.penalty(net(), intervals, 1.0))
    torch.testing.assert_close(metrics[penalty.name], (loss - plain).detach())
    # The penalty's own pass over the batch is not recorded in the running statistics.
    for (name, a), (_, b) in zip(model.named_buffers(), alone.named_buffers()):
        torch.testing.assert_close(a, b, msg=name)
    # The training loss still trains gamma: its gradient is that without the penalty, if that is NRS.
    ours, without = gradients(model, loss), gradients(alone, plain)
    same = torch.allclose(ours["1.weight"], without["1.weight"])
    assert same == isinstance(penalty, NRSLoss)
    assert not torch.allclose(ours["0.weight"], without["0.weight"])


def test_no_penalty_while_the_radius_is_zero():
    x, y = data()
    both = Regularised(CROWNIBP(EPS, schedule=Linear(0.5, 1.0)), (NRSLoss(),))
    _, metrics = both.loss(net().train(), x, y, CrossEntropy(), Progress(0, 10))
    assert "nrs" not in metrics
    assert both.settled().objective.schedule(0.0) == 1.0
    assert both.settled().regularisers == both.regularisers


def test_a_penalty_that_finds_nothing_to_read_says_so_in_the_first_step():
    plain = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 3))
    warm = IBP(0.1, schedule=Linear(0.5, 1.0))  # no radius, so no penalty, for half of the training
    x, y = torch.rand(4, 1, 8, 8), torch.zeros(4, dtype=torch.int64)
    step = Progress(epoch=0, epochs=10, step=0, steps=5)
    with pytest.raises(ValueError, match="no ReLU right behind a batch normalisation; over='all' takes any"):
        Regularised(warm, (NRSLoss(),)).loss(plain, x, y, CrossEntropy(), step)
    _, metrics = Regularised(warm, (NRSLoss(over="all"),)).loss(plain, x, y, CrossEntropy(), step)
    assert "nrs" not in metrics


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="pass eps"):
        Regularised(Natural(), (NRSLoss(),))
    with pytest.raises(ValueError, match="empty"):
        Regularised(Natural(), ())
    for bad in ({"weight": -1.0}, {"average": "sum"}, {"over": "bn"}):
        with pytest.raises(ValueError, match=r"weight|average|over"):
            NRSLoss(**bad)
    with pytest.raises(ValueError, match="gamma"):
        NRSLoss(gamma="detached")
    plain = nn.Sequential(nn.Flatten(), nn.Linear(36, 4), nn.ReLU(), nn.Linear(4, 3)).double()
    with pytest.raises(ValueError, match="behind a batch normalisation"):
        Regularised(Natural(), (NRSLoss(),), eps=0.1).loss(plain, *data(), CrossEntropy(), END)


def test_nrs_makes_relus_stable():
    """What it is for: fewer unstable ReLUs at the same accuracy, within ordinary training."""
    x, y = points(128)
    unstable = {}
    for name, objective in {
        "plain": Natural(),
        "nrs": Regularised(Natural(), (NRSLoss(0.5, over="all"),), eps=0.05),
        "rs": Regularised(Natural(), (RSLoss(0.5),), eps=0.05),
    }.items():
        model = mlp()
        train(model, [(x, y)], objective, FAST, epochs=40)
        assert (model(x).argmax(1) == y).float().mean() > 0.95
        layers = certify.Network(model, x).propagate(certify.Linf(0.05)).rectifiers()
        unstable[name] = float(torch.cat([layer.unstable.float().flatten() for layer in layers]).mean())
    assert unstable["nrs"] < 0.8 * unstable["plain"]
    assert unstable["rs"] < 0.8 * unstable["plain"]


def test_a_relu6_and_a_shared_module_are_seen():
    model = residual()
    x, _ = images(12)[0]
    layers = certify.Network(model, x).propagate(certify.Linf(EPS)).rectifiers()
    assert [layer.norm is not None for layer in layers] == [True, False, True, False, False]
    assert layers[0].path == "stem.2"
    assert dataclasses.is_dataclass(layers[0])
