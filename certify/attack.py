"""Attacks: perturbed images that break a property, and the smallest margin that search can find.

Everything runs in one `Space` a perturbation: the pixels themselves for boxes and balls, the parameters
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

All but `adversarial` compute in full float32 (`certify.arithmetic`); training keeps the precision that its user set.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from certify.arithmetic import full_float32
from certify.perturbations import AffineFamily, Perturbation
from certify.space import Space
from certify.specs import Linear, Spec, margin, select

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


@full_float32()
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
        return _replay(problem, best)


@full_float32()
def fgsm(model: nn.Module, x: Tensor, spec: Spec, p: Perturbation) -> Attack:
    """One gradient step of full radius on the worst row, from the unperturbed images (arXiv 1412.6572)."""
    return pgd(model, x, spec, p, steps=1, restarts=1, step_size=2.0, multi_target=False)


@full_float32()
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
        return _replay(problem, best)


@full_float32()
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
        return _replay(problem, best)


@full_float32()
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
    space = Space.of(x, p, exact=False)
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
class _Problem:
    """A network, a space and the rows whose smallest value is to be made small."""

    model: nn.Module
    space: Space
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
        return cls(model, Space.of(x.detach(), p, exact=True), spec, reference, spec.rows(reference))

    def at(self, index: Tensor) -> _Problem:
        rows = Linear(self.rows.C[index], torch.as_tensor(self.rows.d)[index])
        spec = select(self.spec, self.reference, index)
        return _Problem(self.model, self.space.at(index), spec, self.reference[index], rows)

    def __len__(self) -> int:
        return len(self.reference)

    def values(self, outputs: Tensor) -> Tensor:
        """All rows at `outputs` (N, outputs): (N, rows)."""
        return (self.rows.C @ outputs.unsqueeze(2)).squeeze(2) + torch.as_tensor(self.rows.d)

    def margin(self, outputs: Tensor) -> Tensor:
        return margin(self.spec, outputs, self.reference)


@dataclasses.dataclass
class _Best:
    """The worst points so far: margins (N,), points (N, *z), the smallest value of every row (N, rows)."""

    margin: Tensor
    z: Tensor
    rows: Tensor

    @classmethod
    def at(cls, problem: _Problem) -> _Best:
        z = problem.space.start()
        with torch.no_grad():
            outputs = problem.model(problem.space.image(z))
        return cls(problem.margin(outputs), z, problem.values(outputs))

    def offer(self, index: Tensor, margins: Tensor, z: Tensor, rows: Tensor | None = None) -> None:
        """Keep what is worse than before among candidates (R, n, ...) for the images `index` (n,)."""
        lowest, which = margins.min(0)
        better = lowest < self.margin[index]
        picked = z[which, torch.arange(len(index), device=index.device)]
        self.margin[index] = torch.where(better, lowest, self.margin[index])
        self.z[index] = torch.where(better.reshape(-1, *[1] * (z.ndim - 2)), picked, self.z[index])
        if rows is not None:
            self.rows[index] = torch.minimum(self.rows[index], rows.amin(0))

    def open(self) -> Tensor:
        """Images not yet broken for certain: a margin within rounding of zero could vanish on another machine."""
        slack = 1e-6 * (1 + self.rows.abs().amax(1))
        return (self.margin > -slack).nonzero().squeeze(1)


def _pgd(problem: _Problem, best: _Best, steps: int, restarts: int, step_size: float, seed: int, multi: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    done = 0
    while done < restarts:
        index = best.open()
        if not len(index):
            return
        # The first start goes alone: it breaks most images that break at all, and ranks the rows for the others.
        count = 1 if done == 0 else min(restarts - done, max(1, _rows_at_once(problem.space.x) // len(index)))
        order = best.rows[index].argsort(1)
        repeated = problem.at(index.repeat(count))
        if done == 0:
            z, target = repeated.space.start(), None
        else:
            z = repeated.space.random(generator)
            turns = torch.arange(done - 1, done - 1 + count, device=index.device) % order.shape[1]
            target = order[:, turns].T.reshape(-1) if multi else None
        margins, z, rows = _descend(repeated, z, steps, step_size, target)
        shape = (count, len(index))
        best.offer(index, margins.unflatten(0, shape), z.unflatten(0, shape), rows.unflatten(0, shape))
        done += count


def _descend(
    problem: _Problem, z: Tensor, steps: int, step_size: float, target: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient steps from `z` for all images of `problem`, in chunks: smallest margins, their points, rows' minima."""
    parts = []
    chunk = _rows_at_once(problem.space.x)
    for start in range(0, len(problem), chunk):
        index = torch.arange(start, min(start + chunk, len(problem)), device=z.device)
        goal = None if target is None else target[index].unsqueeze(1)
        parts.append(_descend_chunk(problem.at(index), z[index], steps, step_size, goal))
    margins, points, rows = zip(*parts)
    return torch.cat(margins), torch.cat(points), torch.cat(rows)


