"""A claim, what the papers print on it, what the records say, and the verdict."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum

from runs.claims.observation import Observation, observations
from runs.claims.questions import METHODS, SEEDS, Evidence, Question
from runs.statistics import holm
from runs.store import Record

LEVEL = 0.05


class Verdict(Enum):
    """What the records say of a claim."""

    SUPPORTED = "supported"
    CONTRADICTED = "contradicted"
    UNDECIDED = "undecided"
    NOT_RUN = "no record"


@dataclass(frozen=True)
class Finding:
    """What the printed numbers say themselves: comparisons for and against the claim, and ties.

    ``significant`` counts comparisons with p < 0.05 after Holm, None where the papers give no counts to test.
    ``universal`` marks claims of the kind "always" and "highest", which one comparison against them contradicts.
    """

    wins: int
    losses: int
    ties: int
    significant: int | None = None
    universal: bool = True
    note: str = ""

    @property
    def contradicted(self) -> bool:
        """Whether the printed numbers contradict the printed sentence."""
        return self.losses > 0 if self.universal else self.losses > self.wins

    @property
    def text(self) -> str:
        """One line for tables."""
        parts = [f"{self.wins} for, {self.losses} against, {self.ties} tied"]
        if self.significant is not None:
            parts.append(f"{self.significant} significant after Holm")
        if self.note:
            parts.append(self.note)
        return ("CONTRADICTS ITSELF: " if self.contradicted else "") + "; ".join(parts)


@dataclass(frozen=True)
class Claim:
    """One quantitative sentence of a paper.

    ``printed`` holds the sentence against the paper's own tables (None where it prints no numbers on it); ``question``
    puts it to the records; ``decide`` is the command whose records would decide it.
    """

    id: str
    paper: str
    where: str
    text: str
    question: Question
    decide: str
    printed: Callable[[], Finding] | None = None


@dataclass(frozen=True)
class Answer:
    """A claim with its verdict; ``p`` is Holm-adjusted over all claims on which there is evidence."""

    claim: Claim
    verdict: Verdict
    finding: Finding | None
    evidence: Evidence | None
    p: float | None
    reason: str


def evaluate(claims: Sequence[Claim], records: Iterable[Record]) -> list[Answer]:
    """The verdict on each claim, in order.

    A claim is supported or contradicted when the test against "no difference" has p < 0.05 after Holm's adjustment over
    all claims that have evidence, on at least three seeds; else it is undecided.

    Raises:
        ValueError: a record's cell cannot be read.
    """
    found: list[Observation] = observations(records)
    asked = [claim.question.ask(found) for claim in claims]
    adjusted = iter(holm([evidence.p for evidence in asked if evidence is not None]))
    return [
        _answer(claim, evidence, None if evidence is None else next(adjusted)) for claim, evidence in zip(claims, asked)
    ]


def _answer(claim: Claim, evidence: Evidence | None, p: float | None) -> Answer:
    finding = claim.printed() if claim.printed is not None else None
    if evidence is None or p is None:
        return Answer(claim, Verdict.NOT_RUN, finding, None, None, f"run {claim.decide}")
    if evidence.seeds < SEEDS:
        few = "one seed" if evidence.seeds == 1 else f"{evidence.seeds} seeds"
        return Answer(claim, Verdict.UNDECIDED, finding, evidence, p, f"{few}: run {claim.decide} with --seeds 0 1 2")
    if p >= LEVEL:
        return Answer(claim, Verdict.UNDECIDED, finding, evidence, p, _more(claim, evidence))
    verdict = Verdict.SUPPORTED if evidence.difference > 0 else Verdict.CONTRADICTED
    return Answer(claim, verdict, finding, evidence, p, "")


def _more(claim: Claim, evidence: Evidence) -> str:
    """What would decide an open claim: more of whatever the test counts, or a larger preset."""
    if evidence.unit == METHODS:
        return f"too few methods pass the test: more images (--images) or {claim.decide}"
    if evidence.unit == "images":
        return (
            f"a difference of {abs(evidence.difference):.1%} is within chance: more images (--images) or {claim.decide}"
        )
    return f"within the spread of {evidence.seeds} seeds: more seeds (--seeds) or {claim.decide}"
