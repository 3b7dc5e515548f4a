"""Soft masks: where they start, noise, the exact binary mask and its straight-through gradient."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
from method_toys import images, mlp, residual, same_state
from torch import Tensor, nn

from methods import masks
from methods.car.initialise import initial_values, scale
from methods.car.softmask import SoftMasked, binarise, keep_largest
from methods.masks import Mask, MaskError


def soft(seed: int = 0, **options: object) -> SoftMasked:
    model = residual(seed)
    return SoftMasked(model, initial_values(model, masks.prunable(model)), **options)


# --- initialisation ------------------------------------------------------------
@pytest.mark.parametrize("tau", [0.1, 0.3, 0.5, 1.0])
def test_the_fraction_tau_starts_at_one_and_the_others_in_proportion(tau):
    model = residual()
    names = masks.prunable(model)
    weights = dict(model.named_parameters())
    for name, value in initial_values(model, names, "partial", tau).items():
        magnitudes = weights[name].detach().abs()
        n = magnitudes.numel()
        assert int((value == 1).sum()) == max(1, round(tau * n))
        divisor = magnitudes.flatten().sort(descending=True).values[max(1, round(tau * n)) - 1]
        assert float(scale(weights[name], tau)) == float(divisor)
        below = value < 1
        torch.testing.assert_close(value[below], (magnitudes / divisor)[below])
        assert value.shape == weights[name].shape


def test_full_scaling_is_tau_zero():
    model = residual()
    names = masks.prunable(model)
    full, zero = initial_values(model, names, "full", tau=0.7), initial_values(model, names, "partial", 0.0)
    for name in names:
        assert torch.equal(full[name], zero[name])
        magnitudes = dict(model.named_parameters())[name].detach().abs()
        torch.testing.assert_close(full[name], magnitudes / magnitudes.max())
        assert int((full[name] == 1).sum()) == 1


def test_the_random_start_is_uniform_and_seeded():
    model = nn.Linear(200, 100)
    one, same, other = (initial_values(model, ("weight",), "random", seed=s)["weight"] for s in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    quantiles = one.flatten().quantile(torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0]))
    torch.testing.assert_close(quantiles, torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0]), rtol=0, atol=0.02)


def test_a_signed_start_deletes_every_negative_weight():
    model = residual()
    names = masks.prunable(model)
    masked = SoftMasked(copy.deepcopy(model), initial_values(model, names, sign="signed"))
    weights = dict(model.named_parameters())
    for name, value in masked.soft().items():
        negative = weights[name] < 0
        assert bool((value[negative] == 0).all())
        assert bool((value[weights[name] > 0] > 0).all())


def test_a_layer_of_zeros_starts_at_zero():
    model = mlp()
    nn.init.zeros_(model[0].weight)
    assert float(initial_values(model, ("0.weight",))["0.weight"].abs().max()) == 0.0


# --- the binary mask ------------------------------------------------------------
@pytest.mark.parametrize("levels", [1, 2, 5, 1000])
@pytest.mark.parametrize("n", [1, 7, 200])
def test_keeping_the_largest_is_a_stable_sort(levels, n):
    values = torch.randint(0, levels, (n,), generator=torch.Generator().manual_seed(n)).float() / levels
    for removed in range(n + 1):
        expected = torch.ones(n, dtype=torch.bool)
        expected[torch.argsort(values, stable=True)[:removed]] = False
        assert torch.equal(keep_largest(values, removed), expected)
        if removed:
            literal = values > values.sort().values[removed - 1]
            assert torch.equal(keep_largest(values, removed, drop=True), literal)


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.5, 0.7, 0.95])
def test_the_ratio_is_exact_and_training_sees_the_final_mask(scope, ratio):
    masked = soft()
    values = {name: (4 * value).round() / 4 for name, value in masked.soft().items()}  # many ties
    masked = SoftMasked(masked.network, values)
    mask = binarise(masked.soft(), ratio, scope, weights=masked.weights())
    by_position = binarise(masked.soft(), ratio, scope, "position")
    assert by_position == Mask.from_scores({name: value.detach() for name, value in values.items()}, ratio, scope)
    total = sum(value.numel() for value in values.values())
    if scope == "layer":
        for name, value in values.items():
            assert int(mask[name].sum()) == value.numel() - round(ratio * value.numel())
    else:
        assert mask.kept == total - round(ratio * total)
    for ties, final in (("magnitude", mask), ("position", by_position)):
        for name, value in masked.hard(ratio, scope, ties).items():
            assert torch.equal(value.detach(), final[name].float())
    # Lexicographic: by soft mask, then by weight.
    if scope == "layer":
        for name, value in values.items():
            keys = list(zip(value.flatten().tolist(), masked.weights()[name].abs().flatten().tolist()))
            gone = sorted(range(len(keys)), key=keys.__getitem__)[: round(ratio * len(keys))]
            assert set((~mask[name].flatten()).nonzero().flatten().tolist()) == set(gone)


@pytest.mark.parametrize("tau", [0.0, 0.1, 0.3, 1.0])
def test_the_start_prunes_by_magnitude_whatever_is_tied_at_one(tau):
    model = residual()
    names = masks.prunable(model)
    weights = {n: p.detach() for n, p in model.named_parameters() if n in names}
    expected = Mask.from_scores({n: w.abs() for n, w in weights.items()}, 0.9, "layer")
    assert binarise(initial_values(model, names, "partial", tau), 0.9, weights=weights) == expected


def test_ties_across_layers_go_by_relative_magnitude():
    weights = {"a": torch.tensor([10.0, 20.0, 30.0]), "b": torch.tensor([0.1, 0.2, 0.9])}  # over their mean: .5 1 1.5
    values = {name: torch.ones(3) for name in weights}  # and .25 .5 2.25
    mask = binarise(values, 0.5, "global", weights=weights)
    assert mask["a"].tolist() == [False, True, True]
    assert mask["b"].tolist() == [False, False, True]


def test_masks_of_growing_ratios_are_nested():
    values = soft().soft()
    found = [binarise(values, ratio, ties="position") for ratio in (0.1, 0.5, 0.7, 0.9)]
    assert all(later.is_subset(earlier) for earlier, later in pairwise(found))


def test_ties_to_the_letter_can_remove_more():
    values = {"w": torch.tensor([1.0, 1.0, 1.0, 0.5])}
    assert binarise(values, 0.5, ties="drop")["w"].tolist() == [False, False, False, False]
    assert binarise(values, 0.5, ties="position")["w"].tolist() == [False, True, True, False]
    kept = binarise(values, 0.5, weights={"w": torch.tensor([3.0, 1.0, -2.0, 9.0])})
    assert kept["w"].tolist() == [True, False, True, False]
    with pytest.raises(MaskError, match="pass weights="):
        binarise(values, 0.5)
    with pytest.raises(MaskError, match="NaN"):
        binarise({"w": torch.tensor([float("nan"), 1.0])}, 0.5)


def test_the_gradient_passes_straight_through_the_binary_mask():
    masked = soft()
    x, y = images()[0]
    masked.eval()
    nn.functional.cross_entropy(masked(x, masked.hard(0.5)), y).backward()
    # The same network with its binary mask as a free factor of the weights.
    hard = {n: v.detach().clone().requires_grad_() for n, v in masked.hard(0.5).items()}
    loss = nn.functional.cross_entropy(masked(x, hard), y)
    expected = torch.autograd.grad(loss, list(hard.values()))
    for value, gradient in zip(masked.values, expected):
        torch.testing.assert_close(value.grad, gradient)
    assert all(bool((v.grad[v.detach() < 0.05] != 0).any()) for v in masked.values if (v < 0.05).sum() > 20)


# --- noise ------------------------------------------------------------
def test_noise_is_uniform_independent_and_clipped():
    model = nn.Sequential(nn.Linear(300, 100, bias=False))
    masked = SoftMasked(model, {"0.weight": torch.full((100, 300), 0.5)})
    one, other = (masked.noisy(0.2)["0.weight"].detach() - 0.5 for _ in range(2))
    assert 0.199 < float(one.max()) <= 0.2
    assert -0.2 <= float(one.min()) < -0.199
    assert float(one.std()) == pytest.approx(0.4 / 12**0.5, rel=0.02)
    assert abs(float(torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1])) < 0.02
    assert abs(float(torch.corrcoef(torch.stack([one.flatten()[1:], one.flatten()[:-1]]))[0, 1])) < 0.02
    layer = masked.noisy(0.2, "layer")["0.weight"].detach()
    assert float(layer.max()) == float(layer.min()) != 0.5
    assert torch.equal(masked.noisy(0.0)["0.weight"], masked.soft()["0.weight"])
    high = SoftMasked(model, {"0.weight": torch.full((100, 300), 0.9)}).noisy(0.5)["0.weight"].detach()
    assert float(high.max()) == 1.0
    assert float((high == 1.0).float().mean()) == pytest.approx(0.4, abs=0.02)


def test_what_the_clip_cuts_has_no_gradient():
    masked = SoftMasked(nn.Sequential(nn.Linear(50, 40, bias=False)), {"0.weight": torch.full((40, 50), 0.8)})
    noisy = masked.noisy(0.5)["0.weight"]
    noisy.sum().backward()
    assert torch.equal(masked.values[0].grad, (noisy < 1.0).float())


def test_projection_and_the_soft_mask():
    masked = SoftMasked(nn.Sequential(nn.Linear(2, 2)), {"0.weight": torch.tensor([[-0.5, 0.5], [1.5, 1.0]])})
    assert masked.soft()["0.weight"].tolist() == [[0.0, 0.5], [1.0, 1.0]]
    assert float(masked.size().detach()) == pytest.approx(3.5 / 4)
    assert float(masked.size(average=False).detach()) == pytest.approx(3.5)
    masked.project()
    assert masked.values[0].tolist() == [[0.0, 0.5], [1.0, 1.0]]
    assert masked.soft()["0.weight"].requires_grad


# --- the network under masks ------------------------------------------------------------
def test_the_network_computes_with_masked_weights():
    model, x = residual(), images()[0][0]
    masked = SoftMasked(copy.deepcopy(model), initial_values(model, masks.prunable(model))).eval()
    by_hand = copy.deepcopy(model)
    for name, value in masked.soft().items():
        dict(by_hand.named_parameters())[name].data.mul_(value.detach())
    torch.testing.assert_close(masked(x), by_hand(x))
    pruned = masks.apply(copy.deepcopy(model), binarise(masked.soft(), 0.6, weights=masked.weights()))
    torch.testing.assert_close(masked(x, masked.hard(0.6)), pruned(x))
    assert same_state(masked.network, model)


@pytest.mark.parametrize("affine", [False, True])
def test_only_masks_are_trained(affine):
    masked = soft(affine=affine)
    trained = {name for name, p in masked.named_parameters() if p.requires_grad}
    gammas = {f"network.{p}.{w}" for p in ("stem.1", "branch.1", "depthwise.1") for w in ("weight", "bias")}
    assert trained == {f"values.{i}" for i in range(len(masked.names))} | (gammas if affine else set())


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.flatten() for t in tensors])


def test_a_mask_of_zeros_and_ones_is_its_own_start():
    model = mlp()
    names = masks.prunable(model)
    values = {n: (initial_values(model, names)[n] > 0.5).float() for n in names}
    masked = SoftMasked(model, values)
    kept = int(flat(list(values.values())).sum())
    ratio = 1 - kept / flat(list(values.values())).numel()
    for name, one in masked.hard(ratio, "global").items():
        assert torch.equal(one.detach(), values[name])
