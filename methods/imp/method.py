"""Iterative magnitude pruning with rewinding: train, prune a little, rewind the survivors, repeat."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from methods import masks
from methods.base import Where, coupled_groups, magnitude, prunable
from methods.imp.config import IMPConfig
from methods.masks import Mask
from methods.outcome import Outcome
from methods.training.checkpoint import Checkpoint, CheckpointError, read, write
from methods.training.history import EpochRecord, History
from methods.training.loop import Callback, Loss, device_of, train, trained_copy
from methods.training.objective import Batch


@dataclasses.dataclass(frozen=True)
class IMPOutcome(Outcome):
    """The last state, with the mask of each state in `masks`: dense first, each nested in the one before."""

    masks: tuple[Mask, ...]


@dataclasses.dataclass(frozen=True)
class IMP:
    """Iterative magnitude pruning (Frankle & Carbin 2019, "The Lottery Ticket Hypothesis", section 1)."""

    config: IMPConfig = dataclasses.field(default_factory=IMPConfig)

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
    ) -> IMPOutcome:
        """Run all rounds on a copy of `model` and return the last, sparsest state.

        The arguments are those of `methods.training.train`; `checkpoint` is a folder to go on from after a kill.
        """
        found: list[Mask] = []
        state: Outcome | None = None
        for state in self.states(
            model, batches, val=val, loss=loss, seed=seed, device=device, checkpoint=checkpoint, callbacks=callbacks
        ):
            found.append(state.mask)
        assert state is not None  # there is always the dense state
        return IMPOutcome(state.model, state.mask, state.history, tuple(found))

    def states(
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
    ) -> Iterator[Outcome]:
        """Each trained state as soon as it is there: the dense one, then one for each round.

        A state's model is a copy of its own; its history runs from the start, phase "round-00" on.
        """
        config, where, device = self.config, Checkpoint.of(checkpoint), device_of(model, device)
        network = trained_copy(model, device)
        groups = coupled_groups(network, batches, config, seed)
        names = prunable(network, config)
        weights = dict(network.named_parameters())
        ones = {name: torch.ones(weights[name].shape, dtype=torch.bool) for name in names}
        mask, history = Mask(ones, config.structured), History()
        rewind = _Rewind(network, config, where)
        for index in range(config.rounds + 1):
            tuning = index > 0 and config.rewind == "finetune"
            training = config.finetuning if tuning else config.training
            epochs = config.finetune_epochs if tuning else config.epochs
            if index > 0:
                scores = magnitude(network, names, config.norm)
                mask = Mask.from_scores(
                    scores, config.removed(index), config.scope, config.structured, within=mask, groups=groups
                )
                if not tuning:
                    rewind.restore(network)
                    epochs -= config.rewind_epoch if config.rewind == "late" else 0
                masks.apply(network, mask)
            phase = f"round-{index:02d}"
            history += train(
                network,
                batches,
                training.objective,
                training,
                epochs=epochs,
                val=val,
                loss=loss,
                mask=mask,
                seed=seed + index,
                device=device,
                checkpoint=where and where.child(phase),
                callbacks=(rewind, *callbacks) if index == 0 else callbacks,
                phase=phase,
            )
            yield Outcome(trained_copy(network, device), mask, history)


class _Rewind:
    """Remembers the weights to go back to: those given, or those after an epoch of the first state (a callback)."""

    def __init__(self, network: nn.Module, config: IMPConfig, where: Checkpoint | None) -> None:
        self._late = config.rewind_epoch if config.rewind == "late" else 0
        self._path = where.folder / "rewind.ckpt" if where is not None else None
        self._state: dict[str, Tensor] | None = None if self._late else _copy(network)

    def __call__(self, network: nn.Module, record: EpochRecord) -> None:
        if self._late and record.epoch + 1 == self._late:
            self._state = _copy(network)
            if self._path is not None:  # written before the epoch's checkpoint, so a resumed run always finds it
                write(self._path, {name: tensor.cpu() for name, tensor in self._state.items()})

    def restore(self, network: nn.Module) -> None:
        if self._state is None:  # the first state came out of a checkpoint
            if self._path is None or not self._path.exists():
                raise CheckpointError(f"{self._path} (the weights to rewind to) is gone; delete the folder")
            self._state = read(self._path)
        network.load_state_dict(self._state)


def _copy(network: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}
