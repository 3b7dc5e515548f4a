"""Progress of a run: bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Protocol

from runs.cell import Cell
from runs.store import Record

if TYPE_CHECKING:
    from rich.console import Console


class Progress(Protocol):
    """What an engine and a cell at work tell about themselves."""

    def begin(self, cell: Cell) -> None:
        """A cell starts."""

    def step(self, cell: Cell, stage: str, done: float, total: float) -> None:
        """The cell is ``done`` of ``total`` through a stage such as training or certifying."""

    def end(self, cell: Cell, record: Record, *, cached: bool) -> None:
        """A cell is finished, failed, or was already on record."""

    def note(self, text: str) -> None:
        """Something the reader should know."""


class Silent:
    """No output."""

    def begin(self, cell: Cell) -> None: ...

    def step(self, cell: Cell, stage: str, done: float, total: float) -> None: ...

    def end(self, cell: Cell, record: Record, *, cached: bool) -> None: ...

    def note(self, text: str) -> None: ...


def summary(record: Record) -> str:
    """A finished cell in a few words."""
    if record["status"] == "failed":
        error = record["error"]
        return f"FAILED: {error['type']}: {error['message']}"
    parts = [f"{r['label']} {100 * r['verified'] / r['images']:.0f} %" for r in record["results"]]
    return "verified " + ", ".join(parts)


class Lines:
    """One line per cell, for logs."""

    def __init__(self, total: int, console: Console) -> None:
        self.total, self.console = total, console
        self.index = 0
        self.started: dict[Cell, float] = {}

    def begin(self, cell: Cell) -> None:
        self.started[cell] = time.monotonic()

    def step(self, cell: Cell, stage: str, done: float, total: float) -> None: ...

    def end(self, cell: Cell, record: Record, *, cached: bool) -> None:
        self.index += 1
        began = self.started.pop(cell, time.monotonic())
        took = "on record" if cached else f"{time.monotonic() - began:.1f} s"
        self.note(f"[{self.index}/{self.total}] {cell.label} ({took}): {summary(record)}")

    def note(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *exception: object) -> None: ...


class Bars:
    """A bar over all cells and one for each cell at work."""

    def __init__(self, total: int, console: Console) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as RichProgress

        self.bars = RichProgress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            transient=True,
        )
        self.all = self.bars.add_task("cells", total=total)
        self.tasks: dict[Cell, TaskID] = {}

    def begin(self, cell: Cell) -> None:
        self.tasks[cell] = self.bars.add_task(cell.label, total=None)

    def step(self, cell: Cell, stage: str, done: float, total: float) -> None:
        if cell not in self.tasks:
            self.begin(cell)
        self.bars.update(self.tasks[cell], description=f"{cell.label} · {stage}", completed=done, total=total)

    def end(self, cell: Cell, record: Record, *, cached: bool) -> None:
        if cell in self.tasks:
            self.bars.remove_task(self.tasks.pop(cell))
        self.bars.advance(self.all)
        if record["status"] == "failed":
            self.note(f"{cell.label}: {summary(record)}")

    def note(self, text: str) -> None:
        self.bars.console.print(text, markup=False, highlight=False)

    def __enter__(self) -> Bars:
        self.bars.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.bars.stop()


def show(total: int, console: Console) -> Bars | Lines:
    """Bars on a terminal, lines elsewhere."""
    return Bars(total, console) if console.is_terminal else Lines(total, console)
