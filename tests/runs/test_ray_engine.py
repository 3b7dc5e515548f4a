"""The Ray engine: its arithmetic without Ray, and real runs with two workers where Ray is installed."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from runs import compare, ray_engine
from runs.engine import SerialEngine
from runs.packages import ROOT
from runs.progress import Silent
from runs.ray_engine import RayEngine, RayMissing
from runs.store import Record, StorageFull, Store, StoreError
from tests.runs.handmade import make_broken, make_cell, make_deadly, make_work, work
from tests.runs.remote import make_assigned, make_full

CELLS = [make_cell(seed=seed) for seed in range(3)]


def cluster_of(**resources: float) -> Any:
    return SimpleNamespace(cluster_resources=lambda: resources)


@pytest.mark.parametrize(
    ("engine", "resources", "cells", "expected"),
    [
        (RayEngine(), {"CPU": 8}, 100, (8, 1, 0.0)),
        (RayEngine(threads=4), {"CPU": 8}, 100, (2, 4, 0.0)),
        (RayEngine(), {"CPU": 8}, 3, (3, 1, 0.0)),
        (RayEngine(workers=2), {"CPU": 8}, 100, (2, 1, 0.0)),
        (RayEngine(), {"CPU": 16, "GPU": 2}, 100, (2, 1, 1.0)),
        (RayEngine(threads=2), {"CPU": 16, "GPU": 2}, 1, (1, 2, 1.0)),
        (RayEngine(workers=4), {"CPU": 16, "GPU": 1}, 100, (4, 1, 0.25)),
        (RayEngine(workers=3), {"CPU": 16, "GPU": 1}, 100, (3, 1, 0.333)),
        (RayEngine(gpus=0.5), {"CPU": 16, "GPU": 2}, 100, (4, 1, 0.5)),
        (RayEngine(gpus=0), {"CPU": 4, "GPU": 1}, 100, (4, 1, 0.0)),
        (RayEngine(gpus=0.25, threads=8), {"CPU": 16, "GPU": 1}, 100, (2, 8, 0.25)),
    ],
)
def test_workers_are_placed_on_what_there_is(
    engine: RayEngine, resources: dict[str, float], cells: int, expected: tuple[int, int, float]
) -> None:
    placed = engine._placement(cluster_of(**resources), cells)
    assert (placed.workers, placed.threads, placed.gpus) == expected
    assert placed.workers * placed.gpus <= resources.get("GPU", 0)


def test_what_a_cluster_cannot_give_is_refused() -> None:
    with pytest.raises(ValueError, match="asks for 1 GPUs, but the cluster has 0"):
        RayEngine(gpus=1)._placement(cluster_of(CPU=4), 5)
    with pytest.raises(ValueError, match="asks for 8 cores, but the cluster has 4"):
        RayEngine(threads=8)._placement(cluster_of(CPU=4), 5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"workers": 0}, "at least one worker"),
        ({"threads": 0}, "at least one thread"),
        ({"gpus": -0.5}, "GPUs a worker"),
        ({"gpus": 1.5}, "GPUs a worker"),
    ],
)
def test_wrong_numbers_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RayEngine(**arguments)


def test_without_ray_the_command_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ray_engine, "available", lambda: False)
    with pytest.raises(RayMissing, match="uv sync --group ray"):
        RayEngine().run(CELLS, make_work, Store(tmp_path), Silent())
    arguments = ["--preset", "smoke", "--limit", "1", "--engine", "ray", "--results", str(tmp_path / "r")]
    assert compare.main(arguments) == 2
    assert "--engine processes" in capsys.readouterr().err
    assert not (tmp_path / "r").exists()


def test_cells_on_record_need_no_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = SerialEngine().run(CELLS, work, Store(tmp_path), Silent())
    monkeypatch.setattr(ray_engine, "available", lambda: False)
    assert RayEngine(2).run(CELLS, make_broken, Store(tmp_path), Silent()) == expected


def test_news_waits_until_there_is_some_and_keeps_the_last_step() -> None:
    news = ray_engine._News()
    threading.Timer(0.05, lambda: [news.step(CELLS[0], "training", i, 3) for i in range(4)]).start()
    assert news.take(most=5, least=0.0)[0][1][0] == CELLS[0]
    news.note("hello")
    news.step(CELLS[0], "training", 9, 9)
    assert news.take(most=5, least=0.0) == [("note", ("hello",)), ("step", (CELLS[0], "training", 9, 9))]
    started = time.monotonic()
    assert news.take(most=0.05, least=0.0) == []
    assert time.monotonic() - started >= 0.04


def test_importing_the_engine_imports_no_ray() -> None:
    code = "import sys, runs.ray_engine; print('ray' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout == "False\n"


class Recorder(Silent):
    def __init__(self) -> None:
        self.ends: list[tuple[int, str, bool]] = []
        self.begins: list[int] = []
        self.notes: list[str] = []

    def begin(self, cell: Any) -> None:
        self.begins.append(cell.seed)

    def end(self, cell: Any, record: Record, *, cached: bool) -> None:
        self.ends.append((cell.seed, record["status"], cached))

    def note(self, text: str) -> None:
        self.notes.append(text)


def content(root: Path) -> dict[str, bytes]:
    names = ("config.json", "history.jsonl", "examples.jsonl", "model.safetensors", "record.json")
    return {str(p.relative_to(root)): p.read_bytes() for name in names for p in sorted(root.glob(f"*/{name}"))}


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A cluster of its own with two cores on this machine; engines connect to it as to any other."""
    if not ray_engine.available():
        pytest.skip("needs Ray (uv sync --group ray)")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "object_store_memory": 100_000_000})
    yield cluster.address
    cluster.shutdown()


