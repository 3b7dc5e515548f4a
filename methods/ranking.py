"""From scores to what stays: exact fractions by a stable sort, over single weights or over (coupled) channels."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from methods.errors import MaskError
from methods.wiring import ChannelGroup, Member

Scope = Literal["global", "layer"]


def entries(scores: Mapping[str, Tensor], gone: Mapping[str, Tensor], ratio: float, scope: Scope) -> dict[str, Tensor]:
    """Bool tensors of the scores' shapes, ``False`` for the fraction `ratio` removed; `gone` marks what already is."""
    kept = _select([s.flatten() for s in scores.values()], [gone[n].flatten() for n in scores], ratio, scope, False)
    return {name: k.reshape(s.shape) for (name, s), k in zip(scores.items(), kept)}


def channels(
    scores: Mapping[str, Tensor],
    alive: Mapping[str, Tensor],
    ratio: float,
    scope: Scope,
    groups: Sequence[ChannelGroup] | None,
) -> dict[str, Tensor]:
    """Bool (out_channels,) vectors, ``False`` for the fraction `ratio` of channels (or coupled channels) removed.

    A channel's score is the mean over its weights; a coupled channel's, the mean over its members. `alive` holds
    (out_channels,) vectors of what is still there. Channels in no group stay as they are. The best channel of each
    layer or group stays.
    """
    rows = {name: s.flatten(1).double().mean(1) if s.ndim > 1 else s.double() for name, s in scores.items()}
    units = _units(rows, groups)
    unit_scores, unit_gone = [], []
    for unit in units:
        total = torch.zeros(unit.channels, dtype=torch.float64)
        count = torch.zeros(unit.channels, dtype=torch.float64)
        live = torch.zeros(unit.channels, dtype=torch.bool)
        for member in unit.members:
            index, of_member = torch.tensor(member.units), list(member.rows)
            total.index_add_(0, index, rows[member.weight][of_member])
            count.index_add_(0, index, torch.ones(len(of_member), dtype=torch.float64))
            live[index[alive[member.weight][of_member]]] = True
        unit_scores.append(total / count.clamp_min(1))
        unit_gone.append(~live)
    result = {name: vector.clone() for name, vector in alive.items()}
    for unit, kept in zip(units, _select(unit_scores, unit_gone, ratio, scope, True)):
        for member in unit.members:
            result[member.weight][list(member.rows)] = kept[list(member.units)]
    return result


def _units(rows: Mapping[str, Tensor], groups: Sequence[ChannelGroup] | None) -> list[ChannelGroup]:
    """The channels that are ranked as one: each layer's own, or the groups whose members all have scores."""
    if groups is None:
        own = {name: tuple(range(len(vector))) for name, vector in rows.items()}
        return [ChannelGroup(len(index), (Member(name, index, index),)) for name, index in own.items()]
    units = [group for group in groups if all(member.weight in rows for member in group.members)]
    if not units:
        raise MaskError("none of the channel groups is covered by the scores; score every layer of a group")
    return units


def _select(
    scores: Sequence[Tensor], gone: Sequence[Tensor], ratio: float, scope: Scope, protect: bool
) -> list[Tensor]:
    """Kept vectors after removing ``round(ratio * n)`` of the smallest, those already `gone` first.

    With `protect`, the best of each vector stays, so that no layer is emptied.
    """
    shields = []
    for s, g in zip(scores, gone):
        shield = torch.zeros_like(g)
        if protect:
            shield[torch.argsort(s.masked_fill(g, -math.inf), stable=True)[-1]] = True
        shields.append(shield)
    pools = [list(range(len(scores)))] if scope == "global" else [[i] for i in range(len(scores))]
    result: list[Tensor] = []
    for pool in pools:
        flat, already, shield = (torch.cat([part[i] for i in pool]) for part in (scores, gone, shields))
        count = min(round(ratio * flat.numel()), flat.numel() - int(shield.sum()))
        if count < int(already.sum()):
            raise MaskError(
                f"the earlier mask already removes {int(already.sum())} of {flat.numel()}, more than the ratio "
                f"{ratio:.4g} asks for ({count}); ratios must not fall"
            )
        order = torch.argsort(flat, stable=True)
        order = torch.cat([order[already[order]], order[~already[order] & ~shield[order]]])
        keep = torch.ones_like(already)
        keep[order[:count]] = False
        result += keep.split([len(scores[i]) for i in pool])
    return result
