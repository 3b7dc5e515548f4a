from __future__ import annotations

import csv
import dataclasses
import io
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import certify
from runs import deviations, grids, shifts, usn_figures, usn_report, usn_studies, usn_tables
from runs.cell import Cell, Data, Network, Perturb, Pruning, Training, Verifier, from_dict, settings
from runs.configure import build_config, total_epochs
from runs.engine import SerialEngine
from runs.execute import Execute, remarks
from runs.leaderboard import build
from runs.measure import perturbation
from runs.progress import Silent
from runs.store import DONE, Record, Store
from runs.suites import Selection, plan, usn, variants
from tests.runs.handmade import make_cell, make_record

B2, C5 = Perturb("brightness", 2 / 255), Perturb("contrast", 0.05)
DEVIATION = Verifier("deviation", images=4, settings=settings(crown_images=2))


# --- the plan -------------------------------------------------------------------------------------------------------
def test_every_variant_has_settings_that_name_it_again() -> None:
    for name in usn.VARIANTS:
        made = usn.rule(name, (0.2,), 2.6, settings(m=2))
        assert made.variant == name
        assert usn.variant(Pruning("usn", made.ratios[0], made.settings)) == name
        assert Pruning("usn", made.ratios[0], made.settings).label == name


def test_other_weights_are_spelled_out() -> None:
    assert usn.variant(Pruning("usn", 0.1, settings(lambda_w=1.0))) == "usn λ_W=1"
    grown = settings(lambda_w=10.0, lambda_w_ramp="progressive")
    assert usn.variant(Pruning("usn", 0.1, grown)) == "usn λ_W=10 progressive"
    stronger = settings(lambda_w=10.0, lambda_u=0.1, lambda_s=0.1)
    assert usn.variant(Pruning("usn", 0.2, stronger)) == "usn λ_u=0.1"
    assert usn.variant(Pruning("usn", 0.0, stronger)) == "none λ_u=0.1"
    bare = settings(lambda_u=0.0, lambda_s=0.0, lambda_w=0.0, prune="random")
    assert usn.variant(Pruning("usn", 0.1, bare)) == "random without USN losses"
    chosen = settings(lambda_u=0.0, lambda_s=0.0, lambda_w=0.0, prune="high")
    assert usn.variant(Pruning("usn", 0.1, chosen)) == "usn without USN losses"
    assert Pruning("magnitude", 0.5).label == "magnitude"


def test_gpu_holds_every_variant_at_the_papers_ratios_on_every_network_and_head() -> None:
    cells = plan("usn", "gpu", Selection()).cells
    found = {(c.network.label, c.pruning.label, c.pruning.ratio) for c in cells}
    for network in ("cnn7_cw", "cnn7_nrs", "resnet18"):
        for name in usn.VARIANTS:
            ratios = (0.0,) if name in ("vanilla", "augmented", "none") else (0.1, 0.2, 0.3)
            assert {(network, name, ratio) for ratio in ratios} <= found
    assert ("cnn7_cw dsnt", "usn", 0.2) in found
    seeds = Counter(c.pruning.label for c in cells if c.network.label == "cnn7_cw" and c.pruning.ratio in (0.0, 0.2))
    assert seeds["random"] == 5
    assert seeds["usn"] == seeds["none"] == 3
    assert {p.kind for c in cells for p in c.perturbations} == {"brightness", "contrast", "joint", "rotation"}


def test_quick_fits_half_an_hour_and_smoke_a_minute() -> None:
    made = plan("usn", "quick", Selection())
    assert made.seconds() <= 30 * 60
    assert {c.network.name for c in made.cells} == {"cnn7_cw", "cnn7_nrs"}
    assert sum(c.pruning.label == "random" for c in made.cells) == 3
    assert all(c.perturbations == tuple(sorted(usn.PAPER_PERTURBATIONS, key=lambda p: (p.kind, p.magnitude)))
               for c in made.cells)  # fmt: skip
    given = [dict(c.pruning.settings) for c in made.cells]
    assert all(g["m"] == 2 and g["metric_fraction"] == 0.25 for g in given)
    assert all(g["task_on"] == "clean" for g in given)  # every variant learns the task from the same images
    assert len({(c.training, c.data) for c in made.cells}) == 1
    assert plan("usn", "smoke", Selection()).seconds() <= 60


