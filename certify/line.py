"""Perturbations of one or two parameters, decided: branch and bound in t with linear bounds, then exact enumeration.

A network along a path of images is a function of t alone. `minimum` finds its smallest margin over the whole path:

1. evaluate the network on a grid of t, which finds most counterexamples;
2. bound the margins on sub-intervals of t with forward lines (`certify.bounds.forward`), and split what stays open into
   as many parts as the width of the bound asks for (the remainder falls with the square of the length);
3. for what still is open, tighten the rows by their tangent (`certify.bounds.tangent`), one backward pass an image;
4. for piecewise linear networks, list all linear pieces exactly (`certify.enumeration`) where that is cheaper.

Bounds are made in the images' precision; what lies within `SCREEN` of the threshold is decided in float64.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from certify.arithmetic import full_float32
from certify.line_search import MARGIN, METHODS, SCREEN, Minimum, Networks, Search, margin_size
from certify.motion import Parametric
from certify.specs import Deviation, Spec, margin, select
from certify.verdicts import Budget, Status

__all__ = [
    "DIRECTIONS",
    "MARGIN",
    "METHODS",
    "SCREEN",
    "Answer",
    "Minimum",
    "Networks",
    "margin_size",
    "minimum",
    "verify",
]

# Chords that stand for a circle; the polygon's inner radius is .03 % smaller.
DIRECTIONS = 128


@dataclasses.dataclass(frozen=True)
class Answer:
    """Verdicts on N images: `status`, `lower`, `seconds`, `work` as in `certify.Certificate`; the `parameters` (N, K)
    and `inputs` (N, ...) of counterexamples, NaN elsewhere."""

    status: Tensor
    lower: Tensor
    seconds: Tensor
    parameters: Tensor
    inputs: Tensor
    work: dict[str, Tensor]


@full_float32()
def verify(
    nets: Networks,
    x: Tensor,
    reference: Tensor,
    spec: Spec,
    p: Parametric,
    budget: Budget,
    *,
    method: str = "auto",
    seed: int = 0,
) -> Answer:
    """Whether `spec` holds for all images that `p` makes of each of x.

    Args:
        nets: the model and its graphs.
        x: images (N, ...).
        reference: the outputs (N, outputs) at the unperturbed images.
        spec: the property; Euclidean deviations are checked through at least `DIRECTIONS` chords.
        p: a perturbation of few parameters.
        budget: seconds an image and bytes of working memory.
        method: "branch" (branch and bound), "enumerate" (exact pieces), or "auto".
        seed: for the points that are tried first when there are two or more parameters.

    Returns:
        VIOLATED where the model itself fails on `inputs` in a plain forward pass; HOLDS where the smallest margin is
        proven to exceed what is kept for rounding (`MARGIN`); UNKNOWN when the truth lies within that; TIMEOUT.

    Raises:
        ValueError: for an unknown method.
        UnsupportedOperation: for "enumerate", when network or path are not piecewise linear.
    """
    if isinstance(spec, Deviation) and spec.norm == "point_l2":
        spec = dataclasses.replace(spec, directions=max(spec.directions, DIRECTIONS))
    search = Search(nets, x, reference, spec, p, budget, method, seed)
    search.stop_at = torch.zeros(len(x), dtype=torch.float64)
    search.prune_at = search.margin
    found = search.run()
    status = torch.full((len(x),), Status.UNKNOWN, dtype=torch.int64)
    status[found.timeout] = Status.TIMEOUT
    status[found.lower > search.prune_at] = Status.HOLDS
    parameters = torch.full((len(x), search.motion.parameters), math.nan, dtype=torch.float64)
    inputs = torch.full_like(x, math.nan)
    for i in (found.upper <= 0).nonzero().squeeze(1).tolist():
        image = search.motion.images(torch.tensor([i]), found.argmin[i : i + 1], x.dtype)
        one = torch.tensor([i], device=x.device)
        replay = margin(select(spec, reference, one), nets.model(image), reference[one])
        if float(replay) <= 0:  # the deployed model, on this image alone
            status[i], parameters[i], inputs[i] = Status.VIOLATED, found.argmin[i], image[0]
        elif status[i] == Status.HOLDS:
            status[i] = Status.UNKNOWN
    # A failure that was seen ends the search, and what was not looked at has no bound.
    lower = torch.where(found.upper <= 0, -math.inf, found.lower)
    return Answer(status, lower, found.seconds, parameters, inputs, found.work)


@full_float32()
def minimum(
    nets: Networks,
    x: Tensor,
    reference: Tensor,
    spec: Spec,
    p: Parametric,
    budget: Budget,
    tol: float,
    *,
    method: str = "auto",
    seed: int = 0,
) -> Minimum:
    """The smallest margin itself, to within `tol`; arguments as in `verify`."""
    search = Search(nets, x, reference, spec, p, budget, method, seed)
    search.tol = tol
    return search.run()
