"""A diffusion autoencoder (Preechakul et al., CVPR 2022) from diffusers' parts, small enough to train where you are.

An encoder gives each image a semantic code z; a diffusion model conditioned on z decodes. Deterministic DDIM inversion
under z finds the noise that decodes to the very image, which holds all that z does not. An edit decodes that noise
under z + delta * s. The first coordinates of z are tied to named attributes by a small supervised loss, without which a
small decoder may learn to ignore z.

A generator is UNTRAINED, TRAINED or ACCEPTED. Only an accepted one makes edits (`datasets.semantic.acceptance`).
"""

from __future__ import annotations

import enum
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from datasets.errors import CorruptData, MissingData
from datasets.semantic import adapter

FORMAT = 1


class State(enum.IntEnum):
    """How far a generator is. Each needs the one before; training again goes back to TRAINED."""

    UNTRAINED = 0
    TRAINED = 1
    ACCEPTED = 2


class NotAccepted(RuntimeError):
    """A generator was asked for edits before its edits were shown to be what they claim to be."""


@dataclass(frozen=True)
class DiffAEConfig:
    """Architecture.

    Args:
        image_size: pixels a side; divisible by 2 ** (len(channels) - 1).
        channels: of the UNet, finest level first; multiples of 8. The code z has 4 * channels[0] coordinates.
        layers: residual blocks a level.
        attention: self-attention at the two coarsest levels.
        encoder_channels: of the encoder's stride-2 convolutions; multiples of 8.
        attributes: names of the attributes that the first coordinates of z carry.
        steps: DDIM steps of inversion and of decoding.
    """

    image_size: int = 64
    channels: tuple[int, ...] = (16, 32, 48, 64)
    layers: int = 1
    attention: bool = False
    encoder_channels: tuple[int, ...] = (16, 32, 64)
    attributes: tuple[str, ...] = ("warmth",)
    steps: int = 20

    def __post_init__(self) -> None:
        for what, widths in (("channels", self.channels), ("encoder_channels", self.encoder_channels)):
            if not widths or any(w < 8 or w % 8 for w in widths):
                raise ValueError(f"{what} must be positive multiples of 8, got {widths}")
        if self.image_size < 8 or self.image_size % 2 ** (len(self.channels) - 1):
            raise ValueError(
                f"image_size {self.image_size} must be at least 8 and divisible by {2 ** (len(self.channels) - 1)} for "
                f"{len(self.channels)} levels"
            )
        if self.layers < 1 or not 2 <= self.steps <= adapter.STEPS:
            raise ValueError(f"layers must be >= 1 and steps 2 to {adapter.STEPS}, got {self.layers} and {self.steps}")
        if not self.attributes or len(set(self.attributes)) != len(self.attributes):
            raise ValueError(f"attributes must be distinct names, at least one, got {self.attributes}")
        if len(self.attributes) >= self.latent:
            raise ValueError(f"{len(self.attributes)} attributes do not fit into a code of {self.latent}")

    @property
    def latent(self) -> int:
        """Coordinates of z: what diffusers' UNet adds to its embedding of the noise level, 4 * channels[0]."""
        return 4 * self.channels[0]


class SemanticEncoder(nn.Module):
    """Images (B, 3, H, W) in [0, 1] to codes (B, latent): attributes first, the rest normalised to unit scale.

    The means and deviations of the pixels enter beside the convolutions' features, whose group norms would hide them.
    """

    def __init__(self, config: DiffAEConfig) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        width = 3
        for out in config.encoder_channels:
            layers += [nn.Conv2d(width, out, 3, 2, 1), nn.GroupNorm(8, out), nn.SiLU()]
            width = out
        self.features = nn.Sequential(*layers)
        self.attributes = len(config.attributes)
        self.head = nn.Sequential(
            nn.Linear(width + 6, 2 * config.latent), nn.SiLU(), nn.Linear(2 * config.latent, config.latent)
        )

    def forward(self, images: Tensor) -> Tensor:
        x = 2 * images - 1
        statistics = torch.cat([x.mean((2, 3)), x.std((2, 3))], 1)
        z = self.head(torch.cat([self.features(x).mean((2, 3)), 2 * statistics], 1))
        named, rest = z[:, : self.attributes], z[:, self.attributes :]
        return torch.cat([named, functional.layer_norm(rest, rest.shape[1:])], 1)


