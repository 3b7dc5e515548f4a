"""CAR and its baselines under semantic edits, certified by sampling.

A *row* (``--methods``) is a line of the paper's Table 1; a variant of CAR is a column of its Tables 3 to 5.

=============== ====================================================================================================
vanilla         trained, not pruned
advtrain        trained on cross-entropy plus that under an L2 attack, not pruned
lmp             the smallest weights of every layer removed at once, then fine-tuned
lmp:longer      the same, fine-tuned for as many epochs as CAR's masks and fine-tuning take together: the control
advtrain+lmp    the same after adversarial training
hydra           weights chosen by scores learned on TRADES, then fine-tuned
car             soft masks trained for stability under semantic edits, binarised, then fine-tuned
car:VARIANT     without one of its losses, with another initialisation, noise or safety factor, or with cross-entropy
=============== ====================================================================================================

All rows of a table train on the same images: the originals and q edited ones, which are further images to all and make
pairs for CAR. CAR has no row without edits, for its ratio loss compares pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from runs.cell import Cell, Data, Network, Perturb, Pruning, Settings, Training, Value, Verifier, settings
from runs.suites.preset import Block, Preset, Rule, Schedule

METHOD = "probabilistic"
"""The verifier's name: see `runs.car_sampling`."""

ROWS = ("vanilla", "advtrain", "lmp", "advtrain+lmp", "hydra", "car")
"""The rows of Table 1."""

ABLATIONS = ("no_stab", "no_ratio", "no_consis", "mse_consis", "no_l1")
INITIALISATIONS = ("init=random", "tau=50", "tau=40", "tau=20", "tau=10", "tau=0(full-scaled)")
NOISES = ("delta=0", "delta=0.1", "delta=0.8", "eta=inf", "eta=0.95", "eta=0.98")
"""The columns of Tables 3, 4 and 5 besides CAR itself, under the names of `methods.car.presets`."""

VARIANTS = (*ROWS, "lmp:longer", *(f"car:{name}" for name in (*ABLATIONS, *INITIALISATIONS, *NOISES, "ce")))

_TRAINED_ON: Mapping[tuple[str, str], str] = {
    ("dense", "natural"): "vanilla",
    ("dense", "pgd"): "advtrain",
    ("magnitude", "natural"): "lmp",
    ("magnitude", "pgd"): "advtrain+lmp",
    ("hydra", "trades"): "hydra",
    ("car", "natural"): "car",
}
"""Pruning method and training of each row."""


def label(pruning: Pruning) -> str:
    """The method, with its variant where it has one, for tables: ``car no_stab``, ``magnitude longer``."""
    variant = dict(pruning.settings).get("variant")
    return pruning.method if variant is None else f"{pruning.method} {variant}"


def row(cell: Cell) -> str | None:
    """The row of the paper's tables that a cell stands for, with its variant (``car no_stab``); None for no row."""
    name = _TRAINED_ON.get((cell.pruning.method, cell.training.objective))
    variant = dict(cell.pruning.settings).get("variant")
    return name if name is None or variant is None else f"{name} {variant}"


# --- building blocks ------------------------------------------------------------------------------------------------
def _sampling(
    images: int, eps: float, n: int, *, samples: int, repetitions: int = 10, test_images: int = 200, landscape: int = 0
) -> Verifier:
    """``n`` draws an image: the fewest that show ``eps`` at 95 % without a flip are 299 at 1e-2 and 2,995 at 1e-3."""
    own = settings(
        eps=eps, confidence=0.95, n=n, samples=samples, repetitions=repetitions, test_images=test_images,
        landscape=landscape,
    )  # fmt: skip
    return Verifier(METHOD, images, settings=own)


