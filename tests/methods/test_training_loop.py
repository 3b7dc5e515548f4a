"""The training loop: learning, selection, exact resume, divergence, schedules."""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch
from method_toys import FAST, Shuffled, images, mlp, points, residual, same_state
from torch import nn

from methods import masks
from methods.masks import Mask
from methods.training import (
    Checkpoint,
    CheckpointError,
    CrossEntropy,
    EpochRecord,
    History,
    KeypointEuclidean,
    KeypointMSE,
    Natural,
    Objective,
    Progress,
    TrainingConfig,
    TrainingDiverged,
    resolve,
    train,
)


class Killed(Exception):
    """Stands for a kill."""


def kill_after(epochs: int):
    def callback(model: nn.Module, record: EpochRecord) -> None:
        if record.epoch + 1 == epochs:
            raise Killed

    return callback


# --- learning ------------------------------------------------------------
@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_learns_a_separable_problem(optimizer):
    model, batches = mlp(), Shuffled(*points())
    config = TrainingConfig(optimizer=optimizer, lr=0.1 if optimizer == "sgd" else 0.02, warmup_epochs=1)
    history = train(model, batches, Natural(), config, epochs=12, val=[points(64, 1)])
    x, y = points(200, 2)
    assert not model.training
    assert (model(x).argmax(1) == y).float().mean() > 0.95
    losses = [record.metrics["loss"] for record in history.records]
    assert losses[-1] < 0.5 * losses[0]
    assert history.selected().validation["score"] == max(r.validation["score"] for r in history.records)
    assert batches.told == list(range(12))


def test_learns_keypoints():
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(128, 2, generator=generator)
    y = torch.stack([10 * x[:, 0], 10 * x[:, 1], 5 * x.sum(1), 5 - 5 * x[:, 0]], 1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, 4))
    history = train(model, Shuffled(x, y), Natural(), FAST, epochs=40, val=[(x, y)])
    assert isinstance(resolve(None, y), KeypointMSE)
    error = (model(x).detach() - y).reshape(-1, 2, 2).norm(dim=2).mean()
    assert error < 0.4
    assert history.selected().validation["score"] == pytest.approx(-float(error), abs=1e-4)


def test_training_means_are_those_of_the_data():
    """One epoch at a vanishing rate: the metrics are the plain averages over all images, uneven batches included."""
    x, y = points(50)
    model = mlp().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.momentum = 0.0
            module.train = lambda mode=True, module=module: module  # stays in eval mode
    expected = nn.functional.cross_entropy(model(x).detach(), y)
    history = train(model, Shuffled(x, y, 32), Natural(), TrainingConfig(lr=1e-12), epochs=1)
    assert history.records[0].metrics["loss"] == pytest.approx(float(expected), rel=1e-5)
    assert history.records[0].metrics["score"] == pytest.approx(float((model(x).argmax(1) == y).float().mean()))


def test_the_best_validation_weights_come_back():
    """A rising learning rate ruins the network after a good start; the state of the best epoch must be restored."""
    states: dict[int, nn.Module] = {}
    model = mlp()
    config = TrainingConfig(optimizer="sgd", lr=30.0, momentum=0.0, schedule="constant", warmup_epochs=200)
    history = train(
        model, Shuffled(*points()), Natural(), config, epochs=16, val=[points(64, 1)],
        callbacks=[lambda net, record: states.update({record.epoch: copy.deepcopy(net)})],
    )  # fmt: skip
    best = max(history.records, key=lambda record: (record.validation["score"], -record.epoch))
    assert history.selected() == best
    assert same_state(model, states[best.epoch])
    assert not same_state(model, states[15]) or best.epoch == 15


def test_only_late_epochs_are_eligible_when_asked():
    config = dataclasses.replace(FAST, select_after=0.5)
    history = train(mlp(), Shuffled(*points()), Natural(), config, epochs=6, val=[points(64, 1)])
    assert [record.best for record in history.records[:3]] == [False] * 3
    assert history.records[3].best


def test_a_mask_holds_throughout():
    model = mlp()
    weights = dict(model.named_parameters())
    mask = Mask.from_scores({n: weights[n].detach().abs() for n in masks.prunable(model)}, 0.7)
    config = dataclasses.replace(FAST, optimizer="adamw", weight_decay=0.1)
    train(model, Shuffled(*points()), Natural(), config, epochs=5, mask=mask, val=[points(64, 1)])
    for name in mask:
        assert (weights[name][~mask[name]] == 0).all()
        assert (weights[name][mask[name]] != 0).all()


