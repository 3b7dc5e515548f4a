"""From a `Scene` (plain numbers) to an image: camera, light, shadows, sky, ground, paint and sensor.

World frame: metres, right-handed, z up; the ground is z = 0 and the aircraft's origin is at (0, 0, altitude).
Camera frame: x right, y down, z forward, in a pinhole camera: u = fx X/Z + cx, v = fy Y/Z + cy, in pixels of the image
(pixel (i, j) covers [j, j+1) x [i, i+1)).

Light is computed in linear units: Lambert's law for the sun, where a shadow map says it is seen, plus a sky and ground
ambient term and a Blinn-Phong highlight. Exposure, a black level, gamma 2.2, sensor noise and rounding to 8 bits
follow; highlights and deep shadows clip at 255 and 0 as they do in a camera.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from datasets.aircraft_geometry import Mesh, Part, build
from datasets.aircraft_raster import Triangles, barycentric, front_facing, rasterise, unoccluded

Floats = npt.NDArray[np.float64]
Reals = npt.NDArray[np.floating[Any]]  # of float32 where there is one number or more for each sample
Colour = tuple[float, float, float]

SHADOW_SIZE = 112  # texels of the shadow map along each side
KEYPOINT_TOLERANCE = 0.012  # of the aircraft's length: a keypoint this far behind a surface still counts as on it
_NOISE = 64  # side of the periodic lattice of value noise

GROUNDS: tuple[str, ...] = ("grass", "fields", "desert", "sea", "snow", "apron", "clouds")


@dataclass(frozen=True)
class Livery:
    """Linear RGB colours of the paint. `scheme` 0: coloured fin, 1: stripe along the windows, 2: coloured tail third,
    3: coloured belly. The left wing tip is red and the right one green, as navigation lights are.
    """

    scheme: int
    body: Colour
    accent: Colour
    accent2: Colour
    wing: Colour
    engine: Colour


@dataclass(frozen=True)
class Scene:
    """Everything an image is a function of. Angles in radians, lengths in metres, colours linear RGB.

    `rotation` and `translation` are camera-from-world for a world centred on the aircraft (the ground is then at
    z = -altitude). `focal` is in image widths. Yaw turns the nose from +x towards +y, pitch
    turns it up, roll turns the right wing down.
    """

    airframe: str
    stretch: tuple[float, float, float]
    gear: bool
    setting: str
    yaw: float
    pitch: float
    roll: float
    altitude: float
    rotation: tuple[Colour, Colour, Colour]
    translation: tuple[float, float, float]
    focal: float
    sun: tuple[float, float, float]  # unit vector towards the sun
    sunlight: Colour
    ambient: Colour
    zenith: Colour
    horizon: Colour
    cloud_cover: float
    visibility: float  # metres to 1/e
    ground: str
    ground_colours: tuple[Colour, Colour]
    ground_scale: float
    runway: bool
    exposure: float
    black: float
    noise: float  # standard deviation of the sensor noise in units of 1/255
    livery: Livery
    texture_seed: int


@dataclass(frozen=True)
class Rendered:
    """`image` (H, W, 3) uint8, `keypoints` (24, 2) pixels, `visible` (24,) bool, `points` (24, 3) keypoints in metres
    in the body frame, `camera` (4,) fx, fy, cx, cy, `camera_from_body` and `world_from_body` (3, 4): rotation and
    translation [R | t]. The ground of the world is z = 0.
    """

    image: npt.NDArray[np.uint8]
    keypoints: Floats
    visible: npt.NDArray[np.bool_]
    points: Floats
    camera: Floats
    camera_from_body: Floats
    world_from_body: Floats


def attitude(yaw: float, pitch: float, roll: float) -> Floats:
    """World-from-body rotation (3, 3): roll about x, then pitch (nose up) about y, then yaw about z."""
    cy, sy, cp, sp, cr, sr = (f(v) for v in (yaw, pitch, roll) for f in (math.cos, math.sin))
    about_z = np.array([[cy, -sy, 0], [sy, cy, 0], [0, 0, 1]])
    about_y = np.array([[cp, 0, -sp], [0, 1, 0], [sp, 0, cp]])
    about_x = np.array([[1, 0, 0], [0, cr, -sr], [0, sr, cr]])
    return np.asarray(about_z @ about_y @ about_x)


def project(points: Floats, camera: Floats) -> Floats:
    """Pixels (..., 2) of points (..., 3) in the camera frame, with `camera` = fx, fy, cx, cy."""
    scaled = points[..., :2] / points[..., 2:]
    return np.asarray(scaled * camera[:2] + camera[2:])


def render(scene: Scene, image_size: int, supersampling: int = 2) -> Rendered:
    """The image of `scene` at `image_size` pixels a side, box-filtered from `supersampling`^2 samples a pixel."""
    mesh = build(scene.airframe, scene.gear).stretched(scene.stretch)
    body = attitude(scene.yaw, scene.pitch, scene.roll)
    turn, shift = np.asarray(scene.rotation), np.asarray(scene.translation)
    rng = np.random.default_rng(scene.texture_seed)
    lattice = rng.random((_NOISE, _NOISE), dtype=np.float32)

    n = image_size * supersampling
    fine = np.array([scene.focal * n, scene.focal * n, n / 2, n / 2])
    world = mesh.vertices @ body.T
    seen = world @ turn.T + shift
    triangles = front_facing(project(seen, fine), 1 / seen[:, 2], mesh.faces)
    owner, closeness = rasterise(triangles, n, n)

    side = (np.arange(n, dtype=np.float32) + 0.5 - n / 2) / (scene.focal * n)
    rays = np.stack([np.tile(side, n), np.repeat(side, n), np.ones(n * n, dtype=np.float32)], axis=-1)
    rays = rays @ turn.astype(np.float32)  # camera to world, unit depth
    eye = (-shift @ turn).astype(np.float32)

    shadow = _ShadowMap(scene, mesh, world)
    linear = np.empty((n * n, 3), dtype=np.float32)
    craft = owner >= 0
    below = (rays[:, 2] < -1e-4) & ~craft
    above = ~(craft | below)
    linear[above] = _sky(scene, rays[above], lattice)
    if below.any():
        linear[below] = _ground(scene, eye, rays[below], lattice, shadow, n)
    pixels = np.flatnonzero(craft)
    if len(pixels):
        linear[pixels] = _aircraft(scene, mesh, body, triangles, owner, closeness, pixels, rays, eye, shadow, n)
    image = _sensor(scene, linear, image_size, supersampling, rng)

    scale = 1 / supersampling
    camera_points = mesh.keypoints @ (turn @ body).T + shift
    length = np.ptp(mesh.vertices[:, 0])
    nearer = 1 / (camera_points[:, 2] - KEYPOINT_TOLERANCE * length)
    pixels_fine = project(camera_points, fine)
    return Rendered(
        image=image,
        keypoints=pixels_fine * scale,
        visible=unoccluded(triangles, pixels_fine, nearer),
        points=mesh.keypoints,
        camera=fine * scale,
        camera_from_body=np.column_stack([turn @ body, shift]),
        world_from_body=np.column_stack([body, [0.0, 0.0, scene.altitude]]),
    )


class _ShadowMap:
    """Depth of the aircraft seen from the sun; answers which points the sun reaches."""

    def __init__(self, scene: Scene, mesh: Mesh, world: Floats) -> None:
        forward = -np.asarray(scene.sun)
        right = np.cross(forward, [0.0, 0.0, 1.0])
        right /= np.linalg.norm(right)
        axes = np.stack([right, np.cross(forward, right), forward])
        view = world @ axes.T
        low, high = view[:, :2].min(0), view[:, :2].max(0)
        self.scale = (SHADOW_SIZE - 2) / float((high - low).max())
        self.low = (low - 1 / self.scale).astype(np.float32)
        self.axes = axes.astype(np.float32)
        triangles = front_facing((view[:, :2] - self.low) * self.scale, -view[:, 2], mesh.faces)
        depth = rasterise(triangles, SHADOW_SIZE, SHADOW_SIZE)[1].astype(np.float32)
        # A border of nothing, so that points outside the map may be looked up by clipping.
        depth = depth.reshape(SHADOW_SIZE, SHADOW_SIZE)
        depth[[0, -1]] = depth[:, [0, -1]] = -np.inf
        self.depth = depth.ravel()
        self.bias = 1.6 / self.scale

    def lit(self, points: Reals) -> Reals:
        """(n,) 1 where the sun reaches `points` (n, 3), 0 in shadow."""
        view = points @ self.axes.T
        texel = np.clip((view[:, :2] - self.low) * self.scale, 0, SHADOW_SIZE - 1).astype(np.int32)
        near = self.depth[texel[:, 1] * SHADOW_SIZE + texel[:, 0]]
        return (near <= self.bias - view[:, 2]).astype(np.float32)


def _noise(lattice: Reals, u: Reals, v: Reals) -> Reals:
    """Smooth value noise in [0, 1] with period `_NOISE`."""
    fu, fv = np.floor(u), np.floor(v)
    i, j = fu.astype(np.int32) & (_NOISE - 1), fv.astype(np.int32) & (_NOISE - 1)
    a, b = u - fu, v - fv
    a, b = a * a * (3 - 2 * a), b * b * (3 - 2 * b)
    flat = lattice.ravel()
    row, below = i * _NOISE, ((i + 1) & (_NOISE - 1)) * _NOISE
    right = (j + 1) & (_NOISE - 1)
    top = flat[row + j] * (1 - b) + flat[row + right] * b
    bottom = flat[below + j] * (1 - b) + flat[below + right] * b
    return np.asarray(top * (1 - a) + bottom * a)


def _mix(a: Colour | Reals, b: Colour | Reals, t: Reals) -> Reals:
    first, second = np.asarray(a, dtype=np.float32), np.asarray(b, dtype=np.float32)
    return first + (second - first) * t[:, None]


def _sky(scene: Scene, rays: Reals, lattice: Reals) -> Reals:
    """Gradient from the horizon to the zenith, a glow around the sun and a layer of clouds."""
    length = np.sqrt((rays * rays).sum(1))
    up = np.maximum(rays[:, 2] / length, 0)
    colour = _mix(scene.horizon, scene.zenith, np.sqrt(up))
    glow = np.maximum(rays @ np.asarray(scene.sun, dtype=np.float32) / length, 0) ** 24
    sunlight = np.asarray(scene.sunlight, dtype=np.float32)
    colour += 0.35 * glow[:, None] * sunlight
    if scene.cloud_cover > 0:
        # Where the ray meets a layer; the offset keeps the layer finite at the horizon.
        reach = 3.0 / (up + 0.25) / length
        u, v = rays[:, 0] * reach, rays[:, 1] * reach
        density = 0.6 * _noise(lattice, u, v) + 0.28 * _noise(lattice, 2.3 * u + 17, 2.3 * v)
        density += 0.12 * _noise(lattice, 5.1 * u, 5.1 * v + 9)
        edge = 0.72 - 0.5 * scene.cloud_cover
        cover = np.clip((density - edge) / 0.18, 0, 1) * np.clip(up * 8, 0, 1)
        white = 0.55 * sunlight + 0.9 * np.asarray(scene.ambient, dtype=np.float32)
        colour = _mix(colour, white * (0.75 + 0.25 * density)[:, None], 0.85 * cover)
    return colour


def _ground(scene: Scene, eye: Reals, rays: Reals, lattice: Reals, shadow: _ShadowMap, n: int) -> Reals:
    """The plane below: texture, runway or apron markings, the aircraft's shadow, and haze with distance."""
    reach = (-scene.altitude - eye[2]) / rays[:, 2]
    points = eye + reach[:, None] * rays
    distance = reach * np.sqrt((rays * rays).sum(1))
    # Metres of ground per sample: detail finer than this is faded out instead of aliasing.
    footprint = distance * distance / (scene.focal * n * (eye[2] + scene.altitude))
    x, y = points[:, 0], points[:, 1]
    albedo = _texture(scene, x, y, footprint, lattice)
    lit = shadow.lit(points)
    sun, up = np.asarray(scene.sunlight, dtype=np.float32), scene.sun[2]
    light = np.asarray(scene.ambient, dtype=np.float32) + (up * lit)[:, None] * sun
    colour = albedo * light
    if scene.ground == "sea":
        half = np.asarray(scene.sun, dtype=np.float32) - rays / np.sqrt((rays * rays).sum(1, keepdims=True))
        glint = np.maximum(half[:, 2] / np.sqrt((half * half).sum(1)), 0) ** 90
        colour += 0.8 * (glint * lit)[:, None] * sun
    haze = 1 - np.exp(-distance / scene.visibility)
    return _mix(colour, scene.horizon, haze)


