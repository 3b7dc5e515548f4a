"""Every method has a README whose examples run as printed, after the preamble of methods/README.md."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import methods

FOLDER = Path(methods.__file__).parent


def blocks(path: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", path.read_text(), flags=re.DOTALL)


@pytest.mark.parametrize("name", methods.names())
def test_the_examples_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = blocks(FOLDER / name / "README.md")
    assert found
    left = {}
    (preamble,) = blocks(FOLDER / "README.md")
    exec(compile(preamble, "methods/README.md", "exec"), left)
    for block in found:
        exec(compile(block, f"methods/{name}/README.md", "exec"), left)
