"""Certified accuracy with intervals, and McNemar's exact test."""

import dataclasses

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

import certify
from certify.probabilistic import Estimate


def estimate_of(
    certified: list[bool], *, joint: int | None = None, confidence: float = 0.95, valid: bool = True
) -> Estimate:
    n = len(certified)
    upper = torch.where(torch.tensor(certified), 5e-4, 0.5).double()
    counts = torch.zeros(n, dtype=torch.int64)
    no = torch.zeros(n, dtype=torch.bool)
    return Estimate(
        upper, counts, counts, counts, ~no, no, upper, upper, 1e-3, confidence, joint, "clopper-pearson", valid,
        "", "", "distribution", "logits", 0, 256, 2995, "same images", "",
    )  # fmt: skip


def test_interval_of_the_papers_74_percent():
    share = certify.pca(estimate_of([True] * 74 + [False] * 26))
    oracle = stats.binomtest(74, 100).proportion_ci(0.95, method="exact")
    assert (share.low, share.high) == pytest.approx((oracle.low, oracle.high))
    assert round(100 * share.low) == 64
    assert round(100 * share.high) == 82
    assert share.value == 0.74
    assert str(share) == "74.0 % [64.3, 82.3] of 100"


def test_what_is_truly_robust():
    certified = [True] * 74 + [False] * 26
    # Up to 9 of 100 certificates that err with probability .05 each are false with 95 % confidence.
    assert stats.binom.cdf(9, 100, 0.05) >= 0.95 > stats.binom.cdf(8, 100, 0.05)
    assert certify.pca(estimate_of(certified)).truly == pytest.approx(0.65)
    assert certify.pca(estimate_of(certified, joint=100)).truly == pytest.approx(0.74)
    assert certify.pca(estimate_of(certified, joint=100, confidence=0.9)).truly == 0
    assert certify.pca(estimate_of(certified, confidence=1.0)).truly == pytest.approx(0.74)
    assert certify.pca(estimate_of(certified, valid=False)).truly is None
    assert certify.pca(estimate_of([False] * 5)).truly == 0


def test_truly_covers_by_simulation():
    """Images that are not robust are certified falsely 5 % of the time; the bound then holds 95 % of the time."""
    rng = np.random.default_rng(0)
    n, robust, trials = 100, 40, 400
    misses = 0
    for _ in range(trials):
        certified = np.r_[np.ones(robust, bool), rng.random(n - robust) < 0.05]
        misses += certify.pca(estimate_of(certified.tolist())).truly > robust / n
    assert misses <= stats.binom.ppf(0.999, trials, 0.05)


def test_mcnemar_counts_and_agrees_with_scipy():
    rng = np.random.default_rng(1)
    a, b = rng.random(200) < 0.7, rng.random(200) < 0.6
    test = certify.mcnemar(a, b)
    first, second = int((a & ~b).sum()), int((b & ~a).sum())
    assert (test.first, test.second) == (first, second)
    assert test.both + test.first == a.sum()
    assert test.n == 200
    assert test.difference == pytest.approx(a.mean() - b.mean())
    assert test.p_value == pytest.approx(stats.binomtest(first, first + second).pvalue)
    mirrored = certify.mcnemar(b, a)
    assert (mirrored.first, mirrored.second, mirrored.p_value) == (second, first, test.p_value)
    assert certify.mcnemar(a, a).p_value == 1


def test_mcnemar_on_estimates_of_two_models():
    class Mean(nn.Module):
        def __init__(self, at: float) -> None:
            super().__init__()
            self.at = at

        def forward(self, x):
            score = x.flatten(1).mean(1) - self.at
            return torch.stack([-score, score], 1)

    x = torch.linspace(0.45, 0.9, 30).reshape(-1, 1, 1, 1).expand(-1, 1, 2, 2).contiguous()
    y = torch.ones(30, dtype=torch.int64)
    low, high = (certify.estimate(Mean(at).eval(), x, y, certify.Brightness(0.1), 0.05, n_max=100) for at in (0.4, 0.6))
    test = certify.mcnemar(low, high)
    assert test.first > 5
    assert test.second == 0
    assert test.p_value < 0.05
    assert test.difference == pytest.approx(certify.pca(low).value - certify.pca(high).value)
    with pytest.raises(ValueError, match="same images"):
        certify.mcnemar(low, dataclasses.replace(high, images="others"))
    with pytest.raises(ValueError, match="same eps"):
        certify.mcnemar(low, dataclasses.replace(high, eps=0.01))


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [([True], [True, False], "same images"), ([1, 0], [0, 1], "booleans"), ([], [], "booleans")],
)
def test_bad_input(a, b, message):
    with pytest.raises(ValueError, match=message):
        certify.mcnemar(a, b)
