from __future__ import annotations

import csv
import dataclasses
import io
import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from scipy.stats import binomtest

from runs import leaderboard, plots, report, report_page
from runs.cell import Data, Network, Perturb, Training, Verifier
from runs.store import Record, StoreError
from tests.runs.handmade import make_cell, make_failure, make_record

DENSE = ("1100000000", "1110000000", "1000000000")
PRUNED = ("1111100000", "1111110000", "1111111000")


@pytest.fixture
def records() -> list[Record]:
    made = [make_record(make_cell("dense", seed=s), bits, clean=0.9 + s / 100) for s, bits in enumerate(DENSE)]
    made += [make_record(make_cell("imp", 0.5, seed=s), bits, clean=0.8) for s, bits in enumerate(PRUNED)]
    return [*made, make_failure()]


def test_golden_rows(records: list[Record]) -> None:
    (table,) = leaderboard.build(records)
    assert table.title == "digits · mlp · linf 0.1"
    best, dense, failed = table.rows
    assert (best.method, dense.method, failed.method) == ("imp", "dense", "magnitude")
    assert best.verified is not None
    assert best.verified.mean == pytest.approx(0.6)
    assert best.verified.sd == pytest.approx(0.1)
    assert best.seeds == (0, 1, 2)
    assert best.images == 10
    exact = binomtest(6, 10).proportion_ci(method="exact")
    assert best.interval is not None
    assert (best.interval.low, best.interval.high) == pytest.approx((exact.low, exact.high))
    assert best.attacked is not None
    assert best.attacked.mean == pytest.approx(0.8)
    assert best.counts == leaderboard.Counts(holds=18, violated=6, unknown=6, timeout=0)
    assert best.parameters_left == pytest.approx(0.6)
    assert best.flops_nonzero == pytest.approx(0.55)
    assert best.flops_executed == 1.0
    assert best.seconds == 0.5
    assert best.peak_mb == 321.0
    assert dense.clean is not None
    assert (dense.clean.mean, dense.clean.sd) == pytest.approx((0.91, 0.01))


def test_sign_test_counts_images_not_seeds(records: list[Record]) -> None:
    (table,) = leaderboard.build(records)
    imp = table.rows[0]
    # Per image over three seeds, IMP minus dense: 0 1 2 3 3 2 1 0 0 0 → six wins, no loss.
    assert imp.versus_dense is not None
    assert (imp.versus_dense.wins, imp.versus_dense.losses, imp.versus_dense.ties) == (6, 0, 4)
    assert imp.versus_dense.p == pytest.approx(2 / 2**6)
    assert imp.versus_dense_difference == pytest.approx(0.4)
    assert table.rows[1].versus_dense is None


def test_failed_cells_are_rows_with_their_error(records: list[Record]) -> None:
    (table,) = leaderboard.build(records)
    row = table.rows[-1]
    assert row.failed
    assert row.errors == ("seed 0: FloatingPointError: loss is NaN in epoch 3",)
    assert any("FAILED magnitude 0.5 natural: seed 0: FloatingPointError" in line for line in report.notes(table))
    for text in (report.markdown([table]), report.as_csv([table]), report_page.as_html([table], records, [])):
        assert "loss is NaN in epoch 3" in text
        assert "FAILED" in text or "failed" in text


def test_a_row_with_some_failed_seeds_shows_both(records: list[Record]) -> None:
    failure = make_failure()
    cell = make_cell("imp", 0.5, seed=3)
    failure = failure | {"cell": cell.to_dict(), "key": cell.key}
    (table,) = leaderboard.build([*records, failure])
    row = table.rows[0]
    assert not row.failed
    assert len(row.seeds) == 3
    assert row.errors == ("seed 3: FloatingPointError: loss is NaN in epoch 3",)


def test_one_seed_is_not_ranked_and_keeps_the_plans_order() -> None:
    (table,) = leaderboard.build(
        [make_record(make_cell("dense"), DENSE[0]), make_record(make_cell("imp", 0.5), PRUNED[0])]
    )
    assert table.ordered == 0
    assert [row.method for row in table.rows] == ["dense", "imp"]
    assert table.ranking_note == "one seed: no ranking"
    assert table.rows[0].verified is not None
    assert table.rows[0].verified.sd is None


def test_tables_are_split_by_data_net_perturbation_and_verifier() -> None:
    both = (Perturb("linf", 0.1), Perturb("brightness", 0.1))
    made = [
        make_cell(perturbations=both),
        make_cell(network=Network("mlp", width=0.5)),
        make_cell(data=Data("digits", limit=50)),
        make_cell(verifier=Verifier("ibp", images=10)),
        make_cell(seed=1),
    ]
    tables = leaderboard.build([make_record(cell, "1111100000") for cell in made])
    assert len(tables) == 5
    assert [len(table.rows[0].seeds) for table in tables] == [1, 2, 1, 1, 1]


