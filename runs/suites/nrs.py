"""NRSLoss and its rivals (Li et al., TMLR 2022): iterative pruning under certified and adversarial training.

A *row* (``--methods``) is a line of the paper's tables. One cell runs it from the dense state to the sparsest and keeps
every state; which one stands for the row is chosen on validation images. So there is no row for the dense network.

=================== ==================================================================================================
imp                 the smallest weights go, 20 % of those left at a time, over all convolutions at once
imp+rs, imp+nrs     the same with RSLoss or NRSLoss in training
random              weights drawn at random
snip, taylor        connection sensitivity; first-order change of the loss
hydra               scores learned on the robust loss, layer by layer; ``hydra+rs`` and ``hydra+nrs`` with the penalties
slimming            channels with the smallest batch-norm weights, 11 % of those left at a time
structlth           channels that hold the largest weights after IMP, refilled
imp-finetune        trained on with the decayed rate instead of rewound: a correct fine-tune
imp-finetune-frozen what the released fine-tuning does: no convolution is trained
imp-aliased         what the released code does in certified training: nothing is rewound
imp-late            rewound to the weights after the first epoch
lwm, hydra-once     Table VI: pruned once to a share of every layer, then fine-tuned
=================== ==================================================================================================

The paper's network counts 463,712 convolution weights, and "remains" counts those alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from runs.cell import Data, Network, Perturb, Pruning, Settings, Training, Value, Verifier, settings
from runs.suites.preset import Block, Preset, Rule, Schedule

PIXEL = 1 / 255
FASHION, SMALL, LARGE, HYDRA = 0.1, 2 * PIXEL, 8 * PIXEL, 0.007

_PACKAGES: Mapping[str, str] = {
    "random": "random",
    "imp": "imp",
    "imp+rs": "nrs",
    "imp+nrs": "nrs",
    "snip": "snip",
    "taylor": "taylor",
    "hydra": "hydra",
    "hydra+rs": "nrs",
    "hydra+nrs": "nrs",
    "slimming": "slimming",
    "structlth": "structlth",
}
_REWINDINGS = ("finetune", "finetune-frozen", "aliased", "late")
_ONCE: Mapping[str, str] = {"lwm": "magnitude", "hydra-once": "hydra"}
NRS_COST = 1.4
"""A step with NRSLoss over one without: its stop-gradient takes a backward pass of its own."""
VARIANTS = (*_PACKAGES, *(f"imp-{name}" for name in _REWINDINGS), *_ONCE)
ABSENT = {"dense": "every run begins with its dense state, which the tables show; leave it out"}
"""What is asked for elsewhere and has no row here, and why."""

ROWS = (
    "imp", "snip", "taylor", "hydra", "hydra+nrs", "hydra+rs", "imp+rs", "imp+nrs", "random", "structlth", "slimming",
)  # fmt: skip
"""The rows of Table I, with random pruning from Figure 6 and HYDRA with RSLoss, which the paper does not print."""
SELECTED = ("imp", "hydra", "imp+rs", "imp+nrs", "slimming")
"""The rows of Tables II, IV and V."""
STRUCTURED = ("slimming", "structlth")


def variant(pruning: Pruning) -> str:
    """The row behind a cell's pruning: the names above, with "as released" where the flavour is not the paper's."""
    given = dict(pruning.settings)
    row = str(given["row"])
    if given.get("one_shot"):
        return next(name for name, kept in _ONCE.items() if kept == row)
    rewind = str(given.get("rewind", "init"))
    name = row if rewind == "init" else f"{row}-{rewind}"
    return f"{name} as released" if given.get("flavour") == "as_released" else name


def rule(name: str, rounds: int, structured_rounds: int, *, flavour: str = "as_paper", tune: float = 1.0,
         epochs: int = 1, search_epochs: int = 20) -> Rule:  # fmt: skip
    """A row with so many prunings.

    ``tune`` is the length of a fine-tune over that of a training, ``epochs`` those of a training, which the cost of
    HYDRA's ``search_epochs`` is told in.
    """
    base = name.removeprefix("imp-")
    rewind = base if name.startswith("imp-") else "init"
    row = "imp" if name.startswith("imp-") else name
    structured = row in STRUCTURED
    count = structured_rounds if structured else rounds
    own: dict[str, Value] = {"row": row, "rounds": count, "flavour": flavour}
    cost = 1.0 + count
    if rewind != "init":
        own["rewind"] = rewind
    if rewind.startswith("finetune"):
        own["finetune_epochs"] = max(1, round(tune * epochs))
        cost = 1.0 + count * tune
    if row.startswith("hydra"):
        own["search_epochs"] = search_epochs
        cost += count * search_epochs / epochs
    if row.endswith("+nrs"):
        cost *= NRS_COST
    ratio = 1.0 - (0.89 if structured else 0.8) ** count
    return Rule(_PACKAGES[row], (ratio,), settings(**own), cost, name)


def once(name: str, kept: tuple[float, ...], finetune_epochs: int, epochs: int) -> Rule:
    """A row of Table VI: pruned once, at each of these shares that are kept."""
    own = settings(row=_ONCE[name], one_shot=True, finetune_epochs=finetune_epochs)
    return Rule(
        "imp" if name == "lwm" else "hydra", tuple(1.0 - k for k in kept), own, 1.0 + finetune_epochs / epochs, name
    )  # fmt: skip


def _training(kind: str, epochs: int, eps: float | None, batch: int = 128, own: Settings = ()) -> Training:
    return Training(kind, epochs, batch, eps, own)


def _verifier(images: int, seconds: float, test_images: int) -> Verifier:
    """``test_images`` 0: accuracy on the whole test set."""
    return Verifier("auto", images, seconds, settings=settings(test_images=test_images))


# --- a minute, and half an hour on two cores -----------------------------------------------------------------------
def smoke() -> Preset:
    """Digits on an eighth of CNN7, two states of a few epochs, 10 images: a minute; shows that the whole path works."""
    eps, lr = 0.01, settings(lr=5e-3)

    def block(names: tuple[str, ...], kind: str, own: Settings = lr) -> Block:
        return Block(
            data=Data("digits", limit=400, val_limit=60),
            networks=(Network("cnn7_nrs", width=0.125),),
            rules=tuple(rule(name, 1, 1, epochs=8, tune=0.5, search_epochs=1) for name in names),
            schedules=(Schedule(_training(kind, 8, eps, 32, own), 0.35),),
            perturbations=(Perturb("linf", eps),),
            verifier=_verifier(10, 0.5, 60),
            seeds=(0,),
            certify_seconds=4,
            prepare_seconds=5,
        )

    once_block = replace(
        block((), "crown-ibp"),
        networks=(Network("cnn_large", width=0.125),),
        rules=tuple(once(name, (0.1,), 2, 8) for name in _ONCE),
    )
    return Preset(
        name="smoke",
        hardware="two CPU cores",
        at_once=2,
        expectation="every cell finishes; a hundred steps prove little, and constant predictors are marked",
        blocks=(
            block(("imp", "imp+nrs", "hydra", "slimming", "imp-finetune", "imp-aliased"), "crown-ibp"),
            block(("imp",), "fgsm", settings(lr=0.05)),
            block(("imp",), "fast-ibp"),
            once_block,
        ),
        default=("digits",),
    )


QUICK = Network("cnn7_nrs", width=0.25)
QUICK_EPOCHS = 8
QUICK_STATES = 4
QUICK_EPOCH = 13.0
"""Seconds of an epoch of CROWN-IBP: 8,000 images in batches of 64 on one core of two at work."""


def _quick_block(
    names: tuple[str, ...], kind: str = "crown-ibp", eps: float = FASHION, data: str = "fashion_mnist",
    seeds: tuple[int, ...] = (0,), cost: float = 1.0,
) -> Block:  # fmt: skip
    """Some 1,000 steps a state: fewer, or a faster ramp, and certified training at 0.1 ends in a constant."""
    own: dict[str, dict[str, Value]] = {
        "crown-ibp": {"lr": 2e-3, "ramp_end": 0.6},
        "fast-ibp": {"lr": 2e-3, "ramp_end": 0.6},
        "fgsm": {"lr": 0.02},
    }
    rounds = QUICK_STATES - 1
    return Block(
        data=Data(data, limit=8_000, val_limit=500),
        networks=(QUICK,),
        rules=tuple(rule(name, rounds, rounds, epochs=QUICK_EPOCHS, tune=0.5, search_epochs=1) for name in names),
        schedules=(Schedule(_training(kind, QUICK_EPOCHS, eps, 64, settings(**own[kind])), cost * QUICK_EPOCH),),
        perturbations=(Perturb("linf", eps),),
        verifier=_verifier(50, 2.0, 1_000),
        seeds=seeds,
        certify_seconds=QUICK_STATES * 25.0,
    )


def quick() -> Preset:
    """A quarter of CNN7 on 8,000 FashionMNIST images at 0.1 under CROWN-IBP, 4 states: half an hour on two CPU cores.

    Three prunings leave .51 of the weights, or .70 of the channels. One seed ranks nothing: ``--seeds 0 1 2``.
    """
    return Preset(
        name="quick",
        hardware="two CPU cores",
        at_once=2,
        expectation="50 to 60 % verified in every state and row; differences are within the intervals of 50 images",
        blocks=(_quick_block(SELECTED),),
        default=("fashion_mnist",),
    )


def _study(name: str, expectation: str, *blocks: Block) -> Preset:
    """A study at the size of quick; what quick has trained is not trained again."""
    return Preset(name, "two CPU cores", 2, expectation, blocks, tuple(dict.fromkeys(b.data.name for b in blocks)))


def rewind() -> Preset:
    """Study: Figure 9 with the released code's two faults beside rewinding, late rewinding and a correct fine-tune."""
    names = ("imp", "imp-finetune", "imp-finetune-frozen", "imp-aliased", "imp-late")
    return _study("rewind", "only the frozen fine-tune loses what it had, as the paper's does", _quick_block(names))


