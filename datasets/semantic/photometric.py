"""Photometric and geometric changes of the pixels as semantic transforms: exact, for any image, nothing to train.

Each is the identity at delta = 0 and changes an image by its stated amount at delta = 1; results are clipped to [0, 1].
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from datasets.semantic.transform import plain

_LUMINANCE = (0.299, 0.587, 0.114)  # Rec. 601, as in the YIQ rotation below


@dataclass(frozen=True)
class _Photometric:
    """Shared by all: the record, and the check that colour changes get colour images."""

    @property
    def name(self) -> str:
        return type(self).__name__.lower()

    def describe(self) -> dict[str, Any]:
        return plain({"kind": "photometric", "name": self.name, **asdict(self), "delta_1": self.whole})

    @property
    def whole(self) -> str:
        """What delta = 1 does, in words."""
        raise NotImplementedError

    def _check_colour(self, images: Tensor) -> None:
        if images.shape[1] != 3:
            raise ValueError(f"{self.name} changes colours and needs RGB images, got {images.shape[1]} channel(s)")


@dataclass(frozen=True)
class Brightness(_Photometric):
    """Adds `amount` (in [-1, 1]) to every pixel."""

    amount: float = 0.3

    def __post_init__(self) -> None:
        _check("amount", self.amount, -1, 1)

    @property
    def whole(self) -> str:
        return f"{self.amount:+g} on every pixel"

    def edit(self, images: Tensor, index: Tensor, delta: Tensor) -> Tensor:
        return (images + self.amount * _column(delta)).clamp(0, 1)


@dataclass(frozen=True)
class Contrast(_Photometric):
    """Scales the distance of every pixel from mid-grey by up to `factor` (> 0; below 1 flattens)."""

    factor: float = 1.6

    def __post_init__(self) -> None:
        _check("factor", self.factor, 1e-3, 100)

    @property
    def whole(self) -> str:
        return f"contrast times {self.factor:g} about mid-grey"

    def edit(self, images: Tensor, index: Tensor, delta: Tensor) -> Tensor:
        gain = 1 + (self.factor - 1) * _column(delta)
        return ((images - 0.5) * gain + 0.5).clamp(0, 1)


@dataclass(frozen=True)
class Hue(_Photometric):
    """Turns hues by up to `degrees`: a rotation of the chrominance plane of YIQ at constant luma."""

    degrees: float = 45.0

    def __post_init__(self) -> None:
        _check("degrees", self.degrees, -180, 180)

    @property
    def whole(self) -> str:
        return f"hues turned by {self.degrees:g} degrees"

    def edit(self, images: Tensor, index: Tensor, delta: Tensor) -> Tensor:
        self._check_colour(images)
        to_yiq = torch.tensor(
            [_LUMINANCE, (0.595716, -0.274453, -0.321263), (0.211456, -0.522591, 0.311135)],
            dtype=torch.float64,
        )
        y, i, q = torch.einsum("kc,bchw->kbhw", to_yiq.to(images), images)
        angle = (delta * math.radians(self.degrees))[:, None, None]
        c, s = angle.cos(), angle.sin()
        turned = torch.stack([y, c * i - s * q, s * i + c * q])
        out = torch.einsum("ck,kbhw->bchw", torch.linalg.inv(to_yiq).to(images), turned)
        return torch.where(_column(delta) == 0, images, out).clamp(0, 1)


@dataclass(frozen=True)
class Warmth(_Photometric):
    """Warmer light: red times up to `gain` and blue divided by it, luma kept as far as clipping allows (gain > 0)."""

    gain: float = 1.4

    def __post_init__(self) -> None:
        _check("gain", self.gain, 0.05, 20)

    @property
    def whole(self) -> str:
        return f"red light times {self.gain:g}, blue divided by it, at constant luma"

    def edit(self, images: Tensor, index: Tensor, delta: Tensor) -> Tensor:
        self._check_colour(images)
        gain = torch.as_tensor(self.gain, dtype=images.dtype, device=images.device) ** delta
        out = images * torch.stack([gain, torch.ones_like(gain), 1 / gain], 1)[:, :, None, None]
        weights = images.new_tensor(_LUMINANCE)[:, None, None]
        before, after = (images * weights).sum(1, keepdim=True), (out * weights).sum(1, keepdim=True)
        return (out * before / after.clamp_min(1e-6)).clamp(0, 1)


@dataclass(frozen=True)
class Rotation(_Photometric):
    """Turns the image about its centre by up to `degrees`, counter-clockwise; bilinear, the border is mirrored."""

    degrees: float = 20.0

    def __post_init__(self) -> None:
        _check("degrees", self.degrees, -180, 180)

    @property
    def whole(self) -> str:
        return f"a rotation by {self.degrees:g} degrees"

    def edit(self, images: Tensor, index: Tensor, delta: Tensor) -> Tensor:
        angle = delta * math.radians(self.degrees)
        c, s, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
        aspect = images.shape[2] / images.shape[3]  # affine_grid counts in half widths and half heights
        rows = torch.stack([torch.stack([c, -s * aspect, zero], 1), torch.stack([s / aspect, c, zero], 1)], 1)
        grid = functional.affine_grid(rows, list(images.shape), align_corners=False)
        out = functional.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
        return torch.where(_column(delta) == 0, images, out).clamp(0, 1)


@dataclass(frozen=True)
class Blur(_Photometric):
    """Gaussian blur with a standard deviation of up to `sigma` pixels; the border is mirrored."""

    sigma: float = 1.5

    def __post_init__(self) -> None:
        _check("sigma", self.sigma, 1e-3, 100)

    @property
    def whole(self) -> str:
        return f"a Gaussian blur of {self.sigma:g} pixels"

    def edit(self, images: Tensor, index: Tensor, delta: Tensor) -> Tensor:
        b, channels, height, width = images.shape
        reach = min(math.ceil(3 * self.sigma), height - 1, width - 1)
        offsets = torch.arange(-reach, reach + 1, dtype=images.dtype, device=images.device)
        sigma = (self.sigma * delta).clamp_min(1e-3)[:, None]  # at 1e-3 all weight is on the centre: the identity
        weights = torch.exp(-0.5 * (offsets / sigma) ** 2)
        weights = (weights / weights.sum(1, keepdim=True)).repeat_interleave(channels, 0)[:, None, None]
        wide = functional.pad(images, (reach,) * 4, mode="reflect").reshape(1, b * channels, *_grown(images, reach))
        across = functional.conv2d(wide, weights, groups=b * channels)
        down = functional.conv2d(across, weights.transpose(2, 3), groups=b * channels)
        return down.reshape(b, channels, height, width).clamp(0, 1)


def standard() -> tuple[Brightness, Contrast, Hue, Warmth, Rotation, Blur]:
    """One of each, at its default amount."""
    return Brightness(), Contrast(), Hue(), Warmth(), Rotation(), Blur()


def _grown(images: Tensor, reach: int) -> tuple[int, int]:
    return images.shape[2] + 2 * reach, images.shape[3] + 2 * reach


def _column(delta: Tensor) -> Tensor:
    return delta[:, None, None, None]


def _check(what: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ValueError(f"{what} must lie in [{low:g}, {high:g}], got {value}")
