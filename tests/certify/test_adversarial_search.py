"""An adversarial search for wrong verdicts: awkward random networks, certified at the edge, then attacked.

Networks are drawn from a grammar of everything the tracer knows; some are trained a little, many are shaped so that
rounding, ties, kinks and overflow matter. Radii and thresholds are put just above and just below where the property
starts to fail, as far as a search can tell. Every verifier answers; `certify.audit` holds each answer against attacks.

`CERTPRUNE_SEARCH_MINUTES` says how long the slow test searches (3 by default), `CERTPRUNE_SEARCH_SEED` where it starts.
A refuted verdict is reported with the number of its problem, which is all it takes to pose it again: `pose(number)`.
"""

from __future__ import annotations

import copy
import dataclasses
import os
import random
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import certify
from certify import Status, audit
from certify.bounds import METHODS as BOUNDS
from certify.curves import Path
from certify.dispatch import LINE, SEARCH
from certify.enumeration import listable
from certify.perturbations import AffineFamily, Perturbation
from certify.specs import Spec

SIDE = 5

# -- networks ----------------------------------------------------------------------------------------------------------


class Residual(nn.Module):
    """``f(x) + g(x)``."""

    def __init__(self, body: nn.Module, skip: nn.Module) -> None:
        super().__init__()
        self.body, self.skip = body, skip

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) + self.skip(x)


class Beside(nn.Module):
    """Both branches as channels of one map."""

    def __init__(self, left: nn.Module, right: nn.Module) -> None:
        super().__init__()
        self.left, self.right = left, right

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.left(x), self.right(x)], 1)