def _descend_chunk(
    problem: _Problem, z: Tensor, steps: int, step_size: float, goal: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    lowest = torch.full_like(problem.reference[:, 0], float("inf"))
    least = torch.full_like(problem.rows.C[:, :, 0], float("inf"))
    point = z
    for step in range(steps + 1):
        z = z.detach().requires_grad_(step < steps)
        with torch.set_grad_enabled(step < steps):
            outputs = problem.model(problem.space.image(z))
            rows = problem.values(outputs)
            # One row at a time: the gradient of amin would average over ties and cancel where y = reference.
            loss = (rows.min(1).values if goal is None else rows.gather(1, goal)).sum()
        with torch.no_grad():
            margins = problem.margin(outputs)
            point = torch.where((margins < lowest).reshape(-1, *[1] * (z.ndim - 1)), z, point).detach()
            lowest, least = torch.minimum(margins, lowest), torch.minimum(rows, least)
        if step < steps:
            (gradient,) = torch.autograd.grad(loss, z)
            z = problem.space.move(z.detach(), gradient, step_size * (1 - 0.9 * step / steps))
    return lowest, point, least


@torch.no_grad()
def _grid(problem: _Problem, best: _Best, points: int, zooms: int, keep: int) -> None:
    """A grid over the whole box of parameters, then `zooms` grids, each a few times finer, around the best cells."""
    space = problem.space
    k = space.lo.shape[1]
    unit = torch.cartesian_prod(*[torch.linspace(0, 1, points, dtype=space.lo.dtype, device=space.lo.device)] * k)
    unit = unit.reshape(-1, 1, k)
    z = space.project(space.lo + (space.hi - space.lo) * unit)
    everyone = torch.arange(len(problem), device=z.device)
    margins = _evaluate(problem, z)
    best.offer(everyone, margins, z)
    fine = 9 if k == 1 else 5
    local = torch.cartesian_prod(*[torch.linspace(-1, 1, fine, dtype=z.dtype, device=z.device)] * k).reshape(
        -1, 1, 1, k
    )
    half = (space.hi - space.lo) / (points - 1)
    count = min(keep, len(z))
    centres = z.gather(0, margins.topk(count, dim=0, largest=False).indices.unsqueeze(2).expand(-1, -1, k))
    for _ in range(zooms):
        z = space.project(centres + half * local)  # (fine^k, count, N, k)
        margins = _evaluate(problem, z.flatten(0, 1)).reshape(z.shape[:-1])
        best.offer(everyone, margins.flatten(0, 1), z.flatten(0, 1))
        chosen = margins.argmin(0, keepdim=True).unsqueeze(3).expand(-1, -1, -1, k)
        centres = z.gather(0, chosen).squeeze(0)
        half = half * 2 / (fine - 1)


def _evaluate(problem: _Problem, z: Tensor) -> Tensor:
    """Margins (R, N) of the points `z` (R, N, *z)."""
    space = problem.space
    chunk = max(1, _rows_at_once(space.x) // max(1, len(problem)))
    parts = []
    for some in z.split(chunk):
        images = space.p.apply(space.x, some) if space.affine else some
        outputs = problem.model(images.flatten(0, 1)).unflatten(0, images.shape[:2])
        parts.append(problem.margin(outputs))
    return torch.cat(parts)


@torch.no_grad()
def _sample(problem: _Problem, best: _Best, n: int, seed: int) -> None:
    """Random members, for perturbations that offer nothing to descend in."""
    space = problem.space
    generator = torch.Generator().manual_seed(seed)
    everyone = torch.arange(len(problem), device=space.x.device)
    chunk = max(1, _rows_at_once(space.x) // max(1, len(problem)))
    for start in range(0, n, chunk):
        drawn = space.p.sample(space.x, min(chunk, n - start), generator)
        best.offer(everyone, _evaluate(problem, drawn), drawn)


@torch.no_grad()
def _replay(problem: _Problem, best: _Best) -> Attack:
    """The verdict of a fresh forward pass on the images exactly as returned."""
    space = problem.space
    z = space.settle(best.z) if space.bounded else best.z
    inputs = space.image(z)
    parts = [problem.model(part) for part in inputs.split(_rows_at_once(space.x))]
    outputs = torch.cat(parts) if parts else problem.reference
    margins = problem.margin(outputs)
    return Attack(margins <= 0, inputs, margins, z if space.affine else None)
