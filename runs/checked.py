"""What checks of verdicts have found: in ``check.json`` beside the records, under the checksum of each record.

Nothing here imports torch: leaderboards say how their records fared.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from runs.store import Record, write_atomic

FILE = "check.json"


class OutOfTime(Exception):
    """The budget is spent."""


@dataclass(frozen=True)
class Effort:
    """How hard to look: ``probes`` forward passes for an image and perturbation, ``cross`` images for auto-LiRPA."""

    probes: int = 1000
    cross: int = 2

    def __post_init__(self) -> None:
        if self.probes < 10 or self.cross < 0:
            raise ValueError(f"need --probes >= 10 and --cross >= 0, got {self.probes} and {self.cross}")


@dataclass
class Finding:
    """What came out for one cell. ``breaks`` contradict its verdicts, ``problems`` kept it from being checked.

    ``lost`` VIOLATED have no counterexample on record, and none was found again; nor were they proved to hold.
    """

    holds: int = 0
    violated: int = 0
    probes: int = 0
    rounding: int = 0
    crossed: int = 0
    confirmed: int = 0
    lost: int = 0
    breaks: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    complete: bool = False

    def line(self) -> str:
        """The finding in a few words."""
        if self.problems:
            return "NOT CHECKED: " + "; ".join(self.problems)
        parts = [f"{self.holds} HOLDS and {self.violated} VIOLATED, {self.probes:,} probes"]
        if self.crossed:
            parts.append(f"auto-LiRPA proves {self.confirmed} of {self.crossed}")
        if self.lost:
            parts.append(f"{self.lost} VIOLATED not found again, which decides nothing")
        if self.rounding:
            parts.append(f"{self.rounding} within rounding of zero")
        parts.append(f"{len(self.breaks)} BREAKS: " + "; ".join(self.breaks) if self.breaks else "no break")
        return ", ".join(parts) + ("" if self.complete else " (stopped by the budget)")


def save(root: Path, record: Record, found: Finding, effort: Effort) -> None:
    """Add what was found to ``check.json``, under the checksum of the record that it is about."""
    entries = _read(root)
    entries[record["key"]] = {**vars(found), "record": record["sha256"], "effort": vars(effort)}
    write_atomic(root / FILE, (json.dumps({"cells": entries}, indent=1, sort_keys=True) + "\n").encode())


def _read(root: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError, KeyError):
        entries = json.loads((root / FILE).read_bytes())["cells"]
        return dict(entries)
    return {}


def order(records: Sequence[Record], root: Path) -> list[Record]:
    """The finished records, those first that have not been checked as they are."""
    entries = _read(root)

    def checked(record: Record) -> bool:
        entry = entries.get(record["key"], {})
        return entry.get("record") == record["sha256"] and bool(entry.get("complete"))

    return sorted((r for r in records if r["status"] == "done"), key=checked)


def footer(records: Sequence[Record], root: Path) -> str | None:
    """One line for under a leaderboard: what the last checks of these very records found; None before any."""
    entries = _read(root)
    current = [
        entry for r in records if (entry := entries.get(r["key"])) is not None and entry["record"] == r.get("sha256")
    ]
    if not current:
        return None
    holds, probes = (sum(entry[name] for entry in current) for name in ("holds", "probes"))
    breaks = sum(len(entry["breaks"]) for entry in current)
    done = sum(bool(entry["complete"]) for entry in current)
    return f"Check: {done} of {len(records)} cells, {holds:,} HOLDS re-attacked, {probes:,} probes, " + (
        f"{breaks} BREAKS (see {FILE})." if breaks else "no break."
    )


def summary(findings: Sequence[Finding], cells: int) -> str:
    """The last line of a check over so many cells."""
    holds, violated, probes = (sum(getattr(f, name) for f in findings) for name in ("holds", "violated", "probes"))
    breaks, problems = (sum(len(getattr(f, name)) for f in findings) for name in ("breaks", "problems"))
    done = sum(f.complete for f in findings)
    parts = [f"Checked {done} of {cells} cells: {holds:,} HOLDS, {violated:,} VIOLATED, {probes:,} probes"]
    parts.append(f"{breaks} BREAKS" if breaks else "no break")
    if problems:
        parts.append(f"{problems} cells could not be checked")
    if done + problems < cells:
        parts.append("the same command goes on with the others")
    return ", ".join(parts) + "."
