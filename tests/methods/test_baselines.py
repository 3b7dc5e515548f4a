"""dense, random, magnitude and imp: protocol, masks, rewinding, resume, learning."""

from __future__ import annotations

import copy
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from method_toys import FAST, Shuffled, images, mlp, points, residual, same_state
from torch import nn

import methods
from methods import masks
from methods.dense import Dense, DenseConfig
from methods.imp import IMP, IMPConfig
from methods.magnitude import Magnitude, MagnitudeConfig
from methods.masks import Mask
from methods.nrs import NRSConfig
from methods.outcome import Outcome
from methods.random import Random, RandomConfig
from methods.snip import SNIPConfig
from methods.taylor import TaylorConfig
from methods.training import IBP, Checkpoint, EpochRecord, Natural, TrainingConfig, train

KINDS = {
    "dense": DenseConfig(epochs=2, training=FAST),
    "random": RandomConfig(ratio=0.5, epochs=1, finetune_epochs=1, training=FAST),
    "magnitude": MagnitudeConfig(ratio=0.5, epochs=1, finetune_epochs=1, training=FAST),
    "imp": IMPConfig(ratio=0.5, epochs=1, rounds=2, training=FAST, layers=("conv", "linear")),
    "nrs": NRSConfig(ratio=0.5, epochs=1, rounds=2, training=FAST, layers=("conv", "linear"), eps=0.01),
    "snip": SNIPConfig(ratio=0.5, epochs=1, rounds=2, training=FAST, layers=("conv", "linear")),
    "taylor": TaylorConfig(ratio=0.5, epochs=1, rounds=2, training=FAST, layers=("conv", "linear")),
}


class Killed(Exception):
    """Stands for a kill."""


# --- what every method keeps to ------------------------------------------------------------
@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("structured", [False, True])
def test_every_method_keeps_the_protocol(name, structured):
    method, config_class = methods.get(name)
    config = KINDS[name]
    assert isinstance(config, config_class)
    config = dataclasses.replace(config, structured=structured, scope="global")
    model, batches = residual().train(), images()
    model.head.requires_grad_(False)
    before, state = copy.deepcopy(model), torch.get_rng_state()
    outcome = method(config).fit(model, batches, val=images(8, 1), seed=3)
    # The input model and the global random state are as before.
    assert same_state(model, before)
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(state, torch.get_rng_state())
    # The outcome is a masked copy that still runs, with its history.
    assert isinstance(outcome, Outcome)
    assert outcome.model is not model
    assert not outcome.model.training
    assert same_state(outcome.model, masks.apply(copy.deepcopy(outcome.model), outcome.mask))
    assert outcome.mask.structured is structured
    assert torch.isfinite(outcome.model(batches[0][0])).all()
    assert torch.equal(outcome.model.head.bias, before.head.bias)
    assert outcome.history.epochs == {"dense": 2, "random": 2, "magnitude": 2}.get(name, 3)
    json.dumps(outcome.history.to_dicts())
    # The fraction is exact: over weights, or over coupled channels (8 + 6 + 4).
    if structured:
        gone = sum(
            int((~outcome.mask.channels[layer]).sum()) for layer in ("stem.0.weight", "left.weight", "right.weight")
        )
        assert gone == (0 if name == "dense" else 9)
        small = masks.remove(outcome.model, outcome.mask, batches[0][0])
        torch.testing.assert_close(small(batches[0][0]), outcome.model(batches[0][0]), rtol=0, atol=1e-5)
        assert small.removal.stayed == {}
    else:
        assert outcome.mask.total - outcome.mask.kept == (0 if name == "dense" else round(0.5 * outcome.mask.total))


@pytest.mark.parametrize("name", KINDS)
def test_a_seed_fixes_everything(name):
    method, _ = methods.get(name)
    one, two, other = (method(KINDS[name]).fit(mlp(dropout=0.3), Shuffled(*points()), seed=seed) for seed in (1, 1, 2))
    assert same_state(one.model, two.model)
    assert one.mask == two.mask
    assert one.history == two.history
    assert not same_state(one.model, other.model)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("kill_at", [1, 2])
