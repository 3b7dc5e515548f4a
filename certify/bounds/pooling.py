"""Max-pooling with a linear relaxation of its own."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from certify.bounds.op import Coefficients, Interval, Op


@dataclasses.dataclass(frozen=True)
class PoolRelaxation:
    """Around each pooled value m = max_j x_j: ``x_pick <= m``; ``m = x_pick`` where `exact`, else ``m <= ceiling``.

    `pick`: flat spatial index of one input an output, (N, C, H, W).
    """

    pick: Tensor
    exact: Tensor
    ceiling: Tensor


class MaxPool2d(Op):
    """Two-dimensional max-pooling, with padding (by minus infinity), dilation and ceil_mode as torch defines them.

    Lower line: the input with the largest lower end. Upper line: that input where no other can exceed it, else the
    largest upper end.
    """

    def __init__(
        self,
        kernel: tuple[int, int],
        stride: tuple[int, int],
        padding: tuple[int, int],
        dilation: tuple[int, int],
        ceil_mode: bool,
        input_shape: tuple[int, ...],
    ) -> None:
        self.kernel, self.stride, self.padding, self.dilation = kernel, stride, padding, dilation
        self.ceil_mode, self.input_shape = ceil_mode, input_shape

    def _pool(self, x: Tensor) -> Tensor:
        return F.max_pool2d(x, self.kernel, self.stride, self.padding, self.dilation, self.ceil_mode)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self._pool(inputs[0])

    def interval(self, *inputs: Interval) -> Interval:
        ((lo, hi),) = inputs
        return self._pool(lo), self._pool(hi)

    def relax(self, lo: Tensor, hi: Tensor) -> PoolRelaxation:
        """The relaxation for inputs in [lo, hi] (N, C, H, W)."""
        floor, pick = F.max_pool2d(
            lo, self.kernel, self.stride, self.padding, self.dilation, self.ceil_mode, return_indices=True
        )
        ceiling = self._pool(hi)
        return PoolRelaxation(pick, floor >= self._rival(hi, pick), ceiling)

    def contested(self, lo: Tensor, hi: Tensor) -> Tensor:
        """Which inputs may be the maximum of a window that has no certain one: bool (N, C, H, W)."""
        r = self.relax(lo, hi)
        floor = self._pool(lo)
        padded, cuts, crop = self._slices(hi, r.pick)
        mark = torch.zeros_like(padded, dtype=torch.bool)
        for cut in cuts:
            mark[:, :, cut[0], cut[1]] |= (padded[:, :, cut[0], cut[1]] > floor) & ~r.exact
        return mark[:, :, crop[0], crop[1]]

    def _slices(self, value: Tensor, out: Tensor) -> tuple[Tensor, list[tuple[slice, slice]], tuple[slice, slice]]:
        """`value` padded with -inf, for each place in the window the slices that pick it, and the slices of the map."""
        height, width = value.shape[2:]
        rows, cols = out.shape[2:]
        # Enough padding on the far side for the windows that ceil_mode adds.
        reach = [
            (o - 1) * s + d * (k - 1) + 1 for o, s, d, k in zip((rows, cols), self.stride, self.dilation, self.kernel)
        ]
        far = [max(0, r - size - p) for r, size, p in zip(reach, (height, width), self.padding)]
        padded = F.pad(value, (self.padding[1], far[1], self.padding[0], far[0]), value=-torch.inf)
        cuts = []
        for i in range(self.kernel[0]):
            for j in range(self.kernel[1]):
                top, left = i * self.dilation[0], j * self.dilation[1]
                cuts.append(
                    (
                        slice(top, top + (rows - 1) * self.stride[0] + 1, self.stride[0]),
                        slice(left, left + (cols - 1) * self.stride[1] + 1, self.stride[1]),
                    )
                )
        top, left = self.padding
        return padded, cuts, (slice(top, top + height), slice(left, left + width))

    def _rival(self, hi: Tensor, pick: Tensor) -> Tensor:
        """The largest upper end in each window among inputs other than `pick`; -inf where there is none."""
        height, width = hi.shape[2:]
        padded, cuts, _ = self._slices(hi, pick)
        index = torch.arange(height * width, dtype=torch.float64, device=hi.device).reshape(1, 1, height, width)
        places, _, _ = self._slices(index, pick)
        rival = torch.full_like(pick, -torch.inf, dtype=hi.dtype)
        for cut in cuts:
            other = padded[:, :, cut[0], cut[1]].masked_fill(places[:, :, cut[0], cut[1]] == pick, -torch.inf)
            rival = torch.maximum(rival, other)
        return rival

    def backward(self, c: Coefficients, r: PoolRelaxation) -> tuple[Coefficients, Tensor]:
        """Functionals of the input, and constants, that bound those of the output from below."""
        c = c.dense()
        follow = (c.data > 0) | c.gather(r.exact)
        constant = c.replace(torch.where(follow, torch.zeros_like(c.data), c.data)).dot(r.ceiling)
        kept = torch.where(follow, c.data, torch.zeros_like(c.data))
        channels, height, width = self.input_shape
        index = c.gather(r.pick).expand(kept.shape).reshape(-1, channels, kept.shape[-2] * kept.shape[-1])
        flat = kept.reshape(-1, channels, index.shape[-1])
        back = torch.zeros(len(flat), channels, height * width, dtype=flat.dtype, device=flat.device)
        return c.like(back.scatter_add(2, index, flat).reshape(-1, channels, height, width)), constant
