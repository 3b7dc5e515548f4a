"""Parts of a plan: every cell in exactly one, the same on every machine, about equal in cost."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runs import compare
from runs.engine import SerialEngine, Shard
from runs.progress import Silent
from runs.store import Store
from runs.suites import Selection, plan
from tests.runs.handmade import make_cell, work

CELLS = [make_cell(seed=seed, images=images) for seed in range(6) for images in (5, 10)]


@given(st.integers(1, 9), st.lists(st.floats(0.1, 100.0), min_size=12, max_size=12))
def test_shards_are_a_partition_that_keeps_trainings_together(count: int, costs: list[float]) -> None:
    parts = [Shard(i, count).of(CELLS, costs) for i in range(1, count + 1)]
    assert sorted(i for part in parts for i in part) == list(range(12))
    assert all(part == sorted(part) for part in parts)
    trainings = [{CELLS[i].training_key for i in part} for part in parts]
    assert sum(map(len, trainings)) == 6
    # The fullest part is at most one training above the emptiest: nothing could be moved for the better.
    loads = [sum(costs[i] for i in part) for part in parts]
    largest = max(costs[2 * k] + costs[2 * k + 1] for k in range(6))
    assert max(loads) - min(loads) <= largest + 1e-9


def test_one_shard_is_the_plan() -> None:
    cells = plan("arena", "quick", Selection())
    assert Shard(1, 1).of(cells.cells, cells.costs) == list(range(len(cells.cells)))


def test_shards_of_a_real_plan_cost_about_the_same() -> None:
    cells = plan("arena", "quick", Selection())
    costs = [sum(cells.costs[i] for i in Shard(k, 3).of(cells.cells, cells.costs)) for k in (1, 2, 3)]
    assert max(costs) <= 1.1 * min(costs)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0/3", "1 <= I <= N, got 0/3"),
        ("4/3", "got 4/3"),
        ("1/0", "got 1/0"),
        ("1", "expected I/N such as 1/4"),
        ("a/b", "cannot read shard 'a/b'"),
        ("-1/3", "cannot read shard"),
    ],
)
def test_wrong_shards_are_explained(text: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match=message):
        Shard.parse(text)
    assert compare.main(["--preset", "smoke", f"--shard={text}", "--dry-run"]) == 2
    assert "error:" in capsys.readouterr().err


def test_the_command_takes_the_shard(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    cells = plan("arena", "smoke", Selection()).cells
    seen: list[str] = []
    for part in ("1/3", "2/3", "3/3"):
        assert compare.main(["--preset", "smoke", "--shard", part, "--dry-run", "--results", str(tmp_path)]) == 0
        shown = capsys.readouterr().out
        assert f"shard {part}: " in shown
        seen += [cell.key for cell in cells if cell.key in shown]
    assert sorted(seen) == sorted(cell.key for cell in cells)


def test_results_of_shards_that_share_nothing_are_put_together_by_copying(tmp_path: Path) -> None:
    costs = [1.0] * len(CELLS)
    for k in (1, 2):
        mine = [CELLS[i] for i in Shard(k, 2).of(CELLS, costs)]
        SerialEngine().run(mine, work, Store(tmp_path / f"machine{k}"), Silent())
    shutil.copytree(tmp_path / "machine1", tmp_path / "both")
    shutil.copytree(tmp_path / "machine2", tmp_path / "both", dirs_exist_ok=True)
    SerialEngine().run(CELLS, work, Store(tmp_path / "whole"), Silent())
    both, whole = (Store(tmp_path / name).scan() for name in ("both", "whole"))
    assert both.problems == []
    assert both.records == whole.records


def test_ray_options_go_with_ray(capsys: pytest.CaptureFixture[str]) -> None:
    assert compare.main(["--preset", "smoke", "--address", "auto", "--dry-run"]) == 2
    assert "--address and --gpus-per-worker go with --engine ray" in capsys.readouterr().err
