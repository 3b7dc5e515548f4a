"""Exact answers for small networks by mixed-integer programming (Tjeng et al., 2019), with scipy's HiGHS.

Every undecided ReLU is one binary variable in the big-M form, with the unit's own bounds as M. Independent of the
search in `certify.bab` but for the bounds, so it serves as an oracle, and as an option where a network has few
undecided units.
"""

from __future__ import annotations

import copy
import dataclasses
import math

import numpy as np
import scipy.sparse
import torch
from torch import Tensor, nn

from certify.arithmetic import full_float32
from certify.bounds import attach, trace
from certify.bounds.crown import crown_intervals
from certify.bounds.graph import Graph
from certify.bounds.interval import intervals
from certify.bounds.op import Affine, Interval
from certify.bounds.relunet import Link, ReluNet, build
from certify.bounds.rewrite import relu_form
from certify.curves import Path
from certify.perturbations import L2, Perturbation

# HiGHS keeps constraints and reduced costs to 1e-7, integrality to 1e-6.
CONSTRAINT, TOLERANCE = 1e-7, 1e-6
# Units whose bounds are smaller than this share of what they are made of are counted in that.
NOISE = 1e-8


@dataclasses.dataclass(frozen=True)
class Minimum:
    """What the solver found for one row.

    Attributes:
        value: the smallest value found (the network's at `x`: an upper bound of the minimum); inf when there is none.
        bound: proven lower bound; equal to `value` up to the solver's gap and tolerances when it finished.
        x: (1, *input) where `value` is attained, float64; None when there is none.
        binaries: binary variables.
        finished: whether the solver proved its value within the limit.
    """

    value: float
    bound: float
    x: Tensor | None
    binaries: int
    finished: bool


@full_float32()
def minimum(
    model: nn.Module,
    x: Tensor,
    p: Perturbation,
    C: Tensor,
    d: Tensor | None = None,
    *,
    seconds: float = math.inf,
    gap: float = 1e-7,
) -> list[Minimum]:
    """The smallest value of each row of ``C y + d`` over the perturbed versions of one image.

    Args:
        model: a network of affine maps, ReLUs, leaky ReLUs, clamps and max-pools, in evaluation mode.
        x: the image (1, ...).
        p: a box, or an affine family (whose parameters are then the inputs). L2 balls are not linear: ValueError.
        C, d: (rows, outputs) and (rows,), 0 by default.
        seconds: time limit a row.
        gap: relative gap at which a row counts as solved.

    Raises:
        UnsupportedOperation: an activation that is not piecewise linear, or a network too large for its matrices.
        ValueError: a batch, a ball, a curve, or wrong shapes.
    """
    if len(x) != 1:
        raise ValueError(f"one image at a time, got a batch of {len(x)}")
    if isinstance(p, L2):
        raise ValueError("a Euclidean ball is not a polytope; use a box around it, or branch and bound")
    if isinstance(p, Path):
        raise ValueError(f"{p.describe()} is a curve, not a polytope; see certify.line")
    p.check(x)
    with torch.no_grad():
        graph, region = attach(trace(copy.deepcopy(model).double(), x.double())[0].folded(), x.double(), p)
        outputs = graph.nodes[graph.output].shape
        if C.ndim != 2 or (C.shape[1],) != outputs or (d is not None and d.shape != C.shape[:1]):
            raise ValueError(f"C must be (rows, {outputs[0]}) and d (rows,), got {tuple(C.shape)}")
        graph = relu_form(graph, intervals(graph, region))
        shift = torch.zeros(len(C), dtype=torch.float64) if d is None else d.double()
        found = crown_intervals(graph, region)
        net = build(graph, region, found, C.double(), shift.to(C.device))
    program = _Program(net, [_magnitude(graph, found, graph.nodes[block.node].inputs[0]) for block in net.blocks])
    results = []
    for row in range(len(C)):
        value, bound, point, finished = program.solve(row, seconds, gap)
        place = None if point is None else net.inputs(torch.from_numpy(point).to(net.middle).unsqueeze(1))
        if place is not None and hasattr(p, "parameters"):
            place = p.apply(x.double(), place)
        results.append(Minimum(value, bound, place, net.units, finished))
    return results


