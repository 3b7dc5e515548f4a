"""The only importer of diffusers (and of huggingface_hub): networks, schedules and pipelines from there, nothing else.

Pitfalls that are settled here, seen with diffusers 0.42: `clip_sample` defaults to True in both schedulers and breaks
inversion; a class embedding "projection" is accepted by UNet2DModel and fails in its forward pass; under "identity" an
embedding of another width than 4 * channels[0] may broadcast silently, so the width is checked by `conditional_unet`'s
caller; the inverse scheduler takes neither `linspace` spacing nor prediction type "sample".
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from datasets.errors import MissingData

STEPS = 1000
"""Noise levels the model is trained on."""


class Schedules(NamedTuple):
    """Deterministic samplers of one noise schedule: `decode` steps down in noise, `invert` up."""

    decode: Any
    invert: Any


def version() -> str:
    """The version of diffusers, for records."""
    import diffusers

    return str(diffusers.__version__)


def conditional_unet(image_size: int, channels: tuple[int, ...], layers: int, attention: bool) -> nn.Module:
    """A `UNet2DModel` RGB -> RGB that is conditioned on a vector of width 4 * channels[0] beside the noise level.

    Call it as ``unet(x, t, class_labels=z).sample``. With `attention` the two coarsest levels attend to themselves.
    """
    from diffusers import UNet2DModel

    n = len(channels)
    attending = [attention and k >= n - 2 for k in range(n)]
    unet: Any = UNet2DModel(
        sample_size=image_size,
        in_channels=3,
        out_channels=3,
        layers_per_block=layers,
        block_out_channels=channels,
        down_block_types=tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in attending),
        up_block_types=tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attending)),
        add_attention=attention,
        norm_num_groups=8,
        class_embed_type="identity",
    )
    module: nn.Module = unet
    return module


def schedules(steps: int) -> Schedules:
    """Cosine schedule with v-prediction; decoding and inversion in `steps` DDIM steps (Song et al., 2021)."""
    from diffusers import DDIMInverseScheduler, DDIMScheduler

    decode: Any = DDIMScheduler(
        num_train_timesteps=STEPS,
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        clip_sample=False,
        timestep_spacing="leading",
    )
    invert: Any = DDIMInverseScheduler.from_config(decode.config)
    if invert.config.clip_sample or invert.config.prediction_type != "v_prediction":
        raise RuntimeError(
            f"diffusers {version()} made an inverse scheduler with other settings than its forward one; "
            "inversion would not undo decoding. Use a version between 0.36 and 0.42"
        )
    decode.set_timesteps(steps)
    invert.set_timesteps(steps)
    return Schedules(decode, invert)


def text_pipeline(path: str | Path, revision: str | None, device: str | torch.device) -> Any:
    """An instruct-pix2pix pipeline from a local folder, or from the hub at a pinned `revision`; see `fetch`.

    Raises:
        MissingData: no such folder, not reachable, or the folder holds no such pipeline.
        ImportError: the package transformers, which the pipeline's text encoder comes from, is not installed.
    """
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "text-guided editing needs the package transformers for its text encoder: pip install transformers, or use "
            "a DiffAE, a photometric transform or rendered scenes"
        ) from error
    from diffusers import StableDiffusionInstructPix2PixPipeline

    folder = fetch(path, revision)
    if not (folder / "model_index.json").is_file():
        raise MissingData(f"{folder}: no model_index.json, so no diffusers pipeline; save one with save_pretrained")
    pipeline = StableDiffusionInstructPix2PixPipeline.from_pretrained(
        folder, safety_checker=None, requires_safety_checker=False, local_files_only=True
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def fetch(path: str | Path, revision: str | None) -> Path:
    """`path` if it is a local folder, else the snapshot of that hub repository at `revision`.

    Args:
        path: a folder, or "owner/name" on the Hugging Face hub.
        revision: the commit (40 hex digits) of the hub repository; None for a folder.

    Raises:
        ValueError: a hub repository without a pinned commit: a branch may change under a record.
        MissingData: neither a folder nor reachable on the hub.
    """
    local = Path(path).expanduser()
    if local.is_dir():
        return local
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)):
        raise MissingData(f"{path}: no such folder; give a folder, or owner/name of a hub repository and its revision")
    if revision is None or not re.fullmatch(r"[0-9a-f]{40}", revision):
        raise ValueError(
            f"{path} is no folder here; from the hub it needs a pinned revision, the 40 hex digits of a commit, got "
            f"{revision!r}"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(path), revision=revision))
    except Exception as error:  # the hub's client raises its own, requests' and OS errors, depending on what failed
        raise MissingData(
            f"{path} at {revision[:12]}: neither in the hub's local cache nor to be had from the hub "
            f"({type(error).__name__}: {error}); download it where there is a network and give the folder"
        ) from error
