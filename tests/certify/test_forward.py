"""Forward lines, tangents and weighted means: every form contains what it stands for."""

import itertools

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from test_bounds import NETS, Block, build, conv, image_net, images
from torch import nn

import certify
from certify.bounds import attach, trace
from certify.bounds.activations import Clamp, LeakyReLU, ReLU, sigmoid, tanh
from certify.bounds.expectation import Expectation, extremes
from certify.bounds.forward import Form, activation, departure, entry, propagate
from certify.bounds.interval import intervals
from certify.bounds.region import Region
from certify.bounds.tangent import Tangent, slope_at

F64 = torch.float64


def inside(form, values, s):
    """`values` (S, B, ...) at parameters s (S, K) lie within the radius of the centre line."""
    lines = form.centre[0] + torch.einsum("sk,k...->s...", s, form.centre[1:])
    return ((values - lines).abs() <= form.radius + 1e-9).all()


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("p", [certify.Brightness(0.1), certify.BrightnessContrast(0.03, 0.1)], ids=["one", "two"])
def test_lines_contain_the_network(name, p):
    net = build(name)
    x = images(net)
    graph, region = attach(trace(net, x)[0].folded(), x, p)
    k = p.parameters
    s = torch.cat(
        [2 * torch.rand(200, k, dtype=F64, generator=torch.Generator().manual_seed(0)) - 1, torch.eye(k), -torch.eye(k)]
    )
    t = s * region.hi[0]
    values = torch.stack([net(p.apply(x, row.expand(len(x), k))) for row in t])
    form = propagate(graph, entry(region))
    assert inside(form, values, s)
    rows = torch.randn(1, 6, 4, dtype=F64, generator=torch.Generator().manual_seed(1))[:, :, : values.shape[2]]
    if values.shape[2] == 4:
        for i in range(len(x)):
            start = entry(region.select(torch.tensor([i])))
            own, _ = attach(trace(net, x)[0].folded(), x[i : i + 1], p)
            tangent = Tangent(own, (region.lo + region.hi)[i : i + 1] / 2, rows)
            tight, out = tangent.bound(start)
            assert inside(tight, values[:, i : i + 1] @ rows[0].t(), s)
            torch.testing.assert_close(out.interval()[0][0], form.interval()[0][i])


def test_the_tangent_is_exact_where_nothing_changes_side():
    net = build("residual")
    x = images(net)[1:2]
    p = certify.Brightness(1e-9, clip=False)
    graph, region = attach(trace(net, x)[0].folded(), x, p)
    rows = torch.eye(4, dtype=F64).unsqueeze(0)
    tight, _ = Tangent(graph, torch.zeros(1, 1, dtype=F64), rows).bound(entry(region))
    assert tight.radius.max() == 0
    slope = (net(p.apply(x, torch.tensor([1e-9], dtype=F64))) - net(x)) / 1e-9
    torch.testing.assert_close(tight.centre[1] / 1e-9, slope, rtol=1e-4, atol=1e-5)


def test_the_tangent_cuts_the_remainder_of_a_deep_network():
    torch.manual_seed(0)
    blocks = [layer for _ in range(6) for layer in (conv(6, 6, padding=1), nn.ReLU())]
    net = image_net(nn.ReLU(), *blocks, nn.Flatten(), width=6).to(F64).eval()
    x = images(net)[1:2]
    p = certify.Brightness(0.03)
    graph, region = attach(trace(net, x)[0].folded(), x, p)
    tight, out = Tangent(graph, torch.zeros(1, 1, dtype=F64), torch.eye(4, dtype=F64).unsqueeze(0)).bound(entry(region))
    assert tight.radius.mean() < out.radius.mean() / 3


