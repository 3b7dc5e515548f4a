from __future__ import annotations

from dataclasses import replace

import pytest

from runs.cell import Perturb
from runs.suites import Selection, plan, preset_names, suites, variants
from runs.suites.plan import _presets, _rule_names


def test_every_preset_says_what_it_costs_and_gives() -> None:
    for suite in suites():
        for name, line in preset_names(suite).items():
            assert len(line) > 40, name
            made = plan(suite, name, Selection())
            assert made.preset.expectation
            assert made.preset.hardware
            assert len(made.cells) == len(made.costs) > 0
            assert all(cost > 0 for cost in made.costs)
            assert len({cell.key for cell in made.cells}) == len(made.cells)


def test_smoke_and_quick_keep_their_promise() -> None:
    assert plan("arena", "smoke", Selection()).seconds() <= 60
    quick = plan("arena", "quick", Selection())
    assert quick.seconds() <= 8 * 60
    assert {cell.data.name for cell in quick.cells} == {"digits", "aircraft"}
    labels = {cell.pruning.label for cell in quick.cells if cell.data.name == "digits"}
    assert labels == {
        "dense", "random", "magnitude", "imp", "imp+nrs", "imp+rs", "snip", "taylor", "hydra", "car", "random-channels",
        "slimming", "structlth", "usn",
    }  # fmt: skip
    assert {cell.seed for cell in quick.cells} == {0, 1, 2}
    assert {"imp+nrs", "car", "usn"} < {cell.pruning.label for cell in plan("arena", "smoke", Selection()).cells}


def test_quick_has_real_images_when_asked() -> None:
    made = plan("arena", "quick", Selection(datasets=("fashion_mnist",)))
    assert sum(made.costs) <= 25 * 60
    for training in ("natural", "ibp"):
        labels = {cell.pruning.label for cell in made.cells if cell.training.objective == training}
        assert {"dense", "random", "magnitude", "imp"} < labels
    assert {"imp+nrs", "car", "usn", "slimming"} < {cell.pruning.label for cell in made.cells}
    assert {cell.training.objective for cell in made.cells} == {"natural", "ibp"}
    assert len({cell.pruning.ratio for cell in made.cells}) >= 3
    assert all(cell.verifier.images == 200 for cell in made.cells)
    labels = {p.label for cell in made.cells for p in cell.perturbations}
    assert {"linf 0.1", "linf 2/255"} < labels
    assert {p.split()[0] for p in labels} == {"linf", "brightness", "contrast"}


def test_selection_narrows_and_replaces() -> None:
    chosen = Selection(
        methods=("dense", "imp"),
        ratios=(0.9,),
        seeds=(7,),
        trainings=("natural",),
        perturbations=(Perturb("linf", 0.2),),
        images=3,
        verifier="ibp",
        models=("mlp",),
    )
    made = plan("arena", "smoke", chosen)
    assert [(cell.pruning.method, cell.pruning.ratio, cell.seed) for cell in made.cells] == [
        ("dense", 0, 7),
        ("imp", 0.9, 7),
    ]
    assert all(cell.verifier.images == 3 and cell.verifier.method == "ibp" for cell in made.cells)
    assert all(cell.perturbations == (Perturb("linf", 0.2),) for cell in made.cells)


def test_a_network_of_another_width_costs_by_its_square() -> None:
    whole = plan("arena", "smoke", Selection(limit=1))
    name, width = whole.cells[0].network.name, whole.cells[0].network.width
    same, double = (plan("arena", "smoke", Selection(limit=1, models=(f"{name}:{w:g}",))) for w in (width, 2 * width))
    assert same.cells == whole.cells
    assert same.costs == whole.costs
    assert double.cells[0].network == replace(whole.cells[0].network, width=2 * width)
    assert double.costs[0] == pytest.approx(4 * whole.costs[0])
    for bad in ("mlp:", "mlp:x", "mlp:0", "mlp:-1", "mlp:nan", "mlp:inf"):
        with pytest.raises(ValueError, match="NAME:WIDTH"):
            plan("arena", "smoke", Selection(models=(bad,)))


def test_costs_grow_with_images_and_perturbations() -> None:
    whole = plan("arena", "smoke", Selection(methods=("dense",)))
    certified = 1.5  # of the preset: ten images, two perturbations
    for selection, factor in (
        (Selection(methods=("dense",), images=40), 4),
        (Selection(methods=("dense",), perturbations=(Perturb("linf", 0.01),)), 0.5),
        (Selection(methods=("dense",), images=20, perturbations=tuple(Perturb("linf", r) for r in (0.1, 0.2, 0.3))), 3),
    ):
        assert plan("arena", "smoke", selection).costs[0] == pytest.approx(whole.costs[0] + (factor - 1) * certified)