def test_a_killed_fit_goes_on_to_the_same_numbers(name, kill_at, tmp_path):
    method, _ = methods.get(name)
    expected = method(KINDS[name]).fit(mlp(), Shuffled(*points()), val=[points(32, 1)], seed=1)
    seen: list[EpochRecord] = []

    def killer(_: nn.Module, record: EpochRecord) -> None:
        seen.append(record)
        if len(seen) == kill_at:
            raise Killed

    where = Checkpoint(tmp_path, seconds=0.0)
    with pytest.raises(Killed):
        method(KINDS[name]).fit(
            mlp(), Shuffled(*points()), val=[points(32, 1)], seed=1, checkpoint=where, callbacks=[killer]
        )
    resumed = method(KINDS[name]).fit(mlp(), Shuffled(*points()), val=[points(32, 1)], seed=1, checkpoint=where)
    assert same_state(resumed.model, expected.model)
    assert resumed.mask == expected.mask
    assert resumed.history == expected.history


@pytest.mark.parametrize("name", KINDS)
def test_every_method_learns(name):
    method, _ = methods.get(name)
    config = dataclasses.replace(KINDS[name], epochs=8)
    if name in ("random", "magnitude"):
        config = dataclasses.replace(config, finetune_epochs=8, finetune=FAST)
    outcome = method(config).fit(mlp(), Shuffled(*points()), val=[points(64, 1)])
    x, y = points(200, 2)
    assert (outcome.model(x).argmax(1) == y).float().mean() > 0.9


def test_methods_train_under_bounds():
    config = dataclasses.replace(KINDS["magnitude"], training=dataclasses.replace(FAST, objective=IBP(0.05)))
    assert config.finetuning.objective.schedule(0.0) == 1.0  # no second ramp
    outcome = Magnitude(config).fit(residual(), images(), val=images(8, 1))
    assert "certified" in outcome.history.records[-1].validation
    assert {"natural", "robust"} <= outcome.history.records[-1].metrics.keys()


# --- one at a time ------------------------------------------------------------
def test_dense_is_plain_training():
    batches = Shuffled(*points())
    outcome = Dense(DenseConfig(epochs=3, training=FAST)).fit(mlp(), batches, seed=2)
    plain = mlp()
    history = train(plain, batches, Natural(), FAST, epochs=3, seed=2)
    assert same_state(outcome.model, plain)
    assert outcome.history == history
    assert outcome.mask.density == 1.0
    with pytest.raises(ValueError, match="ratio must be 0"):
        DenseConfig(ratio=0.5)


def test_magnitude_keeps_the_largest_weights_of_the_trained_network():
    batches = Shuffled(*points())
    for scope in ("layer", "global"):
        config = MagnitudeConfig(ratio=0.3, epochs=2, finetune_epochs=0, training=FAST, scope=scope)
        outcome = Magnitude(config).fit(mlp(), batches, seed=2)
        trained = dict(Dense(DenseConfig(epochs=2, training=FAST)).fit(mlp(), batches, seed=2).model.named_parameters())
        weights = {name: trained[name].detach().abs() for name in outcome.mask}
        pool = torch.cat([w.flatten() for w in weights.values()])
        for name, w in weights.items():
            of = pool if scope == "global" else w.flatten()
            threshold = of.sort().values[round(0.3 * of.numel())]  # the smallest that stays
            assert torch.equal(outcome.mask[name], w >= threshold)


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_structured_magnitude_ranks_by_the_channels_norm(norm):
    config = MagnitudeConfig(ratio=0.5, epochs=0, finetune_epochs=0, structured=True, coupled=False, norm=norm)
    model = residual()
    outcome = Magnitude(config).fit(model, images())
    for name, kept in outcome.mask.channels.items():
        w = dict(model.named_parameters())[name].detach().flatten(1)
        norms = torch.linalg.vector_norm(w, ord=1 if norm == "l1" else 2, dim=1)
        assert int((~kept).sum()) == len(kept) // 2
        assert norms[kept].min() >= norms[~kept].max()