class Recipe:
    """How the networks of a preset are trained: lengths of the stages, and their costs over an epoch of training.

    Args:
        epochs, mask_epochs, finetune_epochs, search_epochs: of the stages.
        batch: images of a step.
        eps: radius of the L2 attacks; it grows with the side of the images, so that the paper's 2.0 at 224 px is 0.57
            at 64 px.
        own: settings of every training.
        seconds: of a natural epoch, for each 1,000 images.
        attack_steps: of PGD and of TRADES; None for their own.
        car: settings of CAR on top of its defaults.
    """

    def __init__(
        self, epochs: int, mask_epochs: int, finetune_epochs: int, search_epochs: int, *, batch: int, eps: float,
        own: Mapping[str, Value], seconds: float, attack_steps: int | None = None,
        car: Mapping[str, Value] | None = None,
    ) -> None:  # fmt: skip
        self.epochs, self.mask_epochs, self.finetune_epochs = epochs, mask_epochs, finetune_epochs
        self.search_epochs, self.batch, self.eps = search_epochs, batch, eps
        self.own, self.seconds, self.steps = dict(own), seconds, attack_steps
        self.car = dict(car or {})

    def rules(self, names: Sequence[str], ratios: tuple[float, ...]) -> list[tuple[str, Rule]]:
        """The objective that each row is trained for, and its rule."""
        return [self._rule(name, ratios) for name in names]

    def _rule(self, name: str, ratios: tuple[float, ...]) -> tuple[str, Rule]:
        tuned = 1 + self.finetune_epochs / self.epochs
        if name in ("vanilla", "advtrain"):
            goal = "natural" if name == "vanilla" else "pgd"
            return goal, Rule("dense", (0.0,), settings(finetune_epochs=0), 1.0, name)
        if name in ("lmp", "advtrain+lmp"):
            goal = "natural" if name == "lmp" else "pgd"
            own = settings(finetune_epochs=self.finetune_epochs, scope="layer")
            return goal, Rule("magnitude", ratios, own, tuned, name)
        if name == "lmp:longer":
            epochs = self.finetune_epochs + self.mask_epochs
            own = settings(finetune_epochs=epochs, scope="layer", variant="longer")
            return "natural", Rule("magnitude", ratios, own, 1 + epochs / self.epochs, name)
        if name == "hydra":
            own = settings(
                finetune_epochs=self.finetune_epochs, layers="conv+linear", rewind="finetune", rounds=1,
                search=self.search_epochs,
            )  # fmt: skip
            return "trades", Rule("hydra", ratios, own, tuned + self.search_epochs / self.epochs, name)
        given: dict[str, Value] = {
            "mask_epochs": self.mask_epochs, "finetune_epochs": self.finetune_epochs, **self.car,
        }  # fmt: skip
        if name != "car":
            given["variant"] = name.removeprefix("car:")
        return "natural", Rule(
            "car", ratios, settings(**given), tuned + MASK_COST * self.mask_epochs / self.epochs, name
        )

    def schedule(self, objective: str, images: int) -> Schedule:
        """The training of one objective, with what an epoch of it costs on so many images."""
        seconds = self.seconds * images / 1_000
        own: dict[str, Value] = dict(self.own)
        steps = self.steps or {"natural": 0, "pgd": 7, "trades": 10}[objective]
        if objective == "natural":
            return Schedule(Training("natural", self.epochs, self.batch, settings=settings(**own)), seconds)
        own["perturbation"] = "L2"
        if self.steps is not None:
            own["steps"] = self.steps
        if objective == "pgd":
            own["clean"] = 1.0
        passes = steps + 2  # TRADES, and PGD with the images themselves: two passes on top of the attack's
        return Schedule(
            Training(objective, self.epochs, self.batch, self.eps, settings(**own)), seconds * passes
        )  # fmt: skip


MASK_COST = 3.6
"""An epoch of CAR's mask stage over one of training: three passes over the images and the edits they bring."""


def _blocks(
    recipe: Recipe, names: Sequence[str], ratios: tuple[float, ...], *, data: Data, edits: Perturb,
    augmented: Sequence[int], images: int, networks: tuple[Network, ...], verifier: Verifier, certify_seconds: float,
    perturbations: tuple[Perturb, ...] = (), seeds: tuple[int, ...] = (0,), prepare_seconds: float = 20,
) -> list[Block]:  # fmt: skip
    """A block for each objective and each number of edited images; ``images`` is how many there are to edit."""
    found: list[Block] = []
    for count in augmented:
        known: Settings = (*data.settings, ("edits", f"{edits.kind}:{edits.magnitude:g}"), ("edited", count))
        own = replace(data, settings=known) if count else data
        rules = recipe.rules([name for name in names if count or not name.startswith("car")], ratios)
        for objective in dict.fromkeys(goal for goal, _ in rules):
            found.append(
                Block(
                    own, networks, tuple(rule for goal, rule in rules if goal == objective),
                    (recipe.schedule(objective, images + count),), perturbations or (edits,), verifier, seeds,
                    certify_seconds,
                    prepare_seconds if not found else 0.0,
                )
            )  # fmt: skip
    return found


