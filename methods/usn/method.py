"""USN pruning: progressive training and channel pruning by the unbiased and smooth neuron metrics."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from methods import masks, wiring
from methods.base import Where, check_config
from methods.outcome import Outcome
from methods.training.checkpoint import Checkpoint
from methods.training.config import TrainingConfig
from methods.training.loop import Callback, Loss, device_of, first_batch, seeded, train, trained_copy
from methods.training.objective import Batch
from methods.usn.config import USNConfig
from methods.usn.metrics import sites
from methods.usn.objective import EndOfEpoch, USNObjective, collapsed
from methods.usn.pruner import Pruner


@dataclasses.dataclass(frozen=True)
class USNOutcome(Outcome):
    """A network pruned by USN.

    Attributes:
        ratio: fraction of the prunable channels that is really removed.
        collapsed: whether the network returned predicts (nearly) the same for every image.
        notes: departures from the settings given, such as a smaller learning rate on a wide layer.
    """

    ratio: float
    collapsed: bool
    notes: tuple[str, ...]

    def compact(self, example: Tensor) -> nn.Module:
        """The network without the removed channels; `example` (N, C, H, W). See `methods.masks.remove`."""
        return masks.remove(self.model, self.mask, example)


@dataclasses.dataclass(frozen=True)
class USN:
    """USN pruning (arXiv 2510.00083, Algorithm 1)."""

    config: USNConfig = dataclasses.field(default_factory=USNConfig)

    def __post_init__(self) -> None:
        check_config(self, self.config, USNConfig)

    def fit(
        self,
        model: nn.Module,
        batches: Iterable[Batch],
        *,
        val: Iterable[Batch] | None = None,
        loss: Loss | None = None,
        seed: int = 0,
        device: torch.device | str | None = None,
        checkpoint: Where = None,
        callbacks: Sequence[Callback] = (),
    ) -> USNOutcome:
        """Train and prune a copy of `model`; one phase, "usn".

        The arguments are those of `methods.training.train`; `checkpoint` is a folder to go on from after a kill. With
        `val`, the epoch with the least task loss is returned, among those at the final ratio (`USNConfig.select`).

        Raises:
            CollapsedPredictor: a constant predictor, with ``on_collapse="raise"``.
            methods.masks.MaskError: no prunable layer, or none whose channels can be removed.
            methods.wiring.WiringError: torch.fx cannot trace the network.
            ValueError: images that the perturbation refuses.
        """
        config, where, device = self.config, Checkpoint.of(checkpoint), device_of(model, device)
        network = trained_copy(model, device)
        with seeded(seed, device):
            x, _ = first_batch(batches)
        config.perturbation.check(x)
        names = masks.prunable(network, config.layers, structured=True)
        groups = masks.groups(network, x[:1]) if config.coupled and config.ratio > 0 else None
        places = sites(network, x[:1].to(device), names)
        Pruner(network, names, config, groups, seed).attach(network)
        training, notes = self._training(network)
        history = train(
            network,
            batches,
            USNObjective(config, tuple(places.items())),
            training,
            epochs=config.epochs,
            val=val,
            loss=loss,
            seed=seed,
            device=device,
            checkpoint=where and where.child("usn"),
            callbacks=(EndOfEpoch(config), *callbacks),
            phase="usn",
        )
        pruner = Pruner.of(network)
        mask = pruner.mask(network)
        pruner.detach(network)
        masks.apply(network, mask)
        chosen = history.selected()
        assert chosen is not None  # there is at least one epoch
        spread = chosen.validation.get("spread", chosen.metrics["spread"])
        return USNOutcome(network, mask, history, 1.0 - mask.channel_density, collapsed(spread), notes)

    def _training(self, network: nn.Module) -> tuple[TrainingConfig, tuple[str, ...]]:
        """The training settings with the rates of wide layers and the epochs that may be selected, and what changed."""
        config, training = self.config, self.config.training
        outputs = wiring.output_layers(network)
        wide = [
            path
            for path, module in network.named_modules()
            if isinstance(module, nn.Linear) and module.in_features >= config.wide_inputs and path not in outputs
        ]
        notes: tuple[str, ...] = ()
        if wide and config.wide_lr_scale < 1.0:
            # The user's own patterns come first: the first match counts.
            scales = (*training.lr_scale, *((f"{path}.*", config.wide_lr_scale) for path in wide))
            training = dataclasses.replace(training, lr_scale=scales)
            notes = (f"learning rate x {config.wide_lr_scale:g} on {', '.join(wide)} (wide_lr_scale)",)
        if config.select == "final" and config.ratio > 0:
            # Epoch e (from 0) is eligible when e + 1 > select_after * epochs; half an epoch guards against rounding.
            after = max(training.select_after, (config.schedule.end - 0.5) / config.epochs)
            training = dataclasses.replace(training, select_after=after)
        return training, notes