def test_rows_that_differ_in_settings_only_are_told_apart() -> None:
    short, long = Training("natural", epochs=2), Training("natural", epochs=9)
    (table,) = leaderboard.build([make_record(make_cell(training=t), "1000000000") for t in (short, long)])
    assert [row.note for row in table.rows] == ["epochs=2", "epochs=9"]


def test_paper_column_shrinks_to_a_line_when_nothing_is_comparable() -> None:
    cell = make_cell("imp", 0.5, data=Data("fashion_mnist"), network=Network("cnn7_nrs", width=0.25))
    (table,) = leaderboard.build([make_record(cell, "1000000000")])
    assert "Paper" not in {column.heading for column in report.columns(table)}
    assert table.paper_note is not None
    assert "n/c (not comparable) in every row" in table.paper_note
    assert "cnn7_nrs ×0.25" in table.paper_note


def test_paper_column_shows_the_difference_where_comparable() -> None:
    cell = make_cell(
        "imp",
        0.93,
        data=Data("fashion_mnist"),
        network=Network("cnn7_nrs"),
        training=Training("crown-ibp", epochs=200, eps=0.1),
        verifier=Verifier("bab", images=200, seconds=300),
    )
    other = dataclasses.replace(cell, seed=0, training=Training("fgsm", epochs=200, eps=0.1))
    (table,) = leaderboard.build([make_record(cell, "1" * 150 + "0" * 50), make_record(other, "0" * 200)])
    (column,) = [column for column in report.columns(table) if column.heading == "Paper"]
    assert [column.text(row, table) for row in table.rows] == ["73.5 (Δ +1.5)", "n/c"]
    assert any(line.startswith("Paper, imp 0.93 fgsm 0.1: n/c, sparsity") for line in report.notes(table))


def test_keypoints_show_pixels_and_say_what_is_proved() -> None:
    cell = make_cell(data=Data("aircraft"), perturbations=(Perturb("brightness", 2 / 255),))
    (table,) = leaderboard.build([make_record(cell, "1111111110", clean=2.345, task="keypoints")])
    assert "Error px" in {column.heading for column in report.columns(table)}
    assert "no keypoint moves by more than 1 px" in report.caption(table)
    assert "2.35" in report.markdown([table]) or "2.34" in report.markdown([table])


def test_csv_and_json_carry_full_precision(records: list[Record]) -> None:
    tables = leaderboard.build(records)
    rows = list(csv.DictReader(io.StringIO(report.as_csv(tables))))
    assert len(rows) == 3
    assert float(rows[0]["verified_mean"]) == tables[0].rows[0].verified.mean  # type: ignore[union-attr]
    content = json.loads(report.as_json(tables, records))
    assert content["rows"][0]["verified_high"] == tables[0].rows[0].interval.high  # type: ignore[union-attr]
    assert content["keys"] == sorted(record["key"] for record in records)


@pytest.mark.parametrize("width", [80, 100, 120, 160, 200])
def test_terminal_table_fits_its_width(records: list[Record], width: int) -> None:
    console = Console(width=width, file=io.StringIO(), color_system=None)
    report.print_terminal(leaderboard.build(records), console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert max(map(len, text.splitlines())) <= width
    for needed in ("imp", "dense", "60.0 ±10.0 [26, 88]", "FAILED", "natural"):
        assert needed in text
    assert "…" not in text


def test_plots_are_svg_and_absent_without_results(records: list[Record]) -> None:
    tables = leaderboard.build(records)
    made = plots.all_plots(tables)
    assert len(made) == 4
    for _, image in made:
        assert ElementTree.fromstring(image).tag == "{http://www.w3.org/2000/svg}svg"
    assert plots.all_plots(tables) == made  # the same bytes for the same records
    assert plots.all_plots(leaderboard.build([make_failure()])) == []


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=12))
def test_the_front_is_what_nothing_beats(points: list[tuple[int, int]]) -> None:
    def beaten(one: tuple[int, int]) -> bool:
        return any(other[0] <= one[0] and other[1] >= one[1] and other != one for other in points)

    chosen = [points[i] for i in plots.front(points)]
    assert set(chosen) == {point for point in points if not beaten(point)}
    assert chosen == sorted(set(chosen))


def test_export_writes_what_is_asked(records: list[Record], tmp_path: Path) -> None:
    tables = leaderboard.build(records)
    written = report.export(tables, records, tmp_path, ["md", "csv", "md"])
    assert [path.name for path in written] == ["leaderboard.md", "leaderboard.csv"]
    (picture,) = report.export(tables, records, tmp_path, ["svg"])
    assert picture.read_text().count("<svg ") == 1
    assert "<image" not in picture.read_text()
    assert report.export([], [], tmp_path, ["svg"]) == []
    with pytest.raises(ValueError, match="unknown export format 'pdf'"):
        report.export(tables, records, tmp_path, ["pdf"])
    with pytest.raises(StoreError):
        report.export(tables, records, tmp_path / "absent", ["md"])
