from __future__ import annotations

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runs.cell import Cell, Data, Network, Perturb, Pruning, Training, Verifier, from_dict, magnitude_text, settings
from tests.runs.handmade import make_cell


def test_key_is_stable_over_versions() -> None:
    # A changed key orphans every record on disk: it may change only together with SCHEMA.
    assert make_cell().key == "9cd38a3722f76ff1"


def test_key_is_the_same_in_a_new_process_and_after_a_round_trip() -> None:
    cell = make_cell("imp", 0.8, 2, perturbations=(Perturb("linf", 2 / 255), Perturb("brightness", 0.1)))
    again = from_dict(json.loads(json.dumps(cell.to_dict())))
    assert again == cell
    assert again.key == cell.key


def _variants(cell: Cell) -> list[Cell]:
    change = dataclasses.replace
    return [
        change(cell, pruning=Pruning("random", 0.5)),
        change(cell, pruning=Pruning("magnitude", 0.6)),
        change(cell, pruning=Pruning("magnitude", 0.5, settings(scope="layer"))),
        change(cell, training=Training("ibp", epochs=2, eps=0.1)),
        change(cell, training=Training("natural", epochs=3)),
        change(cell, training=Training("natural", epochs=2, batch_size=32)),
        change(cell, training=Training("natural", epochs=2, settings=settings(lr=0.1))),
        change(cell, network=Network("cnn7_cw")),
        change(cell, network=Network("mlp", width=0.5)),
        change(cell, network=Network("mlp", head="dsnt")),
        change(cell, data=Data("mnist")),
        change(cell, data=Data("digits", limit=10)),
        change(cell, data=Data("digits", val_limit=10)),
        change(cell, data=Data("digits", augment=True)),
        change(cell, perturbations=(Perturb("linf", 0.2),)),
        change(cell, perturbations=(Perturb("l2", 0.1),)),
        change(cell, perturbations=(Perturb("linf", 0.1), Perturb("l2", 0.1))),
        change(cell, verifier=Verifier("ibp", images=10)),
        change(cell, verifier=Verifier("crown", images=11)),
        change(cell, verifier=Verifier("crown", images=10, seconds=5)),
        change(cell, verifier=Verifier("crown", images=10, delta=0.5)),
        change(cell, seed=1),
        change(cell, schema=2),
    ]


def test_every_field_that_changes_the_answer_changes_the_key() -> None:
    cell = make_cell("magnitude", 0.5)
    keys = [cell.key, *(variant.key for variant in _variants(cell))]
    assert len(set(keys)) == len(keys)


def test_only_certification_leaves_the_training_key() -> None:
    cell = make_cell("magnitude", 0.5)
    same = [v for v in _variants(cell) if v.training_key == cell.training_key]
    assert len(same) == 7
    assert all(v.perturbations != cell.perturbations or v.verifier != cell.verifier for v in same)


def test_what_does_not_change_the_answer_does_not_change_the_key() -> None:
    a = make_cell(perturbations=(Perturb("linf", 0.1), Perturb("brightness", 0.2)))
    b = make_cell(perturbations=(Perturb("brightness", 0.2), Perturb("linf", 0.1)))
    assert a.key == b.key
    assert Pruning("imp", 0, settings(b=1, a=2)) == Pruning("imp", 0.0, settings(a=2, b=1))
    assert make_cell("dense", 0).key == make_cell("dense", 0.0).key
    names = set(json.dumps(a.to_dict()).replace('"', " ").split())
    assert not names & {"device", "workers", "threads", "preset", "suite", "path"}


@pytest.mark.parametrize(
    ("text", "kind", "magnitude"),
    [("linf:0.1", "linf", 0.1), ("brightness:2/255", "brightness", 2 / 255), ("l2=1e-1", "l2", 0.1)],
)
def test_parse_perturbation(text: str, kind: str, magnitude: float) -> None:
    assert Perturb.parse(text) == Perturb(kind, magnitude)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("linf", "expected KIND:SIZE"),
        ("fog:0.1", "unknown perturbation 'fog'; known: linf"),
        ("linf:-0.1", "must be >= 0"),
        ("linf:1/0", "cannot read the magnitude"),
        ("linf:1e999", "finite"),
    ],
)
def test_bad_perturbations_say_why(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Perturb.parse(text)


@given(st.integers(1, 254))
def test_magnitude_text_reads_back(k: int) -> None:
    text = magnitude_text(k / 255)
    assert Perturb.parse(f"linf:{text}").magnitude == pytest.approx(k / 255, abs=5e-7)


def test_magnitude_text_keeps_short_decimals() -> None:
    assert [magnitude_text(v) for v in (0.1, 0.02, 2 / 255, 0.2, 1.0)] == ["0.1", "0.02", "2/255", "0.2", "1"]


@pytest.mark.parametrize(
    "make",
    [
        lambda: Pruning("imp", 1.0),
        lambda: Pruning("imp", float("nan")),
        lambda: Training("natural", epochs=0),
        lambda: Training("ibp", eps=-0.1),
        lambda: Network("mlp", width=0),
        lambda: Data("digits", limit=0),
        lambda: Verifier(images=0),
        lambda: Verifier(delta=0),
        lambda: make_cell(perturbations=()),
        lambda: make_cell(perturbations=(Perturb("linf", 0.1), Perturb("linf", 0.1))),
        lambda: Pruning("imp", 0.5, (("a", 1), ("a", 2))),
    ],
)
def test_out_of_range_is_refused(make: object) -> None:
    assert callable(make)
    with pytest.raises(ValueError, match=r"."):
        make()


def test_from_dict_refuses_what_is_not_a_cell() -> None:
    good = make_cell().to_dict()
    with pytest.raises(ValueError, match="not a cell"):
        from_dict({k: v for k, v in good.items() if k != "pruning"})
    with pytest.raises(ValueError, match="not a cell"):
        from_dict(good | {"pruning": {"method": "imp", "colour": "red"}})
