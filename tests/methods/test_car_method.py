"""CAR as a method: the loss of the mask stage, its three stages, resume, every network of the zoo, what it refuses."""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from method_toys import FAST, images, mlp, residual, same_state
from test_no_host_sync import NoReading
from torch import Tensor, nn

import certify
import methods
import models
from methods import masks
from methods.car import CAR, CARConfig, PairedBatches, initial_values, margin_ratio, recalibrate
from methods.car.objective import CARObjective, edit, global_generator
from methods.car.softmask import SoftMasked, binarise
from methods.training import IBP, Checkpoint, CrossEntropy, EpochRecord, Progress, TrainingConfig
from methods.training.losses import KeypointMSE

QUICK = CARConfig(
    epochs=2, mask_epochs=3, finetune_epochs=2, training=FAST, mask_training=FAST, transform=certify.Brightness(0.2)
)
ONCE = Progress(0, 1)


def quick(**changes: object) -> CARConfig:
    return dataclasses.replace(QUICK, **changes)


def dataset(n: int = 24, q: int = 10) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, y = (torch.cat(part) for part in zip(*images(n)))
    source = torch.arange(n)[::2][:q]
    return x, y, (0.7 * x[source] + 0.2).clamp(0, 1), source


def paired(n: int = 24, q: int = 10, size: int = 8) -> PairedBatches:
    return PairedBatches(*dataset(n, q), size)


class Killed(Exception):
    """Stands for a kill."""


# --- the loss of the mask stage ------------------------------------------------------------
def masked(config: CARConfig, model: nn.Module | None = None) -> SoftMasked:
    model = residual() if model is None else model
    names = masks.prunable(model)
    return SoftMasked(copy.deepcopy(model), initial_values(model, names, config.init, config.tau), config.affine)


def still(**changes: object) -> CARConfig:
    """Settings whose passes can be repeated by hand: normalisation by running statistics, no noise unless asked for."""
    return quick(**{"statistics": "running", "transform": None, "delta": 0.0} | changes)


def test_the_loss_is_the_sum_of_the_papers_terms():
    config = still(
        delta=0.3, lambda_stab=0.7, lambda_ratio=0.3, lambda_consis=2.0, lambda_l1=0.5, lambda_ce=0.25, margin_eps=0.05
    )
    net = masked(config).train()
    x, y = next(iter(paired().pairs()))
    edits = y[:, 1] >= 0
    assert 0 < int(edits.sum()) < len(x)
    torch.manual_seed(1)
    total, metrics = CARObjective(config).loss(net, x, y, CrossEntropy(), ONCE)
    torch.manual_seed(1)
    net.eval()
    first = net(x, net.noisy(0.3))
    second = net(x, net.noisy(0.3))
    hard = net(x, binary := {n: k.float() for n, k in binarise(net.soft(), 0.5, weights=net.weights()).items()})
    p, q, h = first.softmax(1), second.softmax(1), hard.softmax(1)
    own = ~edits
    terms = {
        "stab": (p - q).square().sum(1)[own].mean(),
        "ratio": margin_ratio(p[y[edits, 1]], p[edits], eps=0.05).mean(),
        "consis": (p * (p.log() - h.log())).sum(1)[own].mean(),
        "l1": torch.cat([v.flatten() for v in net.values]).abs().mean(),
        "task": F.cross_entropy(first, y[:, 0]),
    }
    weights = {"stab": 0.7, "ratio": 0.3, "consis": 2.0, "l1": 0.5, "task": 0.25}
    for name, value in terms.items():
        torch.testing.assert_close(metrics[name], value.detach(), rtol=1e-5, atol=1e-6)
        assert float(value.detach()) > 1e-4
    torch.testing.assert_close(total, sum(weights[n] * v for n, v in terms.items()), rtol=1e-5, atol=1e-6)
    assert float(metrics["pairs"]) == pytest.approx(int(edits.sum()) / len(x))
    assert set(binary) == set(net.names)


