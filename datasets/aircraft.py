"""Rendered airliners with 24 named keypoints: the localisation data set.

Six airframes under full yaw and moderate pitch and roll are seen by a pinhole camera from random directions, parked, on
approach or in cruise, by day, at dusk and under cloud. Everything random about image i of a split comes from
`numpy.random.default_rng([seed, split number, i])`, so an image does not depend on the number of workers or on how many
images are asked for, and the quick splits are the first images of the paper-sized ones.

Targets are pixel coordinates x0, y0, x1, y1, ... where pixel (row i, column j) covers [j, j+1) x [i, i+1): the centre
of the top left pixel is (0.5, 0.5). All keypoints lie inside the image, those hidden by the aircraft itself included;
`extras["visibility"]` tells which are seen.
"""

from __future__ import annotations

import difflib
import math
import multiprocessing
import os
import time
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from datasets.aircraft_geometry import AIRFRAMES, KEYPOINTS, build
from datasets.aircraft_render import GROUNDS, Colour, Livery, Rendered, Scene, attitude, render

VERSION = 1
"""Goes up whenever a change to the renderer or to the sampling changes images; part of the meta data."""

SPLITS: tuple[str, ...] = ("train", "val", "test")
SIZES: dict[str, dict[str, int]] = {
    "quick": {"train": 2000, "val": 300, "test": 154},
    "paper": {"train": 8000, "val": 800, "test": 154},
}
SETTINGS: tuple[str, ...] = ("apron", "approach", "cruise")

Progress = Callable[[int, int], None]
_CHUNK = 25  # images a worker renders between two reports
_MARGIN = 0.03  # of the image width between the aircraft and the border


def sample_scene(seed: int, split: str, index: int) -> Scene:
    """The scene of image `index` of `split`: a pure function of its three arguments."""
    return _draw(np.random.default_rng([seed, _split_number(split), index]))


