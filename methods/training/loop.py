"""The training loop that every method shares.

Epochs of an objective with validation-based selection, exact resume and frozen masks. Metrics stay on the device and
are read once an epoch, so that no step waits for the host.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from methods import masks
from methods.training.checkpoint import Checkpoint
from methods.training.config import TrainingConfig
from methods.training.history import EpochRecord, History
from methods.training.losses import TaskLoss, resolve
from methods.training.objective import Batch, Objective, Progress

Callback = Callable[[nn.Module, EpochRecord], None]
Loss = TaskLoss | Callable[[Tensor, Tensor], Tensor]


class TrainingDiverged(RuntimeError):
    """Training met a loss, weight or score that is not finite.

    Attributes:
        epoch: the epoch (from 0) in which it happened.
        reason: what was not finite, and where.
    """

    def __init__(self, epoch: int, reason: str, lr: float) -> None:
        super().__init__(
            f"training diverged in epoch {epoch}: {reason} (learning rate {lr:.3g}); "
            "lower lr, add warm-up or set clip_grad_norm"
        )
        self.epoch = epoch
        self.reason = reason


def device_of(model: nn.Module, device: torch.device | str | None) -> torch.device:
    """`device`, or where the parameters of `model` are. Raises TypeError for what is no module."""
    if not isinstance(model, nn.Module):
        given = f"the class {model.__name__}; call it" if isinstance(model, type) else type(model).__name__
        raise TypeError(f"the network must be a torch.nn.Module, got {given}")
    if device is not None:
        return torch.device(device)
    first = next(model.parameters(), None)
    return torch.device("cpu") if first is None else first.device


@contextlib.contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Run with torch's generators of the CPU and `device` seeded; the caller's random state comes back afterwards."""
    cuda = [device.index if device.index is not None else torch.cuda.current_device()] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        torch.default_generator.manual_seed(seed)
        for index in cuda:
            torch.cuda.default_generators[index].manual_seed(seed)
        yield


def first_batch(batches: Iterable[Batch], name: str = "batches") -> Batch:
    """The first batch, checked. `name` is what messages call them.
    Raises:
        TypeError: `batches` is an iterator (it could be read only once), or its items are not pairs of tensors.
        ValueError: no batch, images that are not a finite float batch in [0, 1], or targets of another length.
    """
    if iter(batches) is batches:
        raise TypeError(
            f"{name} must be re-iterable, one pass an epoch (a list, a DataLoader, datasets' Batches); "
            f"got the one-shot iterator {type(batches).__name__}"
        )
    batch = next(iter(batches), None)
    if batch is None:
        raise ValueError(f"{name} are empty: there is no data to train on")
    if not (isinstance(batch, (tuple, list)) and len(batch) == 2 and all(isinstance(part, Tensor) for part in batch)):
        raise TypeError(f"each batch must be a pair of tensors (x, y), got {type(batch).__name__}")
    x, y = batch
    if not x.is_floating_point() or x.ndim < 2:
        raise ValueError(
            f"images must be a float batch (N, C, H, W) in [0, 1], got {x.dtype} {tuple(x.shape)}; divide uint8 by 255"
        )
    if y.ndim == 0 or len(x) != len(y):
        raise ValueError(f"a batch has {len(x)} images but {len(y) if y.ndim else 'no batch of'} targets")
    if not len(x):
        raise ValueError(f"the first of the {name} holds no image; leave empty ones out")
    if not bool(torch.isfinite(x).all()):
        raise ValueError("the images of the first batch hold NaN or infinity")
    low, high = (float(end) for end in torch.aminmax(x.detach()))
    if low < -1e-3 or high > 1 + 1e-3:
        raise ValueError(
            f"the images span [{low:.4g}, {high:.4g}], but pixels lie in [0, 1]: divide by 255, and normalise inside "
            "the network"
        )
    if y.is_floating_point() and not bool(torch.isfinite(y).all()):
        raise ValueError("the targets of the first batch hold NaN or infinity")
    return x, y


def _check_outputs(model: nn.Module, x: Tensor, y: Tensor, task_loss: TaskLoss) -> None:
    """Fail on the first batch, with words, rather than inside a kernel."""
    for name, value in model.state_dict().items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise ValueError(f"{name} holds NaN or infinity before any training; reload or initialise the network")
    with torch.no_grad():
        try:
            outputs = model.eval()(x[:1])
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"the network cannot take images {tuple(x.shape)} of type {x.dtype}: {error}") from error
    if not isinstance(outputs, Tensor) or outputs.ndim != 2:
        raise ValueError("the network must return one tensor (N, outputs)")
    if task_loss.kind == "classification" and y.ndim == 1:
        low, high = int(y.min()), int(y.max())
        if low < 0 or high >= outputs.shape[1]:
            raise ValueError(f"labels span [{low}, {high}] but the network has {outputs.shape[1]} outputs")
    elif task_loss.kind == "regression" and y.shape[1:] != outputs.shape[1:]:
        raise ValueError(f"targets have shape {tuple(y.shape)} but the network has {outputs.shape[1]} outputs")


