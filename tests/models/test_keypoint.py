"""Keypoint heads: coordinates in pixels of the input image, x before y."""

import pytest
import torch

import models
from models.keypoint import DSNT, PixelScale, pixel_grid


def peaked(height, width, row, column):
    """One feature map per keypoint with all its mass on one cell."""
    maps = torch.zeros(1, 1, height, width)
    maps[0, 0, row, column] = 100.0
    return maps


def identity_head(keypoints, shape, image_size):
    head = DSNT(keypoints, keypoints, shape, image_size)
    with torch.no_grad():
        head.heatmaps.weight.copy_(torch.eye(keypoints).view(keypoints, keypoints, 1, 1))
    return head


@pytest.mark.parametrize(("row", "column"), [(0, 0), (0, 15), (15, 0), (3, 11)])
def test_a_peak_gives_its_own_pixel_when_cells_are_pixels(row, column):
    head = identity_head(1, (16, 16), image_size=16)
    torch.testing.assert_close(head(peaked(16, 16, row, column)), torch.tensor([[column, row]], dtype=torch.float32))


def test_corners_of_a_coarse_map_are_the_corners_of_the_image():
    head = identity_head(1, (2, 3), image_size=64)
    torch.testing.assert_close(head(peaked(2, 3, 0, 0)), torch.tensor([[0.0, 0.0]]))
    torch.testing.assert_close(head(peaked(2, 3, 1, 1)), torch.tensor([[31.5, 63.0]]))
    torch.testing.assert_close(head(peaked(2, 3, 1, 2)), torch.tensor([[63.0, 63.0]]))


def test_two_equal_peaks_meet_in_the_middle():
    head = identity_head(1, (9, 9), image_size=9)
    torch.testing.assert_close(head(peaked(9, 9, 2, 1) + peaked(9, 9, 4, 7)), torch.tensor([[4.0, 3.0]]))


def test_keypoints_are_ordered_x_y_and_do_not_mix():
    head = identity_head(2, (8, 8), image_size=8)
    maps = torch.cat([peaked(8, 8, 1, 2), peaked(8, 8, 5, 6)], dim=1)
    torch.testing.assert_close(head(maps), torch.tensor([[2.0, 1.0, 6.0, 5.0]]))


def test_head_is_the_expectation_written_out():
    generator = torch.Generator().manual_seed(0)
    head = DSNT(5, 3, (4, 6), image_size=24).double()
    features = torch.randn(2, 5, 4, 6, generator=generator, dtype=torch.float64)
    logits = torch.einsum("kc,nchw->nkhw", head.heatmaps.weight[:, :, 0, 0], features)
    p = torch.exp(logits) / torch.exp(logits).sum((2, 3), keepdim=True)
    x = (p * torch.arange(6, dtype=torch.float64) * 23 / 5).sum((2, 3))
    y = (p * torch.arange(4, dtype=torch.float64).view(4, 1) * 23 / 3).sum((2, 3))
    torch.testing.assert_close(head(features), torch.stack([x, y], dim=2).flatten(1), rtol=1e-6, atol=1e-5)


def test_grid_is_a_saved_constant():
    head = DSNT(2, 1, (3, 3), 32)
    assert "grid" in head.state_dict()
    assert not head.grid.requires_grad
    assert pixel_grid((2, 2), 10).tolist() == [[0, 0], [9, 0], [0, 9], [9, 9]]


def test_pixel_scale_maps_the_unit_square_to_the_image():
    scale = PixelScale(64)
    torch.testing.assert_close(scale(torch.tensor([[-1.0, 0.0, 1.0]])), torch.tensor([[-0.5, 31.5, 63.5]]))


@pytest.mark.parametrize("head", ["keypoints", "dsnt"])
@pytest.mark.parametrize("name", [n for n in models.names() if n != "mlp"])
def test_an_untrained_net_predicts_near_the_centre(name, head):
    model = models.create(name, 48, width=0.125, head=head, image_size=64, seed=0)
    y = model(torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
    assert y.shape == (4, 48)
    assert (y - 31.5).abs().max() < 8


def test_linear_is_another_word_for_keypoints():
    a = models.create("mlp", 6, head="linear", seed=1)
    b = models.create("mlp", 6, head="keypoints", seed=1)
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(a(x), b(x))
    assert a.recipe == b.recipe


def test_a_single_cell_cannot_point():
    with pytest.raises(ValueError, match=r"at least 2x2 cells, but the last one is 1x1 for images of 16 px"):
        models.create("mobilenetv2", 4, image_size=16, width=0.125, head="dsnt")


@pytest.mark.parametrize("head", ["keypoints", "dsnt"])
def test_a_small_net_learns_where_a_spot_is(head):
    generator = torch.Generator().manual_seed(0)
    centre = 4 + 8 * torch.rand(256, 2, generator=generator)
    axis = torch.arange(16.0)
    spot_x = torch.exp(-((axis - centre[:, :1]) ** 2) / 4)
    spot_y = torch.exp(-((axis - centre[:, 1:]) ** 2) / 4)
    x = (spot_y[:, :, None] * spot_x[:, None, :]).unsqueeze(1)
    model = models.create("cnn7_nrs", 2, in_channels=1, image_size=16, width=0.125, head=head, seed=0)
    optimiser = torch.optim.Adam(model.parameters(), lr=0.01)
    losses = []
    for _ in range(40):
        loss = (model(x) - centre).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[0] > 4
    assert losses[-1] < 0.25 * losses[0]
