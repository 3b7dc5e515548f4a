"""Configuration of the dense baseline."""

from __future__ import annotations

import dataclasses

from methods.base import PruningConfig


@dataclasses.dataclass(frozen=True)
class DenseConfig(PruningConfig):
    """Train only; `ratio` is 0 and the fields about pruning have no effect.

    Set `finetune_epochs` (default 0) to that of a pruning method to give both the same number of epochs.
    """

    ratio: float = 0.0
    finetune_epochs: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ratio != 0.0:
            raise ValueError(f"the dense baseline removes nothing: ratio must be 0, got {self.ratio}")