def test_readings_of_the_pairs():
    """Edits under the image's own draw of the mask, or under the other one."""
    x, y = next(iter(paired().pairs()))
    edits, of = y[:, 1] >= 0, y[y[:, 1] >= 0, 1]
    for pair_mask in ("same", "independent"):
        config = still(delta=0.4, pair_mask=pair_mask, lambda_stab=0.0, lambda_consis=0.0, lambda_l1=0.0)
        net = masked(config)
        torch.manual_seed(1)
        total, _ = CARObjective(config).loss(net.train(), x, y, CrossEntropy(), ONCE)
        torch.manual_seed(1)
        net.eval()
        p, q = (net(x, net.noisy(0.4)).softmax(1) for _ in range(2))
        torch.testing.assert_close(total, margin_ratio(p[of], (p if pair_mask == "same" else q)[edits]).mean())


def test_a_function_draws_from_the_global_generator_of_the_images_device(monkeypatch):
    config = quick(transform=lambda x, generator: torch.rand(x.shape, generator=generator, device=x.device))
    x = images()[0][0]
    torch.manual_seed(3)
    drawn = edit(config, x)
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(x.shape))
    monkeypatch.setattr(torch.cuda, "default_generators", ("the first", "the second"))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    found = [global_generator(torch.device(kind)) for kind in ("cpu", "cuda", "cuda:1")]
    assert found == [torch.default_generator, "the first", "the second"]


def test_a_transform_edits_every_image():
    config = still(transform=certify.Brightness(0.3), lambda_stab=0.0, lambda_consis=0.0, lambda_l1=0.0)
    net, (x, y) = masked(config).train(), images()[0]
    torch.manual_seed(5)
    total, metrics = CARObjective(config).loss(net, x, y, CrossEntropy(), ONCE)
    torch.manual_seed(5)
    net.eval()
    p, q = (net(part).softmax(1) for part in (x, config.transform.sample(x, 1)[0]))
    torch.testing.assert_close(total, margin_ratio(p, q).mean())
    assert float(metrics["pairs"]) == 0.5


def test_a_function_can_be_the_transform():
    def dim(batch: Tensor, generator: torch.Generator) -> Tensor:
        return batch * torch.rand(len(batch), 1, 1, 1, generator=generator)

    one, two = (CAR(quick(transform=dim)).fit(residual(), images(), seed=s) for s in (1, 1))
    assert same_state(one.model, two.model)
    assert one.history.phase("mask").records[-1].metrics["pairs"] == 0.5


@pytest.mark.parametrize(
    ("changes", "passes"), [({}, 3), ({"lambda_stab": 0.0}, 2), ({"lambda_stab": 0.0, "pair_mask": "independent"}, 3)]
)
def test_passes_over_a_batch(changes, passes):
    config, seen = quick(**changes), []
    net = masked(config).train()
    net.network.stem[0].register_forward_hook(lambda m, a, out: seen.append(len(out)))
    CARObjective(config).loss(net, *images()[0], CrossEntropy(), ONCE)
    assert seen == [16] * passes  # 8 images and their edits


@pytest.mark.parametrize("term", ["lambda_stab", "lambda_ratio", "lambda_consis", "lambda_l1", "lambda_ce"])
def test_every_term_trains_the_masks_and_nothing_else(term):
    off = {f"lambda_{name}": 0.0 for name in ("stab", "ratio", "consis", "l1", "ce")}
    config = quick(**off | {term: 1.0}, hinge="softplus")
    net = masked(config).train()
    total, _ = CARObjective(config).loss(net, *images()[0], CrossEntropy(), ONCE)
    total.backward()
    assert all(float(value.grad.abs().max()) > 0 for value in net.values)
    assert all(p.grad is None for p in net.network.parameters())


def test_the_task_loss_under_the_binary_mask():
    config = still(lambda_stab=0.0, lambda_ratio=0.0, lambda_consis=0.0, lambda_l1=0.0, lambda_ce=1.0, ce_on="hard")
    net, (x, y) = masked(config).train(), images()[0]
    total, _ = CARObjective(config).loss(net, x, y, CrossEntropy(), ONCE)
    net.eval()
    torch.testing.assert_close(total, F.cross_entropy(net(x, net.hard(0.5)), y))
    total.backward()
    assert all(float(value.grad.abs().max()) > 0 for value in net.values)