@pytest.mark.parametrize("preset", list(usn.PRESETS))
def test_every_cell_is_a_configuration_and_comes_back_from_its_record(preset: str) -> None:
    for cell in {(c.pruning, c.training): c for c in plan("usn", preset, Selection()).cells}.values():
        config = build_config(cell)
        assert config.ratio == cell.pruning.ratio
        assert total_epochs(config) == cell.training.epochs
        assert from_dict(cell.to_dict()) == cell


def test_studies_under_other_perturbations_share_the_networks_of_quick() -> None:
    trained = {c.training_key for c in plan("usn", "quick", Selection()).cells}
    for preset in ("joint", "geometric", "incomplete"):
        cells = plan("usn", preset, Selection()).cells
        assert {c.training_key for c in cells} <= trained
        assert {c.pruning.label for c in cells} == {"vanilla", "none", "usn", "random"}


def test_variants_can_be_asked_for_by_name() -> None:
    assert variants("usn") == usn.VARIANTS
    assert "usn-w0" not in variants("arena")  # other suites have names of their own, or none
    made = plan("usn", "quick", Selection(methods=("random", "vanilla"), models=("cnn7_cw",)))
    assert {c.pruning.label for c in made.cells} == {"random", "vanilla"}
    alone = plan("usn", "quick", Selection(methods=("usn",)))  # the rule, not every rule of the method
    assert {c.pruning.label for c in alone.cells} == {"usn"}
    with pytest.raises(ValueError, match=r"unknown method on aircraft 'randon'\. Did you mean random or"):
        plan("usn", "quick", Selection(methods=("randon",)))


def test_named_perturbations_become_those_of_certify() -> None:
    joint = perturbation(Perturb("joint", 1 / 255))
    assert isinstance(joint, certify.BrightnessContrast)
    assert joint.eps_contrast == pytest.approx(0.01)  # 1/255 goes with 0.01, as the paper trains
    assert isinstance(perturbation(Perturb("rotation", 2.0)), certify.Rotation)
    assert isinstance(perturbation(Perturb("scale", 0.1)), certify.Scale)
    assert isinstance(perturbation(Perturb("saturation", 0.1)), certify.Saturation)
    cell = plan("usn", "hue", Selection(methods=("usn",))).cells[0]
    assert isinstance(build_config(cell).perturbation, certify.Hue)
    assert build_config(cell).perturbation.eps == 0.02


def test_settings_of_the_verifier_change_the_key_and_their_absence_does_not() -> None:
    plain = make_cell()
    assert "settings" not in plain.to_dict()["verifier"]
    own = dataclasses.replace(plain, verifier=dataclasses.replace(plain.verifier, settings=settings(crown_images=3)))
    assert own.key != plain.key
    assert own.training_key == plain.training_key
    assert deviations.crown_images(from_dict(own.to_dict()).verifier) == 3


# --- moved batches
def test_targets_move_with_their_images() -> None:
    x = torch.zeros(40, 1, 9, 12)
    y = torch.stack([torch.randint(3, 9, (40,)), torch.randint(3, 6, (40,))], 1).float()
    for i, (column, row) in enumerate(y.long().tolist()):
        x[i, 0, row, column] = 1.0
    moves = torch.randint(-3, 4, (40, 2), generator=torch.Generator().manual_seed(0))
    images, points = shifts.move(x, torch.cat([y, y], 1), moves, 3)
    assert images.shape == x.shape
    assert images.is_contiguous(memory_format=torch.channels_last)
    for i, (column, row) in enumerate(points[:, :2].long().tolist()):
        assert images[i, 0, row, column] == 1.0
        assert images[i].sum() == 1.0
    assert torch.equal(points[:, :2], points[:, 2:])
    ramp = torch.arange(5.0).expand(1, 1, 5, 5)
    right, _ = shifts.move(ramp, torch.zeros(1, 2), torch.tensor([[2, 0]]), 2)
    assert right[0, 0, 0].tolist() == [0.0, 0.0, 0.0, 1.0, 2.0]  # the border is repeated


