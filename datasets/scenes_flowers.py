"""Rendered flowers: any number of species, photographed from above under a sun of known elevation and warmth.

A flower is drawn once into layers of albedo, normals, height and occlusion, which do not depend on the light, and is
then lit for as many values of the two attributes as are asked for. Cast shadows come from a horizon map along the sun's
azimuth: a point is in the light where the sun stands above everything between it and the sun.

Attributes, both in [0, 1]:
    sun: elevation of the sun, from 7 degrees (long shadows, little light) to 69 degrees (bright, short shadows).
    warmth: colour of all light, from bluish over neutral (0.5) to golden at one luminance.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from datasets.scenes_drawing import (
    Colour,
    Floats,
    between,
    coverage,
    ellipse,
    grid,
    hsv,
    light_colour,
    over,
    spread,
    to_pixels,
    value_noise,
)

ATTRIBUTES: dict[str, tuple[float, float]] = {"sun": (0.0, 0.5), "warmth": (0.15, 0.5)}
"""Name -> the range scenes are drawn from. An edit adds up to `1 - high` and so never leaves [0, 1]."""

_SPECIES_SEED = 20
_PETALS = (4, 5, 5, 6, 6, 7, 8, 10, 12, 15, 18)
_LOWEST, _HIGHEST = math.radians(7), math.radians(69)
_HORIZON_STEPS = 7


@dataclass(frozen=True)
class Species:
    """What all flowers of a class share. Lengths are in units of the flower's radius."""

    petals: int
    layers: int
    width: float
    peak: float
    tip: float
    cup: float
    gap: float
    inner: Colour
    outer: Colour
    throat: float
    stripes: float
    spots: float
    centre: float
    centre_colour: Colour
    rim_colour: Colour
    stamens: int
    leaf: float


@dataclass(frozen=True)
class Flower:
    """One photograph: a species, everything about the plant and the camera (`seed`), and the light.

    `azimuth` is where the sun stands, in radians in the picture's plane; `sun` and `warmth` are the attributes.
    """

    species: int
    seed: tuple[int, ...]
    azimuth: float
    sun: float
    warmth: float


def species(number: int) -> Species:
    """The species with this class number (0, 1, 2, ... without end); a fixed function of the number."""
    u = spread(number, 15, _SPECIES_SEED)
    tone = u[0]
    if u[1] < 0.16:  # white and cream
        outer = hsv(0.12 + 0.06 * tone, between(u[2], 0.0, 0.18), 0.93)
    else:  # from blue over violet, pink, red and orange to yellow: all hues but green
        outer = hsv(0.60 + 0.58 * tone, between(u[2], 0.55, 0.98), between(u[3], 0.72, 0.97))
    shift = (0.0, 0.0, 0.10, -0.10, 0.45)[int(u[4] * 5)]
    inner = hsv(0.60 + 0.58 * tone + shift, between(u[5], 0.25, 1.0), between(u[6], 0.55, 1.0))
    petals = _PETALS[int(u[7] * len(_PETALS))]
    centre_hue = (0.13, 0.15, 0.09, 0.04, 0.27, 0.80)[int(u[8] * 6)]
    return Species(
        petals=petals,
        layers=1 + int(u[9] * 3) if petals < 12 else 1 + int(u[9] * 2),
        width=float(np.clip(between(u[10], 0.75, 1.35) * 2.2 / petals, 0.15, 0.62)),
        peak=between(u[11], 0.8, 2.4),
        tip=between(u[12], -0.28, 0.30),
        cup=between((3 * u[9]) % 1.0, -0.35, 0.85),
        gap=between((5 * u[10]) % 1.0, 0.0, 0.12),
        inner=inner,
        outer=outer,
        throat=between(u[13], 0.12, 0.6),
        stripes=between((7 * u[11]) % 1.0, 0.0, 0.5) if u[5] > 0.5 else 0.0,
        spots=between((3 * u[12]) % 1.0, 0.2, 0.8) if u[6] > 0.72 else 0.0,
        centre=between(u[14], 0.10, 0.34),
        centre_colour=hsv(centre_hue, 0.85, between((3 * u[13]) % 1.0, 0.25, 0.95)),
        rim_colour=hsv(0.12, 0.9, between((5 * u[14]) % 1.0, 0.3, 0.95)),
        stamens=int(between((7 * u[8]) % 1.0, 0, 14)),
        leaf=between((9 * u[2]) % 1.0, 0.16, 0.5),
    )


