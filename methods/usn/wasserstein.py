"""The Wasserstein regulariser (arXiv 2510.00083, Definition 3.3, Eqs. 20 and 21)."""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch
from torch import Tensor


def wasserstein2_squared(a: Tensor, b: Tensor) -> Tensor:
    """Squared 2-Wasserstein distance of two samples on the line with equal weights, in closed form.

    ``W_2^2 = mean_j (a_(j) - b_(j))^2`` over the sorted values. Equivalent to ``ot.wasserstein_1d(a, b, p=2)``,
    differentiable in both.

    Args:
        a: values, (n,).
        b: values, (n,), as many as in `a`.
    """
    if a.ndim != 1 or a.shape != b.shape:
        raise ValueError(f"expected two vectors of the same length, got {tuple(a.shape)} and {tuple(b.shape)}")
    return (a.sort().values - b.sort().values).square().mean()


def target(importance: Tensor, ratio: float, d: int | None = None) -> Tensor:
    """Eq. 20: 1/d for the importances above their (1 - ratio) percentile, 0 for the others; no gradient.

    The percentile interpolates linearly, as numpy's does, so that rounding goes up: of 10 with
    ratio .25 three are above.

    Args:
        importance: A, (n,).
        ratio: fraction that is to be removed.
        d: number of units; None for n.
    """
    values = importance.detach()
    threshold = torch.quantile(values, 1.0 - ratio)
    return (values > threshold).to(values.dtype) / (len(values) if d is None else d)


@dataclasses.dataclass(frozen=True)
class WassersteinTarget:
    """What is transported in Eq. 21, of which the paper defines one side only.

    Args:
        support: "value": the importances A and the entries of E are *points* with equal weights; closed form.
            "index": they are *weights*, scaled to sum to one, of the points 0, 1/n, 2/n, ...; solved by POT on the CPU.
            That reading depends on the order of the channels. Where A or E is all zero there is no such distribution
            and the loss is 0.
        power: "root", W_2 itself (as ``sqrt(W_2^2 + 1e-12)``, whose gradient is finite at 0), or "squared", W_2^2.
        ratio: the rho in Eq. 20: the "final" one, or the "current" one of the schedule.
    """

    support: Literal["value", "index"] = "value"
    power: Literal["root", "squared"] = "root"
    ratio: Literal["final", "current"] = "final"

    def __post_init__(self) -> None:
        choices = {"support": ("value", "index"), "power": ("root", "squared"), "ratio": ("final", "current")}
        for field, allowed in choices.items():
            if getattr(self, field) not in allowed:
                raise ValueError(f"{field} must be {' or '.join(map(repr, allowed))}, got {getattr(self, field)!r}")

    def loss(self, importance: Tensor, ratio: float) -> Tensor:
        """Eq. 21 for one layer: W_2 (or its square) between the importances (n,) and their target, a scalar.

        With ratio 0 the target is zero everywhere and the loss shrinks the importances.
        """
        goal = target(importance, ratio)
        if self.support == "value":
            squared = wasserstein2_squared(importance, goal)
        else:
            squared = _between_weights(importance, goal)
        return squared if self.power == "squared" else (squared + 1e-12).sqrt()


def _between_weights(a: Tensor, b: Tensor) -> Tensor:
    """W_2^2 of distributions with weights proportional to `a` and `b` on 0, 1/n, ...; gradient in `a` by duality."""
    import ot

    total, other = a.sum(), b.sum()
    if not (float(total.detach()) > 0 and float(other) > 0):
        return 0.0 * total
    places = torch.arange(len(a), dtype=torch.float64) / len(a)
    weights = (a / total).cpu().double()
    weights = weights / weights.sum()
    cost = (places.unsqueeze(1) - places).square()
    return ot.emd2(weights, (b / other).cpu().double(), cost).to(a)
