"""The worked example runs as printed."""

import re
from pathlib import Path

import certify


def test_the_example_runs():
    text = (Path(certify.__file__).parent / "README.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    exec(compile(block, "certify/README.md", "exec"), {})
