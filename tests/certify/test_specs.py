"""Specifications against direct statements of what they mean."""

import pytest
import torch

from certify.specs import Classification, Deviation, Linear, margin, margin_rows, select


def draws(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def smallest(spec, outputs: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    rows = spec.rows(reference)
    return ((rows.C @ outputs.unsqueeze(2)).squeeze(2) + rows.d).amin(1)


def test_classification_rows_are_the_margins_to_the_other_classes():
    outputs, y = draws(5, 4), torch.tensor([0, 1, 2, 3, 1])
    rows = Classification(y).rows(outputs)
    assert rows.C.shape == (5, 3, 4)
    for i, label in enumerate(y.tolist()):
        others = [k for k in range(4) if k != label]
        torch.testing.assert_close(rows.C[i] @ outputs[i], outputs[i, label] - outputs[i, others])
    correct = outputs.argmax(1) == y
    assert torch.equal(smallest(Classification(y), outputs, outputs) > 0, correct)
    assert torch.equal(margin_rows(y, 4), rows.C)


def test_a_tie_does_not_hold():
    assert float(margin(Classification(torch.tensor([0])), torch.ones(1, 3), torch.ones(1, 3))) == 0.0


@pytest.mark.parametrize("delta", [0.5, torch.tensor([0.5, 0.1, 1.0, 2.0, 0.2, 0.3])])
@pytest.mark.parametrize("shift", [0.0, 7.0])
def test_coordinate_deviation_is_the_distance_to_the_reference(delta, shift):
    reference, outputs = draws(8, 6) + shift, draws(8, 6) + shift
    outputs = reference + 0.4 * (outputs - shift)
    spec = Deviation(delta)
    expected = (torch.as_tensor(delta) - (outputs - reference).abs()).amin(1)
    torch.testing.assert_close(smallest(spec, outputs, reference), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(margin(spec, outputs, reference), expected, atol=1e-5, rtol=0)
    assert bool((smallest(spec, reference, reference) > 0).all())


def test_a_given_reference_replaces_the_outputs():
    centre, outputs = draws(3, 4) + 5, draws(3, 4)
    spec = Deviation(10.0, reference=centre)
    torch.testing.assert_close(
        smallest(spec, outputs, outputs), (10 - (outputs - centre).abs()).amin(1), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("directions", [4, 7, 16])
def test_the_polygon_lies_in_the_disc_and_almost_fills_it(directions):
    angle = torch.linspace(0, 2 * torch.pi, 721)
    reference = torch.tensor([[3.0, -2.0]]).expand(721, 2)
    spec = Deviation(1.5, norm="point_l2", directions=directions)
    circle = torch.stack([angle.cos(), angle.sin()], 1)
    assert bool((smallest(spec, reference + 1.5001 * circle, reference) <= 0).all())
    inside = 1.4999 * torch.cos(torch.tensor(torch.pi / directions))
    assert bool((smallest(spec, reference + inside * circle, reference) > 0).all())
    torch.testing.assert_close(margin(spec, reference + 1.2 * circle, reference), torch.full((721,), 0.3))
    # The rows are stricter than the property, never laxer.
    points = reference + draws(721, 2)
    assert bool((margin(spec, points, reference)[smallest(spec, points, reference) > 0] > 0).all())


def test_point_deviation_takes_one_radius_a_point():
    reference = torch.zeros(1, 4)
    spec = Deviation(torch.tensor([1.0, 3.0]), norm="point_l2")
    far_second = torch.tensor([[0.0, 0.0, 2.0, 0.0]])
    assert float(margin(spec, far_second, reference)) == 1.0
    assert float(smallest(spec, far_second, reference)) > 0
    far_first = torch.tensor([[2.0, 0.0, 0.0, 0.0]])
    assert float(margin(spec, far_first, reference)) == -1.0
    assert float(smallest(spec, far_first, reference)) < 0


def test_linear_rows_broadcast_and_follow_the_type():
    C, d, outputs = draws(3, 4), torch.tensor([0.1, 0.2, 0.3]), draws(5, 4).double()
    rows = Linear(C, d).rows(outputs)
    assert rows.C.shape == (5, 3, 4)
    assert rows.C.dtype == rows.d.dtype == torch.float64
    torch.testing.assert_close(margin(Linear(C, d), outputs, outputs), (outputs @ C.double().T + d.double()).amin(1))
    assert Linear(C).rows(outputs).d.shape == (5, 3)


def test_margins_take_leading_axes():
    reference, outputs = draws(3, 4), draws(7, 3, 4)
    for spec in (Classification(torch.tensor([0, 1, 2])), Deviation(0.5), Deviation(0.5, norm="point_l2")):
        several = margin(spec, outputs, reference)
        assert several.shape == (7, 3)
        torch.testing.assert_close(several[4], margin(spec, outputs[4], reference))


@pytest.mark.parametrize(
    "spec",
    [
        Classification(torch.tensor([0, 1, 2, 3])),
        Deviation(0.5),
        Deviation(0.5, norm="point_l2", reference=draws(4, 4) + 1),
        Linear(draws(2, 4), 0.3),
        Linear(draws(4, 2, 4)),
    ],
    ids=["classification", "deviation", "points", "shared", "each"],
)
def test_selection_keeps_the_property_of_the_chosen_images(spec):
    reference, outputs, index = draws(4, 4), draws(4, 4).flip(0), torch.tensor([3, 1, 1])
    chosen = margin(select(spec, reference, index), outputs[index], torch.full((3, 4), 9.0))
    torch.testing.assert_close(chosen, margin(spec, outputs, reference)[index])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Linear(torch.zeros(3)), "rows, outputs"),
        (lambda: Linear(torch.zeros(0, 3)), "at least one row"),
        (lambda: Linear(torch.zeros(2, 3)).rows(draws(1, 4)), "3 columns but the network has 4"),
        (lambda: Linear(torch.zeros(2, 1, 4)).rows(draws(3, 4)), "batch of 2"),
        (lambda: Classification(torch.tensor([0, 4])).rows(draws(2, 4)), r"\[0, 4\] but the network has 4"),
        (lambda: Classification(torch.tensor([-1, 0])).rows(draws(2, 4)), r"\[-1, 0\]"),
        (lambda: Classification(torch.tensor([0.0, 1.0])).rows(draws(2, 4)), "integers"),
        (lambda: Classification(torch.tensor([0])).rows(draws(2, 4)), "shape"),
        (lambda: Classification(torch.tensor([0])).rows(draws(1, 1)), "two outputs"),
        (lambda: Deviation(0.0), "> 0"),
        (lambda: Deviation(1.0, norm="l1"), "norm must be"),
        (lambda: Deviation(1.0, directions=3), "4 directions"),
        (lambda: Deviation(1.0, norm="point_l2").rows(draws(2, 3)), "even number"),
        (lambda: Deviation(1.0, reference=draws(1, 4)).rows(draws(2, 4)), "reference is"),
    ],
)
def test_bad_specifications_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
