"""IBP training: schedules, the worst-case loss against sampled images, and what it buys."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from method_toys import FAST, images, mlp, points, residual
from torch import nn

import certify
from methods.training import IBP, CrossEntropy, KeypointMSE, Natural, Objective, Progress, train
from methods.training.eps import Linear, Smoothed

END = Progress(1, 1)


def small(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 3)
        )


def test_linear_schedule():
    ramp = Linear(0.2, 0.6)
    assert [ramp(t) for t in (0.0, 0.2, 0.6, 1.0)] == [0.0, 0.0, 1.0, 1.0]
    assert ramp(0.3) == pytest.approx(0.25)
    assert Linear(0.0, 0.0)(0.0) == 1.0
    with pytest.raises(ValueError, match="start <= end"):
        Linear(0.6, 0.2)


def test_smoothed_schedule_is_the_published_one():
    """Against auto-LiRPA's formula in steps, and smooth at the join."""
    ramp, first, last, beta = Smoothed(0.1, 0.5, mid=0.4, beta=4.0), 100, 500, 4.0
    middle = first + int(0.4 * (last - first))
    t = (middle - first) ** (beta - 1)
    alpha = 1.0 / ((last - middle) * beta * t + (middle - first) * t)
    at_middle = alpha * (middle - first) ** beta
    for step in range(0, 1000, 7):
        if step < first:
            expected = 0.0
        elif step < middle:
            expected = alpha * (step - first) ** beta
        elif step < last:
            expected = at_middle + (1 - at_middle) * (step - middle) / (last - middle)
        else:
            expected = 1.0
        assert ramp(step / 1000) == pytest.approx(expected, abs=1e-9), step
    assert ramp(0.26 + 1e-7) - ramp(0.26) == pytest.approx(ramp(0.26) - ramp(0.26 - 1e-7), rel=1e-3)


def test_kappa_and_radius_follow_the_schedule():
    ibp = IBP(0.2, schedule=Linear(0.0, 0.5), kappa_start=1.0, kappa_end=0.4)
    assert [ibp.radius(Progress(e, 4)) for e in range(4)] == pytest.approx([0.0, 0.1, 0.2, 0.2])
    assert [ibp.kappa(Progress(e, 4)) for e in range(4)] == pytest.approx([1.0, 0.7, 0.4, 0.4])
    assert ibp.settled().radius(Progress(0, 4)) == pytest.approx(0.2)
    assert isinstance(ibp, Objective)
    for bad in ({"eps": -0.1}, {"eps": 0.1, "kappa_end": 2.0}, {"eps": 0.1, "perturbation": "Linfty"}):
        with pytest.raises(ValueError, match=r"eps|kappa|perturbation"):
            IBP(**bad)


@pytest.mark.parametrize("perturbation", ["Linf", "Brightness", "Contrast"])
def test_the_worst_case_loss_bounds_every_perturbed_image(perturbation):
    x, y = images(12)[0]
    model = residual()
    ibp = IBP(0.02, perturbation=perturbation, kappa_start=0.0, kappa_end=0.0)
    worst, metrics = ibp.loss(model, x, y, CrossEntropy(), END)
    p = getattr(certify, perturbation)(0.02)
    for image in p.sample(x, 50, torch.Generator().manual_seed(0)):
        assert nn.functional.cross_entropy(model(image), y) <= worst + 1e-5
    assert metrics["natural"] <= worst
    none, _ = dataclasses.replace(ibp, eps=1e-9).loss(model, x, y, CrossEntropy(), END)
    assert float(none.detach()) == pytest.approx(float(metrics["natural"]), abs=1e-5)


def test_the_worst_case_keypoint_loss_bounds_every_perturbed_image():
    x, _ = images(12)[0]
    model = nn.Sequential(small(), nn.Linear(3, 4)).eval()
    y = torch.randn(len(x), 4, generator=torch.Generator().manual_seed(0))
    worst, _ = IBP(0.05, kappa_start=0.0, kappa_end=0.0).loss(model, x, y, KeypointMSE(), END)
    for image in certify.Linf(0.05).sample(x, 50, torch.Generator().manual_seed(0)):
        assert KeypointMSE()(model(image), y) <= worst + 1e-5
    low, high = certify.bounds(model, x, certify.Linf(0.05), method="ibp")
    expected = torch.maximum((low - y).square(), (high - y).square()).mean().detach()
    assert float(worst.detach()) == pytest.approx(float(expected), rel=1e-5)


def test_kappa_mixes_clean_and_worst():
    x, y = images(12)[0]
    model = residual()
    parts = [IBP(0.02, kappa_start=k, kappa_end=k).loss(model, x, y, CrossEntropy(), END)[0] for k in (0.0, 1.0, 0.3)]
    torch.testing.assert_close(parts[2], 0.7 * parts[0] + 0.3 * parts[1])


def test_normalisation_sees_each_batch_once():
    x, y = images(12)[0]
    traced, plain = residual().train(), residual().train()
    for model in (traced, plain):
        model.drop.p = 0.0
    IBP(0.02).loss(traced, x, y, CrossEntropy(), END)
    plain(x)
    for (name, a), (_, b) in zip(traced.named_buffers(), plain.named_buffers()):
        torch.testing.assert_close(a, b, msg=name)


def test_certified_training_certifies_what_natural_training_does_not():
    batches, test = images(48), images(24, seed=1)
    eps = 0.15
    verified = {}
    for name, objective in {"natural": Natural(), "ibp": IBP(eps, schedule=Linear(0.1, 0.6))}.items():
        model = small()
        history = train(model, batches, objective, FAST, epochs=20, val=test)
        x, y = (torch.cat(part) for part in zip(*test))
        assert (model(x).argmax(1) == y).float().mean() > 0.9
        rows = certify.Classification(y).rows(model(x)).C
        low, _ = certify.bounds(model, x, certify.Linf(eps), method="ibp", C=rows)
        verified[name] = float((low > 0).all(1).float().mean())
        if name == "ibp":
            assert history.selected().validation["certified"] == pytest.approx(verified[name], abs=1e-6)
    assert verified["ibp"] > verified["natural"] + 0.3


def test_dropout_is_off_only_while_bounds_are_taken():
    x, y = images(12)[0]
    model = residual().train()
    losses = {float(IBP(0.02).loss(model, x, y, CrossEntropy(), END)[0].detach()) for _ in range(3)}
    assert len(losses) == 1
    assert model.drop.training
    ramping = Progress(0, 10)  # the radius is still 0: an ordinary step, with dropout
    assert len({float(IBP(0.02).loss(model, x, y, CrossEntropy(), ramping)[0].detach()) for _ in range(5)}) > 1


def test_keypoints_train_under_bounds():
    x, _ = points(64)
    y = torch.cat([x, 1 - x], 1)
    model = nn.Sequential(mlp(), nn.ReLU(), nn.Linear(2, 4))
    history = train(model, [(x, y)], IBP(0.01), FAST, epochs=10, val=[(x, y)])
    assert history.records[-1].metrics["robust"] >= history.records[-1].metrics["natural"]
    assert history.records[-1].validation["certified"] <= history.records[-1].validation["clean"] < 0
