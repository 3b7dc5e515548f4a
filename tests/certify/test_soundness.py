"""Soundness of all verifiers together: random networks, perturbations and methods, searched for a wrong answer.

A wrong answer is a bound that a member of the set leaves, a HOLDS that an attack breaks, or a VIOLATED whose input is
not a member or does not fail. What answers are held against shares no code with the verifiers: forward passes in
float64 on members of the set (random ones, ends, corners, the outcome of gradient descent), and mixed-integer programs.
The slow test at the end searches for minutes; `CERTPRUNE_SEARCH` says for how many seconds.
"""

import copy
import dataclasses
import itertools
import math
import os
import random
import time
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import certify
from certify import Status, attack, bab, milp
from certify.bounds import METHODS as BOUNDS
from certify.curves import Path
from certify.dispatch import LINE, SEARCH
from certify.perturbations import AffineFamily, Box, Linf, Perturbation
from certify.specs import margin
from methods import masks

SHAPE = (3, 4, 4)
SEEDS = st.integers(0, 2**20)
BUDGET = certify.Budget(seconds=20)
# An attack may fail to reproduce a margin below this share of the outputs' size: that is what float32 resolves.
ROUNDING = 2e-5

repeated = settings(derandomize=True, deadline=None, max_examples=16, database=None)


# -- networks ----------------------------------------------------------------------------------------------------------


class Residual(nn.Module):
    """A skip connection around a normalised convolution, a padded max-pool, a mean over places."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.n, self.pool, self.c = nn.BatchNorm2d(4), nn.MaxPool2d(3, 2, 1), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x))
        x = torch.relu(self.n(self.b(x)) + x)
        return self.c(self.pool(x).mean((2, 3)))


class Keypoints(nn.Module):
    """A heat map for each of two points, and the mean place under its softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.n, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 3, padding=1)
        rows, columns = torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij")
        self.register_buffer("places", torch.stack([columns.flatten(), rows.flatten()], 1))

    def forward(self, x: Tensor) -> Tensor:
        heat = self.b(torch.relu(self.n(self.a(x))))
        return (torch.softmax(heat.flatten(2), 2) @ self.places).flatten(1)


def _plain() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 10), nn.ReLU(), nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 3))


def _pooled() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 5, 3, padding=1), nn.BatchNorm2d(5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(5, 4, 2), nn.ReLU(), nn.Flatten(), nn.Linear(4, 3),
    )  # fmt: skip


def _clipped() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4), nn.ReLU6(), nn.Conv2d(4, 4, 2, groups=2),
        nn.LeakyReLU(0.1), nn.Flatten(), nn.Linear(4, 5), nn.Hardtanh(), nn.Linear(5, 3),
    )  # fmt: skip


def _smooth() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 5), nn.Sigmoid(), nn.Linear(5, 3))


KINDS: dict[str, Callable[[], nn.Module]] = {
    "plain": _plain, "pooled": _pooled, "clipped": _clipped, "residual": Residual, "keypoints": Keypoints,
    "smooth": _smooth,
}  # fmt: skip
KINKED = ("plain", "pooled", "clipped", "residual")  # what mixed-integer programs can hold


def network(kind: str, seed: int) -> nn.Module:
    """A network with random weights, large enough for its ReLUs to change sign, and random batch statistics."""
    torch.manual_seed(seed)
    net = KINDS[kind]()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.05, 1.5)
            module.weight.data.normal_(0, 1)
            module.bias.data.normal_(0, 0.3)
        elif isinstance(module, nn.Conv2d | nn.Linear):
            module.weight.data *= float(torch.empty(()).uniform_(0.8, 3))
    return net.eval().requires_grad_(False)


# -- sets --------------------------------------------------------------------------------------------------------------


def images(n: int, seed: int) -> Tensor:
    """Images with many pixels at exactly 0 or 1, and one grey one, where perturbations have nothing to move."""
    generator = torch.Generator().manual_seed(seed)
    x = (torch.rand(n, *SHAPE, generator=generator) * 1.6 - 0.3).clamp(0, 1)
    if n > 2:
        x[-1] = x[-1, :1]
    return x


def _radii(n: int, seed: int, largest: float) -> Tensor:
    return torch.rand(n, generator=torch.Generator().manual_seed(seed + 1)) * largest


def _box(x: Tensor, seed: int) -> Box:
    generator = torch.Generator().manual_seed(seed + 2)
    free = torch.rand(SHAPE, generator=generator) < 0.1
    free[0, 0, 0] = True
    lo = torch.where(free, torch.rand(SHAPE, generator=generator) * 0.5, x[0])
    return Box(lo, torch.where(free, lo + 0.3, lo))


def _curve(x: Tensor, seed: int) -> certify.Curve:
    generator = torch.Generator().manual_seed(seed + 3)
    stops = [(x + 0.3 * torch.randn(x.shape, generator=generator) * k).clamp(-0.1, 1.1) for k in range(4)]
    return certify.Curve(torch.tensor([-0.1, 0.0, 0.2, 0.25]), torch.stack(stops, 1))


