"""A benchmark folder: run its instances one by one, keep every result, and compare with what is known.

The list is a CSV file without a header, ``network,property,seconds`` a row, paths relative to it, ``.gz`` found too.
``known_results.csv`` beside it, if there, has columns ``onnx``, ``vnnlib`` and ``consensus`` (sat, unsat or unknown).
Results are appended to ``<results>/<folder>-<list>.jsonl`` as they come; a later run repeats only what is missing.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from runs import store

if TYPE_CHECKING:
    from rich.table import Table

SCHEMA = 1
FORMATS = ("md", "csv", "json")
_VERDICT_OF = {"unsat": "holds", "holds": "holds", "sat": "violated", "violated": "violated"}
DECIDED = ("holds", "violated")
COLUMNS = ("network", "property", "known", "verdict", "against known", "seconds", "bound", "domains", "note")


class ListFailure(ValueError):
    """The list of instances or of known results cannot be used; the message names the file and the line."""


@dataclasses.dataclass(frozen=True)
class Instance:
    """A row of the list: its two names as written, the files they stand for, the seconds, and the known verdict."""

    network: str
    property: str
    network_file: Path
    property_file: Path
    seconds: float
    known: str | None = None

    def identity(self, seed: int) -> dict[str, Any]:
        """What the answer depends on, contents of the files included."""
        return {
            "schema": SCHEMA,
            "network": store.file_sha256(self.network_file),
            "property": store.file_sha256(self.property_file),
            "seconds": self.seconds,
            "seed": seed,
        }


def read(path: Path, seconds: float | None = None) -> list[Instance]:
    """The instances of a list, with known verdicts; `seconds` replaces the time limit of every row.

    Raises:
        FileNotFoundError: the list, a network or a property is missing.
        ListFailure: a row is not ``network,property,seconds``, or the list is empty.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no list of instances {path}")
    known = _known(path.with_name("known_results.csv"))
    instances = []
    with path.open(newline="", encoding="utf-8") as file:
        for number, row in enumerate(csv.reader(file), 1):
            cells = [cell.strip() for cell in row]
            if not any(cells):
                continue
            limit = _positive(cells[2]) if len(cells) == 3 else None
            if limit is None:
                raise ListFailure(f"{path}, line {number}: expected network,property,seconds, got {','.join(row)!r}")
            network, prop = cells[:2]
            instances.append(
                Instance(
                    network,
                    prop,
                    _find(path.parent, network, path, number),
                    _find(path.parent, prop, path, number),
                    seconds if seconds is not None else limit,
                    known.get((_plain(network), _plain(prop))),
                )
            )
    if not instances:
        raise ListFailure(f"{path} lists no instances")
    return instances


