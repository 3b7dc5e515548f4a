from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from runs.packages import ROOT, ForeignPackage, ours


def test_ours_are_ours() -> None:
    for name in ("datasets", "models", "methods", "certify"):
        assert Path(str(ours(name).__file__)) == ROOT / name / "__init__.py"


def test_a_package_of_the_same_name_from_elsewhere_is_refused(tmp_path: Path) -> None:
    (tmp_path / "datasets").mkdir()
    (tmp_path / "datasets" / "__init__.py").write_text("def describe(): return {}\n")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    run = subprocess.run(
        [sys.executable, "-m", "runs.compare", "--list"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 2
    assert "imported 'datasets' from" in run.stderr
    assert "Hugging Face" in run.stderr
    assert f"cd {ROOT}" in run.stderr


def test_a_namespace_package_is_refused_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "no_such_sister").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ForeignPackage, match="namespace package"):
        ours("no_such_sister")
