"""Checkpoints of a training run: one checked file, replaced atomically, from which a run goes on exactly."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import os
from pathlib import Path
from typing import Any

import torch

from methods.files import write_atomically

MAGIC = b"certprune-train1"


class CheckpointError(RuntimeError):
    """A checkpoint is damaged or belongs to another run."""


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Where to keep a run's state.

    Args:
        folder: directory for ``train.ckpt``; made when needed. Each phase of a method uses a folder below it.
        seconds: least time between two writes. The last epoch is always written; a kill loses at most the epochs since
            the last write, which are then trained again to the same numbers.
    """

    folder: Path
    seconds: float = 10.0

    @classmethod
    def of(cls, where: Checkpoint | str | os.PathLike[str] | None) -> Checkpoint | None:
        """A checkpoint from a folder; itself; or None."""
        return where if where is None or isinstance(where, Checkpoint) else cls(Path(where))

    def child(self, name: str) -> Checkpoint:
        """The checkpoint of a phase."""
        return Checkpoint(self.folder / name, self.seconds)

    @property
    def path(self) -> Path:
        """The file."""
        return self.folder / "train.ckpt"

    def save(self, state: dict[str, Any]) -> None:
        """Write `state` (tensors and plain containers), replacing the file in one step."""
        write(self.path, state)

    def load(self, identity: str) -> dict[str, Any] | None:
        """The state last saved, on the CPU, or None when there is none.

        Raises:
            CheckpointError: damaged file, or one whose ``state["identity"]`` differs from `identity`.
        """
        if not self.path.exists():
            return None
        state = read(self.path)
        if state.get("identity") != identity:
            raise CheckpointError(
                f"{self.path} belongs to a run with other settings, seed, mask or initial weights; "
                "delete it to start afresh, or use another checkpoint folder"
            )
        return state


def write(path: Path, state: dict[str, Any]) -> None:
    """Write `state` to `path` with a checksum, atomically."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    payload = buffer.getvalue()
    write_atomically(path, MAGIC + hashlib.sha256(payload).digest() + payload)


def read(path: Path) -> dict[str, Any]:
    """Read what `write` wrote.

    Raises:
        CheckpointError: truncated, altered or foreign file.
    """
    data = path.read_bytes()
    head = len(MAGIC) + 32
    if data[: len(MAGIC)] != MAGIC or hashlib.sha256(data[head:]).digest() != data[len(MAGIC) : head]:
        raise CheckpointError(
            f"{path} is truncated, altered or not a training checkpoint ({len(data)} bytes); delete it to start afresh"
        )
    return torch.load(io.BytesIO(data[head:]), map_location="cpu", weights_only=True)
