from __future__ import annotations

import csv
import dataclasses
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import certify
import models
from methods import masks
from methods.iterative import Iterative
from methods.masks import Mask
from methods.training.crown_ibp import CROWNIBP
from methods.training.fgsm import FGSM
from methods.training.regularised import Regularised
from runs import configure, execute, nrs_figures, nrs_lines, nrs_records, nrs_report, nrs_states, nrs_tables, nrs_warmup
from runs.cell import Cell, Data, Network, Perturb, Pruning, Training, Verifier, from_dict, recorded_by_state, settings
from runs.leaderboard import build
from runs.statistics import clopper_pearson, holm, sign_test
from runs.store import Record
from runs.suites import Selection, nrs, plan, preset_names, variants
from tests.runs.handmade import make_cell, make_record

LINF = Perturb("linf", 0.1)


def _cell(
    name: str = "imp", rounds: int = 2, seed: int = 0, kind: str = "crown-ibp", eps: float = 0.1, **changes: Any
) -> Cell:
    made = nrs.rule(name, rounds, rounds, epochs=5)
    parts: dict[str, Any] = {
        "pruning": Pruning(made.method, made.ratios[0], made.settings),
        "training": Training(kind, 5, 128, eps),
        "network": Network("cnn7_nrs", width=0.125),
        "data": Data("fashion_mnist"),
        "perturbations": (Perturb("linf", eps),),
        "verifier": Verifier("auto", images=4, seconds=2.0, settings=settings(test_images=8)),
        "seed": seed,
    }
    return Cell(**(parts | changes))


# --- the plan -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", preset_names("nrs"))
def test_every_cell_of_every_preset_has_a_method_that_ends_at_its_ratio(name: str) -> None:
    chosen = nrs.PRESETS[name]()
    names = tuple(dict.fromkeys(block.data.name for block in chosen.blocks))
    cells = plan("nrs", name, Selection(datasets=names)).cells
    assert len({cell.key for cell in cells}) == len(cells)
    for cell in {cell.training_key: cell for cell in cells if cell.seed == 0}.values():
        made = nrs_states.method(cell)
        assert recorded_by_state(cell.pruning)
        assert made.config.ratio == pytest.approx(cell.pruning.ratio)
        assert cell.pruning.label.removesuffix(" as released") in variants("nrs")
        assert made.config.epochs == cell.training.epochs
        assert configure.total_epochs(made.config) >= cell.training.epochs


def test_the_ladders_are_the_papers() -> None:
    for name, states in (("paper", 17), ("released", 16)):
        cells = plan("nrs", name, Selection(seeds=(0,))).cells
        by_label = {cell.pruning.label: nrs_states.method(cell).config for cell in cells}
        suffix = "" if name == "paper" else " as released"
        assert by_label["imp" + suffix].rounds + 1 == states
        assert by_label["slimming" + suffix].rounds + 1 == 12
        assert by_label["slimming" + suffix].average == (name == "released")
    sizes = {cell.data.name for cell in plan("nrs", "paper", Selection()).cells}
    assert sizes == {"fashion_mnist", "svhn", "cifar10"}


def test_quick_is_what_it_says_and_its_studies_share_its_networks() -> None:
    quick = plan("nrs", "quick", Selection())
    assert [cell.pruning.label for cell in quick.cells] == ["imp", "hydra", "imp+rs", "imp+nrs", "slimming"]
    assert {(c.verifier.images, c.verifier.seconds) for c in quick.cells} == {(50, 2.0)}
    assert {nrs_states.method(c).config.rounds + 1 for c in quick.cells} == {4}
    assert quick.seconds() <= 30 * 60
    assert all(execute.test_images(cell) == 1000 for cell in quick.cells)
    shared = {cell.key for cell in quick.cells} & {cell.key for cell in plan("nrs", "rewind", Selection()).cells}
    assert len(shared) == 1
    gpu = plan("nrs", "gpu", Selection())
    assert gpu.seconds() <= 30 * 60
    assert {nrs_states.method(c).config.rounds + 1 for c in gpu.cells} == {6}