def _texture(scene: Scene, x: Reals, y: Reals, footprint: Reals, lattice: Reals) -> Reals:
    """Albedo (n, 3) of the ground at (x, y)."""
    scale = scene.ground_scale
    low, high = scene.ground_colours
    fine, coarse = x / scale, y / scale
    fade = np.clip(1.4 - footprint / scale, 0, 1)
    detail = 0.5 + fade * (_noise(lattice, fine, coarse) - 0.5)
    broad = np.clip(1.4 - footprint / (5 * scale), 0, 1)
    wide = 0.5 + broad * (_noise(lattice, fine / 5 + 31, coarse / 5) - 0.5)
    if scene.ground == "fields":
        u, v = np.floor(fine / 3), np.floor(coarse / 4.5 + 0.3 * np.floor(fine / 3))
        patch = lattice[u.astype(np.int32) & (_NOISE - 1), v.astype(np.int32) & (_NOISE - 1)]
        wide = 0.5 + broad * (0.8 * (patch - 0.5) + 0.2 * (wide - 0.5))
        albedo = _mix(low, high, np.clip(wide + 0.25 * (detail - 0.5), 0, 1))
        albedo[:, 0] += 0.10 * broad * np.maximum(patch - 0.7, 0)  # ripe fields are redder
        return albedo
    albedo = _mix(low, high, np.clip(0.5 * wide + 0.5 * detail, 0, 1))
    cos, sin = math.cos(scene.yaw), math.sin(scene.yaw)
    along, across = cos * x + sin * y, cos * y - sin * x
    if scene.ground == "apron":
        joint = _line(along % 7.5 - 3.75, 0.15, footprint) + _line(across % 7.5 - 3.75, 0.15, footprint)
        albedo *= (1 - 0.25 * np.minimum(joint, 1))[:, None]
        return _mix(albedo, (0.75, 0.55, 0.05), _line(across, 0.25, footprint))
    if scene.runway:
        albedo = _mix(albedo, (0.07, 0.07, 0.075), _line(across, 23.0, footprint))
        paint = _line(np.abs(across) - 21.0, 0.5, footprint)
        dash = (
            np.clip(1.4 - footprint / 30, 0, 1) * (np.mod(along, 60.0) < 35) + np.clip(footprint / 30 - 0.4, 0, 1) * 0.6
        )
        return _mix(albedo, (0.8, 0.8, 0.8), np.minimum(paint + dash * _line(across, 0.6, footprint), 1))
    return albedo


