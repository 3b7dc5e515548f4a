"""Upper confidence bounds for a probability or a mean: numbers in, numbers out, no model and no image.

All arguments broadcast as NumPy arrays. Every bound here is *valid*: drawn again and again, it lies below the truth at
most a fraction ``1 - confidence`` of the time, whatever the truth is.

=====================  ===================  =====================================================================
bound                  may stop early       needs, for eps = 1e-3 at 95 % without a flip
=====================  ===================  =====================================================================
clopper-pearson        on a flip too many   2,995 draws: exact, the smallest possible for a fixed sample
betting                any time             3,263: the wealth of a bettor, so looking at the data often is free
empirical-bernstein    on a flip too many   8,609
hoeffding              on a flip too many   1,497,867: ignores that flips are rare
split-chernoff         no                   26 million at best: the price of making CC-Cert's idea valid
=====================  ===================  =====================================================================
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

Array = NDArray[np.float64]

COUNTING = ("clopper-pearson", "betting", "hoeffding", "empirical-bernstein")
VALID = (*COUNTING, "split-chernoff")

# The bettor's mixture: fractions c of the largest safe bet and their weights. Against the hypothesis "mean >= m", c
# stands for the alternative "mean = (1 - c) m". Half the capital bets everything on never seeing a flip, which keeps
# the sample needed without flips within 10 % of Clopper-Pearson's; the rest survives flips.
FRACTIONS = 1 - np.array([0.0, 1 / 16, 1 / 8, 1 / 4, 1 / 2])
LOG_WEIGHTS = np.log(np.array([4, 1, 1, 1, 1]) / 8)

_BISECTIONS = 60  # halvings of [0, 1]: closer than the rounding of float64


def clopper_pearson(flips: ArrayLike, n: ArrayLike, confidence: ArrayLike = 0.95) -> Array:
    """The exact one-sided upper limit for a binomial probability (Clopper and Pearson, 1934).

    The largest p under which `flips` or fewer of `n` draws still have probability ``1 - confidence``; 1 for ``n = 0``.

    Raises:
        ValueError: for flips outside [0, n] or a confidence outside (0, 1).
    """
    k, n, confidence = _counts(flips, n, confidence)
    with np.errstate(invalid="ignore"):
        return np.where(k >= n, 1.0, special.betaincinv(k + 1, np.maximum(n - k, 1), confidence))[()]


def clopper_pearson_lower(flips: ArrayLike, n: ArrayLike, confidence: ArrayLike = 0.95) -> Array:
    """The exact one-sided lower limit for a binomial probability, the mirror image of `clopper_pearson`."""
    k, n, confidence = _counts(flips, n, confidence)
    return (1 - np.asarray(clopper_pearson(n - k, n, confidence)))[()]


def curtailed(stopped_at: ArrayLike, flips: ArrayLike, confidence: ArrayLike = 0.95) -> Array:
    """The exact upper limit when drawing stopped at draw `stopped_at`, which brought flip number `flips`.

    For the plan "draw until flip number r, but no more than n times": a run that ends without r flips gets
    ``clopper_pearson(k, n)``, one that stops at draw t gets this. Outcomes are ordered from t = 1 over t = n to
    k = r - 1 and down to k = 0, and flip r came at t or later iff the first t - 1 draws held at most r - 1 flips;
    inverting that gives ``clopper_pearson(r - 1, t - 1)`` and exact coverage of the whole plan.
    """
    t, r = np.asarray(stopped_at, dtype=np.float64), np.asarray(flips, dtype=np.float64)
    if np.any(r < 1) or np.any(t < r):
        raise ValueError(f"flip number {r} cannot come at draw {t}; both start at 1 and draws >= flips")
    return clopper_pearson(r - 1, t - 1, confidence)


def hoeffding(mean: ArrayLike, n: ArrayLike, confidence: ArrayLike = 0.95) -> Array:
    """``mean + sqrt(ln(1 / alpha) / 2n)``, the bound of Hoeffding (1963) for the mean of draws in [0, 1]."""
    mean, n, confidence = _means(mean, n, confidence)
    with np.errstate(divide="ignore"):
        return np.minimum(1.0, mean + np.sqrt(-np.log1p(-confidence) / (2 * n)))[()]


def empirical_bernstein(mean: ArrayLike, variance: ArrayLike, n: ArrayLike, confidence: ArrayLike = 0.95) -> Array:
    """The bound of Maurer and Pontil (2009, theorem 4) for the mean of draws in [0, 1].

    ``mean + sqrt(2 v L / n) + 7 L / (3 (n - 1))`` with ``L = ln(2 / alpha)`` and `variance` the unbiased sample
    variance v; 1 below two draws.
    """
    mean, n, confidence = _means(mean, n, confidence)
    variance = np.asarray(variance, dtype=np.float64)
    if np.any(variance < 0):
        raise ValueError(f"a variance cannot be negative, got {variance.min()}")
    level = np.log(2) - np.log1p(-confidence)
    with np.errstate(divide="ignore", invalid="ignore"):
        bound = mean + np.sqrt(2 * variance * level / n) + 7 * level / (3 * (n - 1))
    return np.where(n < 2, 1.0, np.minimum(1.0, bound))[()]


def betting_log_wealth(flips: ArrayLike, n: ArrayLike, probability: ArrayLike) -> Array:
    """ln of the wealth of a bettor against "the flip probability is at least `probability`".

    A draw multiplies the stake of fraction c by ``1 + c m / (1 - m)`` when it is no flip and by ``1 - c`` when it is,
    m being `probability`: a supermartingale under every probability >= m, and so is the mixture over c
    (Waudby-Smith and Ramdas, JRSS B 2024, section 4; for counts this is a mixture likelihood ratio). By Ville's
    inequality the wealth reaches 1 / alpha at *any* time with probability at most alpha.
    """
    k, n, _ = _counts(flips, n, 0.5)
    m = np.asarray(probability, dtype=np.float64)
    if np.any(m < 0) or np.any(m >= 1):
        raise ValueError(f"the probability bet against must lie in [0, 1), got {m}")
    k, n, m = (v[..., None] for v in np.broadcast_arrays(k, n, m))
    paths = special.xlog1py(k, -FRACTIONS) + (n - k) * np.log1p(FRACTIONS * m / (1 - m))
    return special.logsumexp(LOG_WEIGHTS + paths, axis=-1)[()]


def betting(flips: ArrayLike, n: ArrayLike, confidence: ArrayLike = 0.95) -> Array:
    """The anytime-valid upper bound for a flip probability: the smallest m that the bettor has beaten.

    Valid at every n at once (a confidence sequence), so that drawing may stop whenever the answer is clear. The order
    of the draws does not matter.
    """
    k, n, confidence = np.broadcast_arrays(*_counts(flips, n, confidence))
    goal = -np.log1p(-confidence)
    low, high = np.zeros(k.shape), np.ones(k.shape)
    for _ in range(_BISECTIONS):
        middle = np.minimum((low + high) / 2, np.nextafter(1.0, 0.0))
        beaten = betting_log_wealth(k, n, middle) >= goal  # wealth grows with m
        low, high = np.where(beaten, low, middle), np.where(beaten, middle, high)
    return high[()]


def betting_mean(values: ArrayLike, confidence: float = 0.95) -> Array:
    """The anytime-valid upper bound for the mean of draws in [0, 1]: `betting` for other values than 0 and 1.

    Args:
        values: (..., n) draws along the last axis.
        confidence: of each bound.

    Returns:
        The bounds (...).

    Raises:
        ValueError: for no values, or values outside [0, 1].
    """
    w = np.atleast_1d(np.asarray(values, dtype=np.float64))
    if not w.size or not (w.min() >= 0 and w.max() <= 1):
        raise ValueError("betting needs at least one value, all of them inside [0, 1]; rescale by a known range")
    _check_confidence(np.asarray(confidence))
    goal = -np.log1p(-confidence)
    low, high = np.zeros(w.shape[:-1]), np.ones(w.shape[:-1])
    for _ in range(_BISECTIONS):
        middle = np.minimum((low + high) / 2, np.nextafter(1.0, 0.0))
        gain = (middle[..., None] - w) / (1 - middle[..., None])
        with np.errstate(divide="ignore"):
            paths = np.stack([np.log1p(c * gain).sum(-1) for c in FRACTIONS], -1)
        beaten = special.logsumexp(LOG_WEIGHTS + paths, axis=-1) >= goal
        low, high = np.where(beaten, low, middle), np.where(beaten, middle, high)
    return high[()]


def split_chernoff(z: ArrayLike, d: float, confidence: float = 0.95, temperatures: ArrayLike | None = None) -> float:
    """A valid bound on P(Z >= d) by CC-Cert's inequality: choose t on half the sample, bound the moment on the rest.

    ``P(Z >= d) <= e^{-td} E[e^{tZ}]`` for every t > 0. CC-Cert picks t on the very sample that estimates the moment and
    takes the estimate for the moment; here the first half picks t, and the second half bounds the mean of
    ``(e^{t(Z - 1)} - e^{-t}) / (1 - e^{-t})``, which lies in [0, 1], by `betting_mean`.

    Args:
        z: discrepancies in [0, 1], in the order they were drawn.
        d: the threshold, half the margin between the two most probable classes.
        confidence: of the bound.
        temperatures: candidates for t; 100 log-spaced from 0.1 to 1e4 by default.

    Raises:
        ValueError: for fewer than four discrepancies, or values outside [0, 1].
    """
    z = np.asarray(z, dtype=np.float64).ravel()
    if z.size < 4 or not (z.min() >= 0 and z.max() <= 1):
        raise ValueError("a split Chernoff bound needs at least four discrepancies, all of them inside [0, 1]")
    _check_confidence(np.asarray(confidence))
    if not d > 0:
        return 1.0
    t = np.logspace(-1, 4, 100) if temperatures is None else np.asarray(temperatures, dtype=np.float64).ravel()
    tune, test = np.split(z, [z.size // 2])

    def scaled(z: Array, t: Array) -> Array:
        return np.clip((np.exp(t * (z - 1)) - np.exp(-t)) / -np.expm1(-t), 0, 1)

    def chernoff(mean: Array, t: Array) -> Array:
        moment = np.exp(-t) - np.expm1(-t) * mean  # E[e^{t(Z - 1)}]
        return t * (1 - d) + np.log(moment)

    level = -np.log1p(-confidence)
    expected = []
    for value in t:  # any choice is valid; this one foresees roughly what the second half will say
        w = scaled(tune, value)
        guess = min(1.0, w.mean() + np.sqrt(2 * w.var() * level / test.size) + level / test.size)
        expected.append(float(chernoff(np.asarray(guess), value)))
    best = t[int(np.argmin(expected))]
    bound = chernoff(betting_mean(scaled(test, best), confidence), best)
    return float(np.exp(min(0.0, float(bound))))


def upper_bound(flips: ArrayLike, n: ArrayLike, confidence: ArrayLike = 0.95, bound: str = "clopper-pearson") -> Array:
    """The upper bound on the flip probability after `flips` in `n` draws, by the name of the bound (`COUNTING`)."""
    check_name(bound, COUNTING)
    if bound == "clopper-pearson":
        return clopper_pearson(flips, n, confidence)
    if bound == "betting":
        return betting(flips, n, confidence)
    k, n, confidence = _counts(flips, n, confidence)
    mean = k / np.maximum(n, 1)
    if bound == "hoeffding":
        return np.where(n > 0, hoeffding(mean, n, confidence), 1.0)[()]
    return empirical_bernstein(mean, k * (1 - mean) / np.maximum(n - 1, 1), n, confidence)


def reaches(flips: ArrayLike, n: ArrayLike, eps: float, confidence: float, bound: str) -> NDArray[np.bool_]:
    """Whether ``upper_bound(flips, n) <= eps``, decided without a root finder where the bound has a closed test."""
    check_name(bound, COUNTING)
    k, n, _ = _counts(flips, n, confidence)
    if bound == "clopper-pearson":
        return np.asarray(at_most(k, n, eps) <= 1 - confidence)[()]
    if bound == "betting":
        return np.asarray(betting_log_wealth(k, n, eps) >= -np.log1p(-confidence))[()]
    return np.asarray(upper_bound(k, n, confidence, bound) <= eps)[()]


def at_most(flips: ArrayLike, n: ArrayLike, probability: float) -> Array:
    """The chance that `n` draws hold `flips` flips or fewer: the binomial distribution function."""
    k, n, _ = _counts(flips, n, 0.5)
    return np.where(k >= n, 1.0, special.betainc(np.maximum(n - k, 1), k + 1, 1 - probability))[()]


def supported_confidence(flips: ArrayLike, n: ArrayLike, eps: float) -> Array:
    """The highest confidence at which `flips` in `n` independent draws can show a flip probability of at most `eps`.

    One minus the chance of so few flips at probability `eps`, which no method on a fixed sample can beat; for no flips
    ``1 - (1 - eps)^n``, which is 63.2 % for 1,000 draws and eps = 1e-3.
    """
    _check_eps(eps)
    return (1 - np.asarray(at_most(flips, n, eps)))[()]


def required_samples(
    eps: float, confidence: float = 0.95, bound: str = "clopper-pearson", *, images: int = 1, flips: int = 0
) -> int:
    """The smallest sample an image that can show a flip probability of at most `eps`, if it holds `flips` flips.

    Args:
        eps: the flip probability to stay below.
        confidence: of the certificate of one image; with `images` > 1, of the certificates of all of them jointly
            (each then gets the error ``(1 - confidence) / images``).
        bound: one of `VALID`. For "split-chernoff" the best case, a margin of 1 and a constant output.
        images: how many images the confidence is joint over.
        flips: flips to allow for in the sample of an image.

    Returns:
        Draws an image: 2302, 2995, 4603, 6905 for eps = 1e-3 at 90, 95, 99, 99.9 %; 7598 for 95 % over 100 images.

    Raises:
        ValueError: for numbers outside their range or an unknown bound.
    """
    check_name(bound, VALID)
    _check_eps(eps)
    _check_confidence(np.asarray(confidence))
    if images < 1 or flips < 0:
        raise ValueError(f"need images >= 1 and flips >= 0, got {images} and {flips}")
    confidence = joint_confidence(confidence, images)
    if bound == "split-chernoff":
        if flips:
            raise ValueError("split-chernoff does not count flips; ask for flips=0")
        # With d = 1/2 and Z = 0 the bound is e^{t/2} (e^{-t} + (1 - e^{-t}) b), b the betting bound of the second half;
        # the best t has e^{-t} = b / (1 - b) and gives 2 sqrt(b (1 - b)).
        return 2 * required_samples((1 - (1 - eps**2) ** 0.5) / 2, confidence, "betting")

    low, high = flips, max(1, flips + 1)
    while not reaches(flips, high, eps, confidence, bound):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if reaches(flips, middle, eps, confidence, bound) else (middle, high)
    return high


def allowed_flips(n: int, eps: float, confidence: float = 0.95, bound: str = "clopper-pearson") -> int:
    """The most flips with which `n` draws still show a flip probability of at most `eps`; -1 when none are enough."""
    low, high = -1, n
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if reaches(middle, n, eps, confidence, bound) else (low, middle)
    return low


def joint_confidence(confidence: float, images: int) -> float:
    """The confidence each of `images` certificates needs so that all hold together: ``1 - alpha / images``."""
    return 1 - (1 - confidence) / images


def check_name(bound: str, known: tuple[str, ...]) -> None:
    """Raise ValueError for a bound that is not in `known`, with the closest name."""
    if bound not in known:
        import difflib

        near = difflib.get_close_matches(bound, known, n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown bound {bound!r}{hint} Choose one of {', '.join(known)}")


def _check_confidence(confidence: Array) -> None:
    if not (np.all(confidence > 0) and np.all(confidence < 1)):
        raise ValueError(f"confidence must lie strictly between 0 and 1, got {confidence}")


def _check_eps(eps: float) -> None:
    if not 0 < eps < 1:
        raise ValueError(f"eps, the flip probability to stay below, must lie strictly between 0 and 1, got {eps}")


def _counts(flips: ArrayLike, n: ArrayLike, confidence: ArrayLike) -> tuple[Array, Array, Array]:
    k, total, level = (np.asarray(v, dtype=np.float64) for v in (flips, n, confidence))
    if np.any(k < 0) or np.any(k > total):
        raise ValueError("flips must lie between 0 and the number of draws")
    _check_confidence(level)
    return k, total, level


def _means(mean: ArrayLike, n: ArrayLike, confidence: ArrayLike) -> tuple[Array, Array, Array]:
    centre, total, level = (np.asarray(v, dtype=np.float64) for v in (mean, n, confidence))
    if np.any(centre < 0) or np.any(centre > 1):
        raise ValueError("the mean must lie in [0, 1]; rescale the draws by a range known beforehand")
    _check_confidence(level)
    return centre, total, level
