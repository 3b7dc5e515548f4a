"""Linear functionals of feature maps that live in a small window each.

A neuron of a convolution depends on a window of its input. Going back through the network the window grows by the
kernel at every layer; until it covers the map, storing and convolving the window alone saves most of the work of
bounding early layers (the "patches" of auto-LiRPA, here with any set of neurons of any image side by side).
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from certify.bounds.op import Coefficients


@dataclasses.dataclass
class Window(Coefficients):
    """Row m weighs ``map[image[m], :, top : top + kh, left : left + kw]`` with ``data`` (M, C, kh, kw).

    ``(top, left) = position[m] * stride - offset``, so that all geometry but `position` (M, 2) is known without
    looking at the device. Entries that fall outside the map of `size` (H, W) are zero in `data`.
    """

    position: Tensor
    grid: tuple[int, int]  # positions lie in [0, grid)
    stride: tuple[int, int]
    offset: tuple[int, int]
    size: tuple[int, int]

    @staticmethod
    def neurons(image: Tensor, index: Tensor, sign: Tensor, shape: tuple[int, int, int]) -> Window:
        """Functionals ``sign * value`` of single neurons, by `image` (M,) and flat `index` (M,) into `shape`."""
        channels, height, width = shape
        place = index % (height * width)
        data = torch.zeros(len(index), channels, 1, 1, dtype=sign.dtype, device=index.device)
        data[torch.arange(len(index), device=index.device), index // (height * width)] = sign.reshape(-1, 1, 1)
        position = torch.stack([place // width, place % width], 1)
        return Window(data, image, 3, position, (height, width), (1, 1), (0, 0), (height, width))

    def replace(self, data: Tensor) -> Window:
        return dataclasses.replace(self, data=data)

    def _margins(self) -> tuple[int, int, int, int]:
        """How far windows can stick out of the map: left, right, top, bottom (as for F.pad)."""
        pads = []
        for axis in (1, 0):
            reach = (self.grid[axis] - 1) * self.stride[axis] - self.offset[axis] + self.data.shape[2 + axis]
            pads += [max(0, self.offset[axis]), max(0, reach - self.size[axis])]
        return pads[0], pads[1], pads[2], pads[3]

    def _corners(self) -> tuple[Tensor, Tensor]:
        """Top and left of every window in the map padded by `_margins`."""
        left, _, top, _ = self._margins()
        return (
            self.position[:, 0] * self.stride[0] - self.offset[0] + top,
            self.position[:, 1] * self.stride[1] - self.offset[1] + left,
        )

    def _windows(self, value: Tensor, image: Tensor) -> Tensor:
        padded = F.pad(value, self._margins())
        height, width = self.data.shape[2:]
        top, left = self._corners()
        return padded.unfold(2, height, 1).unfold(3, width, 1)[image, :, top, left]

    def gather(self, value: Tensor) -> Tensor:
        assert self.image is not None
        return self._windows(value, self.image)

    def constant(self, value: Tensor) -> Tensor:
        if value.ndim < 2 or (value.shape[-1] == 1 and value.shape[-2] == 1):
            return value
        full = value.expand(self.data.shape[1], *self.size).unsqueeze(0)
        return self._windows(full, torch.zeros_like(self.position[:, 0]))

    def dot(self, value: Tensor) -> Tensor:
        return (self.data * self.gather(value)).flatten(1).sum(1)

    def dense(self) -> Coefficients:
        left, right, top, bottom = self._margins()
        rows, channels, height, width = self.data.shape
        wide, high = self.size[1] + left + right, self.size[0] + top + bottom
        tops, lefts = self._corners()
        inner = torch.arange(height, device=tops.device)[:, None] * wide + torch.arange(width, device=tops.device)
        index = (tops * wide + lefts).reshape(-1, 1, 1) + inner
        full = torch.zeros(rows, channels, high * wide, dtype=self.data.dtype, device=self.data.device)
        full = full.scatter(2, index.reshape(rows, 1, -1).expand(-1, channels, -1), self.data.flatten(2))
        full = full.reshape(rows, channels, high, wide)[:, :, top : top + self.size[0], left : left + self.size[1]]
        return Coefficients(full, self.image, 3)

    def plus(self, other: Coefficients) -> Coefficients:
        same = isinstance(other, Window) and (
            (self.stride, self.offset, self.grid, self.data.shape)
            == (other.stride, other.offset, other.grid, other.data.shape)
        )
        if same:
            return self.replace(self.data + other.data)
        return self.dense().plus(other)

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
        grown = [
            (k - 1) * s + d * (w - 1) + 1 for k, s, d, w in zip(self.data.shape[2:], stride, dilation, weight.shape[2:])
        ]
        if grown[0] * grown[1] >= size[0] * size[1]:
            return None
        data = F.conv_transpose2d(self.data, weight, None, stride, 0, 0, groups, dilation)
        out = Window(
            data,
            self.image,
            3,
            self.position,
            self.grid,
            (self.stride[0] * stride[0], self.stride[1] * stride[1]),
            (self.offset[0] * stride[0] + padding[0], self.offset[1] * stride[1] + padding[1]),
            size,
        )
        if any(out._margins()):
            inside = torch.ones(1, 1, *size, dtype=data.dtype, device=data.device)
            out.data = data * out._windows(inside, torch.zeros_like(self.position[:, 0]))
        return out
