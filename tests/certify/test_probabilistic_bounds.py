"""Bounds from counts and draws: closed forms, scipy as an oracle, and coverage by simulation and by enumeration."""

import numpy as np
import pytest
from scipy import stats

from certify.probabilistic import bounds as b

ALPHA = 0.05


def misses_allowed(trials: int, alpha: float = ALPHA) -> int:
    """The 99.9 % quantile of the misses of a bound that misses exactly a share `alpha` of the time."""
    return int(stats.binom.ppf(0.999, trials, alpha))


def test_clopper_pearson_is_scipys():
    for k in (0, 1, 7, 99, 100):
        oracle = stats.binomtest(k, 100).proportion_ci(0.9, method="exact")  # two-sided 90 %: 95 % on each side
        assert b.clopper_pearson(k, 100) == pytest.approx(oracle.high, abs=1e-9)
        assert b.clopper_pearson_lower(k, 100) == pytest.approx(oracle.low, abs=1e-9)
    assert b.clopper_pearson(0, 0) == 1
    assert b.clopper_pearson_lower(0, 0) == 0


@pytest.mark.parametrize(("confidence", "n"), [(0.9, 2302), (0.95, 2995), (0.99, 4603), (0.999, 6905)])
def test_samples_needed_without_a_flip(confidence, n):
    assert b.required_samples(1e-3, confidence) == n == int(np.ceil(np.log(1 - confidence) / np.log1p(-1e-3)))


def test_samples_needed_jointly_over_100_images():
    assert b.required_samples(1e-3, 0.95, images=100) == 7598


@pytest.mark.parametrize("bound", b.COUNTING)
@pytest.mark.parametrize("flips", [0, 3])
def test_required_samples_is_the_smallest_sample(bound, flips):
    eps = 0.02
    n = b.required_samples(eps, 0.95, bound, flips=flips)
    assert b.upper_bound(flips, n, 0.95, bound) <= eps * (1 + 1e-12)
    assert b.upper_bound(flips, n - 1, 0.95, bound) > eps
    assert b.allowed_flips(n, eps, 0.95, bound) == flips
    assert b.allowed_flips(b.required_samples(eps, 0.95, bound) - 1, eps, 0.95, bound) == -1


def test_betting_needs_less_than_a_tenth_more_than_the_exact_bound():
    assert b.required_samples(1e-3, 0.95, "betting") < 1.1 * 2995
    # Once flips are seen, it stays between the exact bound and empirical Bernstein: 2 flips in 1,000 draws.
    bounds = [float(b.upper_bound(2, 1000, 0.95, name)) for name in b.COUNTING]
    exact, betting, hoeffding, bernstein = bounds
    assert exact == pytest.approx(0.0063, abs=5e-5)
    assert bernstein == pytest.approx(0.0145, abs=5e-5)
    assert hoeffding == pytest.approx(0.0407, abs=5e-5)
    assert exact < betting < 0.0093


@pytest.mark.parametrize("bound", b.COUNTING)
@pytest.mark.parametrize("p", [0.001, 0.01, 0.1, 0.5])
def test_coverage_by_simulation(bound, p):
    n, trials = 400, 20_000
    flips = np.random.default_rng(1).binomial(n, p, trials)
    upper = b.upper_bound(np.arange(n + 1), n, 1 - ALPHA, bound)[flips]
    assert (upper < p).sum() <= misses_allowed(trials)


@pytest.mark.parametrize("bound", b.COUNTING)
def test_coverage_by_enumeration(bound):
    """No simulation error: the chance of a miss, summed over all outcomes, for a fine grid of truths."""
    n = 60
    k = np.arange(n + 1)
    upper = b.upper_bound(k, n, 1 - ALPHA, bound)
    miss = [stats.binom.pmf(k, n, p)[upper < p].sum() for p in np.linspace(0.001, 0.999, 400)]
    assert max(miss) <= ALPHA + 1e-9
    if bound == "clopper-pearson":
        assert max(miss) > 0.9 * ALPHA  # exact, so nearly attained


@pytest.mark.parametrize("p", [0.001, 0.004, 0.02, 0.2])
@pytest.mark.parametrize("bound", ["clopper-pearson", "hoeffding", "empirical-bernstein"])
def test_coverage_when_sampling_stops_at_a_flip_too_many(p, bound):
    n, stop, trials = 200, 3, 20_000
    flips = np.random.default_rng(2).random((trials, n)) < p
    at = np.cumsum(flips, 1)
    stopped = at[:, -1] >= stop
    first = np.argmax(at >= stop, 1) + 1
    upper = np.empty(trials)
    upper[stopped] = b.curtailed(first[stopped], stop)
    upper[~stopped] = b.upper_bound(at[~stopped, -1], n, 1 - ALPHA, bound)
    assert (upper < p).sum() <= misses_allowed(trials)


