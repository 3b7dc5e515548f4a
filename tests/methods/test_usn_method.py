"""USN: Algorithm 1, its baselines, selection, resume, removal, and what it refuses."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import re
import warnings
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from method_toys import FAST, images, residual, same_state
from torch import Tensor, nn

import certify
from methods import masks
from methods.training import IBP, Checkpoint, CrossEntropy, EpochRecord, KeypointMSE, Progress
from methods.usn import USN, CollapsedPredictor, CollapsedPredictorWarning, Metric, USNConfig, WassersteinTarget
from methods.usn.metrics import LayerMetrics, sites
from methods.usn.objective import USNObjective, spread
from methods.usn.pruner import Pruner
from methods.usn.sampling import draw

BRIGHT = certify.Brightness(0.05)
QUICK = USNConfig(
    ratio=0.5, epochs=5, training=FAST, m=2, metric_fraction=0.5, perturbation=BRIGHT, on_collapse="ignore"
)


def quick(**changes: object) -> USNConfig:
    return dataclasses.replace(QUICK, **changes)


def plain(seed: int = 0) -> nn.Sequential:
    """Two convolutions with 8 and 10 channels, no coupling."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 10, 3), nn.ReLU(inplace=True),
            nn.Flatten(), nn.Linear(160, 3),
        )  # fmt: skip


