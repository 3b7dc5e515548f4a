"""The diffusion autoencoder: its parts, its states, and acceptance on generators whose edits are known exactly."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import datasets
from datasets import semantic
from datasets.errors import CorruptData, MissingData
from datasets.semantic import adapter, measures, presets
from datasets.semantic.__main__ import main
from datasets.semantic.acceptance import class_means
from datasets.semantic.diffae import DiffAE, DiffAEConfig, NotAccepted, State

TINY = DiffAEConfig(image_size=16, channels=(8, 16), encoder_channels=(8,), steps=4)
CRITERIA = semantic.Criteria(
    change=0.6, others={"brightness": 1.0, "contrast": 0.5, "tint": 0.75, "sharpness": 0.5}, reconstruction=30.0
)


def coloured(count: int, split: str, seed: int) -> datasets.Pack:
    """Blurred spots in light of random warmth, 16×16."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 5, 5, generator=generator)
    grey = coarse.mean(1, keepdim=True) * 0.5 + 0.5 * coarse
    soft = 0.15 + 0.5 * torch.nn.functional.interpolate(grey, size=16, mode="bicubic").clamp(0, 1)
    w = 1.4 * torch.rand(count, 1, 1, generator=generator) - 0.7
    x = torch.stack([soft[:, 0] * 2 ** (w / 2), soft[:, 1], soft[:, 2] * 2 ** (-w / 2)], -1)
    images = (x.clamp(0, 1) * 255).round().to(torch.uint8)
    return datasets.Pack("spots", split, images, torch.arange(count) % 2, ("a", "b"))


class Analytic(DiffAE):
    """A generator whose decoder is known: the first coordinate of the code is the light's warmth, exactly.

    `fault` makes it fail in one way: its decoder ignores the code, moves brightness along, scrambles the picture, loses
    detail, or goes back and forth.
    """

    def __init__(self, fault: str = "") -> None:
        super().__init__(TINY)
        self.fault = fault
        self.state = State.TRAINED

    def encode(self, images: Tensor) -> Tensor:
        z = torch.zeros(len(images), self.config.latent)
        z[:, 0] = measures.warmth(images)
        return z

    def invert(self, images: Tensor, z: Tensor, steps: int | None = None) -> Tensor:
        half = 2 ** (z[:, 0] / 2)
        return images / torch.stack([half, torch.ones_like(half), 1 / half], 1)[:, :, None, None]

    def decode(self, noise: Tensor, z: Tensor, steps: int | None = None) -> Tensor:
        power = torch.zeros(len(z)) if self.fault == "ignores" else z[:, 0]
        if self.fault == "wavers":
            power = power + 0.4 * torch.sin(20 * z[:, 0])
        half = 2 ** (power / 2)
        x = noise * torch.stack([half, torch.ones_like(half), 1 / half], 1)[:, :, None, None]
        if self.fault == "brightens":
            x = x + 0.2 * (z[:, 0, None, None, None] - 0.2)
        if self.fault == "scrambles":
            share = measures.warmth(x).abs().clamp(0, 1)[:, None, None, None]
            x = x + share * (x.flip(2).flip(3) - x)
        if self.fault == "blurs":
            x = torch.nn.functional.interpolate(torch.nn.functional.avg_pool2d(x, 8), size=16)
        return x.clamp(0, 1)


# --- parts -----------------------------------------------------------------------------------------------------------


def test_inversion_undoes_decoding_for_an_untrained_network_in_many_steps() -> None:
    """DDIM inversion is the same differential equation run backwards: the error falls with the number of steps."""
    model = DiffAE(TINY, seed=1).eval()
    x = coloured(4, "train", 0).tensors()[0]
    z = model.encode(x).detach()
    errors = [float((model.decode(model.invert(x, z, s), z, s) - x).abs().mean()) for s in (5, 40)]
    assert errors[1] < 0.5 * errors[0]
    assert errors[1] < 0.03


def test_codes_have_the_width_the_unet_adds_and_others_are_refused() -> None:
    model = DiffAE(TINY)
    x = coloured(3, "train", 0).tensors()[0]
    z = model.encode(x)
    assert z.shape == (3, TINY.latent) == (3, 32)
    rest = z[:, 1:].detach()
    assert torch.allclose(rest.mean(1), torch.zeros(3), atol=1e-5)
    assert torch.allclose(rest.var(1, unbiased=False), torch.ones(3), atol=1e-2)
    with pytest.raises(ValueError, match=r"codes must be \(3, 32\), got \(3, 1\)"):  # diffusers would broadcast it
        model.velocity(x, torch.tensor(5), z[:, :1])
    with pytest.raises(ValueError, match=r"takes float images \(B, 3, 16, 16\)"):
        model.encode(x[:, :, :8])


