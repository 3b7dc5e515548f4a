"""Wrong answers about what a network computes that were found once, each as the smallest case that showed it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import certify
from certify import Status, UnsupportedOperation


def _gain(x: Tensor) -> Tensor:
    return torch.relu(x.sum(1, keepdim=True) - 1.0) * 3.0


_scripted = torch.jit.script(_gain)


class _Odd(torch.Tensor):
    """Another kind of tensor."""


class Between(nn.Module):
    """Convolution, something with a constant that differs from place to place, convolution, ReLU, linear."""

    def __init__(self, kind: str, shape: tuple[int, int, int]) -> None:
        super().__init__()
        channels, height, width = shape
        self.kind = kind
        self.first = nn.Conv2d(1, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)
        self.last = nn.Linear(channels * height * width, 2)
        self.row = nn.Parameter(torch.randn(width))
        self.column = nn.Parameter(torch.randn(height, 1))
        self.mix = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        change: dict[str, Callable[[Tensor], Tensor]] = {
            "add a row": lambda x: x + self.row,
            "add a column": lambda x: x + self.column,
            "scale by a row": lambda x: x * self.row,
            "mix the columns": self.mix,
        }
        return self.last(torch.relu(self.second(change[self.kind](x))).flatten(1))


@pytest.mark.parametrize("kind", ["add a row", "add a column", "scale by a row", "mix the columns"])
@pytest.mark.parametrize("shape", [(3, 8, 3), (4, 4, 6), (2, 5, 3)])
def test_a_constant_that_differs_between_places_is_cut_like_the_map(kind: str, shape: tuple[int, int, int]) -> None:
    """With as many columns (or rows) as channels it was taken for one number a channel: wrong HOLDS by CROWN."""
    generator = torch.Generator().manual_seed(1)
    p = certify.Linf(0.1)
    for seed in range(4):
        torch.manual_seed(seed)
        net = Between(kind, shape).eval().requires_grad_(False)
        x = torch.rand(1, 1, *shape[1:])
        low, high = p.hull(x)
        corners = torch.where(torch.rand(2000, 1, *shape[1:], generator=generator) < 0.5, low, high)
        y = net(torch.cat([p.sample(x, 200, generator)[:, 0], corners]))
        for method in ("ibp", "crown-ibp", "crown", "alpha-crown"):
            lower, upper = certify.bounds(net, x, p, method)
            assert bool((lower <= y.amin(0) + 1e-5).all()), (method, seed)
            assert bool((upper >= y.amax(0) - 1e-5).all()), (method, seed)


def test_numbers_alone_may_stand_between_convolutions() -> None:
    """A grey image normalised inside of the model: a shift without axes had no first one."""

    class Grey(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(
                nn.Conv2d(1, 1, 3), nn.ReLU(), nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2)
            )

        def forward(self, x: Tensor) -> Tensor:
            return self.layers((x - 0.1307) / 0.3081)

    torch.manual_seed(0)
    net, x = Grey().eval(), torch.rand(2, 1, 6, 6)
    lower, _ = certify.bounds(net, x, certify.Linf(0.01), "crown")
    assert bool((lower <= net(x)).all())


class Lost(nn.Module):
    """A network with a step that the recorder does not see."""

    def __init__(self, step: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.step, self.last = step, nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(x.flatten(1) + self.step(x.flatten(1)))


@pytest.mark.parametrize(
    "step",
    [
        _scripted,
        lambda x: _gain(nn.Parameter(x)),
        lambda x: torch.vmap(lambda row: torch.relu(row - 0.3))(x),
        lambda x: x.as_subclass(_Odd),
        lambda x: torch.randn(x.shape[1:]),
        lambda x: x.type(torch.float64).mean().to(x) * torch.ones_like(x),
    ],
    ids=["torch.jit", "Parameter", "vmap", "subclass", "noise", "type"],
)
def test_what_escapes_the_recorder_is_no_constant(step: Callable[[Tensor], Tensor]) -> None:
    """With one image its value became a constant of the graph, and the check at that image could not tell."""
    torch.manual_seed(0)
    net, x = Lost(step).eval(), torch.rand(1, 1, 2, 2)
    for ask in (
        lambda: certify.bounds(net, x, certify.Linf(0.1), "crown"),
        lambda: certify.verify(net, x, certify.Classification(net(x).argmax(1)), certify.Linf(0.1), attack=False),
    ):
        with pytest.raises((UnsupportedOperation, ValueError)):
            ask()


def test_a_model_is_held_against_its_graph_again_when_it_changes() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)).eval()
    x, calls = torch.rand(1, 1, 2, 2), []
    net.register_forward_hook(lambda *_: calls.append(1))

    def count() -> int:
        calls.clear()
        certify.bounds(net, x, certify.Linf(0.1))
        return len(calls)

    first, again = count(), count()
    assert first > again
    with torch.no_grad():
        net[1].weight.mul_(2.0)
    assert count() == first
    net[1] = nn.Linear(4, 2)
    assert count() == first


def test_a_step_that_is_exchanged_is_looked_at_again() -> None:
    """Its weights are the same, so that the model passed for one that had been held against its graph."""
    net, x = Lost(torch.relu).eval(), torch.rand(1, 1, 2, 2)
    certify.bounds(net, x, certify.Linf(0.1))
    net.step = _scripted
    with pytest.raises(UnsupportedOperation, match="by a step that is not seen"):
        certify.bounds(net, x, certify.Linf(0.1))


def test_autocast_inside_of_a_model_is_refused() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return self.last(x.flatten(1)).float()

    with pytest.raises(UnsupportedOperation, match="runs under autocast"):
        certify.bounds(Half().eval(), torch.rand(1, 1, 2, 2), certify.Linf(0.1))


def test_half_precision_is_refused() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)).eval().bfloat16()
    with pytest.raises(ValueError, match=r"certificates are for float32 and float64: use x\.float\(\)"):
        certify.bounds(net, torch.rand(1, 1, 2, 2).bfloat16(), certify.Linf(0.1))


def test_a_model_that_writes_into_its_input_is_refused_and_leaves_it_alone() -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(x.sub_(0.5).flatten(1))

    net, x = Writes().eval(), torch.rand(1, 1, 2, 2)
    before = x.clone()
    spec = certify.Deviation(0.05, reference=torch.zeros(1, 2))
    for ask in (
        lambda: certify.verify(net, x, spec, certify.Brightness(0.2)),
        lambda: certify.verify(net, x, spec, certify.Linf(0.2)),
        lambda: certify.deviation(net, x, certify.Brightness(0.2)),
    ):
        with pytest.raises(ValueError, match="the model writes into its input"):
            ask()
        assert torch.equal(x, before)


@pytest.mark.parametrize(
    "layer", [nn.BatchNorm1d(4).train(), nn.BatchNorm1d(4, track_running_stats=False), nn.Dropout()]
)
def test_sampling_needs_an_answer_that_the_batch_does_not_change(layer: nn.Module) -> None:
    """A model in evaluation mode with a layer in training mode was certified image by image."""
    training = layer.training
    net = nn.Sequential(nn.Flatten(), layer, nn.Linear(4, 2)).eval()
    layer.train(training)
    x = torch.rand(2, 1, 2, 2)
    if not isinstance(layer, nn.BatchNorm1d) or not layer.track_running_stats:
        layer.train()
    with pytest.raises((ValueError, UnsupportedOperation), match=r"depends on the (batch|others)|draws at random"):
        certify.estimate(net, x, torch.zeros(2, dtype=torch.int64), certify.Brightness(0.1))


def test_the_margin_of_a_verdict_grows_with_the_outputs() -> None:
    from runs.splitting import split

    for scale in (1e7, 1e9):
        for seed in range(20):
            torch.manual_seed(seed)
            first = nn.Linear(3, 6)
            with torch.no_grad():
                first.weight.mul_(scale)
            last = nn.Linear(6, 2, bias=False)
            with torch.no_grad():
                last.weight[1] = last.weight[0]  # both outputs are the same number
            net = nn.Sequential(first, nn.ReLU(), last)
            C, d = torch.tensor([[1.0, -1.0]]), torch.zeros(1)
            found = split(net, torch.zeros(3), torch.ones(3), C, d, seconds=0.3, confirm=lambda x: False, most=500)
            assert found.status != Status.HOLDS, (scale, seed)
    net = nn.Sequential(*[nn.Linear(2, 2) for _ in range(9)]).double()
    with torch.no_grad():
        for layer in net:
            layer.weight.fill_(3e38)
            layer.bias.zero_()
    found = split(net, -torch.ones(2), torch.ones(2), torch.tensor([[1.0, 0.0]]), torch.zeros(1), seconds=0.3)
    assert found.status != Status.HOLDS
