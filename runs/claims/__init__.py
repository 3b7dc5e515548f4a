"""The quantitative claims of the three papers, held against what is on record.

``python -m runs.compare claims`` prints one line a claim: what the printed numbers themselves say, what the records say
(supported, contradicted, undecided, with n, interval and test), and what would decide it.
"""

from __future__ import annotations

from runs.claims.catalogue import CLAIMS
from runs.claims.claim import Answer, Claim, Finding, evaluate
from runs.claims.show import export, print_terminal

__all__ = ["CLAIMS", "Answer", "Claim", "Finding", "evaluate", "export", "print_terminal"]
