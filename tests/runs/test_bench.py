from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch

from runs import bench, bench_bounds
from runs.alarm import OutOfTime, limit
from runs.bench_timing import Clock, Spread
from runs.bench_training import Measured

CPU = Clock(torch.device("cpu"))


def run(tmp_path: Path, *arguments: str) -> tuple[dict, str]:
    threads = torch.get_num_threads()
    files = tmp_path / "bench.json", tmp_path / "bench.md"
    try:
        given = [*arguments, "--threads", "1", "--device", "cpu", "--json", str(files[0]), "--markdown", str(files[1])]
        assert bench.main(given) == 0
    finally:
        torch.set_num_threads(threads)
    return json.loads(files[0].read_text()), files[1].read_text()


def test_steps_are_measured_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found, markdown = run(tmp_path, "--rows", "ibp-step", "--repeats", "2", "--width", "0.125", "--cpu-time")
    row, published = found["rows"]
    assert found["clock"] == "CPU seconds"
    assert row["ours"]["n"] == row["reference"]["n"] == 2
    assert 0 < row["ours"]["low"] <= row["ours"]["median"] <= row["ours"]["high"]
    for each in (row, published):
        assert each["ratio"] == pytest.approx(each["ours"]["median"] / each["reference"]["median"])
        assert each["ratio"] > 1  # bounds cost more than the plain pass they contain
        assert each["met"] == (each["ratio"] <= 2.6)
    assert row["what"] in markdown
    assert "ratios" in capsys.readouterr().out


def test_every_objective_and_sampling_are_measured(tmp_path: Path) -> None:
    arguments = ("--rows", "training", "sampling", "--repeats", "1", "--width", "0.125", "--batch", "4")
    found, _ = run(tmp_path, *arguments)
    rows = {row["what"].partition(",")[0]: row for row in found["rows"]}
    assert {"ibp", "crown-ibp", "fgsm", "pgd", "trades"} <= set(rows)
    assert rows["trades"]["ratio"] > rows["ibp"]["ratio"] > 1  # ten more passes cost more than two
    assert 0 < found["rows"][-1]["ratio"] < 3


def test_bounds_of_a_small_net(tmp_path: Path) -> None:
    arguments = ("--nets", "mlp", "--methods", "ibp", "crown", "--images", "1", "2", "--width", "0.1")
    found, markdown = run(tmp_path, "--rows", "bounds", "--repeats", "2", *arguments)
    cells = {(cell["method"], cell["images"]): cell for cell in found["bounds"]}
    assert set(cells) == {(method, n) for method in ("ibp", "crown") for n in (1, 2)}
    for (_, images), cell in cells.items():
        assert cell["passes"] == pytest.approx(cell["seconds"]["median"] / cell["forward"]["median"])
        assert (cell["growth"] is None) == (images == 1)
    assert cells["crown", 1]["lower"] > cells["ibp", 1]["lower"]
    assert "| mlp | crown | 2 |" in markdown


def test_tightness_is_compared_with_auto_lirpa() -> None:
    pytest.importorskip("auto_LiRPA")
    (cell,) = bench_bounds.table(["mlp"], ["crown"], [1], CPU, 1, 0.1, 30.0)
    assert cell.excess is not None
    assert cell.width is not None
    assert cell.excess <= 1e-5
    assert cell.width == pytest.approx(1, abs=1e-3)
    assert cell.faster is not None
    assert cell.theirs is not None
    assert cell.seconds is not None
    assert cell.faster == pytest.approx(cell.theirs.median / cell.seconds.median)


def test_fixed_slopes_have_a_reference_of_their_own() -> None:
    pytest.importorskip("auto_LiRPA")
    (cell,) = bench_bounds.table(["mlp"], ["alpha-crown"], [1], CPU, 1, 0.1, 30.0)
    assert cell.width == pytest.approx(1, abs=1e-2)
    assert cell.faster is not None
    assert any(text.endswith("faster") for text, _ in cell.goals())


def test_without_auto_lirpa_its_columns_are_left_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("certify.lirpa.available", lambda: False)
    arguments = ("--nets", "mlp", "--methods", "ibp", "--images", "1", "--width", "0.1")
    _, markdown = run(tmp_path, "--rows", "bounds", "--repeats", "1", *arguments)
    assert "auto-LiRPA is not installed" in capsys.readouterr().out
    assert "| width ratio |" not in markdown


def test_turns_are_interleaved_and_medians() -> None:
    order: list[str] = []
    first, second = CPU.interleaved(lambda: order.append("a"), lambda: order.append("b"), 3)
    assert order == ["a", "b"] * 4  # one round of warming up
    assert first.n == second.n == 3
    assert Spread.of([3.0, 1.0, 2.0]) == Spread(2.0, 1.0, 3.0, 3)


def test_a_slow_call_is_not_repeated() -> None:
    calls: list[int] = []

    def slow() -> None:
        calls.append(1)
        time.sleep(0.05)

    assert CPU.repeated(slow, 5, budget=0.04).n == len(calls) == 1


def test_a_limit_stops_what_runs_too_long() -> None:
    with pytest.raises(OutOfTime), limit(0.02):
        time.sleep(5)
    with limit(5.0):  # and leaves no alarm behind
        pass


def test_goals_are_judged() -> None:
    one = Spread.of([1.0])
    assert Measured("r", "w", "s", one, one, 2.6, "≤ 2.6").met
    assert not Measured("r", "w", "s", one, one, 0.9, "≥ 0.95").met
    assert Measured("r", "w", "s", one).met is None
    cell = bench_bounds.Cell("mlp", "ibp", 1, Spread.of([3.0]), None, one, excess=float("nan"))
    assert [met for _, met in cell.goals()] == [False, False]


def test_wrong_rows_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.main(["--rows", "ipb-step"])
    assert "invalid choice: 'ipb-step'" in capsys.readouterr().err
    for wrong in (["--repeats", "0"], ["--limit", "0"], ["--images", "0"]):
        with pytest.raises(SystemExit):
            bench.main(wrong)


@pytest.mark.slow
def test_crown_agrees_with_auto_lirpa() -> None:
    pytest.importorskip("auto_LiRPA")
    rows = bench.crown(CPU, 0.125, images=4)
    (apart,) = [row for row in rows if row.what.startswith("largest difference")]
    assert apart.ours.median < 1e-4
