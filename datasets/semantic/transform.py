"""What a semantic transform is, the checks that one behaves, and its random draws for a probabilistic certificate."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor

if TYPE_CHECKING:
    from datasets.semantic.store import EditStore

TOLERANCE = 1e-6  # how far a pixel may lie outside [0, 1], for rounding


@runtime_checkable
class SemanticTransform(Protocol):
    """A change of one attribute of an image by a strength delta in [0, 1] (a "semantic mutation").

    ``name`` is short and says what changes; ``describe()`` is JSON-able and states everything the result depends on
    besides image and delta: settings, generator, weights, and what delta = 1 means.
    """

    @property
    def name(self) -> str: ...

    def describe(self) -> dict[str, Any]: ...

    def edit(self, images: Tensor, index: Tensor, delta: Tensor) -> Tensor:
        """Images (B, C, H, W) in [0, 1] changed by `delta` (B,), same shape and range.

        `index` (B,) int64 says which image of the set the transform was made for each row is; transforms that work on
        the pixels alone do not look at it.
        """


def fingerprint(transform: SemanticTransform) -> str:
    """SHA-256 (hex) over `describe()`: changes with anything that changes the transform's images."""
    return hashlib.sha256(json.dumps(transform.describe(), sort_keys=True).encode()).hexdigest()


def law(transform: SemanticTransform) -> str:
    """The sentence a certificate over `Draws` states."""
    whole = transform.describe().get("delta_1", "the whole change")
    return f"{transform.name} with delta uniform on [0, 1], independent draws, 8-bit pixels; delta = 1 is {whole}"


def quantise(images: Tensor) -> Tensor:
    """uint8 of the same shape from floats in [0, 1], to the nearest."""
    return (images * 255).round().clamp(0, 255).to(torch.uint8)


def apply(transform: SemanticTransform, images: Tensor, index: Tensor | Sequence[int], delta: Tensor | float) -> Tensor:
    """`transform.edit` with everything checked: what goes in and what comes out.

    Args:
        transform: the transform.
        images: (B, C, H, W) float in [0, 1].
        index: (B,) positions of the images in the transform's set.
        delta: (B,) in [0, 1], or one number for all rows.

    Returns:
        (B, C, H, W) in [0, 1], of the dtype and on the device of `images`.

    Raises:
        ValueError: for images, index or delta of the wrong shape or range; and when the transform returns another
            shape, dtype or device, or pixels that are not finite or leave [0, 1].
    """
    if images.ndim != 4 or not images.is_floating_point() or not len(images):
        raise ValueError(f"expected float images (B, C, H, W), B >= 1, got {tuple(images.shape)} {images.dtype}")
    _in_range(images, "the images", "divide uint8 images by 255")
    rows = torch.as_tensor(index, dtype=torch.int64)
    strengths = torch.as_tensor(delta, dtype=images.dtype, device=images.device)
    strengths = strengths.expand(len(images)) if strengths.ndim == 0 else strengths
    for what, given in (("index", rows), ("delta", strengths)):
        if given.shape != images.shape[:1]:
            raise ValueError(
                f"{what} must have one entry for each of the {len(images)} images, got {tuple(given.shape)}"
            )
    if not bool(((strengths >= 0) & (strengths <= 1)).all()):
        raise ValueError(f"delta must lie in [0, 1], got {strengths.min().item():.4g} .. {strengths.max().item():.4g}")
    out = transform.edit(images, rows, strengths)
    if not isinstance(out, Tensor) or out.shape != images.shape:
        got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise ValueError(f"the transform {transform.name!r} returned {got} for images {tuple(images.shape)}")
    if out.dtype != images.dtype or out.device != images.device:
        raise ValueError(
            f"the transform {transform.name!r} returned {out.dtype} on {out.device} "
            f"for images {images.dtype} on {images.device}"
        )
    _in_range(out, f"what the transform {transform.name!r} returned", "clamp inside the transform")
    return out.clamp(0, 1)