def draw(rng: np.random.Generator, number: int) -> Flower:
    """A random photograph of species `number`."""
    return Flower(
        species=number,
        seed=tuple(int(v) for v in rng.integers(2**32, size=2)),
        azimuth=float(rng.uniform(-math.pi, math.pi)),
        sun=float(rng.uniform(*ATTRIBUTES["sun"])),
        warmth=float(rng.uniform(*ATTRIBUTES["warmth"])),
    )


def render(flower: Flower, size: int, values: dict[str, npt.NDArray[Any]] | None = None) -> npt.NDArray[np.uint8]:
    """The flower as uint8 (B, size, size, 3), for the attribute `values` (B,) each; its own where none are given."""
    values = values or {}
    given = {name: np.asarray(values.get(name, getattr(flower, name)), dtype=np.float32) for name in ATTRIBUTES}
    sun, warmth = np.broadcast_arrays(*(np.atleast_1d(given[name]) for name in ("sun", "warmth")))
    layers = _plant(flower, size)
    out = [_light(layers, sun[i : i + 16], warmth[i : i + 16], flower.azimuth) for i in range(0, len(sun), 16)]
    return np.concatenate(out)


@dataclass
class _Layers:
    """What the camera sees, (S, S) and (S, S, 3): drawn back to front by `lay`."""

    albedo: Floats
    normal: Floats
    height: Floats
    occlusion: Floats
    thin: Floats

    def lay(self, alpha: Floats, albedo: Any, normal: Floats, height: Any, thin: float, contact: Floats) -> None:
        """Put a surface on top; `contact` (S, S) is where it darkens what lies below it."""
        self.occlusion *= 1 - 0.45 * contact
        self.albedo = over(self.albedo, albedo, alpha)
        self.normal = over(self.normal, normal, alpha)
        self.height += (height - self.height) * alpha
        self.thin += (thin - self.thin) * alpha
        self.occlusion += (1 - self.occlusion) * alpha


def _plant(flower: Flower, size: int) -> _Layers:
    kind = species(flower.species)
    rng = np.random.default_rng(flower.seed)
    x, y = grid(size)
    samples = x.shape[0]
    layers = _ground(rng, samples)
    soft = 3.0 / samples
    radius = float(rng.uniform(0.62, 0.84))
    cx, cy = (float(v) for v in rng.uniform(-0.16, 0.16, 2))
    turn = float(rng.uniform(-math.pi, math.pi))
    # A camera not quite overhead: the flower's disc is seen foreshortened along one direction.
    lean, squash = float(rng.uniform(-math.pi, math.pi)), float(rng.uniform(0.78, 1.0))
    dx, dy = (x - cx) / radius, (y - cy) / radius
    along, across = dx * math.cos(lean) + dy * math.sin(lean), (-dx * math.sin(lean) + dy * math.cos(lean)) / squash
    green = rng.uniform(0.24, 0.36)
    for k in range(int(rng.integers(3, 7))):
        angle = turn + 2.4 * k + float(rng.normal(0, 0.3))
        leaf_colour = hsv(green + rng.normal(0, 0.015), rng.uniform(0.5, 0.8), rng.uniform(0.3, 0.55))
        dark = _scaled(leaf_colour, 0.7)
        length = float(rng.uniform(1.05, 1.5))
        shape = (kind.leaf * length, 0.9, 0.25)
        blade = _Blade(angle, length, *shape, 0.1, -0.35, leaf_colour, dark, 0.5, 0.35, 0.0)
        _petal(layers, blade, along, across, soft, 0.2)
    step = 2 * math.pi / kind.petals
    for layer in range(kind.layers):
        length = 1.0 - 0.24 * layer
        shade = 1.0 - 0.08 * layer
        for k in range(kind.petals):
            jitter = rng.normal(0, 1, 3)
            blade = _Blade(
                angle=turn + step * (k + 0.5 * layer) + 0.05 * float(jitter[0]),
                length=length * (1 + 0.04 * float(jitter[1])),
                width=kind.width * (1 + 0.05 * float(jitter[2])) * (1 - kind.gap) * length**0.5,
                peak=kind.peak,
                tip=kind.tip,
                cup=kind.cup + 0.25 * layer,
                curl=0.9,
                outer=_scaled(kind.outer, shade),
                inner=_scaled(kind.inner, shade),
                throat=kind.throat,
                stripes=kind.stripes,
                spots=kind.spots,
            )
            _petal(layers, blade, along, across, soft, 0.45 + 0.12 * layer)
    _centre(layers, kind, along, across, soft, turn)
    # Normals were made in the flower's own axes; turn them back into the picture's.
    n0, n1 = layers.normal[..., 0].copy(), layers.normal[..., 1].copy()
    layers.normal[..., 0] = n0 * math.cos(lean) - n1 * math.sin(lean)
    layers.normal[..., 1] = n0 * math.sin(lean) + n1 * math.cos(lean)
    layers.normal /= np.linalg.norm(layers.normal, axis=-1, keepdims=True)
    return layers


