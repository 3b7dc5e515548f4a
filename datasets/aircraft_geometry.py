"""Airliners as triangle meshes with 24 named keypoints.

Body frame: metres, right-handed, x to the nose, y to the left wing, z up; the origin lies on the fuselage axis halfway
between nose and tail. Every part is a closed (or inwardly open) surface whose triangles are ordered counter-clockwise
as seen from outside, so back faces can be culled.
"""

from __future__ import annotations

import difflib
import functools
import itertools
import math
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from datasets.aircraft_airframes import AIRFRAMES, Airframe, Engine

Floats = npt.NDArray[np.float64]

KEYPOINTS: tuple[str, ...] = (
    "nose",
    "cockpit_top",
    "fuselage_top",
    "fuselage_bottom",
    "tail_tip",
    "fin_root_front",
    "fin_tip_front",
    "fin_tip_rear",
    "wing_root_front_left",
    "wing_root_front_right",
    "wing_root_rear_left",
    "wing_root_rear_right",
    "wing_mid_rear_left",
    "wing_mid_rear_right",
    "wing_tip_left",
    "wing_tip_right",
    "stabiliser_root_front_left",
    "stabiliser_root_front_right",
    "stabiliser_tip_left",
    "stabiliser_tip_right",
    "engine_front_left",
    "engine_front_right",
    "engine_rear_left",
    "engine_rear_right",
)
"""Order of the keypoints. `engine_*` are the inboard engines where there are four, the wing engines where there are
three. Left and right are the aircraft's own (port and starboard), not the viewer's."""

MIRROR: tuple[int, ...] = tuple(
    KEYPOINTS.index(n.replace("left", "\0").replace("right", "left").replace("\0", "right")) for n in KEYPOINTS
)
"""Index of each keypoint's mirror image: keypoint k of an aircraft is keypoint MIRROR[k] of its reflection in y = 0."""

_SIDES = 12  # of a fuselage ring; a multiple of 4, so that the top and the bottom line are made of vertices
_ENGINE_SIDES = 8


class Part(IntEnum):
    """What a triangle belongs to; the livery is chosen by part."""

    FUSELAGE = 0
    WING_LEFT = 1
    WING_RIGHT = 2
    FIN = 3
    STABILISER = 4
    ENGINE = 5
    INTAKE = 6
    EXHAUST = 7
    PYLON = 8
    PROPELLER = 9
    GEAR = 10


@dataclass(frozen=True)
class Mesh:
    """`vertices` (V, 3) in the body frame, `faces` (F, 3) int32, `normals` (F, 3, 3) per corner and unit length,
    `parts` (F,) of `Part`, `keypoints` (24, 3), `ground` the z of the plane the wheels stand on.
    """

    vertices: Floats
    faces: npt.NDArray[np.int32]
    normals: Floats
    parts: npt.NDArray[np.uint8]
    keypoints: Floats
    ground: float

    def stretched(self, scale: tuple[float, float, float]) -> Mesh:
        """The same aircraft scaled along x, y and z (all > 0); normals follow by the inverse transpose."""
        s = np.asarray(scale, dtype=np.float64)
        if s.shape != (3,) or not (s > 0).all():
            raise ValueError(f"scale must be three positive numbers, got {scale!r}")
        normals = self.normals / s
        normals /= np.linalg.norm(normals, axis=-1, keepdims=True)
        return Mesh(self.vertices * s, self.faces, normals, self.parts, self.keypoints * s, self.ground * float(s[2]))


