"""A cell: everything that fixes one trained, pruned and certified network, and nothing else.

The key of a cell is a hash of exactly those fields that change its numbers. Device, worker count, thread count, paths,
the suite and the preset that asked for it are not among them, so two presets that ask the same question share a record.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

SCHEMA = 1
"""Version of the record format and of what the fields mean; raised when old records no longer answer the question."""

Value = bool | int | float | str | None
Settings = tuple[tuple[str, Value], ...]


def settings(**values: Value) -> Settings:
    """Named values as a sorted, hashable tuple, so that equal settings are equal whatever their order."""
    return tuple(sorted(values.items()))


def _check_settings(owner: str, values: Settings) -> Settings:
    names = [name for name, _ in values]
    if len(set(names)) != len(names):
        raise ValueError(f"{owner}: settings name a value twice: {names}")
    return tuple(sorted(values))


def _finite(owner: str, name: str, value: float) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{owner}.{name} must be a finite number, got {value!r}")
    return number


@dataclass(frozen=True)
class Pruning:
    """Which method removes how much: ``ratio`` is the fraction of weights (or channels) removed, in [0, 1)."""

    method: str
    ratio: float = 0.0
    settings: Settings = ()

    def __post_init__(self) -> None:
        ratio = _finite("Pruning", "ratio", self.ratio)
        if not 0.0 <= ratio < 1.0:
            raise ValueError(f"Pruning.ratio is the fraction removed and must lie in [0, 1), got {self.ratio!r}")
        object.__setattr__(self, "ratio", ratio)
        object.__setattr__(self, "settings", _check_settings("Pruning", self.settings))

    @property
    def label(self) -> str:
        """Short name for tables: the method, or which variant of it where one method stands for several."""
        if recorded_by_state(self):
            from runs.suites import nrs

            return nrs.variant(self)
        if self.method == "car" or any(name == "variant" for name, _ in self.settings):
            from runs.suites import car

            return car.label(self)
        given = dict(self.settings)
        if self.method == "usn" and given:
            from runs.suites import usn

            name = usn.variant(self)
        elif self.method == "nrs":
            name = f"imp+{given.get('penalty', 'nrs')}"
        else:
            name = f"{self.method}-channels" if given.get("structured") else self.method
        return f"{name} by FLOPs" if given.get("match") == "flops" else name


def recorded_by_state(pruning: Pruning) -> bool:
    """Whether all states of a run are certified and recorded: its pruning names a row of the NRSLoss paper's tables."""
    return any(name == "row" for name, _ in pruning.settings)


@dataclass(frozen=True)
class Training:
    """How the weights are trained; ``eps`` is the radius of robust objectives, in pixel space [0, 1]."""

    objective: str = "natural"
    epochs: int = 10
    batch_size: int = 64
    eps: float | None = None
    settings: Settings = ()

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_size < 1:
            raise ValueError(f"Training needs epochs >= 1 and batch_size >= 1, got {self.epochs} and {self.batch_size}")
        if self.eps is not None:
            eps = _finite("Training", "eps", self.eps)
            if eps < 0:
                raise ValueError(f"Training.eps must be >= 0, got {eps}")
            object.__setattr__(self, "eps", eps)
        object.__setattr__(self, "settings", _check_settings("Training", self.settings))

    @property
    def label(self) -> str:
        """Short name for tables: ``natural``, ``ibp 0.1``, ``ibp 2/255``."""
        return self.objective if self.eps is None else f"{self.objective} {magnitude_text(self.eps)}"

    def in_all(self, epochs: int) -> dict[str, Any]:
        """What networks share that were trained alike for as many epochs in all, however these were divided up."""
        return {**_part(self), "epochs": None, "epochs in all": epochs}


@dataclass(frozen=True)
class Network:
    """A name of the model zoo with its width factor and head.

    The setting ``pretrained=True`` starts it from published ImageNet weights (`runs.pretrained`).
    """

    name: str
    width: float = 1.0
    head: str | None = None
    settings: Settings = ()

    def __post_init__(self) -> None:
        width = _finite("Network", "width", self.width)
        if width <= 0:
            raise ValueError(f"Network.width must be > 0, got {width}")
        object.__setattr__(self, "width", width)
        object.__setattr__(self, "settings", _check_settings("Network", self.settings))

    @property
    def label(self) -> str:
        """``cnn7_cw``, with the width where it is not one: ``cnn7_cw ×0.25``; and ``resnet18 pretrained``."""
        text = self.name if self.width == 1.0 else f"{self.name} ×{self.width:g}"
        text = f"{text} pretrained" if ("pretrained", True) in self.settings else text
        return text if self.head in (None, "linear", "keypoints") else f"{text} {self.head}"