@dataclass(frozen=True)
class _Blade:
    """A petal or leaf: pointing at `angle`, widest where peak says, with a pointed (> 0) or notched (< 0) tip."""

    angle: float
    length: float
    width: float
    peak: float
    tip: float
    cup: float
    curl: float
    outer: Colour
    inner: Colour
    throat: float
    stripes: float
    spots: float


def _petal(layers: _Layers, blade: _Blade, x: Floats, y: Floats, soft: float, height: float) -> None:
    c, s = math.cos(blade.angle), math.sin(blade.angle)
    u, v = (x * c + y * s) / blade.length, (-x * s + y * c) / blade.width
    # Only the rectangle that the blade can touch is worked on.
    box = (np.abs(v) < 1.5) & (u > -0.1) & (u < 1.15)
    rows, columns = np.flatnonzero(box.any(1)), np.flatnonzero(box.any(0))
    if not len(rows) or not len(columns):
        return
    cut = (slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1))
    u, v = u[cut], v[cut]
    reach = 1 - np.maximum(-blade.tip, 0) * np.exp(-((v / 0.45) ** 2)) * 0.7
    t = np.clip(u / reach, 0, 1)
    blunt = 0.55 + max(blade.tip, 0.0) * 2.2
    profile = np.sin(math.pi * t**blade.peak).clip(0) ** blunt * (1 - 0.25 * max(blade.tip, 0.0)) + 0.06 * (1 - t)
    distance = np.maximum((np.abs(v) - profile) * blade.width, (np.abs(u - 0.5 * reach) - 0.5 * reach) * blade.length)
    alpha = coverage(distance, 2 * soft)
    contact = coverage(distance - 0.01, 0.14) * (t > 0.02)
    blend = np.clip((t - 0.75 * blade.throat) / 0.35, 0, 1)[..., None]
    colour = np.asarray(blade.inner, dtype=np.float32) * (1 - blend) + np.asarray(blade.outer, dtype=np.float32) * blend
    edge = np.abs(v) / (profile + 0.05)
    tone = 1 - 0.22 * np.clip(edge, 0, 1) ** 3 + 0.10 * (t - 0.5)
    tone = tone * (1 - blade.stripes * 0.5 * (1 + np.cos(9 * v / (0.3 + t))) * (1 - 0.6 * t))
    if blade.spots:
        dots = np.sin(17 * u + 3) * np.sin(11 * v + 6 * u)
        tone = tone * (1 - blade.spots * np.clip((dots - 0.45) * 4, 0, 1) * (t < 0.75))
    colour = colour * tone[..., None]
    rise = blade.cup * (1 - 1.3 * t)
    bend = 0.55 * v * blade.curl
    normal = np.stack([-rise * c + bend * -s, -rise * s + bend * c, np.ones_like(t)], -1)
    normal /= np.linalg.norm(normal, axis=-1, keepdims=True)
    level = height + 0.35 * max(blade.cup, -0.1) * t * (1 - 0.5 * t) - 0.05 * v**2
    part = _Layers(layers.albedo[cut], layers.normal[cut], layers.height[cut], layers.occlusion[cut], layers.thin[cut])
    part.lay(alpha, colour, normal.astype(np.float32), level, 1.0, contact)
    layers.albedo[cut], layers.normal[cut] = part.albedo, part.normal