@functools.lru_cache(maxsize=2 * len(AIRFRAMES))
def build(name: str, gear: bool = False) -> Mesh:
    """The mesh of the named airframe, with the landing gear out when `gear`. Cached; do not write to its arrays.

    Raises `ValueError` for an unknown name.
    """
    if name not in AIRFRAMES:
        close = difflib.get_close_matches(name, AIRFRAMES, n=3) or sorted(AIRFRAMES)
        raise ValueError(f"unknown airframe {name!r}; did you mean {', '.join(close)}?")
    a = AIRFRAMES[name]
    parts = _Parts()
    _fuselage(a, parts)
    wing = _wing_sections(a)
    parts.add(Part.WING_LEFT, *_surface(wing, thick=2))
    parts.add(Part.WING_RIGHT, *_mirrored(*_surface(wing, thick=2)))
    fin = _fin_sections(a)
    parts.add(Part.FIN, *_surface(fin, thick=1))
    stabiliser = _stabiliser_sections(a)
    parts.add(Part.STABILISER, *_surface(stabiliser, thick=2))
    parts.add(Part.STABILISER, *_mirrored(*_surface(stabiliser, thick=2)))
    for engine in a.engines:
        _engine(a, engine, parts)
    if gear:
        _gear(a, parts)
    return parts.mesh(_keypoints(a, wing, fin, stabiliser), -a.gear_height)


class _Parts:
    """Collects surfaces and turns each outwards."""

    def __init__(self) -> None:
        self.vertices: list[Floats] = []
        self.faces: list[npt.NDArray[np.int32]] = []
        self.normals: list[Floats] = []
        self.parts: list[npt.NDArray[np.uint8]] = []

    def add(self, part: Part, vertices: Floats, faces: npt.NDArray[np.int32], *, smooth: bool = False) -> None:
        corners = (vertices - vertices.mean(0))[faces]
        volume = np.einsum("ij,ij->", corners[:, 0], np.cross(corners[:, 1], corners[:, 2]))
        self.oriented(part, vertices, faces[:, ::-1] if volume < 0 else faces, smooth=smooth)

    def oriented(self, part: Part, vertices: Floats, faces: npt.NDArray[np.int32], *, smooth: bool = False) -> None:
        corners = vertices[faces]
        cross = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
        keep = np.linalg.norm(cross, axis=1) > 1e-9  # rings of radius 0 leave empty triangles
        faces, cross = faces[keep], cross[keep]
        if smooth:
            at_vertex = np.zeros_like(vertices)
            np.add.at(at_vertex, faces, cross[:, None])
            normals = at_vertex[faces]
        else:
            normals = np.repeat(cross[:, None], 3, axis=1)
        normals = normals / np.maximum(np.linalg.norm(normals, axis=-1, keepdims=True), 1e-12)
        self.faces.append((faces + sum(len(v) for v in self.vertices)).astype(np.int32))
        self.vertices.append(vertices)
        self.normals.append(normals)
        self.parts.append(np.full(len(faces), part, dtype=np.uint8))

    def mesh(self, keypoints: Floats, ground: float) -> Mesh:
        return Mesh(
            np.concatenate(self.vertices),
            np.concatenate(self.faces),
            np.concatenate(self.normals),
            np.concatenate(self.parts),
            keypoints,
            ground,
        )


def _loft(rings: Floats) -> tuple[Floats, npt.NDArray[np.int32]]:
    """Skin over `rings` (S, P, 3): S closed polygons of P points each. The ends stay open."""
    s, p, _ = rings.shape
    i, j = np.meshgrid(np.arange(s - 1), np.arange(p), indexing="ij")
    a, b = i * p + j, i * p + (j + 1) % p
    quads = np.stack([a, b, b + p, a, b + p, a + p], axis=-1)
    return rings.reshape(-1, 3), quads.reshape(-1, 3).astype(np.int32)


def _fan(ring: Floats, *, forward: bool) -> tuple[Floats, npt.NDArray[np.int32]]:
    """A flat cap over `ring` (P, 3), facing +x when `forward`, else -x."""
    p = len(ring)
    j = np.arange(p)
    faces = np.stack([np.full(p, p), j, (j + 1) % p], axis=-1).astype(np.int32)
    vertices = np.concatenate([ring, ring.mean(0, keepdims=True)])
    c = vertices[faces[0]]
    if (np.cross(c[1] - c[0], c[2] - c[0])[0] > 0) != forward:
        faces = faces[:, ::-1]
    return vertices, faces


