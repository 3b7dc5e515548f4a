from __future__ import annotations

import builtins
import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from runs import store as store_module
from runs.store import Locked, Slot, StorageFull, Store, StoreError, append_lines, read_lines, seal, write_atomic
from tests.runs.handmade import make_cell, make_record

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def slot(tmp_path: Path) -> Slot:
    slot = Store(tmp_path).slot(make_cell())
    with slot.lock():
        pass
    return slot


def test_record_round_trip_keeps_full_precision(slot: Slot) -> None:
    record = make_record(slot.cell, "1110000000") | {"number": 0.1 + 0.2}
    slot.write_record(record)
    read = slot.record()
    assert read is not None
    assert read["number"] == 0.1 + 0.2
    assert {k: v for k, v in read.items() if k != "sha256"} == record


@pytest.mark.parametrize("damage", [b"{", b"[]", b"", b"\xff\xfe"])
def test_a_damaged_record_counts_as_none_and_is_set_aside(slot: Slot, damage: bytes) -> None:
    slot.write_record(make_record(slot.cell, "1"))
    path = slot.path / "record.json"
    path.write_bytes(damage)
    assert Store(slot.path.parent).record(slot.cell) is None
    assert slot.record() is None
    assert not path.exists()
    assert (slot.path / "record.json.damaged").read_bytes() == damage


def test_one_changed_digit_is_noticed(slot: Slot) -> None:
    slot.write_record(make_record(slot.cell, "1110000000"))
    path = slot.path / "record.json"
    text = path.read_text()
    assert text.count('"verified": 3') == 1
    path.write_text(text.replace('"verified": 3', '"verified": 9'))
    scan = Store(slot.path.parent).scan()
    assert scan.records == []
    assert "checksum does not match" in scan.problems[0]
    assert slot.record() is None


def test_a_record_of_another_cell_is_not_taken(slot: Slot) -> None:
    slot.write_record(make_record(make_cell(seed=5), "1"))
    assert slot.record() is None


@pytest.mark.parametrize("keep", range(1, 40, 3))
def test_torn_last_line_is_cut_off_and_appending_goes_on(slot: Slot, keep: int) -> None:
    slot.append_examples([{"index": 0, "lower": 0.25}, {"index": 1, "lower": -0.5}])
    path = slot.path / "examples.jsonl"
    whole = path.read_bytes()
    slot.append_examples([{"index": 2, "lower": 1e-17}])
    path.write_bytes(path.read_bytes()[: len(whole) + keep])
    assert [row["index"] for row in slot.examples()] == [0, 1]
    assert path.read_bytes() == whole
    slot.append_examples([{"index": 2, "lower": 1e-17}])
    assert slot.examples()[2] == {"index": 2, "lower": 1e-17}


def test_nothing_behind_a_damaged_line_is_trusted(slot: Slot) -> None:
    slot.append_examples([{"index": i, "status": "holds"} for i in range(4)])
    path = slot.path / "examples.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text(lines[0] + lines[1].replace("holds", "fails") + lines[2] + lines[3])
    assert [row["index"] for row in slot.examples()] == [0]
    assert path.read_text() == lines[0]


def test_lines_survive_values_that_json_spells_oddly(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    rows = [{"lower": float("-inf"), "name": 'a|ü\n"b"', "none": None, "big": 10**20, "small": 5e-324}]
    append_lines(path, rows)
    assert read_lines(path)[0] == rows


def test_two_holders_of_a_cell_exclude_each_other(slot: Slot) -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from pathlib import Path\nfrom runs.store import Store, Locked\nfrom tests.runs.handmade import make_cell\n"
        "try:\n    with Store(Path(sys.argv[2])).slot(make_cell()).lock(): print('got it')\n"
        "except Locked as e: print('locked:', e)\n"
    )
    command = [sys.executable, "-c", code, str(ROOT), str(slot.path.parent)]
    with slot.lock():
        assert "locked: digits" in subprocess.run(command, capture_output=True, text=True, check=True).stdout
        with pytest.raises(Locked, match="another process"), slot.lock():
            pytest.fail("took the lock twice")
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "got it\n"


def test_left_over_temporary_files_are_removed(slot: Slot) -> None:
    leftover = slot.path / ".record.json.123.tmp"
    leftover.write_text("half")
    with slot.lock():
        assert not leftover.exists()


class FullDisk:
    """Patches ``open`` so that writing more than ``room`` bytes fails as a full disk does, after a partial write."""

    def __init__(self, room: int) -> None:
        self.room = room

    def __call__(self, path: Any, mode: str = "r", *rest: Any, **named: Any) -> Any:
        file = builtins.open(path, mode, *rest, **named)  # noqa: SIM115
        if "b" not in mode or not set(mode) & set("wa"):
            return file
        real = file.write

        def write(content: bytes) -> int:
            if len(content) > self.room:
                real(content[: self.room])
                file.flush()
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self.room -= len(content)
            return int(real(content))

        class Wrapped:
            def __enter__(self) -> Any:
                return self

            def __exit__(self, *exception: object) -> None:
                file.close()

            def __getattr__(self, name: str) -> Any:
                return write if name == "write" else getattr(file, name)

        return Wrapped()


def test_full_disk_is_reported_and_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "record.json"
    write_atomic(path, b"old")
    monkeypatch.setattr(store_module, "open", FullDisk(3), raising=False)
    with pytest.raises(StorageFull, match=r"no space left .*record\.json.*resumes"):
        write_atomic(path, b"new and longer")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["record.json"]


def test_full_disk_while_appending_undoes_the_half_line(slot: Slot, monkeypatch: pytest.MonkeyPatch) -> None:
    slot.append_examples([{"index": 0}])
    before = (slot.path / "examples.jsonl").read_bytes()
    monkeypatch.setattr(store_module, "open", FullDisk(5), raising=False)
    with pytest.raises(StorageFull, match="no space left"):
        slot.append_examples([{"index": 1}])
    assert (slot.path / "examples.jsonl").read_bytes() == before


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(StoreError, match="file"), Store(blocked).slot(make_cell()).lock():
        pytest.fail("made a folder inside a file")


def test_training_counts_as_done_only_with_intact_weights(slot: Slot) -> None:
    slot.model_path.write_bytes(b"weights")
    files = {slot.model_path.name: store_module.file_sha256(slot.model_path)}
    slot.write_history([{"epoch": 0}])
    assert slot.trained() is None
    slot.write_history([{"epoch": 0}, {"event": "trained", "files": files}])
    assert slot.trained() == {"event": "trained", "files": files}
    slot.model_path.write_bytes(b"weight")
    assert slot.trained() is None
    slot.model_path.unlink()
    assert slot.trained() is None


def test_same_training_is_found_for_another_certification(tmp_path: Path) -> None:
    store = Store(tmp_path)
    first, second, other = make_cell(images=10), make_cell(images=5), make_cell(images=5, seed=1)
    slot = store.slot(first)
    with slot.lock():
        slot.write_config()
        slot.write_history([{"event": "trained", "files": {}}])
    found = store.same_training(second)
    assert found is not None
    assert found.path == slot.path
    assert store.same_training(other) is None
    assert store.same_training(first) is None


def test_seal_covers_every_field() -> None:
    record = make_record(make_cell(), "10")
    assert seal(record)["sha256"] != seal(record | {"key": "x"})["sha256"]
    assert seal(seal(record)) == seal(record)