def test_moves_are_a_function_of_seed_and_epoch() -> None:
    class Plain(list[tuple[Tensor, Tensor]]):
        epoch = -1

        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch

    x = torch.rand(6, 1, 16, 16)
    inner = Plain([(x[:4], torch.zeros(4, 2)), (x[4:], torch.zeros(2, 2))])

    def passed(seed: int, epoch: int) -> Tensor:
        batches = shifts.Shifted(inner, seed)
        batches.set_epoch(epoch)
        assert inner.epoch == epoch
        assert len(batches) == 2
        return torch.cat([y for _, y in batches])

    assert torch.equal(passed(0, 3), passed(0, 3))
    assert not torch.equal(passed(0, 3), passed(0, 4))
    assert not torch.equal(passed(0, 3), passed(1, 3))
    assert passed(0, 0).abs().max() <= shifts.PIXELS
    with pytest.raises(ValueError, match="must be >= 0"):
        shifts.Shifted(inner, 0, -1)


# --- the certifier --------------------------------------------------------------------------------------------------
class Gain(nn.Module):
    """Keypoint k has both coordinates at ``gains[k] * mean(x)``, through a ReLU: its move is known in closed form."""

    def __init__(self, gains: tuple[float, ...]) -> None:
        super().__init__()
        self.mix = nn.Linear(12, 2 * len(gains))
        with torch.no_grad():
            self.mix.weight.copy_(torch.tensor(gains).repeat_interleave(2).unsqueeze(1).expand(-1, 12) / 12)
            self.mix.bias.fill_(1.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(x.flatten(1)).relu()


@pytest.fixture
def images() -> Tensor:
    return 0.3 + 0.4 * torch.rand(3, 3, 2, 2, generator=torch.Generator().manual_seed(0))


def test_rows_agree_with_the_closed_form(images: Tensor) -> None:
    model = Gain((1.0, 4.0, 20.0)).eval()
    p = certify.Brightness(0.1)  # the keypoints move by exactly 0.1, 0.4 and 2 px
    truth = model(images).detach()
    truth[:, 0] += 1.5  # keypoint 0 is 1.5 px off in one coordinate
    visible = torch.tensor([[1, 1, 0]]).expand(3, -1)
    verifier = Verifier("deviation", images=3, settings=settings(crown_images=2))
    rows = deviations.verdicts(model, images, truth, visible, p, verifier, start=0)
    for i, row in enumerate(rows):
        assert row["index"] == i
        assert row["status"] == "violated"
        assert row["deviation_low"] == pytest.approx(2.0, abs=2e-3)
        assert row["deviation_high"] == pytest.approx(2.0, abs=2e-3)
        assert abs(row["deviation_at"][0]) == pytest.approx(0.1, abs=1e-3)
        assert row["verified_keypoints"] == "110"
        assert row["correct"] == {"1": "011", "2": "111", "4": "111"}
        assert row["clean"] == pytest.approx(0.5, abs=1e-5)  # (1.5 + 0 + 0) / 3
        # Linear over the range: bounds without branching are exact, but for IBP they need not be.
        assert row["single_shot"]["forward"] == pytest.approx(2.0, abs=1e-3)
        assert row["single_shot"]["ibp"] >= 2.0 - 1e-4
        assert (row["single_shot"]["crown"] is None) == (i == 2)
    summary = deviations.summarise(rows, 1.0)
    assert summary["verdicts"]["1"] == {"holds": 0, "violated": 3, "unknown": 0, "timeout": 0}
    assert summary["single_shot"]["crown"]["images"] == 2
    seen, hidden = summary["keypoints"]["visible"], summary["keypoints"]["occluded"]
    assert (seen["total"], seen["verified"], seen["correct"]["1"]) == ([2] * 3, [2] * 3, [1] * 3)
    assert (hidden["total"], hidden["verified"], hidden["correct_and_verified"]["4"]) == ([1] * 3, [0] * 3, [0] * 3)


@pytest.mark.parametrize("gain", [0.5, 3.0, 6.0, 40.0])
def test_verdicts_at_every_delta_follow_from_the_largest_deviation(images: Tensor, gain: float) -> None:
    model = Gain((gain,)).eval()
    p = certify.Brightness(0.1)
    rows = deviations.verdicts(model, images, model(images).detach(), None, p, DEVIATION, start=0)
    for delta in deviations.DELTAS:
        wanted = "holds" if 0.1 * gain < delta else "violated"
        assert {deviations.verdict(row, delta) for row in rows} == {wanted}
        cert = certify.verify(model, images, certify.Deviation(delta), p, method="line")
        assert cert.status.tolist() == [int(certify.Status[wanted.upper()])] * 3
    assert all(set(row["visible"]) == {"1"} for row in rows)


@pytest.mark.parametrize("asked", [usn.JOINT, Perturb("rotation", 0.5), Perturb("saturation", 0.05)])
@pytest.mark.parametrize("head", ["keypoints", "dsnt"])
def test_other_perturbations_and_heads_are_measured_alike(asked: Perturb, head: str) -> None:
    import models

    model = models.create("cnn7_cw", 4, image_size=32 if head == "dsnt" else 16, width=0.125, head=head, seed=0).eval()
    with torch.no_grad():  # so that something moves
        for parameter in model.parameters():
            parameter.mul_(1.3)
    size = 32 if head == "dsnt" else 16
    x = 0.1 + 0.8 * torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(3))
    p = perturbation(asked)
    verifier = Verifier("deviation", images=2, seconds=2.0)
    rows = deviations.verdicts(model, x, model(x).detach(), None, p, verifier, start=0)
    drawn = p.sample(x, 64, torch.Generator().manual_seed(4))
    with torch.no_grad():
        moved = (model(drawn.flatten(0, 1)).unflatten(0, (64, 2)) - model(x)).abs().amax((0, 2)).tolist()
    for row, seen in zip(rows, moved):
        assert seen > 0
        assert row["deviation_high"] is None or row["deviation_high"] >= seen - 1e-4
        assert all(bound is None or bound >= seen - 1e-4 for bound in row["single_shot"].values())
        assert row["unstable"] > 0


