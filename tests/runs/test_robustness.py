"""Kills, other runners, damage and full disks at random places: the same command ends with the same table."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from runs import leaderboard, report
from runs import store as store_module
from runs.cell import Cell
from runs.engine import ProcessEngine, SerialEngine
from runs.packages import ROOT
from runs.progress import Silent
from runs.store import Record, Slot, StorageFull, Store, out_of_space
from tests.runs.handmade import work
from tests.runs.remote import CELLS, make_full

FILES = ("config.json", "history.jsonl", "examples.jsonl", "model.safetensors", "record.json")


def content(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for name in FILES for path in sorted(root.glob(f"*/{name}"))}


def timeless(value: Any) -> Any:
    """Measured times and memory, which honestly differ between runs, put to one; seals over them left out."""
    if isinstance(value, dict):
        times = ("seconds", "seconds_mean", "seconds_median", "peak_mb")
        return {k: 1.0 if k in times else timeless(v) for k, v in value.items() if k != "sha256"}
    return [timeless(item) for item in value] if isinstance(value, list) else value


def table(root: Path, cells: list[Cell]) -> str:
    """The leaderboard of some cells, all of which must be on record."""
    records = [Store(root).record(cell) for cell in cells]
    assert None not in records
    return report.markdown(leaderboard.build([timeless(record) for record in records]))


# One process imports everything once and forks a runner for every kill.
_NURSERY = """
import os, random, signal, shutil, sys, time
sys.path.insert(0, sys.argv[1])
from pathlib import Path
{setup}
root, kills, at_once, seed = Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5])
draw = random.Random(seed)
done = killed = 0
while killed < kills:
    folder = root / f"{{done:03d}}"
    children = []
    for _ in range(at_once):
        child = os.fork()
        if child == 0:
            try:
                run(folder)
            except BaseException as error:
                print("FAILED", type(error).__name__, error, flush=True)
                os._exit(1)
            os._exit(0)
        children.append(child)
    codes = []
    for child in children:
        time.sleep(draw.uniform(0, {longest}))
        os.kill(child, signal.SIGKILL)
        codes.append(os.waitpid(child, 0)[1])
    killed += sum(code == signal.SIGKILL for code in codes)
    done += 0 in codes  # a runner got through: the next one starts from nothing
run(root / f"{{done:03d}}")
print("DONE", done + 1, killed)
"""

_HANDMADE = """
from runs import store as store_module
from runs.engine import SerialEngine
from runs.progress import Silent
from runs.store import Store
from tests.runs.remote import CELLS
from tests.runs.handmade import work
real = os.fsync
def fsync(handle):
    real(handle)
    time.sleep(0.001)
store_module.os.fsync = fsync
def run(folder):
    SerialEngine().run(CELLS, work, Store(folder), Silent())
"""

_REAL = """
import torch
torch.set_num_threads(1)
from runs import execute
from runs.engine import SerialEngine
from runs.progress import Silent
from runs.store import Store
from tests.runs.test_robustness import real_cells
def run(folder):
    store = Store(folder)
    work = execute.Execute.on("cpu", threads=1, data_dir=None, store=store)
    records = SerialEngine().run(real_cells(), work, store, Silent())
    assert [record["status"] for record in records] == ["done"] * len(records)