PERTURBATIONS: dict[str, Callable[[Tensor, int, float], Perturbation]] = {
    "linf": lambda x, seed, size: Linf(_radii(len(x), seed, 0.08 * size)),
    "linf-unclipped": lambda x, seed, size: Linf(0.05 * size, clip=False),
    "l2": lambda x, seed, size: certify.L2(_radii(len(x), seed, 0.5 * size)),
    "box": lambda x, seed, size: _box(x, seed),
    "brightness": lambda x, seed, size: certify.Brightness(_radii(len(x), seed, 0.3 * size)),
    "contrast": lambda x, seed, size: certify.Contrast(0.3 * size, ("zero", "mean", "half")[seed % 3]),
    "brightness-contrast": lambda x, seed, size: certify.BrightnessContrast(
        _radii(len(x), seed, 0.1 * size), _radii(len(x), seed + 9, 0.1 * size)
    ),
    "blur": lambda x, seed, size: certify.BlurMix(min(1.0, 0.8 * size), 0.7),
    "saturation": lambda x, seed, size: certify.Saturation(_radii(len(x), seed, size)),
    "hue": lambda x, seed, size: certify.Hue(_radii(len(x), seed, min(0.5, 0.5 * size))),
    "rotation": lambda x, seed, size: certify.Rotation(_radii(len(x), seed, min(180.0, 30 * size))),
    "scale": lambda x, seed, size: certify.Scale(_radii(len(x), seed, min(0.9, size))),
    "curve": lambda x, seed, size: _curve(x, seed),
}  # fmt: skip