def _line(offset: Reals, half_width: float, footprint: Reals) -> Reals:
    """Share of a sample of size `footprint` covered by a line of `half_width` around offset 0."""
    reach = 0.5 * footprint
    covered = np.minimum(offset + reach, half_width) - np.maximum(offset - reach, -half_width)
    return np.asarray(np.clip(covered / np.maximum(footprint, 1e-3), 0, 1))


def _aircraft(
    scene: Scene,
    mesh: Mesh,
    body: Floats,
    triangles: Triangles,
    owner: npt.NDArray[np.int32],
    closeness: Floats,
    pixels: npt.NDArray[np.int64],
    rays: Reals,
    eye: Reals,
    shadow: _ShadowMap,
    n: int,
) -> Reals:
    """Linear colour of the samples `pixels` that the aircraft covers."""
    tri = owner[pixels].astype(np.int64)
    depth = (1 / closeness[pixels]).astype(np.float32)
    ray = rays[pixels]
    points = eye + depth[:, None] * ray
    weights = barycentric(triangles, tri, pixels % n + 0.5, pixels // n + 0.5)
    face = triangles.index[tri]
    # Perspective-correct up to the common factor, which the normalisation removes.
    corner_closeness = np.einsum("tki,ti->tk", triangles.corners, triangles.plane[:, :2]) + triangles.plane[:, 2:]
    weights = (weights * corner_closeness[tri]).astype(np.float32)
    corner_normals = (mesh.normals @ body.T).astype(np.float32)
    normals = (weights[:, :, None] * corner_normals[face]).sum(1)
    normals /= np.sqrt((normals * normals).sum(1, keepdims=True))
    parts = mesh.parts[face]
    albedo, gloss = _paint(scene.livery, mesh, parts, points @ body.astype(np.float32))

    sun = np.asarray(scene.sun, dtype=np.float32)
    lambert = np.maximum(normals @ sun, 0)
    lit = lambert > 0
    lit[lit] = shadow.lit(points[lit]) > 0
    lambert *= lit
    half = sun - ray / np.sqrt((ray * ray).sum(1, keepdims=True))
    half /= np.sqrt((half * half).sum(1, keepdims=True))
    shine = gloss * lit * np.maximum((normals * half).sum(1), 0) ** 40
    ambient = np.asarray(scene.ambient, dtype=np.float32)
    bounce = np.asarray(scene.ground_colours, dtype=np.float32).mean(0)
    sunlight = np.asarray(scene.sunlight, dtype=np.float32)
    from_below = bounce * (ambient + 0.6 * sun[2] * sunlight)
    light = _mix(from_below, ambient, 0.5 + 0.5 * normals[:, 2]) + lambert[:, None] * sunlight
    return np.asarray(albedo * light + shine[:, None] * sunlight)


def _paint(livery: Livery, mesh: Mesh, parts: npt.NDArray[np.uint8], at: Reals) -> tuple[Reals, Reals]:
    """Albedo (n, 3) and strength of the highlight (n,) for body-frame points `at` on `parts`."""
    palette = np.zeros((len(Part), 3), dtype=np.float32)
    grey = np.asarray(livery.wing, dtype=np.float32)
    for part, colour in (
        (Part.FUSELAGE, livery.body),
        (Part.WING_LEFT, livery.wing),
        (Part.WING_RIGHT, livery.wing),
        (Part.FIN, livery.accent),
        (Part.STABILISER, livery.wing),
        (Part.ENGINE, livery.engine),
        (Part.INTAKE, (0.015, 0.015, 0.02)),
        (Part.EXHAUST, (0.04, 0.04, 0.04)),
        (Part.PYLON, livery.wing),
        (Part.PROPELLER, (0.05, 0.05, 0.05)),
        (Part.GEAR, (0.03, 0.03, 0.03)),
    ):
        palette[part] = colour
    albedo = palette[parts]
    gloss = np.where(parts == Part.FUSELAGE, 0.55, np.where(parts == Part.ENGINE, 0.45, 0.2)).astype(np.float32)
    x, y, z = at.T
    keypoints = mesh.keypoints
    nose, tail, top, bottom = keypoints[0, 0], keypoints[4, 0], keypoints[2, 2], keypoints[3, 2]
    radius = -bottom  # the lower half of the fuselage is round, whatever is on top
    accent, accent2 = np.asarray(livery.accent, np.float32), np.asarray(livery.accent2, np.float32)
    hull = parts == Part.FUSELAGE
    back = (nose - x) / (nose - tail)  # 0 at the nose, 1 at the tail
    if livery.scheme == 2:
        albedo[hull & (back - 0.05 * z / radius > 0.70)] = accent
    elif livery.scheme == 3:
        albedo[hull & (z < -0.25 * radius)] = accent2
    if livery.scheme == 1:
        albedo[hull & (np.abs(z - 0.02 * radius) < 0.22 * radius) & (back > 0.07)] = accent2
    else:
        albedo[hull & (z < -0.55 * radius) & (livery.scheme == 0)] = 0.6 * grey
    cabin = hull & (back > 0.12) & (back < 0.86)
    rows = [0.30 * radius] if top < 1.2 * radius else [0.30 * radius, 0.85 * radius]
    for k, row in enumerate(rows):
        window = cabin & (np.abs(z - row) < 0.10 * radius) & ((back < 0.36) | (k == 0))
        albedo[window] = 0.35 * albedo[window] + 0.01
    # The windscreen: a dark band round the nose below its crown.
    from_nose = (nose - x) / radius
    screen = hull & (from_nose > 0.55) & (from_nose < 1.35) & (z > 0.10 * radius) & (z < 0.62 * radius)
    albedo[screen] = (0.02, 0.025, 0.03)
    fin_tip, fin_root = keypoints[6, 2], keypoints[5, 2]
    up_fin = (z - fin_root) / (fin_tip - fin_root)
    albedo[(parts == Part.FIN) & (up_fin > 0.45) & (up_fin < 0.75)] = accent2
    out = np.abs(y) / keypoints[14, 1]
    albedo[(parts == Part.WING_LEFT) & (out > 0.90)] = (0.75, 0.03, 0.03)
    albedo[(parts == Part.WING_RIGHT) & (out > 0.90)] = (0.02, 0.50, 0.08)
    return albedo, gloss


def _sensor(
    scene: Scene, linear: Reals, image_size: int, supersampling: int, rng: np.random.Generator
) -> npt.NDArray[np.uint8]:
    """Box filter, exposure, black level, gamma, noise, clipping, 8 bits."""
    k = supersampling
    fine = linear.reshape(image_size, k, image_size, k, 3)
    mean = sum((fine[:, a, :, b] for a in range(k) for b in range(k)), np.zeros((), np.float32)) / (k * k)
    exposed = np.maximum(scene.exposure * mean - scene.black, 0)
    signal = 255 * exposed ** np.float32(1 / 2.2)
    signal += scene.noise * rng.standard_normal(signal.shape, dtype=np.float32)
    return np.clip(np.rint(signal), 0, 255).astype(np.uint8)
