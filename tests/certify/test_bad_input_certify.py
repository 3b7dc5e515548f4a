"""Wrong arguments at the front doors: what was wrong, what was expected, what to do, before any work is done."""

import copy
import re

import numpy as np
import pytest
import torch
from torch import nn

import certify
from certify import Box, Brightness, BrightnessContrast, Classification, Deviation, Hue, Linear, Linf

X = torch.rand(3, 3, 4, 4, generator=torch.Generator().manual_seed(0))


def network(outputs: int = 3) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, outputs)
        ).eval()


NET = network()
Y = NET(X).argmax(1)


class Returns(nn.Module):
    def __init__(self, what):
        super().__init__()
        self.what = what

    def forward(self, x):
        return self.what(x)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
@pytest.mark.parametrize("labels", [(0, 0, 1), (1, 1, 1), (2, 0, 1)])
def test_small_integer_labels_mean_the_same_as_int64(dtype, labels):
    # As an index, uint8 is a mask: with as many images as classes it would pick the wrong rows without a complaint.
    y = torch.tensor(labels)
    reference = NET(X)
    found, wanted = (Classification(labels).rows(reference).C for labels in (y.to(dtype), y))
    assert torch.equal(found, wanted)
    cert = certify.verify(NET, X, Classification(y.to(dtype)), Linf(0.001), "crown")
    assert torch.equal(cert.status == certify.Status.VIOLATED, y != Y)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Linf(8), ValueError, r"eps = 8 .* 8 / 255"),
        (lambda: Linf(torch.tensor([0.1, 2.0])), ValueError, "eps = 2 "),
        (lambda: Brightness(2.0), ValueError, "whole range"),
        (lambda: BrightnessContrast(2.0, 0.1), ValueError, "eps_brightness = 2"),
        (lambda: Linf("8/255"), TypeError, "must be a number.*got '8/255'"),
        (lambda: Linf(None), TypeError, "must be a number.*got None"),
        (lambda: Linf([0.1, 0.2]), TypeError, "a tensor"),
        (lambda: Linf(np.array([0.1, 0.2])), TypeError, "a tensor"),
        (lambda: Brightness(torch.full((3, 1), 0.1)), ValueError, r"\(N,\), got shape \(3, 1\)"),
        (lambda: Box(0.0, 1.0), TypeError, "must be tensors, got float and float"),
        (lambda: Box(torch.zeros(3), torch.ones(2)), ValueError, r"shapes \(3,\) and \(2,\)"),
        (lambda: Hue(0.1).check(X[:, :1]), ValueError, "RGB"),
        (lambda: Classification([0, 1, 2]), TypeError, "got list; torch.as_tensor"),
        (lambda: Classification(Y.numpy()), TypeError, "got ndarray"),
        (lambda: Classification(Y.bool()).rows(NET(X)), ValueError, "integers.*bool"),
        (lambda: Linear([[1.0, 0.0, 0.0]]), TypeError, "got list"),
        (lambda: Linear(torch.ones(1, 3), torch.zeros(4)).rows(NET(X)), ValueError, r"d has shape \(4,\).*1 rows"),
        (lambda: Deviation(torch.ones(5)).rows(NET(X)), ValueError, r"3 of them, got shape \(5,\)"),
    ],
)
def test_what_cannot_be_meant_is_refused_when_it_is_said(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_large_radii_that_can_be_meant_are_taken():
    assert Linf(1).eps == 1
    assert Linf(np.float32(0.5)).eps == 0.5
    assert Linf(8, clip=False).eps == 8.0
    assert certify.L2(3.0).eps == 3.0
    assert certify.Contrast(2.0).eps == 2.0


@pytest.mark.parametrize("entry", ["verify", "bounds", "deviation"])
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model": None}, TypeError, "torch.nn.Module, got NoneType"),
        ({"model": lambda x: x}, TypeError, "got function"),
        ({"model": nn.ReLU}, TypeError, "the class ReLU"),
        ({"x": X.tolist()}, TypeError, "got list; torch.as_tensor"),
        ({"x": X.numpy()}, TypeError, "got ndarray"),
        ({"x": X[:0]}, ValueError, "the batch is empty"),
        ({"p": 0.1}, TypeError, r"certify\.Linf\(8 / 255\), got float"),
        ({"p": Brightness}, TypeError, "the class Brightness"),
        ({"x": X[:, :1]}, ValueError, r"cannot take images \((2|3), 1, 4, 4\)"),
        (
            {"x": X.double()},
            ValueError,
            r"images are torch.float64, the weights torch.float32: pass x.to\(torch.float32\)",
        ),
        ({"model": Returns(lambda x: (x.flatten(1), x)).eval()}, certify.UnsupportedOperation, "returns tuple"),
    ],
)
def test_front_doors_explain_wrong_arguments(entry, change, error, message):
    given = {"model": NET, "x": X, "p": Brightness(0.01)} | change
    if entry == "verify":
        given["spec"] = Classification(Y)
    with pytest.raises(error, match=message):
        getattr(certify, entry)(**given)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"spec": Y}, TypeError, "spec must be Classification"),
        ({"spec": Classification}, TypeError, "spec must be Classification"),
        ({"budget": 60}, TypeError, r"Budget\(seconds=60\), got 60"),
        ({"chunk": 0}, ValueError, "chunk must be at least 1"),
        ({"chunk": -1}, ValueError, "chunk must be at least 1"),
        ({"model": Returns(lambda x: x).eval()}, certify.UnsupportedOperation, r"\(3, 3, 4, 4\) for 3 images; flatten"),
        (
            {"model": Returns(lambda x: x.flatten(1).sum(1)).eval()},
            certify.UnsupportedOperation,
            r"\(3,\) for 3 images",
        ),
    ],
)
def test_verify_explains_wrong_arguments(change, error, message):
    given = {"model": NET, "x": X, "spec": Classification(Y), "p": Linf(0.01)} | change
    with pytest.raises(error, match=message):
        certify.verify(**given)


@pytest.mark.parametrize("p", [Linf(0.001), Brightness(0.001)], ids=["box", "line"])
def test_batch_normalisation_left_in_training_mode_is_refused_and_left_alone(p):
    net = copy.deepcopy(NET)
    net[1].train()
    before = net[1].running_mean.clone()
    with pytest.raises(ValueError, match=re.escape("'1' is in training mode") + r".*model\.eval\(\)"):
        certify.verify(net, X, Classification(Y), p)
    assert torch.equal(net[1].running_mean, before)


def test_an_operation_without_a_bound_keeps_its_own_error():
    net = nn.Sequential(nn.Flatten(), nn.Linear(48, 4), nn.GELU(), nn.Linear(4, 3)).eval()
    with pytest.raises(certify.UnsupportedOperation, match="'gelu' in module '2'"):
        certify.bounds(net, X, Linf(0.1))
