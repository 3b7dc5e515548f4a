"""Linear functionals of feature maps that live in a small window each.

A neuron of a convolution depends on a window of its input. Going back through the network the window grows by the
kernel at every layer; until it covers the map, storing and convolving the window alone saves most of the work of
bounding early layers (the "patches" of auto-LiRPA, here with any set of neurons of any image side by side). Numbers are
kept channels-last in memory, which makes cutting windows out of maps, and the convolutions, fast.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from certify.bounds.op import Coefficients, inner

# Up to this many, a transposed convolution is slower than a matrix product and a sum over overlaps.
FEW_CHANNELS = 4


def transposed(
    flat: Tensor,
    weight: Tensor,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
    size: tuple[int, int],
) -> Tensor:
    """The adjoint of a convolution whose input is of `size` (H, W): (A, out, h, w) to (A, in, H, W).

    Into few channels, as at the image, a matrix product and a sum over overlaps is several times faster on a processor
    than the libraries' transposed convolution.
    """
    few = flat.device.type == "cpu" and groups == 1 and weight.shape[1] <= FEW_CHANNELS
    if few:
        kernel = (weight.shape[2], weight.shape[3])
        columns = weight.flatten(1).t() @ flat.flatten(2)
        return F.fold(columns, size, kernel, dilation, padding, stride)
    extra = [
        full - ((out - 1) * s - 2 * p + d * (k - 1) + 1)
        for full, out, s, p, d, k in zip(size, flat.shape[2:], stride, padding, dilation, weight.shape[2:])
    ]
    return F.conv_transpose2d(
        flat.contiguous(memory_format=torch.channels_last),
        weight.contiguous(memory_format=torch.channels_last),
        None,
        stride,
        padding,
        extra,
        groups,
        dilation,
    )


class Maps:
    """Padded, channels-last copies of the maps that windows are cut from, made once for many chunks of windows."""

    def __init__(self) -> None:
        self._kept: dict[tuple[int, tuple[int, ...]], tuple[Tensor, Tensor]] = {}

    def padded(self, value: Tensor, margins: tuple[int, int, int, int]) -> Tensor:
        """`value` (N, C, H, W) as (N, top + H + bottom, left + W + right, C)."""
        key = (id(value), margins)
        if key not in self._kept:
            # The map itself is kept beside its copy, so that no other tensor can take its id.
            self._kept[key] = (value, F.pad(value.movedim(1, -1), (0, 0, *margins)).contiguous())
        return self._kept[key][1]


@dataclasses.dataclass
class Window(Coefficients):
    """Entry a weighs ``map[image[a], :, top : top + kh, left : left + kw]`` with ``data`` (A, R, C, kh, kw).

    ``(top, left) = position[a] * stride - offset``, so that all geometry but `position` (A, 2) is known without looking
    at the device. Windows may stick out of the map of `size` (H, W); what lies outside does not count (`inside` says
    that `data` is already zero there).
    """

    position: Tensor
    grid: tuple[int, int]  # positions lie in [0, grid)
    stride: tuple[int, int]
    offset: tuple[int, int]
    size: tuple[int, int]
    inside: bool
    maps: Maps

    def replace(self, data: Tensor, inside: bool = False) -> Window:
        return dataclasses.replace(self, data=data, inside=self.inside or inside)

    def keep(self, entries: Tensor) -> Window:
        assert self.image is not None
        return dataclasses.replace(
            self, data=self.data[entries], image=self.image[entries], position=self.position[entries]
        )

    def _margins(self) -> tuple[int, int, int, int]:
        """How far windows can stick out of the map: left, right, top, bottom (as for F.pad)."""
        pads = []
        for axis in (1, 0):
            reach = (self.grid[axis] - 1) * self.stride[axis] - self.offset[axis] + self.data.shape[3 + axis]
            pads += [max(0, self.offset[axis]), max(0, reach - self.size[axis])]
        return pads[0], pads[1], pads[2], pads[3]

    def _corners(self) -> tuple[Tensor, Tensor]:
        """Top and left of every window in the map padded by `_margins`."""
        left, _, top, _ = self._margins()
        return (
            self.position[:, 0] * self.stride[0] - self.offset[0] + top,
            self.position[:, 1] * self.stride[1] - self.offset[1] + left,
        )

    def _cut(self, value: Tensor, image: Tensor) -> Tensor:
        """The window of each entry out of `value` (N, C, H, W), zero outside: (A, 1, C, kh, kw)."""
        last = self.maps.padded(value, self._margins())
        tops, lefts = self._corners()
        places = last.unfold(1, self.data.shape[3], 1).unfold(2, self.data.shape[4], 1).permute(0, 1, 2, 4, 5, 3)
        return places[image, tops, lefts].movedim(-1, 1).unsqueeze(1)

    def gather(self, value: Tensor) -> Tensor:
        assert self.image is not None
        return self._cut(value, self.image)

    def constant(self, value: Tensor) -> Tensor:
        # What differs from place to place, (W,) and (H, 1) included, has to be cut like the map that it belongs to.
        if value.numel() == 1 or (value.ndim >= 3 and value.shape[-2:] == (1, 1)):
            return value
        full = value.expand(self.data.shape[2], *self.size).unsqueeze(0)
        return self._cut(full, torch.zeros_like(self.position[:, 0]))

    def masked(self) -> Window:
        """The same functionals with zeros outside the map."""
        if self.inside or not any(self._margins()):
            return self
        ones = torch.ones(1, 1, *self.size, dtype=self.data.dtype, device=self.data.device)
        mask = self._cut(ones, torch.zeros_like(self.position[:, 0]))
        return dataclasses.replace(self, data=self.data * mask, inside=True)

    def dot(self, value: Tensor) -> Tensor:
        # Channels-last on both sides, so that flattening copies nothing.
        rows, columns = self.data.movedim(2, -1), self.gather(value).movedim(2, -1)
        if columns.shape[1] != 1:
            return inner(rows, columns)
        # As a row times a matrix: the libraries are ten times slower on a matrix times a column in a batch.
        return torch.bmm(columns.flatten(2), rows.flatten(2).transpose(1, 2)).squeeze(1)

    def sum(self, weight: Tensor | None = None) -> Tensor:
        data = self.masked().data
        if weight is not None and tuple(weight.shape[-3:]) == (self.data.shape[2], 1, 1):
            return data.sum((3, 4)) @ weight.flatten()
        return (data if weight is None else data * self.constant(weight)).sum((2, 3, 4))

    def dense(self) -> Coefficients:
        left, right, top, bottom = self._margins()
        entries, rows, channels, height, width = self.data.shape
        wide, high = self.size[1] + left + right, self.size[0] + top + bottom
        tops, lefts = self._corners()
        places = torch.arange(height, device=tops.device)[:, None] * wide + torch.arange(width, device=tops.device)
        index = (tops * wide + lefts).reshape(-1, 1, 1, 1) + places.reshape(1, 1, -1, 1)
        full = self.data.new_zeros(entries, rows, high * wide, channels)
        full = full.scatter(2, index.expand(-1, rows, -1, channels), self.data.movedim(2, -1).flatten(2, 3))
        full = full.reshape(entries, rows, high, wide, channels)
        full = full[:, :, top : top + self.size[0], left : left + self.size[1]]
        return Coefficients(full.movedim(-1, 2), self.image, 3)

    def plus(self, other: Coefficients) -> Coefficients:
        if isinstance(other, Window) and (self.stride, self.grid, self.size) == (other.stride, other.grid, other.size):
            # The smallest window that holds both: it starts at the larger offset and ends at the later end.
            offset = (max(self.offset[0], other.offset[0]), max(self.offset[1], other.offset[1]))
            reach = [max(w.data.shape[3 + i] - w.offset[i] for w in (self, other)) for i in (0, 1)]
            if (reach[0] + offset[0]) * (reach[1] + offset[1]) < self.size[0] * self.size[1]:
                data = self._widened(offset, reach) + other._widened(offset, reach)
                return dataclasses.replace(self, data=data, offset=offset, inside=self.inside and other.inside)
        return self.dense().plus(other)

    def _widened(self, offset: tuple[int, int], reach: list[int]) -> Tensor:
        """`data` in the window from ``-offset`` to `reach` (relative to position times stride)."""
        before = [o - own for o, own in zip(offset, self.offset)]
        after = [r - (self.data.shape[3 + i] - self.offset[i]) for i, r in enumerate(reach)]
        if not any(before + after):
            return self.data
        return F.pad(self.data, (before[1], after[1], before[0], after[0]))

    def through_conv(
        self,
        weight: Tensor,
        stride: tuple[int, int],
        padding: tuple[int, int],
        dilation: tuple[int, int],
        groups: int,
        input_shape: tuple[int, ...],
    ) -> Window | None:
        """The functionals of a convolution's input, or None once the window would be as large as the map."""
        size = (input_shape[1], input_shape[2])
        kernel = tuple(weight.shape[2:])
        grown = [(k - 1) * s + d * (w - 1) + 1 for k, s, d, w in zip(self.data.shape[3:], stride, dilation, kernel)]
        # A window somewhat larger than the map costs less than writing it out over the map.
        if grown[0] * grown[1] >= 1.5 * size[0] * size[1]:
            return None
        data = transposed(self.masked().flat(), weight, stride, (0, 0), dilation, groups, (grown[0], grown[1]))
        return Window(
            data.unflatten(0, self.lead),
            self.image,
            3,
            self.position,
            self.grid,
            (self.stride[0] * stride[0], self.stride[1] * stride[1]),
            (self.offset[0] * stride[0] + padding[0], self.offset[1] * stride[1] + padding[1]),
            size,
            inside=False,
            maps=self.maps,
        )


