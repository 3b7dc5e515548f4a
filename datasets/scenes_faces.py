"""Rendered faces: any number of identities, each with its own proportions, colours and hair, and a smile of any degree.

The head is a height field (skull, brow, nose, cheeks, lips, chin) that is shaded by one lamp and the room; eyes, brows,
mouth, hair and glasses are painted on it. A smile moves the corners of the mouth out and up, opens the lips over the
teeth, raises the cheeks, narrows the eyes and deepens the folds beside the nose; nothing else of a picture changes.

Attributes, both in [0, 1]:
    smile: from a closed, level mouth to a broad smile.
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
    bump,
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

ATTRIBUTES: dict[str, tuple[float, float]] = {"smile": (0.0, 0.5), "warmth": (0.15, 0.5)}
"""Name -> the range scenes are drawn from. An edit adds up to `1 - high` and so never leaves [0, 1]."""

_IDENTITY_SEED = 40
_BATCH = 8  # pictures worked on together: enough to hide numpy's overhead, few enough to stay in the processor's cache
_SKIN = ((0.085, 0.50, 0.33), (0.075, 0.54, 0.47), (0.07, 0.48, 0.63), (0.065, 0.42, 0.78), (0.055, 0.32, 0.89))
_HAIR = (
    (0.07, 0.45, 0.10),
    (0.06, 0.55, 0.22),
    (0.06, 0.62, 0.38),
    (0.10, 0.58, 0.68),
    (0.04, 0.72, 0.46),
    (0.1, 0.06, 0.62),
)
_IRIS = ((0.08, 0.65, 0.28), (0.09, 0.55, 0.42), (0.58, 0.50, 0.62), (0.36, 0.38, 0.48), (0.60, 0.18, 0.55))


@dataclass(frozen=True)
class Identity:
    """What makes a person: proportions in units of the head's height, colours in linear RGB."""

    width: float
    jaw: float
    chin: float
    skin: Colour
    eye_gap: float
    eye_size: float
    eye_height: float
    eye_tilt: float
    iris: Colour
    brow: float
    brow_arch: float
    brow_gap: float
    nose_width: float
    nose_length: float
    nose_height: float
    mouth_width: float
    mouth_height: float
    lip: float
    lip_red: float
    ears: float
    hair: Colour
    hairline: float
    hair_volume: float
    hair_length: float
    parting: float
    bald: bool
    beard: float
    glasses: int
    freckles: float


@dataclass(frozen=True)
class Face:
    """One photograph: who, everything about pose, lamp, clothes and room (`seed`), and the attributes."""

    identity: int
    seed: tuple[int, ...]
    smile: float
    warmth: float


def identity(number: int) -> Identity:
    """The person with this class number (0, 1, 2, ... without end); a fixed function of the number."""
    u = spread(number, 20, _IDENTITY_SEED)
    more = np.random.default_rng([_IDENTITY_SEED, number]).random(12)
    skin = _between(_SKIN, u[0])
    hair = _HAIR[int(u[1] * len(_HAIR))]
    return Identity(
        width=between(u[2], 0.66, 0.83),
        jaw=between(u[3], 0.06, 0.40),
        chin=between(more[0], 2.0, 2.9),
        skin=hsv(*skin),
        eye_gap=between(u[4], 0.28, 0.38),
        eye_size=between(u[5], 0.105, 0.155),
        eye_height=between(u[6], -0.16, -0.02),
        eye_tilt=between(more[1], -0.18, 0.22),
        iris=hsv(*_IRIS[int(u[7] * len(_IRIS))]),
        brow=between(u[8], 0.018, 0.055),
        brow_arch=between(u[9], 0.0, 0.07),
        brow_gap=between(more[2], 0.14, 0.22),
        nose_width=between(u[10], 0.10, 0.19),
        nose_length=between(u[11], 0.27, 0.40),
        nose_height=between(more[3], 0.13, 0.24),
        mouth_width=between(u[12], 0.19, 0.29),
        mouth_height=between(u[13], 0.49, 0.60),
        lip=between(u[14], 0.030, 0.072),
        lip_red=between(more[4], 0.15, 0.85),
        ears=between(more[5], 0.02, 0.09),
        hair=hsv(hair[0], hair[1], hair[2] * between(more[6], 0.8, 1.2)),
        hairline=between(u[15], -0.66, -0.42),
        hair_volume=between(u[16], 0.06, 0.26),
        hair_length=between(u[17], -0.35, 1.15),
        parting=between(more[7], -0.45, 0.45),
        bald=bool(u[18] > 0.93),
        beard=between(more[8], 0.35, 0.9) if u[19] > 0.74 else 0.0,
        glasses=1 + int(more[9] * 3) if more[10] > 0.80 else 0,
        freckles=between(more[11], 0.2, 0.5) if u[0] > 0.7 and more[11] > 0.6 else 0.0,
    )


