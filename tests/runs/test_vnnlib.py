"""The VNN-LIB reader against the meaning of the formulas, evaluated independently."""

import gzip
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runs import vnnlib

TWO = "(declare-const X_0 Real)\n(declare-const X_1 Real)\n(declare-const Y_0 Real)\n(declare-const Y_1 Real)\n"
BOX = "(assert (>= X_0 0))(assert (<= X_0 1))\n(assert (and (<= -1 X_1) (<= X_1 2.5e-1)))\n"


def read(text, shape=(2,), outputs=2):
    return vnnlib.parse(TWO + text, shape, outputs)


def unsafe(problem, x, y):
    return any(region.contains(np.array(x)) and region.is_unsafe(np.array(y)) for region in problem.regions)


def test_a_box_and_one_comparison_have_the_documented_sign():
    problem = read(BOX + "(assert (<= Y_0 Y_1)) ; unsafe when y0 <= y1")
    (region,) = problem.regions
    assert region.lo.tolist() == [0, -1]
    assert region.hi.tolist() == [1, 0.25]
    (conjunction,) = region.unsafe
    assert conjunction.C.tolist() == [[1, -1]]
    assert conjunction.d.tolist() == [0]
    assert unsafe(problem, [0.5, 0], [1, 2])
    assert unsafe(problem, [0.5, 0], [2, 2])
    assert not unsafe(problem, [0.5, 0], [3, 2])
    assert not unsafe(problem, [1.5, 0], [1, 2])


def test_a_disjunction_gives_one_conjunction_a_case_and_a_conjunction_several_rows():
    problem = read(BOX + "(assert (or (and (>= Y_0 1) (<= Y_1 2)) (and (<= (+ (* 2 Y_0) (- Y_1)) -3))))")
    (region,) = problem.regions
    first, second = region.unsafe
    assert first.C.tolist() == [[-1, 0], [0, 1]]
    assert first.d.tolist() == [1, -2]
    assert second.C.tolist() == [[2, -1]]
    assert second.d.tolist() == [3]


def test_disjunctions_over_input_boxes_make_regions():
    text = """(assert (or (and (>= X_0 0) (<= X_0 1) (>= X_1 0) (<= X_1 1) (>= Y_0 5))
                          (and (>= X_0 2) (<= X_0 3) (>= X_1 0) (<= X_1 1) (>= Y_0 6))
                          (and (>= X_0 2) (<= X_0 3) (>= X_1 0) (<= X_1 1) (>= Y_1 7))))"""
    problem = read(text)
    assert [r.lo.tolist() for r in problem.regions] == [[0, 0], [2, 0]]
    assert [len(r.unsafe) for r in problem.regions] == [1, 2]
    assert unsafe(problem, [0.5, 0.5], [5, 0])
    assert not unsafe(problem, [2.5, 0.5], [5, 0])
    assert unsafe(problem, [2.5, 0.5], [0, 7])


def test_an_empty_case_is_dropped_while_another_remains():
    problem = read(BOX + "(assert (or (and (>= X_0 2) (>= Y_0 0)) (and (<= X_0 0.5) (>= Y_0 1))))")
    (region,) = problem.regions
    assert region.hi.tolist() == [0.5, 0.25]


def test_a_strict_comparison_excludes_its_end():
    problem = read("(assert (< X_0 1))(assert (> X_0 0))(assert (>= X_1 0))(assert (<= X_1 0))(assert (< Y_0 Y_1))")
    assert not unsafe(problem, [1.0, 0], [1, 2])
    assert unsafe(problem, [np.nextafter(1.0, 0), 0], [1, 2])
    assert not unsafe(problem, [0.5, 0], [2, 2])


def test_layout_quotes_and_other_commands_do_not_matter():
    plain = read(BOX + "(assert (<= Y_0 Y_1))")
    text = "; comment ( with parens\n(set-logic QF_LRA)\n(set-info :source |two\nlines (|)\n" + BOX
    odd = read(text + "(assert\n(<=\tY_0 ; why\nY_1)\n)\n(check-sat)\n")
    assert np.array_equal(plain.regions[0].hi, odd.regions[0].hi)
    assert np.array_equal(plain.regions[0].unsafe[0].C, odd.regions[0].unsafe[0].C)


def test_a_gzipped_file_reads_like_a_plain_one(tmp_path):
    text = TWO + BOX + "(assert (<= Y_0 Y_1))"
    (tmp_path / "p.vnnlib").write_text(text)
    (tmp_path / "p.vnnlib.gz").write_bytes(gzip.compress(text.encode()))
    a, b = (vnnlib.load(tmp_path / name, (2,), 2) for name in ("p.vnnlib", "p.vnnlib.gz"))
    assert np.array_equal(a.regions[0].lo, b.regions[0].lo)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOX + "(assert (<= Y_0 Y_1)", "line 7: the '\\(' here is never closed"),
        (BOX + "(assert (<= Y_0 Y_1)))", "line 7: a '\\)' closes nothing"),
        (BOX + "assert", "line 7: 'assert' stands outside"),
        (BOX + "\n\n(assert (<= Y_0 Y_2))", "line 9: Y_2 is used before it is declared"),
        (BOX + "(assert (<= (* Y_0 Y_1) 1))", "line 7: .* is not linear"),
        (BOX + "(assert (<= (/ Y_0 0) 1))", "divides by zero"),
        (BOX + "(assert (<= Z 1))", "expected a variable X_<number>"),
        (BOX + "(assert (<= Y_0 nan))", "expected a variable"),
        (BOX + "(assert (max Y_0 Y_1))", "expected and, or, not"),
        (BOX + "(assert (<= X_0 Y_0))", "an input together with an output"),
        (BOX + "(assert (<= (+ X_0 X_1) 1))", "2 inputs at once"),
        (BOX + "(assert (<= 1 2))", "mentions no variable"),
        (BOX + "(assert)", "assert takes one formula"),
        (BOX + "(prove (<= Y_0 Y_1))", "unknown command 'prove'"),
        (BOX + "(declare-const X_0 Real)", "declared twice"),
        (BOX + "(declare-const X_9 Int)", "expected \\(declare-const X_0 Real\\)"),
        (BOX, "says nothing about the outputs"),
        (
            "(assert (<= X_0 1))(assert (>= X_1 0))(assert (<= X_1 1))(assert (<= Y_0 1))",
            "X_0 has no lower or no upper",
        ),
        (BOX + "(assert (>= X_0 3))(assert (<= Y_0 1))", "X_0 has a lower bound above its upper bound"),
        (BOX + "(assert false)(assert (<= Y_0 1))", "every box of inputs is empty"),
    ],
)
def test_bad_text_is_refused_with_its_line_and_reason(text, message):
    with pytest.raises(vnnlib.SyntaxFailure, match=message):
        read(text)