def test_curtailed_plan_is_exact_by_enumeration():
    n, stop = 50, 2
    misses = []
    for p in np.linspace(0.005, 0.6, 100):
        late = np.arange(stop, n + 1)
        reached = stats.nbinom.pmf(late - stop, stop, p)  # flip number `stop` comes at draw t
        miss = reached[b.curtailed(late, stop) < p].sum()
        k = np.arange(stop)
        miss += stats.binom.pmf(k, n, p)[b.clopper_pearson(k, n) < p].sum()
        misses.append(miss)
    assert 0.8 * ALPHA < max(misses) <= ALPHA + 1e-9


def test_the_looser_bounds_are_nowhere_below_the_exact_one():
    """What makes the curtailed limit valid for their plans as well."""
    for n in (1, 2, 30, 400):
        k = np.arange(n + 1)
        for bound in ("hoeffding", "empirical-bernstein", "betting"):
            assert (b.upper_bound(k, n, 0.95, bound) >= b.clopper_pearson(k, n) - 1e-12).all()


@pytest.mark.parametrize("p", [0.002, 0.02, 0.2])
def test_the_bettor_is_ruined_even_when_one_peeks_after_every_draw(p):
    trials, n = 4000, 1500
    flips = np.cumsum(np.random.default_rng(3).random((trials, n)) < p, 1)
    steps = np.arange(1, n + 1)
    table = np.stack([b.betting_log_wealth(np.minimum(k, steps), steps, p) for k in range(flips.max() + 1)])
    wealth = table[flips, steps - 1]
    assert (wealth.max(1) >= np.log(1 / ALPHA)).sum() <= misses_allowed(trials)


def test_wealth_is_a_martingale_at_the_truth():
    n, p = 12, 0.3
    k = np.arange(n + 1)
    assert np.exp(b.betting_log_wealth(k, n, p)) @ stats.binom.pmf(k, n, p) == pytest.approx(1, abs=1e-12)
    assert np.exp(b.betting_log_wealth(k, n, p)) @ stats.binom.pmf(k, n, 0.4) < 1  # a loss if flips are commoner


def test_betting_on_values_equals_betting_on_counts():
    for k in (0, 2, 30):
        values = np.r_[np.ones(k), np.zeros(120 - k)]
        assert b.betting_mean(values) == pytest.approx(float(b.betting(k, 120)), abs=1e-12)


@pytest.mark.parametrize("law", [(0.3, 20.0), (0.5, 0.5), (8.0, 1.0)])
def test_coverage_for_means(law):
    rng, n, trials = np.random.default_rng(4), 40, 1000
    draws = rng.beta(*law, (trials, n))
    truth = law[0] / sum(law)
    assert (b.betting_mean(draws) < truth).sum() <= misses_allowed(trials)
    mean = draws.mean(1)
    assert (b.hoeffding(mean, n) < truth).sum() <= misses_allowed(trials)
    assert (b.empirical_bernstein(mean, draws.var(1, ddof=1), n) < truth).sum() <= misses_allowed(trials)


@pytest.mark.parametrize("d", [0.05, 0.15])
def test_coverage_of_the_split_chernoff_bound(d):
    rng, trials = np.random.default_rng(5), 100
    truth = stats.beta.sf(d, 0.3, 20)
    t = np.logspace(0, 3, 12)
    bounds = np.array([b.split_chernoff(rng.beta(0.3, 20, 200), d, temperatures=t) for _ in range(trials)])
    assert (bounds < truth).sum() <= misses_allowed(trials)


def test_split_chernoff_reaches_its_best_case():
    n = b.required_samples(0.1, 0.95, "split-chernoff")
    assert b.split_chernoff(np.zeros(n), 0.5) <= 0.1 * 1.02  # up to the grid of t
    assert b.split_chernoff(np.zeros(n // 2), 0.5) > 0.1
    assert b.split_chernoff(np.zeros(100), 0.0) == 1  # no margin, nothing to show
    assert b.required_samples(1e-3, 0.95, "split-chernoff") > 2e7


def test_supported_confidence():
    assert b.supported_confidence(0, 1000, 1e-3) == pytest.approx(0.6323, abs=1e-4)
    assert b.supported_confidence(0, 2995, 1e-3) >= 0.95 > b.supported_confidence(0, 2994, 1e-3)
    assert b.supported_confidence(2, 5000, 1e-3) == pytest.approx(stats.binom.sf(2, 5000, 1e-3), abs=1e-12)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: b.clopper_pearson(3, 2), "between 0 and the number of draws"),
        (lambda: b.clopper_pearson(0, 10, 1.0), "strictly between 0 and 1"),
        (lambda: b.required_samples(0.0), "eps, the flip probability"),
        (lambda: b.required_samples(0.1, 0.95, "clopper-person"), "did you mean 'clopper-pearson'"),
        (lambda: b.hoeffding(1.2, 10), r"mean must lie in \[0, 1\]"),
        (lambda: b.betting_mean([0.5, 1.5]), r"inside \[0, 1\]"),
        (lambda: b.curtailed(2, 3), "cannot come at draw"),
        (lambda: b.split_chernoff([0.1, 0.2], 0.3), "at least four"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