def test_random_masks_depend_on_the_seed_alone():
    config = RandomConfig(ratio=0.5, epochs=0, finetune_epochs=0)
    fits = [
        Random(config).fit(mlp(initial), Shuffled(*points()), seed=seed) for initial, seed in ((0, 0), (1, 0), (0, 1))
    ]
    assert fits[0].mask == fits[1].mask
    assert fits[0].mask != fits[2].mask


def test_fine_tuning_sees_another_order_and_a_tenth_of_the_rate():
    batches = Shuffled(*points())
    config = MagnitudeConfig(epochs=2, finetune_epochs=3, training=FAST)
    outcome = Magnitude(config).fit(mlp(), batches)
    assert batches.told == [0, 1, 2, 3, 4]
    assert outcome.history.phases == ("train", "finetune")
    assert [r.lr for r in outcome.history.phase("finetune").records] == pytest.approx([0.1 * FAST.lr] * 3)


# --- iterative magnitude pruning ------------------------------------------------------------
def imp_config(**changes: object) -> IMPConfig:
    return dataclasses.replace(KINDS["imp"], **changes)


@pytest.mark.parametrize("structured", [False, True])
def test_imp_masks_are_nested_and_each_fraction_is_exact(structured):
    config = imp_config(ratio=1 - 0.8**4, rounds=4, structured=structured, coupled=False)
    outcome = IMP(config).fit(residual(), images())
    assert len(outcome.masks) == 5
    assert outcome.masks[0].density == 1.0
    assert outcome.masks[-1] == outcome.mask
    for index, (large, small) in enumerate(zip(outcome.masks, outcome.masks[1:]), start=1):
        assert small.is_subset(large)
        if structured:
            total = sum(len(c) for c in small.channels.values())
            gone = sum(int((~c).sum()) for c in small.channels.values())
        else:
            total, gone = small.total, small.total - small.kept
        assert gone == round((1 - 0.8**index) * total)
    assert outcome.history.phases == tuple(f"round-{i:02d}" for i in range(5))
    assert config.total_epochs == outcome.history.epochs


def test_imp_rewinds_everything_to_the_network_it_was_given():
    """At a rate that moves nothing, each state is the network given under its mask: buffers and biases too."""
    model = residual()
    still = TrainingConfig(optimizer="sgd", lr=1e-30, momentum=0.0, schedule="constant")
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.0
    states = list(IMP(imp_config(rounds=2, epochs=2, training=still)).states(model, images()))
    assert [state.mask.density for state in states] == pytest.approx([1.0, 0.5**0.5, 0.5], abs=0.01)
    for state in states:
        expected = masks.apply(copy.deepcopy(model), state.mask).state_dict()
        for name, tensor in state.model.state_dict().items():
            if not name.endswith("num_batches_tracked"):  # counts the batches of this state
                assert torch.equal(tensor, expected[name]), name
            else:
                assert int(tensor) == 2 * len(images())


@pytest.mark.parametrize("rewind", ["init", "late", "finetune"])
def test_imp_goes_back_to_where_it_should(rewind):
    """The first weights a round trains, seen by its objective, against the state they must equal."""
    starts: list[dict[str, torch.Tensor]] = []
    after: dict[int, dict[str, torch.Tensor]] = {}

    @dataclasses.dataclass(frozen=True)
    class Spy(Natural):
        def loss(self, model, x, y, task_loss, progress):
            if progress.epoch == progress.step == 0:
                starts.append({n: p.detach().clone() for n, p in model.named_parameters()})
            return super().loss(model, x, y, task_loss, progress)

    def remember(model: nn.Module, record: EpochRecord) -> None:
        after[len(after)] = {n: p.detach().clone() for n, p in model.named_parameters()}

    changes = {"late": {"rewind_epoch": 1}, "finetune": {"finetune_epochs": 2}}.get(rewind, {})
    config = imp_config(
        rounds=2, epochs=3, rewind=rewind, training=dataclasses.replace(FAST, objective=Spy()), **changes
    )
    model = mlp()
    states = list(IMP(config).states(model, Shuffled(*points()), callbacks=[remember]))
    assert config.total_epochs == states[-1].history.epochs == len(after)
    assert len(starts) == 3
    for index in (1, 2):
        source = {
            "init": dict(model.named_parameters()),
            "late": after[0],
            "finetune": dict(states[index - 1].model.named_parameters()),
        }[rewind]
        mask = states[index].mask
        for name, start in starts[index].items():
            expected = source[name] * mask[name] if name in mask else source[name]
            assert torch.equal(start, expected), (index, name)
    assert any(not torch.equal(a, b) for a, b in zip(starts[0].values(), after[0].values()))


