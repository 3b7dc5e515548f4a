"""Attacks: perturbed images that break a property, and the smallest margin that search can find.

Everything runs in one search space a perturbation (`_Space`): the pixels themselves for boxes and balls, the parameters
``t`` for affine families. What comes back is always replayed: `Attack.success` is a statement about a fresh forward
pass on exactly the returned images, which lie in the perturbation set to the last bit (box ends are rounded inwards
from float64, L2 offsets towards the image).

* `fgsm`: one signed-gradient step (Goodfellow et al., arXiv 1412.6572);
* `pgd`: projected gradient descent with restarts (Madry et al., arXiv 1706.06083), on the worst row of the property
  first and then, as in multi-targeted attacks (Gowal et al., arXiv 1910.09338), on one row a restart;
* `grid`: for affine families a dense grid over the parameters, then zooming into the best cells;
* `attack`: the right combination, at a chosen strength;
* `probe`: plain random sampling, to re-examine verdicts by something that shares no code with the search;
* `adversarial`: training examples (FGSM, PGD), without replay and without host synchronisation.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from certify.perturbations import L2, AffineFamily, Box, Linf, Perturbation
from certify.specs import Linear, Spec, margin

Objective = str | Callable[[Tensor, Tensor], Tensor]

STRENGTHS = ("quick", "standard", "strong")


@dataclasses.dataclass(frozen=True)
class Attack:
    """What a search found for a batch of N images.

    Attributes:
        success: (N,) bool, the property fails on `inputs` (margin <= 0 in a fresh forward pass).
        inputs: (N, *input), the worst image seen, always a member of the perturbation set.
        margin: (N,) its margin: an upper bound on the true minimum over the set.
        parameters: (N, K) the parameters that give `inputs` for affine families, else None.
    """

    success: Tensor
    inputs: Tensor
    margin: Tensor
    parameters: Tensor | None = None


def attack(
    model: nn.Module, x: Tensor, spec: Spec, p: Perturbation, *, seed: int = 0, strength: str = "standard"
) -> Attack:
    """Search for a violation with the methods that suit `p`.

    Args:
        model: maps (N, *input) to (N, outputs); run in eval mode, its mode is restored afterwards.
        x: images (N, *input), in the dtype that the model computes in.
        spec: the property; its rows are taken at ``model(x)``.
        p: the perturbation.
        seed: of the random starts.
        strength: "quick" (20 steps or 33 grid points), "standard" (4 restarts of 50, or 129), "strong" (16 restarts of
            100, or 1025). Affine families with two parameters get a grid of 9, 17 or 33 points an axis, then PGD.

    Raises:
        ValueError: unknown strength, bad images (see `Perturbation.check`), or NaN outputs.
    """
    if strength not in STRENGTHS:
        raise ValueError(f"unknown strength {strength!r}; expected one of {', '.join(STRENGTHS)}")
    level = STRENGTHS.index(strength)
    with _evaluating(model):
        problem = _Problem.of(model, x, spec, p)
        best = _Best.at(problem)
        if isinstance(p, AffineFamily):
            one = p.parameters == 1
            points = (33, 129, 1025)[level] if one else (9, 17, 33)[level]
            _grid(problem, best, points, zooms=(2, 4, 6)[level], keep=(1, 2, 4)[level])
            if not one:
                _pgd(problem, best, (10, 20, 40)[level], (1, 2, 8)[level], 0.25, seed, multi=True)
        elif problem.space.bounded:
            _pgd(problem, best, (20, 50, 100)[level], (1, 4, 16)[level], 0.25, seed, multi=True)
        else:
            _sample(problem, best, (100, 1000, 10000)[level], seed)
        return _replay(problem, best, spec)


def fgsm(model: nn.Module, x: Tensor, spec: Spec, p: Perturbation) -> Attack:
    """One gradient step of full radius on the worst row, from the unperturbed images (arXiv 1412.6572)."""
    return pgd(model, x, spec, p, steps=1, restarts=1, step_size=2.0, multi_target=False)


def pgd(
    model: nn.Module,
    x: Tensor,
    spec: Spec,
    p: Perturbation,
    *,
    steps: int = 50,
    restarts: int = 1,
    step_size: float = 0.25,
    seed: int = 0,
    multi_target: bool = True,
) -> Attack:
    """Projected gradient descent on the margin, in pixels or in the parameters of an affine family.

    The first start is the unperturbed image, the others are uniform in the set. Restarts run batched; between batches
    of restarts, images that are already broken drop out.

    Args:
        model, x, spec, p, seed: as in `attack`.
        steps: gradient steps a start.
        restarts: starts an image.
        step_size: first step as a fraction of the radius (half the width of a box); it falls linearly to a tenth.
        multi_target: restarts after the first descend on one row each, smallest margin so far first; else all descend
            on the worst row.
    """
    if steps < 1 or restarts < 1 or not step_size > 0:
        raise ValueError(f"need steps >= 1, restarts >= 1, step_size > 0; got {steps}, {restarts}, {step_size}")
    with _evaluating(model):
        problem = _Problem.of(model, x, spec, p)
        if not problem.space.bounded:
            raise TypeError(f"PGD needs Linf, L2, Box or an affine family, not {type(p).__name__}; use probe or attack")
        best = _Best.at(problem)
        _pgd(problem, best, steps, restarts, step_size, seed, multi=multi_target)
        return _replay(problem, best, spec)


def grid(
    model: nn.Module, x: Tensor, spec: Spec, p: AffineFamily, *, points: int = 129, zooms: int = 4, keep: int = 2
) -> Attack:
    """The best of `points` values a parameter (ends included), refined `zooms` times around the `keep` best of them."""
    if not isinstance(p, AffineFamily):
        raise TypeError(f"a grid needs an affine family of one or two parameters, not {type(p).__name__}")
    if points < 2:
        raise ValueError(f"a grid needs at least 2 points an axis, got {points}")
    with _evaluating(model):
        problem = _Problem.of(model, x, spec, p)
        best = _Best.at(problem)
        _grid(problem, best, points, zooms, keep)
        return _replay(problem, best, spec)


@torch.no_grad()
def probe(model: nn.Module, x: Tensor, spec: Spec, p: Perturbation, n: int, seed: int = 0) -> Tensor:
    """The smallest margin (N,) over the images themselves and `n` random members of the set for each."""
    p.check(x)
    generator = torch.Generator().manual_seed(seed)
    with _evaluating(model):
        reference = model(x)
        lowest = margin(spec, reference, reference)
        chunk = max(1, _rows_at_once(x) // max(1, len(x)))
        for start in range(0, n, chunk):
            drawn = p.sample(x, min(chunk, n - start), generator)
            outputs = model(drawn.flatten(0, 1)).unflatten(0, drawn.shape[:2])
            lowest = torch.minimum(lowest, margin(spec, outputs, reference).amin(0))
    return lowest


def adversarial(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    p: Perturbation,
    *,
    objective: Objective = "ce",
    steps: int = 1,
    step_size: float | None = None,
    init: str = "uniform",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Perturbed training images (N, *input) that raise the loss; detached, in the model's current mode.

    One step from a uniform start with ``step_size=1.25`` is fast adversarial training (Wong et al., arXiv 2001.03994);
    one step from zero with ``step_size=1`` is FGSM; several steps are PGD (arXiv 1706.06083). The gradient is taken
    with respect to the images only, so the parameters' ``.grad`` is untouched. In training mode, batch norm sees every
    step; put the model in eval mode around the call if that is not wanted.

    Args:
        model: the network.
        x, y: images and targets (labels, or whatever a callable objective takes).
        p: Linf, L2, Box or an affine family.
        objective: "ce" (cross-entropy), "margin" (largest other score minus the label's), or a function of
            (outputs, y) giving a loss a batch, to be maximised.
        steps: gradient steps.
        step_size: as a fraction of the radius; default 1.25 for one step, 2.5 / steps for several.
        init: "uniform" (in the set) or "zero" (the images themselves).
        generator: of the starts; default the global one of `x`'s device.
    """
    if init not in ("uniform", "zero"):
        raise ValueError(f'init must be "uniform" or "zero", got {init!r}')
    if steps < 1:
        raise ValueError(f"need steps >= 1, got {steps}")
    loss = _objective(objective)
    space = _Space.of(x, p, exact=False)
    if not space.bounded:
        raise TypeError(f"adversarial examples need Linf, L2, Box or an affine family, not {type(p).__name__}")
    size = step_size if step_size is not None else (1.25 if steps == 1 else 2.5 / steps)
    z = space.random(generator) if init == "uniform" else space.start()
    for _ in range(steps):
        z = z.detach().requires_grad_()
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(loss(model(space.image(z)), y), z)
        z = space.move(z.detach(), -gradient, size)
    return space.image(z).detach()


