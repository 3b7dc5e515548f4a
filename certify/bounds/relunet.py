"""A ReLU network on one input region, cut down to the units that matter there and stored as matrices between them.

On a given region most ReLUs are decided: units that are off vanish, units that are on are linear. What is left, the
*live* units of every ReLU and the affine maps between them, is small: dense matrices for fully connected layers,
sparse ones for convolutions. Branch and bound evaluates hundreds of thousands of bounds on one region, so it pays to
build this once. Columns are problems: values of the units of a layer are (units, B).

A linear functional of the outputs is bounded from below as in CROWN: carried backward, every undecided ReLU replaced by
the line on the right side of it. Each unit has one parameter `theta`: the slope of its lower line while it is undecided
(alpha-CROWN, Xu et al., 2021), the multiplier of its sign constraint once it is split (beta-CROWN, Wang et al., 2021).
"""

from __future__ import annotations

import dataclasses
import functools
import math
import warnings
from typing import Any, TypeAlias

import numpy as np
import scipy.sparse
import torch
from torch import Tensor

from certify.bounds.activations import ReLU
from certify.bounds.affine import Conv2d, Linear, Reshape, Scale
from certify.bounds.graph import Graph
from certify.bounds.op import Affine, Interval, UnsupportedOperation
from certify.bounds.region import Region

Array = np.ndarray[Any, np.dtype[Any]]
Matrix: TypeAlias = Any  # scipy.sparse.csr_matrix, which has no type stubs

# Sparse products cost about four times as much an entry as dense ones.
SPARSE_BELOW = 0.2


@dataclasses.dataclass(frozen=True)
class Link:
    """A matrix from the units of an earlier block to those of a later one, with its transpose (both dense or CSR)."""

    matrix: Tensor
    transposed: Tensor

    @staticmethod
    def make(matrix: Matrix, dtype: torch.dtype, device: torch.device) -> Link:
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