def _mirrored(vertices: Floats, faces: npt.NDArray[np.int32]) -> tuple[Floats, npt.NDArray[np.int32]]:
    return vertices * np.array([1.0, -1.0, 1.0]), faces[:, ::-1]


def _profile(a: Airframe, x: float) -> tuple[float, float, float]:
    """Half width, top and bottom (z) of the fuselage at `x`."""
    s = (a.length / 2 - x) / a.length
    nose = min(1.0, s * a.length / (3.3 * a.radius))  # the nose is 1.65 diameters long
    tail = max(0.0, (s - 0.66) / 0.34)
    full = math.sqrt(max(0.0, 1 - (1 - nose) ** 2.2)) * (1 - tail**1.7)
    width = a.radius * max(full, 0.10 if tail > 0 else 0.0)
    droop = -0.28 * a.radius * (1 - nose) ** 2
    upsweep = 0.45 * a.radius * tail**1.4  # the belly rises to the tail, the crown stays nearly level
    deck = a.upper_deck * a.radius * max(0.0, math.sin(math.pi * min(1.0, max(0.0, (s - 0.015) / 0.40)))) ** 0.6
    return width, droop + upsweep + width + deck * min(1.0, full), droop + upsweep - width


def _stations(a: Airframe) -> list[float]:
    nose = [0.0, 0.02, 0.07, 0.16, 0.30, 0.5, 0.75, 1.0]
    x = [a.length / 2 - t * 3.3 * a.radius for t in nose]
    cylinder = [0.30, 0.42, 0.54, 0.66, 0.74, 0.82, 0.90, 0.96, 1.0]
    x += [a.length / 2 - s * a.length for s in cylinder if s * a.length > 3.3 * a.radius]
    return x


def _fuselage(a: Airframe, parts: _Parts) -> None:
    angle = 2 * math.pi * np.arange(_SIDES) / _SIDES
    rings = []
    for x in _stations(a):
        width, top, bottom = _profile(a, x)
        middle = bottom + width  # the lower half stays round under an upper deck
        z = np.where(np.sin(angle) > 0, (top - middle) * np.sin(angle), width * np.sin(angle)) + middle
        rings.append(np.stack([np.full(_SIDES, x), width * np.cos(angle), z], axis=-1))
    skin = np.stack(rings)
    parts.add(Part.FUSELAGE, *_loft(skin), smooth=True)
    parts.oriented(Part.EXHAUST, *_fan(skin[-1], forward=False))


@dataclass(frozen=True)
class _Section:
    """A chord of a lifting surface: leading edge (3,), chord along -x and thickness, in metres."""

    edge: tuple[float, float, float]
    chord: float
    thickness: float

    @property
    def trailing(self) -> tuple[float, float, float]:
        return self.edge[0] - self.chord, self.edge[1], self.edge[2]


def _surface(sections: list[_Section], *, thick: int) -> tuple[Floats, npt.NDArray[np.int32]]:
    """A wing of six-point aerofoils lofted over `sections`, thick along axis `thick`, closed at the tip."""
    along = np.array([0.0, 0.12, 0.55, 1.0, 0.55, 0.12])
    across = np.array([0.0, 0.40, 0.42, 0.0, -0.42, -0.40])
    rings = []
    for section in sections:
        ring = np.tile(np.asarray(section.edge), (6, 1))
        ring[:, 0] -= along * section.chord
        ring[:, thick] += across * section.thickness
        rings.append(ring)
    vertices, faces = _loft(np.stack(rings))
    tip = (len(sections) - 1) * 6
    cap = np.array([[0, 1, 5], [1, 2, 4], [1, 4, 5], [2, 3, 4]], dtype=np.int32) + tip
    # Orientation of the cap follows the loft's last ring: an edge is walked in opposite directions by its two faces.
    quad = next(f for f in faces if {tip, tip + 1} <= set(f.tolist()))
    order = quad.tolist()
    if (order.index(tip) + 1) % 3 == order.index(tip + 1):
        cap = cap[:, ::-1]
    return vertices, np.concatenate([faces, cap])


