"""Records on disk: ``results/<key>/`` with config, history, per-image verdicts, weights and the final record.

Whole files are written to a temporary name, flushed to disk and renamed, so a reader sees the old file or the new one.
Line files are appended to in whole batches; each line carries a CRC-32, so a torn or damaged tail is recognised and cut
off. An ``flock`` on the folder keeps two runners apart and vanishes with its process, even on ``kill -9``.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from runs.cell import Cell, from_dict

Record = dict[str, Any]
DONE, FAILED = "done", "failed"


class StoreError(RuntimeError):
    """A problem with the results folder."""


class StorageFull(StoreError):
    """The disk (or the quota) is full."""

    @classmethod
    def during(cls, path: Path, doing: str = "writing") -> StorageFull:
        """With what was going on, what is kept, and what to do."""
        return cls(
            f"no space left while {doing} {path}. Finished cells and all verdicts written so far are kept: "
            "free some space and run the same command again, it resumes there."
        )


class Locked(StoreError):
    """Another process is working on this cell."""


_NO_SPACE = tuple(os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT))


def out_of_space(error: BaseException) -> bool:
    """Whether a full disk is behind an error, also where a library put it into words of its own."""
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        if isinstance(link, OSError) and link.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if any(text in str(link) for text in _NO_SPACE):
            return True
        link = link.__cause__ or link.__context__
    return False


def _explain(error: OSError, path: Path, doing: str) -> StoreError:
    if out_of_space(error):
        return StorageFull.during(path, doing)
    if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
        return StoreError(f"may not write {path} ({error.strerror}); choose another folder with --results DIR")
    return StoreError(f"{doing} {path} failed: {error.strerror or error}")


def _sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomic(path: Path, content: bytes) -> None:
    """Replace ``path`` by ``content`` so that a kill at any moment leaves the old file or the new one.

    Raises:
        StorageFull: the disk is full (the old file is untouched).
        StoreError: any other failure of the file system.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise _explain(error, path, "writing") from error


def append_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Append rows as JSON lines with a CRC each, in one write. A failed write is undone.

    Raises:
        StorageFull: the disk is full (the lines before are untouched).
    """
    content = b"".join(_encode(row) for row in rows)
    try:
        with open(path, "ab") as file:
            size = file.tell()
            try:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            except OSError:
                with contextlib.suppress(OSError):
                    os.truncate(path, size)
                raise
    except OSError as error:
        raise _explain(error, path, "appending to") from error


def _encode(row: Mapping[str, Any]) -> bytes:
    body = json.dumps(row, sort_keys=True, allow_nan=True)
    return (json.dumps({"crc": zlib.crc32(body.encode())})[:-1] + ", " + body[1:] + "\n").encode()


def _decode(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    if not isinstance(row, dict):
        return None
    crc = row.pop("crc", None)
    return row if crc == zlib.crc32(json.dumps(row, sort_keys=True, allow_nan=True).encode()) else None


def read_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Intact rows at the start of a line file and their length in bytes; nothing behind a damaged line is trusted."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return [], 0
    rows: list[dict[str, Any]] = []
    good = 0
    for line in content.splitlines(keepends=True):
        row = _decode(line) if line.endswith(b"\n") else None
        if row is None:
            break
        rows.append(row)
        good += len(line)
    return rows, good


def seal(record: Mapping[str, Any]) -> Record:
    """The record with a checksum over its canonical JSON form."""
    body = {name: value for name, value in record.items() if name != "sha256"}
    return {**body, "sha256": hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()}


def read_record(path: Path) -> Record | None:
    """A sealed record, or None where there is no file.

    Raises:
        StoreError: the file is there but damaged (not JSON, wrong checksum, or not a record).
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    try:
        record = json.loads(content)
    except ValueError as error:
        raise StoreError(f"{path} is damaged: {error}") from None
    if not isinstance(record, dict) or record.get("status") not in (DONE, FAILED):
        raise StoreError(f"{path} is damaged: it is not a record")
    if seal(record)["sha256"] != record.get("sha256"):
        raise StoreError(f"{path} is damaged: its checksum does not match")
    return record


