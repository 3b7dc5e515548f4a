"""Rendered scenes with known factors: flowers under a sun of known elevation, faces with a known smile.

Everything random about image i of a split comes from `numpy.random.default_rng([seed, split number, i])`, so an image
does not depend on the number of workers or on how many are asked for. Image i shows class i mod the number of classes.
The same scene can be rendered again with another value of an attribute and nothing else changed: an exact semantic
edit (`datasets.semantic.SceneEdit`), which no generative model can give.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from datasets import scenes_faces, scenes_flowers
from datasets.rendering import Progress, render_chunks, split_number, unknown

VERSION = 1
"""Goes up whenever a change to a renderer or to the sampling changes images; part of the meta data."""

SIZE_RANGE = (16, 512)
_CHUNK = 20  # images a worker renders between two reports

Scene = scenes_flowers.Flower | scenes_faces.Face
Values = Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Family:
    """One kind of scene.

    Args:
        name: "flowers" or "faces".
        noun: what a class is called.
        attributes: name -> the range scenes are drawn from, inside [0, 1], the range that can be rendered.
        draw: (generator, class) -> scene.
        render: (scene, size, values) -> uint8 (B, size, size, 3), one picture for each row of the attribute values.
        counts: variant -> (classes, {split: images}).
    """

    name: str
    noun: str
    attributes: Mapping[str, tuple[float, float]]
    draw: Callable[[np.random.Generator, int], Scene]
    render: Callable[[Any, int, dict[str, npt.NDArray[Any]] | None], npt.NDArray[np.uint8]]
    counts: Mapping[str, tuple[int, Mapping[str, int]]]

    def sample(self, seed: int, split: str, index: int, classes: int) -> Scene:
        """The scene of image `index` of `split`: a pure function of its arguments."""
        return self.draw(np.random.default_rng([seed, split_number(split), index]), index % classes)

    def edit(self, scene: Scene, size: int, values: Values) -> npt.NDArray[np.uint8]:
        """The scene again, uint8 (B, size, size, 3), with attributes set to `values` (B,) and all else as it was.

        Raises ValueError for an unknown attribute or a value outside [0, 1].
        """
        for name, value in values.items():
            self.check_attribute(name)
            if not (np.isfinite(value).all() and np.min(value) >= 0 and np.max(value) <= 1):
                raise ValueError(
                    f"{self.name}: {name} must lie in [0, 1], got [{np.min(value):.4g}, {np.max(value):.4g}]"
                )
        return self.render(scene, size, dict(values))

    def check_attribute(self, name: str) -> None:
        """Raise ValueError naming close matches unless `name` is an attribute of this family."""
        if name not in self.attributes:
            raise ValueError(unknown(f"attribute of {self.name}", name, self.attributes))


FAMILIES: dict[str, Family] = {
    "flowers": Family(
        "flowers",
        "species",
        scenes_flowers.ATTRIBUTES,
        scenes_flowers.draw,
        scenes_flowers.render,
        {
            "quick": (20, {"train": 1000, "val": 200, "test": 200}),
            "full": (102, {"train": 6552, "val": 818, "test": 819}),
        },
    ),
    "faces": Family(
        "faces",
        "identity",
        scenes_faces.ATTRIBUTES,
        scenes_faces.draw,
        scenes_faces.render,
        {
            "quick": (20, {"train": 1000, "val": 200, "test": 200}),
            "full": (307, {"train": 4263, "val": 614, "test": 1215}),
        },
    ),
}


def family(name: str) -> Family:
    """The family called `name`. Raises ValueError naming close matches."""
    if name not in FAMILIES:
        raise ValueError(unknown("family of scenes", name, FAMILIES))
    return FAMILIES[name]


def render_split(
    kind: str,
    split: str,
    *,
    variant: str = "quick",
    classes: int | None = None,
    seed: int = 0,
    image_size: int = 64,
    workers: int | None = None,
    limit: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Render a split.

    Args:
        kind: "flowers" or "faces".
        split: "train", "val" or "test".
        variant: "quick" (20 classes, 1,000/200/200 images) or "full" (as many classes and images as the real sets the
            families stand in for: 102 and 6,552/818/819, 307 and 4,263/614/1,215).
        classes: another number of classes, at least 2, without upper end.
        seed: of the data set; each seed is another data set of the same classes.
        image_size: pixels a side, 16 to 512.
        workers: processes (spawned); None means one for each usable core, 1 renders in this process.
        limit: render only the first `limit` images of the split.
        progress: called as `progress(done, total)` after every chunk, in this process.

    Returns:
        `images` uint8 (N, H, W, 3); `targets` int64 (N,); `extras`: `attributes` float32 (N, A) in the order of
        `meta["attributes"]` and `index` int64 (N,), the image's number in the split; `meta`, a JSON-able dict.

    Raises:
        ValueError: unknown kind, split or variant, or a number out of range.
        RuntimeError: a worker process died.
    """
    what = family(kind)
    split_number(split)
    if variant not in what.counts:
        raise ValueError(unknown("variant", variant, what.counts))
    if not SIZE_RANGE[0] <= image_size <= SIZE_RANGE[1]:
        raise ValueError(f"image_size must be {SIZE_RANGE[0]} to {SIZE_RANGE[1]} pixels, got {image_size}")
    for name, number, least in (
        ("seed", seed, 0),
        ("limit", limit, 1),
        ("workers", workers, 1),
        ("classes", classes, 2),
    ):
        if number is not None and number < least:
            raise ValueError(f"{name} must be at least {least}, got {number}")
    known, counts = what.counts[variant]
    classes = classes or known
    total = counts[split] if limit is None else min(limit, counts[split])
    jobs = [(kind, split, i, min(i + _CHUNK, total), image_size, seed, classes) for i in range(0, total, _CHUNK)]
    sizes = [job[3] - job[2] for job in jobs]
    images = np.concatenate(render_chunks(_render_chunk, jobs, sizes, "scenes", workers, progress))
    shown = [what.sample(seed, split, i, classes) for i in range(total)]
    return {
        "images": images,
        "targets": np.arange(total, dtype=np.int64) % classes,
        "extras": {
            "attributes": np.array([[getattr(s, a) for a in what.attributes] for s in shown], dtype=np.float32),
            "index": np.arange(total, dtype=np.int64),
        },
        "meta": {
            "name": f"scenes_{kind}",
            "family": kind,
            "version": VERSION,
            "split": split,
            "variant": variant,
            "classes": [f"{what.noun} {k:03d}" for k in range(classes)],
            "seed": seed,
            "image_size": image_size,
            "attributes": list(what.attributes),
            "attribute_ranges": [list(r) for r in what.attributes.values()],
            "random": "default_rng([seed, split number, image number]), splits numbered train 0, val 1, test 2",
        },
    }


def throughput(kind: str, n: int = 32, *, image_size: int = 64) -> float:
    """Images rendered in a second of processor time (one core) over the first `n` training images."""
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    begin = time.process_time()
    _render_chunk((kind, "train", 0, n, image_size, 0, 20))
    return n / (time.process_time() - begin)


_Job = tuple[
    str, str, int, int, int, int, int
]  # kind, split, first image, one past the last, image size, seed, classes


def _render_chunk(job: _Job) -> npt.NDArray[np.uint8]:
    kind, split, first, last, image_size, seed, classes = job
    what = family(kind)
    drawn = [what.render(what.sample(seed, split, i, classes), image_size, None)[0] for i in range(first, last)]
    return np.stack(drawn)
