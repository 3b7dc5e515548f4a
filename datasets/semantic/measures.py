"""Attributes measured on pixels: independent of any generator, so that they can judge one.

Each takes images (B, 3, H, W) in [0, 1] and returns (B,).
"""

from __future__ import annotations

import difflib
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

Measure = Callable[[Tensor], Tensor]

_LUMA = (0.2126, 0.7152, 0.0722)


def brightness(images: Tensor) -> Tensor:
    """Mean luma (Rec. 709)."""
    return luma(images).mean((1, 2))


def warmth(images: Tensor) -> Tensor:
    """log2 of mean red over mean blue: 0 for grey, 1 where there is twice as much red as blue."""
    _check(images)
    mean = images.mean((2, 3))
    return torch.log2((mean[:, 0] + 0.02) / (mean[:, 2] + 0.02))


def contrast(images: Tensor) -> Tensor:
    """Standard deviation of the luma over its mean."""
    grey = luma(images)
    return grey.std((1, 2)) / (grey.mean((1, 2)) + 0.02)


def tint(images: Tensor) -> Tensor:
    """log2 of mean green over the geometric mean of red and blue: the colour axis across warmth."""
    _check(images)
    mean = images.mean((2, 3)) + 0.02
    return torch.log2(mean[:, 1] / (mean[:, 0] * mean[:, 2]).sqrt())


def sharpness(images: Tensor) -> Tensor:
    """Mean size of the luma's gradient over its standard deviation."""
    grey = luma(images)
    across, down = grey[:, :, 1:] - grey[:, :, :-1], grey[:, 1:] - grey[:, :-1]
    return (across.abs().mean((1, 2)) + down.abs().mean((1, 2))) / (grey.std((1, 2)) + 0.02)


MEASURES: dict[str, Measure] = {
    "brightness": brightness,
    "warmth": warmth,
    "contrast": contrast,
    "tint": tint,
    "sharpness": sharpness,
}


def measure(name: str) -> Measure:
    """The measure called `name`. Raises ValueError naming close matches."""
    if name not in MEASURES:
        close = difflib.get_close_matches(name, MEASURES, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"unknown measure {name!r}, expected one of {', '.join(MEASURES)}{hint}")
    return MEASURES[name]


def luma(images: Tensor) -> Tensor:
    """Rec. 709 luma (B, H, W)."""
    _check(images)
    return torch.einsum("c,bchw->bhw", images.new_tensor(_LUMA), images)


def structure(first: Tensor, second: Tensor) -> Tensor:
    """How far two images show the same thing, (B,) in [-1, 1]: correlation of their luma, locally normalised.

    Local mean and deviation (over 9 × 9 pixels) are taken out first, so that light, colour and contrast do not count
    and shapes do. 1 for equal shapes, about 0 for unrelated images.
    """
    a, b = (_normalised(luma(images)) for images in (first, second))
    a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
    return (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1)).clamp_min(1e-8)


def psnr(first: Tensor, second: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, (B,), of images in [0, 1]."""
    return -10 * torch.log10(((first - second) ** 2).mean((1, 2, 3)).clamp_min(1e-10))


def _normalised(grey: Tensor) -> Tensor:
    grey = grey[:, None]

    def smooth(t: Tensor) -> Tensor:
        return functional.avg_pool2d(functional.pad(t, (4, 4, 4, 4), mode="reflect"), 9, stride=1)

    mean = smooth(grey)
    spread = (smooth(grey**2) - mean**2).clamp_min(0).sqrt()
    # 0.03: two luma steps of 8 bits times four; flat regions stay flat instead of showing their noise.
    return ((grey - mean) / (spread + 0.03)).flatten(1)


def _check(images: Tensor) -> None:
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"attributes are measured on RGB images (B, 3, H, W), got {tuple(images.shape)}")
