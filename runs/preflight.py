"""What can be known to fail before any cell starts.

Data sets, generators of edits and published weights that are not there, perturbations that nobody accepts or that the
verifier does not decide, more test images than there are, and draws too few to certify anything.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runs import pretrained
from runs.cell import SEMANTIC, Cell, Data, Perturb, Verifier, recorded_by_state
from runs.packages import ours
from runs.suites import car


@dataclass(frozen=True)
class Facts:
    """What decides whether a cell can be certified on a data set.

    ``inputs`` is how many values an image has, ``test`` how many test images there are.
    """

    task: str
    channels: int
    inputs: int
    test: int


MADE: Mapping[str, Facts] = {
    "digits": Facts("classification", 1, 64, 360),
    "aircraft": Facts("keypoints", 3, 12288, 154),
    "aircraft:paper": Facts("keypoints", 3, 12288, 154),
    "scenes_flowers": Facts("classification", 3, 12288, 200),
    "scenes_flowers:full": Facts("classification", 3, 12288, 819),
    "scenes_faces": Facts("classification", 3, 12288, 200),
    "scenes_faces:full": Facts("classification", 3, 12288, 1215),
}
"""Data sets that come with a library or are rendered: no file could be missing, and none is read to know them.

Images of another size than 64 px have other ``inputs``, but never so few that it matters.
"""

FEW = ("line", "line-branch", "line-enumerate", "deviation")
"""Verifiers of perturbations that have few parameters."""

SOME = (*FEW, "bab", "milp")
"""Verifiers that do not take every perturbation."""

COLOURED = ("hue", "saturation", "warmth")
"""Perturbations of RGB images alone."""


def check_data(cells: Iterable[Cell], data_dir: Path | None) -> None:
    """Look for what the cells need from outside: data sets that come from files, generators, published weights.

    Before that, whether their verifiers can decide anything at all. Weights that torchvision or timm publish are
    fetched into their cache here, where they are not yet.

    Raises:
        ValueError: something is missing, damaged, not accepted, or can never certify; the message says where it was
            looked for and what to run or to change.
    """
    plan = list(cells)
    check_verifiers(plan)
    for data in dict.fromkeys(cell.data for cell in plan):
        own = [cell for cell in plan if cell.data == data]
        edits = _edits(own)
        if data.name in MADE and not edits:
            continue
        pack = _find(data, data_dir, 1 if data.name in MADE else max(cell.verifier.images for cell in own))
        for cell in own if data.name not in MADE else ():
            _check_facts(cell, Facts(pack.task, pack.in_channels, pack.images[0].numel(), len(pack)))
        _check_edits(edits, pack, data_dir)
    _check_weights(plan, data_dir)


def check_verifiers(cells: Iterable[Cell]) -> None:
    """Whether the verifiers can decide what they will be asked, as far as that is known without any file.

    Raises:
        ValueError: a perturbation, a data set or a number of images that a verifier does not take; settings of random
            draws that are unknown or out of range, or fewer draws than eps and confidence need without a flip (the
            message says how many).
    """
    plan = list(cells)
    alike: dict[Any, Cell] = {}
    for cell in plan:
        alike.setdefault((cell.verifier.method, cell.perturbations, recorded_by_state(cell.pruning)), cell)
    for cell in alike.values():
        for named in cell.perturbations:
            if (why := _undecided(cell, named)) is not None:
                raise ValueError(f"{cell.label}: {why}")
    for cell in plan:
        if cell.data.name in MADE:
            _check_facts(cell, MADE[cell.data.name])
    for verifier in dict.fromkeys(cell.verifier for cell in plan if cell.verifier.method == car.METHOD):
        _check_draws(verifier)


def _undecided(cell: Cell, named: Perturb) -> str | None:
    """Why the verifier of a cell cannot decide a perturbation, and what to do: what `certify.verify` would refuse."""
    method, sampled = cell.verifier.method, cell.verifier.method == car.METHOD
    if named.kind in SEMANTIC and not sampled:
        return (
            f"{named.label} has no set of images that the verifier {method!r} could decide on, only random draws: use "
            f"--verifier {car.METHOD}"
        )
    if recorded_by_state(cell.pruning) and named.kind in SEMANTIC:
        return f"every state is attacked by PGD, which {named.label} has no set of images for; use the suite car"
    if not (recorded_by_state(cell.pruning) or method in SOME):
        return None
    from certify.curves import Path as Curve
    from certify.motion import parametric
    from certify.perturbations import L2
    from runs import measure

    p = measure.perturbation(named)
    if recorded_by_state(cell.pruning) and isinstance(p, Curve):
        return (
            f"every state is attacked by PGD, which does not follow {named.label}; use linf, l2, brightness, contrast"
        )
    if method in FEW and not parametric(p):
        return (
            f"the verifier {method!r} decides perturbations of one or two parameters, not {named.label}; use "
            "--verifier auto, or --perturbations such as brightness:2/255"
        )
    if method in ("bab", "milp") and isinstance(p, Curve):
        return f"the verifier {method!r} searches boxes and straight lines, not {named.label}; use --verifier line"
    if method == "milp" and isinstance(p, L2):
        return f"the verifier 'milp' searches boxes and straight lines, not {named.label}; use --verifier bab"
    return None


def _check_facts(cell: Cell, facts: Facts) -> None:
    """Refuse a verifier that does not take the labels of a data set, colours of grey images, and too many images."""
    method, name = cell.verifier.method, cell.data.name
    why = None
    if method == "deviation" and facts.task != "keypoints":
        why = f"the verifier 'deviation' measures how far keypoints move, but {name} has classes; use --verifier auto"
    elif method == car.METHOD and facts.task == "keypoints":
        why = (
            f"the verifier {method!r} counts changed labels, but {name} has keypoints; use --verifier deviation or auto"
        )
    elif facts.channels != 3 and (coloured := [p.label for p in cell.perturbations if p.kind in COLOURED]):
        why = f"{coloured[0]} changes the colours of RGB images, but those of {name} are grey; leave it out"
    elif method == "forward" and (wide := _too_wide(cell, facts.inputs)):
        why = f"the verifier 'forward' does not take {wide[0]} of images with {facts.inputs:,} values; use crown"
    elif cell.verifier.images > facts.test:
        why = (
            f"{cell.verifier.images:,} test images are asked for, but {name} has {facts.test:,}: --images {facts.test}"
        )
    if why is not None:
        raise ValueError(f"{cell.label}: {why}")


def _too_wide(cell: Cell, inputs: int) -> list[str]:
    """Perturbations for which forward bounds would carry a map for each of too many values."""
    from certify.bounds.forward import MAX_PARAMETERS
    from certify.perturbations import AffineFamily
    from runs import measure

    found = [p for p in cell.perturbations if not isinstance(measure.perturbation(p), AffineFamily)]
    return [p.label for p in found] if inputs > MAX_PARAMETERS else []


def _check_draws(verifier: Verifier) -> None:
    from certify.probabilistic import required_samples
    from runs import car_sampling

    how = car_sampling.sampling(verifier)
    over = verifier.images if how.joint else 1
    needed = required_samples(how.eps, how.confidence, how.bound, images=over)
    if how.n is not None and how.n < needed:
        joint = f" jointly over {over} images" if how.joint else ""
        raise ValueError(
            f"the verifier {car.METHOD} can never certify an image: {how.n:,} draws do not show eps = {how.eps:g} at "
            f"{100 * how.confidence:g} % confidence{joint} by {how.bound}, even without a flip; set n to {needed:,} or "
            "more (or to None for the fewest), or eps larger"
        )


def _edits(cells: Iterable[Cell]) -> list[Perturb]:
    """The semantic edits that cells of one data set are trained on and certified against."""
    named = (p for cell in cells for p in (*cell.perturbations, cell.data.edits) if p is not None)
    return [p for p in dict.fromkeys(named) if p.kind in SEMANTIC]


def _check_edits(edits: Iterable[Perturb], pack: Any, data_dir: Path | None) -> None:
    for named in edits:
        import torch

        from runs import car_edits

        try:
            car_edits.transform(named, pack, data_dir, torch.device("cpu"))
        except (FileNotFoundError, ValueError, RuntimeError) as error:
            raise ValueError(f"the plan edits {pack.name} by {named.label}: {error}") from error


def _check_weights(cells: Iterable[Cell], data_dir: Path | None) -> None:
    """The first network that fails, and which others have no file either, so that all can be put in place at once.

    They are not asked for: without a connection timm takes most of a minute to give up.
    """
    networks = list(dict.fromkeys(cell.network for cell in cells))
    for i, network in enumerate(networks):
        try:
            pretrained.check(network, data_dir)
        except ValueError as error:
            others = [other.name for other in networks[i + 1 :] if pretrained.source(other, data_dir) is True]
            also = f". The plan's other networks without a file there: {', '.join(others)}" if others else ""
            raise ValueError(f"{error}{also}") from error


def _find(data: Data, data_dir: Path | None, images: int) -> Any:
    """The first test images of a data set, or all where there are fewer."""
    try:
        return ours("datasets").load(data.name, data_dir, "test", limit=images, **data.options)
    except FileNotFoundError as error:
        raise ValueError(f"the plan needs the data set {data.name}: {error}") from error


def check_perturbations(perturbations: Iterable[Perturb]) -> None:
    """Make every perturbation that a verifier would be given.

    Raises:
        ValueError: a magnitude that makes no sense, such as 8 for images in [0, 1].
    """
    from runs import measure

    for named in dict.fromkeys(perturbations):
        if named.kind in SEMANTIC:
            continue
        try:
            measure.perturbation(named)
        except (TypeError, ValueError) as error:
            raise ValueError(f"perturbation {named.kind}:{named.magnitude:g}: {error}") from error