# --- reproducibility and resume ------------------------------------------------------------
def test_the_same_seed_gives_the_same_numbers_and_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    results = []
    for seed in (3, 3, 4):
        model = mlp(dropout=0.5)
        results.append((train(model, Shuffled(*points()), Natural(), FAST, epochs=3, seed=seed), model))
    assert results[0][0] == results[1][0]
    assert same_state(results[0][1], results[1][1])
    assert not same_state(results[0][1], results[2][1])
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("killed_after", [1, 3, 5])
def test_resuming_gives_exactly_the_uninterrupted_numbers(tmp_path, optimizer, killed_after):
    loader = torch.utils.data.DataLoader(  # its order comes from the global generator
        torch.utils.data.TensorDataset(*points()), batch_size=32, shuffle=True
    )
    config = TrainingConfig(optimizer=optimizer, lr=0.02, weight_decay=1e-3, warmup_epochs=1, clip_grad_norm=1.0)

    def run(model: nn.Module, **options: object) -> History:
        return train(model, loader, Natural(), config, epochs=6, val=[points(64, 1)], seed=5, **options)

    whole = mlp(dropout=0.3)
    expected = run(whole)
    broken = mlp(dropout=0.3)
    where = Checkpoint(tmp_path, seconds=0.0)
    with pytest.raises(Killed):
        run(broken, checkpoint=where, callbacks=[kill_after(killed_after)])
    resumed = mlp(dropout=0.3)
    epochs_run: list[int] = []
    history = run(resumed, checkpoint=where, callbacks=[lambda _, record: epochs_run.append(record.epoch)])
    assert epochs_run[0] == max(0, killed_after - 1)  # the callback fires before the epoch is written
    assert history == expected
    assert same_state(resumed, whole)
    again = mlp(dropout=0.3)
    assert run(again, checkpoint=where) == expected
    assert same_state(again, whole)


def test_checkpoints_of_other_runs_and_damaged_ones_are_refused(tmp_path):
    def run(seed: int = 0, initial: int = 0, config: TrainingConfig = FAST, where: str = "a") -> History:
        return train(
            mlp(initial), Shuffled(*points()), Natural(), config, epochs=2, seed=seed, checkpoint=tmp_path / where
        )

    run()
    for other in ({"seed": 1}, {"initial": 1}, {"config": dataclasses.replace(FAST, lr=0.5)}):
        with pytest.raises(CheckpointError, match="other settings"):
            run(**other)
    path = tmp_path / "a" / "train.ckpt"
    data = path.read_bytes()
    for damaged in (data[:-100], data[:-1] + bytes([data[-1] ^ 1]), b"", b"nonsense"):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="delete it"):
            run()
    assert [p.name for p in path.parent.iterdir()] == ["train.ckpt"]


def test_a_failing_write_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    where = Checkpoint(tmp_path)
    where.save({"identity": "x", "value": torch.arange(3)})

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        where.save({"identity": "x", "value": torch.zeros(3)})
    assert torch.equal(where.load("x")["value"], torch.arange(3))
    assert [p.name for p in tmp_path.iterdir()] == ["train.ckpt"]


# --- failure ------------------------------------------------------------
def test_divergence_stops_with_epoch_and_reason():
    config = TrainingConfig(optimizer="sgd", lr=1e30, momentum=0.0, schedule="constant")
    with pytest.raises(TrainingDiverged, match=r"diverged in epoch 0: .* not finite .*lower lr") as caught:
        train(mlp(), Shuffled(*points()), Natural(), config, epochs=3)
    assert caught.value.epoch == 0


def test_a_nan_loss_names_its_first_step():
    def loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return outputs.square().mean() * (float("nan") if len(calls) == 11 else 1.0)

    calls: list[int] = []  # two a step, for the loss and for the score; four steps an epoch
    with pytest.raises(TrainingDiverged, match="epoch 1: the loss of step 1"):
        train(mlp(), Shuffled(*points()), Natural(), FAST, epochs=3, loss=loss)


@pytest.mark.parametrize(
    ("batches", "error", "words"),
    [
        (iter([points(4)]), TypeError, "re-iterable"),
        ([], ValueError, "empty"),
        ([points(4)[0]], TypeError, "pair"),
        ([(points(4)[0].byte(), points(4)[1])], ValueError, "divide uint8"),
        ([(points(4)[0], points(3)[1])], ValueError, "4 images but 3 targets"),
        ([(points(4)[0] / 0, points(4)[1])], ValueError, "NaN or infinity"),
        ([(points(4)[0], points(4)[1] + 7)], ValueError, "labels span .* 2 outputs"),
        ([(points(4)[0], torch.zeros(4, 6))], ValueError, "targets have shape"),
        ([(points(4)[0], torch.zeros(4, 3))], ValueError, "no default loss"),
    ],
)
def test_bad_batches_are_refused_before_training(batches, error, words):
    with pytest.raises(error, match=words):
        train(mlp(), batches, Natural(), FAST, epochs=1)


