from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import certify
import datasets
from certify.probabilistic import required_samples
from datasets import semantic
from methods.masks import Mask
from runs import car_edits, car_measure, car_sampling, execute, measure
from runs.cell import SEMANTIC, Cell, Data, Network, Perturb, Pruning, Training, Verifier, settings
from runs.progress import Silent
from runs.store import Store
from runs.suites import car

SUN = Perturb("sun", 1.0)


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A cache of this module's own: nothing that is rendered or stored is left behind."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CERTPRUNE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def flowers(_cache: None) -> Any:
    return datasets.load("scenes_flowers", split="test", limit=6, image_size=16, workers=1)


class Threshold(nn.Module):
    """Class 1 where the mean of the image exceeds a threshold."""

    def __init__(self, at: float) -> None:
        super().__init__()
        self.at = at
        self.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        above = (x.flatten(1).mean(1) - self.at) * 20
        return torch.stack([-above, above], 1)


def _verifier(images: int = 4, **own: Any) -> Verifier:
    return Verifier(car.METHOD, images, settings=settings(**({"eps": 0.1, "samples": 10, "repetitions": 3} | own)))


# --- settings -------------------------------------------------------------------------------------------------------
def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="Did you mean eps"):
        car_sampling.sampling(_verifier(epz=0.1))
    with pytest.raises(ValueError, match="must be one that is valid"):
        car_sampling.sampling(_verifier(bound="cccert"))
    with pytest.raises(ValueError, match="odd number of points"):
        car_sampling.sampling(_verifier(landscape=4))
    assert car_sampling.sampling(Verifier(car.METHOD)).eps == 1e-3
    assert car_sampling.sampling(_verifier(samples=0)).cccert is None
    assert car_sampling.test_images(_verifier(test_images=50)) == 50
    assert car_sampling.test_images(_verifier(images=60, test_images=50)) == 60


def test_an_edit_is_no_set_that_bounds_cover() -> None:
    for kind in SEMANTIC:
        with pytest.raises(ValueError, match="--verifier probabilistic"):
            measure.perturbation(Perturb(kind, 1.0))


def test_data_names_edits_and_their_number_together() -> None:
    with pytest.raises(ValueError, match="go together"):
        Data("scenes_flowers", settings=settings(edited=10))
    with pytest.raises(ValueError, match=">= 0"):
        Data("scenes_flowers", settings=settings(edits="sun:1", edited=-1))
    data = Data("scenes_flowers", settings=settings(edits="sun:0.5", edited=10, image_size=16))
    assert data.label == "scenes_flowers + 10 edits"
    assert (data.options, data.edits, data.edited) == ({"image_size": 16}, Perturb("sun", 0.5), 10)


# --- edits ----------------------------------------------------------------------------------------------------------
def test_each_kind_becomes_its_transform(flowers: Any) -> None:
    cpu = torch.device("cpu")
    assert isinstance(car_edits.transform(SUN, flowers, None, cpu), semantic.SceneEdit)
    half = car_edits.transform(Perturb("sun", 0.5), flowers, None, cpu)
    assert half.describe()["span"] == pytest.approx(0.25)
    assert isinstance(car_edits.transform(Perturb("warmth", 1.0), flowers, None, cpu), semantic.SceneEdit)
    plain = dataclasses.replace(flowers, meta={k: v for k, v in flowers.meta.items() if k != "family"})
    assert car_edits.transform(Perturb("warmth", 1.0), plain, None, cpu).describe()["gain"] == pytest.approx(1.4)
    assert isinstance(car_edits.transform(Perturb("blur", 1.0), plain, None, cpu), semantic.Blur)
    with pytest.raises(ValueError, match="no change of one attribute"):
        car_edits.transform(Perturb("linf", 0.1), flowers, None, cpu)
    with pytest.raises(ValueError, match="magnitude > 0"):
        car_edits.transform(Perturb("sun", 0.0), flowers, None, cpu)
    with pytest.raises(ValueError, match="not a set of rendered scenes"):
        car_edits.transform(SUN, plain, None, cpu)


@pytest.mark.parametrize("named", [Perturb("brightness", 0.2), Perturb("hue", 0.1), Perturb("rotation", 10.0)])
def test_a_line_goes_from_end_to_end(named: Perturb, flowers: Any) -> None:
    x, _ = flowers.tensors([0, 1])
    edit = car_edits.transform(named, flowers, None, torch.device("cpu"))
    p = measure.perturbation(named)
    for delta, t in ((0.0, -named.magnitude), (0.5, 0.0), (1.0, named.magnitude)):
        moved = semantic.apply(edit, x, [0, 1], delta)
        assert torch.allclose(moved, p.apply(x, torch.full((2,), t)), atol=1e-6)


