from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from runs import store as store_module
from runs.engine import ProcessEngine, SerialEngine, failed
from runs.progress import Silent
from runs.store import Record, StorageFull, Store
from tests.runs.handmade import broken, make_broken, make_cell, make_deadly, make_record, make_work, work

ROOT = Path(__file__).resolve().parents[2]
CELLS = [make_cell(seed=seed) for seed in range(3)]


class Recorder(Silent):
    def __init__(self) -> None:
        self.events: list[tuple[str, int, bool]] = []

    def end(self, cell: Any, record: Record, *, cached: bool) -> None:
        self.events.append((record["status"], cell.seed, cached))


def content(root: Path) -> dict[str, bytes]:
    names = ("config.json", "history.jsonl", "examples.jsonl", "model.safetensors", "record.json")
    return {str(p.relative_to(root)): p.read_bytes() for name in names for p in sorted(root.glob(f"*/{name}"))}


def test_runs_every_cell_once_and_then_none(tmp_path: Path) -> None:
    progress = Recorder()
    first = SerialEngine().run([*CELLS, CELLS[0]], work, Store(tmp_path), progress)
    assert [record["cell"]["seed"] for record in first] == [0, 1, 2]
    assert progress.events == [("done", 0, False), ("done", 1, False), ("done", 2, False)]
    again = Recorder()
    assert SerialEngine().run(CELLS, broken, Store(tmp_path), again) == first
    assert all(cached for _, _, cached in again.events)


def test_force_redoes_from_nothing(tmp_path: Path) -> None:
    store = Store(tmp_path)
    before = SerialEngine().run(CELLS[:1], work, store, Silent())
    stray = store.slot(CELLS[0]).path / "stray"
    stray.write_text("from an older run")
    progress = Recorder()
    assert SerialEngine().run(CELLS[:1], work, store, progress, force=True) == before
    assert progress.events == [("done", 0, False)]
    assert not stray.exists()


def test_a_failing_cell_is_recorded_and_the_others_go_on(tmp_path: Path) -> None:
    def sometimes(cell: Any, slot: Any, progress: Any) -> Record:
        return (broken if cell.seed == 1 else work)(cell, slot, progress)

    records = SerialEngine().run(CELLS, sometimes, Store(tmp_path), Silent())
    assert [record["status"] for record in records] == ["done", "failed", "done"]
    error = failed(records)[0]["error"]
    assert (error["type"], error["message"]) == ("ZeroDivisionError", "no luck with seed 1")
    assert "handmade.py" in error["traceback"]
    assert Store(tmp_path).record(CELLS[1]) == records[1]


