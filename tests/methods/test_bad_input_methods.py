"""Wrong arguments to pruning methods: refused before the first epoch, so that no work is lost."""

import copy

import pytest
import torch
from torch import nn

import methods
from methods.base import PruningConfig
from methods.imp import IMP, IMPConfig
from methods.magnitude import Magnitude, MagnitudeConfig

GENERATOR = torch.Generator().manual_seed(0)
X, Y = torch.rand(16, 1, 4, 4, generator=GENERATOR), torch.arange(16) % 3
BATCHES = [(X[:8], Y[:8]), (X[8:], Y[8:])]


def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))


def broken() -> nn.Module:
    net = network()
    net[0].weight.data[0] = torch.nan
    return net


class Spy:
    """A callback that counts epochs."""

    epochs = 0

    def __call__(self, model, record):
        self.epochs += 1


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model": None}, TypeError, "torch.nn.Module, got NoneType"),
        ({"model": nn.ReLU}, TypeError, "the class ReLU; call it"),
        ({"model": broken()}, ValueError, r"0\.weight holds NaN or infinity before any training"),
        ({"val": []}, ValueError, "val are empty"),
        ({"val": (batch for batch in BATCHES)}, TypeError, "val must be re-iterable.*one-shot iterator generator"),
        ({"batches": [(X[:0], Y[:0]), *BATCHES]}, ValueError, "holds no image"),
        ({"batches": [(X * 255, Y)]}, ValueError, r"pixels lie in \[0, 1\]: divide by 255"),
        ({"batches": [((X - 0.5) / 0.2, Y)]}, ValueError, "normalise inside the network"),
        ({"batches": [(X, Y[0])]}, ValueError, "no batch of targets"),
        ({"batches": [(X, torch.full((16, 4), torch.nan))]}, ValueError, "targets of the first batch hold NaN"),
        ({"batches": [(X.double(), Y)]}, ValueError, "cannot take images.*torch.float64"),
        ({"batches": [(X.expand(-1, 3, -1, -1), Y)]}, ValueError, r"cannot take images \(16, 3, 4, 4\)"),
        ({"loss": lambda outputs, y: outputs}, ValueError, r"one number, got shape \(8, 3\)"),
    ],
)
@pytest.mark.parametrize("method", [Magnitude(MagnitudeConfig(epochs=1)), IMP(IMPConfig(epochs=1, rounds=1))])
def test_no_epoch_is_spent_on_wrong_arguments(method, change, error, message):
    spy = Spy()
    given = {"model": network(), "batches": BATCHES, "callbacks": (spy,)} | change
    with pytest.raises(error, match=message):
        method.fit(**copy.copy(given))
    assert spy.epochs == 0


def test_a_bare_callback_is_refused():
    with pytest.raises(TypeError, match=r"callbacks=\(function,\)"):
        Magnitude(MagnitudeConfig(epochs=1)).fit(network(), BATCHES, callbacks=print)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"ratio": "0.5"}, TypeError, r"number in \[0, 1\), got '0.5'"),
        ({"epochs": 1.5}, TypeError, "epochs must be a whole number, got 1.5"),
        ({"epochs": True}, TypeError, "epochs must be a whole number, got True"),
        ({"finetune_epochs": "2"}, TypeError, "finetune_epochs must be a whole number"),
        ({"training": "ibp"}, TypeError, "training must be a TrainingConfig.*got 'ibp'"),
        ({"training": None}, TypeError, "training must be a TrainingConfig"),
        ({"finetune": "ibp"}, TypeError, "finetune must be a TrainingConfig"),
    ],
)
def test_settings_of_another_type_are_refused(change, error, message):
    with pytest.raises(error, match=message):
        PruningConfig(**change)


@pytest.mark.parametrize(
    "name",
    ["dense", "random", "magnitude", "imp", "nrs", "snip", "taylor", "hydra", "slimming", "structlth"],
)
def test_a_method_takes_its_own_configuration_only(name):
    method, config = methods.get(name)
    assert isinstance(method(config()).config, config)
    other = MagnitudeConfig if config is not MagnitudeConfig else IMPConfig
    wrong = [other(), {"ratio": 0.5}, None] if not issubclass(other, config) else [{"ratio": 0.5}, None]
    for given in wrong:
        with pytest.raises(TypeError, match=f"takes a {config.__name__}, got {type(given).__name__}"):
            method(given)
    with pytest.raises(TypeError, match="the class itself; call it"):
        method(config)