def draw(rng: np.random.Generator, number: int) -> Face:
    """A random photograph of person `number`."""
    return Face(
        identity=number,
        seed=tuple(int(v) for v in rng.integers(2**32, size=2)),
        smile=float(rng.uniform(*ATTRIBUTES["smile"])),
        warmth=float(rng.uniform(*ATTRIBUTES["warmth"])),
    )


def render(face: Face, size: int, values: dict[str, npt.NDArray[Any]] | None = None) -> npt.NDArray[np.uint8]:
    """The face as uint8 (B, size, size, 3), for the attribute `values` (B,) each; its own where none are given."""
    values = values or {}
    given = {name: np.asarray(values.get(name, getattr(face, name)), dtype=np.float32) for name in ATTRIBUTES}
    smile, warmth = np.broadcast_arrays(*(np.atleast_1d(given[name]) for name in ("smile", "warmth")))
    shades = light_colour(warmth)[:, None, None, :]
    if (smile == smile[0]).all():  # one picture in several lights
        return to_pixels(_picture(face, size, smile[:1]) * shades)
    parts = range(0, len(smile), _BATCH)
    return np.concatenate(
        [to_pixels(_picture(face, size, smile[i : i + _BATCH]) * shades[i : i + _BATCH]) for i in parts]
    )


@dataclass(frozen=True)
class _Pose:
    """Where the head is and how it is turned; the lamp; drawn from the face's seed."""

    scale: float
    x: float
    y: float
    roll: float
    yaw: float
    pitch: float
    lamp: tuple[float, float, float]
    lamp_strength: float
    gaze: float
    brows: float


def _pose(rng: np.random.Generator) -> _Pose:
    azimuth, elevation = rng.uniform(-1.1, 1.1), rng.uniform(0.15, 0.9)
    return _Pose(
        scale=float(rng.uniform(0.60, 0.70)),
        x=float(rng.uniform(-0.07, 0.07)),
        y=float(rng.uniform(-0.04, 0.10)),
        roll=float(rng.normal(0, 0.05)),
        yaw=float(np.clip(rng.normal(0, 0.35), -0.8, 0.8)),
        pitch=float(np.clip(rng.normal(0, 0.25), -0.5, 0.5)),
        lamp=(
            math.sin(azimuth) * math.cos(elevation),
            -math.sin(elevation),
            math.cos(azimuth) * math.cos(elevation),
        ),
        lamp_strength=float(rng.uniform(0.95, 1.35)),
        gaze=float(rng.uniform(-0.25, 0.25)),
        brows=float(rng.normal(0, 0.012)),
    )