def test_a_failed_cell_is_tried_again(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert SerialEngine().run(CELLS[:1], broken, store, Silent())[0]["status"] == "failed"
    assert SerialEngine().run(CELLS[:1], work, store, Silent())[0]["status"] == "done"


def test_a_damaged_record_is_redone_to_the_same_bytes(tmp_path: Path) -> None:
    store = Store(tmp_path)
    SerialEngine().run(CELLS, work, store, Silent())
    before = content(tmp_path)
    path = store.slot(CELLS[1]).path / "record.json"
    path.write_bytes(path.read_bytes()[:100])
    progress = Recorder()
    SerialEngine().run(CELLS, work, store, progress)
    assert progress.events == [("done", 0, True), ("done", 1, False), ("done", 2, True)]
    assert content(tmp_path) == before


class Killed(BaseException):
    """As a kill: nothing may catch it."""


def test_resume_after_a_kill_between_any_two_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    SerialEngine().run(CELLS[:2], work, Store(tmp_path / "whole"), Silent())
    expected = content(tmp_path / "whole")
    real = os.fsync
    kills = 0
    for writes in range(1, 100):
        store = Store(tmp_path / f"killed{writes}")
        left = writes

        def fsync(handle: int) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                raise Killed
            real(handle)

        monkeypatch.setattr(store_module.os, "fsync", fsync)
        try:
            SerialEngine().run(CELLS[:2], work, store, Silent())
        except Killed:
            kills += 1
        else:
            break
        finally:
            monkeypatch.setattr(store_module.os, "fsync", real)
        SerialEngine().run(CELLS[:2], work, store, Silent())
        assert content(store.root) == expected, f"after a kill at write {writes}"
    assert kills >= 2 * 9


_CHILD = """
import sys, time
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from runs.engine import SerialEngine
from runs.progress import Silent
from runs.store import Slot, Store
from tests.runs.handmade import make_cell, work
append = Slot.append_examples
def slow(self, rows):
    append(self, rows)
    print("appended", flush=True)
    time.sleep(0.02)
Slot.append_examples = slow
SerialEngine().run([make_cell(seed=s) for s in range(3)], work, Store(Path(sys.argv[2])), Silent())
print("finished", flush=True)
"""


def child(root: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", _CHILD, str(ROOT), str(root)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("appends", [1, 3, 5, 8])
def test_resume_after_a_real_kill_9(tmp_path: Path, appends: int) -> None:
    SerialEngine().run(CELLS, work, Store(tmp_path / "whole"), Silent())
    process = child(tmp_path / "killed")
    assert process.stdout is not None
    for _ in range(appends):
        assert process.stdout.readline() == "appended\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert process.returncode == -signal.SIGKILL
    SerialEngine().run(CELLS, work, Store(tmp_path / "killed"), Silent())
    assert content(tmp_path / "killed") == content(tmp_path / "whole")


def test_two_runners_on_one_folder_share_the_work(tmp_path: Path) -> None:
    SerialEngine().run(CELLS, work, Store(tmp_path / "whole"), Silent())
    first, second = child(tmp_path / "shared"), child(tmp_path / "shared")
    outputs = [process.communicate(timeout=60)[0] for process in (first, second)]
    assert all(output.endswith("finished\n") for output in outputs)
    # Three batches for each of three cells, none done twice.
    assert sum(output.count("appended") for output in outputs) == 9
    assert content(tmp_path / "shared") == content(tmp_path / "whole")


def test_a_full_disk_stops_the_run_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path)
    SerialEngine().run(CELLS[:1], work, store, Silent())

    def full(path: Path, content: bytes) -> None:
        raise StorageFull(f"no space left while writing {path}")

    monkeypatch.setattr(store_module, "write_atomic", full)
    with pytest.raises(StorageFull, match="no space left"):
        SerialEngine().run(CELLS, work, store, Silent())
    monkeypatch.undo()
    assert [store.record(cell) is not None for cell in CELLS] == [True, False, False]
    assert [r["status"] for r in SerialEngine().run(CELLS, work, store, Silent())] == ["done"] * 3


def test_interrupt_leaves_finished_cells(tmp_path: Path) -> None:
    def interrupted(cell: Any, slot: Any, progress: Any) -> Record:
        if cell.seed == 2:
            raise KeyboardInterrupt
        return work(cell, slot, progress)

    store = Store(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        SerialEngine().run(CELLS, interrupted, store, Silent())
    assert [store.record(cell) is not None for cell in CELLS] == [True, True, False]


def test_waits_for_a_cell_that_another_runner_holds(tmp_path: Path) -> None:
    holder = (
        "import sys, time; sys.path.insert(0, sys.argv[1])\n"
        "from pathlib import Path\nfrom runs.store import Store\n"
        "from tests.runs.handmade import make_cell, make_record\n"
        "slot = Store(Path(sys.argv[2])).slot(make_cell(seed=0))\n"
        "with slot.lock():\n"
        "    print('held', flush=True); time.sleep(0.4); slot.write_record(make_record(slot.cell, '1111111111'))\n"
    )
    command = [sys.executable, "-c", holder, str(ROOT), str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    started = time.monotonic()
    progress = Recorder()
    records = SerialEngine().run(CELLS, work, Store(tmp_path), progress)
    process.communicate(timeout=30)
    assert time.monotonic() - started < 20
    assert [seed for _, seed, _ in progress.events] == [1, 2, 0]
    expected = make_record(CELLS[0], "1111111111")
    assert {k: v for k, v in records[0].items() if k != "sha256"} == expected


def test_processes_give_the_records_of_the_serial_engine(tmp_path: Path) -> None:
    serial = SerialEngine().run(CELLS, work, Store(tmp_path / "serial"), Silent())
    progress = Recorder()
    assert ProcessEngine(2).run(CELLS, make_work, Store(tmp_path / "processes"), progress) == serial
    assert content(tmp_path / "processes") == content(tmp_path / "serial")
    assert sorted(progress.events) == [("done", 0, False), ("done", 1, False), ("done", 2, False)]
    again = Recorder()
    assert ProcessEngine(2).run(CELLS, make_broken, Store(tmp_path / "processes"), again) == serial
    assert {cached for _, _, cached in again.events} == {True}


def test_failures_in_processes_are_isolated(tmp_path: Path) -> None:
    records = ProcessEngine(2).run(CELLS, make_broken, Store(tmp_path), Silent())
    assert [record["status"] for record in records] == ["failed"] * 3
    assert records[2]["error"]["message"] == "no luck with seed 2"


def test_a_process_that_dies_fails_its_cell_only(tmp_path: Path) -> None:
    progress = Recorder()
    records = ProcessEngine(1).run(CELLS, make_deadly, Store(tmp_path), progress)
    assert [record["status"] for record in records] == ["done", "failed", "done"]
    assert "the process of this cell died" in records[1]["error"]["message"]
    assert Store(tmp_path).record(CELLS[1]) == records[1]
    assert sorted(progress.events) == [("done", 0, False), ("done", 2, False), ("failed", 1, False)]


def test_workers_end_with_their_parent(tmp_path: Path) -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from pathlib import Path\nfrom runs.engine import ProcessEngine\nfrom runs.progress import Silent\n"
        "from runs.store import Store\nfrom tests.runs.handmade import make_cell, make_sleeper\n"
        "if __name__ == '__main__':\n"
        "    ProcessEngine(1).run([make_cell()], make_sleeper, Store(Path(sys.argv[2])), Silent())\n"
    )
    script = tmp_path / "run.py"
    script.write_text(code)
    process = subprocess.Popen([sys.executable, str(script), str(ROOT), str(tmp_path / "results")])
    worker = tmp_path / "results" / make_cell().key / "worker.pid"
    deadline = time.monotonic() + 30
    while not worker.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    pid = int(worker.read_text())
    process.kill()
    process.wait()
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            break
        time.sleep(0.02)
    else:
        pytest.fail("the worker outlived its parent")
