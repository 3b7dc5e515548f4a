"""Probabilistic certificates beside exact verdicts: the same perturbation, drawn from at random.

A weaker statement than "every member keeps its class", about a law of draws instead of a set. Where both are there, the
distance between them says how much of what could not be verified is rare.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

import certify
from certify.perturbations import Perturbation
from runs.cell import Verifier

SETTING = "flip_probability"
"""The verifier's setting that asks for these certificates: the probability of another label that they stay below."""

CONFIDENCE = 0.95
BALLS = ("linf", "l2")
"""Perturbations that are adversarial by nature: uniform draws from a ball say nothing of its corners."""


def beside(verifier: Verifier, task: str, p: Perturbation, model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Any]:
    """What a result holds besides the verdicts: nothing, or ``sampled`` with counts and one bit an image.

    An image counts where it is classified correctly and a Clopper-Pearson bound on its flip probability stays below the
    one asked for, each image on its own; draws are the fewest that can show it, and the same for every network.

    Args:
        verifier: of the cell.
        task: "classification", or keypoints, which have no labels to flip.
        p: drawn from uniformly.
        model: in evaluation mode.
        x, y: images (N, C, H, W) and labels (N,).
    """
    asked = dict(verifier.settings).get(SETTING)
    if asked is None or task != "classification" or p.name in BALLS:
        return {}
    eps = float(asked)
    found = certify.estimate(model, x, y, p, eps=eps, confidence=CONFIDENCE, n_max=None)
    bits = [bool(own) for own in (found.certified & found.correct).tolist()]
    return {
        "sampled": {
            "images": len(bits),
            "certified": sum(bits),
            "bits": "".join("1" if own else "0" for own in bits),
            "flip_probability": eps,
            "confidence": CONFIDENCE,
            "bound": found.bound,
            "draws": found.n_max,
            "law": found.law,
            "seed": found.seed,
        }
    }
