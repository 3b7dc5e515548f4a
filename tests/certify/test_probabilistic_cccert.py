"""CC-Cert is reproduced faithfully, and certifies models that it must not."""

import numpy as np
import pytest
from scipy import stats

from certify.probabilistic import CCCert, cc_cert, discrepancy, half_margin

READINGS = [CCCert(order=order, over_alpha=over) for order in ("max-min", "min-max") for over in (False, True)]


def literal(z: np.ndarray, d: float, config: CCCert) -> float:
    """Equations 12 to 14 as printed, for values of t that do not overflow."""
    t = np.logspace(np.log10(config.t_min), np.log10(config.t_max), config.temperatures)
    parts = z.reshape(config.repetitions, config.samples)
    y = np.exp(parts[:, :, None] * t).mean(1) / np.exp(d * t)  # (l, T)
    bound = y.min(1).max() if config.order == "max-min" else y.max(0).min()
    return bound / config.alpha if config.over_alpha else bound


@pytest.mark.parametrize("config", READINGS, ids=lambda c: f"{c.order}-{c.over_alpha}")
def test_equals_the_printed_equations(config):
    config = CCCert(samples=20, repetitions=4, t_max=300.0, order=config.order, over_alpha=config.over_alpha)
    rng = np.random.default_rng(0)
    z = rng.beta(0.3, 20, (30, config.draws))
    d = rng.uniform(0.02, 0.4, 30)
    out = cc_cert(z, d, config)
    expected = np.array([literal(row, margin, config) for row, margin in zip(z, d)])
    np.testing.assert_allclose(np.exp(out.log_upper), expected, rtol=1e-10)
    np.testing.assert_allclose(out.upper, np.minimum(expected, 1), rtol=1e-10)


@pytest.mark.parametrize("p", [0.0011, 0.0015, 0.002, 0.003])
def test_false_certificates(p):
    """Models that flip more often than eps = 1e-3 pass about as often as 1,000 draws hold no flip at all."""
    trials = 800
    z = np.random.default_rng(1).beta(0.3, 20, (trials, 1000))
    d = stats.beta.isf(p, 0.3, 20)
    rate = (cc_cert(z, d).upper <= 1e-3).mean()
    low, high = stats.binom.interval(0.999, trials, (1 - p) ** 1000)
    assert low / trials <= rate <= high / trials
    assert rate > 0.02 if p == 0.003 else rate > 0.08  # a certificate at 95 % would allow 5 % at p = eps itself


def test_the_four_readings_decide_alike_at_the_papers_settings():
    z = np.random.default_rng(2).beta(0.3, 20, (60, 1000))
    d = stats.beta.isf(0.0015, 0.3, 20)
    outs = [cc_cert(z, d, config) for config in READINGS]
    assert (outs[2].log_upper >= outs[0].log_upper - 1e-9).all()  # one t for all can only be worse
    np.testing.assert_allclose(outs[1].log_upper - outs[0].log_upper, -np.log(0.9))
    for out in outs[1:]:
        np.testing.assert_array_equal(out.upper <= 1e-3, outs[0].upper <= 1e-3)


def test_an_exceedance_decides_and_cantelli_says_nothing():
    z = np.full((2, 1000), 0.01)
    z[1, 3] = 0.25
    out = cc_cert(z, 0.2)
    assert out.upper[0] < 1e-300  # e^{tZ} alone would have overflowed
    assert out.upper[1] >= 1 / 100
    passing = np.random.default_rng(3).beta(0.3, 20, (200, 1000))
    d = stats.beta.isf(0.0015, 0.3, 20)
    out = cc_cert(passing, d)
    certified = out.upper <= 1e-3
    assert out.claimed_failure == pytest.approx(2.0**-10)
    assert certified.any()
    assert np.median(out.variation[certified]) > 20
    assert (out.cantelli_failure[certified] > 0.9).mean() > 0.9


def test_confidence_of_its_sample():
    assert CCCert().draws == 1000
    assert CCCert().confidence(1e-3) == pytest.approx(0.632, abs=5e-4)


def test_sorting_hides_flips():
    clean, moved = np.array([0.9, 0.1]), np.array([0.1, 0.9])
    assert discrepancy(clean, moved) == pytest.approx(0.8)
    assert discrepancy(clean, moved, sort=True) == 0
    assert half_margin(clean) == pytest.approx(0.4)


def test_z_below_d_keeps_the_label():
    """CAR, appendix A.2, on random distributions; and the factor 1/2 in d cannot be dropped."""
    rng = np.random.default_rng(4)
    p, q = rng.dirichlet(np.ones(4), 20_000), rng.dirichlet(np.ones(4), 20_000)
    q = 0.7 * p + 0.3 * q
    z, d, kept = discrepancy(p, q), half_margin(p), p.argmax(1) == q.argmax(1)
    assert kept[z < d].all()
    assert not kept[z < 2 * d].all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: cc_cert(np.zeros(999), 0.1), "needs 1000 discrepancies"),
        (lambda: cc_cert(np.full(1000, 1.5), 0.1), "are these logits"),
        (lambda: CCCert(order="max"), "Choose one of max-min, min-max"),
        (lambda: CCCert(alpha=1.0), "alpha"),
        (lambda: CCCert(samples=1), "samples >= 2"),
        (lambda: half_margin([1.0]), "two classes"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