class Draws:
    """Independent random draws of a semantic transform, one a row, as `certify.estimate` takes them.

    ``Draws(transform)(batch, generator=g)`` edits every row by its own delta, uniform on [0, 1], and rounds to 8 bits.
    With a `store` the edits are kept on disk and found there the next time, so that exactly the stored pixels are
    certified; without one the same pixels are made anew.

    Args:
        transform: the semantic transform.
        indices: for the i-th image that will be certified, its position in the transform's set; None means i itself.
        store: where images are kept.
        image: the one position all rows belong to; set by `for_image`.

    Raises ValueError when called for rows before `for_image` said which image they are.
    """

    def __init__(
        self,
        transform: SemanticTransform,
        *,
        indices: Sequence[int] | None = None,
        store: EditStore | None = None,
        image: int | None = None,
    ) -> None:
        if store is not None and store.fingerprint != fingerprint(transform):
            raise ValueError(f"the store at {store.folder} holds images of another transform than {transform.name!r}")
        self.transform = transform
        self.indices = None if indices is None else [int(i) for i in indices]
        self.store = store
        self.image = image
        self.law = law(transform)
        self.fingerprint = fingerprint(transform)

    def for_image(self, i: int) -> Draws:
        """The draws for the i-th image that is certified. Raises IndexError where `indices` is shorter than that."""
        if self.indices is not None and i >= len(self.indices):
            raise IndexError(
                f"image {i} of the batch has no entry among the {len(self.indices)} indices given to Draws"
            )
        position = i if self.indices is None else self.indices[i]
        return Draws(self.transform, store=self.store, image=position)

    def __call__(self, batch: Tensor, *, generator: torch.Generator) -> Tensor:
        if self.image is None:
            raise ValueError("which image is this? call for_image(i)(batch, generator=g) (certify.estimate does)")
        from datasets.semantic.store import deltas, image_hash

        stream = int(torch.randint(2**62, (1,), generator=generator, device=generator.device))
        # One image repeated, which is how certificates are sampled, is hashed, stored and encoded once.
        if not bool((batch == batch[:1]).all()):
            raise ValueError("all rows given to the draws for one image must be that image")
        if self.store is not None:
            pixels, _ = self.store.take(batch[0], self.image, stream, len(batch))
        else:
            strengths = deltas(stream, image_hash(batch[0]), len(batch))
            pixels = make(self.transform, batch[0], self.image, strengths)
        return pixels.to(batch.device).to(batch.dtype) / 255


def make_each(transform: SemanticTransform, images: Tensor, index: Sequence[int], delta: Tensor) -> Tensor:
    """uint8 (B, C, H, W): each image (B, C, H, W) edited by its own `delta` (B,), checked."""
    strengths = delta.to(images.device, images.dtype)
    return quantise(apply(transform, images, torch.as_tensor(index, dtype=torch.int64), strengths))


def make(transform: SemanticTransform, image: Tensor, index: int, delta: Tensor, *, batch: int = 64) -> Tensor:
    """uint8 (B, C, H, W): one image (C, H, W) edited by each `delta` (B,), `batch` at a time, checked."""
    parts = []
    for part in delta.to(image.device, image.dtype).split(batch):
        rows = image.expand(len(part), *image.shape)
        parts.append(quantise(apply(transform, rows, torch.full((len(part),), index), part)))
    return torch.cat(parts)


def plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """JSON-able settings, key order as given; tuples become lists."""
    return dict(json.loads(json.dumps(settings)))


def _in_range(images: Tensor, what: str, advice: str) -> None:
    low, high = (float(v) for v in torch.aminmax(images))
    if not (low >= -TOLERANCE and high <= 1 + TOLERANCE):
        raise ValueError(f"{what} span [{low:.4g}, {high:.4g}]; pixels must be finite and lie in [0, 1] ({advice})")
