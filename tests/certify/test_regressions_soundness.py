"""Wrong answers that were found once, each as the smallest case that showed it."""

from __future__ import annotations

import math
import types

import pytest
import torch
from torch import Tensor, nn

import certify
from certify import Status, audit, bab, branching, milp
from certify.bounds import METHODS as BOUNDS
from certify.bounds.activations import Clamp, LeakyReLU, ReLU
from certify.bounds.ascent import Ascended
from certify.enumeration import listable
from certify.precisions import Precisions, apart


def _linear(weight: list[list[float]], bias: list[float]) -> nn.Linear:
    layer = nn.Linear(len(weight[0]), len(weight))
    layer.weight.data, layer.bias.data = torch.tensor(weight), torch.tensor(bias)
    return layer


def _frozen(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(*layers).eval().requires_grad_(False)


# -- paths -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", ["line", "line-branch", "line-enumerate"])
def test_a_path_that_returns_to_its_start_keeps_its_pieces(dtype: torch.dtype, method: str) -> None:
    """Breakpoints were merged by how far apart the ends of a chunk are, which for a closed path is nothing."""
    net = _frozen(
        nn.Flatten(), _linear([[1.0]] * 3, [-0.5, -0.6, -0.7]), nn.ReLU(), _linear([[-20.0, 40.0, -20.0]], [1.0])
    ).to(dtype)
    x = torch.zeros(1, 1, 1, 1, dtype=dtype)
    stops = torch.tensor([0.0, 0.0, 1.0, 0.0, 0.0]).reshape(1, 5, 1, 1, 1)
    p = certify.Curve(torch.tensor([0.0, 1 / 64, 3 / 64, 5 / 64, 1.0]), stops)
    cert = certify.verify(net, x, certify.Linear(torch.ones(1, 1), 0.0), p, method)
    assert int(cert.status) == Status.VIOLATED  # -1 where the pixel is .6
    assert float(net(cert.counterexamples)) <= 0
    assert float(certify.deviation(net, x, p, method="enumerate").upper) == pytest.approx(2, abs=1e-3)


def test_an_overflow_on_the_path_is_no_proof() -> None:
    """NaN is below no threshold, which is not the same as above it."""
    net = _frozen(nn.Flatten(), _linear([[1e20], [1e20]], [0.0, 0.0]), nn.ReLU(), _linear([[1e20, -1e20]], [1.0]))
    x = torch.zeros(1, 1, 1, 1)
    assert listable(certify.Network(net, x).graph)
    for method in ("line", "line-branch", "line-enumerate"):
        cert = certify.verify(
            net, x, certify.Linear(torch.ones(1, 1), 0.0), certify.Brightness(0.3), method, certify.Budget(seconds=2)
        )
        assert not math.isnan(float(cert.lower)), method
        assert float(cert.lower) <= 1.0, method


@pytest.mark.parametrize("method", ["line", "line-enumerate", "crown", "forward", "auto"])
@pytest.mark.parametrize("seed", [0, 2, 4])
def test_float32_is_not_trusted_where_the_inside_of_a_network_is_large(seed: int, method: str) -> None:
    """Outputs near 1 from numbers near 1e8: what float32 loses has nothing to do with the size of the outputs, and on a
    black image it loses nothing. The output falls to -0.2; float32 saw 1 everywhere."""
    torch.manual_seed(seed)
    row = torch.rand(64) * 1e7
    heavier = row.clone()
    heavier[0] += 4
    net = _frozen(nn.Flatten(), nn.Linear(64, 2), nn.ReLU(), _linear([[1.0, -1.0]], [1.0]))
    net[1].weight.copy_(torch.stack([row.sort().values, heavier]))
    net[1].bias.zero_()
    x, spec, p = torch.zeros(1, 1, 8, 8), certify.Linear(torch.ones(1, 1), 0.0), certify.Brightness(0.3)
    nets, C = Precisions(net, x), torch.ones(1, 1, 1)
    black, grey = torch.zeros(1, *x.shape), torch.full((1, *x.shape), 0.3)
    assert float(apart(nets.given, nets.double, C, black, black.double())) == 0
    assert float(apart(nets.given, nets.double, C, grey, grey.double())) > 1
    assert float(audit.worst(net, x, spec, p).margin) == pytest.approx(-0.2, abs=1e-3)
    cert = certify.verify(net, x, spec, p, method, certify.Budget(seconds=5), attack=False)
    assert int(cert.status) != Status.HOLDS
    assert float(cert.lower) <= -0.199


# -- rounding and overflow ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", BOUNDS)
def test_an_interval_whose_width_overflows_is_not_narrow(method: str) -> None:
    """``hi / (hi - lo)`` is 0 where the width overflows, and a chord of slope 0 through 0 lies below the ReLU."""
    net = _frozen(_linear([[2e38, -2e38]], [0.0]), nn.ReLU(), _linear([[-1.0]], [1.0]))
    x, spec, p = torch.full((1, 2), 0.5), certify.Linear(torch.ones(1, 1), 0.0), certify.Linf(0.5)
    lo, _ = certify.bounds(net, x, p, method)
    assert not float(lo) > -1.99e38
    assert int(certify.verify(net, x, spec, p, method, attack=False).status) != Status.HOLDS


@pytest.mark.parametrize("op", [ReLU(), LeakyReLU(0.1), Clamp(0.0, math.inf), Clamp(-math.inf, 0.0), Clamp(-1.0, 1.0)])
def test_lines_enclose_activations_on_intervals_of_any_width(op: ReLU | LeakyReLU | Clamp) -> None:
    lo = torch.tensor([-3e38, -2e38, -1e30, -1e-40, -3e38, -1.0])
    hi = torch.tensor([3e38, 1.0, 3e38, 1e-40, 1e-30, 3e38])
    r = op.relax(lo, hi)
    for share in torch.linspace(0, 1, 9, dtype=torch.float64):
        v = lo.double() * (1 - share) + hi.double() * share
        value, slack = op.forward(v), 1e-6 * torch.maximum(-lo, hi).double() + 1e-38
        below = r.slope_lo.double() * v + (0 if r.bias_lo is None else r.bias_lo.double())
        above = r.slope_hi.double() * v + (0 if r.bias_hi is None else r.bias_hi.double())
        assert (below <= value + slack).all()
        assert (above >= value - slack).all()


def test_an_interval_that_is_not_a_number_stays_undecided() -> None:
    """NaN passed for a unit that is off."""
    nothing = torch.tensor([math.nan])
    for op in (ReLU(), LeakyReLU(0.1)):
        assert bool(op.unstable(nothing, nothing))
        assert bool(op.relax(nothing, nothing).slope_hi.isnan())


def test_the_middle_of_large_ends_does_not_overflow_alone() -> None:
    """Both ends near the largest float32: their sum is infinite, and an infinite middle with a finite radius is a lower
    bound of infinity."""
    net = _frozen(_linear([[3e38]], [0.0]), nn.ReLU(), _linear([[1e-38]], [-2.85]))
    x, p = torch.ones(1, 1), certify.Linf(0.1)
    for method in BOUNDS:
        lo, _ = certify.bounds(net, x, p, method)
        assert not float(lo) > -0.149, method  # 3 * .9 - 2.85
        cert = certify.verify(net, x, certify.Linear(torch.ones(1, 1), 0.0), p, method, attack=False)
        assert int(cert.status) != Status.HOLDS, method


@pytest.mark.parametrize("method", [*BOUNDS, "bab", "milp", "auto"])
def test_constants_of_a_property_are_not_rounded_to_the_images_precision(method: str) -> None:
    """``delta - C reference`` near 31.5 was rounded to float32, upwards, by more than is kept for rounding."""
    net = _frozen(_linear([[1.0]], [30.0]))
    x, delta = torch.full((1, 1), 0.5), 1 + 1.2e-6
    spec, p = certify.Deviation(delta), certify.Linf(delta + 2e-7, clip=False)
    cert = certify.verify(net, x, spec, p, method, attack=False)
    assert int(cert.status) != Status.HOLDS
    assert not audit.refutations(net, x, spec, p, cert, audit.worst(net, x, spec, p))


def test_a_single_image_is_decided_in_float64() -> None:
    """With nothing to change the float32 output alone was the verdict, a unit in its last place above the truth."""
    net = _frozen(_linear([[1.0]], [16.0]))
    x = torch.full((1, 1), 0.3)
    rounded = float(net(x)) - 16 - 0.3
    exact = float(net.double()(x.double())) - 16 - 0.3
    net.float()
    assert rounded != exact
    sign = 1.0 if rounded > exact else -1.0
    spec = certify.Linear(torch.tensor([[sign]], dtype=torch.float64), -sign * (16.3 + (rounded + exact) / 2))
    found = bab.verify(
        net, x, certify.Linf(0.0), spec.C, torch.tensor([float(spec.d)], dtype=torch.float64), attack=False
    )
    assert found.status == Status.UNKNOWN  # fails in real arithmetic, but the model does not show it


def test_a_bound_that_overflows_leaves_its_subproblem_open(monkeypatch: pytest.MonkeyPatch) -> None:
    """A subproblem whose bound was NaN was neither decided nor kept."""
    torch.manual_seed(0)
    net = _frozen(nn.Linear(4, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 1))
    ascend = branching.ascend

    def overflowing(*args: object, **kwargs: object) -> Ascended:
        found = ascend(*args, **kwargs)  # type: ignore[arg-type]
        lower = found.lower.clone()
        lower[::2] = math.nan
        return Ascended(lower, found.theta, found.weights, found.kept, found.at_input)

    x = torch.full((1, 4), 0.5)
    with torch.no_grad():
        points = torch.rand(4096, 4)
        lowest = float(net(points).min())
    spec = certify.Linear(torch.ones(1, 1), -lowest - 1e-3)  # fails, but only just
    monkeypatch.setattr(branching, "ascend", overflowing)
    settings = bab.Settings(input_dimensions=0)
    found = bab.verify(
        net, x, certify.Linf(0.5), spec.C, torch.tensor([float(spec.d)]), certify.Budget(seconds=2), attack=False,
        settings=settings,
    )  # fmt: skip
    assert found.status != Status.HOLDS


def test_a_tie_of_a_network_without_kinks_stays_unknown() -> None:
    """No unit to split, and a margin that only rounding keeps from zero: an error was raised."""
    net = _frozen(_linear([[1.0] * 9], [0.0])).double()
    x, p = torch.full((1, 9), 0.5, dtype=torch.float64), certify.Linf(0.25)
    spec = certify.Linear(torch.ones(1, 1), -9 * 0.25 + 1e-12)
    assert int(certify.verify(net, x, spec, p, "bab", attack=False).status) == Status.UNKNOWN


@pytest.mark.parametrize("factor", [1e-10, 1e-6, 1.0, 1e6, 1e10])
def test_programs_of_badly_scaled_networks_have_the_same_answer(factor: float) -> None:
    """The solver's tolerances are absolute: layers divided and multiplied by the same gave other minima."""
    torch.manual_seed(3)
    net = _frozen(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)).double()
    x, C = torch.full((1, 3), 0.5, dtype=torch.float64), torch.eye(2, dtype=torch.float64)
    wanted = [row.value for row in milp.minimum(net, x, certify.Linf(0.5), C)]
    net[0].weight *= factor
    net[0].bias *= factor
    net[2].weight /= factor
    found = milp.minimum(net, x, certify.Linf(0.5), C)
    for output, (row, value) in enumerate(zip(found, wanted, strict=True)):
        assert row.finished
        assert row.value == pytest.approx(value, abs=1e-5)
        assert value - 1e-3 < row.bound <= value
        point = row.x
        assert point is not None
        assert float(net(point)[0, output]) == pytest.approx(value, abs=1e-5)


