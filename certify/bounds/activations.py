"""Elementwise nonlinear functions and the two lines that enclose each on an interval."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from certify.bounds.op import Monotone, Relaxation


def _share(part: Tensor, lo: Tensor, hi: Tensor, where: Tensor) -> Tensor:
    """``part / (hi - lo)`` on the entries `where`, else `part`. Halves, because a width may overflow where its ends do
    not: a slope of 0 would then be too flat."""
    return 0.5 * part / torch.where(where, 0.5 * hi - 0.5 * lo, 0.5)


class ReLU(Monotone):
    """``max(x, 0)``, the triangle relaxation of CROWN (Zhang et al., 2018).

    The upper line is the chord. The lower line has slope 1 where ``hi > -lo`` and else 0, which is CROWN's adaptive
    choice; alpha-CROWN replaces it.
    """

    def forward(self, *inputs: Tensor) -> Tensor:
        return inputs[0].clamp(min=0)

    def unstable(self, lo: Tensor, hi: Tensor) -> Tensor:
        return ~((lo >= 0) | (hi <= 0))  # also where an end is NaN, which must not pass for decided

    def relax(self, lo: Tensor, hi: Tensor) -> Relaxation:
        unstable = self.unstable(lo, hi)
        zero = torch.zeros_like(lo)
        chord = _share(hi, lo, hi, unstable)
        active = (lo >= 0).to(lo.dtype)
        slope_hi = torch.where(unstable, chord, active)
        slope_lo = torch.where(unstable, (hi > -lo).to(lo.dtype), active)
        return Relaxation(slope_lo, None, slope_hi, torch.where(unstable, -lo * chord, zero))


class LeakyReLU(Monotone):
    """``x`` for x >= 0 and ``slope * x`` below, 0 <= slope <= 1."""

    def __init__(self, slope: float) -> None:
        if not 0 <= slope <= 1:
            raise ValueError(f"LeakyReLU is bounded for slopes in [0, 1], got {slope}")
        self.slope = slope

    def forward(self, *inputs: Tensor) -> Tensor:
        return torch.maximum(inputs[0], self.slope * inputs[0])

    def unstable(self, lo: Tensor, hi: Tensor) -> Tensor:
        return ~((lo >= 0) | (hi <= 0))

    def relax(self, lo: Tensor, hi: Tensor) -> Relaxation:
        unstable = self.unstable(lo, hi)
        zero = torch.zeros_like(lo)
        stable = torch.where(lo >= 0, torch.ones_like(lo), torch.full_like(lo, self.slope))
        chord = self.slope + (1 - self.slope) * _share(hi, lo, hi, unstable)
        slope_lo = torch.where(
            unstable, torch.where(hi > -lo, torch.ones_like(lo), torch.full_like(lo, self.slope)), stable
        )
        return Relaxation(
            slope_lo, None, torch.where(unstable, chord, stable), torch.where(unstable, hi - chord * hi, zero)
        )


class Clamp(Monotone):
    """``min(max(x, low), high)``: ReLU6, hard tanh, clipping to pixel range. Either end may be infinite."""

    def __init__(self, low: float, high: float) -> None:
        if not low < high:
            raise ValueError(f"clamp needs low < high, got [{low}, {high}]")
        self.low, self.high = low, high

    def forward(self, *inputs: Tensor) -> Tensor:
        return inputs[0].clamp(self.low, self.high)

    def unstable(self, lo: Tensor, hi: Tensor) -> Tensor:
        return ((lo < self.low) & (hi > self.low)) | ((lo < self.high) & (hi > self.high))

    def relax(self, lo: Tensor, hi: Tensor) -> Relaxation:
        below, above = (lo < self.low) & (hi > self.low), (lo < self.high) & (hi > self.high)
        f_lo, f_hi = self.forward(lo), self.forward(hi)
        one, zero = torch.ones_like(lo), torch.zeros_like(lo)
        identity = (lo >= self.low) & (hi <= self.high)
        # A constant piece and the identity need no choice.
        slope = torch.where(identity, one, zero)
        bias = torch.where(identity, zero, f_lo)

        # Upper line: from (lo, f(lo)) to where the function last rises, or the constant f(hi) where that is closer.
        reach = torch.where(above, torch.full_like(hi, self.high), hi) if math.isfinite(self.high) else hi
        rise = _share(f_hi - f_lo, lo, reach, below)
        # Over the concave end alone, the identity and the constant `high` are both above; keep the one that is closer.
        concave = above & ~below
        flat_hi = torch.where(concave, (hi - self.high) > (self.high - lo), (hi - reach) > (reach - lo))
        slope_hi = torch.where(below, rise, torch.where(concave, one, slope))
        slope_hi = torch.where((below | concave) & above & flat_hi, zero, slope_hi)
        bias_hi = torch.where(below, f_lo - slope_hi * lo, torch.where(concave, zero, bias))
        bias_hi = torch.where((below | concave) & above & flat_hi, f_hi, bias_hi)

        # Lower line: mirror image.
        start = torch.where(below, torch.full_like(lo, self.low), lo) if math.isfinite(self.low) else lo
        climb = _share(f_hi - f_lo, start, hi, above)
        convex = below & ~above
        flat_lo = torch.where(convex, (self.low - lo) >= (hi - self.low), (start - lo) >= (hi - start))
        slope_lo = torch.where(above, climb, torch.where(convex, one, slope))
        slope_lo = torch.where((above | convex) & below & flat_lo, zero, slope_lo)
        bias_lo = torch.where(above, f_hi - slope_lo * hi, torch.where(convex, zero, bias))
        bias_lo = torch.where((above | convex) & below & flat_lo, f_lo, bias_lo)
        return Relaxation(slope_lo, bias_lo, slope_hi, bias_hi)


class SShaped(Monotone):
    """An increasing function, convex below 0 and concave above (sigmoid, tanh).

    On one side of 0 one line is the chord and the other the tangent at the middle. Across 0, the upper line starts at
    (lo, f(lo)) and touches the concave part; where the touching point would lie beyond `hi`, it is the chord. Lower
    lines mirror it. Touching points come from bisection, always rounded to the sound side.
    """

    def __init__(self, function: Callable[[Tensor], Tensor], derivative: Callable[[Tensor], Tensor]) -> None:
        self.function, self.derivative = function, derivative

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(inputs[0])

    def unstable(self, lo: Tensor, hi: Tensor) -> Tensor:
        return torch.ones_like(lo, dtype=torch.bool)

    def relax(self, lo: Tensor, hi: Tensor) -> Relaxation:
        f_lo, f_hi = self.function(lo), self.function(hi)
        width = hi - lo
        point = width < 1e-6
        chord = torch.where(
            point,
            self.derivative(lo).minimum(self.derivative(hi)),
            (f_hi - f_lo) / torch.where(point, torch.ones_like(width), width),
        )
        middle = (lo + hi) / 2
        up_at = self._touch(lo, hi, f_lo, upper=True)
        down_at = self._touch(lo, hi, f_hi, upper=False)
        convex, concave = hi <= 0, lo >= 0
        tangent_hi = torch.where(concave, middle, up_at)
        chord_hi = convex | (~concave & (up_at >= hi)) | point
        slope_hi = torch.where(chord_hi, chord, self.derivative(tangent_hi))
        bias_hi = torch.where(chord_hi, f_lo - chord * lo, self.function(tangent_hi) - slope_hi * tangent_hi)
        tangent_lo = torch.where(convex, middle, down_at)
        chord_lo = concave | (~convex & (down_at <= lo)) | point
        slope_lo = torch.where(chord_lo, chord, self.derivative(tangent_lo))
        bias_lo = torch.where(chord_lo, f_hi - chord * hi, self.function(tangent_lo) - slope_lo * tangent_lo)
        # A line with the right slope is made sound at both ends of a tiny interval by constants.
        slope_hi, slope_lo = torch.where(point, 0.0, slope_hi), torch.where(point, 0.0, slope_lo)
        return Relaxation(slope_lo, torch.where(point, f_lo, bias_lo), slope_hi, torch.where(point, f_hi, bias_hi))

    def _touch(self, lo: Tensor, hi: Tensor, anchor: Tensor, upper: bool) -> Tensor:
        """Smallest d >= 0 (largest d <= 0) whose tangent stays above f at lo (below f at hi), by bisection."""
        with torch.no_grad():
            end = hi.clamp(min=0) if upper else lo.clamp(max=0)
            inner, outer = torch.zeros_like(lo), end.clone()
            for _ in range(40):
                d = (inner + outer) / 2
                reach = self.function(d) + self.derivative(d) * ((lo if upper else hi) - d)
                sound = reach >= anchor if upper else reach <= anchor
                outer, inner = torch.where(sound, d, outer), torch.where(sound, inner, d)
            reach = self.function(outer) + self.derivative(outer) * ((lo if upper else hi) - outer)
            sound = reach >= anchor if upper else reach <= anchor
            # No tangent inside the interval is sound: report its end, which stands for the chord.
            return torch.where(sound, outer, end)


def sigmoid() -> SShaped:
    """The logistic function."""
    return SShaped(torch.sigmoid, lambda v: torch.sigmoid(v) * (1 - torch.sigmoid(v)))


def tanh() -> SShaped:
    """The hyperbolic tangent."""
    return SShaped(torch.tanh, lambda v: 1 - torch.tanh(v) ** 2)