def _centre(layers: _Layers, kind: Species, x: Floats, y: Floats, soft: float, turn: float) -> None:
    r = np.hypot(x, y)
    angle = np.arctan2(y, x) + turn
    dome = r / kind.centre
    alpha = coverage(r - kind.centre, 2 * soft)
    spiral = np.cos(8 * angle + 26 * np.sqrt(dome + 0.02)) * np.cos(13 * angle - 26 * np.sqrt(dome + 0.02))
    mix = np.clip((dome - 0.55) / 0.3, 0, 1)[..., None]
    colour = np.asarray(kind.centre_colour) * (1 - mix) + np.asarray(kind.rim_colour) * mix
    colour = colour * (0.8 + 0.3 * spiral)[..., None]
    normal = np.stack([0.8 * x / kind.centre, 0.8 * y / kind.centre, np.ones_like(r)], -1)
    normal /= np.linalg.norm(normal, axis=-1, keepdims=True)
    bulge = 0.75 + 0.14 * np.sqrt(np.clip(1 - dome**2, 0, 1))
    layers.lay(alpha, colour.astype(np.float32), normal.astype(np.float32), bulge, 0.1, coverage(r - kind.centre, 0.22))
    up = np.broadcast_to(np.array([0, 0, 1], dtype=np.float32), layers.normal.shape)
    for k in range(kind.stamens):
        a = 2.39996 * k + turn
        reach = kind.centre * (1.25 + 0.25 * (k % 3))
        spot = ellipse(x, y, reach * math.cos(a), reach * math.sin(a), 0.045, 0.045)
        layers.lay(coverage(spot, 2 * soft), kind.rim_colour, up, 0.9, 0.2, coverage(spot, 0.08))


def _ground(rng: np.random.Generator, samples: int) -> _Layers:
    """Soft, unsharp undergrowth."""
    hue = rng.uniform(0.20, 0.36)
    dark = np.array(hsv(hue, rng.uniform(0.4, 0.8), rng.uniform(0.12, 0.28)))
    light = np.array(hsv(hue + rng.normal(0, 0.05), rng.uniform(0.3, 0.7), rng.uniform(0.32, 0.62)))
    noise = 0.65 * value_noise(rng, samples, 4) + 0.35 * value_noise(rng, samples, 9)
    albedo = (dark + (light - dark) * np.clip(1.6 * noise - 0.3, 0, 1)).astype(np.float32)
    slope = value_noise(rng, samples, 6, 2) - 0.5
    normal = np.concatenate([0.9 * slope, np.ones_like(slope[..., :1])], -1)
    flat = np.zeros((samples, samples), dtype=np.float32)
    return _Layers(albedo, normal.astype(np.float32), 0.1 * noise[..., 0], flat + 0.9, flat.copy())


def _light(layers: _Layers, sun: npt.NDArray[Any], warmth: npt.NDArray[Any], azimuth: float) -> npt.NDArray[np.uint8]:
    """Light the layers: (B, H, W, 3) for `sun` and `warmth` (B,)."""
    elevation = _LOWEST + (_HIGHEST - _LOWEST) * sun.astype(np.float32)[:, None, None]
    c, s = np.cos(elevation), np.sin(elevation)
    lean = layers.normal[..., 0] * math.cos(azimuth) + layers.normal[..., 1] * math.sin(azimuth)
    facing = np.maximum(c * lean + s * layers.normal[..., 2], 0)
    through = np.maximum(-0.4 * c * lean + 0.25 * s, 0) * 0.5 * layers.thin  # light through petals from behind
    lit = np.clip(((s / c) - _horizon(layers.height, azimuth)) / 0.22 + 0.5, 0, 1)
    strength = 1.5 * np.exp(-0.16 / s)  # air mass dims a low sun
    sky = 0.16 + 0.30 * s
    energy = strength * (facing * lit + through) + sky * layers.occlusion * (0.55 + 0.45 * layers.normal[..., 2])
    colour = light_colour(warmth)[:, None, None, :]
    return to_pixels(energy[..., None] * colour * layers.albedo)


def _horizon(height: Floats, azimuth: float) -> Floats:
    """(S, S): tangent of the angle above which nothing stands between a point and the sun at `azimuth`."""
    samples = height.shape[0]
    best = np.full_like(height, -1.0)
    for k in range(1, _HORIZON_STEPS + 1):
        reach = 0.025 * k**1.5
        dx, dy = (round(reach * samples / 2 * f) for f in (math.cos(azimuth), math.sin(azimuth)))
        pad = max(abs(dx), abs(dy))
        wide = np.pad(height, pad, mode="edge")
        ahead = wide[pad + dy : pad + dy + samples, pad + dx : pad + dx + samples]
        best = np.maximum(best, 0.55 * (ahead - height) / reach)
    return best


def _scaled(colour: Colour, factor: float) -> Colour:
    return colour[0] * factor, colour[1] * factor, colour[2] * factor