def test_a_timeout_leaves_the_verdict_open() -> None:
    row = {"deviation_low": 0.4, "deviation_high": None}
    assert [deviations.verdict(row, delta) for delta in (1.0, 0.5, 0.25)] == ["unknown", "unknown", "violated"]


def test_contradicting_certifiers_are_refused() -> None:
    deviations.check(0, certify.Status.HOLDS, 0.2, 0.3, 1.0)
    deviations.check(0, certify.Status.UNKNOWN, 0.2, 3.0, 1.0)
    deviations.check(0, certify.Status.VIOLATED, 1.0, 1.001, 1.0)
    with pytest.raises(deviations.Contradiction, match="image 5: the verdict at 1 px is HOLDS"):
        deviations.check(5, certify.Status.HOLDS, 1.5, 1.6, 1.0)
    with pytest.raises(deviations.Contradiction, match="is VIOLATED"):
        deviations.check(5, certify.Status.VIOLATED, 0.2, 0.3, 1.0)


def test_percentile_is_numpys() -> None:
    values = [0.3, 0.1, 0.7, 0.2, 0.9, 0.4]
    for q in (0.0, 0.5, 0.95, 1.0):
        assert deviations.percentile(values, q) == pytest.approx(float(torch.tensor(values).double().quantile(q)))


def test_remarks_keep_what_a_method_says_of_itself() -> None:
    @dataclasses.dataclass
    class Said:
        collapsed: bool = False
        notes: tuple[str, ...] = ("slower",)

    assert remarks(Said()) == {"collapsed": False, "notes": ["slower"]}
    assert remarks(object()) == {}