def test_running_statistics_are_those_of_the_binary_mask():
    config = quick(delta=0.5, transform=None, lambda_ratio=0.0)
    net, (x, y) = masked(config).train(), images()[0]
    alone = copy.deepcopy(net)
    CARObjective(config).loss(net, x, y, CrossEntropy(), ONCE)
    with torch.no_grad():
        alone.network.drop.eval()
        alone(x, alone.hard(config.ratio))
    for one, other in zip(net.buffers(), alone.buffers(), strict=True):
        torch.testing.assert_close(one, other)
    assert net.network.drop.training  # dropout is off in the pass only
    fixed = masked(dataclasses.replace(config, statistics="running")).train()
    before = [buffer.clone() for buffer in fixed.buffers()]
    CARObjective(dataclasses.replace(config, statistics="running")).loss(fixed, x, y, CrossEntropy(), ONCE)
    assert all(torch.equal(a, b) for a, b in zip(before, fixed.buffers()))
    assert fixed.network.stem[1].training


def test_without_noise_and_dropout_predictions_are_stable():
    net, (x, y) = masked(QUICK).train(), images()[0]
    for changes, stable in (({"delta": 0.0}, True), ({"delta": 0.0, "dropout": True}, False), ({}, False)):
        _, metrics = CARObjective(quick(**changes)).loss(net, x, y, CrossEntropy(), ONCE)
        assert (float(metrics["stab"]) < 1e-12) == stable


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_a_step_reads_no_value_on_the_host(scope, pairs):
    config = quick(scope=scope, lambda_ce=1.0, noise="layer", transform=None if pairs else QUICK.transform)
    net = masked(config).train()
    x, y = next(iter(paired().pairs())) if pairs else images()[0]
    with NoReading():
        loss, _ = CARObjective(config).loss(net, x, y, CrossEntropy(), ONCE)
        loss.backward()


# --- recalibration ------------------------------------------------------------
def test_recalibrated_statistics_are_the_means_over_all_images():
    model, batches = residual(), [images()[0], tuple(part[:5] for part in images()[1])]
    momentum = model.stem[1].momentum
    before = copy.deepcopy(model)
    recalibrate(model, batches)
    outputs = [model.stem[0](x) for x, _ in batches]
    mean = torch.cat(outputs).mean((0, 2, 3))
    variance = (8 * outputs[0].var((0, 2, 3)) + 5 * outputs[1].var((0, 2, 3))) / 13
    torch.testing.assert_close(model.stem[1].running_mean, mean)
    torch.testing.assert_close(model.stem[1].running_var, variance)
    assert model.stem[1].momentum == momentum
    assert not any(m.training for m in model.modules())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters()))
    assert not torch.equal(model.branch[1].running_mean, before.branch[1].running_mean)
    plain = nn.Sequential(nn.Flatten(), nn.Linear(36, 3))
    assert recalibrate(plain, []) is plain
    with pytest.raises(ValueError, match="batches are empty"):
        recalibrate(before, [])
    assert same_state(before, residual())


