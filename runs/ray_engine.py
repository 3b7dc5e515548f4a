"""Running cells on a Ray cluster: the only importer of Ray (``uv sync --group ray``).

Each worker is an actor in a process of its own that runs the serial engine on one cell at a time, so that locks,
records and failures are those of a serial run. Records go to the results folder directly: workers on other machines
must see it under the same path, and the clone too. Where machines share no file, use shards instead.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import threading
import time
import uuid
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from runs.cell import Cell
from runs.engine import Factory, SerialEngine, Work, bury, finished
from runs.progress import Progress
from runs.store import Record, Store, StoreError

INSTALL = "--engine ray needs Ray, which is not installed; run `uv sync --group ray`, or choose --engine processes"

PATIENCE = 20.0
"""Seconds without any free worker after which the user hears that the cluster is waited for."""

_OBJECTS = 100_000_000  # bytes of a local cluster's object store: records are small


class RayMissing(ImportError):
    """Ray is not installed."""


def available() -> bool:
    """Whether Ray is installed (without importing it)."""
    return importlib.util.find_spec("ray") is not None


@dataclass(frozen=True)
class RayEngine:
    """Several cells at once on a Ray cluster.

    Attributes:
        workers: cells at once; None for one a GPU where GPUs are used, else for as many as the cluster's cores allow.
        threads: CPU threads a worker, which Ray reserves as cores.
        gpus: the fraction of a GPU that each worker gets: 0.5 puts two on one GPU; 0 uses none; None shares the
            cluster's GPUs out evenly among the workers, at most one each.
        address: of a running cluster ("auto" finds the one on this machine); None starts one here and stops it after.
    """

    workers: int | None = None
    threads: int = 1
    gpus: float | None = None
    address: str | None = None

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 1:
            raise ValueError(f"an engine needs at least one worker, got {self.workers}")
        if self.threads < 1:
            raise ValueError(f"a worker needs at least one thread, got {self.threads}")
        if self.gpus is not None and (self.gpus < 0 or (self.gpus > 1 and self.gpus != int(self.gpus))):
            raise ValueError(f"GPUs a worker: a fraction up to 1 or a whole number, got {self.gpus}")

    def run(
        self, cells: Sequence[Cell], work: Factory, store: Store, progress: Progress, *, force: bool = False
    ) -> list[Record]:
        """As the serial engine's; ``work`` is a picklable function that makes the ``Work`` inside each worker.

        Raises:
            RayMissing: Ray is not installed.
            ConnectionError: there is no cluster at the address.
            StoreError: a worker does not see the results folder, or cannot write to it.
            RuntimeError: workers die before they take up a cell.
        """
        unique = list(dict.fromkeys(cells))
        records: dict[Cell, Record] = {}
        for cell in unique if not force else ():
            if (found := finished(store.record(cell))) is not None:
                records[cell] = found
                progress.end(cell, found, cached=True)
        left = deque(cell for cell in unique if cell not in records)
        if left:
            absolute = Store(store.root.resolve())
            with self._cluster(len(left)) as ray, _mark(absolute.root) as mark:
                _Dispatch(ray, self._placement(ray, len(left)), work, absolute, progress, force, mark).all(
                    left, records
                )
        return [records[cell] for cell in unique]

    @contextlib.contextmanager
    def _cluster(self, cells: int) -> Iterator[Any]:
        """Ray, connected; a cluster that was started here is stopped at the end."""
        ray = _library()
        if ray.is_initialized():
            yield ray
            return
        quiet = {"logging_level": "error", "log_to_driver": False}
        if self.address is None:
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a run tells nobody about itself
            cores = max(os.cpu_count() or 1, min(self.workers or 1, cells) * self.threads)
            ray.init("local", num_cpus=cores, include_dashboard=False, object_store_memory=_OBJECTS, **quiet)
        else:
            try:
                ray.init(address=self.address, **quiet)
            except (ConnectionError, ValueError) as error:
                raise ConnectionError(
                    f"no Ray cluster answers at {self.address!r} ({' '.join(str(error).split())}); start one with "
                    "`ray start --head`, or leave --address out to start one for this run"
                ) from None
        try:
            yield ray
        finally:
            ray.shutdown()

    def _placement(self, ray: Any, cells: int) -> _Placement:
        """How many workers on what share of the cluster."""
        has = ray.cluster_resources()
        cores, cards = int(has.get("CPU", 0)), float(has.get("GPU", 0.0))
        workers = self.workers
        if workers is None:
            by_card = int(cards / self.gpus) if self.gpus else int(cards) if self.gpus is None else 0
            workers = max(1, min(by_card or cores, cores // self.threads))
        workers = min(workers, cells)
        share = self.gpus
        if share is None:
            share = min(1.0, int(1000 * cards / workers) / 1000)
        if share > cards:
            raise ValueError(f"a worker asks for {share:g} GPUs, but the cluster has {cards:g}")
        if self.threads > cores:
            raise ValueError(f"a worker asks for {self.threads} cores, but the cluster has {cores}")
        return _Placement(workers, self.threads, share)


@dataclass(frozen=True)
class _Placement:
    """How many workers, and what Ray reserves for each."""

    workers: int
    threads: int
    gpus: float


@contextlib.contextmanager
def _mark(root: Path) -> Iterator[Path]:
    """A file in the results folder that a worker must be able to see."""
    mark = root / f".ray-{uuid.uuid4().hex}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        mark.touch()
    except OSError as error:
        raise StoreError(f"may not write {root} ({error.strerror}); choose another folder with --results DIR") from None
    try:
        yield mark
    finally:
        mark.unlink(missing_ok=True)


class _Dispatch:
    """Hands cells to workers and collects what comes back."""

    def __init__(
        self, ray: Any, placement: _Placement, work: Factory, store: Store, progress: Progress, force: bool, mark: Path
    ) -> None:
        self.ray, self.placement, self.work, self.store = ray, placement, work, store
        self.progress, self.force, self.mark = progress, force, mark
        self.busy: dict[Any, tuple[Any, Cell | None]] = {}  # reference of a call -> its worker and cell
        self.news: dict[Any, Any] = {}  # reference of a call for news -> its worker
        self.alive: list[Any] = []
        self.ready = False  # whether any worker has ever got as far as a cell

    def all(self, left: deque[Cell], records: dict[Cell, Record]) -> None:
        """Run the cells in ``left``; their records are added to ``records`` as they come."""
        started, told = time.monotonic(), False
        try:
            for _ in range(self.placement.workers):
                self._hire()
            while self.busy:
                done, _ = self.ray.wait([*self.busy, *self.news], num_returns=1, timeout=1.0)
                for reference in done:
                    if reference in self.news:
                        self._tell(reference)
                    else:
                        self._collect(reference, left, records)
                if not self.ready and not told and time.monotonic() - started > PATIENCE:
                    told = True
                    self.progress.note("waiting for the Ray cluster to start workers or to have resources free")
        finally:
            for worker in self.alive:
                self.ray.kill(worker)

    def _hire(self) -> None:
        """Start a worker; it takes a cell once it is ready."""
        kind = self.ray.remote(concurrency_groups={"news": 1})(_Worker)
        worker = kind.options(num_cpus=self.placement.threads, num_gpus=self.placement.gpus).remote()
        self.alive.append(worker)
        self.busy[worker.prepare.remote(self.work, self.mark)] = worker, None

    def _collect(self, reference: Any, left: deque[Cell], records: dict[Cell, Record]) -> None:
        worker, cell = self.busy.pop(reference)
        try:
            result = self.ray.get(reference)
        except self.ray.exceptions.RayTaskError as error:
            raise error.cause from None
        except self.ray.exceptions.RayError as error:
            self.alive.remove(worker)
            if cell is None:
                raise RuntimeError(
                    f"Ray workers die before they take up a cell; --engine serial shows why ({error})"
                ) from None
            records[cell] = bury(cell, self.store, self.progress)
            if left:
                self._hire()
            return
        if cell is None:
            self.ready = True
            self.news[worker.news.options(concurrency_group="news").remote()] = worker
        else:
            records[cell], cached = result
            self.progress.end(cell, records[cell], cached=cached)
        if left:
            following = left.popleft()
            self.progress.begin(following)
            self.busy[worker.run.remote(following, self.store, self.force)] = worker, following

    def _tell(self, reference: Any) -> None:
        """Show a worker's news and ask it for more."""
        worker = self.news.pop(reference)
        try:
            news = self.ray.get(reference)
        except self.ray.exceptions.RayError:
            return  # it died; the call for its cell says so
        running = {cell for _, cell in self.busy.values()}
        for name, arguments in news:
            if name == "note" or arguments[0] in running:  # a step of a cell that is over would bring its bar back
                getattr(self.progress, name)(*arguments)
        self.news[worker.news.options(concurrency_group="news").remote()] = worker