@pytest.mark.parametrize("loud", [1.0, 1e4, 1e30])
def test_a_clamp_of_large_numbers_is_not_swallowed_by_their_difference(loud: float) -> None:
    """``relu(v) - relu(v - 6)`` is 0 for v = 1e30, where the clamp is 6: programs and ReLU splits decided another
    network."""
    torch.manual_seed(1)
    net = _frozen(nn.Linear(3, 6), nn.ReLU6(), nn.Linear(6, 1)).double()
    net[0].weight *= loud
    x, p, C = torch.full((1, 3), 0.5, dtype=torch.float64), certify.Linf(0.4), torch.ones(1, 1, dtype=torch.float64)
    lowest = float(audit.worst(net, x, certify.Linear(C), p, points=4000).margin)
    if loud > 1e7:
        with pytest.raises(certify.UnsupportedOperation, match="very different size"):
            milp.minimum(net, x, p, C)
    else:
        (found,) = milp.minimum(net, x, p, C)
        assert found.bound <= lowest + 1e-6
        assert found.value <= lowest + 1e-6
    for method in ("bab", "milp"):
        spec = certify.Linear(C, -1e-3 - lowest)
        cert = certify.verify(net, x, spec, p, method, certify.Budget(seconds=5), attack=False)
        assert int(cert.status) != Status.HOLDS if loud > 1e7 else int(cert.status) == Status.VIOLATED


