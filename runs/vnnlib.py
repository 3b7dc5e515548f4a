"""VNN-LIB properties: a subset of SMT-LIB that says which inputs and outputs of a network would be a counterexample.

Reads declarations of ``X_i`` and ``Y_j`` (real), and assertions built from ``and``, ``or``, ``not``, ``=>`` over linear
comparisons ``<= >= < > =``. Comparisons on inputs must bound one variable each (boxes), those on outputs may be any
linear expression. Grammar: vnnlib.org, version 1.0.

The sign convention: the assertions describe the *unsafe* set. A `Conjunction` is unsafe where **all** its rows satisfy
``C y + d <= 0``, a `Region` is a box with conjunctions of which **any** makes an output unsafe, and a `Property` is
violated if any region holds an input whose output is unsafe. One row alone is safe exactly where ``C y + d > 0``, which
is how `certify.Linear` reads its rows.
"""

from __future__ import annotations

import dataclasses
import gzip
import itertools
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[np.float64]]

MOST_DISJUNCTS = 200_000
"""Expanding the assertions into cases stops with an error beyond this many."""


class SyntaxFailure(ValueError):
    """The text is not a property in the supported subset; the message starts with the place (file and line)."""


@dataclasses.dataclass(frozen=True, eq=False)
class Conjunction:
    """Outputs y with ``C y + d <= 0`` in every row (``< 0`` where `strict`).

    `C` is (rows, outputs), `d` and `strict` are (rows,).
    """

    C: Array
    d: Array
    strict: np.ndarray[Any, np.dtype[np.bool_]]

    def contains(self, y: Array) -> bool:
        """Whether the output y (outputs,) is unsafe, in float64."""
        rows = self.C @ np.asarray(y, np.float64) + self.d
        return bool(np.where(self.strict, rows < 0, rows <= 0).all())


@dataclasses.dataclass(frozen=True, eq=False)
class Region:
    """A box of inputs, `lo` and `hi` (inputs,) in float64, and the conjunctions any of which is unsafe there."""

    lo: Array
    hi: Array
    unsafe: tuple[Conjunction, ...]

    def contains(self, x: Array) -> bool:
        """Whether the input x (any shape) lies in the box, in float64."""
        x = np.asarray(x, np.float64).reshape(-1)
        return bool(((self.lo <= x) & (x <= self.hi)).all())

    def is_unsafe(self, y: Array) -> bool:
        """Whether the output y (any shape) is in one of the conjunctions."""
        return any(c.contains(np.asarray(y).reshape(-1)) for c in self.unsafe)


@dataclasses.dataclass(frozen=True, eq=False)
class Property:
    """The unsafe set: any region. Inputs are numbered in row-major order of `input_shape` (without the batch axis)."""

    input_shape: tuple[int, ...]
    outputs: int
    regions: tuple[Region, ...]


