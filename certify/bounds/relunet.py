"""A ReLU network on one input region, cut down to the units that matter there and stored as matrices between them.

On a given region most ReLUs are decided: units that are off vanish, units that are on are linear. What is left, the
*live* units of every ReLU and the affine maps between them, is small: dense matrices for fully connected layers, sparse
ones for convolutions. Branch and bound evaluates hundreds of thousands of bounds on one region, so it pays to build this
once. Columns are problems: values of the units of a layer are (units, B).

A linear functional of the outputs is bounded from below as in CROWN: carried backward, every undecided ReLU replaced by
the line on the right side of it. Each unit has one parameter `theta`: the slope of its lower line while it is undecided
(alpha-CROWN, Xu et al., 2021), the multiplier of its sign constraint once it is split (beta-CROWN, Wang et al., 2021).
"""

from __future__ import annotations

import dataclasses
import functools
import math
import warnings

import numpy as np
import scipy.sparse
import torch
from torch import Tensor

from certify.bounds.activations import ReLU
from certify.bounds.graph import Graph
from certify.bounds.crown import single
from certify.bounds.op import Affine, Coefficients, Interval, UnsupportedOperation
from certify.bounds.region import Region
from certify.bounds.windows import Window

# Sparse products cost about four times as much an entry as dense ones.
SPARSE_BELOW = 0.2


@dataclasses.dataclass(frozen=True)
class Link:
    """A matrix from the units of an earlier block to those of a later one, with its transpose (both dense or CSR)."""

    matrix: Tensor
    transposed: Tensor

    @staticmethod
    def make(matrix: scipy.sparse.csr_matrix, dtype: torch.dtype, device: torch.device) -> Link:
        size = matrix.shape[0] * matrix.shape[1]
        if matrix.nnz < SPARSE_BELOW * size and size > 4096 and _csr_works(dtype, device):
            return Link(_csr(matrix, dtype, device), _csr(matrix.T.tocsr(), dtype, device))
        dense = torch.from_numpy(matrix.toarray()).to(device=device, dtype=dtype)
        return Link(dense, dense.t().contiguous())

    def push(self, value: Tensor) -> Tensor:
        return self.matrix @ value

    def pull(self, functional: Tensor) -> Tensor:
        return self.transposed @ functional

    def columns(self, rows: Tensor) -> Tensor:
        """The functionals of some rows as columns: (earlier units, rows), dense."""
        transposed = self.transposed if self.transposed.layout == torch.strided else self.transposed.to_dense()
        return transposed[:, rows]


def _csr(matrix: scipy.sparse.csr_matrix, dtype: torch.dtype, device: torch.device) -> Tensor:
    matrix.sort_indices()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls its CSR layout a beta feature
        return torch.sparse_csr_tensor(
            torch.from_numpy(matrix.indptr.astype(np.int32)),
            torch.from_numpy(matrix.indices.astype(np.int32)),
            torch.from_numpy(matrix.data.astype(np.float64)).to(dtype),
            size=matrix.shape,
            device=device,
        )


