"""Rankings: who is ahead among networks of the same size, training and budget, with ties left as ties.

Networks are matched by what was measured of them, not by what was asked for: by the share of parameters that is left,
and by the share of multiply-adds that runs after pruned channels are removed. An entrant's places follow from sign
tests between all pairs over test images (`runs.statistics.ranks`); a difference that no test shows is a tie.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from runs.statistics import Interval, MeanSd, Rank, paired_interval, ranks

if TYPE_CHECKING:
    from rich.table import Table as RichTable

TOLERANCE = 0.04
"""How far a share may be from the one that is matched: a channel of a narrow layer is worth about so much."""

LEVEL = 0.05
MEASURES = {"parameters": "parameters left", "flops": "multiply-adds executed"}


@dataclass(frozen=True)
class Entrant:
    """A row of a leaderboard as rankings see it.

    Attributes:
        method, ratio, training, budget: what it is; ``budget`` is its number of epochs in all, None where not recorded.
        parameters, flops: shares left and executed.
        verified: mean and spread over its seeds.
        bits: by seed, a character for each test image, "1" where it is verified.
    """

    method: str
    ratio: float
    training: str
    budget: int | None
    parameters: float
    flops: float
    verified: MeanSd
    bits: Mapping[int, str]

    @property
    def images(self) -> int:
        """How many test images every seed has verdicts on; 0 where seeds differ."""
        counts = {len(own) for own in self.bits.values()}
        return counts.pop() if len(counts) == 1 else 0

    def scores(self, seeds: Iterable[int]) -> tuple[float, ...]:
        """For each test image, the share of these seeds in which it is verified."""
        chosen = [self.bits[seed] for seed in seeds]
        return tuple(sum(bit == "1" for bit in image) / len(chosen) for image in zip(*chosen, strict=True))


@dataclass(frozen=True)
class Standing:
    """An entrant's places, and its difference to the dense network, or to the best where dense is missing."""

    entrant: Entrant
    rank: Rank
    difference: float
    interval: Interval


@dataclass(frozen=True)
class Ranking:
    """Entrants matched by one measure under one training; ``reference`` is what their differences are to.

    Places and differences are over the ``seeds`` that all of them have.
    """

    measure: str
    share: float
    training: str
    budget: int | None
    seeds: tuple[int, ...]
    reference: str
    standings: tuple[Standing, ...]

    @property
    def title(self) -> str:
        """What is matched, for instance "Ranking at 50 % (±4) of parameters left · natural · 30 epochs"."""
        epochs = "" if self.budget is None else f" · {self.budget} epochs in all"
        return (
            f"Ranking at {100 * self.share:.0f} % (±{100 * TOLERANCE:.0f}) of {MEASURES[self.measure]} · "
            f"{self.training}{epochs}"
        )

    @property
    def verdict(self) -> str:
        """The outcome in words."""
        behind = [s.entrant.method for s in self.standings if s.rank.first > 1]
        if not behind:
            return "No method is significantly ahead of another: all are tied."
        leaders = [s.entrant.method for s in self.standings if s.rank.first == 1]
        lead = "Tied for the lead" if len(leaders) > 1 else "In the lead"
        return f"{lead}: {', '.join(leaders)}. Beaten by at least one: {', '.join(behind)}."


def build(entrants: Sequence[Entrant], least_seeds: int) -> tuple[Ranking, ...]:
    """Every ranking of at least two pruned entrants; those with fewer than ``least_seeds`` seeds are not ranked.

    Entrants are ranked within a training and, where it is recorded, a budget, on the seeds that all of them have. The
    dense network of the same training and budget is ranked with them, whatever its size.
    """
    enough = [entrant for entrant in entrants if len(entrant.bits) >= least_seeds and entrant.images]
    shares = sorted({round(1 - entrant.ratio, 9) for entrant in enough if entrant.ratio > 0}, reverse=True)
    found = []
    for training, budget in dict.fromkeys((entrant.training, entrant.budget) for entrant in enough):
        alike = [entrant for entrant in enough if (entrant.training, entrant.budget) == (training, budget)]
        dense = [entrant for entrant in alike if entrant.ratio == 0]
        for measure in MEASURES:
            for share in shares:
                near = [
                    entrant
                    for entrant in alike
                    if entrant.ratio > 0 and abs(getattr(entrant, measure) - share) <= TOLERANCE
                ]
                members = [*dense[:1], *near]
                seeds = sorted(set.intersection(*(set(entrant.bits) for entrant in members))) if near else []
                if len(near) >= 2 and len(seeds) >= least_seeds and len({one.images for one in members}) == 1:
                    found.append(_ranking(measure, share, training, budget, tuple(seeds), dense[:1], near))
    return tuple(found)


