"""Edits by an accepted DiffAE: the image's own noise, decoded under z + delta * s."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor

from datasets.semantic.diffae import DiffAE, NotAccepted, State
from datasets.semantic.store import image_hash
from datasets.semantic.transform import plain

_REMEMBERED = 64  # images whose code and noise are kept; inverting one costs as much as decoding one edit


class DiffAEEdit:
    """G(z + delta * s) of an accepted generator, as a semantic transform.

    At delta = 0 this is the generator's reconstruction, not the image itself (the acceptance report has its PSNR): as
    in the paper, both the transformed images and the untransformed end of the path come from the decoder.

    Raises NotAccepted for a generator that is not accepted, when made and whenever it is used.
    """

    def __init__(self, model: DiffAE) -> None:
        model.require(State.ACCEPTED)
        self.model = model
        self._weights = model.weights_hash()
        if self._weights != self.record["weights"]:
            raise NotAccepted("the weights were changed after the generator was accepted; accept it again")
        self._codes: OrderedDict[str, tuple[Tensor, Tensor]] = OrderedDict()

    @property
    def record(self) -> dict[str, Any]:
        """The acceptance's criteria and report."""
        assert self.model.edit_record is not None  # require(ACCEPTED) has passed
        return self.model.edit_record

    @property
    def name(self) -> str:
        return f"diffae {self.record['criteria']['attribute']}"

    def describe(self) -> dict[str, Any]:
        self.model.require(State.ACCEPTED)
        criteria, report = self.record["criteria"], self.record["report"]
        return plain(
            {
                "kind": "diffae",
                "name": self.name,
                "weights": self._weights,
                "steps": self.model.config.steps,
                "acceptance": self.record,
                "delta_1": f"{criteria['attribute']} up by {report['moved']:.3g} on average",
            }
        )

    @torch.no_grad()
    def edit(self, images: Tensor, index: Tensor, delta: Tensor) -> Tensor:
        """See `SemanticTransform.edit`; works on the model's device."""
        self.model.require(State.ACCEPTED)
        where = self.model.direction.device
        z, noise = self._coded(images.to(where, torch.float32))
        moved = z + delta.to(where, torch.float32)[:, None] * self.model.direction
        return self.model.decode(noise, moved).to(images.device, images.dtype)

    def _coded(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Codes and noises of images, each different one inverted once."""
        if len(images) > 1 and bool((images == images[:1]).all()):
            z, noise = self._coded(images[:1])
            return z.expand(len(images), -1), noise.expand(len(images), -1, -1, -1)
        keys = [image_hash(image) for image in images]
        new = {key: i for i, key in enumerate(keys) if key not in self._codes}
        found = {key: self._codes[key] for key in keys if key not in new}
        if new:
            originals = images[list(new.values())]
            z = self.model.encode(originals)
            noise = self.model.invert(originals, z)
            found |= {key: (z[k : k + 1], noise[k : k + 1]) for k, key in enumerate(new)}
        self._codes.update(found)
        while len(self._codes) > _REMEMBERED:
            self._codes.popitem(last=False)
        return torch.cat([found[key][0] for key in keys]), torch.cat([found[key][1] for key in keys])