def load(path: str | Path, input_shape: Sequence[int], outputs: int) -> Property:
    """The property in a file (``.vnnlib`` or ``.vnnlib.gz``) for a network with this input shape and number of outputs.

    Raises:
        FileNotFoundError: there is no such file.
        SyntaxFailure: the text is outside the subset (with the line), declares other variables than the network has,
            leaves an input without bounds, has only empty boxes, or says nothing about the outputs.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no property file {path}")
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        text = data.decode("utf-8")
    except (gzip.BadGzipFile, EOFError, UnicodeDecodeError) as e:
        raise SyntaxFailure(f"{path}: cannot be read as text ({e})") from None
    return parse(text, input_shape, outputs, source=str(path))


def parse(text: str, input_shape: Sequence[int], outputs: int, source: str = "property") -> Property:
    """Like `load`, from the text itself; `source` names it in messages."""
    parser = _Parser(source)
    for command in parser.commands(text):
        parser.run(command)
    inputs = math.prod(input_shape)
    for kind, needed in (("X", inputs), ("Y", outputs)):
        declared = {i for k, i in parser.declared if k == kind}
        if declared != set(range(needed)):
            what = "inputs" if kind == "X" else "outputs"
            range_ = f"{kind}_{min(declared)} to {kind}_{max(declared)}" if declared else "none"
            raise SyntaxFailure(
                f"{source}: declares {len(declared)} {what} ({range_}), but the network has {needed} "
                f"({kind}_0 to {kind}_{needed - 1}); is this the property of another network?"
            )
    regions = _regions(parser, inputs, outputs, source)
    return Property(tuple(int(s) for s in input_shape), outputs, regions)


# An expression is a place in the text with a name or a list; a linear form is {variable: factor} with the constant
# under None; a constraint says that its form is <= 0 (or < 0).


@dataclasses.dataclass(frozen=True)
class _Expression:
    line: int
    atom: str | None = None
    items: tuple[_Expression, ...] = ()

    @property
    def head(self) -> str:
        return self.items[0].atom or "" if self.items else ""

    def __str__(self) -> str:
        text = self.atom if self.atom is not None else f"({' '.join(map(str, self.items))})"
        return text if len(text) <= 60 else text[:57] + "..."


_Variable = tuple[str, int]
_Form = dict[_Variable | None, float]


@dataclasses.dataclass(frozen=True)
class _Constraint:
    form: _Form
    strict: bool
    line: int


_Case = tuple[_Constraint, ...]  # all of them hold
_TOKEN = re.compile(r"[()]|\|[^|]*\||\"[^\"]*\"|;[^\n]*|[^\s();|\"]+|\n")
_VARIABLE = re.compile(r"([XY])_(\d+)$")
_IGNORED = {"set-logic", "set-info", "set-option", "check-sat", "get-model", "get-value", "exit"}
_OPPOSITE = {"<=": ">", ">=": "<", "<": ">=", ">": "<="}


class _Parser:
    """Reads commands one by one and collects variables, plain constraints and choices between cases."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.declared: set[_Variable] = set()
        self.always: list[_Constraint] = []
        self.choices: list[list[_Case]] = []

    def failure(self, line: int, problem: str) -> SyntaxFailure:
        return SyntaxFailure(f"{self.source}, line {line}: {problem}")

    def commands(self, text: str) -> Iterable[_Expression]:
        line = 1
        stack: list[tuple[int, list[_Expression]]] = []
        for token in _TOKEN.findall(text):
            if token == "\n":
                line += 1
            elif token.startswith(";"):
                continue
            elif token == "(":
                stack.append((line, []))
            elif token == ")":
                if not stack:
                    raise self.failure(line, "a ')' closes nothing")
                start, items = stack.pop()
                done = _Expression(start, None, tuple(items))
                if stack:
                    stack[-1][1].append(done)
                else:
                    yield done
            elif not stack:
                raise self.failure(line, f"{token!r} stands outside a command; commands look like (assert ...)")
            else:
                stack[-1][1].append(_Expression(line, token))
                line += token.count("\n")
        if stack:
            raise self.failure(stack[-1][0], "the '(' here is never closed; is the file cut off?")

    def run(self, command: _Expression) -> None:
        head, items = command.head, command.items
        if head in ("declare-const", "declare-fun"):
            shape_ok = len(items) == (3 if head == "declare-const" else 4) and items[-1].atom == "Real"
            if not shape_ok or (head == "declare-fun" and items[2].items):
                raise self.failure(command.line, f"expected (declare-const X_0 Real), got {command}")
            variable = self.variable(items[1])
            if variable in self.declared:
                raise self.failure(command.line, f"{items[1]} is declared twice")
            self.declared.add(variable)
        elif head == "assert":
            if len(items) != 2:
                raise self.failure(command.line, f"assert takes one formula, got {len(items) - 1}")
            self.require(items[1])
        elif head not in _IGNORED:
            raise self.failure(
                command.line, f"unknown command {head or str(command)!r}; expected declare-const or assert"
            )

    def require(self, formula: _Expression) -> None:
        """Plain conjunctions join `always`, so that thousands of bounds cost no expansion; choices are kept apart."""
        if formula.head == "and":
            for part in formula.items[1:]:
                self.require(part)
            return
        cases = self.cases(formula, True)
        if len(cases) == 1:
            self.always.extend(cases[0])
        else:
            self.choices.append(cases)

    def cases(self, formula: _Expression, positive: bool) -> list[_Case]:
        """The disjunctive normal form of `formula`, or of its negation."""
        head, arguments = formula.head, formula.items[1:]
        if formula.atom in ("true", "false"):
            return [()] if (formula.atom == "true") == positive else []
        if head == "not" and len(arguments) == 1:
            return self.cases(arguments[0], not positive)
        if head == "=>" and len(arguments) == 2:
            parts = [self.cases(arguments[0], not positive), self.cases(arguments[1], positive)]
            return self.either(parts, formula) if positive else self.both(parts, formula)
        if head in ("and", "or"):
            parts = [self.cases(a, positive) for a in arguments]
            return self.both(parts, formula) if (head == "and") == positive else self.either(parts, formula)
        if (head in _OPPOSITE or head == "=") and len(arguments) >= 2:
            forms = [self.form(a) for a in arguments]
            pairs = list(itertools.pairwise(forms))
            if head == "=":
                parts = [self.comparison(op, a, b, positive, formula.line) for a, b in pairs for op in ("<=", ">=")]
            else:
                parts = [self.comparison(head, a, b, positive, formula.line) for a, b in pairs]
            return self.both(parts, formula) if positive else self.either(parts, formula)
        raise self.failure(formula.line, f"expected and, or, not, => or a comparison, got {formula}")

    def both(self, parts: list[list[_Case]], formula: _Expression) -> list[_Case]:
        if math.prod(map(len, parts)) > MOST_DISJUNCTS:
            raise self.failure(formula.line, f"this formula expands to more than {MOST_DISJUNCTS} cases")
        return [tuple(itertools.chain(*choice)) for choice in itertools.product(*parts)]

    def either(self, parts: list[list[_Case]], formula: _Expression) -> list[_Case]:
        if sum(map(len, parts)) > MOST_DISJUNCTS:
            raise self.failure(formula.line, f"this formula expands to more than {MOST_DISJUNCTS} cases")
        return list(itertools.chain(*parts))

    def comparison(self, op: str, a: _Form, b: _Form, positive: bool, line: int) -> list[_Case]:
        op = op if positive else _OPPOSITE[op]
        if op in (">=", ">"):
            a, b = b, a
        return [(_Constraint(_combine(a, b, -1.0), op in ("<", ">"), line),)]

    def form(self, term: _Expression) -> _Form:
        if term.atom is not None:
            if term.atom[0] in "XY" or not _is_number(term.atom):
                variable = self.variable(term)
                if variable not in self.declared:
                    raise self.failure(term.line, f"{term.atom} is used before it is declared")
                return {variable: 1.0}
            return {None: float(term.atom)}
        head, arguments = term.head, [self.form(t) for t in term.items[1:]]
        if head in ("+", "-") and arguments:
            if head == "-" and len(arguments) == 1:
                return {k: -v for k, v in arguments[0].items()}
            total = arguments[0]
            for other in arguments[1:]:
                total = _combine(total, other, 1.0 if head == "+" else -1.0)
            return total
        if head in ("*", "/") and arguments:
            total = arguments[0]
            for other in arguments[1:]:
                if set(total) <= {None} and head == "*":
                    total, other = other, total
                if not set(other) <= {None}:
                    raise self.failure(term.line, f"{term} is not linear")
                factor = other.get(None, 0.0)
                if head == "/" and factor == 0:
                    raise self.failure(term.line, f"{term} divides by zero")
                total = {k: v * factor if head == "*" else v / factor for k, v in total.items()}
            return total
        raise self.failure(term.line, f"expected a number, a variable or a sum or product of them, got {term}")

    def variable(self, name: _Expression) -> _Variable:
        match = _VARIABLE.match(name.atom or "")
        if not match:
            raise self.failure(name.line, f"expected a variable X_<number> or Y_<number>, got {name}")
        return match[1], int(match[2])


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text)) and "_" not in text
    except ValueError:
        return False


