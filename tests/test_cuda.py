"""What a GPU answers is what the CPU answers: bounds, verdicts, deviations, samples, attacks, an epoch of a method."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import Tensor, nn

import certify
import methods
from certify import attack, audit, lirpa
from certify.arithmetic import full_float32
from certify.bounds import METHODS
from methods import masks
from methods.hydra import SearchConfig
from methods.training import CROWNIBP, PGD, TrainingConfig

pytestmark = pytest.mark.gpu
SHAPE = (6, 3, 7, 7)
RADII = torch.linspace(0.005, 0.03, SHAPE[0])  # one an image, and not where the images are
BOX = certify.Box(torch.full(SHAPE, 0.4), torch.full(SHAPE, 0.41))
PIXELS = {"linf": certify.Linf(RADII), "l2": certify.L2(0.1), "box": BOX}
LINES = {"saturation": certify.Saturation(RADII), "brightness-contrast": certify.BrightnessContrast(0.02, 0.02)}
PATHS = {"hue": certify.Hue(0.05), "rotation": certify.Rotation(RADII), "scale": certify.Scale(0.02)}
ALL = PIXELS | LINES | PATHS
FOREIGN = [f"auto-lirpa:{method}" for method in lirpa.METHODS] if lirpa.available() else []


@pytest.fixture
def device() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return torch.device("cuda")


def both(device, ask):
    """What ``ask(network, images, its labels)`` says on the device and on the CPU."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [nn.Conv2d(3, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 2), nn.BatchNorm2d(4)]
        net = nn.Sequential(*layers, nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))
        net(torch.rand(64, *SHAPE[1:]))
        x = torch.rand(SHAPE)
    y = net.eval()(x).argmax(1)
    return ask(copy.deepcopy(net).to(device), x.to(device), y.to(device)), ask(net, x, y)


def same(here: Tensor, there: Tensor, atol: float = 1e-4) -> None:
    torch.testing.assert_close(here.detach().cpu(), there.detach(), atol=atol, rtol=1e-3)


def test_full_float32_is_that(device):
    x, weight = torch.rand(2, 64, 16, 16, device=device), torch.randn(64, 64, 3, 3, device=device)
    for run in (nn.functional.conv2d, lambda x, weight: x.flatten(2) @ weight.flatten(1).T[:256]):
        with full_float32():
            found = run(x, weight)
        exact = run(x.double(), weight.double())
        assert float((found - exact).abs().max() / exact.abs().max()) < 1e-5  # TF32: some 1e-3


BOUNDS = [(m, n) for m in METHODS for n in (LINES if m == "forward" else PIXELS | LINES)]


@pytest.mark.parametrize(("method", "name"), BOUNDS + [(m, "linf") for m in FOREIGN])
def test_bounds(device, method, name):
    here, there = both(device, lambda net, x, y: certify.bounds(net, x, ALL[name], method))
    for a, b in zip(here, there, strict=True):
        assert a.device.type == device.type
        same(a, b, 1e-2 if "alpha" in method or "Optimized" in method else 1e-4)  # slopes follow rounding


SEARCHES = [(m, n) for m in ("auto", "bab") for n in PIXELS | LINES]


@pytest.mark.parametrize(("method", "name"), SEARCHES + [("line", n) for n in LINES | PATHS] + [("milp", "linf")])
def test_verdicts(device, method, name):
    def ask(net, x, y):
        spec = certify.Classification((y + (torch.arange(len(y), device=y.device) == 0)) % 3)  # the first one is wrong
        cert = certify.verify(net, x, spec, ALL[name], method, certify.Budget(seconds=60), chunk=4)
        return cert, audit.refutations(net, x, spec, ALL[name], cert, audit.worst(net, x, spec, ALL[name], points=65))

    (here, refuted), (there, _) = both(device, ask)
    assert not refuted
    assert here.status.tolist() == there.status.tolist()
    same(here.lower, there.lower, 0.05)  # a search stops at what it has proven by then
    parts = [*(getattr(here, field.name) for field in dataclasses.fields(here)), *here.work.values()]
    assert {part.device.type for part in parts if isinstance(part, Tensor)} == {device.type}


@pytest.mark.parametrize("name", LINES | PATHS)
def test_deviations(device, name):
    here, there = both(device, lambda net, x, y: certify.deviation(net, x, ALL[name]))
    same(torch.stack([here.lower, here.upper]), torch.stack([there.lower, there.upper]), 2e-3)


def shift(batch: Tensor, *, generator: torch.Generator) -> Tensor:
    return (batch + 1e-3 * torch.rand(len(batch), 1, 1, 1, generator=generator, device=batch.device)).clamp(0, 1)


@pytest.mark.parametrize("bound", ["clopper-pearson", "cccert", "split-chernoff"])
@pytest.mark.parametrize("transform", [shift, certify.Brightness(0.001), certify.Linf(0.1 * RADII)])
def test_estimates(device, transform, bound):
    here, there = both(device, lambda *asked: certify.estimate(*asked, transform, 0.05, bound=bound, n_max=None))
    assert here.status.tolist() == there.status.tolist()
    assert here.flips.tolist() == there.flips.tolist() == [0] * SHAPE[0]


ATTACKS = [(s, n) for s in ("attack", "fgsm", "pgd", "probe") for n in PIXELS | LINES] + [("grid", n) for n in LINES]


@pytest.mark.parametrize(("search", "name"), ATTACKS)
def test_attacks(device, search, name):
    def ask(net, x, y):
        found = getattr(attack, search)(net, x, certify.Classification(y), ALL[name], *[100] * (search == "probe"))
        return found if search == "probe" else found.margin

    here, there = both(device, ask)
    same(here, there, 1e-2)


FAST = TrainingConfig(optimizer="adam", lr=0.01, schedule="constant")
SETTINGS = {
    "dense": {"ratio": 0.0, "training": dataclasses.replace(FAST, objective=PGD(0.02, steps=2))},
    "magnitude": {"finetune_epochs": 1, "training": dataclasses.replace(FAST, objective=CROWNIBP(0.02))},
    "random": {"finetune_epochs": 1, "structured": True},
    "usn": {"m": 2, "prune_steps": 1, "on_collapse": "ignore"},
    "car": {"finetune_epochs": 1, "mask_epochs": 1, "mask_training": FAST, "transform": shift},
    "hydra": {"rounds": 1, "search": SearchConfig(1, FAST)},
    "nrs": {"rounds": 1, "eps": 0.02},
}


@pytest.mark.parametrize("name", methods.names())
def test_an_epoch_of_every_method(device, name):
    method, config = methods.get(name)
    chosen = method(config(**{"ratio": 0.5, "epochs": 1, "training": FAST} | SETTINGS.get(name, {"rounds": 1})))

    def ask(net, x, y):
        batches = [(x.cpu(), y.cpu())] * 2  # as a loader has them
        outcome = chosen.fit(net, batches, val=batches, device=x.device)
        assert all(v.device.type == x.device.type and v.isfinite().all() for v in outcome.model.state_dict().values())
        masks.remove(outcome.model, outcome.mask, x[:1])  # raises where the outputs differ
        return outcome.mask

    here, there = both(device, ask)
    assert here.channel_density == there.channel_density if there.structured else here.density == there.density