def test_a_property_of_another_network_is_refused():
    with pytest.raises(vnnlib.SyntaxFailure, match=r"declares 2 inputs \(X_0 to X_1\), but the network has 784"):
        vnnlib.parse(TWO + BOX + "(assert (<= Y_0 Y_1))", (1, 28, 28), 2)
    with pytest.raises(vnnlib.SyntaxFailure, match=r"declares 2 outputs .* the network has 10"):
        vnnlib.parse(TWO + BOX + "(assert (<= Y_0 Y_1))", (2,), 10)


def test_unreadable_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no property file"):
        vnnlib.load(tmp_path / "none.vnnlib", (2,), 2)
    (tmp_path / "torn.vnnlib.gz").write_bytes(gzip.compress(TWO.encode())[:20])
    with pytest.raises(vnnlib.SyntaxFailure, match="cannot be read as text"):
        vnnlib.load(tmp_path / "torn.vnnlib.gz", (2,), 2)


def test_an_explosion_of_cases_is_an_error_not_a_hang():
    clause = "(assert (or (<= Y_0 1) (>= Y_1 2)))"
    with pytest.raises(vnnlib.SyntaxFailure, match="expand to more than"):
        read(BOX + clause * 40)


# Random formulas: what the reader calls unsafe must be what the formula says, evaluated term by term.

comparisons = st.tuples(
    st.sampled_from(["<=", ">=", "<", ">"]),
    st.sampled_from(["Y_0", "Y_1", "(+ Y_0 Y_1)", "(- Y_0 (* 2 Y_1))", "(* Y_1 -3)", "(- Y_0)"]),
    st.integers(-3, 3),
)
formulas = st.recursive(
    comparisons.map(lambda c: f"({c[0]} {c[1]} {c[2]})"),
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=3).map(lambda parts: f"(and {' '.join(parts)})"),
        st.lists(inner, min_size=1, max_size=3).map(lambda parts: f"(or {' '.join(parts)})"),
        inner.map(lambda part: f"(not {part})"),
        st.tuples(inner, inner).map(lambda pair: f"(=> {pair[0]} {pair[1]})"),
    ),
    max_leaves=6,
)


def evaluate(text, values):
    """The value of a formula by Python, from its text alone."""
    tokens = text.replace("(", " ( ").replace(")", " ) ").split()

    def take():
        token = tokens.pop(0)
        if token != "(":
            return values[token] if token in values else float(token)
        op, arguments = tokens.pop(0), []
        while tokens[0] != ")":
            arguments.append(take())
        tokens.pop(0)
        functions = {
            "<=": lambda a, b: a <= b,
            ">=": lambda a, b: a >= b,
            "<": lambda a, b: a < b,
            ">": lambda a, b: a > b,
            "and": lambda *a: all(a),
            "or": lambda *a: any(a),
            "not": lambda a: not a,
            "=>": lambda a, b: b or not a,
            "+": lambda a, b: a + b,
            "-": lambda a, b=None: -a if b is None else a - b,
            "*": lambda a, b: a * b,
        }
        return functions[op](*arguments)

    return take()


@settings(max_examples=150, deadline=None)
@given(formula=formulas, more=formulas)
def test_random_formulas_mean_what_they_say(formula, more):
    problem = read(f"{BOX}(assert {formula})(assert {more})")
    for y0 in (-2.0, -1.0, 0.0, 0.5, 1.0, 3.0):
        for y1 in (-1.5, -1.0, 0.0, 1.0, 2.0):
            values = {"Y_0": y0, "Y_1": y1}
            said = evaluate(formula, values) and evaluate(more, values)
            assert unsafe(problem, [0.5, 0], [y0, y1]) == said


@pytest.mark.skipif("CERTPRUNE_VNNCOMP" not in os.environ, reason="CERTPRUNE_VNNCOMP does not point at benchmarks")
def test_benchmark_properties_are_boxes_around_an_image_with_nine_single_rows():
    root = Path(os.environ["CERTPRUNE_VNNCOMP"])
    for folder, shape in (("mnistfc", (784, 1)), ("oval21/vnnlib", (3, 32, 32))):
        files = sorted((root / folder).glob("*.vnnlib*"))
        assert files
        for file in files[::6]:
            (region,) = vnnlib.load(file, shape, 10).regions
            assert len(region.unsafe) == 9
            assert all(c.C.shape == (1, 10) and c.C.sum() == 0 and c.d.tolist() == [0] for c in region.unsafe)
            assert (region.hi > region.lo).all()
