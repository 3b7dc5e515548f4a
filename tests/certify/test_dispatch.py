"""The front door: verdicts, counterexamples, errors."""

import dataclasses
import itertools
import math

import pytest
import torch
from torch import nn

import certify
from certify import Status, attack
from certify.verdicts import join


@pytest.fixture(scope="module")
def task():
    """A small trained classifier of two blobs of images, and a batch of images."""
    torch.manual_seed(0)
    x = torch.rand(256, 1, 6, 6) * 0.4
    y = torch.arange(256) % 3
    for k in range(3):
        x[y == k, :, 2 * k : 2 * k + 2] += 0.5
    net = nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(24, 3)
    )
    optimizer = torch.optim.Adam(net.parameters(), 0.02)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    return net.eval(), x[:24], y[:24]


def test_verdicts_are_consistent(task):
    net, x, y = task
    spec = certify.Classification(y)
    for p in (certify.Linf(0.03), certify.L2(0.2), certify.Brightness(0.1), certify.Contrast(0.1)):
        by_method = {m: certify.verify(net, x, spec, p, method=m) for m in ("ibp", "crown-ibp", "crown", "auto")}
        holds = {m: c.status == Status.HOLDS for m, c in by_method.items()}
        assert (holds["ibp"] <= holds["auto"]).all()
        assert (holds["crown"] <= holds["auto"]).all()
        for cert in by_method.values():
            assert not ((cert.status == Status.HOLDS) & (by_method["auto"].status == Status.VIOLATED)).any()
            assert (cert.lower[cert.status == Status.HOLDS] > 0).all()
            assert sum(cert.counts().values()) == len(x) == len(cert)
        held = by_method["auto"].status == Status.HOLDS
        if held.any():
            probe = attack.probe(net, x[held], certify.Classification(y[held]), p.select(held, len(x)), 300, seed=1)
            assert (probe > 0).all()


def test_counterexamples_fool_the_model_and_lie_in_the_set(task):
    net, x, y = task
    cert = certify.verify(net, x, certify.Classification(y), certify.Linf(0.3))
    broken = cert.status == Status.VIOLATED
    assert broken.any()
    assert (net(cert.counterexamples[broken]).argmax(1) != y[broken]).all()
    assert (cert.counterexamples[broken] - x[broken]).abs().max() <= 0.3
    assert cert.counterexamples[~broken].isnan().all()
    semantic = certify.verify(net, x, certify.Deviation(0.01), certify.Brightness(0.2))
    assert (semantic.status == Status.VIOLATED).all()
    torch.testing.assert_close(certify.Brightness(0.2).apply(x, semantic.parameters[:, 0]), semantic.counterexamples)


def test_a_certificate_is_in_one_place(task):
    net, x, y = task
    cert = certify.verify(net, x[:4], certify.Classification(y[:4]), certify.Brightness(0.1))
    kinds = [dataclasses.replace(cert, work={kind: cert.seconds.long()}) for kind in ("rows", "domains")]
    for moved in (cert.to("meta"), join([part.to("meta") for part in kinds])):  # a device without numbers
        tensors = [*(getattr(moved, field.name) for field in dataclasses.fields(moved)), *moved.work.values()]
        assert {part.device.type for part in tensors if isinstance(part, torch.Tensor)} == {"meta"}
    assert join(kinds).work["rows"].tolist() == [*kinds[0].work["rows"].tolist(), 0, 0, 0, 0]


def test_verdicts_are_monotone_in_the_radius(task):
    net, x, y = task
    held = [
        certify.verify(net, x, certify.Classification(y), certify.Linf(eps), method="crown").status == Status.HOLDS
        for eps in (0.0, 0.005, 0.02, 0.05)
    ]
    assert held[0].all()
    for smaller, larger in itertools.pairwise(held):
        assert (larger <= smaller).all()


def test_a_misclassified_image_is_its_own_counterexample(task):
    net, x, y = task
    wrong = (y + 1) % 3
    cert = certify.verify(net, x, certify.Classification(wrong), certify.Linf(0.0))
    assert (cert.status == Status.VIOLATED).all()
    assert torch.equal(cert.counterexamples, x)


def test_chunks_and_reference_do_not_change_the_answer(task):
    net, x, _ = task
    eps = torch.linspace(0, 0.05, len(x))
    spec = certify.Deviation(0.5, reference=net(x).detach() + 0.01)
    one = certify.verify(net, x, spec, certify.Linf(eps), method="crown", chunk=5)
    all_ = certify.verify(net, x, spec, certify.Linf(eps), method="crown", chunk=100)
    assert torch.equal(one.status, all_.status)
    torch.testing.assert_close(one.lower, all_.lower, atol=1e-5, rtol=0)


