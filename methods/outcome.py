"""What every method returns."""

from __future__ import annotations

import dataclasses

from torch import nn

from methods.masks import Mask
from methods.training.history import History


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A pruned network.

    Attributes:
        model: a copy of the input network's architecture with the mask applied, in eval mode;
            `methods.masks.remove` makes it smaller.
        mask: what stays. It covers the layers the method may prune, the dense ones among them.
        history: every epoch spent, all phases: ``history.epochs`` is the training budget.
    """

    model: nn.Module
    mask: Mask
    history: History