@pytest.mark.parametrize(
    "op", [ReLU(), LeakyReLU(0.1), Clamp(0.0, 6.0), Clamp(-0.5, 0.25), Clamp(-torch.inf, 0.1), sigmoid(), tanh()]
)
@pytest.mark.parametrize("k", [1, 3])
def test_lines_contain_the_function_and_its_departure_from_any_tangent(op, k):
    generator = torch.Generator().manual_seed(k)
    centre = (
        torch.randn(1 + k, 4000, dtype=F64, generator=generator) * torch.rand(4000, dtype=F64, generator=generator) * 4
    )
    radius = torch.rand(4000, dtype=F64, generator=generator) * (torch.rand(4000, generator=generator) < 0.6)
    v = Form(centre, radius)
    found = activation(op, v)
    slope = slope_at(op, 2 * torch.randn(4000, dtype=F64, generator=generator))
    left = departure(op, v, slope)
    s = 2 * torch.rand(100, k, dtype=F64, generator=generator) - 1
    s = torch.cat([s, s.sign()])
    line = centre[0] + s @ centre[1:]
    for noise in (-1.0, -0.3, 0.0, 1.0):
        value = line + noise * radius
        assert inside(found, op.forward(value), s)
        assert inside(left, op.forward(value) - slope * value, s)
    lo, hi = op.interval(v.interval())
    assert (found.radius <= (hi - lo) / 2 + 1e-9).all()


def test_an_affine_network_is_bounded_exactly():
    torch.manual_seed(0)
    net = nn.Sequential(conv(2, 3, stride=2), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(3, 4)).to(F64).eval()
    x = torch.rand(2, 2, 6, 6, dtype=F64)
    p = certify.BrightnessContrast(0.1, 0.2, clip=False)
    lo, hi = certify.bounds(net, x, p, method="forward")
    corners = torch.stack(
        [net(p.apply(x, torch.tensor(t, dtype=F64).expand(2, 2))) for t in itertools.product((-0.1, 0.1), (-0.2, 0.2))]
    )
    torch.testing.assert_close(lo, corners.amin(0))
    torch.testing.assert_close(hi, corners.amax(0))


def test_a_low_dimensional_box_is_bounded_and_a_large_one_refused():
    net = build("relu")
    x = images(net)
    lo, hi = x.clone(), x.clone()
    hi[:, 0, 2, 2:5] = 1
    box = certify.Box(lo, hi)
    low, high = certify.bounds(net, x, box, method="forward")
    y = net(box.sample(x, 300, torch.Generator().manual_seed(0)).flatten(0, 1)).reshape(300, len(x), -1)
    assert (y >= low - 1e-9).all()
    assert (y <= high + 1e-9).all()
    ibp_low, ibp_high = certify.bounds(net, x, box, method="ibp")
    assert (high - low).mean() < (ibp_high - ibp_low).mean()
    big = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 2)).eval()
    with pytest.raises(ValueError, match="free inputs"):
        certify.bounds(big, torch.rand(1, 3, 16, 16), certify.Linf(0.1), method="forward")


def corner_means(lo, hi, g):
    """All weighted means with every weight at one of its ends."""
    return [float((np.exp(z) * g).sum() / np.exp(z).sum()) for z in itertools.product(*zip(lo.tolist(), hi.tolist()))]


def test_weighted_means_are_bounded_exactly():
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        lo = torch.randn(7, dtype=F64, generator=generator)
        hi = lo + 2 * torch.rand(7, dtype=F64, generator=generator) ** 3
        g = torch.randn(2, 7, dtype=F64, generator=generator)
        found = extremes(lo, hi, g)
        for row in range(2):
            every = corner_means(lo, hi, g[row].numpy())
            assert found.low[row].item() == pytest.approx(min(every), abs=1e-12)
            assert found.high[row].item() == pytest.approx(max(every), abs=1e-12)