def test_a_cell_end_to_end_and_its_resumption(tmp_path: Path) -> None:
    own = settings(m=2, metric_fraction=0.25, lambda_w=10.0, prune="high")
    cell = Cell(
        Pruning("usn", 0.5, own),
        Training("natural", 2, 8, None, settings(lr=3e-3)),
        Network("cnn7_cw", width=0.125),
        Data("aircraft", limit=16, val_limit=8, settings=settings(image_size=16, workers=1)),
        (B2, C5),
        Verifier("deviation", images=2, seconds=5.0, settings=settings(crown_images=1)),
    )
    store = Store(tmp_path)
    work = Execute.on("cpu", threads=1, data_dir=None, store=store)
    (record,) = SerialEngine().run([cell], work, store, Silent())
    assert record["status"] == DONE, record.get("error")
    assert record["training"]["ratio"] == pytest.approx(0.5, abs=0.01)
    assert isinstance(record["training"]["collapsed"], bool)
    assert set(record["training"]["notes"]) <= {"learning rate x 0.05 on head.fc1 (wide_lr_scale)"}
    for layer in record["channels"].values():
        removed = [i for i, bit in enumerate(layer["kept"]) if bit == "0"]
        assert len(removed) == len(layer["kept"]) // 2
        assert all(layer["smooth"][i] == 0 for i in removed)
        assert min(layer["smooth"]) == 0 < max(layer["smooth"])
    for result in record["results"]:
        single = result["single_shot"]
        assert [single[name]["images"] for name in deviations.SINGLE_SHOT] == [2, 2, 2, 1]
        visible, occluded = result["keypoints"]["visible"], result["keypoints"]["occluded"]
        assert [a + b for a, b in zip(visible["total"], occluded["total"])] == [24] * 2
        # A sound bound is never below a deviation that the network was seen to make.
        for row in store.slot(cell).examples():
            seen = row["deviation_low"]
            assert all(bound is None or bound >= seen - 1e-4 for bound in row["single_shot"].values())
    # Killed after the first image under the second perturbation: the torn batch is done again, with the same verdicts.
    slot = store.slot(cell)
    slot.keep_examples(3)
    (slot.path / "record.json").unlink()
    (again,) = SerialEngine().run([cell], work, store, Silent())
    for new, old in zip(again["results"], record["results"]):
        assert new["deviation"]["low"] == old["deviation"]["low"]
        assert new["verdicts"] == old["verdicts"]
    assert again["channels"] == record["channels"]


# --- tables and figures, from records made by hand ------------------------------------------------------------------
def _row(index: int, deviation: float, correct: str) -> dict[str, Any]:
    return {
        "index": index, "clean": 2.0, "status": "holds" if deviation < 1 else "violated", "lower": 1 - deviation,
        "unstable": 10, "soundness": "real-arithmetic", "method": "line", "seconds": 0.1 * (index + 1),
        "peak_mb": None, "sub_intervals": 4, "deviation_low": deviation, "deviation_high": deviation + 5e-4,
        "deviation_at": [0.0], "deviation_seconds": 0.2, "deviation_timeout": False, "deviation_sub_intervals": 9,
        "single_shot": {"ibp": 9.0, "crown-ibp": 3.0, "forward": deviation, "crown": None},
        "visible": "110", "verified_keypoints": "111" if deviation < 1 else "101",
        "correct": {"1": "000", "2": correct, "4": "111"},
    }  # fmt: skip


def _record(variant: str, ratio: float, seed: int, moves: list[float], collapsed: bool = False) -> Record:
    own = usn.rule(variant, (ratio,), 1.0, settings(m=2)).settings
    cell = Cell(
        Pruning("usn", ratio, own), Training("natural", 5), Network("cnn7_cw"), Data("aircraft"), (B2, C5), DEVIATION,
        seed,
    )  # fmt: skip
    record = make_record(cell, "1" * len(moves), task="keypoints")
    for result, scale in zip(record["results"], (1.0, 2.0)):
        rows = [_row(i, scale * move, "110") for i, move in enumerate(moves)]
        result |= deviations.summarise(rows, 1.0) | {"clean": 2.0, "images": len(moves)}
        result["timing"]["seconds_mean"] = 0.1
    layer = {"unbiased": [1.0, 2.0, 4.0], "smooth": [1.0, 4.0, 16.0], "importance": [0.1, 0.2, 0.6], "kept": "110"}
    record["channels"] = {f"features.conv{k}.weight": dict(layer) for k in range(1, 5)}
    record["training"] = {"collapsed": collapsed}
    assert record["status"] == DONE
    return record


