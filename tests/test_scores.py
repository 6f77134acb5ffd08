"""Attacks that see scores only."""

import math

import pytest
import torch

from advkit import Lp, Oracle, differences, run
from advkit.attacks import NES, SPSA, SimBA, Square
from advkit.losses import margin
from advkit.norms import lp_norm

FREE = {"low": -math.inf, "high": math.inf}


@pytest.mark.parametrize("p", [2.0, 1.0])
@pytest.mark.parametrize("shape", [(16,), (2, 8), (1, 4, 4)])
def test_square_solves_a_linear_model_in_l2_and_l1(linear, p, shape):
    model, w, x, y = linear(16)
    true = (x @ w).abs() / (w.norm() if p == 2 else w.abs().max())
    x = x.view(-1, *shape)
    far, near = (Lp(p, eps, **FREE) for eps in (float(true.max()) * 1.5, float(true.min()) * 0.99))
    assert run(Square(600), lambda z: model(z.flatten(1)), x, y, far).success.float().mean() > 0.9
    assert not run(Square(50), lambda z: model(z.flatten(1)), x, y, near).success.any()


@pytest.mark.parametrize(("p", "eps"), [(2.0, 1.0), (1.0, 3.0)])
def test_square_spends_the_radius(p, eps):
    """On a clean input at the edge of the range half of every change is cut off; the candidates fill the ball all the same."""
    x, seen = torch.zeros(3, 1, 28, 28), []

    def model(z):
        seen.append(lp_norm(z - x, p))
        return torch.tensor([[1.0, 0.0]]).expand(len(z), 2)

    run(Square(30), model, x, torch.zeros(3).long(), Lp(p, eps))
    filled = torch.stack(seen[1:-1]) / eps
    assert float(filled.max()) < 1 + 1e-5
    assert float(filled.min()) > 0.99


@pytest.mark.parametrize(
    ("attack", "p"),
    [
        (NES(600), math.inf),
        (NES(600), 2.0),
        (SPSA(600), math.inf),
        (SimBA(600), math.inf),
        (SimBA(600), 2.0),
        (SimBA(600, "pixel"), math.inf),
        (SimBA(600, "pixel"), 2.0),
    ],
    ids=repr,
)
@pytest.mark.parametrize("shape", [(16,), (2, 8), (1, 4, 4)])
def test_a_linear_model_falls_if_the_radius_lets_it(linear, attack, p, shape):
    model, w, x, y = linear(16)
    true = (x @ w).abs() / (w.norm() if p == 2 else w.abs().sum())
    x = x.view(-1, *shape)
    far, near = (Lp(p, eps, **FREE) for eps in (float(true.max()) * 1.5, float(true.min()) * 0.99))
    assert run(attack, lambda z: model(z.flatten(1)), x, y, far).success.float().mean() > 0.95
    assert not run(attack, lambda z: model(z.flatten(1)), x, y, near).success.any()


@pytest.mark.parametrize("several", [1, 10**6])
def test_differences_along_a_basis_are_the_gradient(linear, several, monkeypatch):
    """The mean over the D unit vectors is a D-th of the gradient, however many candidates are sent at once."""
    monkeypatch.setattr(differences, "CANDIDATES", several)
    model, _, x, y = linear(6)
    oracle, rows, turns = Oracle(model, x, y, Lp(math.inf, 1.0, **FREE)), torch.tensor([0, 3, 31]), iter(range(6))

    def draw(rows):
        return torch.eye(6, dtype=x.dtype)[next(turns)].expand(len(rows), -1)

    x_t = x + 0.1
    g = differences.difference(oracle, margin, x_t, x, oracle.threat, rows, 6, 0.01, draw)
    truth = oracle.grad(x_t[rows], margin, rows)[1]
    assert torch.allclose(6 * g, truth, atol=1e-9)
    assert oracle.forwards[rows].tolist() == [13] * 3


def test_the_signs_of_spsa_are_both_and_independent():
    seen, x = [], torch.full((2, 1, 10, 10), 0.5)

    def model(z):
        seen.append((z - 0.5).flatten(1))
        return torch.tensor([[1.0, 0.0]]).expand(len(z), 2)

    run(SPSA(400, pairs=1, delta=0.1), model, x, torch.zeros(2).long(), Lp(math.inf, 0.1))
    up = torch.stack([d[:2] for d in seen[1:-1]]).sign().double().flatten(1)
    assert set(up.unique().tolist()) == {-1.0, 1.0}
    # 200 signs: six standard deviations.
    between = up.T @ up / len(up) - torch.eye(200)
    assert float(between.abs().max()) < 6 / math.sqrt(len(up))


@pytest.mark.parametrize("basis", ["pixel", "dct"])
@pytest.mark.parametrize("shape", [(12,), (2, 5), (2, 4, 5)])
def test_simba_tries_each_direction_once_on_both_sides(basis, shape):
    x, size = torch.full((3, *shape), 0.5, dtype=torch.float64), math.prod(shape)
    seen = []

    def model(z):
        seen.append((z - x).flatten(1))
        return torch.tensor([[1.0, 0.0]]).expand(len(z), 2)

    run(SimBA(1 + 2 * size, basis, step=0.1), model, x, torch.zeros(3).long(), Lp(2.0, 1.0))
    # The first two are the clean input, which the engine and the attack look at, and the last is the last iterate.
    up, down = torch.stack(seen[2:-1:2], 1) / 0.1, torch.stack(seen[3:-1:2], 1) / 0.1
    assert torch.allclose(up, -down)
    assert torch.allclose(up @ up.mT, torch.eye(size, dtype=torch.float64).expand(3, -1, -1), atol=1e-12)
    assert not torch.allclose(up[0], up[1])


def test_simba_tries_low_frequencies_first():
    x, seen = torch.full((2, 1, 10, 10), 0.5), []

    def model(z):
        seen.append(z - x)
        return torch.tensor([[1.0, 0.0]]).expand(len(z), 2)

    run(SimBA(201, "dct"), model, x, torch.zeros(2).long(), Lp(2.0, 1.0))
    place = torch.arange(10)
    cosine = torch.cos(math.pi / 10 * place.unsqueeze(1) * (place + 0.5))
    heard = [(cosine @ d @ cosine.T).flatten(1).abs().argmax(1) for d in seen[2:-1]]
    frequency = torch.stack([torch.maximum(f // 10, f % 10) for f in heard])
    assert int(frequency[:8].max()) == 1
    assert int(frequency[8:].min()) == 2
    assert int(frequency[-38:].min()) >= 8
