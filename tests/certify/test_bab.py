"""Branch and bound: verdicts against the mixed-integer oracle, its parts against sampling, and its manners."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from certify import bab, branching, milp, splitting
from certify.bounds import Region, attach, trace
from certify.bounds.ascent import Memories, Problems, ascend, limits, tighten
from certify.bounds.crown import crown_intervals, crown_rows
from certify.bounds.interval import intervals
from certify.bounds.relunet import Lines, ReluNet, build
from certify.bounds.rewrite import relu_form
from certify.perturbations import L2, Box, Contrast, Linf
from certify.verdicts import Budget, Status

RELUS = bab.Settings(input_dimensions=0)


def mlp(*sizes: int, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(sizes):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers[:-1]).eval().requires_grad_(False)


class Residual(nn.Module):
    """Convolutions with a skip, batch normalisation, a leaky ReLU, a clamp and a padded max-pool."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.n = nn.Conv2d(1, 3, 3, padding=1, stride=2), nn.BatchNorm2d(3)
        self.b = nn.Conv2d(3, 3, 3, padding=1, groups=3)
        self.pool, self.c = nn.MaxPool2d(2, 2, 1), nn.Linear(12, 3)
        self.n.running_mean.uniform_(-0.2, 0.2)
        self.n.running_var.uniform_(0.5, 1.5)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.leaky_relu(self.n(self.a(x)), 0.1)
        x = torch.clamp(self.b(x) + x, -0.3, 0.4)
        return self.c(self.pool(x).flatten(1))


def residual(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return Residual().eval().requires_grad_(False)


def relunet(net: nn.Module, x: Tensor, eps: float, C: Tensor, d: Tensor) -> tuple[ReluNet, Region]:
    graph, region = attach(trace(net.double(), x.double())[0].folded(), x.double(), Linf(eps, clip=False))
    graph = relu_form(graph, intervals(graph, region))
    return build(graph, region, crown_intervals(graph, region), C.double(), d.double()), region


@pytest.mark.parametrize(
    ("net", "shape", "outputs"),
    [(mlp(5, 12, 12, 3), (5,), 3), (residual(), (1, 4, 4), 3)],
    ids=["mlp", "residual"],
)
def test_the_cut_down_network_is_the_network(net: nn.Module, shape: tuple[int, ...], outputs: int) -> None:
    torch.manual_seed(0)
    x, C, d = torch.rand(1, *shape), torch.randn(4, outputs), torch.randn(4)
    small, region = relunet(net, x, 0.2, C, d)
    points = region.lo + (region.hi - region.lo) * torch.rand(300, *shape, dtype=torch.float64)
    rows = net(points) @ C.double().t() + d.double()
    assert torch.allclose(small.forward(points.flatten(1).t()).t(), rows, atol=1e-12)
    assert torch.equal(small.inputs(points.flatten(1).t()), points)


def test_sparse_and_dense_links_are_the_same_map() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 4, 3, stride=2), nn.ReLU(), nn.Flatten())
    net = nn.Sequential(*net, nn.Linear(4 * 49, 2)).eval().requires_grad_(False)
    x = torch.rand(1, 1, 16, 16)
    small, region = relunet(net, x, 0.05, torch.eye(2), torch.zeros(2))
    assert any(v.matrix.layout == torch.sparse_csr for b in small.blocks for v in b.links.values())
    points = region.lo + (region.hi - region.lo) * torch.rand(20, 1, 16, 16, dtype=torch.float64)
    assert torch.allclose(small.forward(points.flatten(1).t()).t(), net(points), atol=1e-12)
    single = small.cast(torch.float32)
    assert torch.allclose(single.forward(points.flatten(1).t().float()).t().double(), net(points), atol=1e-5)


