"""Weights from elsewhere: fetching them and fitting them into a network of the zoo."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from models.backbone import Backbone, Network
from models.io import CheckpointError, listing, mismatches
from models.keypoint import DSNT, PixelScale
from models.normalise import Normalise


@dataclass(frozen=True)
class Weights:
    """A state dict and where it came from.

    ``own`` says that its keys are those of :class:`models.backbone.Network`, not the published layout.
    """

    state: Mapping[str, Tensor]
    source: str
    own: bool


def fetch(
    name: str,
    download: Callable[[], Callable[[], Mapping[str, Tensor]]] | None,
    path: Path | None,
) -> Weights:
    """The weights of a local file, or the published ones (``path`` is None).

    Raises:
        ValueError: no weights were ever published for this network.
        RuntimeError: they could not be downloaded and are not in the cache.
        FileNotFoundError: the local file does not exist.
        CheckpointError: the local file is not a checkpoint.
    """
    if path is not None:
        return _read(path)
    if download is None:
        raise ValueError(
            f"no weights are published for {name!r}: use pretrained=False or pretrained='path/to/checkpoint'"
        )
    get = download()
    library = get.__module__.rpartition(".")[2]
    try:
        state = get()
    except (
        Exception
    ) as error:  # each hub client has its own family of errors; none of them means anything but "not to be had"
        raise RuntimeError(
            f"could not fetch the published weights of {name!r} through {library} ({type(error).__name__}: {error}). "
            "Check the network, or fetch the file elsewhere and pass its path: pretrained='path/to/checkpoint' "
            "(.safetensors or .pth)"
        ) from error
    return Weights(state, f"published weights from {library}", own=False)


def transfer(model: Network, backbone: Backbone, weights: Weights) -> tuple[str, ...]:
    """Copies weights into ``model``; everything but the stem and the head must fit exactly.

    Returns:
        Notes on the source and on what was not taken over as it was.

    Raises:
        CheckpointError: names are missing, unknown or of another shape; the message lists them.
    """
    target = model.state_dict()
    if weights.own:
        source = dict(weights.state)
    else:
        rename = backbone.rename or (lambda key: key)
        source = {new: value for key, value in weights.state.items() if (new := rename(key)) is not None}
    notes = [weights.source]
    fixed = tuple(f"{path}." for path, module in model.named_modules() if isinstance(module, Normalise | PixelScale))
    fixed += tuple(f"{path}.grid" for path, module in model.named_modules() if isinstance(module, DSNT))
    source = {key: value for key, value in source.items() if not key.startswith(("normalise.", *fixed))}

    notes += _fit_stem(source, target, backbone.stem)
    notes += _fit_head(source, target, model.head, keep=weights.own or model.recipe.head is None)

    # Checkpoints older than the counter lack it; it plays no part unless BN's momentum is None.
    optional = {key for key in target if key.endswith("num_batches_tracked")}
    wanted = {key: value for key, value in target.items() if not key.startswith(("head.", *fixed))}
    wanted = {key: value for key, value in wanted.items() if key in source or key not in optional}
    if backbone.stem is not None and backbone.stem not in source:
        wanted.pop(backbone.stem)
    trunk = {key: value for key, value in source.items() if not key.startswith("head.")}
    wrong = mismatches(trunk, wanted)
    if wrong:
        layout = "a checkpoint written by models.save" if backbone.rename is None else "the published layout"
        raise CheckpointError(
            f"{weights.source} does not fit {model.recipe.name!r} at width {model.recipe.width:g}: {listing(wrong)}. "
            f"Expected {layout} of the same network"
        )
    model.load_state_dict({**target, **source})
    return tuple(notes)


def _fit_stem(source: dict[str, Tensor], target: Mapping[str, Tensor], stem: str | None) -> list[str]:
    """Makes the first convolution's weight fit, or drops it from ``source``; returns what was done."""
    if stem is None or stem not in source or source[stem].shape == target[stem].shape:
        return []
    there, here = source[stem].shape, target[stem].shape
    if len(there) == 4 and here[1] == 1 and (there[0], *there[2:]) == (here[0], *here[2:]):
        # A grey image repeated over the channels gives the same response (timm's convention).
        source[stem] = source[stem].sum(dim=1, keepdim=True)
        return [f"stem weights summed over {there[1]} input channels"]
    del source[stem]
    return [f"stem initialised afresh: {tuple(there)} in the checkpoint, {tuple(here)} here"]


def _fit_head(source: dict[str, Tensor], target: Mapping[str, Tensor], head: nn.Module, keep: bool) -> list[str]:
    """Keeps those head layers that fit as a whole, drops the others from ``source``; returns what was done.

    ``keep`` is False where the checkpoint's head means something else: class scores, for a net that predicts
    coordinates.
    """
    fresh: list[str] = []
    taken: set[str] = set()
    for path, module in head.named_modules(prefix="head"):
        if not isinstance(module, nn.Linear | nn.Conv2d):
            continue
        keys = [key for key in target if key.rpartition(".")[0] == path]
        if keep and all(key in source and source[key].shape == target[key].shape for key in keys):
            taken.update(keys)
        else:
            fresh.append(path)
    for key in [key for key in source if key.startswith("head.") and key not in taken]:
        del source[key]
    return [f"head initialised afresh: {', '.join(fresh)}"] if fresh else []


def _read(path: Path) -> Weights:
    if not path.is_file():
        raise FileNotFoundError(
            f"no checkpoint at {path}: pretrained takes True, False or the path of an existing file"
        )
    data = path.read_bytes()
    try:
        if path.suffix == ".safetensors":
            content: object = safetensors.torch.load(data)
        else:
            content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip and safetensors readers share no base class
        raise CheckpointError(f"{path} is not a readable checkpoint ({type(error).__name__}: {error})") from error
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise CheckpointError(f"{path} holds no state dict (a mapping from names to tensors)")
    source = f"weights from {path.name} (sha256 {hashlib.sha256(data).hexdigest()[:12]})"
    return Weights(content, source, own="normalise.mean" in content)
