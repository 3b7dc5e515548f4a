"""Drawing for the rendered scenes: soft-edged layers in linear light, value noise, colours, quasi-random parameters.

Everything is vectorised numpy over a picture (S, S) or a stack of pictures (B, S, S). Coordinates: x to the right, y
down, the picture spans [-1, 1] on both axes, pixel centres as in `grid`. Colours are linear RGB until `to_pixels`.
"""

from __future__ import annotations

import colorsys
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[Any]  # float32 throughout, which numpy's stubs lose at the first product
Colour = tuple[float, float, float]

OVERSAMPLING = 2
"""Pictures are drawn with this many samples a pixel side and averaged."""


def grid(size: int) -> tuple[Floats, Floats]:
    """Sample positions (x, y), each (S, S) with S = size * OVERSAMPLING, over [-1, 1]."""
    samples = size * OVERSAMPLING
    line = ((np.arange(samples, dtype=np.float32) + 0.5) / samples) * 2 - 1
    return np.broadcast_to(line[None, :], (samples, samples)), np.broadcast_to(line[:, None], (samples, samples))


def coverage(distance: npt.NDArray[Any], softness: float) -> Floats:
    """Opacity of a shape from its signed distance (negative inside): a smooth step of width `softness`."""
    t = np.clip(0.5 - distance / softness, 0, 1)
    return np.asarray(t * t * (3 - 2 * t), dtype=np.float32)


def over(picture: Floats, colour: Any, alpha: npt.NDArray[Any]) -> Floats:
    """`picture` (..., 3) with `colour` (3,) or (..., 3) laid over it at opacity `alpha` (...)."""
    a = np.asarray(alpha, dtype=np.float32)[..., None]
    return np.asarray(picture + (np.asarray(colour, dtype=np.float32) - picture) * a)


def bump(x: npt.NDArray[Any], y: npt.NDArray[Any], cx: Any, cy: Any, rx: Any, ry: Any) -> Floats:
    """A Gaussian hill of height 1 at (cx, cy) with radii (rx, ry)."""
    return np.asarray(np.exp(-(((x - cx) / rx) ** 2) - ((y - cy) / ry) ** 2), dtype=np.float32)


def ellipse(x: npt.NDArray[Any], y: npt.NDArray[Any], cx: Any, cy: Any, rx: Any, ry: Any, power: float = 2.0) -> Floats:
    """Approximate signed distance to a superellipse, exact in sign, with unit slope along its shorter axis."""
    radius = (np.abs((x - cx) / rx) ** power + np.abs((y - cy) / ry) ** power) ** (1 / power)
    return np.asarray((radius - 1) * np.minimum(rx, ry), dtype=np.float32)


def value_noise(rng: np.random.Generator, samples: int, cells: int, channels: int = 1) -> Floats:
    """Smooth noise (S, S, channels) in [0, 1] with `cells` cells a side: random values, bicubic-like interpolation."""
    lattice = rng.random((cells + 2, cells + 2, channels), dtype=np.float32)
    place = (np.arange(samples, dtype=np.float32) + 0.5) / samples * cells
    low = place.astype(np.int64)
    t = (place - low)[:, None, None]
    t = t * t * (3 - 2 * t)
    rows = lattice[low] * (1 - t) + lattice[low + 1] * t
    t = t[:, 0][None]
    return np.asarray(rows[:, low] * (1 - t) + rows[:, low + 1] * t)


def hsv(hue: float, saturation: float, value: float) -> Colour:
    """Linear RGB of a colour given as display (sRGB) hue, saturation and value in [0, 1]."""
    r, g, b = colorsys.hsv_to_rgb(hue % 1.0, saturation, value)
    return r**2.2, g**2.2, b**2.2


def light_colour(warmth: npt.NDArray[Any]) -> Floats:
    """Linear RGB (..., 3) of light from bluish (0) over neutral (0.5) to golden (1), at constant luminance.

    Red and blue are moved by a factor of 1.9 either way around neutral, green a little; the Rec. 709 luminance is 1.
    """
    s = 2 * np.asarray(warmth, dtype=np.float32)[..., None] - 1
    rgb = np.exp(s * np.log(np.array([1.9, 1.05, 1 / 1.9], dtype=np.float32)))
    return np.asarray(rgb / (rgb @ np.array([0.2126, 0.7152, 0.0722], dtype=np.float32))[..., None])


def to_pixels(picture: Floats) -> npt.NDArray[np.uint8]:
    """uint8 (B, H, W, 3) from linear light (B, S, S, 3): averaged over the samples, a soft shoulder, sRGB gamma."""
    b, samples, _, _ = picture.shape
    side = samples // OVERSAMPLING
    mean = picture.reshape(b, side, OVERSAMPLING, side, OVERSAMPLING, 3).mean((2, 4))
    # Exposed like film: linear up to about a half, then ever slower, so that highlights keep their colour.
    shown = np.maximum(mean, 0)
    shown = np.where(shown > 0.5, 0.5 + 0.5 * (1 - np.exp(-(shown - 0.5) / 0.5)), shown)
    return np.asarray(np.round(shown ** (1 / 2.2) * 255).clip(0, 255).astype(np.uint8))


def spread(number: int, dimensions: int, seed: int) -> npt.NDArray[np.float64]:
    """Point `number` of an additive recurrence in [0, 1)^dimensions: later points fall between earlier ones.

    Roberts' R-sequence (2018), shifted by `seed`: classes taken from it differ from each other more evenly than random
    ones do, for any number of classes.
    """
    phi = 2.0
    for _ in range(40):
        phi = (1 + phi) ** (1 / (dimensions + 1))
    steps = phi ** -np.arange(1, dimensions + 1)
    shift = np.random.default_rng(seed).random(dimensions)
    return np.asarray((shift + (number + 1) * steps) % 1.0)


def between(u: float, low: float, high: float) -> float:
    """`u` in [0, 1] mapped to [low, high]."""
    return float(low + (high - low) * u)
