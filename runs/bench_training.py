"""Images a second of every training objective, and of sampling, each beside the plain pass it contains."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from runs import bench_nets
from runs.bench_timing import Clock, Spread

if TYPE_CHECKING:
    from torch import Tensor

    from methods.training.objective import Objective

EPS = 0.1


@dataclass(frozen=True)
class Measured:
    """One row: `ours` beside `reference`, both in `unit`; `ratio` is ours over the reference.

    `goal` reads "≤ 2.6" or "≥ 0.95", of the ratio where there is one, else of `ours`; empty without a goal.
    """

    row: str
    what: str
    unit: str
    ours: Spread
    reference: Spread | None = None
    ratio: float | None = None
    goal: str = ""
    note: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the goal was met; None without one."""
        if not self.goal:
            return None
        relation, _, bound = self.goal.partition(" ")
        value = self.ours.median if self.ratio is None else self.ratio
        return value <= float(bound) if relation == "≤" else value >= float(bound)


def objectives() -> dict[str, tuple[Objective, str]]:
    """Training objectives by name, with the goal for the time of a step over a plain one."""
    from methods.training.crown_ibp import CROWNIBP
    from methods.training.fgsm import FGSM
    from methods.training.ibp import IBP
    from methods.training.pgd import PGD
    from methods.training.trades import TRADES

    return {
        "ibp, bound alone, statistics constant": (IBP(eps=EPS, kappa_end=0.0, detach_statistics=True), "≤ 2.6"),
        "ibp, clean and robust loss": (IBP(eps=EPS), "≤ 2.6"),
        "crown-ibp, fused loss": (CROWNIBP(eps=EPS), ""),
        "fgsm, GradAlign": (FGSM(eps=EPS), ""),
        "pgd, 7 steps": (PGD(eps=EPS), ""),
        "trades, 10 steps": (TRADES(eps=EPS), ""),
    }


def stepper(objective: Objective, x: Tensor, y: Tensor, clock: Clock, width: float) -> Callable[[], None]:
    """A training step (forward, backward, optimiser) of a fresh CNN7 half-way through its schedules."""
    import torch

    from methods.training.losses import CrossEntropy
    from methods.training.objective import Progress

    model = bench_nets.cnn7(clock.device, width).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    progress, task_loss = Progress(9, 10), CrossEntropy()

    def step() -> None:
        optimizer.zero_grad()
        objective.loss(model, x, y, task_loss, progress)[0].backward()
        optimizer.step()

    return step


def steps(names: list[str], clock: Clock, repeat: int, width: float, batch: int, row: str) -> list[Measured]:
    """Seconds of a step of each objective in `names` beside a plain step, in turns.

    A clean pass, a pass of centres and one of radii cost three plain steps when gradients flow through all of them, as
    published; the bound alone, with batch statistics held constant, needs no backward pass through the clean network.
    """
    from methods.training.natural import Natural

    x, y = bench_nets.digits_at(28, clock.device)
    x, y = x[:batch], y[:batch]
    found = []
    for name, (objective, goal) in objectives().items():
        if name not in names:
            continue
        ours, plain = clock.interleaved(
            stepper(objective, x, y, clock, width), stepper(Natural(), x, y, clock, width), repeat
        )
        ratio = ours.median / plain.median
        note = f"{batch / ours.median:.0f} images/s against {batch / plain.median:.0f}, {100 / ratio:.0f} %"
        found.append(Measured(row, f"{name}: step over a plain step", "s", ours, plain, ratio, goal, note))
    return found


def training(clock: Clock, repeat: int, width: float, batch: int) -> list[Measured]:
    """Every objective beside a plain step, and CROWN-IBP beside IBP."""
    found = steps(list(objectives()), clock, repeat, width, batch, "training")
    x, y = bench_nets.digits_at(28, clock.device)
    x, y = x[:batch], y[:batch]
    every = objectives()
    crown, ibp = (every[name][0] for name in ("crown-ibp, fused loss", "ibp, clean and robust loss"))
    ours, theirs = clock.interleaved(stepper(crown, x, y, clock, width), stepper(ibp, x, y, clock, width), repeat)
    what = "crown-ibp, fused loss: step over an IBP step"
    return [*found, Measured("training", what, "s", ours, theirs, ours.median / theirs.median, "≤ 2")]


def sampling(clock: Clock, repeat: int, width: float, draws: int = 512) -> list[Measured]:
    """`certify.estimate` beside the plain model on batches of the same size, the transform's own time taken out."""
    import certify
    from certify.probabilistic import throughput

    net, x, _ = bench_nets.build("cnn7-random", clock.device, width, 1)
    rates = [throughput(net, x, certify.Brightness(0.1), n=draws, repeats=3) for _ in range(max(1, min(repeat, 3)))]
    ours, plain = Spread.of([r.sampling for r in rates]), Spread.of([r.inference for r in rates])
    ratio = Spread.of([r.ratio_without_transform for r in rates]).median
    with_transform = Spread.of([r.ratio for r in rates]).median
    what = "sampling over inference and transform"
    note = (
        f"with the transform's time {with_transform:.3f} of plain inference; CNN7, brightness, {draws} draws, wall time"
    )
    return [Measured("sampling", what, "images/s", ours, plain, ratio, "≥ 0.95", note)]
