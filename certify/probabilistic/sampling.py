"""`estimate`: draw transformed images, count flips, stop as soon as the answer is clear."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import time
from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor, nn

from certify.arithmetic import full_float32
from certify.inputs import check_evaluation
from certify.perturbations import Perturbation
from certify.probabilistic import bounds, transforms
from certify.probabilistic.cccert import WHY, CCCert, cc_cert
from certify.probabilistic.transforms import Transform, Uniform
from certify.probabilistic.verdict import Estimate

BOUNDS = (*bounds.VALID, "cccert")
OUTPUTS = ("auto", "logits", "probabilities")

_WHY = {
    "clopper-pearson": "exact binomial bound on independent draws, stopped by a rule its coverage accounts for",
    "betting": "anytime-valid betting bound on independent draws: stopping early costs no coverage",
    "hoeffding": "Hoeffding's inequality on independent draws",
    "empirical-bernstein": "the empirical Bernstein inequality of Maurer and Pontil on independent draws",
    "split-chernoff": "Chernoff's inequality, t chosen on one half of the draws and the moment bounded on the other",
}


@dataclasses.dataclass(frozen=True)
class _Plan:
    """How one image is sampled; `confidence` is the image's own, `hopeless` the flips that end the sampling."""

    bound: str
    eps: float
    confidence: float
    n: int
    batch: int
    hopeless: int
    keep: bool  # discrepancies Z, not only flips
    sort: bool
    probabilities: bool


@dataclasses.dataclass(frozen=True)
class _Sample:
    flips: int
    n: int
    drawn: int
    stopped: bool
    z: Tensor | None