def _picture(face: Face, size: int, smile: npt.NDArray[Any]) -> Floats:
    """Linear light (B, S, S, 3) under neutral light for `smile` (B,)."""
    who = identity(face.identity)
    rng = np.random.default_rng(face.seed)
    pose = _pose(rng)
    gx, gy = grid(size)
    samples = gx.shape[0]
    soft = 3.0 / samples / pose.scale
    c, s = math.cos(pose.roll), math.sin(pose.roll)
    rx, ry = (gx - pose.x) / pose.scale, (gy - pose.y) / pose.scale
    x, y = (rx * c + ry * s)[None], (-rx * s + ry * c)[None]
    amount = smile.astype(np.float32)[:, None, None]
    strands = value_noise(rng, samples, 40)[..., 0] * 0.6 + value_noise(rng, samples, 14)[..., 0] * 0.4

    picture = _room(rng, samples)[None]
    hair_light = (0.55 + 0.75 * strands)[None]
    hair = np.asarray(who.hair, dtype=np.float32) * hair_light[..., None]
    picture = _behind(picture, who, x, y, soft, hair)
    picture = _body(rng, picture, who, x, y, soft, pose)

    # Turning the head moves what stands out from the skull further than its outline.
    fx, fy = x - 0.13 * pose.yaw * np.clip(1 - x**2, 0, 1), y - 0.10 * pose.pitch * np.clip(1 - y**2, 0, 1)
    outline = _outline(who, x, y)
    head = coverage(outline, 2 * soft)
    height = _height(who, fx, fy, x, y, amount)
    pitch_of = 2 / samples / pose.scale
    slope_y, slope_x = np.gradient(height, pitch_of, axis=(1, 2))
    normal = np.stack([-slope_x, -slope_y, np.ones_like(height)], -1)
    normal /= np.linalg.norm(normal, axis=-1, keepdims=True)
    skin = _skin(rng, who, fx, fy, amount, samples)
    lit = _shade(normal, pose)
    shaded = skin * lit[..., None]
    shaded = _features(shaded, who, pose, fx, fy, amount, soft, lit)
    picture = picture + (shaded - picture) * head[..., None]
    return _hair(picture, who, x, y, soft, hair, pose)


def _room(rng: np.random.Generator, samples: int) -> Floats:
    tone = np.array(hsv(rng.random(), rng.uniform(0.05, 0.45), rng.uniform(0.35, 0.8)), dtype=np.float32)
    other = np.array(hsv(rng.random(), rng.uniform(0.05, 0.4), rng.uniform(0.25, 0.7)), dtype=np.float32)
    noise = value_noise(rng, samples, 3)
    return np.asarray((tone + (other - tone) * noise) * 0.8)


def _outline(who: Identity, x: Floats, y: Floats) -> Floats:
    """Signed distance to the head's outline, whose width tapers towards the chin."""
    below = np.clip((y - 0.1) / 0.9, 0, 1)
    width = who.width * (1 - who.jaw * below**1.6)
    radius = (np.abs(x / width) ** 2.25 + np.abs(y) ** np.where(y > 0, who.chin, 2.1)) ** 0.47
    return np.asarray((radius - 1) * 0.6)


def _behind(picture: Floats, who: Identity, x: Floats, y: Floats, soft: float, hair: Floats) -> Floats:
    """Hair that hangs behind the head."""
    if who.bald:
        return picture
    wide = who.width + 0.55 * who.hair_volume + 0.05
    top = ellipse(x, y, 0, -0.12, wide, 1.0 + 0.6 * who.hair_volume)
    hanging = np.maximum(np.abs(x) - wide * (1 + 0.10 * np.clip(y, 0, 1)), np.maximum(-y - 0.1, y - who.hair_length))
    distance = np.minimum(np.where(y < max(who.hair_length, -0.1), top, 1), hanging if who.hair_length > 0 else 1)
    return over(picture, hair * 0.55, coverage(distance, 3 * soft))