# --- three stages ------------------------------------------------------------
@pytest.mark.parametrize("ratio", [0.5, 0.7])
def test_three_stages_and_an_exact_ratio(ratio):
    config = quick(ratio=ratio, transform=None)
    model = residual()
    before = copy.deepcopy(model)
    pretrained: list[dict[str, Tensor]] = []

    def watch(network: nn.Module, record: EpochRecord) -> None:
        if isinstance(network, SoftMasked):
            pretrained.append({name: weight.clone() for name, weight in network.weights().items()})

    outcome = CAR(config).fit(model, paired(), val=images(8, 1), seed=3, callbacks=[watch])
    assert same_state(model, before)
    assert [(phase, len(outcome.history.phase(phase))) for phase in outcome.history.phases] == [
        ("train", 2), ("mask", 3), ("finetune", 2)
    ]  # fmt: skip
    assert outcome.history.epochs == config.total_epochs == 7
    weights = dict(outcome.model.named_parameters())
    for name, kept in outcome.mask.items():
        assert int(kept.sum()) == kept.numel() - round(ratio * kept.numel())
        assert bool((weights[name][~kept] == 0).all())
        assert outcome.soft[name].shape == kept.shape
        assert float(outcome.soft[name].min()) >= 0.0
        assert float(outcome.soft[name].max()) <= 1.0
    assert outcome.mask == binarise(outcome.soft, ratio, weights=pretrained[-1])
    assert outcome.mask.density == pytest.approx(1 - ratio, abs=0.01)
    total = sum(p.numel() for p in model.parameters())
    gone = sum(int((~kept).sum()) for kept in outcome.mask.values())
    assert outcome.density_all == pytest.approx(1 - gone / total)
    assert not outcome.model.training
    assert outcome.model.state_dict().keys() == model.state_dict().keys()
    assert all(p.requires_grad for p in outcome.model.parameters())


def test_the_mask_stage_leaves_the_pretrained_weights_alone():
    config = quick(finetune_epochs=0)
    pretrained = CAR(quick(mask_epochs=0, finetune_epochs=0, ratio=0.0, recalibrate=False)).fit(residual(), images())
    outcome = CAR(config).fit(residual(), images())
    kept = {name: outcome.mask[name] for name in outcome.mask}
    for name, weight in outcome.model.named_parameters():
        expected = dict(pretrained.model.named_parameters())[name]
        assert torch.equal(weight, expected * kept[name] if name in kept else expected)
    by_hand = recalibrate(masks.apply(copy.deepcopy(pretrained.model), outcome.mask), images())
    assert same_state(outcome.model, by_hand)
    soft = CAR(quick(finetune_epochs=0, finetune_from="soft")).fit(residual(), images())
    assert soft.mask == outcome.mask
    for name, one in kept.items():
        weight = dict(soft.model.named_parameters())[name]
        torch.testing.assert_close(weight, dict(pretrained.model.named_parameters())[name] * one * soft.soft[name])


def test_without_mask_epochs_it_is_magnitude_pruning():
    outcome = CAR(quick(mask_epochs=0, finetune_epochs=0, tau=0.6)).fit(residual(), images())
    dense = CAR(quick(mask_epochs=0, finetune_epochs=0, ratio=0.0)).fit(residual(), images())
    names = masks.prunable(dense.model)
    weights = {n: p.detach().abs() for n, p in dense.model.named_parameters() if n in names}
    assert outcome.mask == masks.Mask.from_scores(weights, 0.5, "layer")


def test_fine_tuning_holds_the_mask_and_trains_the_rest():
    states: dict[str, list[dict[str, Tensor]]] = {"train": [], "mask": [], "finetune": []}

    def watch(model: nn.Module, record: EpochRecord) -> None:
        state = model.network.state_dict() if isinstance(model, SoftMasked) else model.state_dict()
        states[record.phase].append({name: tensor.clone() for name, tensor in state.items()})

    heavy = TrainingConfig(optimizer="sgd", lr=0.05, momentum=0.9, weight_decay=0.01)
    outcome = CAR(quick(finetune=heavy)).fit(residual(), images(), callbacks=[watch])
    parameters = [name for name, _ in residual().named_parameters()]
    for state in states["mask"]:
        assert all(torch.equal(state[name], states["train"][-1][name]) for name in parameters)
    for state in states["finetune"]:
        for name, kept in outcome.mask.items():
            assert bool((state[name][~kept] == 0).all())
            assert not torch.equal(state[name][kept], states["train"][-1][name][kept])