def _positive(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if 0 < value < float("inf") else None


def _plain(name: str) -> str:
    return name.removeprefix("./").removesuffix(".gz")


def _find(folder: Path, name: str, path: Path, number: int) -> Path:
    for file in (folder / name, folder / f"{name}.gz", folder / _plain(name)):
        if file.is_file():
            return file
    raise FileNotFoundError(f"{path}, line {number}: neither {folder / name} nor {name}.gz is there")


def _known(path: Path) -> dict[tuple[str, str], str]:
    if not path.is_file():
        return {}
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        missing = {"onnx", "vnnlib", "consensus"} - set(reader.fieldnames or ())
        if missing:
            raise ListFailure(f"{path} has no column {', '.join(sorted(missing))}; it has {reader.fieldnames}")
        rows = [
            (_plain(r["onnx"]), _plain(r["vnnlib"]), _VERDICT_OF.get(r["consensus"].strip().lower())) for r in reader
        ]
    return {(network, prop): verdict for network, prop, verdict in rows if verdict is not None}


@dataclasses.dataclass(frozen=True)
class Result:
    """An instance with its answer, a JSON-able mapping; where it failed, "verdict" is "error" and "error" says why."""

    instance: Instance
    answer: Mapping[str, Any]

    @property
    def verdict(self) -> str:
        return str(self.answer["verdict"])

    @property
    def against_known(self) -> str:
        """ "agrees" | "CONTRADICTS" | "new" (nobody knew) | "open" (undecided here)."""
        if self.verdict not in DECIDED:
            return "open"
        if self.instance.known is None:
            return "new"
        return "agrees" if self.verdict == self.instance.known else "CONTRADICTS"


def run(
    instances: Sequence[Instance],
    answer: Callable[[Instance], Mapping[str, Any]],
    file: Path,
    *,
    seed: int,
    force: bool = False,
) -> Iterator[Result]:
    """Results in order, from `file` where they are there already; new ones are appended to it as they come."""
    file.parent.mkdir(parents=True, exist_ok=True)
    rows, good = store.read_lines(file)
    if file.is_file() and file.stat().st_size > good:
        store.write_atomic(file, file.read_bytes()[:good])  # a torn last line from a run that was killed
    done = {} if force else {json.dumps(row["identity"], sort_keys=True): row["answer"] for row in rows}
    for instance in instances:
        identity = instance.identity(seed)
        known = done.get(json.dumps(identity, sort_keys=True))
        if known is None or known["verdict"] == "error":
            known = dict(answer(instance))
            names = {"onnx": instance.network, "vnnlib": instance.property}
            store.append_lines(file, [{"identity": identity, **names, "answer": known}])
        yield Result(instance, known)


def cells(result: Result) -> tuple[str, ...]:
    """A row of the table, in the order of `COLUMNS`."""
    a = result.answer
    lower = a.get("lower")
    note = a.get("error") or "; ".join(a.get("notes") or ())
    return (
        Path(_plain(result.instance.network)).stem,
        Path(_plain(result.instance.property)).stem,
        result.instance.known or "–",
        result.verdict,
        result.against_known,
        f"{a['seconds']:.1f}",
        "–" if lower is None else f"{lower:.4g}",
        str((a.get("work") or {}).get("domains", "–")),
        str(note),
    )


def table(results: Sequence[Result]) -> Table:
    """The results for a terminal."""
    from rich.table import Table

    drawn = Table()
    for name in COLUMNS if any(cells(r)[-1] for r in results) else COLUMNS[:-1]:
        number = name in ("seconds", "bound", "domains")
        drawn.add_column(name, justify="right" if number else "left", overflow="fold")
    style = {"CONTRADICTS": "bold red", "agrees": "green", "new": "cyan", "open": "dim"}
    for result in results:
        row = cells(result)
        drawn.add_row(*row[: len(drawn.columns)], style="red" if result.verdict == "error" else style[row[4]])
    return drawn


def summary(results: Sequence[Result]) -> list[str]:
    """What the table comes to, in a few lines."""
    decided = [r for r in results if r.instance.known is not None]
    agree = sum(r.against_known == "agrees" for r in results)
    against = sum(r.against_known == "CONTRADICTS" for r in results)
    new = sum(r.against_known == "new" for r in results)
    counts: dict[str, int] = {}
    for r in results:
        counts[r.verdict] = counts.get(r.verdict, 0) + 1
    lines = [
        f"{len(results)} instances: " + ", ".join(f"{n} {name}" for name, n in sorted(counts.items())),
        f"of {len(decided)} with a known result: {agree} agree, {against} contradict, "
        f"{len(decided) - agree - against} open; {new} solved beyond the known ones",
    ]
    solved = [float(r.answer["seconds"]) for r in results if r.verdict in DECIDED]
    if solved:
        lines.append(f"seconds for a solved instance: median {median(solved):.1f}, longest {max(solved):.1f}")
    return lines


def export(results: Sequence[Result], stem: Path, formats: Sequence[str]) -> list[Path]:
    """Write the table as ``<stem>.md``, ``.csv`` or ``.json`` (the latter with full answers)."""
    written = []
    for kind in formats:
        if kind == "json":
            content = json.dumps([as_dict(r) for r in results], indent=1) + "\n"
        elif kind == "csv":
            text = io.StringIO()
            csv.writer(text, lineterminator="\n").writerows([COLUMNS, *map(cells, results)])
            content = text.getvalue()
        else:
            rows = [COLUMNS, ("---",) * len(COLUMNS), *map(cells, results)]
            body = "\n".join("| " + " | ".join(c.replace("|", "\\|") for c in row) + " |" for row in rows)
            content = body + "\n\n" + "\n".join(f"* {line}" for line in summary(results)) + "\n"
        path = stem.with_name(f"{stem.name}.{kind}")
        store.write_atomic(path, content.encode())
        written.append(path)
    return written


def as_dict(result: Result) -> dict[str, Any]:
    """A JSON-able form: names, known verdict, how they compare, and the whole answer."""
    i = result.instance
    names = {"onnx": i.network, "vnnlib": i.property, "timeout": i.seconds, "known": i.known}
    return {**names, "against_known": result.against_known, **result.answer}
