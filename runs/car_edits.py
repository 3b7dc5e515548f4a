"""Semantic edits that a cell names: of test images, to certify against, and of training images, to train on.

A perturbation of a cell (`runs.cell.Perturb`) becomes a `datasets.semantic.SemanticTransform` for the images at hand.
Its law is the same in training and in certificates: delta uniform on [0, 1], independent draws, pixels of 8 bits.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from certify.perturbations import Perturbation
from methods.car import PairedBatches
from runs import measure
from runs.cell import SEMANTIC, Perturb
from runs.packages import ours

GENERATORS = "generators"
"""Folder under the data directory: a DiffAE for each data set, saved under the data set's name."""

_SYMMETRIC = ("brightness", "contrast", "hue", "saturation", "rotation", "scale")
_STORED = ("rendered", "diffae")
WARMTH, BLUR = 1.4, 1.5


class Edit(Protocol):
    """`datasets.semantic.SemanticTransform`, said here so that nothing of ``datasets`` is imported for its types."""

    @property
    def name(self) -> str: ...

    def describe(self) -> dict[str, Any]: ...

    def edit(self, images: Tensor, index: Tensor, delta: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Line:
    """A perturbation of one parameter t in [-magnitude, magnitude] as a semantic transform, from end to end."""

    named: Perturb
    perturbation: Perturbation

    @property
    def name(self) -> str:
        return self.named.kind

    def describe(self) -> dict[str, Any]:
        return {
            "kind": "line",
            "name": self.name,
            "magnitude": self.named.magnitude,
            "delta_1": f"t = {self.named.magnitude:g} in {self.perturbation.describe()}, delta = 0 its negative",
        }

    def edit(self, images: Tensor, index: Tensor, delta: Tensor) -> Tensor:
        """See `datasets.semantic.SemanticTransform`."""
        return self.perturbation.apply(images, (2 * delta - 1) * self.named.magnitude)


def transform(named: Perturb, pack: Any, root: Path | None, device: torch.device) -> Edit:
    """The semantic transform that a perturbation names, for the images of ``pack``.

    Args:
        named: "sun", "smile" or "warmth" of rendered scenes, exact; "warmth" and "blur" of any RGB images, by a
            formula; "diffae", by the generator ``generators/<data set>`` of the data directory; or a perturbation of
            one parameter.
        pack: `datasets.Pack`.
        root: the data directory; None for $CERTPRUNE_DATA.
        device: where a generator runs.

    Raises:
        ValueError: the images cannot be changed so, or the size is out of range.
        FileNotFoundError: there is no generator for this data set.
        datasets.semantic.NotAccepted: the generator does not do what it should.
    """
    semantic = _semantic()
    if not named.magnitude > 0:
        raise ValueError(f"{named.label}: an edit needs a magnitude > 0")
    if named.kind in _SYMMETRIC:
        return Line(named, measure.perturbation(named))
    if named.kind not in SEMANTIC:
        raise ValueError(
            f"{named.kind} is no change of one attribute, so images cannot be edited by it; "
            f"there are {', '.join((*SEMANTIC, *_SYMMETRIC))}"
        )
    made: Edit
    if named.kind == "diffae":
        if named.magnitude != 1.0:
            raise ValueError(f"diffae:{named.magnitude:g}: the generator's edit has a size of its own; use diffae:1")
        made = _generated(pack, root, device)
    elif named.kind == "blur":
        made = semantic.Blur(BLUR * named.magnitude)
    elif named.kind == "warmth" and "family" not in pack.meta:
        made = semantic.Warmth(WARMTH**named.magnitude)
    else:
        whole = semantic.SceneEdit(pack, named.kind)
        made = semantic.SceneEdit(pack, named.kind, named.magnitude * whole.span)
    return made


def generator_path(name: str, side: int, root: Path | None) -> Path:
    """Where the generator for a data set at ``side`` pixels lies: ``generators/<data set>-<side>``, or without side.

    Raises:
        FileNotFoundError: there is neither; the message has the command that makes one.
    """
    library = ours("datasets")
    folder: Path = library.data_folder(root, library.cache_folder(None)) / GENERATORS
    path = folder / name.replace(":", "-")
    for found in (path.with_name(f"{path.name}-{side}"), path):
        if found.with_name(f"{found.name}.json").is_file() or found.is_dir():
            return found
    raise FileNotFoundError(
        f"{path}: no generator for {name}; train and accept one with {_command('train', name, side, path, root)}"
    )


def _generated(pack: Any, root: Path | None, device: torch.device) -> Edit:
    """The edit of the data set's accepted generator. Raises as `transform`, saying what to run."""
    semantic = _semantic()
    path = generator_path(pack.name, pack.image_size, root)
    generator = semantic.load(path, device=device)
    if (side := generator.config.image_size) != pack.image_size:
        own = path.with_name(f"{path.name.removesuffix(f'-{pack.image_size}')}-{pack.image_size}")
        raise ValueError(
            f"{path}: the generator makes images of {side} px, {pack.name} has {pack.image_size}; train one with "
            + _command("train", pack.name, pack.image_size, own, root)
        )
    try:
        edit: Edit = semantic.DiffAEEdit(generator)
    except semantic.NotAccepted as error:
        again = _command("accept", pack.name, pack.image_size, path, root)
        raise semantic.NotAccepted(f"{path}: {error}; run {again}") from error
    return edit


def _command(verb: str, name: str, side: int, path: Path, root: Path | None) -> str:
    """The command that trains or accepts a generator."""
    source = ours("datasets").SOURCES.get(name.partition(":")[0])
    sized = source is not None and "image_size" in source.options
    words = ["python", "-m", "datasets.semantic", verb, "--data", name, "--model", str(path)]
    words += ["--image-size", str(side)] if sized else []
    words += ["--data-dir", str(root)] if root is not None else []
    return shlex.join(words)


def draws(edit: Edit, indices: Sequence[int], split: str, *, stored: bool = True) -> Any:
    """Random draws for `certify.estimate`: of the images at these positions of the edit's set.

    Rendered and generated images are kept in the cache (unless not ``stored``) and found there by every network that is
    certified with them.
    """
    semantic = _semantic()
    store = None
    if stored and edit.describe()["kind"] in _STORED:
        store = semantic.EditStore(_edits_folder(), edit, split=split)
    return semantic.Draws(edit, indices=indices, store=store)


def augmented(pack: Any, named: Perturb, count: int, root: Path | None, device: torch.device) -> Any:
    """The training ``pack`` followed by ``count`` edited images (`datasets.semantic.augment`), as it is for none.

    The generator of a "diffae" edit runs on ``device``.
    """
    if count == 0:
        return pack
    edit = transform(named, pack, root, device)
    store = None
    if edit.describe()["kind"] == "diffae":  # rendering is cheaper than keeping
        store = _semantic().EditStore(_edits_folder(), edit, split=pack.split)
    return _semantic().augment(pack, edit, count, store=store)


def originals(pack: Any) -> int:
    """How many images of a pack are no edits of others."""
    return len(pack) - int(pack.meta["semantic"]["count"]) if "semantic" in pack.meta else len(pack)


def paired_batches(pack: Any, batch_size: int, *, device: torch.device, seed: int, augment: Any) -> PairedBatches:
    """Batches of an augmented pack that know which image each edit was made from."""
    edited, source = _semantic().pairs(pack)
    whole = originals(pack)
    return PairedBatches(
        pack.images[:whole], pack.targets[:whole], pack.images[edited], source, batch_size,
        device=device, seed=seed, augment=augment,
    )  # fmt: skip


def stated(edit: Edit) -> Mapping[str, Any]:
    """What the record says of a transform: its fingerprint and everything that the fingerprint is taken over."""
    semantic = _semantic()
    return {"fingerprint": semantic.fingerprint(edit), "law": semantic.law(edit), "transform": edit.describe()}


def _edits_folder() -> Path:
    folder: Path = ours("datasets").cache_folder(None) / "edits"
    return folder


def _semantic() -> Any:
    ours("datasets")
    from datasets import semantic

    return semantic
