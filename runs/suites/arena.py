"""The arena: every pruning method on the same networks, data, sparsities and training budgets, certified alike.

*Budget.* Every network of a table is trained for the same number of epochs in all: a one-shot method spends half of
them before pruning and half after, an iterative one a third on each of three states, HYDRA and CAR a third each on
weights, scores (or soft masks) and fine-tuning, USN all of them on its one training, and ``dense`` all on training.

*Matching.* A ratio is the share of weights that goes. Structured methods remove channels, and with them the inputs of
the next layer: theirs is turned into the ratio of channels that leaves the same share of parameters, or of executed
multiply-adds ("by FLOPs"), counted on the network itself (`runs.matching`). They take that ratio from every layer.

An *entrant* (``--methods``) is one of

================ ==================================================================================================
dense            nothing removed
random           weights by chance; ``random-channels`` channels
magnitude        the smallest weights (LMP); ``magnitude-channels`` channels
imp              the smallest weights, in two rounds with rewinding
imp+nrs, imp+rs  the same with NRSLoss or RSLoss in training (system 1)
snip, taylor     connection sensitivity; first-order change of the loss; in two rounds with rewinding
hydra            scores learned on the loss
car              soft masks trained for stability under brightness and contrast (system 2)
slimming         channels with the smallest weights of batch normalisation
structlth        channels that hold the largest weights after IMP, refilled
usn              channels that are unstable under brightness and contrast, with the USN losses (system 3)
================ ==================================================================================================

Costs in the presets are CPU seconds of one cell on one core, or seconds on the hardware that the preset names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from runs.cell import Data, Network, Perturb, Settings, Training, Value, Verifier, settings
from runs.suites.preset import Block, Preset, Rule, Schedule

THREE_SEEDS = (0, 1, 2)
PIXEL = 1 / 255
ROUNDS = 2
"""Prunings of an iterative method."""

WHOLE: tuple[str, ...] = (
    "dense", "random", "magnitude", "imp", "imp+nrs", "imp+rs", "snip", "taylor", "hydra", "car", "random-channels",
    "slimming", "structlth", "usn",
)  # fmt: skip
"""Every entrant that natural training admits."""

CERTIFIED: tuple[str, ...] = tuple(name for name in WHOLE if name != "usn")
"""Those that certified training admits: the USN losses take the place of the objective."""

STRUCTURED = ("random-channels", "magnitude-channels", "slimming", "structlth", "usn")
BASELINES = ("dense", "random", "magnitude", "imp")
VARIANTS = ("imp+nrs", "imp+rs", "random-channels", "magnitude-channels")


@dataclass(frozen=True)
class Field:
    """What the entrants of a block share.

    Args:
        budget: epochs in all, a multiple of 6.
        kind: what is prunable, "conv" or "conv+linear".
        eps: radius of the stability penalties beside natural training.
        edits: brightness and contrast that CAR and USN train for, as ``KIND:SIZE``.
        match: what structured entrants are matched by: "parameters", "flops", or both, one cell each.
    """

    budget: int
    eps: float
    edits: str = "joint:0.05"
    kind: str = "conv+linear"
    match: tuple[str, ...] = ("parameters",)

    def __post_init__(self) -> None:
        if self.budget < 6 or self.budget % 6:
            raise ValueError(f"the budget is split in halves and thirds: a multiple of 6 epochs, got {self.budget}")


@dataclass(frozen=True)
class Entry:
    """One entrant's rule, the epochs of its first training, and its cost over that of the budget in plain training."""

    rule: Rule
    epochs: int


