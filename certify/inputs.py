"""What the front doors of the package refuse before any work is done, and in which words."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from certify.bounds.op import UnsupportedOperation
from certify.perturbations import Perturbation


def check(model: nn.Module, x: Tensor, p: Perturbation) -> None:
    """Raise TypeError for things of another kind, ValueError for an empty batch or one that `p` does not fit."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"the model must be a torch.nn.Module, got {_kind(model)}; wrap a function in a module")
    if not isinstance(x, Tensor):
        raise TypeError(f"images must be a tensor (N, ...), got {_kind(x)}; torch.as_tensor makes one")
    if not isinstance(p, Perturbation):
        raise TypeError(f"the perturbation must be one of certify's, such as certify.Linf(8 / 255), got {_kind(p)}")
    if x.ndim and not len(x):
        raise ValueError("no images: the batch is empty")
    if x.is_floating_point() and torch.finfo(x.dtype).bits < 32:
        raise ValueError(
            f"the images are {x.dtype}; certificates are for float32 and float64: use x.float(), model.float()"
        )
    p.check(x)


def check_evaluation(model: nn.Module) -> None:
    """Refuse a model whose answer depends on the batch or on chance.

    Raises:
        ValueError: it, or a batch normalisation or dropout in it, is in training mode.
        certify.UnsupportedOperation: a batch normalisation has no statistics of its own.
    """
    if model.training:
        raise ValueError(
            "the model is in training mode, where its answer depends on the batch; call model.eval() first"
        )
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            if module.training:
                raise ValueError(
                    f"the batch normalisation {name!r} is in training mode, though the model is not, and so its answer "
                    "depends on the batch; call model.eval() first"
                )
            if module.running_mean is None:
                raise UnsupportedOperation(
                    f"module {name!r} uses the statistics of the batch, so that the answer on an image depends on the "
                    "others; use track_running_stats=True"
                )
        if module.training and isinstance(module, nn.modules.dropout._DropoutNd):
            raise ValueError(
                f"the dropout {name!r} is in training mode, and so draws at random; call model.eval() first"
            )


def outputs(model: nn.Module, x: Tensor) -> Tensor:
    """The outputs (N, K) of a plain forward pass.

    Raises:
        ValueError: the model cannot be called on such images, with its own complaint and what differs; or it writes
            into them.
        certify.UnsupportedOperation: it returns something else than one row of numbers an image.
    """
    given = x.clone()
    try:
        found = model(given)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"the model cannot take images {tuple(x.shape)}: {error}{_difference(model, x)}") from error
    if not torch.equal(given, x):
        raise ValueError(
            "the model writes into its input, so that it cannot be said which images a certificate is about; use the "
            "out-of-place form (x - mean, not x.sub_(mean))"
        )
    if not isinstance(found, Tensor):
        raise UnsupportedOperation(f"the model returns {_kind(found)}; one tensor (N, outputs) is needed")
    if found.ndim != 2 or len(found) != len(x):
        raise UnsupportedOperation(
            f"the model returns {tuple(found.shape)} for {len(x)} images; flatten its output to ({len(x)}, outputs)"
        )
    return found


def _difference(model: nn.Module, x: Tensor) -> str:
    """What to do about parameters of another type or place than the images."""
    for parameter in model.parameters():
        if parameter.is_floating_point() and parameter.dtype != x.dtype:
            kind = str(parameter.dtype).removeprefix("torch.")
            return f" (the images are {x.dtype}, the weights {parameter.dtype}: pass x.to(torch.{kind}))"
        if parameter.device != x.device:
            return f" (the images are on {x.device}, the weights on {parameter.device}: move one of them)"
    return ""


def _kind(value: object) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__
