"""Every network of the zoo goes through the bound engine unchanged."""

import pytest
import torch

import certify
import models

QUICK = {"cnn7_nrs", "cnn7_cw", "cnn_large", "mlp"}


def build(name, size, head=None):
    """A narrow network whose batch normalisation has seen some images."""
    net = models.create(name, 10, in_channels=3, image_size=size, width=0.25, head=head, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _ in range(3):
            net.train()(torch.rand(8, 3, size, size, generator=generator))
    return net.eval(), torch.rand(2, 3, size, size, generator=generator)


def check(net, x, p, method, n=20):
    lo, hi = certify.bounds(net, x, p, method)
    with torch.no_grad():
        samples = torch.stack([net(s) for s in p.sample(x, n, torch.Generator().manual_seed(2))])
    slack = 1e-4 * (1 + samples.abs().max())
    assert (samples >= lo - slack).all()
    assert (samples <= hi + slack).all()
    return (hi - lo).mean().item()


@pytest.mark.parametrize("name", models.names())
def test_intervals_and_linear_bounds_at_64_pixels(name):
    net, x = build(name, 64)
    for p in (certify.Linf(1e-4), certify.Brightness(1e-3)):
        widths = [check(net, x, p, method) for method in ("ibp", "crown-ibp")]
        assert all(width < float("inf") for width in widths)


@pytest.mark.parametrize("head", ["keypoints", "dsnt"])
def test_keypoint_heads(head):
    net, x = build("cnn7_nrs", 64, head)
    loose = check(net, x, certify.Brightness(1e-3), "ibp")
    assert check(net, x, certify.Brightness(1e-3), "forward") < min(loose, 64)


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in models.names()])
@torch.no_grad()
def test_crown_at_32_pixels(name):
    net, x = build(name, 32)
    p = certify.Linf(1e-5)
    assert check(net, x[:1], p, "crown") <= check(net, x[:1], p, "crown-ibp") * (1 + 1e-3) + 1e-6
