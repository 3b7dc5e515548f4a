"""Which records a question is put to: a claim is about some perturbations and about one kind of certificate."""

from __future__ import annotations

import math
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
class Under:
    """A question put to verdicts that rest on bounds, under some kinds of perturbations alone.

    With ``radii`` only under those of these sizes; with ``trained`` only at the radius of the training.
    """

    question: Question
    kinds: tuple[str, ...]
    radii: tuple[float, ...] = ()
    trained: bool = False

    def ask(self, found: Sequence[Observation]) -> Evidence | None:
        return self.question.ask([one for one in found if self._applies(one)])

    def _applies(self, one: Observation) -> bool:
        radius, eps = one.result["magnitude"], one.record["cell"]["training"]["eps"]
        return (
            not is_sampled(one)
            and one.kind in self.kinds
            and (not self.radii or any(math.isclose(radius, own) for own in self.radii))
            and (not self.trained or (eps is not None and math.isclose(radius, eps)))
        )


@dataclass(frozen=True)
class Sampled:
    """A question put to sampled certificates alone, whose rows differ in training as well as in pruning.

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