def test_weighted_means_agree_with_a_linear_program():
    """Charnes and Cooper: maximise g u over u = w / sum(w), with tau exp(lo) <= u <= tau exp(hi) and sum(u) = 1."""
    generator = torch.Generator().manual_seed(1)
    n = 40
    lo = torch.randn(n, dtype=F64, generator=generator)
    hi = lo + torch.rand(n, dtype=F64, generator=generator)
    g = 60 * torch.rand(1, n, dtype=F64, generator=generator)
    eye = np.eye(n)
    bounds = np.concatenate([np.c_[eye, -np.exp(hi.numpy())], np.c_[-eye, np.exp(lo.numpy())]])
    for sign, expected in ((1, extremes(lo, hi, g).low), (-1, extremes(lo, hi, g).high)):
        cost = np.r_[sign * g[0].numpy(), 0.0]
        solved = linprog(cost, A_ub=bounds, b_ub=np.zeros(2 * n), A_eq=np.r_[np.ones(n), 0.0][None], b_eq=[1.0])
        assert sign * solved.fun == pytest.approx(expected.item(), abs=1e-7)


def test_weighted_means_survive_extreme_logits():
    g = torch.tensor([[0.0, 1.0, 5.0]], dtype=F64)
    wide = extremes(torch.full((3,), -2000.0, dtype=F64), torch.full((3,), 2000.0, dtype=F64), g)
    assert (wide.low.item(), wide.high.item()) == (0.0, 5.0)
    point = torch.tensor([-1000.0, 1000.0, 999.0], dtype=F64)
    exact = float(1 + 4 / (1 + np.e))
    assert extremes(point, point, g).low.item() == pytest.approx(exact)
    assert extremes(point, point, g).high.item() == pytest.approx(exact)


def heat_map_net():
    torch.manual_seed(3)
    grid = torch.stack(
        torch.meshgrid(torch.arange(6, dtype=F64), torch.arange(6, dtype=F64), indexing="xy"), -1
    ).reshape(36, 2)
    return (
        nn.Sequential(
            conv(2, 6, padding=1),
            nn.ReLU(),
            conv(6, 3),
            nn.Flatten(2),
            nn.Softmax(-1),
            Block(lambda p: p @ grid),
            nn.Flatten(),
        )
        .to(F64)
        .eval()
    )


def test_heat_map_heads_are_one_operation_and_stay_in_the_grid():
    net, x = heat_map_net(), torch.rand(3, 2, 8, 8, dtype=F64, generator=torch.Generator().manual_seed(7))
    graph = trace(net, x)[0].folded()
    assert sum(isinstance(n.op, Expectation) for n in graph.nodes) == 1
    torch.testing.assert_close(graph.forward(x), net(x))
    p = certify.Linf(0.5)
    for method in ("ibp", "crown-ibp", "crown"):
        lo, hi = certify.bounds(net, x, p, method=method)
        assert (lo >= -1e-9).all()
        assert (hi <= 5 + 1e-9).all()
    narrow = Region(x - 0.01, x + 0.01)
    lo, hi = intervals(graph, narrow)[graph.output]
    apart, ends = trace(net, x)[0], []
    for index in range(len(apart.nodes)):
        ends.append((narrow.lo, narrow.hi) if index == 0 else apart.step(index, ends))
    assert (hi - lo).mean() < (ends[-1][1] - ends[-1][0]).mean() / 2


@pytest.mark.parametrize("eps", [0.3, 0.03, 0.003])
def test_lines_of_heat_map_heads_contain_them_and_close_in(eps):
    net, x = heat_map_net(), torch.rand(2, 2, 8, 8, dtype=F64, generator=torch.Generator().manual_seed(7))
    p = certify.BrightnessContrast(eps, eps)
    graph, region = attach(trace(net, x)[0].folded(), x, p)
    s = 2 * torch.rand(300, 2, dtype=F64, generator=torch.Generator().manual_seed(0)) - 1
    values = torch.stack([net(p.apply(x, (row * eps).expand(2, 2))) for row in s])
    assert inside(propagate(graph, entry(region)), values, s)
    rows = torch.eye(6, dtype=F64).unsqueeze(0)
    own, part = attach(trace(net, x)[0].folded(), x[:1], p)
    tight, _ = Tangent(own, torch.zeros(1, 2, dtype=F64), rows).bound(entry(part))
    assert inside(tight, values[:, :1], s)
    assert tight.radius.max() < 1e3 * eps**2