@full_float32()
def estimate(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    transform: Transform | Perturbation,
    eps: float = 1e-3,
    confidence: float = 0.95,
    bound: str = "clopper-pearson",
    n_max: int | None = 2995,
    *,
    seed: int = 0,
    joint: bool | int = False,
    batch: int = 256,
    early_stop: bool = True,
    outputs: str = "auto",
    cccert: CCCert | None = None,
    law: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Estimate:
    """Certify that random transformations of each image change its label with probability at most `eps`.

    Draws of an image depend on `seed`, the image itself and `batch`, not on its place in `x` or on the model: asking
    for images one by one gives the same answers, and two models see the same draws.

    Args:
        model: a classifier in evaluation mode, (B, C, H, W) to (B, classes); normalisation belongs inside it.
        x: images (N, C, H, W) in [0, 1].
        y: labels (N,), integers. For the stability of predictions pass the model's own.
        transform: called as ``transform(batch, generator=g)``, one independent draw a row, pixels in [0, 1] (see
            `Transform`); or a `certify.Perturbation`, drawn from uniformly.
        eps: the flip probability to stay below.
        confidence: of each certificate, or of all of them together (`joint`).
        bound: "clopper-pearson" (exact), "betting" (stops as early as the draws allow), "hoeffding",
            "empirical-bernstein", "split-chernoff" (bounds P(Z >= d), never stops early), or the paper's "cccert",
            which is not valid and says so.
        n_max: the most draws an image; None for the fewest that can certify. "cccert" draws its own n * l.
        seed: of all draws.
        joint: True makes the confidence joint over the N images (Bonferroni); a number, over that many, for when the
            images come in several calls.
        batch: transformed images classified together.
        early_stop: stop an image when it is certified ("betting") or can no longer be (a flip too many).
        outputs: "logits", "probabilities", or "auto": probabilities when all rows are >= 0 and sum to 1. Only "cccert"
            and "split-chernoff" depend on it; the reading is stated in the result.
        cccert: settings of "cccert".
        law: a sentence on the transform's distribution for the record; the transform's own by default.
        progress: called with (images done, N) after each.

    Returns:
        An `Estimate`, one certificate an image.

    Raises:
        ValueError: for bad images, labels, eps or confidence; a transform that leaves [0, 1], changes the shape,
            ignores its generator or makes one draw a batch; fewer draws than `eps` and `confidence` can ever certify; a
            model in training mode or with outputs that are not finite.
        TypeError: for a transform that cannot be called as above.
    """
    bounds.check_name(bound, BOUNDS)
    _check_inputs(model, x, y)
    images = len(x) if joint is True else int(joint)
    if images < 0 or (images and images < len(x)):
        raise ValueError(f"joint must be True or a number of images >= {len(x)}, got {joint}")
    settings = cccert or CCCert()
    draws = _draws(eps, confidence, bound, n_max, images, settings)
    if batch < 1:
        raise ValueError(f"batch must be >= 1, got {batch}")

    source: Transform = Uniform(transform, x) if isinstance(transform, Perturbation) else transform
    transforms.accepts_generator(source)
    law = transforms.law_of(source, law)
    generator = torch.Generator(device=x.device)
    own = bounds.joint_confidence(confidence, max(1, images))
    hopeless = draws + 1
    if early_stop and bound in bounds.COUNTING:
        hopeless = bounds.allowed_flips(draws, eps, own, bound) + 1

    with torch.no_grad():
        clean = _clean(model, x, y, batch)
        reading = _reading(clean, outputs)
        plan = _Plan(
            bound=bound,
            eps=eps,
            confidence=own,
            n=draws,
            batch=batch,
            hopeless=hopeless,
            keep=bound in ("cccert", "split-chernoff"),
            sort=bound == "cccert" and settings.sort,
            probabilities=reading == "probabilities",
        )
        hashes = [transforms.hash_image(image) for image in x]
        probed = transforms.probe(transforms.for_image(source, 0), x[0], generator, seed)
        samples, uppers, seconds = [], [], []
        for i, image in enumerate(x):
            start = time.perf_counter()
            sample = _sample(
                model,
                transforms.for_image(source, i),
                image,
                y[i],
                clean[i],
                generator,
                functools.partial(transforms.seed_for, seed, hashes[i]),
                plan,
                early_stop,
            )
            samples.append(sample)
            uppers.append(_upper(sample, clean[i], plan, settings))
            seconds.append(time.perf_counter() - start)
            if progress is not None:
                progress(i + 1, len(x))

    flips = np.array([s.flips for s in samples])
    n = np.array([s.n for s in samples])
    identity = hashlib.sha256("".join([*hashes, str(y.tolist())]).encode()).hexdigest()
    scope = f"; {images} certificates hold jointly (Bonferroni)" if images else "; each certificate on its own"
    return Estimate(
        upper=torch.tensor(uppers, dtype=torch.float64),
        flips=torch.from_numpy(flips),
        n=torch.from_numpy(n),
        drawn=torch.tensor([s.drawn for s in samples]),
        correct=(clean.argmax(1) == y).cpu(),
        refuted=torch.from_numpy(np.asarray(bounds.clopper_pearson_lower(flips, n, own) > eps)),
        supported=torch.from_numpy(np.asarray(bounds.supported_confidence(flips, n, eps))),
        seconds=torch.tensor(seconds, dtype=torch.float64),
        eps=eps,
        confidence=settings.confidence(eps) if bound == "cccert" else confidence,
        joint=images or None,
        bound=bound,
        valid=bound != "cccert",
        why=WHY if bound == "cccert" else _WHY[bound] + scope,
        law=law,
        population="distribution",
        outputs=reading,
        seed=seed,
        batch=batch,
        n_max=draws,
        images=identity,
        fingerprint=transforms.fingerprint(identity, seed, batch, source, law, probed),
    )


@full_float32()
def exhaust(
    model: nn.Module, x: Tensor, y: Tensor, versions: Iterable[Tensor], eps: float = 1e-3, *, law: str = "uniform"
) -> Estimate:
    """Certify images whose transformed versions are a finite set, by trying every member: no chance is involved.

    Args:
        model: a classifier in evaluation mode.
        x: images (N, C, H, W) in [0, 1].
        y: labels (N,).
        versions: M batches (N, C, H, W), the m-th version of every image; a tensor (M, N, C, H, W) is one.
        eps: the largest share of versions that may get another label.
        law: how the versions came about, for the record.

    Returns:
        An `Estimate` with population "finite set", confidence 1, and `upper` the share itself; no seed is used.

    Raises:
        ValueError: for bad images or labels, no versions, or versions of another shape or outside [0, 1].
    """
    bounds.supported_confidence(0, 0, eps)  # checks eps
    _check_inputs(model, x, y)
    start = time.perf_counter()
    flips = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    digest = hashlib.sha256()
    members = 0
    with torch.no_grad():
        clean = _clean(model, x, y, len(x))
        for version in versions:
            if version.shape != x.shape:
                raise ValueError(f"version {members} is {tuple(version.shape)}, the images are {tuple(x.shape)}")
            _check_pixels(version, f"version {members}")
            out = model(version)
            if not bool(torch.isfinite(out).all()):
                raise ValueError(f"the model's outputs hold NaN or infinity for version {members}; check its weights")
            flips += out.argmax(1) != y
            digest.update(transforms.hash_image(version).encode())
            members += 1
    if not members:
        raise ValueError("a finite set needs at least one version of every image")
    total = torch.full((len(x),), members)
    share = flips.cpu().double() / members
    identity = hashlib.sha256("".join([*map(transforms.hash_image, x), str(y.tolist())]).encode()).hexdigest()
    return Estimate(
        upper=share,
        flips=flips.cpu(),
        n=total,
        drawn=total.clone(),
        correct=(clean.argmax(1) == y).cpu(),
        refuted=share > eps,
        supported=(share <= eps).double(),
        seconds=torch.full((len(x),), (time.perf_counter() - start) / len(x), dtype=torch.float64),
        eps=eps,
        confidence=1.0,
        joint=None,
        bound="enumeration",
        valid=True,
        why=f"all {members} members of the finite set were classified; says nothing of images outside it",
        law=law,
        population="finite set",
        outputs=_reading(clean, "auto"),
        seed=0,
        batch=1,
        n_max=members,
        images=identity,
        fingerprint=digest.hexdigest(),
    )


def _sample(
    model: nn.Module,
    transform: Transform,
    image: Tensor,
    label: Tensor,
    clean: Tensor,
    generator: torch.Generator,
    seed_for: Callable[[int], int],
    plan: _Plan,
    early_stop: bool,
) -> _Sample:
    """Draws of one image, block by block; the device is waited for once a block."""
    reference = _probabilities(clean, plan)
    flips, used, kept = 0, 0, []
    while used < plan.n:
        rows = image.expand(min(plan.batch, plan.n - used), *image.shape)
        drawn = transform(rows, generator=generator.manual_seed(seed_for(used)))
        transforms.check_drawn(drawn, rows, transform)
        out = model(drawn)
        low, high = torch.aminmax(drawn)
        fits = (low >= -transforms.TOLERANCE) & (high <= 1 + transforms.TOLERANCE)  # False for NaN
        sane = torch.isfinite(out).all()
        host = torch.cat([out.argmax(1) != label, fits[None], sane[None]]).cpu().numpy()
        if not host[-2]:
            transforms.check_range(drawn, transform)
        if not host[-1]:
            raise ValueError("the model's outputs hold NaN or infinity for transformed images; check its weights")
        if plan.keep:
            moved = _probabilities(out, plan)
            kept.append(((moved.sort(1)[0] - reference.sort()[0]) if plan.sort else moved - reference).abs().amax(1))
        wrong = host[:-2]
        used += len(wrong)
        seen = int(wrong.sum())
        if flips + seen >= plan.hopeless:
            last = int(np.flatnonzero(wrong)[plan.hopeless - flips - 1])
            return _Sample(plan.hopeless, used - len(wrong) + last + 1, used, True, None)
        flips += seen
        if (
            early_stop
            and plan.bound == "betting"
            and bounds.reaches(flips, used, plan.eps, plan.confidence, plan.bound)
        ):
            break
    return _Sample(flips, used, used, False, torch.cat(kept).cpu() if kept else None)


def _upper(sample: _Sample, clean: Tensor, plan: _Plan, settings: CCCert) -> float:
    """The bound on the flip probability that a sample gives."""
    if sample.z is not None:
        top = _probabilities(clean, plan).topk(2)[0].double().cpu()
        d = float(top[0] - top[1]) / 2
        z = sample.z.double().clamp(0, 1).numpy()
        if plan.bound == "cccert":
            return float(cc_cert(z, d, settings).upper[0])
        return bounds.split_chernoff(z, d, plan.confidence)
    if sample.stopped and plan.bound != "betting":
        # Exact for Clopper-Pearson; the other two bounds are nowhere below it, so that it holds for their plans too.
        return float(bounds.curtailed(sample.n, sample.flips, plan.confidence))
    return float(bounds.upper_bound(sample.flips, sample.n, plan.confidence, plan.bound))


def _probabilities(out: Tensor, plan: _Plan) -> Tensor:
    return out if plan.probabilities or not plan.keep else out.softmax(-1)


def _draws(eps: float, confidence: float, bound: str, n_max: int | None, images: int, settings: CCCert) -> int:
    """Draws an image, after checking that they can certify anything."""
    if bound == "cccert":
        bounds.required_samples(eps, confidence)  # checks both
        if images:
            raise ValueError("cccert has no confidence to make joint; use a valid bound")
        if n_max is not None and n_max < settings.draws:
            raise ValueError(f"cccert as set draws {settings.draws} images, more than n_max={n_max}")
        return settings.draws
    needed = bounds.required_samples(eps, confidence, bound, images=max(1, images))
    if n_max is None:
        return needed
    if n_max < needed:
        scope = f" jointly over {images} images" if images else ""
        own = bounds.joint_confidence(confidence, max(1, images))
        fewest = bounds.required_samples(eps, own)
        other = f"; clopper-pearson needs {fewest:,}" if bound != "clopper-pearson" else ""
        raise ValueError(
            f"{n_max:,} draws can never certify eps={eps:g} at {100 * confidence:g} % confidence{scope} with "
            f"{bound}, even without a flip: it needs {needed:,}{other}. Pass n_max={needed} or more, n_max=None for "
            "the fewest, or a larger eps"
        )
    return n_max


def _clean(model: nn.Module, x: Tensor, y: Tensor, batch: int) -> Tensor:
    """Outputs (N, classes) at the untransformed images, checked."""
    out = torch.cat([model(part) for part in x.split(batch)])
    if out.ndim != 2 or len(out) != len(x) or out.shape[1] < 2:
        raise ValueError(f"a classifier must return (N, classes >= 2) for (N, C, H, W), got {tuple(out.shape)}")
    if not bool(torch.isfinite(out).all()):
        raise ValueError("the model's outputs hold NaN or infinity; check its weights")
    if not (int(y.min()) >= 0 and int(y.max()) < out.shape[1]):
        raise ValueError(f"labels span [{int(y.min())}, {int(y.max())}] but the model has {out.shape[1]} classes")
    return out


def _reading(out: Tensor, outputs: str) -> str:
    """How outputs (N, classes) are read: as stated, or probabilities when every row is one distribution."""
    bounds.check_name(outputs, OUTPUTS)
    distributions = bool((out >= 0).all()) and bool(((out.double().sum(1) - 1).abs() < 1e-3).all())
    if outputs == "probabilities" and not distributions:
        raise ValueError("the outputs are not probabilities (rows >= 0 that sum to 1); pass outputs='logits'")
    return ("probabilities" if distributions else "logits") if outputs == "auto" else outputs


def _check_inputs(model: nn.Module, x: Tensor, y: Tensor) -> None:
    check_evaluation(model)
    if x.ndim != 4 or not x.is_floating_point() or not len(x):
        raise ValueError(
            f"expected float images (N, C, H, W) with N >= 1, got {tuple(x.shape)} {x.dtype}; uint8 images must be "
            "divided by 255 and a single image needs a batch axis"
        )
    _check_pixels(x, "the images")
    if y.shape != x.shape[:1] or y.is_floating_point() or y.dtype == torch.bool:
        raise ValueError(f"labels must be integers of shape ({len(x)},), got {tuple(y.shape)} {y.dtype}")
    if y.device != x.device:
        raise ValueError(f"labels are on {y.device}, images on {x.device}; move them together")


def _check_pixels(x: Tensor, what: str) -> None:
    low, high = (float(v) for v in torch.aminmax(x))
    if not (low >= -transforms.TOLERANCE and high <= 1 + transforms.TOLERANCE):
        raise ValueError(f"{what} span [{low:.4g}, {high:.4g}]; pixels must be finite and lie in [0, 1]")
