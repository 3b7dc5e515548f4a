"""Fast-IBP: the initialisation, normalisation of linear layers, and both penalties against the authors' formulas."""

from __future__ import annotations

import math

import pytest
import torch
from method_toys import FAST, images
from torch import nn

import certify
from methods.training import CrossEntropy, Progress, ReLUBalance, Tightness, fast_ibp, train
from methods.training.eps import Linear
from methods.training.fast_ibp import initialise, normalise_linear


def plain(depth: int = 4, width: int = 64) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Flatten(), nn.Linear(36, width), nn.ReLU()]
    for _ in range(depth - 1):
        layers += [nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, 3))


def test_weights_have_the_published_deviation_but_the_last():
    model = nn.Sequential(
        nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 3)
    )
    made = initialise(model, seed=1)
    for index, fan_in in ((0, 27), (3, 64)):
        weight = made[index].weight.detach()
        assert float(weight.std()) == pytest.approx(math.sqrt(2 * math.pi) / fan_in, rel=0.1)
        assert abs(float(weight.mean())) < 0.1 * float(weight.std())
        assert not torch.equal(weight, model[index].weight)
        assert torch.equal(made[index].bias, model[index].bias)
    assert torch.equal(made[5].weight, model[5].weight)
    assert torch.equal(initialise(model, seed=1)[0].weight, made[0].weight)
    with pytest.raises(ValueError, match="before its last"):
        initialise(nn.Linear(2, 2))


def test_intervals_keep_their_width_with_depth():
    """Default initialisation makes them grow by orders of magnitude."""
    x = torch.rand(16, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    growth = {}
    for name, model in {"default": plain(6, 256), "fast": initialise(plain(6, 256))}.items():
        layers = certify.Network(model, x).propagate(certify.Linf(0.01)).rectifiers()
        widths = [float((layer.upper - layer.lower).detach().mean()) for layer in layers]
        growth[name] = widths[-1] / widths[0]
    assert 0.3 < growth["fast"] < 3.0
    assert growth["default"] > 30.0


def test_normalisation_goes_between_linear_layers_and_their_relus():
    model = nn.Sequential(
        nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU6()), nn.Linear(6, 2)
    ).eval()
    made = normalise_linear(model)
    kinds = [type(m).__name__ for m in made[0]]
    assert kinds == ["Linear", "BatchNorm1d", "ReLU", "Linear", "BatchNorm1d", "ReLU6"]
    assert len(model[0]) == 4
    assert not made[0][1].training
    x = torch.rand(5, 4)
    torch.testing.assert_close(made(x), model(x), rtol=1e-3, atol=1e-3)  # fresh statistics are (0, 1)
    assert {n: p.shape for n, p in made.state_dict().items() if "norm" not in n} == {
        n: p.shape for n, p in model.state_dict().items()
    }
    with pytest.raises(ValueError, match="nothing to normalise"):
        normalise_linear(nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU()))


def authors(found, tolerance: float) -> tuple[float, float]:
    """L_tightness and L_relu, transcribed from the paper's Eqs. 8 and 9 in plain numbers."""
    low, high = found.entry
    first = float((high - low).mean())
    tight, relu = [], []
    for layer in found.rectifiers():
        tight.append(max(0.0, tolerance - first / float((layer.upper - layer.lower).mean())) / tolerance)
        centre = ((layer.lower + layer.upper) / 2).flatten().tolist()
        lower, upper = layer.lower.flatten().tolist(), layer.upper.flatten().tolist()
        mean = sum(centre) / len(centre)
        on, off = [c for c, l in zip(centre, lower) if l > 0], [c for c, u in zip(centre, upper) if u < 0]
        if not on or not off:
            relu.append(0.0)
            continue
        a = sum(on) / -sum(off)
        b = sum((c - mean) ** 2 for c in on) / sum((c - mean) ** 2 for c in off)
        relu.append(sum(max(0.0, tolerance - min(r, 1 / r)) for r in (a, b)) / tolerance)
    return sum(tight) / len(tight), sum(relu) / len(relu)


@pytest.mark.parametrize("tolerance", [0.5, 0.9])
def test_the_penalties_are_the_authors(tolerance):
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(),
            nn.Linear(64, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Linear(9, 3),
        ).double()  # fmt: skip
    with torch.no_grad():  # most neurons active in the first layer, most inactive in the second, none balanced
        model[1].bias.copy_(torch.tensor([4.0, 4.0, 4.0, -4.0]))
        model[5].bias.copy_(torch.tensor([-9.0, -9.0, -9.0, -9.0, -9.0, -9.0, -9.0, 9.0, 9.0]))
    x = torch.rand(6, 1, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = certify.Network(model.train(), x, check=False).propagate(certify.Linf(0.02))
    with torch.no_grad():
        tight, relu = authors(found, tolerance)
    assert tight > 0
    assert relu > 0
    for share, left in ((0.0, 1.0), (0.25, 0.75), (1.0, 0.0)):
        ours = float(Tightness(0.5, tolerance).penalty(model, found, share).detach())
        assert ours == pytest.approx(0.5 * left * tight, abs=1e-12)
        ours = float(ReLUBalance(0.5, tolerance).penalty(model, found, share).detach())
        assert ours == pytest.approx(0.5 * left * relu, abs=1e-12)


def test_a_layer_without_active_or_inactive_neurons_costs_nothing():
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 4), nn.ReLU(), nn.Linear(4, 2))
    nn.init.constant_(model[1].bias, 100.0)
    x = torch.rand(6, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    penalty = ReLUBalance().penalty(model, certify.Network(model, x).propagate(certify.Linf(0.02)), 0.0)
    assert float(penalty.detach()) == 0.0
    penalty.backward()
    assert torch.isfinite(model[1].weight.grad).all()


def test_the_objective_penalises_while_the_radius_grows():
    objective = fast_ibp(0.05, Linear(0.0, 0.5))
    assert objective.name == "ibp+tightness+balance"
    x, y = images(12)[0]
    model = normalise_linear(plain()).train()
    _, during = objective.loss(model, x, y, CrossEntropy(), Progress(1, 4))
    _, after = objective.loss(model, x, y, CrossEntropy(), Progress(3, 4))
    assert during["tightness"] > 0
    assert after["tightness"] == after["balance"] == 0
    with pytest.raises(ValueError, match="tolerance"):
        Tightness(0.5, 0.0)


def test_it_certifies():
    model = initialise(normalise_linear(plain(3, 32)))
    history = train(model, images(48), fast_ibp(0.1, Linear(0.1, 0.5)), FAST, epochs=20, val=images(24, seed=1))
    assert history.selected().validation["certified"] > 0.6