class DiffAE(nn.Module):
    """Encoder, conditional UNet and DDIM steps; everything an edit needs, and whether it may be used.

    Attributes: `config`; `state`; `edit_record`, the accepted direction and its report (a JSON-able dict) or None;
    `training_record`, how it was trained; `scaling` (A, 2), mean and deviation of the attributes it was trained on.
    """

    scaling: Tensor
    direction: Tensor

    def __init__(self, config: DiffAEConfig, *, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.encoder = SemanticEncoder(config)
            self.unet = adapter.conditional_unet(config.image_size, config.channels, config.layers, config.attention)
        self.register_buffer("scaling", torch.tensor([[0.0, 1.0]] * len(config.attributes)))
        self.register_buffer("direction", torch.zeros(config.latent))
        self.state = State.UNTRAINED
        self.training_record: dict[str, Any] = {}
        self.edit_record: dict[str, Any] | None = None

    def require(self, state: State) -> None:
        """Raise NotAccepted unless the generator is at least in `state`."""
        if self.state >= state:
            return
        needed = {
            State.TRAINED: "train it (semantic.train) or load trained weights (semantic.load)",
            State.ACCEPTED: "show that its edits move the attribute and keep the rest (semantic.accept)",
        }[state]
        raise NotAccepted(
            f"this DiffAE is {self.state.name.lower()}, expected at least {state.name.lower()}: {needed}. "
            "Nothing is used in its place"
        )

    def encode(self, images: Tensor) -> Tensor:
        """Codes (B, latent) of images (B, 3, S, S) in [0, 1]."""
        self._check(images)
        z: Tensor = self.encoder(images)
        return z

    def velocity(self, noisy: Tensor, t: Tensor, z: Tensor) -> Tensor:
        """v-prediction for noisy images (B, 3, S, S) in about [-1, 1], noise levels t and codes z (B, latent)."""
        if z.shape != (len(noisy), self.config.latent):
            raise ValueError(f"codes must be ({len(noisy)}, {self.config.latent}), got {tuple(z.shape)}")
        v: Tensor = self.unet(noisy, t, class_labels=z).sample
        return v

    @torch.no_grad()
    def invert(self, images: Tensor, z: Tensor, steps: int | None = None) -> Tensor:
        """The noise (B, 3, S, S) from which `decode` gives the images back, under their codes z."""
        self._check(images)
        up = adapter.schedules(steps or self.config.steps).invert
        x = 2 * images - 1
        for t in up.timesteps:
            x = up.step(self.velocity(x, t.to(x.device), z), t, x).prev_sample
        return x

    @torch.no_grad()
    def decode(self, noise: Tensor, z: Tensor, steps: int | None = None) -> Tensor:
        """Images (B, 3, S, S) in [0, 1] from noise and codes; deterministic."""
        down = adapter.schedules(steps or self.config.steps).decode
        x = noise
        for t in down.timesteps:
            x = down.step(self.velocity(x, t.to(x.device), z), t, x, eta=0.0).prev_sample
        return ((x + 1) / 2).clamp(0, 1)

    def weights_hash(self) -> str:
        """SHA-256 (hex) over all weights, the direction included."""
        sha = hashlib.sha256()
        for name, tensor in sorted(self.state_dict().items()):
            sha.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
            sha.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return sha.hexdigest()

    def save(self, path: str | Path) -> None:
        """Write `path`.safetensors and `path`.json (configuration, state, records, hash of the weights), atomically."""
        weights, stated = _files(path)
        weights.parent.mkdir(parents=True, exist_ok=True)
        record = {
            "format": FORMAT,
            "config": asdict(self.config),
            "state": self.state.name,
            "weights": self.weights_hash(),
            "training": self.training_record,
            "edit": self.edit_record,
            "diffusers": adapter.version(),
        }
        temporary = weights.with_name(f".{weights.name}.{os.getpid()}.tmp")
        try:
            save_file({k: v.detach().cpu().contiguous() for k, v in self.state_dict().items()}, temporary)
            os.replace(temporary, weights)
            temporary.write_text(json.dumps(record, indent=1))
            os.replace(temporary, stated)
        finally:
            temporary.unlink(missing_ok=True)

    def _check(self, images: Tensor) -> None:
        side = self.config.image_size
        if images.ndim != 4 or images.shape[1:] != (3, side, side) or not images.is_floating_point():
            raise ValueError(
                f"this DiffAE takes float images (B, 3, {side}, {side}), got {tuple(images.shape)} {images.dtype}"
            )


def load(path: str | Path, *, revision: str | None = None, device: str | torch.device = "cpu") -> DiffAE:
    """A DiffAE written by `DiffAE.save`: yours, or one from the hub.

    Args:
        path: the path given to `save`, or "owner/name" of a hub repository that holds diffae.safetensors and
            diffae.json.
        revision: the pinned commit of the hub repository.
        device: where to put it.

    Raises:
        MissingData: no such files, or the hub cannot be reached.
        CorruptData: unreadable files, weights that do not fit the configuration, or are not the ones that were saved
            (an accepted state belongs to exactly one set of weights).
        ValueError: a hub repository without a pinned revision.
    """
    weights, stated = _files(path)
    if not stated.is_file():
        weights, stated = _files(adapter.fetch(path, revision) / "diffae")
    if absent := [str(f) for f in (stated, weights) if not f.is_file()]:
        raise MissingData(
            f"no DiffAE there: {' and '.join(absent)} missing; train one with python -m datasets.semantic"
        )
    try:
        record: Mapping[str, Any] = json.loads(stated.read_text())
        settings = dict(record["config"])
        for key in ("channels", "encoder_channels", "attributes"):
            settings[key] = tuple(settings[key])
        model = DiffAE(DiffAEConfig(**settings))
        model.load_state_dict(load_file(weights))
        state = State[record["state"]]
    except (json.JSONDecodeError, KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        raise CorruptData(f"{stated}: not a DiffAE that can be loaded ({type(error).__name__}: {error})") from error
    if model.weights_hash() != record["weights"]:
        raise CorruptData(
            f"{weights}: not the weights {stated.name} was written with; what it says of them (state "
            f"{state.name.lower()}) is worth nothing for these. Save both together"
        )
    model.state = state
    model.training_record, model.edit_record = dict(record["training"]), record["edit"]
    return model.to(device).eval()


def _files(path: str | Path) -> tuple[Path, Path]:
    path = Path(path).expanduser()
    return path.with_name(path.name + ".safetensors"), path.with_name(path.name + ".json")
