"""The auto-LiRPA back end: closed forms, samples, and the places where the bare library is wrong."""

import importlib.metadata

import pytest
import torch
from torch import Tensor, nn

import certify
from certify import lirpa
from certify.perturbations import (
    L2,
    BlurMix,
    Box,
    Brightness,
    BrightnessContrast,
    Contrast,
    Linf,
    Perturbation,
)

if not lirpa.available():
    pytest.skip("auto-LiRPA is not installed", allow_module_level=True)

BACKWARD = ("CROWN-IBP", "CROWN")


def images(n: int = 3) -> Tensor:
    x = torch.rand(n, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    x[0, :, :2] = 0.0
    x[-1, :, :2] = 1.0
    return x


X = images()
EPS = torch.tensor([0.0, 0.02, 0.1])
SETS = [
    Linf(EPS),
    Linf(0.05, clip=False),
    Box(X * 0.9, X * 0.9 + 0.1),
    L2(EPS * 4),
    Brightness(EPS),
    Contrast(0.2, about="mean"),
    BlurMix(EPS),
    BrightnessContrast(0.05, EPS),
]


class Residual(nn.Module):
    """Convolutions, batch norm, a skip and a chosen way of normalising the input."""

    def __init__(self, normalise: str = "none") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.second = nn.Conv2d(4, 4, 3, stride=2)
        self.inner = nn.Conv2d(4, 4, 1)
        self.head = nn.Linear(16, 5)
        self.normalise = normalise
        self.register_buffer("mean", torch.tensor([0.4, 0.5, 0.6]).reshape(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor([0.2, 0.3, 0.4]).reshape(1, 3, 1, 1))
        self.norm.running_mean.uniform_(-0.2, 0.2)
        self.norm.running_var.uniform_(0.5, 1.5)
        self.plain = torch.tensor(0.35)

    def forward(self, x: Tensor) -> Tensor:
        if self.normalise == "scalar":
            x = (x - 0.286) / 0.353
        elif self.normalise == "affine":
            x = 3.0 * x - 1
        elif self.normalise == "buffers":
            x = (x - self.mean) / self.std
        elif self.normalise == "channels":
            x = (x - self.mean[0]) / self.std[0]
        elif self.normalise == "computed":
            x = (1 - x.sub(self.mean.mean())).div(self.plain)
        h = self.second(torch.relu(self.norm(self.first(x))))
        return self.head((torch.relu(self.inner(torch.relu(h))) + h).flatten(1))


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(108, 20), nn.ReLU(), nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 5))


def assert_inside(model: nn.Module, x: Tensor, p: Perturbation, lo: Tensor, hi: Tensor, C: Tensor | None) -> None:
    drawn = p.sample(x, 300, torch.Generator().manual_seed(0))
    with torch.no_grad():
        y = model(drawn.flatten(0, 1)).unflatten(0, drawn.shape[:2])
    y = y if C is None else torch.einsum("nro,sno->snr", C, y)
    slack = 1e-5 * (1 + y.abs().amax())
    assert lo.shape == hi.shape == y.shape[1:]
    assert bool((y >= lo - slack).all())
    assert bool((y <= hi + slack).all())


