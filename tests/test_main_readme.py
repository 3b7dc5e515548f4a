"""The README's Python examples run as printed, and its leaderboards are those of the records that ship."""

import re
from pathlib import Path

import pytest

from runs import leaderboard, records, report

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_the_examples_run(number, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(BLOCKS[number], f"README.md, example {number + 1}", "exec"), {})


def test_every_link_leads_somewhere():
    links = re.findall(r"\]\(([^)#]+)\)", (ROOT / "README.md").read_text())
    assert links
    assert all((ROOT / link).exists() for link in links if "://" not in link)


def _printed():
    """The rows of the README's leaderboards, each with its radius, by heading."""
    found, headings = [], None
    for line in (ROOT / "README.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[0] == "ε":
            headings = cells
        elif not line.startswith("|"):
            headings = None
        elif headings and not set(cells[0]) <= set(":- "):
            found.append(dict(zip(headings, cells, strict=True)))
    return found


def test_its_leaderboards_are_those_of_the_records():
    recorded = set()
    for table in leaderboard.build(records.merged(records.read_all())):
        if table.perturbation.kind == "linf":
            for row in table.rows:
                cells = {column.heading: column.text(row, table) for column in report.columns(table)}
                recorded.add(frozenset((cells | {"ε": f"{table.perturbation.magnitude:g}"}).items()))
    printed = _printed()
    assert len(printed) > 20
    for row in printed:
        wanted = {(heading, value) for heading, value in row.items() if not heading.startswith("Place")}
        assert any(wanted <= own for own in recorded), row