def test_a_missing_generator_says_where_and_how(flowers: Any, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"generators/scenes_flowers.*python -m datasets.semantic train"):
        car_edits.transform(Perturb("diffae", 1.0), flowers, tmp_path, torch.device("cpu"))
    with pytest.raises(ValueError, match="diffae:1"):
        car_edits.transform(Perturb("diffae", 0.5), flowers, tmp_path, torch.device("cpu"))


def test_paired_batches_bring_each_edit_to_its_original() -> None:
    pack = datasets.load("scenes_flowers", split="train", limit=8, image_size=16, workers=1)
    more = car_edits.augmented(pack, SUN, 5, None, torch.device("cpu"))
    assert (len(more), car_edits.originals(more)) == (13, 8)
    assert car_edits.augmented(pack, SUN, 0, None, torch.device("cpu")) is pack
    batches = car_edits.paired_batches(more, 4, device=torch.device("cpu"), seed=0, augment=None)
    assert sum(len(x) for x, _ in batches) == 13
    paired = [y for _, y in batches.pairs()]
    sources = torch.cat([y[:, 1] for y in paired])
    assert int((sources >= 0).sum()) == 5
    for y in paired:
        edits = y[y[:, 1] >= 0]
        assert torch.equal(edits[:, 0], y[edits[:, 1], 0])  # the label of the original, in the same batch


# --- verdicts -------------------------------------------------------------------------------------------------------
def test_rows_are_what_estimate_says(flowers: Any) -> None:
    x, _ = flowers.tensors()
    model = Threshold(float(x.flatten(1).mean(1).median()) + 0.01)
    y = model(x).argmax(1)
    rows = car_sampling.verdicts(model, x[2:5], y[2:5], SUN, flowers, _verifier(3), 2, None)
    edit = semantic.SceneEdit(flowers, "sun")
    want = certify.estimate(model, x[2:5], y[2:5], semantic.Draws(edit, indices=[2, 3, 4]), 0.1, n_max=None)
    assert [row["index"] for row in rows] == [2, 3, 4]
    assert [row["flips"] for row in rows] == want.flips.tolist()
    assert [row["n"] for row in rows] == want.n.tolist()
    assert [row["status"] == "holds" for row in rows] == want.certified.tolist()
    said = rows[0]["certificate"]
    assert said["generator"] == semantic.fingerprint(edit)
    assert (said["population"], said["valid"], said["outputs"]) == ("distribution", True, "logits")
    assert said["n_max"] == required_samples(0.1, 0.95)
    assert not rows[0]["paper"]["certificate"]["valid"]
    assert rows[0]["paper"]["n"] == 30
    again = car_sampling.verdicts(model, x[2:5], y[2:5], SUN, flowers, _verifier(3), 2, None)
    assert [(r["flips"], r["upper"]) for r in rows] == [(r["flips"], r["upper"]) for r in again]


def test_a_wrong_prediction_is_never_certified(flowers: Any) -> None:
    x, _ = flowers.tensors([0, 1])
    model = Threshold(-1.0)  # always class 1
    rows = car_sampling.verdicts(
        model, x, torch.tensor([1, 0]), Perturb("brightness", 0.1), flowers, _verifier(2), 0, None
    )
    assert [row["status"] for row in rows] == ["holds", "violated"]
    assert [row["paper"]["certified"] for row in rows] == [True, False]
    found = car_sampling.summarise(Perturb("brightness", 0.1), rows, _verifier(2))
    assert (found["verified_bits"], found["paper"]["bits"], found["clean_bits"]) == ("10", "10", "10")
    assert (found["verified"], found["attacked"], found["violated"]) == (1, 1, 1)
    assert found["certificate"]["generator"] is None


def test_too_few_draws_say_how_many_are_needed(flowers: Any) -> None:
    x, y = flowers.tensors([0])
    with pytest.raises(ValueError, match="needs 299"):
        car_sampling.verdicts(Threshold(0.5), x, y, SUN, flowers, _verifier(1, eps=0.01, n=100), 0, None)


def test_keypoints_have_no_labels_to_flip(flowers: Any) -> None:
    class Keypoints:
        task, name = "keypoints", "aircraft"

    with pytest.raises(ValueError, match="has keypoints"):
        car_sampling.verdicts(Threshold(0.5), *flowers.tensors([0]), SUN, Keypoints(), _verifier(1), 0, None)


def test_joint_certificates_count_every_image_and_lose_none(flowers: Any) -> None:
    x, _ = flowers.tensors([0, 1])
    y = torch.ones(2, dtype=torch.int64)
    rows = car_sampling.verdicts(Threshold(-1.0), x, y, SUN, flowers, _verifier(40, joint=True, samples=0), 0, None)
    assert rows[0]["certificate"]["joint"] == 40
    assert rows[0]["n"] == required_samples(0.1, 0.95, images=40)
    assert "paper" not in rows[0]
    joint = car_sampling.summarise(SUN, rows, _verifier(40, joint=True))
    assert joint["truly"] == joint["verified"] == 2
    # One by one, some of 100 certificates may be false: Binomial(100, .05) stays below 10 with 95 %.
    single = car_sampling.summarise(SUN, [rows[0]] * 100, _verifier(100))
    assert (single["verified"], single["truly"]) == (100, 91)


