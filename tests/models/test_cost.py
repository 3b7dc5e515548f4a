"""Parameters and multiply-adds against closed forms, PyTorch's own counter and published numbers."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import models


def test_closed_form():
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.Conv2d(8, 8, 3, groups=8), nn.Flatten(), nn.LazyLinear(5)
    )
    net(torch.rand(1, 3, 16, 16))
    assert models.flops(net, (3, 16, 16)) == 8 * 3 * 9 * 64 + 8 * 9 * 36 + 5 * 8 * 36
    assert models.count(net) == (8 * 3 * 9 + 8) + (8 * 9 + 8) + (5 * 288 + 5)


@pytest.mark.parametrize("name", models.names())
def test_agrees_with_pytorchs_counter(name):
    model = models.create(name, 10, width=0.25).eval()
    with FlopCounterMode(display=False) as counter:
        model(torch.rand(1, 3, 32, 32))
    assert models.flops(model, (3, 32, 32)) == counter.get_total_flops() // 2


@pytest.mark.parametrize(("name", "billions"), [("resnet18", 1.814), ("googlenet", 1.498), ("mobilenetv2", 0.301)])
def test_agrees_with_published_numbers(name, billions):
    cost = models.flops(models.create(name, 1000, image_size=224), (3, 224, 224))
    assert cost / 1e9 == pytest.approx(billions, abs=6e-4)


def test_zeros_can_be_left_out():
    model = models.create("cnn7_nrs", 10, width=0.25, seed=0)
    dense, size = models.flops(model, (3, 32, 32)), models.count(model)
    with torch.no_grad():
        model.features.conv1.weight[:4] = 0
    saved = 4 * 3 * 9
    assert models.flops(model, (3, 32, 32)) == dense
    assert models.flops(model, (3, 32, 32), nonzero=True) == dense - saved * 32 * 32
    zeros = sum(int((p == 0).sum()) for p in model.parameters())
    assert zeros >= saved
    assert models.count(model, nonzero=True) == size - zeros


def test_measuring_leaves_no_trace():
    model = models.create("resnet18", 10, width=0.125, seed=0)
    model.features.bn1.eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    models.flops(model, (3, 32, 32))
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(m._forward_hooks for m in model.modules())
    with pytest.raises(RuntimeError):
        models.flops(model, (4, 32, 32))
    assert [m.training for m in model.modules()] == modes
    assert not any(m._forward_hooks for m in model.modules())


def test_image_shape_is_checked():
    with pytest.raises(ValueError, match=r"image_shape must be \(channels, height, width\), got \(1, 3, 32, 32\)"):
        models.flops(models.create("mlp", 2), (1, 3, 32, 32))