def dots(n: int = 48, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """8x8 images of two bright dots, and the dots' pixel coordinates."""
    generator = torch.Generator().manual_seed(seed)
    places = torch.randint(1, 7, (n, 2, 2), generator=generator)
    x = 0.2 * torch.rand(n, 1, 8, 8, generator=generator)
    for i, ((a, b), (c, d)) in enumerate(places.tolist()):
        x[i, 0, b, a], x[i, 0, d, c] = 1.0, 0.7
    return list(zip(x.split(16), places.flatten(1).float().split(16)))


class Killed(Exception):
    """Stands for a kill."""


# --- the loss ------------------------------------------------------------
def objective(model: nn.Module, config: USNConfig) -> USNObjective:
    names = masks.prunable(model, ("conv",), structured=True)
    Pruner(model, names, config).attach(model)
    return USNObjective(config, tuple(sites(model, images()[0][0][:1], names).items()))


@pytest.mark.parametrize("fraction", [1.0, 0.5])
@pytest.mark.parametrize("task_on", ["both", "clean", "perturbed"])
@pytest.mark.parametrize("loss_norm", ["mean", "sum", "signal"])
def test_the_loss_is_the_sum_of_the_papers_terms(fraction, task_on, loss_norm):
    """Against one pass a copy, without hooks, in eval mode (so that normalisation treats all passes alike)."""
    config = quick(m=4, metric_fraction=fraction, task_on=task_on, loss_norm=loss_norm, lambda_u=0.3, lambda_s=0.7)
    model = plain().eval()
    x, y = images()[0]
    state = torch.get_rng_state()
    total, metrics = objective(model, config).loss(model, x, y, CrossEntropy(), Progress(0, 5))
    torch.set_rng_state(state)
    some = round(fraction * len(x))
    copies = draw(BRIGHT, x[:some], 4)
    rest = draw(BRIGHT, x[some:], 1, "iid")[0] if some < len(x) and task_on != "clean" else x[:0]
    clean_loss = F.cross_entropy(model(x), y)
    moved_loss = F.cross_entropy(model(torch.cat([copies[0], rest])), y) if task_on != "clean" else clean_loss
    task = {"both": (clean_loss + moved_loss) / 2, "clean": clean_loss, "perturbed": moved_loss}[task_on]
    unbiased = smooth = distance = torch.zeros(())
    for part in (model[:2], model[:4]):
        clean = part(x[:some]).flatten(1)
        change = torch.stack([part(c).flatten(1) - clean for c in copies])
        u, s = change.abs().mean(0).sum(1).mean(), change.square().mean(0).sum(1).mean()
        scale = {"mean": (clean.shape[1],) * 2, "sum": (1, 1)}.get(
            loss_norm, (clean.abs().sum(1).mean().detach(), clean.square().sum(1).mean().detach())
        )
        unbiased, smooth = unbiased + u / scale[0], smooth + s / scale[1]
        layer = LayerMetrics.of(part(x[:some]), torch.stack([part(c) for c in copies]), Metric())
        distance = distance + WassersteinTarget().loss(layer.importance(Metric()), 0.5)
    torch.testing.assert_close(total, task + 0.3 * unbiased + 0.7 * smooth + 10.0 * distance, rtol=1e-4, atol=1e-5)
    for name, value in {"task": task, "unbiased": unbiased, "smooth": smooth, "wasserstein": distance}.items():
        torch.testing.assert_close(metrics[name], value.detach(), rtol=1e-3, atol=1e-5)
    total.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_one_forward_pass_of_the_batch_and_its_copies():
    """The metrics cost the m copies of the sampled images and nothing else."""
    model, x, y = plain(), *images()[0]
    passes: list[int] = []
    for config, expected in (
        (quick(m=4, metric_fraction=1.0), 8 + 4 * 8),
        (quick(m=4, metric_fraction=0.5), 8 + 4 * 4 + 4),
        (quick(m=4, metric_fraction=0.5, task_on="clean"), 8 + 4 * 4),
        (quick(prune="random").task_only(), 8 + 8),
        (quick(prune="magnitude", task_on="clean").task_only(), 8),
        (quick(prune="magnitude", task_on="perturbed").task_only(), 8),
    ):
        net = copy.deepcopy(model)
        found = objective(net, config)
        net[0].register_forward_hook(lambda m, a, out: passes.append(len(out)))
        found.loss(net, x, y, CrossEntropy(), Progress(0, 5))
        assert passes == [expected]
        passes.clear()


def test_the_wasserstein_weight_can_follow_the_schedule():
    config = quick(lambda_w_ramp="progressive", lambda_u=0.0, lambda_s=0.0, epochs=10, prune_steps=4, prune_start=2)
    model, (x, y) = plain().eval(), images()[0]
    found = objective(model, config)
    weights = []
    for epoch in range(10):
        total, metrics = found.loss(model, x, y, CrossEntropy(), Progress(epoch, 10))
        weights.append(float((total.detach() - metrics["task"]) / metrics["wasserstein"]))
    assert weights == pytest.approx([0, 0, 2.5, 5, 7.5, 10, 10, 10, 10, 10], abs=1e-4)


def test_the_target_can_follow_the_schedule():
    config = quick(wasserstein=WassersteinTarget(ratio="current"), epochs=10, prune_steps=5)
    model, (x, y) = plain().eval(), images()[0]
    found, seen = objective(model, config), []
    for epoch in (0, 4):
        torch.manual_seed(0)
        seen.append(float(found.loss(model, x, y, CrossEntropy(), Progress(epoch, 10))[1]["wasserstein"]))
    torch.manual_seed(0)
    final = objective(plain().eval(), quick(epochs=10, prune_steps=5))
    assert seen[1] == pytest.approx(float(final.loss(model, x, y, CrossEntropy(), Progress(0, 10))[1]["wasserstein"]))
    assert seen[0] < seen[1]


# --- Algorithm 1 ------------------------------------------------------------
def trace_masks(config: USNConfig, model: nn.Module | None = None, seed: int = 0) -> tuple[list[masks.Mask], object]:
    """The mask after each epoch, and the outcome."""
    found: list[masks.Mask] = []

    def look(network: nn.Module, record: EpochRecord) -> None:
        mask = Pruner.of(network).mask(network)
        assert all(
            torch.equal(p, masks.apply(copy.deepcopy(network), mask).get_parameter(n))
            for n, p in network.named_parameters()
        )
        found.append(mask)

    return found, USN(config).fit(model or plain(), images(), val=images(8, 1), seed=seed, callbacks=[look])


@pytest.mark.parametrize("prune", ["high", "low", "literal", "random", "magnitude", "snr"])
def test_masks_are_cumulative_and_each_fraction_is_exact(prune):
    config = quick(prune=prune, ratio=0.3, epochs=7, prune_start=1, prune_steps=4)
    found, outcome = trace_masks(config)
    final = 0.7 if prune == "literal" else 0.3
    for epoch, mask in enumerate(found, start=1):
        fraction = min(max(epoch - 1, 0), 4) / 4
        for kept in mask.channels.values():
            assert int((~kept).sum()) == round(final * fraction * len(kept))
    assert all(small.is_subset(large) for large, small in pairwise(found))
    assert outcome.mask == found[-1]
    assert outcome.ratio == pytest.approx((round(final * 8) + round(final * 10)) / 18)
    assert [r.validation["ratio"] for r in outcome.history.records] == pytest.approx(
        [1 - m.channel_density for m in found]
    )
    assert outcome.model.state_dict().keys() == plain().state_dict().keys()


@pytest.mark.parametrize("prune", ["high", "low", "snr", "magnitude"])
def test_the_right_channels_go(prune):
    """With weights that never move, the ranking is that of the network given; the metrics are noise-free enough."""
    still = dataclasses.replace(FAST, lr=1e-30)
    config = quick(
        prune=prune, training=still, epochs=1, ratio=0.25, metric_fraction=1.0, m=16, prune_steps=1, lambda_w=0.0
    )
    model = plain()
    batches = images()
    outcome = USN(config).fit(model, batches, seed=1)
    reference = copy.deepcopy(model).train()
    with torch.no_grad():
        for part, (name, kept) in zip((2, 4), outcome.mask.channels.items()):
            totals = torch.zeros(len(kept))
            for x, _ in batches:
                copies = draw(BRIGHT, x, 64, generator=torch.Generator().manual_seed(0))
                out = reference[:part](torch.cat([x, copies.flatten(0, 1)]))
                clean, change = out[: len(x)], out[len(x) :].unflatten(0, (64, len(x))) - out[: len(x)]
                u, s = change.abs().mean((0, 1, 3, 4)), change.square().mean((0, 1, 3, 4))
                totals += s / clean.square().mean((0, 2, 3)) if prune == "snr" else s / u
            if prune == "magnitude":
                totals = -model.get_parameter(name).detach().abs().mean((1, 2, 3))
            order = totals.argsort(descending=prune != "low")
            gone = round(0.25 * len(kept))
            # Copies differ from those of training: allow a swap at the edge.
            assert not bool(kept[order[: gone - 1]].any())
            assert bool(kept[order[gone + 1 :]].all())


def test_random_pruning_depends_on_the_seed_alone():
    config = quick(prune="random")
    first, again, other = (trace_masks(config, plain(i), seed)[1].mask for i, seed in ((0, 1), (5, 1), (0, 2)))
    assert first == again
    assert first != other


def test_pruning_works_without_validation_and_counts_the_last_epoch():
    outcome = USN(quick(prune_steps=5)).fit(plain(), images())
    assert outcome.ratio == 0.5
    for kept in outcome.mask.channels.values():
        assert int((~kept).sum()) == len(kept) // 2
    assert same_state(outcome.model, masks.apply(copy.deepcopy(outcome.model), outcome.mask))


def test_no_pruning_keeps_everything():
    vanilla = USN(quick(ratio=0.0).task_only()).fit(plain(), images(), val=images(8, 1))
    regularised = USN(quick(ratio=0.0)).fit(plain(), images(), val=images(8, 1))
    assert vanilla.mask.density == regularised.mask.density == 1.0
    assert "wasserstein" in regularised.history.records[0].metrics
    assert "unbiased" not in vanilla.history.records[0].metrics


def test_the_regulariser_makes_neurons_steadier():
    strong = quick(ratio=0.0, lambda_u=20.0, lambda_s=20.0, lambda_w=0.0, epochs=8)
    last = [
        USN(config).fit(plain(), images(), seed=1).history.records[-1].metrics["unbiased"]
        for config in (strong, dataclasses.replace(strong, lambda_u=1e-9, lambda_s=0.0))
    ]
    assert last[0] < 0.5 * last[1]


# --- selection, resume, removal ------------------------------------------------------------
def test_only_epochs_at_the_final_ratio_are_selected():
    config = quick(epochs=6, prune_steps=4)
    records = USN(config).fit(plain(), images(), val=images(8, 1)).history.records
    assert not any(r.best for r in records[:3])
    assert records[3].best
    chosen = min((r for r in records[3:]), key=lambda r: r.validation["loss"])
    assert [r for r in records if r.best][-1] is chosen
    # By the letter any epoch may win, with the masks that belong to it.
    found, outcome = trace_masks(dataclasses.replace(config, select="literal"))
    assert outcome.history.records[0].best
    best = outcome.history.selected()
    assert outcome.mask == found[best.epoch]
    assert outcome.ratio == pytest.approx(best.validation["ratio"])


def test_the_score_is_the_task_loss_on_clean_and_perturbed_images():
    outcome = USN(quick()).fit(plain(), images(), val=(val := images(16, 1)))
    best = outcome.history.selected().validation
    x, y = (torch.cat(part) for part in zip(*val))
    with torch.no_grad():
        assert best["clean"] == pytest.approx(float((outcome.model(x).argmax(1) == y).float().mean()))
        lo, hi = (float(F.cross_entropy(outcome.model(x), y)) * f for f in (0.8, 1.25))
    assert lo < best["loss"] < hi
    assert best["score"] == -best["loss"]
    json.dumps(outcome.history.to_dicts())


@pytest.mark.parametrize("kill_at", [1, 3, 5])
@pytest.mark.parametrize("prune", ["high", "random"])
def test_a_killed_fit_goes_on_to_the_same_numbers(kill_at, prune, tmp_path):
    config = quick(prune=prune)
    expected = USN(config).fit(residual(), images(), val=images(8, 1), seed=1)
    seen: list[EpochRecord] = []

    def killer(_: nn.Module, record: EpochRecord) -> None:
        seen.append(record)
        if len(seen) == kill_at:
            raise Killed

    where = Checkpoint(tmp_path, seconds=0.0)
    with pytest.raises(Killed):
        USN(config).fit(residual(), images(), val=images(8, 1), seed=1, checkpoint=where, callbacks=[killer])
    resumed = USN(config).fit(residual(), images(), val=images(8, 1), seed=1, checkpoint=where)
    assert same_state(resumed.model, expected.model)
    assert resumed.mask == expected.mask
    assert resumed.history == expected.history
    assert resumed.ratio == expected.ratio
    # The finished run comes back from its checkpoint as it was.
    again = USN(config).fit(residual(), images(), val=images(8, 1), seed=1, checkpoint=where)
    assert again.mask == expected.mask
    assert same_state(again.model, expected.model)


def test_residual_and_depthwise_channels_are_removed_physically():
    outcome = USN(quick()).fit(residual(), images(), val=images(8, 1))
    x = images()[0][0]
    small = outcome.compact(x)
    torch.testing.assert_close(small(x), outcome.model(x), rtol=0, atol=1e-5)
    assert small.removal.stayed == {}
    assert small.removal.after == {
        "stem.0.weight": 4, "branch.0.weight": 4, "depthwise.0.weight": 4, "left.weight": 3, "right.weight": 2,
    }  # fmt: skip
    free = USN(quick(coupled=False)).fit(residual(), images())
    assert {name: int(kept.sum()) for name, kept in free.mask.channels.items()} == small.removal.after


def test_what_training_leaves_alone():
    model, state = residual().train(), torch.get_rng_state()
    model.head.requires_grad_(False)
    before = copy.deepcopy(model)
    outcome = USN(QUICK).fit(model, images(), val=images(8, 1), seed=3)
    assert same_state(model, before)
    assert model.training
    assert outcome.model.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(state, torch.get_rng_state())
    assert not outcome.model.training
    assert torch.equal(outcome.model.head.weight, before.head.weight)
    assert not any(p._backward_hooks for p in outcome.model.parameters())
    again, other = (USN(QUICK).fit(model, images(), val=images(8, 1), seed=seed) for seed in (3, 4))
    assert same_state(again.model, outcome.model)
    assert again.history == outcome.history
    assert not same_state(other.model, outcome.model)


# --- tasks ------------------------------------------------------------
def test_keypoints_are_learnt_while_channels_go():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 12, 3, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(12 * 64, 4),
    )  # fmt: skip
    config = quick(epochs=30, ratio=0.25, lambda_w=0.1, on_collapse="raise")
    outcome = USN(config).fit(model, dots(), val=dots(16, 1))
    x, y = (torch.cat(part) for part in zip(*dots()))
    with torch.no_grad():
        error = -float(KeypointMSE().score(outcome.model(x), y)) / len(x)
        mean = -float(KeypointMSE().score(y.mean(0).expand_as(y), y)) / len(x)
    assert error < 0.5 * mean
    assert not outcome.collapsed
    assert outcome.ratio == 0.25


