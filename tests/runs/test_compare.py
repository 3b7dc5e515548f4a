from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

from runs import commands, compare
from runs.packages import ROOT
from runs.progress import Silent
from runs.store import Store
from runs.suites import Selection, plan, suites
from tests.runs.handmade import make_cell, make_failure, make_record

README = (ROOT / "README.md").read_text() + (ROOT / "runs" / "README.md").read_text()
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
        (["--methods", "magnitud"], "unknown method on digits, aircraft 'magnitud'. Did you mean magnitude"),
        (["--methods", "IMP"], "Did you mean imp"),
        (["--methods", "dense,imp"], "Names are separated by spaces, without commas"),
        (["usn", "--methods", "dense"], "unknown method on aircraft 'dense'. Known: vanilla, none, usn"),
        (["usn", "--methods", "litral"], "Did you mean literal"),
        (["nrs", "--methods", "dense"], "suite nrs has no 'dense': every run begins with its dense state"),
        (["--models", "cnn7nrs"], "unknown model 'cnn7nrs'. Did you mean cnn7_nrs"),
        (["--datasets", "fashion_mnst"], "unknown data set 'fashion_mnst'. Did you mean fashion_mnist"),
        (["--perturbations", "linf:-1"], "the magnitude of linf must be >= 0"),
        (["--perturbations", "linff:0.1"], "unknown perturbation 'linff'. Did you mean linf"),
        (["--perturbations", "linf"], "expected KIND:SIZE"),
        (["--verifier", "crwon"], "unknown certifier 'crwon'. Did you mean crown"),
        (["--limit", "0"], "--limit must be at least 1"),
        (["--seeds", "-1"], "--seeds must be at least 0"),
        (["--export", "pdf"], "unknown export format 'pdf'; known: md, csv, json, html, svg"),
        (["--preset", "huge"], "unknown preset 'huge'"),
        (["--ratios", "1.5"], "must lie in [0, 1)"),
        (["aren"], "unknown suite 'aren'"),
        (["repot"], "unknown suite 'repot'. Did you mean report?"),
        (["quick"], "'quick' is a preset, not a suite: python -m runs.compare arena --preset quick"),
        (["lambda"], "'lambda' is a preset, not a suite: python -m runs.compare usn --preset lambda"),
        (["verify"], "'verify' is a command of its own: python -m runs.verify --help"),
        (["--preset", "nrs"], "'nrs' is a suite, not a preset: python -m runs.compare nrs"),
        (["--preset", "lambda"], "suite arena has no preset 'lambda'; suites that do: usn"),
        (["--engine", "serial", "--workers", "4"], "for --workers 4 say --engine processes"),
        (["--images", "100000", "--preset", "smoke"], "digits has 360: --images 360"),
    ],
)
def test_wrong_usage_is_explained(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare.main([*arguments, "--dry-run"]) == 2
    assert message in capsys.readouterr().err.replace("\n", " ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["report", "--methods", "nosuch"], "--methods does not apply to 'report'; it takes --results, --records"),
        (["report", "--records", "--datasets", "digits"], "--datasets does not apply to 'report'"),
        (["claims", "--dry-run"], "--dry-run does not apply to 'claims'"),
        (["check", "--records", "a.jsonl"], "--records does not apply to 'check'; it takes --results, --limit"),
        (["check", "--limit", "0"], "--limit must be at least 1"),
        (["pack", "--to", "a.jsonl", "--records"], "--records does not apply to 'pack'"),
        (["usn", "--records", "a.jsonl"], "--records does not apply to the suite 'usn', only to report, claims"),
        (["--budget", "9", "--dry-run"], "--budget does not apply to the suite 'arena', only to check"),
    ],
)
def test_options_that_nothing_reads_are_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compare.main(arguments) == 2
    assert message in capsys.readouterr().err.replace("\n", " ")


def test_every_option_is_read_by_somebody() -> None:
    known = set(vars(compare.parser().parse_args([])))
    assert {option for options in commands.TAKES.values() for option in options} | set(commands.ALONE) <= known
    assert set(commands.TAKES) == set(commands.COMMANDS) == set(compare.ON_RECORDS)
    assert all(any(option in options for options in commands.TAKES.values()) for option in commands.ALONE)


@pytest.mark.parametrize("command", re.findall(r"python -m runs\.compare ([^`#|\n]*)", README.replace("\\\n", "")))
def test_the_readme_says_nothing_that_is_refused(command: str) -> None:
    words = shlex.split(command.replace("DIR", ".").rstrip(":,"))
    args = compare.parser().parse_args(words)
    commands.check_suite(args.suite)
    commands.check_options(args, compare.parser().get_default)
    if args.suite in suites() and not args.plugin:
        assert plan(args.suite, args.preset, compare.selection(args)).cells


@pytest.mark.parametrize("option", ["--results", "--data-dir"])
def test_a_file_is_no_folder(option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "file"
    file.write_text("")
    for path in (file, file / "below"):
        assert compare.main(["--preset", "smoke", "--dry-run", option, str(path)]) == 2
        assert f"{option} must be a folder, {file} is a file" in capsys.readouterr().err.replace("\n", "")


def test_numbers_and_second_words_are_explained(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["--seeds", "0,1"], "'0,1' is no whole number; several are separated by spaces"),
        (["--ratios", "50%"], "'50%' is no number"),
        (["nrs", "quick"], "unrecognized arguments: quick (a preset is chosen by --preset quick)"),
        (["arena", "nrs"], "unrecognized arguments: nrs (one suite or command at a time)"),
        (["--epochs", "3"], "unrecognized arguments: --epochs"),
    ):
        with pytest.raises(SystemExit) as stop:
            compare.main(arguments)
        assert stop.value.code == 2
        assert message in capsys.readouterr().err


def test_a_second_worker_needs_an_engine_that_has_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import torch

    from runs.execute import Execute, Library

    def elsewhere(*_: object, **__: object) -> object:
        device = torch.device("cuda")
        return lambda: Execute(device, Library(None, device), Store(tmp_path))

    monkeypatch.setattr(Execute, "factory", elsewhere)
    args = compare.parser().parse_args(["--workers", "2", "--results", str(tmp_path)])
    with pytest.raises(ValueError, match="--workers 2 on a GPU: say --engine processes"):
        compare.run_cells([make_cell()], args, Store(tmp_path), Silent())


def test_another_verifier_is_not_what_the_minutes_are_of(capsys: pytest.CaptureFixture[str]) -> None:
    for verifier, said in (([], False), (["--verifier", "crown"], True)):
        assert compare.main(["--preset", "smoke", "--dry-run", *verifier]) == 0
        assert ("with the verifier of the preset" in " ".join(capsys.readouterr().out.split())) is said


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
    said = capsys.readouterr().err
    assert "no records under" in said
    assert "or --records" in said
    assert compare.main(["pack", "--results", str(tmp_path), "--to", str(tmp_path / "a.jsonl")]) == 2
    assert "--records" not in capsys.readouterr().err


def test_every_certifier_offered_is_one() -> None:
    from certify.dispatch import METHODS
    from runs.deviations import METHOD
    from runs.suites import car

    assert set(compare.CERTIFIERS) <= {*METHODS, METHOD, car.METHOD}
