"""The search behind ``runs.compare check``: the smallest margin over the members of a perturbation set.

Margins are computed here from the outputs alone, and grids, refinement and sampling are written out, so that little
is shared with the verifiers whose verdicts are put to the test.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

import certify
from certify import attack
from certify.curves import Path as Curve
from certify.perturbations import L2, AffineFamily, Box, Linf, Perturbation

STEPS = 49  # of PGD: 50 forward passes a start
SEED = 20_231
STRAY = 1e-6  # what a member may lie outside of the box around the set, for rounding


@dataclass
class Question:
    """One network under one perturbation, with the images that a list of verdicts is about.

    ``x`` (N, C, H, W), ``reference`` (N, outputs); ``y`` (N,) labels, or None for keypoints, which may move by less
    than ``delta`` pixels from the reference.
    """

    model: nn.Module
    p: Perturbation
    x: Tensor
    reference: Tensor
    y: Tensor | None
    delta: float

    def at(self, index: Tensor) -> Question:
        y = None if self.y is None else self.y[index]
        return replace(self, p=self.p.select(index, len(self.x)), x=self.x[index], reference=self.reference[index], y=y)

    def margin(self, outputs: Tensor) -> Tensor:
        """Margins (..., N) of outputs (..., N, outputs): positive where the property holds."""
        if self.y is None:
            return self.delta - (outputs - self.reference).abs().amax(-1)
        label = self.y.expand(outputs.shape[:-1]).unsqueeze(-1)
        own = outputs.gather(-1, label).squeeze(-1)
        return own - outputs.scatter(-1, label, -math.inf).amax(-1)

    @property
    def spec(self) -> certify.Spec:
        if self.y is None:
            return certify.Deviation(self.delta, reference=self.reference)
        return certify.Classification(self.y)

    @property
    def slack(self) -> Tensor:
        """What rounding may make of a margin, (N,): a part in ten thousand of the outputs."""
        return 1e-4 * (1 + self.reference.abs().amax(1))


@dataclass
class Worst:
    """The smallest margins so far (N,), where they were found (N, C, H, W), and how many images were tried."""

    margin: Tensor
    inputs: Tensor
    probes: int = 0

    def offer(self, margins: Tensor, inputs: Tensor) -> None:
        """Keep what is worse among candidates (n, N) at images (n, N, C, H, W)."""
        lowest, which = margins.min(0)
        better = lowest < self.margin
        picked = inputs[which, torch.arange(len(lowest), device=which.device)]
        self.inputs = torch.where(better.reshape(-1, *[1] * (self.inputs.ndim - 1)), picked, self.inputs)
        self.margin = torch.where(better, lowest, self.margin)
        self.probes += margins.numel()


def search(q: Question, probes: int, tick: Callable[[], None]) -> Worst:
    """The smallest margins that some ``probes`` members of each image's set have.

    Args:
        q: what to search.
        probes: members tried for each image, about.
        tick: called now and then; may raise.
    """
    worst = Worst(margins_at(q, q.x.unsqueeze(0))[0], q.x.clone(), len(q.x))
    if isinstance(q.p, Box):  # the images themselves need not be members
        worst = Worst(torch.full_like(worst.margin, math.inf), q.x.clone())
    generator = torch.Generator().manual_seed(SEED)
    if isinstance(q.p, AffineFamily | Curve):
        _sweep(q, worst, probes, tick)
    elif not isinstance(q.p, Linf | L2 | Box):
        _random(q, worst, probes, generator, tick)
        return worst
    if isinstance(q.p, Linf | L2 | Box) or (isinstance(q.p, AffineFamily) and q.p.parameters > 1):
        restarts = max(1, probes // (STEPS + 1))
        found = attack.pgd(q.model, q.x, q.spec, q.p, steps=STEPS, restarts=restarts, seed=SEED)
        require_members(q, found.inputs)
        worst.offer(margins_at(q, found.inputs.unsqueeze(0)), found.inputs.unsqueeze(0))
        worst.probes += len(q.x) * restarts * (STEPS + 1)
        tick()
    _random(q, worst, max(1, probes // 10), generator, tick)
    return worst


def _sweep(q: Question, worst: Worst, probes: int, tick: Callable[[], None]) -> None:
    """A dense grid over the parameters, ends included, and two finer ones around each image's worst point."""
    p = q.p
    assert isinstance(p, AffineFamily | Curve)
    low, high = p.limits(q.x)
    k = low.shape[1]
    points = max(3, math.ceil(probes ** (1 / k)))
    unit = torch.cartesian_prod(*[torch.linspace(0, 1, points)] * k).reshape(-1, 1, k).to(q.x)
    grid = low + (high - low) * unit
    half = (high - low) / (points - 1)
    fine = max(5, math.ceil((probes / 8) ** (1 / k)))
    local = torch.cartesian_prod(*[torch.linspace(-1, 1, fine)] * k).reshape(-1, 1, k).to(q.x)
    for _ in range(3):
        least = torch.full_like(worst.margin, math.inf)
        best = grid[0].clone()
        for part in grid.split(_at_once(q.x)):
            images = p.apply(q.x, part[..., 0] if k == 1 else part)
            margins = margins_at(q, images)
            worst.offer(margins, images)
            lowest, which = margins.min(0)
            better = lowest < least
            best = torch.where(better.unsqueeze(1), part[which, torch.arange(len(which))], best)
            least = torch.where(better, lowest, least)
            tick()
        grid = torch.maximum(torch.minimum(best + half * local, high), low)
        half = half * 2 / (fine - 1)


