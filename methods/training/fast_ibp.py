"""IBP training with a short warm-up.

Z. Shi et al. 2021, "Fast Certified Robust Training with Short Warmup": an initialisation under which intervals neither
grow nor shrink with depth, batch normalisation behind every layer, and two penalties during the warm-up that keep the
intervals tight and the ReLUs balanced.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from certify.bounds import Propagation, Rectifier
from methods.training.eps import Linear, Smoothed
from methods.training.ibp import IBP
from methods.training.regularised import Regularised

_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


def initialise(model: nn.Module, seed: int = 0) -> nn.Module:
    """A copy of `model` with weights drawn from N(0, sqrt(2 pi) / fan_in), the last layer's apart (section 4.1).

    The mean of |w| is then 2 / fan_in, so that a layer and its ReLU, which halves the width on average, keep the mean
    width of intervals. Biases and the last weight stay. "Last" is the order of registration, as in the authors' code.

    Raises:
        ValueError: no convolution or linear layer before the last.
    """
    model = copy.deepcopy(model)
    layers = [module for module in model.modules() if isinstance(module, _LAYERS)]
    if len(layers) < 2:
        raise ValueError("the initialisation is for hidden layers: the network has no layer before its last")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in layers[:-1]:
            weight = layer.weight
            deviation = math.sqrt(2.0 * math.pi) / weight[0].numel()
            weight.copy_(torch.randn(weight.shape, generator=generator, dtype=weight.dtype) * deviation)
    return model


def normalise_linear(model: nn.Module) -> nn.Module:
    """A copy of `model` with batch normalisation between every linear layer and the ReLU that follows it (section 4.1).

    Looks at neighbours in `nn.Sequential` containers. The new layers are in the model's mode and on its device.

    Raises:
        ValueError: no linear layer directly followed by a ReLU in a Sequential.
    """
    model = copy.deepcopy(model)
    found = 0
    for module in list(model.modules()):
        if not isinstance(module, nn.Sequential):
            continue
        children = list(module.named_children())
        if not any(_bare(a, b) for (_, a), (_, b) in itertools.pairwise(children)):
            continue
        for name, _ in children:
            delattr(module, name)
        for position, (name, child) in enumerate(children):
            module.add_module(name, child)
            following = children[position + 1][1] if position + 1 < len(children) else None
            if isinstance(child, nn.Linear) and following is not None and _bare(child, following):
                norm = nn.BatchNorm1d(child.out_features).to(child.weight).train(child.training)
                module.add_module(f"{name}_norm", norm)
                found += 1
    if not found:
        raise ValueError("nothing to normalise: no linear layer is directly followed by a ReLU in an nn.Sequential")
    return model


def _bare(first: nn.Module, second: nn.Module) -> bool:
    return isinstance(first, nn.Linear) and isinstance(second, (nn.ReLU, nn.ReLU6))


@dataclasses.dataclass(frozen=True)
class Tightness:
    """Keeps intervals from growing with depth (section 4.2, Eq. 8).

    ``weight * (1 - eps / eps_max) * mean_i relu(tol - E(width_0) / E(width_i)) / tol`` over ReLU inputs i, where
    width_0 is that of what the first layer reads, behind the input normalisation; the means are over neurons and the
    batch.
    """

    weight: float = 0.5
    tolerance: float = 0.5

    name: str = dataclasses.field(default="tightness", init=False)
    bounded: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check(self.weight, self.tolerance)

    def penalty(self, model: nn.Module, found: Propagation | None, share: float) -> Tensor:
        layers = _rectifiers(found)
        assert found is not None
        low, high = found.entry
        first = (high - low).mean()
        terms = [
            F.relu(self.tolerance - first / (layer.upper - layer.lower).mean().clamp(min=1e-12)) for layer in layers
        ]
        return self.weight * (1.0 - share) * torch.stack(terms).mean() / self.tolerance


@dataclasses.dataclass(frozen=True)
class ReLUBalance:
    """Keeps active and inactive ReLUs in balance (section 4.2, Eq. 9).

    ``weight * (1 - eps / eps_max) * mean_i (relu(tol - a_i) + relu(tol - b_i)) / tol``, where a_i is the ratio, taken
    the way it is below 1, of the mean centres of the stably active to the stably inactive neurons of layer i, and b_i
    that of their variances around the layer's mean. A layer with none on one side is left out, as in the authors' code.
    """

    weight: float = 0.5
    tolerance: float = 0.5

    name: str = dataclasses.field(default="balance", init=False)
    bounded: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check(self.weight, self.tolerance)

    def penalty(self, model: nn.Module, found: Propagation | None, share: float) -> Tensor:
        terms = []
        for layer in _rectifiers(found):
            centre = (layer.lower + layer.upper) / 2
            active, inactive = layer.lower > 0, layer.upper < 0
            spread = (centre - centre.mean()).square()
            sums = [(centre * active).sum(), -(centre * inactive).sum()]
            sums += [(spread * active).sum(), (spread * inactive).sum()]
            whole = torch.stack([s > 0 for s in sums]).all()
            up, down, up_var, down_var = (torch.where(whole, s, torch.ones_like(s)) for s in sums)
            short = self.tolerance - torch.stack([_below_one(up, down), _below_one(up_var, down_var)])
            terms.append(torch.where(whole, F.relu(short).sum(), torch.zeros_like(up)))
        return self.weight * (1.0 - share) * torch.stack(terms).mean() / self.tolerance


def fast_ibp(eps: float, schedule: Linear | Smoothed | None = None) -> Regularised:
    """Shi et al.'s objective: IBP without clean loss, and both penalties while the radius grows.

    The default ramp is the NRSLoss paper's, from epoch 11 to 80 of 200; Shi et al. warm up over 20 to 80 of 160.
    """
    objective = IBP(eps, schedule=schedule or Smoothed(0.05, 0.4), kappa_start=0.0, kappa_end=0.0)
    return Regularised(objective, (Tightness(), ReLUBalance()))


def _below_one(a: Tensor, b: Tensor) -> Tensor:
    return torch.minimum(a, b) / torch.maximum(a, b)


def _check(weight: float, tolerance: float) -> None:
    if not 0.0 <= weight < math.inf or not 0.0 < tolerance <= 1.0:
        raise ValueError(f"need a finite weight >= 0 and a tolerance in (0, 1], got {weight} and {tolerance}")


def _rectifiers(found: Propagation | None) -> tuple[Rectifier, ...]:
    assert found is not None
    layers = found.rectifiers()
    if not layers:
        raise ValueError("the penalty finds no ReLU in the network")
    return layers