def _body(
    rng: np.random.Generator, picture: Floats, who: Identity, x: Floats, y: Floats, soft: float, pose: _Pose
) -> Floats:
    skin = np.asarray(who.skin, dtype=np.float32)
    neck = np.maximum(np.abs(x) - who.width * (0.56 + 0.12 * np.clip(y - 1, 0, 1)), 0.4 - y)
    fall = np.clip((y - 0.75) / 0.6, 0.2, 0.75)[..., None] * (1 - 0.3 * np.clip(np.abs(x) / 0.5, 0, 1)[..., None])
    picture = over(picture, skin * fall * pose.lamp_strength, coverage(neck, 2 * soft))
    cloth = np.asarray(hsv(rng.random(), rng.uniform(0.1, 0.85), rng.uniform(0.15, 0.8)), dtype=np.float32)
    collar = 1.22 + 0.10 * rng.random() - 0.22 * np.clip(np.abs(x) / 0.45, 0, 1) ** 2
    shoulders = np.maximum(collar - y + 0.30 * np.clip(np.abs(x) - 0.55, 0, 9) ** 1.3, np.abs(x) - 1.6)
    fold = (0.75 + 0.2 * np.cos(5 * x + 2 * y))[..., None]
    picture = over(picture, cloth * fold * 0.8, coverage(shoulders, 2 * soft))
    for side in (-1, 1):
        ear = ellipse(x, y, side * (who.width + 0.35 * who.ears), 0.02, who.ears + 0.045, 0.19)
        tone = (0.62 + 0.25 * (1 - np.clip(-ear / 0.05, 0, 1)))[..., None]
        picture = over(picture, skin * tone, coverage(ear, 2 * soft))
    return picture


def _height(who: Identity, fx: Floats, fy: Floats, x: Floats, y: Floats, smile: Floats) -> Floats:
    """Height field (B, S, S) of the face, in units of the head's half height."""
    dome = 0.62 * np.sqrt(np.clip(1 - (x / (who.width * 1.05)) ** 2 - (y / 1.08) ** 2, 0.02, 1))
    eye = who.eye_height
    tip = eye + who.nose_length
    ridge = np.clip((fy - eye) / who.nose_length, 0, 1)
    bridge = who.nose_height * 0.75 * (0.25 + 0.75 * ridge) * np.exp(-((fx / (0.05 + 0.03 * ridge)) ** 2))
    bridge = bridge * coverage(np.maximum(fy - tip, eye - 0.05 - fy), 0.16)
    height = dome + bridge + who.nose_height * 0.55 * bump(fx, fy, 0, tip - 0.02, 0.075, 0.075)
    height = height + 0.05 * bump(fx, fy, 0, who.mouth_height + 0.27, 0.16, 0.12)
    height = height + 0.03 * bump(fx, fy, 0, who.mouth_height, who.mouth_width * 1.1, 0.14)
    for side in (-1, 1):
        height = height + 0.05 * bump(fx, fy, side * who.nose_width * 0.62, tip, 0.05, 0.045)
        height = height - 0.075 * bump(fx, fy, side * who.eye_gap, eye, 0.16, 0.085)
        height = height + 0.035 * bump(fx, fy, side * who.eye_gap, eye - who.brow_gap, 0.22, 0.06)
        cheek = 0.025 + 0.055 * smile
        height = height + cheek * bump(fx, fy, side * (who.eye_gap + 0.06), eye + 0.32 - 0.05 * smile, 0.17, 0.13)
    return np.asarray(height, dtype=np.float32)


def _shade(normal: Floats, pose: _Pose) -> Floats:
    facing = np.maximum(normal @ np.asarray(pose.lamp, dtype=np.float32), 0)
    fill = 0.26 + 0.16 * normal[..., 2] - 0.10 * normal[..., 1]
    return np.asarray(pose.lamp_strength * facing + fill)


def _skin(rng: np.random.Generator, who: Identity, fx: Floats, fy: Floats, smile: Floats, samples: int) -> Floats:
    base = np.asarray(who.skin, dtype=np.float32)
    red = base * np.array([1.0, 0.66, 0.60], dtype=np.float32)
    tone = 0.95 + 0.08 * value_noise(rng, samples, 24)[None, ..., 0]
    flush = np.zeros_like(fx + smile)
    for side in (-1, 1):
        flush = flush + (0.30 + 0.25 * smile) * bump(fx, fy, side * 0.40, who.eye_height + 0.34, 0.20, 0.16)
    flush = flush + 0.35 * bump(fx, fy, 0, who.eye_height + who.nose_length, 0.10, 0.09)
    skin = over(np.broadcast_to(base, (*flush.shape, 3)) * tone[..., None], red, np.clip(flush, 0, 0.7))
    if who.freckles:
        spots = np.clip(value_noise(rng, samples, 48)[None, ..., 0] * 4 - 2.7, 0, 1)
        near = bump(fx, fy, 0, who.eye_height + 0.25, 0.5, 0.2)
        skin = over(skin, base * np.array([0.6, 0.42, 0.35], dtype=np.float32), who.freckles * spots * near)
    if who.beard:
        lower = coverage(who.mouth_height - 0.19 + 0.16 * np.cos(4.2 * fx) - fy, 0.12)
        dense = 0.75 + 0.25 * value_noise(rng, samples, 50)[None, ..., 0]
        skin = over(skin, np.asarray(who.hair) * 0.8, who.beard * lower * dense + 0 * smile)
    return skin