@functools.lru_cache
def _csr_works(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether this build of torch multiplies CSR matrices on `device`."""
    try:
        eye = _csr(scipy.sparse.identity(2, format="csr"), dtype, device)
        return bool(torch.equal(eye @ torch.ones(2, 2, dtype=dtype, device=device), torch.ones(2, 2).to(eye)))
    except RuntimeError:
        return False


@dataclasses.dataclass(frozen=True)
class Block:
    """The live units of one ReLU: `undecided` ones first, then those that are on; entry `index` (units,) of `node`.

    ``z = bias + sum_j links[j] v_j`` over earlier blocks j, where v_0 are the inputs and v_j = relu(z_j).
    """

    node: int
    index: Tensor
    undecided: int
    links: dict[int, Link]
    bias: Tensor


@dataclasses.dataclass(frozen=True)
class Lines:
    """Upper chords ``slope v + intercept``, and where a unit is undecided; (U, B), or (U, 1) for all columns alike."""

    slope: Tensor
    intercept: Tensor
    undecided: Tensor  # 1 or 0 in the working dtype

    @staticmethod
    def make(lo: Tensor, hi: Tensor, sign: Tensor | None = None) -> Lines:
        """For pre-activations in [lo, hi] (U, B); `sign` (U, B) is 1 where a unit is split on, -1 off, else 0."""
        undecided = (lo < 0) & (hi > 0)
        on = lo >= 0
        if sign is not None:
            undecided &= sign == 0
            on = torch.where(sign == 0, on, sign > 0)
        chord = hi / torch.where(undecided, hi - lo, torch.ones_like(lo))
        slope = torch.where(undecided, chord, on.to(lo.dtype))
        return Lines(slope, torch.where(undecided, -lo * chord, torch.zeros_like(lo)), undecided.to(lo.dtype))

    def select(self, columns: Tensor) -> Lines:
        """Some columns."""
        if self.slope.shape[1] == 1:
            return self
        return Lines(self.slope[:, columns], self.intercept[:, columns], self.undecided[:, columns])


@dataclasses.dataclass(frozen=True)
class Rows:
    """Linear functionals of the network: ``bias + sum_j links[j] v_j``, one a row."""

    links: dict[int, Link]
    bias: Tensor


@dataclasses.dataclass(frozen=True)
class ReluNet:
    """See the module's description. `blocks` do not contain block 0, the inputs that vary.

    Attributes:
        blocks: block k is ``blocks[k - 1]``, in topological order.
        rows: the functionals ``C y + d`` to be bounded.
        lo, hi: (U,) root bounds of the undecided units' pre-activations, block after block.
        offsets: where each block's undecided units start; the last entry is U.
        middle, half: (inputs,) centre and half-width of the input box.
        centre, radius: the Euclidean ball that cuts the box, or None.
        base, index: a whole input (flat) and the places of the varying inputs in it.
    """

    blocks: tuple[Block, ...]
    rows: Rows
    lo: Tensor
    hi: Tensor
    offsets: tuple[int, ...]
    middle: Tensor
    half: Tensor
    centre: Tensor | None
    radius: Tensor | None
    base: Tensor
    index: Tensor
    shape: tuple[int, ...]

    @property
    def units(self) -> int:
        """U, the number of undecided units."""
        return self.offsets[-1]

    def span(self, k: int) -> slice:
        """Where the undecided units of block k are."""
        return slice(self.offsets[k - 1], self.offsets[k])

    def inputs(self, x: Tensor) -> Tensor:
        """Whole inputs (B, *shape) from columns of varying entries (inputs, B)."""
        full = self.base.to(x.dtype).repeat(x.shape[1], 1)
        full[:, self.index] = x.t()
        return full.reshape(-1, *self.shape)

    def cast(self, dtype: torch.dtype) -> ReluNet:
        """The same network in another dtype."""

        def link(value: Link) -> Link:
            return Link(value.matrix.to(dtype), value.transposed.to(dtype))

        def links(value: dict[int, Link]) -> dict[int, Link]:
            return {j: link(v) for j, v in value.items()}

        blocks = tuple(dataclasses.replace(b, links=links(b.links), bias=b.bias.to(dtype)) for b in self.blocks)
        return dataclasses.replace(
            self,
            blocks=blocks,
            rows=Rows(links(self.rows.links), self.rows.bias.to(dtype)),
            lo=self.lo.to(dtype),
            hi=self.hi.to(dtype),
            middle=self.middle.to(dtype),
            half=self.half.to(dtype),
            centre=None if self.centre is None else self.centre.to(dtype),
            radius=None if self.radius is None else self.radius.to(dtype),
        )

    def start(self, weights: Tensor) -> tuple[dict[int, Tensor], Tensor]:
        """Functionals ``weights^T rows``, weights (rows, B): coefficients of each block's values and constants (B,)."""
        return {j: link.pull(weights) for j, link in self.rows.links.items()}, self.rows.bias @ weights

    def start_units(self, k: int, units: Tensor, sign: Tensor) -> tuple[dict[int, Tensor], Tensor]:
        """Functionals ``sign * z`` of single pre-activations of block k."""
        block = self.blocks[k - 1]
        return {j: link.columns(units) * sign for j, link in block.links.items()}, block.bias[units] * sign

    def pull(
        self, functional: dict[int, Tensor], constant: Tensor, upto: int, lines: Lines, theta: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Bound functionals of the values of blocks below `upto` from below over the region.

        Returns:
            The bounds (B,), the coefficients (U', B) of the undecided units' outputs, the minimising inputs (inputs, B).
        """
        functional = dict(functional)
        width = len(constant)
        kept = theta.new_zeros(self.offsets[upto - 1], width)
        for k in range(upto - 1, 0, -1):
            c = functional.pop(k, None)
            if c is None:
                continue
            block, span = self.blocks[k - 1], self.span(k)
            n = block.undecided
            if n:
                kept[span] = c[:n]
                outer = c[:n]
                weight = self._weight(outer, lines.undecided[span])
                inner = lines.slope[span] * outer + weight * (theta[span] - lines.slope[span] * lines.undecided[span])
                c = torch.cat([inner, c[n:]])
            constant = constant + block.bias @ c
            for j, link in block.links.items():
                part = link.pull(c)
                functional[j] = functional[j] + part if j in functional else part
        constant = constant + (kept.clamp(max=0) * lines.intercept[: len(kept)]).sum(0)
        at_input = functional.get(0)
        if at_input is None:
            at_input = theta.new_zeros(len(self.middle), width)
        lower, x = self._minimise(at_input)
        return constant + lower, kept, x

    @staticmethod
    def _weight(c: Tensor, undecided: Tensor) -> Tensor:
        """The factor of `theta` in the functional: the positive part of c for slopes, 1 for multipliers."""
        return torch.addcmul(1 - undecided, c.clamp(min=0), undecided)

    def _minimise(self, c: Tensor) -> tuple[Tensor, Tensor]:
        """The smallest value of each functional over the inputs (a lower bound, for a box cut by a ball), and where."""
        x = self.middle.unsqueeze(1) - c.sign() * self.half.unsqueeze(1)
        lower = (c * x).sum(0)
        if self.centre is None or self.radius is None:
            return lower, x
        norm = c.norm(dim=0)
        round_x = self.centre.unsqueeze(1) - self.radius * c / norm.clamp_min(1e-30)
        round_lower = self.centre @ c - self.radius * norm
        better = round_lower > lower
        return torch.where(better, round_lower, lower), torch.where(better, round_x, x)

    def gradient(self, x: Tensor, kept: Tensor, upto: int, lines: Lines, theta: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Supergradient (U', B) of the bounds in `theta`, and the values of all blocks at the minimising inputs.

        By the envelope theorem it is the product of each parameter's factor and the unit's pre-activation when `x` goes
        forward through the lines that the bound uses: one forward pass, no tape.
        """
        values = [x]
        total = torch.empty_like(kept)
        for k in range(1, upto):
            block, span = self.blocks[k - 1], self.span(k)
            z = block.bias.unsqueeze(1).expand(-1, x.shape[1])
            for j, link in block.links.items():
                z = z + link.push(values[j])
            n = block.undecided
            if n:
                c, v = kept[span], z[:n]
                undecided, slope = lines.undecided[span], lines.slope[span]
                total[span] = self._weight(c, undecided) * v
                lower = (c > 0) & (undecided > 0)
                bent = torch.where(lower, theta[span] * v, torch.addcmul(lines.intercept[span], slope, v))
                z = torch.cat([bent, z[n:]])
            values.append(z)
        return total, values

    def outputs(self, values: list[Tensor]) -> Tensor:
        """The rows (rows, B) for values of all blocks."""
        result = self.rows.bias.unsqueeze(1).expand(-1, values[0].shape[1])
        for j, link in self.rows.links.items():
            result = result + link.push(values[j])
        return result

    def forward(self, x: Tensor) -> Tensor:
        """The rows (rows, B) at inputs x (inputs, B); exact inside the region."""
        values = [x]
        for block in self.blocks:
            z = block.bias.unsqueeze(1).expand(-1, x.shape[1])
            for j, link in block.links.items():
                z = z + link.push(values[j])
            values.append(torch.cat([z[: block.undecided].clamp(min=0), z[block.undecided :]]))
        return self.outputs(values)


def build(
    graph: Graph, region: Region, found: list[Interval], C: Tensor, d: Tensor, entries: int = 200_000_000
) -> ReluNet:
    """The live part of `graph` (ReLUs and affine maps only) over the region of a single image.

    Args:
        graph: see `certify.bounds.rewrite.relu_form`.
        region: its input region, batch size 1.
        found: intervals of all nodes over the region.
        C, d: (rows, outputs) and (rows,).
        entries: largest number of matrix entries; a network with more is refused.

    Raises:
        UnsupportedOperation: another nonlinearity, or a network too large for this form.
    """
    builder = _Builder(graph, region, found, entries)
    blocks: list[Block] = []
    numbers: dict[int, int] = {0: 0}
    bounds: list[tuple[Tensor, Tensor]] = []
    for index in range(1, len(graph.nodes)):
        op = graph.operation(index)
        if isinstance(op, ReLU):
            pre = graph.nodes[index].inputs[0]
            lo, hi = found[pre][0].flatten(), found[pre][1].flatten()
            undecided = ((lo < 0) & (hi > 0)).nonzero().flatten()
            on = (lo >= 0).nonzero().flatten()
            places = torch.cat([undecided, on])
            builder.live[index] = places
            numbers[index] = len(blocks) + 1
            maps, bias = builder.functionals(pre, places)
            links = {numbers[j]: builder.link(m) for j, m in sorted(maps.items())}
            blocks.append(Block(index, places, len(undecided), links, bias))
            bounds.append((lo[undecided], hi[undecided]))
        elif not isinstance(op, Affine):
            raise UnsupportedOperation(f"{op.label} is neither affine nor a ReLU")
    maps, bias = builder.dense_functionals(graph.output, C)
    rows = Rows({numbers[j]: builder.link(m) for j, m in sorted(maps.items())}, bias + d)
    offsets = [0]
    for block in blocks:
        offsets.append(offsets[-1] + block.undecided)
    none = region.lo.new_zeros(0)
    varying = builder.live[0]
    lo, hi = region.lo.flatten()[varying], region.hi.flatten()[varying]
    return ReluNet(
        tuple(blocks),
        rows,
        torch.cat([b[0] for b in bounds]) if bounds else none,
        torch.cat([b[1] for b in bounds]) if bounds else none,
        tuple(offsets),
        (lo + hi) / 2,
        (hi - lo) / 2,
        None if region.centre is None else region.centre.flatten()[varying],
        None if region.radius is None else region.radius[0],
        region.lo.flatten(),
        varying,
        tuple(region.lo.shape[1:]),
    )


class _Builder:
    """Collects the affine maps between ReLUs, restricted to live entries."""

    def __init__(self, graph: Graph, region: Region, found: list[Interval], entries: int) -> None:
        self.graph, self.found, self.left = graph, found, entries
        fixed = (region.lo == region.hi) if region.radius is None else torch.zeros_like(region.lo, dtype=torch.bool)
        self.live: dict[int, Tensor] = {0: (~fixed).flatten().nonzero().flatten()}
        self._base = torch.where(fixed, region.lo, torch.zeros_like(region.lo))
        self.dtype, self.device = region.lo.dtype, region.lo.device

    def link(self, matrix: scipy.sparse.csr_matrix) -> Link:
        return Link.make(matrix, self.dtype, self.device)

    def functionals(self, node: int, places: Tensor) -> tuple[dict[int, scipy.sparse.csr_matrix], Tensor]:
        """The maps onto entries `places` of `node` from the live entries of the ReLUs (and inputs) below, and bias."""
        shape = self.graph.nodes[node].shape
        widest = max(math.prod(n.shape) for n in self.graph.nodes[: node + 1])
        chunk = max(1, (1 << 25) // widest)
        parts: list[tuple[dict[int, scipy.sparse.csr_matrix], Tensor]] = []
        for at in range(0, len(places), chunk):
            some = places[at : at + chunk]
            one = torch.ones(len(some), dtype=self.dtype, device=self.device)
            parts.append(self._pull(node, single(torch.zeros_like(some), some, one, shape)))
        sources = {j for maps, _ in parts for j in maps}
        stacked = {j: scipy.sparse.vstack([maps[j] for maps, _ in parts], format="csr") for j in sources}
        none = torch.zeros(0, dtype=self.dtype, device=self.device)
        return stacked, torch.cat([b for _, b in parts]) if parts else none

    def dense_functionals(self, node: int, C: Tensor) -> tuple[dict[int, scipy.sparse.csr_matrix], Tensor]:
        """As `functionals`, for functionals C (rows, *shape)."""
        image = torch.zeros(len(C), dtype=torch.long, device=C.device)
        return self._pull(node, Coefficients(C, image, C.ndim - 1))

    def _pull(self, node: int, c: Coefficients) -> tuple[dict[int, scipy.sparse.csr_matrix], Tensor]:
        pending = {node: c}
        maps: dict[int, scipy.sparse.csr_matrix] = {}
        constant = torch.zeros(c.lead, dtype=self.dtype, device=self.device)
        while pending:
            index = max(pending)
            c = pending.pop(index)
            op = self.graph.nodes[index].op
            if isinstance(op, Affine):
                offset = op.offset(c)
                constant = constant if offset is None else constant + offset
                for i, part in zip(self.graph.nodes[index].inputs, op.adjoint(c)):
                    pending[i] = pending[i].plus(part) if i in pending else part
                continue
            if op is None:
                constant = constant + c.dot(self._base)
            maps[index] = self._live_entries(index, c)
            self.left -= maps[index].nnz
            if self.left < 0:
                raise UnsupportedOperation("the network is too large for branch and bound over ReLUs")
        return maps, constant

    def _live_entries(self, index: int, c: Coefficients) -> scipy.sparse.csr_matrix:
        size = math.prod(self.graph.nodes[index].shape)
        rank = np.full(size, -1)
        rank[self.live[index].cpu().numpy()] = np.arange(len(self.live[index]))
        if isinstance(c, Window):
            rows, places, values = _window_entries(c)
        else:
            flat = c.dense().flat().flatten(1)
            rows, places = flat.nonzero(as_tuple=True)
            values = flat[rows, places]
        column = rank[places.cpu().numpy()]
        keep = column >= 0
        data = values.detach().cpu().numpy().astype(np.float64)[keep]
        where = (rows.cpu().numpy()[keep], column[keep])
        return scipy.sparse.csr_matrix((data, where), shape=(len(c.flat()), len(self.live[index])))


def _window_entries(c: Window) -> tuple[Tensor, Tensor, Tensor]:
    """Row, flat place in the map, and value of every entry that is not zero."""
    rows, channel, down, right = c.data.nonzero(as_tuple=True)
    top = c.position[rows, 0] * c.stride[0] - c.offset[0] + down
    left = c.position[rows, 1] * c.stride[1] - c.offset[1] + right
    return rows, (channel * c.size[0] + top) * c.size[1] + left, c.data[rows, channel, down, right]
