import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from advkit.errors import AccessError, ModelError
from advkit.losses import ce, margin, towards_margin
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


def test_rivals_are_the_other_classes_greatest_first():
    z = torch.tensor([[1.0, 5.0, 3.0, 2.0], [0.0, -math.inf, 7.0, -1.0], [math.nan, 1.0, 2.0, 3.0]])
    o = oracle()
    assert o.rivals(z, 2).tolist() == [[2, 3], [2, 3], [3, 2]]
    assert o.rivals(z, 9).tolist() == [[2, 3, 0], [2, 3, 1], [3, 2, 0]]
    assert o.rivals(z[:1], 1, torch.tensor([1])).tolist() == [[1]]
    assert o.forwards.tolist() == [0, 0, 0]


def test_a_loss_towards_a_class():
    t = torch.tensor([0, 1, 0])
    assert oracle().loss(X, towards_margin, towards=t).tolist() == pytest.approx([-0.6, -2.1, -0.3])
    targeted = oracle(goal=Goal(targeted=True))
    assert targeted.loss(X, towards_margin, towards=t).tolist() == pytest.approx([0.6, 2.1, 0.3])
    rows = torch.tensor([2, 0])
    values, g = oracle().grad(X[rows], towards_margin, rows, towards=t[rows])
    assert values.tolist() == pytest.approx([-0.3, -0.6])
    assert g.tolist() == [[3.0, -3.0], [3.0, -3.0]]


@pytest.mark.parametrize("targeted", [False, True])
def test_the_jacobian_is_that_of_autograd(targeted):
    rng = torch.Generator().manual_seed(0)
    w, x = (torch.randn(shape, generator=rng, dtype=torch.float64) for shape in ((6, 5), (4, 2, 3)))
    model = lambda z: torch.tanh(z.flatten(1) @ w)
    y, towards = torch.tensor([0, 1, 2, 3]), torch.tensor([[1, 2, 4], [0, 2, 3], [4, 3, 0], [0, 1, 2]])
    o = Oracle(model, x, y, Lp(2.0, 1e-9, -math.inf, math.inf), Goal(targeted))
    values, g = o.jacobian(x, towards)
    gains = lambda z: (model(z).gather(1, towards) - model(z).gather(1, y.unsqueeze(1))) * (-1 if targeted else 1)
    expected = torch.autograd.functional.jacobian(gains, x)
    assert torch.allclose(values, gains(x))
    assert torch.allclose(g, torch.stack([expected[i, :, i] for i in range(4)]))
    assert o.forwards.tolist() == [1] * 4
    assert o.backwards.tolist() == [3] * 4


def test_what_goes_through_a_change_is_counted_and_is_no_success():
    o, seen = oracle(), []

    def swap(z, rows):
        seen.append(rows.tolist())
        return 2 * z.flip(1)

    rows = torch.tensor([1, 2])
    assert (o.loss(X[rows], margin, rows, through=swap) > 0).all()
    _value, g = o.grad(X[rows], margin, rows, through=swap)
    assert g.tolist() == [[6.0, -6.0], [-6.0, 6.0]]
    assert torch.equal(o._model.asked[0], 2 * X[rows].flip(1))
    assert seen == [[1, 2], [1, 2]]
    assert not o.found.any()
    assert o.forwards.tolist() == [0, 2, 2]
    assert o.backwards.tolist() == [0, 1, 1]


def test_a_fast_model_that_lies_breaks_nothing():
    """It says that every row is fooled; the model itself says that none is."""
    fast = Model()
    o = oracle(fast=lambda x: fast(x).flip(1))
    assert not o.fooled(X).any()
    assert not o.found.any()
    assert not o.once.any()
    assert o.checks.tolist() == [1, 1, 1]
    assert o.exact.all()
    assert not o.fooled(X).any()
    assert len(fast.asked) == 1
    assert o.forwards.tolist() == [2, 2, 2]
    assert sum(map(len, o._model.asked)) == int(o.checks.sum()) + 3


def test_rows_go_on_with_the_exact_model_one_by_one():
    """The fast model is wrong about row 0 only, so row 0 alone leaves it, and answers keep their order."""
    fast = Model()
    turned = torch.tensor([[True], [False], [False]])

    def lies(x):
        z = fast(x)
        return torch.where(turned, z.flip(1), z) if len(x) == 3 else z

    o = oracle(fast=lies)
    o.fooled(X)
    assert o.exact.tolist() == [True, False, False]
    assert torch.equal(o.outputs(X), 3 * X)
    assert [len(x) for x in fast.asked] == [3, 2]
    assert [len(x) for x in o._model.asked] == [1, 1]