# --- a minute, and half an hour on two cores --------------------------------------------------------------------------
SUN = Perturb("sun", 1.0)
FLOWERS = Data("scenes_flowers", settings=settings(image_size=64))
SMALL = Network("resnet18", width=0.25)


def smoke() -> Preset:
    """All six rows on 200 rendered flowers of 64 px and an eighth of ResNet-18, 10 images: a minute and a half.

    Shows that the whole path works: so short a training certifies next to nothing.
    """
    recipe = Recipe(3, 2, 1, 1, batch=32, eps=0.5, own={"lr": 2e-3}, seconds=2.0, attack_steps=2)
    blocks = _blocks(
        recipe, (*ROWS, "car:ce"), (0.5,), data=replace(FLOWERS, limit=200, val_limit=40), edits=SUN, augmented=(40,),
        images=200, networks=(replace(SMALL, width=0.125),),
        verifier=_sampling(10, 0.1, 29, samples=10, repetitions=3, test_images=40, landscape=3),
        certify_seconds=4, prepare_seconds=15,
    )  # fmt: skip
    return Preset(
        "smoke", "two CPU cores", 2, "every cell finishes; nothing can be ranked", tuple(blocks), (FLOWERS.name,)
    )  # fmt: skip


QUICK = Recipe(20, 20, 8, 6, batch=32, eps=0.5, own={"lr": 2e-3}, seconds=1.75, attack_steps=3)
QUICK_VERIFIER = _sampling(100, 1e-2, 299, samples=30, landscape=9)
QUICK_EDITS = 500


def _quick_blocks(
    names: Sequence[str], ratios: tuple[float, ...] = (0.5,), augmented: Sequence[int] = (QUICK_EDITS,), **changes: Any
) -> list[Block]:
    given: dict[str, Any] = {
        "data": FLOWERS, "edits": SUN, "images": 1_000, "networks": (SMALL,), "verifier": QUICK_VERIFIER,
        "certify_seconds": 55, "prepare_seconds": 60,
    }  # fmt: skip
    return _blocks(QUICK, names, ratios, augmented=augmented, **(given | changes))


def quick() -> Preset:
    """Rendered flowers under a rising sun, a quarter of ResNet-18, all six rows: half an hour on two cores.

    1,000 images and 500 edits; eps = 1e-2 at 95 % from 299 draws without a flip; 100 test images. One seed: ``--seeds
    0 1 2`` for a ranking.
    """
    return Preset(
        "quick", "two CPU cores", 2,
        "every row 98 to 100 % accurate and certified; rows differ where more goes (--preset sparsity --ratios 0.9)",
        tuple(_quick_blocks(ROWS, (0.5, 0.7))), (FLOWERS.name,),
    )  # fmt: skip


def _study(name: str, expectation: str, blocks: Sequence[Block]) -> Preset:
    """A study at the size of quick; what quick has run is not run again."""
    return Preset(
        name, "two CPU cores", 2, expectation, tuple(blocks), tuple(dict.fromkeys(b.data.name for b in blocks))
    )


def ablation() -> Preset:
    """Study: Table 3 and CAR with cross-entropy, at the size of quick: CAR without each of its losses at 50 %."""
    names = ("vanilla", "lmp", "lmp:longer", "car", *(f"car:{name}" for name in ABLATIONS), "car:ce")
    return _study(
        "ablation",
        "not measured: gaps between the losses within the intervals, LMP fine-tuned as long ahead",
        _quick_blocks(names),
    )