def _steps(name: str, field: Field, certified: bool) -> tuple[str, int, dict[str, Value], float]:
    """Method, epochs of its first training, settings, and what its whole training costs over plain training."""
    half, third = field.budget // 2, field.budget // 3
    shared: dict[str, Value] = {"layers": field.kind, "scope": "global"}
    channels: dict[str, Value] = {"layers": "conv", "scope": "layer", "structured": True}
    if name == "dense":
        return "dense", half, {"finetune_epochs": half}, 1.0
    if name in ("random", "magnitude"):
        return name, half, {**shared, "finetune_epochs": half}, 1.0
    if name in ("random-channels", "magnitude-channels"):
        return name.removesuffix("-channels"), half, {**channels, "finetune_epochs": half}, 1.0
    if name in ("imp", "snip", "taylor"):
        return name, third, {**shared, "rounds": ROUNDS}, 1.0
    if name in ("imp+nrs", "imp+rs"):
        own: dict[str, Value] = {**shared, "rounds": ROUNDS, "penalty": name.removeprefix("imp+")}
        return "nrs", third, own if certified else {**own, "eps": field.eps}, 1.4 if certified else 5.0
    if name == "hydra":
        own = {"layers": field.kind, "rounds": 1, "rewind": "finetune", "finetune_epochs": third, "search": third}
        return "hydra", third, own, 1.0
    if name == "car":
        own = {"layers": field.kind, "finetune_epochs": third, "mask_epochs": third, "transform": field.edits}
        return "car", third, own, 1.6
    if name in ("slimming", "structlth"):
        return name, third, {"layers": "conv", "scope": "layer", "rounds": ROUNDS}, 1.0
    assert name == "usn"
    own = {"lambda_w": 10.0, "m": 2, "metric_fraction": 0.25, "wide_lr_scale": 1.0, "perturbation": field.edits}
    return "usn", field.budget, own, 2.6


def entries(
    names: Sequence[str], ratios: tuple[float, ...], field: Field, *, certified: bool = False
) -> tuple[Entry, ...]:
    """The entrants' rules at some ratios; structured ones get one for each of ``field.match``."""
    found = []
    for name in names:
        method, epochs, own, cost = _steps(name, field, certified)
        cost *= field.budget / epochs  # a rule's cost is counted in first trainings
        variant = name if name in VARIANTS else ""
        if name not in STRUCTURED:
            taken = (0.0,) if name == "dense" else ratios
            found.append(Entry(Rule(method, taken, settings(**own), cost, variant), epochs))
            continue
        for measure in field.match:
            found.append(Entry(Rule(method, ratios, settings(**own, match=measure), cost, variant), epochs))
    return tuple(found)


def _schedule(objective: str, lr: float, epoch_seconds: float, batch: int, eps: float | None = None,
              own: Settings = ()) -> Schedule:  # fmt: skip
    """A training whose length its entrants decide."""
    return Schedule(Training(objective, 1, batch, eps, (*own, ("lr", lr))), epoch_seconds)


def blocks(base: Block, found: Sequence[Entry]) -> tuple[Block, ...]:
    """``base`` once for each length of the first training among the entrants, dense's first."""
    made: list[Block] = []
    for epochs in dict.fromkeys(entry.epochs for entry in found):
        schedules = tuple(
            replace(schedule, training=replace(schedule.training, epochs=epochs)) for schedule in base.schedules
        )
        rules = tuple(entry.rule for entry in found if entry.epochs == epochs)
        prepare = 0.0 if made else base.prepare_seconds
        made.append(replace(base, rules=rules, schedules=schedules, prepare_seconds=prepare))
    return tuple(made)


def _verifier(images: int, seconds: float) -> Verifier:
    """Complete or exact verdicts, and beside them certificates that at most 1 % of random draws change the label."""
    return Verifier("auto", images, seconds, settings=settings(flip_probability=0.01))


DIGITS = Network("cnn7_nrs", width=0.25)


def smoke() -> Preset:
    """One seed of digits, 10 images, all three systems: at most 60 s; shows that everything works, ranks nothing."""
    field = Field(budget=6, eps=0.02)
    base = Block(
        data=Data("digits", limit=640, val_limit=60),
        networks=(DIGITS,),
        rules=(),
        schedules=(_schedule("natural", 5e-3, 0.1, 64),),
        perturbations=(Perturb("linf", 0.01), Perturb("brightness", 0.1)),
        verifier=_verifier(10, 0.3),
        seeds=(0,),
        certify_seconds=1.5,
        prepare_seconds=8,
    )
    return Preset(
        name="smoke",
        hardware="two CPU cores",
        at_once=2,
        expectation="every cell finishes; six epochs and ten images rank nothing",
        blocks=blocks(base, entries(("dense", "magnitude", "imp", "imp+nrs", "car", "usn"), (0.5,), field)),
        default=("digits",),
    )