def test_affine_parameters_can_be_trained_along_and_stay():
    states: list[Tensor] = []

    def watch(model: nn.Module, record: EpochRecord) -> None:
        if record.phase in ("train", "mask"):
            states.append(dict(model.named_modules())["network." * (record.phase == "mask") + "stem.1"].weight.clone())

    outcome = CAR(quick(affine=True, finetune_epochs=0)).fit(residual(), images(), callbacks=[watch])
    assert not torch.equal(states[-1], states[1])
    assert torch.equal(outcome.model.stem[1].weight, states[-1])


def test_accuracy_before_and_after_fine_tuning():
    val = images(24, 1)
    outcome = CAR(quick(finetune_epochs=6, ratio=0.7)).fit(residual(), images(), val=val)
    x, y = (torch.cat(part) for part in zip(*val))
    with torch.no_grad():
        logits = outcome.model(x)
    assert outcome.after["score"] == pytest.approx(float((logits.argmax(1) == y).float().mean()))
    assert outcome.after["loss"] == pytest.approx(float(F.cross_entropy(logits, y)), rel=1e-4)
    assert outcome.after["score"] >= outcome.before["score"]
    one = CAR(quick(finetune_epochs=0)).fit(residual(), images(), val=val)
    assert one.before == one.after


def test_the_mask_stage_ends_with_its_last_epoch_unless_told():
    val = images(8, 1)
    for select in ("last", "best"):
        outcome = CAR(quick(select=select, mask_epochs=5)).fit(residual(), images(), val=val)
        records = outcome.history.phase("mask").records
        if select == "last":
            assert [record.best for record in records] == [False] * 4 + [True]
        else:
            assert records[0].best
        assert set(records[0].validation) == {"score", "loss"}


