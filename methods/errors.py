"""Errors that several modules raise."""


class MaskError(ValueError):
    """A mask is malformed, does not fit the network, or its file is damaged."""
