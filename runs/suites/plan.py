"""From what the command line selects to a list of cells."""

from __future__ import annotations

import difflib
import importlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from runs import plugins
from runs.cell import Cell, Network, Perturb, Pruning, Settings, Verifier, recorded_by_state
from runs.suites.preset import Block, Preset, Rule

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
    presets: Mapping[str, Callable[[], Preset]] = _module(suite).PRESETS
    return presets


def _module(suite: str) -> Any:
    check("suite", suite, _SUITES)
    return importlib.import_module(f"runs.suites.{suite}")


def preset_names(suite: str) -> dict[str, str]:
    """Names of a suite's presets with the first line of their documentation."""
    return {name: (function.__doc__ or "").strip().splitlines()[0] for name, function in _presets(suite).items()}


def check(kind: str, name: str, known: Iterable[str], near: Iterable[str] = ()) -> None:
    """Raise ValueError with close matches, also among those that are ``near``, when ``name`` is not ``known``."""
    names = list(known)
    if name in names:
        return
    close = difflib.get_close_matches(name.lower(), dict.fromkeys((*names, *near)), n=3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(close)}?" if close else ""
    if "," in name:
        hint = " Names are separated by spaces, without commas."
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
        ValueError: an unknown name, or a selection that leaves nothing to run or asks for what a method does not take.
    """
    chosen = plugins.widen(_preset(suite, preset), selection.methods, selection.datasets)
    for name in selection.datasets or ():
        _require("data set", name, suite, chosen, chosen.blocks)
    names = selection.datasets or chosen.default
    siblings = {name: [block for block in chosen.blocks if block.data.name == name] for name in names}
    for kind, asked in (("method", selection.methods), ("training", selection.trainings)):
        for name in asked or ():
            _require(kind, name, suite, chosen, [block for own in siblings.values() for block in own])
    narrowed = {name: [_narrow(block, selection, own) for block in own] for name, own in siblings.items()}
    pairs = list(dict.fromkeys(pair for own in narrowed.values() for block in own for pair in block.cells()))
    if not pairs:
        raise ValueError(
            f"this selection leaves no cell to run: {_what(selection)}; --dry-run shows what goes together"
        )
    if selection.ratios is not None and not any(cell.pruning.ratio for cell, _ in pairs) and any(selection.ratios):
        raise ValueError("--ratios: nothing is pruned in this selection (" + _what(selection) + "); leave them out")
    pairs = pairs[: selection.limit]
    left = {cell.data.name for cell, _ in pairs}
    return Plan(
        suite,
        chosen,
        tuple(cell for cell, _ in pairs),
        tuple(cost for _, cost in pairs),
        sum(block.prepare_seconds for name in left for block in narrowed[name]),
    )


def _preset(suite: str, name: str) -> Preset:
    """A suite's preset, or where to find what was asked for: presets and suites are easily confused."""
    presets = _presets(suite)
    if name not in presets:
        if name in _SUITES:
            raise ValueError(f"{name!r} is a suite, not a preset: python -m runs.compare {name}")
        if owners := owners_of(name):
            raise ValueError(
                f"suite {suite} has no preset {name!r}; suites that do: {', '.join(owners)} "
                f"(python -m runs.compare {owners[0]} --preset {name})"
            )
    check("preset", name, presets)
    return presets[name]()


def owners_of(preset: str) -> list[str]:
    """The suites that have a preset of this name."""
    return [suite for suite in _SUITES if preset in _presets(suite)]


def _what(selection: Selection) -> str:
    given = [f"{name}={value!r}" for name, value in vars(selection).items() if value is not None]
    return ", ".join(given) or "nothing selected"


def _rule_names(block: Block) -> list[str]:
    """Names by which the rules of a block may be asked for."""
    return [name for rule in block.rules for name in (rule.variant, rule.method) if name]


_HELD: Mapping[str, Callable[[Block], Sequence[str]]] = {
    "data set": lambda block: [block.data.name],
    "method": _rule_names,
    "training": lambda block: [schedule.training.objective for schedule in block.schedules],
}
"""What of each kind may be asked for by name in a block."""


def _require(kind: str, name: str, suite: str, preset: Preset, blocks: Sequence[Block]) -> None:
    """Raise ValueError where none of the blocks that were chosen holds what is asked for, and say who does."""
    held = _HELD[kind]
    if any(name in held(block) for block in blocks):
        return
    chosen = ", ".join(dict.fromkeys(block.data.name for block in blocks))
    if on := list(dict.fromkeys(block.data.name for block in preset.blocks if name in held(block))):
        raise ValueError(f"preset {preset.name} has {name!r} on {', '.join(on)}, not on {chosen}; see --datasets")
    others = {other: make().blocks for other, make in _presets(suite).items() if other != preset.name}
    if having := [other for other, own in others.items() if any(name in held(block) for block in own)]:
        raise ValueError(f"preset {preset.name} has no {name!r}; presets that do: {', '.join(having)}")
    if why := getattr(_module(suite), "ABSENT", {}).get(name):
        raise ValueError(f"suite {suite} has no {name!r}: {why}")
    known = dict.fromkeys(offered for block in blocks for offered in _offered(kind, block))
    where = f"of preset {preset.name}" if kind == "data set" else f"on {chosen}"
    check(f"{kind} {where}", name, known, variants(suite) if kind == "method" else ())


