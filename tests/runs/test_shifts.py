from __future__ import annotations

import pytest
import torch
from torch import Tensor

from datasets.aircraft_geometry import KEYPOINTS, MIRROR
from runs.shifts import Shifted, mirrored, move, reflect


class Still(list[tuple[Tensor, Tensor]]):
    """Batches that come in the same order in every epoch."""

    def set_epoch(self, epoch: int) -> None:
        pass


def dots(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Black images 12x16, two white pixels in channels of their own, and the centres of these pixels."""
    generator = torch.Generator().manual_seed(seed)
    columns = torch.randint(4, 12, (n, 2), generator=generator)
    rows = torch.randint(4, 8, (n, 2), generator=generator)
    x = torch.zeros(n, 2, 12, 16)
    for i in range(n):
        for k in range(2):
            x[i, k, rows[i, k], columns[i, k]] = 1.0
    return x, torch.stack([columns, rows], -1).flatten(1) + 0.5


def lit(x: Tensor, y: Tensor) -> Tensor:
    """(N, 2, 2): the value of channel c at keypoint k."""
    columns, rows = y.long().unflatten(1, (2, 2)).unbind(-1)
    return torch.stack([torch.stack([x[i, :, r, c] for r, c in zip(rows[i], columns[i])], 1) for i in range(len(x))])


def test_reflection_keeps_keypoints_on_their_pixels_and_swaps_the_sides() -> None:
    x, y = dots(30)
    which = torch.arange(30) % 3 == 0
    images, points = reflect(x, y, which, torch.tensor([1, 0]))
    assert torch.equal(images[~which], x[~which])
    assert torch.equal(points[~which], y[~which])
    assert torch.equal(images[which], x[which].flip(-1))
    # What was the first keypoint is the second one now: its pixel lies in the first channel.
    assert torch.equal(lit(images[which], points[which])[:, 0, 1], torch.ones(10))
    assert torch.equal(lit(images[which], points[which])[:, 1, 0], torch.ones(10))
    again = reflect(images, points, which, torch.tensor([1, 0]))
    assert torch.equal(again[0], x)
    assert torch.equal(again[1], y)


def test_names_tell_the_mirror_images() -> None:
    assert mirrored(KEYPOINTS) == MIRROR
    assert mirrored(("nose", "left_eye", "right_eye")) == (0, 2, 1)
    assert mirrored(("a", "b")) is None  # nothing says that these are no left and right
    assert mirrored(("nose", "left_eye")) is None


def test_half_of_the_images_are_mirrored_in_any_epoch_and_the_draws_come_back() -> None:
    x, y = dots(200)

    def passed(epoch: int, mirror: tuple[int, ...] | None = (1, 0)) -> tuple[Tensor, Tensor]:
        batches = Shifted(Still([(x[:150], y[:150]), (x[150:], y[150:])]), 0, pixels=3, mirror=mirror)
        batches.set_epoch(epoch)
        parts = list(batches)
        return torch.cat([a for a, _ in parts]), torch.cat([b for _, b in parts])

    images, points = passed(0)
    values = lit(images, points)
    turned = values[:, 0, 1] == 1.0
    assert torch.equal(values[~turned][:, 0, 0], torch.ones(int((~turned).sum())))
    assert 70 < int(turned.sum()) < 130
    assert all(torch.equal(a, b) for a, b in zip(passed(0), (images, points)))
    assert not torch.equal(passed(1)[1], points)
    assert torch.equal(lit(*passed(0, None))[:, 0, 0], torch.ones(200))


def test_images_come_in_channels_last_memory() -> None:
    x, y = dots(5)
    moved, _ = move(x, y, torch.zeros(5, 2, dtype=torch.int64), 2)
    assert torch.equal(moved, x)
    assert moved.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("mirror", [(0, 0), (1, 2, 0), (2, 1)])
def test_what_pairs_nothing_up_is_no_mirror(mirror: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="pair the keypoints up"):
        Shifted(Still(), 0, mirror=mirror)
