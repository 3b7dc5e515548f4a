"""What is refused before any cell starts: generators, published weights and draws that cannot do what is asked."""

from __future__ import annotations

import dataclasses
import urllib.error
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import models
from certify.probabilistic import required_samples
from datasets.semantic.diffae import DiffAE, DiffAEConfig, State
from runs import compare, preflight, pretrained
from runs.cell import Cell, Data, Network, Perturb, Pruning, Training, Verifier, settings
from runs.execute import Execute
from runs.progress import Silent
from runs.store import Store, file_sha256
from runs.suites import Selection, car, plan
from runs.suites.preset import Block, Preset, Rule, Schedule

DIFFAE = Perturb("diffae", 1.0)
SUN = Perturb("sun", 1.0)
IMAGENET = Network("resnet18", settings=settings(pretrained=True))
VERIFIER = Verifier(car.METHOD, 2, settings=settings(eps=0.1, n=29, samples=9, repetitions=3, test_images=4))


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A cache of this module's own, and no data directory but what a test names."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CERTPRUNE_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.delenv("CERTPRUNE_DATA", raising=False)
        yield


def _cell(perturb: Perturb = SUN, verifier: Verifier = VERIFIER, edits: str = "sun:1", **changes: Any) -> Cell:
    data = Data("scenes_flowers", 16, 8, settings=settings(image_size=16, edits=edits, edited=4))
    parts: dict[str, Any] = {
        "pruning": Pruning("dense", 0.0, settings(finetune_epochs=0)),
        "training": Training("natural", 1, 8),
        "network": Network("cnn7_cw", width=0.125),
        "data": data,
        "perturbations": (perturb,),
        "verifier": verifier,
    }
    return Cell(**(parts | changes))


# --- generators -----------------------------------------------------------------------------------------------------
def _generator(root: Path, side: int = 16, *, accepted: bool = True, name: str = "scenes_flowers") -> None:
    """A tiny DiffAE that nobody has judged, in the state asked for."""
    model = DiffAE(DiffAEConfig(image_size=side, channels=(8, 16), encoder_channels=(8,), steps=4), seed=0)
    model.direction.copy_(torch.ones_like(model.direction))
    model.state = State.TRAINED
    if accepted:
        criteria, report = {"attribute": "warmth"}, {"moved": 0.8}
        model.edit_record = {"criteria": criteria, "report": report, "weights": model.weights_hash()}
        model.state = State.ACCEPTED
    model.save(root / "generators" / name)