@pytest.mark.parametrize("method", ["IBP", *BACKWARD])
def test_linear_networks_are_bounded_exactly(method):
    net = nn.Sequential(nn.Flatten(), nn.Linear(108, 4))
    W, b = net[1].weight.detach(), net[1].bias.detach()
    flat = X.flatten(1)
    C = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(0))
    rows = C @ W
    for p in (Linf(EPS), Box(X * 0.5, X * 0.5 + 0.25)):
        lo, hi = lirpa.bounds(net, X, p, method, C)
        low, high = (v.flatten(1).unsqueeze(1) for v in p.hull(X))
        offset = C @ b
        exact = torch.where(rows > 0, rows * low, rows * high).sum(2) + offset
        torch.testing.assert_close(lo, exact, atol=1e-5, rtol=1e-5)
        exact = torch.where(rows > 0, rows * high, rows * low).sum(2) + offset
        torch.testing.assert_close(hi, exact, atol=1e-5, rtol=1e-5)
    if method != "IBP":
        lo, hi = lirpa.bounds(net, X, L2(EPS, clip=False), method)
        reach = EPS.unsqueeze(1) * W.norm(dim=1)
        torch.testing.assert_close(lo, flat @ W.T + b - reach, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(hi, flat @ W.T + b + reach, atol=1e-5, rtol=1e-5)
        lo, hi = lirpa.bounds(net, X, Brightness(EPS, clip=False), method)
        reach = EPS.unsqueeze(1) * W.sum(1).abs()
        torch.testing.assert_close(hi - lo, 2 * reach, atol=1e-5, rtol=1e-5)


def test_ibp_of_a_small_network_by_hand():
    net = mlp()
    lo, hi = lirpa.bounds(net, X, Linf(0.05), "IBP")
    low, high = (v.flatten(1) for v in Linf(0.05).hull(X))
    for layer in net:
        if isinstance(layer, nn.Linear):
            centre, half = (low + high) / 2 @ layer.weight.T + layer.bias, (high - low) / 2 @ layer.weight.abs().T
            low, high = (centre - half).detach(), (centre + half).detach()
        elif isinstance(layer, nn.ReLU):
            low, high = low.relu(), high.relu()
    torch.testing.assert_close(lo, low, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(hi, high, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("p", SETS, ids=lambda p: p.describe())
@pytest.mark.parametrize("method", ["IBP", *BACKWARD])
def test_samples_lie_inside(method, p):
    C = torch.randn(3, 2, 5, generator=torch.Generator().manual_seed(0))
    for model in (mlp().eval(), Residual("scalar").eval()):
        lo, hi = lirpa.bounds(model, X, p, method, C)
        assert_inside(model, X, p, lo, hi, C)


@pytest.mark.parametrize("normalise", ["scalar", "affine", "buffers", "channels", "computed"])
@pytest.mark.parametrize("method", ["IBP", *BACKWARD])
def test_every_way_of_normalising_gives_the_same_bounds_as_folding_it(normalise, method):
    model, folded = Residual(normalise).eval(), Residual().eval()
    # A pointwise affine map commutes with the box: move the box instead.
    with torch.no_grad():
        probe = torch.zeros(1, 3, 1, 1)
        steps = {
            "scalar": lambda x: (x - 0.286) / 0.353,
            "affine": lambda x: 3 * x - 1,
            "buffers": lambda x: (x - model.mean) / model.std,
            "channels": lambda x: (x - model.mean) / model.std,
            "computed": lambda x: (1 - (x - 0.5)) / 0.35,
        }[normalise]
        assert steps(probe).shape == probe.shape
        low, high = (steps(v) for v in Linf(EPS).hull(X))
    box = Box(torch.minimum(low, high), torch.maximum(low, high))
    expected = lirpa.bounds(folded, steps(X), box, method)
    for ours, theirs in zip(lirpa.bounds(model, X, Linf(EPS), method), expected):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method", ["IBP", *BACKWARD])
def test_l2_bounds_survive_a_normalisation_in_front(method):
    # Asked directly, release 0.3 loses the radius behind the subtraction and returns the value at the centre.
    model, p = Residual("buffers").eval(), L2(1.0, clip=False)
    lo, hi = lirpa.bounds(model, X, p, method)
    x = X.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(x)[:, 0].sum(), x)
    worst = X - gradient / gradient.flatten(1).norm(dim=1).reshape(3, 1, 1, 1)
    with torch.no_grad():
        assert bool((model(worst)[:, 0] >= lo[:, 0]).all())
        assert bool((model(X) - lo > 0.1).all())
        assert bool((hi - model(X) > 0.1).all())


def test_methods_tighten_in_order_and_widen_with_the_radius():
    model = Residual("scalar").eval()
    widths = {m: (lambda b: b[1] - b[0])(lirpa.bounds(model, X, Linf(0.05), m)) for m in ("IBP", *BACKWARD)}
    assert bool((widths["CROWN-IBP"] <= widths["IBP"] + 1e-5).all())
    assert bool((widths["CROWN"] <= widths["CROWN-IBP"] + 1e-4).all())
    before = None
    for eps in (0.0, 0.01, 0.05, 0.2):
        lo, hi = lirpa.bounds(model, X, Linf(eps), "CROWN-IBP")
        if before is not None:
            assert bool((lo <= before[0] + 1e-5).all())
            assert bool((hi >= before[1] - 1e-5).all())
        before = lo, hi
    with torch.no_grad():
        at_zero = lirpa.bounds(model, X, Linf(0.0), "CROWN")
        torch.testing.assert_close(at_zero[0], model(X), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("model", [mlp().eval(), Residual("scalar").eval()], ids=["mlp", "residual"])
def test_optimised_slopes_help_and_stay_sound(model):
    p = Linf(0.1)
    plain = lirpa.bounds(model, X[:2], p, "CROWN")
    lo, hi = lirpa.bounds(model, X[:2], p, "CROWN-Optimized", iterations=8)
    assert bool((lo >= plain[0] - 1e-4).all())
    assert bool((hi <= plain[1] + 1e-4).all())
    assert float(((plain[1] - plain[0]) - (hi - lo)).mean()) > 1e-3
    assert_inside(model, X[:2], p, lo, hi, None)


@pytest.mark.parametrize("model", [mlp().eval(), Residual("scalar").eval()], ids=["mlp", "residual"])
def test_slopes_optimised_on_fixed_intervals_lie_between_crown_and_joint_optimisation(model):
    p = Linf(0.1)
    crown, fixed, joint = (
        (lambda b: b[1] - b[0])(lirpa.bounds(model, X[:1], p, m, iterations=8))
        for m in ("CROWN", "CROWN-Optimized-Fixed", "CROWN-Optimized")
    )
    assert bool((fixed <= crown + 1e-4).all())
    assert float((crown - fixed).mean()) > 1e-3
    assert float(fixed.mean()) >= float(joint.mean()) - 1e-4
    # The same question to our own engine: CROWN's intervals fixed, slopes of the last pass optimised.
    lo, hi = lirpa.bounds(model, X[:1], p, "CROWN-Optimized-Fixed")
    low, high = certify.bounds(model, X[:1], p, "alpha-crown")
    torch.testing.assert_close(high - low, hi - lo, rtol=0.02, atol=1e-4)
    assert_inside(model, X[:1], p, lo, hi, None)


def test_our_crown_is_never_looser():
    for seed in range(6):
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Flatten(), nn.Linear(108, 16), *[m for _ in range(3) for m in (nn.ReLU(), nn.Linear(16, 16))]
        )
        for layer in model:
            if isinstance(layer, nn.Linear):  # mostly positive weights, where interval propagation beats CROWN inside
                layer.weight.data.add_(layer.weight.data.abs(), alpha=0.5)
        model = model.double().eval().requires_grad_(False)
        x, p = X[:1].double(), Linf(0.1)
        lo, hi = lirpa.bounds(model, x, p, "CROWN")
        low, high = certify.bounds(model, x, p, "crown")
        slack = 1e-7 * float(torch.maximum(lo.abs(), hi.abs()).max())
        assert bool((low >= lo - slack).all())
        assert bool((high <= hi + slack).all())


def test_batching_does_not_change_the_answer():
    model = Residual("buffers").eval()
    one_by_one = lirpa.bounds(model, X, Linf(EPS), "CROWN", batch_size=1)
    together = lirpa.bounds(model, X, Linf(EPS), "CROWN", batch_size=3)
    for a, b in zip(one_by_one, together):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_rows_shared_by_all_images_and_outputs_agree():
    model = mlp().eval()
    outputs = lirpa.bounds(model, X, Linf(0.02), "CROWN")
    rows = lirpa.bounds(model, X, Linf(0.02), "CROWN", torch.eye(5))
    for a, b in zip(outputs, rows):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_the_model_is_left_alone_in_any_mode():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(64, 5)
    )
    model.train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    lo, hi = lirpa.bounds(model, X, Linf(EPS), "CROWN")
    assert model.training
    assert all(m.training for m in model.modules())
    assert all(v.requires_grad for v in model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not lo.requires_grad
    assert_inside(model.eval(), X, Linf(EPS), lo, hi, None)


@pytest.mark.parametrize("method", ["IBP", "CROWN", "CROWN-Optimized", "CROWN-Optimized-Fixed"])
def test_float64_stays_float64(method):
    model, x = mlp().double().eval(), X[:1].double()
    lo, hi = lirpa.bounds(model, x, Linf(0.05), method, iterations=3)
    assert lo.dtype == hi.dtype == torch.float64
    assert torch.get_default_dtype() == torch.float32
    single = lirpa.bounds(mlp().eval(), X[:1], Linf(0.05), method, iterations=3)
    torch.testing.assert_close(lo.float(), single[0], atol=1e-3, rtol=1e-3)


def test_an_empty_batch_gives_empty_bounds():
    lo, hi = lirpa.bounds(mlp().eval(), X[:0], Linf(0.1), "IBP", torch.ones(2, 5))
    assert lo.shape == hi.shape == (0, 2)


def test_bad_calls_are_refused():
    model = mlp().eval()
    with pytest.raises(ValueError, match="unknown auto-LiRPA method"):
        lirpa.bounds(model, X, Linf(0.1), "crown")
    with pytest.raises(ValueError, match="expected"):
        lirpa.bounds(model, X, Linf(0.1), "CROWN", torch.ones(3, 2, 4))
    with pytest.raises(ValueError, match="pixel space"):
        lirpa.bounds(model, X * 255, Linf(0.1))

    class Other(Linf.__mro__[1]):
        clip = False

    Other.__abstractmethods__ = frozenset()
    with pytest.raises(TypeError, match="cannot express Other"):
        lirpa.bounds(model, X, Other())


def test_an_operation_it_does_not_know_is_reported():
    class Sorted(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1).sort(dim=1).values[:, :3]

    with pytest.raises(RuntimeError, match="auto-LiRPA cannot bound this network with CROWN"):
        lirpa.bounds(Sorted(), X, Linf(0.1), "CROWN")


@pytest.mark.parametrize("method", ["IBP", *BACKWARD])
def test_relu6_is_bounded(method):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU6(), nn.Flatten(), nn.Linear(64, 8), nn.ReLU6(), nn.Linear(8, 2))
    for layer in (model[0], model[3]):
        layer.weight.data.mul_(10)
    lo, hi = lirpa.bounds(model, X, Linf(0.1), method)
    assert_inside(model, X, Linf(0.1), lo, hi, None)
    # Whatever the input, an activation lies in [0, 6].
    W, b = model[5].weight.detach(), model[5].bias.detach()
    if method == "IBP":
        assert bool((hi <= 6 * W.clamp(min=0).sum(1) + b + 1e-4).all())
        assert bool((lo >= 6 * W.clamp(max=0).sum(1) + b - 1e-4).all())


def test_a_missing_library_says_how_to_get_it(monkeypatch):
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert not lirpa.available()
    with pytest.raises(ModuleNotFoundError, match="uv sync --group lirpa"):
        lirpa.bounds(mlp(), X, Linf(0.1))
