"""The loop of iterative pruning: train, choose what goes, rewind the survivors, train again.

A method derives from `Iterative` and says what goes (`Iterative.prune`); training, rewinding, exact fractions, nested
masks and resuming are here.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import typing
from collections.abc import Iterable, Iterator, Sequence
from typing import Generic, Literal, TypeVar

import torch
from torch import Tensor, nn

from methods import masks
from methods.base import LayerKind, PruningConfig, Where, check_config, coupled_groups, prunable
from methods.masks import ChannelGroup, Mask, Scope
from methods.outcome import Outcome
from methods.training.checkpoint import Checkpoint, CheckpointError, read, write
from methods.training.config import TrainingConfig
from methods.training.history import EpochRecord, History
from methods.training.loop import Callback, Loss, device_of, train, trained_copy
from methods.training.objective import Batch, Objective

Rewinding = Literal["init", "late", "finetune", "aliased", "finetune-frozen"]
_REWINDINGS = ("init", "late", "finetune", "aliased", "finetune-frozen")


@dataclasses.dataclass(frozen=True)
class IterativeConfig(PruningConfig):
    """What every iterative method can be told.

    Defaults: the loop of the NRSLoss paper (Li et al. 2022, section 4.1 and appendix): 16 prunings of 20 % of what is
    left, ranked globally over convolutions, survivors rewound to their initial values, 200 epochs a state, SGD .01 with
    momentum .9 and weight decay 5e-4, rate times .1 at 140 and 170 epochs, gradient norm clipped at 8. Its structured
    loop is ``structured=True, rounds=11, ratio=1 - 0.89**11``.

    Args:
        ratio: fraction removed after the last round. Each round removes the same fraction of what is left,
            ``1 - (1 - ratio) ** (1 / rounds)``.
        rounds: how often to prune; there are ``rounds + 1`` trained states, the dense one first.
        epochs: epochs of each state.
        rewind: what the survivors of a pruning go back to: "init", their values in the network given (Frankle & Carbin
            2019); "late", those after `rewind_epoch` epochs of the dense state, from where ``epochs - rewind_epoch``
            epochs follow (Frankle et al. 2020, section 2); "finetune", nothing: `finetune_epochs` epochs with the
            `finetune` settings follow each pruning (Han et al. 2015). Two reproduce faults of the code released with
            the NRSLoss paper: "aliased", nothing either, but the whole training is repeated (its saved initial weights
            are the trained ones); "finetune-frozen", fine-tuning in which no pruned layer's weight is trained.
    """

    ratio: float = 1.0 - 0.8**16
    epochs: int = 200
    training: TrainingConfig = dataclasses.field(
        default_factory=lambda: TrainingConfig(
            optimizer="sgd", lr=0.01, momentum=0.9, weight_decay=5e-4, schedule="step", clip_grad_norm=8.0
        )
    )
    finetune_epochs: int = 0
    scope: Scope = "global"
    layers: tuple[LayerKind, ...] = ("conv",)
    rounds: int = 16
    rewind: Rewinding = "init"
    rewind_epoch: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rounds < 1:
            raise ValueError(f"rounds must be >= 1, got {self.rounds}; train without pruning with methods.dense")
        if self.rewind not in _REWINDINGS:
            raise ValueError(f"rewind must be one of {', '.join(map(repr, _REWINDINGS))}, got {self.rewind!r}")
        if self.rewind == "late" and not 0 < self.rewind_epoch < self.epochs:
            raise ValueError(f"rewind_epoch must lie between 0 and epochs={self.epochs}, got {self.rewind_epoch}")
        if not self.tuned and self.finetune_epochs:
            raise ValueError("finetune_epochs is for rewind='finetune': rewound states are trained for `epochs` epochs")

    @property
    def tuned(self) -> bool:
        """Whether later states are fine-tuned rather than trained."""
        return self.rewind in ("finetune", "finetune-frozen")

    def removed(self, rounds: int) -> float:
        """Fraction removed after so many rounds."""
        return self.ratio if rounds == self.rounds else 1.0 - (1.0 - self.ratio) ** (rounds / self.rounds)

    @property
    def total_epochs(self) -> int:
        """Epochs of a whole run."""
        if self.tuned:
            return self.epochs + self.rounds * self.finetune_epochs
        later = self.epochs - (self.rewind_epoch if self.rewind == "late" else 0)
        return self.epochs + self.rounds * later


@dataclasses.dataclass(frozen=True)
class Trained:
    """A trained state that is about to be pruned.

    Attributes:
        network: with the trained weights under `mask`, in eval mode; not to be changed.
        initial: state dict that the survivors will go back to.
        names: the prunable weights.
        mask: what is left so far.
        ratio: fraction that is to be gone after this pruning.
        round: which pruning this is, from 1.
        groups: coupled channels, None where a mask need not respect any.
        objective: what the state was trained for.
        batches, val, loss, seed, device, where, callbacks: as in `methods.training.train`, for criteria that train.
    """

    network: nn.Module
    initial: dict[str, Tensor]
    names: tuple[str, ...]
    mask: Mask
    ratio: float
    round: int
    groups: tuple[ChannelGroup, ...] | None
    objective: Objective
    batches: Iterable[Batch]
    val: Iterable[Batch] | None
    loss: Loss | None
    seed: int
    device: torch.device
    where: Checkpoint | None
    callbacks: Sequence[Callback]

    def select(self, scores: dict[str, Tensor], scope: Scope, structured: bool) -> Mask:
        """The mask that removes the smallest scores, within the present one."""
        return Mask.from_scores(scores, self.ratio, scope, structured, within=self.mask, groups=self.groups)


@dataclasses.dataclass(frozen=True)
class IterativeOutcome(Outcome):
    """The last state, with the mask of each state in `masks`: dense first, each nested in the one before."""

    masks: tuple[Mask, ...]


C = TypeVar("C", bound=IterativeConfig)


class Iterative(abc.ABC, Generic[C]):
    """Iterative pruning with rewinding; derive a frozen dataclass with a field `config` and define `prune`."""

    config: C

    def __post_init__(self) -> None:
        check_config(self, self.config, typing.get_type_hints(type(self))["config"])

    @abc.abstractmethod
    def prune(self, trained: Trained) -> tuple[Mask, History]:
        """The next mask, within ``trained.mask``, and the history of any training that took."""

    def objective(self, objective: Objective) -> Objective:
        """What a state is trained for, given the configured objective: methods add their penalties here."""
        return objective

    def names(self, network: nn.Module) -> tuple[str, ...]:
        """The weights that may be pruned."""
        return prunable(network, self.config)

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
    ) -> IterativeOutcome:
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
        return IterativeOutcome(state.model, state.mask, state.history, tuple(found))

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
        names = self.names(network)
        weights = dict(network.named_parameters())
        ones = {name: torch.ones(weights[name].shape, dtype=torch.bool) for name in names}
        mask, history = Mask(ones, config.structured), History()
        rewind = _Rewind(network, config, where)
        full = self.objective(config.training.objective)
        for index in range(config.rounds + 1):
            tuning = index > 0 and config.tuned
            training = config.finetuning if tuning else config.training
            objective = self.objective(training.objective)
            epochs = config.finetune_epochs if tuning else config.epochs
            phase = f"round-{index:02d}"
            if index > 0:
                trained = Trained(
                    network, rewind.state(), names, mask, config.removed(index), index, groups, full, batches, val,
                    loss, seed + index, device, where and where.child(f"{phase}-mask"), callbacks,
                )  # fmt: skip
                mask, searched = self.prune(trained)
                history += searched
                if config.rewind in ("init", "late"):
                    network.load_state_dict(rewind.state())
                    epochs -= config.rewind_epoch if config.rewind == "late" else 0
                masks.apply(network, mask)
            with _frozen(network, names if tuning and config.rewind == "finetune-frozen" else ()):
                history += train(
                    network,
                    batches,
                    objective,
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

    def __init__(self, network: nn.Module, config: IterativeConfig, where: Checkpoint | None) -> None:
        self._late = config.rewind_epoch if config.rewind == "late" else 0
        self._path = where.folder / "rewind.ckpt" if where is not None else None
        self._state: dict[str, Tensor] | None = None if self._late else _copy(network)

    def __call__(self, network: nn.Module, record: EpochRecord) -> None:
        if self._late and record.epoch + 1 == self._late:
            self._state = _copy(network)
            if self._path is not None:  # written before the epoch's checkpoint, so a resumed run always finds it
                write(self._path, {name: tensor.cpu() for name, tensor in self._state.items()})

    def state(self) -> dict[str, Tensor]:
        """The weights and buffers to go back to."""
        if self._state is None:  # the first state came out of a checkpoint
            if self._path is None or not self._path.exists():
                raise CheckpointError(f"{self._path} (the weights to rewind to) is gone; delete the folder")
            self._state = read(self._path)
        return self._state


def _copy(network: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}


@contextlib.contextmanager
def _frozen(network: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Without gradients for the parameters `names`."""
    parameters = dict(network.named_parameters())
    held = [parameters[name] for name in names if parameters[name].requires_grad]
    for parameter in held:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in held:
            parameter.requires_grad_(True)
