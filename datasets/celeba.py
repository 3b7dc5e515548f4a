"""CelebA-HQ faces by identity, from a folder of images and a manifest that says who is who and in which split.

The identity split in circulation (307 people, 4,263 + 1,215 images; Na et al., 2022) follows from the order in which
one file system listed a folder, so it is read from a file instead: `<root>/celeba_hq/manifest.csv` with the columns

    file,identity,split
    train/1081/12345.jpg,1081,train

`file` is relative to the manifest's folder, `identity` any text, `split` train, val or test. Without val rows the
validation images come off the training ones. `write_manifest` makes the file from folders `<split>/<identity>/<image>`.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from datasets import archive, images, layout
from datasets.archive import Arrays
from datasets.errors import CorruptData, MissingData
from datasets.packs import Pack
from datasets.registry import Request
from datasets.splits import SPLITS

DEFAULT_SIZE = 64
COLUMNS = ("file", "identity", "split")
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_SUFFIXES = (".jpg", ".jpeg", ".png")


@dataclass(frozen=True)
class Row:
    """One image of the manifest; `file` is absolute."""

    file: Path
    identity: str
    split: str


def load(request: Request) -> Pack:
    """The pack of one split; see `datasets.load`. Classes are all identities of the manifest, numbers in order."""
    folder = request.root / "celeba_hq"
    pack_file = request.root / "celeba_hq.npz"
    size = request.image_size or DEFAULT_SIZE
    meta: dict[str, Any] = {
        "mean": list(IMAGENET[0]),
        "std": list(IMAGENET[1]),
        "resize_rule": images.RULE,
        "augmentation": {"padding": 0, "flip": True},
    }
    if pack_file.is_file():
        names = archive.members(pack_file)
        arrays, _ = archive.read(pack_file, layout.needed(names, request.split))
        fitted = {key: images.fit_array(a, size) if key.startswith("x_") else a for key, a in arrays.items()}
        meta["source"] = f"{pack_file.name} as found"
        return layout.to_pack(fitted, request, own_val="x_val" in names, meta=meta)
    manifest = folder / "manifest.csv"
    if not manifest.is_file():
        raise MissingData(
            f"celeba_hq: neither the pack {pack_file} nor the manifest {manifest}. CelebA-HQ is given out by "
            f"its authors on request; put the images under {folder} with a manifest.csv of the columns "
            f"{','.join(COLUMNS)} (datasets.celeba.write_manifest makes one from folders <split>/<identity>/<image>)"
        )
    rows = read_manifest(manifest)
    files = [row.file for row in rows]
    stored = request.cache / "packs" / f"celeba_hq-{size}px-{archive.signature(folder, [manifest, *files])}.npz"
    own_val = any(row.split == "val" for row in rows)
    present = ["x_train", "y_train", "x_test", "y_test", "class_names", *(["x_val", "y_val"] if own_val else [])]
    arrays, _ = archive.cached(stored, lambda: _build(rows, size, request), layout.needed(present, request.split))
    meta["source"] = "celeba_hq/manifest.csv"
    return layout.to_pack(arrays, request, own_val=own_val, meta=meta)


def read_manifest(path: Path) -> list[Row]:
    """The rows of a manifest, checked. Raises `MissingData` for absent images, `CorruptData` for the rest."""
    with path.open(newline="", encoding="utf-8-sig") as stream:
        reader = csv.DictReader(stream)
        if absent := [column for column in COLUMNS if column not in (reader.fieldnames or ())]:
            raise CorruptData(f"{path}: no column {', '.join(absent)}; the first line must be {','.join(COLUMNS)}")
        rows, seen, missing = [], dict[Path, int](), list[Path]()
        for number, line in enumerate(reader, start=2):
            name, identity, split = ((line[column] or "").strip() for column in COLUMNS)
            if split not in SPLITS:
                raise CorruptData(f"{path}, line {number}: split {split!r}, expected one of {', '.join(SPLITS)}")
            if not name or not identity:
                raise CorruptData(f"{path}, line {number}: file and identity must not be empty")
            file = path.parent / name
            if Path(name).is_absolute() or ".." in Path(name).parts:
                raise CorruptData(f"{path}, line {number}: {name!r} leaves the manifest's folder; use a path inside it")
            if file in seen:
                raise CorruptData(f"{path}, line {number}: {name!r} is listed before, in line {seen[file]}")
            seen[file] = number
            if not file.is_file():
                missing.append(file)
            rows.append(Row(file, identity, split))
    if missing:
        raise MissingData(f"{path}: {len(missing)} of {len(rows)} images are not there, the first is {missing[0]}")
    for split in ("train", "test"):
        if not any(row.split == split for row in rows):
            raise CorruptData(f"{path}: no row with split {split!r}")
    known = {row.identity for row in rows if row.split == "train"}
    if strangers := sorted({row.identity for row in rows} - known, key=_natural):
        raise CorruptData(
            f"{path}: {len(strangers)} identities have no training image (the first is {strangers[0]!r}); "
            "a classifier cannot name them, remove their rows"
        )
    return rows


def write_manifest(folder: str | Path, *, splits: Sequence[str] = SPLITS) -> Path:
    """Write `manifest.csv` for images at `<folder>/<split>/<identity>/<image>`, sorted by name; returns its path.

    Raises `MissingData` if there is no image in such a place.
    """
    folder = Path(folder)
    found = [
        (path.relative_to(folder).as_posix(), path.parent.name, split)
        for split in splits
        for path in sorted(folder.glob(f"{split}/*/*"))
        if path.suffix.lower() in _SUFFIXES
    ]
    if not found:
        raise MissingData(f"{folder}: no image in folders <split>/<identity>/, with <split> one of {', '.join(splits)}")
    manifest = folder / "manifest.csv"
    temporary = manifest.with_name(f".manifest.{os.getpid()}.tmp")
    try:
        with temporary.open("w", newline="", encoding="utf-8") as stream:
            csv.writer(stream, lineterminator="\n").writerows([COLUMNS, *found])
        os.replace(temporary, manifest)
    finally:
        temporary.unlink(missing_ok=True)
    return manifest


def _natural(identity: str) -> tuple[int, int, str]:
    return (0, int(identity), "") if identity.isdecimal() else (1, 0, identity)


def _build(rows: list[Row], size: int, request: Request) -> tuple[Arrays, dict[str, Any]]:
    classes = sorted({row.identity for row in rows}, key=_natural)
    number = {identity: index for index, identity in enumerate(classes)}
    pixels = images.decode([row.file for row in rows], size, workers=request.workers, progress=request.progress)
    arrays: Arrays = {"class_names": np.array(classes)}
    for split in SPLITS:
        index = [position for position, row in enumerate(rows) if row.split == split]
        if index:
            arrays[f"x_{split}"] = pixels[index]
            arrays[f"y_{split}"] = np.array([number[rows[position].identity] for position in index], dtype=np.int64)
    return arrays, {"name": "celeba_hq", "image_size": size}
