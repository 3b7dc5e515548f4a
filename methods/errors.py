"""Errors that several modules raise, and the words they share."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MaskError(ValueError):
    """A mask is malformed, does not fit the network, or its file is damaged."""


def unknown(what: str, name: object, known: Iterable[str]) -> str:
    """The message for a name that is not among the `known` ones: the closest of them, or all."""
    known = list(known)
    near = difflib.get_close_matches(str(name), known, n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(known)}"
    return f"unknown {what} {name!r}; {hint}"