def test_schedules_neither_clip_nor_disagree() -> None:
    both = adapter.schedules(10)
    for schedule in both:
        assert schedule.config.clip_sample is False
        assert schedule.config.prediction_type == "v_prediction"
    assert torch.equal(both.decode.alphas_cumprod, both.invert.alphas_cumprod)
    assert len(both.invert.timesteps) == len(both.decode.timesteps) == 10
    assert (both.invert.timesteps.diff() >= 0).all()


def test_the_weights_follow_the_seed_and_leave_the_global_generator_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    prints = [DiffAE(TINY, seed=s).weights_hash() for s in (0, 0, 1)]
    assert prints[0] == prints[1] != prints[2]
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"channels": (12, 16)}, "channels must be positive multiples of 8"),
        ({"encoder_channels": ()}, "encoder_channels must be positive"),
        ({"image_size": 20, "channels": (8, 16, 16, 16)}, "divisible by 8"),
        ({"steps": 1}, "steps 2 to 1000"),
        ({"attributes": ()}, "at least one"),
        ({"attributes": ("a", "a")}, "distinct"),
    ],
)
def test_bad_configurations(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DiffAEConfig(**arguments)
    with pytest.raises(ValueError, match="steps must be >= 1"):
        semantic.TrainingConfig(steps=0)
    with pytest.raises(ValueError, match="precision must be"):
        semantic.TrainingConfig(precision="float16")


# --- training --------------------------------------------------------------------------------------------------------


def test_training_is_reproducible_and_learns() -> None:
    pack = coloured(64, "train", 0)
    short = semantic.TrainingConfig(steps=40, batch=8)
    losses: list[float] = []
    a = semantic.train(pack, TINY, short, seed=3, progress=lambda step, steps, loss: losses.append(loss))
    b = semantic.train(pack, TINY, short, seed=3)
    assert a.weights_hash() == b.weights_hash()
    assert a.state is State.TRAINED
    assert len(losses) == 2
    assert losses[1] < 0.9 * losses[0]
    assert a.training_record["fingerprint"] == pack.fingerprint
    warm = measures.warmth(pack.tensors()[0])
    assert torch.allclose(a.scaling[0], torch.stack([warm.mean(), warm.std()]), atol=1e-5)
    assert not any(p.requires_grad for p in a.parameters())


def test_known_attributes_replace_measured_ones() -> None:
    pack = coloured(16, "train", 0)
    config = dataclasses.replace(TINY, attributes=("smile",))
    short = semantic.TrainingConfig(steps=1, batch=4)
    values = torch.arange(16.0)
    model = semantic.train(pack, config, short, attributes={"smile": values})
    assert model.scaling[0].tolist() == pytest.approx([float(values.mean()), float(values.std())])
    with pytest.raises(ValueError, match="unknown measure 'smile'"):
        semantic.train(pack, config, short)
    with pytest.raises(ValueError, match="one value for each of the 16 images"):
        semantic.train(pack, config, short, attributes={"smile": values[:3]})
    with pytest.raises(ValueError, match="smile is the same for all images"):
        semantic.train(pack, config, short, attributes={"smile": torch.ones(16)})
    with pytest.raises(ValueError, match=r"the DiffAE takes \(3, 32, 32\)"):
        semantic.train(pack, dataclasses.replace(TINY, image_size=32), short)


# --- acceptance ------------------------------------------------------------------------------------------------------


def test_class_means_point_along_the_attribute() -> None:
    codes = torch.randn(300, 6, generator=torch.Generator().manual_seed(0))
    values = 3 * codes[:, 2]
    unit = class_means(codes, values)
    assert float(unit.norm()) == pytest.approx(1)
    assert float(unit[2]) > 0.98
    assert torch.allclose(class_means(codes, -values), -unit, atol=1e-6)
    with pytest.raises(ValueError, match="have the same mean"):
        class_means(torch.ones(10, 4), torch.arange(10.0))


def test_an_exact_generator_is_accepted_and_its_edit_changes_the_attribute_as_stated() -> None:
    model, pack = Analytic(), coloured(60, "val", 1)
    report = semantic.accept(model, pack, CRITERIA, calibration=20, probes=30)
    assert model.state is State.ACCEPTED
    assert report.accepted
    assert report.moved == pytest.approx(0.6, rel=0.15)
    assert report.follow == 1
    assert model.direction[0] == pytest.approx(report.scale, rel=1e-4)
    assert np.diff(report.attribute) == pytest.approx([report.moved / 4] * 4, rel=0.2)
    assert max(abs(v) for v in report.drift.values()) < 1
    edit = semantic.DiffAEEdit(model)
    x = pack.tensors(range(3))[0]
    out = semantic.apply(edit, x, range(3), torch.tensor([0.0, 0.5, 1.0]))
    gained = measures.warmth(out) - measures.warmth(x)
    assert gained.tolist() == pytest.approx([0, report.moved / 2, report.moved], abs=0.1)
    assert f"warmth up by {report.moved:.3g}" in semantic.law(edit)
    assert json.loads(json.dumps(edit.describe())) == edit.describe()


def test_different_images_are_inverted_together_and_each_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, pack = Analytic(), coloured(60, "val", 1)
    semantic.accept(model, pack, CRITERIA, calibration=20, probes=30)
    x, delta = pack.tensors([0, 1, 0, 2])[0], torch.tensor([0.1, 0.5, 0.7, 1.0])
    alone = torch.cat(
        [semantic.DiffAEEdit(model).edit(x[i : i + 1], torch.tensor([i]), delta[i : i + 1]) for i in range(4)]
    )
    asked: list[int] = []
    invert = model.invert
    monkeypatch.setattr(model, "invert", lambda images, z: (asked.append(len(images)), invert(images, z))[1])
    edit = semantic.DiffAEEdit(model)
    torch.testing.assert_close(edit.edit(x, torch.arange(4), delta), alone)
    assert asked == [3]
    torch.testing.assert_close(edit.edit(x.flip(0), torch.arange(4), delta.flip(0)), alone.flip(0))
    assert asked == [3]  # remembered
    many = coloured(70, "val", 2).tensors(range(70))[0]
    edit.edit(many, torch.arange(70), torch.zeros(70))
    assert asked == [3, 70]  # more than are remembered at once


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("ignores", "warmth moves by 0, expected 0.75 of 0.6"),
        ("brightens", r"brightness drifts by \+\d"),
        ("scrambles", "structure agrees by"),
        ("blurs", "reconstruction reaches"),
        ("wavers", "it grows with delta on"),
    ],
)
def test_generators_that_do_something_else_are_refused(fault: str, message: str) -> None:
    model = Analytic(fault)
    with pytest.raises(NotAccepted, match=message):
        semantic.accept(model, coloured(60, "val", 1), CRITERIA, calibration=20, probes=30)
    assert model.state is State.TRAINED
    assert model.edit_record is None
    with pytest.raises(NotAccepted, match="this DiffAE is trained, expected at least accepted"):
        semantic.DiffAEEdit(model)


