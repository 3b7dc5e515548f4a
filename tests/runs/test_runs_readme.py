from __future__ import annotations

import re
from pathlib import Path

import pytest

from runs.packages import ROOT


def test_the_worked_example_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "runs" / "README.md").read_text(), flags=re.S)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    shown = capsys.readouterr().out
    assert "# Leaderboard" in shown
    assert "| magnitude | 50 % | natural |" in shown
    assert len(list((tmp_path / "results").glob("*/record.json"))) == 2