def quick() -> Preset:
    """All systems and baselines on digits, USN on rendered aircraft; three seeds, offline, at most 8 minutes.

    ``--datasets fashion_mnist`` and ``cifar10_subset`` are there too (one seed, about 15 minutes).
    """
    semantic = (Perturb("brightness", 0.15), Perturb("contrast", 0.3))
    field, longer = Field(budget=18, eps=0.02), Field(budget=24, eps=0.0)
    natural = Block(
        data=Data("digits"),
        networks=(DIGITS,),
        rules=(),
        schedules=(_schedule("natural", 3e-3, 0.13, 64),),
        perturbations=(Perturb("linf", 0.02), *semantic),
        verifier=_verifier(40, 0.2),
        seeds=THREE_SEEDS,
        certify_seconds=7.0,
        prepare_seconds=8,
    )
    certified = replace(
        natural,
        schedules=(_schedule("ibp", 5e-3, 0.4, 64, 0.03),),
        perturbations=(Perturb("linf", 0.03), *semantic),
        certify_seconds=2.0,
        prepare_seconds=0.0,
    )
    aircraft = Block(
        data=Data("aircraft", limit=1000, val_limit=100),
        networks=(Network("cnn7_nrs", width=0.125),),
        rules=(),
        schedules=(_schedule("natural", 5e-3, 0.9, 32),),
        perturbations=(Perturb("brightness", 10 * PIXEL), Perturb("contrast", 0.1)),
        verifier=Verifier("auto", images=30, seconds=2),
        seeds=THREE_SEEDS,
        certify_seconds=5,
        prepare_seconds=30,
    )
    keypoints = entries(
        ("dense", "random-channels", "usn"), (0.5,), Field(budget=12, eps=0.0, edits="joint:1/255", match=("flops",))
    )
    return Preset(
        name="quick",
        hardware="two CPU cores",
        at_once=2,
        expectation="on digits most methods are tied with dense at half of the parameters, and the ranking says so",
        blocks=(
            *blocks(natural, entries([name for name in WHOLE if name != "imp+rs"], (0.5,), field)),
            *blocks(certified, entries(("dense", "imp", "imp+nrs", "imp+rs"), (0.5,), longer, certified=True)),
            *blocks(aircraft, keypoints),
            *_quick_images("fashion_mnist", 0.1, (2 * PIXEL, 0.1), 1.1),
            *_quick_images("cifar10_subset", 2 * PIXEL, (2 * PIXEL,), 1.5),
        ),
        default=("digits", "aircraft"),
    )


def _quick_images(name: str, eps: float, radii: tuple[float, ...], epoch_seconds: float) -> tuple[Block, ...]:
    """Real images for ``quick`` on request: one seed; more with ``--seeds 0 1 2``."""
    field = Field(budget=12, eps=2 * PIXEL, edits="joint:0.02")
    natural = Block(
        data=Data(name, limit=6_000, val_limit=500),
        networks=(Network("cnn7_nrs", width=0.125),),
        rules=(),
        schedules=(_schedule("natural", 3e-3, epoch_seconds, 128),),
        perturbations=(
            *(Perturb("linf", r) for r in radii),
            Perturb("brightness", 5 * PIXEL),
            Perturb("contrast", 0.05),
        ),
        verifier=Verifier("auto", images=200, seconds=0.5),
        seeds=(0,),
        certify_seconds=50,
        prepare_seconds=10,
    )
    certified = replace(natural, schedules=(_schedule("ibp", 3e-3, 2 * epoch_seconds, 128, eps),), prepare_seconds=0.0)
    return (
        *blocks(natural, entries(BASELINES, (0.5, 0.8), field)),
        *blocks(natural, entries(("car", "usn"), (0.5,), field)),
        *blocks(certified, entries(BASELINES, (0.5, 0.8), field, certified=True)),
        *blocks(certified, entries(("imp+nrs", "slimming"), (0.5,), field, certified=True)),
    )


