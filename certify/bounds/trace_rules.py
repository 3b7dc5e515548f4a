"""What the tracer's rules share: their form, how they are registered, and what they ask of the recording."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor

from certify.bounds.op import Op, UnsupportedOperation

# The operation (None: it changes nothing), the values it reads, and its result where that is known already.
Handled = tuple[Op | None, tuple[Tensor, ...]] | tuple[Op | None, tuple[Tensor, ...], Tensor | None]
Handler = Callable[..., Handled]


class Recording(Protocol):
    """A trace in progress, as rules see it: `training` is the mode of the whole model."""

    detach_statistics: bool
    training: bool

    @property
    def path(self) -> str:
        """The dotted path of the module that is running."""
        ...

    def find(self, value: object) -> int | None:
        """The node of a traced tensor, None for everything else."""
        ...


class Handlers(dict[str, Handler]):
    """Rules by the name of the function they stand for."""

    def handles(self, *names: str) -> Callable[[Handler], Handler]:
        """Register the decorated rule under these names."""

        def register(handler: Handler) -> Handler:
            for name in names:
                self[name] = handler
            return handler

        return register


def need_constant(recording: Recording, value: Any, what: str) -> None:
    """Raise UnsupportedOperation where `value` is traced."""
    if recording.find(value) is not None:
        raise UnsupportedOperation(
            f"{what} in module {recording.path!r} depends on the input; products of inputs have no bound"
        )
