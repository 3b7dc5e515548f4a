"""The bench's table of bounds: net x method x number of images, beside a forward pass and beside auto-LiRPA."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from runs import bench_nets
from runs.alarm import OutOfTime, limit
from runs.bench_timing import Clock, Spread, settle_memory

if TYPE_CHECKING:
    from torch import Tensor, nn

    import certify

METHODS = ("ibp", "crown-ibp", "crown", "alpha-crown", "alpha-crown-full", "forward")
# auto-LiRPA's optimised bounds re-optimise the intervals of every layer, as "alpha-crown-full" does, unless fixed.
THEIRS = {
    "ibp": "IBP",
    "crown-ibp": "CROWN-IBP",
    "crown": "CROWN",
    "alpha-crown": "CROWN-Optimized-Fixed",
    "alpha-crown-full": "CROWN-Optimized",
}
UNCOMPARED = {"forward": "over brightness: forward bounds are for few parameters"}
IBP_GOAL, SPEED_GOAL, EXCESS_GOAL, LINEAR_GOAL = 2.2, 4.0, 1e-4, 1.25


@dataclass(frozen=True)
class Cell:
    """One method on one net and number of images.

    Attributes:
        seconds: of all images together; None when it did not end within the limit (`note` says so).
        peak_mb: peak memory while it ran once, of the process on a CPU, of the device on CUDA.
        forward: seconds of a plain forward pass of the same images.
        theirs: seconds of auto-LiRPA for *one image*, setting up its graph included; None where there is no answer.
        faster: auto-LiRPA's seconds an image over ours; > 1 when we are faster.
        lower: mean lower bound of the outputs, ours; `their_lower` auto-LiRPA's on its one image and ours there.
        width: mean width of our intervals over that of auto-LiRPA's, same image.
        excess: by how much an end of ours is looser at most, over the largest of their ends; <= 0 means never looser.
        growth: seconds an image over the seconds of a single image; 1 is linear in the batch.
    """

    net: str
    method: str
    images: int
    seconds: Spread | None
    peak_mb: float | None
    forward: Spread
    theirs: Spread | None = None
    faster: float | None = None
    lower: float | None = None
    their_lower: tuple[float, float] | None = None
    width: float | None = None
    excess: float | None = None
    growth: float | None = None
    note: str = ""

    @property
    def passes(self) -> float | None:
        """Seconds in units of forward passes of the same images."""
        return None if self.seconds is None else self.seconds.median / self.forward.median

    def goals(self) -> list[tuple[str, bool]]:
        """Goals that apply to this cell, each with whether it was met."""
        found = []
        if self.method == "ibp" and self.passes is not None:
            found.append((f"≤ {IBP_GOAL} passes", self.passes <= IBP_GOAL))
        if self.method in ("crown", "alpha-crown", "alpha-crown-full") and self.faster is not None:
            found.append((f"≥ {SPEED_GOAL:g}× faster", self.faster >= SPEED_GOAL))
        if self.excess is not None:
            found.append((f"excess ≤ {EXCESS_GOAL:g}", self.excess <= EXCESS_GOAL))
        if self.growth is not None:
            found.append((f"growth ≤ {LINEAR_GOAL}", self.growth <= LINEAR_GOAL))
        return found


def table(
    nets: Sequence[str],
    methods: Sequence[str],
    batches: Sequence[int],
    clock: Clock,
    repeat: int,
    width: float,
    seconds: float,
) -> Iterator[Cell]:
    """Measure cell after cell.

    Args:
        nets, methods: names in `bench_nets.NETS` and `METHODS`.
        batches: numbers of images, from small to large.
        clock: what is measured, and where.
        repeat: repetitions; fewer where one takes long.
        width: factor on the widths of the nets.
        seconds: limit for a cell; a larger batch is left out where a smaller one shows that it would pass the limit.
    """
    for name in nets:
        net, x, eps = bench_nets.build(name, clock.device, width, max(batches))
        forward = {
            n: clock.repeated(functools.partial(net, x[:n]), max(9, repeat), seconds) for n in sorted(set(batches))
        }
        for method in methods:
            one: Spread | None = None
            gone = ""
            theirs: Reference | None = None
            for n in sorted(set(batches)):
                if gone:
                    yield Cell(name, method, n, None, None, forward[n], note=gone)
                    continue
                if theirs is None:
                    theirs = reference(net, x[:1], eps, method, clock, repeat, seconds)
                cell = measure(name, net, x[:n], eps, method, clock, repeat, seconds, forward[n], theirs, one)
                yield cell
                if cell.seconds is None:
                    gone = f"not tried: {cell.note or 'no answer'} for {n}"
                elif n == 1:
                    one = cell.seconds
                following = [k for k in batches if k > n]
                if cell.seconds is not None and following and cell.seconds.median * min(following) / n > seconds:
                    gone = f"not tried: would pass the limit of {seconds:g} s"


@dataclass(frozen=True)
class Reference:
    """auto-LiRPA on one image: its bounds and seconds, or why there are none."""

    seconds: Spread | None
    bounds: tuple[Tensor, Tensor] | None
    note: str = ""


def reference(
    net: nn.Module, x: Tensor, eps: float, method: str, clock: Clock, repeat: int, seconds: float
) -> Reference:
    """auto-LiRPA's answer for one image (1, C, H, W), within `seconds`."""
    import certify
    from certify import lirpa

    if method not in THEIRS or not lirpa.available():
        return Reference(None, None, UNCOMPARED.get(method, ""))
    call = functools.partial(certify.bounds, net, x, certify.Linf(eps), f"auto-lirpa:{THEIRS[method]}")
    try:
        with limit(seconds):
            found = call()
            return Reference(clock.repeated(call, min(repeat, 3), seconds / 3), found)
    except OutOfTime:
        return Reference(None, None, f"auto-LiRPA: over {seconds:g} s")
    except RuntimeError as error:
        return Reference(None, None, f"auto-LiRPA: {str(error)[:80]}")