class Function(nn.Module):
    """A function of the functional interface."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Keypoints(nn.Module):
    """A heat map a channel, and the mean place under its softmax."""

    def __init__(self, places: Tensor) -> None:
        super().__init__()
        self.register_buffer("places", places)

    def forward(self, x: Tensor) -> Tensor:
        return (torch.softmax(x.flatten(2), 2) @ self.places).flatten(1)


KINKED: tuple[Callable[[], nn.Module], ...] = (
    nn.ReLU, nn.ReLU, nn.ReLU, nn.ReLU6, lambda: nn.LeakyReLU(0.2), lambda: nn.LeakyReLU(0.0), nn.Hardtanh,
    lambda: Function(lambda v: v.clamp(min=0.1)), lambda: Function(lambda v: torch.clamp(v, max=0.4)),
)  # fmt: skip
SMOOTH: tuple[Callable[[], nn.Module], ...] = (nn.Sigmoid, nn.Tanh)


def _activation(rng: random.Random, smooth: bool) -> nn.Module:
    return rng.choice(SMOOTH if smooth and rng.random() < 0.5 else KINKED)()


def _convolution(rng: random.Random, channels: int, side: int) -> tuple[nn.Module, int]:
    """A convolution of any kind that fits, and how many channels it makes."""
    kind = rng.choice(("plain", "plain", "strided", "grouped", "depthwise", "dilated", "pointwise"))
    bias = rng.random() < 0.7
    if kind == "depthwise":
        return nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=bias), channels
    out = rng.choice((2, 4))
    if kind == "strided":
        return nn.Conv2d(channels, out, rng.choice((1, 2, 3)), stride=2, padding=1, bias=bias), out
    if kind == "grouped" and channels % 2 == 0:
        return nn.Conv2d(channels, out, 3, padding=1, groups=2, bias=bias), out
    if kind == "dilated" and side > 2:
        return nn.Conv2d(channels, out, 3, padding=2, dilation=2, bias=bias), out
    if kind == "pointwise":
        return nn.Conv2d(channels, out, 1, bias=bias), out
    return nn.Conv2d(channels, out, 3, padding=rng.choice((0, 1)) if side > 2 else 1, bias=bias), out


def _pooling(rng: random.Random, side: int) -> nn.Module:
    k = rng.choice((2, 3))
    pools = (
        nn.MaxPool2d(2, ceil_mode=side > 1),
        nn.MaxPool2d(k, 2, 1, ceil_mode=rng.random() < 0.5),
        nn.MaxPool2d(k, 1, 1),
        nn.AvgPool2d(2, ceil_mode=True),
        nn.AvgPool2d(3, 2, 1, count_include_pad=rng.random() < 0.5),
        nn.AdaptiveAvgPool2d(max(1, side - 1)),
        Function(lambda v: nn.functional.pad(v, (1, 0, 0, 1))),
        Function(lambda v: v[:, :, ::2]),
    )
    return rng.choice(pools)


def build(rng: random.Random) -> nn.Module:
    """A random network for images (3, SIDE, SIDE)."""
    smooth = rng.random() < 0.25
    if rng.random() < 0.2:
        return nn.Sequential(nn.Flatten(), *_perceptron(rng, 3 * SIDE * SIDE, smooth, 3))
    parts: list[nn.Module] = []
    shape = torch.zeros(1, 3, SIDE, SIDE)
    for _ in range(rng.choice((1, 2, 2, 3))):
        part = _stage(rng, shape.shape[1], min(shape.shape[2:]), smooth).eval()
        try:
            shape = part(shape).detach()
        except RuntimeError:  # a window larger than what is left of the map
            continue
        parts.append(part)
    net = nn.Sequential(*parts, *_head(rng, shape, smooth))
    return net


def _stage(rng: random.Random, channels: int, side: int, smooth: bool) -> nn.Module:
    conv, out = _convolution(rng, channels, side)
    norm = [nn.BatchNorm2d(out)] if rng.random() < 0.5 else []
    layers = [conv, *norm, _activation(rng, smooth)]
    kind = rng.choice(("chain", "chain", "pooled", "residual", "beside"))
    if kind == "residual":
        body = nn.Sequential(nn.Conv2d(out, out, 3, padding=1), _activation(rng, smooth))
        skip = nn.Identity() if rng.random() < 0.6 else nn.Conv2d(out, out, 1)
        layers += [Residual(body, skip), _activation(rng, smooth)]
    elif kind == "beside":
        layers += [Beside(nn.Conv2d(out, 2, 1), nn.Identity()), _activation(rng, smooth)]
    elif kind == "pooled":
        layers.append(_pooling(rng, side))
    return nn.Sequential(*layers)


def _perceptron(rng: random.Random, inputs: int, smooth: bool, outputs: int) -> list[nn.Module]:
    if rng.random() < 0.3:
        return [nn.Linear(inputs, outputs)]
    width = rng.choice((3, 8))
    norm = [nn.BatchNorm1d(width)] if rng.random() < 0.2 else []
    return [nn.Linear(inputs, width), *norm, _activation(rng, smooth), nn.Linear(width, outputs)]


def _head(rng: random.Random, shape: Tensor, smooth: bool) -> list[nn.Module]:
    channels, height, width = shape.shape[1:]
    kind = rng.choice(("flat", "flat", "mean", "keypoints", "softmax"))
    if kind == "keypoints" and height * width > 1:
        rows, columns = torch.meshgrid(torch.arange(float(height)), torch.arange(float(width)), indexing="ij")
        places = torch.stack([columns.flatten(), rows.flatten()], 1)
        return [nn.Conv2d(channels, 2, 1), Keypoints(places)]
    if kind == "mean":
        return [Function(lambda v: v.mean((2, 3))), *_perceptron(rng, channels, smooth, 3)]
    if kind == "softmax":
        return [nn.Flatten(), nn.Linear(channels * height * width, 3), nn.Softmax(1)]
    return [nn.Flatten(), *_perceptron(rng, channels * height * width, smooth, 3)]


# -- shapings ----------------------------------------------------------------------------------------------------------


def _layers(net: nn.Module) -> list[nn.Conv2d | nn.Linear]:
    return [m for m in net.modules() if isinstance(m, nn.Conv2d | nn.Linear)]


def _trained(net: nn.Module, rng: random.Random) -> None:
    """A few steps towards random targets: weights that belong together, as random ones do not."""
    x = torch.rand(16, 3, SIDE, SIDE)
    wanted = torch.rand(16, net(x).shape[1])
    net.train().requires_grad_(True)
    optimizer = torch.optim.Adam(net.parameters(), 0.03)
    for _ in range(12):
        optimizer.zero_grad()
        with torch.enable_grad():
            nn.functional.mse_loss(net(x), 3 * wanted).backward()
        optimizer.step()
    net.eval().requires_grad_(False)


def _spread_layers(net: nn.Module, rng: random.Random) -> None:
    """Layers of very different size, the product kept."""
    layers, factor = _layers(net), 10 ** rng.uniform(-12, 12)
    if len(layers) > 1:
        at = rng.randrange(len(layers) - 1)
        layers[at].weight *= factor
        layers[at + 1].weight /= factor
        if layers[at].bias is not None:
            layers[at].bias *= factor


def _twins(net: nn.Module, rng: random.Random) -> None:
    """Two units nearly alike, with large opposite weights behind: cancellation inside the network."""
    for before, after in zip(_layers(net), _layers(net)[1:], strict=False):
        same_kind = type(before) is type(after) and getattr(after, "groups", 1) == 1
        if same_kind and after.weight.shape[1] == before.weight.shape[0] >= 2:
            before.weight[1] = before.weight[0] * (1 + rng.choice((0.0, 1e-7, 1e-5)))
            if before.bias is not None:
                before.bias[1] = before.bias[0]
            large = 10 ** rng.uniform(0, 6)
            after.weight[:, 0] += large
            after.weight[:, 1] -= large
            return


def _few_bits(net: nn.Module, rng: random.Random) -> None:
    """Weights that are multiples of a quarter: ties, units at exactly 0."""
    for layer in _layers(net):
        layer.weight.copy_((layer.weight * 4).round() / 4)
        if layer.bias is not None:
            layer.bias.copy_((layer.bias * 4).round() / 4)


def _no_biases(net: nn.Module, rng: random.Random) -> None:
    """Every unit is exactly 0 on a black image, some of them -0."""
    for layer in _layers(net):
        if layer.bias is not None:
            layer.bias.fill_(rng.choice((0.0, -0.0)))


def _loud(net: nn.Module, rng: random.Random) -> None:
    for layer in _layers(net):
        layer.weight *= 10 ** rng.uniform(-1, 1.5)


def _denormal(net: nn.Module, rng: random.Random) -> None:
    """A layer so small that float32 has few bits left of it, blown up behind."""
    layers = _layers(net)
    if len(layers) > 1:
        layers[0].weight *= 1e-39
        layers[1].weight *= 1e30


def _dead(net: nn.Module, rng: random.Random) -> None:
    """Channels that normalisation switches off, or keeps at a constant."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
            off = torch.tensor([rng.random() < 0.5 for _ in range(module.num_features)])
            module.weight[off] = 0.0
            module.bias[off] = rng.choice((0.0, 1e-8, -1e-8, 0.5))
            module.running_var[off] = rng.choice((0.0, 1e-12, 1.0))


