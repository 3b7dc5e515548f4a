"""Cells that are recorded state by state: iterative pruning as the NRSLoss paper (Li et al., TMLR 2022) runs it.

A cell whose pruning names a ``row`` of the paper's tables is one run: a training, and after each pruning another. All
its states are certified and measured and stand in one record, so that nothing is trained twice. The state that
represents the run is chosen on validation images.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

import certify
import models
from certify import attack as attacks
from certify.arithmetic import full_float32
from certify.perturbations import Perturbation
from methods import masks
from methods.coupling import Removal
from methods.dense import Dense
from methods.iterative import Iterative
from methods.masks import Mask
from methods.nrs import one_shot, preset, remaining, stability
from methods.outcome import Outcome
from methods.training.objective import Batch
from methods.training.regularised import Regularised
from models.backbone import Network
from runs import measure
from runs.cell import Cell, Verifier
from runs.nrs_warmup import fold

SETTINGS = ("row", "one_shot", "flavour", "rounds", "rewind", "rewind_epoch", "finetune_epochs", "search_epochs")
"""What the pruning of such a cell may say: arguments of `methods.nrs.preset`; ``one_shot`` for that of Table VI."""

ADJUSTABLE = ("lr", "weight_decay", "clip_grad_norm", "ramp_start", "ramp_end")
"""What its training may change of the paper's: fields of the training's configuration, and the ramp of the radius."""

BOUNDS = ("ibp", "crown-ibp", "crown")
"""Bounds without branching, in order of cost."""

PGD_STEPS = 20
TOLERANCE = 1e-4
"""Largest difference between a network and the one without its pruned channels, relative to its largest output."""

Run = Dense | Iterative[Any]


class NotTheSameFunction(RuntimeError):
    """A network without its pruned channels computes something else than the masked one."""


# --- the run --------------------------------------------------------------------------------------------------------
def method(cell: Cell) -> Run:
    """The method of a cell, ready to run.

    Raises:
        ValueError: an unknown row, training or setting, or a ratio that is not where the rounds end.
    """
    given: dict[str, Any] = dict(cell.pruning.settings)
    if unknown := sorted(set(given) - set(SETTINGS)):
        raise ValueError(f"a row of the NRSLoss paper has no setting {unknown[0]!r}; it has {', '.join(SETTINGS)}")
    training = cell.training
    if training.eps is None and (training.objective != "natural" or "+" in given["row"]):
        raise ValueError(f"training {training.objective!r} of row {given['row']!r} needs a radius (eps)")
    eps = training.eps or 0.0
    made: Run
    if given.get("one_shot"):
        if training.objective != "crown-ibp":
            raise ValueError(f"one-shot pruning is trained with crown-ibp, not with {training.objective}")
        tuning = given.get("finetune_epochs", training.epochs)
        made = one_shot(
            given["row"], 1.0 - cell.pruning.ratio, eps, epochs=training.epochs, finetune_epochs=tuning
        )  # fmt: skip
    else:
        made = preset(
            given["row"],
            cast(Any, training.objective),
            eps,
            flavour=given.get("flavour", "as_paper"),
            epochs=training.epochs,
            rounds=given.get("rounds"),
            rewind=given.get("rewind", "init"),
            rewind_epoch=given.get("rewind_epoch", 1),
            finetune_epochs=given.get("finetune_epochs"),
            search_epochs=given.get("search_epochs", 20),
        )
    if abs(made.config.ratio - cell.pruning.ratio) > 1e-9:
        rounds = made.config.rounds if isinstance(made, Iterative) else 0
        raise ValueError(
            f"{given['row']} with {rounds} prunings ends at a ratio of {made.config.ratio:.6g}, not "
            f"{cell.pruning.ratio:.6g}: the ratio follows from the rounds here, leave it out"
        )
    return _adjusted(made, dict(training.settings))


def _adjusted(made: Run, changes: Mapping[str, Any]) -> Run:
    """`made` with another rate, decay or ramp, in training and in fine-tuning."""
    if unknown := sorted(set(changes) - set(ADJUSTABLE)):
        raise ValueError(
            f"the training of a row of the NRSLoss paper has no setting {unknown[0]!r}; it has {', '.join(ADJUSTABLE)}"
        )
    config = made.config
    own = {name: value for name, value in changes.items() if not name.startswith("ramp_")}
    ramp = {name.removeprefix("ramp_"): value for name, value in changes.items() if name.startswith("ramp_")}
    training = dataclasses.replace(config.training, objective=_ramped(config.training.objective, ramp), **own)
    finetune = config.finetune
    if finetune is not None:  # as the preset makes it: the decayed rate, the full radius
        finetune = dataclasses.replace(
            finetune, lr=training.lr * training.gamma**2, objective=training.objective.settled(),
            weight_decay=training.weight_decay, clip_grad_norm=training.clip_grad_norm,
        )  # fmt: skip
    changed = dataclasses.replace(config, training=training, finetune=finetune)
    adjusted: Run = dataclasses.replace(cast(Any, made), config=changed)
    return adjusted


def _ramped(objective: Any, ramp: Mapping[str, float]) -> Any:
    if not ramp:
        return objective
    if isinstance(objective, Regularised):
        return dataclasses.replace(objective, objective=_ramped(objective.objective, ramp))
    schedule = getattr(objective, "schedule", None)
    if schedule is None:
        raise ValueError(f"training {objective.name!r} has no ramp of the radius: leave ramp_start and ramp_end out")
    return dataclasses.replace(objective, schedule=dataclasses.replace(schedule, **ramp))


def states(
    made: Run, network: nn.Module, batches: Iterable[Batch], val: Iterable[Batch], seed: int, device: torch.device,
    checkpoint: Path, callbacks: Sequence[Any],
) -> Iterator[Outcome]:  # fmt: skip
    """Every trained state, the dense one first."""
    if isinstance(made, Dense):
        yield made.fit(
            network, batches, val=val, seed=seed, device=device, checkpoint=checkpoint, callbacks=callbacks
        )  # fmt: skip
        return
    yield from made.states(
        network, batches, val=val, seed=seed, device=device, checkpoint=checkpoint, callbacks=callbacks
    )  # fmt: skip


def stem(index: int) -> str:
    """Of a state's files in the cell's folder: ``state-03.safetensors``, ``.json`` and ``.mask.safetensors``."""
    return f"state-{index:02d}"


def save(outcome: Outcome, index: int, folder: Path) -> tuple[str, str, str]:
    """Write a state's weights, recipe and mask; returns the names of the files."""
    name = stem(index)
    models.save(fold(outcome.model), folder / f"{name}.safetensors")
    masks.save(outcome.mask, folder / f"{name}.mask.safetensors")
    return f"{name}.safetensors", f"{name}.json", f"{name}.mask.safetensors"


