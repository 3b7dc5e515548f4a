"""A triangle rasteriser in numpy: all spans of all triangles at once, one z-buffer pass, no loop over triangles.

Screen convention, here and in the whole renderer: x to the right, y down, in pixels; pixel (i, j) covers
[j, j+1) x [i, i+1), so its centre is at (j + 0.5, i + 0.5). "Closeness" grows towards the viewer and must be affine in
screen space: 1/z for a perspective view, -z for an orthographic one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Triangles:
    """Front-facing triangles in screen space: `index` (T,) into the faces given, `corners` (T, 3, 2), `plane` (T, 3)
    with closeness = plane . (x, y, 1).
    """

    index: Ints
    corners: Floats
    plane: Floats


def front_facing(xy: Floats, closeness: Floats, faces: npt.NDArray[np.int32]) -> Triangles:
    """Triangles that face the viewer, from vertices `xy` (V, 2) and `closeness` (V,).

    Faces are counter-clockwise from outside in a right-handed space, which is clockwise on a screen whose y points up
    and therefore has a negative cross product with y down.
    """
    corners = xy[faces]
    e1, e2 = corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]
    cross = e1[:, 0] * e2[:, 1] - e1[:, 1] * e2[:, 0]
    front = np.flatnonzero(cross < -1e-9)
    corners, e1, e2, cross = corners[front], e1[front], e2[front], cross[front]
    c = closeness[faces[front]]
    d1, d2 = c[:, 1] - c[:, 0], c[:, 2] - c[:, 0]
    a = (d1 * e2[:, 1] - d2 * e1[:, 1]) / cross
    b = (d2 * e1[:, 0] - d1 * e2[:, 0]) / cross
    offset = c[:, 0] - a * corners[:, 0, 0] - b * corners[:, 0, 1]
    return Triangles(front, corners, np.stack([a, b, offset], axis=-1))


def _expand(counts: Ints) -> tuple[Ints, Ints]:
    """For counts (n,): the owner of each of the sum(counts) items, and the item's place within its owner."""
    owner = np.repeat(np.arange(len(counts)), counts)
    start = np.cumsum(counts) - counts
    return owner, np.arange(len(owner)) - start[owner]


def rasterise(triangles: Triangles, height: int, width: int) -> tuple[npt.NDArray[np.int32], Floats]:
    """(owner, closeness), each (height * width,): the nearest triangle at each pixel centre (an index into
    `triangles`, -1 where there is none) and its closeness there (-inf where there is none).

    A pixel belongs to a triangle iff its centre lies in the half-open span [left, right) of its row, so that two
    triangles sharing an edge never both own, and never both miss, a pixel on it.
    """
    owner = np.full(height * width, -1, dtype=np.int32)
    depth = np.full(height * width, -np.inf)
    corners = triangles.corners
    if len(corners) == 0:
        return owner, depth
    y = corners[:, :, 1]
    first = np.clip(np.ceil(y.min(1) - 0.5), 0, height).astype(np.int64)
    last = np.clip(np.ceil(y.max(1) - 0.5), 0, height).astype(np.int64)
    tri, row = _expand(last - first)
    row += first[tri]
    # The inside lies to the right of an edge that goes down the screen and to the left of one that goes up.
    step = np.roll(corners, -1, axis=1) - corners
    dy = step[:, :, 1]
    slope = step[:, :, 0] / np.where(dy == 0, 1.0, dy)
    offset = corners[:, :, 0] - slope * y
    centre = (row + 0.5)[:, None]
    x = slope[tri] * centre + offset[tri]
    down, up = (dy > 0)[tri], (dy < 0)[tri]
    left = np.where(down, x, -np.inf).max(1)
    right = np.where(up, x, np.inf).min(1)
    start = np.clip(np.ceil(left - 0.5), 0, width).astype(np.int64)
    stop = np.clip(np.ceil(right - 0.5), 0, width).astype(np.int64)
    span, column = _expand(np.maximum(stop - start, 0))
    column += start[span]
    row, tri = row[span], tri[span]
    plane = triangles.plane[tri]
    closeness = plane[:, 0] * (column + 0.5) + plane[:, 1] * (row + 0.5) + plane[:, 2]
    pixel = row * width + column
    np.maximum.at(depth, pixel, closeness)
    nearest = closeness == depth[pixel]
    owner[pixel[nearest]] = tri[nearest]
    return owner, depth


def barycentric(triangles: Triangles, owner: Ints, x: npt.NDArray[Any], y: npt.NDArray[Any]) -> Floats:
    """Screen-space barycentric coordinates (n, 3) of the points (x, y) in the triangles `owner` (n,)."""
    a, b, c = (triangles.corners[owner, k] for k in range(3))
    area = (b[:, 0] - a[:, 0]) * (c[:, 1] - a[:, 1]) - (b[:, 1] - a[:, 1]) * (c[:, 0] - a[:, 0])
    wb = ((x - a[:, 0]) * (c[:, 1] - a[:, 1]) - (y - a[:, 1]) * (c[:, 0] - a[:, 0])) / area
    wc = ((b[:, 0] - a[:, 0]) * (y - a[:, 1]) - (b[:, 1] - a[:, 1]) * (x - a[:, 0])) / area
    return np.stack([1 - wb - wc, wb, wc], axis=-1)


def unoccluded(triangles: Triangles, xy: Floats, closeness: Floats) -> npt.NDArray[np.bool_]:
    """(K,) whether the points `xy` (K, 2) are seen: no triangle covers them with more than `closeness` (K,).

    The depth test is exact, against the triangles and not against a z-buffer, so it does not depend on resolution.
    Give the point a little more closeness than it has, or the surface it lies on may hide it by rounding.
    """
    a = triangles.corners[None, :, :, :]  # (1, T, 3, 2)
    step = np.roll(triangles.corners, -1, axis=1)[None] - a
    to = xy[:, None, None, :] - a
    inside = (step[..., 0] * to[..., 1] - step[..., 1] * to[..., 0] <= 0).all(-1)
    p = triangles.plane
    at = xy[:, :1] * p[:, 0] + xy[:, 1:] * p[:, 1] + p[:, 2]
    return np.asarray(~np.any(inside & (at > closeness[:, None]), axis=1))