def _combine(a: _Form, b: _Form, sign: float) -> _Form:
    total = dict(a)
    for key, value in b.items():
        total[key] = total.get(key, 0.0) + sign * value
    return total


def _regions(parser: _Parser, inputs: int, outputs: int, source: str) -> tuple[Region, ...]:
    """Expand the choices into cases, turn each into a box and a conjunction, and gather the cases with one box."""
    if math.prod(map(len, parser.choices)) > MOST_DISJUNCTS:
        raise SyntaxFailure(f"{source}: the assertions expand to more than {MOST_DISJUNCTS} cases together")
    lo, hi = np.full(inputs, -np.inf), np.full(inputs, np.inf)
    common = [c for c in parser.always if not _bound_input(c, lo, hi, parser)]
    found: dict[bytes, tuple[Array, Array, list[Conjunction]]] = {}
    empty: int | None = None
    boxes = 0
    for choice in itertools.product(*parser.choices):
        low, high = lo, hi
        rows = list(common)
        for constraint in itertools.chain(*choice):
            if low is lo and any(v is not None and v[0] == "X" for v in constraint.form):
                low, high = lo.copy(), hi.copy()
            if not _bound_input(constraint, low, high, parser):
                rows.append(constraint)
        boxes += 1
        free = np.flatnonzero(~np.isfinite(low) | ~np.isfinite(high))
        if len(free):
            raise SyntaxFailure(f"{source}: X_{free[0]} has no lower or no upper bound; every input needs both")
        if (low > high).any():
            empty = int(np.flatnonzero(low > high)[0]) if empty is None else empty
            continue
        if not rows:
            raise SyntaxFailure(f"{source}: a case says nothing about the outputs, so every input would violate it")
        _, _, unsafe = found.setdefault(low.tobytes() + high.tobytes(), (low, high, []))
        unsafe.append(_conjunction(rows, outputs))
    if not found:
        why = (
            f"X_{empty} has a lower bound above its upper bound"
            if empty is not None
            else "the assertions exclude it all"
        )
        raise SyntaxFailure(f"{source}: every box of inputs is empty ({why}); the property says nothing")
    return tuple(Region(low, high, tuple(unsafe)) for low, high, unsafe in found.values())


