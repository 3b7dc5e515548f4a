"""What every bounded operation can do, and how linear functionals of its values are laid out.

A network is a graph of `Op`s. Values carry a leading batch axis N; shapes in the graph leave it out. Three questions
are asked of an operation: its values (`forward`), an interval of its values from intervals of its inputs (`interval`),
and, for a linear functional of its values, a functional of its *inputs* that bounds it from below (`backward`).
"""

from __future__ import annotations

import abc
import dataclasses
import functools

import torch
from torch import Tensor

Interval = tuple[Tensor, Tensor]


class UnsupportedOperation(NotImplementedError):
    """The network uses an operation that has no sound bound here; the message names it and the module it is in."""


@dataclasses.dataclass
class Coefficients:
    """Linear functionals ``sum_j data_j v_j`` of one node's values, many at once, dense over the node's shape.

    `data` is (A, R, *shape): R functionals for each of A entries. Two layouts. *Uniform* (`image` is None): the entries
    are the images. *Indexed*: entry a belongs to image ``image[a]``; this is how only each image's unstable neurons
    are bounded, from both sides (R = 2), at a cost linear in their number.
    """

    data: Tensor
    image: Tensor | None
    rank: int  # number of feature axes of the node

    @property
    def lead(self) -> torch.Size:
        """The row axes (A, R)."""
        return self.data.shape[:2]

    @property
    def shape(self) -> torch.Size:
        """The node's shape."""
        return self.data.shape[2:]

    def flat(self) -> Tensor:
        """All rows on one axis: (A * R, *shape)."""
        return self.data.flatten(0, 1)

    def like(self, flat: Tensor) -> Coefficients:
        """Functionals of another node from `flat` (A * R, *shape), in this layout."""
        return Coefficients(flat.unflatten(0, self.lead), self.image, flat.ndim - 1)

    def replace(self, data: Tensor, inside: bool = False) -> Coefficients:
        """The same rows with other numbers; `inside` promises that they are zero outside the node (windows only)."""
        return Coefficients(data, self.image, self.rank)

    def keep(self, entries: Tensor) -> Coefficients:
        """The functionals of some entries, by index; indexed layout only."""
        assert self.image is not None
        return Coefficients(self.data[entries], self.image[entries], self.rank)

    def gather(self, value: Tensor) -> Tensor:
        """`value` (N, *shape), or (A, R, *shape) as it is, lined up with `data` for elementwise work."""
        if value.ndim == self.data.ndim:
            return value
        return (value if self.image is None else value[self.image]).unsqueeze(1)

    def constant(self, value: Tensor) -> Tensor:
        """A tensor without batch axis that broadcasts over the node's shape, lined up with `data`."""
        return value

    def dot(self, value: Tensor) -> Tensor:
        """Row sums ``sum_j data_j value_j`` for `value` (N, *shape) or (A, R, *shape): (A, R)."""
        return inner(self.data, self.gather(value))

    def sum(self, weight: Tensor | None = None) -> Tensor:
        """Row sums of ``data * weight`` (weight without batch axis, broadcast over the shape): (A, R)."""
        data = self.data if weight is None else self.data * self.constant(weight)
        return data.flatten(2).sum(-1) if self.rank else data

    def dense(self) -> Coefficients:
        """These functionals over the whole node."""
        return self

    def plus(self, other: Coefficients) -> Coefficients:
        """The sum of two sets of functionals of the same node (a node with two consumers)."""
        return self.replace(self.data + other.dense().data)


def inner(rows: Tensor, value: Tensor) -> Tensor:
    """Sums over all but the first two axes of ``rows * value``, `value` (A, R or 1, *shape): (A, R)."""
    if rows.ndim == 2:
        return rows * value
    if value.shape[1] != 1:
        return (rows * value).flatten(2).sum(-1)
    return torch.bmm(rows.flatten(2), value.flatten(1).unsqueeze(2)).squeeze(2)


