"""How far outputs move at most along a path of images: the number itself, and where."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor, nn

from certify import inputs, line
from certify.arithmetic import full_float32
from certify.motion import parametric
from certify.perturbations import Perturbation
from certify.precisions import Precisions
from certify.specs import Deviation
from certify.verdicts import Budget


@dataclasses.dataclass(frozen=True)
class Deviations:
    """The largest deviation of every image's outputs from those of the unperturbed image; all tensors are on the CPU.

    Attributes:
        lower: (N,) float64, the largest deviation that the model was seen to make, at
        argmax: (N, K) float64, in units of the perturbation's parameter.
        upper: (N,) float64, no deviation is larger (up to rounding); inf where the budget ended the search too early.
        timeout: (N,) bool.
        seconds: (N,) float64, wall-clock time.
        work: "sub-intervals" and "pieces", (N,) each.
    """

    lower: Tensor
    upper: Tensor
    argmax: Tensor
    timeout: Tensor
    seconds: Tensor
    work: dict[str, Tensor]


@full_float32()
def deviation(
    model: nn.Module,
    x: Tensor,
    p: Perturbation,
    norm: str = "linf",
    tol: float = 1e-3,
    budget: Budget | None = None,
    *,
    method: str = "auto",
    chunk: int = 16,
) -> Deviations:
    """The largest ``|y(t) - y|`` along `p`, enclosed to within `tol`.

    What `verify` with ``Deviation(delta)`` decides, for every delta at once.

    Args:
        model: a module in evaluation mode.
        x: images (N, ...).
        p: a perturbation of one or two parameters.
        norm: "linf" (largest coordinate) or "point_l2" (largest Euclidean distance of a point (x, y)); the latter is
            enclosed through `line.DIRECTIONS` chords, which adds 0.03 % of itself to the gap.
        tol: how far apart `lower` and `upper` may end, in units of the outputs (pixels, for keypoints). What the
            model does in float32 and in real arithmetic differs by about 1e-5 px, so nothing below that has a meaning.
        budget: seconds an image and bytes of working memory.
        method: "auto", "branch" or "enumerate", as in `certify.line.verify`.
        chunk: images that are worked on together.

    Raises:
        ValueError: for a perturbation of many parameters, a bad `tol`, a model in training mode, bad images.
        UnsupportedOperation: for an operation without a sound bound.
    """
    inputs.check(model, x, p)
    if not parametric(p):
        raise ValueError(f"the largest deviation is found along perturbations of few parameters, not {p.describe()}")
    if not 0 < tol < math.inf:
        raise ValueError(f"tol must be a positive number, got {tol}")
    inputs.check_evaluation(model)
    # The property's threshold only shifts margins; that of a circle is shifted least by a small one.
    delta = 1.0 if norm == "linf" else 1e-9
    spec = Deviation(delta, norm, directions=line.DIRECTIONS)
    stretch = 1.0 if norm == "linf" else 1 / math.cos(math.pi / line.DIRECTIONS)
    parts = []
    with torch.no_grad():
        reference = inputs.outputs(model, x)
        nets = Precisions(model, x)
        for at in range(0, len(x), chunk):
            part = torch.arange(at, min(at + chunk, len(x)), device=x.device)
            own = p.select(part, len(x))
            assert parametric(own)
            found = line.minimum(nets, x[part], reference[part], spec, own, budget or Budget(), tol, method=method)
            lower = delta - found.upper
            upper = torch.maximum((delta - found.lower) * stretch, lower)
            parts.append(Deviations(lower, upper, found.argmin, found.timeout, found.seconds, found.work))
    work = {kind: torch.cat([part.work[kind] for part in parts]) for kind in parts[0].work}
    names = [f.name for f in dataclasses.fields(Deviations) if f.name != "work"]
    return Deviations(**{name: torch.cat([getattr(part, name) for part in parts]) for name in names}, work=work)
