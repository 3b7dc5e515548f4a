"""Training a DiffAE: v-prediction under the encoder's code, with a small supervised loss on the named coordinates."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from datasets.packs import Pack
from datasets.semantic import adapter
from datasets.semantic.diffae import DiffAE, DiffAEConfig, State
from datasets.semantic.measures import measure

Progress = Callable[[int, int, float], None]
"""Called as progress(step, steps, mean loss)."""


@dataclass(frozen=True)
class TrainingConfig:
    """How to train.

    Args:
        steps: optimiser steps.
        batch: images a step.
        lr: of Adam, warmed up over the first 5 % and brought down to zero along a half cosine.
        attribute_weight: of the supervised loss on the named coordinates of z, beside the diffusion loss.
        noise_power: noise levels are T * u ** noise_power, u uniform; below 1 favours high noise, where z matters.
        ema: decay of the averaged weights that are kept (shorter at first).
        flip: mirror half of the images.
        jitter: images are seen in light whose red over blue is changed by up to this many powers of two, so that the
            code has to say in which; attributes that are measured are measured afterwards.
        coarse: share of the steps that is done first, at half the resolution and a quarter of the cost; where colour
            and layout are learnt.
        precision: "float32", or "bfloat16" for autocast.
    """

    steps: int = 500
    batch: int = 16
    lr: float = 2e-3
    attribute_weight: float = 0.3
    noise_power: float = 0.4
    ema: float = 0.99
    flip: bool = True
    jitter: float = 1.0
    coarse: float = 0.8
    precision: str = "float32"

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch < 2:
            raise ValueError(f"steps must be >= 1 and batch >= 2, got {self.steps} and {self.batch}")
        if not (self.lr > 0 and self.attribute_weight >= 0 and self.noise_power > 0 and 0 <= self.ema < 1):
            raise ValueError(
                "lr and noise_power must be positive, attribute_weight >= 0, ema in [0, 1), got "
                f"{self.lr}, {self.noise_power}, {self.attribute_weight}, {self.ema}"
            )
        if not (self.jitter >= 0 and 0 <= self.coarse <= 1):
            raise ValueError(f"jitter must be >= 0 and coarse in [0, 1], got {self.jitter} and {self.coarse}")
        if self.precision not in ("float32", "bfloat16"):
            raise ValueError(f"precision must be 'float32' or 'bfloat16', got {self.precision!r}")


def train(
    pack: Pack,
    config: DiffAEConfig | None = None,
    training: TrainingConfig | None = None,
    *,
    attributes: Mapping[str, Tensor] | None = None,
    seed: int = 0,
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
) -> DiffAE:
    """Train a DiffAE on the images of a pack.

    Args:
        pack: RGB images of `config.image_size`.
        config: architecture.
        training: settings.
        attributes: name -> values (N,) for attributes that are known; the others in `config.attributes` are measured
            on the images (`datasets.semantic.measures`).
        seed: of weights, order, noise.
        device: where to train.
        progress: called every 20 steps and after the last.

    Returns:
        The averaged weights, in state TRAINED.

    Raises:
        ValueError: images that do not fit the configuration, unknown or constant attributes, values of another length.
        FloatingPointError: the loss is not finite.
    """
    config, training = config or DiffAEConfig(), training or TrainingConfig()
    if pack.image_shape != (3, config.image_size, config.image_size):
        raise ValueError(
            f"{pack.name} has images {pack.image_shape}, the DiffAE takes (3, {config.image_size}, {config.image_size})"
        )
    values = attribute_values(pack, config.attributes, attributes)
    mean, deviation = values.mean(0), values.std(0)
    if bool((deviation < 1e-6).any()):
        flat = [name for name, d in zip(config.attributes, deviation.tolist()) if d < 1e-6]
        raise ValueError(f"{', '.join(flat)} is the same for all images of {pack.name}: there is nothing to learn from")
    model = DiffAE(config, seed=seed).to(device)
    model.scaling.copy_(torch.stack([mean, deviation], 1))
    averaged = copy.deepcopy(model).requires_grad_(False)
    targets = ((values - mean) / deviation).to(device)
    meters = [None if attributes and name in attributes else measure(name) for name in config.attributes]
    images = pack.images.to(device)
    coarse_steps = round(training.coarse * training.steps)
    alphas = adapter.schedules(config.steps).decode.alphas_cumprod.to(device)
    optimiser = torch.optim.Adam(model.parameters(), lr=training.lr)
    warm = max(1, training.steps // 20)
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimiser,
        lambda s: min((s + 1) / warm, 0.5 * (1 + torch.cos(torch.tensor(torch.pi * s / training.steps)).item())),
    )
    generator = torch.Generator(device=device).manual_seed(seed)
    model.train()
    recent = torch.zeros((), device=device)
    for step in range(training.steps):
        pick = torch.randint(len(images), (training.batch,), generator=generator, device=device)
        x = images[pick].permute(0, 3, 1, 2).float() / 255
        if training.flip:
            mirrored = torch.rand(training.batch, 1, 1, 1, generator=generator, device=device) < 0.5
            x = torch.where(mirrored, x.flip(3), x)
        if training.jitter:
            x = _relit(x, training.jitter * (2 * torch.rand(training.batch, generator=generator, device=device) - 1))
        if step < coarse_steps:
            x = functional.avg_pool2d(x, 2)
        told = [targets[pick, k] if m is None else _standard(m(x), model.scaling[k]) for k, m in enumerate(meters)]
        u = torch.rand(training.batch, generator=generator, device=device)
        t = (adapter.STEPS * u**training.noise_power).long().clamp_max(adapter.STEPS - 1)
        noise = torch.randn(x.shape, generator=generator, device=device)
        a = alphas[t][:, None, None, None]
        clean = 2 * x - 1
        noisy, wanted = a.sqrt() * clean + (1 - a).sqrt() * noise, a.sqrt() * noise - (1 - a).sqrt() * clean
        with torch.autocast(x.device.type, torch.bfloat16, enabled=training.precision == "bfloat16"):
            z = model.encoder(x)  # not encode(), which insists on the full resolution
            predicted = model.velocity(noisy, t, z)
        named = z[:, : len(config.attributes)].float()
        loss = functional.mse_loss(predicted.float(), wanted)
        loss = loss + training.attribute_weight * functional.mse_loss(named, torch.stack(told, 1))
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        rate.step()
        _average(averaged, model, min(training.ema, (1 + step) / (10 + step)))
        recent = loss.detach() if step == 0 else 0.95 * recent + 0.05 * loss.detach()
        if (step + 1) % 20 == 0 or step + 1 == training.steps:
            shown = float(recent)
            if not shown < float("inf"):
                raise FloatingPointError(f"the loss is {shown} after {step + 1} steps; lower lr ({training.lr:g})")
            if progress is not None:
                progress(step + 1, training.steps, shown)
    averaged.training_record = {
        "data": pack.name,
        "split": pack.split,
        "images": len(pack),
        "fingerprint": pack.fingerprint,
        "seed": seed,
        "loss": float(recent),
        **asdict(training),
    }
    averaged.state = State.TRAINED
    return averaged.eval()


def attribute_values(pack: Pack, names: tuple[str, ...], known: Mapping[str, Tensor] | None = None) -> Tensor:
    """(N, A) float32: the values of the attributes, known or measured on the images. Raises ValueError as `train`."""
    columns = []
    for name in names:
        if known is not None and name in known:
            values: Any = torch.as_tensor(known[name], dtype=torch.float32)
            if values.shape != (len(pack),):
                raise ValueError(
                    f"{name} needs one value for each of the {len(pack)} images, got {tuple(values.shape)}"
                )
        else:
            meter = measure(name)
            parts = torch.arange(len(pack)).split(256)
            values = torch.cat([meter(pack.tensors(part)[0]).cpu() for part in parts])
        columns.append(values)
    return torch.stack(columns, 1)


def _relit(images: Tensor, power: Tensor) -> Tensor:
    """Images (B, 3, H, W) in light whose red over blue is 2 ** power (B,) times what it was."""
    gains = torch.stack([2 ** (power / 2), torch.ones_like(power), 2 ** (-power / 2)], 1)
    return (images * gains[:, :, None, None]).clamp(0, 1)


def _standard(values: Tensor, scaling: Tensor) -> Tensor:
    return (values - scaling[0]) / scaling[1]


@torch.no_grad()
def _average(averaged: DiffAE, model: DiffAE, decay: float) -> None:
    own = dict(averaged.named_parameters())
    torch._foreach_lerp_([*own.values()], [p.detach() for p in model.parameters()], 1 - decay)