def test_fully_connected_layers_can_be_pruned_too():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 12), nn.ReLU(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3))
    outcome = USN(quick(layers=("linear",))).fit(model, images())
    assert {name: int(kept.sum()) for name, kept in outcome.mask.channels.items()} == {"1.weight": 6, "3.weight": 4}
    assert outcome.compact(images()[0][0])[1].out_features == 6


@pytest.mark.parametrize(
    "config",
    [
        quick(metric=Metric(granularity="neuron")),
        quick(metric=Metric(ratio="squared")),
        quick(metric=Metric(aggregate="mean_of_ratios")),
        quick(metric=Metric(bias="abs_mean"), sampling="iid"),
        quick(sampling="iid", m=3),
        quick(wasserstein=WassersteinTarget(support="index")),
        quick(wasserstein=WassersteinTarget(power="squared", ratio="current")),
        quick(perturbation=certify.BrightnessContrast(0.02, 0.05)),
        quick(perturbation=certify.Linf(0.02)),
        quick(scope="global"),
        quick(loss_norm="signal", prune="snr"),
    ],
    ids=["neuron", "squared", "mean_of_ratios", "abs_mean", "iid", "index", "current", "both", "linf", "global", "snr"],
)
def test_every_reading_trains(config):
    outcome = USN(dataclasses.replace(config, epochs=2)).fit(plain(), images(), val=images(8, 1))
    assert outcome.ratio == 0.5
    assert all(math.isfinite(value) for r in outcome.history.records for value in r.metrics.values())