def load(folder: Path, index: int, device: torch.device | str = "cpu") -> tuple[Network, Mask]:
    """A state's network, in evaluation mode, and its mask.

    Raises:
        FileNotFoundError, models.CheckpointError, methods.masks.MaskError: files missing, damaged or foreign.
    """
    model = models.load(folder / f"{stem(index)}.safetensors", device=device)
    return model, masks.load(folder / f"{stem(index)}.mask.safetensors", model)


def described(outcome: Outcome, index: int, ratio: float) -> dict[str, Any]:
    """What the line that says "trained" holds of a state."""
    phase = outcome.history.phases[-1]
    last = outcome.history.phase(phase)
    selected = outcome.history.selected()
    return {
        "index": index,
        "removed": ratio,
        "phase": phase,
        "epochs": last.epochs,
        "seconds": last.seconds,
        "validation": dict(selected.validation) if selected else {},
    }


def removed(made: Run, index: int) -> float:
    """Fraction that is gone in a state."""
    return made.config.removed(index) if isinstance(made, Iterative) else 0.0


# --- what is measured -----------------------------------------------------------------------------------------------
def test_images(verifier: Verifier) -> int | None:
    """How many test images accuracy is measured on: the verifier's setting ``test_images`` (0: all of them)."""
    given = dict(verifier.settings).get("test_images")
    return verifier.images if given is None else max(int(given), verifier.images) if given else None


@dataclasses.dataclass(frozen=True)
class Removed:
    """A network without its pruned channels beside the masked one.

    Attributes:
        network: what is certified: the smaller network, or the masked one where nothing can be removed.
        facts: whether that is ``physical``, ``channels`` removed, the largest differences of ``outputs`` and of ``ibp``
            and ``crown`` bounds, relative to their size, and ``stayed``: why channels could not be removed, by layer.
    """

    network: nn.Module
    facts: dict[str, Any]


