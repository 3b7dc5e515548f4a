"""The terms of CAR's loss: numbers worked out by hand, derivatives, and the algebra the paper rests on."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from methods.car.losses import consistency, discrepancy, margin, margin_ratio, stability

P = torch.tensor([[0.7, 0.2, 0.1], [0.4, 0.35, 0.25]], dtype=torch.float64)
Q = torch.tensor([[0.5, 0.4, 0.1], [0.2, 0.3, 0.5]], dtype=torch.float64)


def probabilities(n: int, classes: int = 4, seed: int = 0, scale: float = 2.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(n, classes, generator=generator, dtype=torch.float64)).softmax(1)


def test_by_hand():
    torch.testing.assert_close(stability(P, Q), torch.tensor([0.04 + 0.04, 0.04 + 0.0025 + 0.0625]).double())
    torch.testing.assert_close(discrepancy(P, Q), torch.tensor([0.2, 0.25]).double())
    torch.testing.assert_close(discrepancy(P, Q, "sorted"), torch.tensor([0.2, 0.1]).double())
    torch.testing.assert_close(margin(P), torch.tensor([0.25, 0.025]).double())
    excess = torch.tensor([0.2 / 0.35 - 1.0, 0.25 / 0.125 - 1.0]).double()  # epsilon .1, eta 1
    for hinge, expected in {
        "relu": excess.relu(),
        "softplus": F.softplus(excess),
        "literal": torch.tensor([math.log(2.0), math.log(1 + math.e)]).double(),
    }.items():
        found = margin_ratio(P, Q, eta=1.0, eps=0.1, hinge=hinge)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


def test_sorting_hides_a_flip():
    one, other = torch.tensor([[0.9, 0.1]]), torch.tensor([[0.1, 0.9]])
    assert float(discrepancy(one, other, "sorted")) == 0.0
    assert float(discrepancy(one, other)) == pytest.approx(0.8)


def test_the_literal_hinge_has_a_floor_and_no_gradient_below_eta():
    logits = torch.tensor([[3.0, 0.0]], dtype=torch.float64, requires_grad=True)
    near = torch.tensor([[2.9, 0.0]], dtype=torch.float64).softmax(1)
    literal = margin_ratio(logits.softmax(1), near)
    assert float(literal.detach()) == pytest.approx(math.log(2.0))
    (gradient,) = torch.autograd.grad(literal.sum(), logits)
    assert torch.equal(gradient, torch.zeros_like(gradient))
    (gradient,) = torch.autograd.grad(margin_ratio(logits.softmax(1), near, hinge="softplus").sum(), logits)
    assert float(gradient.abs().max()) > 0.0


@pytest.mark.parametrize("hinge", ["literal", "softplus", "relu"])
def test_an_infinite_eta_leaves_no_gradient(hinge):
    logits = torch.tensor([[0.1, 0.0], [0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    loss = margin_ratio(logits.softmax(1), Q[:, :2], eta=math.inf, hinge=hinge).sum()
    loss.backward()
    assert torch.equal(logits.grad, torch.zeros_like(logits))


@pytest.mark.parametrize("alignment", ["class", "sorted"])
def test_derivatives(alignment):
    generator = torch.Generator().manual_seed(3)
    a, b = (torch.randn(3, 4, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(2))
    assert torch.autograd.gradcheck(lambda a, b: stability(a.softmax(1), b.softmax(1)), (a, b))
    assert torch.autograd.gradcheck(
        lambda a, b: margin_ratio(a.softmax(1), b.softmax(1), hinge="softplus", alignment=alignment), (a, b)
    )
    for kind in ("kl", "mse"):
        assert torch.autograd.gradcheck(lambda a, b, kind=kind: consistency(a, b, kind), (a, b))


def test_consistency_is_the_divergence_from_the_hard_to_the_soft_prediction():
    p, q = probabilities(5, seed=1), probabilities(5, seed=2)
    expected = (p * (p / q).log()).sum(1)
    torch.testing.assert_close(consistency(p.log() + 3.0, q.log() - 1.0), expected)
    torch.testing.assert_close(consistency(p.log(), p.log()), torch.zeros(5).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(consistency(p.log(), q.log(), "mse"), F.mse_loss(p, q, reduction="none").mean(1))


@pytest.mark.parametrize("kind", ["kl", "mse"])
def test_the_soft_side_can_be_a_constant(kind):
    soft = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    hard = torch.randn(4, 3, generator=torch.Generator().manual_seed(1)).requires_grad_()
    grads = {}
    for gradient in ("both", "hard"):
        loss = consistency(soft, hard, kind, gradient).sum()
        grads[gradient] = torch.autograd.grad(loss, (soft, hard), allow_unused=True)
    assert grads["hard"][0] is None
    assert float(grads["both"][0].abs().max()) > 1e-3
    torch.testing.assert_close(grads["hard"][1], grads["both"][1])


def test_a_probability_of_zero_has_a_finite_derivative():
    soft = torch.tensor([[200.0, 0.0, -200.0]], requires_grad=True)
    hard = torch.tensor([[-200.0, 0.0, 200.0]], requires_grad=True)
    loss = consistency(soft, hard).sum()
    loss.backward()
    assert float(loss.detach()) == pytest.approx(400.0)
    assert bool(torch.isfinite(soft.grad).all() and torch.isfinite(hard.grad).all())


# --- the paper's algebra ------------------------------------------------------------
def test_equation_4_the_triangle_bound():
    """Z under one mask <= its distance to the mean prediction, at x and at x_T, plus that of the mean predictions."""
    at_x, at_edit = (probabilities(400, seed=s).reshape(8, 50, 4) for s in (0, 1))  # masks, images, classes
    mean_x, mean_edit = at_x.mean(0), at_edit.mean(0)
    for one, other in zip(at_x, at_edit):
        a, c = ((p - m).square().sum(1).sqrt() for p, m in ((one, mean_x), (other, mean_edit)))
        assert bool((discrepancy(one, other) <= a + discrepancy(mean_x, mean_edit) + c + 1e-12).all())


def test_equation_5_and_a3_twice_the_variance():
    drawn = probabilities(60, seed=4).reshape(12, 5, 4)
    pairs = torch.stack([stability(a, b) for a in drawn for b in drawn])  # all pairs: independent draws, with return
    variance = (drawn - drawn.mean(0)).square().sum(2).mean(0)
    torch.testing.assert_close(pairs.mean(0), 2 * variance)


def test_a2_a_discrepancy_below_the_margin_keeps_the_prediction():
    p, q = probabilities(20_000, seed=5, scale=0.5), probabilities(20_000, seed=6, scale=0.5)
    kept = discrepancy(p, q) < margin(p)
    assert 500 < int(kept.sum()) < 19_500
    assert torch.equal(p.argmax(1)[kept], q.argmax(1)[kept])
    # Sorting each side first proves nothing.
    sorted_kept = discrepancy(p, q, "sorted") < margin(p)
    assert int((p.argmax(1) != q.argmax(1))[sorted_kept].sum()) > 100
