"""What can go wrong with data, as exceptions that say what to do about it."""

from __future__ import annotations


class MissingData(FileNotFoundError):
    """Files are not where they were looked for; the message names the exact path and how to get them."""


class CorruptData(ValueError):
    """Files are there but cannot be trusted: truncated, a wrong checksum, a wrong shape, labels out of range."""
