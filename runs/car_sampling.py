"""The verifier "probabilistic": random draws of a perturbation instead of all of its members.

Every test image gets two answers from draws of the same law. The valid one is a bound on the probability of another
label (`certify.probabilistic`), exact by default; only it makes an image HOLD. The other one is CC-Cert as the CAR
paper computes it, which is no certificate: it stands in columns of its own. Both count an image only where the network
is right without any edit.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

import certify
from certify import probabilistic
from certify.probabilistic.cccert import CCCert
from runs import car_edits, measure
from runs.cell import SEMANTIC, Perturb, Verifier
from runs.suites.car import METHOD
from runs.suites.plan import check


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How images are sampled: what the settings of a cell's verifier may say.

    Args:
        eps: the flip probability to stay below.
        confidence: of each certificate, or of those of all test images together (``joint``).
        n: the most draws an image; None for the fewest that can certify.
        bound: one of `certify.probabilistic.BOUNDS` that is valid.
        joint: one confidence for all test images together.
        seed: of the draws, which are the same for every network.
        samples, repetitions: n and l of CC-Cert; 0 samples leave it out.
        sort: CC-Cert compares sorted probabilities, as under the paper's Eq. 2.
        test_images: accuracy is measured on so many, at least those that are certified.
        landscape: points a side of the loss landscape that is measured; 0 for none.
    """

    eps: float = 1e-3
    confidence: float = 0.95
    n: int | None = None
    bound: str = "clopper-pearson"
    joint: bool = False
    seed: int = 0
    samples: int = 100
    repetitions: int = 10
    sort: bool = False
    test_images: int | None = None
    landscape: int = 0

    def __post_init__(self) -> None:
        if self.bound not in probabilistic.BOUNDS or self.bound == "cccert":
            valid = ", ".join(name for name in probabilistic.BOUNDS if name != "cccert")
            raise ValueError(f"bound must be one that is valid ({valid}), got {self.bound!r}; CC-Cert comes beside it")
        for name in ("samples", "landscape", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be >= 0, got {getattr(self, name)}")
        if self.landscape and (self.landscape < 3 or self.landscape % 2 == 0):
            raise ValueError(f"a landscape has an odd number of points a side, 3 or more, got {self.landscape}")

    @property
    def cccert(self) -> CCCert | None:
        """CC-Cert's settings, None where it is left out."""
        return CCCert(self.samples, self.repetitions, sort=self.sort) if self.samples else None


def sampling(verifier: Verifier) -> Sampling:
    """The settings of a verifier. Raises ValueError for unknown ones (with close matches) or values out of range."""
    given: dict[str, Any] = dict(verifier.settings)
    known = [field.name for field in dataclasses.fields(Sampling)]
    for name in given:
        check(f"setting of the verifier {METHOD}", name, known)
    return Sampling(**given)


def test_images(verifier: Verifier) -> int:
    """How many test images a cell needs."""
    return max(verifier.images, sampling(verifier).test_images or 0)


def verdicts(
    model: nn.Module, x: Tensor, y: Tensor, named: Perturb, pack: Any, verifier: Verifier, start: int, root: Path | None
) -> list[dict[str, Any]]:
    """A row an image: clean result, flips and draws, both answers, and the statement they belong to.

    Args:
        model: a classifier; logits or probabilities, which the row says.
        x, y: images (N, C, H, W) and labels (N,), the test images ``start`` to ``start + N`` of ``pack``.
        named: what the draws are from.
        pack: the test images.
        verifier: whose method this is.
        root: the data directory, for generators.

    Raises:
        ValueError: keypoints; an edit that these images do not take, or that leaves [0, 1]; fewer draws than eps and
            confidence can ever certify (the message says how many are needed).
    """
    if pack.task != "classification":
        raise ValueError(
            f"the verifier {METHOD!r} counts changed labels, but {pack.name} has keypoints; use line or auto"
        )
    how = sampling(verifier)
    law, statement = _law(named, x, pack, start, root)
    images = verifier.images
    with measure.Peak(x.device) as peak:
        valid = certify.estimate(
            model, x, y, law, how.eps, how.confidence, how.bound, how.n, seed=how.seed,
            joint=images if how.joint else False,
        )  # fmt: skip
        paper = None
        if (settings := how.cccert) is not None:
            paper = certify.estimate(
                model, x, y, law, how.eps, bound="cccert", n_max=None, seed=how.seed, cccert=settings
            )
    shared = {**statement, **_statement(valid)}
    printed = None if paper is None else _statement(paper)
    rows = []
    for i, status in enumerate(valid.status.tolist()):
        row: dict[str, Any] = {
            "perturbation": named.label,
            "index": start + i,
            "data": pack.fingerprint,
            "clean": float(valid.correct[i]),
            "status": certify.Status(status).name.lower(),
            "lower": None,
            "unstable": None,
            "soundness": f"{how.confidence:.4g} confidence, " + (f"joint over {images}" if how.joint else "per image"),
            "method": valid.bound,
            "seconds": float(valid.seconds[i]),
            "peak_mb": peak.mb,
            "flips": int(valid.flips[i]),
            "n": int(valid.n[i]),
            "upper": float(valid.upper[i]),
            "certificate": shared,
        }
        if paper is not None:
            row["paper"] = {
                "certified": bool(paper.certified[i]),
                "upper": float(paper.upper[i]),
                "flips": int(paper.flips[i]),
                "n": int(paper.n[i]),
                "certificate": printed,
            }
        rows.append(row)
    return rows


def _law(
    named: Perturb, x: Tensor, pack: Any, start: int, root: Path | None, *, stored: bool = True
) -> tuple[Any, Mapping[str, Any]]:
    """What `certify.estimate` draws from, and what the record says of it."""
    if named.kind not in SEMANTIC:
        p = measure.perturbation(named)
        return p, {"transform": {"kind": "perturbation", "name": p.describe()}, "generator": None}
    edit = car_edits.transform(named, pack, root, x.device)
    said = car_edits.stated(edit)
    made = car_edits.draws(edit, range(start, start + len(x)), pack.split, stored=stored)
    return made, {"transform": said["transform"], "generator": said["fingerprint"]}


_STATED = (
    "eps", "confidence", "joint", "bound", "valid", "why", "law", "population", "outputs", "seed", "batch", "n_max",
    "fingerprint",
)  # fmt: skip


def _statement(found: certify.Estimate) -> dict[str, Any]:
    return {name: getattr(found, name) for name in _STATED}


def current(rows: Sequence[Mapping[str, Any]], named: Perturb, pack: Any, root: Path | None, device: Any) -> bool:
    """Whether rows on record were drawn from what the perturbation names today: generators may be trained again."""
    known = {
        row["certificate"]["generator"] for row in rows if "certificate" in row and row["perturbation"] == named.label
    }
    if not known or named.kind not in SEMANTIC:
        return True
    return known == {car_edits.stated(car_edits.transform(named, pack, root, device))["fingerprint"]}


def summarise(named: Perturb, rows: Sequence[Mapping[str, Any]], verifier: Verifier) -> dict[str, Any]:
    """Counts over the test images, bits of both answers, and the statement of the certificates.

    ``verified_bits`` are those of the valid certificates. ``truly`` is a lower bound on how many of these very images
    are robust, at the certificates' confidence: certificates that are made image by image may fail for a few.
    """
    how = sampling(verifier)
    bits = "".join("1" if row["status"] == "holds" else "0" for row in rows)
    peaks = [row["peak_mb"] for row in rows if row["peak_mb"] is not None]
    found: dict[str, Any] = {
        "label": named.label,
        "kind": named.kind,
        "magnitude": named.magnitude,
        "images": len(rows),
        "clean": statistics.fmean(row["clean"] for row in rows),
        "clean_bits": "".join("1" if row["clean"] == 1.0 else "0" for row in rows),
        "attacked": sum(row["status"] != "violated" for row in rows),
        "verified": bits.count("1"),
        "verified_bits": bits,
        **{name: sum(row["status"] == name for row in rows) for name in ("holds", "violated", "unknown", "timeout")},
        "unstable": None,
        "soundness": rows[0]["soundness"],
        "method": rows[0]["method"],
        "draws": sum(row["n"] for row in rows),
        "flips": [row["flips"] for row in rows],
        "truly": _truly(bits.count("1"), len(rows), how),
        "certificate": _joined([row["certificate"] for row in rows]),
        "timing": {
            "seconds_mean": statistics.fmean(row["seconds"] for row in rows),
            "seconds_median": statistics.median(row["seconds"] for row in rows),
            "peak_mb": max(peaks, default=None),
        },
    }
    if all("paper" in row for row in rows):
        found["paper"] = {
            "bits": "".join("1" if row["paper"]["certified"] else "0" for row in rows),
            "certified": sum(row["paper"]["certified"] for row in rows),
            "flips": [row["paper"]["flips"] for row in rows],
            "certificate": _joined([row["paper"]["certificate"] for row in rows]),
        }
    return found


def _joined(certificates: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One statement for all images; fingerprints of the batches in order, each once."""
    prints = list(dict.fromkeys(one["fingerprint"] for one in certificates))
    return {**certificates[0], "fingerprint": prints[0] if len(prints) == 1 else prints}


def _truly(count: int, images: int, how: Sampling) -> int:
    """How many of the images are robust at least, at the certificates' confidence."""
    if how.joint:
        return count
    from scipy.stats import binom

    return max(0, count - int(binom.ppf(how.confidence, images, 1 - how.confidence)))


def redraw(
    model: nn.Module, x: Tensor, y: Tensor, named: Perturb, pack: Any, verifier: Verifier,
    rows: Sequence[Mapping[str, Any]], root: Path | None, probes: int, tick: Callable[[], None],
) -> tuple[list[str], int]:  # fmt: skip
    """Put certificates to the test with draws that they did not see: what contradicts them, and how many draws.

    An image that HOLDS is contradicted when fresh draws show a flip probability above eps at a confidence of 1e-6 a
    test; a few flips are what eps allows.
    """
    how = sampling(verifier)
    breaks, drawn = [], 0
    for i, row in enumerate(rows):
        if row["status"] != "holds":
            continue
        at = int(row["index"])
        law, _ = _law(named, x[at : at + 1], pack, at, root, stored=False)
        fresh = certify.estimate(
            model, x[at : at + 1], y[at : at + 1], law, 0.5, 0.5, "clopper-pearson", probes,
            seed=how.seed + 1 + i, early_stop=False,
        )  # fmt: skip
        flips, n = int(fresh.flips[0]), int(fresh.n[0])
        drawn += n
        if not bool(fresh.correct[0]):
            breaks.append(f"image {at} under {named.label} HOLDS on record, but is misclassified as it is")
        elif float(probabilistic.clopper_pearson_lower(flips, n, 1 - 1e-6)) > how.eps:
            breaks.append(f"image {at} under {named.label} HOLDS on record, but {flips} of {n} fresh draws flip")
        tick()
    return breaks, drawn
