"""`estimate`: exact answers where the flip probability is known, reproducible draws, early stopping, clear errors."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

import certify
from certify.probabilistic import CCCert, Uniform, bounds, cc_cert, discrepancy, half_margin, join, throughput


class Threshold(nn.Module):
    """Class 1 iff the mean pixel exceeds `at`; linear logits, so that margins are known."""

    def __init__(self, at: float = 0.5, scale: float = 20.0, softmax: bool = False) -> None:
        super().__init__()
        self.at, self.scale, self.softmax = at, scale, softmax

    def forward(self, x: Tensor) -> Tensor:
        score = self.scale * (x.flatten(1).mean(1) - self.at)
        out = torch.stack([-score, score], 1) / 2
        return out.softmax(1) if self.softmax else out


def shift(batch: Tensor, *, generator: torch.Generator) -> Tensor:
    """One uniform brightness in [-.2, .2] a row."""
    t = 0.4 * torch.rand(len(batch), 1, 1, 1, generator=generator, device=batch.device) - 0.2
    return batch + t


shift.law = "brightness uniform on [-0.2, 0.2]"


def images(*levels: float) -> Tensor:
    return torch.stack([torch.full((1, 4, 4), level) for level in levels])


# Flip probabilities of shift under Threshold(): P(t < .5 - level) for class 1.
X = images(0.75, 0.69, 0.6, 0.31, 0.5001)
Y = torch.tensor([1, 1, 1, 0, 1])
TRUTH = torch.tensor([0.0, 0.025, 0.25, 0.025, 0.49975])
NET = Threshold().eval()


def test_counts_match_the_known_flip_probability():
    cert = certify.estimate(NET, X, Y, shift, eps=0.1, confidence=0.9999, n_max=4000, early_stop=False)
    assert cert.n.tolist() == [4000] * 5
    for flips, p in zip(cert.flips.tolist(), TRUTH.tolist()):
        low, high = stats.binom.interval(0.9999, 4000, p)
        assert low <= flips <= high
    assert (cert.upper >= TRUTH).all()
    assert cert.certified.tolist() == [True, True, False, True, False]
    assert cert.refuted.tolist() == [False, False, True, False, True]
    S = certify.Status
    assert cert.status.tolist() == [S.HOLDS, S.HOLDS, S.VIOLATED, S.HOLDS, S.VIOLATED]
    assert cert.valid
    assert "independent draws" in cert.why
    assert cert.law == shift.law


def test_default_settings_are_the_papers_eps_at_95_percent():
    cert = certify.estimate(NET, X[:1], Y[:1], shift)
    assert (int(cert.n), int(cert.flips), int(cert.drawn)) == (2995, 0, 2995)
    assert 0.0009 < float(cert.upper) <= 1e-3
    assert float(cert.supported) >= 0.95
    assert "1 of 1 images certified: P(flip) <= 0.001 with 95 % confidence, per image" in str(cert)


@pytest.mark.parametrize("bound", ["clopper-pearson", "betting", "hoeffding", "empirical-bernstein"])
def test_early_stopping_saves_draws_and_keeps_the_verdict(bound):
    n_max = 3000
    full, short = (
        certify.estimate(NET, X, Y, shift, 0.1, 0.999, bound, n_max, batch=64, early_stop=stop)
        for stop in (False, True)
    )
    assert full.certified.tolist() == short.certified.tolist()
    assert full.drawn.tolist() == [n_max] * 5
    assert (short.drawn - short.n < 64).all()
    assert (short.drawn[~short.certified] < n_max).all()
    assert (short.upper >= TRUTH).all()
    if bound == "betting":  # also stops when it is certain enough
        assert int(short.drawn[0]) == 64 * -(-bounds.required_samples(0.1, 0.999, "betting") // 64)
        assert (short.drawn[short.certified] < n_max / 2).all()


def test_the_curtailed_sample_ends_with_the_flip_that_decides():
    cert = certify.estimate(NET, X[2:3], Y[2:3], shift, eps=1e-3, batch=512)
    every = certify.estimate(NET, X[2:3], Y[2:3], shift, eps=0.9, n_max=int(cert.n), batch=512, early_stop=False)
    before = certify.estimate(NET, X[2:3], Y[2:3], shift, eps=0.9, n_max=512, batch=512, early_stop=False)
    assert int(cert.flips) == 1
    assert int(cert.drawn) == 512
    assert float(cert.upper) == pytest.approx(float(bounds.curtailed(int(cert.n), 1)))
    assert int(before.flips) >= int(every.flips) >= 0


@pytest.mark.parametrize("bound", ["clopper-pearson", "betting"])
def test_false_certificates_of_the_whole_procedure(bound):
    """400 images whose flip probability is just above eps: at most 5 % of the certificates may come out true."""
    level = 0.5 + 0.2 - 0.4 * 0.055
    x = images(*[level] * 400) + 1e-5 * torch.arange(400).reshape(-1, 1, 1, 1) / 400  # distinct, so draws are too
    cert = certify.estimate(NET, x, torch.ones(400, dtype=torch.int64), shift, eps=0.05, n_max=300, batch=100)
    assert cert.flips.unique().numel() > 1
    assert int(cert.certified.sum()) <= stats.binom.ppf(0.999, 400, 0.05)
    assert int(cert.refuted.sum()) < 400


def test_draws_follow_the_image_not_its_place_nor_the_model():
    whole = certify.estimate(NET, X, Y, shift, eps=0.1, n_max=500, early_stop=False)
    single = join(
        [certify.estimate(NET, X[i : i + 1], Y[i : i + 1], shift, 0.1, n_max=500, early_stop=False) for i in range(5)]
    )
    assert torch.equal(whole.flips, single.flips)
    assert torch.equal(whole.upper, single.upper)
    again = certify.estimate(NET, X, Y, shift, eps=0.1, n_max=500, early_stop=False)
    assert again.fingerprint == whole.fingerprint
    other = certify.estimate(NET, X, Y, shift, eps=0.1, n_max=500, early_stop=False, seed=1)
    assert other.fingerprint != whole.fingerprint
    assert not torch.equal(other.flips, whole.flips)
    same = certify.estimate(Threshold(scale=3.0).eval(), X, Y, shift, eps=0.1, n_max=500, early_stop=False)
    assert same.fingerprint == whole.fingerprint
    assert torch.equal(same.flips, whole.flips)  # the same decision boundary sees the same draws


def test_a_generator_with_other_weights_has_another_fingerprint():
    def generator_with(weight: float):
        def edit(batch: Tensor, *, generator: torch.Generator) -> Tensor:
            return batch + weight * (torch.rand(len(batch), 1, 1, 1, generator=generator) - 0.5)

        return edit

    a, b = (certify.estimate(NET, X[:1], Y[:1], generator_with(w), 0.1, n_max=50) for w in (0.1, 0.2))
    assert a.fingerprint != b.fingerprint
    assert a.images == b.images
    assert a.law.startswith("not stated: whatever")


def test_joint_confidence():
    with pytest.raises(ValueError, match=r"jointly over 5 images with clopper-pearson.*n_max=None"):
        certify.estimate(NET, X, Y, shift, eps=0.1, n_max=29, joint=True)
    cert = certify.estimate(NET, X, Y, shift, eps=0.1, n_max=None, joint=True)
    assert cert.joint == 5
    assert cert.n_max == bounds.required_samples(0.1, 0.95, images=5)
    assert float(cert.upper[0]) == pytest.approx(float(bounds.clopper_pearson(0, cert.n_max, 0.99)))
    parts = [certify.estimate(NET, X[i : i + 1], Y[i : i + 1], shift, 0.1, n_max=None, joint=5) for i in range(5)]
    assert torch.equal(join(parts).upper, cert.upper)
    alone = [certify.estimate(NET, X[i : i + 1], Y[i : i + 1], shift, 0.1, n_max=None, joint=1) for i in range(2)]
    with pytest.raises(ValueError, match="does not cover the 2 joined"):
        join(alone)
    with pytest.raises(ValueError, match="number of images >= 5"):
        certify.estimate(NET, X, Y, shift, eps=0.1, joint=3)


def test_cccert_is_marked_invalid_and_matches_its_formula():
    settings = CCCert(samples=20, repetitions=5)
    cert = certify.estimate(NET, X, Y, shift, eps=0.01, bound="cccert", cccert=settings, batch=64)
    assert not cert.valid
    assert "not a valid certificate" in cert.why
    assert cert.confidence == pytest.approx(1 - 0.99**100)
    assert cert.n.tolist() == [100] * 5
    assert certify.Status.HOLDS not in cert.status.tolist()
    # The same draws, with the formula applied by hand.
    p = NET(X).softmax(1)
    seen: list[Tensor] = []

    def recorded(batch: Tensor, *, generator: torch.Generator) -> Tensor:
        seen.append(shift(batch, generator=generator))
        return seen[-1]

    one = certify.estimate(NET, X[1:2], Y[1:2], recorded, eps=0.01, bound="cccert", cccert=settings, batch=64)
    moved = NET(torch.cat(seen[3:])).softmax(1)  # after the three probes
    z = discrepancy(p[1].numpy(), moved.numpy())
    assert len(z) == 100
    assert float(one.upper) == pytest.approx(float(cc_cert(z, half_margin(p[1].numpy()), settings).upper[0]), rel=1e-5)
    assert float(one.upper) == pytest.approx(float(cert.upper[1]))


def test_logits_and_probabilities_give_the_same_certificate():
    settings = CCCert(samples=20, repetitions=5)
    probabilities = Threshold(softmax=True).eval()
    for bound in ("clopper-pearson", "cccert"):
        a, b = (certify.estimate(m, X, Y, shift, 0.1, bound=bound, cccert=settings) for m in (NET, probabilities))
        assert (a.outputs, b.outputs) == ("logits", "probabilities")
        torch.testing.assert_close(a.upper, b.upper)
    forced = certify.estimate(probabilities, X, Y, shift, 0.1, bound="cccert", cccert=settings, outputs="logits")
    assert forced.outputs == "logits"
    assert not torch.equal(forced.upper, b.upper)
    with pytest.raises(ValueError, match="not probabilities"):
        certify.estimate(NET, X, Y, shift, outputs="probabilities")


def test_split_chernoff_is_valid_but_weak():
    sharp = Threshold(scale=200.0).eval()
    cert = certify.estimate(sharp, X[:3], Y[:3], shift, 0.3, bound="split-chernoff", n_max=1000)
    assert cert.valid
    assert cert.certified.tolist() == [True, False, False] or cert.certified.tolist() == [True, True, False]
    exact = certify.estimate(sharp, X[:3], Y[:3], shift, 0.3, n_max=1000, early_stop=False)
    assert (cert.upper >= exact.upper).all()


def test_perturbations_are_transforms():
    p = certify.Brightness(0.2)
    cert = certify.estimate(NET, X, Y, p, eps=0.1, n_max=2000, early_stop=False)
    assert cert.law == "uniform on Brightness(0.2)"
    for flips, truth in zip(cert.flips.tolist(), TRUTH.tolist()):
        low, high = stats.binom.interval(0.9999, 2000, truth)
        assert low <= flips <= high
    own = certify.Brightness(torch.tensor([0.2, 0.001, 0.001, 0.001, 0.2]))  # a radius an image
    assert certify.estimate(NET, X, Y, own, eps=0.1).certified.tolist() == [True, True, True, True, False]
    generator = torch.Generator().manual_seed(0)
    rows = Uniform(p, X)(X, generator=generator)
    assert rows.shape == X.shape
    assert certify.estimate(NET, X[:1], Y[:1], certify.Linf(0.2), eps=0.1).certified.all()


def test_a_finite_set_is_enumerated():
    steps = torch.linspace(-0.2, 0.2, 40).tolist()
    cert = certify.exhaust(NET, X, Y, (X + t for t in steps), eps=0.05)
    expected = [sum(level + t <= 0.5 for t in steps) / 40 for level in (0.75, 0.69, 0.6)]
    torch.testing.assert_close(cert.upper[:3], torch.tensor(expected, dtype=torch.float64))
    assert cert.population == "finite set"
    assert cert.confidence == 1
    assert cert.certified.tolist() == [True, True, False, True, False]
    assert certify.pca(cert).truly == pytest.approx(0.6)
    halves = [certify.exhaust(NET, X[s], Y[s], [X[s] + t for t in steps], eps=0.05) for s in (slice(0, 2), slice(2, 5))]
    assert torch.equal(join(halves).upper, cert.upper)
    with pytest.raises(ValueError, match="at least one version"):
        certify.exhaust(NET, X, Y, [])
    with pytest.raises(ValueError, match="version 0 is"):
        certify.exhaust(NET, X, Y, [X[:2]])


def test_misclassified_images_are_never_certified():
    cert = certify.estimate(NET, X[:2], torch.tensor([0, 1]), shift, eps=0.1)
    assert cert.correct.tolist() == [False, True]
    assert cert.certified.tolist() == [False, True]
    assert cert.status[0] == certify.Status.VIOLATED


def test_record_is_json_and_complete():
    cert = certify.estimate(NET, X, Y, shift, eps=0.1, n_max=100)
    record = json.loads(json.dumps(cert.record()))
    assert set(record) == {f.name for f in dataclasses.fields(cert)} | {"certified"}
    assert record["n"] == cert.n.tolist()
    assert record["upper"] == cert.upper.tolist()
    with pytest.raises(ValueError, match="different eps"):
        join([cert, dataclasses.replace(cert, eps=0.2)])


def test_progress_is_told_of_every_image():
    told = []
    certify.estimate(NET, X, Y, shift, eps=0.1, n_max=60, progress=lambda done, total: told.append((done, total)))
    assert told == [(i, 5) for i in range(1, 6)]


def broken(what: str):
    state = {"calls": 0}

    def transform(batch: Tensor, *, generator: torch.Generator) -> Tensor:
        state["calls"] += 1
        t = torch.rand(len(batch), 1, 1, 1, generator=generator)
        match what:
            case "range":
                return batch + 2 * t
            case "nan":
                return batch / 0 - batch / 0
            case "late":
                return batch + (3 if state["calls"] > 4 else 0.1) * t
            case "shape":
                return batch[:, :, :2]
            case "rows":
                return batch[:-1]
            case "dtype":
                return batch.double()
            case "global":
                return (batch + 0.1 * torch.rand(len(batch), 1, 1, 1)).clamp(0, 1)
            case "shared":
                return batch + 0.1 * torch.rand(1, generator=generator)
            case _:
                return batch.mul_(0.9)

    return transform


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("range", r"returned pixels in \[.*lie in \[0, 1\]"),
        ("nan", r"finite and lie in \[0, 1\]"),
        ("late", r"returned pixels in \[.*lie in \[0, 1\]"),
        ("shape", r"returned \(16, 1, 2, 4\) for a batch \(16, 1, 4, 4\)"),
        ("rows", r"returned \(15, 1, 4, 4\)"),
        ("dtype", "torch.float64 on cpu for torch.float32"),
        ("global", "another source of randomness"),
        ("shared", "one draw for a whole batch"),
    ],
)
def test_broken_transforms(what, message):
    with pytest.raises(ValueError, match=message):
        certify.estimate(NET, X[:1], Y[:1], broken(what), eps=0.1, n_max=300, batch=100)


def test_in_place_transforms_fail_instead_of_corrupting_the_image():
    with pytest.raises(RuntimeError, match="clone"):
        certify.estimate(NET, X[:1], Y[:1], broken("in place"), eps=0.1)


def test_a_deterministic_transform_is_fine():
    cert = certify.estimate(NET, X[:2], Y[:2], lambda batch, generator: batch * 0.9, eps=0.1)
    assert cert.certified.all()


def test_transforms_that_take_no_generator():
    with pytest.raises(TypeError, match=r"cannot be called as transform\(batch, generator=g\).*torch.Generator"):
        certify.estimate(NET, X, Y, lambda batch: batch)
    with pytest.raises(TypeError, match="must be callable"):
        certify.estimate(NET, X, Y, 0.1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_max": 1000}, r"1,000 draws can never certify eps=0.001 at 95 % .* it needs 2,995"),
        ({"bound": "hoeffding"}, r"it needs 1,497,867; clopper-pearson needs 2,995"),
        ({"bound": "cloper-pearson"}, "did you mean 'clopper-pearson'"),
        ({"bound": "cccert", "n_max": 999}, "draws 1000 images, more than n_max=999"),
        ({"bound": "cccert", "joint": True}, "no confidence to make joint"),
        ({"eps": 0.0}, "eps, the flip probability"),
        ({"confidence": 1.0}, "confidence must lie"),
        ({"batch": 0}, "batch must be >= 1"),
        ({"x": X * 255}, r"span \[.*\[0, 1\]"),
        ({"x": (X * 255).byte()}, "divided by 255"),
        ({"x": X[0]}, "batch axis"),
        ({"y": Y.float()}, "labels must be integers"),
        ({"y": Y + 5}, "the model has 2 classes"),
        ({"model": Threshold()}, "training mode"),
        ({"model": nn.Flatten(2).eval()}, r"must return \(N, classes >= 2\)"),
        ({"model": Threshold(scale=float("nan")).eval()}, "NaN or infinity"),
        ({"outputs": "logit"}, "did you mean 'logits'"),
    ],
)
def test_bad_input(change, message):
    arguments = {"model": NET, "x": X, "y": Y, "transform": shift} | change
    with pytest.raises(ValueError, match=message):
        certify.estimate(**arguments)


def test_throughput_relates_sampling_to_the_plain_model():
    net = nn.Sequential(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 784, 10)).eval()
    speed = throughput(net, torch.rand(1, 1, 28, 28), certify.Brightness(0.1), n=256, batch=64, repeats=2)
    assert min(speed.sampling, speed.inference, speed.transform) > 0
    assert speed.transform > speed.inference  # an addition against a convolution
    assert speed.ratio_without_transform >= speed.ratio
    assert np.isfinite(speed.ratio)
