"""Cells, and stand-ins for their work, that other processes import: no torch."""

from __future__ import annotations

import os
from typing import Any

from runs.store import Record, StorageFull
from tests.runs.handmade import make_cell, work

CELLS = [make_cell(method, ratio, seed) for method, ratio in (("dense", 0.0), ("imp", 0.5)) for seed in range(3)]


def make_assigned() -> Any:
    """A work that records what Ray has reserved for its worker."""

    def assigned(cell: Any, slot: Any, progress: Any) -> Record:
        import ray

        reserved = ray.get_runtime_context().get_assigned_resources()
        return {**work(cell, slot, progress), "reserved": reserved, "process": os.getpid()}

    return assigned


def make_full() -> Any:
    def full(cell: Any, slot: Any, progress: Any) -> Record:
        raise StorageFull("no space left while writing the record")

    return full