def test_nothing_is_edited_before_acceptance(tmp_path: Path) -> None:
    pack = coloured(60, "val", 1)
    with pytest.raises(NotAccepted, match="this DiffAE is untrained, expected at least trained: train it"):
        semantic.accept(DiffAE(TINY), pack)
    with pytest.raises(NotAccepted, match="Nothing is used in its place"):
        semantic.DiffAEEdit(DiffAE(TINY))
    model = Analytic()
    semantic.accept(model, pack, CRITERIA, calibration=20, probes=30)
    edit = semantic.DiffAEEdit(model)
    model.state = State.TRAINED  # as training it further would leave it
    with pytest.raises(NotAccepted):
        edit.edit(pack.tensors([0])[0], torch.zeros(1), torch.zeros(1))
    model.state = State.ACCEPTED
    with torch.no_grad():
        next(model.unet.parameters()).add_(1)
    with pytest.raises(NotAccepted, match="changed after the generator was accepted"):
        semantic.DiffAEEdit(model)


def test_criteria_and_probes_are_checked() -> None:
    pack = coloured(40, "val", 1)
    with pytest.raises(ValueError, match=r"has 40 images, expected 32 \+ 64"):
        semantic.accept(Analytic(), pack)
    with pytest.raises(ValueError, match="unknown measure 'smile'"):
        semantic.accept(Analytic(), pack, semantic.Criteria("smile"), calibration=8, probes=8)
    with pytest.raises(ValueError, match="cannot be among the others"):
        semantic.Criteria("tint")
    with pytest.raises(ValueError, match="change must be positive"):
        semantic.Criteria(change=0.0)
    own = {"red": lambda x: x[:, 0].mean((1, 2))}
    criteria = semantic.Criteria("red", change=0.1, others={"contrast": 3.0}, reconstruction=30)
    report = semantic.accept(Analytic(), pack, criteria, extra=own, calibration=16, probes=16)
    assert report.moved == pytest.approx(0.1, rel=0.3)