run(Path(sys.argv[2]) / "reference")
"""


def real_cells() -> list[Cell]:
    from tests.runs.test_execute import digits_cell

    return [digits_cell(), digits_cell("dense", 0.0)]


def nursery(root: Path, setup: str, kills: int, at_once: int, longest: float, seed: int, limit: int) -> list[Path]:
    """The folders that runners got through, after so many kills."""
    code = _NURSERY.format(setup=setup, longest=longest)
    command = [sys.executable, "-c", code, str(ROOT), str(root), str(kills), str(at_once), str(seed)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=limit, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "FAILED" not in run.stdout
    _, count, killed = run.stdout.splitlines()[-1].split()
    assert int(killed) >= kills
    return [root / f"{i:03d}" for i in range(int(count))]


@pytest.mark.parametrize(("kills", "at_once"), [(5, 1), (6, 2), pytest.param(50, 1, marks=pytest.mark.slow)])
def test_kill_9_anywhere_and_resume(tmp_path: Path, kills: int, at_once: int) -> None:
    """``at_once`` runners share one folder and are all killed, sooner or later."""
    SerialEngine().run(CELLS, work, Store(tmp_path / "whole"), Silent())
    expected, shown = content(tmp_path / "whole"), table(tmp_path / "whole", CELLS)
    for folder in nursery(tmp_path / "killed", _HANDMADE, kills, at_once, 0.15, seed=kills, limit=240):
        assert content(folder) == expected
        assert table(folder, CELLS) == shown
        assert not list(folder.glob("*/.*.tmp"))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_fifty_kills_of_real_cells_and_resume(tmp_path: Path) -> None:
    folders = nursery(tmp_path, _REAL, 50, 1, 1.5, seed=7, limit=800)
    expected = table(tmp_path / "reference", real_cells())
    assert "| magnitude | 50 % | natural |" in expected
    for folder in folders:
        assert table(folder, real_cells()) == expected


def damage(path: Path, draw: random.Random) -> None:
    """Flip a byte, cut the end off, add to it, empty it, or take it away."""
    whole = bytearray(path.read_bytes())
    kind = draw.choice(("flip", "cut", "add", "empty", "remove"))
    if kind == "remove":
        path.unlink()
        return
    if kind == "flip":
        whole[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
    elif kind == "cut":
        whole = whole[: draw.randrange(len(whole))]
    elif kind == "add":
        whole += draw.randbytes(draw.randrange(1, 50))
    path.write_bytes(b"" if kind == "empty" else bytes(whole))


@pytest.mark.parametrize("seed", range(30))
def test_damage_anywhere_is_noticed_and_redone(tmp_path: Path, seed: int) -> None:
    """Of a cell whose record is lost or damaged too: while a record is whole, its other files are not read."""
    draw = random.Random(seed)
    cells = CELLS[:2]
    SerialEngine().run(cells, work, Store(tmp_path), Silent())
    expected, shown = content(tmp_path), table(tmp_path, cells)
    slot = Store(tmp_path).slot(draw.choice(cells))
    for name in draw.sample(FILES[:-1], draw.randrange(3)):
        damage(slot.path / name, draw)
    record = slot.path / "record.json"
    damage(record, draw)
    if seed % 3 == 0:
        record.unlink(missing_ok=True)
    SerialEngine().run(cells, work, Store(tmp_path), Silent())
    assert table(tmp_path, cells) == shown
    found = content(tmp_path)
    if found != expected:  # the damage has left the same JSON (whitespace): the record was whole
        own = f"{slot.cell.key}/record.json"
        assert json.loads(found[own]) == json.loads(expected[own])
    assert Store(tmp_path).scan().problems == []


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), True),
        (OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)), True),
        (RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"), True),
        (OSError(errno.EACCES, os.strerror(errno.EACCES)), False),
        (ValueError("loss is NaN in epoch 3"), False),
    ],
)
def test_a_full_disk_is_told_from_other_errors(error: Exception, expected: bool) -> None:
    assert out_of_space(error) is expected
    outer = ValueError("the library's own words")
    outer.__cause__ = error
    assert out_of_space(outer) is expected
    outer.__cause__, outer.__context__ = None, error
    assert out_of_space(outer) is expected


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_libraries_that_meet_a_full_disk_stop_the_run(tmp_path: Path) -> None:
    """Real ones: a device on which there is never any space."""

    def plain(cell: Cell, slot: Slot, progress: Any) -> Record:
        with open("/dev/full", "wb") as file:
            file.write(b"x" * 100_000)
        return work(cell, slot, progress)

    def weights(cell: Cell, slot: Slot, progress: Any) -> Record:
        (slot.path / "model").symlink_to("/dev/full")
        (slot.path / "model").write_bytes(safetensors.torch.save({"x": torch.zeros(100_000)}))
        return work(cell, slot, progress)

    for name, broken in (("plain", plain), ("weights", weights)):
        store = Store(tmp_path / name)
        with pytest.raises(StorageFull, match=r"no space left while writing .*resumes there"):
            SerialEngine().run(CELLS[:2], broken, store, Silent())
        assert [store.record(cell) for cell in CELLS[:2]] == [None, None]  # stopped, not recorded as failed
        assert [r["status"] for r in SerialEngine().run(CELLS[:2], work, store, Silent())] == ["done", "done"]


def test_a_full_disk_in_a_worker_process_stops_the_run(tmp_path: Path) -> None:
    with pytest.raises(StorageFull, match="no space left"):
        ProcessEngine(2).run(CELLS[:2], make_full, Store(tmp_path), Silent())


_SMALL_DISK = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from runs.engine import SerialEngine
from runs.progress import Silent
from runs.store import StorageFull, Store
from tests.runs.handmade import work
from tests.runs.remote import CELLS
root = Path(sys.argv[2])
try:
    SerialEngine().run(CELLS, work, Store(root), Silent())
except StorageFull as full:
    print("FULL", full)
ballast = root / "ballast"
done = sum(Store(root).record(cell) is not None for cell in CELLS)
ballast.unlink()
SerialEngine().run(CELLS, work, Store(root), Silent())
print("RESUMED", done, sum(Store(root).record(cell) is not None for cell in CELLS), Store(root).scan().problems)
"""


def test_a_disk_that_really_fills_up(tmp_path: Path) -> None:
    """A file system of 200 kB in a namespace of its own, most of it taken."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = f"mount -t tmpfs -o size=200k tmpfs {disk}"
    if shutil.which("unshare") is None:
        pytest.skip("needs unshare")
    if subprocess.run(["unshare", "-rm", "sh", "-c", mount], capture_output=True, check=False).returncode:
        pytest.skip("may not mount a file system here")
    script = tmp_path / "small.py"
    script.write_text(_SMALL_DISK)
    fill = f"dd if=/dev/zero of={disk}/ballast bs=1k count=130 status=none"
    command = f"{mount} && {fill} && {sys.executable} {script} {ROOT} {disk}"
    run = subprocess.run(
        ["unshare", "-rm", "sh", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
    full, resumed = run.stdout.splitlines()
    assert full.startswith("FULL no space left while")
    assert "free some space and run the same command again" in full
    _, done, whole, problems = resumed.split(maxsplit=3)
    assert 0 < int(done) < len(CELLS)
    assert (int(whole), problems) == (len(CELLS), "[]")


def test_a_write_that_fails_leaves_no_temporary_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(store_module.os, "fsync", full)
    with pytest.raises(StorageFull):
        store_module.write_atomic(tmp_path / "record.json", b"{}")
    assert list(tmp_path.iterdir()) == []
