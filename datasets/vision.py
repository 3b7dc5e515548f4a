"""FashionMNIST, MNIST, CIFAR-10 and SVHN: from a pack, from torchvision's layout, or by torchvision's download."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from datasets import archive, layout
from datasets.archive import Arrays
from datasets.errors import CorruptData, MissingData
from datasets.packs import Pack
from datasets.registry import Request

_CIFAR_STATISTICS = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
_CIFAR_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_FASHION_CLASSES = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)
_DIGITS = tuple("0123456789")
_IDX = tuple(f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1"))


@dataclass(frozen=True)
class Spec:
    """Facts of one set.

    Args:
        torchvision: name of the class in torchvision.datasets; "" for a set that exists as a pack only.
        files: what torchvision reads, relative to the root; the first folder or file is how the layout is recognised.
        shape: (H, W, C) of an image.
        counts: training and test images of the whole set, in its published form.
        classes: names of the classes.
        mean, std: customary normalisation per channel.
        padding, flip: customary augmentation.
    """

    torchvision: str
    files: tuple[str, ...]
    shape: tuple[int, int, int]
    counts: tuple[int, int]
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    padding: int
    flip: bool


SPECS: dict[str, Spec] = {
    "fashion_mnist": Spec(
        torchvision="FashionMNIST",
        files=tuple(f"FashionMNIST/raw/{name}" for name in _IDX),
        shape=(28, 28, 1),
        counts=(60_000, 10_000),
        classes=_FASHION_CLASSES,
        mean=(0.286,),
        std=(0.315,),
        padding=4,
        flip=True,
    ),
    "mnist": Spec(
        torchvision="MNIST",
        files=tuple(f"MNIST/raw/{name}" for name in _IDX),
        shape=(28, 28, 1),
        counts=(60_000, 10_000),
        classes=_DIGITS,
        mean=(0.1307,),
        std=(0.3081,),
        padding=2,
        flip=False,
    ),
    "cifar10": Spec(
        torchvision="CIFAR10",
        files=tuple(
            f"cifar-10-batches-py/{name}"
            for name in (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch", "batches.meta")
        ),
        shape=(32, 32, 3),
        counts=(50_000, 10_000),
        classes=_CIFAR_CLASSES,
        mean=_CIFAR_STATISTICS[0],
        std=_CIFAR_STATISTICS[1],
        padding=4,
        flip=True,
    ),
    "cifar10_subset": Spec(
        torchvision="",
        files=(),
        shape=(32, 32, 3),
        counts=(15_000, 2_000),
        classes=_CIFAR_CLASSES,
        mean=_CIFAR_STATISTICS[0],
        std=_CIFAR_STATISTICS[1],
        padding=4,
        flip=True,
    ),
    "svhn": Spec(
        torchvision="SVHN",
        files=("train_32x32.mat", "test_32x32.mat"),
        shape=(32, 32, 3),
        counts=(73_257, 26_032),
        classes=_DIGITS,
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
        padding=4,
        flip=False,
    ),
}


def load(request: Request) -> Pack:
    """The pack of one split; see `datasets.load` for the order of places and the errors."""
    spec = SPECS[request.name]
    pack_file = request.root / f"{request.name}.npz"
    if pack_file.is_file():
        names = layout.needed(archive.members(pack_file), request.split)
        arrays, _ = archive.read(pack_file, names)
        source = f"{pack_file.name} as found"
    else:
        files = _find(request, spec)
        stored = request.cache / "packs" / f"{request.name}-{archive.signature(request.root, files)}.npz"
        names = layout.needed(["x_train", "y_train", "x_test", "y_test", "class_names"], request.split)
        arrays, _ = archive.cached(stored, lambda: _build(request, spec, files), names)
        source = f"torchvision.datasets.{spec.torchvision}"
    _check(arrays, spec, request, source)
    meta: dict[str, Any] = {
        "source": source,
        "mean": list(spec.mean),
        "std": list(spec.std),
        "augmentation": {"padding": spec.padding, "flip": spec.flip},
    }
    arrays["class_names"] = np.array(spec.classes)
    return layout.to_pack(arrays, request, meta=meta)


def _find(request: Request, spec: Spec) -> list[Path]:
    """The files of torchvision's layout under the root, downloaded if asked for and missing."""
    root = request.root
    looked = f"neither the pack {root / f'{request.name}.npz'}"
    if not spec.torchvision:
        raise MissingData(
            f"{request.name}: no pack {root / f'{request.name}.npz'}{_siblings(request)}. {_own_hint(request)}"
        )
    files, missing = _present(root, spec)
    if missing and request.download:
        _download(request, spec)
        files, missing = _present(root, spec)
    if not missing:
        return files
    folder = Path(spec.files[0]).parts[0]
    if len(missing) < len(spec.files):
        state = f"nor a complete {root / folder}: it lacks {', '.join(missing)}" if "/" in spec.files[0] else ""
        state = state or f"nor all of torchvision's files in {root}: it lacks {', '.join(missing)}"
    else:
        state = f"nor torchvision's layout {root / spec.files[0]}"
    raise MissingData(
        f"{request.name}: {looked} {state}{_siblings(request)}. "
        f"Give the folder that holds it (root, --data-dir or CERTPRUNE_DATA), or fetch it with "
        f"datasets.load({request.name!r}, root={str(root)!r}, download=True)"
    )


