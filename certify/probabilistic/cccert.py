"""CC-Cert as the CAR paper uses it (Pautov et al., 2022; CAR, appendix A.4): reproduced, and not valid.

For discrepancies ``Z = ||p(x) - p(T(x))||_inf`` and ``d`` half the margin between the two most probable classes,
``Z < d`` keeps the prediction and ``P(Z >= d) <= E[e^{tZ}] / e^{td}``. CC-Cert draws l repetitions of n transformed
images, takes ``Y(t) = mean(e^{t Z_i}) / e^{td}`` (equation 13) for the expectation, minimises over t and keeps the
largest of the l values.

Why that is no certificate: t is chosen on the sample that estimates the moment, and e^{tZ} is so heavy-tailed where the
bound is small that its sample mean misses the tail altogether. One exceedance makes ``Y >= 1 / n``, none lets large t
push Y below any eps: the test is, up to a fraction of a per cent, "no draw exceeded d". With 1,000 draws a model that
flips with probability 1.5 eps passes 22 % of the time. Equation 14's failure probability is Cantelli's inequality with
the coefficient of variation of e^{tZ} set to 1; at the t that is used it is 20 to 30, and the inequality says nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

from certify.probabilistic.bounds import Array, check_name, supported_confidence

ORDERS = ("max-min", "min-max")
WHY = (
    "not a valid certificate: t is chosen on the sample that estimates the moment, so the answer is nearly 'no draw "
    "exceeded d'; the confidence given is the most that a sample of this size without a flip supports"
)


@dataclasses.dataclass(frozen=True)
class CCCert:
    """CC-Cert's settings; the defaults are the paper's, and where it leaves a choice, its text.

    Attributes:
        samples: n, transformed images a repetition.
        repetitions: l.
        alpha: of equation 14.
        temperatures, t_min, t_max: the log-spaced grid of t.
        over_alpha: bound by ``max(Y) / alpha``, as equation 14 says, instead of by ``max(Y)``, as the text says.
        order: "max-min" minimises every Y over its own t and takes the largest; "min-max" minimises the largest Y over
            one t for all repetitions, which is never smaller. With `over_alpha` these are four readings.
        sort: take Z between probability vectors sorted in descending order, as under equation 2. It hides flips
            ((.9, .1) and (.1, .9) have Z = 0), so classes are aligned by default.
    """

    samples: int = 100
    repetitions: int = 10
    alpha: float = 0.9
    temperatures: int = 500
    t_min: float = 1e-4
    t_max: float = 1e4
    over_alpha: bool = False
    order: str = "max-min"
    sort: bool = False

    def __post_init__(self) -> None:
        check_name(self.order, ORDERS)
        if self.samples < 2 or self.repetitions < 1 or self.temperatures < 2:
            raise ValueError(
                "CC-Cert needs samples >= 2, repetitions >= 1 and temperatures >= 2, got "
                f"{self.samples}, {self.repetitions}, {self.temperatures}"
            )
        if not 0 < self.alpha < 1 or not 0 < self.t_min < self.t_max:
            raise ValueError(
                f"need 0 < alpha < 1 and 0 < t_min < t_max, got {self.alpha}, {self.t_min} and {self.t_max}"
            )

    @property
    def draws(self) -> int:
        """Transformed images an image: n * l."""
        return self.samples * self.repetitions

    def confidence(self, eps: float) -> float:
        """The confidence at which a sample of this size can support `eps` at most: ``1 - (1 - eps)^(n l)``."""
        return float(supported_confidence(0, self.draws, eps))


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What CC-Cert says of a batch of B images, all arrays (B,).

    Attributes:
        upper: the "bound" on P(Z >= d); not an upper confidence bound (see the module).
        log_upper: its natural logarithm, which does not underflow.
        t: the minimiser, of the repetition that attained the maximum.
        variation: the coefficient of variation of e^{tZ} at that t, over the whole sample.
        claimed_failure: equation 14's right side with a coefficient of variation of 1, as the paper takes it.
        cantelli_failure: the same with `variation`.
    """

    upper: Array
    log_upper: Array
    t: Array
    variation: Array
    claimed_failure: float
    cantelli_failure: Array


