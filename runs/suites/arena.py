"""The arena: every pruning method on the same networks, data, sparsities and training budgets, certified alike.

Each preset's documentation states its cost and what to expect; costs in the blocks are seconds, measured on the hardware
that the preset names. Epochs of a state are the same for every method of a block; one-shot methods and ``dense`` then get
the same fine-tuning epochs, and ``imp`` trains one state more for each of its rounds (the record says how many it had).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from runs.cell import Data, Network, Perturb, Settings, Training, Verifier, settings
from runs.suites.preset import Block, Preset, Rule, Schedule

THREE_SEEDS = (0, 1, 2)
PIXEL = 1 / 255


def _rules(ratios: tuple[float, ...], finetune: int, epochs: int, rounds: int = 2, **shared: str | bool) -> tuple[Rule, ...]:
    """Dense and the three baselines, all ranking over all convolutions and linear layers together."""
    common: Settings = settings(**({"layers": "conv+linear", "scope": "global"} | shared))
    tuned = 1 + finetune / epochs
    return (
        Rule("dense", settings=settings(finetune_epochs=finetune), networks=tuned),
        Rule("random", ratios, (*common, ("finetune_epochs", finetune)), tuned),
        Rule("magnitude", ratios, (*common, ("finetune_epochs", finetune)), tuned),
        Rule("imp", ratios, (*common, ("rounds", rounds)), rounds + 1),
    )


def smoke() -> Preset:
    """One seed of digits on a small MLP, 20 images: at most 60 s; shows that everything works, ranks nothing."""
    digits = Block(
        data=Data("digits"),
        networks=(Network("mlp"),),
        rules=_rules((0.5,), finetune=1, epochs=4, rounds=1),
        schedules=(
            Schedule(Training("natural", epochs=4, settings=settings(lr=3e-3)), 0.05),
            Schedule(Training("ibp", epochs=4, eps=0.05, settings=settings(lr=3e-3)), 0.15),
        ),
        perturbations=(Perturb("linf", 0.05), Perturb("brightness", 0.05)),
        verifier=Verifier("crown", images=20),
        seeds=(0,),
        certify_seconds=1.0,
    )
    return Preset(
        name="smoke",
        hardware="two CPU cores",
        expectation="every cell finishes; under linf more is verified after IBP training than after natural training",
        blocks=(digits,),
        default=("digits",),
    )


PRESETS: Mapping[str, Callable[[], Preset]] = {"smoke": smoke}