def _wing_sections(a: Airframe) -> list[_Section]:
    sweep, dihedral = math.tan(math.radians(a.wing_sweep)), math.tan(math.radians(a.wing_dihedral))
    half = a.span / 2

    def at(y: float, chord: float, ratio: float) -> _Section:
        return _Section((a.wing_x - sweep * y, y, a.wing_z + dihedral * y), chord, ratio * chord)

    share, chord = a.wing_kink
    sections = [at(0.0, a.wing_root, 0.13), at(share * half, chord, 0.12), at(half, a.wing_tip, 0.11)]
    if a.winglet:
        x, y, z = sections[-1].edge
        top = (x - 0.9 * a.wing_tip, y + 0.25 * a.winglet, z + a.winglet)
        sections.append(_Section(top, 0.4 * a.wing_tip, 0.10 * a.wing_tip))
    return sections


def _fin_sections(a: Airframe) -> list[_Section]:
    _, top, _ = _profile(a, a.fin_x - a.fin_root / 2)
    sweep = math.tan(math.radians(a.fin_sweep))
    base = top - 0.35 * a.radius  # the root is sunk into the fuselage
    height = a.fin_height + 0.35 * a.radius
    root = _Section((a.fin_x + sweep * (a.fin_height - height), 0.0, base), a.fin_root, 0.11 * a.fin_root)
    tip = _Section((a.fin_x - sweep * a.fin_height, 0.0, base + height), a.fin_tip, 0.10 * a.fin_tip)
    return [root, tip]


def _stabiliser_sections(a: Airframe) -> list[_Section]:
    sweep, half = math.tan(math.radians(a.stabiliser_sweep)), a.stabiliser_span / 2
    x, z, rise = a.stabiliser_x, a.stabiliser_z, 0.10
    if a.t_tail:
        edge = _fin_sections(a)[-1].edge
        x, z, rise = edge[0] + a.stabiliser_x, edge[2] - 0.1, -0.02
    root = _Section((x, 0.0, z), a.stabiliser_root, 0.11 * a.stabiliser_root)
    tip = _Section((x - sweep * half, half, z + rise * half), a.stabiliser_tip, 0.10 * a.stabiliser_tip)
    return [root, tip]


def _engine(a: Airframe, e: Engine, parts: _Parts) -> None:
    stations, radii = [0.0, 0.12, 0.45, 0.78, 1.0], [0.88, 1.0, 1.0, 0.84, 0.52]
    if e.propeller:
        stations, radii = [0.0, 0.10, 0.30, 0.70, 1.0], [0.35, 0.75, 1.0, 0.95, 0.40]
    angle = 2 * math.pi * (np.arange(_ENGINE_SIDES) + 0.5) / _ENGINE_SIDES
    rings = np.stack(
        [
            np.stack([np.full_like(angle, e.x - s * e.length), r * np.cos(angle) + e.y, r * np.sin(angle) + e.z], -1)
            for s, r in zip(stations, e.radius * np.array(radii), strict=True)
        ]
    )
    pieces: list[tuple[Part, tuple[Floats, npt.NDArray[np.int32]], bool]] = [
        (Part.ENGINE, _loft(rings), True),
        (Part.INTAKE, _fan(rings[0], forward=True), False),
        (Part.EXHAUST, _fan(rings[-1], forward=False), False),
    ]
    pieces += [(Part.PROPELLER, blade, False) for blade in _blades(e)]
    pylon = _pylon(a, e)
    if pylon is not None:
        pieces.append((Part.PYLON, pylon, False))
    for part, (vertices, faces), smooth in pieces:
        for v, f in ((vertices, faces),) if e.y == 0 else ((vertices, faces), _mirrored(vertices, faces)):
            if part in (Part.INTAKE, Part.EXHAUST):
                parts.oriented(part, v, f, smooth=smooth)
            else:
                parts.add(part, v, f, smooth=smooth)


