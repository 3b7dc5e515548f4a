"""Softmax, bounded entry by entry."""

from __future__ import annotations

import torch
from torch import Tensor

from certify.bounds.op import Interval, Op


class Softmax(Op):
    """Softmax along `axis` (counted with the batch axis).

    Entry i is smallest when its own logit is lowest and all others highest; both ends are exact for a box of logits.
    """

    def __init__(self, axis: int) -> None:
        self.axis = axis

    def forward(self, *inputs: Tensor) -> Tensor:
        return torch.softmax(inputs[0], self.axis)

    def interval(self, *inputs: Interval) -> Interval:
        ((lo, hi),) = inputs
        return self._end(lo, hi), self._end(hi, lo)

    def _end(self, own: Tensor, others: Tensor) -> Tensor:
        # p_i = sigmoid(own_i - log sum_{j != i} exp(others_j)); sums from both sides leave i out without cancellation.
        others = others.movedim(self.axis, -1)
        edge = others.new_full((*others.shape[:-1], 1), -torch.inf)
        before = torch.cat([edge, torch.logcumsumexp(others, -1)[..., :-1]], -1)
        after = torch.cat([torch.logcumsumexp(others.flip(-1), -1).flip(-1)[..., 1:], edge], -1)
        return torch.sigmoid(own - torch.logaddexp(before, after).movedim(-1, self.axis))