def _offset(net: nn.Module, rng: random.Random) -> None:
    """Outputs far from 0 whose differences are small."""
    last = _layers(net)[-1]
    if last.bias is not None:
        last.bias += 10 ** rng.uniform(0, 5)


def _sparse(net: nn.Module, rng: random.Random) -> None:
    for layer in _layers(net):
        layer.weight *= torch.rand(layer.weight.shape) < rng.choice((0.15, 0.5))


SHAPINGS = (_trained, _spread_layers, _twins, _few_bits, _no_biases, _loud, _denormal, _dead, _offset, _sparse)


def network(rng: random.Random) -> tuple[nn.Module, str]:
    """A network in evaluation mode, and what was done to it."""
    net = build(rng)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.05, 1.5)
            module.weight.data.normal_(0, 1)
            module.bias.data.normal_(0, 0.3)
        elif isinstance(module, nn.Conv2d | nn.Linear):
            module.weight.data *= rng.uniform(0.8, 3)
    net.eval().requires_grad_(False)
    shapings = rng.sample(SHAPINGS, rng.choice((0, 1, 1, 2, 3)))
    for shape in shapings:
        shape(net, rng)
    return net, "+".join(shape.__name__.strip("_") for shape in shapings) or "as it is"


# -- sets --------------------------------------------------------------------------------------------------------------


def images(rng: random.Random, n: int) -> Tensor:
    """Images with pixels at exactly 0 and 1, grey ones, black ones, flat ones (every pooling window tied)."""
    x = (torch.rand(n, 3, SIDE, SIDE) * 1.6 - 0.3).clamp(0, 1)
    kind = rng.choice(("plain", "plain", "plain", "rounded", "grey", "black", "flat"))
    if kind == "rounded":
        x = x.round()
    elif kind == "grey":
        x = x[:, :1].expand(-1, 3, -1, -1).clone()
    elif kind == "black":
        x[0] = 0
    elif kind == "flat":
        x = x[:, :, :1, :1].expand(-1, -1, SIDE, SIDE).clone()
    return x


def _stops(x: Tensor) -> certify.Curve:
    """A path that bends, and comes back to where it was."""
    away = [(x + 0.2 * torch.randn(x.shape)).clamp(-0.1, 1.1) for _ in range(2)]
    knots = torch.tensor([-0.25, 0.0, 1 / 16, 3 / 16, 0.25])
    return certify.Curve(knots, torch.stack([away[0], x, away[1], x, away[0]], 1))