def test_rows_by_name() -> None:
    only = plan("nrs", "quick", Selection(methods=("imp+nrs", "slimming")))
    assert [cell.pruning.label for cell in only.cells] == ["imp+nrs", "slimming"]
    labels = {name: _cell(name).pruning.label for name in nrs.VARIANTS if name not in nrs_tables.ONE_SHOT}
    assert all(name == label for name, label in labels.items())
    assert nrs.rule("imp-finetune", 4, 4, tune=0.5, epochs=10).networks == pytest.approx(3.0)
    assert nrs.rule("hydra", 3, 3, epochs=10, search_epochs=5).networks == pytest.approx(5.5)


def test_ratios_follow_from_the_rounds() -> None:
    whole = (
        "imp with 3 prunings ends at a ratio of 0.488, not 0.9: the ratio follows from the rounds here, leave --ratios"
    )
    with pytest.raises(ValueError, match=whole):
        plan("nrs", "quick", Selection(ratios=(0.9,)))
    with pytest.raises(ValueError, match=r"imp with 1 pruning ends .*\(lwm, hydra-once of this preset take them\)"):
        plan("nrs", "smoke", Selection(ratios=(0.2, 0.9)))
    same = plan("nrs", "quick", Selection(methods=("imp",), ratios=(0.488,)))
    assert same.cells == plan("nrs", "quick", Selection(methods=("imp",))).cells
    once = plan("nrs", "smoke", Selection(methods=("lwm", "hydra-once"), ratios=(0.5, 0.7)))
    assert {(c.pruning.label, c.pruning.ratio) for c in once.cells} == {
        (name, ratio) for name in ("lwm", "hydra-once") for ratio in (0.5, 0.7)
    }
    assert all(nrs_states.method(cell).config.ratio == pytest.approx(cell.pruning.ratio) for cell in once.cells)


def test_hydra_with_rsloss_is_a_row_of_the_large_presets() -> None:
    for name in ("paper", "released", "fgsm"):
        cells = plan("nrs", name, Selection(methods=("hydra+rs",))).cells
        assert {cell.pruning.label.removesuffix(" as released") for cell in cells} == {"hydra+rs"}
    assert "dense" not in variants("nrs")
    assert Pruning("dense", 0.0, settings(row="dense", flavour="as_paper")).label == "dense"  # of records unfolded