@pytest.mark.slow
def test_two_workers_give_the_records_of_the_serial_engine(tmp_path: Path, address: str) -> None:
    serial = SerialEngine().run(CELLS, work, Store(tmp_path / "serial"), Silent())
    progress = Recorder()
    store = Store(tmp_path / "ray")
    records = RayEngine(2, address=address).run([*CELLS, CELLS[0]], make_work, store, progress)
    assert records == serial
    assert content(store.root) == content(tmp_path / "serial")
    assert sorted(progress.ends) == [(seed, "done", False) for seed in range(3)]
    assert sorted(progress.begins) == [0, 1, 2]
    assert not list(store.root.glob(".ray-*"))
    again = Recorder()
    assert RayEngine(2, address=address).run(CELLS, make_broken, store, again) == serial
    assert again.ends == [(seed, "done", True) for seed in range(3)]


@pytest.mark.slow
def test_failures_and_deaths_stay_with_their_cells(tmp_path: Path, address: str) -> None:
    progress = Recorder()
    records = RayEngine(1, address=address).run(CELLS, make_deadly, Store(tmp_path), progress)
    assert [record["status"] for record in records] == ["done", "failed", "done"]
    assert "the process of this cell died" in records[1]["error"]["message"]
    assert Store(tmp_path).record(CELLS[1]) == records[1]
    assert progress.ends == [(0, "done", False), (1, "failed", False), (2, "done", False)]
    again = RayEngine(2, address=address).run(CELLS, make_broken, Store(tmp_path), Silent())
    assert [record["status"] for record in again] == ["done", "failed", "done"]
    assert again[1]["error"]["message"] == "no luck with seed 1"  # tried again, and failed in its own way


@pytest.mark.slow
def test_a_full_disk_and_a_folder_out_of_sight_stop_the_run(
    tmp_path: Path, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(StorageFull, match="no space left"):
        RayEngine(2, address=address).run(CELLS, make_full, Store(tmp_path / "full"), Silent())
    monkeypatch.setattr(Path, "touch", lambda self: None)  # as if the worker looked at another machine's disk
    with pytest.raises(StoreError, match=r"does not see .*--shard"):
        RayEngine(1, address=address).run(CELLS, make_work, Store(tmp_path / "elsewhere"), Silent())


@pytest.mark.slow
def test_each_worker_reserves_its_threads(tmp_path: Path, address: str) -> None:
    (record,) = RayEngine(threads=2, address=address).run(CELLS[:1], make_assigned, Store(tmp_path), Silent())
    assert record["reserved"] == {"CPU": 2.0}
    assert record["process"] != os.getpid()


@pytest.mark.slow
def test_the_command_with_a_local_cluster_gives_the_serial_numbers(tmp_path: Path) -> None:
    if not ray_engine.available():
        pytest.skip("needs Ray (uv sync --group ray)")
    from tests.runs.test_execute import numbers

    arguments = ["--preset", "smoke", "--limit", "2", "--images", "5", "--threads", "1", "--export", "--results"]
    command = [sys.executable, "-m", "runs.compare"]
    ray_options = [str(tmp_path / "ray"), "--engine", "ray", "--workers", "2", "--device", "cpu"]
    run = subprocess.run([*command, *arguments, *ray_options], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert compare.main([*arguments, str(tmp_path / "serial"), "--engine", "serial", "--device", "cpu"]) == 0
    found, expected = (Store(tmp_path / name).scan().records for name in ("ray", "serial"))
    assert len(expected) == 2
    assert [numbers(record) for record in found] == [numbers(record) for record in expected]
