"""Counterexamples on record: how a verdict's row keeps the input that breaks the property, and gives it back.

A semantic perturbation keeps its parameters, a ball or a box the image itself. Rows of images that the network gets
wrong before they are perturbed keep nothing: the image is its own counterexample.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

import certify
from certify.curves import Path as Curve
from certify.perturbations import AffineFamily, Perturbation
from runs.reattack import STRAY

KEY = "counterexample"


def kept(found: certify.Certificate, i: int) -> dict[str, Any]:
    """What the row of image ``i`` keeps of its counterexample: nothing unless it is VIOLATED."""
    if int(found.status[i]) != certify.Status.VIOLATED:
        return {}
    if found.parameters is not None and bool(found.parameters[i].isfinite().all()):
        return {KEY: {"parameters": found.parameters[i].tolist()}}
    image = found.counterexamples[i].detach().to("cpu", torch.float32).numpy().astype("<f4")
    return {KEY: {"image": base64.b64encode(image.tobytes()).decode()}}


def given(row: Mapping[str, Any], p: Perturbation, x: Tensor) -> Tensor | None:
    """The counterexample of a row as an image (1, C, H, W), None if it keeps none.

    Args:
        row: a verdict.
        p: the perturbation it is about, of this image alone.
        x: the image (1, C, H, W).

    Raises:
        ValueError: what is kept is no image of this size, or not in reach of the perturbation's parameters.
    """
    found = row.get(KEY)
    if found is None:
        return None
    if "parameters" in found:
        at = torch.tensor(found["parameters"], dtype=x.dtype, device=x.device)
        if not isinstance(p, AffineFamily | Curve):
            raise ValueError(f"the counterexample of image {row['index']} has parameters, but {p.describe()} has none")
        low, high = (end[0] for end in p.limits(x))
        if at.shape != low.shape or bool(((at < low - STRAY) | (at > high + STRAY)).any()):
            raise ValueError(f"the counterexample of image {row['index']} lies outside of {p.describe()}")
        return p.apply(x, at if len(at) == 1 else at.unsqueeze(0))
    values = np.frombuffer(base64.b64decode(found["image"]), dtype="<f4")
    if values.size != x.numel():
        raise ValueError(f"the counterexample of image {row['index']} has {values.size} values, not {x.numel()}")
    return torch.from_numpy(values.copy()).reshape(x.shape).to(x)