def test_maxima_of_numbers_of_very_different_size_are_refused() -> None:
    """``b + relu(a - b)`` is 0 for a = 1 and b = -1e30."""
    net = _frozen(nn.MaxPool2d(2), nn.Flatten(), _linear([[1.0]], [0.0])).double()
    x = torch.tensor([[[[1.0, -1e30], [0.5, 0.25]]]], dtype=torch.float64)
    with pytest.raises(certify.UnsupportedOperation, match="very different size"):
        milp.minimum(net, x, certify.Linf(0.1, clip=False), torch.ones(1, 1))
    spec = certify.Linear(torch.ones(1, 1), -0.95)  # 1 - .1 - .95 < 0
    cert = certify.verify(net, x, spec, certify.Linf(0.1, clip=False), "bab", certify.Budget(seconds=3))
    assert int(cert.status) != Status.HOLDS


def test_a_unit_that_only_rounding_leaves_undecided_does_not_spoil_the_program() -> None:
    """Counted in units of its bounds, which are noise, its constraint cuts the minimum off: a grey image hardly moves
    with its saturation, and white pixels lie where clipping starts."""
    torch.manual_seed(0)
    net = _frozen(nn.Flatten(), nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 1)).double()
    x = torch.rand(1, 3, 2, 2, dtype=torch.float64)
    x[:, :, 0] = 1.0
    x[:, :, 1, 1] = 0.3
    C, p = torch.ones(1, 1, dtype=torch.float64), certify.Saturation(0.9)
    (found,) = milp.minimum(net, x, p, C)
    lowest = float(audit.worst(net, x, certify.Linear(C), p).margin)
    assert found.value == pytest.approx(lowest, abs=1e-6)
    assert lowest - 1e-3 < found.bound <= lowest + 1e-9