def _objective(objective: Objective) -> Callable[[Tensor, Tensor], Tensor]:
    if callable(objective):
        return objective
    if objective == "ce":
        return F.cross_entropy
    if objective == "margin":
        return _label_margin
    raise ValueError(f'objective must be "ce", "margin" or a function of (outputs, y), got {objective!r}')


def _label_margin(outputs: Tensor, y: Tensor) -> Tensor:
    own = outputs.gather(1, y.unsqueeze(1))
    others = outputs.scatter(1, y.unsqueeze(1), float("-inf"))
    return (others.amax(1, keepdim=True) - own).sum()


def _rows_at_once(x: Tensor) -> int:
    """How many images to push through the network together: 512, fewer when they are large."""
    return max(8, min(512, (1 << 22) // max(1, x[0].numel()))) if len(x) else 1


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; every submodule's own mode is put back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@dataclasses.dataclass(frozen=True)
class _Space:
    """Where a search moves: points z between `lo` and `hi`, inside a ball for L2, and the image of each point."""

    p: Perturbation
    x: Tensor
    lo: Tensor
    hi: Tensor
    radius: Tensor | None = None  # of the L2 ball, (N, 1, ...)
    bounded: bool = True

    @classmethod
    def of(cls, x: Tensor, p: Perturbation, exact: bool) -> _Space:
        """`exact`: take the ends in float64 and round them inwards, so that every point is truly a member."""
        wide = x.double() if exact else x
        radius = None
        if isinstance(p, AffineFamily):
            lo, hi = p.limits(wide)
        else:
            lo, hi = p.hull(wide)
        if isinstance(p, L2):
            radius = torch.as_tensor(p.eps, dtype=x.dtype, device=x.device).reshape(-1, *[1] * (x.ndim - 1))
            radius = radius.expand(len(x), *[1] * (x.ndim - 1))
        if exact:
            lo, hi = _inwards(lo, hi, x.dtype)
        return cls(p, x, lo, hi, radius, isinstance(p, Linf | L2 | Box | AffineFamily))

    def at(self, index: Tensor) -> _Space:
        radius = None if self.radius is None else self.radius[index]
        return dataclasses.replace(self, x=self.x[index], lo=self.lo[index], hi=self.hi[index], radius=radius)

    @property
    def affine(self) -> bool:
        return isinstance(self.p, AffineFamily)

    def image(self, z: Tensor) -> Tensor:
        return self.p.apply(self.x, z) if self.affine else z

    def start(self) -> Tensor:
        """The point of the unperturbed image, or the nearest one in the set."""
        return torch.maximum(torch.minimum(torch.zeros_like(self.lo) if self.affine else self.x, self.hi), self.lo)

    def random(self, generator: torch.Generator | None) -> Tensor:
        device = self.lo.device if generator is None else generator.device
        u = torch.rand(self.lo.shape, dtype=self.lo.dtype, device=device, generator=generator).to(self.lo.device)
        return self.project(torch.lerp(self.lo, self.hi, u))

    def project(self, z: Tensor) -> Tensor:
        z = torch.maximum(torch.minimum(z, self.hi), self.lo)
        if self.radius is None:
            return z
        offset = z - self.x
        norm = offset.flatten(1).norm(dim=1).reshape(self.radius.shape)
        return self.x + offset * (self.radius / norm.clamp_min(1e-30)).clamp(max=1)

    def move(self, z: Tensor, gradient: Tensor, size: float) -> Tensor:
        """A step against `gradient`: signed for boxes, normalised for balls; `size` counts radii."""
        if self.radius is None:
            return self.project(z - gradient.sign() * (self.hi - self.lo) * (size / 2))
        norm = gradient.flatten(1).norm(dim=1).reshape(self.radius.shape)
        return self.project(z - gradient / norm.clamp_min(1e-30) * self.radius * size)

    def settle(self, z: Tensor) -> Tensor:
        """The member of the set nearest to `z` in the arithmetic of `x`: for balls, the offset rounded towards x."""
        if self.radius is None:
            return self.project(z)
        centre = self.x.double()
        offset = torch.maximum(torch.minimum(z, self.hi), self.lo).double() - centre
        eps = torch.as_tensor(getattr(self.p, "eps"), dtype=torch.float64, device=z.device)  # noqa: B009
        eps = eps.reshape(-1, *[1] * (z.ndim - 1)).expand_as(self.radius)
        norm = offset.flatten(1).norm(dim=1).reshape(self.radius.shape)
        offset = torch.where(norm > eps, offset * (eps / norm.clamp_min(1e-300) * (1 - 1e-12)), offset)
        rounded = (centre + offset).to(z.dtype)
        past = (rounded.double() - centre).abs() > offset.abs()
        return torch.where(past, torch.nextafter(rounded, self.x), rounded)


def _inwards(lo: Tensor, hi: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Ends in `dtype` that lie inside the float64 ends; where no such number exists, both round to the nearest."""
    low, high = lo.to(dtype), hi.to(dtype)
    up = torch.nextafter(low, torch.full_like(low, float("inf")))
    down = torch.nextafter(high, torch.full_like(high, float("-inf")))
    inner_low = torch.where(low.double() < lo, up, low)
    inner_high = torch.where(high.double() > hi, down, high)
    empty = inner_low > inner_high
    return torch.where(empty, low, inner_low), torch.where(empty, high, inner_high)


@dataclasses.dataclass(frozen=True)
class _Problem:
    """A network, a space and the rows whose smallest value is to be made small."""

    model: nn.Module
    space: _Space
    spec: Spec
    reference: Tensor
    rows: Linear

    @classmethod
    def of(cls, model: nn.Module, x: Tensor, spec: Spec, p: Perturbation) -> _Problem:
        p.check(x)
        with torch.no_grad():
            reference = model(x)
        if bool(reference.isnan().any()):
            raise ValueError("the network's outputs on the unperturbed images hold NaN; check its weights and inputs")
        return cls(model, _Space.of(x.detach(), p, exact=True), spec, reference, spec.rows(reference))
