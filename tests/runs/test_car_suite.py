from __future__ import annotations

import csv
import dataclasses
import io
from pathlib import Path
from typing import Any

import pytest

from methods.car import CARConfig, preset
from methods.training.pgd import PGD
from methods.training.trades import TRADES
from runs import car_figures, car_lines, car_methods, car_report, car_tables, paper
from runs.cell import Cell, Data, Network, Perturb, Pruning, Training, from_dict, settings
from runs.claims.catalogue import CLAIMS
from runs.claims.claim import evaluate
from runs.claims.observation import observations
from runs.claims.scope import Sampled, edited
from runs.configure import build_config
from runs.statistics import clopper_pearson
from runs.store import Record
from runs.suites import Selection, car, plan, preset_names, variants
from tests.runs.handmade import make_record

SUN = Perturb("sun", 1.0)
N = 20


def _cells(name: str, **selection: Any) -> tuple[Cell, ...]:
    chosen = car.PRESETS[name]()
    names = tuple(dict.fromkeys(block.data.name for block in chosen.blocks))
    return plan("car", name, Selection(datasets=names, **selection)).cells


# --- the plan -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", preset_names("car"))
def test_every_cell_is_a_row_with_a_configuration(name: str) -> None:
    cells = _cells(name)
    assert len({cell.key for cell in cells}) == len(cells)
    for cell in {cell.training_key: cell for cell in cells}.values():
        row = car.row(cell)
        assert row is not None
        assert row.replace(" ", ":") in variants("car")
        config = build_config(cell)
        assert config.epochs == cell.training.epochs
        assert from_dict(cell.to_dict()) == cell
        assert row == "car" or not row.startswith("car") or cell.data.edited > 0


def test_quick_is_what_it_says() -> None:
    made = plan("car", "quick", Selection())
    assert made.seconds() <= 30 * 60
    assert {car.row(cell) for cell in made.cells} == set(car.ROWS)
    assert {cell.pruning.ratio for cell in made.cells} == {0.0, 0.5, 0.7}
    own = dict(made.cells[0].verifier.settings)
    assert (own["eps"], own["confidence"], own["n"]) == (1e-2, 0.95, 299)
    assert plan("car", "smoke", Selection()).seconds() <= 90


def test_studies_share_the_networks_of_quick() -> None:
    quick = set(_cells("quick"))
    for study in ("ablation", "initialisation", "noise", "sparsity", "augmentation"):
        assert quick & set(_cells(study)), study


def test_there_is_no_car_without_edits_and_claims_find_their_variants() -> None:
    rows = {(car.row(cell), cell.data.edited) for cell in _cells("augmentation")}
    assert ("vanilla", 0) in rows
    assert ("car", 0) not in rows
    labels = {cell.pruning.label for name in ("ablation", "initialisation", "noise") for cell in _cells(name)}
    assert {f"car {name}" for name in (*car.ABLATIONS, *car.INITIALISATIONS, *car.NOISES)} <= labels


def test_rows_are_the_presets_of_the_paper() -> None:
    """At the paper's lengths the cells build the configurations that `methods.car.presets` names."""
    flowers = [cell for cell in _cells("paper") if cell.data.name == "flowers102" and cell.data.edited == 1_000]
    by_row = {(car.row(cell), cell.pruning.ratio): build_config(cell) for cell in flowers}
    for (row, ratio), config in by_row.items():
        expected = preset(row, ratio or 0.5, 2.0).config  # type: ignore[arg-type]
        assert config == dataclasses.replace(expected, ratio=ratio), row
    assert isinstance(by_row["advtrain", 0.0].training.objective, PGD)
    assert isinstance(by_row["hydra", 0.5].training.objective, TRADES)


def test_variants_change_one_field_each() -> None:
    plain = car_methods.fields("car", {"mask_epochs": 3})
    assert plain == {"mask_epochs": 3}
    assert car_methods.fields("car", {"variant": "no_stab"}) == {"lambda_stab": 0.0}
    assert car_methods.fields("car", {"variant": "tau=0(full-scaled)"}) == {"init": "full"}
    assert car_methods.fields("car", {"mask_lr": 1e-2})["mask_training"].lr == 1e-2
    assert car_methods.fields("magnitude", {"scope": "layer"}) == {"scope": "layer"}
    for name in (*car.ABLATIONS, *car.INITIALISATIONS, *car.NOISES, "ce"):
        assert CARConfig(**car_methods.fields("car", {"variant": name})) != CARConfig()
    with pytest.raises(ValueError, match=r"unknown variant of car .no_stap.\. Did you mean no_stab"):
        car_methods.fields("car", {"variant": "no_stap"})