def members(p: Perturbation, x: Tensor, n: int, seed: int) -> Tensor:
    """Members of the set around every image, (M, N, ...): random ones, corners, and for paths a grid with both ends."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [p.sample(x, n, generator)]
    if isinstance(p, AffineFamily | Path):
        low, high = p.limits(x)
        axes = [torch.linspace(0, 1, 65 if p.parameters == 1 else 9, dtype=x.dtype)] * p.parameters
        share = torch.cartesian_prod(*axes).reshape(-1, 1, p.parameters)
        t = low + (high - low) * share
        drawn.append(p.apply(x, t[..., 0] if p.parameters == 1 else t))
    elif not isinstance(p, certify.L2):
        lo, hi = p.hull(x)
        corner = torch.rand(n, *x.shape, generator=generator) < 0.5
        drawn.append(torch.where(corner, lo, hi))
    return torch.cat(drawn)


def belongs(p: Perturbation, x: Tensor, image: Tensor, t: Tensor | None) -> bool:
    """Whether `image` (1, ...) is a member of the set around `x` (1, ...), judged in float64."""
    wide, at = x.double(), image.double()
    if isinstance(p, certify.L2):
        return bool((at - wide).norm() <= float(torch.as_tensor(p.eps)) * (1 + 1e-6) + 1e-12)
    if not isinstance(p, AffineFamily | Path):
        lo, hi = p.hull(wide)
        return bool((at >= lo - 1e-7).all() and (at <= hi + 1e-7).all())
    low, high = p.limits(wide)
    if t is not None and bool(torch.isfinite(t).all()):
        t = t.double().reshape(1, -1)
        if not bool((t >= low - 1e-7).all() and (t <= high + 1e-7).all()):
            return False
        return float((p.apply(wide, t[:, 0] if p.parameters == 1 else t) - at).abs().max()) < 1e-6
    lo, hi = p.hull(wide)
    return bool((at >= lo - 1e-6).all() and (at <= hi + 1e-6).all())


def one(p: Perturbation, i: int, n: int) -> Perturbation:
    return p.select(torch.tensor([i]), n)


def applies(method: str, kind: str, p: Perturbation) -> bool:
    """Whether `verify` takes this method on this network and set."""
    if method in LINE:
        if not isinstance(p, AffineFamily | Path):
            return False
        straight = p.parameters == 1 and not isinstance(p, certify.Rotation | certify.Scale) and kind != "smooth"
        return method != "line-enumerate" or straight
    if method in SEARCH:
        return not isinstance(p, Path) and not (method == "milp" and (kind not in KINKED or isinstance(p, certify.L2)))
    return True


# -- bounds ------------------------------------------------------------------------------------------------------------


@repeated
@given(SEEDS, st.sampled_from(sorted(KINDS)), st.sampled_from(sorted(PERTURBATIONS)), st.sampled_from([0.1, 1.0, 3.0]))
def test_members_stay_within_every_bound(seed: int, kind: str, name: str, size: float) -> None:
    net, x = network(kind, seed), images(3, seed)
    p = PERTURBATIONS[name](x, seed, size)
    with torch.no_grad():
        points = members(p, x, 40, seed)
        outputs = net(points.flatten(0, 1)).unflatten(0, points.shape[:2])
        C = torch.randn(3, 4, outputs.shape[2], generator=torch.Generator().manual_seed(seed))
        rows = torch.einsum("nro,mno->mnr", C, outputs)
        for method in BOUNDS:
            if method == "forward" and isinstance(p, Path):
                continue  # the box around a path is free in too many places to tell more than "crown" does
            for values, found in (
                (outputs, certify.bounds(net, x, p, method)),
                (rows, certify.bounds(net, x, p, method, C=C)),
            ):
                slack = ROUNDING * (1 + values.abs().amax())
                assert (found[0] <= values.amin(0) + slack).all(), method
                assert (found[1] >= values.amax(0) - slack).all(), method


@repeated
@given(SEEDS, st.sampled_from(sorted(KINDS)), st.sampled_from(["linf", "l2", "brightness", "contrast", "blur"]))
def test_interval_bounds_grow_with_the_radius(seed: int, kind: str, name: str) -> None:
    net, x = network(kind, seed), images(2, seed)
    inner = outer = None
    with torch.no_grad():
        for size in (0.0, 0.2, 1.0):
            inner, outer = outer, certify.bounds(net, x, PERTURBATIONS[name](x, seed, size), "ibp")
            if inner is not None:
                slack = ROUNDING * (1 + outer[0].abs().amax())
                assert (outer[0] <= inner[0] + slack).all()
                assert (outer[1] >= inner[1] - slack).all()


@pytest.mark.parametrize("kind", KINKED)
def test_bounds_are_ordered_down_to_the_exact_minimum(kind: str) -> None:
    net, x = network(kind, 5), images(2, 5)
    p = Linf(0.03)
    with torch.no_grad():
        C = torch.tensor([[1.0, -1.0, 0.0], [0.0, 1.0, -1.0]]).expand(2, 2, 3)
        lower = {m: certify.bounds(net, x, p, m, C=C)[0].double() for m in BOUNDS}
        exact = torch.tensor([[r.value for r in milp.minimum(net, x[i : i + 1], p, C[i])] for i in range(2)]).double()
        slack = 1e-5 * (1 + exact.abs().amax())
        assert (lower["ibp"] <= lower["crown"] + slack).all()
        for method in BOUNDS:
            assert (lower[method] <= exact + slack).all(), method
        if "alpha-crown" in BOUNDS:
            assert (lower["crown"] <= lower["alpha-crown"] + slack).all()
        assert (lower["ibp"] < exact).any()


@repeated
@given(SEEDS, st.floats(0, 400), st.booleans())
def test_a_mean_under_softmax_is_bounded_whatever_the_logits(seed: int, scale: float, one_sided: bool) -> None:
    """Weights that underflow can still hold the mean, where everything else underflows further."""
    generator = torch.Generator().manual_seed(seed)
    net = nn.Sequential(nn.Linear(2, 4), nn.Softmax(1), nn.Linear(4, 2)).eval().requires_grad_(False)
    net[0].weight.copy_(torch.randn(4, 2, generator=generator) * scale)
    net[0].bias.copy_(torch.randn(4, generator=generator) * scale)
    if one_sided:
        net[0].weight.copy_(-net[0].weight.abs())
    net[2].weight.copy_(torch.randn(2, 4, generator=generator))
    x, p = torch.zeros(1, 2), Linf(1.0)
    steps = torch.linspace(0, 1, 41)
    values = net(torch.cartesian_prod(steps, steps))
    for method in BOUNDS:
        with torch.no_grad():
            lo, hi = certify.bounds(net, x, p, method)
        assert (lo[0] <= values.amin(0) + 1e-4).all(), method
        assert (hi[0] >= values.amax(0) - 1e-4).all(), method


# -- verdicts ----------------------------------------------------------------------------------------------------------


def specification(net: nn.Module, x: Tensor, kind: str, seed: int) -> certify.Classification | certify.Deviation:
    """What the network says itself, or for keypoints a distance; so that both verdicts occur."""
    if kind == "keypoints":
        return certify.Deviation((0.02, 0.1, 0.5)[seed % 3], ("linf", "point_l2")[seed % 2])
    return certify.Classification(net(x).argmax(1))


def lowest_seen(net: nn.Module, x: Tensor, spec: certify.specs.Spec, p: Perturbation, seed: int) -> Tensor:
    """The smallest margin (N,) in float64 over members of the set, the model's own references kept."""
    wide, precise = x.double(), _double(net)
    reference = net(x).double()
    points = members(_precise(p), wide, 200, seed)
    outputs = precise(points.flatten(0, 1)).unflatten(0, points.shape[:2])
    return margin(spec, outputs, reference).amin(0)


def _double(net: nn.Module) -> nn.Module:
    return copy.deepcopy(net).double()


def _precise(p: Perturbation) -> Perturbation:
    """`p` with its tensors in float64."""
    changes = {
        f.name: getattr(p, f.name).double()
        for f in dataclasses.fields(p)
        if isinstance(getattr(p, f.name), Tensor)
    }  # fmt: skip
    return dataclasses.replace(p, **changes)


def scale_of(spec: certify.specs.Spec, reference: Tensor) -> Tensor:
    """The size of the numbers that make up the margins (N,)."""
    rows = spec.rows(reference)
    return (rows.C.abs() @ reference.abs().unsqueeze(2)).squeeze(2).amax(1) + torch.as_tensor(rows.d).abs().amax(1)


