"""Oxford Flowers-102 (Nilsback & Zisserman, 2008) in torchvision's layout, at one size, with two choices of split.

`paper_like` (default): all 8,189 images, 6,552 / 818 / 819 for train / val / test by a seeded permutation: the sizes of
the split that circulates with 6,552 training images, whose own list of files was never published with a paper.
`official`: the authors' 1,020 / 1,020 / 6,149 of `setid.mat`.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from datasets import archive, images, splits
from datasets.archive import Arrays
from datasets.errors import CorruptData, MissingData
from datasets.packs import Pack
from datasets.registry import Request
from datasets.splits import SPLITS

DEFAULT_SIZE = 64
SEED = 102
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_MEMBERS = ("x", "y", "image_id", "official")


def paper_like_sizes(n: int) -> tuple[int, int, int]:
    """Train, val and test images out of n: 80 % rounded up, and two halves of the rest; 8,189 gives 6552/818/819."""
    train = math.ceil(0.8 * n)
    val = (n - train) // 2
    return train, val, n - train - val


def manifest(image_ids: npt.NDArray[np.int64], seed: int = SEED) -> dict[str, npt.NDArray[np.int64]]:
    """The `paper_like` split: image ids (as in `image_00001.jpg`) of "train", "val" and "test", each in shuffled order.

    Depends on the set of ids and the seed only, not on the order in which the ids are given.
    """
    ordered = np.sort(image_ids)[splits.permutation(len(image_ids), seed)]
    train, val, _ = paper_like_sizes(len(ordered))
    return dict(zip(SPLITS, np.split(ordered, [train, train + val]), strict=True))


def load(request: Request) -> Pack:
    """The pack of one split; see `datasets.load`."""
    size = request.image_size or DEFAULT_SIZE
    arrays, source = _all_images(request, size)
    if len(arrays["x"]) != len(arrays["y"]):
        raise CorruptData(f"flowers102: {len(arrays['x'])} images but {len(arrays['y'])} labels")
    ids = arrays["image_id"].astype(np.int64)
    if request.variant == "official":
        index = np.flatnonzero(arrays["official"] == SPLITS.index(request.split))
        rule = "the authors' setid.mat: 1,020 / 1,020 / 6,149, in its order"
    else:
        place = {int(number): position for position, number in enumerate(ids)}
        index = np.array([place[int(number)] for number in manifest(ids)[request.split]])
        rule = f"all images by a permutation with seed {SEED}: {' / '.join(map(str, paper_like_sizes(len(ids))))}"
    meta: dict[str, Any] = {
        "source": source,
        "split_rule": rule,
        "resize_rule": images.RULE,
        "mean": list(IMAGENET[0]),
        "std": list(IMAGENET[1]),
        "augmentation": {"padding": size // 8, "flip": True},
    }
    return Pack(
        request.title,
        request.split,
        torch.from_numpy(arrays["x"][index]),
        torch.from_numpy(arrays["y"][index].astype(np.int64)),
        _classes(),
        meta,
        {"image_id": torch.from_numpy(ids[index])},
    )


def _classes() -> tuple[str, ...]:
    from torchvision.datasets import Flowers102

    return tuple(Flowers102.classes)


def _all_images(request: Request, size: int) -> tuple[Arrays, str]:
    """All images in the order train, val, test of `setid.mat`, from the root's pack, the cache or the JPEG files."""
    pack_file = request.root / "flowers102.npz"
    if pack_file.is_file():
        arrays, _ = archive.read(pack_file, _MEMBERS)
        return arrays | {"x": images.fit_array(arrays["x"], size)}, f"{pack_file.name} as found"
    folder = request.root / "flowers-102"
    if not folder.is_dir() and request.download:
        _download(request)
    wanted = [folder / name for name in ("imagelabels.mat", "setid.mat", "jpg")]
    if absent := [path.name for path in wanted if not path.exists()]:
        raise MissingData(
            f"flowers102: neither the pack {pack_file} nor a complete {folder}: it lacks {', '.join(absent)}. "
            f"Give the folder that holds flowers-102 (root, --data-dir or CERTPRUNE_DATA), or fetch it with "
            f"datasets.load('flowers102', root={str(request.root)!r}, download=True)"
        )
    files = [*wanted[:2], *(folder / "jpg").glob("*.jpg")]
    stored = request.cache / "packs" / f"flowers102-{size}px-{archive.signature(request.root, files)}.npz"
    arrays, _ = archive.cached(stored, lambda: _build(request, size), _MEMBERS)
    return arrays, "torchvision.datasets.Flowers102"


def _build(request: Request, size: int) -> tuple[Arrays, dict[str, Any]]:
    from torchvision.datasets import Flowers102

    paths: list[Path] = []
    labels: list[int] = []
    official: list[int] = []
    for number, split in enumerate(SPLITS):
        try:
            # A loader that hands the path back: one decode per file, at the right size, happens below.
            found = Flowers102(request.root, split=split, loader=Path)
        except Exception as error:  # torchvision and scipy raise whatever the broken bytes lead to
            raise CorruptData(
                f"flowers102: imagelabels.mat or setid.mat in {request.root / 'flowers-102'} cannot be used "
                f"({type(error).__name__}: {error}); delete them and fetch them again"
            ) from error
        for position in range(len(found)):
            path, label = found[position]
            paths.append(path)
            labels.append(label)
            official.append(number)
    arrays: Arrays = {
        "x": images.decode(paths, size, workers=request.workers, progress=request.progress),
        "y": np.array(labels, dtype=np.int64),
        "image_id": np.array([int(path.stem.removeprefix("image_")) for path in paths], dtype=np.int64),
        "official": np.array(official, dtype=np.uint8),
    }
    return arrays, {"name": "flowers102", "image_size": size}


def _download(request: Request) -> None:
    from torchvision.datasets import Flowers102

    try:
        request.root.mkdir(parents=True, exist_ok=True)
        Flowers102(request.root, download=True)
    except (OSError, RuntimeError) as error:
        raise MissingData(
            f"flowers102: the download into {request.root} failed ({error}); "
            "check the network and that the folder can be written, or put the files there yourself"
        ) from error