# --- records made by hand -------------------------------------------------------------------------------------------
def _cell(row: str, ratio: float = 0.0, seed: int = 0, edits: int = 500, network: str = "resnet18") -> Cell:
    method, objective = {
        "vanilla": ("dense", "natural"),
        "advtrain": ("dense", "pgd"),
        "lmp": ("magnitude", "natural"),
        "lmp:longer": ("magnitude", "natural"),
        "hydra": ("hydra", "trades"),
    }.get(row, ("car", "natural"))
    own = settings(variant=row.partition(":")[2]) if ":" in row else ()
    data = settings(image_size=64, edits="sun:1", edited=edits) if edits else settings(image_size=64)
    return Cell(
        Pruning(method, ratio, own),
        Training(objective, 2, eps=None if objective == "natural" else 1.0),
        Network(network),
        Data("scenes_flowers", settings=data),
        (SUN,),
        dataclasses.replace(car.QUICK_VERIFIER, images=N),
        seed,
    )


def _record(cell: Cell, passed: int, paper_passed: int, accuracy: int = 30) -> Record:
    bits = "1" * passed + "0" * (N - passed)
    record = make_record(cell, bits)
    said = {
        "eps": 1e-2, "confidence": 0.95, "joint": None, "bound": "clopper-pearson", "valid": True, "why": "exact",
        "law": "flowers sun", "population": "distribution", "outputs": "logits", "seed": 0, "batch": 256, "n_max": 299,
        "fingerprint": "ab" * 32, "generator": "cd" * 32,
    }  # fmt: skip
    record["results"][0] |= {
        "unstable": None,
        "clean_bits": "1" * N,
        "draws": 299 * N,
        "truly": max(0, passed - 3),
        "certificate": said,
        "paper": {
            "bits": "1" * paper_passed + "0" * (N - paper_passed),
            "certified": paper_passed,
            "certificate": {**said, "bound": "cccert", "valid": False, "confidence": 0.951, "n_max": 300},
        },
    }
    record["training"] = {"collapsed": False}
    record["mask"] = {"density": 1 - cell.pruning.ratio}
    record["accuracy"] = {"bits": "1" * accuracy + "0" * (40 - accuracy), "images": 40, "right": accuracy}
    histogram = {"reach": 1.0, "counts": [1, 2, 1], "kept": 4, "total": 8, "near_zero": 0.5}
    record["weights"] = {"conv.weight": histogram, "fc.weight": histogram, "all": histogram}
    record["landscape"] = {
        "axis": [-0.5, 0.0, 0.5],
        "loss": [[1.0, 2.0, None]] * 3,
        "flat": 0.3,
        "images": 8,
        "seed": 0,
    }
    return record


def _records() -> list[Record]:
    found = [
        _record(_cell("vanilla"), 12, 10),
        _record(_cell("advtrain"), 4, 2, 12),
        _record(_cell("lmp", 0.5), 10, 8),
        _record(_cell("lmp", 0.7), 8, 5),
        _record(_cell("hydra", 0.5), 9, 9),
        _record(_cell("car", 0.5), 16, 11),
        _record(_cell("car", 0.7), 8, 5),
        _record(_cell("car:no_stab", 0.5), 6, 5),
        _record(_cell("car:tau=50", 0.5), 16, 5),
    ]
    for record in found:
        if record["cell"]["pruning"]["method"] == "car":
            record["training"] |= {"before": {"score": 0.5}, "after": {"score": 0.75}, "density_all": 0.51}
    return found


def test_lines_keep_edits_networks_and_seeds_apart() -> None:
    records = [*_records(), _record(_cell("car", 0.5, seed=1), 12, 12), _record(_cell("car", 0.5, edits=2_000), 3, 3)]
    (study,) = car_lines.studies(records)
    line = study.find("car", 0.5, 500, "resnet18")
    assert line is not None
    assert len(line.entries) == 2
    assert line.share(car_lines.valid) == pytest.approx(14 / N)
    assert line.interval(car_lines.valid) == clopper_pearson(14, N)
    assert study.find("car", 0.5, 2_000, "resnet18") is not None
    assert study.find("car", 0.6, 500, "resnet18") is None
    assert [line.row for line in study.lines[:2]] == ["vanilla", "advtrain"]


def test_records_of_other_suites_are_passed_over() -> None:
    record = make_record(
        dataclasses.replace(_cell("vanilla"), verifier=dataclasses.replace(car.QUICK_VERIFIER)), "1" * 4
    )
    assert not car_lines.applies(record)  # no accuracy: certified by sampling in another suite
    assert car_lines.studies([record, {**record, "status": "failed"}]) == []