# --- files -----------------------------------------------------------------------------------------------------------


def test_saved_generators_come_back_with_their_state(tmp_path: Path) -> None:
    model = semantic.train(coloured(16, "train", 0), TINY, semantic.TrainingConfig(steps=1, batch=4))
    model.save(tmp_path / "models" / "spots")
    back = semantic.load(tmp_path / "models" / "spots")
    assert (back.state, back.config, back.training_record) == (State.TRAINED, TINY, model.training_record)
    assert back.weights_hash() == model.weights_hash()
    x = coloured(2, "test", 2).tensors()[0]
    assert torch.equal(back.encode(x), model.encode(x))
    named = tmp_path / "hub"
    model.save(named / "diffae")
    assert semantic.load(named).weights_hash() == model.weights_hash()


def test_files_that_cannot_be_trusted(tmp_path: Path) -> None:
    DiffAE(TINY, seed=0).save(tmp_path / "a")
    DiffAE(TINY, seed=1).save(tmp_path / "b")
    with pytest.raises(MissingData, match="no such folder; give a folder, or owner/name"):
        semantic.load(tmp_path / "c")
    (tmp_path / "b.safetensors").replace(tmp_path / "a.safetensors")
    with pytest.raises(CorruptData, match=r"not the weights a\.json was written with"):
        semantic.load(tmp_path / "a")
    (tmp_path / "a.safetensors").write_bytes(b"short")
    with pytest.raises(CorruptData, match="not a DiffAE that can be loaded"):
        semantic.load(tmp_path / "a")
    (tmp_path / "a.safetensors").unlink()
    with pytest.raises(MissingData, match=r"a\.safetensors missing"):
        semantic.load(tmp_path / "a")
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(MissingData):
        semantic.load(tmp_path / "a")


def test_the_hub_wants_a_pinned_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="needs a pinned revision, the 40 hex digits of a commit, got 'main'"):
        semantic.load("someone/faces", revision="main")
    import huggingface_hub

    def unreachable(repository: str, revision: str) -> str:
        raise OSError(f"no route to the hub for {repository}")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(MissingData, match="someone/faces at 0123456789ab: neither in the hub's local cache"):
        semantic.load("someone/faces", revision="0123456789abcdef" * 2 + "01234567")


# --- the command line ------------------------------------------------------------------------------------------------


def test_the_command_line_reports_errors_by_its_exit_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = [
        "grid",
        "--data",
        "scenes_flowers",
        "--limit",
        "2",
        "--image-size",
        "16",
        "--model",
        str(tmp_path / "no"),
    ]
    assert main([*missing, "--out", str(tmp_path / "g.png")]) == 2
    assert "no such folder" in capsys.readouterr().err
    DiffAE(TINY).save(tmp_path / "raw")
    missing[-1] = str(tmp_path / "raw")
    assert main([*missing, "--out", str(tmp_path / "g.png")]) == 1
    assert "this DiffAE is untrained" in capsys.readouterr().err
    shown = ["grid", "--data", "scenes_flowers", "--limit", "2", "--image-size", "16", "--images", "2"]
    assert main([*shown, "--out", str(tmp_path / "g.png")]) == 0
    numbers = json.loads(capsys.readouterr().out)
    assert list(numbers)[:3] == ["flowers sun", "flowers warmth", "brightness"]
    assert (tmp_path / "g.png").stat().st_size > 1000


def test_presets_build_for_every_size_they_name() -> None:
    for size in (32, 64, 128, 224):
        for preset in presets.PRESETS.values():
            config, training = preset(size, ("warmth",), 7)
            assert (config.image_size, training.steps) == (size, 7)
    assert sum(p.numel() for p in DiffAE(presets.cpu()[0]).parameters()) < 1.2e6


@pytest.mark.slow
def test_a_small_generator_learns_warm_light_on_real_flowers(real_data: Path, tmp_path: Path) -> None:
    """About four minutes of one core: the demonstration of the README, at a quarter of its area."""
    train, val = (
        datasets.load("flowers102", root=real_data, split=s, cache=tmp_path, image_size=32) for s in ("train", "val")
    )
    config = DiffAEConfig(image_size=32, channels=(16, 32, 48), steps=30)
    model = semantic.train(train, config, semantic.TrainingConfig(steps=600, coarse=0.3))
    report = semantic.accept(model, val, calibration=16, probes=32)
    assert report.moved > 0.6
    assert report.attribute == tuple(sorted(report.attribute))
