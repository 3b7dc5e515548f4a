"""What happened during training, epoch by epoch."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class EpochRecord:
    """One epoch. Two records are equal when their numbers are, whatever the time they took.

    Attributes:
        phase: part of the method, such as "train", "finetune" or "round-03".
        epoch: from 0 within the phase.
        lr: learning rate of the last step (of parameters with `lr_scale` 1).
        metrics: training means over the epoch's images, ``"loss"`` among them.
        validation: metrics on the validation set, ``"score"`` among them; empty without one.
        best: whether these were the best validation weights so far.
        seconds: wall time.
    """

    phase: str
    epoch: int
    lr: float
    metrics: dict[str, float]
    validation: dict[str, float]
    best: bool
    seconds: float = dataclasses.field(compare=False)


@dataclasses.dataclass(frozen=True)
class History:
    """The epochs of one or several phases, in order. Histories add up: ``train_history + finetune_history``."""

    records: tuple[EpochRecord, ...] = ()

    def __add__(self, other: History) -> History:
        return History(self.records + other.records)

    def __len__(self) -> int:
        return len(self.records)

    @property
    def phases(self) -> tuple[str, ...]:
        """Names of the phases, in order."""
        return tuple(dict.fromkeys(record.phase for record in self.records))

    @property
    def epochs(self) -> int:
        """Epochs of training in all: the budget spent."""
        return len(self.records)

    @property
    def seconds(self) -> float:
        """Wall time of training and validation."""
        return sum(record.seconds for record in self.records)

    def phase(self, name: str) -> History:
        """The records of one phase."""
        return History(tuple(record for record in self.records if record.phase == name))

    def selected(self, phase: str | None = None) -> EpochRecord | None:
        """The epoch whose weights the last (or the named) phase ended with: the best on validation, else the last."""
        records = self.phase(phase or self.records[-1].phase).records if self.records else ()
        chosen = [record for record in records if record.best]
        return (chosen or list(records))[-1] if records else None

    def to_dicts(self) -> list[dict[str, Any]]:
        """JSON-able records."""
        return [dataclasses.asdict(record) for record in self.records]

    @classmethod
    def from_dicts(cls, records: list[dict[str, Any]]) -> History:
        """Inverse of `to_dicts`."""
        return cls(tuple(EpochRecord(**record) for record in records))