@dataclass(frozen=True)
class Data:
    """A data set by name; the limits cap training and validation images, ``settings`` go to its loader.

    Except two of them, which go together: ``edited`` says how many semantic edits of training images are trained on
    besides, and ``edits`` by what they are made (``KIND:SIZE`` of a perturbation).
    """

    name: str
    limit: int | None = None
    val_limit: int | None = None
    augment: bool = False
    settings: Settings = ()

    def __post_init__(self) -> None:
        for limit in (self.limit, self.val_limit):
            if limit is not None and limit < 1:
                raise ValueError(f"the limits of Data must be >= 1 or None (all), got {limit}")
        object.__setattr__(self, "settings", _check_settings("Data", self.settings))
        given = dict(self.settings)
        if ("edits" in given) != ("edited" in given):
            raise ValueError("Data: the settings edits (by what) and edited (how many) go together")
        if (count := given.get("edited", 0)) is not None and (not isinstance(count, int) or count < 0):
            raise ValueError(f"Data: edited must be a number of images >= 0, got {count!r}")

    @property
    def label(self) -> str:
        """The name, with the number of training images where it is capped, and that of edits where there are any."""
        text = self.name if self.limit is None else f"{self.name} ({self.limit:,} training images)"
        return f"{text} + {self.edited:,} edits" if self.edited else text

    @property
    def options(self) -> dict[str, Any]:
        """The settings that the data set's loader is given."""
        return {name: value for name, value in self.settings if name not in ("edits", "edited")}

    @property
    def edited(self) -> int:
        """How many edits of training images are trained on besides."""
        return int(dict(self.settings).get("edited") or 0)

    @property
    def edits(self) -> Perturb | None:
        """What makes those edits."""
        named = dict(self.settings).get("edits")
        return None if named is None else Perturb.parse(str(named))


PERTURBATIONS: dict[str, str] = {
    "linf": "every pixel may change by up to the magnitude",
    "l2": "the Euclidean length of the change is at most the magnitude",
    "brightness": "x + t for |t| up to the magnitude, clipped to [0, 1]",
    "contrast": "(1 + t)·x for |t| up to the magnitude, clipped to [0, 1]",
    "joint": "(1 + c)·x + b for |b| up to the magnitude and |c| up to 2.55 times it (1/255 goes with 0.01), clipped",
    "rotation": "turned about the centre by up to the magnitude in degrees",
    "scale": "larger or smaller about the centre by up to the magnitude (.1 is 10 %)",
    "hue": "hues turned by up to the magnitude (1 is the whole circle)",
    "saturation": "x + t·(x - grey) for |t| up to the magnitude, clipped to [0, 1]",
    "sun": "the sun of rendered flowers rises by up to the magnitude times half its range; by sampling only",
    "smile": "rendered faces smile by up to the magnitude times half the range more; by sampling only",
    "warmth": "warmer light, magnitude 1 is half the range of rendered scenes, else red times 1.4; by sampling only",
    "blur": "Gaussian blur of up to the magnitude times 1.5 pixels; by sampling only",
    "diffae": "the edit of the data set's own accepted diffusion autoencoder, magnitude 1; by sampling only",
}
"""Perturbations that a cell can name, and what each does. ``certify`` holds their implementation."""

SEMANTIC = ("sun", "smile", "warmth", "blur", "diffae")
"""Those that have a law of random draws but no set whose every member could be verified (`datasets.semantic`)."""

OUTSIDE: dict[str, Callable[[float], Any]] = {}
"""Perturbations from outside the tree: what makes the ``certify.Perturbation`` of each from its magnitude."""


def register_perturbation(kind: str, make: Callable[[float], Any], line: str) -> None:
    """Add a perturbation of your own to those that a cell can name.

    Raises:
        ValueError: the name is taken, or ``KIND:SIZE`` could not spell it.
    """
    if kind in PERTURBATIONS:
        raise ValueError(f"there is a perturbation {kind!r} already; choose another name")
    if re.fullmatch(r"[a-z0-9_]+", kind) is None:
        raise ValueError(f"{kind!r}: a perturbation's name consists of small letters, digits and underscores")
    PERTURBATIONS[kind] = line
    OUTSIDE[kind] = make


@dataclass(frozen=True)
class Perturb:
    """A perturbation by name and magnitude (pixel space, [0, 1])."""

    kind: str
    magnitude: float

    def __post_init__(self) -> None:
        if self.kind not in PERTURBATIONS:
            raise ValueError(
                f"unknown perturbation {self.kind!r}; known: {', '.join(PERTURBATIONS)} (one of a plug-in: --plugin)"
            )
        magnitude = _finite("Perturb", "magnitude", self.magnitude)
        if magnitude < 0:
            raise ValueError(f"the magnitude of {self.kind} must be >= 0, got {magnitude}")
        object.__setattr__(self, "magnitude", magnitude)

    @property
    def label(self) -> str:
        """``linf 0.1``, ``brightness 2/255``."""
        return f"{self.kind} {magnitude_text(self.magnitude)}"

    @classmethod
    def parse(cls, text: str) -> Perturb:
        """Read ``kind:magnitude``; the magnitude is a number or a fraction such as ``2/255``."""
        match = re.fullmatch(r"\s*([a-z0-9_]+)\s*[:= ]\s*([0-9.eE+-]+)\s*(?:/\s*([0-9.]+))?\s*", text)
        if match is None:
            raise ValueError(
                f"cannot read perturbation {text!r}; expected KIND:SIZE such as linf:0.1 or brightness:2/255"
            )
        kind, number, divisor = match.groups()
        try:
            magnitude = float(number) / float(divisor) if divisor else float(number)
        except (ValueError, ZeroDivisionError) as error:
            raise ValueError(f"cannot read the magnitude of perturbation {text!r}: {error}") from None
        return cls(kind, magnitude)