def measure(
    name: str,
    net: nn.Module,
    x: Tensor,
    eps: float,
    method: str,
    clock: Clock,
    repeat: int,
    seconds: float,
    forward: Spread,
    theirs: Reference,
    one: Spread | None,
) -> Cell:
    """One cell; `one` is the time of a single image, for the growth with the batch."""
    import torch

    import certify
    from runs.measure import Peak

    p = certify.Brightness(eps) if method == "forward" else certify.Linf(eps)
    graph = certify.Network(net, x[:2])

    def call() -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            return _bounds(graph, x, p, method)

    settle_memory()
    peak = Peak(clock.device)
    try:
        with limit(seconds), peak:
            low, high = call()
        with limit(seconds):
            spread = clock.repeated(call, repeat, seconds / 3)
    except OutOfTime:
        return Cell(name, method, len(x), None, None, forward, theirs.seconds, note=f"over {seconds:g} s")
    except NotImplementedError as error:
        return Cell(name, method, len(x), None, None, forward, theirs.seconds, note=str(error)[:80])
    found = Cell(name, method, len(x), spread, peak.mb, forward, theirs.seconds, lower=float(low.mean()))
    fields = dict(vars(found), note=theirs.note)
    if one is not None and len(x) > 1:
        fields["growth"] = spread.median / len(x) / one.median
    if theirs.seconds is not None:
        fields["faster"] = theirs.seconds.median / (spread.median / len(x))
    if theirs.bounds is not None:
        low, high = low[:1], high[:1]
        below, above = theirs.bounds
        size = float(torch.maximum(below.abs(), above.abs()).max())
        looser = float(torch.cat([below - low, high - above]).max())  # NaN where an end is
        fields["their_lower"] = (float(low.mean()), float(below.mean()))
        width = float((above - below).mean())
        fields["width"] = float((high - low).mean()) / width if width > 0 else None
        fields["excess"] = looser / max(size, torch.finfo(low.dtype).tiny)
    return Cell(**fields)


def _bounds(network: certify.Network, x: Tensor, p: certify.Perturbation, method: str) -> tuple[Tensor, Tensor]:
    from certify.bounds import bound_rows

    return bound_rows(network.graph, x, p, method, None)


def lines(cells: Sequence[Cell]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Heading and rows of the table, as text."""
    theirs = any(cell.theirs is not None or cell.width is not None for cell in cells)
    heading = ["net", "method", "images", "seconds", "peak MB", "forward passes", "growth", "mean lower"]
    heading += ["auto-LiRPA, 1 image", "faster", "width ratio", "excess"] if theirs else []
    heading += ["goals", "note"]
    rows = []
    for cell in cells:
        row = [
            cell.net,
            cell.method,
            str(cell.images),
            "–" if cell.seconds is None else cell.seconds.text(),
            _number(cell.peak_mb, ".0f"),
            _number(cell.passes, ".3g"),
            _number(cell.growth, ".2f"),
            _number(cell.lower, ".4g"),
        ]
        if theirs:
            row += [
                "–" if cell.theirs is None else cell.theirs.text(),
                "–" if cell.faster is None else f"{cell.faster:.3g}×",
                _number(cell.width, ".4f"),
                _number(cell.excess, ".1e"),
            ]
        row.append(", ".join(f"{text}: {'met' if met else 'MISSED'}" for text, met in cell.goals()) or "–")
        rows.append((*row, cell.note))
    return tuple(heading), rows


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)
