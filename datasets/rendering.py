"""What sets that are rendered have in common: splits, chunks drawn here or in processes of their own, names."""

from __future__ import annotations

import difflib
import multiprocessing
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from datasets.splits import SPLITS

Progress = Callable[[int, int], None]
Job = TypeVar("Job")
Chunk = TypeVar("Chunk")


def split_number(split: str) -> int:
    """Place of a split in the seeds of its images. Raises ValueError naming close matches."""
    if split not in SPLITS:
        raise ValueError(unknown("split", split, SPLITS))
    return SPLITS.index(split)


def unknown(what: str, name: str, known: Iterable[str]) -> str:
    """The message for a name that is not among the `known` ones, with the closest of them."""
    known = list(known)
    close = difflib.get_close_matches(str(name), known, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return f"unknown {what} {name!r}, expected one of {', '.join(known)}{hint}"


def render_chunks(
    render: Callable[[Job], Chunk],
    jobs: Sequence[Job],
    counts: Sequence[int],
    what: str,
    workers: int | None,
    progress: Progress | None,
) -> list[Chunk]:
    """`render` of every job, in the order of the jobs.

    Args:
        render: a function that processes can import.
        jobs: what it is called with.
        counts: images of each job.
        what: is rendered, for the message when a process dies.
        workers: processes (spawned); None means one for each usable core, 1 renders in this process.
        progress: called as `progress(done, total)` after every job, in this process.

    Raises:
        RuntimeError: a process died.
    """
    workers = min(workers or _cores(), len(jobs))
    if workers == 1:
        return _here(render, jobs, counts, progress)
    return _apart(render, jobs, counts, what, workers, progress)


def _here(
    render: Callable[[Job], Chunk], jobs: Sequence[Job], counts: Sequence[int], progress: Progress | None
) -> list[Chunk]:
    chunks, done = [], 0
    for job, count in zip(jobs, counts, strict=True):
        chunks.append(render(job))
        done += count
        if progress is not None:
            progress(done, sum(counts))
    return chunks


def _apart(
    render: Callable[[Job], Chunk],
    jobs: Sequence[Job],
    counts: Sequence[int],
    what: str,
    workers: int,
    progress: Progress | None,
) -> list[Chunk]:
    # Spawned, not forked: the caller may hold CUDA or threads, which a fork would break.
    done = 0
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = {pool.submit(render, job): count for job, count in zip(jobs, counts, strict=True)}
        try:
            for future in as_completed(futures):
                future.result()
                done += futures[future]
                if progress is not None:
                    progress(done, sum(counts))
        except BrokenProcessPool as error:
            raise RuntimeError(
                f"a process that renders the {what} died. Expected: enough memory, and a main module that can be "
                "imported (in a script, work goes under `if __name__ == '__main__':`). Or render with workers=1."
            ) from error
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [future.result() for future in futures]


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
