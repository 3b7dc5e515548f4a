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

import time
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from datasets.aircraft_airframes import AIRFRAMES
from datasets.aircraft_geometry import KEYPOINTS, build
from datasets.aircraft_render import GROUNDS, Rendered, Scene, render
from datasets.aircraft_sampling import SETTINGS, draw
from datasets.rendering import Progress, render_chunks, split_number, unknown

VERSION = 6
"""Goes up whenever a change to the renderer or to the sampling changes images; part of the meta data."""

SIZES: dict[str, dict[str, int]] = {
    "quick": {"train": 2000, "val": 300, "test": 154},
    "paper": {"train": 8000, "val": 800, "test": 154},
}

_CHUNK = 25  # images a worker renders between two reports


def sample_scene(seed: int, split: str, index: int) -> Scene:
    """The scene of image `index` of `split`: a pure function of its three arguments."""
    return draw(np.random.default_rng([seed, split_number(split), index]))


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
        raise ValueError(unknown("size", size, SIZES))
    split_number(split)
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
    counts = [last - first for _, _, first, last, _ in jobs]
    chunks = render_chunks(_render_chunk, jobs, counts, "aircraft", workers, progress)
    images, targets, extras = (
        np.concatenate([c.images for c in chunks]),
        np.concatenate([c.targets for c in chunks]),
        {k: np.concatenate([c.extras[k] for c in chunks]) for k in chunks[0].extras},
    )
    return {"images": images, "targets": targets, "extras": extras, "meta": _meta(split, size, seed, image_size)}


def throughput(n: int = 64, *, image_size: int = 64, seed: int = 0) -> float:
    """Images a second of processor time, that is for one core kept busy, over `n` images once the meshes are built.

    Processor time and not the clock on the wall, so that other programs on the machine do not count.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    for name in AIRFRAMES:
        build(name, True)
        build(name, False)
    begin = time.process_time()
    _render_chunk((seed, "train", 0, n, image_size))
    return n / (time.process_time() - begin)


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
