"""Stability and remain ratios against plain computations."""

from __future__ import annotations

import pytest
import torch
from method_toys import images, residual
from torch import nn

import certify
from methods.imp import IMP, IMPConfig
from methods.masks import Mask
from methods.nrs import remaining, stability

EPS = 0.05


def net() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 7), nn.ReLU(), nn.Linear(7, 3)
        )
        nn.init.uniform_(model[1].weight, 0.3, 2.0)
        nn.init.normal_(model[1].bias)
        for x, _ in images(400):
            model(x)
    return model.double().eval()


def by_hand(model: nn.Sequential, x: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(l, u) of both layers of ReLUs."""
    low, high = (x - EPS).clamp(0, 1), (x + EPS).clamp(0, 1)
    conv, norm, linear = model[0], model[1], model[4]
    mid = norm(conv((low + high) / 2))
    rad = nn.functional.conv2d((high - low) / 2, conv.weight.abs())
    rad = rad * (norm.weight / (norm.running_var + norm.eps).sqrt()).abs().reshape(-1, 1, 1)
    first = (mid - rad, mid + rad)
    low, high = (v.relu().flatten(1) for v in first)
    mid, rad = linear((low + high) / 2), nn.functional.linear((high - low) / 2, linear.weight.abs())
    return [first, (mid - rad, mid + rad)]


def test_stability_by_hand():
    model, batches = net(), [(x.double(), y) for x, y in images(20)]
    x = torch.cat([x for x, _ in batches])
    found = stability(model, batches, certify.Linf(EPS))
    with torch.no_grad():
        ends = by_hand(model, x)
    unstable = [(l < 0) & (u > 0) for l, u in ends]
    products = [-(l * u) for l, u in ends]
    both, flags = (torch.cat([v.flatten(1) for v in parts], 1) for parts in (products, unstable))
    assert (found.images, found.neurons) == (20, 55)
    assert found.unstable_ratio == pytest.approx(float(flags.double().mean()))
    assert found.pre_activation.total == pytest.approx(float(both.sum(1).mean()))
    assert found.pre_activation.mean == pytest.approx(float(both.mean()))
    assert found.pre_activation.unstable == pytest.approx(float(both[flags].mean()))
    normalised = products[0] / model[1].weight.detach().square().reshape(-1, 1, 1)
    assert found.pre_bn.total == pytest.approx(float(normalised.flatten(1).sum(1).mean()))
    assert found.pre_bn.mean == pytest.approx(float(normalised.mean()))
    assert found.pre_bn.unstable == pytest.approx(float(normalised[unstable[0]].mean()))
    assert list(found.by_layer) == ["2", "5"]
    assert list(found.by_layer.values()) == pytest.approx([float(u.double().mean()) for u in unstable])


def test_crown_intervals_leave_fewer_neurons_unstable():
    model, batches = net(), [(x.double(), y) for x, y in images(12)]
    loose, tight = (stability(model, batches, certify.Linf(EPS), method=m) for m in ("ibp", "crown"))
    assert tight.unstable_ratio < loose.unstable_ratio
    # Stable under sampling too: no neuron that counts as stable crosses zero.
    assert stability(model, batches, certify.Linf(0.0)).unstable_ratio == 0.0
    assert stability(model, batches, certify.Linf(0.0)).pre_activation.unstable == 0.0


def test_layers_of_one_module_are_told_apart_and_dead_channels_left_out():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.relu = nn.Conv2d(1, 2, 3, padding=1), nn.BatchNorm2d(2), nn.ReLU()
            self.head = nn.Linear(72, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.relu(self.relu(self.norm(self.conv(x))) - 0.1).flatten(1))

    model = Twice().eval()
    with torch.no_grad():
        model.norm.weight[0] = 0.0
    found = stability(model, images(8), certify.Linf(EPS))
    assert list(found.by_layer) == ["relu#1", "relu#2"]
    assert found.neurons == 144
    layer = certify.Network(model, images(8)[0][0]).propagate(certify.Linf(EPS)).rectifiers()[0]
    product = -(layer.lower * layer.upper)[:, 1] / model.norm.weight[1] ** 2
    assert found.pre_bn.mean == pytest.approx(float(product.detach().mean()), rel=1e-5)


def test_what_cannot_be_measured_is_refused():
    with pytest.raises(ValueError, match="training mode"):
        stability(net().train(), images(), certify.Linf(EPS))
    with pytest.raises(ValueError, match="empty"):
        stability(net(), [], certify.Linf(EPS))
    with pytest.raises(ValueError, match="no ReLU"):
        stability(nn.Sequential(nn.Flatten(), nn.Linear(36, 3)).eval(), images(), certify.Linf(EPS))
    bare = nn.Sequential(nn.Flatten(), nn.Linear(36, 4), nn.ReLU(), nn.Linear(4, 3)).eval()
    assert stability(bare, images(), certify.Linf(EPS)).pre_bn is None
    with pytest.raises(ValueError, match="no convolution"):
        remaining(bare, Mask.dense(bare))


def test_remain_ratios():
    outcome = IMP(IMPConfig(ratio=0.5, epochs=0, rounds=1)).fit(residual(), images())
    model, mask = outcome.model, outcome.mask
    convs = [m.weight for m in model.modules() if isinstance(m, nn.Conv2d)]
    total = sum(p.numel() for p in model.parameters())
    found = remaining(model, mask)
    assert found.conv == pytest.approx(sum(int((w != 0).sum()) for w in convs) / sum(w.numel() for w in convs))
    assert found.conv == pytest.approx(0.5, abs=0.01)
    assert found.total == pytest.approx(1 - (mask.total - mask.kept) / total)
    rows = torch.cat([mask[n].flatten(1).any(1) for n in mask])
    assert found.channels == pytest.approx(float(rows.float().mean()))
    partly = Mask({"left.weight": mask["left.weight"]})
    gone = int((~mask["left.weight"]).sum())
    assert remaining(model, partly).conv == pytest.approx(1 - gone / sum(w.numel() for w in convs))
