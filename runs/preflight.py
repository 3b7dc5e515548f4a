"""What can be known to fail before any cell starts.

Data sets, generators of edits and published weights that are not there, perturbations that nobody accepts, and draws
too few to certify anything.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from runs import pretrained
from runs.cell import SEMANTIC, Cell, Data, Perturb, Verifier
from runs.packages import ours
from runs.suites import car

MADE = ("digits", "aircraft", "scenes_flowers", "scenes_faces")
"""Data sets that come with a library or are rendered: there is no file that could be missing."""


def check_data(cells: Iterable[Cell], data_dir: Path | None) -> None:
    """Look for what the cells need from outside: data sets that come from files, generators, published weights.

    Before that, whether verifiers that draw at random can certify anything at all. Weights that torchvision or timm
    publish are fetched into their cache here, where they are not yet.

    Raises:
        ValueError: something is missing, damaged, not accepted, or can never certify; the message says where it was
            looked for and what to run or to change.
    """
    plan = list(cells)
    check_verifiers(plan)
    for data in dict.fromkeys(cell.data for cell in plan):
        edits = _edits(cell for cell in plan if cell.data == data)
        if data.name.partition(":")[0] not in MADE or any(edit.kind == "diffae" for edit in edits):
            _check_edits(edits, _find(data, data_dir), data_dir)
    _check_weights(plan, data_dir)


def check_verifiers(cells: Iterable[Cell]) -> None:
    """Whether those that draw at random can certify anything, and no other is asked about an edit without a set.

    Raises:
        ValueError: settings that are unknown or out of range, fewer draws than eps and confidence need without a flip
            (the message says how many), or a perturbation that has a law of draws alone and another verifier.
    """
    plan = list(cells)
    for cell in plan:
        if cell.verifier.method != car.METHOD and (alone := [p for p in cell.perturbations if p.kind in SEMANTIC]):
            raise ValueError(
                f"{alone[0].label} has no set of images that the verifier {cell.verifier.method!r} could decide on, "
                f"only random draws: use --verifier {car.METHOD}"
            )
    for verifier in dict.fromkeys(cell.verifier for cell in plan if cell.verifier.method == car.METHOD):
        _check_draws(verifier)


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


def _find(data: Data, data_dir: Path | None) -> Any:
    """One test image of a data set."""
    try:
        return ours("datasets").load(data.name, data_dir, "test", limit=1, **data.options)
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