def test_nothing_to_decide_needs_no_program() -> None:
    """A point, and units that are all off: the solver was handed no variables."""
    net = _frozen(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
    net[0].bias.fill_(-9.0)
    x = torch.full((1, 2), 0.5)
    (found,) = milp.minimum(net, x, certify.Linf(0.0), torch.ones(1, 1))
    assert found.value == pytest.approx(float(net(x)))


# -- models ------------------------------------------------------------------------------------------------------------


def test_statistics_of_the_batch_in_evaluation_mode_are_refused() -> None:
    """Their values on the clean batch passed for constants, although they move with what is perturbed."""
    net = _frozen(nn.Linear(2, 3), nn.BatchNorm1d(3, track_running_stats=False), nn.ReLU(), nn.Linear(3, 2))
    x = torch.rand(3, 2)
    with pytest.raises(certify.UnsupportedOperation, match="module '1' uses the statistics of the batch"):
        certify.bounds(net, x, certify.Linf(0.1))
    with pytest.raises(certify.UnsupportedOperation, match="statistics of the batch"):
        certify.verify(net, x, certify.Classification(torch.zeros(3, dtype=torch.int64)), certify.Linf(0.1))


class _Half(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        return x.to(self.dtype).to(x.dtype)


def test_a_cast_that_rounds_is_refused() -> None:
    """Half precision inside a network passed for the identity."""
    x = torch.rand(2, 3)
    for dtype in (torch.float16, torch.bfloat16):
        with pytest.raises(certify.UnsupportedOperation, match=f"rounds its input to {dtype}"):
            certify.bounds(_frozen(_Half(dtype), nn.Linear(3, 2)), x, certify.Linf(0.0))
    wide = _frozen(_Half(torch.float64), nn.Linear(3, 2))
    lo, hi = certify.bounds(wide, x, certify.Linf(0.0))
    assert torch.allclose(lo, wide(x))
    assert torch.allclose(hi, wide(x))


# -- the auditor -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [certify.Linf(0.2), certify.L2(0.3), certify.Brightness(0.2), certify.Hue(0.2)])
def test_the_auditor_refutes_planted_answers(p: certify.Perturbation) -> None:
    torch.manual_seed(0)
    net = _frozen(nn.Flatten(), nn.Linear(27, 6), nn.LeakyReLU(0.5), nn.Linear(6, 2))
    net[1].weight *= 4
    x = torch.rand(2, 3, 3, 3)
    with torch.no_grad():
        reference = net(x)
        moved = audit.worst(net, x, certify.Linear(torch.tensor([[1.0, 0.0]])), p).margin
        spec = certify.Linear(torch.tensor([[1.0, 0.0]]).expand(2, 1, 2), -((reference[:, :1] + moved[:, None]) / 2))
        cert = certify.verify(net, x, spec, p)
    assert (cert.status == Status.VIOLATED).all()
    found = audit.worst(net, x, spec, p)
    assert not audit.refutations(net, x, spec, p, cert, found)
    planted = types.SimpleNamespace(**{**vars(cert), "status": torch.tensor([Status.HOLDS, Status.UNKNOWN])})
    planted.lower = torch.tensor([0.1, math.nan])
    lines = audit.refutations(net, x, spec, p, planted, found)  # type: ignore[arg-type]
    assert [line.partition(":")[0] for line in lines] == ["image 0", "image 0", "image 1"]
    planted = types.SimpleNamespace(**{**vars(cert), "counterexamples": x, "parameters": None})
    lines = audit.refutations(net, x, spec, p, planted, found)  # type: ignore[arg-type]
    assert len(lines) == 2
    assert all("says VIOLATED, but the margin there is" in line for line in lines)
    planted = types.SimpleNamespace(**{**vars(cert), "counterexamples": cert.counterexamples + 1, "parameters": None})
    assert any("outside" in line for line in audit.refutations(net, x, spec, p, planted, found))  # type: ignore[arg-type]
