"""Theorem 3.1, Corollary 3.1 and Lemma 3.2 of arXiv 2510.00083 as functions to check: as printed, and corrected."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor, nn

from certify.perturbations import Perturbation
from methods.usn.lipschitz import Constants, constants
from methods.usn.sampling import Sampling, draw

CHUNK = 16  # copies of a batch held at a time; even, so that antithetic pairs stay together


@dataclasses.dataclass(frozen=True)
class Moments:
    """How the pre-activations of one layer move under perturbation: (N, d) each.

    Attributes:
        bias: ``E f(x) - f(x_0)``.
        variance: ``Var f(x)``, of the samples themselves (divided by their number), so that Eq. 14 is an identity.
        absolute: ``E |f(x) - f(x_0)|``.
    """

    bias: Tensor
    variance: Tensor
    absolute: Tensor

    @property
    def unbiased(self) -> Tensor:
        """L_unbiased as computed by Algorithm 1 (Eq. 11), (N,)."""
        return self.absolute.sum(1)

    @property
    def unbiased_of_means(self) -> Tensor:
        """The right side of Eq. 13, which Lemma 3.2 prints as equal to Eq. 11; it is at most that (Jensen), (N,)."""
        return self.bias.abs().sum(1)

    @property
    def smooth(self) -> Tensor:
        """L_smooth (Eqs. 12, 14), (N,)."""
        return (self.variance + self.bias.square()).sum(1)


@dataclasses.dataclass(frozen=True)
class ProbabilisticCertificate:
    """Theorem 3.1 for each image: ``P(||f(x) - f(x_0)||_q <= delta) >= 1 - alpha``.

    The moments are estimates from samples, so this is a diagnosis, not a guarantee.

    Attributes:
        layers: the layers it was tried at.
        alpha: the smallest alpha of the corrected theorem at each layer, (N, layers); infinite where Eq. 7 fails.
        alpha_smooth: the same from Markov's inequality on the smooth metric, ``C_i^2 L_smooth / delta^2``.
        holds: at the alpha asked for, by the corrected theorem at one layer (one suffices), (N,) bool.
        holds_smooth: by Markov's inequality at one layer, (N,) bool.
        printed: whether the theorem as printed, at all layers with the printed constants, claims it, (N,) bool.
    """

    layers: tuple[str, ...]
    alpha: Tensor
    alpha_smooth: Tensor
    holds: Tensor
    holds_smooth: Tensor
    printed: Tensor


@dataclasses.dataclass(frozen=True)
class CorollaryBounds:
    """What Eqs. 7 and 8 imply for the metrics of a layer (Corollary 3.1).

    Attributes:
        unbiased: corrected bound of L_unbiased, ``delta sqrt(d) / (2 C) sqrt(1 + alpha / (d (L - i)))``.
        smooth: bound of L_smooth, as printed, ``delta^2 / (4 C^2) (alpha / (d (L - i)) + 1)``.
        unbiased_printed: ``delta sqrt(d) / (2 C)``, which bounds Eq. 13's sum of ``|E D|``, not Eq. 11's of ``E|D|``.
    """

    unbiased: float
    smooth: float
    unbiased_printed: float


def corollary(delta: float, alpha: float, constant: float, neurons: int, after: int = 1) -> CorollaryBounds:
    """Corollary 3.1 (Eq. 15), corrected and as printed.

    Args:
        delta: allowed deviation of the output.
        alpha: 1 - confidence.
        constant: C_i > 0.
        neurons: d_i.
        after: L - i.
    """
    if not (delta > 0 and 0 < alpha <= 1 and constant > 0 and neurons >= 1 and after >= 1):
        raise ValueError(
            "expected delta > 0, 0 < alpha <= 1, constant > 0, neurons >= 1 and after >= 1, got "
            f"{delta}, {alpha}, {constant}, {neurons}, {after}"
        )
    printed = delta * math.sqrt(neurons) / (2 * constant)
    share = alpha / (neurons * after)
    smooth = delta**2 / (4 * constant**2) * (share + 1)
    return CorollaryBounds(printed * math.sqrt(1 + share), smooth, printed)


def failure_probability(after: tuple[int, ...], alpha: float) -> float:
    """What the union bound over layers in the proof of Theorem 3.1 adds up to: ``sum_i alpha / (L - i)``.

    The proof puts it at alpha; it exceeds alpha for three layers or more. No union over layers is needed.
    """
    return sum(alpha / number for number in after)


def bias_limit(delta: float, constant: float, neurons: int) -> float:
    """Right side of Eq. 7."""
    return delta / (2 * constant * math.sqrt(neurons)) if constant > 0 else math.inf


def variance_limit(delta: float, alpha: float, constant: float, neurons: int, after: int = 1) -> float:
    """Right side of Eq. 8; with ``after=1`` for the corrected theorem, which uses one layer."""
    return alpha * delta**2 / (4 * constant**2 * neurons**2 * after) if constant > 0 else math.inf


@torch.no_grad()
def moments(
    known: Constants,
    x: Tensor,
    p: Perturbation,
    *,
    samples: int = 256,
    sampling: Sampling = "antithetic",
    generator: torch.Generator | None = None,
) -> list[Moments]:
    """Moments of every layer of `known` for images (N, C, H, W), from `samples` perturbed copies of each."""
    p.check(x)
    clean = [value.double() for value in known.preactivations(x)]
    first = [torch.zeros_like(value) for value in clean]
    second, absolute = [torch.zeros_like(v) for v in clean], [torch.zeros_like(v) for v in clean]
    for done in range(0, samples, CHUNK):
        for copy in draw(p, x, min(CHUNK, samples - done), sampling, generator):
            for i, value in enumerate(known.preactivations(copy)):
                change = value.double() - clean[i]
                first[i] += change / samples
                second[i] += change.square() / samples
                absolute[i] += change.abs() / samples
    return [Moments(a, (b - a.square()).clamp_min(0), c) for a, b, c in zip(first, second, absolute)]


def certificate(
    model: nn.Module,
    x: Tensor,
    p: Perturbation,
    delta: float,
    alpha: float = 0.05,
    *,
    samples: int = 256,
    sampling: Sampling = "antithetic",
    generator: torch.Generator | None = None,
    known: Constants | None = None,
) -> ProbabilisticCertificate:
    """Theorem 3.1 for each image.

    Corrected: C_i without the surplus factors, and Eqs. 7 and 8 (with L - i = 1) at any one layer. As printed: Eqs. 7
    and 8 at all layers, with the printed constants.

    Args:
        model: the network; taken in eval mode.
        x: images (N, C, H, W).
        p: the perturbation, uniform draws of which are meant.
        delta: largest deviation of the outputs (pixels for keypoints), in any q-norm with q >= 2.
        alpha: 1 - confidence.
        samples: copies an image for mean and variance.
        sampling: "antithetic" or "iid".
        generator: source of the copies.
        known: the network's `constants`, when they are at hand.

    Raises:
        UnsupportedOperation: an operation without a known Lipschitz constant.
        ValueError: delta or alpha out of range, or images that the perturbation refuses.
    """
    if not (0 < delta < math.inf and 0 < alpha <= 1):
        raise ValueError(f"expected delta > 0 and 0 < alpha <= 1, got {delta} and {alpha}")
    known = constants(model, x) if known is None else known
    found = moments(known, x, p, samples=samples, sampling=sampling, generator=generator)
    exact, smooth = [], []
    printed = torch.ones(len(x), dtype=torch.bool, device=x.device)
    for layer, d, after, c, c_printed in zip(found, known.neurons, known.after, known.to_output, known.printed):
        worst_bias, worst_variance = layer.bias.abs().amax(1), layer.variance.amax(1)
        allowed = worst_bias <= bias_limit(delta, c, d)
        # The smallest alpha that Eq. 8 accepts.
        needed = worst_variance * (4 * c**2 * d**2 / delta**2)
        exact.append(torch.where(allowed, needed, torch.inf))
        smooth.append(layer.smooth * (c / delta) ** 2)
        printed &= worst_bias <= bias_limit(delta, c_printed, d)
        printed &= worst_variance <= variance_limit(delta, alpha, c_printed, d, after)
    alphas, smooths = torch.stack(exact, 1), torch.stack(smooth, 1)
    return ProbabilisticCertificate(
        known.layers, alphas, smooths, (alphas <= alpha).any(1), (smooths <= alpha).any(1), printed
    )