# --- the method of a cell -------------------------------------------------------------------------------------------
def test_a_cells_training_may_be_adjusted_and_its_fine_tune_follows() -> None:
    own = settings(lr=0.004, ramp_start=0.1, ramp_end=0.7)
    made = nrs_states.method(_cell("imp-finetune", training=Training("crown-ibp", 5, 128, 0.1, own)))
    objective = made.config.training.objective
    assert isinstance(objective, CROWNIBP)
    assert (objective.eps, objective.schedule.start, objective.schedule.end) == (0.1, 0.1, 0.7)
    assert made.config.training.lr == 0.004
    assert made.config.finetune is not None
    assert made.config.finetune.lr == pytest.approx(0.004 * made.config.training.gamma**2)
    tuned = made.config.finetune.objective
    assert isinstance(tuned, CROWNIBP)
    assert tuned.schedule(0.0) == 1.0
    fast = nrs_states.method(_cell(kind="fast-ibp", training=Training("fast-ibp", 5, 128, 0.1, own)))
    assert isinstance(fast.config.training.objective, Regularised)
    inner = fast.config.training.objective.objective
    assert inner.schedule.end == 0.7


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pruning": Pruning("imp", 0.36, settings(row="imp", rounds=2, colour="red"))}, "no setting 'colour'"),
        ({"pruning": Pruning("imp", 0.5, settings(row="imp", rounds=2))}, "ends at a ratio of 0.36, not 0.5"),
        ({"training": Training("crown-ibp", 5)}, "needs a radius"),
        ({"training": Training("crown-ibp", 5, 128, 0.1, settings(speed=2))}, "no setting 'speed'"),
        ({"training": Training("natural", 5, 128, None, settings(ramp_end=0.5))}, "has no ramp"),
        ({"training": Training("crown-ipb", 5, 128, 0.1)}, "did you mean crown-ibp"),
        ({"pruning": Pruning("imp", 0.36, settings(row="impp", rounds=2))}, "did you mean imp"),
        (
            {
                "pruning": Pruning("imp", 0.9, settings(row="magnitude", one_shot=True)),
                "training": Training("fgsm", 5, 9, 0.1),
            },
            "one-shot pruning is trained with crown-ibp",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        nrs_states.method(_cell(**changes))


def test_every_training_can_be_named_by_a_cell() -> None:
    assert set(configure.OBJECTIVES) == {"natural", "fgsm", "pgd", "trades", "ibp", "crown-ibp", "fast-ibp"}
    for name in configure.OBJECTIVES:
        made = configure.build_objective(Training(name, 1, 8, None if name == "natural" else 0.1), {})
        assert made.name.split("+")[0] == {"fast-ibp": "ibp"}.get(name, name)
    aligned = configure.build_objective(Training("fgsm", 1, 8, 0.1), {"grad_align": 1.757})
    assert isinstance(aligned, FGSM)
    assert aligned.grad_align == 1.757
    with pytest.raises(ValueError, match=r"unknown setting of training pgd 'step'.*steps"):
        configure.build_objective(Training("pgd", 1, 8, 0.1), {"step": 3})
    with pytest.raises(ValueError, match="needs a radius"):
        configure.build_objective(Training("fast-ibp", 1, 8), {})


# --- networks -------------------------------------------------------------------------------------------------------
def _network(seed: int = 0) -> Any:
    return models.create("cnn7_nrs", 10, in_channels=1, image_size=8, width=0.125, seed=seed)


def test_fast_ibps_normalisation_is_folded_into_the_zoos_network(tmp_path: Path) -> None:
    plain = _network()
    assert nrs_warmup.prepare(plain, "crown-ibp", 0) is plain
    prepared = nrs_warmup.prepare(plain, "fast-ibp", 0)
    x = torch.rand(6, 1, 8, 8)
    prepared.train()
    for _ in range(3):
        prepared(x)  # statistics that are not the initial ones
    prepared.eval()
    assert set(prepared.state_dict()) > set(plain.state_dict())
    folded = nrs_warmup.fold(prepared)
    assert set(folded.state_dict()) == set(plain.state_dict())
    torch.testing.assert_close(folded(x), prepared(x), rtol=1e-4, atol=1e-5)
    models.save(folded, tmp_path / "net")
    torch.testing.assert_close(models.load(tmp_path / "net")(x), folded(x))


def test_structured_tickets_lose_their_channels_and_stay_the_same_function() -> None:
    network = _network().eval()
    names = masks.prunable(network, ("conv",), structured=True)
    weights = dict(network.named_parameters())
    scores = {name: weights[name].detach().abs() for name in names}
    mask = Mask.from_scores(scores, 0.3, "global", True)
    masks.apply(network, mask)
    x = torch.rand(4, 1, 8, 8)
    found = nrs_states.without_pruned(network, mask, x, certify.Linf(0.05))
    assert found.facts["physical"]
    gone = sum(int((~kept).sum()) for kept in mask.channels.values())
    assert found.facts["channels"] == gone > 0
    assert max(found.facts[name] for name in ("outputs", "ibp", "crown")) < 1e-5
    assert models.count(found.network) < models.count(network)
    torch.testing.assert_close(found.network(x), network(x), rtol=1e-4, atol=1e-5)


def test_a_masks_network_must_be_the_masked_one(monkeypatch: pytest.MonkeyPatch) -> None:
    network = _network().eval()
    names = masks.prunable(network, ("conv",), structured=True)
    scores = {name: p.detach().abs() for name, p in network.named_parameters() if name in names}
    mask = Mask.from_scores(scores, 0.3, "global", True)
    masks.apply(network, mask)
    other = _network(1).eval()
    other.removal = None
    monkeypatch.setattr(nrs_states.masks, "remove", lambda *_: other)
    with pytest.raises(nrs_states.NotTheSameFunction, match="differs by"):
        nrs_states.without_pruned(network, mask, torch.rand(2, 1, 8, 8), certify.Linf(0.05))


def test_single_weights_are_not_removed() -> None:
    network = _network().eval()
    scores = {name: p.detach().abs() for name, p in network.named_parameters() if name == "features.conv2.weight"}
    found = nrs_states.without_pruned(
        network, Mask.from_scores(scores, 0.9), torch.rand(2, 1, 8, 8), certify.Linf(0.05)
    )
    assert found.network is network
    assert found.facts["physical"] is False
    assert found.facts["channels"] == 0


def test_attacks_and_bounds_measure_what_they_say() -> None:
    network = _network().eval()
    x = torch.rand(12, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    y = network(x).argmax(1)
    y[0] = (y[0] + 1) % 10  # one wrong answer
    clean, constant = nrs_states.accuracy(network, x, y)
    assert clean == "0" + "1" * 11
    assert constant  # an untrained network gives every image the same class
    eyes = torch.eye(4).reshape(4, 1, 2, 2)
    assert nrs_states.accuracy(nn.Flatten().eval(), eyes, torch.tensor([0, 1, 2, 0])) == ("1110", False)
    p = certify.Linf(0.02)
    fgsm, pgd = nrs_states.survived(network, x, y, p, 10, 0)
    found = nrs_states.bounded(network, x, y, p, "crown")
    for i in range(12):
        # Proved implies unbroken, and what survives PGD has survived FGSM.
        assert found["bits"][i] <= pgd[i] <= fgsm[i] <= clean[i]
    assert found["timing"]["seconds_mean"] > 0
    assert nrs_states.bounded(network, x, y, certify.Linf(0.0), "ibp")["bits"] == clean
    either = nrs_states.validated(network, x, y, certify.Linf(0.0))
    assert either == {"images": 12, "verified": 11, "right": 11}


# --- records made by hand -------------------------------------------------------------------------------------------
STD = {"dense": "11111100", "same": "11111010", "better": "11111110", "worse": "00000001", "constant": "00000000"}


def _state(index: int, removed: float, verified: str, std: str, validation: int, label: str = "linf 0.1") -> Record:
    timing = {"seconds_mean": 0.5 / (index + 1), "seconds_median": 0.1, "peak_mb": 300.0 - index}
    crown = {"bits": verified[:-1] + "0", "timing": {"seconds_mean": 0.2 / (index + 1), "peak_mb": 200.0}}
    instability = {"total": 100.0 - index, "mean": 0.5 - 0.1 * index, "unstable": 0.7}
    return {
        "index": index, "removed": removed, "phase": f"round-{index:02d}", "epochs": 5, "seconds": 10.0,
        "validation": {"score": 0.5}, "constant": std == STD["constant"],
        "remaining": {"conv": 1 - removed, "total": 1 - 0.9 * removed, "channels": 1 - removed},
        "size": {"parameters": 1000, "parameters_left": 900, "flops": 2000, "flops_nonzero": 1000 - 10 * index,
                 "flops_executed": 2000 - 100 * index},
        "mask": {"structured": False, "density": 1 - removed, "layers": {}},
        "removal": {"physical": index > 0, "channels": 3 * index, "outputs": 1e-7, "ibp": 1e-7, "crown": 2e-7,
                    "stayed": {}},
        "results": [{
            "label": label, "kind": "linf", "magnitude": float(label.split()[1]), "images": len(verified),
            "clean": 0.75, "attacked": 3, "verified": verified.count("1"), "verified_bits": verified,
            "holds": verified.count("1"), "violated": 1, "unknown": 0,
            "timeout": len(verified) - verified.count("1") - 1,
            "unstable": 12.0, "soundness": "real-arithmetic", "method": "auto", "timing": timing,
            "std": std, "fgsm": std, "pgd": std[:-2] + "00", "constant": std == STD["constant"],
            "bounds": {"ibp": {"bits": "0" * len(verified), "timing": timing}, "crown-ibp": crown, "crown": crown},
            "ibp_test": 3, "masked": timing,
            "stability": {"images": 8, "neurons": 100, "unstable_ratio": 0.4 - 0.1 * index, "by_layer": {},
                          "pre_activation": instability, "pre_bn": instability},
            "validation": {"images": 4, "verified": validation, "right": 4},
        }],
    }  # fmt: skip


def _record(cell: Cell, states: list[Record]) -> Record:
    record = make_record(cell, states[-1]["results"][0]["verified_bits"])
    label = cell.perturbations[0].label
    for state, ratio in zip(states, (0.0, 0.2, 0.36)):
        state["removed"] = ratio
        state["results"][0] |= {"label": label, "magnitude": cell.perturbations[0].magnitude}
    index = nrs_records.chosen(states)
    return record | {
        "states": states, "chosen": index, "results": states[index]["results"], "size": states[index]["size"],
        "training": {"epochs": 15, "phases": [], "validation": {}, "timing": {"seconds": 30.0, "peak_mb": 500.0}},
        "data": {"task": "classification", "images": {"train": 600, "val": 4, "test": 8}},
    }  # fmt: skip


@pytest.fixture
def records() -> list[Record]:
    """Two seeds of IMP, one of IMP+NRS, slimming, a fine-tune, FGSM, and Fast-IBP; validation likes step 1 of IMP."""

    def states(*found: tuple[str, str, int]) -> list[Record]:
        return [_state(i, 0.2 * i, verified, STD[std], val) for i, (verified, std, val) in enumerate(found)]

    return [
        _record(_cell("imp", seed=0), states(("1100", "dense", 2), ("1110", "same", 3), ("1111", "constant", 1))),
        _record(_cell("imp", seed=1), states(("1000", "dense", 2), ("1100", "same", 3), ("1000", "constant", 1))),
        _record(_cell("imp+nrs"), states(("1110", "dense", 3), ("1111", "better", 3), ("1111", "better", 3))),
        _record(_cell("slimming"), states(("1100", "dense", 2), ("1000", "same", 3), ("0000", "same", 2))),
        _record(_cell("imp-finetune"), states(("1100", "dense", 2), ("1000", "same", 2), ("0000", "worse", 1))),
        _record(_cell("imp", kind="fgsm"), states(("0000", "dense", 0), ("1000", "same", 1), ("1000", "same", 2))),
        _record(_cell("imp", kind="fast-ibp"), states(("1100", "dense", 2), ("1100", "same", 2), ("1110", "same", 2))),
    ]  # fmt: skip


def _study(records: list[Record]) -> nrs_lines.Study:
    (study,) = nrs_lines.studies(records)
    return study


def test_states_are_chosen_on_validation_images_alone(records: list[Record]) -> None:
    study = _study(records)
    line = study.lines[0]
    assert (line.label, line.seeds, line.steps) == ("imp", (0, 1), 3)
    assert line.chosen == 1
    # Of equals the sparser one.
    assert study.lines[1].chosen == 2
    assert nrs_records.chosen(records[0]["states"]) == 1
    assert nrs_records.chosen(records[0]["states"][:1]) == 0
    # Test images: steps 1 and 2 verify 2.5 of 4 on average; of each seed's own best, 4 and 2.
    assert line.optimistic == 2
    assert line.mean(2, nrs_lines.verified) == pytest.approx(2.5 / 4)
    assert line.best_by_seed() == pytest.approx(3 / 4)


def test_tickets_are_paired_exact_tests_over_images(records: list[Record]) -> None:
    study = _study(records)
    imp, nrs_line = study.lines[:2]
    ticket = study.ticket(imp, 1)
    assert ticket is not None
    # Verified: gains of one image in each seed, both different images; std: one won, one lost, of each seed.
    assert ticket.verified == pytest.approx(0.25)
    assert ticket.std == pytest.approx(0.0)
    assert ticket.mark == "ticket"
    won, lost = clopper_pearson(2, 4), clopper_pearson(0, 4)
    assert (ticket.interval.low, ticket.interval.high) == (won.low - lost.high, won.high - lost.low)
    assert study.ticket(imp, 2) is None  # a constant predictor
    tuned = study.lines[3]
    assert tuned.label == "imp-finetune"
    worse = study.ticket(tuned, 2)
    assert worse is not None
    assert worse.std == pytest.approx(-5 / 8)
    raw = sign_test([-1, -1, -1, -1, -1, -1, 1, 0])
    assert worse.std_p >= raw.p
    assert worse.mark == "open"  # six images lost and one won, but there are many tests and few images
    assert study.dense(nrs_line) is imp
    # IMP+NRS has one seed in common with the dense baseline.
    better = study.ticket(nrs_line, 1)
    assert better is not None
    assert better.verified == pytest.approx(0.5)
    everything = sorted(t.std_p for t in study.tickets.values())
    assert everything == sorted(everything)
    assert max(holm([1.0, raw.p])) == 1.0


def test_marks() -> None:
    def compared(difference: float, wins: int, losses: int, p: float) -> Any:
        return nrs_lines._Compared(difference, wins, losses, 100, p)

    def mark(std: Any, ver: Any) -> str:
        return nrs_lines._ticket(std, ver, std.p, ver.p).mark

    assert mark(compared(0.0, 3, 3, 1.0), compared(0.2, 20, 0, 1e-4)) == "better"
    assert mark(compared(0.0, 3, 3, 1.0), compared(0.02, 2, 0, 0.5)) == "ticket"
    assert mark(compared(-0.01, 0, 1, 1.0), compared(0.2, 20, 0, 1e-4)) == "open"
    assert mark(compared(-0.2, 0, 20, 1e-4), compared(0.2, 20, 0, 1e-4)) == "worse"


def test_table_one_stands_beside_the_printed_numbers(records: list[Record]) -> None:
    (grid,) = [g for g in nrs_tables.grids(_study(records)) if g.title.startswith("Table I:")]
    rows = [dict(zip(grid.header, row)) for row in grid.rows]
    dense = rows[0]
    assert (dense["row"], dense["training"], dense["seeds"], dense["step"]) == ("dense", "crown-ibp 0.1", "2", "0")
    assert dense["verified"].startswith("1.5/4 38 % [")
    assert dense["paper"].startswith("remains 1 · std 77.2 · verified 68.8 [")
    imp = next(r for r in rows if r["row"] == "imp")
    assert imp["step"] == "1"
    assert imp["verified"].startswith("2.5/4 62 % [")
    assert imp["against dense"] == "ticket"
    assert imp["best on test (optimistic)"] == "step 2: 62.5"
    assert "remains 0.07 · std 78.1" in imp["paper"]
    assert next(r for r in rows if r["training"] == "fgsm 0.1" and r["row"] == "imp")["paper"].endswith("85.9 s")
    assert any("not comparable: network cnn7_nrs ×0.125" in note for note in grid.notes)


def test_the_other_tables(records: list[Record]) -> None:
    grids = {g.title.split(" · ")[0]: g for g in nrs_tables.grids(_study(records))}
    four = grids["Table IV: CROWN-IBP beside Fast-IBP"]
    assert four.header == ("row", "crown-ibp", "fast-ibp")
    assert [row[0] for row in four.rows][:2] == ["dense", "imp"]
    assert "3/4 75 %" in four.rows[1][2]
    five = grids["Table V: incomplete and complete verification"]
    imp = dict(zip(five.header, five.rows[0]))
    assert imp["complete"].startswith("2.5/4")
    assert imp["CROWN"].startswith("2.5/4")
    assert (imp["AVG"], imp["BEST"]) == ("62.5 (step 2)", "75.0")
    nine = grids["Figure 9 in numbers: rewinding and fine-tuning"]
    assert {row[0] for row in nine.rows} == {"imp", "imp-finetune"}
    # In both seeds of step 2 the network predicts a constant, and the table says so.
    assert "CONSTANT 2/2" in nine.rows[0][-1]
    removed = grids["Removed before verification"]
    cells = {(row[0], row[2]): row for row in removed.rows}
    assert cells["slimming", "2"][3] == "6 channels"
    assert cells["slimming", "2"][6] == "1e-07 / 1e-07 / 2e-07"
    assert cells["imp", "2"][6] == "nothing is exploited"
    every = [g for g in nrs_tables.grids(_study(records)) if g.title.startswith("Every state: imp+nrs")]
    assert [row[0] for row in every[0].rows] == ["0", "1", "2 ◄"]
    assert every[0].rows[1][9].startswith("4/4 100 %")


def test_a_row_that_is_not_printed_stands_alone(records: list[Record]) -> None:
    states = [_state(i, 0.2 * i, "1110", STD["same"], 2) for i in range(3)]
    (grid,) = [
        g for g in nrs_tables.grids(_study([*records, _record(_cell("hydra+rs"), states)])) if g.title[:8] == "Table I:"
    ]
    (row,) = [dict(zip(grid.header, row)) for row in grid.rows if row[0] == "hydra+rs"]
    assert row["verified"].startswith("3/4")
    assert row["paper"] in ("", "–")


def test_radii_are_columns_of_table_two(records: list[Record]) -> None:
    def at(name: str, eps: float) -> Record:
        data = Data("cifar10")
        states = [_state(i, 0.2 * i, "1110", STD["same"], 2) for i in range(3)]
        return _record(_cell(name, eps=eps, data=data), states)

    found = [at(name, eps) for eps in (2 / 255, 8 / 255) for name in ("imp", "imp+nrs")]
    grids = {g.title.split(":")[0]: g for g in nrs_tables.grids(_study(found))}
    two = grids["Table II"]
    assert two.header == ("row", "ε = 2/255", "ε = 8/255")
    assert "paper: remains 1 · std 54.1 · verified 43.0" in two.rows[0][1]
    assert "paper: remains 0.13 · std 35.0 · verified 29.8" in two.rows[1][2]
    assert "paper: remains 0.51 · std 39.0 · verified 31.5" in two.rows[2][2]
    assert "Table II" not in {g.title.split(":")[0] for g in nrs_tables.grids(_study(found[:2]))}


def test_table_six(records: list[Record]) -> None:
    found = []
    for name in ("lwm", "hydra-once"):
        for kept in (0.1, 0.01):
            made = nrs.once(name, (kept,), 2, 5)
            cell = _cell(pruning=Pruning(made.method, made.ratios[0], made.settings), data=Data("svhn"),
                         network=Network("cnn_large"), eps=0.007)  # fmt: skip
            states = [_state(i, 0.0, "1110", STD["same"], 2) for i in range(2)]
            found.append(_record(cell, states))
    grids = {g.title.split(":")[0]: g for g in nrs_tables.grids(_study(found))}
    rows = [dict(zip(grids["Table VI"].header, row)) for row in grids["Table VI"].rows]
    assert [(r["row"], r["remains"], r["paper: CROWN-IBP %"]) for r in rows] == [
        ("dense", "1", "48.99"),
        ("lwm", "0.1", "49.48"),
        ("hydra-once", "0.1", "48.60"),
        ("lwm", "0.01", "47.47"),
        ("hydra-once", "0.01", "44.14"),
    ]
    assert "Table I" not in grids


def test_the_leaderboard_sees_every_state_and_dense_once(records: list[Record]) -> None:
    unfolded = nrs_records.unfold([*records, make_record(make_cell(), "11")])
    cells = [from_dict(record["cell"]) for record in unfolded]
    dense = [c for c in cells if c.pruning.method == "dense" and c.training.objective == "crown-ibp"]
    assert sorted(c.seed for c in dense) == [0, 1]
    assert len(unfolded) == 7 * 3 + 1 - 1  # the fine-tune's dense state is IMP's
    tables = build(unfolded)
    rows = {(r.method, round(r.ratio, 2), r.training): r for r in tables[0].rows}
    assert rows["imp", 0.2, "crown-ibp 0.1"].versus_dense_difference == pytest.approx(0.25)
    assert rows["imp", 0.36, "crown-ibp 0.1"].note == "constant predictor in 2 of 2 seeds"
    assert ("imp+nrs", 0.0, "crown-ibp 0.1") in rows
    assert rows["dense", 0.0, "crown-ibp 0.1"].images == 4
    failed = {**make_record(_cell(), "1"), "status": "failed", "error": {"type": "E", "message": "m"}}
    assert nrs_records.unfold([failed]) == [failed]
    assert nrs_lines.studies([failed]) == []


def test_report_writes_tables_and_all_figures(records: list[Record], tmp_path: Path) -> None:
    from rich.console import Console

    console = Console(width=220, file=io.StringIO())
    written = nrs_report.show(records, tmp_path, ("md", "csv", "html"), console)
    assert {path.name for path in written} == {"nrs.md", "nrs.csv", "nrs.html"} | {
        f"nrs-figure{k}.png" for k in (2, 4, 6, 7, 8, 9, 10)
    }
    page = (tmp_path / "nrs.html").read_text()
    assert page.count("data:image/png;base64,") == 7
    assert "http://" not in page
    assert "https://" not in page
    text = (tmp_path / "nrs.md").read_text()
    for heading in ("Table I:", "Table IV:", "Table V:", "Every state: imp", "Removed before", "What it took"):
        assert heading in text
    rows = list(csv.DictReader(io.StringIO((tmp_path / "nrs.csv").read_text())))
    assert len(rows) == 7 * 3
    row = next(r for r in rows if (r["row"], r["seed"], r["step"]) == ("imp", "1", "1"))
    assert (row["verified"], row["images"], row["std"], row["chosen"]) == ("2", "4", "6", "True")
    assert float(row["instability_mean"]) == pytest.approx(0.4)
    assert nrs_report.show([make_record(make_cell(), "11")], tmp_path / "none", ("md",), console) == []
    assert not (tmp_path / "none").exists()


def test_penalties_of_figure_two() -> None:
    # Most unstable, and of a channel without importance: 1; stable: -1. At gamma = 1 the two penalties are one.
    assert nrs_figures.penalty(-4.0, 0.2) == pytest.approx(1.0)
    assert nrs_figures.penalty(2.0, 0.2) == pytest.approx(-1.0)
    assert nrs_figures.penalty(-1.0, 1.0) == 0.0
    assert nrs_figures.penalty(-4.0, 2.0) == pytest.approx(0.0)
    assert nrs_figures.penalties().startswith(b"\x89PNG")


def test_one_seed_or_one_row_leaves_figures_out(records: list[Record]) -> None:
    study = _study(records[2:3])
    assert nrs_figures.seeds(study) is None
    assert nrs_figures.consumption(study) is None
    assert nrs_figures.rewinding(study) is None
    assert nrs_figures.against_steps(study) is not None


def test_other_data_networks_or_verifiers_are_other_studies(records: list[Record]) -> None:
    cell = _cell("imp", network=Network("cnn7_nrs"))
    states = [_state(i, 0.0, "1111", STD["same"], 1) for i in range(3)]
    assert [len(s.lines) for s in nrs_lines.studies([*records, _record(cell, states)])] == [6, 1]
    whole = dataclasses.replace(cell, verifier=Verifier("auto", images=4, settings=settings(test_images=0)))
    assert execute.test_images(whole) is None
    assert execute.test_images(make_cell(images=7)) == 7
    assert isinstance(nrs_states.method(cell), Iterative)
