"""The state of Algorithm 1 of arXiv 2510.00083: importance summed over an epoch, and cumulative channel masks.

It rides along as buffers of the network in training, so that checkpoints, resumed runs and the snapshot of the best
epoch carry the masks that belong to their weights. It hangs on a layer rather than on the network itself, which may be
a container that runs whatever is in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from methods import masks
from methods.masks import ChannelGroup, Mask
from methods.usn.config import USNConfig

_ATTRIBUTE = "_usn_pruner"


class Pruner(nn.Module):
    """Decides at the end of an epoch which channels go, and keeps them at zero.

    Args:
        model: the network, for shapes and device.
        names: the weights that may lose channels.
        config: what to prune by, and when.
        groups: coupled channels, or None.
        seed: of the random choice.
    """

    epoch: Tensor
    images: Tensor
    removed: Tensor

    def __init__(
        self,
        model: nn.Module,
        names: Sequence[str],
        config: USNConfig,
        groups: Sequence[ChannelGroup] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        weights = dict(model.named_parameters())
        device = weights[names[0]].device
        self.names, self.config, self.groups, self.seed = tuple(names), config, groups, seed
        exact = torch.float32 if device.type == "mps" else torch.float64
        for index, name in enumerate(names):
            channels = len(weights[name])
            self.register_buffer(f"kept_{index}", torch.ones(channels, dtype=torch.bool, device=device))
            self.register_buffer(f"score_{index}", torch.zeros(channels, dtype=exact, device=device))
        self.register_buffer("images", torch.zeros((), dtype=exact, device=device))
        self.register_buffer("removed", torch.zeros((), dtype=exact, device=device))
        self.register_buffer("epoch", torch.zeros((), dtype=torch.int64, device=device))  # the last one settled
        self._frozen: masks.Frozen | None = None

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self.release()  # the hooks hold another state's mask

    def attach(self, model: nn.Module) -> None:
        """Make this part of the state of `model`."""
        _layer(model, self.names[0]).add_module(_ATTRIBUTE, self)

    @classmethod
    def of(cls, model: nn.Module) -> Pruner:
        """The pruner attached to `model`."""
        return next(module for module in model.modules() if isinstance(module, cls))

    def detach(self, model: nn.Module) -> None:
        """Leave `model` as it was before `attach`, its weights apart."""
        self.release()
        delattr(_layer(model, self.names[0]), _ATTRIBUTE)

    @torch.no_grad()
    def observe(self, scores: Mapping[str, Tensor], images: int) -> None:
        """Add a batch's scores, (C,) a layer, to the epoch's mean."""
        for index, name in enumerate(self.names):
            total = self.get_buffer(f"score_{index}")
            total.add_(scores[name].to(total.dtype), alpha=images)
        self.images.add_(images)

    def mask(self, model: nn.Module) -> Mask:
        """What is left, as a structured mask."""
        return Mask.from_channels({n: self.get_buffer(f"kept_{i}").cpu() for i, n in enumerate(self.names)}, model)

    def hold(self, model: nn.Module) -> None:
        """Zero what is removed: after a step of an optimiser whose momentum may have moved it."""
        if self._frozen is None:
            self._frozen = masks.freeze(model, self.mask(model))
        self._frozen.rezero()

    def release(self) -> None:
        """Take the gradient hooks off."""
        if self._frozen is not None:
            self._frozen.remove()
        self._frozen = None

    @torch.no_grad()
    def settle(self, model: nn.Module, epoch: int) -> None:
        """End epoch `epoch` (from 1): prune if the schedule says so, and zero what is removed. Once an epoch.

        Raises:
            methods.masks.MaskError: the scores hold NaN.
        """
        self.hold(model)
        if int(self.epoch) >= epoch:
            return
        self.epoch.fill_(epoch)
        schedule = self.config.schedule
        if not schedule.prunes(epoch) or self.config.ratio == 0.0:
            return
        scores = self._keep_scores(model)
        removed = self.config.removed * schedule.fraction(epoch)
        mask = Mask.from_scores(
            scores, removed, self.config.scope, structured=True, within=self.mask(model), groups=self.groups
        )
        for index, name in enumerate(self.names):
            kept = self.get_buffer(f"kept_{index}")
            kept.copy_(mask.channels[name])
            self.get_buffer(f"score_{index}").zero_()
        self.images.zero_()
        self.removed.fill_(1.0 - mask.channel_density)
        self.release()
        self.hold(model)

    def _keep_scores(self, model: nn.Module) -> dict[str, Tensor]:
        """Larger = kept, of the weights' shapes."""
        weights = {name: p.detach() for name, p in model.named_parameters() if name in self.names}
        if self.config.prune == "magnitude":
            return {name: w.abs() for name, w in weights.items()}
        if self.config.prune == "random":
            generator = torch.Generator().manual_seed(self.seed)  # one draw for the whole run: cumulative by itself
            rows = {name: torch.rand(len(weights[name]), generator=generator) for name in self.names}
        else:
            sign = -1.0 if self.config.prune in ("high", "snr") else 1.0
            means = {n: self.get_buffer(f"score_{i}") / self.images for i, n in enumerate(self.names)}
            rows = {name: sign * mean for name, mean in means.items()}
        return {name: _spread(row, weights[name]) for name, row in rows.items()}


def _layer(model: nn.Module, weight: str) -> nn.Module:
    return model.get_submodule(weight.removesuffix("weight").removesuffix("."))


def _spread(row: Tensor, weight: Tensor) -> Tensor:
    return row.reshape(-1, *[1] * (weight.ndim - 1)).expand(weight.shape)