def _blades(e: Engine) -> list[tuple[Floats, npt.NDArray[np.int32]]]:
    """Six still propeller blades as flat boxes in the plane of the spinner."""
    if not e.propeller:
        return []
    blades = []
    for k in range(6):
        phi = math.pi * (k + 0.25) / 3
        out, side = np.array([0, math.cos(phi), math.sin(phi)]), np.array([0, -math.sin(phi), math.cos(phi)])
        hub = np.array([e.x + 0.05, e.y, e.z])
        depth = np.array([0.05, 0, 0])
        ring = [-0.10 * side - depth, 0.10 * side - depth, 0.10 * side + depth, -0.10 * side + depth]
        root = np.stack([hub + 0.2 * e.radius * out + c for c in ring])
        tip = np.stack([hub + e.propeller * out + c for c in ring])
        vertices, faces = _loft(np.stack([root, tip]))
        cap = np.array([[4, 5, 6], [4, 6, 7]], dtype=np.int32)
        blades.append((vertices, np.concatenate([faces, cap])))
    return blades


def _pylon(a: Airframe, e: Engine) -> tuple[Floats, npt.NDArray[np.int32]] | None:
    """What holds the engine: a vertical pylon under a wing, a stub at the rear fuselage, nothing on the centre line."""
    if e.y == 0 or e.propeller:
        return None
    if a.t_tail:
        chord = 0.6 * e.length
        sections = [_Section((e.x - 0.25 * e.length, y, e.z), chord, 0.35) for y in (0.5 * a.radius, e.y)]
        return _surface(sections, thick=2)
    sweep, dihedral = math.tan(math.radians(a.wing_sweep)), math.tan(math.radians(a.wing_dihedral))
    wing = (a.wing_x - sweep * e.y - 0.4, e.y, a.wing_z + dihedral * e.y)
    nacelle = (e.x - 0.25 * e.length, e.y, e.z + 0.5 * e.radius)
    sections = [_Section(nacelle, 0.7 * e.length, 0.3 * e.radius), _Section(wing, 0.5 * e.length, 0.3 * e.radius)]
    return _surface(sections, thick=1)


def _gear(a: Airframe, parts: _Parts) -> None:
    """Three legs, each a strut on a block of wheels."""
    track = 1.45 * a.radius if a.wing_z < 0 else 1.15 * a.radius
    main = a.wing_x - 0.75 * a.wing_root if a.wing_z < 0 else a.wing_x - 0.9 * a.wing_root
    for x, y in ((a.length / 2 - 3.0 * a.radius, 0.0), (main, track), (main, -track)):
        wheel, strut = 0.27 * a.radius, 0.09 * a.radius
        for half_x, half_y, low, high in ((1.3 * wheel, wheel, -a.gear_height, -a.gear_height + 2 * wheel),
                                          (strut, strut, -a.gear_height + wheel, -0.4 * a.radius)):  # fmt: skip
            square = np.array([[1, 1], [-1, 1], [-1, -1], [1, -1]], dtype=np.float64) * [half_x, half_y] + [x, y]
            rings = np.stack([np.column_stack([square, np.full(4, z)]) for z in (low, high)])
            vertices, faces = _loft(rings)
            caps = np.array([[4, 5, 6], [4, 6, 7], [2, 1, 0], [3, 2, 0]], dtype=np.int32)
            parts.add(Part.GEAR, vertices, np.concatenate([faces, caps]))


