from __future__ import annotations

import dataclasses
import io
import itertools
import math

import pytest
from rich.console import Console
from scipy.stats import norm

from runs import leaderboard, ranking, report
from runs.ranking import Entrant
from runs.statistics import MeanSd, Rank, holm, paired_interval, ranks, sign_test
from runs.store import Record
from tests.runs.handmade import make_cell, make_record


def test_paired_interval_is_agresti_and_mins_variance_by_hand() -> None:
    # 7 wins, 2 losses, 31 ties; with half a pair added to each of the four cells of the table.
    differences = [1.0] * 7 + [-1.0] * 2 + [0.0] * 31
    n, b, c = 42, 7.5, 2.5
    half = norm.ppf(0.975) * math.sqrt((b + c - (b - c) ** 2 / n) / n**2)
    found = paired_interval(differences)
    assert (found.low, found.high) == pytest.approx(((b - c) / n - half, (b - c) / n + half))


def test_paired_interval_without_a_difference_is_not_a_point() -> None:
    few, many = paired_interval([0.0] * 20), paired_interval([0.0] * 200)
    assert few.low < many.low < 0 < many.high < few.high
    assert paired_interval([0.5] * 50).low > 0.3
    with pytest.raises(ValueError, match=r"numbers in \[-1, 1\]"):
        paired_interval([])
    with pytest.raises(ValueError, match=r"confidence must lie in \(0, 1\)"):
        paired_interval([0.0], 1.0)


def scores(verified: int, images: int = 40) -> list[float]:
    return [1.0] * verified + [0.0] * (images - verified)


def test_clear_winners_and_ties() -> None:
    assert ranks([scores(40), scores(20), scores(0)]) == [Rank(1, 1), Rank(2, 2), Rank(3, 3)]
    assert ranks([scores(20), scores(20), scores(21)]) == [Rank(1, 3)] * 3
    assert str(Rank(1, 3)) == "1–3"
    assert str(Rank(2, 2)) == "2"


def test_ranks_need_not_be_transitive_and_say_so() -> None:
    # The best beats the worst; the middle is tied with both.
    assert ranks([scores(20), scores(15), scores(10)]) == [Rank(1, 2), Rank(1, 3), Rank(2, 3)]


def test_ranks_against_the_definition() -> None:
    entrants = [scores(k) for k in (3, 12, 20, 28, 40)]
    pairs = list(itertools.combinations(range(5), 2))
    tests = [sign_test([a - b for a, b in zip(entrants[i], entrants[j])]) for i, j in pairs]
    beats = {
        ((i, j) if test.wins > test.losses else (j, i))
        for (i, j), test, p in zip(pairs, tests, holm([test.p for test in tests]))
        if p <= 0.05
    }
    for k, rank in enumerate(ranks(entrants)):
        assert rank.first == 1 + sum((i, k) in beats for i in range(5))
        assert rank.last == 5 - sum((k, j) in beats for j in range(5))


def test_ranks_pair_images() -> None:
    assert ranks([]) == []
    with pytest.raises(ValueError, match="the same images"):
        ranks([[1.0], [1.0, 0.0]])


def entrant(method: str, verified: int, *, ratio: float = 0.5, parameters: float = 0.5, flops: float = 1.0,
            seeds: tuple[int, ...] = (0, 1, 2), training: str = "natural",
            budget: int | None = 6) -> Entrant:  # fmt: skip
    share = MeanSd(verified / 40, 0.0, len(seeds))
    bits = "".join(str(int(value)) for value in scores(verified))
    return Entrant(method, ratio, training, budget, parameters, flops, share, dict.fromkeys(seeds, bits))


DENSE = entrant("dense", 20, ratio=0.0, parameters=1.0)


def test_rows_are_matched_by_what_was_measured() -> None:
    found = ranking.build(
        [
            DENSE,
            entrant("imp", 40),
            entrant("usn", 22, parameters=0.48, flops=0.51),
            entrant("slimming", 4, parameters=0.47, flops=0.53),
            entrant("off", 40, parameters=0.5 + 2 * ranking.TOLERANCE, flops=0.7),
        ],
        3,
    )
    by_size, by_work = found
    assert (by_size.measure, by_work.measure) == ("parameters", "flops")
    assert [(s.entrant.method, str(s.rank)) for s in by_size.standings] == [
        ("imp", "1"), ("usn", "2–3"), ("dense", "2–3"), ("slimming", "4"),
    ]  # fmt: skip
    assert [s.entrant.method for s in by_work.standings] == ["usn", "dense", "slimming"]
    best = by_size.standings[0]
    assert best.difference == pytest.approx(0.5)
    assert best.interval.low > 0.3
    assert by_size.title == "Ranking at 50 % (±4) of parameters left · natural · 6 epochs in all"
    assert by_size.verdict == "In the lead: imp. Beaten by at least one: usn, dense, slimming."


def test_ties_are_said_in_words() -> None:
    (tied,) = ranking.build([DENSE, entrant("imp", 21), entrant("car", 19)], 3)
    assert tied.verdict == "No method is significantly ahead of another: all are tied."
    (half,) = ranking.build([DENSE, entrant("imp", 21), entrant("random", 2)], 3)
    assert half.verdict.startswith("Tied for the lead: imp, dense. Beaten")