def _features(
    shaded: Floats, who: Identity, pose: _Pose, fx: Floats, fy: Floats, smile: Floats, soft: float, lit: Floats
) -> Floats:
    """Folds, eyes, brows, nostrils, mouth and glasses."""
    ink = np.asarray(who.skin, dtype=np.float32) * np.array([0.30, 0.20, 0.18], dtype=np.float32)
    lip_y, lip_w = who.mouth_height - 0.02 * smile, who.mouth_width * (1 + 0.38 * smile)
    tip = who.eye_height + who.nose_length
    for side in (-1, 1):
        # From the wing of the nose to beside the corner of the mouth.
        t = np.clip((fy - tip + 0.02) / (lip_y - tip), 0, 1)
        fold = np.abs(fx - side * (who.nose_width * 0.85 + t * (lip_w + 0.07 - who.nose_width * 0.85)))
        along = coverage(np.maximum(tip - fy, fy - lip_y - 0.03), 0.10)
        shaded = over(shaded, ink, (0.07 + 0.36 * smile) * along * np.exp(-((fold / 0.030) ** 2)))
        nostril = ellipse(fx, fy, side * who.nose_width * 0.42, tip + 0.055, 0.038, 0.020)
        shaded = over(shaded, ink * 0.5, 0.85 * coverage(nostril, 2 * soft) + 0 * smile)
        shaded = _eye(shaded, who, pose, side, fx, fy, smile, soft, lit)
        shaded = _brow(shaded, who, pose, side, fx, fy, smile, soft)
    shaded = over(shaded, ink, 0.30 * bump(fx, fy, 0, tip + 0.085, who.nose_width * 0.7, 0.022) + 0 * smile)
    shaded = _mouth(shaded, who, fx, fy, smile, lip_y, lip_w, soft, lit)
    return _glasses(shaded, who, fx, fy, soft) if who.glasses else shaded


def _eye(
    shaded: Floats,
    who: Identity,
    pose: _Pose,
    side: int,
    fx: Floats,
    fy: Floats,
    smile: Floats,
    soft: float,
    lit: Floats,
) -> Floats:
    ex, ey = fx - side * who.eye_gap, fy - who.eye_height
    ey = ey + side * who.eye_tilt * ex * 0.6
    u = np.clip(ex / (who.eye_size * 1.12), -1, 1)
    opening = who.eye_size * 0.50 * (1 - u**2)
    upper, lower = -opening * (1 - 0.22 * smile), opening * (0.75 - 0.50 * smile)
    inside = np.maximum(np.maximum(upper - ey, ey - lower), np.abs(ex) - who.eye_size * 1.1)
    alpha = coverage(inside, 2 * soft)
    white = np.full(3, 0.80, dtype=np.float32) * np.clip(lit, 0.25, 1.0)[..., None]
    iris_x = pose.gaze * who.eye_size * 0.8
    iris = coverage(ellipse(ex, ey, iris_x, -0.008, who.eye_size * 0.50, who.eye_size * 0.50), 2 * soft)
    pupil = coverage(ellipse(ex, ey, iris_x, -0.008, who.eye_size * 0.22, who.eye_size * 0.22), 2 * soft)
    glint = coverage(ellipse(ex, ey, iris_x + 0.02, -0.03, 0.018, 0.018), 2 * soft)
    ball = over(white, who.iris, iris + 0 * smile)
    ball = over(ball, (0.01, 0.01, 0.01), pupil + 0 * smile)
    ball = over(ball, (1.0, 1.0, 1.0), 0.9 * glint + 0 * smile)
    ball = ball * (0.55 + 0.45 * np.clip((ey - upper) / 0.05, 0, 1))[..., None]
    shaded = over(shaded, ball, alpha)
    inner = np.abs(ex) < who.eye_size * 1.15
    lid = np.exp(-(((ey - upper) / 0.020) ** 2)) * inner
    crease = np.exp(-(((ey - upper + 0.055) / 0.018) ** 2)) * inner * (1 - u**2)
    bag = np.exp(-(((ey - lower - 0.03) / 0.022) ** 2)) * inner * (1 - u**2)
    dark = np.asarray(who.skin, dtype=np.float32) * np.array([0.32, 0.22, 0.2], dtype=np.float32)
    shaded = over(shaded, dark * 0.35, 0.85 * lid)
    shaded = over(shaded, dark, 0.40 * crease)
    return over(shaded, dark, (0.12 + 0.25 * smile) * bag)


