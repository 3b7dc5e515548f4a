"""What a transform must be, and the checks that it is: a certificate speaks of independent draws only."""

from __future__ import annotations

import hashlib
import inspect
import json
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from certify.perturbations import Perturbation

TOLERANCE = 1e-6  # how far a pixel may lie outside [0, 1], for rounding
_PROBES = 16


class Transform(Protocol):
    """Draws one transformed version of every row of a batch, independently, from `generator` alone.

    Rows (B, C, H, W) in [0, 1] to the same shape and range. `certify.estimate` passes one image
    expanded to B rows: read it, and return new memory.
    Three attributes are used when they are there: ``law`` (a sentence on the distribution), ``fingerprint`` (a string
    that changes with anything that changes the draws, such as weights), and ``for_image(i)``, which returns the
    transform for image `i` of the batch that is being certified.
    """

    def __call__(self, batch: Tensor, *, generator: torch.Generator) -> Tensor: ...


@runtime_checkable
class PerImage(Protocol):
    """A transform that differs from image to image, such as one that knows the latent code of each."""

    def for_image(self, i: int) -> Transform: ...


class Uniform:
    """Uniform draws from a `certify.Perturbation`, as a transform; `x` (N, C, H, W) are the images it will be given."""

    def __init__(self, perturbation: Perturbation, x: Tensor) -> None:
        perturbation.check(x)
        self.perturbation = perturbation
        self.x = x
        self.law = f"uniform on {perturbation.describe()}"
        self.fingerprint = self.law

    def __call__(self, batch: Tensor, *, generator: torch.Generator) -> Tensor:
        return self.perturbation.sample(batch, 1, generator)[0]

    def for_image(self, i: int) -> Uniform:
        """This transform with the radius of image `i`, where radii are given an image each."""
        selected = self.perturbation.select(torch.tensor([i]), len(self.x))
        one = self if selected is self.perturbation else Uniform(selected, self.x[i : i + 1])
        return one


def for_image(transform: Transform, i: int) -> Transform:
    """The transform for image `i`: the same one, unless it is a `PerImage`."""
    return transform.for_image(i) if isinstance(transform, PerImage) else transform


def name_of(transform: Transform) -> str:
    """The qualified name of a transform: of the function, or of the class of an object."""
    target = transform if inspect.isroutine(transform) else type(transform)
    return f"{target.__module__}.{target.__qualname__}"


def law_of(transform: Transform, law: str | None) -> str:
    """The stated law of the transform's draws, or a sentence that none was stated."""
    return law or str(getattr(transform, "law", "")) or f"not stated: whatever {name_of(transform)} draws"


def accepts_generator(transform: Transform) -> None:
    """Raise TypeError unless `transform` takes a batch and ``generator=`` and needs nothing else."""
    target = transform.forward if isinstance(transform, nn.Module) else transform
    if not callable(target):
        raise TypeError(f"a transform must be callable as transform(batch, generator=g), got {type(transform)}")
    try:
        signature = inspect.signature(target)
    except (TypeError, ValueError):
        return  # built in: found out when it is called
    try:
        signature.bind(None, generator=None)
    except TypeError as error:
        raise TypeError(
            f"{name_of(transform)}{signature} cannot be called as transform(batch, generator=g): {error}. Draw every "
            "random number from the torch.Generator it is given, so that certificates can be reproduced"
        ) from None


def seed_for(seed: int, image: str, first: int) -> int:
    """The generator's seed for the block that starts at draw `first` of the image with this sha256."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{image}:{first}".encode()).digest()[:8], "little") >> 1


def hash_image(image: Tensor) -> str:
    """sha256 over shape, dtype and pixels: draws follow the image, not its place in a batch."""
    head = f"{tuple(image.shape)}{image.dtype}".encode()
    return hashlib.sha256(head + image.detach().cpu().contiguous().numpy().tobytes()).hexdigest()


def check_drawn(drawn: Tensor, rows: Tensor, transform: Transform) -> None:
    """Raise ValueError unless `drawn` has the shape, dtype and device of the `rows` it was drawn for."""
    if not isinstance(drawn, Tensor) or drawn.shape != rows.shape:
        got = tuple(drawn.shape) if isinstance(drawn, Tensor) else type(drawn).__name__
        raise ValueError(
            f"{name_of(transform)} returned {got} for a batch {tuple(rows.shape)}; it must return one image a row"
        )
    if drawn.dtype != rows.dtype or drawn.device != rows.device:
        raise ValueError(
            f"{name_of(transform)} returned {drawn.dtype} on {drawn.device} for {rows.dtype} on {rows.device}"
        )


def check_range(drawn: Tensor, transform: Transform) -> None:
    """Raise ValueError unless the pixels of `drawn` are finite and lie in [0, 1]."""
    low, high = (float(v) for v in torch.aminmax(drawn))
    if not (low >= -TOLERANCE and high <= 1 + TOLERANCE):
        raise ValueError(
            f"{name_of(transform)} returned pixels in [{low:.4g}, {high:.4g}]; transformed images must be finite and "
            "lie in [0, 1] (clamp inside the transform: clipping is part of what is certified)"
        )


def probe(transform: Transform, image: Tensor, generator: torch.Generator, seed: int) -> Tensor:
    """A few draws for `image` (C, H, W), after checking that they come from the generator and differ between rows.

    Raises:
        ValueError: when the same generator state gives other images (randomness from elsewhere), or all rows of a batch
            share one draw (such draws are not independent and no bound here would hold).
    """
    rows = image.expand(_PROBES, *image.shape)
    first = seed_for(seed, "probe", 0)
    draws = []
    for state in (first, first, first ^ 1):
        draws.append(transform(rows, generator=generator.manual_seed(state)))
        check_drawn(draws[-1], rows, transform)
        check_range(draws[-1], transform)
    once, again, other = draws
    if not torch.allclose(once, again, rtol=0, atol=1e-4):
        raise ValueError(
            f"{name_of(transform)} gave different images for the same generator state; it draws from another source of "
            "randomness (torch's global one, random, numpy) or keeps state, and its certificate could not be repeated"
        )
    if bool((once == once[0]).all()) and bool((other == other[0]).all()) and not torch.equal(once[0], other[0]):
        raise ValueError(
            f"{name_of(transform)} makes one draw for a whole batch: every row came out alike, and another generator "
            "state changed them all. Draw once a row, for instance torch.rand(len(batch), 1, 1, 1, generator=generator)"
        )
    return once


def fingerprint(images: str, seed: int, batch: int, transform: Transform, law: str, draws: Tensor) -> str:
    """sha256 over what fixes the sample: see `Estimate.fingerprint`."""
    stated = {
        "images": images,
        "seed": seed,
        "batch": batch,
        "law": law,
        "transform": name_of(transform),
        "own": str(getattr(transform, "fingerprint", "")),
        "draws": hash_image(draws),
    }
    return hashlib.sha256(json.dumps(stated, sort_keys=True).encode()).hexdigest()
