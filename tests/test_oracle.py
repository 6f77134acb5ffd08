import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from advkit.errors import AccessError, ModelError
from advkit.losses import ce, margin
from advkit.oracle import Access, Goal, Oracle, Stop, _occurrence, logits_of
from advkit.threat import Lp

X = torch.tensor([[0.2, 0.4], [0.8, 0.1], [0.5, 0.6]])
Y = torch.tensor([1, 0, 1])


class Model:
    """The input itself as logits; remembers what it was asked."""

    def __init__(self):
        self.asked = []

    def __call__(self, x):
        self.asked.append(x.detach().clone())
        return 3 * x


def oracle(eps=0.5, **options):
    return Oracle(Model(), X, Y, Lp(math.inf, eps), **options)


def test_rows_that_are_fooled_are_not_sent_again():
    o = oracle()
    fooling = X.clone()
    fooling[1] = torch.tensor([0.4, 0.5])
    assert o.fooled(fooling).tolist() == [False, True, False]
    assert o.live.tolist() == [0, 2]
    values = o.loss(X, margin)
    assert len(o._model.asked[-1]) == 2
    assert values.tolist() == pytest.approx([-0.6, -math.inf, -0.3])
    _value, g = o.grad(X, margin)
    assert g.tolist() == [[3.0, -3.0], [0.0, 0.0], [3.0, -3.0]]
    assert o.outputs(X)[1].isnan().all()
    assert o.forwards.tolist() == [4, 1, 4]
    assert o.backwards.tolist() == [1, 0, 1]
    assert torch.equal(o.best[1], fooling[1])
    assert o.distance.tolist() == pytest.approx([math.inf, 0.4, math.inf])


def test_a_success_outside_the_threat_model_does_not_count():
    o = oracle(eps=0.1)
    outside = X.clone()
    outside[1] = torch.tensor([0.0, 0.9])
    assert o.fooled(outside).tolist() == [False, True, False]
    assert not o.found.any()
    assert o.live.tolist() == [0, 1, 2]


def test_without_a_radius_the_closest_success_is_kept():
    o = oracle(eps=math.inf)
    for step in (0.9, 0.5, 0.7):
        moved = X.clone()
        moved[1] = torch.tensor([0.1, step])
        o.fooled(moved)
    assert o.best[1].tolist() == pytest.approx([0.1, 0.5])
    assert o.live.tolist() == [0, 1, 2]
    assert o.forwards.tolist() == [3, 3, 3]


def test_stop_when_no_row_is_left():
    o = oracle(budget=1)
    o.fooled(X)
    with pytest.raises(Stop):
        o.fooled(X)
    assert o.forwards.tolist() == [1, 1, 1]


def test_several_candidates_of_a_row():
    o = oracle(eps=math.inf)
    rows = torch.tensor([1, 1, 0, 1])
    candidates = torch.tensor([[0.0, 0.9], [0.3, 0.4], [0.2, 0.4], [0.2, 0.8]])
    assert o.fooled(candidates, rows).tolist() == [True, True, False, True]
    assert o.best[1].tolist() == pytest.approx([0.3, 0.4])
    assert o.forwards.tolist() == [1, 3, 0]


def test_a_budget_counts_candidates():
    o = oracle(budget=2)
    rows = torch.tensor([1, 0, 1, 1])
    values = o.loss(X[rows], ce, rows)
    assert values.isinf().tolist() == [False, False, False, True]
    assert o.forwards.tolist() == [1, 2, 0]


def test_targets_turn_the_sign_and_the_goal():
    o = oracle(goal=Goal(targeted=True))
    value, g = o.grad(X, margin)
    assert g[0].tolist() == [-3.0, 3.0]
    assert o.found.all()
    assert value.tolist() == pytest.approx([0.6, 2.1, 0.3])


@pytest.mark.parametrize(
    ("access", "ask"),
    [
        (Access.SCORES, lambda o: o.grad(X, ce)),
        (Access.LABELS, lambda o: o.grad(X, ce)),
        (Access.LABELS, lambda o: o.loss(X, ce)),
        (Access.LABELS, lambda o: o.outputs(X)),
    ],
)
def test_access_is_enforced(access, ask):
    o = oracle(access=access)
    with pytest.raises(AccessError, match=f"the adversary sees {access.name.lower()} only"):
        ask(o)
    assert not o._model.asked


def test_a_model_without_gradients_says_so():
    o = Oracle(lambda x: x.detach() * 3, X, Y, Lp(math.inf, 0.5))
    with pytest.raises(AccessError, match="gives no gradient"):
        o.grad(X, ce)


def test_nan_gradients_become_zero():
    o = Oracle(lambda x: torch.stack([x[:, 0], (x[:, 1] - x[:, 1]).sqrt()], 1), X, Y, Lp(math.inf, 0.5))
    _, g = o.grad(X, margin)
    assert g.isfinite().all()


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        (lambda x: x * math.nan, "NaN for 3 of 3"),
        (lambda x: x[:2], "float32 of shape \\(2, 2\\) for 3 examples"),
        (lambda x: x.argmax(1), "int64 of shape"),
        (lambda x: "no", "returned str"),
        (lambda x: 1 / 0, "raised ZeroDivisionError on an input of shape \\(3, 2\\): division by zero"),
    ],
)
def test_a_broken_model_gets_a_sentence(model, sentence):
    with pytest.raises(ModelError, match=sentence):
        Oracle(model, X, Y, Lp(math.inf, 0.5)).fooled(X)


def test_logits_of_objects():
    class Output:
        logits = X

    for output in (X, Output(), {"logits": X}, (X, None), [Output()]):
        assert torch.equal(logits_of(output), X)


@given(st.lists(st.integers(0, 4), max_size=20))
def test_occurrence_counts_earlier_equals(rows):
    expected = [rows[:i].count(row) for i, row in enumerate(rows)]
    assert _occurrence(torch.tensor(rows, dtype=torch.int64)).tolist() == expected