def without_pruned(model: nn.Module, mask: Mask, x: Tensor, p: Perturbation) -> Removed:
    """Remove what a structured mask prunes, and show on the images `x` that the function is the same, bounds included.

    An unstructured mask removes nothing: its zeros are multiplied like any other weight.

    Raises:
        NotTheSameFunction: outputs or bounds differ by more than `TOLERANCE`.
    """
    if not mask.structured or mask.density == 1.0:
        nothing = dict.fromkeys(("outputs", "ibp", "crown"), 0.0)
        return Removed(model, {"physical": False, **nothing, "channels": 0, "stayed": {}})
    small = masks.remove(model, mask, x[:1]).eval()
    few = x[:8]
    with torch.no_grad(), full_float32():  # TF32 alone differs by more than the tolerance
        before, after = model(few), small(few)
        scale = max(float(before.abs().max()), 1e-12)
        facts: dict[str, Any] = {"physical": True, "outputs": float((before - after).abs().max()) / scale}
        for name in ("ibp", "crown"):
            ends = zip(certify.bounds(model, few, p, name), certify.bounds(small, few, p, name))
            size = max(scale, *(float(end.abs().max()) for end in certify.bounds(model, few, p, name)))
            facts[name] = max(float((one - two).abs().max()) for one, two in ends) / size
    if (worst := max(facts["outputs"], facts["ibp"], facts["crown"])) > TOLERANCE:
        raise NotTheSameFunction(
            f"without its pruned channels the network differs by {worst:.2g} of its outputs: {facts}"
        )
    removal = cast(Removal, small.removal)
    gone = sum(removal.before.values()) - sum(removal.after.values())
    return Removed(small, facts | {"channels": gone, "stayed": dict(removal.stayed)})


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> tuple[str, bool]:
    """One bit an image: classified correctly; and whether all images get the same class."""
    guesses = torch.cat([model(part).argmax(1) for part in x.split(512)])
    return _bits(guesses == y), bool((guesses == guesses[0]).all()) and len(y.unique()) > 1


def survived(model: nn.Module, x: Tensor, y: Tensor, p: Perturbation, steps: int, seed: int) -> tuple[str, str]:
    """One bit an image for FGSM and for PGD: right, and still right after the attack."""
    fgsm, pgd = [], []
    for at in range(0, len(x), 512):
        part, spec = x[at : at + 512], certify.Classification(y[at : at + 512])
        one = attacks.fgsm(model, part, spec, p).success
        many = attacks.pgd(model, part, spec, p, steps=steps, seed=seed + at, multi_target=False).success
        fgsm.append(~one)
        pgd.append(~(one | many))
    return _bits(torch.cat(fgsm)), _bits(torch.cat(pgd))


def bounded(model: nn.Module, x: Tensor, y: Tensor, p: Perturbation, name: str) -> dict[str, Any]:
    """What one bound proves: one bit an image, seconds an image, and the peak of memory."""
    started = time.perf_counter()
    with measure.Peak(x.device) as peak:
        found = certify.verify(
            model, x, certify.Classification(y), p, method=name, attack=False, chunk=256 if name == "ibp" else 16
        )  # fmt: skip
    return {
        "bits": _bits(found.status == certify.Status.HOLDS),
        "timing": {"seconds_mean": (time.perf_counter() - started) / len(x), "peak_mb": peak.mb},
    }


@full_float32()
def measured(
    cell: Cell, model: nn.Module, small: nn.Module, p: Perturbation, test: tuple[Tensor, Tensor],
    val: tuple[Tensor, Tensor],
) -> dict[str, Any]:  # fmt: skip
    """Everything about one state under one perturbation besides the complete verifier's verdicts.

    Args:
        cell: its verifier says how many images are certified, and with how many steps (``pgd_steps``) PGD attacks.
        model, small: the masked network and the one that is certified.
        p: the perturbation.
        test, val: (x, y); all test images that accuracy is measured on, and the validation images that choose a state.
    """
    images, (x, y) = cell.verifier.images, test
    steps = int(dict(cell.verifier.settings).get("pgd_steps") or PGD_STEPS)
    clean, constant = accuracy(small, x, y)
    fgsm, pgd = survived(small, x, y, p, steps, cell.seed)
    first = (x[:images], y[:images])
    found: dict[str, Any] = {
        "std": clean,
        "fgsm": fgsm,
        "pgd": pgd,
        "constant": constant,
        "bounds": {name: bounded(small, *first, p, name) for name in BOUNDS},
        "ibp_test": bounded(small, x, y, p, "ibp")["bits"].count("1"),
        "stability": dataclasses.asdict(stability(model, zip(x.split(256), y.split(256)), p)),
    }
    if small is not model:
        found["masked"] = bounded(model, *first, p, "crown")["timing"]
    return found | {"validation": validated(small, val[0][:images], val[1][:images], p)}


def validated(model: nn.Module, x: Tensor, y: Tensor, p: Perturbation) -> dict[str, Any]:
    """What a state is chosen by: validation images that some bound proves, and those that are right."""
    bits = [bounded(model, x, y, p, name)["bits"] for name in BOUNDS]
    either = sum("1" in column for column in zip(*bits))
    return {"images": len(x), "verified": either, "right": accuracy(model, x, y)[0].count("1")}


def _bits(found: Tensor) -> str:
    return "".join("1" if bit else "0" for bit in found.tolist())


def summary(model: nn.Module, mask: Mask, image: Tensor) -> dict[str, Any]:
    """Size and remain ratios of a state."""
    return {
        "remaining": dataclasses.asdict(remaining(model, mask)),
        "size": measure.sizes(model, mask, image),
        "mask": {"structured": mask.structured, "density": mask.density, "layers": mask.layer_density},
    }