# --- the constant predictor ------------------------------------------------------------
def dead() -> nn.Sequential:
    model = plain()
    nn.init.zeros_(model[3].weight)
    nn.init.constant_(model[3].bias, -1.0)  # every ReLU off for good
    return model


def test_a_constant_predictor_is_not_silent():
    with pytest.raises(CollapsedPredictor, match=r"after epoch 2 .* nearly the same for every image"):
        USN(quick(on_collapse="raise", ratio=0.0)).fit(dead(), images(), val=images(8, 1))
    with pytest.warns(CollapsedPredictorWarning, match="wide_lr_scale") as caught:
        outcome = USN(quick(on_collapse="warn")).fit(dead(), images())
    assert len([w for w in caught if w.category is CollapsedPredictorWarning]) == 1
    assert outcome.collapsed
    assert outcome.history.records[-1].metrics["spread"] < 1e-6
    with warnings.catch_warnings():
        warnings.simplefilter("error", CollapsedPredictorWarning)
        assert USN(quick(on_collapse="ignore")).fit(dead(), images(), val=images(8, 1)).collapsed


def test_the_spread_is_a_ratio_of_standard_deviations():
    def moments(p: Tensor, t: Tensor) -> list[Tensor]:
        return [v for part in (p, t) for v in (part.double().sum(0), part.double().square().sum(0))]

    targets = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    assert float(spread(moments(0.3 * targets + 7, targets), 50)) == pytest.approx(0.3, rel=1e-5)
    assert float(spread(moments(torch.ones(50, 4), targets), 50)) == 0.0
    assert float(spread(moments(targets, torch.ones(50, 4)), 50)) == 1.0