class _Worker:
    """A process that runs one cell after another. ``news`` is called beside the others, in a thread of its own."""

    def __init__(self) -> None:
        self._work: Work | None = None
        self._news = _News()

    def prepare(self, work: Factory, mark: Path) -> None:
        """Make the work, after a look at whether this machine sees the results folder."""
        if not mark.exists():
            raise StoreError(
                f"a Ray worker on {os.uname().nodename} does not see {mark.parent}: give a --results folder that every "
                "machine of the cluster shares, or run --shard I/N on each and copy the folders together"
            )
        self._work = work()

    def run(self, cell: Cell, store: Store, force: bool) -> tuple[Record, bool]:
        """The record of a cell, and whether another runner had made it already."""
        assert self._work is not None
        (record,) = SerialEngine().run([cell], self._work, store, self._news, force=force)
        return record, self._news.cached

    def news(self) -> list[tuple[str, tuple[Any, ...]]]:
        """Calls of ``Progress`` since the last time; waits until there are some."""
        return self._news.take()


class _News:
    """Progress of a worker, kept until the driver asks."""

    def __init__(self) -> None:
        self.cached = False
        self._fresh = threading.Event()
        self._lock = threading.Lock()
        self._notes: list[tuple[str, tuple[Any, ...]]] = []
        self._step: tuple[str, tuple[Any, ...]] | None = None

    def begin(self, cell: Cell) -> None: ...

    def step(self, cell: Cell, stage: str, done: float, total: float) -> None:
        with self._lock:
            self._step = "step", (cell, stage, done, total)  # only the last one matters
        self._fresh.set()

    def end(self, cell: Cell, record: Record, *, cached: bool) -> None:
        self.cached = cached

    def note(self, text: str) -> None:
        with self._lock:
            self._notes.append(("note", (text,)))
        self._fresh.set()

    def take(self, most: float = 30.0, least: float = 0.2) -> list[tuple[str, tuple[Any, ...]]]:
        """What there is, after at least ``least`` and at most ``most`` seconds."""
        time.sleep(least)  # an epoch may take a millisecond; nobody reads that fast
        self._fresh.wait(most)
        with self._lock:
            self._fresh.clear()
            found = [*self._notes, *([self._step] if self._step else [])]
            self._notes, self._step = [], None
        return found


def require() -> None:
    """Raise RayMissing, which says how to get it, unless Ray is installed."""
    if not available():
        raise RayMissing(INSTALL)


def _library() -> ModuleType:
    require()
    return importlib.import_module("ray")
