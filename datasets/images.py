"""Image files to uint8 arrays of one size."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from datasets.errors import CorruptData, MissingData
from datasets.registry import Progress

RULE = "shorter side resized (bilinear, antialiased), then centre crop"


def fit(image: Image.Image, size: int) -> Image.Image:
    """Resize the shorter side to `size` pixels and cut out the centre, size × size; untouched if it is that already.

    Equal to torchvision's `Compose([Resize(size), CenterCrop(size)])` on PIL images.
    """
    width, height = image.size
    if min(width, height) != size:
        short = min(width, height)
        width, height = int(size * width / short), int(size * height / short)
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    if (width, height) == (size, size):
        return image
    left, top = round((width - size) / 2), round((height - size) / 2)
    return image.crop((left, top, left + size, top + size))


def fit_array(images: npt.NDArray[np.uint8], size: int) -> npt.NDArray[np.uint8]:
    """`fit` for each of (N, H, W, C) images."""
    if images.shape[1:3] == (size, size):
        return images
    grey = images.shape[3] == 1
    fitted = (fit(Image.fromarray(image[..., 0] if grey else image), size) for image in images)
    stacked = np.stack([np.asarray(image) for image in fitted])
    return stacked[..., None] if grey else stacked


def decode(
    paths: Sequence[Path], size: int, *, workers: int | None = None, progress: Progress | None = None
) -> npt.NDArray[np.uint8]:
    """Decode files as RGB and `fit` them: (N, size, size, 3) uint8, in the order of `paths`, by `workers` threads.

    Raises `MissingData` for a file that is not there and `CorruptData` for one that is truncated or no image.
    """
    out = np.empty((len(paths), size, size, 3), dtype=np.uint8)

    def one(path: Path) -> npt.NDArray[np.uint8]:
        try:
            with Image.open(path) as image:
                return np.asarray(fit(image.convert("RGB"), size))
        except FileNotFoundError as error:
            raise MissingData(f"{path}: no such image; complete the folder or correct its list of files") from error
        except (UnidentifiedImageError, OSError, SyntaxError) as error:
            raise CorruptData(f"{path}: truncated or not an image ({error}); fetch it again") from error

    with ThreadPoolExecutor(workers or min(8, os.cpu_count() or 1)) as pool:
        for done, pixels in enumerate(pool.map(one, paths), start=1):
            out[done - 1] = pixels
            if progress is not None and (done % 100 == 0 or done == len(paths)):
                progress(done, len(paths))
    return out
