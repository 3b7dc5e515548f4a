"""Probabilistic certificates that are valid, and CC-Cert, which is not, beside them.

>>> cert = certify.estimate(model, x, y, certify.Brightness(0.1), eps=1e-3, confidence=0.95)
>>> cert.certified, cert.upper, cert.valid
"""

from certify.probabilistic.bounds import (
    allowed_flips,
    betting,
    betting_log_wealth,
    betting_mean,
    clopper_pearson,
    clopper_pearson_lower,
    curtailed,
    empirical_bernstein,
    hoeffding,
    required_samples,
    split_chernoff,
    supported_confidence,
    upper_bound,
)
from certify.probabilistic.cccert import CCCert, cc_cert, discrepancy, half_margin
from certify.probabilistic.pca import McNemar, Share, mcnemar, pca
from certify.probabilistic.sampling import BOUNDS, estimate, exhaust
from certify.probabilistic.speed import Throughput, throughput
from certify.probabilistic.transforms import Transform, Uniform
from certify.probabilistic.verdict import Estimate, join

__all__ = [
    "BOUNDS",
    "CCCert",
    "Estimate",
    "McNemar",
    "Share",
    "Throughput",
    "Transform",
    "Uniform",
    "allowed_flips",
    "betting",
    "betting_log_wealth",
    "betting_mean",
    "cc_cert",
    "clopper_pearson",
    "clopper_pearson_lower",
    "curtailed",
    "discrepancy",
    "empirical_bernstein",
    "estimate",
    "exhaust",
    "half_margin",
    "hoeffding",
    "join",
    "mcnemar",
    "pca",
    "required_samples",
    "split_chernoff",
    "supported_confidence",
    "throughput",
    "upper_bound",
]