class _Program:
    """Variables: inputs, then for every block its values (after the ReLU), then one binary an undecided unit.

    The solver's tolerances are absolute, so every variable counts in units of its own size (ReLUs allow that): without,
    a network whose layers are large and small in turn gets wrong answers.

    Args:
        net: the network.
        magnitudes: for each block, the largest number that its pre-activations are made of.
    """

    def __init__(self, net: ReluNet, magnitudes: list[float]) -> None:
        self.net = net
        sizes = [len(net.middle), *(len(b.bias) for b in net.blocks)]
        self.at = np.concatenate([[0], np.cumsum(sizes)])
        self.binaries = int(self.at[-1])
        self.count = self.binaries + net.units
        middle, half = _array(net.middle), _array(net.half)
        self.sizes = [_positive(np.abs(middle) + half)]
        self.errors = [CONSTRAINT * self.sizes[0]]  # how far values can be off that the solver takes for right
        middle, half = middle / self.sizes[0], half / self.sizes[0]
        low = np.concatenate([middle - half, np.full(self.count - len(middle), -np.inf)])
        high = np.concatenate([middle + half, np.full(self.count - len(middle), np.inf)])
        low[self.binaries :], high[self.binaries :] = 0, 1
        rows, least, most = [], [], []
        for k, block in enumerate(net.blocks, 1):
            n, size = block.undecided, len(block.bias)
            bias = _array(block.bias)
            own = scipy.sparse.identity(size, format="csr")
            parts = {j: _matrix(link) @ scipy.sparse.diags(self.sizes[j]) for j, link in block.links.items()}
            lo, hi = _array(net.lo[net.span(k)]), _array(net.hi[net.span(k)])
            terms = np.abs(bias) + sum(np.asarray(abs(m).sum(1)).ravel() for m in parts.values())
            # Of a unit that is undecided by rounding alone the bounds are noise, which is not to be blown up.
            terms[:n] = np.maximum(-lo, hi)
            unit = _positive(np.maximum(terms, NOISE * magnitudes[k - 1]))
            self.sizes.append(unit)
            error = CONSTRAINT * unit
            for j, link in block.links.items():
                error = error + abs(_matrix(link)) @ self.errors[j]
            error[:n] = np.minimum(error[:n], unit[:n])
            self.errors.append(error)
            parts = {j: (scipy.sparse.diags(1 / unit) @ m).tocsr() for j, m in parts.items()}
            bias, lo, hi = bias / unit, lo / unit[:n], hi / unit[:n]
            if size > n:
                # On: v = z.
                rows.append(self._place({**{j: -m[n:] for j, m in parts.items()}, k: own[n:]}))
                least.append(bias[n:])
                most.append(bias[n:])
            if n:
                first = int(self.at[k])
                low[first : first + n], high[first : first + n] = 0, np.maximum(hi, 0)
                binary = scipy.sparse.csr_matrix(
                    (np.ones(n), (np.arange(n), np.arange(net.offsets[k - 1], net.offsets[k]))), (n, net.units)
                )
                above = self._place({**{j: -m[:n] for j, m in parts.items()}, k: own[:n]})
                # v >= z;  v <= z - lo (1 - b);  v <= hi b.
                rows.append(above)
                least.append(bias[:n])
                most.append(np.full(n, np.inf))
                rows.append(above + self._binary(binary.multiply(-lo[:, None]).tocsr()))
                least.append(np.full(n, -np.inf))
                most.append(bias[:n] - lo)
                rows.append(self._place({k: own[:n]}) - self._binary(binary.multiply(hi[:, None]).tocsr()))
                least.append(np.full(n, -np.inf))
                most.append(np.zeros(n))
        self.low, self.high = low, high
        self.matrix = scipy.sparse.vstack(rows, format="csc") if rows else None
        self.least = np.concatenate(least) if rows else np.zeros(0)
        self.most = np.concatenate(most) if rows else np.zeros(0)

    def _place(self, parts: dict[int, scipy.sparse.csr_matrix]) -> scipy.sparse.csr_matrix:
        """Matrices on blocks as one matrix on all variables."""
        height = next(iter(parts.values())).shape[0]
        columns = []
        for j in range(len(self.at) - 1):
            width = int(self.at[j + 1] - self.at[j])
            columns.append(parts[j] if j in parts else scipy.sparse.csr_matrix((height, width)))
        columns.append(scipy.sparse.csr_matrix((height, self.net.units)))
        return scipy.sparse.hstack(columns, format="csr")

    def _binary(self, part: scipy.sparse.csr_matrix) -> scipy.sparse.csr_matrix:
        return scipy.sparse.hstack([scipy.sparse.csr_matrix((part.shape[0], self.binaries)), part], format="csr")

    def solve(self, row: int, seconds: float, gap: float) -> tuple[float, float, np.ndarray | None, bool]:
        """Value, bound, inputs and whether the row is solved."""
        from scipy.optimize import Bounds, LinearConstraint, milp

        parts = {j: (_matrix(link) @ scipy.sparse.diags(self.sizes[j]))[row] for j, link in self.net.rows.links.items()}
        constant = float(self.net.rows.bias[row])
        if not parts or not self.count:
            return constant, constant, _array(self.net.middle), True
        objective = self._place(parts).toarray()[0]
        unit = float(_positive(np.abs(objective).max()))
        # What tolerances on constraints, reduced costs and integrality can add up to.
        off = TOLERANCE * float(np.abs(objective).sum())
        off += sum(float((abs(_matrix(link))[row] @ self.errors[j]).item()) for j, link in self.net.rows.links.items())
        integrality = np.zeros(self.count)
        integrality[self.binaries :] = 1
        options = {"mip_rel_gap": gap}
        if math.isfinite(seconds):
            options["time_limit"] = seconds
        result = milp(
            objective / unit,
            integrality=integrality,
            bounds=Bounds(self.low, self.high),
            constraints=None if self.matrix is None else LinearConstraint(self.matrix, self.least, self.most),
            options=options,
        )
        bound = -math.inf if result.mip_dual_bound is None else float(result.mip_dual_bound) * unit + constant - off
        if result.x is None:
            return math.inf, bound, None, False
        claimed = float(result.fun) * unit + constant
        # Without binaries the solver is a linear one and reports no dual bound.
        bound = claimed - off if result.mip_dual_bound is None and result.status == 0 else bound
        middle, half = _array(self.net.middle), _array(self.net.half)
        point = np.clip(result.x[: len(middle)] * self.sizes[0], middle - half, middle + half)
        value = float(self.net.forward(torch.from_numpy(point).to(self.net.middle).unsqueeze(1))[row, 0])
        if abs(value - claimed) > off + gap * abs(claimed):
            return value, -math.inf, point, False  # what the solver solved is not this network
        return value, bound, point, result.status == 0


def _magnitude(graph: Graph, found: list[Interval], node: int) -> float:
    """The largest number in a node and in those that affine maps make it of."""
    pending, largest = {node}, 0.0
    while pending:
        index = pending.pop()
        largest = max(largest, *(float(end.abs().max()) for end in found[index]))
        if isinstance(graph.nodes[index].op, Affine):
            pending.update(graph.nodes[index].inputs)
    return largest


def _positive(size: np.ndarray) -> np.ndarray:
    """`size` with 1 for what is zero."""
    return np.where(size > 0, size, 1.0)


def _array(value: Tensor) -> np.ndarray:
    return np.asarray(value.detach().double().cpu().numpy())


def _matrix(link: Link) -> scipy.sparse.csr_matrix:
    matrix = link.matrix.to_dense() if link.matrix.layout != torch.strided else link.matrix
    return scipy.sparse.csr_matrix(_array(matrix))
