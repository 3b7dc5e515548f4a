"""The worked example runs as printed."""

import re
import tempfile
from pathlib import Path

import models


def test_the_example_runs(tmp_path, monkeypatch):
    text = (Path(models.__file__).parent / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(blocks) == 1
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "elsewhere"))
    (tmp_path / "elsewhere").mkdir()
    exec(compile(blocks[0], "models/README.md", "exec"), {})
    assert sorted(p.name for p in tmp_path.rglob("cnn7.*")) == ["cnn7.json", "cnn7.safetensors"]
    assert [p.name for p in tmp_path.iterdir()] == ["elsewhere"]  # nothing is left in the checkout


def test_every_network_is_listed():
    text = (Path(models.__file__).parent / "README.md").read_text()
    assert all(f"`{name}`" in text for name in models.names())
