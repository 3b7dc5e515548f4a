"""Text-guided edits by an instruct-pix2pix pipeline of diffusers (Brooks et al., CVPR 2023), local or from the hub.

Strength is a straight line between two instructions in the space of the text encoder: delta = 0 is "leave it as it is"
(by default the empty text), delta = 1 the instruction. The noise is the same for all strengths of an image.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from datasets.semantic import adapter
from datasets.semantic.store import image_hash
from datasets.semantic.transform import plain


@dataclass(frozen=True)
class TextConfig:
    """What to ask for and how.

    Args:
        instruction: the edit at delta = 1.
        rest: the instruction at delta = 0.
        steps: denoising steps.
        guidance: weight of the text, > 1.
        image_guidance: weight of the image, >= 1; higher keeps more of it.
        seed: of the noise; together with the image it fixes the noise.
    """

    instruction: str = "add warm bright sunlight"
    rest: str = ""
    steps: int = 20
    guidance: float = 7.5
    image_guidance: float = 1.5
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.instruction:
            raise ValueError("the instruction must not be empty: it is the edit at delta = 1")
        if self.steps < 1 or not self.guidance > 1 or not self.image_guidance >= 1:
            raise ValueError(
                "steps must be >= 1, guidance > 1 and image_guidance >= 1 (below, the pipeline switches guidance off), "
                f"got {self.steps}, {self.guidance}, {self.image_guidance}"
            )


class TextEdit:
    """Edits by an instruct-pix2pix pipeline, as a semantic transform.

    Args:
        path: folder written by `save_pretrained`, or "owner/name" on the hub.
        config: the instruction and its strength.
        revision: the pinned commit of a hub repository.
        device: where to run it.

    Raises:
        MissingData: neither a folder with a pipeline nor reachable on the hub.
        ImportError: transformers is not installed.
        ValueError: a hub repository without a pinned revision.
    """

    def __init__(
        self,
        path: str | Path,
        config: TextConfig | None = None,
        *,
        revision: str | None = None,
        device: str | torch.device = "cpu",
    ) -> None:
        self.config = config or TextConfig()
        self.source = {"path": Path(path).name if Path(path).is_dir() else str(path), "revision": revision}
        self.device = torch.device(device)
        self.pipeline = adapter.text_pipeline(path, revision, device)
        self._weights = self._hash()
        self._ends = torch.stack([self._encode(self.config.rest), self._encode(self.config.instruction)])

    @property
    def name(self) -> str:
        return "text edit"

    def describe(self) -> dict[str, Any]:
        return plain(
            {
                "kind": "text-guided",
                "name": self.name,
                "source": self.source,
                "weights": self._weights,
                "diffusers": adapter.version(),
                **asdict(self.config),
                "delta_1": f"the instruction {self.config.instruction!r}",
            }
        )

    @torch.no_grad()
    def edit(self, images: Tensor, index: Tensor, delta: Tensor) -> Tensor:
        """See `SemanticTransform.edit`. Raises ValueError for sides that the pipeline's autoencoder cannot take."""
        factor = int(self.pipeline.vae_scale_factor)
        if images.shape[1] != 3 or images.shape[2] % factor or images.shape[3] % factor:
            raise ValueError(
                f"this pipeline takes RGB images with sides divisible by {factor}, got {tuple(images.shape)}"
            )
        d = delta.to(self.device, self._ends.dtype)[:, None, None]
        embeds = self._ends[0] + d * (self._ends[1] - self._ends[0])
        generators = [self._generator(image) for image in images]
        out = self.pipeline(
            image=images.to(self.device),
            prompt_embeds=embeds,
            negative_prompt_embeds=self._ends[:1].expand(len(images), -1, -1).squeeze(1),
            num_inference_steps=self.config.steps,
            guidance_scale=self.config.guidance,
            image_guidance_scale=self.config.image_guidance,
            generator=generators,
            output_type="pt",
        ).images
        return out.to(images.device, images.dtype).clamp(0, 1)

    def _generator(self, image: Tensor) -> torch.Generator:
        """A fresh generator for one row: the noise is a function of the seed and the image, not of delta."""
        words = hashlib.sha256(f"{self.config.seed}:{image_hash(image)}".encode()).digest()
        return torch.Generator("cpu").manual_seed(int.from_bytes(words[:8], "little") >> 1)

    @torch.no_grad()
    def _encode(self, text: str) -> Tensor:
        """(tokens, width) embedding of a text."""
        tokenizer = self.pipeline.tokenizer
        tokens = tokenizer(
            text, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
        )
        embedded: Tensor = self.pipeline.text_encoder(tokens.input_ids.to(self.device))[0][0]
        return embedded

    def _hash(self) -> str:
        sha = hashlib.sha256()
        for part in ("text_encoder", "unet", "vae"):
            for name, tensor in sorted(getattr(self.pipeline, part).state_dict().items()):
                sha.update(f"{part}.{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
                sha.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return sha.hexdigest()