def test_another_generator_makes_verdicts_stale(flowers: Any) -> None:
    x, y = flowers.tensors([0])
    rows = car_sampling.verdicts(Threshold(0.5), x, y, SUN, flowers, _verifier(1), 0, None)
    cpu = torch.device("cpu")
    assert car_sampling.current(rows, SUN, flowers, None, cpu)
    rows[0]["certificate"] = {**rows[0]["certificate"], "generator": "0" * 64}
    assert not car_sampling.current(rows, SUN, flowers, None, cpu)
    assert car_sampling.current([], SUN, flowers, None, cpu)


def test_fresh_draws_confirm_what_holds_and_break_what_does_not(flowers: Any) -> None:
    x, _ = flowers.tensors()
    verifier = _verifier(6, eps=0.05)
    y = torch.ones(6, dtype=torch.int64)
    rows = car_sampling.verdicts(Threshold(-1.0), x, y, SUN, flowers, verifier, 0, None)
    assert all(row["status"] == "holds" for row in rows)
    args = (SUN, flowers, verifier, rows, None, 60, lambda: None)
    assert car_sampling.redraw(Threshold(-1.0), x, y, *args) == ([], 360)
    breaks, _ = car_sampling.redraw(Threshold(2.0), x, y, *args)
    assert len(breaks) == 6
    assert "misclassified" in breaks[0]
    at = float(x[0].mean()) + 1e-4  # right as it is, flipped by nearly every edit
    flipping = Threshold(at)
    breaks, _ = car_sampling.redraw(
        flipping, x, torch.zeros(6, dtype=torch.int64), SUN, flowers, verifier, [rows[0]], None, 60, lambda: None
    )
    assert len(breaks) == 1
    assert "of 60 fresh draws flip" in breaks[0]


# --- measures -------------------------------------------------------------------------------------------------------
def _small() -> tuple[nn.Module, Mask]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 2)).eval()
    kept = {name: torch.rand(model.get_parameter(name).shape) > 0.5 for name in ("0.weight", "3.weight")}
    with torch.no_grad():
        for name, mask in kept.items():
            model.get_parameter(name).mul_(mask)
    return model, Mask(kept)


def test_the_landscape_passes_through_the_network_and_leaves_it_alone() -> None:
    model, mask = _small()
    x, y = torch.rand(5, 3, 8, 8), torch.tensor([0, 1, 0, 1, 1])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = car_measure.landscape(model, mask, x, y, 3)
    assert found["loss"][1][1] == pytest.approx(float(nn.functional.cross_entropy(model(x), y).detach()), rel=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert found == car_measure.landscape(model, mask, x, y, 3)
    assert found != car_measure.landscape(model, mask, x, y, 3, seed=1)


def test_directions_have_the_filters_norms_and_respect_the_mask() -> None:
    model, mask = _small()
    w = model.get_parameter("0.weight").detach()
    d = car_measure._direction(w, mask["0.weight"], torch.Generator().manual_seed(0))
    assert torch.allclose(d.flatten(1).norm(dim=1), w.flatten(1).norm(dim=1), rtol=1e-5)
    assert not d[~mask["0.weight"]].any()
    assert not car_measure._direction(torch.ones(4), None, torch.Generator()).any()


def test_histograms_count_every_kept_weight() -> None:
    model, mask = _small()
    found = car_measure.weights(model, mask)
    assert set(found) == {"0.weight", "3.weight", "all"}
    assert found["all"]["kept"] == mask.kept == sum(found["all"]["counts"])
    assert found["all"]["total"] == mask.total


# --- a cell ---------------------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_a_cell_of_car_from_data_to_record_and_back(tmp_path: Path) -> None:
    cell = Cell(
        Pruning("car", 0.5, settings(mask_epochs=1, finetune_epochs=1, variant="ce")),
        Training("natural", 1, 8),
        Network("cnn7_cw", width=0.125),
        Data("scenes_flowers", 24, 8, settings=settings(image_size=32, edits="sun:1", edited=8)),
        (SUN,),
        _verifier(4, test_images=10, landscape=3),
    )
    store = Store(tmp_path)
    run = execute.Execute.on("cpu", threads=1, data_dir=None, store=store)
    slot = store.slot(cell)
    with slot.lock():
        record = run(cell, slot, Silent())
        again = run(cell, slot, Silent())
    assert record["results"] == again["results"]
    assert record["mask"]["density"] == pytest.approx(0.5, abs=1e-3)
    assert record["data"]["images"]["train"] == 32
    assert record["accuracy"]["images"] == 10
    assert len(record["results"][0]["verified_bits"]) == 4
    assert record["training"]["before"].keys() == {"score", "loss"}
    assert len(record["landscape"]["loss"]) == 3
