"""Claims: what the printed tables say on their own sentences, and verdicts on records made by hand."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
from handmade import LINF, make_cell, make_record

from runs import nrs_records, paper
from runs import records as packed
from runs.cell import Perturb, Pruning, Training, Verifier, settings
from runs.claims import CLAIMS, Claim, evaluate, export, print_terminal, printed
from runs.claims.claim import Finding, Verdict
from runs.claims.observation import observations, picked
from runs.claims.questions import (
    AgainstEach,
    Evidence,
    Exceeds,
    Falls,
    Gains,
    MatchesSomewhere,
    Measures,
    Verifies,
    VerifiesSomewhere,
)
from runs.claims.show import evidence_text
from runs.statistics import sign_test
from runs.suites import Selection, plan

SEEDS = (0, 1, 2)
BRIGHTNESS = Perturb("brightness", 2 / 255)


def by_id(name: str) -> Claim:
    return next(claim for claim in CLAIMS if claim.id == name)


def found(methods, **changes):
    """One record per method and seed: ``methods`` maps (name, ratio) to bits, or to a function of the seed."""
    return [
        make_record(make_cell(name, ratio, seed, **changes), bits(seed) if callable(bits) else bits)
        for (name, ratio), bits in methods.items()
        for seed in SEEDS
    ]


def test_ids_are_unique_and_every_paper_has_claims():
    assert len({claim.id for claim in CLAIMS}) == len(CLAIMS) >= 30
    assert {claim.paper for claim in CLAIMS} == {paper.USN, paper.NRS, paper.CAR}
    assert all(claim.decide.startswith("python -m runs.compare ") for claim in CLAIMS)


def test_printed_contradictions_are_exactly_those_that_the_tables_hold():
    contradicted = {claim.id for claim in CLAIMS if claim.printed is not None and claim.printed().contradicted}
    assert contradicted == {
        "USN-2",  # worse than ratio 0 in 10 of 15 cells
        "USN-3",  # at ratio .3 brightness 2 gains more
        "NRS-5",  # HYDRA+NRSLoss on FashionMNIST
        "NRS-13",  # StructLTH above SNIP on FashionMNIST
        "NRS-16",  # IMP+RSLoss: IBP 47.5 > beta-CROWN 46.3
        "NRS-17",  # at 8/255 only IMP+NRSLoss keeps the dense accuracy
        "NRS-19",  # TP is more accurate than IMP on FashionMNIST
        "CAR-1",  # Flowers, 70 %, 1,000 images: 79 < 84
        "CAR-5",  # Flowers, 70 %: HYDRA above LMP
        "CAR-8",  # ResNet-18 and MobileNet-V2 lose accuracy
    }


def test_printed_counts_agree_with_the_tables():
    assert printed.usn_against_random() == Finding(13, 0, 2, 0, True)
    assert printed.usn_against_unpruned() == Finding(3, 10, 2, 0, True)
    gain = by_id("NRS-3").printed()
    assert (gain.wins, gain.losses) == (1, 0)
    assert "8.2" in gain.note
    with pytest.raises(ValueError, match="no two printed rows"):
        printed.usn(("I",), printed.where(rule="nobody"), printed.where(rule="usn"), ("rho",))


def test_images_are_the_unit_and_seeds_do_not_count_twice():
    records = found({("imp", 0.5): "1111111100", ("magnitude", 0.5): "0000000000"})
    evidence = Verifies(picked("imp"), picked("magnitude")).ask(observations(records))
    assert evidence.units == 10
    assert evidence.pairs == 3
    assert evidence.seeds == 3
    assert evidence.difference == pytest.approx(0.8)
    assert evidence.p == sign_test([1] * 8 + [0] * 2).p
    assert evidence.low < 0.8 < evidence.high


def test_pairs_share_context_ratio_and_seed():
    other = Perturb("linf", 0.2)
    records = found({("imp", 0.5): "1100000000"}) + found({("magnitude", 0.5): "0" * 10}, perturbations=(other,))
    assert Verifies(picked("imp"), picked("magnitude")).ask(observations(records)) is None
    records = found({("imp", 0.5): "1100000000", ("magnitude", 0.8): "0" * 10})
    assert Verifies(picked("imp"), picked("magnitude")).ask(observations(records)) is None
    assert Verifies(picked("imp"), picked("magnitude"), same_ratio=False).ask(observations(records)) is not None


def test_verdicts():
    question = Verifies(picked("imp"), picked("magnitude"))
    claim = dataclasses.replace(CLAIMS[0], question=question)
    for bits, expected in (
        (("1" * 10, "0" * 10), Verdict.SUPPORTED),
        (("0" * 10, "1" * 10), Verdict.CONTRADICTED),
        (("1110000000", "0001000000"), Verdict.UNDECIDED),
    ):
        records = found({("imp", 0.5): bits[0], ("magnitude", 0.5): bits[1]})
        (answer,) = evaluate([claim], records)
        assert answer.verdict is expected
    (answer,) = evaluate([claim], [])
    assert answer.verdict is Verdict.NOT_RUN
    assert claim.decide in answer.reason
    (answer,) = evaluate([claim], [record for record in records if record["cell"]["seed"] == 0])
    assert answer.verdict is Verdict.UNDECIDED
    assert answer.reason.startswith("one seed")


def test_holm_counts_only_claims_with_evidence():
    bits = {("imp", 0.5): "1111110000", ("magnitude", 0.5): "0" * 10}  # p = 1/32
    claim = dataclasses.replace(CLAIMS[0], question=Verifies(picked("imp"), picked("magnitude")))
    absent = dataclasses.replace(claim, question=Verifies(picked("usn"), picked("random")))
    alone, nothing = evaluate([claim, absent], found(bits))
    assert alone.p == pytest.approx(2 / 64)
    assert alone.verdict is Verdict.SUPPORTED
    assert nothing.p is None
    twice = evaluate([claim, claim], found(bits))
    assert [answer.p for answer in twice] == pytest.approx([4 / 64] * 2)
    assert {answer.verdict for answer in twice} == {Verdict.UNDECIDED}


def test_somewhere_pays_for_its_search():
    methods = {("imp", 0.5): "1" * 7 + "000", ("imp", 0.8): "0" * 10, ("dense", 0.0): "0" * 10}
    evidence = VerifiesSomewhere(picked("imp"), picked("dense")).ask(observations(found(methods)))
    assert "ratio 0.5" in evidence.detail
    assert evidence.p == pytest.approx(2 * sign_test([1] * 7).p)
    worse = {("imp", 0.5): "0" * 10, ("imp", 0.8): "0" * 10, ("dense", 0.0): "1" * 10}
    evidence = VerifiesSomewhere(picked("imp"), picked("dense")).ask(observations(found(worse)))
    assert evidence.difference == -1.0
    assert evidence.p < 0.05


def test_numbers_are_compared_seed_by_seed():
    def unstable(one):
        return {"imp": 10.0, "dense": 13.0}[one.method] + one.seed

    records = found({("imp", 0.5): "1" * 10, ("dense", 0.0): "1" * 10})
    question = Measures(picked("imp"), picked("dense"), unstable, more=False, same_ratio=False)
    evidence = question.ask(observations(records))
    assert evidence.difference == 3.0
    assert evidence.unit == "seeds"
    assert evidence.units == 3
    assert evidence.p == 0.0
    one_seed = question.ask(observations(records[::3]))
    assert one_seed.p == 1.0
    assert math.isinf(one_seed.high)


def test_trends_and_gains():
    methods = {("dense", 0.0): "1" * 10, ("imp", 0.5): "1" * 10, ("imp", 0.8): "1" * 10, ("imp", 0.9): "1" * 10}
    seen = observations(found(methods))
    imp, dense = picked("imp"), picked("dense")
    assert Falls(imp, dense, lambda one: -one.ratio).ask(seen).difference == 1.0
    assert Falls(imp, dense, lambda one: -one.ratio, rises=True).ask(seen).difference == -1.0
    assert Falls(dense, dense, lambda one: 1.0).ask(seen) is None  # one ratio is no trend
    # The dense network begins the series; two of its three pairs fall.
    two = [one for one in seen if one.ratio < 0.85]
    start = {0.0: 0.3, 0.5: 0.5, 0.8: 0.2}
    assert Falls(imp, dense, lambda one: start[one.ratio]).ask(two).difference == pytest.approx(1 / 3)
    low, high = Perturb("contrast", 0.01), Perturb("contrast", 0.05)
    records = found({("imp", 0.5): "1110000000", ("random", 0.5): "0" * 10}, perturbations=(high,))
    records += found({("imp", 0.5): "1000000000", ("random", 0.5): "0" * 10}, perturbations=(low,))
    gains = Gains(picked("imp"), picked("random"), lambda one: one.perturbation == "contrast 0.05")
    assert gains.ask(observations(records)).difference == pytest.approx(0.2)


def test_one_verifier_is_held_against_another_image_by_image():
    seen = observations(found({("imp", 0.5): "1110000000", ("dense", 0.0): "1" * 10}))
    evidence = Exceeds(picked("imp"), lambda one: "1000000000").ask(seen)
    assert (evidence.difference, evidence.units, evidence.seeds) == (pytest.approx(0.2), 10, 3)
    assert Exceeds(picked("imp"), lambda one: None).ask(seen) is None


def test_the_numbers_that_the_nrs_claims_read_are_those_that_its_suite_records():
    def records(name, mean, crown):
        made = found({(name, 0.5): "1110000000"}, training=Training("ibp", epochs=2, eps=0.1), perturbations=(LINF,))
        own = {
            "stability": {"pre_activation": {"mean": mean}},
            "bounds": {"ibp": {"bits": "1" + "0" * 9}, "crown": crown},
        }
        return [{**record, "results": [record["results"][0] | own]} for record in made]

    both = records("imp", -0.8, {"bits": "01" + "0" * 8}) + records("imp+nrs", -0.9, None)
    by_name = {answer.claim.id: answer for answer in evaluate(CLAIMS, both)}
    assert by_name["NRS-11"].evidence.difference == pytest.approx(0.1)
    assert by_name["NRS-16"].evidence.difference == pytest.approx((0.1 + 0.2) / 2)


NEEDS_LONGER_RUNS = {"NRS-1", "NRS-3", "NRS-4", "NRS-12", "NRS-17", "CAR-9", "CAR-10", "CAR-11", "CAR-12", "CAR-13",
                     "CAR-14", "USN-6"}  # fmt: skip
"""On these the presets that are made for a sitting say nothing."""


def test_records_of_the_quick_presets_bear_on_every_other_claim():
    shipped = nrs_records.unfold(packed.merged(packed.read_all()))
    silent = {answer.claim.id for answer in evaluate(CLAIMS, shipped) if answer.verdict is Verdict.NOT_RUN}
    assert silent <= NEEDS_LONGER_RUNS


def test_what_would_decide_a_claim_can_be_run():
    for command in {claim.decide for claim in CLAIMS}:
        suite, _, preset, *more = command.removeprefix("python -m runs.compare ").split()
        datasets = tuple(more[1:]) if more else ()
        assert plan(suite, preset, Selection(datasets=datasets)).cells, command


def test_the_best_of_all_is_ahead_of_each():
    def ask(**bits):
        made = found({(name, 0.5): own for name, own in ({"imp": "1" * 8 + "0" * 2} | bits).items()})
        rivals = tuple(bits)
        questions = tuple(Verifies(picked("imp"), picked(rival)) for rival in rivals)
        return AgainstEach(questions, rivals).ask(observations(made))

    clear = ask(snip="0" * 10, taylor="1" * 2 + "0" * 8)
    assert (clear.difference, clear.detail) == (pytest.approx(0.6), "against taylor, the best of 2 rivals")
    assert clear.p == pytest.approx(2 * 0.5**6)
    # Far ahead of one on average and behind another: behind.
    mixed = ask(snip="0" * 10, taylor="1" * 10)
    assert (mixed.difference, mixed.detail) == (pytest.approx(-0.2), "against taylor, the best of 2 rivals")
    assert mixed.p == pytest.approx(2 * 0.5)
    assert ask(snip="0" * 10).detail == "against snip"
    assert AgainstEach((Verifies(picked("car"), picked("imp")),), ("imp",)).ask([]) is None


def test_claims_are_put_to_the_perturbations_that_they_are_about():
    def verdict(name, *, eps, **changes):
        training = Training("ibp", epochs=2, eps=eps)
        first, second = ("usn", "random-channels") if name == "USN-1" else ("imp", "dense")
        ratios = {"usn": 0.2, "random-channels": 0.2, "imp": 0.5, "dense": 0.0}
        records = [
            make_record(make_cell(method, ratios[method], seed, training=training, **changes), bits)
            for method, bits in ((first, "1" * 10), (second, "0" * 10))
            for seed in SEEDS
        ]
        return evaluate([by_id(name)], records)[0].verdict

    narrow = Perturb("linf", 2 / 255)
    for name, perturbation, eps, wanted in (
        ("USN-1", BRIGHTNESS, 0.1, Verdict.SUPPORTED),
        ("USN-1", LINF, 0.1, Verdict.NOT_RUN),
        ("NRS-2", LINF, 0.1, Verdict.SUPPORTED),
        ("NRS-2", narrow, 0.1, Verdict.NOT_RUN),  # not the radius of the training
        ("NRS-2", BRIGHTNESS, 0.1, Verdict.NOT_RUN),
        ("NRS-17", LINF, 0.1, Verdict.NOT_RUN),  # is about 8/255
        ("NRS-17", Perturb("linf", 8 / 255), 8 / 255, Verdict.SUPPORTED),
        ("NRS-18", LINF, 0.1, Verdict.SUPPORTED),
    ):
        assert verdict(name, eps=eps, perturbations=(perturbation,)) is wanted, (name, perturbation)
    sampled = Verifier("probabilistic", images=10)
    assert verdict("USN-1", eps=None, perturbations=(BRIGHTNESS,), verifier=sampled) is Verdict.NOT_RUN


def test_most_methods_match():
    bits = "1" * 5 + "0" * 5
    same = {(name, 0.5): bits for name in ("imp", "snip", "taylor")} | {("dense", 0.0): bits}
    question = MatchesSomewhere(picked("imp", "snip", "taylor"), picked("dense"))
    evidence = question.ask(observations(found(same)))
    assert evidence.difference == 0.5
    assert evidence.p == 0.0
    assert evidence_text(evidence, 0.0).startswith("3 of 3 methods match within 2%: imp, snip, taylor; p < 0.001; n = ")
    worse = same | {("snip", 0.5): "0" * 10, ("taylor", 0.5): "0" * 10}
    evidence = question.ask(observations(found(worse)))
    assert evidence.difference == pytest.approx(1 / 3 - 0.5)
    assert evidence.p > 0.5


def test_usn_claims_read_variants():
    training = Training("natural", epochs=2)

    def cell(variant, ratio, seed):
        own = settings(lambda_w=10.0, prune={"usn": "high", "random": "random"}[variant])
        pruning = Pruning("usn", ratio, own)
        return make_cell(seed=seed, training=training, pruning=pruning, perturbations=(BRIGHTNESS,))

    records = [make_record(cell("usn", 0.2, seed), "1" * 10) for seed in SEEDS]
    records += [make_record(cell("random", 0.2, seed), "0" * 10) for seed in SEEDS]
    (answer,) = evaluate([by_id("USN-1")], records)
    assert answer.verdict is Verdict.SUPPORTED
    assert answer.finding is not None


def test_random_weights_are_not_the_random_channels_of_the_claim():
    under = (BRIGHTNESS,)
    records = [make_record(make_cell("usn", 0.2, seed, perturbations=under), "1" * 10) for seed in SEEDS]
    weights = [make_record(make_cell("random", 0.2, seed, perturbations=under), "0" * 10) for seed in SEEDS]
    (answer,) = evaluate([by_id("USN-1")], records + weights)
    assert answer.verdict is Verdict.NOT_RUN
    own = Pruning("random", 0.2, settings(structured=True))
    channels = [make_record(make_cell(seed=seed, pruning=own, perturbations=under), "0" * 10) for seed in SEEDS]
    (answer,) = evaluate([by_id("USN-1")], records + weights + channels)
    assert answer.verdict is Verdict.SUPPORTED
    assert answer.evidence is not None
    assert answer.evidence.pairs == len(SEEDS)


def test_epochs_in_all_match_methods_that_divide_them_up_differently():
    def records(dense_total):
        whole = Training("ibp", epochs=12, eps=0.1)
        parts = dataclasses.replace(whole, epochs=4)
        for seed in SEEDS:
            for name, ratio, training, total, bits in (
                ("dense", 0.0, whole, dense_total, "0" * 10), ("imp", 0.8, parts, 12, "1" * 10),
            ):  # fmt: skip
                record = make_record(make_cell(name, ratio, seed, training=training), bits)
                yield {**record, "training": {"epochs": total}}

    (answer,) = evaluate([by_id("NRS-2")], list(records(12)))
    assert answer.verdict is Verdict.SUPPORTED
    for other in (18, None):  # another budget, and one that is not on record
        (answer,) = evaluate([by_id("NRS-2")], list(records(other)))
        assert answer.verdict is Verdict.NOT_RUN


def test_files_and_terminal(tmp_path, capsys):
    from rich.console import Console

    answers = evaluate(CLAIMS, found({("imp", 0.5): "1" * 10, ("dense", 0.0): "0" * 10}))
    print_terminal(answers, Console(width=200))
    shown = capsys.readouterr().out
    assert "CONTRADICTS ITSELF" in shown
    assert "no record" in shown
    written = export(answers, tmp_path)
    assert {path.name for path in written} == {"claims.md", "claims.json"}
    loaded = json.loads((tmp_path / "claims.json").read_text())
    assert [entry["id"] for entry in loaded] == [claim.id for claim in CLAIMS]
    assert len((tmp_path / "claims.md").read_text().splitlines()) == len(CLAIMS) + 6


def test_a_difference_that_is_rounding_is_nothing():
    evidence = Evidence(-5.5e-17, -math.inf, math.inf, 1.0, 3, "seeds", 5, 3, "sign test")
    assert evidence_text(evidence, 1.0).startswith("+0; p = 1; n = 3 seeds")
    small = dataclasses.replace(evidence, difference=-1.14e-05)
    assert evidence_text(small, 1.0).startswith("-1.14e-05; ")