def test_noise_and_a_margin_are_learnt():
    """The mask stage lowers its own loss: predictions vary less over masks, and the binary mask agrees with them."""
    x, y, edited, source = dataset(48, 48 // 2)
    batches = PairedBatches(x, y, edited, source, 24)
    slow = TrainingConfig(optimizer="adam", lr=0.02)
    config = quick(epochs=15, mask_epochs=25, mask_training=slow, transform=None, hinge="softplus", ratio=0.7)
    history = CAR(config).fit(residual(), batches, seed=1).history.phase("mask").records
    first, last = (
        {k: sum(r.metrics[k] for r in part) / len(part) for k in ("loss", "stab", "consis", "l1")}
        for part in (history[:4], history[-4:])
    )
    assert last["loss"] < 0.8 * first["loss"]
    assert last["consis"] < 0.7 * first["consis"]
    assert last["stab"] < first["stab"]
    assert last["l1"] < first["l1"]


# --- every reading, every network ------------------------------------------------------------
@pytest.mark.parametrize(
    "changes",
    [
        {"init": "full"}, {"init": "random"}, {"tau": 0.1}, {"sign": "signed"}, {"delta": 0.0}, {"noise": "layer"},
        {"project": False}, {"lambda_ce": 1.0}, {"eta": math.inf}, {"eta": 0.95}, {"hinge": "softplus"},
        {"alignment": "sorted"}, {"pair_mask": "independent"}, {"consistency": "mse"}, {"consistency_gradient": "hard"},
        {"l1": "sum"}, {"ties": "drop"}, {"ties": "position"}, {"statistics": "running"}, {"affine": True},
        {"dropout": True}, {"select": "best"}, {"recalibrate": False}, {"finetune_from": "soft"}, {"scope": "global"},
        {"layers": ("conv",)}, {"lambda_consis": 0.0}, {"ce_on": "hard", "lambda_ce": 1.0, "lambda_consis": 0.0},
    ],
    ids=str,
)  # fmt: skip
def test_every_reading_runs(changes):
    config = quick(epochs=1, mask_epochs=1, finetune_epochs=1, transform=None, **changes)
    outcome = CAR(config).fit(residual(), paired(), val=images(8, 1))
    if changes.get("ties") != "drop":
        expected = sum(
            kept.numel() - (round(0.5 * kept.numel()) if config.scope == "layer" else 0)
            for kept in outcome.mask.values()
        )
        total = outcome.mask.total
        assert outcome.mask.kept == (expected if config.scope == "layer" else total - round(0.5 * total))
    assert all(math.isfinite(value) for r in outcome.history.records for value in r.metrics.values())


@pytest.mark.parametrize("name", ["resnet18", "googlenet", "mobilenetv2", "cnn7_nrs"])
def test_every_classifier_of_the_zoo(name):
    model = models.create(name, 4, 3, 32, width=0.125, seed=0)
    x = torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    batches = PairedBatches(x, torch.arange(8) % 4, (0.8 * x[:4]), torch.arange(4), 6)
    config = quick(epochs=0, mask_epochs=1, finetune_epochs=0, transform=None)
    outcome = CAR(config).fit(model, batches)
    record = outcome.history.records[0]
    assert {"stab", "ratio", "consis", "l1"} <= set(record.metrics)
    assert record.metrics["stab"] > 0
    for kept in outcome.mask.values():
        assert int(kept.sum()) == kept.numel() - round(0.5 * kept.numel())
    assert bool(torch.isfinite(outcome.model(x)).all())


def test_networks_without_normalisation():
    outcome = CAR(quick(transform=None)).fit(
        nn.Sequential(nn.Flatten(), nn.Linear(36, 10), nn.ReLU(), nn.Linear(10, 3)), paired()
    )
    assert outcome.mask.kept == 180 + 15


# --- resuming ------------------------------------------------------------
@pytest.mark.parametrize(("kill_at", "pairs"), [(1, True), (3, True), (4, False), (6, True)])
def test_a_killed_fit_goes_on_to_the_same_numbers(kill_at, pairs, tmp_path):
    config = quick(transform=None) if pairs else QUICK
    batches = paired() if pairs else images()
    expected = CAR(config).fit(residual(), batches, val=images(8, 1), seed=1)
    seen: list[EpochRecord] = []

    def killer(_: nn.Module, record: EpochRecord) -> None:
        seen.append(record)
        if len(seen) == kill_at:
            raise Killed

    where = Checkpoint(tmp_path, seconds=0.0)
    with pytest.raises(Killed):
        CAR(config).fit(residual(), batches, val=images(8, 1), seed=1, checkpoint=where, callbacks=[killer])
    resumed = CAR(config).fit(residual(), batches, val=images(8, 1), seed=1, checkpoint=where)
    assert same_state(resumed.model, expected.model)
    assert resumed.mask == expected.mask
    assert resumed.history == expected.history
    assert all(torch.equal(resumed.soft[name], expected.soft[name]) for name in expected.soft)
    assert (resumed.before, resumed.after) == (expected.before, expected.after)


def test_seeds_decide_everything():
    state = torch.get_rng_state()
    one, same, other = (CAR(QUICK).fit(residual(), images(), seed=seed) for seed in (1, 1, 2))
    assert same_state(one.model, same.model)
    assert one.history == same.history
    assert not same_state(one.model, other.model)
    assert torch.equal(state, torch.get_rng_state())


# --- settings and bad input ------------------------------------------------------------
def test_the_defaults_are_the_papers():
    config = CARConfig()
    assert (config.epochs, config.mask_epochs, config.finetune_epochs, config.total_epochs) == (50, 100, 50, 200)
    assert (config.training.optimizer, config.training.lr, config.finetuning.lr) == ("sgd", 0.01, pytest.approx(0.001))
    assert (config.tau, config.delta, config.eta, config.init) == (0.3, 0.5, 1.0, "partial")
    assert (config.scope, config.layers, config.lambda_ce) == ("layer", ("conv", "linear"), 0.0)
    assert methods.get("car") == (CAR, CARConfig)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"structured": True}, "structured must be False"),
        ({"ratio": 1.0}, "ratio"),
        ({"mask_epochs": -1}, "mask_epochs"),
        ({"init": "partly"}, "init must be one of 'partial', 'full', 'random'"),
        ({"hinge": "hard"}, "hinge"),
        ({"consistency": "js"}, "consistency"),
        ({"tau": 1.5}, "tau"),
        ({"delta": -0.1}, "delta"),
        ({"lambda_stab": -1.0}, "lambda_stab"),
        ({"lambda_l1": math.nan}, "lambda_l1"),
        ({"eta": 0.0}, "eta"),
        ({"margin_eps": 0.0}, "margin_eps"),
        ({"transform": "sun"}, "transform"),
        ({"mask_training": dataclasses.replace(FAST, objective=IBP(0.1))}, "objective"),
    ],
)
def test_bad_settings_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        quick(**changes)


