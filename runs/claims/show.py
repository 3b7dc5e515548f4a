"""The claims as tables: on the terminal, as Markdown and as JSON."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from runs.claims.claim import Answer, Verdict
from runs.claims.questions import METHODS, Evidence
from runs.store import write_atomic

if TYPE_CHECKING:
    from rich.console import Console

_STYLES = {
    Verdict.SUPPORTED: "green", Verdict.CONTRADICTED: "red", Verdict.UNDECIDED: "yellow", Verdict.NOT_RUN: "dim"
}  # fmt: skip
HEADER = ("Claim", "What the paper says", "Its printed numbers", "Our records", "Evidence", "What would decide it")


def evidence_text(evidence: Evidence | None, p: float | None) -> str:
    """Difference, interval, p-value, n and test in one line."""
    if evidence is None:
        return "–"
    percent = evidence.unit == "images"

    def number(value: float) -> str:
        # Rounded first: a difference of means may be 1e-17 where it is nothing, and that nothing may be negative.
        return f"{100 * value:+.1f}" if percent else f"{round(value, 9) + 0.0:+.3g}"

    interval = "" if math.isinf(evidence.low) else f" [{number(evidence.low)}, {number(evidence.high)}]"
    many = f"{evidence.units} {evidence.unit}"
    seeds = "" if evidence.unit == "seeds" else f", {evidence.seeds} seed{'s' if evidence.seeds > 1 else ''}"
    if evidence.unit == METHODS:
        parts, detail = [evidence.detail], ""
    else:
        parts, detail = [f"{number(evidence.difference)}{' points' if percent else ''}{interval}"], evidence.detail
    parts.append(f"p {'< 0.001' if p is not None and p < 0.001 else f'= {p:.2g}'}")
    parts.append(f"n = {many}{seeds}, {evidence.pairs} pairs; {evidence.test}")
    return "; ".join(parts) + (f" ({detail})" if detail else "")


def line(answer: Answer) -> tuple[str, ...]:
    """One answer as the columns of :data:`HEADER`."""
    claim = answer.claim
    return (
        claim.id,
        f"{claim.text} ({claim.where})",
        answer.finding.text if answer.finding is not None else "no numbers printed",
        answer.verdict.value,
        evidence_text(answer.evidence, answer.p),
        answer.reason or "decided",
    )


def summary(answers: Sequence[Answer]) -> str:
    """Counts of verdicts in one sentence."""
    counts = Counter(answer.verdict for answer in answers)
    own = sum(answer.finding is not None and answer.finding.contradicted for answer in answers)
    named = ", ".join(f"{counts[verdict]} {verdict.value}" for verdict in Verdict)
    return (
        f"{len(answers)} claims: {named}; {own} are contradicted by the papers' own printed numbers. p-values carry "
        "Holm's adjustment over all claims with evidence; a positive difference is in the claim's favour."
    )


def print_terminal(answers: Sequence[Answer], console: Console) -> None:
    """Print the table and its summary."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(title="claims", title_justify="left", show_lines=True)
    for name in HEADER:
        table.add_column(name, overflow="fold", no_wrap=name == "Claim")
    for answer in answers:
        cells = list(map(escape, line(answer)))
        cells[3] = f"[{_STYLES[answer.verdict]}]{cells[3]}[/]"
        table.add_row(*cells)
    console.print(table)
    console.print(summary(answers), highlight=False)


def markdown(answers: Sequence[Answer]) -> str:
    """The table as Markdown."""
    rows = [HEADER, ("---",) * len(HEADER), *map(line, answers)]
    body = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)
    return f"# Claims\n\n{summary(answers)}\n\n{body}\n"


def as_json(answers: Sequence[Answer]) -> str:
    """The answers with full precision; infinite interval ends are null."""

    def finite(value: float) -> float | None:
        return value if math.isfinite(value) else None

    out = []
    for answer in answers:
        found, evidence = answer.finding, answer.evidence
        out.append(
            {
                "id": answer.claim.id,
                "paper": answer.claim.paper,
                "where": answer.claim.where,
                "text": answer.claim.text,
                "printed": None if found is None else vars(found) | {"contradicted": found.contradicted},
                "verdict": answer.verdict.value,
                "evidence": None
                if evidence is None
                else vars(evidence) | {"low": finite(evidence.low), "high": finite(evidence.high)},
                "p": answer.p,
                "decide": answer.claim.decide,
                "reason": answer.reason,
            }
        )
    return json.dumps(out, indent=1, allow_nan=False) + "\n"


def export(answers: Sequence[Answer], folder: Path) -> list[Path]:
    """Write ``claims.md`` and ``claims.json``; returns their paths."""
    files = {"claims.md": markdown(answers), "claims.json": as_json(answers)}
    for name, text in files.items():
        write_atomic(folder / name, text.encode())
    return [folder / name for name in files]
