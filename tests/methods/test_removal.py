"""Physical removal of channels: outputs stay, sizes shrink, on toys and on every net of the zoo."""

from __future__ import annotations

import copy

import pytest
import torch
from method_toys import residual, same_state
from torch import Tensor, nn

import certify
import models
from methods import masks
from methods.masks import Mask
from methods.wiring import WiringError, output_layers, tied_tensors
from runs.nrs_states import without_pruned


def structured_mask(model: nn.Module, x: Tensor, ratio: float, coupled: bool, scope: str = "layer") -> Mask:
    params = dict(model.named_parameters())
    scores = {name: params[name].detach().abs() for name in masks.prunable(model, structured=True)}
    groups = masks.groups(model, x) if coupled else None
    return Mask.from_scores(scores, ratio, scope, structured=True, groups=groups)


def enliven(model: nn.Module, x: Tensor) -> nn.Module:
    """Batch normalisation as after some training: statistics and affine parameters that are not trivial."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(1)
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.momentum = None  # take over the statistics of the batch
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.5)
        model.train()(x)
    return model.eval()


@pytest.mark.parametrize("name", models.names())
@pytest.mark.parametrize("coupled", [True, False])
def test_removal_keeps_the_outputs_of_every_net_of_the_zoo(name, coupled):
    x = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    model = models.create(name, num_outputs=10, in_channels=3, image_size=32, width=0.25, seed=0)
    enliven(model, x)
    mask = structured_mask(model, x, 0.5, coupled)
    masked = masks.apply(copy.deepcopy(model), mask)
    small = masks.remove(model, mask, x)
    with torch.no_grad():
        expected, got = masked(x), small(x)
    assert expected.std() > 1e-4
    assert (got - expected).abs().max() <= 1e-5 * max(1.0, float(expected.abs().max()))
    count = [sum(p.numel() for p in net.parameters()) for net in (model, small)]
    assert count[1] < 0.75 * count[0]
    if coupled:
        assert small.removal.stayed == {}
        for layer, kept in mask.channels.items():
            if not kept.all():
                assert dict(small.named_parameters())[layer].shape[0] == int(kept.sum()), layer


@pytest.mark.parametrize("head", ["keypoints", "dsnt"])
def test_keypoint_heads_keep_their_outputs(head):
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    model = enliven(models.create("cnn7_nrs", num_outputs=8, image_size=32, width=0.25, head=head, seed=0), x)
    mask = structured_mask(model, x, 0.5, True)
    small = masks.remove(model, mask, x)
    masked = masks.apply(copy.deepcopy(model), mask)
    with torch.no_grad():
        torch.testing.assert_close(small(x), masked(x), rtol=1e-5, atol=1e-4)
    assert small(x).shape == (2, 8)


def test_residual_depthwise_and_concatenated_channels_go_together():
    model, x = residual(), torch.rand(3, 1, 6, 6)
    mask = structured_mask(model, x, 0.5, True, "global")
    channels = mask.channels
    # The stem, the branch that is added to it and the depthwise convolution behind share one choice.
    assert torch.equal(channels["stem.0.weight"], channels["branch.0.weight"])
    assert torch.equal(channels["stem.0.weight"], channels["depthwise.0.weight"])
    small = masks.remove(model, mask, x)
    assert small.depthwise[0].groups == int(channels["stem.0.weight"].sum())
    assert small.head.in_features == int(channels["left.weight"].sum() + channels["right.weight"].sum())
    torch.testing.assert_close(small(x), masks.apply(copy.deepcopy(model), mask)(x), rtol=0, atol=1e-5)


def test_coupled_fractions_are_exact():
    model, x = residual(), torch.rand(1, 1, 6, 6)
    groups = masks.groups(model, x)
    assert sorted(group.channels for group in groups) == [4, 6, 8]
    for ratio in (0.0, 0.25, 0.5, 0.99):
        mask = structured_mask(model, x, ratio, True, "global")
        gone = sum(int((~mask.channels[g.members[0].weight]).sum()) for g in groups)
        assert gone == min(round(ratio * 18), 18 - 3)


def test_what_cannot_go_is_named_and_stays_zero():
    model, x = residual(), torch.rand(3, 1, 6, 6)
    channels = {"branch.0.weight": torch.arange(8) > 2, "left.weight": torch.arange(6) > 0}
    small = masks.remove(model, Mask.from_channels(channels, model), x)
    assert "coupled with" in small.removal.stayed["branch.0.weight"]
    assert "stem.0.weight" in small.removal.stayed["branch.0.weight"]
    assert small.removal.before == {"branch.0.weight": 8, "left.weight": 6}
    assert small.removal.after == {"branch.0.weight": 8, "left.weight": 5}
    assert (small.branch[0].weight[:3] == 0).all()


def test_a_concatenation_that_is_flattened_stays_whole():
    class Flattened(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.a, self.b = nn.Conv2d(1, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1)
            self.out = nn.Linear(6 * 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x).relu()
            return self.out(torch.cat([self.a(x).relu(), self.b(x).relu()], 1).flatten(1))

    model, x = Flattened(), torch.rand(2, 1, 2, 2)
    mask = structured_mask(model, x, 0.5, False)
    small = masks.remove(model, mask, x)
    assert small.removal.after == {"first.weight": 2, "a.weight": 4, "b.weight": 2}
    assert set(small.removal.stayed) == {"a.weight", "b.weight"}
    torch.testing.assert_close(small(x), masks.apply(copy.deepcopy(model), mask)(x))


def test_removal_changes_neither_the_model_nor_its_flags():
    model, x = residual(), torch.rand(2, 1, 6, 6)
    model.left.weight.requires_grad_(False)
    before = copy.deepcopy(model)
    small = masks.remove(model, structured_mask(model, x, 0.5, True), x)
    assert same_state(model, before)
    assert all(p.grad is None for p in model.parameters())
    assert not small.left.weight.requires_grad
    assert small.right.weight.requires_grad
    assert not small.training
    assert masks.remove(model.train(), structured_mask(model, x, 0.5, True), x).training


def test_an_unstructured_mask_removes_nothing():
    model, x = residual(), torch.rand(2, 1, 6, 6)
    params = dict(model.named_parameters())
    mask = Mask.from_scores({n: params[n].detach().abs() for n in masks.prunable(model)}, 0.9)
    small = masks.remove(model, mask, x)
    assert same_state(small, masks.apply(copy.deepcopy(model), mask))


def test_networks_are_compared_in_full_float32():
    """TF32, which torch allows in convolutions, is off by more than the tolerance."""
    seen = []

    class Watched(nn.ReLU):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(torch.backends.cudnn.conv.fp32_precision)
            return super().forward(x)

    model = nn.Sequential(nn.Conv2d(1, 4, 3), Watched(), nn.Flatten(), nn.Linear(64, 2)).eval()
    x = torch.rand(2, 1, 6, 6)
    mask = Mask.from_channels({"0.weight": torch.arange(4) > 1}, model)
    given = torch.backends.cudnn.conv.fp32_precision
    assert given != "ieee"
    masks.remove(masks.apply(model, mask), mask, x)
    traces = len(seen) - 2  # on the way there
    assert seen == [given] * traces + ["ieee", "ieee"]
    seen.clear()
    without_pruned(model, mask, x, certify.Linf(0.01))
    assert seen == [given] * traces + ["ieee"] * (len(seen) - traces)
    assert torch.backends.cudnn.conv.fp32_precision == given


def test_an_operation_that_wakes_zero_channels_is_caught():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Sigmoid(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(4, 2))
    x = torch.rand(1, 1, 5, 5)
    mask = Mask.from_channels({"0.weight": torch.tensor([True, False, True, True])}, model)
    with pytest.raises(RuntimeError, match="does not map a zero channel to zero"):
        masks.remove(model, mask, x)


def test_a_normalisation_behind_a_sum_is_not_taken_for_a_layers_own():
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.norm = nn.Conv2d(1, 4, 1), nn.Conv2d(1, 4, 1), nn.BatchNorm2d(4)
            self.out = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.norm(self.a(x) + self.b(x)).mean((2, 3)))

    model, x = Sum().eval(), torch.rand(2, 1, 4, 4)
    nn.init.normal_(model.norm.bias)
    assert tied_tensors(model) == {"a": ("a.bias",), "b": ("b.bias",), "out": ("out.bias",)}
    assert output_layers(model) == {"out"}
    mask = Mask.from_channels(dict.fromkeys(("a.weight", "b.weight"), torch.arange(4) > 1), model)
    small = masks.remove(model, mask, x)
    assert "norm turns zero channels into a constant" in small.removal.stayed["a.weight"]
    torch.testing.assert_close(small(x), masks.apply(copy.deepcopy(model), mask)(x))


def test_untraceable_networks_are_told_apart():
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(1, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.conv(x)) if x.sum() > 0 else x

    mask = Mask.from_channels({"conv.weight": torch.arange(4) > 1}, Branching())
    with pytest.raises(WiringError, match=r"torch\.fx cannot trace Branching"):
        masks.apply(Branching(), mask)