def test_table_one_has_both_shares_with_intervals_beside_the_printed_ones() -> None:
    (study,) = car_lines.studies(_records())
    grids = {grid.title.partition(" ·")[0]: grid for grid in car_tables.grids(study)}
    table = next(grid for title, grid in grids.items() if title.startswith("Table 1"))
    row = next(row for row in table.rows if row[0] == "car" and row[2] == "50")
    low, high = clopper_pearson(16, N).low, clopper_pearson(16, N).high
    assert row[7] == f"80.0 [{100 * low:.1f}, {100 * high:.1f}]"
    assert row[6].startswith("55.0 [")
    assert row[5].startswith("75.0 [")
    assert row[8] == "65.0"
    assert row[9:] == ("96.45 / 88", "82.30 / 74")
    assert "NOT VALID" in table.header[6]
    assert "299" in table.header[7]
    assert any(title.startswith("Table 3") for title in grids)
    assert any(title.startswith("Table 4") for title in grids)
    assert not any(title.startswith(("Table 2", "Table 5")) for title in grids)
    certificates = next(grid for title, grid in grids.items() if title.startswith("What the certificates"))
    stated = {row[0]: row[1] for row in certificates.rows}
    assert stated["population"] == "distribution"
    assert stated["generator"] == "cd" * 32
    before = next(grid for title, grid in grids.items() if title.startswith("CAR's masks"))
    assert before.rows[0][3:] == ("50.0", "75.0", "50.00", "51.00")


def test_ablations_stand_against_car_with_mcnemars_test() -> None:
    from scipy.stats import binomtest

    (study,) = car_lines.studies(_records())
    first, second = (study.find(row, 0.5, 500, "resnet18") for row in ("car no_stab", "car"))
    assert first is not None
    assert second is not None
    found = car_lines.paired(first, second, car_lines.valid)
    assert found is not None
    assert found[0] == pytest.approx(-0.5)
    assert (found[1].wins, found[1].losses) == (0, 10)
    assert found[1].p == pytest.approx(binomtest(0, 10, 0.5).pvalue)
    other = car_lines.Line(
        "car", 0.5, 500, "resnet18", (dataclasses.replace(second.entries[0], cell=_cell("car", 0.5, 9)),)
    )
    assert car_lines.paired(first, other, car_lines.valid) is None  # no seed in common


def test_the_control_is_a_row_of_its_own_and_no_evidence_for_a_claim() -> None:
    records = [*_records(), _record(_cell("lmp:longer", 0.5), 18, 18)]
    (study,) = car_lines.studies(records)
    assert study.find("lmp longer", 0.5, 500, "resnet18") is not None
    table, tests = (
        next(grid for grid in car_tables.grids(study) if grid.title.startswith(title))
        for title in ("Table 1", "Paired")
    )
    assert any(row[0] == "lmp longer" and row[9:] == ("–", "–") for row in table.rows)
    assert any("CAR's masks are trained for epochs" in note for note in table.notes)
    assert any(row[0] == "car 0.5 – lmp longer 0.5" and row[3] == "valid" for row in tests.rows)
    claim = next(claim for claim in CLAIMS if claim.id == "CAR-3")
    assert claim.question.ask(observations(records)) == claim.question.ask(observations(_records()))
    cells = [cell for cell in _cells("ablation") if car.row(cell) in ("lmp longer", "car")]
    control, masks = (build_config(cell) for cell in sorted(cells, key=lambda cell: car.row(cell) != "lmp longer"))
    assert control.finetune_epochs == masks.mask_epochs + masks.finetune_epochs


def test_car_stands_against_lmp_and_hydra_at_its_own_sparsity() -> None:
    from scipy.stats import binomtest

    (study,) = car_lines.studies([*_records(), _record(_cell("lmp:longer", 0.7), 19, 18)])
    (table,) = (grid for grid in car_tables.grids(study) if grid.title.startswith("CAR against LMP and HYDRA"))
    found = {row[0]: row for row in table.rows if "50.00" in row[3]}
    assert set(found) == {"car – lmp", "car – hydra"}
    assert found["car – hydra"][3:8] == ("50.00 / 50.00", "80.0 / 45.0", "+35.0", "7", "0")
    raw = binomtest(0, 7, 0.5).pvalue
    assert float(found["car – hydra"][8]) == pytest.approx(raw, rel=0.1)
    assert float(found["car – lmp"][8]) == pytest.approx(binomtest(0, 6, 0.5).pvalue, rel=0.1)
    assert float(found["car – hydra"][9]) == pytest.approx(3 * raw, rel=0.1)  # Holm: second of four
    assert found["car – hydra"][10] == "CAR ahead"
    others = {row[0]: row for row in table.rows if "30.00 / 30.00" in row[3]}
    assert others["car – lmp"][10] == "not told apart"
    assert others["car – lmp longer"][5:8] == ("-55.0", "0", "11")
    assert others["car – lmp longer"][10] == "CAR behind"
    assert "CAR's masks are trained for epochs" in table.notes[1]
    (vanilla,) = car_lines.studies([_record(_cell("vanilla"), 3, 3)])
    assert not any(grid.title.startswith("CAR against") for grid in car_tables.grids(vanilla))


