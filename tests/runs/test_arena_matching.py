from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from torch import nn

import models
from methods import masks
from methods.magnitude import MagnitudeConfig
from methods.slimming import SlimmingConfig
from methods.usn import USNConfig
from runs import configure, execute, matching, measure
from runs.cell import Cell, Data, Network, Perturb, Pruning, Training, Verifier, settings
from runs.progress import Silent
from runs.ranking import TOLERANCE
from runs.store import Store
from runs.suites import Selection, plan

IMAGE = torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def net() -> nn.Module:
    return models.create("cnn7_nrs", 10, in_channels=1, image_size=8, width=0.25, seed=0).eval()


def chain() -> nn.Sequential:
    """conv 1→20, conv 20→20, linear: parameters and multiply-adds are easy to count by hand."""
    return nn.Sequential(
        nn.Conv2d(1, 20, 3, padding=1, bias=False), nn.ReLU(), nn.Conv2d(20, 20, 3, padding=1, bias=False), nn.ReLU(),
        nn.Flatten(), nn.Linear(20 * 64, 10, bias=False),
    ).eval()  # fmt: skip


def test_shares_are_those_counted_by_hand() -> None:
    found = matching.shares(chain(), IMAGE, 0.5, ("conv",), "layer")
    assert found.parameters == pytest.approx((90 + 900 + 6400) / (180 + 3600 + 12800))
    assert found.flops == pytest.approx((90 * 64 + 900 * 64 + 6400) / (180 * 64 + 3600 * 64 + 12800))


@pytest.mark.parametrize("measure_by", matching.MEASURES)
@pytest.mark.parametrize("removed", [0.3, 0.6])
def test_no_other_channel_ratio_comes_closer(net: nn.Module, measure_by: str, removed: float) -> None:
    ratio = matching.channel_ratio(net, IMAGE, removed, measure_by, ("conv",))

    def miss(candidate: float) -> float:
        found = matching.shares(net, IMAGE, candidate, ("conv",), "layer")
        return abs(float(getattr(found, measure_by)) - (1 - removed))

    assert miss(ratio) <= min(miss(k / 100) for k in range(0, 100, 5)) + 1e-9
    assert miss(ratio) < TOLERANCE


def test_nothing_removed_is_the_ratio_nought(net: nn.Module) -> None:
    assert matching.channel_ratio(net, IMAGE, 0.0, "flops", ("conv",)) == 0.0


def test_wrong_questions_are_refused(net: nn.Module) -> None:
    with pytest.raises(ValueError, match="match must be one of parameters, flops, got 'weights'"):
        matching.channel_ratio(net, IMAGE, 0.5, "weights", ("conv",))
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\), got 1.0"):
        matching.channel_ratio(net, IMAGE, 1.0, "flops", ("conv",))
    with pytest.raises(ValueError, match="MagnitudeConfig removes single weights"):
        matching.matched(MagnitudeConfig(ratio=0.5), "parameters", net, IMAGE)


@pytest.mark.parametrize("config", [SlimmingConfig(ratio=0.5, scope="layer"), USNConfig(ratio=0.5)])
def test_a_configuration_gets_the_ratio_and_keeps_the_rest(net: nn.Module, config: object) -> None:
    found = matching.matched(config, "parameters", net, IMAGE)
    wanted = matching.channel_ratio(net, IMAGE, 0.5, "parameters", ("conv",))
    assert found == dataclasses.replace(config, ratio=wanted)  # type: ignore[type-var]
    assert 0.2 < wanted < 0.4
    assert not net.training