def _partial(x: Tensor, size: float) -> certify.Box:
    """Few free entries, the same for all images, around each."""
    free = torch.rand(x.shape[1:]) < 0.06
    free[0, 0, 0] = True
    return certify.Box(torch.where(free, (x - size).clamp(min=0), x), torch.where(free, (x + size).clamp(max=1), x))


SETS: dict[str, Callable[[Tensor, Tensor, random.Random], Perturbation]] = {
    "linf": lambda x, r, rng: certify.Linf(0.05 * r),
    "linf-unclipped": lambda x, r, rng: certify.Linf(0.05 * r, clip=False),
    "l2": lambda x, r, rng: certify.L2(0.4 * r),
    "box": lambda x, r, rng: _partial(x, 0.4 * float(r.max())),
    "brightness": lambda x, r, rng: certify.Brightness(0.3 * r, clip=rng.random() < 0.8),
    "contrast-zero": lambda x, r, rng: certify.Contrast(0.3 * r, "zero"),
    "contrast-mean": lambda x, r, rng: certify.Contrast(0.3 * r, "mean"),
    "contrast-half": lambda x, r, rng: certify.Contrast(0.3 * r, "half"),
    "brightness-contrast": lambda x, r, rng: certify.BrightnessContrast(0.1 * r, 0.1 * r.flip(0)),
    "blur": lambda x, r, rng: certify.BlurMix((0.8 * r).clamp(max=1), rng.choice((0.5, 1.0))),
    "saturation": lambda x, r, rng: certify.Saturation(r),
    "hue": lambda x, r, rng: certify.Hue((0.5 * r).clamp(max=0.5)),
    "rotation": lambda x, r, rng: certify.Rotation((30 * r).clamp(max=180)),
    "scale": lambda x, r, rng: certify.Scale(r.clamp(max=0.9)),
    "curve": lambda x, r, rng: _stops(x),
}


# -- problems ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Problem:
    """A question for every verifier, and how it came about."""

    net: nn.Module
    x: Tensor
    spec: Spec
    p: Perturbation
    label: str


def _first_property(net: nn.Module, x: Tensor, rng: random.Random) -> Spec:
    reference = net(x)
    if reference.shape[1] == 4:  # keypoints
        return certify.Deviation(rng.choice((0.02, 0.1, 0.5)), rng.choice(("linf", "point_l2")))
    if rng.random() < 0.5:
        return certify.Classification(reference.argmax(1))
    C = torch.randn(len(x), rng.choice((1, 2)), reference.shape[1]).to(x)
    return certify.Linear(C, (0.1 * reference.abs().amax() - (C @ reference.unsqueeze(2)).squeeze(2)).to(x))


def _edged(net: nn.Module, x: Tensor, p: Perturbation, rng: random.Random) -> Spec | None:
    """A property whose smallest margin, as far as a search can tell, is a hair above or below zero."""
    reference = net(x)
    C = torch.randn(len(x), 2, reference.shape[1]).to(x)
    found = [audit.worst(net, x, certify.Linear(C[:, k : k + 1]), p, points=129) for k in range(2)]
    lowest = torch.stack([f.margin for f in found], 1)
    size = torch.stack([f.size for f in found], 1)
    hair = rng.choice((1.0, 1.0, -1.0)) * 10 ** rng.uniform(-8.5, -1)
    return certify.Linear(C, (hair * size - lowest).to(x)) if bool(torch.isfinite(lowest).all()) else None


def _critical(
    net: nn.Module, x: Tensor, spec: Spec, r: Tensor, draw: Callable[[Tensor], Perturbation], rng: random.Random
) -> Perturbation:
    """The set at a radius a hair above or below that at which members start to fail, image by image."""
    good, bad = torch.zeros_like(r), r.clone()
    for _ in range(8):
        middle = (good + bad) / 2
        failed = (audit.worst(net, x, spec, draw(middle), points=65).margin <= 0).to(r.device)
        good, bad = torch.where(failed, good, middle), torch.where(failed, middle, bad)
    return draw(bad * (1 + rng.choice((1.0, 1.0, -1.0)) * 10 ** rng.uniform(-7, -1)))


