"""The rows of the CAR paper's tables, and what they need of the trainings: PGD and TRADES in the L2 ball."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from method_toys import FAST, images, residual
from torch import nn

import certify
from methods.car import CAR, CARConfig, Row, Variant, preset
from methods.car.presets import RADII
from methods.dense import Dense
from methods.hydra import HYDRA
from methods.magnitude import Magnitude
from methods.training import FGSM, PGD, TRADES, CrossEntropy, Natural, Progress
from methods.training.eps import Linear

END = Progress(1, 1)


# --- the L2 ball ------------------------------------------------------------
def linear(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(36, 2)).double()


def grey(seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = 0.4 + 0.2 * torch.rand(5, 1, 6, 6, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 2, (5,), generator=generator)


@pytest.mark.parametrize("clean", [0.0, 1.0, 0.5])
def test_on_a_linear_network_l2_pgd_is_exact(clean):
    """The worst image of the ball is the one along the difference of the two rows."""
    model, (x, y) = linear(), grey()
    row = model[1].weight[1 - y] - model[1].weight[y]
    worst = x + 0.3 * (row / row.norm(dim=1, keepdim=True)).reshape(x.shape)
    robust, natural = F.cross_entropy(model(worst), y), F.cross_entropy(model(x), y)
    loss, metrics = PGD(0.3, "L2", steps=40, clean=clean).loss(model, x, y, CrossEntropy(), END)
    assert float(metrics["robust"]) == pytest.approx(float(robust.detach()), rel=1e-3)
    assert float(loss.detach()) == pytest.approx(float((robust + clean * natural).detach()), rel=1e-3)
    assert ("natural" in metrics) == (clean > 0)


@pytest.mark.parametrize(
    "objective", [PGD(0.5, "L2"), TRADES(0.5, "L2"), FGSM(0.5, "L2", grad_align=0.0)], ids=lambda o: o.name
)
def test_l2_examples_stay_in_the_ball_and_in_the_image(objective):
    model, (x, y) = residual(), images()[0]
    seen: list[torch.Tensor] = []
    model.register_forward_pre_hook(lambda m, args: seen.append(args[0].detach()))
    objective.loss(model.train(), x, y, CrossEntropy(), END)
    moved = [(batch - x).flatten(1).norm(dim=1) for batch in seen]
    assert float(torch.stack(moved).max()) <= 0.5 * (1 + 1e-5)
    assert float(torch.stack(moved).max(0).values.min()) > 0.4
    assert all(0 <= float(batch.min()) <= float(batch.max()) <= 1 for batch in seen)
    found = objective.validate(model.eval(), images(), CrossEntropy(), END)
    assert found["score"] == found["attacked"] <= found["clean"]


def test_the_radius_can_ramp():
    objective = PGD(2.0, "L2", schedule=Linear(0.0, 1.0))
    assert objective.radius(Progress(1, 4)) == pytest.approx(0.5)
    assert objective.settled().radius(Progress(0, 4)) == 2.0


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: PGD(-1.0, "L2"), "eps"),
        (lambda: PGD(1.0, "L3"), "perturbation"),
        (lambda: PGD(1.0, "L2", clean=-1.0), "clean"),
        (lambda: FGSM(1.0, "L2"), "grad_align=0"),
    ],
)
def test_bad_trainings_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


# --- the rows ------------------------------------------------------------
@pytest.mark.parametrize("ratio", [0.5, 0.7])
def test_rows_are_what_the_paper_says(ratio):
    rows = {row: preset(row, ratio, RADII["flowers102"]) for row in get_args(Row)}
    kinds = {
        "vanilla": Dense,
        "advtrain": Dense,
        "lmp": Magnitude,
        "advtrain+lmp": Magnitude,
        "hydra": HYDRA,
        "car": CAR,
    }
    for row, method in rows.items():
        config = method.config
        assert isinstance(method, kinds[row])
        assert (config.epochs, config.training.optimizer, config.training.lr) == (50, "sgd", 0.01)
        assert config.ratio == (0.0 if row in ("vanilla", "advtrain") else ratio)
        assert config.layers == ("conv", "linear")
        if kinds[row] is not Dense:
            assert (config.finetune_epochs, config.finetuning.lr) == (50, pytest.approx(0.001))
            assert config.scope == "layer"
    for row in ("advtrain", "advtrain+lmp"):
        assert rows[row].config.training.objective == PGD(2.0, "L2", clean=1.0)
    assert rows["hydra"].config.training.objective == TRADES(2.0, "L2")
    assert rows["hydra"].config.finetuning.objective == TRADES(2.0, "L2")
    assert (rows["hydra"].config.rounds, rows["hydra"].config.total_epochs) == (1, 120)
    for row in ("vanilla", "lmp", "car"):
        assert rows[row].config.training.objective == Natural()
    assert rows["car"].config == CARConfig(ratio=ratio)


@pytest.mark.parametrize(
    ("variant", "field", "value"),
    [
        ("no_stab", "lambda_stab", 0.0), ("no_ratio", "lambda_ratio", 0.0), ("no_consis", "lambda_consis", 0.0),
        ("mse_consis", "consistency", "mse"), ("no_l1", "lambda_l1", 0.0), ("init=random", "init", "random"),
        ("tau=40", "tau", 0.4), ("tau=0(full-scaled)", "init", "full"), ("delta=0", "delta", 0.0),
        ("delta=0.8", "delta", 0.8), ("eta=inf", "eta", math.inf), ("eta=0.95", "eta", 0.95), ("ce", "lambda_ce", 1.0),
    ],
)  # fmt: skip
def test_a_variant_changes_one_field(variant, field, value):
    changed, full = preset("car", variant=variant).config, preset("car").config
    differing = {name for name in vars(full) if getattr(changed, name) != getattr(full, name)}
    assert differing == {field}
    assert getattr(changed, field) == value


def test_every_variant_is_a_configuration():
    assert {preset("car", variant=v).config for v in ("full", "tau=30", "delta=0.5", "eta=1.0")} == {CARConfig()}
    assert len({preset("car", variant=v).config for v in get_args(Variant)}) == len(get_args(Variant)) - 3


@pytest.mark.parametrize("row", get_args(Row))
def test_every_row_trains(row):
    method = preset(
        row, 0.5, 0.5, epochs=1, mask_epochs=1, finetune_epochs=1, search_epochs=1, transform=certify.Brightness(0.1)
    )
    outcome = method.fit(residual(), images())
    assert outcome.mask.density == (1.0 if row in ("vanilla", "advtrain") else pytest.approx(0.5, abs=0.01))
    assert all(math.isfinite(value) for r in outcome.history.records for value in r.metrics.values())


def test_bad_rows_are_refused():
    with pytest.raises(ValueError, match=r"unknown row 'advtrain\+lpm'; did you mean advtrain\+lmp"):
        preset("advtrain+lpm")
    with pytest.raises(ValueError, match="did you mean tau=10 or"):
        preset("car", variant="tau=1")
    with pytest.raises(ValueError, match="variants are those of row 'car'"):
        preset("lmp", variant="no_l1")


def test_fine_tuning_settings_can_be_given():
    assert CARConfig(finetune=FAST).finetuning == FAST
