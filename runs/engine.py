"""Running many cells: skip what is on record, lock what is not, isolate failures.

An engine takes cells and returns one record per cell, in their order. The serial engine is the reference: another
engine must give the same records. Every engine raises StorageFull when the disk is full and KeyboardInterrupt when
interrupted; either way the folder resumes.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import re
import signal
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.queues import Queue
from queue import Empty
from typing import Any, Protocol

from runs.cell import SCHEMA, Cell
from runs.progress import Progress
from runs.store import DONE, FAILED, Locked, Record, Slot, StorageFull, Store, out_of_space


class Work(Protocol):
    """Turn one cell, whose folder this process holds, into a record (not yet written)."""

    def __call__(self, cell: Cell, slot: Slot, progress: Progress) -> Record: ...


Factory = Callable[[], Work]
"""Makes the ``Work`` in the process that does it."""


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
        if out_of_space(error):  # from a library that writes files itself: no fault of the cell
            raise StorageFull.during(slot.path) from error
        record = failure(cell, error)
    return slot.write_record(record)


def bury(cell: Cell, store: Store, progress: Progress) -> Record:
    """Write the record of a cell whose process died under it."""
    error = ChildProcessError("the process of this cell died: it was killed, or ran out of memory")
    slot = store.slot(cell)
    with slot.lock(wait=True):
        record = slot.write_record(failure(cell, error))
    progress.end(cell, record, cached=False)
    return record


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
            if not force and (found := finished(store.record(cell))) is not None:
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
        elif (found := finished(slot.record())) is not None:
            progress.end(cell, found, cached=True)
            return found
        progress.begin(cell)
        record = attempt(cell, work, slot, progress)
        progress.end(cell, record, cached=False)
        return record


def finished(record: Record | None) -> Record | None:
    """The record of a cell that need not be run again, else None."""
    return record if record is not None and record["status"] == DONE else None


class ProcessEngine:
    """Several cells at once, each in a process of its own.

    Each process runs the serial engine on one cell at a time, so that locks, records and failures are the same. When a
    process dies (killed, out of memory) the cells at work fail, and the others go on in fresh processes.
    """

    def __init__(self, workers: int) -> None:
        if workers < 1:
            raise ValueError(f"an engine needs at least one worker, got {workers}")
        self.workers = workers

    def run(
        self, cells: Sequence[Cell], work: Factory, store: Store, progress: Progress, *, force: bool = False
    ) -> list[Record]:
        """As the serial engine's; ``work`` is a picklable function that makes the ``Work`` inside each process."""
        unique = list(dict.fromkeys(cells))
        records: dict[Cell, Record] = {}
        while left := [cell for cell in unique if cell not in records]:
            finished = len(records)
            self._round(left, work, store, progress, force, records)
            if len(records) == finished:
                raise RuntimeError("worker processes die before they take up a cell; --engine serial shows why")
        return [records[cell] for cell in unique]

    def _round(
        self,
        cells: Sequence[Cell],
        work: Factory,
        store: Store,
        progress: Progress,
        force: bool,
        records: dict[Cell, Record],
    ) -> None:
        """Run cells until they are all done or a process dies; finished ones are added to ``records``."""
        context = multiprocessing.get_context("spawn")
        events = context.Queue()
        running: set[Cell] = set()
        over = threading.Event()
        listener = threading.Thread(target=_listen, args=(events, progress, running, over), daemon=True)
        listener.start()
        pool = ProcessPoolExecutor(self.workers, context, _start, (work, events))
        try:
            futures = {pool.submit(_one, cell, store, force): cell for cell in cells}
            for future in as_completed(futures):
                try:
                    records[futures[future]] = future.result()
                except BrokenProcessPool:
                    break
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            over.set()
            listener.join(timeout=5)
        for cell in [cell for cell in cells if cell in running and cell not in records]:
            records[cell] = bury(cell, store, progress)


_WORK: Work | None = None
_EVENTS: Queue[Any] | None = None


def _start(work: Factory, events: Queue[Any]) -> None:
    """Prepare a worker process."""
    global _WORK, _EVENTS
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # an interrupt ends the process; its folder resumes
    threading.Thread(target=_follow_parent, daemon=True).start()
    _WORK, _EVENTS = work(), events


def _follow_parent() -> None:
    """End this process when its parent does, even on ``kill -9``: a new run should find no one at its cells."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def _one(cell: Cell, store: Store, force: bool) -> Record:
    """Run one cell in a worker process."""
    assert _WORK is not None
    assert _EVENTS is not None
    return SerialEngine().run([cell], _WORK, store, _Sender(_EVENTS), force=force)[0]


class _Sender:
    """Progress of a worker process, sent to the parent."""

    def __init__(self, events: Queue[Any]) -> None:
        self._events = events

    def begin(self, cell: Cell) -> None:
        self._events.put(("begin", (cell,), {}))

    def step(self, cell: Cell, stage: str, done: float, total: float) -> None:
        self._events.put(("step", (cell, stage, done, total), {}))

    def end(self, cell: Cell, record: Record, *, cached: bool) -> None:
        # What a line of progress shows; the whole record comes back as the result.
        short = {name: record[name] for name in ("status", "error", "results") if name in record}
        short["results"] = [{k: r[k] for k in ("label", "verified", "images")} for r in record.get("results", ())]
        self._events.put(("end", (cell, short), {"cached": cached}))

    def note(self, text: str) -> None:
        self._events.put(("note", (text,), {}))


def _listen(events: Queue[Any], progress: Progress, running: set[Cell], over: threading.Event) -> None:
    """Hand the workers' events to the parent's progress, and keep track of which cells they are at."""
    while True:
        try:
            name, arguments, named = events.get(timeout=0.2)
        except Empty:
            if over.is_set():
                return
            continue
        if name == "begin":
            running.add(arguments[0])
        elif name == "end":
            running.discard(arguments[0])
        getattr(progress, name)(*arguments, **named)


@dataclass(frozen=True)
class Shard:
    """Part ``index`` of ``count`` of a plan, counted from 1: machines that share no file can each run one.

    The parts of a plan are the same everywhere, share no cell, and cost about the same. Cells that share a trained
    network lie in the same part, so that it is trained once.
    """

    index: int
    count: int

    def __post_init__(self) -> None:
        if not 1 <= self.index <= self.count:
            raise ValueError(f"a shard I/N needs 1 <= I <= N, got {self.index}/{self.count}")

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Read ``2/3``.

        Raises:
            ValueError: not of this form, or out of range.
        """
        match = re.fullmatch(r"\s*(\d+)\s*/\s*(\d+)\s*", text)
        if match is None:
            raise ValueError(f"cannot read shard {text!r}; expected I/N such as 1/4")
        return cls(int(match[1]), int(match[2]))

    def of(self, cells: Sequence[Cell], costs: Sequence[float]) -> list[int]:
        """Positions of this part's cells, in the plan's order; ``costs`` are expected seconds, one a cell.

        Trainings go, the most expensive first, to the part that has least to do so far.
        """
        groups: dict[str, list[int]] = {}
        for position, cell in enumerate(cells):
            groups.setdefault(cell.training_key, []).append(position)
        loads = [0.0] * self.count
        mine: list[int] = []
        for positions in sorted(groups.values(), key=lambda own: (-sum(costs[i] for i in own), own[0])):
            least = min(range(self.count), key=lambda part: (loads[part], part))
            loads[least] += sum(costs[i] for i in positions)
            mine += positions if least == self.index - 1 else []
        return sorted(mine)


def failed(records: Iterable[Record]) -> list[Record]:
    """The records that failed."""
    return [record for record in records if record["status"] == FAILED]
