"""Statistics in the units of uint8 images."""

import pytest

import models


@pytest.mark.parametrize("mean", [125.3, (0.4, 0.5, 113.9), -0.1])
def test_a_mean_outside_of_pixel_space_is_refused(mean):
    with pytest.raises(ValueError, match=r"images in \[0, 1\].*divide statistics of 0\.\.255 by 255"):
        models.create("mlp", 10, image_size=8, mean=mean)
