"""`verify`: one question, many verifiers, one kind of answer."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from certify import attack as attacks
from certify import bab, inputs, line
from certify.arithmetic import full_float32
from certify.audit import outside
from certify.bounds import METHODS as BOUNDS
from certify.bounds import Graph, UnsupportedOperation, lower_rows
from certify.curves import Curve, Path
from certify.motion import parametric
from certify.perturbations import Box, Perturbation
from certify.precisions import Precisions, apart
from certify.space import Space
from certify.specs import Spec, margin, select
from certify.verdicts import Budget, Certificate, Status, join

INCOMPLETE = BOUNDS
# Complete for perturbations of few parameters.
LINE = {"line": "auto", "line-branch": "branch", "line-enumerate": "enumerate"}
# Complete for boxes and balls, for one image at a time.
SEARCH = ("bab", "milp")
METHODS = ("auto", *INCOMPLETE, *LINE, *SEARCH)
# Verifiers from outside the tree.
Outside = Callable[[nn.Module, Tensor, Spec, Perturbation, Budget, int], Certificate]
OUTSIDE: dict[str, Outside] = {}
# How far their counterexamples may lie outside of the perturbation, for rounding.
STRAY = 1e-6
# What complete verifiers may spend where no budget is given.
BUDGET = Budget(seconds=60)

# Margins this close to zero, relative to the size of the outputs, are settled in float64. Measured differences between
# float32 and float64 margins stay below 2e-5 of that size on trained networks; where outputs themselves differ by more,
# so many times the largest difference seen at corners of the set counts.
SCREEN, SCREEN_SEEN = 1e-3, 100.0
# What is kept for rounding in float64, relative to the same.
MARGIN, MARGIN_SEEN = 1e-9, 1e-6
# HiGHS keeps constraints and integrality to 1e-6 or so.
MILP_MARGIN = 1e-5


def register(name: str, verifier: Outside) -> None:
    """Add a verifier of your own to the methods of `verify`.

    Args:
        name: as given to ``verify(method=...)``.
        verifier: called as verifier(model, x, spec, p, budget, seed), without gradients, on checked inputs in the
            chunks of `verify`, in full float32; returns a `Certificate` for every image of x, on any device. HOLDS is
            taken at its word. VIOLATED needs a counterexample in the set (with its ``parameters`` where there are some)
            that the model fails on in a plain forward pass.

    Raises:
        ValueError: the name is taken.
    """
    if name in METHODS or name in OUTSIDE:
        raise ValueError(f"there is a verifier {name!r} already; choose another name")
    OUTSIDE[name] = verifier


@full_float32()
def verify(
    model: nn.Module,
    x: Tensor,
    spec: Spec,
    p: Perturbation,
    method: str = "auto",
    budget: Budget | None = None,
    *,
    attack: bool = True,
    seed: int = 0,
    chunk: int = 16,
    progress: Callable[[Certificate], None] | None = None,
) -> Certificate:
    """Decide for every image whether `spec` holds for all perturbed versions of it.

    Args:
        model: a module in evaluation mode; normalisation belongs inside it.
        x: images (N, ...) in pixel space.
        spec: what must hold of the outputs; references are taken at `x`.
        p: what may change.
        method: "ibp", "crown-ibp", "crown", "alpha-crown", "forward": one bound, then an attack on what it leaves open.
            "line": exact for perturbations of one or two parameters ("line-branch" and "line-enumerate" force one of
            its two ways). "bab": an attack, then branch and bound; "milp": exact for small networks. "auto": "line"
            where it applies, else bounds in order of cost, an attack, and branch and bound on what is still open.
        budget: seconds an image and bytes of working memory; None: a minute an image.
        attack: look for counterexamples among the images that no bound settles.
        seed: for the attack's random restarts.
        chunk: images that are bounded together.
        progress: called with the certificate of each finished chunk, in order.

    Returns:
        A `Certificate`. VIOLATED comes with an input that the model as given fails on in a plain forward pass.

    Raises:
        ValueError: for bad images, labels, radii, non-finite weights, a model in training mode, an unknown method.
        TypeError: for something else than a module, a tensor, a property, a perturbation or a budget.
        certify.UnsupportedOperation: for an operation without a sound bound.
    """
    if method not in METHODS and method not in OUTSIDE:
        raise ValueError(f"unknown verifier {method!r}; choose one of {', '.join((*METHODS, *OUTSIDE))}")
    inputs.check(model, x, p)
    inputs.check_evaluation(model)
    if isinstance(spec, type) or not hasattr(spec, "rows"):
        raise TypeError(f"spec must be Classification(labels), Deviation(delta) or Linear(C, d), got {spec!r:.80}")
    if budget is not None and not isinstance(budget, Budget):
        raise TypeError(f"budget must be a certify.Budget, such as Budget(seconds=60), got {budget!r:.80}")
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1 image, got {chunk}")
    p = p.spread(x)
    few = parametric(p)
    if method in SEARCH and isinstance(p, Path):
        raise ValueError(
            f"{method!r} searches boxes, balls and straight lines, not {p.describe()}; use 'line' or 'auto'"
        )
    if method in LINE and not few:
        raise ValueError(f"{method!r} is for perturbations of few parameters, not for {p.describe()}; use 'auto'")
    budget = budget or BUDGET
    parts = []
    with torch.no_grad():
        reference = inputs.outputs(model, x)
        if not bool(torch.isfinite(reference).all()):
            raise ValueError("the network's outputs on the unperturbed images hold NaN or infinity; check its weights")
        rows = spec.rows(reference)  # a property that does not fit the network is refused before any work
        if not bool(torch.isfinite(rows.C).all() and torch.isfinite(torch.as_tensor(rows.d)).all()):
            raise ValueError("the property holds NaN or infinity; every row needs finite coefficients and constants")
        nets = Precisions(model, x) if method in METHODS else None
        for at in range(0, len(x), chunk):
            part = torch.arange(at, min(at + chunk, len(x)), device=x.device)
            own = select(spec, reference, part)
            if nets is None:
                parts.append(_outside(method, model, x[part], own, p.select(part, len(x)), budget, seed + at))
                if progress is not None:
                    progress(parts[-1])
                continue
            task = _Chunk(nets, x[part], reference[part], own, p.select(part, len(x)), budget)
            task.look()
            task.decide(method, attack, seed + at)
            parts.append(task.certificate(method))
            if progress is not None:
                progress(parts[-1])
    return join(parts)


def _outside(
    name: str, model: nn.Module, x: Tensor, spec: Spec, p: Perturbation, budget: Budget, seed: int
) -> Certificate:
    """The answer of a verifier from outside the tree, checked as far as a forward pass can."""
    found = OUTSIDE[name](model, x, spec, p, budget, seed)
    if not isinstance(found, Certificate):
        raise TypeError(f"the verifier {name!r} returned {type(found).__name__}, expected a certify.Certificate")
    if len(found.status) != len(x) or not set(found.status.tolist()) <= set(Status):
        raise ValueError(
            f"the verifier {name!r} returned {len(found.status)} statuses for {len(x)} images, or values that are none "
            "of certify.Status"
        )
    if len(found.lower) != len(x) or found.counterexamples.shape != x.shape:
        raise ValueError(
            f"the verifier {name!r} returned lower bounds {tuple(found.lower.shape)} and counterexamples "
            f"{tuple(found.counterexamples.shape)} for images {tuple(x.shape)}"
        )
    found = dataclasses.replace(found, method=name).to(x.device)
    broken = (found.status == Status.VIOLATED).nonzero().squeeze(1)
    if not len(broken):
        return found
    inputs = found.counterexamples.to(x)[broken]
    reference = model(x)
    stands = ~(margin(select(spec, reference, broken), model(inputs), reference[broken]) <= 0)
    for place, i in enumerate(broken.tolist()):
        t = None if found.parameters is None else found.parameters[i : i + 1]
        if parametric(p) and (t is None or not bool(t.isfinite().all())):
            why = f"it gives no parameters of {p.describe()} (Certificate.parameters) for its counterexample"
        elif outside(p.select(broken[place : place + 1], len(x)), x[i : i + 1], inputs[place : place + 1], t) > STRAY:
            why = "the counterexample that it gives lies outside of the perturbation"
        elif bool(stands[place]):
            why = "the counterexample that it gives does not break the property"
        else:
            continue
        raise ValueError(f"the verifier {name!r} calls image {i} of its chunk VIOLATED, but {why}")
    return found


class _Chunk:
    """The open and settled images of one chunk."""

    def __init__(
        self, nets: Precisions, x: Tensor, reference: Tensor, spec: Spec, p: Perturbation, budget: Budget
    ) -> None:
        self.nets, self.x, self.reference, self.spec, self.p, self.budget = nets, x, reference, spec, p, budget
        rows = spec.rows(reference.double())  # constants are not rounded to the images' precision
        self.C, self.d = rows.C, torch.as_tensor(rows.d)
        n = len(x)
        self.status = torch.full((n,), Status.UNKNOWN, dtype=torch.int64, device=x.device)
        self.lower = torch.full((n,), -math.inf, dtype=x.dtype, device=x.device)
        self.seconds = torch.zeros(n, dtype=torch.float64)
        self.inputs = torch.full_like(x, math.nan)
        self.bounded = torch.zeros(n, dtype=torch.int64)
        self.work: dict[str, Tensor] = {}
        k = p.parameters if parametric(p) else 0
        self.parameters = torch.full((n, k), math.nan, dtype=x.dtype, device=x.device) if k else None
        outputs = reference.double().abs().amax(1, keepdim=True)
        self.size = (self.C.abs().sum(2) * outputs + self.d.abs()).amax(1)

    def _open(self) -> Tensor:
        return (self.status == Status.UNKNOWN).nonzero().squeeze(1)

    def _spend(self, index: Tensor, start: float) -> None:
        self.seconds[index.cpu()] += (time.perf_counter() - start) / max(1, len(index))

    def look(self) -> None:
        """Settle images that already fail as they are (a misclassified image is its own counterexample)."""
        if isinstance(self.p, Box | Curve):
            return  # the images are reference points, not necessarily in the box
        failed = margin(self.spec, self.reference, self.reference) <= 0
        self.status[failed] = Status.VIOLATED
        self.inputs[failed] = self.x[failed]
        if self.parameters is not None:
            self.parameters[failed] = 0

    def decide(self, method: str, attack: bool, seed: int) -> None:
        """Run the stages of `method`, each on the images that the ones before left open."""
        if method in LINE or (method == "auto" and parametric(self.p)):
            self.line(LINE.get(method, "auto"), seed)
            return
        # Nearly robust images are settled by cheap bounds, hopeless ones by the attack, before anything is expensive.
        before = {"auto": ("ibp", "crown-ibp"), "bab": (), "milp": ()}.get(method, (method,))
        for stage in before:
            self.bound(stage)
        if attack:
            self.attack(seed)
        if method == "auto":
            self.bound("crown")
        if method in ("auto", *SEARCH):
            self.search("milp" if method == "milp" else "bab", seed)

    def bound(self, method: str) -> None:
        """Bound the margins of the open images; close calls are settled in float64."""
        index = self._open()
        if not len(index):
            return
        start = time.perf_counter()
        lower = self._margins(self.nets.given, index, method, self.x.dtype)
        kept = MARGIN * self.size[index]
        if self.x.dtype != torch.float64:
            slack = SCREEN * self.size[index]
            if bool((lower > 0).any()):
                slack = torch.maximum(slack, SCREEN_SEEN * self.noise[index])
                kept = torch.maximum(kept, MARGIN_SEEN * self.noise[index])
            close = (lower.abs() <= slack).nonzero().squeeze(1)
            if len(close):
                lower[close] = self._margins(self.nets.double, index[close], method, torch.float64).to(lower)
        self.lower[index] = torch.maximum(self.lower[index], lower)
        self.status[index[lower > kept]] = Status.HOLDS
        self.bounded[index.cpu()] += self.C.shape[1]
        self._spend(index, start)

    def _margins(self, graph: Graph, index: Tensor, method: str, dtype: torch.dtype) -> Tensor:
        x, C, d = (v[index].to(dtype) for v in (self.x, self.C, self.d))
        p = self.p.select(index, len(self.x))
        lower = (lower_rows(graph, x, p, method, C, self.budget.memory // 4) + d).amin(1)
        return torch.where(torch.isfinite(lower), lower, -math.inf)  # what overflowed says nothing

    @functools.cached_property
    def noise(self) -> Tensor:
        """How much float32 and float64 differ in the margins at two opposite corners of the set (N,)."""
        rough = torch.stack(self.p.hull(self.x))
        found = apart(self.nets.given, self.nets.double, self.C, rough, rough.double())
        return found.nan_to_num(nan=math.inf).to(self.x)  # float32 overflows: nothing that it says counts

    def line(self, method: str, seed: int) -> None:
        """Decide the open images along their path of parameters."""
        index = self._open()
        if not len(index):
            return
        p = self.p.select(index, len(self.x))
        assert parametric(p)
        found = line.verify(
            self.nets, self.x[index], self.reference[index], select(self.spec, self.reference, index), p, self.budget,
            method=method, seed=seed,
        )  # fmt: skip
        self.status[index] = found.status.to(index.device)
        self.lower[index] = found.lower.to(self.lower)
        self.seconds[index.cpu()] += found.seconds
        broken = index[found.status.to(index.device) == Status.VIOLATED]
        self.inputs[index] = found.inputs
        assert self.parameters is not None
        self.parameters[broken] = found.parameters.to(self.parameters)[torch.isin(index, broken)]
        for kind, count in found.work.items():
            self.work[kind] = torch.zeros(len(self.x), dtype=torch.int64).index_copy(0, index.cpu(), count)

    def search(self, method: str, seed: int) -> None:
        """Decide the open images one by one within what is left of their budgets."""
        for i in self._open().tolist():
            left = self.budget.seconds - float(self.seconds[i])
            if left <= 0:
                self.status[i] = Status.TIMEOUT
                continue
            start = time.perf_counter()
            x, p = self.x[i : i + 1], self.p.select(torch.tensor([i], device=self.x.device), len(self.x))
            try:
                if method == "milp":
                    self._solve(i, x, p, left)
                else:
                    found = bab.verify(
                        self.nets.model, x, p, self.C[i], self.d[i], Budget(left, self.budget.memory),
                        attack=False, seed=seed,
                    )  # fmt: skip
                    self._record(i, found.status, found.lower, found.counterexample)
                    for kind, count in found.work.items():
                        self.work.setdefault(kind, torch.zeros(len(self.x), dtype=torch.int64))[i] = count
            except UnsupportedOperation:
                pass  # the bounds that were possible have been taken; the image stays unknown
            self.seconds[i] += time.perf_counter() - start

    def _record(self, i: int, status: Status, lower: float, counterexample: Tensor | None) -> None:
        if status == Status.VIOLATED and counterexample is not None:
            outputs = self.nets.model(counterexample.to(self.x))
            own = select(self.spec, self.reference, torch.tensor([i], device=self.x.device))
            if float(margin(own, outputs, self.reference[i : i + 1])) > 0:
                return  # a polygon row failed, the property itself did not
            self.inputs[i] = counterexample[0].to(self.x)
        self.status[i] = status
        self.lower[i] = max(float(self.lower[i]), lower)

    def _solve(self, i: int, x: Tensor, p: Perturbation, seconds: float) -> None:
        from certify import milp  # scipy's solver is only needed here

        rows = milp.minimum(self.nets.model, x, p, self.C[i], self.d[i], seconds=seconds / len(self.C[i]))
        lower, size = min(row.bound for row in rows), float(self.size[i])
        worst = min(rows, key=lambda row: row.value)
        if lower > MILP_MARGIN * max(1.0, size):
            self._record(i, Status.HOLDS, lower, None)
            return
        point = None if worst.x is None else worst.x.to(x)
        if point is not None and not parametric(p):
            point = Space.of(x, p, exact=True).settle(point)  # what rounding moved out of the set
        if point is not None and float((self.C[i] @ self.nets.model(point)[0].double() + self.d[i]).min()) <= 0:
            self._record(i, Status.VIOLATED, lower, point)
        elif not all(row.finished for row in rows):
            self._record(i, Status.TIMEOUT, lower, None)

    def attack(self, seed: int) -> None:
        """Look for counterexamples among the open images."""
        index = self._open()
        if not len(index):
            return
        start = time.perf_counter()
        spec = select(self.spec, self.reference, index)
        found = attacks.attack(self.nets.model, self.x[index], spec, self.p.select(index, len(self.x)), seed=seed)
        broken = index[found.success]
        self.status[broken] = Status.VIOLATED
        self.inputs[broken] = found.inputs[found.success]
        if self.parameters is not None and found.parameters is not None:
            self.parameters[broken] = found.parameters[found.success].to(self.parameters)
        self._spend(index, start)

    def certificate(self, method: str) -> Certificate:
        """What is known so far."""
        return Certificate(
            self.status, self.lower, self.seconds, self.inputs, self.work or {"rows": self.bounded}, method,
            margin=MARGIN, dtype="float64" if self.x.dtype == torch.float64 else "float32, close calls in float64",
            parameters=self.parameters,
        ).to(self.x.device)  # fmt: skip
