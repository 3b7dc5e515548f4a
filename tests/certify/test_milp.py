"""The mixed-integer oracle against sampling, exhaustive enumeration of activation patterns, and hand-made cases."""

import itertools

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from torch import nn

from certify import milp
from certify.perturbations import L2, Box, Brightness, Linf


def mlp(*sizes: int, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(sizes):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers[:-1]).double().eval().requires_grad_(False)


def by_enumeration(net: nn.Sequential, lo: torch.Tensor, hi: torch.Tensor, c: torch.Tensor) -> float:
    """The minimum of c y for one hidden layer: a linear program for every pattern of signs."""
    first, last = net[0], net[2]
    W, b, V, e = (v.numpy() for v in (first.weight, first.bias, last.weight, last.bias))
    best = np.inf
    for signs in itertools.product((0, 1), repeat=len(b)):
        on = np.array(signs)
        row = c.numpy() @ V @ (on[:, None] * W)
        turn = np.where(on == 1, -1.0, 1.0)
        result = linprog(
            row, A_ub=turn[:, None] * W, b_ub=-turn * b, bounds=np.column_stack([lo.numpy(), hi.numpy()]),
            method="highs",
        )  # fmt: skip
        if result.status == 0:
            best = min(best, result.fun + float(c.numpy() @ (V @ (on * b) + e)))
    return best


@pytest.mark.parametrize("seed", range(3))
def test_equals_enumeration_of_patterns(seed: int) -> None:
    net = mlp(3, 6, 2, seed=seed)
    x = torch.rand(1, 3, dtype=torch.float64)
    C = torch.randn(2, 2, dtype=torch.float64)
    d = torch.randn(2, dtype=torch.float64)
    found = milp.minimum(net, x, Linf(0.8, clip=False), C, d)
    for row in range(2):
        exact = by_enumeration(net, x[0] - 0.8, x[0] + 0.8, C[row]) + d[row].item()
        assert found[row].finished
        assert found[row].value == pytest.approx(exact, abs=1e-6)
        assert found[row].bound <= found[row].value + 1e-9
        assert (C[row] @ net(found[row].x)[0] + d[row]).item() == pytest.approx(exact, abs=1e-6)


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 2, 3, padding=1), nn.Conv2d(2, 2, 1)
        self.pool, self.c = nn.MaxPool2d(2, 2, 1), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.leaky_relu(self.a(x), 0.1)
        x = self.pool(torch.clamp(self.b(x) + x, -0.2, 0.5))
        return self.c(x.flatten(1))


def test_leaky_clamp_pool_residual_below_every_sample_and_attained() -> None:
    torch.manual_seed(3)
    net = Mixed().double().eval().requires_grad_(False)
    x = torch.rand(1, 1, 2, 2, dtype=torch.float64)
    net.c = nn.Linear(8, 2).double().requires_grad_(False)
    C = torch.eye(2, dtype=torch.float64)
    found = milp.minimum(net, x, Linf(0.3, clip=False), C)
    grid = torch.cartesian_prod(*[torch.linspace(-0.3, 0.3, 13, dtype=torch.float64)] * 4).reshape(-1, 1, 2, 2)
    values = net(x + grid)
    for row in range(2):
        assert found[row].value <= values[:, row].min().item() + 1e-7
        assert found[row].value >= values[:, row].min().item() - 0.1
        assert net(found[row].x)[0, row].item() == pytest.approx(found[row].value, abs=1e-6)


def test_an_affine_family_is_minimised_over_its_parameters() -> None:
    net = mlp(4, 8, 2, seed=1)
    x = torch.rand(1, 4, dtype=torch.float64)
    model = nn.Sequential(nn.Flatten(), net)
    image = x.reshape(1, 1, 2, 2)
    (found,) = milp.minimum(model, image, Brightness(0.4), torch.tensor([[1.0, -1.0]]))
    t = torch.linspace(-0.4, 0.4, 4001, dtype=torch.float64)
    values = model((image + t.reshape(-1, 1, 1, 1)).clamp(0, 1)) @ torch.tensor([1.0, -1.0], dtype=torch.float64)
    assert found.value == pytest.approx(values.min().item(), abs=1e-3)
    assert found.value <= values.min().item() + 1e-9


def test_no_unit_undecided_and_no_input_free() -> None:
    net = mlp(3, 5, 2)
    x = torch.rand(1, 3, dtype=torch.float64)
    exact = net(x)[0, 0].item()
    C = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    (found,) = milp.minimum(net, x, Linf(1e-9, clip=False), C)
    assert found.binaries == 0
    assert found.value == pytest.approx(exact, abs=1e-6)
    (found,) = milp.minimum(net, x, Box(x, x), C)
    assert found.value == pytest.approx(exact, abs=1e-12)


def test_bad_input() -> None:
    net = mlp(3, 5, 2)
    x = torch.rand(2, 3)
    C = torch.eye(2)
    with pytest.raises(ValueError, match="one image"):
        milp.minimum(net, x, Linf(0.1), C)
    with pytest.raises(ValueError, match="ball"):
        milp.minimum(net, x[:1], L2(0.1), C)
    with pytest.raises(ValueError, match="C must be"):
        milp.minimum(net, x[:1], Linf(0.1), torch.eye(3))