@pytest.mark.parametrize(("p", "votes"), [(0.3, 1), (0.3, 15), (0.7, 15)])
def test_votes(p, votes):
    """Each answer is fooled with probability p: the share of rows that fall is that of most of ``votes`` answers, after one."""
    rng, n = torch.Generator().manual_seed(0), 2000

    def model(x):
        return torch.stack([torch.rand(len(x), generator=rng) < p, torch.full((len(x),), 0.5)], 1).double()

    o = Oracle(model, torch.full((n, 2), 0.5), torch.ones(n, dtype=torch.int64), Lp(math.inf, 0.1), votes=votes)
    o.fooled(o.x)
    most = sum(math.comb(votes, k) * p**k * (1 - p) ** (votes - k) for k in range(votes // 2 + 1, votes + 1))
    expected = p if votes == 1 else p * most
    assert float(o.found.double().mean()) == pytest.approx(expected, abs=0.04)
    assert float(o.once.double().mean()) == pytest.approx(p, abs=0.04)
    assert int(o.checks.sum()) >= votes * int(o.once.sum()) if votes > 1 else int(o.checks.sum()) == 0


def test_begin_is_a_check_and_ends_rows_that_meet_the_goal():
    y = torch.tensor([0, 0, 1])
    o = Oracle(Model(), X, y, Lp(math.inf, 0.5))
    assert torch.equal(o.begin(), 3 * X)
    assert o.live.tolist() == [1, 2]
    assert o.distance.tolist() == [0.0, math.inf, math.inf]
    assert o.checks.tolist() == [1, 1, 1]
    assert o.forwards.tolist() == [0, 0, 0]


def test_rows_that_are_done_do_not_stop_those_that_are_not():
    o = oracle()
    rows = torch.tensor([1])
    o.fooled(torch.tensor([[0.4, 0.5]]), rows)
    asked = len(o._model.asked)
    assert o.loss(X[rows], margin, rows).tolist() == [-math.inf]
    assert o.grad(X[rows], margin, rows)[1].tolist() == [[0.0, 0.0]]
    assert o.outputs(X[rows], rows).isnan().all()
    assert not o.fooled(X[rows], rows).any()
    assert len(o._model.asked) == asked
    assert o.live.tolist() == [0, 2]
    o.fooled(X.flip(1))
    with pytest.raises(Stop):
        o.fooled(X[rows], rows)


def scripted(answers, eps):
    """An oracle of one row and three votes whose model says, call by call, whether it is fooled."""
    said = iter(answers)
    model = lambda x: torch.tensor([[0.0, 1.0] if next(said) else [1.0, 0.0]] * len(x))
    return Oracle(model, torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64), Lp(math.inf, eps), votes=3)


def test_inside_a_radius_the_success_with_the_most_votes_is_kept_until_one_is_sure():
    most, few, all_of_three, sure = [1, 1, 0, 1], [1, 0, 0, 1], [1, 1, 1, 1, 1, 0], [1] * 10
    o = scripted([*most, *most, *few, *all_of_three, *most, *sure], eps=0.5)
    near, middle, far = (torch.full((1, 2), size) for size in (0.1, 0.2, 0.4))
    for tried, best in ((near, near), (middle, middle), (far, middle), (far, far), (middle, far)):
        o.fooled(tried)
        assert torch.equal(o.best, best)
        assert o.found.all()
        assert o.live.tolist() == [0]
    o.fooled(near)
    assert torch.equal(o.best, near)
    assert o.done.all()
    assert float(o.distance) == pytest.approx(0.1)
    assert o.checks.tolist() == [3 + 3 + 3 + 5 + 3 + 9]
    assert o.forwards.tolist() == [6]


def test_in_a_search_for_the_closest_a_success_must_be_sure():
    most, all_of_three, sure = [1, 1, 0, 1], [1, 1, 1, 1, 1, 0], [1] * 10
    o = scripted([*most, *sure, *all_of_three, *sure, 1], eps=math.inf)
    for size, best in ((0.1, 0.0), (0.3, 0.3), (0.2, 0.3), (0.25, 0.25), (0.28, 0.25)):
        o.fooled(torch.full((1, 2), size))
        assert float(o.best.max()) == pytest.approx(best)
    assert not o.done.any()
    assert o.checks.tolist() == [3 + 9 + 5 + 9]