def gpu() -> Preset:
    """FashionMNIST, CIFAR-10, Flowers-102 and aircraft, every entrant, three seeds: five days of one GPU; shard it.

    The costs are estimates (no run of this preset has been timed); the first finished cells show the true pace.
    """
    both = ("parameters", "flops")

    def classes(name: str, network: Network, eps: float, budget: int, seconds: float, limit: int) -> tuple[Block, ...]:
        field = Field(budget=budget, eps=2 * PIXEL, edits="joint:0.05", kind="conv", match=both)
        natural = Block(
            data=Data(name, val_limit=limit, augment=name != "fashion_mnist"),
            networks=(network,),
            rules=(),
            schedules=(_schedule("natural", 1e-3, seconds, 128),),
            perturbations=(Perturb("linf", eps), Perturb("brightness", 0.1), Perturb("contrast", 0.2)),
            verifier=_verifier(200, 60),
            seeds=THREE_SEEDS,
            certify_seconds=120,
            prepare_seconds=20,
        )
        certified = replace(
            natural, schedules=(_schedule("crown-ibp", 1e-3, 4 * seconds, 128, eps),), prepare_seconds=0.0
        )
        ratios = (0.5, 0.8)
        return (
            *blocks(natural, entries(WHOLE, ratios, field)),
            *blocks(certified, entries(CERTIFIED, ratios, field, certified=True)),
        )

    aircraft = Block(
        data=Data("aircraft", augment=True),
        networks=(Network("cnn7_cw", width=0.5),),
        rules=(),
        schedules=(_schedule("natural", 1e-3, 2.0, 64),),
        perturbations=(Perturb("brightness", 2 * PIXEL), Perturb("contrast", 0.02)),
        verifier=Verifier("auto", images=154, seconds=60),
        seeds=THREE_SEEDS,
        certify_seconds=300,
        prepare_seconds=120,
    )
    keypoints = ("dense", "random", "magnitude", "imp", "random-channels", "magnitude-channels", "structlth", "usn")
    field = Field(budget=120, eps=0.0, edits="joint:1/255", kind="conv", match=both)
    return Preset(
        name="gpu",
        hardware="one H200-class GPU (estimated, not timed)",
        at_once=1,
        expectation="dense CROWN-IBP at FashionMNIST linf 0.1 near the 70 % verified that the papers report",
        blocks=(
            *classes("fashion_mnist", Network("cnn7_nrs"), 0.1, 60, 3.0, 2_000),
            *classes("cifar10", Network("cnn7_nrs"), 2 * PIXEL, 60, 3.0, 2_000),
            *classes("flowers102", Network("cnn7_nrs"), 1 * PIXEL, 120, 1.0, 1_020),
            *blocks(aircraft, entries(keypoints, (0.2, 0.5), field)),
        ),
        default=("fashion_mnist", "cifar10", "flowers102", "aircraft"),
    )


def paper() -> Preset:
    """The NRSLoss paper's scale with every entrant: 600 epochs a network, five seeds: months of one GPU; shard it.

    Three states of 200 epochs each where a method has rounds; sparsities from the paper's ladder ``1 - 0.8**k``. The
    costs are estimates. ``runs.compare nrs --preset paper`` is the paper's own 17 states.
    """

    def block(name: str, eps: float, seconds: float) -> tuple[Block, ...]:
        field = Field(budget=600, eps=2 * PIXEL, kind="conv", match=("parameters", "flops"))
        sgd = settings(optimizer="sgd", weight_decay=5e-4, schedule="step", clip_grad_norm=8.0)
        slow = settings(weight_decay=1e-5, schedule="step", clip_grad_norm=8.0)
        natural = Block(
            data=Data(name, augment=True),
            networks=(Network("cnn7_nrs"),),
            rules=(),
            schedules=(_schedule("natural", 0.01, seconds, 128, None, sgd),),
            perturbations=(Perturb("linf", eps), Perturb("brightness", 0.1), Perturb("contrast", 0.2)),
            verifier=_verifier(200, 300),
            seeds=(0, 1, 2, 3, 4),
            certify_seconds=3600,
            prepare_seconds=20,
        )
        certified = replace(
            natural, schedules=(_schedule("crown-ibp", 1e-3, 4 * seconds, 128, eps, slow),), prepare_seconds=0.0
        )
        ratios = tuple(1 - 0.8**k for k in (3, 6, 9, 12))
        return (
            *blocks(natural, entries(WHOLE, ratios, field)),
            *blocks(certified, entries(CERTIFIED, ratios, field, certified=True)),
        )

    return Preset(
        name="paper",
        hardware="one H200-class GPU (estimated, not timed)",
        at_once=1,
        expectation="the order of the paper's Table I under CROWN-IBP, as far as two rounds in place of 16 allow",
        blocks=(
            *block("fashion_mnist", 0.1, 3.0),
            *block("svhn", 2 * PIXEL, 4.0),
            *block("cifar10", 2 * PIXEL, 3.0),
        ),
        default=("fashion_mnist", "svhn", "cifar10"),
    )


PRESETS: Mapping[str, Callable[[], Preset]] = {"smoke": smoke, "quick": quick, "gpu": gpu, "paper": paper}