def _keypoints(a: Airframe, wing: list[_Section], fin: list[_Section], stabiliser: list[_Section]) -> Floats:
    nose_z = sum(_profile(a, a.length / 2)[1:]) / 2
    tail_z = sum(_profile(a, -a.length / 2)[1:]) / 2
    cockpit_x = a.length / 2 - 0.5 * 3.3 * a.radius
    middle_x = a.length / 2 - 0.42 * a.length
    # Where the surfaces come out of the fuselage.
    inside = _chord_at(wing, 0.93 * _half_width(a, a.wing_x - 0.5 * a.wing_root, a.wing_z))
    stem = 0.0 if a.t_tail else 0.9 * _half_width(a, a.stabiliser_x - 0.5 * a.stabiliser_root, a.stabiliser_z)
    stabiliser_root = _chord_at(stabiliser, max(stem, 0.08 * a.stabiliser_span))
    engine = next(e for e in a.engines if e.y > 0)
    central = {
        "nose": (a.length / 2, 0.0, nose_z),
        "cockpit_top": (cockpit_x, 0.0, _profile(a, cockpit_x)[1]),
        "fuselage_top": (middle_x, 0.0, _profile(a, middle_x)[1]),
        "fuselage_bottom": (middle_x, 0.0, _profile(a, middle_x)[2]),
        "tail_tip": (-a.length / 2, 0.0, tail_z),
        "fin_root_front": _fin_root_front(a, fin),
        "fin_tip_front": fin[1].edge,
        "fin_tip_rear": fin[1].trailing,
    }
    left = {
        "wing_root_front": inside.edge,
        "wing_root_rear": inside.trailing,
        "wing_mid_rear": _chord_at(wing, 0.5 * a.span / 2).trailing,
        "wing_tip": wing[2].edge,
        "stabiliser_root_front": stabiliser_root.edge,
        "stabiliser_tip": stabiliser[1].edge,
        "engine_front": (engine.x, engine.y, engine.z),
        "engine_rear": (engine.x - engine.length, engine.y, engine.z),
    }
    points = []
    for name in KEYPOINTS:
        stem_name, _, side = name.rpartition("_")
        if side in ("left", "right") and stem_name in left:
            x, y, z = left[stem_name]
            points.append((x, y if side == "left" else -y, z))
        else:
            points.append(central[name])
    return np.array(points, dtype=np.float64)


def _fin_root_front(a: Airframe, fin: list[_Section]) -> tuple[float, float, float]:
    """Where the leading edge of the fin comes out of the fuselage."""
    low, high = 0.0, 1.0  # along the edge: inside the fuselage, in the air
    root, tip = np.asarray(fin[0].edge), np.asarray(fin[1].edge)
    for _ in range(30):
        t = (low + high) / 2
        x, _, z = root + t * (tip - root)
        low, high = (t, high) if z < _profile(a, float(x))[1] else (low, t)
    x, _, z = root + high * (tip - root)
    return float(x), 0.0, float(z)


def _half_width(a: Airframe, x: float, z: float) -> float:
    """Half width of the fuselage at height `z`; 0 above or below it."""
    width, top, bottom = _profile(a, x)
    middle = bottom + width
    height = (top - middle) if z > middle else width
    return width * math.sqrt(max(0.0, 1 - ((z - middle) / height) ** 2))


def _chord_at(sections: list[_Section], y: float) -> _Section:
    """The section at span position `y`, interpolated between its neighbours."""
    for inner, outer in itertools.pairwise(sections):
        if y <= outer.edge[1]:
            t = (y - inner.edge[1]) / (outer.edge[1] - inner.edge[1])
            edge = tuple(float(p + t * (q - p)) for p, q in zip(inner.edge, outer.edge, strict=True))
            chord = inner.chord + t * (outer.chord - inner.chord)
            return _Section(
                (edge[0], edge[1], edge[2]), chord, inner.thickness + t * (outer.thickness - inner.thickness)
            )
    raise ValueError(f"no section at y = {y}: the surface ends at {sections[-1].edge[1]}")
