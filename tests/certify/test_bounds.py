"""Every operation under every method: sampled points lie inside, and the methods are ordered as theory says."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import certify
from certify.bounds import METHODS, Network, Region, UnsupportedOperation, trace
from certify.bounds.activations import Clamp, LeakyReLU, ReLU, sigmoid, tanh
from certify.bounds.crown import _meet, crown_intervals, crown_rows

F64 = torch.float64
DIRECT = tuple(m for m in METHODS if not m.startswith("alpha"))  # the others optimise, and are tested on fewer networks


class Block(nn.Module):
    """Wraps a function of the input as a module."""

    def __init__(self, function, *layers):
        super().__init__()
        self.function = function
        self.layers = nn.ModuleList(layers)

    def forward(self, x):
        return self.function(x, *self.layers)


def conv(i, o, k=3, **options):
    return nn.Conv2d(i, o, k, **options)


def image_net(*middle, width=6, size=8):
    """Input (2, size, size) -> conv -> middle -> linear 4."""
    net = nn.Sequential(conv(2, width, padding=1), *middle, nn.Flatten())
    features = net(torch.zeros(1, 2, size, size)).shape[1]
    return nn.Sequential(*net, nn.Linear(features, 4))


def normed(channels):
    norm = nn.BatchNorm2d(channels)
    generator = torch.Generator().manual_seed(5)
    norm.running_mean.copy_(torch.randn(channels, generator=generator) * 0.1)
    norm.running_var.copy_(torch.rand(channels, generator=generator) + 0.5)
    norm.weight.data.copy_(torch.randn(channels, generator=generator))
    norm.bias.data.copy_(torch.randn(channels, generator=generator) * 0.1)
    return norm


NETS = {
    "relu": lambda: image_net(nn.ReLU(), conv(6, 6, padding=1), nn.ReLU()),
    "batch-norm": lambda: image_net(normed(6), nn.ReLU(), conv(6, 5), normed(5), nn.ReLU()),
    "batch-norm first": lambda: nn.Sequential(normed(2), *image_net(nn.ReLU())),
    "relu6": lambda: image_net(Block(lambda x: 8 * x + 3), nn.ReLU6(), conv(6, 6), nn.ReLU6()),
    "leaky": lambda: image_net(nn.LeakyReLU(0.2), conv(6, 6), nn.LeakyReLU(0.1)),
    "clamp": lambda: image_net(Block(lambda x: x.clamp(-0.1, 0.2)), conv(6, 6), Block(lambda x: torch.clamp(x, max=0.1))),
    "sigmoid": lambda: image_net(nn.Sigmoid(), conv(6, 6), Block(lambda x: torch.sigmoid(4 * x))),
    "tanh": lambda: image_net(nn.Tanh(), conv(6, 6), Block(lambda x: torch.tanh(4 * x))),
    "max-pool": lambda: image_net(nn.ReLU(), nn.MaxPool2d(2), conv(6, 6, padding=1), nn.MaxPool2d(2), nn.ReLU()),
    "max-pool overlapping": lambda: image_net(nn.MaxPool2d(3, 2, padding=1), nn.ReLU(), conv(6, 6), nn.ReLU()),
    "max-pool ceil": lambda: image_net(nn.ReLU(), nn.MaxPool2d(3, 2, ceil_mode=True), conv(6, 3), nn.ReLU(), size=9),
    "max-pool dilated": lambda: image_net(nn.MaxPool2d(2, 1, dilation=2), nn.ReLU()),
    "avg-pool": lambda: image_net(nn.ReLU(), nn.AvgPool2d(3, 2, padding=1, ceil_mode=True), conv(6, 6), nn.ReLU()),
    "avg-pool uncounted": lambda: image_net(nn.ReLU(), nn.AvgPool2d(3, 2, padding=1, count_include_pad=False), nn.ReLU()),
    "adaptive pool": lambda: image_net(nn.ReLU(), nn.AdaptiveAvgPool2d(3), conv(6, 6), nn.ReLU(), nn.AdaptiveAvgPool2d(1)),
    "strided, dilated": lambda: image_net(nn.ReLU(), conv(6, 4, stride=2), nn.ReLU(), conv(4, 4, 2, dilation=2, padding=1), nn.ReLU()),
    "grouped, depthwise": lambda: image_net(nn.ReLU(), conv(6, 6, groups=3), nn.ReLU(), conv(6, 6, groups=6, padding=1), nn.ReLU()),
    "same padding": lambda: image_net(nn.ReLU(), conv(6, 4, padding="same"), nn.ReLU()),
    "residual": lambda: image_net(nn.ReLU(), Block(lambda x, f, g: F.relu(x + g(F.relu(f(x)))), conv(6, 6, padding=1), conv(6, 6, padding=1))),
    "residual, strided": lambda: image_net(nn.ReLU(), Block(lambda x, f, g: F.relu(g(x) - f(x)), conv(6, 4, stride=2, padding=1), conv(6, 4, 1, stride=2))),
    "cat": lambda: image_net(nn.ReLU(), Block(lambda x, f, g: torch.cat([f(x), g(x), x], 1), conv(6, 2, padding=1), conv(6, 3, 1)), nn.ReLU(), conv(11, 4), nn.ReLU()),
    "mean": lambda: image_net(nn.ReLU(), conv(6, 6), nn.ReLU(), Block(lambda x: x.mean((2, 3)))),
    "arithmetic": lambda: image_net(Block(lambda x: 1 - (2 * x - 0.1) / 3), nn.ReLU(), Block(lambda x: -x + torch.linspace(0, 1, 6, dtype=x.dtype).reshape(1, 6, 1, 1)), nn.ReLU()),
    "slices": lambda: image_net(nn.ReLU(), Block(lambda x: x[:, 1:4, ::2] + x[..., :3, 1::2, :]), nn.ReLU()),
    "shapes": lambda: image_net(nn.ReLU(), Block(lambda x: x.permute(0, 2, 3, 1).reshape(x.size(0), -1).view(x.shape[0], 6, -1).transpose(1, 2).unsqueeze(1).squeeze(1)), nn.ReLU()),
    "pads": lambda: image_net(nn.ReLU(), nn.ZeroPad2d(1), conv(6, 4), nn.ReflectionPad2d(1), nn.ReLU()),
    "splits": lambda: image_net(nn.ReLU(), Block(lambda x: x.chunk(2, 1)[0] + 2 * x.split([3, 3], 1)[1]), nn.ReLU(), Block(lambda x: x.unbind(2)[1])),
    "in place": lambda: image_net(nn.ReLU(inplace=True), conv(6, 6), Block(lambda x: x.relu_()), nn.Dropout(0.5)),
    "softmax": lambda: image_net(nn.ReLU(), conv(6, 3), Block(lambda x: torch.softmax(5 * x.flatten(2), 2)), Block(lambda p: p @ torch.linspace(0, 7, 72, dtype=p.dtype).reshape(36, 2))),
    "linear": lambda: nn.Sequential(nn.Flatten(), nn.Linear(128, 20), nn.ReLU(), nn.Linear(20, 15), nn.BatchNorm1d(15), nn.ReLU(), nn.Linear(15, 4)),
    "matmul": lambda: nn.Sequential(nn.Flatten(), Block(lambda x: torch.matmul(x, torch.linspace(-1, 1, 128 * 9, dtype=x.dtype).reshape(128, 9).sin())), nn.ReLU(), nn.Linear(9, 4)),
}  # fmt: skip

PERTURBATIONS = {
    "linf": certify.Linf(0.04),
    "l2": certify.L2(0.3),
    "brightness": certify.Brightness(0.1),
    "contrast": certify.Contrast(0.2, about="mean"),
    "brightness-contrast": certify.BrightnessContrast(0.05, 0.1),
    "blur": certify.BlurMix(0.5),
}


def build(name):
    torch.manual_seed(sum(map(ord, name)))
    return NETS[name]().to(F64).eval()


def images(net, n=3):
    size = 9 if isinstance(net[-1], nn.Linear) and net[-1].in_features == 12 else 8
    x = torch.rand(n, 2, size, size, dtype=F64, generator=torch.Generator().manual_seed(7))
    x[0, :, :3] = torch.tensor([0.0, 1.0, 0.0], dtype=F64).reshape(1, 3, 1)  # clipping matters
    return x


@pytest.mark.parametrize("name", NETS)
def test_graph_computes_the_network(name):
    net = build(name)
    x = images(net)
    graph, output = trace(net, x)
    assert torch.equal(output, net(x))
    torch.testing.assert_close(graph.forward(x), output)
    torch.testing.assert_close(graph.folded().forward(x), output)


@pytest.mark.parametrize("name", NETS)
def test_samples_lie_inside_and_methods_are_ordered(name):
    net = build(name)
    x = images(net)
    for label, p in PERTURBATIONS.items():
        samples = p.sample(x, 300, torch.Generator().manual_seed(1)).flatten(0, 1)
        ends = p.limits(x) if hasattr(p, "limits") else ()
        corners = list(p.hull(x)) if label == "linf" else [p.apply(x, end) for end in ends]
        with torch.no_grad():
            y = torch.cat([net(samples).reshape(300, len(x), -1), *(net(c).unsqueeze(0) for c in corners)])
        widths = {}
        for method in DIRECT:
            lo, hi = certify.bounds(net, x, p, method)
            assert (y >= lo - 1e-9).all(), (label, method)
            assert (y <= hi + 1e-9).all(), (label, method)
            widths[method] = (hi - lo).mean().item()
        assert widths["crown"] <= widths["ibp"] * (1 + 1e-9), (label, widths)


@pytest.mark.parametrize("name", ["linear", "leaky", "residual", "max-pool overlapping"])
def test_optimised_lines_are_sound_and_never_looser(name):
    net = build(name)
    x = images(net, 2)
    for p in (certify.Linf(0.03), certify.Brightness(0.1)):
        y = net(p.sample(x, 200, torch.Generator().manual_seed(1)).flatten(0, 1)).reshape(200, len(x), -1)
        lo, hi = certify.bounds(net, x, p, "crown")
        for method in ("alpha-crown", "alpha-crown-full"):
            low, high = certify.bounds(net, x, p, method)
            assert (y >= low - 1e-9).all()
            assert (y <= high + 1e-9).all()
            assert (low >= lo - 1e-9).all()
            assert (high <= hi + 1e-9).all()
            assert low.requires_grad


def positive_net(seed):
    """A random ReLU network with mostly positive weights, on which interval propagation often beats CROWN."""
    torch.manual_seed(seed)
    if seed % 2:
        layers = [m for _ in range(4) for m in (nn.Linear(9, 9), nn.ReLU())]
        net, shape = nn.Sequential(*layers, nn.Linear(9, 4)), (9,)
    else:
        block = Block(lambda x, f: F.relu(x + f(x)), conv(4, 4, padding=1))
        middle = [nn.ReLU(), conv(4, 4, padding=1), nn.ReLU(), block, conv(4, 4, padding=1), nn.ReLU()]
        net, shape = nn.Sequential(conv(1, 4), *middle, nn.Flatten(), nn.Linear(36, 4)), (1, 5, 5)
    for layer in net.modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            layer.weight.data.add_(layer.weight.data.abs(), alpha=0.5)
    return net.to(F64).eval().requires_grad_(False), torch.rand(3, *shape, dtype=F64)


def test_intersected_intervals_never_loosen_crown():
    narrower = 0
    for seed in range(24):
        net, x = positive_net(seed)
        region = Region(x - 0.4, x + 0.4)
        graph = trace(net, x)[0].folded()
        C = torch.cat([torch.eye(4, dtype=F64), -torch.eye(4, dtype=F64)]).expand(3, -1, -1)
        alone, met = crown_intervals(graph, region, intersect=False), crown_intervals(graph, region)
        for (lo, hi), (a, b) in zip(met, alone, strict=True):
            assert (lo >= a).all()
            assert (hi <= b).all()
        plain, rows = crown_rows(graph, region, alone, C), crown_rows(graph, region, met, C)
        assert (rows >= plain - 1e-12 * plain.abs().max()).all()
        narrower += int((rows > plain + 1e-6 * plain.abs().max()).any())
        inside = (region.lo + (region.hi - region.lo) * torch.rand(500, *x.shape, dtype=F64)).flatten(0, 1)
        for value, (lo, hi) in zip(graph.values(inside), met, strict=True):
            value = value.unflatten(0, (500, 3))
            assert (value >= lo - 1e-9).all()
            assert (value <= hi + 1e-9).all()
    assert narrower > 6  # and often tightens it


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_meeting_intervals_keeps_the_lower_line(dtype):
    generator = torch.Generator().manual_seed(0)
    ends = (
        torch.randint(-8, 9, (4000, 4), generator=generator).to(dtype)
        / 4
        * (1 + torch.arange(4000) % 3 / 7).unsqueeze(1)
    )
    (own_lo, own_hi), (lo, hi) = ends[:, :2].sort(1).values.unbind(1), ends[:, 2:].sort(1).values.unbind(1)
    crossing = torch.maximum(own_lo, lo) <= torch.minimum(own_hi, hi)
    own, other = (own_lo[crossing], own_hi[crossing]), (lo[crossing], hi[crossing])
    low, high = _meet(own, other)
    assert (low >= own[0]).all()
    assert (high <= own[1]).all()
    assert (low <= torch.maximum(own[0], other[0])).all()
    assert (high >= torch.minimum(own[1], other[1])).all()
    unstable = (own[0] < 0) & (own[1] > 0)
    assert torch.equal(ReLU().relax(*own).slope_lo[unstable], ReLU().relax(low, high).slope_lo[unstable])
    assert (low[~unstable] == torch.maximum(own[0], other[0])[~unstable]).all()
    changed = (low < torch.maximum(own[0], other[0])) | (high > torch.minimum(own[1], other[1]))
    assert 0 < changed.sum() < unstable.sum() / 2


@pytest.mark.parametrize("name", ["relu", "max-pool overlapping", "residual, strided", "softmax", "cat"])
def test_rows_are_bounded_no_looser_than_outputs_combined(name):
    net = build(name)
    x = images(net)
    C = torch.randn(len(x), 5, 4, dtype=F64, generator=torch.Generator().manual_seed(3))
    y = net(certify.Linf(0.04).sample(x, 200, torch.Generator().manual_seed(1)).flatten(0, 1)).reshape(
        200, len(x), 4, 1
    )
    for method in DIRECT:
        lo, hi = certify.bounds(net, x, certify.Linf(0.04), method)
        low, high = certify.bounds(net, x, certify.Linf(0.04), method, C=C)
        values = (C @ y).squeeze(3)
        assert (values >= low - 1e-9).all()
        assert (values <= high + 1e-9).all()
        combined = C.clamp(min=0) @ lo.unsqueeze(2) + C.clamp(max=0) @ hi.unsqueeze(2)
        if method == "ibp":
            assert (low >= combined.squeeze(2) - 1e-9).all()


def test_an_affine_network_is_bounded_exactly():
    torch.manual_seed(0)
    net = nn.Sequential(conv(2, 3, stride=2), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(3, 4)).to(F64).eval()
    x = torch.rand(2, 2, 6, 6, dtype=F64)
    p = certify.Linf(0.1, clip=False)
    jacobian = torch.func.jacrev(lambda v: net(v.unsqueeze(0))[0])(x[0]).flatten(1)
    radius = 0.1 * jacobian.abs().sum(1)
    ball = 0.1 * jacobian.norm(dim=1)
    for method in ("crown-ibp", "crown"):
        lo, hi = certify.bounds(net, x, p, method)
        torch.testing.assert_close(hi - lo, (2 * radius).expand(2, -1))
        lo, hi = certify.bounds(net, x, certify.L2(0.1, clip=False), method)
        torch.testing.assert_close(hi - lo, (2 * ball).expand(2, -1))


def test_hand_computed_crown():
    """y = relu(x1 + x2) - relu(x1 - x2) on [-1, 1]^2: both preactivations in [-2, 2].

    Upper lines: v / 2 + 1; lower slopes: 0 (hi = -lo is no reason for slope 1). So y <= (x1 + x2) / 2 + 1 <= 2 and
    y >= -((x1 - x2) / 2 + 1) >= -2.
    """
    net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False))
    net[0].weight.data = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    net[2].weight.data = torch.tensor([[1.0, -1.0]])
    box = certify.Box(torch.full((1, 2), -1.0), torch.full((1, 2), 1.0))
    lo, hi = certify.bounds(net.eval(), torch.zeros(1, 2), box, "crown")
    assert (lo.item(), hi.item()) == (-2.0, 2.0)


@pytest.mark.parametrize(
    ("op", "span"),
    [
        (ReLU(), 3.0),
        (LeakyReLU(0.1), 3.0),
        (Clamp(0.0, 6.0), 9.0),
        (Clamp(-0.5, 0.25), 1.0),
        (sigmoid(), 8.0),
        (tanh(), 5.0),
    ],
)
def test_lines_enclose_the_function(op, span):
    generator = torch.Generator().manual_seed(0)
    ends = (2 * torch.rand(4000, 2, dtype=F64, generator=generator) - 1) * span
    narrow = ends[:500, :1] + torch.tensor([[0.0, 1e-9]], dtype=F64)
    special = torch.tensor(list(itertools.product([-0.5, 0.0, 0.25, 6.0, -1.0, 7.0], repeat=2)), dtype=F64)
    lo, hi = torch.cat([ends, narrow, special]).sort(1).values.unbind(1)
    r = op.relax(lo, hi)
    t = torch.linspace(0, 1, 201, dtype=F64).unsqueeze(1)
    v = lo + t * (hi - lo)
    f = op.forward(v)
    assert (r.slope_lo * v + (0 if r.bias_lo is None else r.bias_lo) <= f + 1e-9).all()
    assert (r.slope_hi * v + (0 if r.bias_hi is None else r.bias_hi) >= f - 1e-9).all()
    point = op.relax(lo, lo)
    torch.testing.assert_close(point.slope_lo * lo + (0 if point.bias_lo is None else point.bias_lo), op.forward(lo))
    torch.testing.assert_close(point.slope_hi * lo + (0 if point.bias_hi is None else point.bias_hi), op.forward(lo))


def test_bounds_widen_with_the_radius_and_follow_the_image():
    net = build("relu")
    x = images(net)
    eps = torch.tensor([0.0, 0.01, 0.05], dtype=F64)
    for method in DIRECT:
        lo, hi = certify.bounds(net, x, certify.Linf(eps), method)
        torch.testing.assert_close(lo[0], net(x)[0], atol=1e-9, rtol=0)
        for i in (1, 2):
            one_lo, one_hi = certify.bounds(net, x[i : i + 1], certify.Linf(eps[i].item()), method)
            torch.testing.assert_close(one_lo[0], lo[i])
            torch.testing.assert_close(one_hi[0], hi[i])


def test_a_partial_box_moves_only_the_free_pixels():
    net = build("relu")
    x = images(net)
    lo, hi = x.clone(), x.clone()
    lo[:, 0, 2:4, 2:4], hi[:, 0, 2:4, 2:4] = 0, 1
    box = certify.Box(lo, hi)
    y = net(box.sample(x, 500, torch.Generator().manual_seed(0)).flatten(0, 1)).reshape(500, len(x), -1)
    for method in DIRECT:
        low, high = certify.bounds(net, x, box, method)
        assert (y >= low - 1e-9).all()
        assert (y <= high + 1e-9).all()


@pytest.mark.parametrize("method", DIRECT)
def test_bounds_are_differentiable_in_the_weights(method):
    net = build("batch-norm")
    x = images(net)
    weight = net[3].weight

    def total(value):
        with torch.no_grad():
            weight[0, 0, 0, 0] = value
        lo, hi = certify.bounds(net, x, certify.Linf(0.03), method)
        return (hi - lo).sum()

    at = weight[0, 0, 0, 0].item()
    (gradient,) = torch.autograd.grad(total(at), weight)
    numeric = (total(at + 1e-6) - total(at - 1e-6)).item() / 2e-6
    assert gradient[0, 0, 0, 0].item() == pytest.approx(numeric, rel=1e-4, abs=1e-6)


def test_training_mode_uses_batch_statistics_and_one_forward_pass():
    net = build("batch-norm").train()
    x = images(net)
    twin = build("batch-norm").train()
    expected = twin(x)
    traced = Network(net, x)
    torch.testing.assert_close(traced.output, expected)
    torch.testing.assert_close(net[1].running_mean, twin[1].running_mean)
    lo, hi = traced.bounds(certify.Linf(0.0))
    torch.testing.assert_close(lo, expected, atol=1e-9, rtol=0)
    assert torch.autograd.grad((hi - traced.output).sum() + lo.sum(), net[1].weight)[0].abs().sum() > 0
    before = net[1].running_mean.clone()
    certify.bounds(net, x, certify.Linf(0.01), "ibp")
    assert torch.equal(net[1].running_mean, before)


def test_gradients_flow_through_batch_statistics_unless_detached():
    net = build("batch-norm").train()
    x = images(net)
    weight = net[0].weight

    def total(value, detach=False):
        with torch.no_grad():
            weight[0, 0, 0, 0] = value
        lo, hi = Network(net, x, detach_statistics=detach).bounds(certify.Linf(0.02))
        return (hi - 2 * lo).sum()

    at = weight[0, 0, 0, 0].item()
    (gradient,) = torch.autograd.grad(total(at), weight)
    numeric = (total(at + 1e-6) - total(at - 1e-6)).item() / 2e-6
    assert gradient[0, 0, 0, 0].item() == pytest.approx(numeric, rel=1e-5)
    (detached,) = torch.autograd.grad(total(at, detach=True), weight)
    assert not torch.allclose(detached, gradient)


class Branching(nn.Module):
    def forward(self, x):
        return x.flatten(1) if x.mean((1, 2, 3)) else -x.flatten(1)


@pytest.mark.parametrize(
    ("net", "match"),
    [
        (nn.Sequential(nn.Flatten(), nn.GELU()), r"gelu.*'1'"),
        (Branching(), "branch on values"),
        (Block(lambda x: (x * x).flatten(1)), "products of inputs"),
        (Block(lambda x: x.flatten(1).cumsum(1)), "cumsum"),
        (nn.Sequential(conv(2, 3), nn.ReLU()), "flatten"),
    ],
)
def test_unsupported_operations_are_named(net, match):
    with pytest.raises(UnsupportedOperation, match=match):
        certify.bounds(net.eval(), torch.rand(2, 2, 4, 4), certify.Linf(0.1))


def test_writing_behind_a_view_is_noticed():
    def net(x):
        y = x + 1
        view = y.flatten(1)
        y.neg_()
        return view

    with pytest.raises(UnsupportedOperation, match="view"):
        certify.bounds(Block(net).eval(), torch.rand(2, 2, 4, 4), certify.Linf(0.1))


def test_active_dropout_has_no_bound():
    net = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(32, 2)).train()
    with pytest.raises(UnsupportedOperation, match="eval"):
        certify.bounds(net, torch.rand(2, 2, 4, 4), certify.Linf(0.1))


def test_mixing_the_batch_is_refused():
    with pytest.raises(ValueError, match="batch"):
        certify.bounds(Block(lambda x: x.reshape(1, -1)), torch.rand(2, 2, 4, 4), certify.Linf(0.1))
    with pytest.raises(ValueError, match="batch"):
        certify.bounds(
            Block(lambda x: (x - x.mean(0, keepdim=True)).flatten(1)), torch.rand(2, 2, 4, 4), certify.Linf(0.1)
        )


def test_bad_input_is_explained():
    net = build("relu")
    x = images(net)
    with pytest.raises(ValueError, match="normalise inside the model"):
        certify.bounds(net, 255 * x, certify.Linf(0.1))
    with pytest.raises(ValueError, match="NaN"):
        certify.bounds(net, x * float("nan"), certify.Linf(0.1))
    with pytest.raises(ValueError, match=">= 0"):
        certify.Linf(-0.1)
    with pytest.raises(ValueError, match="unknown bound method"):
        certify.bounds(net, x, certify.Linf(0.1), "crwn")
    with pytest.raises(ValueError, match="rows"):
        certify.bounds(net, x, certify.Linf(0.1), C=torch.zeros(3, 2, 7))
    net[0].weight.data[0] = float("inf")
    with pytest.raises(ValueError, match=r"0\.weight"):
        certify.bounds(net, x, certify.Linf(0.1))


@pytest.mark.parametrize("act", [nn.Sigmoid, nn.Tanh, nn.Hardtanh, nn.ReLU6])
def test_a_settled_sign_is_not_all_that_a_bend_needs(act):
    """Backward passes stopped there early, with ends up to twice as far apart, and otherwise in a batch than alone."""
    torch.manual_seed(0)
    hidden = [layer for _ in range(3) for layer in (nn.Linear(12, 12), act())]
    net = nn.Sequential(nn.Flatten(), nn.Linear(9, 12), act(), *hidden, nn.Linear(12, 2)).double().eval()
    x, p = torch.rand(3, 1, 3, 3, dtype=torch.float64), certify.Linf(0.1)
    lower, upper = certify.bounds(net, x, p, "crown")
    for i in range(3):
        low, high = certify.bounds(net, x[i : i + 1], p, "crown")
        torch.testing.assert_close((lower[i], upper[i]), (low[0], high[0]), rtol=1e-9, atol=1e-12)
    narrower, _ = certify.bounds(net, x, p, "crown-ibp")
    assert bool((lower >= narrower - 1e-9).all())