@dataclasses.dataclass
class Neurons(Coefficients):
    """Single entries of a node, weighed +1 and -1: the start of a backward pass. `data` (A, 2) holds the signs.

    They stand for one-hot functionals without storing them; a convolution or linear map picks rows of its weight.
    """

    entry: Tensor
    full: tuple[int, ...]
    maps: Maps

    @staticmethod
    def both_signs(
        image: Tensor, entry: Tensor, shape: tuple[int, ...], dtype: torch.dtype, maps: Maps | None = None
    ) -> Neurons:
        """Functionals ``+value`` and ``-value`` of flat entries `entry` (A,) of a node of `shape`, in images (A,)."""
        signs = torch.tensor([1.0, -1.0], dtype=dtype, device=image.device).expand(len(image), 2)
        return Neurons(signs, image, len(shape), entry, shape, maps or Maps())

    @property
    def shape(self) -> torch.Size:
        return torch.Size(self.full)

    def dense(self) -> Coefficients:
        full = self.data.new_zeros(*self.lead, self.shape.numel())
        index = self.entry.reshape(-1, 1, 1).expand(-1, 2, 1)
        return Coefficients(
            full.scatter(2, index, self.data.unsqueeze(2)).unflatten(2, self.full), self.image, self.rank
        )

    def sum(self, weight: Tensor | None = None) -> Tensor:
        if weight is None:
            return self.data
        return self.data * weight.expand(self.full).flatten()[self.entry].unsqueeze(1)

    def rows(self, weight: Tensor) -> Coefficients:
        """The functionals of the input of a linear map with matrix `weight` (out, in) on one axis."""
        return Coefficients(self.data.unsqueeze(2) * weight[self.entry].unsqueeze(1), self.image, 1)

    def through_conv(
        self,
        weight: Tensor,
        stride: tuple[int, int],
        padding: tuple[int, int],
        dilation: tuple[int, int],
        groups: int,
        input_shape: tuple[int, ...],
    ) -> Window | None:
        """The functionals of a convolution's input: its kernels; None where windows do not pay."""
        size, kernel = (input_shape[1], input_shape[2]), tuple(weight.shape[2:])
        if groups != 1 or dilation != (1, 1):
            return self.window().through_conv(weight, stride, padding, dilation, groups, input_shape)
        if kernel[0] * kernel[1] >= size[0] * size[1]:
            return None
        height, width = self.full[1:]
        picked = weight.contiguous(memory_format=torch.channels_last)[self.entry // (height * width)]
        data = self.data.reshape(-1, 2, 1, 1, 1) * picked.unsqueeze(1)
        return self._placed(data, stride, padding, size)

    def window(self) -> Window:
        """As windows of one pixel; the node must be a feature map."""
        height, width = self.full[1:]
        channel = (self.entry // (height * width)).reshape(-1, 1, 1).expand(*self.lead, 1)
        data = self.data.new_zeros(*self.lead, self.full[0]).scatter(2, channel, self.data.unsqueeze(2))
        return self._placed(data.unflatten(2, (-1, 1, 1)), (1, 1), (0, 0), (height, width))

    def dot(self, value: Tensor) -> Tensor:
        return self.dense().dot(value)

    def constant(self, value: Tensor) -> Tensor:
        return value.expand(self.full).flatten()[self.entry].unsqueeze(1)

    def replace(self, data: Tensor, inside: bool = False) -> Neurons:
        return dataclasses.replace(self, data=data)

    def plus(self, other: Coefficients) -> Coefficients:
        return self.dense().plus(other)

    def spread(self) -> Coefficients:
        """Windows of one pixel for a feature map, dense for anything else."""
        return self.window() if len(self.full) == 3 and self.full[1] * self.full[2] > 1 else self.dense()

    def _placed(self, data: Tensor, stride: tuple[int, int], offset: tuple[int, int], size: tuple[int, int]) -> Window:
        height, width = self.full[1:]
        place = self.entry % (height * width)
        position = torch.stack([place // width, place % width], 1)
        return Window(data, self.image, 3, position, (height, width), stride, offset, size, False, self.maps)
