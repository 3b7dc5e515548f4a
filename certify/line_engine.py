"""Batches of sub-intervals of t, and lines below the margins of a network on each, in one precision."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from certify.bounds.forward import Form, propagate
from certify.bounds.graph import Graph
from certify.bounds.op import UnsupportedOperation
from certify.bounds.tangent import Tangent
from certify.motion import Motion


@dataclasses.dataclass
class Open:
    """Sub-intervals to be looked at: image (D,), lo and hi (D, K), whether in float64 (D,), and the best bound known of
    the margins on each (D,); all on the CPU."""

    image: Tensor
    lo: Tensor
    hi: Tensor
    double: Tensor
    bound: Tensor

    def __len__(self) -> int:
        return len(self.image)

    def pick(self, index: Tensor) -> Open:
        return Open(*(getattr(self, f.name)[index] for f in dataclasses.fields(Open)))

    @staticmethod
    def join(parts: list[Open]) -> Open:
        return Open(*(torch.cat([getattr(p, f.name) for p in parts]) for f in dataclasses.fields(Open)))


@dataclasses.dataclass
class Left:
    """Sub-intervals that a round left over, with the worst row's line: its smallest value `best` (D,), the radius
    around it `remainder` (D,), its `steps` along each parameter (D, K), the `slack` kept for rounding (D,)."""

    part: Open
    best: Tensor
    remainder: Tensor
    steps: Tensor
    slack: Tensor

    def pick(self, index: Tensor) -> Left:
        return Left(self.part.pick(index), *(v[index] for v in (self.best, self.remainder, self.steps, self.slack)))

    @staticmethod
    def none(part: Open, parameters: int) -> Left:
        nothing = torch.zeros(0, dtype=torch.float64)
        empty = part.pick(torch.zeros(0, dtype=torch.int64))
        return Left(empty, nothing, nothing, nothing.reshape(0, parameters), nothing)

    @staticmethod
    def join(parts: list[Left]) -> Left:
        rest = (torch.cat([getattr(p, name) for p in parts]) for name in ("best", "remainder", "steps", "slack"))
        return Left(Open.join([p.part for p in parts]), *rest)


class Rows:
    """The rows C of a batch as few base rows and a matrix that combines them: ``C = mix @ base``."""

    def __init__(self, C: Tensor, d: Tensor) -> None:
        self.C, self.d = C, d
        self.mix: Tensor | None = None
        half = C.shape[1] // 2
        eye = torch.eye(C.shape[1], dtype=C.dtype, device=C.device)
        if C.shape[1] == 2 * half and bool((C[:, :half] == -C[:, half:]).all()):
            self.base, self.mix = C[:, :half], torch.cat([eye[:half, :half], -eye[:half, :half]])
        elif C.shape[1] <= 2 * C.shape[2]:
            self.base, self.mix = C, eye
        else:
            outputs = torch.eye(C.shape[2], dtype=C.dtype, device=C.device)
            self.base = outputs.expand(len(C), -1, -1)
        # Per image: the matrix from base rows to rows.
        self.matrix = C if self.mix is None else self.mix.expand(len(C), -1, -1)

    def to(self, dtype: torch.dtype) -> Rows:
        return Rows(self.C.to(dtype), self.d.to(dtype))


class Engine:
    """One precision: the network behind the perturbation's clipping, the rows, and the tangents made so far."""

    def __init__(self, graph: Graph, motion: Motion, rows: Rows, dtype: torch.dtype) -> None:
        self.graph, self.motion, self.rows, self.dtype = motion.network(graph), motion, rows, dtype
        self.tangents: dict[int, Tangent] = {}
        self.smooth = True  # until an operation turns out to have no tangent
        self.nodes = sum(math.prod(n.shape) for n in self.graph.nodes)

    def tangent_bytes(self) -> int:
        """The working memory of one image's tangent."""
        return self.nodes * self.rows.base.shape[1] * torch.finfo(self.dtype).bits // 8

    def lines(self, part: Open, tangent: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Lines below the margins for t in each sub-interval: constants (D, R), slopes (K, D, R), radii (D, R)."""
        device = self.rows.C.device
        image = part.image.to(device)
        start = self.motion.form(part.image, part.lo, part.hi, self.dtype)
        if tangent and self.smooth:
            only = int(part.image[0])
            if only not in self.tangents:
                middle = ((self.motion.lo + self.motion.hi) / 2)[only : only + 1]
                at = self.motion.raw(part.image[:1], middle, self.dtype)
                try:
                    self.tangents = {only: Tangent(self.graph, at, self.rows.base[only : only + 1])}
                except UnsupportedOperation:
                    self.smooth = False
                    return self.lines(part, False)
            rows, out = self.tangents[only].bound(start)
            tight = _combine(rows, self.rows.matrix[image], self.rows.d[image])
            plain = _combine(out, self.rows.C[image], self.rows.d[image])
            better = tight[2] < plain[2]
            merged = [torch.where(better, a, b) for a, b in zip(tight, plain)]
            return merged[0], merged[1], merged[2]
        return _combine(propagate(self.graph, start), self.rows.C[image], self.rows.d[image])


def _combine(form: Form, C: Tensor, d: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The rows ``C v + d`` of a form (B, outputs), as constants, slopes and radii."""
    centre = (form.centre.unsqueeze(2) @ C.transpose(1, 2)).squeeze(2)
    return centre[0] + d, centre[1:], (form.radius.unsqueeze(1) @ C.abs().transpose(1, 2)).squeeze(1)
