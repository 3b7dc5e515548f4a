"""Certificates held against attacks: what a verdict denies is looked for by means that share nothing with verifiers.

`worst` searches the set around every image for its smallest margin, in float64: dense grids with refinement along
parameters; for boxes and balls projected gradient descent, corners, and flips of single pixels from the best corner.
`refutations` holds a certificate against that: HOLDS where a member of the set fails, a lower bound above a margin that
was seen, a counterexample on which the model does not fail or that is not a member. An empty answer proves nothing; any
other shows a bug.
"""

from __future__ import annotations

import copy
import dataclasses
import math

import torch
from torch import Tensor, nn

from certify import attack
from certify.arithmetic import constant, full_float32
from certify.curves import Path
from certify.perturbations import L2, AffineFamily, Perturbation
from certify.specs import Deviation, Spec, margin, select
from certify.verdicts import Certificate, Status

# What verifiers keep for rounding, relative to the size of the margins and to what float32 was seen to lose.
KEPT, KEPT_SEEN = 1e-9, 1e-6
# What float32 resolves, relative to the size of the margins.
SINGLE = 2e-5


@dataclasses.dataclass(frozen=True)
class Worst:
    """The worst member of the set that was found around each of N images.

    Attributes:
        margin: (N,) float64, its margin in float64 (the references of a deviation are the model's as given).
        inputs: (N, *input) float64.
        size: (N,) float64, the size of the numbers that make up the margin.
        noise: (N,) float64, how far float32 and float64 differ in them there and at the image itself.
        tried: members that were looked at.
    """

    margin: Tensor
    inputs: Tensor
    size: Tensor
    noise: Tensor
    tried: int


@full_float32()
@torch.no_grad()
def worst(model: nn.Module, x: Tensor, spec: Spec, p: Perturbation, *, points: int = 1025, seed: int = 0) -> Worst:
    """Search the set around every image of x (N, ...) for its smallest margin.

    Args:
        model: a module in evaluation mode, in the precision of x.
        x: images (N, ...).
        spec: the property.
        p: what may change.
        points: first points a parameter (an axis has the root of it where there are two), or corners and random
            members of a box or ball.
        seed: for random members.
    """
    reference = model(x)
    pinned = _pinned(spec, reference)
    search = _Search(copy.deepcopy(model).double(), x.double(), pinned, reference.double(), _double(p))
    if isinstance(p, AffineFamily | Path):
        search.parameters(points)
    else:
        search.corners(points, seed)
        search.descend(seed)
    rows = pinned.rows(reference.double())
    size = (rows.C.abs() @ reference.double().abs().unsqueeze(2)).squeeze(2) + torch.as_tensor(rows.d).abs()
    noise = torch.zeros_like(search.margin)
    for image in (x, search.inputs.to(x)):
        apart = (model(image).double() - search.model(image.double())).abs().nan_to_num(nan=math.inf)
        noise = torch.maximum(noise, (rows.C.abs() @ apart.unsqueeze(2)).amax((1, 2)))
    return Worst(search.margin, search.inputs, size.amax(1), noise, search.tried)


@full_float32()
@torch.no_grad()
def refutations(model: nn.Module, x: Tensor, spec: Spec, p: Perturbation, cert: Certificate, found: Worst) -> list[str]:
    """What `found` (of the same model, images, property and set) and replays show to be wrong, one line each."""
    wrong = []
    reference = model(x)
    fine = KEPT * found.size + KEPT_SEEN * found.noise
    rough = fine if x.dtype == torch.float64 else SINGLE * found.size + 100 * found.noise
    for i in range(len(x)):
        lowest, lower = float(found.margin[i]), float(cert.lower[i])
        if cert.status[i] == Status.HOLDS and lowest < -float(fine[i]):
            wrong.append(f"image {i}: {cert.method} says HOLDS (lower {lower:.6g}), a member has margin {lowest:.6g}")
        if math.isnan(lower) or lower > lowest + float(rough[i]):
            wrong.append(f"image {i}: {cert.method} says margins are above {lower:.6g}, a member has {lowest:.6g}")
        if cert.status[i] != Status.VIOLATED:
            continue
        image, one = cert.counterexamples[i : i + 1], torch.tensor([i], device=x.device)
        value = float(margin(select(spec, reference, one), model(image), reference[one]))
        if not value <= SINGLE * float(found.size[i]) + float(found.noise[i]):
            wrong.append(f"image {i}: {cert.method} says VIOLATED, but the margin there is {value:.6g}")
        t = None if cert.parameters is None else cert.parameters[i : i + 1]
        beyond = outside(p.select(one, len(x)), x[i : i + 1], image, t)
        if not beyond <= 1e-6:
            wrong.append(f"image {i}: {cert.method} gives a counterexample {beyond:.3g} outside {p.describe()}")
    return wrong


def outside(p: Perturbation, x: Tensor, image: Tensor, t: Tensor | None = None) -> float:
    """How far `image` (1, ...) lies outside the set around x (1, ...), in float64.

    In pixels for boxes and balls. For perturbations with parameters it is the distance to the image at `t` (1, K), and
    how far `t` is off its limits.
    """
    wide, at, p = x.double(), image.double(), _double(p)
    if isinstance(p, L2):
        return float((at - wide).norm() - constant(p.eps, wide))
    if isinstance(p, AffineFamily | Path) and t is not None and bool(torch.isfinite(t).all()):
        low, high = p.limits(wide)
        t = t.double()
        beyond = torch.maximum(low - t, t - high).amax()
        return float(torch.maximum(beyond, (_images(p, wide, t.unsqueeze(0))[0] - at).abs().amax()))
    lo, hi = p.hull(wide)
    return float(torch.maximum(lo - at, at - hi).amax())