@pytest.mark.parametrize("dry", [["--dry-run"], []])
def test_a_plan_without_its_generator_is_refused(
    dry: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["car", "--preset", "smoke", "--perturbations", "diffae:1", "--data-dir", str(tmp_path)]
    assert compare.main([*arguments, "--results", str(tmp_path / "r"), *dry]) == 2
    said = capsys.readouterr().err
    path = tmp_path / "generators" / "scenes_flowers"
    assert "the plan edits scenes_flowers by diffae 1" in said
    command = f"python -m datasets.semantic train --data scenes_flowers --model {path} --image-size 64"
    assert f"{command} --data-dir {tmp_path}" in said
    assert not (tmp_path / "r").exists()


def test_edits_of_training_images_need_their_generator_too(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no generator for scenes_flowers"):
        preflight.check_data([_cell(edits="diffae:1")], tmp_path)
    _generator(tmp_path)
    preflight.check_data([_cell(edits="diffae:1"), _cell(DIFFAE)], tmp_path)


def test_a_generator_that_is_not_accepted_is_refused(tmp_path: Path) -> None:
    _generator(tmp_path, accepted=False)
    with pytest.raises(ValueError, match=r"expected at least accepted.*run python -m datasets.semantic accept --data"):
        preflight.check_data([_cell(DIFFAE)], tmp_path)


def test_a_generator_belongs_to_a_size(tmp_path: Path) -> None:
    _generator(tmp_path, 32)
    wanted = r"makes images of 32 px, scenes_flowers has 16; train one with .*scenes_flowers-16 --image-size 16"
    with pytest.raises(ValueError, match=wanted):
        preflight.check_data([_cell(DIFFAE)], tmp_path)
    _generator(tmp_path, 16, name="scenes_flowers-16")
    preflight.check_data([_cell(DIFFAE)], tmp_path)


@pytest.mark.slow
def test_a_cell_trains_on_generated_edits_and_is_certified_against_others(tmp_path: Path) -> None:
    _generator(tmp_path)
    cell = _cell(DIFFAE, edits="diffae:1")
    store = Store(tmp_path / "results")
    slot = store.slot(cell)
    run = Execute.on("cpu", threads=1, data_dir=tmp_path, store=store)
    with slot.lock():
        record = run(cell, slot, Silent())
        again = run(cell, slot, Silent())
    assert record["results"] == again["results"]
    assert record["data"]["images"]["train"] == 16 + 4
    (result,) = record["results"]
    assert result["certificate"]["generator"]
    assert result["paper"]["certificate"]["n_max"] == 27


# --- draws ----------------------------------------------------------------------------------------------------------
def _verifier(**own: Any) -> Verifier:
    return dataclasses.replace(VERIFIER, images=40, settings=settings(**own))


def test_draws_that_can_never_certify_are_refused() -> None:
    needed = required_samples(0.01, 0.95)
    with pytest.raises(ValueError, match=f"298 draws do not show eps = 0.01 at 95 % .*set n to {needed} or more"):
        preflight.check_verifiers([_cell(verifier=_verifier(eps=0.01, n=needed - 1))])
    preflight.check_verifiers([_cell(verifier=_verifier(eps=0.01, n=needed))])
    preflight.check_verifiers([_cell(verifier=_verifier(eps=0.01))])
    together = required_samples(0.01, 0.95, images=40)
    assert together > needed
    with pytest.raises(ValueError, match=f"jointly over 40 images by clopper-pearson.*set n to {together}"):
        preflight.check_verifiers([_cell(verifier=_verifier(eps=0.01, n=needed, joint=True))])
    slower = required_samples(0.01, 0.95, "hoeffding")
    with pytest.raises(ValueError, match=f"by hoeffding, even without a flip; set n to {slower:,}"):
        preflight.check_verifiers([_cell(verifier=_verifier(eps=0.01, n=needed, bound="hoeffding"))])
    with pytest.raises(ValueError, match="Did you mean eps"):
        preflight.check_verifiers([_cell(verifier=_verifier(epz=0.01))])
    with pytest.raises(ValueError, match=r"eps"):
        preflight.check_verifiers([_cell(verifier=_verifier(eps=1.5))])


def test_such_a_plan_exits_before_any_cell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    few = dataclasses.replace(VERIFIER, settings=settings(eps=0.01, n=100))
    block = Block(_cell().data, (_cell().network,), (Rule("dense"),), (Schedule(_cell().training, 1.0),), (SUN,), few,
                  (0,), 1.0)  # fmt: skip
    preset = Preset("few", "a core", 1, "nothing", (block,), ("scenes_flowers",))
    monkeypatch.setitem(car.PRESETS, "few", lambda: preset)  # type: ignore[arg-type]
    assert compare.main(["car", "--preset", "few", "--results", str(tmp_path / "r")]) == 2
    assert "can never certify an image: 100 draws" in capsys.readouterr().err
    assert not (tmp_path / "r").exists()


def test_edits_without_a_set_need_draws(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert compare.main(["--preset", "smoke", "--perturbations", "sun:1", "--results", str(tmp_path / "r")]) == 2
    assert "use --verifier probabilistic" in capsys.readouterr().err


# --- published weights ----------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def published() -> Mapping[str, torch.Tensor]:
    """torchvision's ResNet-18 in its own layout, with weights of a seed."""
    import torchvision

    torch.manual_seed(0)
    state: Mapping[str, torch.Tensor] = torchvision.models.resnet18().state_dict()
    return state


def test_networks_say_whether_they_are_pretrained() -> None:
    assert pretrained.wanted(IMAGENET)
    assert not pretrained.wanted(Network("resnet18"))
    assert IMAGENET.label == "resnet18 pretrained"
    assert Network("resnet18", settings=settings(pretrained=False)).label == "resnet18"
    assert _cell(network=IMAGENET).key != _cell(network=Network("resnet18")).key
    with pytest.raises(ValueError, match="Did you mean pretrained"):
        pretrained.wanted(Network("resnet18", settings=settings(pretraind=True)))
    with pytest.raises(ValueError, match="is True or False, got 'imagenet'"):
        pretrained.wanted(Network("resnet18", settings=settings(pretrained="imagenet")))


def test_the_papers_networks_are_pretrained_in_the_presets_of_its_size() -> None:
    for name in ("gpu", "paper"):
        cells = plan("car", name, Selection()).cells
        assert all(pretrained.wanted(cell.network) for cell in cells), name
        assert {cell.network.name for cell in cells} == {"resnet18", "mobilenetv2", "googlenet"}
    sides = {cell.data.options["image_size"] for cell in plan("car", "paper", Selection()).cells}
    assert sides == {224}
    assert not any(pretrained.wanted(cell.network) for cell in plan("car", "quick", Selection()).cells)


def test_weights_that_cannot_be_fetched_are_refused_with_the_place_for_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable() -> Any:
        raise urllib.error.URLError("no route to host")

    unreachable.__module__ = "models.torchvision"
    monkeypatch.setattr("models.torchvision.resnet18_weights", unreachable)
    with pytest.raises(ValueError, match=r"network setting pretrained=True.*no route to host") as caught:
        preflight.check_data([_cell(network=IMAGENET)], tmp_path)
    assert str(tmp_path / "weights" / "resnet18.pth") in str(caught.value)
    cells = [_cell(network=IMAGENET), _cell(network=dataclasses.replace(IMAGENET, name="googlenet")), _cell()]
    with pytest.raises(ValueError, match=r"other networks without a file there: googlenet$"):
        preflight.check_data(cells, tmp_path)
    preflight.check_data([_cell(network=Network("resnet18"))], tmp_path)


def test_weights_are_fetched_where_no_file_is_there(
    published: Mapping[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fetched() -> Mapping[str, torch.Tensor]:
        return published

    fetched.__module__ = "models.torchvision"
    monkeypatch.setattr("models.torchvision.resnet18_weights", fetched)
    preflight.check_data([_cell(network=IMAGENET)], tmp_path)
    assert pretrained.source(IMAGENET, tmp_path) is True
    with pytest.raises(ValueError, match=r"published weights exist for width 1 only, got width=0\.5"):
        preflight.check_data([_cell(network=dataclasses.replace(IMAGENET, width=0.5))], tmp_path)
    with pytest.raises(ValueError, match="no weights are published for 'mlp'"):
        preflight.check_data([_cell(network=Network("mlp", settings=settings(pretrained=True)))], tmp_path)


def test_a_file_in_the_data_directory_comes_first_and_must_fit(
    published: Mapping[str, torch.Tensor], tmp_path: Path
) -> None:
    path = tmp_path / "weights" / "resnet18.pth"
    path.parent.mkdir()
    torch.save({key: value for key, value in published.items() if "layer4" not in key}, path)
    assert pretrained.source(IMAGENET, tmp_path) == path
    with pytest.raises(ValueError, match="does not fit 'resnet18'"):
        preflight.check_data([_cell(network=IMAGENET)], tmp_path)


@pytest.mark.slow
def test_a_cell_starts_from_the_weights(published: Mapping[str, torch.Tensor], tmp_path: Path) -> None:
    """Trained for a step at a rate of nothing, the network still has them, and the record says whose they are."""
    path = tmp_path / "weights" / "resnet18.pth"
    path.parent.mkdir()
    torch.save(dict(published), path)
    training = Training("natural", 1, 16, settings=settings(lr=1e-12))
    cell = _cell(network=IMAGENET, training=training)
    store = Store(tmp_path / "results")
    slot = store.slot(cell)
    with slot.lock():
        record = Execute.on("cpu", threads=1, data_dir=tmp_path, store=store)(cell, slot, Silent())
    model = models.load(slot.model_path)
    assert torch.allclose(model.features.layer4[1].conv2.weight, published["layer4.1.conv2.weight"], atol=1e-6)
    assert record["network"]["pretrained"] == "resnet18.pth"
    assert record["network"]["notes"][1].startswith("weights from resnet18.pth (sha256 ")
    assert tuple(record["network"]["mean"]) == pytest.approx((0.485, 0.456, 0.406))
    trained = slot.trained()
    assert trained is not None
    assert trained["fingerprints"]["weights"] == file_sha256(path)  # another file is another training


def test_a_cluster_is_not_bothered_with_what_cannot_be_certified(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["car", "--preset", "smoke", "--verifier", "crown", "--engine", "ray", "--address", "auto"]
    assert compare.main(asked) == 2
    assert "only random draws: use --verifier probabilistic" in capsys.readouterr().err
