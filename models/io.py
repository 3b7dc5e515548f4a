"""Saving and loading: weights as safetensors, the recipe and a checksum in a JSON sidecar."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from models.backbone import Network
from models.recipe import Recipe
from models.zoo import build

FORMAT = "certprune.model/1"


class CheckpointError(RuntimeError):
    """A checkpoint is damaged, incomplete, or belongs to another network."""


def save(model: nn.Module, path: str | os.PathLike[str]) -> Path:
    """Writes ``path.safetensors`` (every parameter and buffer, bit for bit) and ``path.json`` (recipe, size, sha256).

    Both files are complete before either takes its place, so a full disk or a kill leaves an earlier checkpoint whole.

    Args:
        model: a network from :func:`models.create`, with whatever weights it has by now.
        path: with or without the suffix ``.safetensors``; its folder is created.

    Returns:
        The path of the weights.

    Raises:
        TypeError: the model has no recipe.
        ValueError: its layers are not those of its recipe any more, for example after channels were removed.
    """
    recipe = getattr(model, "recipe", None)
    if not isinstance(recipe, Recipe):
        raise TypeError(f"{type(model).__name__} has no recipe: models.save takes networks made by models.create")
    state = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    wrong = mismatches(state, skeleton(recipe).state_dict())
    if wrong:
        raise ValueError(
            f"the layers of this {recipe.name!r} are not those of its recipe: {listing(wrong)}. Save the network "
            "before channels are removed, together with its mask"
        )
    weights, sidecar = paths(path)
    data = safetensors.torch.save(state, metadata={"format": "pt"})
    record = {
        "format": FORMAT,
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
        "recipe": recipe.to_dict(),
    }
    weights.parent.mkdir(parents=True, exist_ok=True)
    _replace({weights: data, sidecar: (json.dumps(record, indent=2) + "\n").encode()})
    return weights


def load(path: str | os.PathLike[str], device: str | torch.device = "cpu") -> Network:
    """The network that :func:`save` wrote, on ``device``, in eval mode, with the dtype it was saved in.

    Raises:
        FileNotFoundError: either file is missing.
        CheckpointError: truncated or changed (checksum), not a sidecar of ours, or tensors that do not fit the recipe.
    """
    weights, sidecar = paths(path)
    for file, what in ((weights, "weights"), (sidecar, "recipe")):
        if not file.is_file():
            raise FileNotFoundError(
                f"no {what} at {file}: models.load needs {weights.name} and {sidecar.name} together"
            )
    record = _sidecar(sidecar)
    data = weights.read_bytes()
    if len(data) != record["bytes"] or hashlib.sha256(data).hexdigest() != record["sha256"]:
        raise CheckpointError(
            f"{weights} is damaged: {len(data)} bytes that do not match the checksum in {sidecar.name} "
            f"({record['bytes']} bytes when saved). Restore the file or train the network again"
        )
    try:
        recipe = Recipe.from_dict(record["recipe"])
        model = skeleton(recipe)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"the recipe in {sidecar} cannot be built: {error}") from error
    state = safetensors.torch.load(data)
    wrong = mismatches(state, model.state_dict())
    if wrong:
        raise CheckpointError(
            f"{weights} does not hold the network of {sidecar.name} ({recipe.name!r}): {listing(wrong)}"
        )
    model.load_state_dict(state, assign=True)
    model.recipe = recipe
    return model.to(device).eval()


def skeleton(recipe: Recipe) -> Network:
    """The recipe's network without storage (on the meta device): names, shapes and structure only."""
    with torch.device("meta"):
        return build(recipe)[0]


def mismatches(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    """What keeps ``state`` from being exactly ``expected``: missing names, unknown names, other shapes."""
    wrong = [f"missing {key}" for key in expected if key not in state]
    wrong += [f"unknown {key}" for key in state if key not in expected]
    wrong += [
        f"{key} is {tuple(state[key].shape)} instead of {tuple(expected[key].shape)}"
        for key in expected
        if key in state and state[key].shape != expected[key].shape
    ]
    return wrong


def listing(items: Sequence[str], most: int = 6) -> str:
    """The first items, and how many were left out."""
    rest = len(items) - most
    return "; ".join(items[:most]) + (f"; and {rest} more" if rest > 0 else "")


def paths(path: str | os.PathLike[str]) -> tuple[Path, Path]:
    """(weights, sidecar) for a path with or without ``.safetensors``."""
    path = Path(path)
    stem = path.name.removesuffix(".safetensors")
    return path.with_name(f"{stem}.safetensors"), path.with_name(f"{stem}.json")


def _sidecar(file: Path) -> dict[str, Any]:
    try:
        record = json.loads(file.read_text())
    except ValueError as error:
        raise CheckpointError(f"{file} is not readable JSON: {error}") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        found = record.get("format") if isinstance(record, dict) else type(record).__name__
        raise CheckpointError(f"{file} does not describe a saved model: expected format {FORMAT!r}, found {found!r}")
    for key, kind in (("bytes", int), ("sha256", str), ("recipe", dict)):
        if not isinstance(record.get(key), kind):
            raise CheckpointError(
                f"{file} does not describe a saved model: field {key!r} is missing or of another type"
            )
    return record


def _replace(contents: Mapping[Path, bytes]) -> None:
    """Writes all files next to their places, flushed to disk, and only then moves each into place."""
    staged: list[tuple[str, Path]] = []
    try:
        for target, data in contents.items():
            handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
            staged.append((name, target))
            with os.fdopen(handle, "wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
        while staged:
            name, target = staged[0]
            os.replace(name, target)
            staged.pop(0)
    finally:
        for name, _ in staged:
            Path(name).unlink(missing_ok=True)