def discrepancy(clean: ArrayLike, moved: ArrayLike, sort: bool = False) -> Array:
    """``||p(x) - p(T(x))||_inf`` (equation 2) for probabilities (..., K); `sort` ranks both sides first."""
    a, b = np.asarray(clean, dtype=np.float64), np.asarray(moved, dtype=np.float64)
    if sort:
        a, b = np.sort(a, axis=-1), np.sort(b, axis=-1)
    return np.abs(a - b).max(axis=-1)


def half_margin(probabilities: ArrayLike) -> Array:
    """``d = (p_1 - p_2) / 2`` of the two largest entries of (..., K)."""
    top = np.sort(np.asarray(probabilities, dtype=np.float64), axis=-1)
    if top.shape[-1] < 2:
        raise ValueError("a margin needs at least two classes")
    return ((top[..., -1] - top[..., -2]) / 2)[()]


def cc_cert(z: ArrayLike, d: ArrayLike, config: CCCert | None = None) -> Outcome:
    """CC-Cert's bound from discrepancies, in log-space (e^{tZ} itself overflows for t up to 1e4).

    ln Y(t) is convex in t, and so is a maximum of such, so that a binary search finds the smallest value on the grid
    exactly; equal to trying all of its points.

    Args:
        z: (B, n * l) or (n * l,) discrepancies in [0, 1], in the order drawn: the first n make the first repetition.
        d: (B,) or a number, the half margins.
        config: settings.

    Raises:
        ValueError: when the sample is not n * l long or holds values outside [0, 1].
    """
    config = config or CCCert()
    z = np.atleast_2d(np.asarray(z, dtype=np.float64))
    if z.shape[-1] != config.draws:
        raise ValueError(
            f"CC-Cert with {config.repetitions} repetitions of {config.samples} samples needs {config.draws} "
            f"discrepancies an image, got {z.shape[-1]}"
        )
    if not (z.min() >= 0 and z.max() <= 1):
        raise ValueError("discrepancies between probabilities lie in [0, 1]; are these logits?")
    d = np.broadcast_to(np.asarray(d, dtype=np.float64), z.shape[:1])
    grid = np.logspace(np.log10(config.t_min), np.log10(config.t_max), config.temperatures)
    excess = z.reshape(len(z), config.repetitions, config.samples) - d[:, None, None]

    if config.order == "min-max":
        at = _smallest(lambda i: _log_y(excess, grid[i][:, None]).max(1), len(z), len(grid))
        log_upper = _log_y(excess, grid[at][:, None]).max(1)
    else:
        each = excess.reshape(-1, 1, config.samples)
        index = _smallest(lambda i: _log_y(each, grid[i][:, None])[:, 0], len(each), len(grid))
        values = _log_y(each, grid[index][:, None]).reshape(len(z), -1)
        worst = values.argmax(1)
        log_upper = values[np.arange(len(z)), worst]
        at = index.reshape(len(z), -1)[np.arange(len(z)), worst]

    t = grid[at]
    log_upper = log_upper - (np.log(config.alpha) if config.over_alpha else 0.0)
    weights = np.exp(t[:, None] * (z - z.max(1, keepdims=True)))
    variation = weights.std(1, ddof=1) / weights.mean(1)
    slack = config.samples * (1 - config.alpha) ** 2
    with np.errstate(divide="ignore"):
        cantelli = (1 / (1 + slack / variation**2)) ** config.repetitions
    return Outcome(
        upper=np.exp(np.minimum(log_upper, 0.0)),
        log_upper=log_upper,
        t=t,
        variation=variation,
        claimed_failure=float((1 / (1 + slack)) ** config.repetitions),
        cantelli_failure=cantelli,
    )


def _log_y(excess: Array, t: Array) -> Array:
    """ln of equation 13 for (B, l, n) values of Z - d at temperatures (B, l or 1): (B, l)."""
    return special.logsumexp(excess * t[..., None], axis=-1) - np.log(excess.shape[-1])


def _smallest(value: Callable[[NDArray[np.intp]], Array], rows: int, length: int) -> NDArray[np.intp]:
    """Where each of `rows` convex sequences is smallest: the first index whose successor is no smaller."""
    low, high = np.zeros(rows, dtype=np.intp), np.full(rows, length - 1, dtype=np.intp)
    while (low < high).any():
        middle = (low + high) // 2
        rising = value(np.minimum(middle + 1, length - 1)) >= value(middle)
        open_ = low < high
        high = np.where(open_ & rising, middle, high)
        low = np.where(open_ & ~rising, middle + 1, low)
    return low
