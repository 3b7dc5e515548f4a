"""What numbers are computed in: float32 in full, and constants that the host need not wait for.

On NVIDIA GPUs since Ampere torch rounds the inputs of float32 convolutions to 10 bits (TF32) unless told not to, and
those of matrix products where it is asked to; on some CPUs it is asked for bfloat16. That is off by thousands of times
what float32 is, and no slack of this package covers it.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor


def constant(value: float | Tensor, like: Tensor) -> Tensor:
    """`value`, a number () or a tensor, in the dtype and on the device of `like`.

    Unlike `torch.as_tensor`, which copies a number from the host's memory and has the host wait until that is done.
    """
    if isinstance(value, Tensor):
        return value.to(like)
    return torch.full((), float(value), dtype=like.dtype, device=like.device)


@contextlib.contextmanager
def full_float32() -> Iterator[None]:
    """Run with float32 as float32: no TF32 and no bfloat16 in convolutions, recurrent layers and matrix products.

    A context manager, or a decorator: ``@full_float32()``. It may be nested, and what was set before comes back at the
    end, also after an exception. torch keeps the setting for the whole process: where several threads are inside, the
    last one to leave puts it back.

    It is made through torch's ``fp32_precision``. Inside, `torch.backends.cudnn.allow_tf32` of the older interface
    cannot be read unless it was False before: torch raises where the two disagree.
    """
    _pinned.enter()
    try:
        yield
    finally:
        _pinned.leave()


class _Pinned:
    """How many are inside `full_float32`, and what puts the settings back when the last one leaves."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.inside = 0
        self.restore: Callable[[], None] | None = None

    def enter(self) -> None:
        with self.lock:
            if not self.inside:
                self.restore = _pin()
            self.inside += 1

    def leave(self) -> None:
        with self.lock:
            self.inside -= 1
            if not self.inside and self.restore is not None:
                self.restore()
                self.restore = None


_pinned = _Pinned()


def _pin() -> Callable[[], None]:
    """Set full precision; returns what undoes it to the last detail, so that settings which followed others do again.

    An operation without a setting of its own follows that of its backend, and this the general one. In torch 2.13 (not
    yet in 2.11) convolutions start like that, and no assignment brings it back: such operations are left to follow.
    """
    cudnn, onednn, cublas = torch.backends.cudnn, torch.backends.mkldnn, torch.backends.cuda.matmul
    followed: tuple[Any, ...] = (torch.backends, cudnn)
    products: tuple[Any, ...] = (cublas, onednn.matmul)  # type: ignore[attr-defined]
    others: tuple[Any, ...] = (cudnn.conv, cudnn.rnn, onednn.conv, onednn.rnn)  # type: ignore[attr-defined]
    older = _older_setting()
    general = []
    for backend in followed:
        general.append(backend.fp32_precision)
        backend.fp32_precision = "none"  # what is below shows its own setting
    own = [(operation, operation.fp32_precision) for operation in products]
    for backend in followed:
        backend.fp32_precision = "ieee"
    own += [(operation, operation.fp32_precision) for operation in others if operation.fp32_precision != "ieee"]
    if older is not None:
        torch.set_float32_matmul_precision("highest")
    for operation, _ in own:
        operation.fp32_precision = "ieee"

    def restore() -> None:
        if older is not None:
            torch.set_float32_matmul_precision(older)
        for operation, value in own:
            operation.fp32_precision = value
        for backend, value in zip(followed, general, strict=True):
            backend.fp32_precision = value

    return restore


def _older_setting() -> str | None:
    """What the older interface says of matrix products; None where it raises, for the user has mixed the two."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return None
