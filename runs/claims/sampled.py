"""Questions about networks that are certified by sampling, whose rows differ in training as well as in pruning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from runs.cell import digest, from_dict
from runs.claims.observation import Observation, Pick
from runs.claims.questions import Evidence, Question
from runs.suites import car


def is_sampled(one: Observation) -> bool:
    """Whether the verdicts rest on random draws, each with a confidence, instead of bounds."""
    return bool(one.record["cell"]["verifier"]["method"] == car.METHOD)


@dataclass(frozen=True)
class Sampled:
    """A question put to sampled certificates alone.

    The rows of the CAR paper are trainings and prunings together, so networks are compared whose training differs. With
    ``edits_differ`` they share training, method and ratio instead, and differ in how many edited images they train on.
    """

    question: Question
    edits_differ: bool = False

    def ask(self, found: Sequence[Observation]) -> Evidence | None:
        return self.question.ask(
            [replace(one, context=self._context(one), budget=None) for one in found if is_sampled(one)]
        )

    def _context(self, one: Observation) -> str:
        cell = from_dict(one.record["cell"])
        whole = cell.to_dict()
        same: dict[str, Any] = {name: whole[name] for name in ("network", "data", "verifier")}
        if self.edits_differ:
            same |= {
                "training": whole["training"],
                "pruning": whole["pruning"],
                "data": {**whole["data"], "settings": cell.data.options},
            }
        return digest(same | {"perturbation": one.perturbation, "images": one.result["images"]})


def edited(*counts: int) -> Pick:
    """Networks trained on so many edited images."""

    def pick(found: Observation) -> bool:
        return from_dict(found.record["cell"]).data.edited in counts

    return pick