def _present(root: Path, spec: Spec) -> tuple[list[Path], list[str]]:
    """Files that are there (an IDX file may still be packed as .gz), and the names of those that are not."""
    files, missing = [], []
    for name in spec.files:
        candidates = [root / name, root / f"{name}.gz"] if name.endswith("-ubyte") else [root / name]
        found = next((path for path in candidates if path.is_file()), None)
        if found is None:
            missing.append(name)
        else:
            files.append(found)
    return files, missing


def _siblings(request: Request) -> str:
    others = sorted(path.stem for path in request.root.glob(f"{request.name}_*.npz"))
    if not others:
        return ""
    return f" (there is {', '.join(others)}, which is a data set of its own: ask for it by that name)"


def _own_hint(request: Request) -> str:
    return (
        f"It is an npz with x_train y_train train_index x_test y_test and {SPECS[request.name].counts[0]:,} + "
        f"{SPECS[request.name].counts[1]:,} images, made from the full set; give the folder that holds it"
    )


def _download(request: Request, spec: Spec) -> None:
    try:
        request.root.mkdir(parents=True, exist_ok=True)
        for part in (True, False):
            _torchvision(spec, request.root, train=part, download=True)
    except (OSError, RuntimeError) as error:
        raise MissingData(
            f"{request.name}: the download into {request.root} failed ({error}); "
            "check the network and that the folder can be written, or put the files there yourself"
        ) from error


def _torchvision(spec: Spec, root: Path, *, train: bool, download: bool = False) -> Any:
    from torchvision import datasets as sources

    dataset = getattr(sources, spec.torchvision)
    if spec.torchvision == "SVHN":
        return dataset(root, split="train" if train else "test", download=download)
    return dataset(root, train=train, download=download)


def _build(request: Request, spec: Spec, files: list[Path]) -> tuple[Arrays, dict[str, Any]]:
    with tempfile.TemporaryDirectory() as scratch:
        root = request.root
        if any(path.suffix == ".gz" for path in files):
            root = _unpack(files, request.root, Path(scratch), spec)
        arrays: Arrays = {}
        for part in ("train", "test"):
            try:
                found = _torchvision(spec, root, train=part == "train")
            except Exception as error:  # torchvision's readers raise whatever the broken bytes lead to
                raise CorruptData(
                    f"{request.name}: the files of torchvision.datasets.{spec.torchvision} under {request.root} are "
                    f"there but cannot be used ({type(error).__name__}: {error}); delete them and fetch them again"
                ) from error
            images = np.asarray(found.data)
            if spec.torchvision == "SVHN":
                images = images.transpose(0, 2, 3, 1)
            labels = found.labels if spec.torchvision == "SVHN" else found.targets
            arrays[f"x_{part}"] = np.ascontiguousarray(images if images.ndim == 4 else images[..., None])
            arrays[f"y_{part}"] = np.asarray(labels, dtype=np.int64)
    arrays["class_names"] = np.array(spec.classes)
    _check(arrays, spec, request, f"{request.root} (torchvision's layout)")
    return arrays, {"name": request.name}


def _unpack(files: list[Path], root: Path, scratch: Path, spec: Spec) -> Path:
    """Unpack .gz files into `scratch` in torchvision's layout, after torchvision's own MD5 check."""
    from torchvision import datasets as sources
    from torchvision.datasets.utils import check_integrity, extract_archive

    sums = dict(getattr(sources, spec.torchvision).resources)
    for path in files:
        target = scratch / path.relative_to(root).parent
        target.mkdir(parents=True, exist_ok=True)
        if path.suffix != ".gz":
            (target / path.name).symlink_to(path.resolve())
            continue
        if not check_integrity(str(path), sums.get(path.name)):
            raise CorruptData(f"{path}: the MD5 is not the published one; delete it and fetch it again")
        try:
            extract_archive(str(path), str(target))
        except (OSError, EOFError) as error:
            raise CorruptData(f"{path}: truncated or not a gzip file ({error}); fetch it again") from error
    return scratch


def _check(arrays: Arrays, spec: Spec, request: Request, where: str) -> None:
    """Whether the arrays are the whole published set: a part of it is a data set of another name."""
    for part, count in zip(("train", "test"), spec.counts, strict=True):
        images = arrays.get(f"x_{part}")
        if images is None:
            continue
        if images.shape[1:] not in (spec.shape, spec.shape[:2] if spec.shape[2] == 1 else spec.shape):
            raise CorruptData(
                f"{request.name}: {where} has {part} images of shape {images.shape[1:]}, expected {spec.shape}"
            )
        if len(images) != count:
            raise CorruptData(
                f"{request.name}: {where} has {len(images):,} {part} images, the set has {count:,}; "
                "a part of a set is a data set of its own: give the npz another name and load it by its path"
            )
