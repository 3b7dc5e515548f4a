"""From what the command line selects to a list of cells."""

from __future__ import annotations

import difflib
import importlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from runs import plugins
from runs.cell import Cell, Network, Perturb
from runs.suites.preset import Block, Preset

_SUITES: Mapping[str, str] = {
    "arena": "every pruning method on the same networks, data and budgets, certified in the same way",
    "usn": "USN pruning and its baselines on keypoints: the paper's Tables I to III, Figures 3 and 4, and studies",
    "nrs": "NRSLoss and iterative pruning: every state certified; the paper's Tables I to VI and Figures 2 to 10",
    "car": "CAR and its baselines under semantic edits, certified by sampling; the paper's Tables 1 to 5 and figures",
}


def suites() -> dict[str, str]:
    """Names of the suites with one line each."""
    return dict(_SUITES)


def _presets(suite: str) -> Mapping[str, Callable[[], Preset]]:
    check("suite", suite, _SUITES)
    presets: Mapping[str, Callable[[], Preset]] = importlib.import_module(f"runs.suites.{suite}").PRESETS
    return presets


def preset_names(suite: str) -> dict[str, str]:
    """Names of a suite's presets with the first line of their documentation."""
    return {name: (function.__doc__ or "").strip().splitlines()[0] for name, function in _presets(suite).items()}


def check(kind: str, name: str, known: Iterable[str]) -> None:
    """Raise ValueError with close matches when ``name`` is unknown."""
    names = list(known)
    if name in names:
        return
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(close)}?" if close else ""
    raise ValueError(f"unknown {kind} {name!r}.{hint} Known: {', '.join(names)}.")


@dataclass(frozen=True)
class Selection:
    """What the command line asks for on top of a preset; None keeps the preset's choice."""

    methods: tuple[str, ...] | None = None
    models: tuple[str, ...] | None = None
    datasets: tuple[str, ...] | None = None
    perturbations: tuple[Perturb, ...] | None = None
    seeds: tuple[int, ...] | None = None
    ratios: tuple[float, ...] | None = None
    trainings: tuple[str, ...] | None = None
    images: int | None = None
    verifier: str | None = None
    limit: int | None = None


@dataclass(frozen=True)
class Plan:
    """Cells with their expected seconds, in the order in which they run."""

    suite: str
    preset: Preset
    cells: tuple[Cell, ...]
    costs: tuple[float, ...]
    prepare_seconds: float

    def seconds(self, done: Iterable[Cell] = ()) -> float:
        """Expected seconds of the cells that are not ``done``."""
        skip = set(done)
        left = sum(cost for cell, cost in zip(self.cells, self.costs) if cell not in skip)
        return left / self.preset.at_once + self.prepare_seconds if left else 0.0


def plan(suite: str, preset: str, selection: Selection) -> Plan:
    """The cells of a suite's preset, narrowed or widened by a selection.

    Raises:
        ValueError: an unknown name, or a selection that leaves nothing to run.
    """
    presets = _presets(suite)
    check("preset", preset, presets)
    chosen = plugins.widen(presets[preset](), selection.methods, selection.datasets)
    available = {block.data.name: None for block in chosen.blocks}
    names = selection.datasets or chosen.default
    for name in names:
        check(f"data set of preset {preset}", name, available)
    blocks = []
    for name in names:
        siblings = [block for block in chosen.blocks if block.data.name == name]
        blocks += [_narrow(block, selection, siblings) for block in siblings]
    pairs = list(dict.fromkeys(pair for block in blocks for pair in block.cells()))
    if not pairs:
        raise ValueError("this selection leaves no cell to run: " + _what(selection))
    pairs = pairs[: selection.limit]
    return Plan(
        suite,
        chosen,
        tuple(cell for cell, _ in pairs),
        tuple(cost for _, cost in pairs),
        sum(block.prepare_seconds for block in blocks),
    )


def _what(selection: Selection) -> str:
    given = [f"{name}={value!r}" for name, value in vars(selection).items() if value is not None]
    return ", ".join(given) or "nothing selected"


def _rule_names(blocks: Iterable[Block]) -> list[str]:
    """Names by which the rules of some blocks may be asked for."""
    rules = [rule for block in blocks for rule in block.rules]
    return [name for rule in rules for name in (rule.variant, rule.method) if name]


def variants(suite: str) -> tuple[str, ...]:
    """Names of rules that a suite knows besides the pruning methods."""
    module = importlib.import_module(f"runs.suites.{suite}") if suite in _SUITES else None
    return tuple(getattr(module, "VARIANTS", ()))


def _narrow(block: Block, selection: Selection, siblings: Sequence[Block]) -> Block:
    """``block`` as the selection wants it; ``siblings`` are all blocks of its data set, which may hold other rules."""
    if selection.methods is not None:
        for name in selection.methods:
            check(f"method on {block.data.name}", name, dict.fromkeys(_rule_names(siblings)))
        # A variant may have the name of its method: "usn" is one of USN's rules, "random" another.
        variants = {rule.variant for sibling in siblings for rule in sibling.rules}
        wanted = set(selection.methods)
        rules = (r for r in block.rules if r.variant in wanted or r.method in wanted - variants)
        block = replace(block, rules=tuple(rules))
    if selection.ratios is not None:
        block = replace(
            block,
            rules=tuple(
                rule if rule.ratios == (0.0,) else replace(rule, ratios=selection.ratios) for rule in block.rules
            ),
        )
    if selection.trainings is not None:
        for name in selection.trainings:
            known = dict.fromkeys(s.training.objective for sibling in siblings for s in sibling.schedules)
            check(f"training on {block.data.name}", name, known)
        block = replace(
            block, schedules=tuple(s for s in block.schedules if s.training.objective in selection.trainings)
        )
    if selection.models is not None:
        networks = tuple(_network(block.networks, name) for name in selection.models)
        block = replace(block, networks=networks, timed_width=block.networks[-1].width)
    if selection.perturbations is not None:
        block = replace(block, perturbations=selection.perturbations)
    if selection.seeds is not None:
        block = replace(block, seeds=selection.seeds)
    if selection.images is not None or selection.verifier is not None:
        verifier = replace(
            block.verifier,
            images=selection.images or block.verifier.images,
            method=selection.verifier or block.verifier.method,
        )
        block = replace(block, verifier=verifier)
    return block


def named_width(text: str) -> tuple[str, float | None]:
    """The network's name and width in ``NAME`` or ``NAME:WIDTH``.

    Raises:
        ValueError: the width is no number > 0.
    """
    name, colon, width = text.partition(":")
    try:
        value = float(width) if colon else None
    except ValueError:
        value = 0.0
    if value is not None and not 0 < value < math.inf:
        raise ValueError(f"cannot read the network {text!r}; expected NAME or NAME:WIDTH such as cnn7_cw:0.5")
    return name, value


def _network(networks: Sequence[Network], text: str) -> Network:
    """The block's own entry for this name, else this name with the head of the block's last network; of the width that
    is named, else of the entry's or the last one's."""
    name, width = named_width(text)
    own = [network for network in networks if network.name == name]
    found = own[0] if own else replace(networks[-1], name=name, settings=())
    return found if width is None else replace(found, width=width)
