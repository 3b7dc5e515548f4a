"""Perturbed copies of a batch: independent draws, or antithetic pairs that mirror each other."""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch
from torch import Tensor

from certify.curves import Path
from certify.perturbations import L2, AffineFamily, Box, Linf, Perturbation

Sampling = Literal["antithetic", "iid"]


def draw(
    p: Perturbation, x: Tensor, m: int, sampling: Sampling = "antithetic", generator: torch.Generator | None = None
) -> Tensor:
    """`m` uniform draws for every image of `x` (N, C, H, W), as (m, N, C, H, W).

    Args:
        p: any perturbation of `certify`.
        x: images in [0, 1].
        m: copies an image.
        sampling: "iid": `m` independent draws. "antithetic": ``m / 2`` independent draws, then the mirror image of
            each in the centre of the parameter set (t and -t for a symmetric set), so that effects linear in the
            parameters cancel in a mean. Every draw on its own is uniform either way.
        generator: source of randomness, on any device; None: the global generator of `x`'s device.

    Raises:
        ValueError: m < 1, an odd `m` for antithetic pairs, or an unknown kind of sampling.
        TypeError: a perturbation that cannot be mirrored.
    """
    if m < 1:
        raise ValueError(f"m is the number of perturbed copies and must be >= 1, got {m}")
    if sampling == "iid":
        return p.sample(x, m, generator)
    if sampling != "antithetic":
        raise ValueError(f"sampling must be 'antithetic' or 'iid', got {sampling!r}")
    if m % 2:
        raise ValueError(f"antithetic copies come in pairs: m must be even, got {m}; or pass sampling='iid'")
    half = m // 2
    if isinstance(p, (AffineFamily, Path)):
        low, high = p.limits(x)
        shape = (half, *low.shape)
        device = generator.device if generator is not None else x.device
        t = low + (high - low) * torch.rand(shape, dtype=x.dtype, device=device, generator=generator).to(x.device)
        t = torch.cat([t, low + high - t])
        return p.apply(x, t if isinstance(p, AffineFamily) else t[..., 0])
    if isinstance(p, Box):
        lo, hi = p.hull(x)
        first = p.sample(x, half, generator)
        return torch.cat([first, lo + hi - first])
    if isinstance(p, (Linf, L2)):
        offset = dataclasses.replace(p, clip=False).sample(x, half, generator) - x
        return p.apply(x, torch.cat([offset, -offset]))
    raise TypeError(f"no mirror image known for {type(p).__name__}; pass sampling='iid'")