def magnitude_text(value: float) -> str:
    """``k/255`` where that is exact and shorter than the decimal, else the decimal."""
    steps = value * 255
    decimal = f"{value:g}"
    if 0 < steps < 255 and abs(steps - round(steps)) < 1e-9 and len(decimal) > 5:
        return f"{round(steps)}/255"
    return decimal


@dataclass(frozen=True)
class Verifier:
    """How the network is certified: by what, on the first ``images`` test images, within which limits.

    ``seconds`` is the limit per image (None: none); ``delta`` (px) is how far a keypoint coordinate may
    move; ``settings`` are the method's own.
    """

    method: str = "auto"
    images: int = 100
    seconds: float | None = None
    delta: float = 1.0
    settings: Settings = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "settings", _check_settings("Verifier", self.settings))
        if self.images < 1:
            raise ValueError(f"Verifier.images must be >= 1, got {self.images}")
        if self.seconds is not None:
            object.__setattr__(self, "seconds", _finite("Verifier", "seconds", self.seconds))
        object.__setattr__(self, "delta", _finite("Verifier", "delta", self.delta))
        if self.delta <= 0:
            raise ValueError(f"Verifier.delta must be > 0 px, got {self.delta}")


@dataclass(frozen=True)
class Cell:
    """One network of the comparison: trained, pruned and certified under one or more perturbations with one seed."""

    pruning: Pruning
    training: Training
    network: Network
    data: Data
    perturbations: tuple[Perturb, ...]
    verifier: Verifier
    seed: int = 0
    schema: int = SCHEMA

    def __post_init__(self) -> None:
        if not self.perturbations:
            raise ValueError("a cell needs at least one perturbation")
        if len(set(self.perturbations)) != len(self.perturbations):
            raise ValueError(f"perturbations are named twice: {[p.label for p in self.perturbations]}")
        # Their order changes no number, so it must not change the key.
        object.__setattr__(
            self, "perturbations", tuple(sorted(self.perturbations, key=lambda p: (p.kind, p.magnitude)))
        )

    def to_dict(self) -> dict[str, Any]:
        """The cell as JSON-able nested dictionaries; :func:`from_dict` is the inverse."""
        return {
            "schema": self.schema,
            "pruning": _part(self.pruning),
            "training": _part(self.training),
            "network": _part(self.network),
            "data": _part(self.data),
            "perturbations": [_part(p) for p in self.perturbations],
            # Without settings of its own a verifier is written as before it could have any, so that keys last.
            "verifier": {name: value for name, value in _part(self.verifier).items() if name != "settings" or value},
            "seed": self.seed,
        }

    @property
    def key(self) -> str:
        """16 hexadecimal digits of SHA-256 over the canonical form: the name of the cell's folder."""
        return digest(self.to_dict())

    @property
    def training_key(self) -> str:
        """Hash of the fields that fix the trained network: cells that differ only in certification share it."""
        whole = self.to_dict()
        return digest({name: whole[name] for name in ("schema", "pruning", "training", "network", "data", "seed")})

    @property
    def label(self) -> str:
        """One line for progress bars and error messages."""
        ratio = f" {self.pruning.ratio:g}" if self.pruning.ratio else ""
        return (
            f"{self.data.name} · {self.network.label} · {self.pruning.label}{ratio} · {self.training.label}"
            f" · seed {self.seed}"
        )


def _part(value: Any) -> dict[str, Any]:
    fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return {name: dict(item) if name == "settings" else item for name, item in fields.items()}


def digest(value: Any) -> str:
    """First 16 hexadecimal digits of SHA-256 over canonical JSON (sorted names, no spaces, no NaN)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def from_dict(value: Mapping[str, Any]) -> Cell:
    """Rebuild a cell from :meth:`Cell.to_dict`.

    Raises:
        ValueError: a field is missing, unknown or out of range.
    """

    def part(cls: type[Any], raw: Mapping[str, Any]) -> Any:
        fields = dict(raw)
        if "settings" in fields:
            fields["settings"] = tuple(sorted(fields["settings"].items()))
        return cls(**fields)

    try:
        return Cell(
            pruning=part(Pruning, value["pruning"]),
            training=part(Training, value["training"]),
            network=part(Network, value["network"]),
            data=part(Data, value["data"]),
            perturbations=tuple(part(Perturb, raw) for raw in value["perturbations"]),
            verifier=part(Verifier, value["verifier"]),
            seed=int(value["seed"]),
            schema=int(value["schema"]),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not a cell: {type(error).__name__}: {error}") from None