def replayed(net: nn.Module, x: Tensor, spec: certify.specs.Spec, p: Perturbation, cert: certify.Certificate) -> int:
    """How many images are VIOLATED; each comes with a member on which the model itself fails, others with NaN."""
    reference = net(x)
    for i in range(len(x)):
        image = cert.counterexamples[i : i + 1]
        if cert.status[i] != Status.VIOLATED:
            assert image.isnan().all()
            continue
        index = torch.tensor([i])
        own = certify.specs.select(spec, reference, index)
        assert float(margin(own, net(image), reference[i : i + 1])) <= ROUNDING * float(scale_of(spec, reference)[i])
        t = None if cert.parameters is None else cert.parameters[i : i + 1]
        assert belongs(one(p, i, len(x)), x[i : i + 1], image, t)
    return int((cert.status == Status.VIOLATED).sum())


@settings(repeated, max_examples=16)
@given(SEEDS, st.sampled_from(sorted(KINDS)), st.sampled_from(sorted(PERTURBATIONS)), st.sampled_from([0.05, 0.3, 1.0]))
def test_no_verdict_is_refuted(seed: int, kind: str, name: str, size: float) -> None:
    net, x = network(kind, seed), images(3, seed)
    p = PERTURBATIONS[name](x, seed, size).spread(x)
    with torch.no_grad():
        spec = specification(net, x, kind, seed)
        lowest = lowest_seen(net, x, spec, p, seed)
        slack = ROUNDING * scale_of(spec, net(x))
        verdicts = []
        for method in ("auto", *BOUNDS, *LINE, *SEARCH):
            if not applies(method, kind, p) or (method == "forward" and isinstance(p, Path)):
                continue
            cert = certify.verify(net, x, spec, p, method, BUDGET, seed=seed)
            replayed(net, x, spec, p, cert)
            holds = cert.status == Status.HOLDS
            assert (lowest[holds] > -slack[holds]).all(), method
            assert (cert.lower <= lowest + slack).all(), method
            verdicts.append(cert.status)
    together = torch.stack(verdicts)
    # Margins that float32 cannot tell from zero may be judged either way.
    clear = (lowest.abs() > slack).expand_as(together)
    assert not (((together == Status.HOLDS) & clear).any(0) & ((together == Status.VIOLATED) & clear).any(0)).any()


@repeated
@given(SEEDS, st.sampled_from(KINKED), st.sampled_from(["linf", "brightness", "contrast", "blur", "saturation"]))
def test_verdicts_are_monotone_in_the_radius(seed: int, kind: str, name: str) -> None:
    net, x = network(kind, seed), images(2, seed)
    with torch.no_grad():
        spec = specification(net, x, kind, seed)
        broken = torch.zeros(2, dtype=torch.bool)
        for size in (0.0, 0.05, 0.3, 1.0):
            cert = certify.verify(net, x, spec, PERTURBATIONS[name](x, seed, size), budget=BUDGET)
            assert not (broken & (cert.status == Status.HOLDS)).any()
            broken |= cert.status == Status.VIOLATED


# -- exact answers -----------------------------------------------------------------------------------------------------


@settings(repeated, max_examples=12)
@given(SEEDS, st.sampled_from(KINKED), st.sampled_from(["linf", "linf-unclipped", "box", "brightness", "contrast"]))
def test_complete_verifiers_agree_around_the_exact_minimum(seed: int, kind: str, name: str) -> None:
    """A property that holds, or fails, by a hair: its constant puts the exact minimum just above or below zero."""
    net, x = _double(network(kind, seed)), images(1, seed).double()
    p = _precise(PERTURBATIONS[name](x, seed, 0.15))
    C = torch.randn(1, 3, generator=torch.Generator().manual_seed(seed)).double()
    with torch.no_grad():
        (exact,) = milp.minimum(net, x, p, C)
        assert exact.finished
        size = float((C.abs() @ net(x)[0].abs()).amax()) + abs(exact.value)
        seen = float((net(members(p, x, 100, seed).flatten(0, 1)) @ C.t()).min())
        assert exact.value <= seen + 1e-6 * size
        for share, wanted in ((1e-3, Status.HOLDS), (-1e-3, Status.VIOLATED)):
            d = torch.tensor([share * size - exact.value]).double()
            spec = certify.Linear(C, d)
            for method in ("auto", "line", "line-enumerate", "bab"):
                if applies(method, kind, p):
                    cert = certify.verify(net, x, spec, p, method, BUDGET)
                    assert int(cert.status) == wanted, method
                    replayed(net, x, spec, p, cert)