def _brow(
    shaded: Floats, who: Identity, pose: _Pose, side: int, fx: Floats, fy: Floats, smile: Floats, soft: float
) -> Floats:
    bx = (fx * side - who.eye_gap) / (who.eye_size * 1.55)
    middle = who.eye_height - who.brow_gap - pose.brows - who.brow_arch * (1 - (bx - 0.25) ** 2)
    thick = who.brow * np.clip(1.15 - 0.45 * bx, 0.3, 1.3)
    distance = np.maximum(np.abs(fy - middle) - thick, (np.abs(bx) - 1) * who.eye_size)
    return over(shaded, np.asarray(who.hair) * 0.55, 0.85 * coverage(distance, 3 * soft) + 0 * smile)


def _mouth(
    shaded: Floats,
    who: Identity,
    fx: Floats,
    fy: Floats,
    smile: Floats,
    lip_y: Floats,
    lip_w: Floats,
    soft: float,
    lit: Floats,
) -> Floats:
    u = np.clip(fx / lip_w, -1, 1)
    lift = 0.115 * smile - 0.012
    seam = lip_y + 0.35 * lift - lift * u**2  # the line between the lips; corners up when smiling
    gap = 0.115 * np.clip(smile - 0.12, 0, 1) * (1 - u**2)
    upper_lip = who.lip * (1 - 0.30 * smile) * (1 - u**2) ** 0.7 * (1 - 0.22 * np.exp(-((fx / 0.035) ** 2)))
    lower_lip = who.lip * 1.35 * (1 - 0.25 * smile) * (1 - u**2) ** 0.6
    top, bottom = seam - 0.35 * gap, seam + 0.65 * gap
    side = (np.abs(fx) - lip_w) * 0.5
    lips = np.maximum(np.maximum(top - upper_lip - fy, fy - bottom - lower_lip), side)
    red = np.asarray(who.skin, dtype=np.float32) * (1 - who.lip_red) + np.float32(who.lip_red) * np.array(
        [0.50, 0.11, 0.11], dtype=np.float32
    ) * (0.5 + 0.6 * max(who.skin))
    red = red * np.array([0.95, 0.70, 0.70], dtype=np.float32)
    tone = np.where(fy > seam, 1.08 - 4 * np.clip(fy - bottom - 0.5 * lower_lip, 0, 1), 0.80)
    shaded = over(shaded, red * (tone * np.clip(lit, 0.3, 1.2))[..., None], coverage(lips, 2.5 * soft))
    mouth = np.maximum(np.maximum(top - fy, fy - bottom), side)
    opened = coverage(mouth, 2 * soft) * np.clip(gap / 0.02, 0, 1)
    shaded = over(shaded, (0.10, 0.02, 0.02), opened)
    teeth = np.maximum(mouth + 0.004, fy - top - 0.72 * gap)
    white = np.array([0.82, 0.79, 0.72], dtype=np.float32) * np.clip(lit, 0.3, 1.0)[..., None]
    shaded = over(shaded, white * (1 - 0.35 * u**2)[..., None], coverage(teeth, 2 * soft) * np.clip(gap / 0.02, 0, 1))
    line = np.exp(-(((fy - seam) / 0.012) ** 2)) * (np.abs(fx) < lip_w) * (1 - np.clip(gap / 0.02, 0, 1))
    shaded = over(shaded, (0.08, 0.02, 0.02), 0.75 * line)
    below = np.exp(-(((fy - bottom - lower_lip - 0.05) / 0.03) ** 2)) * np.clip(1 - 1.4 * u**2, 0, 1)
    shaded = over(shaded, np.asarray(who.skin, dtype=np.float32) * 0.35, 0.30 * below)
    corners = bump(np.abs(fx), fy, lip_w + 0.01, seam, 0.025, 0.03)
    return over(shaded, np.asarray(who.skin, dtype=np.float32) * 0.3, (0.2 + 0.35 * smile) * corners)