def _random(q: Question, worst: Worst, count: int, generator: torch.Generator, tick: Callable[[], None]) -> None:
    size = _at_once(q.x)
    for start in range(0, count, size):
        images = q.p.sample(q.x, min(size, count - start), generator)
        worst.offer(margins_at(q, images), images)
        tick()


def require_members(q: Question, inputs: Tensor) -> None:
    """Refuse inputs (N, C, H, W) of an attack that it was not allowed.

    Raises:
        AssertionError: the attack is wrong, so that nothing can be said about the verdicts.
    """
    low, high = q.p.hull(q.x)
    inside = ((inputs >= low - STRAY) & (inputs <= high + STRAY)).flatten(1).all(1)
    if isinstance(q.p, L2):
        radius = torch.as_tensor(q.p.eps, dtype=torch.float64, device=q.x.device)
        inside &= (inputs - q.x).double().flatten(1).norm(dim=1) <= radius + STRAY
    if not bool(inside.all()):
        raise AssertionError(f"the attack left {q.p.describe()} at image {int((~inside).nonzero()[0])}")


@torch.no_grad()
def margins_at(q: Question, images: Tensor) -> Tensor:
    """Margins (n, N) in a plain forward pass on images (n, N, C, H, W)."""
    flat = images.flatten(0, 1)
    size = _at_once(flat[:1])
    outputs = torch.cat([q.model(part) for part in flat.split(size)]).unflatten(0, images.shape[:2])
    return q.margin(outputs)


def _at_once(x: Tensor) -> int:
    """How many times the batch ``x`` may go through the network together."""
    return max(1, min(512, (1 << 22) // max(1, x[0].numel())) // len(x))


class Double:
    """The network in float64, made when it is first needed."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._wide: nn.Module | None = None

    def margins(self, q: Question, inputs: Tensor) -> Tensor:
        """Margins (N,) at ``inputs`` in float64."""
        if self._wide is None:
            self._wide = copy.deepcopy(self.model).double()
        with torch.no_grad():
            reference = self._wide(q.x.double())
        wide = replace(q, model=self._wide, reference=reference)
        return margins_at(wide, inputs.double().unsqueeze(0))[0]
