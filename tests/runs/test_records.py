"""Packed records: nothing is lost, nothing damaged is believed, and the command line reads what it wrote."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runs import compare, leaderboard, records, report
from runs.cell import Training
from runs.records import SHIPPED
from runs.store import Record, Store, StoreError, seal
from runs.suites import Selection, plan
from tests.runs.handmade import make_cell, make_failure, make_record


def made() -> list[Record]:
    found = [make_record(make_cell("dense", seed=seed), "1100000000") for seed in range(3)]
    found += [make_record(make_cell("imp", 0.5, seed=seed), "1111100000", clean=math.pi / 4) for seed in range(3)]
    return [seal(record) for record in (*found, make_failure())]


def results(folder: Path, found: list[Record] | None = None) -> Path:
    """A results folder with these records."""
    for record in found or made():
        path = folder / record["key"] / "record.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(record))
    return folder


def run(*arguments: object) -> int:
    return compare.main([str(argument) for argument in arguments])


def test_what_is_packed_comes_back(tmp_path: Path) -> None:
    before = made()
    packed = records.pack(before, tmp_path / "a.jsonl", "arena --preset quick")
    again = records.read(tmp_path / "a.jsonl")
    assert again == packed
    done = [record for record in before if record["status"] == "done"]
    assert [r for r in again.records if r["status"] == "done"] == sorted(done, key=lambda record: record["key"])
    (failed,) = [record for record in again.records if record["status"] == "failed"]
    assert failed["error"]["message"] == "loss is NaN in epoch 3"
    assert "traceback" not in failed["error"]
    order = {record["key"]: place for place, record in enumerate(before)}
    sorted_back = sorted(again.records, key=lambda record: order[record["key"]])
    assert report.markdown(leaderboard.build(sorted_back)) == report.markdown(leaderboard.build(before))


def test_the_first_line_says_how_they_came_about(tmp_path: Path) -> None:
    packed = records.pack(made(), tmp_path / "a.jsonl", "arena --preset quick")
    assert packed.about.line == (
        "arena --preset quick; 7 cells (1 failed); seeds 0, 1, 2; n = 10 test images; cpu; torch 2.15"
    )
    head, *lines = (tmp_path / "a.jsonl").read_text().splitlines()
    assert json.loads(head)["about"]["seeds"] == [0, 1, 2]
    assert len(lines) == 7  # one cell a line


def test_a_whole_preset_names_itself(tmp_path: Path) -> None:
    cells = plan("arena", "smoke", Selection()).cells
    whole = [seal(make_record(cell, "1" * 10)) for cell in cells]
    assert records.pack(whole, tmp_path / "a.jsonl").about.made_by == "arena --preset smoke"
    with pytest.raises(ValueError, match="not exactly those of a preset: say with --made-by"):
        records.pack(whole[1:], tmp_path / "b.jsonl")
    assert not (tmp_path / "b.jsonl").exists()


@given(st.text("01", max_size=300))
def test_bits_survive(bits: str) -> None:
    short = records._map_strings({"bits": bits}, records._shorten)
    assert records._map_strings(short, records._lengthen) == {"bits": bits}
    assert len(short["bits"]) <= max(len(bits), records.LONG)


def test_long_bits_are_short_on_disk(tmp_path: Path) -> None:
    record = seal(make_record(make_cell(images=5000), "10" * 2500))
    records.pack([record], tmp_path / "a.jsonl", "by hand")
    assert (tmp_path / "a.jsonl").stat().st_size < 3500
    assert records.read(tmp_path / "a.jsonl").records[0]["results"][0]["verified_bits"] == "10" * 2500


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda lines: [lines[0], lines[1].replace('"seed":', '"seed":1'), *lines[2:]],
            "line 2 is damaged.*checksum",
        ),
        (lambda lines: [*lines[:3], lines[3][:50]], "line 4 is damaged"),
        (lambda lines: [*lines[:3], "[1]"], "line 4 is damaged: it is not a JSON object"),
        (lambda lines: lines[:-1], "should hold 7 records and holds 6"),
        (lambda lines: [lines[0].replace('"version":1', '"version":9'), *lines[1:]], "version 9; .* reads version 1"),
    ],
)
def test_damage_is_noticed(tmp_path: Path, change, message: str) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "a.jsonl"
    records.pack(made(), path, "by hand")
    path.write_text("\n".join(change(path.read_text().splitlines())))
    with pytest.raises(StoreError, match=message):
        records.read(path)
    assert run("report", "--records", path, "--results", tmp_path / "out") == compare.FAILED


@pytest.mark.parametrize("content", [b"", b"# Records\n", b"{}\n", b"[1]\n", b"\xff\xd8\xff"])
def test_other_files_are_no_records(tmp_path: Path, content: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "README.md"
    path.write_bytes(content)
    assert run("report", "--records", path, "--results", tmp_path / "out") == compare.USAGE
    wanted = "README.md is not a file of packed records (made by `python -m runs.compare pack`)"
    assert wanted in capsys.readouterr().err
    records.pack(made(), tmp_path / "a.jsonl", "by hand")
    (tmp_path / "headless.jsonl").write_text("".join((tmp_path / "a.jsonl").read_text().splitlines(keepends=True)[1:]))
    assert run("claims", "--records", tmp_path / "headless.jsonl", "--results", tmp_path / "out") == compare.USAGE
    assert run("report", "--records", tmp_path) == compare.USAGE
    assert "is a folder" in capsys.readouterr().err


def test_two_files_may_share_cells_but_not_contradict_each_other(tmp_path: Path) -> None:
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    records.pack(made()[:4], first, "by hand")
    records.pack(made()[2:], second, "by hand")
    both = records.read_all([first, second, first])
    assert len(both) == 2
    assert len(records.merged(both)) == 7
    other = seal(make_record(make_cell("dense", seed=2), "0000000000"))
    records.pack([other], second, "by hand")
    with pytest.raises(ValueError, match=r"a\.jsonl and .*b\.jsonl hold different records of the cell"):
        records.read_all([first, second])


def test_missing_and_wrong_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="no records to pack"):
        records.pack([], tmp_path / "a.jsonl", "by hand")
    with pytest.raises(ValueError, match=r"something\.jsonl, not a\.json"):
        records.pack(made(), tmp_path / "a.json", "by hand")
    with pytest.raises(ValueError, match=r"no folder .*nowhere to write a\.jsonl to"):
        records.pack(made(), tmp_path / "nowhere" / "a.jsonl", "by hand")
    assert run("report", "--records", tmp_path / "absent.jsonl") == compare.USAGE
    assert "no packed records at" in capsys.readouterr().err
    assert run("pack", "--results", tmp_path) == compare.USAGE
    assert run("pack", "--results", tmp_path, "--to", tmp_path / "a.jsonl") == compare.USAGE
    assert "no records under" in capsys.readouterr().err


def test_the_command_line_packs_and_reports_the_same_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out, path = results(tmp_path / "results"), tmp_path / "out", tmp_path / "a.jsonl"
    assert run("report", "--results", folder, "--export", "md") == compare.FAILED  # a cell has failed
    assert run("pack", "--results", folder, "--to", path, "--made-by", "by hand") == compare.OK
    capsys.readouterr()
    assert run("report", "--records", path, "--results", out, "--export", "md", "html") == compare.FAILED
    assert "a.jsonl: by hand; 7 cells (1 failed); seeds 0, 1, 2; n = 10" in capsys.readouterr().out
    assert (out / "leaderboard.md").read_text() == (folder / "leaderboard.md").read_text()
    assert "loss is NaN in epoch 3" in (out / "leaderboard.html").read_text()


def test_claims_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained = Training("ibp", epochs=2, eps=0.1)
    several = {"dense": ("1000000000", 0.0), "imp": ("1111110000", 0.5)}
    folder = results(tmp_path / "results", [
        seal(make_record(make_cell(name, ratio, seed, training=trained), bits))
        for name, (bits, ratio) in several.items() for seed in range(3)
    ])  # fmt: skip
    path = tmp_path / "a.jsonl"
    assert run("claims", "--results", tmp_path / "none", "--export") == compare.OK
    nothing = capsys.readouterr().out
    assert "0 supported, 0 contradicted, 0 undecided" in nothing
    assert "CONTRADICTS ITSELF" in nothing
    assert not (tmp_path / "none").exists()
    assert run("claims", "--results", folder) == compare.OK
    seen = json.loads((folder / "claims.json").read_text())
    assert any(entry["evidence"] is not None for entry in seen)
    run("pack", "--results", folder, "--to", path, "--made-by", "by hand")
    assert run("claims", "--records", path, "--results", tmp_path / "out") == compare.OK
    assert json.loads((tmp_path / "out" / "claims.json").read_text()) == seen


def test_claims_are_asked_of_every_state_of_a_run(tmp_path: Path) -> None:
    cells = {
        cell.pruning.label: cell
        for cell in plan("nrs", "smoke", Selection(methods=("imp", "imp+nrs"), trainings=("crown-ibp",))).cells
    }
    made = []
    for name, bits in (("imp", "0" * 10), ("imp+nrs", "1" * 10)):
        for seed in range(3):
            cell = dataclasses.replace(cells[name], seed=seed)
            record = make_record(cell, "0" * 10)  # the chosen state says nothing for the claim
            state = make_record(cell, bits)
            parts = {part: state[part] for part in ("size", "results")}
            state = {"index": 1, "removed": 0.5, "constant": False, "mask": {}, **parts}
            made.append(seal({**record, "training": {}, "states": [state], "chosen": 1}))
    assert run("claims", "--results", results(tmp_path, made)) == compare.OK
    found = {entry["id"]: entry for entry in json.loads((tmp_path / "claims.json").read_text())}
    assert found["NRS-6"]["evidence"]["difference"] == 1.0  # NRSLoss beats plain IMP under certified training
    assert found["NRS-6"]["evidence"]["units"] == 10


def test_commands_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--list") == compare.OK
    shown = capsys.readouterr().out
    with pytest.raises(SystemExit):
        run("--help")
    helped = " ".join(capsys.readouterr().out.split())
    for name in ("report", "check", "claims", "pack"):
        assert f"  {name}" in shown
        assert f"'{name}':" in helped


@pytest.mark.skipif(not any(SHIPPED.glob("*.jsonl")), reason="no records come with this clone")
def test_shipped_records_are_whole() -> None:
    packed = records.read_all()
    assert leaderboard.build(records.merged(packed))
    for one in packed:
        assert one.about.made_by
        assert one.about.devices
        text = one.path.read_text()
        assert "/home/" not in text
        assert "/root/" not in text
        assert "/work/" not in text


def test_a_results_folder_and_its_pack_have_the_same_records(tmp_path: Path) -> None:
    folder = results(tmp_path / "results")
    records.pack(Store(folder).scan().records, tmp_path / "a.jsonl", "by hand")
    done = {r["key"]: r for r in Store(folder).scan().records if r["status"] == "done"}
    assert {r["key"]: r for r in records.read(tmp_path / "a.jsonl").records if r["status"] == "done"} == done