@pytest.fixture
def records() -> list[Record]:
    return [
        _record("vanilla", 0.0, 0, [0.4, 0.6, 0.8, 1.2]),
        _record("none", 0.0, 0, [0.3, 0.4, 0.5, 0.6]),
        _record("usn", 0.2, 0, [0.1, 0.2, 0.3, 0.4]),
        _record("usn", 0.2, 1, [0.1, 0.2, 0.3, 1.4]),
        _record("usn-w0", 0.2, 0, [0.2, 0.2, 0.2, 0.2]),
        _record("random", 0.2, 0, [0.2, 0.4, 0.6, 0.8]),
        _record("random", 0.2, 1, [0.0, 0.0, 0.0, 0.0], collapsed=True),
    ]


def _grids(records: list[Record]) -> dict[str, grids.Grid]:
    (study,) = usn_tables.studies(records)
    return {grid.title.split(":")[0].split(" ·")[0]: grid for grid in usn_tables.grids(study)}


def test_the_papers_tables_stand_beside_ours_with_counts_and_intervals(records: list[Record]) -> None:
    found = _grids(records)
    first = found["Table I"]
    assert first.header == ("ρ", "rule", "seeds", "brightness 2/255", "contrast 0.05")
    chance, guided = first.rows
    assert chance[:3] == ("0.2", "random (CONSTANT 1/2)", "2")
    # 4 and 3 of 4 hold: 3.5 on average. The paper prints 0.9870 = 152/154 for usn, 0.9805 = 151/154 for random.
    assert guided[:3] == ("0.2", "usn", "2")
    assert guided[3].startswith("3.5/4 88 % [")
    assert "paper 152/154 99 % [95, 100]" in guided[3]
    assert "paper 151/154" in chance[3]
    assert [row[:2] for row in found["Table II"].rows] == [("0", "none"), ("0", "vanilla"), ("0.2", "usn")]
    assert "paper 151/154" in found["Table II"].rows[0][3]  # 0.9805
    assert "paper" not in found["Table II"].rows[1][3]
    assert [row[1] for row in found["Table III"].rows] == ["usn-w0", "usn"]
    assert "paper 149/154" in found["Table III"].rows[0][3]  # 0.9675
    assert any("CONSTANT k/n" in note for note in first.notes)
    assert not any("CONSTANT k/n" in note for note in found["Table II"].notes)


def test_every_printed_value_is_a_count_of_154() -> None:
    asked = [(t, label, ratio) for t, label, ratio in (
        ("I", "random", 0.1), ("I", "usn", 0.3), ("II", "none", 0.0), ("III", "usn-w0", 0.1))]  # fmt: skip
    for table, label, ratio in asked:
        for p in usn.PAPER_PERTURBATIONS:
            value = usn_tables.printed(table, "cnn7_cw ×0.125", label, ratio, p)
            assert value is not None
            count = round(value * 154)
            # Four digits, rounded or cut off.
            assert math.isclose(value, count / 154, abs_tol=1e-4)
    assert usn_tables.printed("I", "cnn7_nrs", "usn", 0.1, B2) is None
    assert usn_tables.printed("I", "cnn7_cw", "snr", 0.1, B2) is None


def test_what_the_exact_verifier_adds(records: list[Record]) -> None:
    grid = _grids(records)["contrast 0.05, decided exactly"]
    rows = {(row[0], row[2]): dict(zip(grid.header, row)) for row in grid.rows}
    none = rows["none", "1"]  # moves 0.6, 0.8, 1.0, 1.2
    assert none["holds at 1 px"].startswith("2/4 50 % [")
    assert none["holds at 1 px"].endswith("(2/0/0)")
    assert none["holds at 0.5 px"] == "0/4 (4/0/0)"
    assert none["largest move px"] == "0.9000"
    assert none["95th percentile"] == "1.1700"
    assert none["ibp alone"] == "0/4"
    assert none["forward alone"] == "2/4"
    assert none["crown alone"] == "–"
    points = {row[0]: row for row in _grids(records)["Keypoints under brightness 2/255"].rows}
    assert points["vanilla"][5:] == ("100.0 %", "87.5 %", "87.5 %", "0.0 %", "100.0 %", "0.0 %")