def test_settings_of_the_wrong_kind_are_refused():
    with pytest.raises(TypeError, match="mask_epochs must be a whole number"):
        quick(mask_epochs=2.5)
    with pytest.raises(TypeError, match="mask_training must be a TrainingConfig"):
        quick(mask_training="adam")
    with pytest.raises(TypeError, match="CAR takes a CARConfig, got TrainingConfig"):
        CAR(FAST)


def _bytes(batch: Tensor, generator: torch.Generator) -> Tensor:
    return 255 * batch


def _cropped(batch: Tensor, generator: torch.Generator) -> Tensor:
    return batch[..., 1:]


def _not_a_number(batch: Tensor, generator: torch.Generator) -> Tensor:
    return batch * math.nan


@pytest.mark.parametrize(
    ("transform", "words"),
    [
        (_bytes, r"span \[.*expected pixels in \[0, 1\]"),
        (_cropped, r"must give float images \(8, 1, 6, 6\), got torch.float32 \(8, 1, 6, 5\)"),
        (_not_a_number, "span"),
        (lambda batch, generator: None, "got NoneType"),
    ],
)
def test_a_bad_transform_is_refused(transform, words):
    with pytest.raises(ValueError, match=words):
        CAR(quick(transform=transform)).fit(residual(), images())


def test_missing_pairs_are_refused():
    config = quick(transform=None)
    with pytest.raises(ValueError, match=r"bring none: pass methods\.car\.PairedBatches"):
        CAR(config).fit(residual(), images())
    with pytest.raises(ValueError, match="no edited images"):
        CAR(config).fit(residual(), paired(q=0))
    outcome = CAR(quick(transform=None, lambda_ratio=0.0)).fit(residual(), images())
    assert "ratio" not in outcome.history.phase("mask").records[0].metrics


class Wrong:
    """Batches whose pairs are not."""

    def __init__(self, source: list[int], width: int = 2, scale: float = 1.0) -> None:
        self.source, self.width, self.scale = source, width, scale

    def __len__(self) -> int:
        return 1

    def __iter__(self):
        yield images()[0]

    def pairs(self):
        x, y = images()[0]
        targets = torch.stack([y, torch.tensor(self.source), y], 1)[:, : self.width]
        return [(self.scale * x, targets)]


@pytest.mark.parametrize(
    ("batches", "words"),
    [
        (Wrong([-1] * 7 + [8]), "names rows -1 to 8 of 8"),
        (Wrong([-1] * 6 + [0, 6]), "an edit with an edit"),
        (Wrong([-1] * 7 + [0], width=3), "the label and the row"),
        (Wrong([-1] * 7 + [0], scale=255.0), "pixels in"),
    ],
)
def test_bad_pairs_are_refused(batches, words):
    with pytest.raises(ValueError, match=words):
        CAR(quick(transform=None)).fit(residual(), batches)


def test_keypoints_are_refused():
    x, _ = images()[0]
    with pytest.raises(ValueError, match="class probabilities"):
        CAR(QUICK).fit(residual(), [(x, torch.rand(8, 4))])
    with pytest.raises(ValueError, match="class probabilities"):
        CAR(QUICK).fit(residual(), images(), loss=KeypointMSE())


def test_nothing_to_prune_is_refused():
    with pytest.raises(masks.MaskError, match="no layer of kind conv"):
        CAR(quick(layers=("conv",), transform=None, lambda_ratio=0.0)).fit(
            mlp(), [(torch.rand(8, 2), torch.arange(8) % 2)]
        )