@dataclasses.dataclass(frozen=True)
class Relaxation:
    """Two lines around a function on an interval: ``slope_lo v + bias_lo <= f(v) <= slope_hi v + bias_hi``.

    Each tensor is (N, *shape), or (A, R, *shape) where rows have lines of their own; a bias that is None is zero.
    """

    slope_lo: Tensor
    bias_lo: Tensor | None
    slope_hi: Tensor
    bias_hi: Tensor | None

    @functools.cached_property
    def slope_gap(self) -> Tensor:
        """``slope_hi - slope_lo``."""
        return self.slope_hi - self.slope_lo


class Op(abc.ABC):
    """One operation; `path` is the dotted path of the module that runs it."""

    path: str = ""

    @property
    def label(self) -> str:
        """For messages: the operation and where it is."""
        return f"{type(self).__name__} in module {self.path or '(root)'!r}"

    def select(self, index: Tensor) -> Op:
        """This operation for some images of the batch; only operations with constants an image differ."""
        return self

    @abc.abstractmethod
    def forward(self, *inputs: Tensor) -> Tensor:
        """The values (N, ...)."""

    @abc.abstractmethod
    def interval(self, *inputs: Interval) -> Interval:
        """An interval of the values for inputs anywhere in their intervals."""


class Affine(Op):
    """``v = A x + b`` (over all inputs together)."""

    @abc.abstractmethod
    def linear(self, *inputs: Tensor) -> Tensor:
        """``A x``."""

    @abc.abstractmethod
    def magnitude(self, *radii: Tensor) -> Tensor:
        """``|A| r`` for radii r >= 0."""

    @abc.abstractmethod
    def adjoint(self, c: Coefficients) -> tuple[Coefficients, ...]:
        """``A^T c``, one set of functionals an input."""

    def offset(self, c: Coefficients) -> Tensor | None:
        """``c . b`` a row, None when b = 0."""
        return None

    def bias(self) -> Tensor | None:
        """b, broadcastable to the values, None when it is 0."""
        return None

    def forward(self, *inputs: Tensor) -> Tensor:
        value, bias = self.linear(*inputs), self.bias()
        return value if bias is None else value + bias

    def interval(self, *inputs: Interval) -> Interval:
        # Where a sum of ends overflows, lerp's middle overflows only together with the radius, which then says so.
        centre = self.forward(*[torch.lerp(lo, hi, 0.5) for lo, hi in inputs])
        radius = self.magnitude(*[(hi - lo) / 2 for lo, hi in inputs])
        return centre - radius, centre + radius


class Activation(Op):
    """An elementwise nonlinear function of one input, bounded by two lines on an interval."""

    @abc.abstractmethod
    def relax(self, lo: Tensor, hi: Tensor) -> Relaxation:
        """Two lines that enclose the function on [lo, hi]."""

    def backward(self, c: Coefficients, r: Relaxation) -> tuple[Coefficients, Tensor]:
        """Replace the function by the line that bounds each functional from below: input functionals and constants."""
        negative = c.data.clamp(max=0)
        constant: Tensor | None = None
        if r.bias_hi is not None:
            constant = c.replace(negative).dot(r.bias_hi)
        if r.bias_lo is not None:
            lower = c.replace(c.data - negative).dot(r.bias_lo)
            constant = lower if constant is None else constant + lower
        # Positive weights take the lower line and negative ones the upper: lo c + (hi - lo) min(c, 0).
        gap = c.gather(r.slope_gap)
        down = negative * gap if torch.is_grad_enabled() else negative.mul_(gap)
        data = torch.addcmul(down, c.data, c.gather(r.slope_lo))
        # What is cut from the lines outside a map is zero, and so is the product.
        return c.replace(data, inside=True), c.data.new_zeros(c.lead) if constant is None else constant

    @abc.abstractmethod
    def unstable(self, lo: Tensor, hi: Tensor) -> Tensor:
        """Where on [lo, hi] the function is not a single line: bool, same shape. Only these need tight bounds."""


class Monotone(Activation):
    """A non-decreasing elementwise function: the ends of an interval map to the ends."""

    def interval(self, *inputs: Interval) -> Interval:
        ((lo, hi),) = inputs
        return self.forward(lo), self.forward(hi)
