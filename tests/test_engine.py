import math

import pytest
import torch
from torch import nn

from advkit import Access, AccessError, Goal, Lp, ModelError, UsageError, frozen, perturb, run
from advkit.attacks import BIM, FGSM, FMN, PGD, Square

X = torch.rand(6, 1, 5, 5, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(25, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3))


@pytest.fixture
def y(model):
    with torch.no_grad():
        labels = model.eval()(X).argmax(1)
    model.train()
    return labels


def test_frozen_puts_every_flag_back(model):
    model[2].eval()
    model[1].bias.requires_grad_(False)

    def body():
        with frozen(model):
            assert not any(module.training for module in model.modules())
            assert not any(parameter.requires_grad for parameter in model.parameters())
            raise KeyError

    with pytest.raises(KeyError):
        body()
    assert [module.training for module in model.modules()] == [True, True, True, False, True, True, True]
    assert [parameter.requires_grad for parameter in model.parameters()] == [True, False, True, True, True, True]


def test_a_row_that_is_wrong_already_is_a_success_at_distance_zero(model, y):
    wrong = y.clone()
    wrong[2] = (y[2] + 1) % 3
    for threat in (Lp(math.inf, 1e-6), Lp(math.inf)):
        result = run(FMN(3), model, X, wrong, threat)
        assert result.success[2]
        assert result.distance[2] == 0
        assert torch.equal(result.x_adv[2], X[2])
        assert result.forwards[2] == 0
        assert result.checks[2] == 1


def test_distances_grow_with_failures(model, y):
    result = run(PGD(5), model, X, y, Lp(math.inf, 1e-7))
    assert not result.success.any()
    assert torch.equal(result.x_adv, X)
    assert result.distance.isinf().all()
    assert result.forwards.tolist() == [6] * 6
    assert result.backwards.tolist() == [5] * 6


def test_perturb_returns_the_last_iterate_of_every_row(model, y):
    threat = Lp(math.inf, 0.3)
    x_adv = perturb(FGSM(), model, X, y, threat, rng=torch.Generator())
    inside = (X + 0.3 <= 1) & (X - 0.3 >= 0)
    assert torch.allclose((x_adv - X).abs()[inside], torch.tensor(0.3))
    assert model.training
    assert not x_adv.requires_grad


def test_perturb_against_reference_logits(model):
    with torch.no_grad():
        logits = model.eval()(X)
    x_adv = perturb(PGD(5, loss="kl"), model, X, logits, Lp(2.0, 0.5), rng=torch.Generator())
    assert Lp(2.0, 0.5).allows(x_adv, X).all()
    assert not torch.equal(x_adv, X)


def test_goals(model, y):
    target = (y + 1) % 3
    result = run(PGD(30), model, X, target, Lp(math.inf, 1.0), goal=Goal(targeted=True))
    assert torch.equal(result.outputs.argmax(1) == target, result.success)
    assert result.success.any()


def test_any_rank_dtype_and_range():
    for shape in ((4,), (2, 3), (2, 2, 2), (1, 2, 2, 2)):
        x = 100 * torch.rand(3, *shape, dtype=torch.float64) - 50
        weights = torch.randn(x[0].numel(), 2, dtype=torch.float64)

        def model(z, weights=weights):
            return z.flatten(1) @ weights

        result = run(PGD(10), model, x, model(x).argmax(1), Lp(math.inf, 40.0, -50.0, 50.0))
        assert result.x_adv.dtype == torch.float64
        assert ((result.x_adv >= -50) & (result.x_adv <= 50)).all()


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        ({"x": X.int()}, UsageError, "the inputs are torch.int32"),
        ({"x": X[:0], "y": torch.zeros(0).long()}, UsageError, "at least one example"),
        ({"x": X + 1}, UsageError, r"the inputs are in \[1\..*the threat model's range is \[0, 1\]"),
        ({"x": X * math.nan}, UsageError, "NaN or infinite"),
        ({"y": torch.zeros(3).long()}, UsageError, r"6 inputs and labels of shape \(3,\)"),
        ({"y": torch.full((6,), 3)}, UsageError, "the labels are between 3 and 3; the model has classes 0 to 2"),
        ({"y": torch.full((6,), -1)}, UsageError, "between -1 and -1"),
        ({"x": X[:, :, :4]}, ModelError, r"raised RuntimeError on an input of shape \(6, 1, 4, 5\)"),
        ({"threat": Lp(math.inf)}, UsageError, "PGD searches inside a fixed radius and none was given"),
        ({"attack": Square(), "threat": Lp(0.0, 1.0)}, UsageError, "Square does not serve l_0; it serves l_inf, l_2, l_1"),
        ({"attack": BIM(), "threat": Lp(0.0, 1.0)}, UsageError, "BIM does not serve l_0; it serves l_inf, l_2, l_1"),
        ({"access": Access.SCORES}, AccessError, "asked for gradients; the adversary sees scores only"),
        ({"budget": 0}, UsageError, "the budget is 0"),
    ],
)
def test_bad_input_gets_a_sentence(model, y, change, error, sentence):
    given = {"attack": PGD(2), "model": model, "x": X, "y": y, "threat": Lp(math.inf, 0.1), **change}
    order = [given.pop(name) for name in ("attack", "model", "x", "y", "threat")]
    with pytest.raises(error, match=sentence):
        run(*order, **given)


def test_a_model_of_one_output_is_refused(y):
    with pytest.raises(ModelError, match="at least two logits"):
        run(PGD(2), lambda x: x.flatten(1)[:, :1], X, torch.zeros(6).long(), Lp(math.inf, 0.1))


def test_a_model_that_changes_its_input_is_refused(y):
    with pytest.raises(ModelError, match="changes its input in place"):
        run(PGD(2), lambda x: x.sub_(0.5).flatten(1), X.clone(), y, Lp(math.inf, 0.1))


def test_a_success_that_is_not_confirmed_does_not_count(y):
    """A model that is fooled once and never again."""
    calls = []

    def model(x):
        calls.append(len(x))
        z = torch.zeros(len(x), 3)
        z[:, 1 if len(calls) == 3 else 0] = 1.0
        return z

    result = run(Square(queries=3), model, X, torch.zeros(6).long(), Lp(math.inf, 0.1))
    assert len(calls) == 4
    assert not result.success.any()
