from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from runs import bench


def test_rows_are_measured_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "bench.json"
    threads = torch.get_num_threads()
    try:
        arguments = ["--rows", "ibp-step", "--repeat", "2", "--width", "0.125", "--threads", "1", "--json", str(path)]
        assert bench.main(arguments) == 0
    finally:
        torch.set_num_threads(threads)
    row, published = json.loads(path.read_text())
    assert published["ratio"] > 1
    assert row["n"] == 2
    assert row["ours"] > 0
    assert row["ratio"] == pytest.approx(row["ours"] / row["reference"])
    assert row["ratio"] > 1  # bounds cost more than the plain pass they contain
    assert "IBP training step" in capsys.readouterr().out


def test_turns_are_interleaved_and_medians() -> None:
    order: list[str] = []
    first, second = bench.interleaved(lambda: order.append("a"), lambda: order.append("b"), 3, torch.device("cpu"))
    assert order == ["a", "b"] * 4  # one round of warming up
    assert min(first, second) >= 0


def test_wrong_rows_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.main(["--rows", "ipb-step"])
    assert "invalid choice: 'ipb-step'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        bench.main(["--repeat", "0"])


@pytest.mark.slow
def test_crown_agrees_with_auto_lirpa() -> None:
    pytest.importorskip("auto_LiRPA")
    rows = bench.crown(torch.device("cpu"), 0.125, images=4)
    (apart,) = [row for row in rows if row.what.startswith("largest difference")]
    assert apart.ours < 1e-4
