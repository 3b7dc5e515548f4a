"""alpha-CROWN: never looser than CROWN, sound against dense sampling, differentiable, and the best it can be."""

import pytest
import torch
from torch import nn

from certify.bounds import Region, trace
from certify.bounds.alpha import alpha_intervals, alpha_rows, rows_with
from certify.bounds.crown import crown_intervals, crown_rows


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.c = nn.Linear(4 * 25, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.a(x))
        x = torch.relu(self.b(x) + x)
        return self.c(x.flatten(1))


def networks() -> dict[str, tuple[nn.Module, tuple[int, ...]]]:
    return {
        "mlp": (nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 3)), (6,)),
        "leaky": (nn.Sequential(nn.Linear(6, 20), nn.LeakyReLU(0.2), nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 3)), (6,)),
        "clamp": (nn.Sequential(nn.Linear(6, 20), nn.ReLU6(), nn.Linear(20, 12), nn.Hardtanh(), nn.Linear(12, 3)), (6,)),
        "sigmoid": (nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 12), nn.Sigmoid(), nn.Linear(12, 3)), (6,)),
        "pool": (
            nn.Sequential(
                nn.Conv2d(2, 4, 3), nn.ReLU(), nn.MaxPool2d(3, 2, 1), nn.Flatten(), nn.Linear(16, 8), nn.ReLU(),
                nn.Linear(8, 3),
            ),
            (2, 5, 5),
        ),
        "residual": (Residual(), (2, 5, 5)),
    }  # fmt: skip


def setting(name: str, n: int = 3, eps: float = 0.3):
    torch.manual_seed(sum(map(ord, name)))
    net, shape = networks()[name]
    net = net.eval().double().requires_grad_(False)
    x = torch.rand(n, *shape, dtype=torch.float64)
    graph = trace(net, x)[0].folded()
    region = Region(x - eps, x + eps)
    C = torch.randn(n, 4, 3, dtype=torch.float64)
    return net, graph, region, C


@pytest.mark.parametrize("name", networks())
def test_tighter_than_crown_and_sound(name: str) -> None:
    net, graph, region, C = setting(name)
    found = crown_intervals(graph, region)
    crown = crown_rows(graph, region, found, C)
    fixed, slopes = alpha_rows(graph, region, found, C, steps=20)
    assert (fixed >= crown - 1e-12).all()
    assert float((fixed - crown).sum()) > 0
    tight = alpha_intervals(graph, region, found, steps=5)
    for (lo, hi), (a, b) in zip(tight, found, strict=True):
        assert (lo >= a - 1e-12).all()
        assert (hi <= b + 1e-12).all()
    joint, _ = alpha_rows(graph, region, tight, C, steps=20)
    t = torch.rand(4000, *region.lo.shape, dtype=torch.float64)
    x = region.lo + (region.hi - region.lo) * t.round_() if name == "mlp" else region.lo + (region.hi - region.lo) * t
    for i in range(len(C)):
        values = net(x[:, i]) @ C[i].t()
        assert (values.amin(0) >= fixed[i] - 1e-9).all()
        assert (values.amin(0) >= joint[i] - 1e-9).all()
        nodes = graph.values(x[:500, i])
        for value, (lo, hi) in zip(nodes, tight, strict=True):
            assert (value >= lo[i] - 1e-9).all()
            assert (value <= hi[i] + 1e-9).all()
    for i, own in enumerate(slopes):
        part = [(lo[i : i + 1], hi[i : i + 1]) for lo, hi in found]
        again = rows_with(graph, region.select(torch.tensor([i])), part, C[i : i + 1], own)
        assert torch.allclose(again[0], fixed[i], atol=1e-10)


def test_chunks_do_not_change_the_bounds() -> None:
    _, graph, region, C = setting("residual")
    found = crown_intervals(graph, region)
    assert torch.allclose(
        alpha_rows(graph, region, found, C, steps=5)[0], alpha_rows(graph, region, found, C, steps=5, memory=1)[0]
    )


def test_one_unit_by_hand() -> None:
    net = nn.Sequential(nn.Linear(1, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False)).double()
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[1.0], [-1.0]]))
        net[2].weight.copy_(torch.tensor([[1.0, 1.0]]))
    # relu(x) + relu(-x) = |x|: the minimum is 0, CROWN's slopes (1, 0) give min x = -1, equal slopes give 0.
    x = torch.tensor([[0.5]], dtype=torch.float64)
    graph = trace(net, x)[0].folded()
    region = Region(x - 1.5, x + 1.5)
    found = crown_intervals(graph, region)
    C = torch.ones(1, 1, 1, dtype=torch.float64)
    assert crown_rows(graph, region, found, C).item() == pytest.approx(-1.0)
    assert alpha_rows(graph, region, found, C, steps=200)[0].item() == pytest.approx(0.0, abs=1e-2)


def test_gradients_reach_the_network() -> None:
    torch.manual_seed(0)
    net = networks()["mlp"][0].double()
    x = torch.rand(1, 6, dtype=torch.float64)
    C = torch.randn(1, 2, 3, dtype=torch.float64)
    with torch.no_grad():
        graph = trace(net, x)[0].folded()
        region = Region(x - 0.2, x + 0.2)
        _, slopes = alpha_rows(graph, region, crown_intervals(graph, region), C, steps=5)

    def value() -> torch.Tensor:
        graph = trace(net, x)[0].folded()
        return rows_with(graph, region, crown_intervals(graph, region), C, slopes[0]).sum()

    value().backward()
    weight = net[2].weight
    assert weight.grad is not None
    slope = weight.grad[3, 4].item()
    with torch.no_grad():
        weight[3, 4] += 1e-6
        up = value().item()
        weight[3, 4] -= 2e-6
        down = value().item()
    assert (up - down) / 2e-6 == pytest.approx(slope, rel=1e-4, abs=1e-7)