def fgsm() -> Preset:
    """Study: Figures 4 and 6c: FGSM with GradAlign at 2/255; few ReLUs are stable, and pruning makes more so."""
    return _study(
        "fgsm", "unstable ReLUs fall with every pruning, verified rises from next to nothing",
        _quick_block(("imp", "hydra", "hydra+rs", "imp+rs", "imp+nrs", "slimming", "random"), "fgsm", SMALL, cost=1.4),
    )  # fmt: skip


def trainings() -> Preset:
    """Study: Table IV: CROWN-IBP beside Fast-IBP."""
    return _study(
        "trainings", "Fast-IBP starts its ramp from a better initialisation and ends somewhat above",
        *(_quick_block(("imp", "imp+nrs"), kind) for kind in ("crown-ibp", "fast-ibp")),
    )  # fmt: skip


def structured() -> Preset:
    """Study: Figure 7: time and memory of certification after channels are removed, 7 states, certified and FGSM."""

    def deeper(kind: str, eps: float, cost: float) -> Block:
        block = _quick_block((), kind, eps, cost=cost)
        return replace(block, rules=tuple(rule(n, 6, 6, epochs=QUICK_EPOCHS) for n in STRUCTURED),
                       certify_seconds=7 * 25.0)  # fmt: skip

    return _study(
        "structured", "CROWN takes about half the time after six prunings", deeper("crown-ibp", FASHION, 1.0),
        deeper("fgsm", SMALL, 1.4),
    )  # fmt: skip