def _offered(kind: str, block: Block) -> Sequence[str]:
    """What is suggested: of rules with a name of their own not the method's, which stands for several of them."""
    return [rule.variant or rule.method for rule in block.rules] if kind == "method" else _HELD[kind](block)


def variants(suite: str) -> tuple[str, ...]:
    """Names of rules that a suite knows besides the pruning methods."""
    return tuple(getattr(_module(suite), "VARIANTS", ()))


def _narrow(block: Block, selection: Selection, siblings: Sequence[Block]) -> Block:
    """``block`` as the selection wants it; ``siblings`` are all blocks of its data set, which may hold other rules."""
    if selection.methods is not None:
        # A variant may have the name of its method: "usn" is one of USN's rules, "random" another.
        variants = {rule.variant for sibling in siblings for rule in sibling.rules}
        wanted = set(selection.methods)
        rules = (r for r in block.rules if r.variant in wanted or r.method in wanted - variants)
        block = replace(block, rules=tuple(rules))
    if selection.trainings is not None:
        block = replace(
            block, schedules=tuple(s for s in block.schedules if s.training.objective in selection.trainings)
        )
    if selection.ratios is not None and block.schedules:
        rules = (_at(rule, selection.ratios, siblings) for rule in block.rules)
        block = replace(block, rules=tuple(rules))
    if selection.models is not None:
        networks = tuple(_network(block.networks, name) for name in selection.models)
        block = replace(block, networks=networks, timed_width=block.networks[-1].width)
    if selection.seeds is not None:
        block = replace(block, seeds=selection.seeds)
    return _certified(block, selection)


def _at(rule: Rule, ratios: tuple[float, ...], siblings: Sequence[Block]) -> Rule:
    """A rule at other ratios, where it prunes at all.

    Raises:
        ValueError: another ratio than the one at which its rounds end.
    """
    if rule.ratios == (0.0,):
        return rule
    if not _in_rounds(rule):
        return replace(rule, ratios=ratios)
    (end,) = rule.ratios
    if other := [ratio for ratio in ratios if abs(ratio - end) > 1e-9]:
        rounds = dict(rule.settings)["rounds"]
        free = dict.fromkeys(
            r.variant or r.method for b in siblings for r in b.rules if any(r.ratios) and not _in_rounds(r)
        )
        takes = f" ({', '.join(free)} of this preset take them)" if free else ""
        raise ValueError(
            f"{rule.variant or rule.method} with {rounds} pruning{'s' if rounds != 1 else ''} ends at a ratio of "
            f"{end:.6g}, not {other[0]:.6g}: the ratio follows from the rounds here, leave --ratios out{takes}"
        )
    return rule


def _in_rounds(rule: Rule) -> bool:
    """Whether the ratio of a rule follows from its rounds: those of the NRSLoss paper that are not pruned once."""
    return _by_state(rule) and not dict(rule.settings).get("one_shot")


def _certified(block: Block, selection: Selection) -> Block:
    """A block certified as the selection wants it; its cost grows with images and perturbations."""
    before = len(block.perturbations) * block.verifier.images
    perturbations = selection.perturbations or block.perturbations
    verifier = replace(block.verifier, images=selection.images or block.verifier.images)
    if selection.verifier is not None and selection.verifier != verifier.method:
        kept = _taken(verifier, selection.verifier, by_state=any(map(_by_state, block.rules)))
        verifier = replace(verifier, method=selection.verifier, settings=kept)
    seconds = block.certify_seconds * len(perturbations) * verifier.images / before
    return replace(block, perturbations=perturbations, verifier=verifier, certify_seconds=seconds)


def _by_state(rule: Rule) -> bool:
    return recorded_by_state(Pruning(rule.method, settings=rule.settings))


def _taken(verifier: Verifier, method: str, *, by_state: bool) -> Settings:
    """Those of a verifier's settings that another method reads as well, which is all that may stay."""
    if method == "probabilistic":
        from runs import car_sampling

        names = {field.name for field in fields(car_sampling.Sampling)}
    else:
        names = {"flip_probability"} | ({"crown_images"} if method == "deviation" else set())
    names |= {"test_images", "pgd_steps"} if by_state else set()
    return tuple((name, value) for name, value in verifier.settings if name in names)


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