def test_networks_stand_side_by_side_in_table_two() -> None:
    records = [_record(_cell(row, ratio, network=net), 9, 9) for net in ("resnet18", "mobilenetv2")
               for row, ratio in (("vanilla", 0.0), ("lmp", 0.5), ("car", 0.5))]  # fmt: skip
    (study,) = car_lines.studies(records)
    table = next(grid for grid in car_tables.grids(study) if grid.title.startswith("Table 2"))
    assert len(table.rows) == 6
    printed = {(row[0], row[1]): row[-1] for row in table.rows}
    assert printed["mobilenetv2", "car"] == "67.98 / 44"
    assert printed["resnet18", "lmp"] == "82.47 / 54"


def test_every_printed_row_has_a_place() -> None:
    known = {*car_tables.PRINTED_NAMES.values()}
    rows = paper.rows("car.csv")
    assert {row["method"] for row in rows} <= known
    variants_printed = {row["variant"] for row in rows if row["table"] in "345"}
    ours = {*car.ABLATIONS, *car.INITIALISATIONS, *car.NOISES, "full", "tau=30", "delta=0.5", "eta=1.0"}
    assert variants_printed == ours


def test_csv_has_every_bit_and_report_writes_figures(tmp_path: Path) -> None:
    found = car_lines.studies(_records())
    rows = list(csv.DictReader(io.StringIO(car_tables.as_csv(found))))
    assert len(rows) == 9
    own = next(row for row in rows if row["method"] == "car" and row["ratio"] == "0.5")
    assert own["valid_bits"].count("1") == 16
    assert float(own["paper_pca"]) == pytest.approx(11 / N)
    written = car_report.export(found, tmp_path, ("md", "csv", "html"))
    names = {path.name for path in written}
    assert {"car.md", "car.csv", "car.html", "car-figure1c.png", "car-figure2.png", "car-figure3.png"} == names
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in written if path.suffix == ".png")
    assert "NOT VALID" in (tmp_path / "car.md").read_text()


def test_figures_need_something_to_show() -> None:
    (study,) = car_lines.studies([_record(_cell("vanilla"), 3, 3)])
    assert car_figures.against_ratio(study) is None
    assert car_figures.distributions(study) is None
    assert car_figures.landscapes(study) is not None
    assert car_figures.setting(study) == (500, "resnet18")


# --- claims ---------------------------------------------------------------------------------------------------------
def test_claims_compare_rows_across_trainings_by_sampled_certificates_alone() -> None:
    claims = {claim.id: claim for claim in CLAIMS}
    found = observations(_records())
    answered = [claim.id for claim in CLAIMS if claim.question.ask(found) is not None]
    assert {f"CAR-{k}" for k in (1, 2, 3, 4, 5, 6, 7, 9, 11)} <= set(answered)
    beaten = claims["CAR-4"].question.ask(found)  # against HYDRA, which is trained otherwise
    assert beaten is not None
    assert beaten.difference == pytest.approx((16 - 9) / N)
    adversarial = claims["CAR-6"].question.ask(found)
    assert adversarial is not None
    assert adversarial.difference == pytest.approx((12 - 4) / N)
    assert claims["CAR-9"].question.ask(found) is not None
    assert claims["CAR-11"].question.ask(found) is not None
    exact = dataclasses.replace(
        _cell("car", 0.5), verifier=dataclasses.replace(car.QUICK_VERIFIER, method="line", settings=())
    )
    assert claims["CAR-4"].question.ask(observations([make_record(exact, "1" * N)])) is None


def test_sampled_certificates_answer_no_claim_of_the_other_papers() -> None:
    answers = evaluate(CLAIMS, _records())
    assert {answer.claim.paper for answer in answers if answer.evidence is not None} == {paper.CAR}


def test_more_edits_are_compared_within_a_row() -> None:
    from runs.claims.questions import Verifies

    question = Sampled(Verifies(edited(2_000), edited(500)), edits_differ=True)
    records = [
        _record(_cell("lmp", 0.5, edits=2_000), 12, 5),
        _record(_cell("lmp", 0.5), 10, 8),
        _record(_cell("hydra", 0.5), 1, 1),
    ]
    evidence = question.ask(observations(records))
    assert evidence is not None
    assert evidence.pairs == 1
    assert evidence.difference == pytest.approx(2 / N)