# --- parts ------------------------------------------------------------
def test_schedules_follow_their_closed_forms():
    def rates(config: TrainingConfig, epochs: int = 10, steps: int = 4) -> list[float]:
        return [config.factor(Progress(e, epochs, s, steps)) for e in range(epochs) for s in range(steps)]

    step = rates(TrainingConfig(schedule="step", milestones=(0.7, 0.9), gamma=0.1))
    assert step[: 7 * 4] == [1.0] * 28
    assert step[28:36] == [0.1] * 8
    assert step[36:] == pytest.approx([0.01] * 4)
    cosine = rates(TrainingConfig(schedule="cosine", warmup_epochs=2))
    assert cosine[:8] == pytest.approx([(i + 1) / 8 for i in range(8)])
    assert cosine[8:] == pytest.approx([0.5 * (1 + math.cos(math.pi * i / 32)) for i in range(32)])
    assert set(rates(TrainingConfig(schedule="constant"))) == {1.0}


def test_lr_scale_slows_the_layers_it_names():
    model = mlp()
    before = copy.deepcopy(model.state_dict())
    config = TrainingConfig(optimizer="sgd", lr=0.1, lr_scale=(("4.*", 0.0),), schedule="constant")
    train(model, Shuffled(*points()), Natural(), config, epochs=1)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if name.endswith(("weight", "bias")) and not name.startswith("4.")}


@pytest.mark.parametrize(
    "bad",
    [{"lr": 0.0}, {"lr": float("nan")}, {"optimizer": "lion"}, {"schedule": "linear"}, {"milestones": (140,)},
     {"clip_grad_norm": 0.0}, {"select_after": 1.0}, {"weight_decay": -1.0}],
)  # fmt: skip
def test_bad_settings_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        TrainingConfig(**bad)


def test_keypoint_losses_against_numpy():
    numpy = pytest.importorskip("numpy")
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(5, 6, generator=generator), torch.randn(5, 6, generator=generator)
    distances = numpy.linalg.norm((a - b).numpy().reshape(5, 3, 2), axis=2)
    assert float(KeypointEuclidean()(a, b)) == pytest.approx(distances.mean(), rel=1e-5)
    assert float(KeypointMSE()(a, b)) == pytest.approx(float(((a - b).numpy() ** 2).mean()), rel=1e-5)
    for loss in (KeypointEuclidean(), KeypointMSE()):
        assert float(loss.score(a, b)) == pytest.approx(-distances.mean(1).sum(), rel=1e-5)
    exact = a.clone().requires_grad_()
    KeypointEuclidean()(exact, a).backward()
    assert torch.isfinite(exact.grad).all()


def test_history_round_trip_and_phases():
    history = train(mlp(), Shuffled(*points()), Natural(), FAST, epochs=2, phase="a")
    history += train(mlp(), Shuffled(*points()), Natural(), FAST, epochs=3, phase="b")
    assert history.phases == ("a", "b")
    assert (history.epochs, len(history.phase("b"))) == (5, 3)
    assert History.from_dicts(history.to_dicts()) == history
    assert history.selected("a").epoch == 1
    assert isinstance(Natural(), Objective)
    assert CrossEntropy(0.1) != CrossEntropy()
    assert train(mlp(), [], Natural(), FAST, epochs=0) == History()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_mixed_precision_and_channels_last_on_cuda(tmp_path):
    batches = images(48)
    config = dataclasses.replace(FAST, amp=True, channels_last=True)
    model = residual()
    where = Checkpoint(tmp_path, seconds=0.0)
    history = train(model, batches, Natural(), config, epochs=15, val=images(24, 1), device="cuda", checkpoint=where)
    assert next(model.parameters()).is_cuda
    assert all(p.is_contiguous() and p.dtype == torch.float32 for p in model.parameters())
    assert history.selected().validation["score"] > 0.9
    again = residual()
    assert train(
        again, batches, Natural(), config, epochs=15, val=images(24, 1), device="cuda", checkpoint=where
    ) == history  # fmt: skip
    assert same_state(again, model)
