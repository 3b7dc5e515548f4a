"""What a preset is: blocks of cells with a stated cost and a stated expectation."""

from __future__ import annotations

from dataclasses import dataclass

from runs.cell import Cell, Data, Network, Perturb, Pruning, Settings, Training, Verifier


@dataclass(frozen=True)
class Schedule:
    """One kind of training in a block, with its cost per epoch (seconds)."""

    training: Training
    epoch_seconds: float


@dataclass(frozen=True)
class Rule:
    """One pruning method in a block and the ratios at which it runs; ``settings`` are fields of its configuration.

    ``networks`` is how many times a full training is paid for (iterative methods train several). ``variant`` is another
    name by which the rule may be asked for, where one method stands for several rules.
    """

    method: str
    ratios: tuple[float, ...] = (0.0,)
    settings: Settings = ()
    networks: float = 1.0
    variant: str = ""


@dataclass(frozen=True)
class Block:
    """Every combination of rules, schedules, networks and seeds on one data set.

    ``certify_seconds`` is what certification, attack and measuring cost per cell, ``prepare_seconds`` what loading or
    rendering the data costs once. Costs hold for networks of the ``timed_width``; others' go with the square of theirs.
    """

    data: Data
    networks: tuple[Network, ...]
    rules: tuple[Rule, ...]
    schedules: tuple[Schedule, ...]
    perturbations: tuple[Perturb, ...]
    verifier: Verifier
    seeds: tuple[int, ...]
    certify_seconds: float
    prepare_seconds: float = 0.0
    timed_width: float | None = None

    def cells(self) -> list[tuple[Cell, float]]:
        """The cells with their expected seconds, dense first, seeds innermost."""
        found = []
        for network in self.networks:
            larger = 1.0 if self.timed_width is None else (network.width / self.timed_width) ** 2
            for schedule in self.schedules:
                for rule in self.rules:
                    for ratio in rule.ratios:
                        pruning = Pruning(rule.method, ratio, rule.settings)
                        training = schedule.epoch_seconds * schedule.training.epochs * rule.networks
                        cost = larger * (training + self.certify_seconds)
                        found += [
                            (
                                Cell(
                                    pruning,
                                    schedule.training,
                                    network,
                                    self.data,
                                    self.perturbations,
                                    self.verifier,
                                    seed,
                                ),
                                cost,
                            )
                            for seed in self.seeds
                        ]
        return found


@dataclass(frozen=True)
class Preset:
    """A named plan.

    ``at_once`` cells run together on its hardware; ``default`` are the data sets that run when none is asked for, and
    ``blocks`` may hold more.
    """

    name: str
    hardware: str
    at_once: int
    expectation: str
    blocks: tuple[Block, ...]
    default: tuple[str, ...]
