"""Full float32 inside of the front doors, and what was set before afterwards."""

from __future__ import annotations

import threading
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import certify
from certify import attack, audit, bab, lirpa, milp
from certify.arithmetic import constant, full_float32
from certify.probabilistic import throughput


def setting() -> tuple[str, ...]:
    cudnn, onednn = torch.backends.cudnn, torch.backends.mkldnn
    places = (
        torch.backends,
        cudnn,
        cudnn.conv,
        cudnn.rnn,
        torch.backends.cuda.matmul,
        *((onednn.conv, onednn.rnn, onednn.matmul)),
    )
    return tuple(place.fp32_precision for place in places)


def following() -> list[tuple[str, ...]]:
    """What the settings become when the general one changes: which of them follow it."""
    general, found = torch.backends.fp32_precision, []
    for value in ("none", "tf32", "ieee"):
        torch.backends.fp32_precision = value
        found.append(setting())
    torch.backends.fp32_precision = general
    return found


class Watch(nn.Module):
    """A linear network that notes how torch is set whenever it, or a copy of it, runs."""

    seen: ClassVar[list[tuple[str, ...]]] = []

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(4, 2)
        self.seen.clear()

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(setting())
        return self.last(x.flatten(1))


X = torch.rand(2, 1, 2, 2)
LABELS = torch.zeros(2, dtype=torch.int64)
SPEC, BALL, BRIGHT = certify.Classification(LABELS), certify.Linf(0.1), certify.Brightness(0.1)
ROW = torch.tensor([[1.0, -1.0]])
ASK = {
    "bounds": lambda net: certify.bounds(net, X, BALL, "crown"),
    "bounds by auto-LiRPA": lambda net: lirpa.bounds(net, X, BALL, "IBP"),
    "verify": lambda net: certify.verify(net, X, SPEC, BALL),
    "verify a line": lambda net: certify.verify(net, X, SPEC, BRIGHT),
    "deviation": lambda net: certify.deviation(net, X, BRIGHT),
    "bab": lambda net: bab.verify(net, X[:1], BALL, ROW, torch.zeros(1)),
    "milp": lambda net: milp.minimum(net, X[:1], BALL, ROW),
    "attack": lambda net: attack.attack(net, X, SPEC, BALL),
    "fgsm": lambda net: attack.fgsm(net, X, SPEC, BALL),
    "pgd": lambda net: attack.pgd(net, X, SPEC, BALL),
    "grid": lambda net: attack.grid(net, X, SPEC, BRIGHT),
    "probe": lambda net: attack.probe(net, X, SPEC, BALL, 10),
    "worst": lambda net: audit.worst(net, X, SPEC, BALL, points=9),
    "estimate": lambda net: certify.estimate(net, X, LABELS, BRIGHT),
    "exhaust": lambda net: certify.exhaust(net, X, LABELS, [X]),
    "throughput": lambda net: throughput(net, X[:1], BRIGHT, n=8, repeats=1),
}
USERS = {
    "as it is": lambda: None,
    "products": lambda: torch.set_float32_matmul_precision("medium"),
    "products, newer": lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32"),
    "convolutions off": lambda: setattr(torch.backends.cudnn, "allow_tf32", False),
    "everything": lambda: setattr(torch.backends, "fp32_precision", "tf32"),
    "a backend": lambda: setattr(torch.backends.cudnn, "fp32_precision", "tf32"),
    "a mix of the interfaces": lambda: setattr(torch.backends.cudnn.conv, "fp32_precision", "ieee"),
}


@pytest.fixture(params=USERS)
def given(request):
    """What a user has set before."""
    before = setting()
    USERS[request.param]()
    yield setting(), following()
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.fp32_precision, torch.backends.cudnn.fp32_precision = before[:2]
    torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision = before[4], before[7]


@pytest.mark.parametrize("name", ASK)
def test_the_front_doors_run_in_full_float32(name):
    if "LiRPA" in name and not lirpa.available():
        pytest.skip("auto-LiRPA is not installed")
    net, before = Watch().eval(), (setting(), following())
    ASK[name](net)
    assert net.seen
    assert {part for seen in net.seen for part in seen} == {"ieee"}
    assert (setting(), following()) == before


def test_training_keeps_what_its_user_set():
    net, before = Watch(), setting()
    attack.adversarial(net, X, LABELS, BALL)
    traced = certify.Network(net, X, check=False)
    traced.propagate(BALL)
    assert set(net.seen) == {before} != {("ieee",) * len(before)}


def test_what_was_set_comes_back_after_an_exception_and_from_within(given):
    @full_float32()
    def fail():
        with full_float32():
            assert set(setting()) == {"ieee"}
        assert set(setting()) == {"ieee"}
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert (setting(), following()) == given


def test_the_last_thread_to_leave_puts_it_back(given):
    first, second = threading.Event(), threading.Event()
    found = []

    @full_float32()
    def other():
        first.set()
        second.wait()
        found.append(setting())

    thread = threading.Thread(target=other)
    with full_float32():
        thread.start()
        first.wait()
    second.set()  # the first one has left
    thread.join()
    assert set(found[0]) == {"ieee"}
    assert (setting(), following()) == given


def test_constants_take_on_type_and_place():
    like = torch.zeros(2, dtype=torch.float64)
    for number in (0.1, 1 / 3, 2, np.float32(0.1)):
        for kind in (torch.float32, torch.float64):
            assert torch.equal(constant(number, like.to(kind)), torch.as_tensor(number, dtype=kind))
    assert constant(0.5, like).dtype == torch.float64
    assert constant(0.5, like).shape == ()
    assert constant(torch.tensor([1, 2]), like).tolist() == [1.0, 2.0]