def _double(p: Perturbation) -> Perturbation:
    """`p` with its tensors in float64."""
    values = {f.name: getattr(p, f.name) for f in dataclasses.fields(p)}  # type: ignore[arg-type]
    return dataclasses.replace(p, **{k: v.double() for k, v in values.items() if isinstance(v, Tensor)})  # type: ignore[type-var]


def _pinned(spec: Spec, reference: Tensor) -> Spec:
    """The property with the references that the model as given has."""
    if isinstance(spec, Deviation) and spec.reference is None:
        return dataclasses.replace(spec, reference=reference.double())
    return spec


def _images(p: AffineFamily | Path, x: Tensor, t: Tensor) -> Tensor:
    """The images (M, N, ...) at parameters t (M, N, K)."""
    return p.apply(x, t[..., 0] if p.parameters == 1 else t)


class _Search:
    """The worst members so far, in float64."""

    def __init__(self, model: nn.Module, x: Tensor, spec: Spec, reference: Tensor, p: Perturbation) -> None:
        self.model, self.x, self.spec, self.reference, self.p = model, x, spec, reference, p
        self.margin = torch.full((len(x),), math.inf, dtype=torch.float64, device=x.device)
        self.inputs, self.tried = x.clone(), 0

    def look(self, images: Tensor) -> Tensor:
        """Margins (M, N) of members (M, N, ...); the worst are remembered."""
        chunk = max(1, 1024 // len(self.x))
        parts = [self.model(part.flatten(0, 1)).unflatten(0, part.shape[:2]) for part in images.split(chunk)]
        margins = margin(self.spec, torch.cat(parts), self.reference)
        lowest, where = margins.min(0)
        better = (lowest < self.margin).nonzero().squeeze(1)
        self.margin[better] = lowest[better]
        self.inputs[better] = images[where[better], better]
        self.tried += margins.numel()
        return margins

    def parameters(self, points: int, keep: int = 6, zooms: int = 10) -> None:
        """A grid over the parameters with their ends, and finer ones around its lowest points."""
        assert isinstance(self.p, AffineFamily | Path)
        k = self.p.parameters
        low, high = self.p.limits(self.x)
        count = max(3, round(points ** (1 / k)))
        share = torch.cartesian_prod(*[torch.linspace(0, 1, count, dtype=torch.float64)] * k).reshape(-1, 1, k)
        share = share.to(self.x.device).expand(-1, len(self.x), -1)
        fine = torch.cartesian_prod(*[torch.linspace(-1, 1, 9 if k == 1 else 5, dtype=torch.float64)] * k)
        fine = fine.reshape(-1, 1, 1, k).to(self.x.device)
        step = 1 / (count - 1)
        for _ in range(zooms):
            margins = self.look(_images(self.p, self.x, torch.lerp(low, high, share)))
            lowest = margins.topk(min(keep, len(margins)), 0, largest=False).indices
            centres = share.gather(0, lowest.unsqueeze(2).expand(-1, -1, k))
            share = (centres + step * fine).clamp(0, 1).flatten(0, 1)
            step *= 0.25 if k == 1 else 0.5

    def corners(self, points: int, seed: int, rounds: int = 4) -> None:
        """Random members and corners, and from the best of these flips of one entry at a time."""
        generator = torch.Generator().manual_seed(seed)
        count = max(1, points // 4)
        self.look(torch.cat([self._members(self.x).unsqueeze(0), self.p.sample(self.x, count, generator)]))
        lo, hi = self.p.hull(self.x)
        ball = isinstance(self.p, L2)
        pick = torch.rand((count, *self.x.shape), generator=generator).to(self.x.device) < 0.5
        self.look(self._members(torch.where(pick, lo, hi)))
        size = self.x[0].numel()
        for _ in range(rounds if size <= 512 else 0):
            before = self.margin.clone()
            flat = self.inputs.flatten(1)
            other = torch.where(flat - lo.flatten(1) > hi.flatten(1) - flat, lo.flatten(1), hi.flatten(1))
            eye = torch.eye(size, dtype=torch.bool, device=self.x.device).unsqueeze(1)
            self.look(self._members(torch.where(eye, other, flat).unflatten(2, self.x.shape[1:])))
            if ball or bool((self.margin >= before).all()):
                break

    def _members(self, images: Tensor) -> Tensor:
        """The nearest members of the set."""
        if isinstance(self.p, L2):
            return self.p.apply(self.x, images - self.x)
        lo, hi = self.p.hull(self.x)
        return torch.maximum(torch.minimum(images, hi), lo)

    def descend(self, seed: int) -> None:
        """Projected gradient descent in float64, also by leaps from corner to corner."""
        found = attack.attack(self.model, self.x, self.spec, self.p, seed=seed)
        self.look(found.inputs.unsqueeze(0))
        found = attack.pgd(self.model, self.x, self.spec, self.p, steps=15, restarts=8, step_size=2.0, seed=seed)
        self.look(found.inputs.unsqueeze(0))
        self.tried += len(self.x) * (4 * 50 + 8 * 15)
