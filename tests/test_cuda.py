"""What a GPU answers is what the CPU answers: bounds, verdicts, deviations, samples, attacks, an epoch of a method."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import certify
import methods
from certify import attack, audit, lirpa
from certify.bounds import METHODS
from methods.hydra import SearchConfig
from methods.training import CROWNIBP, PGD, TrainingConfig

pytestmark = pytest.mark.gpu

N = 6
RADII = torch.linspace(0.005, 0.03, N)  # one an image, and not where the images are


@pytest.fixture
def device() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return torch.device("cuda")


def network() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 2), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Flatten(), nn.Linear(16, 3),
    )  # fmt: skip
    net(torch.rand(64, 3, 7, 7))
    return net.eval()


def both(device: torch.device, ask: Callable[[nn.Module, Tensor, Tensor], Any]) -> tuple[Any, Any]:
    """What `ask(network, images, labels)` says on the device and on the CPU; all tensors of the first are checked."""
    net = network()
    x = torch.rand(N, 3, 7, 7, generator=torch.Generator().manual_seed(1))
    y = net(x).argmax(1)
    return ask(copy.deepcopy(net).to(device), x.to(device), y.to(device)), ask(net, x, y)


def same(here: Tensor, there: Tensor, atol: float = 1e-4, rtol: float = 1e-3) -> None:
    torch.testing.assert_close(here.cpu(), there, atol=atol, rtol=rtol)


PERTURBATIONS: dict[str, certify.Perturbation] = {
    "linf": certify.Linf(RADII),
    "l2": certify.L2(0.2),
    "box": certify.Box(torch.full((N, 3, 7, 7), 0.4), torch.full((N, 3, 7, 7), 0.41)),
    "saturation": certify.Saturation(RADII),
    "brightness-contrast": certify.BrightnessContrast(0.02, 0.02),
}
PATHS = {"hue": certify.Hue(0.05), "rotation": certify.Rotation(RADII), "scale": certify.Scale(0.02)}


@pytest.mark.parametrize("name", PERTURBATIONS)
@pytest.mark.parametrize("method", [*METHODS, *(f"auto-lirpa:{m}" for m in lirpa.METHODS)])
def test_bounds(device, method, name):
    p, outside = PERTURBATIONS[name], method.startswith("auto-lirpa")
    if (method == "forward" and name in ("linf", "l2", "box")) or (outside and not lirpa.available()):
        pytest.skip("not for this perturbation, or not installed")
    here, there = both(device, lambda net, x, y: certify.bounds(net, x, p, method))
    for a, b in zip(here, there, strict=True):
        assert a.device.type == device.type
        # Optimised slopes follow rounding; they stay within a per cent.
        same(a.detach(), b.detach(), atol=1e-2 if "alpha" in method or "Optimized" in method else 1e-4)


@pytest.mark.parametrize("method", ["auto", "line", "bab", "milp"])
@pytest.mark.parametrize("name", [*PERTURBATIONS, *PATHS])
def test_verdicts(device, name, method):
    p = (PERTURBATIONS | PATHS)[name]
    few = name in PATHS or isinstance(p, certify.AffineFamily)
    if (
        (method == "line" and not few)
        or (method in ("bab", "milp") and name in PATHS)
        or (method, name) == ("milp", "l2")
    ):
        pytest.skip("not for this perturbation")

    def ask(net: nn.Module, x: Tensor, y: Tensor) -> tuple[certify.Certificate, list[str]]:
        wrong = (y + (torch.arange(N, device=y.device) == 0)) % 3  # the first image fails as it is
        spec, budget = certify.Classification(wrong), certify.Budget(seconds=60)
        cert = certify.verify(net, x, spec, p, method, budget, chunk=4)
        return cert, audit.refutations(net, x, spec, p, cert, audit.worst(net, x, spec, p, points=65))

    (here, refuted), (there, _) = both(device, ask)
    assert not refuted
    assert here.status.cpu().tolist() == there.status.tolist()
    parts = [getattr(here, f.name) for f in dataclasses.fields(here)]
    for part in [*parts, *here.work.values()]:
        assert not isinstance(part, Tensor) or part.device.type == device.type
    same(here.lower, there.lower, atol=0.05)  # a search stops at what it has proven by then


@pytest.mark.parametrize("name", ["saturation", "brightness-contrast", *PATHS])
def test_deviations(device, name):
    here, there = both(device, lambda net, x, y: certify.deviation(net, x, (PERTURBATIONS | PATHS)[name], tol=1e-3))
    same(here.lower, there.lower, atol=2e-3)
    same(here.upper, there.upper, atol=2e-3)


def shift(batch: Tensor, *, generator: torch.Generator) -> Tensor:
    return (batch + 1e-3 * torch.rand(len(batch), 1, 1, 1, generator=generator, device=batch.device)).clamp(0, 1)


@pytest.mark.parametrize("bound", ["clopper-pearson", "cccert", "split-chernoff"])
@pytest.mark.parametrize("transform", [shift, certify.Brightness(0.001), certify.Linf(0.1 * RADII)])
def test_estimates(device, transform, bound):
    here, there = both(
        device, lambda net, x, y: certify.estimate(net, x, y, transform, 0.05, bound=bound, n_max=None, joint=False)
    )
    assert here.status.tolist() == there.status.tolist()
    assert here.flips.tolist() == there.flips.tolist() == [0] * N


@pytest.mark.parametrize("name", PERTURBATIONS)
@pytest.mark.parametrize("search", ["attack", "fgsm", "pgd", "probe"])
def test_attacks(device, search, name):
    more = (100,) if search == "probe" else ()

    def ask(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        found = getattr(attack, search)(net, x, certify.Classification(y), PERTURBATIONS[name], *more)
        return found if search == "probe" else found.margin

    here, there = both(device, ask)
    assert here.device.type == device.type
    same(here, there, atol=1e-2)


FAST = TrainingConfig(optimizer="adam", lr=0.01, schedule="constant")
ONE = {"ratio": 0.5, "epochs": 1, "finetune_epochs": 1}
ITERATED: dict[str, Any] = {"ratio": 0.5, "epochs": 1, "rounds": 1}
SETTINGS: dict[str, dict[str, Any]] = {
    "dense": {"epochs": 1, "training": dataclasses.replace(FAST, objective=PGD(0.02, steps=2))},
    "random": ONE | {"structured": True},
    "magnitude": ONE | {"training": dataclasses.replace(FAST, objective=CROWNIBP(0.02))},
    "usn": {"ratio": 0.5, "epochs": 1, "m": 2, "prune_steps": 1, "on_collapse": "ignore"},
    "car": ONE | {"mask_epochs": 1, "mask_training": FAST, "transform": shift},
    "hydra": ITERATED | {"search": SearchConfig(1, FAST)},
    "nrs": ITERATED | {"eps": 0.02},
} | dict.fromkeys(("imp", "snip", "taylor", "slimming", "structlth"), ITERATED)


@pytest.mark.parametrize("name", methods.names())
def test_an_epoch_of_every_method(device, name):
    method, config = methods.get(name)
    chosen = config(**{"training": FAST} | SETTINGS[name])

    def ask(net: nn.Module, x: Tensor, y: Tensor) -> Any:
        batches = [(x.cpu(), y.cpu())] * 2  # as a loader has them
        outcome = method(chosen).fit(net, batches, val=batches, device=x.device)
        assert all(v.device.type == x.device.type and v.isfinite().all() for v in outcome.model.state_dict().values())
        return outcome.mask

    here, there = both(device, ask)
    assert (here.structured, here.density) == (there.structured, pytest.approx(there.density))
