"""Certified training with CROWN-IBP and loss fusion.

H. Zhang et al. 2020, "Towards Stable and Efficient Training of Verifiably Robust Neural Networks" (CROWN-IBP: CROWN's
backward pass on interval bounds, in a mix with plain intervals), with loss fusion after K. Xu et al. 2020, "Automatic
Perturbation Analysis for Scalable Certified Robustness and Beyond", section 3.3 (auto-LiRPA): the bound is of the
cross-entropy itself, and takes one backward pass whatever the number of classes.
"""

from __future__ import annotations

import dataclasses
from typing import Self

import torch
from torch import Tensor

import certify
from certify.bounds import Propagation, cross_entropy
from certify.specs import margin_rows
from methods.training.bounding import perturbation
from methods.training.eps import Linear, Smoothed
from methods.training.ibp import IBP
from methods.training.losses import TaskLoss


@dataclasses.dataclass(frozen=True)
class CROWNIBP(IBP):
    """CROWN-IBP training with loss fusion, as auto-LiRPA trains and Li et al. (TMLR 2022) prune.

    The bound of the summed exponentials is ``f * CROWN + (1 - f) * IBP`` with ``f = (eps_max - eps) / eps_max``, so
    that training ends on plain interval bounds, which are also what validation certifies with. While the radius is 0 a
    step is a natural one.

    Args:
        eps, perturbation, detach_statistics: as for `IBP`.
        schedule: default auto-LiRPA's smoothed ramp from epoch 11 to 80 of 200.
        kappa_start, kappa_end: default 0: no clean loss in the mix (auto-LiRPA; Zhang et al. mix some in).
        fused: bound the cross-entropy with one backward pass; False bounds each margin (Zhang et al. 2020), and mixes
            the margins instead. Keypoints always take the corner of mixed output bounds.
    """

    schedule: Linear | Smoothed = dataclasses.field(default_factory=lambda: Smoothed(0.05, 0.4))
    kappa_start: float = 0.0
    kappa_end: float = 0.0
    fused: bool = True

    name: str = dataclasses.field(default="crown-ibp", init=False)

    def settled(self) -> Self:
        return dataclasses.replace(self, schedule=Linear(0.0, 0.0))

    def _propagate(self, traced: certify.Network, radius: float) -> Propagation:
        return traced.propagate(perturbation(self.perturbation, radius), "crown-ibp")

    def _worst(self, found: Propagation, y: Tensor, share: float, task_loss: TaskLoss) -> tuple[Tensor, Tensor]:
        if task_loss.kind != "classification" or not self.fused:
            return super()._worst(found, y, share, task_loss)
        rows = margin_rows(y, found.output[0].shape[1]).to(found.output[0])
        with torch.no_grad():
            certified = (found.lower(rows) > 0).all(1).sum().float()
        return cross_entropy(found, rows, 1.0 - share).mean(), certified

    def _rows(self, found: Propagation, C: Tensor, share: float) -> Tensor:
        plain = found.lower(C)
        return plain if share == 1.0 else (1.0 - share) * found.lower(C, "crown") + share * plain

    def _ends(self, found: Propagation, share: float) -> tuple[Tensor, Tensor]:
        if share == 1.0:
            return found.output
        outputs = found.output[0]
        eye = torch.eye(outputs.shape[1], dtype=outputs.dtype, device=outputs.device).expand(len(outputs), -1, -1)
        ends = self._rows(found, torch.cat([eye, -eye], 1), share)
        return ends[:, : outputs.shape[1]], -ends[:, outputs.shape[1] :]
