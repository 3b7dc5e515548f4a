"""What may change: sets of perturbed images, all in pixel space [0, 1] and clipped to it by default.

Two families share one interface. *Boxes and balls* (`Linf`, `L2`, `Box`) move every pixel on its own. *Affine families*
(`Brightness`, `Contrast`, `BlurMix`, `Saturation`, `BrightnessContrast`) move the whole image along one or two
directions, ``clip(x + sum_k t_k * direction_k(x))``; a ReLU network restricted to such a path is piecewise linear in
``t``, which is what makes exact verdicts possible.

Every perturbation has

* ``apply(x, t)``: the perturbed image for parameters ``t``;
* ``sample(x, n, generator)``: ``n`` uniform draws per image, (n, N, C, H, W);
* ``hull(x)``: the smallest box that contains every perturbed image, a pair of (N, C, H, W).

A radius is a float or a tensor (N,) with one radius an image.
"""

from __future__ import annotations

import abc
import dataclasses
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from certify.arithmetic import constant

Radius = float | Tensor

LUMA = (0.299, 0.587, 0.114)


class Perturbation(abc.ABC):
    """A set of images around each image of a batch."""

    name: ClassVar[str]
    clip: bool

    @abc.abstractmethod
    def hull(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The smallest box around all perturbed versions of `x` (N, C, H, W): lower and upper ends, same shape."""

    @abc.abstractmethod
    def apply(self, x: Tensor, t: Tensor) -> Tensor:
        """The image that parameters `t` select; the shape of `t` is the subclass's."""

    @abc.abstractmethod
    def sample(self, x: Tensor, n: int, generator: torch.Generator | None = None) -> Tensor:
        """`n` independent uniform draws for every image of `x` (N, C, H, W), as (n, N, C, H, W)."""

    def describe(self) -> str:
        """A short line for tables, such as ``Linf(0.1)``; per-image radii print as their range."""
        values = []
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                values.append(f"{value.min():.4g}..{value.max():.4g}" if value.numel() > 1 else f"{float(value):.4g}")
            elif isinstance(value, float):
                values.append(f"{value:.4g}")
            elif value != field.default:
                values.append(f"{field.name}={value}")
        return f"{type(self).__name__}({', '.join(values)})"

    def select(self, index: Tensor | slice, n: int) -> Perturbation:
        """This perturbation for some images of a batch of `n`: radii given an image each are picked, others stay."""
        changes = {}
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if isinstance(value, Tensor) and value.ndim and len(value) == n and n > 1:
                changes[field.name] = _picked(value, index)
        return dataclasses.replace(self, **changes) if changes else self  # type: ignore[type-var]

    def spread(self, x: Tensor) -> Perturbation:
        """This perturbation with all that broadcasts over the batch `x` written out, so that `select` can pick it."""
        return self

    def check(self, x: Tensor) -> None:
        """Raise ValueError unless `x` is a finite floating batch (inside [0, 1] when the perturbation clips)."""
        if x.ndim < 2 or not x.is_floating_point():
            raise ValueError(
                f"expected a batch of float images, got {tuple(x.shape)} {x.dtype}; "
                "uint8 images must be divided by 255 and a single image needs a batch axis (x.unsqueeze(0))"
            )
        low, high = (float(v) for v in torch.aminmax(x.detach())) if x.numel() else (0.0, 0.0)
        if not (low == low and high == high and abs(low) != float("inf") and abs(high) != float("inf")):
            raise ValueError("the images hold NaN or infinity; check the data before asking for a certificate")
        if self.clip and (low < -1e-6 or high > 1 + 1e-6):
            raise ValueError(
                f"the images span [{low:.4g}, {high:.4g}] but {type(self).__name__} clips to [0, 1]; pass images in "
                "pixel space and normalise inside the model, or build the perturbation with clip=False"
            )
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if field.name.startswith("eps") and isinstance(value, Tensor) and value.ndim and len(value) != len(x):
                raise ValueError(f"{field.name} has {len(value)} radii for a batch of {len(x)} images; give one each")


def _check_radius(eps: Radius, name: str = "eps") -> float:
    """Refuse what is no radius; the largest one."""
    if isinstance(eps, Tensor):
        if eps.ndim > 1:
            raise ValueError(f"{name} must be a number or one radius an image, (N,), got shape {tuple(eps.shape)}")
        ends = [float(v) for v in torch.aminmax(eps.detach())] if eps.numel() else [0.0]
    else:
        try:
            ends = [float(eps)] if not isinstance(eps, str) else []
        except TypeError:
            ends = []
        if not ends:
            raise TypeError(f"{name} must be a number, or a tensor (N,) with one radius an image, got {eps!r}")
    for value in ends:
        if not 0 <= value < float("inf"):
            raise ValueError(f"{name} must be a finite number >= 0, got {value}")
    return ends[-1]


def _check_reach(eps: Radius, clip: bool, name: str = "eps") -> None:
    """As `_check_radius`, for a radius of pixel values: above 1 it is one of images in [0, 255], left undivided."""
    most = _check_radius(eps, name)
    if clip and most > 1:
        raise ValueError(
            f"{name} = {most:g} is more than the whole range of images in [0, 1]; 8 of 255 grey levels are 8 / 255 "
            "(for images without that range: clip=False)"
        )


def _spread(eps: Radius, like: Tensor) -> Tensor:
    """`eps` as a tensor of `like`'s dtype that broadcasts over the batch axis of `like`."""
    eps = constant(eps, like)
    return eps.reshape(-1, *[1] * (like.ndim - 1)) if eps.ndim else eps


def _picked(value: Tensor, index: Tensor | slice) -> Tensor:
    """The entries of a tensor that need not be where the index is."""
    return value[index.to(value.device) if isinstance(index, Tensor) else index]


def _clip(x: Tensor, clip: bool) -> Tensor:
    return x.clamp(0, 1) if clip else x


def _uniform(shape: tuple[int, ...], like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Uniform draws on [0, 1) made on the generator's device, so that a CPU generator serves any device."""
    device = generator.device if generator is not None else like.device
    return torch.rand(shape, dtype=like.dtype, device=device, generator=generator).to(like.device)


@dataclasses.dataclass(frozen=True, eq=False)
class Linf(Perturbation):
    """Every pixel moves by at most `eps`. In `apply`, `t` is the offset (N, C, H, W), cut to [-eps, eps]."""

    eps: Radius
    clip: bool = True
    name: ClassVar[str] = "linf"

    def __post_init__(self) -> None:
        _check_reach(self.eps, self.clip)

    def hull(self, x: Tensor) -> tuple[Tensor, Tensor]:
        eps = _spread(self.eps, x)
        return _clip(x - eps, self.clip), _clip(x + eps, self.clip)

    def apply(self, x: Tensor, t: Tensor) -> Tensor:
        eps = _spread(self.eps, x)
        return _clip(x + torch.maximum(torch.minimum(t, eps), -eps), self.clip)

    def sample(self, x: Tensor, n: int, generator: torch.Generator | None = None) -> Tensor:
        return self.apply(x, (2 * _uniform((n, *x.shape), x, generator) - 1) * _spread(self.eps, x))


@dataclasses.dataclass(frozen=True, eq=False)
class L2(Perturbation):
    """Images within Euclidean distance `eps` (then clipped). In `apply`, `t` is the offset, projected to the ball."""

    eps: Radius
    clip: bool = True
    name: ClassVar[str] = "l2"

    def __post_init__(self) -> None:
        _check_radius(self.eps)

    def hull(self, x: Tensor) -> tuple[Tensor, Tensor]:
        eps = _spread(self.eps, x)
        return _clip(x - eps, self.clip), _clip(x + eps, self.clip)

    def apply(self, x: Tensor, t: Tensor) -> Tensor:
        norm = t.flatten(-(x.ndim - 1)).norm(dim=-1).reshape(*t.shape[: t.ndim - x.ndim + 1], *[1] * (x.ndim - 1))
        return _clip(x + t * (_spread(self.eps, x) / norm.clamp_min(1e-30)).clamp(max=1), self.clip)

    def sample(self, x: Tensor, n: int, generator: torch.Generator | None = None) -> Tensor:
        device = generator.device if generator is not None else x.device
        direction = torch.randn((n, *x.shape), dtype=x.dtype, device=device, generator=generator).to(x.device)
        norm = direction.flatten(2).norm(dim=-1)
        radius = _uniform(norm.shape, x, generator) ** (1 / x[0].numel())
        scale = (radius / norm.clamp_min(1e-30)).reshape(*norm.shape, *[1] * (x.ndim - 1))
        return _clip(x + direction * scale * _spread(self.eps, x), self.clip)


@dataclasses.dataclass(frozen=True, eq=False)
class Box(Perturbation):
    """Any image between `lo` and `hi` (each broadcastable to the batch): partial inputs, occlusions, VNN-LIB boxes.

    Pixels with ``lo == hi`` stay fixed. The images passed beside it serve as reference points only. In `apply`, `t` in
    [0, 1] interpolates from `lo` to `hi`. Not clipped by default, because the box itself says what is possible.
    """

    lo: Tensor
    hi: Tensor
    clip: bool = False
    name: ClassVar[str] = "box"

    def __post_init__(self) -> None:
        if not (isinstance(self.lo, Tensor) and isinstance(self.hi, Tensor)):
            raise TypeError(f"lo and hi must be tensors, got {type(self.lo).__name__} and {type(self.hi).__name__}")
        try:
            ordered = self.lo <= self.hi
        except RuntimeError:
            raise ValueError(
                f"lo and hi must fit each other, got shapes {tuple(self.lo.shape)} and {tuple(self.hi.shape)}"
            ) from None
        if not bool(ordered.all()):
            raise ValueError("inverted box: some entries have lo > hi (or are NaN); swap the ends or fix the input")

    def hull(self, x: Tensor) -> tuple[Tensor, Tensor]:
        ends = [v.to(x).expand(x.shape).clone() for v in (self.lo, self.hi)]
        return _clip(ends[0], self.clip), _clip(ends[1], self.clip)

    def apply(self, x: Tensor, t: Tensor) -> Tensor:
        lo, hi = self.hull(x)
        return lo + (hi - lo) * t.clamp(0, 1)

    def sample(self, x: Tensor, n: int, generator: torch.Generator | None = None) -> Tensor:
        return self.apply(x, _uniform((n, *x.shape), x, generator))

    def spread(self, x: Tensor) -> Box:
        return dataclasses.replace(self, lo=self.lo.expand(x.shape), hi=self.hi.expand(x.shape))

    def select(self, index: Tensor | slice, n: int) -> Box:
        ends = [_picked(v, index) if v.ndim > 1 and len(v) == n and n > 1 else v for v in (self.lo, self.hi)]
        return dataclasses.replace(self, lo=ends[0], hi=ends[1])

    def check(self, x: Tensor) -> None:
        super().check(x)
        for end in (self.lo, self.hi):
            pairs = zip(reversed(end.shape), reversed(x.shape))
            if end.ndim > x.ndim or any(a not in (1, b) for a, b in pairs):
                raise ValueError(f"a box of shape {tuple(end.shape)} does not fit inputs of shape {tuple(x.shape)}")
            if not self.clip and not bool(torch.isfinite(end).all()):
                raise ValueError("unbounded box: some ends are infinite, and so is every bound; give finite ends")

    def describe(self) -> str:
        free = int((self.lo < self.hi).sum())
        return f"Box({free} free of {self.lo.numel()})"


class AffineFamily(Perturbation):
    """Images ``clip(x + sum_k t_k direction_k(x))`` with ``t`` in a box of K parameters.

    `apply` takes `t` as (N,) when K = 1, else (N, K); leading axes (..., N[, K]) give (..., N, C, H, W).
    """

    parameters: ClassVar[int] = 1

    @abc.abstractmethod
    def directions(self, x: Tensor) -> Tensor:
        """The K directions for images (N, C, H, W), as (N, K, C, H, W)."""

    @abc.abstractmethod
    def limits(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The ends of the parameter box for images (N, ...), each (N, K)."""

    def apply(self, x: Tensor, t: Tensor) -> Tensor:
        t = t.to(x)
        # (..., N) when K = 1; for a single image, (n, 1) is n parameters of that image, not an (N, K).
        if self.parameters == 1 and not (t.ndim and t.shape[-1] == 1 and (t.ndim == 1 or t.shape[-2] == len(x))):
            t = t.unsqueeze(-1)
        lead = t.shape[:-2]
        t = t.expand(*lead, len(x), self.parameters)
        move = (t.reshape(*t.shape, *[1] * (x.ndim - 1)) * self.directions(x)).sum(len(lead) + 1)
        return _clip(x + move, self.clip)

    def sample(self, x: Tensor, n: int, generator: torch.Generator | None = None) -> Tensor:
        low, high = self.limits(x)
        t = low + (high - low) * _uniform((n, len(x), self.parameters), x, generator)
        move = (t.reshape(*t.shape, *[1] * (x.ndim - 1)) * self.directions(x)).sum(2)
        return _clip(x + move, self.clip)

    def hull(self, x: Tensor) -> tuple[Tensor, Tensor]:
        low, high = (v.reshape(*v.shape, *[1] * (x.ndim - 1)) for v in self.limits(x))
        ends = torch.stack([low * self.directions(x), high * self.directions(x)])
        lo, hi = ends.amin(0).sum(1), ends.amax(0).sum(1)
        return _clip(x + lo, self.clip), _clip(x + hi, self.clip)


def _symmetric(eps: Radius, x: Tensor) -> tuple[Tensor, Tensor]:
    radius = constant(eps, x).expand(len(x)).unsqueeze(1)
    return -radius, radius


@dataclasses.dataclass(frozen=True, eq=False)
class Brightness(AffineFamily):
    """``clip(x + t)``, |t| <= eps (USN pruning, arXiv 2510.00083, section IV)."""

    eps: Radius
    clip: bool = True
    name: ClassVar[str] = "brightness"

    def __post_init__(self) -> None:
        _check_reach(self.eps, self.clip)

    def directions(self, x: Tensor) -> Tensor:
        return torch.ones_like(x).unsqueeze(1)

    def limits(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return _symmetric(self.eps, x)


@dataclasses.dataclass(frozen=True, eq=False)
class Contrast(AffineFamily):
    """``clip(x + t (x - centre))``, |t| <= eps; `about` sets the centre: "zero" (gain), "mean" (of the image), "half".

    The USN paper (arXiv 2510.00083) prints no formula; "zero", the plain gain ``(1 + t) x``, is the default.
    """

    eps: Radius
    about: str = "zero"
    clip: bool = True
    name: ClassVar[str] = "contrast"

    def __post_init__(self) -> None:
        _check_radius(self.eps)
        if self.about not in ("zero", "mean", "half"):
            raise ValueError(f'about must be "zero", "mean" or "half", got {self.about!r}')

    def directions(self, x: Tensor) -> Tensor:
        if self.about == "mean":
            return (x - x.flatten(1).mean(1).reshape(-1, *[1] * (x.ndim - 1))).unsqueeze(1)
        return (x - (0.5 if self.about == "half" else 0.0)).unsqueeze(1)

    def limits(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return _symmetric(self.eps, x)


@dataclasses.dataclass(frozen=True, eq=False)
class BrightnessContrast(AffineFamily):
    """Both at once, ``clip((1 + c) x + b)`` with parameters (b, c), |b| <= eps_brightness, |c| <= eps_contrast."""

    eps_brightness: Radius
    eps_contrast: Radius
    clip: bool = True
    name: ClassVar[str] = "brightness-contrast"
    parameters: ClassVar[int] = 2

    def __post_init__(self) -> None:
        _check_reach(self.eps_brightness, self.clip, "eps_brightness")
        _check_radius(self.eps_contrast, "eps_contrast")

    def directions(self, x: Tensor) -> Tensor:
        return torch.stack([torch.ones_like(x), x], 1)

    def limits(self, x: Tensor) -> tuple[Tensor, Tensor]:
        b, c = _symmetric(self.eps_brightness, x), _symmetric(self.eps_contrast, x)
        return torch.cat([b[0], c[0]], 1), torch.cat([b[1], c[1]], 1)


@dataclasses.dataclass(frozen=True, eq=False)
class Saturation(AffineFamily):
    """``clip(x + t (x - grey(x)))``, |t| <= eps, with the ITU-R BT.601 luma as grey; needs three channels."""

    eps: Radius
    clip: bool = True
    name: ClassVar[str] = "saturation"

    def __post_init__(self) -> None:
        _check_radius(self.eps)

    def directions(self, x: Tensor) -> Tensor:
        if x.ndim != 4 or x.shape[1] != 3:
            raise ValueError(f"Saturation needs RGB images (N, 3, H, W), got {tuple(x.shape)}")
        luma = torch.stack([constant(share, x) for share in LUMA])
        grey = (x * luma.reshape(1, 3, 1, 1)).sum(1, keepdim=True)
        return (x - grey).unsqueeze(1)

    def limits(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return _symmetric(self.eps, x)


@dataclasses.dataclass(frozen=True, eq=False)
class BlurMix(AffineFamily):
    """``clip((1 - t) x + t blur(x))``, 0 <= t <= eps <= 1, with a Gaussian blur of width `sigma` pixels."""

    eps: Radius
    sigma: float = 1.0
    clip: bool = True
    name: ClassVar[str] = "blur"

    def __post_init__(self) -> None:
        _check_radius(self.eps)
        if float(torch.as_tensor(self.eps).max()) > 1:
            raise ValueError(f"BlurMix mixes at most fully, 0 <= eps <= 1; got {self.eps}")
        if not self.sigma > 0:
            raise ValueError(f"sigma must be > 0 pixels, got {self.sigma}")

    def directions(self, x: Tensor) -> Tensor:
        if x.ndim != 4:
            raise ValueError(f"BlurMix needs images (N, C, H, W), got {tuple(x.shape)}")
        return (_gaussian_blur(x, self.sigma) - x).unsqueeze(1)

    def limits(self, x: Tensor) -> tuple[Tensor, Tensor]:
        high = _symmetric(self.eps, x)[1]
        return torch.zeros_like(high), high


def _gaussian_blur(x: Tensor, sigma: float) -> Tensor:
    """Separable Gaussian blur, kernel cut at 3 sigma, edges replicated."""
    reach = max(1, round(3 * sigma))
    grid = torch.arange(-reach, reach + 1, dtype=x.dtype, device=x.device)
    kernel = torch.exp(-0.5 * (grid / sigma) ** 2)
    kernel = (kernel / kernel.sum()).reshape(1, 1, 1, -1).expand(x.shape[1], 1, 1, -1)
    x = F.conv2d(F.pad(x, (reach, reach, 0, 0), mode="replicate"), kernel, groups=x.shape[1])
    return F.conv2d(F.pad(x, (0, 0, reach, reach), mode="replicate"), kernel.transpose(2, 3), groups=x.shape[1])
