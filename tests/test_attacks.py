"""Every attack: the contract, and the closed-form optimum of a linear model."""

import math

import pytest
import torch

from advkit import Lp, Restarts, Worst, run
from advkit.attacks import ATTACKS, BIM, FGSM, FMN, PGD, Gaussian, SaltAndPepper, Square, Uniform
from advkit.norms import dual, lp_norm, steepest
from advkit.testing import check_attack

QUICK = {
    "fgsm": [FGSM(), FGSM(loss="margin")],
    "bim": [BIM(4)],
    "pgd": [PGD(4), PGD(4, loss="dlr", momentum=0.9, start=False)],
    "fmn": [FMN(6)],
    "square": [Square(12)],
    "uniform": [Uniform(4)],
    "gaussian": [Gaussian(4)],
    "salt-and-pepper": [SaltAndPepper(4)],
    "restarts": [Restarts(PGD(3), 2)],
    "worst": [Worst((FGSM(), Square(5)))],
}
CASES = [attack for attacks in QUICK.values() for attack in attacks]


def test_every_attack_of_the_table_is_tested():
    assert set(QUICK) == set(ATTACKS)
    for name, attacks in QUICK.items():
        assert all(type(attack) is ATTACKS[name] for attack in attacks)


@pytest.mark.parametrize("attack", CASES, ids=repr)
def test_contract(attack):
    check_attack(attack)


FREE = {"low": -math.inf, "high": math.inf}


@pytest.mark.parametrize("shape", [(2,), (20,), (3, 4, 5)])
@pytest.mark.parametrize("p", [1.0, 2.0, math.inf])
def test_fmn_finds_the_distance_to_a_linear_boundary(linear, p, shape):
    model, w, x, y = linear(math.prod(shape))
    true = (x @ w).abs() / lp_norm(w.unsqueeze(0), dual(p))
    result = run(FMN(), lambda z: model(z.flatten(1)), x.view(-1, *shape), y, Lp(p, **FREE))
    ratio = result.distance / true
    assert result.success.all()
    assert float(ratio.min()) > 1 - 1e-6
    assert float(ratio.max()) < 1.02


def test_fmn_finds_the_fewest_entries_of_a_linear_boundary(linear):
    """In [0, 1] the fewest entries are those whose change to the far end of the range gains most."""
    model, w, x, _y = linear(20)
    x = x.sigmoid()
    centre = torch.full_like(w, 0.5)
    score = (x - centre) @ w
    gain = torch.where((w > 0) == (score < 0).unsqueeze(1), 1 - x, x) * w.abs()
    reach = gain.sort(1, descending=True).values.cumsum(1)
    true = (reach < score.abs().unsqueeze(1)).sum(1) + 1
    result = run(FMN(), lambda z: model(z - centre), x, (score > 0).long(), Lp(0.0))
    assert result.success.all()
    assert (result.distance >= true).all()
    assert float((result.distance / true).mean()) < 1.25


@pytest.mark.parametrize("attack", [FGSM(), BIM(), PGD(40), PGD(40, momentum=0.9), PGD(40, loss="margin")], ids=repr)
@pytest.mark.parametrize("p", [1.0, 2.0, math.inf])
def test_a_linear_model_falls_exactly_when_the_radius_exceeds_the_distance(linear, attack, p):
    model, w, x, y = linear(6)
    true = (x @ w).abs() / lp_norm(w.unsqueeze(0), dual(p))
    ordered = true.sort().values
    gap = int((ordered[9:24] / ordered[8:23]).argmax()) + 8
    eps = float((ordered[gap] + ordered[gap + 1]) / 2)
    result = run(attack, model, x, y, Lp(p, eps, **FREE))
    assert torch.equal(result.success, true < eps)


@pytest.mark.parametrize("p", [2.0, math.inf])
def test_fgsm_is_one_step_to_the_edge(linear, p):
    model, w, x, y = linear(5)
    sign = torch.where(y == 0, 1.0, -1.0).unsqueeze(1)
    expected = x + 100.0 * sign * steepest(w.unsqueeze(0), p)
    result = run(FGSM(), model, x, y, Lp(p, 100.0, **FREE))
    assert torch.allclose(result.x_adv, expected)


def test_square_solves_a_linear_model_with_scores(linear):
    model, w, x, y = linear(16)
    true = (x @ w).abs() / w.abs().sum()
    result = run(Square(600), model, x, y, Lp(math.inf, float(true.max()) * 1.2, **FREE))
    assert result.success.float().mean() > 0.9
    unreachable = run(Square(50), model, x, y, Lp(math.inf, float(true.min()) * 0.99, **FREE))
    assert not unreachable.success.any()


def test_more_steps_and_more_radius_do_not_hurt(linear):
    model, _w, x, y = linear(30)
    found = [int(run(PGD(steps), model, x, y, Lp(2.0, 0.8, **FREE)).success.sum()) for steps in (1, 5, 40)]
    assert found == sorted(found)
    found = [int(run(PGD(10), model, x, y, Lp(2.0, eps, **FREE)).success.sum()) for eps in (0.1, 0.4, 0.8, 1.6, 30.0)]
    assert found == sorted(found)
    assert found[-1] == len(x)


def test_noise_is_no_adversary(linear):
    """In many dimensions noise of a radius at which PGD always succeeds finds little."""
    model, w, x, y = linear(1000)
    true = (x @ w).abs() / w.abs().sum()
    threat = Lp(math.inf, float(true.median()) * 2, **FREE)
    assert run(PGD(10), model, x, y, threat).success.float().mean() > 0.6
    for noise in (Uniform(20), Gaussian(20)):
        assert run(noise, model, x, y, threat).success.float().mean() < 0.3


def test_restarts_and_worst_count_every_attack(linear):
    model, w, x, y = linear(8)
    threat = Lp(2.0, float((x @ w).abs().median() / w.norm()), **FREE)
    single = run(PGD(2), model, x, y, threat)
    several = run(Restarts(PGD(2), 5), model, x, y, threat)
    assert int(several.success.sum()) >= int(single.success.sum())
    worst = run(Worst((Uniform(3), PGD(40))), model, x, y, threat)
    assert int(worst.success.sum()) >= int(single.success.sum())
