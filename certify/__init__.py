"""Certified robustness: sound bounds, verdicts and attacks for any `torch.nn.Module`.

>>> cert = certify.verify(model, x, certify.Classification(y), certify.Linf(8 / 255))
>>> cert.status          # (N,) of certify.Status: HOLDS VIOLATED UNKNOWN TIMEOUT
"""

from certify.bounds import Network, UnsupportedOperation, bounds
from certify.curves import Curve, Hue, Path
from certify.deviation import Deviations, deviation
from certify.dispatch import verify
from certify.geometric import Rotation, Scale
from certify.perturbations import (
    L2,
    AffineFamily,
    BlurMix,
    Box,
    Brightness,
    BrightnessContrast,
    Contrast,
    Linf,
    Perturbation,
    Saturation,
)
from certify.probabilistic import (
    CCCert,
    Estimate,
    McNemar,
    Share,
    estimate,
    exhaust,
    mcnemar,
    pca,
    required_samples,
)
from certify.specs import Classification, Deviation, Linear, Spec
from certify.verdicts import Budget, Certificate, Status

__all__ = [
    "L2",
    "AffineFamily",
    "BlurMix",
    "Box",
    "Brightness",
    "BrightnessContrast",
    "Budget",
    "CCCert",
    "Certificate",
    "Classification",
    "Contrast",
    "Curve",
    "Deviation",
    "Deviations",
    "Estimate",
    "Hue",
    "Linear",
    "Linf",
    "McNemar",
    "Network",
    "Path",
    "Perturbation",
    "Rotation",
    "Saturation",
    "Scale",
    "Share",
    "Spec",
    "Status",
    "UnsupportedOperation",
    "bounds",
    "deviation",
    "estimate",
    "exhaust",
    "mcnemar",
    "pca",
    "required_samples",
    "verify",
]
