"""Full float32 inside of the front doors, and what was set before afterwards."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import certify
from certify.arithmetic import constant, full_float32


def setting() -> tuple[str, ...]:
    backends = torch.backends
    return (
        backends.fp32_precision,
        backends.cudnn.fp32_precision,
        backends.cudnn.conv.fp32_precision,
        backends.cuda.matmul.fp32_precision,
        backends.mkldnn.matmul.fp32_precision,
    )


class Watch(nn.Module):
    """A linear network that notes how torch is set whenever it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(4, 2)
        self.seen: list[tuple[str, ...]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(setting())
        return self.last(x.flatten(1))


X = torch.rand(2, 1, 2, 2)
LABELS = torch.zeros(2, dtype=torch.int64)
ASK = {
    "bounds": lambda net: certify.bounds(net, X, certify.Linf(0.1), "crown"),
    "verify": lambda net: certify.verify(net, X, certify.Classification(LABELS), certify.Linf(0.1)),
    "deviation": lambda net: certify.deviation(net, X, certify.Brightness(0.1)),
    "estimate": lambda net: certify.estimate(net, X, LABELS, certify.Brightness(0.1)),
}


@pytest.fixture(params=["as it is", "tf32"])
def given(request):
    before = torch.backends.cuda.matmul.fp32_precision
    if request.param == "tf32":
        torch.backends.cuda.matmul.fp32_precision = "tf32"
    yield setting()
    torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.parametrize("name", ASK)
def test_the_front_doors_run_in_full_float32(name, given):
    net = Watch().eval()
    ASK[name](net)
    assert net.seen
    assert {part for seen in net.seen for part in seen} == {"ieee"}
    assert setting() == given


def test_what_was_set_comes_back_after_an_exception_and_from_within(given):
    @full_float32()
    def fail():
        with full_float32():
            assert set(setting()) == {"ieee"}
        assert set(setting()) == {"ieee"}
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert setting() == given


def test_constants_take_on_type_and_place():
    like = torch.zeros(2, dtype=torch.float64)
    assert constant(0.5, like).dtype == torch.float64
    assert constant(0.5, like).shape == ()
    assert constant(torch.tensor([1, 2]), like).tolist() == [1.0, 2.0]