def test_a_polygon_row_that_fails_is_no_counterexample():
    """point_l2 is checked through a polygon inside the disc: a point between the two is undecided, not violated."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(1, 2, bias=False)).eval()
    net[1].weight.data = torch.full((2, 1), 0.5**0.5)
    x = torch.full((1, 1, 1, 1), 0.5)
    spec = certify.Deviation(0.1, norm="point_l2", directions=4)
    cert = certify.verify(net, x, spec, certify.Brightness(0.09, clip=False), method="crown")
    assert cert.status.tolist() == [Status.UNKNOWN]
    assert certify.verify(net, x, spec, certify.Brightness(0.05, clip=False)).status.tolist() == [Status.HOLDS]
    assert certify.verify(net, x, spec, certify.Brightness(0.11, clip=False)).status.tolist() == [Status.VIOLATED]


def test_close_calls_are_settled_in_float64():
    """y = 1000 + 1e-5 x - 1000 loses its margin to rounding in float32."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(1, 2, bias=True)).eval()
    net[1].weight.data = torch.tensor([[1e-3], [0.0]])
    net[1].bias.data = torch.tensor([1000.0, 1000.0])
    x = torch.full((1, 1, 1, 1), 0.5)
    cert = certify.verify(net.double(), x.double(), certify.Linear(torch.tensor([[1.0, -1.0]])), certify.Linf(0.1))
    assert cert.status.tolist() == [Status.HOLDS]
    single = certify.verify(net.float(), x, certify.Linear(torch.tensor([[1.0, -1.0]])), certify.Linf(0.1))
    assert single.status.tolist() in ([Status.HOLDS], [Status.VIOLATED])
    if single.status.item() == Status.VIOLATED:
        outputs = net(single.counterexamples)[0]
        assert outputs[0] <= outputs[1]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda a: a | {"method": "crwn"}, "unknown verifier"),
        (lambda a: a | {"x": a["x"][:0]}, "empty"),
        (lambda a: a | {"x": a["x"] * 255}, "normalise inside"),
        (lambda a: a | {"spec": certify.Classification(torch.full((24,), 7))}, r"labels span \[7, 7\]"),
        (lambda a: a | {"spec": certify.Classification(torch.zeros(5, dtype=torch.long))}, "labels must be"),
        (lambda a: a | {"p": certify.Linf(torch.zeros(3))}, "3 radii for a batch of 24"),
    ],
)
def test_bad_input_is_explained(task, change, match):
    net, x, y = task
    arguments = {"x": x, "spec": certify.Classification(y), "p": certify.Linf(0.1), "method": "auto"}
    with pytest.raises(ValueError, match=match):
        certify.verify(net, **change(arguments))


def test_training_mode_and_budgets_are_checked(task):
    net, x, y = task
    with pytest.raises(ValueError, match=r"model\.eval"):
        certify.verify(net.train(), x, certify.Classification(y), certify.Linf(0.1))
    net.eval()
    with pytest.raises(ValueError, match="seconds > 0"):
        certify.Budget(seconds=0)
    assert certify.Budget().seconds == math.inf


def test_complete_verifiers_agree_and_leave_nothing_open(task):
    _, x, y = task
    torch.manual_seed(1)
    net = nn.Sequential(nn.Flatten(), nn.Linear(36, 10), nn.ReLU(), nn.Linear(10, 6), nn.ReLU(), nn.Linear(6, 3))
    optimizer = torch.optim.Adam(net.parameters(), 0.02)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    net.eval()
    x, y, eps = x[:6], y[:6], torch.linspace(0.02, 0.4, 6)
    answers = {
        method: certify.verify(net, x, certify.Classification(y), certify.Linf(eps), method=method)
        for method in ("auto", "bab", "milp")
    }
    for cert in answers.values():
        assert set(cert.status.tolist()) <= {Status.HOLDS, Status.VIOLATED}
        assert torch.equal(cert.status, answers["milp"].status)
        broken = cert.status == Status.VIOLATED
        assert (net(cert.counterexamples[broken]).argmax(1) != y[broken]).all()
    assert 0 < (answers["bab"].status == Status.HOLDS).sum() < 6


def test_a_spent_budget_is_a_timeout(task):
    net, x, y = task
    radius = certify.Linf(0.12)
    short, long = (
        certify.verify(net, x, certify.Classification(y), radius, method="bab", budget=certify.Budget(s), attack=False)
        for s in (1e-9, 20)
    )
    assert (short.status == Status.TIMEOUT).any()
    settled = short.status != Status.TIMEOUT
    assert torch.equal(short.status[settled], long.status[settled])
    assert (short.lower <= 1e-6)[short.status == Status.TIMEOUT].all()


def test_line_methods_need_few_parameters(task):
    net, x, y = task
    with pytest.raises(ValueError, match="few parameters"):
        certify.verify(net, x, certify.Classification(y), certify.Linf(0.1), method="line")
