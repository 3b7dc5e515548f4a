"""Methods, perturbations, data sets and verifiers from outside the tree.

A plug-in is a module with a function ``register(registry)``:

    def register(registry):
        registry.method("mine", Mine, MineConfig, "what it does, in one line")

It is named on the command line (``--plugin my_module``, or ``my_module:function``), or found by itself where an
installed distribution has an entry point in the group ``certprune.plugins``. Worker processes load the same plug-ins.
Everything that a plug-in registers is checked before any of it counts.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from runs import cell as cells
from runs.engine import Factory, Work
from runs.packages import ours
from runs.suites.preset import Block, Preset, Rule

GROUP = "certprune.plugins"
"""The entry point group of installed plug-ins: ``name = "module:function"``."""

FIT = ("batches", "val", "loss", "seed", "device", "checkpoint", "callbacks")
"""What ``Method(config).fit(model, ...)`` is called with."""

FIELDS = ("ratio", "epochs", "training")
"""Fields that every configuration has."""


class PluginError(ValueError):
    """A plug-in cannot be loaded, or registers something that does not fit or is taken."""


@dataclass(frozen=True)
class Loaded:
    """What a plug-in has brought: its version (of the distribution, or the module's ``__version__``) and names."""

    version: str | None
    names: Mapping[str, tuple[str, ...]]


_LOADED: dict[str, Loaded] = {}
_VERIFIERS: dict[str, str] = {}  # name -> one line
_METHODS: dict[str, Any] = {}  # name -> configuration class


@dataclass
class Registry:
    """What a plug-in's ``register`` is handed. Nothing counts before the function has returned.

    Attributes:
        plugin: the plug-in's name, for messages.
    """

    plugin: str
    _kept: list[tuple[str, str, Callable[[], None]]] = field(default_factory=list, init=False, repr=False)

    def method(self, name: str, method: Any, config: Any, line: str) -> None:
        """A pruning method, for ``--methods name``.

        Args:
            name: small letters, digits, underscores.
            method: a class with ``method(config).fit(model, batches, *, val, loss, seed, device, checkpoint,
                callbacks) -> methods.outcome.Outcome``.
            config: its configuration, a frozen dataclass with at least ``ratio``, ``epochs`` and ``training``.
            line: what it does, for ``--list``.

        Raises:
            PluginError: one of these is otherwise.
        """
        self._name("method", name)
        if not dataclasses.is_dataclass(config) or not isinstance(config, type):
            raise self._error(f"the configuration of method {name!r} must be a dataclass, got {config!r}")
        missing = [item for item in FIELDS if item not in {own.name for own in dataclasses.fields(config)}]
        if missing:
            raise self._error(
                f"{config.__name__} has no field {' and no '.join(missing)}; a configuration needs {', '.join(FIELDS)}"
            )
        fit = getattr(method, "fit", None)
        if not callable(fit):
            raise self._error(f"the class of method {name!r} has no fit(model, batches, ...)")
        takes = inspect.signature(fit).parameters
        if not any(own.kind is inspect.Parameter.VAR_KEYWORD for own in takes.values()):
            missing = [item for item in FIT if item not in takes]
            if missing:
                raise self._error(f"fit of method {name!r} takes no {', no '.join(missing)}; it needs {', '.join(FIT)}")

        def install() -> None:
            ours("methods").register(name, method, config, line)
            _METHODS[name] = config

        self._kept.append(("method", name, install))

    def perturbation(self, name: str, make: Callable[[float], Any], line: str) -> None:
        """A perturbation, for ``--perturbations name:size``: ``make(size)`` is a ``certify.Perturbation``.

        A subclass of ``certify.AffineFamily`` gets exact verdicts, others what `certify.verify` can do for them.
        """
        self._name("perturbation", name)
        self._callable("perturbation", name, make, 1)
        self._kept.append(("perturbation", name, lambda: cells.register_perturbation(name, make, line)))

    def dataset(self, source: Any) -> None:
        """A data set, for ``--datasets name``: a ``datasets.Source``."""
        if not isinstance(source, ours("datasets").Source):
            raise self._error(f"a data set is registered as a datasets.Source, got {type(source).__name__}")
        self._name("data set", source.name)
        self._kept.append(("data set", source.name, lambda: ours("datasets").register(source)))

    def verifier(self, name: str, verify: Callable[..., Any], line: str) -> None:
        """A verifier, for ``--verifier name`` and ``certify.verify(method=name)``: see ``certify.dispatch.register``.

        ``verify(model, x, spec, p, budget, seed)`` returns a ``certify.Certificate``.
        """
        self._name("verifier", name)
        self._callable("verifier", name, verify, 6)

        def install() -> None:
            importlib.import_module("certify.dispatch").register(name, verify)
            _VERIFIERS[name] = line

        self._kept.append(("verifier", name, install))

    def _error(self, text: str) -> PluginError:
        return PluginError(f"plug-in {self.plugin}: {text}")

    def _name(self, kind: str, name: str) -> None:
        if not isinstance(name, str) or re.fullmatch(r"[a-z][a-z0-9_]*", name) is None:
            raise self._error(
                f"{name!r} is no name for a {kind}: small letters, digits and underscores, a letter first"
            )
        if any((kind, name) == own[:2] for own in self._kept):
            raise self._error(f"registers the {kind} {name!r} twice")
        for plugin, found in _LOADED.items():
            if name in found.names.get(kind, ()):
                raise self._error(
                    f"there is a {kind} {name!r} already, from plug-in {plugin}; one of them must give way"
                )
        if name in _known(kind):
            raise self._error(f"there is a {kind} {name!r} already, built in; choose another name")

    def _callable(self, kind: str, name: str, function: Any, count: int) -> None:
        if not callable(function):
            raise self._error(f"the {kind} {name!r} must be a function of {count}, got {type(function).__name__}")
        try:
            inspect.signature(function).bind(*range(count))
        except TypeError:
            raise self._error(
                f"the {kind} {name!r} must be callable with {count} argument{'s' if count > 1 else ''}, "
                f"but is {inspect.signature(function)}"
            ) from None

    def _commit(self) -> dict[str, tuple[str, ...]]:
        names: dict[str, tuple[str, ...]] = {}
        for kind, name, install in self._kept:
            install()
            names[kind] = (*names.get(kind, ()), name)
        return names


def _known(kind: str) -> Sequence[str]:
    """Names that are taken, whoever brought them."""
    if kind == "method":
        return tuple(ours("methods").names())
    if kind == "data set":
        return tuple(ours("datasets").names())
    if kind == "perturbation":
        return tuple(cells.PERTURBATIONS)
    dispatch = importlib.import_module("certify.dispatch")
    return (*dispatch.METHODS, *dispatch.OUTSIDE)


def load(modules: Sequence[str] = ()) -> None:
    """Load installed plug-ins and those named, each once a process.

    Args:
        modules: ``module`` or ``module:function``; the function is ``register`` if not named.

    Raises:
        PluginError: a module cannot be imported or has no such function, the function fails, or what it registers does
            not fit or is taken. Nothing of that plug-in is registered then.
    """
    for point in sorted(importlib.metadata.entry_points(group=GROUP), key=lambda point: (point.name, point.value)):
        version = point.dist.version if point.dist is not None else None
        where = f"; it is installed by {point.dist.name}: repair or uninstall it" if point.dist is not None else ""
        _load(point.value, version, where)
    for text in modules:
        _load(text, None, "")


def _load(text: str, version: str | None, where: str) -> None:
    name, _, attribute = (part.strip() for part in text.partition(":"))
    title = name if attribute in ("", "register") else f"{name}:{attribute}"
    if title in _LOADED:
        return
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        raise PluginError(
            f"cannot import plug-in {name!r}: {error}; it must be installed, or lie in the current folder or on "
            f"PYTHONPATH{where}"
        ) from error
    except Exception as error:
        raise PluginError(f"plug-in {name!r} fails on import: {type(error).__name__}: {error}{where}") from error
    function = getattr(module, attribute or "register", None)
    if not callable(function):
        raise PluginError(
            f"plug-in {name!r} has no function {attribute or 'register'}(registry) (looked in {module.__file__}){where}"
        )
    registry = Registry(title)
    try:
        function(registry)
    except PluginError as error:
        raise PluginError(f"{error}{where}") from None
    except Exception as error:
        raise PluginError(f"plug-in {title} fails to register: {type(error).__name__}: {error}{where}") from error
    _LOADED[title] = Loaded(version or getattr(module, "__version__", None), registry._commit())


def loaded() -> dict[str, str | None]:
    """The plug-ins of this process that registered something, with their versions: part of every record."""
    return {name: found.version for name, found in _LOADED.items() if found.names}


def verifiers() -> dict[str, str]:
    """Verifiers from plug-ins, with one line each."""
    return dict(_VERIFIERS)


@dataclass(frozen=True)
class Prepared:
    """A factory that loads plug-ins before it makes the work, for processes that start from nothing."""

    plugins: tuple[str, ...]
    factory: Factory

    def __call__(self) -> Work:
        load(self.plugins)
        return self.factory()


def widen(preset: Preset, methods: Sequence[str] | None, datasets: Sequence[str] | None) -> Preset:
    """A preset with the methods and data sets of plug-ins that are asked for, on its own terms.

    A method gets the ratios of the preset's pruning rules and those of their settings that its configuration has, once
    for each training: where the preset has the dense network. A data set is put in the place of the preset's default.
    """
    outside = {name for found in _LOADED.values() for name in found.names.get("data set", ())}
    blocks = list(preset.blocks)
    for name in datasets or ():
        base, _, _ = name.partition(":")
        if base in outside and name not in {block.data.name for block in blocks}:
            model = [block for block in preset.blocks if block.data.name == preset.default[0]]
            blocks += [replace(block, data=replace(block.data, name=name, settings=())) for block in model]
    for name in methods or ():
        if name in _METHODS:
            home = [block for block in blocks if any(rule.method == "dense" for rule in block.rules)] or blocks
            blocks = [
                replace(block, rules=(*block.rules, _rule(block, name))) if block in home else block for block in blocks
            ]
    return replace(preset, blocks=tuple(blocks))


def _rule(block: Block, name: str) -> Rule:
    """How a method from outside runs in a block."""
    has = {item.name for item in dataclasses.fields(_METHODS[name])}
    pruning = [rule for rule in block.rules if rule.ratios != (0.0,)]
    template = next((rule for rule in pruning if rule.method == "magnitude"), pruning[0] if pruning else None)
    if template is None:
        return Rule(name)
    return replace(
        template, method=name, variant="", settings=tuple(item for item in template.settings if item[0] in has)
    )