def test_bound_with_crown_slopes_is_crown() -> None:
    net = mlp(5, 12, 12, 3)
    x, C = torch.rand(1, 5), torch.randn(4, 3)
    small, region = relunet(net, x, 0.2, C, torch.zeros(4))
    lines = Lines.make(small.lo.unsqueeze(1), small.hi.unsqueeze(1))
    functional, constant = small.start(torch.eye(4, dtype=torch.float64))
    theta = ((small.hi > -small.lo) & (small.lo < 0)).double().unsqueeze(1).repeat(1, 4)
    lower, _, at_input = small.pull(functional, constant, len(small.blocks) + 1, lines, theta)
    at = small.minimiser(at_input)
    graph = trace(net, x.double())[0].folded()
    crown = crown_rows(graph, region, crown_intervals(graph, region), C.double().unsqueeze(0))[0]
    assert torch.allclose(lower, crown, atol=1e-10)
    assert ((at >= region.lo.flatten().unsqueeze(1) - 1e-12) & (at <= region.hi.flatten().unsqueeze(1) + 1e-12)).all()


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), splits=st.integers(0, 8), ball=st.booleans())
def test_bounds_under_random_splits_and_parameters_are_sound(seed: int, splits: int, ball: bool) -> None:
    """Whatever slopes and multipliers: below every sample that satisfies the splits; and so after ascent."""
    net = mlp(3, 10, 8, 2, seed=seed).double()
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(1, 3, generator=generator, dtype=torch.float64)
    graph = trace(net, x)[0].folded()
    p = L2(0.6, clip=False) if ball else Linf(0.6, clip=False)
    graph, region = attach(graph, x, p)
    C = torch.randn(2, 2, generator=generator, dtype=torch.float64)
    small = build(graph, region, crown_intervals(graph, region), C, torch.zeros(2, dtype=torch.float64))
    if not small.units:
        return
    sign = torch.zeros(small.units, 2, dtype=torch.int8)
    for unit in torch.randint(small.units, (splits,), generator=generator).tolist():
        sign[unit] = 1 if torch.rand(1, generator=generator) < 0.5 else -1
    lo, hi = small.lo.unsqueeze(1).expand(-1, 2), small.hi.unsqueeze(1).expand(-1, 2)
    lo, hi = torch.where(sign > 0, lo.clamp(min=0), lo), torch.where(sign < 0, hi.clamp(max=0), hi)
    lines = Lines.make(lo, hi, sign)
    low, high = limits(lines, sign)
    theta = (torch.randn(small.units, 2, generator=generator, dtype=torch.float64) * 2).clamp(low, high)
    functional, constant = small.start(torch.eye(2, dtype=torch.float64))
    top = len(small.blocks) + 1
    bound, kept, at = small.pull(functional, constant, top, lines, theta)
    best = ascend(small, Problems(top, functional, constant, lines, theta, low, high), 15, math.inf)
    assert (best.lower >= bound - 1e-12).all()
    again, _, _ = small.pull(functional, constant, top, lines, best.theta)
    assert torch.allclose(again, best.lower, atol=1e-10)

    points = p.sample(x, 3000, generator)[:, 0]
    z = torch.cat([points.t()[:0], *_preactivations(small, points.t())])
    inside = ((sign[:, :1] == 0) | (sign[:, :1] * z >= 0)).all(0)
    rows = small.forward(points.t())[:, inside]
    if rows.shape[1]:
        assert (rows.amin(1) >= best.lower - 1e-9).all()

    # The supergradient is the gradient wherever there is one.
    gradient, _ = small.gradient(at, kept, top, lines, theta)
    probe = theta.clone().requires_grad_()
    value, _, _ = small.pull(functional, constant, top, lines, probe)
    (expected,) = torch.autograd.grad(value.sum(), probe)
    free = (low < high) & (kept.abs() > 1e-9)
    assert torch.allclose(gradient[free], expected[free], atol=1e-8)


def _preactivations(net: ReluNet, x: Tensor) -> list[Tensor]:
    values, out = [x], []
    for block in net.blocks:
        z = block.bias.unsqueeze(1).expand(-1, x.shape[1])
        for j, link in block.links.items():
            z = z + link.push(values[j])
        out.append(z[: block.undecided])
        values.append(torch.cat([z[: block.undecided].clamp(min=0), z[block.undecided :]]))
    return out


