"""Fast-IBP's network: its initialisation and its batch normalisation behind linear layers, put in and taken out again.

Shi et al. 2021 train with a batch normalisation behind every layer. That normalisation is part of the training, not of
the network that is compared: afterwards it is folded into the linear layer, so that records hold the zoo's network.
"""

from __future__ import annotations

import copy
import itertools

from torch import nn
from torch.nn.utils.fusion import fuse_linear_bn_eval

from methods.training.fast_ibp import initialise, normalise_linear

KIND = "fast-ibp"


def prepare(network: nn.Module, objective: str, seed: int) -> nn.Module:
    """The network to train for `objective`: a Fast-IBP copy for "fast-ibp", otherwise the network itself.

    Raises:
        ValueError: the network has no linear layer in front of a ReLU, or nothing before its last layer.
    """
    return initialise(normalise_linear(network), seed) if objective == KIND else network


def fold(network: nn.Module) -> nn.Module:
    """A copy with the normalisations of :func:`prepare` folded into their linear layers; the same in eval mode.

    A network without any comes back as it is.
    """
    found = copy.deepcopy(network).eval()
    for module in list(found.modules()):
        if not isinstance(module, nn.Sequential):
            continue
        for (name, linear), (beside, norm) in itertools.pairwise(list(module.named_children())):
            if beside == f"{name}_norm" and isinstance(linear, nn.Linear) and isinstance(norm, nn.BatchNorm1d):
                setattr(module, name, fuse_linear_bn_eval(linear, norm))
                delattr(module, beside)
    return found