def _bound_input(constraint: _Constraint, lo: Array, hi: Array, parser: _Parser) -> bool:
    """Tighten the box by a constraint on one input, in place; False if the constraint is about outputs."""
    variables = [v for v, factor in constraint.form.items() if v is not None and factor != 0]
    kinds = {v[0] for v in variables}
    if kinds == {"Y"}:
        return False
    if not variables:
        raise parser.failure(constraint.line, "a comparison mentions no variable")
    if len(variables) != 1:
        what = "an input together with an output" if len(kinds) == 2 else f"{len(variables)} inputs at once"
        raise parser.failure(constraint.line, f"a comparison bounds {what}; only boxes of inputs are supported")
    index = variables[0][1]
    factor, offset = constraint.form[variables[0]], constraint.form.get(None, 0.0)
    end = -offset / factor + 0.0  # without a negative zero
    if factor > 0:
        hi[index] = min(hi[index], np.nextafter(end, -np.inf) if constraint.strict else end)
    else:
        lo[index] = max(lo[index], np.nextafter(end, np.inf) if constraint.strict else end)
    return True


def _conjunction(rows: Sequence[_Constraint], outputs: int) -> Conjunction:
    C, d = np.zeros((len(rows), outputs)), np.zeros(len(rows))
    for i, constraint in enumerate(rows):
        for variable, factor in constraint.form.items():
            if variable is None:
                d[i] = factor
            else:
                C[i, variable[1]] = factor
    return Conjunction(C, d, np.array([c.strict for c in rows]))
