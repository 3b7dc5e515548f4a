"""Exact enumeration: hand-made pieces, and agreement with dense sampling."""

import math

import numpy as np
import pytest
import torch
from test_bounds import NETS, Block, build, conv, images
from test_forward import heat_map_net
from torch import nn

import certify
from certify import enumeration
from certify.bounds import trace
from certify.motion import Motion

F64 = torch.float64
SMOOTH = {"sigmoid", "tanh", "softmax"}


def walk(net, x, p, i=0, C=None, d=None, **options):
    graph = trace(net, x)[0].folded()
    motion = Motion(p, x)
    graph = motion.network(graph)
    outputs = graph.nodes[graph.output].shape[0]
    C = torch.eye(outputs, dtype=x.dtype) if C is None else C
    d = torch.zeros(len(C), dtype=x.dtype) if d is None else d
    lo, hi = options.pop("lo", motion.lo[i, 0].item()), options.pop("hi", motion.hi[i, 0].item())
    return enumeration.lowest(graph, motion, i, lo, hi, C, d, x.dtype, **options)


def scalar(function, *layers):
    """A network of one number, as an image of one pixel."""
    return nn.Sequential(nn.Flatten(), Block(function, *layers)).to(F64).eval()


ONE = torch.zeros(1, 1, 1, 1, dtype=F64)


def test_hand_made_pieces():
    """y = relu(t - 0.3) - 2 relu(t + 0.2) + relu(t) on [-1, 1] has slopes 0, -2, -1, 0 between its bends -0.2, 0, 0.3:
    it falls from 0 to -0.4 at 0 and -0.7 at 0.3, and stays there."""
    net = scalar(lambda x: torch.relu(x - 0.3) - 2 * torch.relu(x + 0.2) + torch.relu(x))
    found = walk(net, ONE, certify.Brightness(1.0, clip=False))
    assert found.lower == pytest.approx(-0.7, abs=1e-15)
    assert found.argmin == pytest.approx(0.3, abs=1e-15)
    assert not found.timeout
    # One chunk sees the three bends exactly; chunk ends add pieces, so count within a single chunk.
    one = walk(net, ONE, certify.Brightness(1.0, clip=False), lo=-0.25, hi=0.35)
    graph = trace(net, ONE)[0].folded()
    motion = Motion(certify.Brightness(1.0, clip=False), ONE)
    walker = enumeration._Walker(graph, motion, 0, torch.ones(1, 1, dtype=F64), torch.zeros(1, dtype=F64), F64)
    low, place, pieces = walker.chunk(-1.0, 1.0, 100)
    assert (low, pieces) == (pytest.approx(-0.7), 4)
    assert place == pytest.approx(0.3, abs=1e-15)
    assert one.lower == pytest.approx(-0.7)


def test_pieces_are_where_they_should_be():
    """Clipping at 1, a leaky ReLU, and the switch of a max-pool, all in closed form."""
    x = torch.tensor([[[[0.9, 0.4]]]], dtype=F64)
    pool = nn.Sequential(
        Block(lambda v: v * torch.tensor([1.0, 3.0], dtype=F64)), nn.MaxPool2d((1, 2)), nn.Flatten()
    ).eval()
    # max(min(0.9 + t, 1), 3 (0.4 + t)): switch where 0.9 + t = 1.2 + 3 t, t = -0.15; clip at t = 0.1, hidden by then.
    motion = Motion(certify.Brightness(0.3), x)
    graph = motion.network(trace(pool, x)[0].folded())
    walker = enumeration._Walker(graph, motion, 0, torch.ones(1, 1, dtype=F64), torch.zeros(1, dtype=F64), F64)
    assert walker.chunk(-0.3, 0.3, 100)[2] == 3
    assert walker.chunk(-0.3, -0.15, 100)[2] == 1
    low, place, _ = walker.chunk(-0.3, 0.3, 100)
    assert (low, place) == (pytest.approx(0.6), pytest.approx(-0.3))
    leaky = scalar(lambda v: nn.functional.leaky_relu(v - 0.1, 0.5) - 0.75 * v)
    found = walk(leaky, ONE, certify.Brightness(1.0, clip=False))
    assert found.argmin == pytest.approx(0.1, abs=1e-15)
    assert found.lower == pytest.approx(-0.075, abs=1e-15)


@pytest.mark.parametrize("name", sorted(set(NETS) - SMOOTH))
def test_enumeration_is_dense_sampling_made_exact(name):
    net = build(name)
    x = images(net)
    p = certify.Brightness(0.2)
    C = torch.randn(3, net(x).shape[1], dtype=F64, generator=torch.Generator().manual_seed(2))
    for i in range(2):
        found = walk(net, x, p, i, C)
        t = torch.linspace(-0.2, 0.2, 2001, dtype=F64)
        with torch.no_grad():
            dense = (net(p.apply(x[i : i + 1], t.unsqueeze(1)).flatten(0, 1)) @ C.t()).amin(1)
            at = torch.tensor([found.argmin], dtype=F64)
            assert float((net(p.apply(x[i : i + 1], at)) @ C.t()).min()) == pytest.approx(found.lower, abs=1e-10)
        assert found.lower <= dense.min() + 1e-12
        assert found.lower >= dense.min() - 2e-4 * (1 + dense.abs().max())
        assert found.done == 0.2


