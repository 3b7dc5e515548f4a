"""Timing and memory for the bench: repeated, interleaved, within a budget, aware of the device."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Spread:
    """Median of `n` repetitions, and the smallest and largest of them."""

    median: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        """The spread of one or more values."""
        return cls(statistics.median(values), min(values), max(values), len(values))

    def text(self, unit: str = "") -> str:
        """``median [low-high]`` with three digits each."""
        between = f" [{self.low:.3g}–{self.high:.3g}]" if self.n > 1 else ""
        return f"{self.median:.3g}{between}{' ' + unit if unit else ''}"


@dataclass(frozen=True)
class Clock:
    """Seconds on `device`: of the wall, or, with `cpu`, of all threads of this process (on a busy machine)."""

    device: torch.device
    cpu: bool = False

    def once(self, function: Callable[[], object]) -> float:
        """Seconds of one call; on CUDA between two events on the current stream."""
        import torch

        if self.device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            function()
            end.record()
            torch.cuda.synchronize(self.device)
            return float(begin.elapsed_time(end)) / 1e3
        now = time.process_time if self.cpu else time.perf_counter
        start = now()
        function()
        return now() - start

    def repeated(self, function: Callable[[], object], repeat: int, budget: float = float("inf")) -> Spread:
        """Up to `repeat` calls; no further one once they took `budget` seconds of the wall together.

        The first call warms up and is dropped, unless it alone used a fifth of the budget.
        """
        started = time.perf_counter()
        first = self.once(function)
        slow = time.perf_counter() - started > budget / 5
        found = [first] if slow or repeat < 1 else []
        while len(found) < repeat and (not found or time.perf_counter() - started < budget):
            found.append(self.once(function))
        return Spread.of(found)

    def interleaved(
        self, first: Callable[[], object], second: Callable[[], object], repeat: int
    ) -> tuple[Spread, Spread]:
        """Two functions in turns, so that a change of the machine's load meets both alike; one warm-up each."""
        times: tuple[list[float], list[float]] = ([], [])
        for function in (first, second):
            function()
        for _ in range(repeat):
            for function, found in zip((first, second), times):
                found.append(self.once(function))
        return Spread.of(times[0]), Spread.of(times[1])


def settle_memory() -> None:
    """Give freed memory back to the system, so that a peak measured from here on is of what comes."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