def test_names_count_on_the_data_sets_that_have_them() -> None:
    for selection in (Selection(methods=("magnitude",)), Selection(trainings=("ibp",))):
        made = plan("arena", "quick", selection)
        assert {cell.data.name for cell in made.cells} == {"digits"}
        assert made.prepare_seconds == 8  # nothing of the aircraft, which have none
    mixed = plan("arena", "quick", Selection(methods=("dense", "imp")))
    assert {(c.data.name, c.pruning.label) for c in mixed.cells} == {
        ("digits", "dense"), ("digits", "imp"), ("aircraft", "dense"),
    }  # fmt: skip


def test_another_verifier_keeps_what_it_reads_of_the_settings() -> None:
    def settings(suite: str, verifier: str, preset: str = "smoke") -> dict[str, object]:
        return dict(plan(suite, preset, Selection(verifier=verifier)).cells[0].verifier.settings)

    assert settings("usn", "deviation", "incomplete") == {"crown_images": 5}
    assert settings("usn", "probabilistic", "incomplete") == {}
    assert settings("usn", "auto", "incomplete") == {}
    assert settings("arena", "crown") == {"flip_probability": 0.01}
    assert settings("arena", "probabilistic") == {}
    assert settings("nrs", "crown") == {"test_images": 60}
    assert set(settings("car", "probabilistic")) > {"eps", "n", "landscape"}
    assert settings("car", "line") == {}


def test_every_variant_is_in_some_preset() -> None:
    for suite in suites():
        made = (_presets(suite)[name]() for name in preset_names(suite))
        held = {name for preset in made for block in preset.blocks for name in _rule_names(block)}
        assert set(variants(suite)) <= held


def test_limit_takes_the_first_cells() -> None:
    whole = plan("arena", "smoke", Selection())
    assert plan("arena", "smoke", Selection(limit=3)).cells == whole.cells[:3]


def test_cost_leaves_out_what_is_on_record() -> None:
    made = plan("arena", "smoke", Selection())
    assert made.seconds(made.cells) == 0
    assert made.seconds(made.cells[1:]) == pytest.approx(made.costs[0] / 2 + made.prepare_seconds)


@pytest.mark.parametrize(
    ("suite", "preset", "selection", "message"),
    [
        ("arean", "smoke", Selection(), r"unknown suite 'arean'\. Did you mean arena"),
        ("arena", "smok", Selection(), r"unknown preset 'smok'\. Did you mean smoke\?"),
        ("arena", "smoke", Selection(methods=("inp",)), r"unknown method on digits 'inp'\. Did you mean imp\?"),
        ("arena", "smoke", Selection(datasets=("digit",)), r"unknown data set of preset smoke 'digit'.*digits"),
        ("arena", "smoke", Selection(trainings=("naturl",)), r"unknown training on digits 'naturl'.*natural"),
        ("usn", "quick", Selection(methods=("literal",)), r"preset quick has no 'literal'; presets that do: gpu$"),
        (
            "nrs",
            "quick",
            Selection(methods=("hydra+rs",)),
            "has no 'hydra.rs'; presets that do: paper, released, fgsm$",
        ),
        (
            "nrs",
            "quick",
            Selection(datasets=("svhn",)),
            r"preset quick has no 'svhn'; presets that do: paper, released",
        ),
        ("nrs", "smoke", Selection(methods=("dnse",)), r"unknown method on digits 'dnse'.*Known: imp, imp\+nrs, hydra"),
        (
            "arena",
            "quick",
            Selection(methods=("imp",), datasets=("aircraft",)),
            "has 'imp' on digits, .*not on aircraft",
        ),
        ("arena", "smoke", Selection(trainings=("ibp",)), r"preset smoke has no 'ibp'; presets that do: quick"),
        (
            "usn",
            "quick",
            Selection(methods=("vanilla",), ratios=(0.5,)),
            "--ratios: nothing is pruned in this selection",
        ),
        ("arena", "quick", Selection(methods=("usn",), trainings=("ibp",)), "leaves no cell .*--dry-run shows"),
    ],
)
def test_unknown_names_get_close_matches(suite: str, preset: str, selection: Selection, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(suite, preset, selection)