@pytest.mark.parametrize("name", ["relu", "max-pool overlapping", "residual"])
def test_float32_agrees_with_float64(name):
    net = build(name)
    x = images(net)
    exact = walk(net, x, certify.Contrast(0.3))
    single = walk(net.float(), x.float(), certify.Contrast(0.3))
    assert single.lower == pytest.approx(exact.lower, abs=1e-5)
    assert single.pieces == pytest.approx(exact.pieces, rel=0.1)


def test_heat_map_heads_are_enclosed_tightly():
    net = heat_map_net()
    x = torch.rand(2, 2, 8, 8, dtype=F64, generator=torch.Generator().manual_seed(7))
    p = certify.Brightness(0.5, clip=False)
    C = torch.randn(5, 6, dtype=F64, generator=torch.Generator().manual_seed(2))
    found = walk(net, x, p, 1, C)
    t = torch.linspace(-0.5, 0.5, 4001, dtype=F64)
    with torch.no_grad():
        dense = (net(p.apply(x[1:2], t.unsqueeze(1)).flatten(0, 1)) @ C.t()).amin(1)
    assert found.lower <= dense.min() + 1e-12
    assert found.lower >= dense.min() - 1e-5


def test_a_steep_heat_map_dips_inside_a_piece():
    """y(t) = E over logits (0, 40 t, 80 t - 8) of (0, -1, 0): smallest well inside the only linear piece."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(1, 3), nn.Softmax(-1), nn.Linear(3, 1, bias=False)).to(F64).eval()
    net[1].weight.data = torch.tensor([[0.0], [40.0], [80.0]], dtype=F64)
    net[1].bias.data = torch.tensor([0.0, 0.0, -8.0], dtype=F64)
    net[3].weight.data = torch.tensor([[0.0, -1.0, 0.0]], dtype=F64)
    found = walk(net, ONE, certify.Brightness(1.0, clip=False))
    t = np.linspace(-1, 1, 200001)
    exact = (-1 / (np.exp(-40 * t) + 1 + np.exp(40 * t - 8))).min()
    assert found.lower == pytest.approx(exact, abs=1e-6)
    assert found.lower <= exact
    assert found.argmin == pytest.approx(0.1, abs=1e-2)


@pytest.mark.parametrize("p", [certify.Hue(0.1), "curve"], ids=["hue", "curve"])
def test_paths_with_bends_of_their_own(p):
    torch.manual_seed(0)
    net = nn.Sequential(conv(3, 5), nn.ReLU(), conv(5, 5), nn.ReLU(), nn.Flatten(), nn.Linear(5 * 9, 4)).to(F64).eval()
    x = torch.rand(2, 3, 7, 7, dtype=F64)
    if p == "curve":
        p = certify.Curve(torch.tensor([-0.1, 0.02, 0.1]), torch.rand(2, 3, 3, 7, 7, dtype=F64) * 1.2 - 0.1)
    found = walk(net, x, p, 1)
    low, high = found.argmin, p.limits(x)[1][1, 0].item()
    t = torch.linspace(-high, high, 3001, dtype=F64)
    own = p.select(torch.tensor([1]), 2)
    with torch.no_grad():
        dense = net(own.apply(x[1:2], t.unsqueeze(1)).flatten(0, 1)).amin(1)
        there = net(own.apply(x[1:2], torch.tensor([low], dtype=F64))).min()
    assert there.item() == pytest.approx(found.lower, abs=1e-10)
    assert dense.min() - 1e-3 <= found.lower <= dense.min() + 1e-12


def test_the_walk_stops_early_and_on_time():
    net = build("relu")
    x = images(net)
    full = walk(net, x, certify.Brightness(0.2))
    stopped = walk(net, x, certify.Brightness(0.2), stop=math.inf)
    assert stopped.done < full.done
    assert stopped.pieces < full.pieces
    late = walk(net, x, certify.Brightness(0.2), seconds=0.0)
    assert late.timeout
    assert late.done < full.done
    tight = walk(net, x, certify.Brightness(0.2), memory=1)
    assert tight.lower == pytest.approx(full.lower, abs=1e-12)


def test_what_can_be_listed():
    for name in NETS:
        graph = trace(build(name), images(build(name)))[0].folded()
        assert enumeration.listable(graph) == (name not in {"sigmoid", "tanh", "softmax"} or name == "softmax"), name
    behind = nn.Sequential(nn.Flatten(), nn.Softmax(-1), nn.Linear(4, 4), nn.ReLU()).eval()
    assert not enumeration.listable(trace(behind, torch.rand(1, 1, 2, 2))[0].folded())