@dataclass(frozen=True)
class Slot:
    """The folder of one cell."""

    cell: Cell
    path: Path

    @property
    def model_path(self) -> Path:
        """Stem under which ``models.save`` writes ``model.safetensors`` and ``model.json``."""
        return self.path / "model.safetensors"

    @property
    def mask_path(self) -> Path:
        return self.path / "mask.safetensors"

    @contextlib.contextmanager
    def lock(self, *, wait: bool = False) -> Iterator[Slot]:
        """Hold the cell for this process; left-over temporary files of a killed run are removed.

        Raises:
            Locked: another process holds it and ``wait`` is False.
            StorageFull, StoreError: the folder cannot be made.
        """
        import fcntl

        try:
            self.path.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise _explain(error, self.path, "making") from error
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                raise Locked(f"{self.cell.label}: another process is working on {self.path}") from None
            for leftover in self.path.glob(".*.tmp"):
                leftover.unlink(missing_ok=True)
            yield self
        finally:
            os.close(handle)

    def record(self) -> Record | None:
        """The finished (or failed) record of this cell; a damaged one is set aside as ``record.json.damaged``."""
        path = self.path / "record.json"
        try:
            record = read_record(path)
        except StoreError:
            os.replace(path, path.with_name("record.json.damaged"))
            return None
        if record is not None and record.get("key") != self.cell.key:
            os.replace(path, path.with_name("record.json.damaged"))
            return None
        return record

    def write_record(self, record: Mapping[str, Any]) -> Record:
        """Seal and write the record; the last write of a cell."""
        sealed = seal(record)
        write_atomic(self.path / "record.json", _pretty(sealed))
        return sealed

    def write_config(self) -> None:
        """Write what this cell is, for people and for reuse of its training."""
        config = {"key": self.cell.key, "training_key": self.cell.training_key, "cell": self.cell.to_dict()}
        write_atomic(self.path / "config.json", _pretty(config))

    def write_history(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Replace ``history.jsonl``: one line per epoch, and a last one with ``event: trained``."""
        write_atomic(self.path / "history.jsonl", b"".join(_encode(row) for row in rows))

    def history(self) -> list[dict[str, Any]]:
        """Intact lines of ``history.jsonl``."""
        return read_lines(self.path / "history.jsonl")[0]

    def trained(self) -> dict[str, Any] | None:
        """The line that says training is complete, if it is there and the weights it names are intact."""
        rows = self.history()
        if not rows or rows[-1].get("event") != "trained":
            return None
        for name, wanted in rows[-1].get("files", {}).items():
            path = self.path / name
            if not path.is_file() or file_sha256(path) != wanted:
                return None
        return rows[-1]

    def examples(self) -> list[dict[str, Any]]:
        """Per-image verdicts so far; a torn tail is cut off the file, so that appending goes on after a whole line."""
        path = self.path / "examples.jsonl"
        rows, good = read_lines(path)
        if path.exists() and path.stat().st_size != good:
            os.truncate(path, good)
        return rows

    def keep_examples(self, count: int) -> None:
        """Keep the first ``count`` verdicts only."""
        rows = self.examples()[:count]
        write_atomic(self.path / "examples.jsonl", b"".join(_encode(row) for row in rows))

    def append_examples(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append the verdicts of one batch."""
        append_lines(self.path / "examples.jsonl", rows)

    def clear(self) -> None:
        """Remove everything of this cell except its lock."""
        for item in self.path.iterdir() if self.path.is_dir() else ():
            if item.name != ".lock":
                shutil.rmtree(item) if item.is_dir() else item.unlink()

    def clear_examples(self) -> None:
        (self.path / "examples.jsonl").unlink(missing_ok=True)


@dataclass
class Scan:
    """What a results folder holds: good records, and one line per folder that could not be read."""

    records: list[Record] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Store:
    """A results folder."""

    root: Path

    def slot(self, cell: Cell) -> Slot:
        return Slot(cell, self.root / cell.key)

    def record(self, cell: Cell) -> Record | None:
        """The intact record of a cell, without taking its lock or repairing anything."""
        try:
            record = read_record(self.root / cell.key / "record.json")
        except StoreError:
            return None
        return record if record is not None and record.get("key") == cell.key else None

    def scan(self) -> Scan:
        """Every record under the folder, in the order of their keys."""
        scan = Scan()
        for path in sorted(self.root.glob("*/record.json")):
            try:
                record = read_record(path)
                if record is not None:
                    from_dict(record["cell"])
                    scan.records.append(record)
            except StoreError as error:
                scan.problems.append(f"{error}; run the same command again to redo this cell")
            except (ValueError, KeyError) as error:
                scan.problems.append(f"{path} is no record of a cell known here: {error}")
        return scan

    def same_training(self, cell: Cell) -> Slot | None:
        """Another cell's folder whose network is trained exactly as this cell asks, if there is one."""
        for path in sorted(self.root.glob("*/config.json")):
            if path.parent.name == cell.key:
                continue
            try:
                config = json.loads(path.read_bytes())
                other = from_dict(config["cell"])
            except (OSError, ValueError, KeyError, TypeError):
                continue
            slot = self.slot(other)
            if other.training_key == cell.training_key and slot.path == path.parent and slot.trained() is not None:
                return slot
        return None


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _pretty(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()