def test_late_rewinding_resumes_from_its_own_file(tmp_path):
    config = imp_config(rounds=2, epochs=3, rewind="late", rewind_epoch=1)
    expected = IMP(config).fit(mlp(), Shuffled(*points()), seed=1)
    seen: list[int] = []

    def killer(_: nn.Module, record: EpochRecord) -> None:
        seen.append(record.epoch)
        if len(seen) == 4:  # in the second state
            raise Killed

    where = Checkpoint(tmp_path, seconds=0.0)
    with pytest.raises(Killed):
        IMP(config).fit(mlp(), Shuffled(*points()), seed=1, checkpoint=where, callbacks=[killer])
    resumed = IMP(config).fit(mlp(), Shuffled(*points()), seed=1, checkpoint=where)
    assert same_state(resumed.model, expected.model)
    assert resumed.history == expected.history
    (tmp_path / "rewind.ckpt").unlink()
    with pytest.raises(RuntimeError, match="rewind to"):
        IMP(config).fit(mlp(), Shuffled(*points()), seed=1, checkpoint=where)


def test_the_states_are_copies_of_their_own():
    """Spoiling one must not reach the next."""
    count = 0
    for state in IMP(KINDS["imp"]).states(mlp(), Shuffled(*points())):
        assert all(torch.isfinite(p).all() for p in state.model.parameters())
        with torch.no_grad():
            for p in state.model.parameters():
                p.fill_(float("nan"))
        count += 1
    assert count == 3


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rounds": 0}, "rounds"),
        ({"rewind": "early"}, "rewind"),
        ({"rewind": "late", "rewind_epoch": 9}, "rewind_epoch"),
        ({"finetune_epochs": 3}, "finetune"),
        ({"ratio": 1.0}, "ratio"),
        ({"scope": "net"}, "scope"),
        ({"layers": ()}, "layers"),
        ({"epochs": -1}, "epochs"),
    ],
)
def test_bad_settings_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        imp_config(**changes)


# --- the package ------------------------------------------------------------
def test_the_registry():
    assert set(KINDS) <= set(methods.names())
    assert methods.describe().keys() == set(methods.names())
    for name in methods.names():
        method, config = methods.get(name)
        assert isinstance(method().config, config)
    assert methods.get("imp") == (IMP, IMPConfig)
    assert methods.get("random") == (Random, RandomConfig)
    with pytest.raises(KeyError, match="did you mean magnitude"):
        methods.get("magnitud")
    assert Mask.dense(mlp()).density == 1.0


def test_the_package_stands_alone(tmp_path):
    """Listing loads no torch; using a method loads none of the packages that only run from a clone."""
    root = Path(methods.__file__).parents[1]
    code = (
        f"import sys; sys.path.append({str(root)!r})\n"
        "import methods; methods.names(); methods.describe()\n"
        "assert 'torch' not in sys.modules\n"
        "for name in methods.names(): methods.get(name)\n"
        "from methods import masks; import methods.training\n"
        "loaded = {m.partition('.')[0] for m in sys.modules}\n"
        "print(sorted(loaded & {'models', 'datasets', 'runs', 'torch_pruning', 'timm', 'diffusers', 'auto_LiRPA'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