def _length(batches: Iterable[Batch]) -> int:
    try:
        return len(batches)  # type: ignore[arg-type]
    except TypeError:
        return sum(1 for _ in batches)


def _on(batches: Iterable[Batch], device: torch.device, channels_last: bool) -> Iterator[Batch]:
    for x, y in batches:
        x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
        yield (x.contiguous(memory_format=torch.channels_last) if channels_last and x.ndim == 4 else x), y


def _identity(model: nn.Module, parts: Sequence[object], mask: masks.Mask | None) -> str:
    """A digest of everything that decides the run's numbers, the data apart."""
    digest = hashlib.sha256("\0".join(repr(part) for part in parts).encode())
    for name, tensor in model.state_dict().items():
        digest.update(f"\0{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    digest.update(mask.fingerprint.encode() if mask is not None else b"unmasked")
    return digest.hexdigest()


def _describe(task_loss: TaskLoss) -> str:
    function = getattr(task_loss, "function", None)  # a function's repr holds its address
    return repr(task_loss) if function is None else getattr(function, "__qualname__", type(function).__name__)


def _cpu(state: dict[str, Any]) -> dict[str, Any]:
    return {name: value.detach().cpu() if isinstance(value, Tensor) else value for name, value in state.items()}


def _snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def train(
    model: nn.Module,
    batches: Iterable[Batch],
    objective: Objective,
    config: TrainingConfig,
    *,
    epochs: int,
    val: Iterable[Batch] | None = None,
    loss: Loss | None = None,
    mask: masks.Mask | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    checkpoint: Checkpoint | str | Path | None = None,
    callbacks: Sequence[Callback] = (),
    phase: str = "train",
    first_epoch: int = 0,
) -> History:
    """Train `model` in place and leave it in eval mode with its best weights on validation (its last without `val`).

    Args:
        model: the network; takes (N, C, H, W) in [0, 1], returns (N, outputs).
        batches: re-iterable (x, y) batches. ``batches.set_epoch(first_epoch + epoch)`` is called when it exists.
        objective: what is minimised and selected by.
        config: optimiser and schedule (its own `objective` is not read: pass it as `objective`).
        epochs: passes over `batches`; 0 returns at once.
        val: batches for selection. The best epoch's weights and buffers are restored at the end (the first among
            equals).
        loss: the task loss; None for the default of the targets (`methods.training.losses.resolve`).
        mask: stays applied: what it removes is exactly zero throughout.
        seed: of dropout and of loaders that draw from torch's global generator, whose state is given back.
        device: where to train; None: where the model is.
        checkpoint: folder to keep the state in and to go on from. Going on gives the same numbers as never stopping,
            where the device's own arithmetic is deterministic.
        callbacks: called after each epoch as ``callback(model, record)``; not for epochs restored from a checkpoint.
        phase: name of this part in the history.
        first_epoch: offset of the epoch told to `batches`, so that a second phase sees another order.

    Returns:
        The history, restored epochs included.

    Raises:
        TrainingDiverged: loss, weights or score not finite; the weights are then of no use.
        CheckpointError: `checkpoint` is damaged or of another run.
        TypeError, ValueError: unusable batches, labels or targets that do not fit the network.
    """
    if epochs < 0:
        raise ValueError(f"epochs must be >= 0, got {epochs}")
    if callable(callbacks):
        raise TypeError("callbacks must be a sequence of functions; put a single one in a tuple: callbacks=(function,)")
    where, device = Checkpoint.of(checkpoint), device_of(model, device)
    model.to(device)
    if epochs == 0:
        if mask is not None:
            masks.apply(model, mask)
        model.eval()
        return History()
    with seeded(seed, device):
        x, y = first_batch(batches)
        if val is not None:
            first_batch(val, "val")
        task_loss = resolve(loss, y)
        _check_outputs(model, x.to(device), y, task_loss)
    channels_last = config.channels_last and device.type == "cuda"
    identity = ""
    if where is not None:
        told = (config, objective, epochs, seed, phase, first_epoch, _describe(task_loss), val is not None)
        identity = _identity(model, told, mask)
    if channels_last:
        model.to(memory_format=torch.channels_last)
    optimizer = config.build(model)
    with contextlib.ExitStack() as stack:
        if mask is not None:
            stack.enter_context(masks.freeze(model, mask, optimizer))
        stack.enter_context(seeded(seed, device))
        run = _Run(model, optimizer, objective, config, task_loss, epochs, device, phase, channels_last)
        state = where.load(identity) if where is not None else None
        if state is not None:
            run.restore(state)
        written = time.monotonic()
        while run.epoch < epochs:
            if hasattr(batches, "set_epoch"):
                batches.set_epoch(first_epoch + run.epoch)
            record = run.advance(batches, val)
            for callback in callbacks:
                callback(model, record)
            if where is not None and (run.epoch == epochs or time.monotonic() - written >= where.seconds):
                where.save({"identity": identity} | run.state())
                written = time.monotonic()
    if run.best is not None:
        model.load_state_dict(run.best)
    if channels_last:
        model.to(memory_format=torch.contiguous_format)
    for parameter in model.parameters():
        parameter.grad = None
    model.eval()
    return History(tuple(run.records))


class _Run:
    """The state of one call of `train`, and one epoch of it."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        objective: Objective,
        config: TrainingConfig,
        task_loss: TaskLoss,
        epochs: int,
        device: torch.device,
        phase: str,
        channels_last: bool,
    ) -> None:
        self.model, self.optimizer, self.objective, self.config = model, optimizer, objective, config
        self.task_loss, self.epochs, self.device, self.phase = task_loss, epochs, device, phase
        self.channels_last = channels_last
        amp = config.amp and objective.mixed_precision and device.type == "cuda" and torch.cuda.is_bf16_supported()
        self.autocast = torch.autocast(device.type, torch.bfloat16, enabled=amp)
        self.epoch = 0
        self.steps = 0
        self.lr = 0.0
        self.records: list[EpochRecord] = []
        self.best: dict[str, Tensor] | None = None
        self.best_score = -math.inf

    def state(self) -> dict[str, Any]:
        """Everything needed to go on, on the CPU."""
        return {
            "epoch": self.epoch,
            "model": _cpu(self.model.state_dict()),
            "optimizer": self.optimizer.state_dict(),
            "best": None if self.best is None else _cpu(self.best),
            "best_score": self.best_score,
            "history": History(tuple(self.records)).to_dicts(),
            "rng": torch.get_rng_state(),
            "rng_cuda": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        self.epoch = state["epoch"]
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.best = state["best"]
        self.best_score = state["best_score"]
        self.records = list(History.from_dicts(state["history"]).records)
        torch.set_rng_state(state["rng"])
        if state["rng_cuda"] is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(state["rng_cuda"], self.device)

    def advance(self, batches: Iterable[Batch], val: Iterable[Batch] | None) -> EpochRecord:
        """Train one epoch, validate, and remember the weights if they are the best."""
        began = time.perf_counter()
        self.steps = self.steps or _length(batches)
        metrics = self._train_epoch(batches)
        lr = self.lr
        validation: dict[str, float] = {}
        best = False
        if val is not None:
            self.model.eval()
            progress = Progress(self.epoch + 1, self.epochs, 0, self.steps)
            with torch.no_grad(), self.autocast:
                found = self.objective.validate(
                    self.model, _on(val, self.device, self.channels_last), self.task_loss, progress
                )
            validation = dict(found)
            score = validation["score"]
            if math.isnan(score):
                raise TrainingDiverged(self.epoch, "the validation score is NaN", lr)
            eligible = self.epoch + 1 > self.config.select_after * self.epochs
            if eligible and (self.best is None or score > self.best_score):
                self.best, self.best_score, best = _snapshot(self.model), score, True
        record = EpochRecord(self.phase, self.epoch, lr, metrics, validation, best, time.perf_counter() - began)
        self.records.append(record)
        self.epoch += 1
        return record

    def _train_epoch(self, batches: Iterable[Batch]) -> dict[str, float]:
        self.model.train()
        exact = torch.float32 if self.device.type == "mps" else torch.float64
        sums: dict[str, Tensor] = {}
        weights: dict[str, int] = {}
        bad_step = torch.full((), -1, dtype=torch.int64, device=self.device)
        step = -1
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        for step, (x, y) in enumerate(_on(batches, self.device, self.channels_last)):
            progress = Progress(self.epoch, self.epochs, min(step, self.steps - 1), self.steps)
            factor = self.config.factor(progress)
            for group in self.optimizer.param_groups:
                group["lr"] = group["peak"] * factor
            self.lr = self.config.lr * factor
            with self.autocast:
                loss, metrics = self.objective.loss(self.model, x, y, self.task_loss, progress)
            if loss.ndim:
                raise ValueError(f"the loss must be one number, got shape {tuple(loss.shape)}; take its mean")
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            if self.config.clip_grad_norm is not None:
                nn.utils.clip_grad_norm_(parameters, self.config.clip_grad_norm)
            self.optimizer.step()
            for name, value in {"loss": loss.detach(), **metrics}.items():
                share = value.to(exact) * len(x)
                sums[name] = sums[name] + share if name in sums else share
                weights[name] = weights.get(name, 0) + len(x)
            bad_step = torch.where((bad_step < 0) & ~torch.isfinite(loss.detach()), step, bad_step)
        if step < 0:
            raise ValueError(f"batches are empty in epoch {self.epoch}")
        sound = torch.stack([torch.isfinite(p.detach()).all() for p in parameters]).all()
        bad, finite, *values = torch.stack([bad_step.to(exact), sound.to(exact), *sums.values()]).tolist()
        if bad >= 0:
            raise TrainingDiverged(self.epoch, f"the loss of step {int(bad)} is not finite", self.lr)
        if not finite:
            raise TrainingDiverged(self.epoch, "a weight is not finite", self.lr)
        return {name: value / weights[name] for name, value in zip(sums, values)}


def trained_copy(model: nn.Module, device: torch.device | str | None) -> nn.Module:
    """A copy of `model` on `device` (None: where it is) to train; the original is never touched."""
    return copy.deepcopy(model).to(device_of(model, device))
