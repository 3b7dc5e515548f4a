"""One propagation for several questions: the same numbers as asking one by one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import certify
from certify.bounds import Network
from certify.bounds.affine import BatchNorm
from certify.specs import margin_rows


def net() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(),
            nn.Conv2d(3, 4, 3, stride=2), nn.ReLU6(), nn.Flatten(), nn.Linear(16, 5),
        )  # fmt: skip
        model(torch.rand(16, 1, 6, 6))
    return model.eval()


X = torch.rand(4, 1, 6, 6, generator=torch.Generator().manual_seed(1))
Y = torch.tensor([0, 1, 2, 3])


@pytest.mark.parametrize("p", [certify.Linf(0.03), certify.Brightness(0.05), certify.Contrast(0.05)])
def test_rows_and_outputs_are_those_of_bounds(p):
    model, rows = net(), margin_rows(Y, 5)
    network = Network(model, X)
    for intervals, row, method in (
        ("ibp", "ibp", "ibp"),
        ("crown-ibp", "crown", "crown-ibp"),
        ("crown", "crown", "crown"),
    ):
        found = network.propagate(p, intervals)
        lower, _ = certify.bounds(model, X, p, method, C=rows)
        torch.testing.assert_close(found.lower(rows, row), lower)
    low, high = certify.bounds(model, X, p, "ibp")
    for intervals in ("ibp", "crown-ibp"):
        torch.testing.assert_close(network.propagate(p, intervals).output, (low, high))
    with pytest.raises(ValueError, match="on top of the intervals"):
        network.propagate(p).lower(rows, "alpha")


@pytest.mark.parametrize("method", ["ibp", "crown-ibp", "crown"])
def test_every_sample_lies_in_the_rectifiers_intervals(method):
    model = net()
    p = certify.Brightness(0.1)
    layers = Network(model, X).propagate(p, method).rectifiers()
    assert [layer.path for layer in layers] == ["2", "4"]  # the clip of the perturbation is no layer of the network
    assert isinstance(layers[0].norm, BatchNorm)
    assert layers[1].norm is None
    for image in p.sample(X, 50, torch.Generator().manual_seed(2)):
        first = model[:2](image)
        for layer, value in zip(layers, (first, model[2:4](first))):
            assert (layer.lower <= value + 1e-5).all()
            assert (value <= layer.upper + 1e-5).all()
    assert torch.equal(layers[0].unstable, (layers[0].lower < 0) & (layers[0].upper > 0))


@pytest.mark.parametrize("training", [True, False])
def test_the_recorded_normalisation_is_the_modules(training):
    model = net().train(training)
    norm = Network(model, X, check=False).propagate(certify.Linf(0.01)).rectifiers()[0].norm
    z = model[0](X)
    mean = z.mean((0, 2, 3)) if training else model[1].running_mean
    var = z.var((0, 2, 3), unbiased=False) if training else model[1].running_var
    torch.testing.assert_close(norm.mean, mean)
    torch.testing.assert_close(norm.inverse, (var + model[1].eps).rsqrt())
    assert norm.weight is model[1].weight
    assert norm.offsets is model[1].bias
    expected = nn.functional.batch_norm(
        z, mean.detach(), var.detach(), model[1].weight, model[1].bias, eps=model[1].eps
    )
    torch.testing.assert_close(norm.forward(z), expected)


def test_the_entry_is_what_the_first_layer_reads():
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()
            self.register_buffer("std", torch.full((1, 1, 1, 1), 0.25))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net((x - 0.5) / self.std)

    found = Network(Scaled().eval(), X).propagate(certify.Linf(0.01, clip=False))
    low, high = found.entry
    torch.testing.assert_close(high - low, torch.full_like(X, 0.08))
    torch.testing.assert_close(found.input[1] - found.input[0], torch.full_like(X, 0.02))