def test_tightening_is_sound_under_splits_and_never_looser() -> None:
    small, region = relunet(mlp(3, 12, 12, 10, 2, seed=4), torch.rand(1, 3), 0.5, torch.eye(2), torch.zeros(2))
    points = region.lo + (region.hi - region.lo) * torch.rand(20_000, 3, dtype=torch.float64)
    z = torch.cat(_preactivations(small, points.t()))
    sign = torch.zeros(small.units, 3, dtype=torch.int8)
    # Splits that some points satisfy: two signs of the first point, three of the second.
    for column, units in ((1, [0, small.units - 1]), (2, [1, 2, small.units // 2])):
        sign[units, column] = z[units, column - 1].sign().to(torch.int8)
    lo, hi = small.lo.unsqueeze(1).repeat(1, 3), small.hi.unsqueeze(1).repeat(1, 3)
    lo, hi = torch.where(sign > 0, lo.clamp(min=0), lo), torch.where(sign < 0, hi.clamp(max=0), hi)
    before = lo.clone(), hi.clone()
    memories: Memories = {}
    for k in range(2, len(small.blocks) + 1):
        tighten(small.cast(torch.float32), small, k, lo, hi, 5, sign, memories)
    assert (lo >= before[0]).all()
    assert (hi <= before[1]).all()
    assert (lo - before[0]).sum() > 0
    assert sorted(memories) == list(range(2, len(small.blocks) + 1))
    for column in range(3):
        own = sign[:, column : column + 1]
        inside = ((own == 0) | (own * z >= 0)).all(0)
        assert int(inside.sum()) > 10
        assert (z[:, inside] >= lo[:, column : column + 1] - 1e-9).all()
        assert (z[:, inside] <= hi[:, column : column + 1] + 1e-9).all()


def verdict(net: nn.Module, x: Tensor, eps: float, C: Tensor, d: Tensor, **options: object) -> bab.Verdict:
    return bab.verify(net, x, Linf(eps, clip=False), C, d, Budget(30.0), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("settings_", [RELUS, bab.Settings()], ids=["relus", "inputs"])
@pytest.mark.parametrize("attack", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_agrees_with_milp_on_both_sides(seed: int, attack: bool, settings_: bab.Settings) -> None:
    net = mlp(4, 12, 12, 3, seed=seed)
    torch.manual_seed(seed)
    x, C = torch.rand(1, 4), torch.randn(2, 3)
    exact = min(m.value for m in milp.minimum(net, x, Linf(0.4, clip=False), C))
    for gap in (1e-3, -1e-3):
        found = verdict(net, x, 0.4, C, torch.full((2,), gap - exact), attack=attack, settings=settings_)
        assert found.status == (Status.HOLDS if gap > 0 else Status.VIOLATED)
        assert found.lower <= gap + 1e-6
        if gap < 0:
            assert found.counterexample is not None
            assert ((found.counterexample - x).abs() <= 0.4 + 1e-6).all()
            assert float((net(found.counterexample)[0] @ C.t() + gap - exact).min()) <= 0
        else:
            assert found.lower > found.margin


@pytest.mark.parametrize("seed", range(3))
def test_leaky_clamp_pool_and_skip_agree_with_milp(seed: int) -> None:
    net = residual(seed)
    torch.manual_seed(seed)
    x, C = torch.rand(1, 1, 4, 4), torch.randn(1, 3)
    (exact,) = milp.minimum(net, x, Linf(0.15, clip=False), C)
    assert exact.finished
    for gap, status in ((2e-3, Status.HOLDS), (-2e-3, Status.VIOLATED)):
        found = verdict(net, x, 0.15, C, torch.tensor([gap - exact.value]), attack=False, settings=RELUS)
        assert found.status == status


def test_any_row_means_any() -> None:
    # y = (x, -x): at every x in [-1, 1] one of x + .1 and -x + .1 is positive, though neither is everywhere.
    net = nn.Sequential(nn.Linear(1, 4), nn.ReLU(), nn.Linear(4, 2)).eval().requires_grad_(False)
    net[0].weight.copy_(torch.tensor([[1.0], [-1.0], [1.0], [-1.0]]))
    net[0].bias.zero_()
    net[2].weight.copy_(torch.tensor([[1.0, -1, 0, 0], [0, 0, -1, 1]]))
    net[2].bias.zero_()
    x = torch.zeros(1, 1)
    for settings_ in (RELUS, bab.Settings()):
        both = verdict(net, x, 1.0, torch.eye(2), torch.full((2,), 0.1), any_row=True, settings=settings_)
        assert both.status == Status.HOLDS
        assert verdict(net, x, 1.0, torch.eye(2), torch.full((2,), 0.1), settings=settings_).status == Status.VIOLATED
        lost = verdict(net, x, 1.0, torch.eye(2), torch.full((2,), -0.1), any_row=True, settings=settings_)
        assert lost.status == Status.VIOLATED
        assert lost.counterexample is not None
        assert lost.counterexample.abs().item() <= 0.1


@pytest.mark.parametrize("seed", range(3))
def test_any_row_against_a_grid(seed: int) -> None:
    net = mlp(2, 10, 10, 3, seed=seed)
    torch.manual_seed(seed)
    x, C = torch.rand(1, 2), torch.randn(3, 3)
    t = torch.linspace(-0.5, 0.5, 401)
    worst = float((net(x + torch.cartesian_prod(t, t)) @ C.t()).amax(1).min())
    for settings_ in (RELUS, bab.Settings()):
        for shift, status in ((0.02, Status.HOLDS), (-0.02, Status.VIOLATED)):
            d = torch.full((3,), shift - worst)
            assert verdict(net, x, 0.5, C, d, any_row=True, attack=False, settings=settings_).status == status


def test_verdicts_are_monotone_in_the_radius() -> None:
    net = mlp(6, 16, 16, 3, seed=7)
    torch.manual_seed(7)
    x = torch.rand(1, 6)
    y = int(net(x).argmax())
    C = torch.eye(3)[y] - torch.eye(3)[[i for i in range(3) if i != y]]
    order = [verdict(net, x, eps, C, torch.zeros(2), settings=RELUS).status for eps in (0.01, 0.1, 0.2, 0.4, 0.8, 2.0)]
    assert order == sorted(order)
    assert order[0] == Status.HOLDS
    assert order[-1] == Status.VIOLATED


def test_smooth_activations_are_decided_by_splitting_the_input() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 8), nn.Sigmoid(), nn.Linear(8, 1)).eval()
    net.requires_grad_(False)
    x = torch.rand(1, 2)
    t = torch.linspace(-1, 1, 401)
    least = float(net(x + torch.cartesian_prod(t, t)).min())
    one = torch.ones(1, 1)
    assert verdict(net, x, 1.0, one, torch.tensor([1e-3 - least])).status == Status.HOLDS
    assert verdict(net, x, 1.0, one, torch.tensor([-1e-3 - least]), attack=False).status == Status.VIOLATED


def test_balls_and_semantic_families() -> None:
    net = nn.Sequential(nn.Flatten(), *mlp(4, 10, 10, 2, seed=2)).eval()
    torch.manual_seed(1)
    x, C = torch.rand(1, 1, 2, 2), torch.tensor([[1.0, -1.0]])
    p = Contrast(0.5)
    t = torch.linspace(-0.5, 0.5, 2001)
    least = float((net(torch.cat([p.apply(x, v.reshape(1, 1)) for v in t])) @ C.t()).min())
    assert bab.verify(net, x, p, C, torch.tensor([1e-3 - least])).status == Status.HOLDS
    lost = bab.verify(net, x, p, C, torch.tensor([-1e-3 - least]), attack=False)
    assert lost.status == Status.VIOLATED
    assert lost.counterexample is not None
    assert float(net(lost.counterexample) @ C[0]) <= 1e-3 + least
    ball = L2(0.3)
    sampled = float((net(ball.sample(x, 20_000)[:, 0]) @ C.t()).min())
    assert bab.verify(net, x, ball, C, torch.tensor([0.3 - sampled]), Budget(20.0)).status == Status.HOLDS
    lost = bab.verify(net, x, ball, C, torch.tensor([-1e-3 - sampled]), Budget(20.0))
    assert lost.status == Status.VIOLATED
    assert lost.counterexample is not None
    assert float((lost.counterexample - x).norm()) <= 0.3 + 1e-6


def test_exact_zero_margin_is_not_proven_and_ends() -> None:
    # |x| > 0 fails at 0 alone, which float32 can hit; |x| + 0 x 0.1 shifted so that it cannot is left UNKNOWN at worst.
    net = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 1)).eval().requires_grad_(False)
    net[0].weight.copy_(torch.tensor([[1.0], [-1.0]]))
    net[0].bias.copy_(torch.tensor([-0.1, 0.1]))
    net[2].weight.fill_(1.0)
    net[2].bias.zero_()
    for settings_ in (RELUS, bab.Settings()):
        found = verdict(net, torch.zeros(1, 1), 1.0, torch.ones(1, 1), torch.zeros(1), settings=settings_)
        assert found.status in (Status.VIOLATED, Status.UNKNOWN)


def test_budget_is_kept_and_the_bound_is_anytime() -> None:
    net = mlp(20, 40, 40, 40, 3, seed=1)
    torch.manual_seed(1)
    x, C = torch.rand(1, 20), torch.randn(1, 3)
    sampled = float((net(Linf(0.6, clip=False).sample(x, 5000)[:, 0]) @ C.t()).min())
    bounds = []
    for seconds in (0.3, 2.0):
        found = bab.verify(net, x, Linf(0.6, clip=False), C, torch.tensor([-sampled + 0.05]), Budget(seconds))
        assert found.status in (Status.TIMEOUT, Status.VIOLATED)
        assert found.seconds < seconds + 3
        if found.status == Status.TIMEOUT:
            bounds.append(found.lower)
            assert found.lower <= 0.05
    assert bounds == sorted(bounds)
    small = bab.verify(net, x, Linf(0.6, clip=False), C, torch.tensor([-sampled + 0.05]), Budget(20.0, 1 << 16))
    assert small.status in (Status.TIMEOUT, Status.VIOLATED)
    assert small.seconds < 20


def test_runs_repeat() -> None:
    net = mlp(8, 20, 20, 3, seed=3)
    torch.manual_seed(3)
    x, C = torch.rand(1, 8), torch.randn(2, 3)
    exact = min(m.value for m in milp.minimum(net, x, Linf(0.25, clip=False), C, seconds=20))
    runs = [verdict(net, x, 0.25, C, torch.full((2,), 1e-2 - exact), settings=RELUS) for _ in range(2)]
    assert runs[0].status == Status.HOLDS
    assert (runs[0].work, runs[0].lower) == (runs[1].work, runs[1].lower)


def test_a_fixed_input_and_bad_input() -> None:
    net = mlp(3, 5, 2)
    x = torch.rand(1, 3)
    C, d = torch.tensor([[1.0, 0.0]]), torch.zeros(1)
    value = net(x)[0, 0]
    assert bab.verify(net, x, Box(x, x), C, 0.1 - value.reshape(1)).status == Status.HOLDS
    assert bab.verify(net, x, Box(x, x), C, -0.1 - value.reshape(1)).status == Status.VIOLATED
    with pytest.raises(ValueError, match="one image"):
        bab.verify(net, torch.rand(2, 3), Linf(0.1), C, d)
    with pytest.raises(ValueError, match="C must be"):
        bab.verify(net, x, Linf(0.1), torch.eye(3), torch.zeros(3))
    with pytest.raises(ValueError, match="training mode"):
        bab.verify(mlp(3, 5, 2).train(), x, Linf(0.1), C, d)


def test_open_subproblems_come_back_worst_first() -> None:
    store = branching._Open()
    values = torch.randperm(5000).float()
    for part in values.split(700):
        store.push({"lower": part, "tag": part.to(torch.int32).unsqueeze(1)})
    seen = []
    while store.count:
        some = store.pop(97)
        assert torch.equal(some["lower"], some["tag"][:, 0].float())
        seen.append(some["lower"].sort().values)
    assert torch.equal(torch.cat(seen), torch.arange(5000).float())


def test_affine_pieces_are_minimised_exactly() -> None:
    net = mlp(3, 6, 2, seed=5)
    x, C = torch.rand(1, 3), torch.eye(2)
    small, region = relunet(net, x, 0.7, C, torch.zeros(2))
    points = region.lo + (region.hi - region.lo) * torch.rand(200_000, 3, dtype=torch.float64)
    z = torch.cat(_preactivations(small, points.t()))
    rows = small.forward(points.t())
    some = z[:, 0].sign().to(torch.int8)
    inside = (z.sign() == some.unsqueeze(1)).all(0)
    for row in (0, 1):
        value, at = branching._affine_minimum(small, some, small.lo, row)
        assert at is not None
        assert value <= float(rows[row, inside].min()) + 1e-9
        assert float(small.forward(at.unsqueeze(1))[row]) == pytest.approx(value, abs=1e-6)
    largest, _ = branching._affine_minimum(small, some, small.lo, None)
    assert largest <= float(rows[:, inside].amax(0).min()) + 1e-9
    assert largest >= max(branching._affine_minimum(small, some, small.lo, row)[0] for row in (0, 1)) - 1e-9


def test_boxes_are_halved_without_gap_or_overlap() -> None:
    lo, hi = torch.zeros(1, 2, 2), torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])
    low, high = splitting._halve(lo, hi, torch.tensor([3]))
    assert torch.equal(low, torch.tensor([[[0.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 2.0]]]))
    assert torch.equal(high, torch.tensor([[[1.0, 2.0], [3.0, 2.0]], [[1.0, 2.0], [3.0, 4.0]]]))