def _ranking(
    measure: str, share: float, training: str, budget: int | None, seeds: tuple[int, ...], dense: Sequence[Entrant],
    near: Sequence[Entrant],
) -> Ranking:  # fmt: skip
    members = [*dense, *near]
    scores = [entrant.scores(seeds) for entrant in members]
    places = ranks(scores, LEVEL)
    reference = 0 if dense else max(range(len(near)), key=lambda i: near[i].verified.mean)
    standings = []
    for entrant, own, rank in zip(members, scores, places):
        differences = [a - b for a, b in zip(own, scores[reference])]
        mean = sum(differences) / len(differences)
        standings.append(Standing(entrant, rank, mean, paired_interval(differences)))
    standings.sort(key=lambda s: (s.rank.first, s.rank.last, -s.entrant.verified.mean))
    name = "dense" if dense else near[reference].method
    return Ranking(measure, share, training, budget, seeds, name, tuple(standings))


HEADINGS = ("Place", "Method", "Verified %", "Δ {reference} [95 %]", "Params %", "FLOPs % run")


def cells(ranking: Ranking) -> list[tuple[str, ...]]:
    """The rows of a ranking as text, in the order of :data:`HEADINGS`."""
    rows: list[tuple[str, ...]] = []
    for standing in ranking.standings:
        entrant = standing.entrant
        difference = f"{100 * standing.difference:+.1f}"
        low, high = 100 * standing.interval.low, 100 * standing.interval.high
        difference = "–" if entrant.method == ranking.reference else f"{difference} [{low:+.0f}, {high:+.0f}]"
        spread = "" if entrant.verified.sd is None else f" ±{100 * entrant.verified.sd:.1f}"
        rows.append(
            (
                str(standing.rank),
                entrant.method,
                f"{100 * entrant.verified.mean:.1f}{spread}",
                difference,
                f"{100 * entrant.parameters:.0f}",
                f"{100 * entrant.flops:.0f}",
            )
        )
    return rows


def headings(ranking: Ranking) -> tuple[str, ...]:
    """Column headings of a ranking."""
    return tuple(heading.format(reference=ranking.reference) for heading in HEADINGS)


NOTE = (
    "places that overlap are ties: sign tests over test images between all pairs, Holm-adjusted, 5 %. Δ has an "
    "approximate 95 % interval over test images."
)


def grid(ranking: Ranking) -> RichTable:
    """A ranking for a terminal."""
    from rich.markup import escape
    from rich.table import Table as RichTable

    table = RichTable(title=escape(ranking.title), caption=escape(ranking.verdict), title_justify="left")
    table.caption_justify = "left"
    for heading in headings(ranking):
        table.add_column(escape(heading), justify="left" if heading == "Method" else "right", no_wrap=True)
    for row in cells(ranking):
        table.add_row(*map(escape, row), style="dim" if row[1] == "dense" else None)
    return table


def markdown(ranking: Ranking) -> list[str]:
    """A ranking as lines of GitHub-flavoured Markdown."""
    shown = headings(ranking)
    lines = [f"**{ranking.title}**", "", "| " + " | ".join(shown) + " |"]
    lines.append("|" + "|".join(":--" if heading == "Method" else "--:" for heading in shown) + "|")
    lines += ["| " + " | ".join(row) + " |" for row in cells(ranking)]
    return [*lines, "", ranking.verdict, ""]


def page(ranking: Ranking) -> str:
    """A ranking as a piece of an HTML page."""
    import html

    e, shown = html.escape, headings(ranking)
    left = [' class="l"' if heading == "Method" else "" for heading in shown]
    head = "".join(f"<th{kind}>{e(heading)}</th>" for heading, kind in zip(shown, left))
    body = "".join(
        "<tr>" + "".join(f"<td{kind}>{e(text)}</td>" for text, kind in zip(row, left)) + "</tr>"
        for row in cells(ranking)
    )
    return (
        f'<h4>{e(ranking.title)}</h4><div class="wrap"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody>'
        f'</table></div><p class="note">{e(ranking.verdict)}</p>'
    )