def test_other_trainings_budgets_and_too_few_seeds_are_not_mixed() -> None:
    strangers = [
        entrant("car", 30, training="ibp 0.1"), entrant("usn", 30, budget=12), entrant("snip", 30, seeds=(0, 1)),
    ]  # fmt: skip
    assert ranking.build([DENSE, entrant("imp", 30), *strangers], 3) == ()
    (only,) = ranking.build([DENSE, entrant("imp", 30), entrant("taylor", 30), *strangers], 3)
    assert {s.entrant.method for s in only.standings} == {"dense", "imp", "taylor"}


def test_only_seeds_that_all_have_are_compared() -> None:
    full, none = "1" * 40, "0" * 40
    more = dataclasses.replace(entrant("imp", 40, seeds=(0, 1, 2)), bits={0: full, 1: full, 2: full, 3: none, 4: none})
    (found,) = ranking.build([DENSE, entrant("taylor", 20), more], 3)
    assert found.seeds == (0, 1, 2)
    assert found.standings[0].entrant.method == "imp"
    assert found.standings[0].difference == pytest.approx(0.5)
    other = dataclasses.replace(more, bits=dict.fromkeys((0, 1, 7, 8), full))  # two in common are too few
    assert ranking.build([DENSE, entrant("taylor", 20), other], 3) == ()


def test_without_dense_differences_are_to_the_best() -> None:
    (found,) = ranking.build([entrant("imp", 30), entrant("taylor", 34)], 3)
    assert found.reference == "taylor"
    assert ranking.headings(found)[3] == "Δ taylor [95 %]"
    assert ranking.cells(found)[0][3] == "–"


def made() -> list[Record]:
    records = []
    for seed in range(3):
        for method, ratio, bits, parameters, flops in (
            ("dense", 0.0, "1" * 20 + "0" * 20, 1000, 2000),
            ("imp", 0.5, "1" * 40, 500, 2000),
            ("magnitude", 0.5, "1" * 38 + "00", 520, 2000),
        ):
            epochs = 4 if method == "imp" else 6
            own = make_record(make_cell(method, ratio, seed=seed, images=40), bits, attacked=40)
            own["size"] |= {"parameters_left": parameters, "parameters_executed": 1000, "flops_executed": flops}
            own["training"] = {"epochs": 12}
            own["cell"]["training"]["epochs"] = epochs
            own["results"][0]["sampled"] = {"images": 40, "certified": 30}
            records.append(own)
    return records


def test_a_leaderboard_holds_its_rankings_everywhere() -> None:
    (table,) = leaderboard.build(made())
    (found,) = table.rankings
    assert [(s.entrant.method, str(s.rank)) for s in found.standings] == [
        ("imp", "1–2"), ("magnitude", "1–2"), ("dense", "3"),
    ]  # fmt: skip
    assert found.budget == 12
    assert {row.sampled.mean for row in table.rows if row.sampled} == {0.75}
    console = Console(width=160, file=io.StringIO(), color_system=None)
    report.print_terminal([table], console)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "Tied for the lead: imp, magnitude. Beaten" in shown.replace("\n", " ")
    assert "Sampled %" in report.markdown([table])
    assert "| 1–2 | imp | 100.0 ±0.0 | +50.0 [" in report.markdown([table])
    assert 'class="l">imp</td>' in ranking.page(found)


def test_dense_of_the_same_budget_is_the_reference_however_it_is_divided() -> None:
    (table,) = leaderboard.build(made())
    imp = next(row for row in table.rows if row.method == "imp")
    assert imp.versus_dense is not None
    assert (imp.versus_dense.wins, imp.versus_dense.losses) == (20, 0)
    records = made()
    for record in records:
        if record["cell"]["pruning"]["method"] == "imp":
            record["training"]["epochs"] = 99
    (other,) = leaderboard.build(records)
    assert next(row for row in other.rows if row.method == "imp").versus_dense is None


def test_rows_of_one_seed_do_not_hide_the_ranking_of_the_others() -> None:
    alone = [record for record in made() if record["cell"]["seed"] == 0]
    for record in alone:
        record["cell"]["training"] |= {"objective": "ibp", "eps": 0.1}
    (whole,), (table,) = leaderboard.build(made()), leaderboard.build(alone + made())
    assert table.rankings == whole.rankings
    assert (table.ordered, len(table.rows)) == (3, 6)
    assert [row.method for row in table.rows[:3]] == [row.method for row in whole.rows]
    assert [row.versus_dense_p for row in table.rows[:3]] == [row.versus_dense_p for row in whole.rows]
    assert {row.training for row in table.rows[3:]} == {"ibp 0.1"}
    assert table.ranking_note.endswith("in the rankings below. The last 3, of fewer seeds, are in no order.")


def test_two_seeds_rank_nothing() -> None:
    (table,) = leaderboard.build([record for record in made() if record["cell"]["seed"] < 2])
    assert table.rankings == ()
    assert table.ranking_note == "2 seeds: no ranking"
