"""A picture of edits: images down, delta = 0 ... 1 across, one block for each transform."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from datasets.packs import Pack
from datasets.semantic.measures import MEASURES
from datasets.semantic.transform import SemanticTransform, apply, quantise


def draw_grid(
    path: str | Path,
    pack: Pack,
    transforms: Sequence[SemanticTransform],
    *,
    indices: Sequence[int] = (0, 1, 2, 3),
    deltas: Sequence[float] = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0),
    zoom: int = 1,
) -> dict[str, dict[str, list[float]]]:
    """Write a PNG with the edits of some images and return the attributes measured on them.

    Args:
        path: of the PNG.
        pack: RGB images.
        transforms: one block of rows each, in this order; the first column is the image itself, unedited.
        indices: the images, by position in the pack.
        deltas: the other columns.
        zoom: pixels drawn for each pixel.

    Returns:
        For each transform's name the mean over the images of every measure, a list over `deltas`.

    Raises:
        ValueError: nothing to draw, grey images, or a transform that fails its checks.
    """
    from PIL import Image, ImageDraw

    if not transforms or not len(indices) or not len(deltas):
        raise ValueError("a grid needs at least one transform, one image and one delta")
    if zoom < 1:
        raise ValueError(f"zoom must be at least 1, got {zoom}")
    images = pack.tensors(list(indices))[0]
    blocks, numbers = [], dict[str, dict[str, list[float]]]()
    for transform in transforms:
        columns = [apply(transform, images, list(indices), float(d)) for d in deltas]
        numbers[_distinct(transform.name, numbers)] = _measured(columns)
        blocks.append(torch.stack([images, *columns], 1))
    side, line = images.shape[-1] * zoom, 14
    block = line + len(indices) * (images.shape[-2] * zoom + 2)
    canvas = Image.new("RGB", ((1 + len(deltas)) * (side + 2), line + block * len(transforms)), "white")
    pen = ImageDraw.Draw(canvas)
    for column, label in enumerate(["image", *(f"{d:.2g}" for d in deltas)]):
        pen.text((column * (side + 2) + 2, 1), label, fill="black")
    for number, (transform, rows) in enumerate(zip(transforms, blocks, strict=True)):
        top = line + number * block
        pen.text(
            (2, top + 1), f"{transform.name}: delta = 1 is {transform.describe().get('delta_1', '?')}", fill="black"
        )
        for r, row in enumerate(rows):
            for c, image in enumerate(row):
                tile = Image.fromarray(quantise(image).permute(1, 2, 0).cpu().numpy())
                tile = tile.resize((side, images.shape[-2] * zoom), Image.Resampling.NEAREST)
                canvas.paste(tile, (c * (side + 2), top + line + r * (tile.height + 2)))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    canvas.save(path, format="PNG")
    return numbers


def _measured(columns: Sequence[Tensor]) -> dict[str, list[float]]:
    return {name: [float(meter(c).mean()) for c in columns] for name, meter in MEASURES.items()}


def _distinct(name: str, taken: Mapping[str, Any]) -> str:
    number = 2
    result = name
    while result in taken:
        result, number = f"{name} ({number})", number + 1
    return result