def test_wide_layers_learn_more_slowly_and_the_outcome_says_so():
    def wide() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(*plain()[:6], nn.Linear(160, 200), nn.Sigmoid(), nn.Linear(200, 3))

    moved: dict[float, float] = {}
    for scale in (1.0, 0.05):
        sgd = dataclasses.replace(FAST, optimizer="sgd", lr=1e-3, momentum=0.0)
        config = quick(wide_inputs=160, wide_lr_scale=scale, training=sgd, epochs=1, ratio=0.0).task_only()
        model = wide()
        outcome = USN(config).fit(model, images()[:1])
        moved[scale] = float((outcome.model[6].weight - model[6].weight).detach().norm())
        assert outcome.notes == (("learning rate x 0.05 on 6 (wide_lr_scale)",) if scale < 1 else ())
    assert moved[0.05] == pytest.approx(0.05 * moved[1.0], rel=1e-3)
    # A pattern of the user's own wins.
    own = dataclasses.replace(sgd, lr_scale=(("6.*", 1.0),))
    outcome = USN(dataclasses.replace(config, training=own)).fit(wide(), images()[:1])
    assert float((outcome.model[6].weight - wide()[6].weight).detach().norm()) == pytest.approx(moved[1.0])


# --- settings ------------------------------------------------------------
def test_the_defaults_are_the_papers():
    config = USNConfig()
    assert (config.epochs, config.training.optimizer, config.training.lr, config.lambda_w) == (200, "adam", 0.01, 10.0)
    assert config.perturbation.describe() == certify.BrightnessContrast(1 / 255, 0.01).describe()
    assert config.layers == ("conv",)
    assert (config.schedule.steps, config.schedule.end) == (160, 160)
    literal = USNConfig(prune_steps=200, select="literal")
    assert literal.schedule(199) == pytest.approx(0.199)
    assert USNConfig(prune="literal", ratio=0.2).removed == pytest.approx(0.8)
    assert not USNConfig(prune="random").task_only().measures
    assert USNConfig(prune="random").measures


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prune": "lowest"}, "prune"),
        ({"ratio": 1.0}, "ratio"),
        ({"ratio": -0.1}, "ratio"),
        ({"epochs": 0}, "epochs"),
        ({"lambda_w": -1.0}, "lambda_w"),
        ({"lambda_u": math.inf}, "lambda_u"),
        ({"m": 3}, "even"),
        ({"m": 0, "sampling": "iid"}, "m must"),
        ({"metric_fraction": 0.0}, "metric_fraction"),
        ({"layers": ("pool",)}, "layers"),
        ({"prune": "literal", "ratio": 0.0}, "literal"),
        ({"metric": Metric(bias="abs_mean")}, "iid"),
        ({"training": dataclasses.replace(FAST, objective=IBP(0.1))}, "objective"),
        ({"prune_steps": 6}, "epoch 6 of 5"),
        ({"prune_interval": 0}, "prune_interval"),
        ({"prune_start": 5}, "epoch 6 of 5"),
        ({"collapse_after": 2.0}, "collapse_after"),
        ({"wide_lr_scale": 0.0}, "wide_lr_scale"),
        ({"wide_inputs": 0}, "wide_inputs"),
        ({"select": "best"}, "select"),
        ({"on_collapse": "cry"}, "on_collapse"),
    ],
)
def test_bad_settings_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        quick(**changes)