def _glasses(shaded: Floats, who: Identity, fx: Floats, fy: Floats, soft: float) -> Floats:
    power = (2.0, 4.0, 3.0)[who.glasses - 1]
    frame = ((0.02, 0.02, 0.02), (0.20, 0.07, 0.03), (0.45, 0.40, 0.30))[who.glasses - 1]
    for side in (-1, 1):
        rim = ellipse(fx, fy, side * who.eye_gap, who.eye_height + 0.02, 0.225, 0.175, power)
        shaded = over(shaded, frame, 0.95 * coverage(np.abs(rim) - 0.014, 2 * soft))
        shaded = over(shaded, (1.0, 1.0, 1.0), 0.05 * coverage(rim, 2 * soft))
        arm = np.maximum(np.abs(fy - who.eye_height + 0.02) - 0.014, who.eye_gap + 0.22 - side * fx)
        shaded = over(shaded, frame, 0.9 * coverage(arm, 2 * soft))
    bridge = np.maximum(np.abs(fy - who.eye_height) - 0.013, np.abs(fx) - who.eye_gap + 0.22)
    return over(shaded, frame, 0.95 * coverage(bridge, 2 * soft))


def _hair(picture: Floats, who: Identity, x: Floats, y: Floats, soft: float, hair: Floats, pose: _Pose) -> Floats:
    """Hair on top of the forehead and down the temples."""
    if who.bald:
        return picture
    shell = ellipse(x, y, 0, -0.10, who.width + 0.45 * who.hair_volume + 0.02, 0.98 + 0.6 * who.hair_volume)
    from_part = np.abs(x - who.parting * who.width)
    line = who.hairline + 0.30 * (np.abs(x) / who.width) ** 3.2 - 0.12 * np.exp(-((from_part / 0.22) ** 2))
    line = line + 0.06 * np.clip(from_part, 0, 1)
    temple = np.minimum(who.hair_length, 0.25) if who.hair_length < 0.25 else who.hair_length
    side = np.maximum(who.width * 0.93 - np.abs(x) + 0.07 * np.clip(y, 0, 1), y - temple)
    distance = np.maximum(shell, np.minimum(y - line, np.maximum(side, -0.2 - y)))
    gloss = 0.55 + 0.75 * np.exp(-(((y + 0.72 - 0.25 * x * pose.lamp[0]) / 0.16) ** 2)) * max(pose.lamp[2], 0.2)
    gloss = gloss * (1 - 0.35 * np.clip(np.abs(x) / who.width, 0, 1) ** 3) * (0.6 + 0.5 * pose.lamp_strength)
    shadow = coverage(distance - 0.02, 0.16)
    picture = picture * (1 - 0.35 * shadow * coverage(_outline(who, x, y), 2 * soft))[..., None]
    return over(picture, hair * gloss[..., None], coverage(distance, 3.5 * soft))


def _between(palette: tuple[Colour, ...], u: float) -> Colour:
    """The colour at `u` in [0, 1) along a palette, interpolated."""
    place = u * (len(palette) - 1)
    k = int(place)
    a, b, t = palette[k], palette[k + 1], place - k
    return a[0] + (b[0] - a[0]) * t, a[1] + (b[1] - a[1]) * t, a[2] + (b[2] - a[2]) * t
