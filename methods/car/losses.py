"""The terms of CAR's loss, per image: Eqs. 2 and 5 to 8 of the CAR paper.

All take class probabilities or logits (N, K) and return (N,); averaging is the caller's.
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

Alignment = Literal["class", "sorted"]
Hinge = Literal["literal", "softplus", "relu"]
Consistency = Literal["kl", "mse"]
Gradient = Literal["both", "hard"]


def stability(p: Tensor, q: Tensor) -> Tensor:
    """``||p - q||_2^2`` (Eq. 5): p, q (N, K), the probabilities under two draws of the mask.

    Its mean over independent draws is twice the variance of p over masks (appendix A.3).
    """
    return (p - q).square().sum(1)


def discrepancy(p: Tensor, moved: Tensor, alignment: Alignment = "class") -> Tensor:
    """``Z = ||p(x) - p(x_T)||_inf`` (Eq. 2), in [0, 1].

    "class" compares class by class. "sorted" sorts each side first, as Eq. 2 says to the letter; it does not see a
    change of the predicted class: (.9, .1) and (.1, .9) are then equal.
    """
    if alignment == "sorted":
        p, moved = p.sort(1, descending=True).values, moved.sort(1, descending=True).values
    return (p - moved).abs().amax(1)


def margin(p: Tensor) -> Tensor:
    """``d = (p_1 - p_2) / 2``, half the gap between the two largest probabilities; Z < d keeps the prediction."""
    top = p.topk(2, 1).values
    return (top[:, 0] - top[:, 1]) / 2


def margin_ratio(
    p: Tensor,
    moved: Tensor,
    *,
    eta: float = 1.0,
    eps: float = 1e-2,
    hinge: Hinge = "literal",
    alignment: Alignment = "class",
) -> Tensor:
    """The hinge on ``r = Z / (d + eps)`` beyond `eta` (Eqs. 6 and 7), for pairs of images.

    Args:
        p: probabilities of the images, (N, K).
        moved: of their transformed versions.
        eta: safety factor; infinity turns the term off.
        eps: keeps the quotient finite.
        hinge: "literal", ``softplus(max(r - eta, 0))``, which is at least ln 2 and has no gradient below eta;
            "softplus", ``softplus(r - eta)``, the smooth surrogate that the text describes; "relu",
            ``max(r - eta, 0)``.
        alignment: see `discrepancy`.
    """
    excess = discrepancy(p, moved, alignment) / (margin(p) + eps) - eta
    if hinge == "softplus":
        return F.softplus(excess)
    return excess.relu() if hinge == "relu" else F.softplus(excess.relu())


def consistency(soft: Tensor, hard: Tensor, kind: Consistency = "kl", gradient: Gradient = "both") -> Tensor:
    """``KL(p_soft || p_hard)`` (Eq. 8), or the squared error over classes (Table 3).

    Args:
        soft, hard: *logits* (N, K) under the soft and under the binary mask.
        kind: "kl" or "mse" (the mean over classes of the squared difference of probabilities).
        gradient: "both" differentiates both sides, "hard" takes the soft prediction as a constant.
    """
    if gradient == "hard":
        soft = soft.detach()
    if kind == "mse":
        return (soft.softmax(1) - hard.softmax(1)).square().mean(1)
    # In logarithms on both sides: the derivative by a probability that underflows to 0 would be infinite.
    return F.kl_div(hard.log_softmax(1), soft.log_softmax(1), reduction="none", log_target=True).sum(1)
