"""Where soft masks start: scaled by a percentile of the magnitudes (Algorithm 1, line 2), fully scaled, or random."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

Initialisation = Literal["partial", "full", "random"]
Sign = Literal["magnitude", "signed"]


def scale(weight: Tensor, tau: float) -> Tensor:
    """``Q(|w|, tau)``: the magnitude that the fraction `tau` of the weights reaches, a 0-d tensor.

    It is the ``round(tau n)``-th largest of the n magnitudes; at tau = 0, the largest.
    """
    magnitudes = weight.detach().abs().flatten()
    rank = max(1, round(tau * magnitudes.numel()))
    return magnitudes.kthvalue(magnitudes.numel() - rank + 1).values


def scaled(weight: Tensor, tau: float, sign: Sign = "magnitude") -> Tensor:
    """``min(1, |w| / Q(|w|, tau))``, of the weight's shape: the fraction `tau` starts at 1, the others below.

    `sign` "signed" keeps the sign of w, as Algorithm 1 is printed: the clip to [0, 1] then deletes every negative
    weight. A layer of zeros starts at 0.
    """
    value = weight.detach() if sign == "signed" else weight.detach().abs()
    return (value / scale(weight, tau).clamp_min(torch.finfo(weight.dtype).tiny)).clamp(-1.0, 1.0)


def initial_values(
    model: nn.Module,
    names: Sequence[str],
    kind: Initialisation = "partial",
    tau: float = 0.3,
    sign: Sign = "magnitude",
    seed: int = 0,
) -> dict[str, Tensor]:
    """Initial soft masks by parameter name, of the weights' shapes, dtype and device, layer by layer.

    Args:
        model: the pretrained network.
        names: its weights that are masked.
        kind: "partial", scaled by the percentile `tau`; "full", by the largest magnitude (tau = 0, the start of
            Sehwag et al. 2020 up to a factor a layer); "random", uniform on [0, 1].
        tau: fraction of each layer's masks that starts at 1, in [0, 1].
        sign: see `scaled`.
        seed: of the random start, drawn on the CPU.
    """
    weights = dict(model.named_parameters())
    if kind == "random":
        generator = torch.Generator().manual_seed(seed)
        return {name: torch.rand(weights[name].shape, generator=generator).to(weights[name]) for name in names}
    return {name: scaled(weights[name], tau if kind == "partial" else 0.0, sign) for name in names}
