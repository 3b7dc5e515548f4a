from __future__ import annotations

import csv
from collections import Counter
from importlib import resources

import pytest

from runs import paper
from runs.cell import Data, Network, Perturb, Pruning, Training, Verifier
from tests.runs.handmade import make_cell


def test_every_printed_row_is_loaded() -> None:
    counts = Counter(printed.paper for printed in paper.load())
    assert counts == {paper.USN: 80, paper.NRS: 111, paper.CAR: 86}
    for name, total in (("usn.csv", 80), ("certified_pruning.csv", 111), ("car.csv", 86)):
        text = resources.files("runs").joinpath("paper_numbers", name).read_text()
        assert len(list(csv.DictReader(text.splitlines()))) == total


def test_values_are_fractions_and_ratios_are_removed_shares() -> None:
    assert all(0 <= p.value <= 1 for p in paper.load())
    assert all(p.ratio is None or 0 <= p.ratio < 1 for p in paper.load())


def test_printed_usn_values_are_counts_of_154_images() -> None:
    for printed in paper.load():
        if printed.paper == paper.USN:
            assert printed.images == 154
            assert int(1e4 * round(printed.value * 154) / 154 + 1e-6) == round(printed.value * 1e4)


def nrs_cell(**changes: object):
    parts = {
        "pruning": Pruning("imp", 0.93),
        "training": Training("crown-ibp", epochs=200, eps=0.1),
        "network": Network("cnn7_nrs"),
        "data": Data("fashion_mnist"),
        "verifier": Verifier("bab", images=200, seconds=300),
    }
    return make_cell(**(parts | changes))


def test_the_papers_own_conditions_are_comparable() -> None:
    comparison = paper.compare(nrs_cell(), Perturb("linf", 0.1))
    assert comparison is not None
    assert comparison.comparable
    assert comparison.printed.value == pytest.approx(0.735)
    shown = paper.describe(comparison, 0.75)
    assert shown["difference"] == pytest.approx(0.015)
    assert shown["source"] == "NRSLoss pruning, Table I"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"network": Network("cnn7_nrs", width=0.25)}, "network: cnn7_nrs ×0.25"),
        ({"training": Training("ibp", epochs=200, eps=0.1)}, "training: ibp, not"),
        ({"training": Training("crown-ibp", epochs=10, eps=0.1)}, "epochs: 10, not 200"),
        ({"verifier": Verifier("crown", images=200)}, "verifier: crown, not beta-CROWN"),
        ({"verifier": Verifier("bab", images=100)}, "images: 100, not 200"),
        ({"data": Data("fashion_mnist", limit=5000)}, "5,000 training images"),
        ({"pruning": Pruning("imp", 0.5)}, "sparsity: 0.5, not 0.93"),
    ],
)
def test_each_difference_makes_it_not_comparable(changes: dict[str, object], reason: str) -> None:
    comparison = paper.compare(nrs_cell(**changes), Perturb("linf", 0.1))
    assert comparison is not None
    assert not comparison.comparable
    assert any(reason in text for text in comparison.reasons), comparison.reasons
    assert paper.describe(comparison, 0.5)["difference"] is None


def test_another_radius_is_not_comparable() -> None:
    comparison = paper.compare(nrs_cell(), Perturb("linf", 2 / 255))
    assert comparison is not None
    assert any("magnitude" in text for text in comparison.reasons)


def test_a_subset_is_never_taken_for_the_whole() -> None:
    cell = nrs_cell(data=Data("cifar10_subset"), training=Training("crown-ibp", epochs=200, eps=2 / 255))
    comparison = paper.compare(cell, Perturb("linf", 2 / 255))
    assert comparison is not None
    assert any("data: cifar10_subset, not cifar10" in text for text in comparison.reasons)


def test_data_that_is_not_public_is_never_comparable() -> None:
    cell = make_cell(
        "random", 0.1, data=Data("aircraft"), network=Network("cnn7_cw"), verifier=Verifier("bab", images=154)
    )
    comparison = paper.compare(cell, Perturb("brightness", 2 / 255))
    assert comparison is not None
    assert "the paper's images are not public" in comparison.reasons


def test_rows_in_no_paper_have_no_number() -> None:
    assert paper.compare(make_cell("magnitude", 0.5), Perturb("linf", 0.1)) is None
    assert paper.describe(None, 0.5)["printed"] is None