def test_paired_comparisons_are_sign_tests_over_images(records: list[Record]) -> None:
    (study,) = usn_tables.studies(records)
    pairs = {(p.other.name, p.perturbation.label): p for p in usn_tables.paired(study)}
    assert {name for name, _ in pairs} == {"vanilla", "none", "usn-w0 0.2", "random 0.2"}
    against = pairs["vanilla", "brightness 2/255"]
    # Vanilla has one seed, so that usn's second does not count.
    assert (against.seeds, against.ours, against.theirs) == (1, pytest.approx(0.25), pytest.approx(0.75))
    assert (against.wins, against.losses) == (4, 0)
    assert against.p == pytest.approx(2 * 0.5**4)
    chance = pairs["random 0.2", "brightness 2/255"]
    # Means over two seeds: 0.1, 0.2, 0.3, 0.9 against 0.1, 0.2, 0.3, 0.4.
    assert (chance.seeds, chance.ours, chance.theirs) == (2, pytest.approx(0.375), pytest.approx(0.25))
    assert (chance.wins, chance.losses) == (0, 1)


def test_settings_of_their_own_are_compared_among_themselves_and_with_the_usual_ones(records: list[Record]) -> None:
    strong = []
    for name, ratio, moves in (("usn", 0.2, [0.1] * 4), ("random", 0.2, [0.2] * 4), ("none", 0.0, [0.1] * 4)):
        record = _record(name, ratio, 0, moves)
        record["cell"]["pruning"]["settings"] |= {"lambda_u": 1.0, "lambda_s": 1.0}
        strong.append(record)
    (study,) = usn_tables.studies([*records, *strong])
    same = {p.other.name for p in usn_tables.paired(study, "λ_u=1")}
    assert same == {"random λ_u=1 0.2", "none λ_u=1", "vanilla"}
    assert {p.other.name for p in usn_tables.paired(study)} == {"vanilla", "none", "usn-w0 0.2", "random 0.2"}
    changed = {(p.line.name, p.other.name): p for p in usn_tables.unusual(study) if p.perturbation.label[0] == "b"}
    assert set(changed) == {
        ("usn λ_u=1 0.2", "usn 0.2"), ("random λ_u=1 0.2", "random 0.2"), ("none λ_u=1", "none"),
    }  # fmt: skip
    assert changed["none λ_u=1", "none"].wins == 4
    titles = [grid.title for grid in usn_tables.grids(study)]
    assert any("USN against the others, λ_u=1, largest move" in title for title in titles)
    assert any("Settings of their own against the usual ones" in title for title in titles)


def test_other_data_epochs_or_networks_are_other_tables(records: list[Record]) -> None:
    other = dict(records[0])
    other["cell"] = from_dict(records[0]["cell"])
    other["cell"] = dataclasses.replace(other["cell"], network=Network("cnn7_nrs")).to_dict()
    assert [len(s.lines) for s in usn_tables.studies([*records, other])] == [5, 1]
    arena = make_record(make_cell(), "1111")
    assert usn_tables.studies([arena]) == []


def test_csv_and_markdown_hold_every_network(records: list[Record], tmp_path: Path) -> None:
    found = usn_tables.studies(records)
    rows = list(csv.DictReader(io.StringIO(usn_tables.as_csv(found))))
    assert len(rows) == len(records) * 2
    row = next(r for r in rows if (r["rule"], r["seed"], r["perturbation"]) == ("usn", "1", "contrast"))
    assert float(row["deviation_mean"]) == pytest.approx(1.0)
    assert (row["holds_1"], row["violated_1"], row["holds_0.25"], row["collapsed"]) == ("3", "1", "1", "False")
    assert (row["visible_total"], row["occluded_verified"]) == ("8", "4")
    (written,) = usn_report.export(found, tmp_path, ("md",))
    text = written.read_text()
    for heading in ("Table I:", "Table II:", "Table III:", "decided exactly", "out of scope"):
        assert heading in text


