"""Keypoint heads: both give (N, 2K) coordinates x0, y0, x1, y1, ... in pixels of the input image."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class PixelScale(nn.Module):
    """Fixed affine map from a unit scale, 0 at the image centre and ±1 at its edges, to pixels: (N, D) to (N, D).

    Without it the last layer would have to travel half the image before anything is learned; with it an untrained net
    predicts the centre, and the layer before it works on the scale its initialisation was made for.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, image_size: int) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor([image_size / 2.0]))
        self.register_buffer("shift", torch.tensor([(image_size - 1) / 2.0]))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.shift


class DSNT(nn.Module):
    """Heat maps to coordinates by expectation (Nibali et al., "Numerical Coordinate Regression", 2018, eq. 3-5).

    (N, C, h, w) -> 1x1 convolution to K heat maps -> softmax over the h*w cells -> expected coordinate: (N, 2K).
    Every step is a convolution, a softmax or a product with the constant ``grid`` of shape (h*w, 2), so that a verifier
    needs no other operation.

    Differs from the paper in the grid: there a cell stands for its centre; here the outermost cells stand for the
    outermost pixels (0 and image_size - 1). On the small maps at the end of a classifier the centres would leave a wide
    border of the image that no heat map can point at. With one cell per pixel the two agree.

    Args:
        in_channels: C.
        keypoints: K.
        shape: (h, w) of the incoming feature map, at least (2, 2).
        image_size: side of the square input image in pixels.

    Raises:
        ValueError: the feature map has a single row or column, whose expectation is a constant.
    """

    grid: Tensor

    def __init__(self, in_channels: int, keypoints: int, shape: tuple[int, int], image_size: int) -> None:
        super().__init__()
        if min(shape) < 2:
            raise ValueError(
                f"a DSNT head needs a feature map of at least 2x2 cells, but the last one is {shape[0]}x{shape[1]} for "
                f"images of {image_size} px: use larger images or head='keypoints'"
            )
        self.heatmaps = nn.Conv2d(in_channels, keypoints, 1)
        start_at_centre(self.heatmaps)
        self.cells = nn.Flatten(2)
        self.softmax = nn.Softmax(dim=-1)
        self.register_buffer("grid", pixel_grid(shape, image_size))
        self.coordinates = nn.Flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        weights = self.softmax(self.cells(self.heatmaps(x)))
        return self.coordinates(torch.matmul(weights, self.grid))


def start_at_centre(layer: nn.Linear | nn.Conv2d) -> None:
    """Small weights and no bias: an untrained net predicts the image centre, give or take, whatever its features."""
    nn.init.normal_(layer.weight, std=0.01)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def pixel_grid(shape: tuple[int, int], image_size: int) -> Tensor:
    """(h*w, 2) pixel coordinates (x, y) of the cells of an (h, w) map in row-major order, corners on corners."""
    ys, xs = (torch.linspace(0, image_size - 1, n) for n in shape)
    y, x = torch.meshgrid(ys, xs, indexing="ij")
    return torch.stack([x.flatten(), y.flatten()], dim=1)
