"""Masks: validation, exact fractions, nesting, application, files."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from method_toys import mlp, residual
from torch import nn

from methods import masks
from methods.masks import Mask, MaskError


def scores_of(model: nn.Module, structured: bool = False) -> dict[str, torch.Tensor]:
    weights = dict(model.named_parameters())
    return {name: weights[name].detach().abs() for name in masks.prunable(model, structured=structured)}


# --- the type ------------------------------------------------------------
def test_density_counts_entries():
    mask = Mask({"a.weight": torch.tensor([[True, False], [False, False]]), "b.weight": torch.tensor([True, True])})
    assert (mask.kept, mask.total, mask.density) == (3, 6, 0.5)
    assert mask.layer_density == {"a.weight": 0.25, "b.weight": 1.0}
    assert mask.channels["a.weight"].tolist() == [True, False]
    assert mask.channel_density == 0.75


def test_a_mask_cannot_be_changed():
    source = torch.ones(2, 2, dtype=torch.bool)
    mask = Mask({"a": source})
    source[0, 0] = False
    mask["a"][1, 1] = False
    assert mask.density == 1.0
    with pytest.raises(AttributeError, match="immutable"):
        mask.structured = True
    with pytest.raises(TypeError):
        mask["a"] = source  # type: ignore[index]
    assert pickle.loads(pickle.dumps(mask)) == mask
    assert copy.deepcopy(mask) == mask
    assert hash(copy.copy(mask)) == hash(mask)


@pytest.mark.parametrize(
    ("layers", "structured", "words"),
    [
        ({}, False, "at least one layer"),
        ({"a": torch.ones(2, 2)}, False, "torch.bool"),
        ({"a": torch.ones(0, 2, dtype=torch.bool)}, False, "empty"),
        ({"a": torch.tensor([[True, False]])}, True, "splits a channel"),
        ({"a": torch.zeros(2, 2, dtype=torch.bool)}, True, "removes all"),
    ],
)
def test_malformed_masks_are_refused(layers, structured, words):
    with pytest.raises(MaskError, match=words):
        Mask(layers, structured)


def test_misfits_name_the_layer():
    model = mlp()
    with pytest.raises(MaskError, match=r"'4.weigth'.*did you mean.*4.weight"):
        Mask({"4.weigth": torch.ones(16, 16, dtype=torch.bool)}).check(model)
    with pytest.raises(MaskError, match=r"\(16, 8\).*\(16, 16\)"):
        masks.apply(model, Mask({"4.weight": torch.ones(16, 8, dtype=torch.bool)}))


def test_and_is_the_intersection_and_subsets_are_told():
    a = Mask({"a": torch.tensor([True, True, False])})
    b = Mask({"a": torch.tensor([True, False, True])})
    both = a & b
    assert both["a"].tolist() == [True, False, False]
    assert both.is_subset(a)
    assert both.is_subset(b)
    assert not a.is_subset(b)
    with pytest.raises(MaskError, match="different layers"):
        a & Mask({"b": torch.tensor([True])})


# --- exact fractions ------------------------------------------------------------
@settings(max_examples=60, deadline=None)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 6), st.integers(1, 5)), min_size=1, max_size=4),
    ratio=st.floats(0, 1),
    levels=st.integers(1, 5),
    seed=st.integers(0, 99),
)
def test_unstructured_fractions_are_exact_even_with_ties(shapes, ratio, levels, seed):
    generator = torch.Generator().manual_seed(seed)
    scores = {f"l{i}": torch.randint(0, levels, s, generator=generator).float() for i, s in enumerate(shapes)}
    total = sum(s.numel() for s in scores.values())
    mask = Mask.from_scores(scores, ratio, "global")
    assert mask.total - mask.kept == round(ratio * total)
    kept = torch.cat([scores[n][mask[n]] for n in mask])
    gone = torch.cat([scores[n][~mask[n]] for n in mask])
    assert not len(kept) or not len(gone) or kept.min() >= gone.max()
    local = Mask.from_scores(scores, ratio, "layer")
    for name, s in scores.items():
        assert int((~local[name]).sum()) == round(ratio * s.numel())


def test_among_equals_the_first_goes():
    mask = Mask.from_scores({"a": torch.zeros(2, 3), "b": torch.zeros(2)}, 0.5, "global")
    assert mask["a"].tolist() == [[False, False, False], [False, True, True]]
    assert mask["b"].tolist() == [True, True]


@settings(max_examples=40, deadline=None)
@given(
    widths=st.lists(st.integers(1, 7), min_size=1, max_size=4),
    ratio=st.floats(0, 1),
    seed=st.integers(0, 99),
    scope=st.sampled_from(["global", "layer"]),
)
def test_structured_fractions_are_exact_and_no_layer_is_emptied(widths, ratio, seed, scope):
    generator = torch.Generator().manual_seed(seed)
    scores = {f"l{i}": torch.rand(w, 3, 2, generator=generator) for i, w in enumerate(widths)}
    mask = Mask.from_scores(scores, ratio, scope, structured=True)
    gone = {name: int((~kept).sum()) for name, kept in mask.channels.items()}
    assert all(gone[name] < len(scores[name]) for name in gone)
    if scope == "layer":
        assert all(gone[name] == min(round(ratio * len(s)), len(s) - 1) for name, s in scores.items())
    else:
        assert sum(gone.values()) == min(round(ratio * sum(widths)), sum(widths) - len(widths))
    for name, kept in mask.channels.items():
        norm = scores[name].flatten(1).sum(1)
        if not kept.all():
            assert norm[kept].max() >= norm[~kept].max()


def test_nested_masks_only_shrink_whatever_the_new_scores():
    generator = torch.Generator().manual_seed(0)
    mask = None
    for ratio in (0.0, 0.2, 0.36, 0.9, 0.9):
        scores = {"a": torch.rand(20, 5, generator=generator), "b": torch.rand(30, generator=generator)}
        smaller = Mask.from_scores(scores, ratio, within=mask)
        assert smaller.total - smaller.kept == round(ratio * 130)
        assert mask is None or smaller.is_subset(mask)
        mask = smaller
    with pytest.raises(MaskError, match="must not fall"):
        Mask.from_scores(scores, 0.5, within=mask)


def test_bad_scores_are_refused():
    with pytest.raises(MaskError, match="NaN"):
        Mask.from_scores({"a": torch.tensor([0.0, float("nan")])}, 0.5)
    with pytest.raises(MaskError, match=r"\[0, 1\]"):
        Mask.from_scores({"a": torch.zeros(2)}, 1.5)
    with pytest.raises(MaskError, match="scope"):
        Mask.from_scores({"a": torch.zeros(2)}, 0.5, "net")  # type: ignore[arg-type]


def test_prunable_leaves_out_the_output_layer_only_when_structured():
    model = residual()
    assert "head.weight" in masks.prunable(model)
    assert masks.prunable(model, structured=True) == tuple(n for n in masks.prunable(model) if n != "head.weight")
    assert "head.weight" not in masks.prunable(model, ("conv",))
    with pytest.raises(MaskError, match="unknown layer kind"):
        masks.prunable(model, ("convolution",))
    with pytest.raises(MaskError, match="output layer"):
        masks.prunable(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), structured=True)


# --- application ------------------------------------------------------------
def test_apply_zeroes_exactly_what_the_mask_removes():
    model = mlp()
    before = copy.deepcopy(model.state_dict())
    mask = Mask.from_scores(scores_of(model), 0.6)
    assert masks.apply(model, mask) is model
    for name, tensor in model.state_dict().items():
        expected = before[name] * mask[name] if name in mask else before[name]
        assert torch.equal(tensor, expected), name


@pytest.mark.parametrize("training", [False, True])
def test_a_removed_channel_is_exactly_zero_behind_its_normalisation(training):
    model = residual().train(training)
    mask = Mask.from_scores(scores_of(model, True), 0.5, "layer", structured=True)
    masks.apply(model, mask)
    seen: dict[str, torch.Tensor] = {}
    for name, layer in (
        ("stem.0.weight", model.stem[1]),
        ("branch.0.weight", model.branch[1]),
        ("left.weight", model.left),
    ):
        layer.register_forward_hook(lambda _, __, out, name=name: seen.update({name: out}))
    model(torch.rand(5, 1, 6, 6))
    for name, out in seen.items():
        gone = ~mask.channels[name]
        assert gone.any()
        assert (out[:, gone] == 0).all(), name
        assert (out[:, ~gone] != 0).any(), name


def test_density_over_all_parameters_counts_what_is_really_zero():
    model = residual()
    for structured in (False, True):
        mask = Mask.from_scores(scores_of(model, structured), 0.5, "layer", structured)
        zeroed = masks.apply(copy.deepcopy(model), mask)
        nonzero = sum(int((p != 0).sum()) for p in zeroed.parameters())
        total = sum(p.numel() for p in model.parameters())
        assert mask.density_over(model) == pytest.approx(nonzero / total, abs=1e-12)


@pytest.mark.parametrize("structured", [False, True])
@pytest.mark.parametrize("kind", ["sgd", "adam", "adamw"])
def test_frozen_weights_stay_zero_under_momentum_and_weight_decay(kind, structured):
    model = residual().train()
    params = list(model.parameters())
    optimizer = {
        "sgd": lambda: torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=0.1),
        "adam": lambda: torch.optim.Adam(params, lr=0.1, weight_decay=0.1),
        "adamw": lambda: torch.optim.AdamW(params, lr=0.1, weight_decay=0.1),
    }[kind]()
    x, y = torch.rand(8, 1, 6, 6), torch.randint(0, 3, (8,))

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    for _ in range(3):
        step()  # momentum and moments of the weights that go
    mask = Mask.from_scores(scores_of(model, structured), 0.5, "layer", structured)
    reference = masks.apply(copy.deepcopy(model), mask)
    with masks.freeze(model, mask, optimizer):
        for _ in range(3):
            step()
            for name, p in model.named_parameters():
                zero = dict(reference.named_parameters())[name] == 0
                assert (p[zero] == 0).all(), name
                if name in mask:
                    assert (p.grad[~mask[name]] == 0).all(), name
    moved = [n for n, p in model.named_parameters() if not torch.equal(p, dict(reference.named_parameters())[n])]
    assert set(mask) <= set(moved)
    step()  # released: the gradient is no longer masked
    assert any((p[~mask[n]] != 0).any() for n, p in model.named_parameters() if n in mask)


# --- files ------------------------------------------------------------
def test_save_and_load_round_trip(tmp_path):
    model = residual()
    for structured in (False, True):
        mask = Mask.from_scores(scores_of(model, structured), 0.4, "layer", structured)
        path = masks.save(mask, tmp_path / "deep" / "mask.safetensors")
        assert masks.load(path, model) == mask
    assert [p.name for p in path.parent.iterdir()] == ["mask.safetensors"]


def test_damaged_files_are_refused(tmp_path):
    mask = Mask.from_scores(scores_of(mlp()), 0.4)
    path = masks.save(mask, tmp_path / "mask.safetensors")
    data = path.read_bytes()
    with pytest.raises(FileNotFoundError, match="no mask"):
        masks.load(tmp_path / "other")
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(MaskError, match="damaged"):
        masks.load(path)
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(MaskError, match="checksum"):
        masks.load(path)
    path.write_bytes(data.replace(b"certprune-mask", b"elsewhere-mask"))
    with pytest.raises(MaskError, match="format"):
        masks.load(path)
    path.write_bytes(data)
    with pytest.raises(MaskError, match="lacks"):
        masks.load(path, residual())
