"""Finding the direction of an edit, scaling it to a stated change, and deciding whether the generator may be used.

The direction s is the difference of the mean codes of the images with most and with least of the attribute (Preechakul
et al., 2022, use a linear classifier's normal; for equal covariances both agree). Its length is set on calibration
images so that delta = 1 changes the attribute by `Criteria.change` on average. Acceptance is measured on other images,
by measures that know nothing of the generator.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor

from datasets.packs import Pack
from datasets.semantic import measures
from datasets.semantic.diffae import DiffAE, NotAccepted, State
from datasets.semantic.measures import MEASURES, Measure
from datasets.semantic.training import attribute_values
from datasets.semantic.transform import plain

_DELTAS = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Criteria:
    """What an edit must do, and what it must leave alone, on images the direction was not found on.

    Args:
        attribute: what the edit raises: a measure, or one handed to `accept` in `extra`.
        change: wanted mean change at delta = 1, in the measure's units; the direction is scaled to it.
        move: least share of `change` that must be reached, on average.
        follow: least share of images whose attribute grows at every step of delta = 0, .25, .5, .75, 1.
        identity: least mean `measures.structure` between an image and its edit at delta = 1.
        reconstruction: least mean PSNR in dB between an image and its edit at delta = 0.
        others: the other attributes, and the most each may move on average at delta = 1, in its own standard
            deviations over the images.
    """

    attribute: str = "warmth"
    change: float = 0.8
    move: float = 0.75
    follow: float = 0.8
    identity: float = 0.8
    reconstruction: float = 24.0
    others: Mapping[str, float] = field(
        default_factory=lambda: {"brightness": 0.5, "contrast": 0.5, "tint": 0.75, "sharpness": 0.5}
    )

    def __post_init__(self) -> None:
        if not self.change > 0:
            raise ValueError(f"change must be positive, got {self.change}; turn the attribute round to lower it")
        for what in ("move", "follow"):
            if not 0 < getattr(self, what) <= 1:
                raise ValueError(f"{what} must lie in (0, 1], got {getattr(self, what)}")
        if self.attribute in self.others:
            raise ValueError(f"{self.attribute} is what the edit moves; it cannot be among the others")


@dataclass(frozen=True)
class Report:
    """What was measured; each list of numbers is over delta = 0, .25, .5, .75, 1.

    Args:
        attribute: mean of the attribute.
        moved: mean change at delta = 1.
        follow: share of images whose attribute grows at every step.
        identity: mean structural agreement with the image at delta = 1.
        reconstruction: mean PSNR in dB at delta = 0.
        drift: for each other attribute, its mean change at delta = 1 in its standard deviations.
        scale: length of the direction, in the code's units.
        images: how many were measured.
        failures: sentences, one for each criterion that is not met.
    """

    attribute: tuple[float, ...]
    moved: float
    follow: float
    identity: float
    reconstruction: float
    drift: Mapping[str, float]
    scale: float
    images: int
    failures: tuple[str, ...]

    @property
    def accepted(self) -> bool:
        """Whether every criterion is met."""
        return not self.failures


def class_means(codes: Tensor, values: Tensor, share: float = 1 / 3) -> Tensor:
    """Unit vector (latent,) from the mean code of the lowest `share` of `values` (N,) to that of the highest.

    Raises ValueError where the two groups cannot be told apart by their means.
    """
    count = max(1, int(share * len(values)))
    order = values.argsort(stable=True)
    difference = codes[order[-count:]].mean(0) - codes[order[:count]].mean(0)
    length = difference.norm()
    if not bool(length > 1e-6):
        raise ValueError("the codes of images with much and with little of the attribute have the same mean")
    return difference / length


@torch.no_grad()
def accept(
    model: DiffAE,
    pack: Pack,
    criteria: Criteria | None = None,
    *,
    values: Tensor | None = None,
    extra: Mapping[str, Measure] | None = None,
    calibration: int = 32,
    probes: int = 64,
    longest: float = 12.0,
    device: str | torch.device | None = None,
) -> Report:
    """Give a trained generator its direction and accept it, or refuse.

    Args:
        model: a trained DiffAE; put into state ACCEPTED with `direction` and `edit_record` filled.
        pack: images that it was not trained on. The direction is found on all, scaled on the first `calibration` and
            judged on the next `probes`.
        criteria: what to ask for.
        values: the attribute of all images (N,), where it is known; else it is measured.
        extra: measures of your own by name, such as a small classifier's score, used for attributes of that name.
        calibration, probes: numbers of images.
        longest: the most the direction may be scaled to; a decoder that ignores the code gets no further.
        device: where to work; the model's own if None.

    Returns:
        The report of an accepted generator.

    Raises:
        NotAccepted: untrained; or a criterion is not met (the message has the numbers). The state stays TRAINED.
        ValueError: too few images, unknown measures, or a direction that cannot be found.
    """
    model.require(State.TRAINED)
    criteria = criteria or Criteria()
    if len(pack) < calibration + probes:
        raise ValueError(f"{pack.name} ({pack.split}) has {len(pack)} images, expected {calibration} + {probes}")
    meters = {**MEASURES, **(extra or {})}
    for name in (criteria.attribute, *criteria.others):
        if name not in meters:
            measures.measure(name)  # raises, naming what there is
    where = torch.device(device) if device is not None else model.scaling.device
    model.state, model.edit_record = State.TRAINED, None
    model.to(where).eval()
    codes = torch.cat([model.encode(pack.tensors(p, where)[0]) for p in torch.arange(len(pack)).split(128)])
    if values is None and criteria.attribute in (extra or {}):
        own = meters[criteria.attribute]
        values = torch.cat([own(pack.tensors(p, where)[0]) for p in torch.arange(len(pack)).split(128)])
    known = {} if values is None else {criteria.attribute: values.cpu()}
    target = attribute_values(pack, (criteria.attribute,), known)[:, 0].to(where)
    unit = class_means(codes, target)
    fitting = pack.tensors(range(calibration), where)[0]
    scale = _scale(model, fitting, unit, meters[criteria.attribute], criteria.change, longest)
    held_out = pack.tensors(range(calibration, calibration + probes), where)[0]
    report = judge(model, held_out, unit * scale, criteria, meters)
    if not report.accepted:
        raise NotAccepted(
            f"the generator's {criteria.attribute} edit is refused on {probes} images: " + "; ".join(report.failures)
        )
    model.direction.copy_(unit * scale)
    model.edit_record = plain(
        {
            "criteria": asdict(criteria),
            "report": asdict(report),
            "data": {"name": pack.name, "split": pack.split, "fingerprint": pack.fingerprint},
            "calibration": calibration,
            "weights": model.weights_hash(),
        }
    )
    model.state = State.ACCEPTED
    return report


@torch.no_grad()
def judge(
    model: DiffAE, images: Tensor, direction: Tensor, criteria: Criteria, meters: Mapping[str, Measure]
) -> Report:
    """Measure the edits of `images` (B, 3, S, S) along `direction` against the criteria; changes nothing."""
    z, noise = _codes(model, images)
    edits = [_decode(model, noise, z + d * direction) for d in _DELTAS]
    meter = meters[criteria.attribute]
    track = torch.stack([meter(e) for e in edits])
    moved = float((track[-1] - track[0]).mean())
    follow = float((track.diff(dim=0) > 0).all(0).float().mean())
    identity = float(measures.structure(images, edits[-1]).mean())
    reconstruction = float(measures.psnr(images, edits[0]).mean())
    drift = {}
    for name in criteria.others:
        before, after = meters[name](edits[0]), meters[name](edits[-1])
        spread = float(meters[name](images).std().clamp_min(1e-6))
        drift[name] = float((after - before).mean()) / spread
    failures = []
    if not moved >= criteria.move * criteria.change:
        failures.append(
            f"{criteria.attribute} moves by {moved:.3g}, expected {criteria.move:g} of {criteria.change:g} or more"
        )
    if not follow >= criteria.follow:
        failures.append(f"it grows with delta on {follow:.0%} of the images, expected {criteria.follow:.0%} or more")
    if not identity >= criteria.identity:
        failures.append(f"structure agrees by {identity:.3f}, expected {criteria.identity:g} or more")
    if not reconstruction >= criteria.reconstruction:
        failures.append(f"reconstruction reaches {reconstruction:.1f} dB, expected {criteria.reconstruction:g} or more")
    failures += [
        f"{name} drifts by {drift[name]:+.2f} standard deviations, expected {most:g} at most"
        for name, most in criteria.others.items()
        if not abs(drift[name]) <= most
    ]
    return Report(
        attribute=tuple(float(v) for v in track.mean(1)),
        moved=moved,
        follow=follow,
        identity=identity,
        reconstruction=reconstruction,
        drift=drift,
        scale=float(direction.norm()),
        images=len(images),
        failures=tuple(failures),
    )


def _scale(model: DiffAE, images: Tensor, unit: Tensor, meter: Measure, change: float, longest: float) -> float:
    """The length at which the attribute changes by `change` on average: doubling, then false position."""
    z, noise = _codes(model, images)
    start = meter(_decode(model, noise, z)).mean()

    def gained(length: float) -> float:
        return float(meter(_decode(model, noise, z + length * unit)).mean() - start)

    low, at_low, high = 0.0, 0.0, 1.0
    at_high = gained(high)
    while at_high < change and high < longest:
        low, at_low, high = high, at_high, min(2 * high, longest)
        at_high = gained(high)
    if at_high < change:
        return high  # as far as it goes; `judge` says by how much it falls short
    for _ in range(4):
        middle = low + (high - low) * (change - at_low) / max(at_high - at_low, 1e-9)
        at = gained(middle)
        if abs(at - change) < 0.02 * change:
            return middle
        low, at_low, high, at_high = (middle, at, high, at_high) if at < change else (low, at_low, middle, at)
    return high


def _codes(model: DiffAE, images: Tensor, batch: int = 32) -> tuple[Tensor, Tensor]:
    parts = [(z := model.encode(x), model.invert(x, z)) for x in images.split(batch)]
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])


def _decode(model: DiffAE, noise: Tensor, z: Tensor, batch: int = 32) -> Tensor:
    return torch.cat([model.decode(n, c) for n, c in zip(noise.split(batch), z.split(batch), strict=True)])
