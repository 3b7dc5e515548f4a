"""What is refused before any cell starts: generators, published weights and draws that cannot do what is asked."""

from __future__ import annotations

import dataclasses
import math
import urllib.error
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import certify
import datasets
import models
from certify.probabilistic import required_samples
from datasets import aircraft, scenes
from datasets.semantic.diffae import DiffAE, DiffAEConfig, State
from runs import compare, measure, preflight, pretrained
from runs.cell import Cell, Data, Network, Perturb, Pruning, Training, Verifier, settings
from runs.execute import Execute
from runs.progress import Silent
from runs.store import Store, file_sha256
from runs.suites import Selection, car, nrs, plan, preset_names, suites
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


# --- what a verifier decides ----------------------------------------------------------------------------------------
LINF, L2, TURNED, BRIGHT = (Perturb(kind, 0.1) for kind in ("linf", "l2", "rotation", "brightness"))


@pytest.mark.parametrize(
    ("method", "data", "named", "message"),
    [
        *(
            (m, "digits", LINF, "of one or two parameters, not linf 0.1; use --verifier auto")
            for m in preflight.FEW[:3]
        ),
        ("deviation", "aircraft", LINF, "'deviation' decides perturbations of one or two parameters, not linf 0.1"),
        ("deviation", "digits", BRIGHT, "measures how far keypoints move, but digits has classes; use --verifier auto"),
        ("probabilistic", "aircraft", BRIGHT, "counts changed labels, but aircraft has keypoints"),
        ("bab", "digits", TURNED, "searches boxes and straight lines, not rotation 0.1; use --verifier line"),
        ("milp", "digits", TURNED, "searches boxes and straight lines, not rotation 0.1"),
        ("milp", "digits", L2, "searches boxes and straight lines, not l2 0.1; use --verifier bab"),
        ("forward", "aircraft", TURNED, "'forward' does not take rotation 0.1 of images with 12,288 values; use crown"),
        (
            "auto",
            "digits",
            Perturb("hue", 0.1),
            "hue 0.1 changes the colours of RGB images, but those of digits are grey",
        ),
    ],
)
def test_a_verifier_that_cannot_decide_is_refused(method: str, data: str, named: Perturb, message: str) -> None:
    cell = _cell(named, Verifier(method, 2), data=Data(data))
    with pytest.raises(ValueError, match=message) as caught:
        preflight.check_verifiers([cell])
    assert str(caught.value).startswith(f"{cell.label}: ")


@pytest.mark.parametrize("method", ["auto", "crown", "forward", "line", "bab", "milp", "deviation"])
@pytest.mark.parametrize("named", [LINF, L2, TURNED, BRIGHT, Perturb("joint", 0.02)], ids=lambda named: named.kind)
def test_what_is_refused_is_what_certify_would_refuse(method: str, named: Perturb) -> None:
    """Asked with images of the size that the table of data sets names."""
    points = method == "deviation"
    name = "aircraft" if points else "digits"
    facts = preflight.MADE[name]
    x = torch.full((1, facts.channels, *[math.isqrt(facts.inputs // facts.channels)] * 2), 0.5)
    model = nn.Sequential(nn.Flatten(), nn.Linear(facts.inputs, 2))
    spec = certify.Deviation(1e6) if points else certify.Classification(model(x).argmax(1))
    how, p = "line" if points else method, measure.perturbation(named)
    cell = _cell(named, Verifier(method, 1), data=Data(name))
    try:
        certify.verify(model.eval(), x, spec, p, how, certify.Budget(seconds=2), attack=False)
    except ValueError:
        with pytest.raises(ValueError, match=f"the verifier '{method}'"):
            preflight.check_verifiers([cell])
    else:
        preflight.check_verifiers([cell])


def test_states_of_a_run_need_a_set_that_pgd_searches() -> None:
    made = nrs.rule("imp", 1, 1)
    pruning = Pruning(made.method, made.ratios[0], made.settings)
    for named, verifier in ((TURNED, "line"), (SUN, "probabilistic")):
        cell = _cell(named, Verifier(verifier, 2), pruning=pruning, data=Data("digits"))
        with pytest.raises(ValueError, match="every state is attacked by PGD"):
            preflight.check_verifiers([cell])
    preflight.check_verifiers([_cell(BRIGHT, Verifier("line", 2), pruning=pruning, data=Data("digits"))])


@pytest.mark.parametrize("suite", list(suites()))
def test_no_preset_asks_what_its_verifier_cannot_decide(suite: str) -> None:
    for name in preset_names(suite):
        preflight.check_verifiers(plan(suite, name, Selection()).cells)


def test_the_table_of_data_sets_is_right() -> None:
    for name, facts in preflight.MADE.items():
        kind, _, variant = name.partition(":")
        if kind == "digits":
            pack = datasets.load(name, split="test")
            assert (pack.task, pack.in_channels, pack.images[0].numel(), len(pack)) == dataclasses.astuple(facts)
            continue
        pack = datasets.load(name, split="test", limit=1)
        assert (pack.task, pack.in_channels, pack.images[0].numel()) == dataclasses.astuple(facts)[:3]
        sizes = aircraft.SIZES if kind == "aircraft" else None
        family = kind.removeprefix("scenes_")
        counts = sizes[variant or "quick"] if sizes else scenes.family(family).counts[variant or "quick"][1]
        assert counts["test"] == facts.test


def test_sets_from_outside_are_asked_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(request: datasets.Request) -> datasets.Pack:
        images, labels = torch.zeros(12, 8, 8, 1, dtype=torch.uint8), torch.arange(12) % 2
        return datasets.Pack("own", request.split, images, labels, ("a", "b"), {})

    monkeypatch.setitem(datasets.SOURCES, "own", datasets.Source("own", "twelve grey images", load))
    cell = _cell(LINF, Verifier("auto", 12), data=Data("own"))
    preflight.check_data([cell], None)
    more = dataclasses.replace(cell, verifier=Verifier("auto", 13))
    for wrong, message in (
        (more, "13 test images are asked for, but own has 12: --images 12"),
        (dataclasses.replace(cell, perturbations=(Perturb("hue", 0.1),)), "those of own are grey"),
        (dataclasses.replace(cell, perturbations=(BRIGHT,), verifier=Verifier("deviation", 2)), "but own has classes"),
    ):
        with pytest.raises(ValueError, match=message):
            preflight.check_data([cell, wrong], None)


def test_an_edit_belongs_to_its_images(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the plan edits scenes_flowers by smile 1: unknown attribute"):
        preflight.check_data([_cell(Perturb("smile", 1.0))], tmp_path)
    with pytest.raises(ValueError, match="the plan edits digits by sun 1: digits is not a set of rendered scenes"):
        preflight.check_data([_cell(SUN, data=Data("digits"))], tmp_path)


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