@settings(repeated, max_examples=10)
@given(
    SEEDS,
    st.sampled_from(["plain", "pooled", "clipped", "keypoints"]),
    st.sampled_from(["brightness", "contrast", "blur", "saturation", "hue", "rotation", "curve"]),
)
def test_the_largest_deviation_decides_every_threshold(seed: int, kind: str, name: str) -> None:
    net, x = network(kind, seed), images(2, seed)
    p = PERTURBATIONS[name](x, seed, 0.5)
    with torch.no_grad():
        found = certify.deviation(net, x, p, tol=1e-4)
        points = members(p, x, 300, seed)
        moved = (net(points.flatten(0, 1)).unflatten(0, points.shape[:2]) - net(x)).abs().amax((0, 2)).double()
        slack = 1e-5 * (1 + net(x).abs().amax())
        assert (moved <= found.upper + slack).all()
        assert (found.lower <= found.upper + 1e-9).all()
        assert (found.upper - found.lower <= 2e-4 + slack).all()
        for i in range(len(x)):
            for delta, wanted in (
                (found.upper[i] + 2 * slack, Status.HOLDS),
                (found.lower[i] - 2 * slack, Status.VIOLATED),
            ):
                if delta <= 0:
                    continue
                spec, index = certify.Deviation(float(delta)), slice(i, i + 1)
                own = one(p, i, len(x))
                cert = certify.verify(net, x[index], spec, own, budget=BUDGET)
                assert int(cert.status) == wanted
                replayed(net, x[index], spec, own, cert)


# -- pruned networks ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["pooled", "residual"])
def test_masked_and_removed_channels_have_the_same_bounds_and_verdicts(kind: str) -> None:
    net, x = network(kind, 1), images(2, 1)
    scores = {
        name: weight.flatten(1).norm(dim=1).reshape(-1, *[1] * (weight.ndim - 1)).expand_as(weight)
        for name, weight in net.named_parameters()
        if weight.ndim == 4
    }
    mask = masks.Mask.from_scores(scores, 0.4, structured=True, groups=masks.groups(net, x[:1]))
    masked = masks.apply(copy.deepcopy(net), mask)
    removed = masks.remove(net, mask, x[:1])
    assert sum(w.numel() for w in removed.parameters()) < sum(w.numel() for w in masked.parameters())
    with torch.no_grad():
        spec = certify.Classification(masked(x).argmax(1))
        for p in (Linf(0.01), certify.L2(0.1), certify.Brightness(0.1), certify.BrightnessContrast(0.05, 0.05)):
            for method in BOUNDS:
                for a, b in zip(certify.bounds(masked, x, p, method), certify.bounds(removed, x, p, method)):
                    assert torch.allclose(a, b, rtol=1e-4, atol=1e-5 * float(1 + a.abs().max())), method
            a = certify.verify(masked, x, spec, p, budget=BUDGET)
            b = certify.verify(removed, x, spec, p, budget=BUDGET)
            assert torch.equal(a.status, b.status)


# -- what was once wrong -----------------------------------------------------------------------------------------------


def test_a_box_without_batch_axis_is_not_taken_for_a_batch() -> None:
    """Three channels and three images: the box's channels are not the images' boxes."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 2)).eval().requires_grad_(False)
    net[1].weight.zero_()
    net[1].weight[0, 4:8] = -1.0
    net[1].bias.copy_(torch.tensor([1.0, 0.0]))
    lo, hi = torch.zeros(3, 2, 2), torch.zeros(3, 2, 2)
    hi[1] = 1.0
    x, spec = torch.zeros(3, 3, 2, 2), certify.Classification(torch.zeros(3, dtype=torch.int64))
    for method, chunk in itertools.product(("ibp", "crown", "bab", "milp", "auto"), (1, 16)):
        cert = certify.verify(net, x, spec, Box(lo, hi), method, chunk=chunk)
        assert (cert.status == Status.VIOLATED).all(), (method, chunk)


def test_a_box_of_one_point_is_judged_there_and_not_at_the_image_beside_it() -> None:
    net = nn.Sequential(nn.Linear(2, 1)).eval().requires_grad_(False)
    net[0].weight.fill_(1.0)
    net[0].bias.zero_()
    corner = torch.full((1, 2), 0.1)
    found = bab.verify(net, torch.ones(1, 2), Box(corner, corner), torch.ones(1, 1), torch.zeros(1), attack=False)
    assert found.status == Status.HOLDS
    assert found.lower == pytest.approx(0.2)


def test_searches_of_boxes_refuse_curves() -> None:
    net, x = network("plain", 0), images(1, 0)
    for method in SEARCH:
        with pytest.raises(ValueError, match="use 'line' or 'auto'"):
            certify.verify(net, x, certify.Classification(net(x).argmax(1)), certify.Hue(0.1), method)
    with pytest.raises(ValueError, match=r"see certify\.line"):
        bab.verify(net, x, certify.Rotation(5.0), torch.ones(1, 3), torch.zeros(1))
    with pytest.raises(ValueError, match="is a curve"):
        milp.minimum(net, x, certify.Rotation(5.0), torch.ones(1, 3))


def test_branch_and_bound_in_float64_splits_deep_networks() -> None:
    net, x = _double(network("pooled", 0)), images(1, 0).double()
    y = net(x).argmax(1)
    cert = certify.verify(net, x, certify.Classification(y), Linf(0.02), "bab", BUDGET)
    assert cert.dtype == "float64"
    assert int(cert.status) in (Status.HOLDS, Status.VIOLATED, Status.TIMEOUT)
    assert replayed(net, x, certify.Classification(y), Linf(0.02), cert) in (0, 1)


class _Overwriting(nn.Module):
    """Reads a view of memory that an in-place ReLU has changed meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        view = h.view(-1, 2)
        h.relu_()
        return self.b(view)


