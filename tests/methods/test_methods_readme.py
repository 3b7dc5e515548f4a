"""The worked example runs as printed."""

import re
from pathlib import Path

import methods


def test_the_example_runs():
    text = (Path(methods.__file__).parent / "README.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    left = {}
    exec(compile(block, "methods/README.md", "exec"), left)
    assert left["outcome"].history.epochs == 3
    assert left["small"][0].out_channels == 4
