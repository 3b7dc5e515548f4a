"""What the CAR suite measures of a network besides certificates: accuracy, weights, the loss around it."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from methods.masks import Mask

BINS = 61
REACH = 0.5
"""How far the landscape goes in both directions, in norms of the filters."""

LANDSCAPE_IMAGES = 128


def accuracy(model: nn.Module, x: Tensor, y: Tensor, batch: int = 256) -> str:
    """A character for each of the images (N, C, H, W): 1 where the label ``y`` is predicted."""
    with torch.no_grad():
        right = torch.cat([model(a).argmax(1) == b for a, b in zip(x.split(batch), y.split(batch))])
    return "".join("1" if hit else "0" for hit in right.tolist())


def weights(model: nn.Module, mask: Mask) -> dict[str, dict[str, Any]]:
    """How the kept weights of some layers are distributed: the last convolution, the last layer, and all together.

    Counts in bins of equal width over [-reach, reach], reach being the largest magnitude; ``near_zero`` is the share of
    the kept weights below a hundredth of it.
    """
    params = dict(model.named_parameters())
    names = [name for name in params if name in mask]
    convolutions = [name for name in names if params[name].ndim == 4]
    chosen = {name: [name] for name in (*convolutions[-1:], *names[-1:])} | {"all": names}
    return {
        label: _histogram([(params[name].detach(), mask[name]) for name in group]) for label, group in chosen.items()
    }


def _histogram(layers: list[tuple[Tensor, Tensor]]) -> dict[str, Any]:
    kept = torch.cat([w[m.to(w.device)].reshape(-1) for w, m in layers]).float().cpu()
    total = sum(w.numel() for w, _ in layers)
    reach = float(kept.abs().max()) if len(kept) else 0.0
    counts = torch.histc(kept, BINS, -reach, reach) if reach else torch.zeros(BINS)
    ordered = kept.abs().sort().values
    near = float((ordered < 0.01 * reach).double().mean()) if reach else 0.0
    return {
        "reach": reach,
        "counts": [int(c) for c in counts.tolist()],
        "kept": len(kept),
        "total": total,
        "near_zero": near,
    }


def landscape(model: nn.Module, mask: Mask, x: Tensor, y: Tensor, points: int, seed: int = 0) -> dict[str, Any]:
    """Cross-entropy on a plane through the weights (Li et al., NeurIPS 2018): two random directions, filter-normalised.

    Every filter of a direction gets the norm of the network's filter, one-dimensional parameters stay, and the mask
    holds: weights that are gone stay gone. The directions depend on ``seed`` and the shapes alone, so that networks of
    one architecture are seen along the same ones.

    Args:
        model: in evaluation mode; not changed.
        mask: of its weights.
        x, y: images (N, C, H, W) and labels (N,).
        points: a side, odd: the network itself is in the middle.
        seed: of the directions.

    Returns:
        ``axis`` (points,), ``loss`` (points, points) as lists, ``flat`` the mean rise of the loss over the plane.
    """
    moved = copy.deepcopy(model).eval()
    params = dict(moved.named_parameters())
    origin = {name: p.detach().clone() for name, p in params.items()}
    generator = torch.Generator().manual_seed(seed)
    first, second = (
        {name: _direction(value, mask.get(name), generator) for name, value in origin.items()} for _ in range(2)
    )
    axis = torch.linspace(-REACH, REACH, points).tolist()
    rows = []
    with torch.no_grad():
        for a in axis:
            losses = []
            for b in axis:
                for name, p in params.items():
                    p.copy_(origin[name] + a * first[name] + b * second[name])
                losses.append(F.cross_entropy(moved(x), y))
            rows.append(torch.stack(losses).tolist())
    middle = rows[points // 2][points // 2]
    finite = [v for row in rows for v in row if math.isfinite(v)]
    return {
        "axis": axis,
        "loss": [[v if math.isfinite(v) else None for v in row] for row in rows],
        "flat": sum(finite) / len(finite) - middle,
        "images": len(x),
        "seed": seed,
    }


def _direction(value: Tensor, kept: Tensor | None, generator: torch.Generator) -> Tensor:
    """A random direction like ``value``, filter by filter of its norm; zero for biases and normalisation."""
    drawn = torch.randn(value.shape, generator=generator).to(value)
    if value.ndim < 2:
        return torch.zeros_like(value)
    if kept is not None:
        drawn = drawn * kept.to(drawn)
    norms, own = value.flatten(1).norm(dim=1), drawn.flatten(1).norm(dim=1)
    scale = torch.where(own > 0, norms / own.clamp_min(1e-12), torch.zeros_like(own))
    return drawn * scale.reshape(-1, *[1] * (value.ndim - 1))


def found(
    model: nn.Module, mask: Mask, test: tuple[Tensor, Tensor], val: tuple[Tensor, Tensor], points: int
) -> Mapping[str, Any]:
    """All of it: accuracy on the test images, weights, and with ``points`` the landscape on validation images."""
    bits = accuracy(model, *test)
    result: dict[str, Any] = {
        "accuracy": {"bits": bits, "images": len(bits), "right": bits.count("1")},
        "weights": weights(model, mask),
    }
    if points:
        x, y = (part[:LANDSCAPE_IMAGES] for part in val)
        result["landscape"] = landscape(model, mask, x, y, points)
    return result
