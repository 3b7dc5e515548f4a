from __future__ import annotations

import math
import statistics as stdlib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from runs.statistics import clopper_pearson, holm, mcnemar, mean_sd, sign_test


@pytest.mark.parametrize(("k", "n"), [(0, 10), (10, 10), (3, 7), (61, 200), (199, 200)])
@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.99])
def test_clopper_pearson_is_scipys_exact_interval(k: int, n: int, confidence: float) -> None:
    ours = clopper_pearson(k, n, confidence)
    exact = binomtest(k, n).proportion_ci(confidence, method="exact")
    assert (ours.low, ours.high) == pytest.approx((exact.low, exact.high), abs=1e-12)


def test_clopper_pearson_closed_form_at_the_ends() -> None:
    assert clopper_pearson(0, 20).high == pytest.approx(1 - 0.025 ** (1 / 20), abs=1e-12)
    assert clopper_pearson(20, 20).low == pytest.approx(0.025 ** (1 / 20), abs=1e-12)


def test_clopper_pearson_is_continuous_in_a_mean_count() -> None:
    low, middle, high = (clopper_pearson(k, 50) for k in (20, 20.5, 21))
    assert low.low < middle.low < high.low
    assert low.high < middle.high < high.high
    assert middle.width == pytest.approx((low.width + high.width) / 2, rel=1e-3)


@pytest.mark.parametrize(("k", "n", "confidence"), [(1, 0, 0.95), (-1, 5, 0.95), (6, 5, 0.95), (1, 5, 1.0)])
def test_clopper_pearson_refuses_nonsense(k: int, n: int, confidence: float) -> None:
    with pytest.raises(ValueError, match="got"):
        clopper_pearson(k, n, confidence)


@given(st.lists(st.floats(0, 1), min_size=2, max_size=9))
def test_mean_sd_is_the_standard_librarys(values: list[float]) -> None:
    ours = mean_sd(values)
    assert ours.mean == pytest.approx(stdlib.fmean(values), abs=1e-12)
    assert ours.sd == pytest.approx(stdlib.stdev(values), abs=1e-9)


def test_mean_sd_of_one_seed_has_no_spread() -> None:
    assert mean_sd([0.4]).sd is None
    with pytest.raises(ValueError, match="at least one"):
        mean_sd([])


def test_sign_test_closed_form() -> None:
    test = sign_test([1, 1, 1, 1, 1, -1, 0, 0])
    assert (test.wins, test.losses, test.ties) == (5, 1, 2)
    assert test.p == pytest.approx(2 * (math.comb(6, 0) + math.comb(6, 1)) / 2**6)
    assert sign_test([0, 0]).p == 1.0


def test_mcnemar_counts_discordant_pairs_only() -> None:
    first = [True, True, True, False, True, False]
    second = [False, False, True, False, False, True]
    test = mcnemar(first, second)
    assert (test.wins, test.losses, test.ties) == (3, 1, 2)
    assert test.p == pytest.approx(binomtest(3, 4, 0.5).pvalue)
    with pytest.raises(ValueError, match="same images"):
        mcnemar([True], [True, False])


def test_holm_against_hand_computation() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []
