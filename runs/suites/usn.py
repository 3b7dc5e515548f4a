"""USN pruning (arXiv 2510.00083) and its baselines on keypoints: what the paper's tables and figures ask.

Every network of a block is trained for the same epochs. A *variant* (``--methods``) says what is removed and what the
loss holds:

========== =============================================================================
vanilla    plain training on clean images, nothing removed
augmented  the task loss on clean and perturbed images, nothing removed
none       the same with the USN losses, nothing removed: the paper's row of ratio 0
usn        channels of large importance go, lambda_W = 10
usn-w0     the same with lambda_W = 0
random     random channels go, same losses: the paper's baseline
magnitude  channels of small weights go, same losses
low        channels of small importance go (the paper's abstract), same losses
literal    Algorithm 1 by the letter: only the top ratio stays
snr        channels of large noise-to-signal ratio go (the paper's reference 29)
========== =============================================================================

Transformers and dense prediction are out of scope.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from runs.cell import Data, Network, Perturb, Pruning, Settings, Training, Value, Verifier, settings
from runs.suites.preset import Block, Preset, Rule, Schedule

PIXEL = 1 / 255
LAMBDA_W = 10.0
PAPER_RATIOS = (0.1, 0.2, 0.3)

PAPER_PERTURBATIONS = (
    Perturb("brightness", 2 * PIXEL),
    Perturb("brightness", 5 * PIXEL),
    Perturb("contrast", 0.01),
    Perturb("contrast", 0.02),
    Perturb("contrast", 0.05),
)
JOINT = Perturb("joint", 2 * PIXEL)
ROTATION = Perturb("rotation", 0.5)

# How much longer an epoch is than one of plain training: clean and perturbed images; these and metrics on a quarter, or
# on all; clean images alone and metrics on a quarter.
AUGMENTED, QUARTER, WHOLE, CLEAN_QUARTER = 2.4, 2.6, 20.0, 2.1

_RULES: Mapping[str, Mapping[str, Value]] = {
    "vanilla": {"lambda_u": 0.0, "lambda_s": 0.0, "lambda_w": 0.0, "task_on": "clean"},
    "augmented": {"lambda_u": 0.0, "lambda_s": 0.0, "lambda_w": 0.0, "task_on": "both"},
    "none": {"lambda_w": LAMBDA_W},
    "usn": {"lambda_w": LAMBDA_W, "prune": "high"},
    "usn-w0": {"lambda_w": 0.0, "prune": "high"},
    "random": {"lambda_w": LAMBDA_W, "prune": "random"},
    "magnitude": {"lambda_w": LAMBDA_W, "prune": "magnitude"},
    "low": {"lambda_w": LAMBDA_W, "prune": "low"},
    "literal": {"lambda_w": LAMBDA_W, "prune": "literal"},
    "snr": {"lambda_w": LAMBDA_W, "prune": "snr"},
}
VARIANTS = tuple(_RULES)
_UNPRUNED = ("vanilla", "augmented", "none")


def rule(variant: str, ratios: tuple[float, ...], cost: float, own: Settings) -> Rule:
    """A variant at some ratios; ``own`` are settings of the metrics, ``cost`` a USN epoch over a plain one."""
    networks = {"vanilla": 1.0, "augmented": AUGMENTED}.get(variant, cost)
    given = dict(own) | dict(_RULES[variant])
    return Rule("usn", (0.0,) if variant in _UNPRUNED else ratios, settings(**given), networks, variant)


def variant(pruning: Pruning) -> str:
    """The variant behind a cell's pruning: how :func:`rule` would name it.

    A weight lambda_W other than 0 and 10, or one that grows with pruning, is spelled out: ``usn λ_W=1``. So is a common
    weight of the unbiased and the smooth loss that is not the default one: ``usn λ_u=0.1``.
    """
    given = dict(pruning.settings)
    weight = float(given.get("lambda_w") or 0.0)
    prune = str(given.get("prune", "high"))
    if weight == 0.0 and given.get("lambda_u") == 0.0 and given.get("lambda_s") == 0.0:
        if pruning.ratio:
            return f"{'usn' if prune == 'high' else prune} without USN losses"
        return "vanilla" if given.get("task_on") == "clean" else "augmented"
    ramp = " progressive" if given.get("lambda_w_ramp") == "progressive" else ""
    name = {"high": "usn"}.get(prune, prune) if pruning.ratio else "none"
    strength = f" λ_u={given['lambda_u']:g}" if "lambda_u" in given else ""
    if weight == LAMBDA_W and not ramp:
        return f"{name}{strength}"
    if weight == 0.0:
        return f"{name}-w0{strength}"
    return f"{name} λ_W={weight:g}{ramp}{strength}"


def _rules(
    wanted: Mapping[str, tuple[float, ...]], cost: float, **own: Value
) -> tuple[Rule, ...]:  # fmt: skip
    return tuple(rule(name, ratios, cost, settings(**own)) for name, ratios in wanted.items())


def _training(epochs: int, lr: float, batch: int = 32) -> Training:
    return Training("natural", epochs, batch, None, settings(optimizer="adam", lr=lr, warmup_epochs=1.0))


def _verifier(images: int, seconds: float, crown: int) -> Verifier:
    return Verifier("deviation", images, seconds, settings=settings(crown_images=crown))


QUICK_METRIC: Mapping[str, Value] = {"m": 2, "metric_fraction": 0.25, "wide_lr_scale": 1.0}
"""One antithetic pair of copies on a quarter of each batch. At these learning rates, with a warm-up, the wide layer
does not collapse, and a smaller rate on it only slows the network down."""

SHORT: Mapping[str, Value] = {**QUICK_METRIC, "task_on": "clean", "prune_end": 0.6}
"""What fits into minutes. The task loss is taken on clean images alone, a third less work a step, which buys epochs:
the losses of the metrics see the copies either way. Pruning is over after 60 % of the epochs, when the rate is still a
third of its peak, so that what is left recovers."""


def smoke() -> Preset:
    """Two epochs on 160 aircraft, 4 images certified: a minute that shows that the whole path works, nothing more."""
    block = Block(
        data=Data("aircraft", limit=160, val_limit=40),
        networks=(Network("cnn7_cw", width=0.125),),
        rules=_rules(
            {"vanilla": (), "none": (), "usn": (0.2,), "usn-w0": (0.2,), "random": (0.2,)}, QUARTER, **QUICK_METRIC
        ),
        schedules=(Schedule(_training(2, 3e-3), 0.35),),
        perturbations=(Perturb("brightness", 2 * PIXEL), Perturb("contrast", 0.05)),
        verifier=_verifier(4, 2.0, 0),
        seeds=(0,),
        certify_seconds=6,
        prepare_seconds=10,
    )
    return Preset(
        name="smoke",
        hardware="two CPU cores",
        at_once=2,
        expectation="every cell finishes; two epochs leave constant predictors, and the rows say so",
        blocks=(block,),
        default=("aircraft",),
    )


def _quick_block(wanted: Mapping[str, tuple[float, ...]], seeds: tuple[int, ...], network: Network) -> Block:
    return Block(
        data=Data("aircraft", val_limit=150, augment=True),
        networks=(network,),
        rules=_rules(wanted, CLEAN_QUARTER, **SHORT),
        schedules=(Schedule(_training(48, 3e-3, 16), 2.1),),
        perturbations=PAPER_PERTURBATIONS,
        verifier=_verifier(30, 5.0, 0),
        seeds=seeds,
        certify_seconds=60,
        prepare_seconds=40,
    )


def quick() -> Preset:
    """Quick aircraft on CNN7 at a quarter of its width, one seed (three of random): half an hour on two CPU cores.

    One pair of copies on a quarter of each batch; 30 test images. ``--seeds 0 1 2`` repeats everything.
    """
    small = Network("cnn7_cw", width=0.25)
    main = _quick_block({"vanilla": (), "none": (), "usn": (0.1, 0.2, 0.3)}, (0,), small)
    chance = replace(_quick_block({"random": (0.2,)}, (0, 1, 2), small), prepare_seconds=0)
    others = replace(_quick_block({"usn-w0": (0.2,), "magnitude": (0.2,), "low": (0.2,)}, (0,), small),
                     prepare_seconds=0)  # fmt: skip
    beside = replace(_quick_block({"none": (), "usn": (0.2,)}, (0,), Network("cnn7_nrs", width=0.25)),
                     prepare_seconds=0)  # fmt: skip
    return Preset(
        name="quick",
        hardware="two CPU cores",
        at_once=2,
        expectation="cnn7_cw: mean errors of about 2.2 px dense, 2.4 px at ratio 0.2; most images hold at 1 px for "
        "every variant; differences show at 0.25 px, in the largest deviation and in the number of sub-intervals",
        blocks=(main, chance, others, beside),
        default=("aircraft",),
    )


def _gpu_block(networks: tuple[Network, ...], wanted: Mapping[str, tuple[float, ...]], seeds: tuple[int, ...]) -> Block:
    return Block(
        data=Data("aircraft:paper", augment=True),
        networks=networks,
        rules=_rules(wanted, QUARTER, **QUICK_METRIC),
        schedules=(Schedule(_training(100, 3e-3), 1.0),),
        perturbations=(*PAPER_PERTURBATIONS, JOINT, ROTATION),
        verifier=_verifier(154, 30.0, 4),
        seeds=seeds,
        certify_seconds=240,
        prepare_seconds=60,
    )


def gpu() -> Preset:
    """Full width, 8,000 aircraft, every variant on both CNN7s and ResNet18, three seeds (five of random): a GPU day.

    The costs are estimates (no run of this preset has been timed). The DSNT head runs with none and usn.
    """
    nets = (Network("cnn7_cw"), Network("cnn7_nrs"), Network("resnet18"))
    heads = (Network("cnn7_cw", head="dsnt"), Network("resnet18", head="dsnt"))
    every = {name: () if name in _UNPRUNED else PAPER_RATIOS for name in VARIANTS}
    chance = every.pop("random")
    return Preset(
        name="gpu",
        hardware="one H200-class GPU (estimated, not timed)",
        at_once=1,
        expectation="errors of 2 to 3 px; every variant verifies nearly all images at 1 px, as an exact verifier does",
        blocks=(
            _gpu_block(nets, every, (0, 1, 2)),
            replace(_gpu_block(nets, {"random": chance}, (0, 1, 2, 3, 4)), prepare_seconds=0),
            replace(_gpu_block(heads, {"none": (), "usn": (0.2,)}, (0, 1, 2)), prepare_seconds=0),
        ),
        default=("aircraft:paper",),
    )


def paper() -> Preset:
    """The paper's own settings where it gives them: 200 epochs, Adam at 0.01, 8 copies of every image: GPU weeks.

    The costs are estimates. The images are ours, so no number here is the paper's own experiment.
    """
    block = Block(
        data=Data("aircraft:paper"),
        networks=(Network("cnn7_cw"), Network("resnet18")),
        rules=_rules(
            {"none": (), "usn": PAPER_RATIOS, "usn-w0": PAPER_RATIOS, "random": PAPER_RATIOS}, WHOLE, m=8
        ),
        schedules=(
            Schedule(Training("natural", 200, 64, None, settings(optimizer="adam", lr=0.01, schedule="constant")), 1.0),
        ),
        perturbations=PAPER_PERTURBATIONS,
        verifier=_verifier(154, 300.0, 154),
        seeds=(0, 1, 2),
        certify_seconds=600,
        prepare_seconds=60,
    )  # fmt: skip
    return Preset(
        name="paper",
        hardware="one H200-class GPU (estimated, not timed)",
        at_once=1,
        expectation="Tables I to III without the printed tables' unknowns: an exact verifier leaves none",
        blocks=(block,),
        default=("aircraft:paper",),
    )


def lambda_w() -> Preset:
    """Study: λ_W from 0 to 100, and one that grows with pruning, at ratio 0.1, where the paper says it hurts."""
    block = _quick_block({}, (0,), Network("cnn7_cw", width=0.25))
    common = {**SHORT, "prune": "high"}
    weights = (0.0, 1.0, 10.0, 100.0)
    sweep = tuple(Rule("usn", (0.1,), settings(**common, lambda_w=w), CLEAN_QUARTER, "usn") for w in weights)
    growing = Rule("usn", (0.1,), settings(**common, lambda_w=10.0, lambda_w_ramp="progressive"), CLEAN_QUARTER, "usn")
    return Preset(
        name="lambda",
        hardware="two CPU cores",
        at_once=2,
        expectation="larger weights shrink the largest deviation and raise the error",
        blocks=(replace(block, rules=(*sweep, growing)),),
        default=("aircraft",),
    )


def strength() -> Preset:
    """Study: the unbiased and the smooth loss with 10 to 100,000 times their usual weight, at ratios 0 and 0.2.

    Summed over the layers they are about 0.005 on these networks, the task loss (in px²) is 2 to 5: below a weight of
    100 they hardly pull.
    """
    block = _quick_block({}, (0,), Network("cnn7_cw", width=0.25))
    rules: list[Rule] = []
    for weight in (0.1, 1.0, 100.0, 1000.0):
        own: dict[str, Value] = {**SHORT, "lambda_u": weight, "lambda_s": weight}
        rules += _rules({"none": (), "usn": (0.2,), "random": (0.2,)}, CLEAN_QUARTER, **own)
    return Preset(
        name="strength",
        hardware="two CPU cores",
        at_once=2,
        expectation="up to a weight of 1 little changes; beyond, the largest deviation shrinks and the error grows",
        blocks=(replace(block, rules=tuple(rules)),),
        default=("aircraft",),
    )


def selection() -> Preset:
    """Study: the choice of channels alone: task loss only, ratios 0.2 and 0.5, three seeds, beside vanilla."""
    block = _quick_block({}, (0, 1, 2), Network("cnn7_cw", width=0.25))
    bare: dict[str, Value] = {**SHORT, "lambda_u": 0.0, "lambda_s": 0.0, "lambda_w": 0.0}
    # Only the metrics need copies of the images.
    chosen = tuple(
        Rule("usn", (0.2, 0.5), settings(**bare, prune=prune), cost, name)
        for name, prune, cost in (
            ("usn", "high", CLEAN_QUARTER),
            ("random", "random", 1.0),
            ("magnitude", "magnitude", 1.0),
        )
    )
    return Preset(
        name="selection",
        hardware="two CPU cores",
        at_once=2,
        expectation="if the metrics find the unstable channels, usn moves less than random at the same ratio",
        blocks=(replace(block, rules=(*_rules({"vanilla": ()}, CLEAN_QUARTER, **SHORT), *chosen)),),
        default=("aircraft",),
    )


def joint() -> Preset:
    """Study: the networks of quick under brightness and contrast at once, two parameters decided together."""
    return _again("joint", (JOINT,), "not measured: nearly all images should hold at 1 px", 450.0)


def geometric() -> Preset:
    """Study: the networks of quick under rotation and scaling, which none of them has been trained for."""
    return _again(
        "geometric",
        (Perturb("rotation", 0.2), Perturb("rotation", 0.5), Perturb("scale", 0.005), Perturb("scale", 0.01)),
        "keypoints should move with the image, so the deviation from the unmoved output is large on good networks",
        800.0,
    )


def incomplete() -> Preset:
    """Study: what single-shot CROWN would have said of the networks of quick; five images, seconds for each bound."""
    made = _again("incomplete", PAPER_PERTURBATIONS[1:2], "CROWN decides fewer images than the exact verifier", 60.0)
    verifier = _verifier(5, 5.0, 5)
    return replace(made, blocks=tuple(replace(block, verifier=verifier) for block in made.blocks))


def _again(name: str, perturbations: tuple[Perturb, ...], expectation: str, seconds: float) -> Preset:
    """Vanilla, none, usn and random at 0.2 as quick trains them (and shares them), under other perturbations."""
    wanted: dict[str, tuple[float, ...]] = {"vanilla": (), "none": (), "usn": (0.2,), "random": (0.2,)}
    block = _quick_block(wanted, (0,), Network("cnn7_cw", width=0.25))
    changed = replace(block, perturbations=perturbations, certify_seconds=seconds)
    return Preset(name, "two CPU cores", 2, expectation, (changed,), ("aircraft",))


def hue() -> Preset:
    """Study: classification of CIFAR-10 (the 10,000-image subset) trained for and certified under changes of hue."""
    own: dict[str, Value] = {**QUICK_METRIC, "perturbation": "hue:0.02"}
    block = Block(
        data=Data("cifar10_subset", val_limit=500),
        networks=(Network("cnn7_cw", width=0.25),),
        rules=_rules({"vanilla": (), "none": (), "usn": (0.2,), "random": (0.2,)}, QUARTER, **own),
        schedules=(Schedule(_training(10, 2e-3, 64), 6.0),),
        perturbations=(Perturb("hue", 0.02), Perturb("hue", 0.05)),
        verifier=Verifier("auto", images=50, seconds=5.0),
        seeds=(0,),
        certify_seconds=40,
        prepare_seconds=5,
    )
    return Preset(
        name="hue",
        hardware="two CPU cores",
        at_once=2,
        expectation="about half of the images right; most of those hold at 0.02",
        blocks=(block,),
        default=("cifar10_subset",),
    )


def backbone() -> Preset:
    """Study: another backbone, EfficientNet-Lite0, whose depthwise convolutions lose channels together."""
    block = _quick_block({"none": (), "usn": (0.2,), "random": (0.2,)}, (0,), Network("efficientnet_lite0"))
    changed = replace(
        block,
        schedules=(Schedule(_training(20, 1e-3), 12.0),),
        perturbations=PAPER_PERTURBATIONS[:1],
        verifier=_verifier(10, 20.0, 0),
        certify_seconds=240,
    )
    return Preset(
        name="backbone",
        hardware="two CPU cores",
        at_once=2,
        expectation="certification takes longer than on CNN7 and times out on some images",
        blocks=(changed,),
        default=("aircraft",),
    )


PRESETS: Mapping[str, Callable[[], Preset]] = {
    "smoke": smoke,
    "quick": quick,
    "gpu": gpu,
    "paper": paper,
    "lambda": lambda_w,
    "strength": strength,
    "selection": selection,
    "joint": joint,
    "geometric": geometric,
    "incomplete": incomplete,
    "hue": hue,
    "backbone": backbone,
}
