"""A training step must not wait for the device: no objective may read a value on the host, or send one from there."""

from __future__ import annotations

import pytest
import torch
from method_toys import images, residual
from torch.utils._python_dispatch import TorchDispatchMode

import certify
from methods import masks
from methods.hydra.search import _Scored, initial_scores
from methods.slimming import GammaL1
from methods.training import (
    CROWNIBP,
    FGSM,
    IBP,
    PGD,
    TRADES,
    CrossEntropy,
    Natural,
    NRSLoss,
    Progress,
    Regularised,
    RSLoss,
    fast_ibp,
)
from methods.usn import USNConfig
from methods.usn.metrics import sites
from methods.usn.objective import USNObjective
from methods.usn.pruner import Pruner

# Everything that has to know a value to go on: on an accelerator each of these waits for the queue to drain.
READING = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "_unique2", "item"}
# A tensor made of numbers of the host (`torch.tensor`, `as_tensor`, `new_tensor`, an index that is a list): its copy to
# an accelerator comes from pageable memory, which the host waits for.
SENDING = {"lift_fresh"}


class NoReading(TorchDispatchMode):
    """Raises where a step reads a value, or sends one."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in READING, f"{func} reads a value on the host"
        assert name not in SENDING, f"{func} sends a value from the host"
        if name.startswith("index"):  # the length of what a boolean index picks is a value
            picked = [t for t in args[1] if isinstance(t, torch.Tensor)] if isinstance(args[1], (list, tuple)) else []
            assert all(t.dtype != torch.bool for t in picked), f"{func} reads a value on the host"
        return func(*args, **(kwargs or {}))


def test_the_watch_sees_what_it_is_for():
    for read in (lambda t: float(t.sum()), lambda t: t[t > 0], lambda t: t.nonzero(), lambda t: bool((t > 0).any())):
        with pytest.raises(AssertionError, match="reads a value"), NoReading():
            read(torch.ones(3))
    for send in (torch.tensor, torch.as_tensor, torch.ones(3).new_tensor):
        with pytest.raises(AssertionError, match="sends a value"), NoReading():
            send(0.1)


OBJECTIVES = {
    "natural": Natural(),
    "fgsm": FGSM(0.05),
    "pgd": PGD(0.05, steps=2),
    "trades": TRADES(0.05, steps=2),
    "ibp": IBP(0.05),
    "crown-ibp": CROWNIBP(0.05),
    "crown-ibp unfused": CROWNIBP(0.05, fused=False),
    "crown-ibp+rs+nrs": Regularised(CROWNIBP(0.05), (RSLoss(), NRSLoss(), NRSLoss(average="channels"))),
    "fgsm+nrs": Regularised(FGSM(0.05), (NRSLoss(),)),
    "fast-ibp+nrs": Regularised(fast_ibp(0.05).objective, (*fast_ibp(0.05).regularisers, NRSLoss())),
    "natural+gamma": Regularised(Natural(), (GammaL1(),)),
    "brightness": CROWNIBP(0.05, perturbation="Brightness"),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_no_objective_reads_a_value(name):
    x, y = images(8)[0]
    model = residual().train()
    with NoReading():
        loss, _ = OBJECTIVES[name].loss(model, x, y, CrossEntropy(), Progress(2, 10))
        loss.backward()


def test_arithmetic_in_a_network_sends_no_value():
    class Arithmetic(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(36, 3)

        def forward(self, x):
            x = (x - 0.3) / 0.35 + 1
            return self.layer((1 - torch.relu(-(2 * x))).flatten(1))

    x, y = images(8)[0]
    with NoReading():
        loss, _ = CROWNIBP(0.05).loss(Arithmetic().train(), x, y, CrossEntropy(), Progress(2, 10))
        loss.backward()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", OBJECTIVES)
def test_no_objective_waits_for_cuda(name):
    """As torch itself tells, which sees more than the operations that are named above."""
    x, y = (part.to("cuda") for part in images(8)[0])
    model = residual().train().to("cuda")
    for mode in ("default", "error"):  # the first step sets libraries up
        try:
            torch.cuda.set_sync_debug_mode(mode)
            loss, _ = OBJECTIVES[name].loss(model, x, y, CrossEntropy(), Progress(2, 10))
            loss.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_hydras_mask_reads_no_value():
    weight = torch.randn(8, 4, 3, 3)
    scored = _Scored(initial_scores(weight), torch.ones_like(weight, dtype=torch.bool), 0.5)
    with NoReading():
        scored(weight).sum().backward()
    assert int((scored(weight) != 0).sum()) == weight.numel() // 2


@pytest.mark.parametrize("ratio", [0.0, 0.5])
def test_a_step_of_usn_reads_no_value(ratio):
    x, y = images(8)[0]
    model = residual().train()
    config = USNConfig(ratio=ratio, epochs=10, m=2, metric_fraction=0.5, perturbation=certify.Brightness(0.05))
    names = masks.prunable(model, config.layers, structured=True)
    pruner = Pruner(model, names, config)
    pruner.attach(model)
    pruner.hold(model)  # once an epoch
    objective = USNObjective(config, tuple(sites(model, x[:1], names).items()))
    with NoReading():
        loss, _ = objective.loss(model, x, y, CrossEntropy(), Progress(2, 10))
        loss.backward()