def initialisation() -> Preset:
    """Study: Table 4: random, full-scaled and partially scaled masks with tau from 10 to 50 % at 50 %."""
    names = ("car", *(f"car:{name}" for name in INITIALISATIONS))
    return _study(
        "initialisation",
        "not measured: every start ends in a working network, unlike the paper's full-scaled and tau = 50 %",
        _quick_blocks(names),
    )  # fmt: skip


def noise() -> Preset:
    """Study: Table 5: the noise delta on the masks and the safety factor eta at 50 %."""
    return _study(
        "noise", "not measured: differences within the intervals",
        _quick_blocks(("car", *(f"car:{name}" for name in NOISES))),
    )  # fmt: skip


def sparsity() -> Preset:
    """Study: Figure 1c: accuracy and certified shares of LMP, HYDRA and CAR with 30 to 90 % removed."""
    return _study(
        "sparsity", "at 90 % CAR far ahead of LMP, and behind LMP fine-tuned as long; up to 70 % all near 100 %",
        _quick_blocks(("vanilla", "lmp", "lmp:longer", "hydra", "car"), (0.3, 0.5, 0.7, 0.9)),
    )  # fmt: skip


def augmentation() -> Preset:
    """Study: Table 1's q: no edits, half as many as images, and twice as many, at 50 %."""
    return _study(
        "augmentation", "not measured: edits in training help every row",
        _quick_blocks(ROWS, augmented=(0, QUICK_EDITS, 2_000)),
    )  # fmt: skip


def faces() -> Preset:
    """Study: rendered faces that begin to smile, 20 identities, at 50 and 70 %."""
    blocks = _quick_blocks(ROWS, (0.5, 0.7), data=Data("scenes_faces", settings=settings(image_size=64)),
                           edits=Perturb("smile", 1.0))  # fmt: skip
    return _study("faces", "not measured: most accurate images are certified", blocks)


def photographs() -> Preset:
    """Study: 2,000 real flowers of Flowers-102 at 64 px under warmer light and blur: needs the data, and patience.

    From scratch and so small, a network knows few of the 102 flowers: the shares are low.
    """
    recipe = Recipe(25, 25, 8, 6, batch=32, eps=1.0, own={"lr": 2e-3}, seconds=1.75, attack_steps=4)
    blocks = _blocks(
        recipe, ROWS, (0.5, 0.7), data=Data("flowers102", limit=2_000, val_limit=200), edits=Perturb("warmth", 1.0),
        augmented=(1_000,), images=2_000, networks=(SMALL,), verifier=QUICK_VERIFIER, certify_seconds=110,
        perturbations=(Perturb("warmth", 1.0), Perturb("blur", 1.0), Perturb("brightness", 0.1)), prepare_seconds=60,
    )  # fmt: skip
    return _study(
        "photographs", "23 to 27 % accurate, 11 to 18 % certified under each edit; no row ahead of another", blocks
    )


def generated() -> Preset:
    """Study: real flowers of 64 px under the edit of a DiffAE that was trained on them, beside warmth and blur.

    Needs the data and an accepted generator, which ``python -m datasets.semantic train`` makes in eight minutes of one
    core. An edit costs up to two seconds there, so there are few: 20 test images, 29 draws each (eps = 0.1), 50 edits
    in training. Networks are small and from scratch. ``--engine serial``: workers would each make the same edits.
    """
    recipe = Recipe(15, 8, 4, 3, batch=32, eps=1.0, own={"lr": 2e-3}, seconds=1.75, attack_steps=2)
    blocks = _blocks(
        recipe, ROWS, (0.5,), data=Data("flowers102", limit=1_500, val_limit=200), edits=Perturb("diffae", 1.0),
        augmented=(50,), images=1_500, networks=(SMALL,),
        verifier=_sampling(20, 0.1, 29, samples=9, repetitions=3, test_images=400),
        certify_seconds=10, prepare_seconds=400,
        perturbations=(Perturb("diffae", 1.0), Perturb("warmth", 1.0), Perturb("blur", 1.0)),
    )  # fmt: skip
    return _study("generated", "18 % accurate, one or two of the 20 images certified; nothing can be ranked", blocks)


# --- one GPU --------------------------------------------------------------------------------------------------------
NETWORKS = tuple(Network(name, settings=settings(pretrained=True)) for name in ("resnet18", "mobilenetv2", "googlenet"))
"""The paper's, from ImageNet's weights."""