def test_sizes_count_what_is_really_there(net: nn.Module) -> None:
    weights = dict(net.named_parameters())
    names = masks.prunable(net, ("conv",), structured=True)
    scores = {name: weights[name].detach().abs() for name in names}
    mask = masks.Mask.from_scores(scores, 0.5, "layer", True, groups=masks.groups(net, IMAGE))
    sizes = measure.sizes(net, mask, IMAGE)
    assert sizes["parameters_executed"] == models.count(masks.remove(net, mask, IMAGE))
    assert sizes["parameters_executed"] < sizes["parameters_left"] < sizes["parameters"]
    loose = measure.sizes(net, masks.Mask.from_scores(scores, 0.5), IMAGE)
    assert loose["parameters_executed"] == loose["parameters"]


def cell(method: str, epochs: int, **own: bool | float | str) -> Cell:
    return Cell(
        Pruning(method, 0.5, settings(**own)),
        Training("natural", epochs, 64, None, settings(lr=3e-3)),
        Network("cnn7_nrs", width=0.125),
        Data("digits", limit=128, val_limit=32),
        (Perturb("brightness", 0.1), Perturb("linf", 0.01)),
        Verifier("auto", 4, 0.2, settings=settings(flip_probability=0.05)),
    )


def test_a_matched_cell_records_its_channel_ratio_and_random_draws(tmp_path) -> None:  # type: ignore[no-untyped-def]
    asked = cell("slimming", 1, layers="conv", scope="layer", rounds=1, match="flops")
    store = Store(tmp_path)
    work = execute.Execute.on("cpu", threads=1, data_dir=None, store=store)
    slot = store.slot(asked)
    with slot.lock():
        record = work(asked, slot, Silent())
    json.dumps(record, allow_nan=False)
    small = models.create("cnn7_nrs", 10, in_channels=1, image_size=8, width=0.125, seed=0).eval()
    wanted = matching.channel_ratio(small, IMAGE, 0.5, "flops", ("conv",))
    assert record["training"]["channel_ratio"] == wanted
    assert record["size"]["flops_executed"] / record["size"]["flops"] == pytest.approx(
        matching.shares(small, IMAGE, wanted, ("conv",), "layer").flops
    )
    brightness, linf = record["results"]
    sampled = brightness["sampled"]
    assert sampled["images"] == 4 == len(sampled["bits"])
    assert sampled["certified"] == sampled["bits"].count("1") >= brightness["verified"]
    assert sampled["draws"] == 59  # (1 - .05) ** 59 < .05 <= (1 - .05) ** 58
    assert "sampled" not in linf


def test_settings_of_a_cell_become_what_methods_take() -> None:
    penalised = configure.build_config(cell("nrs", 2, penalty="rs", eps=0.02, rounds=1))
    assert penalised.penalty.name == "rs"
    assert configure.build_config(cell("hydra", 2, rounds=1, search=3)).search.epochs == 3
    assert configure.build_config(cell("car", 2, transform="joint:0.05")).transform.name == "brightness-contrast"
    with pytest.raises(ValueError, match=r"unknown stability penalty 'nsr'\. Did you mean nrs"):
        configure.build_config(cell("nrs", 2, penalty="nsr"))


def test_every_entrant_of_a_block_is_trained_for_the_same_epochs() -> None:
    for preset, data in (("smoke", "digits"), ("quick", "digits"), ("quick", "aircraft"), ("quick", "fashion_mnist")):
        made = plan("arena", preset, Selection(datasets=(data,)))
        for training in {asked.training.objective for asked in made.cells}:
            cells = [asked for asked in made.cells if asked.training.objective == training]
            totals = {configure.total_epochs(configure.build_config(asked)) for asked in cells}
            assert len(cells) > 2
            assert len(totals) == 1, (preset, data, training, totals)


@pytest.mark.parametrize("preset", ["smoke", "quick", "gpu", "paper"])
def test_every_configuration_of_a_preset_can_be_built(preset: str) -> None:
    for asked in {(c.pruning, c.training): c for c in plan("arena", preset, Selection()).cells}.values():
        config = configure.build_config(asked)
        structured = getattr(config, "structured", asked.pruning.method == "usn")
        assert (configure.match(asked) is not None) == bool(structured), asked.label