def _scaled(x: Tensor) -> Tensor:
    return 255 * x


@pytest.mark.parametrize(
    ("model", "change", "error", "words"),
    [
        (plain, _scaled, ValueError, "span"),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(36, 3)), lambda x: x, ValueError, "no layer of kind conv"),
    ],
    ids=["bytes", "nothing to prune"],
)
def test_bad_input_is_refused(
    model: Callable[[], nn.Module], change: Callable[[Tensor], Tensor], error: type[Exception], words: str
):
    with pytest.raises(error, match=words):
        USN(QUICK).fit(model(), [(change(x), y) for x, y in images()])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"ratio": "a"}, "ratio must be a number, got 'a'"),
        ({"epochs": 2.5}, "epochs must be a whole number, got 2.5"),
        ({"m": "2"}, "m must be a whole number"),
        ({"prune_steps": 1.5}, "prune_steps must be a whole number or None"),
        ({"perturbation": "brightness:0.1"}, "perturbation must be a Perturbation, got 'brightness:0.1'"),
        ({"metric": "x"}, "metric must be a Metric"),
        ({"training": "adam"}, "training must be a TrainingConfig"),
    ],
)
def test_settings_of_a_wrong_type_are_named(wrong, message):
    with pytest.raises(TypeError, match=re.escape(message)):
        USNConfig(**wrong)


def test_a_method_takes_its_own_configuration():
    with pytest.raises(TypeError, match="USN takes a USNConfig, got the class itself; call it"):
        USN(USNConfig)
    with pytest.raises(TypeError, match="USN takes a USNConfig, got dict"):
        USN({"ratio": 0.2})