def seeds() -> Preset:
    """Study: Figure 10 and Table V: IMP and IMP+NRS with five seeds."""
    return _study(
        "seeds", "seeds scatter by a few points, more than rows differ",
        _quick_block(("imp", "imp+nrs"), seeds=(0, 1, 2, 3, 4)),
    )  # fmt: skip


def radii() -> Preset:
    """Study: Table II on the 10,000-image subset of CIFAR-10: 2/255 and 8/255."""
    return _study(
        "radii", "at 8/255 so small a network on so few images learns little more than the most frequent answers",
        *(_quick_block(SELECTED, eps=eps, data="cifar10_subset", cost=1.3) for eps in (SMALL, LARGE)),
    )  # fmt: skip


def oneshot() -> Preset:
    """Study: Table VI's two rows on FashionMNIST and a quarter of HYDRA's cnn_large."""
    block = replace(
        _quick_block(()),
        networks=(Network("cnn_large", width=0.25),),
        rules=tuple(once(name, (0.1, 0.05, 0.01), 4, QUICK_EPOCHS) for name in _ONCE),
    )
    return _study("oneshot", "1 % of the weights proves much less than 10 %; which row is ahead is a matter of noise",
                  block)  # fmt: skip


# --- one GPU --------------------------------------------------------------------------------------------------------
def gpu() -> Preset:
    """The whole CNN7 on FashionMNIST at 0.1, CROWN-IBP: IMP, IMP+NRS and slimming, 6 states: at most 30 min of GPU.

    Estimated, not timed: 10 epochs a state (4,000 steps) at some 0.012 s a step. A run that is stopped goes on behind
    its last epoch or its last 20 verdicts, so it may be cut into slices of any length.
    """
    epochs = 10
    block = Block(
        data=Data("fashion_mnist", val_limit=1_000),
        networks=(Network("cnn7_nrs"),),
        rules=tuple(rule(name, 5, 5, epochs=epochs) for name in ("imp", "imp+nrs", "slimming")),
        schedules=(
            Schedule(_training("crown-ibp", epochs, FASHION, 128, settings(ramp_end=0.6)), 5.5),
        ),
        perturbations=(Perturb("linf", FASHION),),
        verifier=_verifier(100, 3.0, 2_000),
        seeds=(0,),
        certify_seconds=6 * 35.0,
        prepare_seconds=20,
    )  # fmt: skip
    return Preset(
        name="gpu",
        hardware="one H200-class GPU (estimated, not timed)",
        at_once=1,
        expectation="about 65 % verified when dense; the paper's 200 epochs a state reach 68.8",
        blocks=(block,),
        default=("fashion_mnist",),
    )