def _csr(matrix: Matrix, dtype: torch.dtype, device: torch.device) -> Tensor:
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
            undecided = undecided & (sign == 0)
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
            Bounds (B,), and coefficients of the undecided units' outputs (U', B) and of the inputs (inputs, B).
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
        return constant + self._smallest(at_input), kept, at_input

    @staticmethod
    def _weight(c: Tensor, undecided: Tensor) -> Tensor:
        """The factor of `theta` in the functional: the positive part of c for slopes, 1 for multipliers."""
        return torch.addcmul(1 - undecided, c.clamp(min=0), undecided)

    def _smallest(self, c: Tensor) -> Tensor:
        """The smallest value (B,) of functionals of the inputs (a lower bound of it, for a box cut by a ball)."""
        lower = self.middle @ c - self.half @ c.abs()
        if self.centre is None or self.radius is None:
            return lower
        return torch.maximum(lower, self.centre @ c - self.radius * c.norm(dim=0))

    def minimiser(self, c: Tensor) -> Tensor:
        """Where functionals c (inputs, B) of the inputs take the value that `pull` counts: (inputs, B)."""
        x = torch.addcmul(self.middle.unsqueeze(1), c.sign(), self.half.unsqueeze(1), value=-1)
        if self.centre is None or self.radius is None:
            return x
        norm = c.norm(dim=0)
        inner = self.centre @ c - self.radius * norm > self.middle @ c - self.half @ c.abs()
        return torch.where(inner, self.centre.unsqueeze(1) - self.radius * c / norm.clamp_min(1e-30), x)

    def gradient(
        self, at_input: Tensor, kept: Tensor, upto: int, lines: Lines, theta: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        """Supergradient (U', B) of the bounds in `theta`, and the values of all blocks at the minimising inputs.

        By the envelope theorem it is the product of each parameter's factor and the unit's pre-activation when the
        minimising input goes forward through the lines that the bound uses: one forward pass, no tape.
        """
        values = [self.minimiser(at_input)]
        total = torch.empty_like(kept)
        for k in range(1, upto):
            block, span = self.blocks[k - 1], self.span(k)
            z = block.bias.unsqueeze(1).expand(-1, kept.shape[1])
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
    builder = _Builder(graph, region, entries)
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
            maps, bias = builder.entries(pre, places)
            links = {numbers[j]: builder.link(m) for j, m in sorted(maps.items())}
            blocks.append(Block(index, places, len(undecided), links, bias))
            bounds.append((lo[undecided], hi[undecided]))
        elif not isinstance(op, Affine):
            raise UnsupportedOperation(f"{op.label} is neither affine nor a ReLU")
    maps, bias = builder.pull(graph.output, scipy.sparse.csr_matrix(C.double().cpu().numpy()))
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
    """Collects the affine maps between ReLUs as sparse matrices, restricted to live entries."""

    def __init__(self, graph: Graph, region: Region, entries: int) -> None:
        self.graph, self.left = graph, entries
        fixed = (region.lo == region.hi) if region.radius is None else torch.zeros_like(region.lo, dtype=torch.bool)
        self.live: dict[int, Tensor] = {0: (~fixed).flatten().nonzero().flatten()}
        self._base = torch.where(fixed, region.lo, torch.zeros_like(region.lo)).flatten().double().cpu().numpy()
        self.dtype, self.device = region.lo.dtype, region.lo.device

    def link(self, matrix: Matrix) -> Link:
        return Link.make(matrix, self.dtype, self.device)

    def entries(self, node: int, places: Tensor) -> tuple[dict[int, Matrix], Tensor]:
        """The maps onto entries `places` of `node` from the live entries of the ReLUs (and inputs) below, and bias."""
        rows = np.arange(len(places))
        shape = (len(places), math.prod(self.graph.nodes[node].shape))
        return self.pull(node, scipy.sparse.csr_matrix((np.ones(len(places)), (rows, places.cpu().numpy())), shape))

    def pull(self, node: int, c: Matrix) -> tuple[dict[int, Matrix], Tensor]:
        """As `entries`, for functionals c (rows, size of the node)."""
        pending = {node: c}
        maps: dict[int, Matrix] = {}
        constant = np.zeros(c.shape[0])
        while pending:
            index = max(pending)
            c = pending.pop(index)
            op = self.graph.nodes[index].op
            if isinstance(op, Affine):
                bias = op.bias()
                if bias is not None:
                    constant += c @ _spread(bias, self.graph.nodes[index].shape)
                inputs = self.graph.nodes[index].inputs
                parts = _adjoint(op, c, [self.graph.nodes[i].shape for i in inputs], self.device)
                for i, part in zip(inputs, parts, strict=True):
                    pending[i] = pending[i] + part if i in pending else part
                    self._count(part)
                continue
            if op is None:
                constant += c @ self._base
            maps[index] = c[:, self.live[index].cpu().numpy()].tocsr()
        return maps, torch.from_numpy(constant).to(device=self.device, dtype=self.dtype)

    def _count(self, matrix: Matrix) -> None:
        self.left -= matrix.nnz
        if self.left < 0:
            raise UnsupportedOperation("the network is too large for branch and bound over its ReLUs")


def _spread(value: Tensor, shape: tuple[int, ...]) -> Array:
    """A constant that broadcasts over a node's shape (batch axis 1 allowed), flat, in float64."""
    if value.ndim > len(shape):
        value = value[0]
    return np.asarray(value.detach().double().expand(shape).reshape(-1).cpu().numpy())


def _adjoint(op: Affine, c: Matrix, shapes: list[tuple[int, ...]], device: torch.device) -> list[Matrix]:
    """``c A`` for functionals c of an affine operation's values, one matrix an input."""
    if isinstance(op, Reshape):
        return [c]
    if isinstance(op, Linear) and len(shapes[0]) == 1:
        used = np.unique(c.indices)
        weight = op.weight.detach().double().cpu().numpy()[used]
        return [scipy.sparse.csr_matrix(c[:, used] @ weight)]
    if isinstance(op, Conv2d):
        used = np.unique(c.indices)
        return [(c[:, used] @ _convolution(op, used)).tocsr()]
    if isinstance(op, Scale):
        if op.scale is None:
            return [c]
        return [(c @ scipy.sparse.diags(_spread(op.scale, shapes[0]))).tocsr()]
    # Any other linear map is applied to unit vectors of one input at a time.
    results = []
    for position, shape in enumerate(shapes):
        size = math.prod(shape)
        chunk = max(1, (1 << 24) // max(size, c.shape[1]))
        columns = []
        for at in range(0, size, chunk):
            many = min(chunk, size - at)
            units = torch.zeros(many, size, dtype=torch.float64, device=device)
            units[torch.arange(many), torch.arange(at, at + many)] = 1
            inputs = [units.new_zeros(many, *other) for other in shapes]
            inputs[position] = units.reshape(many, *shape)
            value = scipy.sparse.csr_matrix(op.linear(*inputs).reshape(many, -1).cpu().numpy())
            columns.append((c @ value.T).tocsc())
        results.append(scipy.sparse.hstack(columns, format="csr"))
    return results


def _convolution(op: Conv2d, used: Array) -> Matrix:
    """Rows `used` (flat output entries) of a convolution's matrix."""
    weight = op.weight.detach().double().cpu().numpy()
    out, width, high, wide = weight.shape
    _, height, breadth = op.input_shape
    rows, cols = [
        (size + 2 * p - d * (k - 1) - 1) // s + 1
        for size, p, d, k, s in zip(op.input_shape[1:], op.padding, op.dilation, (high, wide), op.stride, strict=True)
    ]
    channel, place = used // (rows * cols), used % (rows * cols)
    down = (place // cols * op.stride[0] - op.padding[0])[:, None] + np.arange(high) * op.dilation[0]
    right = (place % cols * op.stride[1] - op.padding[1])[:, None] + np.arange(wide) * op.dilation[1]
    source = (channel // (out // op.groups) * width)[:, None] + np.arange(width)
    index = (source[:, :, None, None] * height + down[:, None, :, None]) * breadth + right[:, None, None, :]
    inside = ((down >= 0) & (down < height))[:, None, :, None] & ((right >= 0) & (right < breadth))[:, None, None, :]
    inside = np.broadcast_to(inside, index.shape)
    row = np.broadcast_to(np.arange(len(used))[:, None, None, None], index.shape)
    shape = (len(used), math.prod(op.input_shape))
    return scipy.sparse.csr_matrix((weight[channel][inside], (row[inside], index[inside])), shape)