def test_report_writes_a_page_that_needs_nothing_else(records: list[Record], tmp_path: Path) -> None:
    from rich.console import Console

    console = Console(width=200, file=io.StringIO())
    written = usn_report.show(records, tmp_path, ("md", "csv", "html"), console)
    assert {path.name for path in written} == {
        "usn.md", "usn.csv", "usn.html", "usn-figure3.png", "usn-figure4.png", "usn-importance.png",
    }  # fmt: skip
    page = (tmp_path / "usn.html").read_text()
    assert page.count("data:image/png;base64,") == 3
    assert "http://" not in page
    assert "https://" not in page
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written if path.suffix == ".png")
    assert usn_report.show([make_record(make_cell(), "11")], tmp_path / "none", ("md",), console) == []
    assert not (tmp_path / "none").exists()


def test_figures_read_what_the_records_hold(records: list[Record]) -> None:
    assert usn_figures.layer(records[0])[0] == "features.conv4.weight"
    # Kept channels 0.1 and 0.2 of each of four layers, over their mean 0.15.
    values = usn_figures.relative(records[:1])
    assert values == pytest.approx([0.1 / 0.15, 0.2 / 0.15] * 4)
    assert usn_figures.right(records[0]["results"][0]) == [2, 2, 2, 2]
    (alone,) = usn_tables.studies(records[:1])
    assert usn_figures.channel_map(alone) is None
    assert usn_figures.importance(alone) is None


def test_leaderboard_names_variants_and_constant_predictors(records: list[Record]) -> None:
    tables = build(records)
    notes = {row.method: row.note for row in tables[0].rows}
    assert set(notes) == {"vanilla", "none", "usn", "usn-w0", "random"}
    assert notes["random"] == "constant predictor in 1 of 2 seeds"
    assert notes["usn"] == ""
    printed = {row.method: row.printed for row in tables[0].rows}
    assert printed["usn"]["source"].endswith("(rule usn, λ_W=10)")
    assert printed["random"]["source"].endswith("(rule random)")
    assert "rule" not in (printed["usn"]["reason"] or "")


# --- studies --------------------------------------------------------------------------------------------------------
def test_more_copies_scatter_less() -> None:
    import models
    from methods.usn import USNConfig

    model = models.create("cnn7_cw", 6, image_size=16, width=0.125, head="keypoints", seed=0).eval()
    x = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    config = USNConfig(ratio=0.2, epochs=5, m=2)
    rows = usn_studies.scatter(model, x, config, counts=(2, 32), repeats=12, reference=64)
    assert {row.sampling for row in rows} == {"antithetic", "iid"}
    for sampling in usn_studies.SAMPLINGS:
        few, many = (
            sum(r.variation for r in rows if (r.sampling, r.m) == (sampling, m)) for m in (2, 32)
        )  # fmt: skip
        # Independent draws: the standard deviation falls like 1 / sqrt(m), by 4 from 2 to 32.
        assert 2.0 < few / many < 8.0
    assert all(0 <= row.agreement <= 1 for row in rows)
    again = usn_studies.scatter(model, x, config, counts=(2,), repeats=12, reference=64)
    assert again[0] == rows[0]
    with pytest.raises(ValueError, match="at least two"):
        usn_studies.scatter(model, x, config, repeats=1)


def test_strip_is_a_picture(images: Tensor) -> None:
    model = Gain((1.0, 2.0)).eval()
    x = images[:1]
    png = usn_studies.strip(model, x, model(x), [("brightness", certify.Brightness(0.1), 0.1)], steps=3)
    assert png.startswith(b"\x89PNG")


def test_studies_say_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert usn_studies.main(["variance", "--results", str(tmp_path)]) == 2
    assert "USN networks on record: none" in capsys.readouterr().err
    assert usn_studies.main(["strip", "--results", str(tmp_path), "--images", "0"]) == 2
