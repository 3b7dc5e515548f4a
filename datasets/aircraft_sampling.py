"""The distribution of the aircraft images: how a `Scene` is drawn at random."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from datasets.aircraft_geometry import build
from datasets.aircraft_render import Colour, Livery, Scene, attitude

SETTINGS: tuple[str, ...] = ("apron", "approach", "cruise")
_MARGIN = 0.03  # of the image width between the aircraft and the border

_FLEET: dict[str, float] = {
    "twin_narrow_body": 0.38,
    "twin_wide_body": 0.20,
    "four_engine": 0.12,
    "rear_engine_t_tail": 0.09,
    "turboprop_high_wing": 0.09,
    "trijet": 0.12,
}
"""Share of each airframe: mostly twins, as at an airport, and some of everything."""

_ELEVATION: dict[str, tuple[float, float]] = {"apron": (18, 34), "approach": (16, 34), "cruise": (5, 28)}
"""Degrees by which the camera stands above the aircraft. Mostly from above, where left and right are easily told apart;
close to level in part of the cruise images, which then show the horizon and the sky."""

_FOCAL = (2.0, 3.0)
"""Focal length over image width: a telephoto lens, as one would use from a tower or from another aircraft."""

_EXTENT, _PLACE = (0.55, 0.68), (0.35, 0.65)
"""The longer side of the aircraft's box over the image width, and how the free width is shared out between its two
sides: the crops of a detector, which finds the aircraft and centres it roughly."""


def draw(rng: np.random.Generator) -> Scene:
    """One scene: aircraft, attitude, camera, light, ground and livery."""
    frame = str(rng.choice(list(_FLEET), p=list(_FLEET.values())))
    stretch = _triple(rng.uniform(0.97, 1.03, 3))
    setting = str(rng.choice(SETTINGS, p=(0.3, 0.35, 0.35)))
    yaw = float(rng.uniform(-math.pi, math.pi))
    parked = setting == "apron"
    pitch = 0.0 if parked else math.radians(float(np.clip(rng.normal(2, 4), -8, 12)))
    roll = 0.0 if parked else math.radians(float(np.clip(rng.normal(0, 7), -18, 18)))
    gear = parked or (setting == "approach" and bool(rng.random() < 0.6))

    mesh = build(frame, gear).stretched(stretch)
    elevation = math.radians(float(rng.uniform(*_ELEVATION[setting])))
    rotation = _look(float(rng.uniform(-math.pi, math.pi)), elevation, math.radians(float(rng.normal(0, 2))))
    focal = float(rng.uniform(*_FOCAL))
    vertices = mesh.vertices @ attitude(yaw, pitch, roll).T @ rotation.T
    translation = _frame(rng, vertices, focal)

    # The camera must stay above the ground, and the ground is where the wheels are when parked.
    camera_height = float(-translation @ rotation[:, 2])  # relative to the aircraft
    if parked:
        altitude = -mesh.ground
    elif setting == "approach":
        altitude = max(1.6 * -mesh.ground, 3.0 - camera_height) + float(rng.uniform(0, 45))
    else:
        altitude = max(300.0, 50.0 - camera_height) + float(rng.gamma(2.0, 700.0))
    light = _light(rng)
    ground, colours, scale = _ground(rng, setting, altitude)
    return Scene(
        airframe=frame,
        stretch=stretch,
        gear=gear,
        setting=setting,
        yaw=yaw,
        pitch=pitch,
        roll=roll,
        altitude=altitude,
        rotation=(_triple(rotation[0]), _triple(rotation[1]), _triple(rotation[2])),
        translation=_triple(translation),
        focal=focal,
        sun=light.sun,
        sunlight=light.sunlight,
        ambient=light.ambient,
        zenith=light.zenith,
        horizon=light.horizon,
        cloud_cover=light.clouds,
        visibility=float(rng.uniform(8e3, 4e4) if setting == "cruise" else rng.uniform(1.5e3, 1e4)),
        ground=ground,
        ground_colours=colours,
        ground_scale=scale,
        runway=setting == "approach" and ground in ("grass", "desert", "snow") and bool(rng.random() < 0.6),
        exposure=float(np.clip(math.exp(rng.normal(0.05, 0.40)), 0.4, 2.2)),
        black=float(rng.uniform(0.0, 0.02)),
        noise=float(rng.uniform(0.3, 2.0)),
        livery=_livery(rng),
        texture_seed=int(rng.integers(2**32)),
    )


def _triple(values: Any) -> tuple[float, float, float]:
    a, b, c = (float(v) for v in values)
    return a, b, c


def _look(azimuth: float, elevation: float, tilt: float) -> npt.NDArray[np.float64]:
    """Camera-from-world rotation of a camera that looks at the origin from `azimuth`, `elevation`, tilted by `tilt`."""
    out = np.array(
        [math.cos(elevation) * math.cos(azimuth), math.cos(elevation) * math.sin(azimuth), math.sin(elevation)]
    )
    right = np.cross(-out, [0.0, 0.0, 1.0])
    right /= np.linalg.norm(right)
    down = np.cross(-out, right)
    c, s = math.cos(tilt), math.sin(tilt)
    return np.stack([c * right + s * down, c * down - s * right, -out])


def _frame(rng: np.random.Generator, vertices: npt.NDArray[np.float64], focal: float) -> npt.NDArray[np.float64]:
    """Translation that puts `vertices` (in camera axes) into the image: the longer side of their bounding box takes a
    random share of the width (`_EXTENT`), its place is random (`_PLACE`), and `_MARGIN` is left free all round.
    """
    extent = float(rng.uniform(*_EXTENT))
    place = rng.uniform(*_PLACE, 2)
    reach = float(np.abs(vertices).max())
    t = np.array([0.0, 0.0, 2.5 * reach * focal])
    for _ in range(12):
        seen = vertices + t
        uv = focal * seen[:, :2] / seen[:, 2:]
        low, high = uv.min(0), uv.max(0)
        t[2] = max(t[2] * float((high - low).max()) / extent, 1.3 * reach)
        free = 1 - 2 * _MARGIN - (high - low)
        want = -0.5 + _MARGIN + (high - low) / 2 + free * place
        t[:2] += (want - (low + high) / 2) * t[2] / focal
    return t


class _Light(NamedTuple):
    sun: Colour
    sunlight: Colour
    ambient: Colour
    zenith: Colour
    horizon: Colour
    clouds: float


def _light(rng: np.random.Generator) -> _Light:
    """Sun and sky: clear (55 % of the images), overcast (20 %) or dusk (25 %)."""
    kind = str(rng.choice(("clear", "overcast", "dusk"), p=(0.55, 0.2, 0.25)))
    elevation = math.radians(float(rng.uniform(6, 20) if kind == "dusk" else rng.uniform(18, 72)))
    azimuth = float(rng.uniform(-math.pi, math.pi))
    sun = (
        math.cos(elevation) * math.cos(azimuth),
        math.cos(elevation) * math.sin(azimuth),
        math.sin(elevation),
    )
    jitter = rng.uniform(0.85, 1.15, 3)
    if kind == "clear":
        values = ((1.0, 0.95, 0.86), (0.24, 0.28, 0.36), (0.08, 0.20, 0.52), (0.42, 0.56, 0.74))
    elif kind == "overcast":
        values = ((0.22, 0.22, 0.22), (0.50, 0.52, 0.55), (0.42, 0.45, 0.50), (0.60, 0.63, 0.66))
    else:
        values = ((0.66, 0.36, 0.18), (0.15, 0.15, 0.20), (0.06, 0.08, 0.19), (0.44, 0.27, 0.18))
    sunlight, ambient, zenith, horizon = (_triple(np.array(v) * jitter[k % 3]) for k, v in enumerate(values))
    clouds = float(rng.uniform(0.6, 1.0) if kind == "overcast" else max(0.0, rng.uniform(-0.3, 0.8)))
    return _Light(sun, sunlight, ambient, zenith, horizon, clouds)


_GROUND_COLOURS: dict[str, tuple[Colour, Colour]] = {
    "grass": ((0.05, 0.10, 0.025), (0.14, 0.19, 0.06)),
    "fields": ((0.06, 0.10, 0.03), (0.30, 0.25, 0.11)),
    "desert": ((0.34, 0.24, 0.14), (0.50, 0.38, 0.24)),
    "sea": ((0.010, 0.035, 0.06), (0.03, 0.08, 0.11)),
    "snow": ((0.62, 0.65, 0.70), (0.82, 0.84, 0.86)),
    "apron": ((0.16, 0.16, 0.155), (0.32, 0.31, 0.29)),
    "clouds": ((0.48, 0.50, 0.54), (0.90, 0.90, 0.90)),
}


def _ground(rng: np.random.Generator, setting: str, altitude: float) -> tuple[str, tuple[Colour, Colour], float]:
    """Kind of ground, its two colours and the size of its detail in metres."""
    kinds = {
        "apron": ("apron",),
        "approach": ("grass", "fields", "desert", "sea", "snow"),
        "cruise": ("fields", "desert", "sea", "snow", "clouds"),
    }[setting]
    kind = str(rng.choice(kinds))
    tint = rng.uniform(0.85, 1.15, 3) * rng.uniform(0.8, 1.2)
    low, high = (_triple(np.clip(np.array(c) * tint, 0, 0.95)) for c in _GROUND_COLOURS[kind])
    # Detail grows with altitude: a few metres next to the aircraft, fields and cloud tops from above.
    return kind, (low, high), float(rng.uniform(5, 14) + 0.12 * altitude)


_ACCENTS: tuple[Colour, ...] = (
    (0.02, 0.06, 0.36),
    (0.55, 0.02, 0.03),
    (0.01, 0.28, 0.24),
    (0.70, 0.32, 0.01),
    (0.22, 0.03, 0.30),
    (0.02, 0.30, 0.06),
    (0.05, 0.05, 0.06),
    (0.75, 0.60, 0.02),
    (0.02, 0.36, 0.62),
)


def _livery(rng: np.random.Generator) -> Livery:
    first, second = rng.choice(len(_ACCENTS), 2, replace=False)
    white = float(rng.uniform(0.62, 0.86))
    body = _triple(white * rng.uniform(0.95, 1.05, 3))
    if rng.random() < 0.12:  # bare metal or a dark hull, now and then
        body = _triple(np.full(3, rng.uniform(0.22, 0.42)))
    grey = float(rng.uniform(0.32, 0.55))
    engine = body if rng.random() < 0.5 else _ACCENTS[int(second)]
    return Livery(int(rng.integers(4)), body, _ACCENTS[int(first)], _ACCENTS[int(second)], _triple((grey,) * 3), engine)