def _paper_blocks(flavour: str) -> tuple[Block, ...]:
    """Every experiment of the paper; seconds of an epoch and of certification are estimates for one H200-class GPU."""
    rounds = 16 if flavour == "as_paper" else 15

    def block(
        data: str, kind: str, eps: float, names: tuple[str, ...], epochs: int = 200, hours: float = 1.0
    ) -> Block:  # fmt: skip
        return Block(
            data=Data(data, augment=True),
            networks=(Network("cnn7_nrs"),),
            rules=tuple(rule(name, rounds, 11, flavour=flavour, epochs=epochs) for name in names),
            schedules=(Schedule(_training(kind, epochs, eps), 6.0 if kind == "crown-ibp" else 8.0),),
            perturbations=(Perturb("linf", eps),),
            verifier=_verifier(200, 300.0, 0),
            seeds=(0,) if kind == "fgsm" else (0, 1, 2, 3, 4),
            certify_seconds=3600 * hours,
            prepare_seconds=60,
        )

    radius = {"fashion_mnist": FASHION, "svhn": SMALL, "cifar10": SMALL}
    found = []
    for data, eps in radius.items():
        found.append(block(data, "crown-ibp", eps, ROWS, hours=7))
        found.append(block(data, "fgsm", eps, ROWS, hours=130))
        if data == "cifar10":
            found.append(block(data, "crown-ibp", LARGE, SELECTED, 300, hours=6))
            found.append(block(data, "fast-ibp", SMALL, SELECTED, hours=7))
            faults = ("imp-finetune", "imp-finetune-frozen", "imp-aliased")
            found.append(replace(block(data, "crown-ibp", eps, faults, hours=7), seeds=(0,)))
        if data == "svhn":
            base = block(data, "crown-ibp", HYDRA, (), hours=0.2)
            rules = tuple(once(name, (0.1, 0.05, 0.01), 200, 200) for name in _ONCE)
            found.append(replace(base, networks=(Network("cnn_large"),), rules=rules, seeds=(0,)))
    return tuple(found)


def paper() -> Preset:
    """The paper as printed: 200 epochs x 17 states (12 structured), 3 data sets, 5 seeds: about 7,500 GPU hours.

    Training is 1,700 of them, complete verification of 200 images a state at up to 300 s the rest. Estimates.
    """
    return _whole("paper", "as_paper")


def released() -> Preset:
    """The same as the released code has it: 16 states, other weights of the penalties, ramp to epoch 92."""
    return _whole("released", "as_released")


def _whole(name: str, flavour: str) -> Preset:
    return Preset(
        name=name,
        hardware="one H200-class GPU (estimated, not timed)",
        at_once=1,
        expectation="Tables I, II, IV, V and VI; verified shares of 200 images, each within 7 points",
        blocks=_paper_blocks(flavour),
        default=("fashion_mnist", "svhn", "cifar10"),
    )


PRESETS: Mapping[str, Callable[[], Preset]] = {
    "smoke": smoke,
    "quick": quick,
    "gpu": gpu,
    "paper": paper,
    "released": released,
    "rewind": rewind,
    "fgsm": fgsm,
    "trainings": trainings,
    "structured": structured,
    "seeds": seeds,
    "radii": radii,
    "oneshot": oneshot,
}