def render_split(
    split: str,
    *,
    size: str = "quick",
    seed: int = 0,
    image_size: int = 64,
    workers: int | None = None,
    limit: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Render a whole split.

    Args:
        split: "train", "val" or "test".
        size: "quick" (2,000/300/154 images) or "paper" (8,000/800/154).
        seed: of the data set; each seed is another data set.
        image_size: pixels a side, at least 16.
        workers: processes (spawned); None means one for each usable core, 1 renders in this process.
        limit: render only the first `limit` images of the split.
        progress: called as `progress(done, total)` after every chunk, in this process.

    Returns:
        `images` uint8 (N, H, W, 3); `targets` float32 (N, 48) in pixels; `extras`, a dict of arrays with N rows:
        `visibility` uint8 (N, 24), `keypoints_3d` float32 (N, 24, 3) in metres in the body frame, `camera` float32
        (N, 4) = fx, fy, cx, cy in pixels, `pose` float32 (N, 3, 4) = camera-from-body [R | t], `world_pose` float32
        (N, 3, 4) = world-from-body, `attitude` float32 (N, 3) = yaw, pitch, roll in radians, `light` float32 (N, 10) =
        unit vector to the sun, linear RGB sunlight, linear RGB ambient, exposure, `airframe`, `setting` and `ground`
        uint8 (N,), indices into the lists of `meta`; `meta`, a JSON-able dict of names and conventions.

    Raises:
        ValueError: unknown split or size, or a number out of range.
        RuntimeError: a worker process died.
    """
    if size not in SIZES:
        raise ValueError(_unknown("size", size, SIZES))
    _split_number(split)
    if image_size < 16:
        raise ValueError(f"image_size must be at least 16 pixels, got {image_size}")
    if seed < 0:
        raise ValueError(f"seed must be a non-negative integer, got {seed}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")
    if workers is not None and workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    total = SIZES[size][split] if limit is None else min(limit, SIZES[size][split])
    starts = range(0, total, _CHUNK)
    jobs = [(seed, split, start, min(start + _CHUNK, total), image_size) for start in starts]
    workers = min(workers or _cores(), len(jobs))
    chunks = _render_here(jobs, total, progress) if workers == 1 else _render_apart(jobs, total, workers, progress)
    images, targets, extras = (
        np.concatenate([c.images for c in chunks]),
        np.concatenate([c.targets for c in chunks]),
        {k: np.concatenate([c.extras[k] for c in chunks]) for k in chunks[0].extras},
    )
    return {"images": images, "targets": targets, "extras": extras, "meta": _meta(split, size, seed, image_size)}


def throughput(n: int = 64, *, image_size: int = 64, seed: int = 0) -> float:
    """Images a second that one process renders, measured over `n` images after the meshes have been built."""
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    for name in AIRFRAMES:
        build(name, True)
        build(name, False)
    begin = time.perf_counter()
    _render_chunk((seed, "train", 0, n, image_size))
    return n / (time.perf_counter() - begin)


class _Chunk(NamedTuple):
    images: npt.NDArray[np.uint8]
    targets: npt.NDArray[np.float32]
    extras: dict[str, npt.NDArray[Any]]


_Job = tuple[int, str, int, int, int]  # seed, split, first image, one past the last, image size


def _render_chunk(job: _Job) -> _Chunk:
    seed, split, first, last, image_size = job
    scenes = [sample_scene(seed, split, i) for i in range(first, last)]
    drawn = [render(scene, image_size) for scene in scenes]
    return _Chunk(
        np.stack([d.image for d in drawn]),
        np.stack([d.keypoints.reshape(-1) for d in drawn]).astype(np.float32),
        _extras(scenes, drawn),
    )


def _extras(scenes: list[Scene], drawn: list[Rendered]) -> dict[str, npt.NDArray[Any]]:
    frames = list(AIRFRAMES)
    return {
        "visibility": np.stack([d.visible for d in drawn]).astype(np.uint8),
        "keypoints_3d": np.stack([d.points for d in drawn]).astype(np.float32),
        "camera": np.stack([d.camera for d in drawn]).astype(np.float32),
        "pose": np.stack([d.camera_from_body for d in drawn]).astype(np.float32),
        "world_pose": np.stack([d.world_from_body for d in drawn]).astype(np.float32),
        "attitude": np.array([(s.yaw, s.pitch, s.roll) for s in scenes], dtype=np.float32),
        "light": np.array([(*s.sun, *s.sunlight, *s.ambient, s.exposure) for s in scenes], dtype=np.float32),
        "airframe": np.array([frames.index(s.airframe) for s in scenes], dtype=np.uint8),
        "setting": np.array([SETTINGS.index(s.setting) for s in scenes], dtype=np.uint8),
        "ground": np.array([GROUNDS.index(s.ground) for s in scenes], dtype=np.uint8),
    }


def _render_here(jobs: list[_Job], total: int, progress: Progress | None) -> list[_Chunk]:
    chunks = []
    for job in jobs:
        chunks.append(_render_chunk(job))
        if progress is not None:
            progress(job[3], total)
    return chunks


def _render_apart(jobs: list[_Job], total: int, workers: int, progress: Progress | None) -> list[_Chunk]:
    # Spawned, not forked: the caller may hold CUDA or threads, which a fork would break.
    context = multiprocessing.get_context("spawn")
    done = 0
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        futures: dict[Future[_Chunk], int] = {pool.submit(_render_chunk, job): k for k, job in enumerate(jobs)}
        try:
            for future in as_completed(futures):
                future.result()
                start, stop = jobs[futures[future]][2:4]
                done += stop - start
                if progress is not None:
                    progress(done, total)
        except BrokenProcessPool as error:
            raise RuntimeError(
                "a process that renders the aircraft died. Expected: enough memory, and a main module that can be "
                "imported (in a script, work goes under `if __name__ == '__main__':`). Or render with workers=1."
            ) from error
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    ordered = sorted(futures, key=lambda f: futures[f])
    return [f.result() for f in ordered]


def _meta(split: str, size: str, seed: int, image_size: int) -> dict[str, Any]:
    return {
        "name": "aircraft",
        "version": VERSION,
        "split": split,
        "size": size,
        "seed": seed,
        "image_size": image_size,
        "keypoints": list(KEYPOINTS),
        "airframes": list(AIRFRAMES),
        "settings": list(SETTINGS),
        "grounds": list(GROUNDS),
        "coordinates": "targets are x0, y0, x1, y1, ... in pixels; pixel (row i, column j) covers [j, j+1) x [i, i+1)",
        "frames": "body: x nose, y left, z up; world: z up, ground at 0; camera: x right, y down, z forward; metres",
        "light": "sun direction (3), sunlight RGB (3), ambient RGB (3), exposure; linear",
        "random": "default_rng([seed, split number, image number]), splits numbered train 0, val 1, test 2",
    }


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _split_number(split: str) -> int:
    if split not in SPLITS:
        raise ValueError(_unknown("split", split, SPLITS))
    return SPLITS.index(split)


def _unknown(what: str, name: str, known: Any) -> str:
    close = difflib.get_close_matches(str(name), list(known), n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return f"unknown {what} {name!r}, expected one of {', '.join(known)}{hint}"


# --- what is drawn at random -----------------------------------------------------------------------------------------


_ELEVATION: dict[str, tuple[float, float]] = {"apron": (14, 48), "approach": (10, 48), "cruise": (-6, 34)}
"""Degrees by which the camera stands above the aircraft. Mostly from above, where left and right are easily told apart;
close to level in part of the cruise images, which then show the horizon and the sky."""


def _draw(rng: np.random.Generator) -> Scene:
    frame = str(rng.choice(list(AIRFRAMES)))
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
    focal = float(rng.uniform(1.3, 2.4))
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
    random 70 to 92 % of the width, its place is random, and `_MARGIN` is left free all round.
    """
    extent = float(rng.uniform(0.70, 0.92))
    place = rng.random(2)
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
    """Sun and sky by the time of day: clear (half of the images), overcast, dusk."""
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
