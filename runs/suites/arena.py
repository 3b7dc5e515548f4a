"""The arena: every pruning method on the same networks, data, sparsities and training budgets, certified alike.

Each preset states its cost and what to expect. Costs in the blocks are seconds on the hardware that the preset names,
for one cell at a time on one core. Every trained state of a block gets the same epochs; ``dense``, ``random`` and
``magnitude`` then get the same fine-tuning, and ``imp`` trains one state more for each of its rounds (the record says
how many epochs that made).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from runs.cell import Data, Network, Perturb, Training, Value, Verifier, settings
from runs.suites.preset import Block, Preset, Rule, Schedule

THREE_SEEDS = (0, 1, 2)
PIXEL = 1 / 255


def _rules(
    ratios: tuple[float, ...], *, epochs: int, finetune: int, rounds: int, layers: str = "conv+linear", **shared: Value
) -> tuple[Rule, ...]:
    """Dense and the three baselines, all ranking over the same layers together; ``shared`` are fields of all three."""
    one_shot = settings(finetune_epochs=finetune, layers=layers, scope="global", **shared)
    cost = 1 + finetune / epochs
    return (
        Rule("dense", settings=settings(finetune_epochs=finetune), networks=cost),
        Rule("random", ratios, one_shot, cost),
        Rule("magnitude", ratios, one_shot, cost),
        Rule("imp", ratios, settings(rounds=rounds, layers=layers, scope="global", **shared), rounds + 1),
    )


def _schedule(objective: str, epochs: int, lr: float, epoch_seconds: float, batch: int, eps: float | None) -> Schedule:
    return Schedule(Training(objective, epochs, batch, eps, settings(lr=lr)), epoch_seconds)


def smoke() -> Preset:
    """One seed of digits on a small MLP, 20 images: at most 60 s; shows that everything works, ranks nothing."""
    digits = Block(
        data=Data("digits"),
        networks=(Network("mlp"),),
        rules=_rules((0.5,), epochs=10, finetune=2, rounds=1),
        schedules=(_schedule("natural", 10, 3e-3, 0.06, 64, None), _schedule("ibp", 10, 3e-3, 0.12, 64, 0.1)),
        perturbations=(Perturb("linf", 0.1), Perturb("brightness", 0.1)),
        verifier=Verifier("auto", images=20, seconds=0.5),
        seeds=(0,),
        certify_seconds=0.7,
        prepare_seconds=10,
    )
    return Preset(
        name="smoke",
        hardware="two CPU cores",
        at_once=2,
        expectation="every cell finishes; at linf 0.1 IBP training verifies about twice what natural training does",
        blocks=(digits,),
        default=("digits",),
    )


def quick() -> Preset:
    """Digits and rendered aircraft, three seeds, offline: at most 8 minutes; more data sets on request.

    ``--datasets fashion_mnist`` and ``cifar10_subset`` are there too (one seed, about 20 minutes).

    Expect on digits: about 97 % clean; at linf 0.1 natural training verifies next to nothing and IBP training about
    half; magnitude and IMP at 50 % are close to dense, random loses clearly at 80 %. On aircraft: an error of some
    10 px after so short a training, CROWN leaves many dense images undecided and fewer pruned ones, no attack succeeds.
    """
    semantic = (Perturb("brightness", 0.1), Perturb("contrast", 0.2))
    small = Block(
        data=Data("digits"),
        networks=(Network("mlp"),),
        rules=_rules((0.5, 0.8), epochs=15, finetune=4, rounds=2),
        schedules=(_schedule("natural", 15, 3e-3, 0.06, 64, None), _schedule("ibp", 15, 3e-3, 0.12, 64, 0.1)),
        perturbations=(Perturb("linf", 0.1), *semantic),
        verifier=Verifier("auto", images=100, seconds=0.3),
        seeds=THREE_SEEDS,
        certify_seconds=4.0,
        prepare_seconds=10,
    )
    convolutional = Block(
        data=Data("digits"),
        networks=(Network("cnn_large", width=0.25),),
        rules=_rules((0.5, 0.8), epochs=15, finetune=4, rounds=2),
        schedules=(_schedule("natural", 15, 2e-3, 0.1, 64, None),),
        perturbations=(Perturb("linf", 0.02), *semantic),
        verifier=Verifier("auto", images=60, seconds=0.3),
        seeds=THREE_SEEDS,
        certify_seconds=5.0,
    )
    aircraft = Block(
        data=Data("aircraft", val_limit=150),
        networks=(Network("cnn7_nrs", width=0.125),),
        rules=_rules((0.5,), epochs=8, finetune=4, rounds=1, layers="conv", structured=True),
        schedules=(_schedule("natural", 8, 3e-3, 2.0, 64, None),),
        perturbations=(Perturb("brightness", 2 * PIXEL), Perturb("contrast", 0.02)),
        verifier=Verifier("auto", images=30, seconds=10),
        seeds=THREE_SEEDS,
        certify_seconds=6,
        prepare_seconds=40,
    )
    return Preset(
        name="quick",
        hardware="two CPU cores",
        at_once=2,
        expectation="at linf 0.1 IBP training verifies about half of the images and natural training next to none; "
        "magnitude and imp at 50 % stay close to dense",
        blocks=(small, convolutional, aircraft, *_quick_images()),
        default=("digits", "aircraft"),
    )


def _quick_images() -> tuple[Block, ...]:
    """Real images for ``quick`` on request: one seed in about 20 minutes; more with ``--seeds 0 1 2``."""
    semantic = (Perturb("brightness", 5 * PIXEL), Perturb("contrast", 0.05))

    def block(name: str, eps: float, radii: tuple[float, ...], epoch_seconds: float) -> Block:
        return Block(
            data=Data(name, limit=10_000, val_limit=1_000),
            networks=(Network("cnn7_nrs", width=0.125),),
            rules=_rules((0.5, 0.8), epochs=6, finetune=2, rounds=2),
            schedules=(
                _schedule("natural", 6, 3e-3, epoch_seconds, 128, None),
                _schedule("ibp", 8, 3e-3, 2 * epoch_seconds, 128, eps),
            ),
            perturbations=(*(Perturb("linf", r) for r in radii), *semantic),
            verifier=Verifier("auto", images=200, seconds=0.5),
            seeds=(0,),
            certify_seconds=50,
            prepare_seconds=10,
        )

    return (
        block("fashion_mnist", 0.1, (2 * PIXEL, 0.1), 1.8),
        block("cifar10_subset", 2 * PIXEL, (2 * PIXEL,), 2.4),
    )


def gpu() -> Preset:
    """FashionMNIST and CIFAR-10 on the full CNN7, three seeds: hours on one H200-class GPU, in cells of minutes.

    The costs are estimates (no run of this preset has been timed); the first finished cells show the true pace.
    """

    def block(name: str, eps: float, augment: bool, epoch_seconds: float) -> Block:
        return Block(
            data=Data(name, val_limit=2_000, augment=augment),
            networks=(Network("cnn7_nrs"),),
            rules=_rules((0.5, 0.8, 0.95), epochs=40, finetune=10, rounds=4, layers="conv"),
            schedules=(
                _schedule("natural", 40, 1e-3, epoch_seconds, 128, None),
                _schedule("ibp", 40, 1e-3, 2.5 * epoch_seconds, 128, eps),
            ),
            perturbations=(Perturb("linf", eps), Perturb("brightness", 0.1), Perturb("contrast", 0.2)),
            verifier=Verifier("auto", images=200, seconds=60),
            seeds=THREE_SEEDS,
            certify_seconds=120,
            prepare_seconds=20,
        )

    return Preset(
        name="gpu",
        hardware="one H200-class GPU (estimated, not timed)",
        at_once=1,
        expectation="dense IBP at FashionMNIST linf 0.1 near the 70 % verified that the papers report for dense nets",
        blocks=(block("fashion_mnist", 0.1, False, 3.0), block("cifar10", 2 * PIXEL, True, 3.0)),
        default=("fashion_mnist", "cifar10"),
    )


def paper() -> Preset:
    """The NRSLoss paper's scale with the baselines: 200 epochs a state, IMP in 16 rounds, five seeds: weeks of one GPU.

    Sparsities are every fourth state of the paper's ladder ``1 - 0.8**k``. The costs are estimates.
    """

    def block(name: str, eps: float, augment: bool, epoch_seconds: float) -> Block:
        training = settings(optimizer="sgd", lr=0.01, weight_decay=5e-4, schedule="step", clip_grad_norm=8.0)
        certified = settings(lr=1e-3, weight_decay=1e-5, schedule="step", clip_grad_norm=8.0)
        common = settings(layers="conv", scope="global")
        ladder = (4, 8, 12, 16)
        imp = tuple(Rule("imp", (1 - 0.8**k,), (*common, ("rounds", k)), networks=k + 1) for k in ladder)
        return Block(
            data=Data(name, augment=augment),
            networks=(Network("cnn7_nrs"),),
            rules=(
                Rule("dense"),
                *(
                    Rule(method, tuple(1 - 0.8**k for k in ladder), (*common, ("finetune_epochs", 200)), networks=2)
                    for method in ("random", "magnitude")
                ),
                *imp,
            ),
            schedules=(
                Schedule(Training("natural", 200, 128, None, training), epoch_seconds),
                Schedule(Training("ibp", 200, 128, eps, certified), 2.5 * epoch_seconds),
            ),
            perturbations=(Perturb("linf", eps),),
            verifier=Verifier("auto", images=200, seconds=300),
            seeds=(0, 1, 2, 3, 4),
            certify_seconds=3600,
            prepare_seconds=20,
        )

    return Preset(
        name="paper",
        hardware="one H200-class GPU (estimated, not timed)",
        at_once=1,
        expectation="the paper's Table I rows for dense and IMP, up to the choice of training (IBP, not CROWN-IBP)",
        blocks=(
            block("fashion_mnist", 0.1, True, 3.0),
            block("svhn", 2 * PIXEL, True, 4.0),
            block("cifar10", 2 * PIXEL, True, 3.0),
        ),
        default=("fashion_mnist", "svhn", "cifar10"),
    )


PRESETS: Mapping[str, Callable[[], Preset]] = {"smoke": smoke, "quick": quick, "gpu": gpu, "paper": paper}
