"""Probabilistically certified accuracy (PCA) with its interval, and exact paired tests between models."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from certify.probabilistic.bounds import at_most, clopper_pearson, clopper_pearson_lower
from certify.probabilistic.verdict import Estimate


@dataclasses.dataclass(frozen=True)
class Share:
    """A share of images: `count` of `n`.

    Attributes:
        count, n: images certified, images asked.
        low, high: two-sided Clopper-Pearson interval for the share that the same procedure certifies among all images
            of the kind these `n` are a random sample of. 74 of 100 has [.643, .823] at 95 %.
        confidence: of `low`, `high` and `truly`.
        truly: lower bound on the share of *these* images that are truly robust (flip probability at most eps and
            correct untransformed). With joint certificates all certified ones are; with per-image certificates up to a
            binomial quantile of them may be false. None when the certificates are not valid.
        valid: whether the certificates counted are.
    """

    count: int
    n: int
    low: float
    high: float
    confidence: float
    truly: float | None
    valid: bool

    @property
    def value(self) -> float:
        """``count / n``."""
        return self.count / self.n

    def __str__(self) -> str:
        return f"{100 * self.value:.1f} % [{100 * self.low:.1f}, {100 * self.high:.1f}] of {self.n}"


def pca(estimate: Estimate, confidence: float = 0.95) -> Share:
    """The share of images certified (CAR, equation 10, with the clean prediction required to be correct).

    Raises:
        ValueError: for a confidence outside (0, 1).
    """
    count, n = int(estimate.certified.sum()), len(estimate)
    tail = 1 - (1 - confidence) / 2
    truly = None
    if estimate.valid and estimate.joint is not None:
        # At another confidence than the certificates' own, nothing better than theirs can be said.
        truly = count / n if estimate.confidence >= confidence else 0.0
    elif estimate.valid:
        # Errors of independent certificates: stochastically at most Binomial(n, alpha).
        false = int(np.argmax(at_most(np.arange(n + 1), n, 1 - estimate.confidence) >= confidence))
        truly = max(0, count - false) / n
    return Share(
        count=count,
        n=n,
        low=float(clopper_pearson_lower(count, n, tail)),
        high=float(clopper_pearson(count, n, tail)),
        confidence=confidence,
        truly=truly,
        valid=estimate.valid,
    )


@dataclasses.dataclass(frozen=True)
class McNemar:
    """An exact paired comparison of two models on the same images.

    Attributes:
        both, first, second, neither: images that both models pass, only the first, only the second, neither.
        p_value: two-sided exact (binomial) probability of a split as uneven, if either model is as likely to be the one
            that passes an image on which they differ.
    """

    both: int
    first: int
    second: int
    neither: int
    p_value: float

    @property
    def n(self) -> int:
        """Images compared."""
        return self.both + self.first + self.second + self.neither

    @property
    def difference(self) -> float:
        """The first model's share minus the second's."""
        return (self.first - self.second) / self.n


def mcnemar(first: Estimate | ArrayLike | Tensor, second: Estimate | ArrayLike | Tensor) -> McNemar:
    """McNemar's exact test (McNemar, 1947; binomial form) on two estimates, or two boolean arrays (N,).

    Raises:
        ValueError: for estimates on different images or with different eps, arrays of different length or not boolean.
    """
    if isinstance(first, Estimate) and isinstance(second, Estimate):
        for field in ("images", "eps"):
            a, b = getattr(first, field), getattr(second, field)
            if a != b:
                raise ValueError(f"a paired test needs the same {field} on both sides, got {a} and {b}")
    a, b = _verdicts(first), _verdicts(second)
    if a.shape != b.shape:
        raise ValueError(f"a paired test needs the same images on both sides, got {len(a)} and {len(b)}")
    only_a, only_b = int((a & ~b).sum()), int((~a & b).sum())
    p = min(1.0, 2 * float(at_most(min(only_a, only_b), only_a + only_b, 0.5)))
    return McNemar(int((a & b).sum()), only_a, only_b, int((~a & ~b).sum()), p)


def _verdicts(side: Estimate | ArrayLike | Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.bool_]]:
    if isinstance(side, Estimate):
        side = side.certified
    values = np.asarray(side.detach().cpu() if isinstance(side, torch.Tensor) else side)
    if values.dtype != np.bool_ or values.ndim != 1 or not len(values):
        raise ValueError(f"verdicts must be booleans (N,), N >= 1, got {values.dtype} {values.shape}")
    return values
