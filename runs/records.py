"""Records of real runs as one file of JSON lines: what ``pack`` writes and ``report --records`` reads.

The first line says how the records came about; each further line is the record of one cell, whole but for tracebacks,
at full precision and under its checksum. Long strings of verdict bits are written as base64. The files that come with
this clone lie in the folder ``records`` beside this module.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from runs.cell import Cell, from_dict
from runs.store import DONE, FAILED, Record, StoreError, seal, write_atomic

FORMAT = "certprune-records"
VERSION = 1
SHIPPED = Path(__file__).parent / "records"
LONG = 64
"""Bits from which a string of them is written as base64."""


@dataclass(frozen=True)
class About:
    """How the records of a file came about.

    Attributes:
        made_by: the commands, without ``python -m runs.compare``.
        cells, failed: how many records there are, and how many of them are of failed cells.
        seeds: all that occur.
        images: numbers of test images certified, all that occur.
        devices: names, each once.
        versions: of every library, all that occur.
    """

    made_by: str
    cells: int
    failed: int
    seeds: tuple[int, ...]
    images: tuple[int, ...]
    devices: tuple[str, ...]
    versions: dict[str, tuple[str, ...]]

    @property
    def line(self) -> str:
        """One line for under a table."""
        count = f"{self.cells} cells" + (f" ({self.failed} failed)" if self.failed else "")
        seeds = f"seed{'s' if len(self.seeds) != 1 else ''} {', '.join(map(str, self.seeds))}"
        images = f"n = {', '.join(map(str, self.images))} test images"
        torch = ", ".join(self.versions.get("torch", ()))
        parts = [self.made_by, count, seeds, images, ", ".join(self.devices), f"torch {torch}" if torch else ""]
        return "; ".join(part for part in parts if part)


@dataclass(frozen=True)
class Packed:
    """A file of records."""

    path: Path
    about: About
    records: tuple[Record, ...]


def about(records: Sequence[Record], made_by: str) -> About:
    """What the first line of a file says."""
    versions: dict[str, dict[str, None]] = {}
    devices: dict[str, None] = {}
    for record in records:
        own = record.get("environment", {})
        for name, value in own.get("versions", {}).items():
            versions.setdefault(name, {})[str(value)] = None
        if own.get("device"):
            devices[str(own["device"])] = None
    cells = [from_dict(record["cell"]) for record in records]
    return About(
        made_by,
        len(records),
        sum(record["status"] != DONE for record in records),
        tuple(sorted({cell.seed for cell in cells})),
        tuple(sorted({cell.verifier.images for cell in cells})),
        tuple(sorted(devices)),
        {name: tuple(values) for name, values in sorted(versions.items())},
    )


def preset_of(cells: Iterable[Cell]) -> str | None:
    """The suite and preset whose plan holds exactly these cells, as it is asked for; None where there is none."""
    from runs import suites

    wanted = set(cells)
    for suite in suites.suites():
        for preset in suites.preset_names(suite):
            if wanted == set(suites.plan(suite, preset, suites.Selection()).cells):
                return f"{suite} --preset {preset}"
    return None


def pack(records: Sequence[Record], path: Path, made_by: str | None = None) -> Packed:
    """Write records to a file, in the order of their keys.

    Args:
        records: as a results folder has them.
        path: ends in ``.jsonl``; its folder exists.
        made_by: the command behind the records; None where they are those of a whole preset, which is then named.

    Raises:
        ValueError: no records, another ending, no such folder, or unknown how the records came about.
        StoreError: the file cannot be written.
    """
    if not records:
        raise ValueError("there are no records to pack")
    if path.suffix != ".jsonl":
        raise ValueError(f"packed records are JSON lines: name the file something.jsonl, not {path.name}")
    if not path.parent.is_dir():
        raise ValueError(f"there is no folder {path.parent} to write {path.name} to; make it first")
    named = made_by or preset_of(from_dict(record["cell"]) for record in records)
    if named is None:
        raise ValueError(
            f"these {len(records)} records are not exactly those of a preset: say with --made-by how they came about, "
            "for instance --made-by 'arena --preset quick --datasets fashion_mnist'"
        )
    kept = tuple(_without_traceback(record) for record in sorted(records, key=lambda record: str(record["key"])))
    head = about(kept, named)
    lines: list[dict[str, Any]] = [{"format": FORMAT, "version": VERSION, "about": asdict(head)}]
    lines += [_map_strings(record, _shorten) for record in kept]
    text = "".join(json.dumps(line, sort_keys=True, separators=(",", ":"), ensure_ascii=False) + "\n" for line in lines)
    write_atomic(path, text.encode())
    return Packed(path, head, kept)


def read(path: Path) -> Packed:
    """The records of a file.

    Raises:
        FileNotFoundError: there is no such file.
        StoreError: it is damaged; the line is named.
        ValueError: it is no file of packed records, or holds a cell that this version cannot read.
    """
    if path.is_dir():
        raise ValueError(f"{path} is a folder; packed records are a file, and --results reads a folder of records")
    if not path.is_file():
        raise FileNotFoundError(f"there are no packed records at {path}")
    lines = path.read_text(errors="replace").splitlines()
    if not _begins(lines):
        raise ValueError(f"{path} is not a file of packed records (made by `python -m runs.compare pack`)")
    rows = [_parsed(line, path, number) for number, line in enumerate(lines, 1)]
    if rows[0].get("version") != VERSION:
        raise StoreError(f"{path} has version {rows[0].get('version')!r}; this program reads version {VERSION}")
    records = []
    for number, row in enumerate(rows[1:], 2):
        record = _map_strings(row, _lengthen)
        if record.get("status") not in (DONE, FAILED) or seal(record)["sha256"] != record.get("sha256"):
            raise StoreError(f"{path}, line {number} is damaged: it is not a record under its checksum")
        from_dict(record["cell"])
        records.append(record)
    given: dict[str, Any] = rows[0]["about"]
    found = about(records, str(given.get("made_by", "")))
    if found.cells != given.get("cells"):
        raise StoreError(f"{path} is damaged: it should hold {given.get('cells')} records and holds {found.cells}")
    return Packed(path, found, tuple(records))


def read_all(paths: Sequence[Path] = ()) -> list[Packed]:
    """Several files, by default those that come with this clone.

    Raises:
        ValueError: none are there, or two of them hold different records of the same cell.
        FileNotFoundError, StoreError: as :func:`read`.
    """
    chosen = list(dict.fromkeys(paths)) or sorted(SHIPPED.glob("*.jsonl"))
    if not chosen:
        raise ValueError(
            f"no packed records in {SHIPPED}; name files with --records FILE, or write one: "
            "python -m runs.compare pack --results DIR --to FILE.jsonl"
        )
    packed = [read(path) for path in chosen]
    seen: dict[str, tuple[str, Path]] = {}
    for one in packed:
        for record in one.records:
            before = seen.setdefault(record["key"], (record["sha256"], one.path))
            if before[0] != record["sha256"]:
                raise ValueError(
                    f"{before[1]} and {one.path} hold different records of the cell {record['key']} "
                    f"({from_dict(record['cell']).label}); give one of the two files"
                )
    return packed


def merged(packed: Iterable[Packed]) -> list[Record]:
    """The records of several files, each cell once."""
    return list({record["key"]: record for one in packed for record in one.records}.values())


def _begins(lines: Sequence[str]) -> bool:
    """Whether the first line is that of packed records."""
    try:
        head = json.loads(lines[0]) if lines else None
    except ValueError:
        return False
    return isinstance(head, dict) and head.get("format") == FORMAT and isinstance(head.get("about"), dict)


def _parsed(line: str, path: Path, number: int) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise StoreError(f"{path}, line {number} is damaged: {error}") from None
    if not isinstance(row, dict):
        raise StoreError(f"{path}, line {number} is damaged: it is not a JSON object")
    return row


def _without_traceback(record: Record) -> Record:
    """The record as it is, or without the traceback, which names files of the machine that it ran on."""
    if "traceback" not in record.get("error", {}):
        return record
    return seal({**record, "error": {name: text for name, text in record["error"].items() if name != "traceback"}})


def _map_strings(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {name: _map_strings(item, change) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_map_strings(item, change) for item in value]
    return value


def _shorten(text: str) -> str:
    """``bits:N:BASE64`` for a long string of N binary digits, the first one highest; any other string as it is."""
    if len(text) < LONG or re.fullmatch("[01]+", text) is None:
        return text
    size = -(-len(text) // 8)
    content = int(text, 2).to_bytes(size, "big")
    return f"bits:{len(text)}:{base64.b64encode(content).decode()}"


def _lengthen(text: str) -> str:
    match = re.fullmatch(r"bits:(\d+):([A-Za-z0-9+/=]+)", text)
    if match is None:
        return text
    return f"{int.from_bytes(base64.b64decode(match[2]), 'big'):0{int(match[1])}b}"