def pose(number: int) -> Problem | None:
    """Problem `number`, always the same; None where the draw made no sense (outputs that overflow)."""
    rng = random.Random(number)
    torch.manual_seed(number)
    with torch.no_grad():
        net, shaped = network(rng)
        n = rng.choice((1, 2, 3))
        x = images(rng, n)
        if rng.random() < 0.4:
            net, x = copy.deepcopy(net).double(), x.double()
        if not all(bool(torch.isfinite(v).all()) for v in (net(x), *net.state_dict().values())):
            return None
        name, size = rng.choice(sorted(SETS)), rng.choice((0.0, 1e-7, 1e-3, 0.03, 0.1, 0.1, 0.3, 0.3, 1.0))
        r = (torch.rand(n) * size).to(x) if rng.random() < 0.5 else torch.full((n,), size).to(x)
        p = SETS[name](x, r, rng)
        kind = rng.choice(("plain", "edge", "edge", "critical"))
        spec: Spec | None = _first_property(net, x, rng)
        if kind == "edge" and not isinstance(spec, certify.Deviation):
            spec = _edged(net, x, p, rng)
        elif kind == "critical" and name not in ("curve", "box") and size:
            clip = random.Random(rng.random())
            state = clip.getstate()

            def draw(radius: Tensor) -> Perturbation:
                clip.setstate(state)
                return SETS[name](x, radius, clip)

            p = _critical(net, x, spec, r, draw, rng)
    if spec is None:
        return None
    label = f"problem {number}: {kind} {name} {p.describe()} {x.dtype} n={n}, network {shaped}"
    return Problem(net, x, spec, p.spread(x), label)


def verifiers(problem: Problem) -> list[str]:
    """The methods of `verify` that take this problem."""
    p = problem.p
    chosen = ["auto", *(m for m in BOUNDS if m != "forward" or not isinstance(p, Path))]
    graph = certify.Network(problem.net, problem.x).graph
    if isinstance(p, AffineFamily | Path):
        pieces = p.parameters == 1 and not isinstance(p, certify.Rotation | certify.Scale) and listable(graph)
        chosen += [m for m in LINE if m != "line-enumerate" or pieces]
    if not isinstance(p, Path):
        smooth = any(isinstance(m, nn.Sigmoid | nn.Tanh | nn.Softmax | Keypoints) for m in problem.net.modules())
        chosen += [m for m in SEARCH if m != "milp" or not (smooth or isinstance(p, certify.L2))]
    return chosen


# -- the search --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Tally:
    """What a search did: problems, members tried, verdicts by status, answers that were refuted."""

    problems: int = 0
    members: int = 0
    verdicts: dict[str, int] = dataclasses.field(default_factory=lambda: {s.name: 0 for s in Status})
    refuted: list[str] = dataclasses.field(default_factory=list)


def examine(problem: Problem, tally: Tally, methods: list[str], points: int = 513) -> None:
    """Ask the verifiers and hold their answers against the worst member that can be found."""
    net, x, spec, p = problem.net, problem.x, problem.spec, problem.p
    found = audit.worst(net, x, spec, p, points=points)
    if not bool(torch.isfinite(found.margin).all()):
        return  # members on which the network overflows
    tally.problems += 1
    tally.members += found.tried
    for method in methods:
        cert = certify.verify(net, x, spec, p, method, certify.Budget(seconds=1.0))
        for status in cert.status.tolist():
            tally.verdicts[Status(status).name] += 1
        tally.refuted += [f"{problem.label}: {line}" for line in audit.refutations(net, x, spec, p, cert, found)]


def search(seconds: float, first: int) -> Tally:
    """Pose and examine problems for so many seconds; four verifiers each, in turn."""
    tally, began, number = Tally(), time.perf_counter(), first
    while time.perf_counter() - began < seconds:
        number += 1
        problem = pose(number)
        if problem is None:
            continue
        able = verifiers(problem)
        try:
            examine(problem, tally, random.Random(number).sample(able, min(4, len(able))))
        except Exception as error:
            error.add_note(problem.label)
            raise
    return tally


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_no_verdict_is_refuted_in_minutes_of_search() -> None:
    minutes = float(os.environ.get("CERTPRUNE_SEARCH_MINUTES", "3"))
    tally = search(60 * minutes, int(os.environ.get("CERTPRUNE_SEARCH_SEED", "0")))
    print(f"{tally.problems} problems, {tally.members} members, {tally.verdicts}")
    assert not tally.refuted, "\n".join(tally.refuted)
    assert tally.problems > 5 * minutes
    assert tally.verdicts["HOLDS"] > tally.problems / 10
    assert tally.verdicts["VIOLATED"] > tally.problems / 10


@pytest.mark.parametrize("number", [2, 5, 11, 17, 23])
def test_a_few_problems_by_every_verifier(number: int) -> None:
    problem = pose(number)
    assert problem is not None
    tally = Tally()
    examine(problem, tally, verifiers(problem), points=129)
    assert sum(tally.verdicts.values()) >= 4
    assert not tally.refuted, "\n".join(tally.refuted)
