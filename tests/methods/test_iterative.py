"""The iterative methods: what each ranks by, against plain computations; masks, rewinding, resuming; the presets."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from method_toys import FAST, Shuffled, images, mlp, points, residual, same_state
from torch import nn

import methods
from methods import masks
from methods.dense import Dense
from methods.hydra import HYDRA, HYDRAConfig, SearchConfig
from methods.hydra.search import initial_scores
from methods.imp import IMP, IMPConfig
from methods.iterative import Iterative, IterativeConfig
from methods.nrs import NRS, NRSConfig, NRSLoss, RSLoss, one_shot, preset, training
from methods.random import IterativeRandom
from methods.slimming import GammaL1, Slimming, SlimmingConfig
from methods.snip import SNIP, SNIPConfig
from methods.structlth import StructLTH, StructLTHConfig
from methods.taylor import Taylor, TaylorConfig
from methods.training import (
    CROWNIBP,
    FGSM,
    IBP,
    Checkpoint,
    CrossEntropy,
    EpochRecord,
    Natural,
    Progress,
    Regularised,
    TrainingConfig,
)

STILL = TrainingConfig(optimizer="sgd", lr=1e-30, momentum=0.0, schedule="constant")
TWO = {"ratio": 0.5, "epochs": 1, "rounds": 2, "training": FAST}
METHODS: dict[str, Iterative] = {
    "random": IterativeRandom(IterativeConfig(**TWO)),
    "imp": IMP(IMPConfig(**TWO)),
    "snip": SNIP(SNIPConfig(**TWO)),
    "taylor": Taylor(TaylorConfig(**TWO)),
    "hydra": HYDRA(HYDRAConfig(search=SearchConfig(1, FAST), **TWO)),
    "hydra+nrs": NRS(NRSConfig(hydra=SearchConfig(1, FAST), scope="layer", eps=0.01, **TWO)),
    "imp+nrs": NRS(NRSConfig(eps=0.01, **TWO)),
    "imp+rs": NRS(NRSConfig(eps=0.01, penalty=RSLoss(), **TWO)),
    "slimming": Slimming(SlimmingConfig(**TWO)),
    "structlth": StructLTH(StructLTHConfig(**TWO)),
    "random structured": IterativeRandom(IterativeConfig(structured=True, **TWO)),
    "snip structured": SNIP(SNIPConfig(structured=True, **TWO)),
    "taylor structured": Taylor(TaylorConfig(structured=True, **TWO)),
    "imp+nrs structured": NRS(NRSConfig(eps=0.01, structured=True, **TWO)),
}


class Killed(Exception):
    """Stands for a kill."""


def with_config(method: Iterative, **changes: object) -> Iterative:
    return dataclasses.replace(method, config=dataclasses.replace(method.config, **changes))


# --- what all of them keep to ------------------------------------------------------------
@pytest.mark.parametrize("name", METHODS)
def test_masks_are_nested_and_fractions_exact(name):
    method = with_config(METHODS[name], ratio=1 - 0.8**3, rounds=3, coupled=False)
    model, batches = residual(), images()
    before = copy.deepcopy(model)
    states = list(method.states(model, batches, val=images(8, 1), seed=3))
    assert same_state(model, before)
    assert len(states) == 4
    assert states[0].mask.density == 1.0
    for index in range(1, 4):
        small, large = states[index].mask, states[index - 1].mask
        assert small.is_subset(large)
        assert same_state(states[index].model, masks.apply(copy.deepcopy(states[index].model), small))
        layers = list(small) if method.config.scope == "layer" else None
        if method.config.structured:
            sizes = {n: len(c) for n, c in small.channels.items()}
            gone = {n: int((~c).sum()) for n, c in small.channels.items()}
        else:
            sizes = {n: small[n].numel() for n in small}
            gone = {n: int((~small[n]).sum()) for n in small}
        share = 1 - 0.8**index
        if layers:
            assert gone == {n: round(share * sizes[n]) for n in sizes}
        else:
            assert sum(gone.values()) == round(share * sum(sizes.values()))
    assert states[-1].history.epochs == method.config.total_epochs


@pytest.mark.parametrize("name", METHODS)
def test_a_killed_run_goes_on_to_the_same_numbers(name, tmp_path):
    method, batches = METHODS[name], images()
    expected = method.fit(residual(), batches, val=images(8, 1), seed=1)
    again = method.fit(residual(), batches, val=images(8, 1), seed=1)
    assert same_state(again.model, expected.model)
    seen: list[EpochRecord] = []

    def killer(_: nn.Module, record: EpochRecord) -> None:
        seen.append(record)
        if len(seen) == 2:
            raise Killed

    where = Checkpoint(tmp_path, seconds=0.0)
    with pytest.raises(Killed):
        method.fit(residual(), batches, val=images(8, 1), seed=1, checkpoint=where, callbacks=[killer])
    resumed = method.fit(residual(), batches, val=images(8, 1), seed=1, checkpoint=where)
    assert same_state(resumed.model, expected.model)
    assert resumed.masks == expected.masks
    assert resumed.history == expected.history


@pytest.mark.parametrize("name", [n for n in METHODS if METHODS[n].config.structured])
def test_structured_tickets_are_removed_physically(name):
    x = images(8, 1)[0][0]
    outcome = METHODS[name].fit(residual(), images())
    small = masks.remove(outcome.model, outcome.mask, x)
    torch.testing.assert_close(small(x), outcome.model(x), rtol=0, atol=1e-5)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in outcome.model.parameters())
    assert small.removal.stayed == {}


# --- what each ranks by ------------------------------------------------------------
def pruned_once(method: Iterative, model: nn.Module, batches: object) -> tuple[nn.Module, masks.Mask]:
    """The first trained state and the mask that follows it, one pruning of half."""
    method = with_config(method, rounds=1, ratio=0.5, coupled=False)
    dense, sparse = list(method.states(model, batches, seed=2))
    return dense.model, sparse.mask


def smallest_half(scores: dict[str, torch.Tensor], protect: bool = False) -> dict[str, torch.Tensor]:
    """What stays when the smaller half of all goes; with `protect`, the best of each layer is not counted out."""
    order = sorted((float(v), n, i) for n, s in scores.items() for i, v in enumerate(s.flatten().tolist()))
    best = {(n, int(s.argmax())) for n, s in scores.items()} if protect else set()
    gone = [(n, i) for _, n, i in order if (n, i) not in best][: round(0.5 * len(order))]
    kept = {n: torch.ones(s.numel(), dtype=torch.bool) for n, s in scores.items()}
    for name, index in gone:
        kept[name][index] = False
    return {n: k.reshape(scores[n].shape) for n, k in kept.items()}


def gradient_scores(model: nn.Module, names: list[str], x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
    model = copy.deepcopy(model).train()
    model.drop.p = 0.0
    nn.functional.cross_entropy(model(x), y).backward()
    weights = dict(model.named_parameters())
    return {n: weights[n].detach() * weights[n].grad for n in names}


def without_dropout() -> nn.Module:
    model = residual()
    model.drop.p = 0.0
    return model


@pytest.mark.parametrize("method", [METHODS["snip"], METHODS["taylor"]], ids=["snip", "taylor"])
def test_sensitivity_is_weight_times_gradient_on_the_first_images(method):
    batches = images(24)
    dense, mask = pruned_once(with_config(method, images=20), without_dropout(), batches)
    x, y = (torch.cat(part)[:20] for part in zip(*batches))
    found = smallest_half({n: s.abs() for n, s in gradient_scores(dense, list(mask), x, y).items()})
    assert all(torch.equal(mask[n], found[n]) for n in mask)


def test_snip_at_initialisation_is_the_original():
    batches, model = images(24), without_dropout()
    _, mask = pruned_once(with_config(METHODS["snip"], at="init"), model, batches)
    x, y = (torch.cat(part) for part in zip(*batches))
    found = smallest_half({n: s.abs() for n, s in gradient_scores(model, list(mask), x, y).items()})
    assert all(torch.equal(mask[n], found[n]) for n in mask)
    _, trained = pruned_once(METHODS["snip"], model, batches)
    assert trained != mask


def test_taylor_and_snip_differ_by_the_batch_drawn_alone():
    fixed, shuffled = images(24), Shuffled(*(torch.cat(part) for part in zip(*images(24))), size=8)
    one, two = (pruned_once(m, without_dropout(), fixed)[1] for m in (METHODS["snip"], METHODS["taylor"]))
    assert one == two
    methods_ = [with_config(m, images=8) for m in (METHODS["snip"], METHODS["taylor"])]
    one, two = (pruned_once(m, without_dropout(), shuffled)[1] for m in methods_)
    assert one != two


def test_structured_taylor_lets_the_terms_of_a_channel_cancel():
    batches = images(24)
    x, y = (torch.cat(part) for part in zip(*batches))
    chosen = {}
    for name in ("taylor structured", "snip structured"):
        dense, mask = pruned_once(METHODS[name], without_dropout(), batches)
        raw = {n: s.flatten(1) for n, s in gradient_scores(dense, list(mask), x, y).items()}
        scores = {n: s.mean(1).abs() if name.startswith("taylor") else s.abs().mean(1) for n, s in raw.items()}
        chosen[name] = smallest_half(scores, protect=True)
        assert all(torch.equal(mask.channels[n], chosen[name][n]) for n in mask)
    assert any(not torch.equal(a, b) for a, b in zip(*(c.values() for c in chosen.values())))


def test_the_sensitivity_is_of_the_objective_asked_for():
    batches = images(24)
    certified = with_config(METHODS["snip"], training=dataclasses.replace(FAST, objective=IBP(0.1)))
    _, robust = pruned_once(certified, without_dropout(), batches)
    _, natural = pruned_once(with_config(certified, objective="natural"), without_dropout(), batches)
    assert robust != natural


def test_untrained_hydra_is_layerwise_magnitude():
    hydra = HYDRA(HYDRAConfig(search=SearchConfig(0), **TWO))
    dense, mask = pruned_once(hydra, residual(), images())
    for name in mask:
        size = dict(dense.named_parameters())[name].detach().abs()
        threshold = size.flatten().sort().values[round(0.5 * size.numel())]
        assert torch.equal(mask[name], size >= threshold)
    weight = torch.tensor([[0.5, -2.0], [1.0, 0.25]])
    torch.testing.assert_close(initial_scores(weight), 3**0.5 * weight / 2.0)


def test_hydra_learns_scores_alone_and_finds_better_masks_than_magnitude():
    """A network whose useful weights are small: magnitude removes them, the robust loss keeps them."""
    x, y = points(128)
    x = torch.cat([x, torch.rand(len(x), 2, generator=torch.Generator().manual_seed(5))], 1)
    model = nn.Sequential(nn.Linear(4, 2, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[-0.5, 0.5, 1.0, 1.0], [0.5, -0.5, 1.0, 1.0]]))
    batches = [(x, y)]
    accuracy = {}
    searching = dataclasses.replace(FAST, lr=0.05)
    for epochs in (0, 40):
        seen: list[nn.Module] = []
        config = HYDRAConfig(
            ratio=0.5, rounds=1, epochs=1, training=STILL, layers=("linear",), search=SearchConfig(epochs, searching)
        )

        def look(network: nn.Module, record: EpochRecord, seen=seen) -> None:
            if record.phase == "round-01-mask":
                seen.append(copy.deepcopy(network))

        outcome = HYDRA(config).fit(model, batches, callbacks=[look])
        assert int(outcome.mask["0.weight"].sum()) == 4
        accuracy[epochs] = float((outcome.model(x).argmax(1) == y).float().mean())
        assert len(seen) == epochs
        for network in seen:  # frozen weights, half of them under the mask
            inside = network[0].parametrizations.weight
            assert torch.equal(inside.original, model[0].weight)
            assert int((network[0].weight != 0).sum()) == 4
        assert torch.equal(outcome.model[0].weight[outcome.mask["0.weight"]], model[0].weight[outcome.mask["0.weight"]])
    assert accuracy[40] == 1.0 > accuracy[0] + 0.2


def test_hydra_trains_scores_for_the_states_own_objective():
    config = HYDRAConfig(search=SearchConfig(2, FAST), **TWO | {"rounds": 1})
    config = dataclasses.replace(config, training=dataclasses.replace(FAST, objective=CROWNIBP(0.05)))
    history = HYDRA(config).fit(residual(), images()).history
    assert history.phases == ("round-00", "round-01-mask", "round-01")
    assert {"robust", "certified"} <= history.phase("round-01-mask").records[0].metrics.keys()
    penalised = NRS(NRSConfig(hydra=SearchConfig(1, FAST), scope="layer", eps=0.01, **TWO)).fit(residual(), images())
    assert "nrs" in penalised.history.phase("round-01-mask").records[0].metrics
    plain, certified = SearchConfig().resolved(FGSM(0.1)), SearchConfig().resolved(Regularised(IBP(0.1), (NRSLoss(),)))
    assert (plain.lr, certified.lr) == (0.01, 0.001)
    assert [plain.factor(Progress(e, 20)) for e in (9, 10, 15)] == pytest.approx([1.0, 0.1, 0.01])


def test_slimming_ranks_channels_by_gamma_and_leaves_bare_layers_whole():
    dense, mask = pruned_once(METHODS["slimming"], residual(), images())
    assert set(mask) == {"stem.0.weight", "branch.0.weight", "depthwise.0.weight"}
    gammas = {
        "stem.0.weight": dense.stem[1],
        "branch.0.weight": dense.branch[1],
        "depthwise.0.weight": dense.depthwise[1],
    }
    found = smallest_half({n: norm.weight.detach().abs() for n, norm in gammas.items()}, protect=True)
    assert all(torch.equal(mask.channels[n], found[n]) for n in mask)
    with pytest.raises(ValueError, match="right behind a prunable layer"):
        Slimming(SlimmingConfig(**TWO)).fit(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(32, 3)), images())


def test_slimmings_penalty_is_l1_on_gamma():
    model = residual()
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    with torch.no_grad():
        norms[0].weight.neg_()
    size = torch.cat([norm.weight for norm in norms]).abs()
    torch.testing.assert_close(GammaL1(0.5).penalty(model, None, 1.0), 0.5 * size.sum())
    torch.testing.assert_close(GammaL1(0.5, average=True).penalty(model, None, 1.0), 0.5 * size.mean())
    objective = Slimming(SlimmingConfig(l1=0.1)).objective(Natural())
    assert objective.name == "natural+gamma-l1"
    assert objective.mixed_precision
    x, y = images(8)[0]
    plain = Natural().loss(model, x, y, CrossEntropy(), Progress(0, 1))[0]
    torch.testing.assert_close(objective.loss(model, x, y, CrossEntropy(), Progress(0, 1))[0], plain + 0.1 * size.sum())


@pytest.mark.parametrize("rank", ["total", "mean", "count"])
def test_structlth_ranks_what_magnitude_pruning_leaves_and_refills(rank):
    method = StructLTH(StructLTHConfig(rank=rank, weights=0.4, **TWO))
    dense, mask = pruned_once(method, residual(), images())
    weights = {n: dict(dense.named_parameters())[n].detach().abs() for n in mask}
    flat = torch.cat([w.flatten() for w in weights.values()])
    threshold = flat.sort().values[round(0.4 * flat.numel())]
    left = {n: (w * (w >= threshold)).flatten(1) for n, w in weights.items()}
    if rank == "count":
        for name, kept in mask.channels.items():
            count = (left[name] > 0).sum(1)
            assert int(kept.sum()) == len(kept) - len(kept) // 2
            assert count[kept].min() >= count[~kept].max()
    else:
        scores = {n: v.sum(1) if rank == "total" else v.mean(1) for n, v in left.items()}
        found = smallest_half(scores, protect=True)
        assert all(torch.equal(mask.channels[n], found[n]) for n in mask)
    assert mask.structured  # whole channels: what the inner pruning removed inside them is back


def test_structlth_counts_the_inner_fraction_from_what_is_left():
    method = StructLTH(StructLTHConfig(weights=0.2, coupled=False, **TWO | {"rounds": 2}))
    seen = []
    original = StructLTH.survivors

    def spy(self, trained):
        seen.append((original(self, trained), trained.mask))
        return seen[-1][0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StructLTH, "survivors", spy)
        method.fit(residual(), images())
    for survivors, mask in seen:
        assert survivors.is_subset(mask)
        assert survivors.kept == pytest.approx(0.8 * mask.kept, abs=1)


def test_iterative_random_masks_depend_on_the_seed_alone():
    method = METHODS["random"]
    found = [method.fit(residual(i), images(), seed=s).masks for i, s in ((0, 0), (1, 0), (0, 1))]
    assert found[0] == found[1]
    assert found[0] != found[2]


# --- rewinding ------------------------------------------------------------
@pytest.mark.parametrize("rewind", ["aliased", "finetune-frozen"])
def test_the_released_faults_are_reproduced(rewind):
    starts: list[dict[str, torch.Tensor]] = []

    @dataclasses.dataclass(frozen=True)
    class Spy(Natural):
        def loss(self, model, x, y, task_loss, progress):
            if progress.epoch == progress.step == 0:
                starts.append({n: p.detach().clone() for n, p in model.named_parameters()})
            return super().loss(model, x, y, task_loss, progress)

    tuned = {"finetune_epochs": 3} if rewind == "finetune-frozen" else {}
    config = IMPConfig(
        ratio=0.5, epochs=2, rounds=2, rewind=rewind, training=dataclasses.replace(FAST, objective=Spy()), **tuned
    )
    model = residual()
    states = list(IMP(config).states(model, images()))
    assert config.total_epochs == states[-1].history.epochs == (6 if rewind == "aliased" else 8)
    for index in (1, 2):
        ended = masks.apply(copy.deepcopy(states[index - 1].model), states[index].mask)
        for name, parameter in ended.named_parameters():
            assert torch.equal(starts[index][name], parameter), name
        moved = {n for n, p in states[index].model.named_parameters() if not torch.equal(p, starts[index][n])}
        pruned = set(states[index].mask)
        assert (moved & pruned == set()) if rewind == "finetune-frozen" else (pruned <= moved)
        assert "head.weight" in moved
    rates = [r.lr for r in states[-1].history.phase("round-02").records]
    assert rates == pytest.approx([FAST.lr] * 2 if rewind == "aliased" else [0.1 * FAST.lr] * 3)
    assert all(p.requires_grad for p in states[-1].model.parameters())


# --- configurations and presets ------------------------------------------------------------
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: HYDRAConfig(structured=True), "structured must be False"),
        (lambda: HYDRAConfig(scope="global"), "scope must be 'layer'"),
        (lambda: SlimmingConfig(structured=False), "structured must be True"),
        (lambda: StructLTHConfig(structured=False), "structured must be True"),
        (lambda: StructLTHConfig(rank="norm"), "rank"),
        (lambda: SNIPConfig(at="end"), "at must be"),
        (lambda: TaylorConfig(images=0), "images"),
        (lambda: NRSConfig(hydra=SearchConfig()), "scope='layer'"),
        (lambda: preset("imp+nsr", "fgsm", 0.1), r"did you mean imp\+nrs"),
        (lambda: preset("imp", "crown", 0.1), "did you mean crown-ibp"),
        (lambda: training("fgsm", 0.1, flavour="paper"), "as_paper"),
        (lambda: one_shot("imp", 0.1), "magnitude"),
    ],
)
def test_bad_settings_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_presets_state_the_paper():
    imp = preset("imp", "fgsm", 2 / 255).config
    assert (imp.rounds, imp.epochs, imp.scope, imp.layers) == (16, 200, "global", ("conv",))
    assert 1 - imp.ratio == pytest.approx(0.0281, abs=1e-4)
    assert 1 - imp.removed(1) == pytest.approx(0.8)
    goal = imp.training
    assert (goal.optimizer, goal.lr, goal.momentum, goal.weight_decay, goal.clip_grad_norm) == (
        "sgd",
        0.01,
        0.9,
        5e-4,
        8.0,
    )
    rates = [goal.factor(Progress(e, 200)) for e in (139, 140, 169, 170)]
    assert rates == pytest.approx([1.0, 0.1, 0.1, 0.01])
    assert [goal.factor(Progress(e, 300)) for e in (209, 210, 254, 255)] == pytest.approx([1.0, 0.1, 0.1, 0.01])
    assert goal.objective == FGSM(2 / 255, step_size=1.25, init="zero", grad_align=0.2)
    certified = preset("imp", "crown-ibp", 0.1).config.training
    assert (certified.optimizer, certified.lr, certified.weight_decay) == ("adam", 1e-3, 1e-5)
    ramp = certified.objective.schedule
    assert ramp(10 / 200) == 0.0 < ramp(11 / 200) < ramp(79 / 200) < ramp(80 / 200) == 1.0
    assert training("fast-ibp", 0.1).lr == 5e-4
    structured = preset("slimming", "crown-ibp", 0.1).config
    assert (structured.rounds, structured.structured, structured.average) == (11, True, False)
    assert 1 - structured.ratio == pytest.approx(0.89**11)
    nrs = preset("imp+nrs", "crown-ibp", 0.1)
    assert nrs.config.penalty == NRSLoss(0.01, average="neurons", over="normalised", gamma="stopped")
    assert nrs.config.training.weight_decay == 0.0
    assert nrs.objective(nrs.config.training.objective).name == "crown-ibp+nrs"
    hydra = preset("hydra+nrs", "fgsm", 0.1).config
    assert (hydra.hydra.epochs, hydra.scope) == (20, "layer")
    assert isinstance(preset("dense", "crown-ibp", 0.1), Dense)


def test_presets_state_the_released_code():
    def released(row: str, kind: str) -> Iterative:
        return preset(row, kind, 0.1, flavour="as_released")

    assert released("imp", "fgsm").config.rounds == 15
    assert 1 - released("imp", "fgsm").config.ratio == pytest.approx(0.8**15)
    assert released("slimming", "fgsm").config.rounds == 11
    assert released("slimming", "fgsm").config.average
    assert released("structlth", "fgsm").config.rank == "mean"
    assert preset("structlth", "fgsm", 0.1).config.rank == "total"
    assert released("imp+rs", "fgsm").config.penalty == RSLoss(0.01, average="neurons", over="all")
    assert released("imp+nrs", "crown-ibp").config.penalty == NRSLoss(0.001, average="channels", over="normalised")
    ramp = released("imp", "crown-ibp").config.training.objective.schedule
    assert ramp(91 / 200) < 1.0 == ramp(92 / 200)


def test_presets_take_other_lengths_and_rewindings():
    short = preset("imp+nrs", "crown-ibp", 0.1, rounds=3, epochs=10).config
    assert 1 - short.ratio == pytest.approx(0.8**3)
    assert short.total_epochs == 40
    tuned = preset("imp", "crown-ibp", 0.1, rewind="finetune", epochs=10, finetune_epochs=5, rounds=2).config
    assert tuned.total_epochs == 20
    assert tuned.finetuning.lr == pytest.approx(1e-5)  # the decayed rate
    assert tuned.finetuning.objective.schedule(0.0) == 1.0
    assert preset("hydra", "fgsm", 0.1, rounds=2, epochs=10, search_epochs=4).config.total_epochs == 38
    assert preset("imp", "fgsm", 0.1, rewind="aliased", rounds=1, epochs=3).config.total_epochs == 6
    table = one_shot("hydra", 0.05).config
    assert (table.rounds, table.rewind, table.scope, table.search.epochs) == (1, "finetune", "layer", 20)
    assert table.ratio == pytest.approx(0.95)
    assert table.training.objective.eps == 0.007


ROWS = [
    "random",
    "imp",
    "snip",
    "taylor",
    "hydra",
    "hydra+nrs",
    "hydra+rs",
    "imp+rs",
    "imp+nrs",
    "slimming",
    "structlth",
]


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("kind", ["fgsm", "crown-ibp"])
def test_every_row_runs_under_both_trainings(row, kind):
    method = preset(row, kind, 0.05, rounds=1, epochs=4, search_epochs=1)
    outcome = method.fit(residual(), images(16), val=images(8, 1))
    assert outcome.history.epochs == method.config.total_epochs
    assert torch.isfinite(outcome.model(images(8, 1)[0][0])).all()
    names = outcome.history.phase("round-01").records[-1].metrics
    assert ("nrs" in names, "rs" in names) == ("nrs" in row, row.endswith("+rs"))
    assert ("gamma-l1" in names) == (row == "slimming")


def test_a_method_of_any_row_is_registered():
    for name in ("nrs", "snip", "taylor", "hydra", "slimming", "structlth"):
        method, config = methods.get(name)
        assert issubclass(method, Iterative)
        assert isinstance(method().config, config)
    model = mlp()
    outcome = NRS(NRSConfig(eps=0.01, layers=("linear",), **TWO)).fit(model, Shuffled(*points()))
    assert outcome.mask.density == pytest.approx(0.5, abs=0.01)
