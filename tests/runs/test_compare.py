from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from runs import compare
from runs.packages import ROOT
from runs.store import Store
from runs.suites import Selection, plan
from tests.runs.handmade import make_cell, make_failure, make_record

HEAVY = ("torch", "torchvision", "matplotlib", "timm", "scipy", "sklearn", "diffusers", "numpy")


@pytest.mark.parametrize("arguments", [["--help"], ["--list"], ["--preset", "smoke", "--dry-run"]])
def test_help_list_and_dry_run_import_nothing_heavy(arguments: list[str], tmp_path: Path) -> None:
    code = (
        "import sys, runs.compare\n"
        "try:\n    status = runs.compare.main(sys.argv[2:])\n"
        "except SystemExit as stop:\n    status = stop.code\n"
        "print('STATUS', status, sorted(set(sys.argv[1].split(',')) & set(sys.modules)))\n"
    )
    start = time.monotonic()
    run = subprocess.run(
        [sys.executable, "-c", code, ",".join(HEAVY), *arguments, "--results", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.endswith("STATUS 0 []\n")
    assert time.monotonic() - start < 20  # about half a second on an idle machine


def test_list_names_everything(capsys: pytest.CaptureFixture[str]) -> None:
    assert compare.main(["--list"]) == 0
    shown = capsys.readouterr().out
    for name in (
        "arena",
        "smoke",
        "quick",
        "imp",
        "magnitude",
        "cnn7_nrs",
        "fashion_mnist",
        "linf",
        "contrast",
        "crown",
    ):
        assert f"  {name} " in shown


def test_dry_run_prints_keys_and_costs_and_runs_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare.main(["--preset", "smoke", "--dry-run", "--results", str(tmp_path / "r")]) == 0
    shown = capsys.readouterr().out
    cells = plan("arena", "smoke", Selection()).cells
    assert all(cell.key in shown for cell in cells)
    assert f"{len(cells)} cells, 0 on record; expected" in shown
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "magnitud"], "unknown method 'magnitud'. Did you mean magnitude"),
        (["--models", "cnn7nrs"], "unknown model 'cnn7nrs'. Did you mean cnn7_nrs"),
        (["--datasets", "fashion_mnst"], "unknown data set 'fashion_mnst'. Did you mean fashion_mnist"),
        (["--perturbations", "linf:-1"], "the magnitude of linf must be >= 0"),
        (["--verifier", "crwon"], "unknown certifier 'crwon'. Did you mean crown"),
        (["--limit", "0"], "--limit must be at least 1"),
        (["--seeds", "-1"], "--seeds must be at least 0"),
        (["--export", "pdf"], "unknown export format 'pdf'; known: md, csv, json, html, svg"),
        (["--preset", "huge"], "unknown preset 'huge'"),
        (["--ratios", "1.5"], "must lie in [0, 1)"),
        (["aren"], "unknown suite 'aren'"),
    ],
)
def test_wrong_usage_is_explained(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare.main([*arguments, "--dry-run"]) == 2
    assert message in capsys.readouterr().err.replace("\n", " ")


@pytest.mark.parametrize("dry", [["--dry-run"], []])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--perturbations", "linf:8"], "perturbation linf:8: eps = 8 is more than the whole range"),
        (
            ["--preset", "quick", "--datasets", "fashion_mnist", "--data-dir", "/no/such/folder"],
            "needs the data set fashion_mnist: fashion_mnist: neither the pack /no/such/folder/fashion_mnist.npz",
        ),
    ],
)
def test_what_must_fail_is_refused_before_any_cell_starts(
    arguments: list[str], message: str, dry: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compare.main(["--preset", "smoke", "--results", str(tmp_path / "r"), *arguments, *dry]) == 2
    assert message in capsys.readouterr().err.replace("\n", " ")
    assert not (tmp_path / "r").exists()


def fill(root: Path, *, failing: bool) -> None:
    store = Store(root)
    records = [make_record(make_cell(seed=seed), "1111100000") for seed in range(3)]
    if failing:
        records.append(make_failure())
    for record in records:
        from runs.cell import from_dict

        slot = store.slot(from_dict(record["cell"]))
        with slot.lock():
            slot.write_record(record)


def test_report_renders_what_is_on_disk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fill(tmp_path, failing=False)
    assert compare.main(["report", "--results", str(tmp_path), "--export", "json", "csv", "md"]) == 0
    assert "50.0 ±0.0" in capsys.readouterr().out
    assert json.loads((tmp_path / "leaderboard.json").read_text())["rows"][0]["verified_mean"] == 0.5
    assert not (tmp_path / "leaderboard.html").exists()


def test_failed_cells_are_shown_and_fail_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fill(tmp_path, failing=True)
    assert compare.main(["report", "--results", str(tmp_path), "--export"]) == 1
    shown = capsys.readouterr().out
    assert "FAILED" in shown
    assert "FloatingPointError: loss is NaN in epoch 3" in shown
    assert not list(tmp_path.glob("leaderboard.*"))


def test_report_of_a_damaged_record_fails_and_names_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fill(tmp_path, failing=False)
    path = next(tmp_path.glob("*/record.json"))
    path.write_text(path.read_text()[:-50])
    assert compare.main(["report", "--results", str(tmp_path), "--export"]) == 1
    assert f"{path} is damaged" in capsys.readouterr().out.replace("\n", "")


def test_report_of_nothing_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare.main(["report", "--results", str(tmp_path)]) == 2
    assert "no records under" in capsys.readouterr().err


def test_every_certifier_offered_is_one() -> None:
    from certify.dispatch import METHODS
    from runs.deviations import METHOD
    from runs.suites import car

    assert set(compare.CERTIFIERS) <= {*METHODS, METHOD, car.METHOD}