# -- bad input ---------------------------------------------------------------------------------------------------------


class _Cosine(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cos(x)


class _Mixing(nn.Module):
    """Subtracts the mean of the batch."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0, keepdim=True)


@pytest.mark.parametrize(
    ("inner", "match"),
    [
        (_Cosine(), "'cos' in module '1.0'"),
        (nn.ELU(), "module '1.0'"),
        (_Overwriting(), r"module '1\.0\.b' reads a view whose memory was written to"),
        (_Mixing(), "module '1.0'"),
    ],
    ids=["cosine", "elu", "overwriting", "mixing"],
)
@pytest.mark.parametrize("method", ["ibp", "crown", "auto", "bab"])
def test_an_operation_without_a_bound_is_named_by_its_module(inner: nn.Module, match: str, method: str) -> None:
    width = 2 if isinstance(inner, _Overwriting) else 3
    net = nn.Sequential(nn.Linear(3, width), nn.Sequential(inner)).eval().requires_grad_(False)
    outputs = net(torch.rand(2, 3)).shape[1]
    spec = certify.Linear(torch.ones(1, outputs), 10.0)
    with pytest.raises((certify.UnsupportedOperation, ValueError), match=match):
        certify.verify(net, torch.rand(2, 3), spec, Linf(0.1), method)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("place", ["1.weight", "1.bias"])
def test_weights_that_are_not_finite_are_named(value: float, place: str) -> None:
    net, x = network("plain", 0), images(1, 0)
    dict(net.named_parameters())[place].view(-1)[0] = value
    with pytest.raises(ValueError, match=rf"{place} holds NaN or infinity"):
        certify.bounds(net, x, Linf(0.1))
    with pytest.raises(ValueError, match="NaN or infinity"):
        certify.verify(net, x, certify.Linear(torch.ones(1, 3)), Linf(0.1))


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda: Box(torch.ones(1, 2), torch.zeros(1, 2)), "inverted box"),
        (lambda: Box(torch.tensor([math.nan]), torch.ones(1)), "inverted box"),
        (lambda: Linf(-0.1), ">= 0"),
        (lambda: Linf(math.nan), ">= 0"),
        (lambda: certify.L2(torch.tensor([0.1, math.inf])), ">= 0"),
        (lambda: certify.BlurMix(1.5), "<= 1"),
        (lambda: certify.Hue(0.7), "half a turn"),
        (lambda: certify.Linear(torch.zeros(0, 3)), "at least one row"),
        (lambda: certify.Linear(torch.zeros(2, 0, 3)), "at least one row"),
        (lambda: certify.Deviation(0.0), "delta must be > 0"),
        (lambda: certify.Deviation(math.nan), "delta must be > 0"),
        (lambda: certify.Budget(seconds=0), "seconds > 0"),
        (lambda: certify.Budget(seconds=math.nan), "seconds > 0"),
        (lambda: certify.Budget(memory=0), "memory > 0"),
    ],
)
def test_malformed_sets_properties_and_budgets_are_refused(build: Callable[[], object], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        build()


@pytest.mark.parametrize(
    ("spec", "p", "match"),
    [
        (certify.Linear(torch.ones(1, 4)), Linf(0.1), "4 columns but the network has 3 outputs"),
        (certify.Linear(torch.ones(3, 1, 3)), Linf(0.1), "for a batch of 3"),
        (certify.Linear(torch.full((1, 3), math.nan)), Linf(0.1), "property holds NaN"),
        (certify.Linear(torch.ones(1, 3), math.inf), Linf(0.1), "property holds NaN or infinity"),
        (certify.Deviation(1.0, "point_l2"), Linf(0.1), "even number of outputs"),
        (certify.Deviation(1.0, reference=torch.zeros(2, 4)), Linf(0.1), "the reference is"),
        (certify.Classification(torch.tensor([0, 3])), Linf(0.1), r"labels span \[0, 3\]"),
        (certify.Classification(torch.tensor([0, 0])), Box(torch.zeros(5), torch.ones(5)), "does not fit inputs"),
        (
            certify.Classification(torch.tensor([0, 0])),
            Box(torch.tensor(-math.inf), torch.tensor(1.0)),
            "unbounded box",
        ),
        (certify.Classification(torch.tensor([0, 0])), Linf(torch.tensor([0.1, 0.1, 0.1])), "3 radii"),
    ],
)
@pytest.mark.parametrize("method", ["auto", "ibp", "bab"])
def test_a_property_or_set_that_does_not_fit_the_network_is_refused(
    spec: certify.specs.Spec, p: Perturbation, match: str, method: str
) -> None:
    with pytest.raises(ValueError, match=match):
        certify.verify(network("plain", 0), images(2, 0), spec, p, method)


def test_outputs_that_overflow_are_refused() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)).eval().requires_grad_(False)
    for module in (net[0], net[2]):
        module.weight.fill_(1e30)
    with pytest.raises(ValueError, match="outputs on the unperturbed images hold NaN or infinity"):
        certify.verify(net, torch.ones(1, 2), certify.Classification(torch.tensor([0])), Linf(0.1))


# -- the search --------------------------------------------------------------------------------------------------------


def _trained(net: nn.Module, kind: str, seed: int) -> None:
    """A few steps towards random targets: weights that belong together, as random ones do not."""
    x, generator = images(24, seed + 17), torch.Generator().manual_seed(seed)
    wanted = torch.rand(24, net(x).shape[1], generator=generator)
    net.train().requires_grad_(True)
    optimizer = torch.optim.Adam(net.parameters(), 0.02)
    for _ in range(15):
        optimizer.zero_grad()
        nn.functional.mse_loss(net(x), 3 * wanted).backward()
        optimizer.step()
    net.eval().requires_grad_(False)


def _layers(net: nn.Module) -> list[nn.Module]:
    return [m for m in net.modules() if isinstance(m, nn.Conv2d | nn.Linear)]


def _dead_channels(net: nn.Module, rng: random.Random) -> None:
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            dead = torch.tensor([rng.random() < 0.5 for _ in range(module.num_features)])
            module.weight[dead] = 0.0
            module.bias[dead] = rng.choice((0.0, 1e-7, -1e-7, 0.5))
            module.running_var[dead] = rng.choice((0.0, 1e-12, 1.0))


def _twin_outputs(net: nn.Module, rng: random.Random) -> None:
    last = _layers(net)[-1]
    last.weight[1] = last.weight[0] + rng.choice((0.0, 1e-7, 1e-4)) * torch.randn(last.weight[0].shape)
    if last.bias is not None:
        last.bias[1] = last.bias[0] + rng.choice((0.0, 1e-6, 1e-3))


def _rescaled(net: nn.Module, rng: random.Random) -> None:
    """One layer divided and the next multiplied by the same: the same function where ReLUs lie between."""
    layers, factor = _layers(net), 10 ** rng.uniform(-6, 6)
    at = rng.randrange(len(layers) - 1)
    layers[at].weight *= factor
    if layers[at].bias is not None:
        layers[at].bias *= factor
    layers[at + 1].weight /= factor


def _loud(net: nn.Module, rng: random.Random) -> None:
    for module in _layers(net):
        module.weight *= 10 ** rng.uniform(-1, 1)


def _quiet_outputs(net: nn.Module, rng: random.Random) -> None:
    last, factor = _layers(net)[-1], 10 ** rng.uniform(-8, 5)
    last.weight *= factor
    if last.bias is not None:
        last.bias *= factor


def _cancelling(net: nn.Module, rng: random.Random) -> None:
    """Large constants in the last layer that the margins do not see."""
    last = _layers(net)[-1]
    if last.bias is not None:
        last.bias += 10 ** rng.uniform(0, 4)


def _rounded(net: nn.Module, rng: random.Random) -> None:
    """Weights of few bits: ties, kinks at exactly the same place, zeros."""
    for module in _layers(net):
        module.weight.copy_((module.weight * 4).round() / 4)
        if module.bias is not None:
            module.bias.copy_((module.bias * 4).round() / 4)


def _sparse(net: nn.Module, rng: random.Random) -> None:
    for module in _layers(net):
        module.weight *= torch.rand(module.weight.shape) < rng.choice((0.1, 0.5))


SHAPINGS = (_dead_channels, _twin_outputs, _rescaled, _loud, _quiet_outputs, _cancelling, _rounded, _sparse)


@dataclasses.dataclass
class Tally:
    """What the search did: problems posed, verdicts given, HOLDS attacked, members tried on them."""

    problems: int = 0
    verdicts: int = 0
    holds: int = 0
    violated: int = 0
    members: int = 0
    breaks: list[str] = dataclasses.field(default_factory=list)


def _posed(rng: random.Random) -> tuple[str, str, str, nn.Module, Tensor, Perturbation]:
    seed, kind, name = rng.randrange(2**30), rng.choice(sorted(KINDS)), rng.choice(sorted(PERTURBATIONS))
    net = network(kind, seed)
    if rng.random() < 0.5:
        _trained(net, kind, seed)
    shapings = rng.sample(SHAPINGS, rng.choice((0, 1, 1, 2, 3)))
    for shape in shapings:
        shape(net, rng)
    x = images(2, seed)
    if rng.random() < 0.3:
        x = x.round()  # every pixel where clipping starts
    p = PERTURBATIONS[name](x, seed, rng.choice((0.0, 1e-6, 1e-3, 0.03, 0.1, 0.3, 1.0))).spread(x)
    if rng.random() < 0.4:
        net, x, p = _double(net), x.double(), _precise(p)
    label = f"seed={seed} kind={kind} p={name}:{p.describe()} {x.dtype} {[s.__name__ for s in shapings]}"
    return label, kind, name, net, x, p


def _sharpened(rng: random.Random, net: nn.Module, x: Tensor, kind: str, p: Perturbation) -> certify.specs.Spec:
    """A property that fails or holds by a hair: its constants put the smallest margin seen (or proven) near zero."""
    reference = net(x)
    C = torch.randn(len(x), 2, reference.shape[1]).to(x)
    values = (C @ reference.unsqueeze(2)).squeeze(2)
    size = (C.abs() @ reference.abs().unsqueeze(2)).squeeze(2)
    lowest = values.double()
    small = sum(m.weight.numel() for m in _layers(net)) < 1200
    for i in range(len(x)):
        own = one(p, i, len(x))
        if applies("milp", kind, p) and small and rng.random() < 0.3:
            found = milp.minimum(_double(net), x[i : i + 1].double(), _precise(own), C[i].double(), seconds=2)
            if all(row.finished for row in found):
                lowest[i] = torch.tensor([row.value for row in found]).double()
                continue
        found = attack.attack(net, x[i : i + 1], certify.Linear(C[i], float(-values[i].min())), own, seed=0)
        lowest[i] = values[i].double().min() + float(found.margin)
    hair = rng.choice((1.0, -1.0)) * 10 ** rng.uniform(-9, -1)
    return certify.Linear(C, (hair * size.double() - lowest).to(x))


def _assault(net: nn.Module, x: Tensor, spec: certify.specs.Spec, p: Perturbation, seed: int) -> tuple[Tensor, int]:
    """The smallest margin (N,) that anything finds in float64 with the references of `net`, and how many were tried."""
    reference, precise, wide = net(x).double(), _double(net), x.double()
    points = members(_precise(p), wide, 250, seed)
    outputs = precise(points.flatten(0, 1)).unflatten(0, points.shape[:2])
    rows = spec.rows(net(x))
    lowest = margin(spec, outputs, reference).amin(0)
    tried = len(points) * len(x)
    if not isinstance(p, Path) and not isinstance(spec, certify.Deviation):
        fixed = certify.Linear(rows.C.double(), torch.as_tensor(rows.d).double())
        found = attack.attack(precise, wide, fixed, _precise(p), seed=seed, strength="standard")
        lowest = torch.minimum(lowest, found.margin)
        tried += 200 * len(x)
    return lowest, tried


def search(seconds: float, seed: int = 0) -> Tally:
    """Look for a wrong verdict for so many seconds; what was found is in `breaks`, one line each, to be reproduced."""
    tally, began, number = Tally(), time.perf_counter(), seed
    while time.perf_counter() - began < seconds:
        number += 1
        rng = random.Random(number)
        torch.manual_seed(number)
        with torch.no_grad():
            with torch.enable_grad():
                label, kind, _, net, x, p = _posed(rng)
            if not bool(torch.isfinite(net(x)).all()):
                continue
            sharp = rng.random() < 0.6
            spec = _sharpened(rng, net, x, kind, p) if sharp else specification(net, x, kind, number)
            label = f"number={number} {label} {'sharp' if sharp else type(spec).__name__}"
            lowest, tried = _assault(net, x, spec, p, number)
            tally.members += tried
            tally.problems += 1
            # What float64 resolves, or for a float32 model the precision in which its own outputs are known.
            share = 1e-7 if x.dtype == torch.float64 else ROUNDING
            slack = share * scale_of(spec, net(x)).double()
            candidates = [m for m in (*BOUNDS, *LINE, *SEARCH) if applies(m, kind, p)]
            if isinstance(p, Path):
                candidates = [m for m in candidates if m != "forward"]
            for method in ("auto", *rng.sample(candidates, min(3, len(candidates)))):
                cert = certify.verify(net, x, spec, p, method, certify.Budget(seconds=1.0), seed=number)
                holds = cert.status == Status.HOLDS
                tally.verdicts += len(x)
                tally.holds += int(holds.sum())
                if bool((holds & (lowest <= -slack)).any()):
                    tally.breaks.append(f"HOLDS {method} margin {lowest.tolist()} slack {slack.tolist()}: {label}")
                if bool((cert.lower.double() > lowest + slack).any()):
                    tally.breaks.append(f"lower {cert.lower.tolist()} > {lowest.tolist()} {method}: {label}")
                try:
                    tally.violated += replayed(net, x, spec, p, cert)
                except AssertionError as error:
                    tally.breaks.append(f"VIOLATED {method} {str(error)[:80]}: {label}")
    return tally


@pytest.mark.slow
def test_an_adversarial_search_finds_no_wrong_verdict() -> None:
    tally = search(float(os.environ.get("CERTPRUNE_SEARCH", "240")))
    print(f"{dataclasses.replace(tally, breaks=[])}, {len(tally.breaks)} breaks")
    assert tally.holds > 100
    assert tally.violated > 100
    assert not tally.breaks, "\n".join(tally.breaks)