GPU_OWN: Mapping[str, Value] = {"optimizer": "sgd", "lr": 0.01, "momentum": 0.9, "schedule": "constant"}
GPU_VERIFIER = _sampling(100, 1e-3, 2_995, samples=100, test_images=819, landscape=21)


def gpu() -> Preset:
    """Flowers-102 at 64 px under a DiffAE's warm light, Tables 1 and 2 at q = 1,000 on three networks: n = 2,995.

    Needs the data, an accepted generator (``python -m datasets.semantic train --data flowers102 --preset gpu``) and
    ImageNet's weights, from which the networks start (`runs.pretrained`). Estimated, not timed.
    """
    blocks = _flowers(1_000, networks=NETWORKS)
    return Preset(
        "gpu", "one H200-class GPU (estimated, not timed)", 1,
        "not measured: 60 to 85 % accurate at 64 px, certified shares below that",
        tuple(blocks), ("flowers102",),
    )  # fmt: skip


def _flowers(*augmented: int, networks: tuple[Network, ...], side: int = 64) -> list[Block]:
    """Blocks on Flowers-102. Costs of training grow with the side (batches are small), of edits with the pixels."""
    more = (side / 64) ** 2
    own = Recipe(50, 100, 50, 20, batch=16, eps=2.0 * side / 224, own=GPU_OWN, seconds=1.2 * more**0.5)
    return _blocks(
        own, ROWS, (0.5, 0.7), data=Data("flowers102", augment=True, settings=settings(image_size=side)),
        edits=Perturb("diffae", 1.0), augmented=augmented, images=6_552, networks=networks, verifier=GPU_VERIFIER,
        certify_seconds=120 * more, prepare_seconds=900 * more,
    )  # fmt: skip


def paper() -> Preset:
    """Tables 1 to 5 as printed on Flowers-102 and rendered faces of 224 px: q of 0, 1,000 and 4,000, all columns.

    Rendered faces stand in for CelebA-HQ: 307 identities, 4,263 images, an exact smile. Networks start from ImageNet's
    weights (`runs.pretrained`); flowers need a generator of their size, ``generators/flowers102-224`` (``python -m
    datasets.semantic train --data flowers102 --image-size 224 --preset gpu``). Estimates.
    """
    data = Data("scenes_faces:full", augment=True, settings=settings(image_size=224))
    shared: dict[str, Any] = {
        "data": data, "edits": Perturb("smile", 1.0), "images": 4_263, "verifier": GPU_VERIFIER,
        "certify_seconds": 400.0, "prepare_seconds": 3600,
    }  # fmt: skip
    recipe = Recipe(50, 100, 50, 20, batch=16, eps=0.5, own=GPU_OWN, seconds=4.0)
    columns = tuple(f"car:{name}" for name in (*ABLATIONS, *INITIALISATIONS, *NOISES))
    blocks = [
        *_blocks(recipe, ROWS, (0.5, 0.7), augmented=(0, 1_000, 4_000), networks=NETWORKS[:1], **shared),
        *_blocks(recipe, ("vanilla", "lmp", "car"), (0.5,), augmented=(1_000,), networks=NETWORKS[1:], **shared),
        *_blocks(recipe, columns, (0.5,), augmented=(1_000,), networks=NETWORKS[:1], **shared),
        *_flowers(0, 1_000, 4_000, networks=NETWORKS[:1], side=224),
    ]
    return Preset(
        "paper", "one H200-class GPU (estimated, not timed)", 1,
        "not measured: columns of Tables 3 to 5 cannot be told apart on 100 images",
        tuple(blocks), tuple(dict.fromkeys(block.data.name for block in blocks)),
    )  # fmt: skip


PRESETS: Mapping[str, Callable[[], Preset]] = {
    "smoke": smoke,
    "quick": quick,
    "gpu": gpu,
    "paper": paper,
    "ablation": ablation,
    "initialisation": initialisation,
    "noise": noise,
    "sparsity": sparsity,
    "augmentation": augmentation,
    "faces": faces,
    "photographs": photographs,
    "generated": generated,
}
