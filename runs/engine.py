"""Running many cells: skip what is on record, lock what is not, isolate failures.

An engine takes cells and a ``Work`` function and returns one record per cell. The serial engine is the reference:
another engine must give the same records.
"""

from __future__ import annotations

import traceback
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Protocol

from runs.cell import SCHEMA, Cell
from runs.progress import Progress
from runs.store import DONE, FAILED, Locked, Record, Slot, StorageFull, Store


class Work(Protocol):
    """Turn one cell, whose folder this process holds, into a record (not yet written)."""

    def __call__(self, cell: Cell, slot: Slot, progress: Progress) -> Record: ...


class Engine(Protocol):
    """Runs cells and returns their records in the order of the cells."""

    def run(
        self, cells: Sequence[Cell], work: Work, store: Store, progress: Progress, *, force: bool = False
    ) -> list[Record]:
        """Raises StorageFull on a full disk and KeyboardInterrupt when interrupted; either way the folder resumes."""


def failure(cell: Cell, error: BaseException, stage: str = "") -> Record:
    """The record of a cell that failed: shown in every table, tried again by the next run."""
    return {
        "schema": SCHEMA,
        "key": cell.key,
        "training_key": cell.training_key,
        "status": FAILED,
        "cell": cell.to_dict(),
        "error": {
            "type": type(error).__name__,
            "message": " ".join(str(error).split()) or "(no message)",
            "stage": stage,
            "traceback": "".join(traceback.format_exception(error)),
        },
    }


def attempt(cell: Cell, work: Work, slot: Slot, progress: Progress) -> Record:
    """Run one cell under its lock and write its record, failed or done."""
    try:
        slot.write_config()
        record = work(cell, slot, progress)
    except StorageFull:
        raise
    except Exception as error:
        record = failure(cell, error)
    return slot.write_record(record)


class SerialEngine:
    """One cell after another in this process.

    A cell that another runner holds is put off to the end and then waited for: two runners share the work.
    """

    def run(
        self, cells: Sequence[Cell], work: Work, store: Store, progress: Progress, *, force: bool = False
    ) -> list[Record]:
        unique = list(dict.fromkeys(cells))
        records: dict[Cell, Record] = {}
        queue = deque((cell, False) for cell in unique)
        while queue:
            cell, wait = queue.popleft()
            if not force and (found := _finished(store.record(cell))) is not None:
                records[cell] = found
                progress.end(cell, found, cached=True)
                continue
            slot = store.slot(cell)
            try:
                if wait:
                    progress.note(f"{cell.label}: waiting for another runner to finish it")
                with slot.lock(wait=wait):
                    records[cell] = self._run(cell, work, slot, progress, force=force)
            except Locked:
                queue.append((cell, True))
        return [records[cell] for cell in unique]

    @staticmethod
    def _run(cell: Cell, work: Work, slot: Slot, progress: Progress, *, force: bool) -> Record:
        if force:
            slot.clear()
        elif (found := _finished(slot.record())) is not None:
            progress.end(cell, found, cached=True)
            return found
        progress.begin(cell)
        record = attempt(cell, work, slot, progress)
        progress.end(cell, record, cached=False)
        return record


def _finished(record: Record | None) -> Record | None:
    return record if record is not None and record["status"] == DONE else None


def failed(records: Iterable[Record]) -> list[Record]:
    """The records that failed."""
    return [record for record in records if record["status"] == FAILED]
