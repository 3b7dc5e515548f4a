"""Exact semantic edits: the same rendered scene with another value of an attribute."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from datasets import rendered, scenes
from datasets.packs import Pack
from datasets.semantic.transform import plain, quantise


class SceneEdit:
    """Raises one attribute of rendered scenes by delta * `span`; all else, down to the noise, stays as it was.

    At delta = 0 the result is the image itself, byte for byte. Computed by rendering, so there is no model, no
    reconstruction error and no other attribute that moves along: the reference for learnt edits.

    Args:
        pack: images of "scenes_flowers" or "scenes_faces"; subsets keep their scenes.
        attribute: "sun" or "warmth" of flowers, "smile" or "warmth" of faces.
        span: the change at delta = 1; the most that keeps every scene in range if None (0.5).

    Raises:
        ValueError: for a pack that is not rendered scenes, an unknown attribute, or a span that leaves [0, 1].
    """

    def __init__(self, pack: Pack, attribute: str, span: float | None = None) -> None:
        kind = pack.meta.get("family")
        if kind not in scenes.FAMILIES or "index" not in pack.extras:
            raise ValueError(
                f"{pack.name} is not a set of rendered scenes, so there is nothing to render again; exact edits are "
                "for scenes_flowers and scenes_faces, other images need a photometric transform or a DiffAE"
            )
        self.family = scenes.family(kind)
        self.family.check_attribute(attribute)
        self.attribute = attribute
        room = 1 - self.family.attributes[attribute][1]
        self.span = room if span is None else float(span)
        if not 0 < self.span <= room:
            raise ValueError(
                f"span must lie in (0, {room:g}] so that {attribute} of every scene stays in [0, 1], got {span}"
            )
        self.pack = pack
        self._index = pack.extras["index"].tolist()
        self._split, self._seed, self._classes = pack.split, int(pack.meta["seed"]), len(pack.classes)

    @property
    def name(self) -> str:
        return f"{self.family.name} {self.attribute}"

    def describe(self) -> dict[str, Any]:
        return plain(
            {
                "kind": "rendered",
                "name": self.name,
                "span": self.span,
                "data": {"name": self.pack.name, "split": self._split, "seed": self._seed, "classes": self._classes},
                "renderer": rendered.scenes_code(),
                "delta_1": f"{self.attribute} raised by {self.span:g} of its range",
            }
        )

    def scene(self, position: int) -> scenes.Scene:
        """The scene of the image at `position` in the pack. Raises IndexError outside of it."""
        if not 0 <= position < len(self._index):
            raise IndexError(f"{self.pack.name}: no image {position}, the pack has {len(self._index)}")
        return self.family.sample(self._seed, self._split, self._index[position], self._classes)

    def edit(self, images: Tensor, index: Tensor, delta: Tensor) -> Tensor:
        """See `SemanticTransform.edit`. Raises ValueError where a row is not the image its index says it is."""
        pixels = quantise(images)
        out = torch.empty_like(pixels)
        strengths = delta.detach().cpu().numpy().astype(np.float64)
        rows = index.cpu().numpy()
        stored = self.pack.images
        for position in np.unique(rows):
            scene = self.scene(int(position))
            at = np.flatnonzero(rows == position)
            original = stored[position].permute(2, 0, 1).to(pixels.device)
            if pixels.shape[1:] != original.shape or not bool((pixels[at] == original).all()):
                raise ValueError(
                    f"the images are not number {position} of {self.pack.name} ({self._split}): give each row the "
                    "position it has in the pack the edit was made for"
                )
            values = getattr(scene, self.attribute) + self.span * strengths[at]
            drawn = self.family.edit(scene, int(original.shape[-1]), {self.attribute: np.clip(values, 0, 1)})
            out[at] = torch.from_numpy(drawn).permute(0, 3, 1, 2).to(pixels.device)
        return out.to(images.dtype) / 255
