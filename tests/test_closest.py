"""The attacks that search for the closest example: exact projections, known distances, and the same attacks of the peers."""

import math

import pytest
import torch
from scipy.optimize import linprog, minimize

from advkit import Goal, Lp, data, run
from advkit.attacks import CW, DDN, EAD, FAB, PDPGD, CWLinf, DeepFool
from advkit.attacks.fab import onto_hyperplane
from advkit.benchmarks import closest, peers
from advkit.engine import perturb
from advkit.models import networks
from advkit.norms import dual, lp_norm
from advkit.train import RECIPES, train

FREE = {"low": -math.inf, "high": math.inf}
SLACK = {DeepFool: 1.021, FAB: 1.01, DDN: 1.06, CW: 1.02, CWLinf: 1.06, EAD: 1.6, PDPGD: 1.3}
"""How much further than the closest example an attack may end up on a linear model."""
CASES = [
    (attack, p)
    for attack in (DeepFool(), DDN(), CW(60, 6), CWLinf(200), EAD(60, 6), PDPGD(200), FAB(20), FAB(20, targets=1))
    for p in attack.norms
]


def by_scipy(z, w, gap, p, low, high):
    """The least ||d||_p with <w, d> = gap in the range, by a solver."""
    size, bounds = len(z), list(zip((low - z).tolist(), (high - z).tolist(), strict=True))
    w = w.numpy()
    if p == 2:
        equal = {"type": "eq", "fun": lambda d: w @ d - gap, "jac": lambda d: w}
        given = {"jac": lambda d: 2 * d, "bounds": bounds, "constraints": [equal], "tol": 1e-12}
        return math.sqrt(minimize(lambda d: d @ d, 0 * w, **given).fun)
    # The variables are d and its sizes: one bound for all entries in l_inf, one for each in l_1.
    eye = torch.eye(size)
    sizes = torch.ones(size, 1) if p == math.inf else eye
    beyond = torch.cat([torch.cat([eye, -sizes], 1), torch.cat([-eye, -sizes], 1)]).numpy()
    cost = [0.0] * size + [1.0] * sizes.shape[1]
    normal = [[*w.tolist(), *[0.0] * sizes.shape[1]]]
    return linprog(cost, beyond, [0.0] * (2 * size), normal, [gap], [*bounds, *[(0, None)] * sizes.shape[1]]).fun


@pytest.mark.parametrize("p", [1.0, 2.0, math.inf])
def test_the_projection_on_a_hyperplane_in_the_range_is_the_closest_point(p):
    rng = torch.Generator().manual_seed(3)
    z = torch.rand(12, 2, 7, generator=rng, dtype=torch.float64)
    z[:4] = z[:4].round()
    w = torch.randn(12, 1, 7, generator=rng, dtype=torch.float64)
    w[2:6, :, ::3] = 0.0
    most = torch.where(w > 0, (1 - z) * w, -z * w).sum(2)
    least = torch.where(w > 0, -z * w, (1 - z) * w).sum(2)
    gap = least + (most - least) * torch.rand(12, 2, generator=rng, dtype=torch.float64)
    d = onto_hyperplane(z, w, gap, Lp(p))
    assert float(((d * w).sum(2) - gap).abs().max()) < 1e-12
    assert float((z + d).min()) > -1e-12
    assert float((z + d).max()) < 1 + 1e-12
    for i in range(12):
        for j in range(2):
            true = by_scipy(z[i, j], w[i, 0], float(gap[i, j]), p, 0.0, 1.0)
            assert float(lp_norm(d[i, j].unsqueeze(0), p)) == pytest.approx(true, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("p", [1.0, 2.0, math.inf])
def test_a_hyperplane_out_of_reach_is_approached_as_far_as_the_range_goes(p):
    z, w = torch.tensor([[[0.25, 0.5, 1.0]]]), torch.tensor([[[2.0, -1.0, 3.0]]])
    d = onto_hyperplane(z, w, torch.tensor([[100.0]]), Lp(p))
    assert d.tolist() == [[[0.75, -0.5, 0.0]]]
    still = onto_hyperplane(z, torch.zeros_like(w), torch.tensor([[1.0]]), Lp(p))
    assert not still.any()


@pytest.mark.parametrize("shape", [(3,), (3, 4, 5)])
@pytest.mark.parametrize(("attack", "p"), CASES, ids=repr)
def test_the_distance_to_a_linear_boundary(linear, attack, p, shape):
    model, w, x, y = linear(math.prod(shape))
    true = (x @ w).abs() / lp_norm(w.unsqueeze(0), dual(p))
    result = run(attack, lambda z: model(z.flatten(1)), x.view(-1, *shape), y, Lp(p, **FREE))
    ratio = result.distance / true
    assert result.success.all()
    assert float(ratio.min()) > 1 - 1e-6
    assert float(ratio.max()) < SLACK[type(attack)]


@pytest.mark.parametrize(("attack", "p"), CASES, ids=repr)
def test_the_distance_to_a_linear_boundary_in_a_range(linear, attack, p):
    """Where entries at an end of the range cannot take part, the closest example is the projection in the range."""
    model, w, x, _ = linear(20)
    x = x.sigmoid()
    x[:, ::2] = x[:, ::2].round()
    score = (x - 0.5) @ w
    gap = -torch.stack([score], 1)
    reach = torch.where((w > 0) == (gap > 0), 1 - x, x) @ w.abs()
    true = lp_norm(onto_hyperplane(x.unsqueeze(1), w.expand(len(x), 1, -1), gap, Lp(p))[:, 0], p)
    result = run(attack, lambda z: model(z - 0.5), x, (score > 0).long(), Lp(p))
    assert torch.equal(result.success, reach > score.abs())
    ratio = (result.distance / true)[result.success]
    assert float(ratio.min()) > 1 - 1e-6
    loose = {DeepFool: 1.3, DDN: 1.15, EAD: 1.5, CW: 1.05}.get(type(attack), SLACK[type(attack)])
    assert float(ratio.mean()) < loose


@pytest.mark.parametrize(("attack", "p"), CASES, ids=repr)
def test_rows_that_are_broken_already_cost_nothing(linear, attack, p):
    model, _w, x, y = linear(6)
    y = torch.where(torch.arange(len(y)) % 2 == 0, y, 1 - y)
    result = run(attack, model, x, y, Lp(p, **FREE))
    assert not result.distance[1::2].any()
    assert not result.forwards[1::2].any()
    assert result.success[::2].all()


def test_deepfool_ends_a_row_where_it_crosses(linear):
    """On a linear model one step crosses; the look at the classes, the look at the end and the halvings are forward passes."""
    model, _w, x, y = linear(9)
    for halvings in (0, 5):
        result = run(DeepFool(50, halvings=halvings), model, x, y, Lp(2.0, **FREE))
        assert result.backwards.tolist() == [2] * len(x)
        assert result.forwards.tolist() == [4 + halvings] * len(x)
    true = run(DeepFool(50, halvings=20), model, x, y, Lp(2.0, **FREE)).distance
    paper = run(DeepFool(50, halvings=0), model, x, y, Lp(2.0, **FREE)).distance
    assert torch.allclose(paper, 1.02 * true, rtol=1e-3)


@pytest.mark.parametrize("p", [2.0, math.inf])
def test_deepfool_crosses_where_clipping_undoes_most_of_each_step(p):
    """The entry that counts most is at its end: what is left of a step falls short, by a larger factor than the overshoot."""
    w = torch.tensor([10.0, 1.0, 1.0])
    x = torch.tensor([[1.0, 0.2, 0.3]])

    def model(z):
        return torch.stack([torch.zeros(len(z)), (z @ w - 11.2) + (z[:, 1] - 0.2) ** 3], 1)

    result = run(DeepFool(400 if p == 2 else 50), model, x, torch.tensor([0]), Lp(p))
    assert result.success.all()


def several(z):
    """Four classes in the plane; the least likely of the others is the one that is easiest to reach."""
    return z @ torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 8.0], [-1.0, -1.0]]).T + torch.tensor([1.0, 0.0, -2.0, 0.1])


@pytest.mark.parametrize("p", [1.0, 2.0, math.inf])
def test_fab_tries_as_many_classes_as_it_is_told(p):
    x, y, threat = torch.zeros(1, 2), torch.tensor([0]), Lp(p, **FREE)
    one, every, more = (float(run(FAB(20, targets=n), several, x, y, threat).distance) for n in (1, 3, 9))
    together, few = (float(run(FAB(20, classes=n), several, x, y, threat).distance) for n in (10, 2))
    assert one == few > 1.1 * every
    assert every == more
    assert every == pytest.approx(3 / 8, rel=0.02)
    assert together == pytest.approx(3 / 8, rel=0.02)


@pytest.mark.parametrize(("attack", "p"), [case for case in CASES if case[1] in (2.0, math.inf)], ids=repr)
def test_a_target_has_one_region(attack, p):
    """The third class is reached from 0 at z_3 = z_1 = z_0 or where only one of them is close: never closer than its region."""
    x, target = torch.zeros(1, 2), torch.tensor([2])
    result = run(attack, several, x, target, Lp(p, **FREE), goal=Goal(targeted=True))
    assert float(result.distance) == pytest.approx(3 / 8, rel=0.07)
    assert int(several(result.x_adv).argmax()) == 2


@pytest.mark.parametrize(("attack", "p"), CASES, ids=repr)
def test_training_gets_an_iterate_near_the_boundary(linear, attack, p):
    model, w, x, y = linear(8)
    last = perturb(attack, model, x, y, Lp(p, **FREE), rng=torch.Generator().manual_seed(0))
    true = (x @ w).abs() / lp_norm(w.unsqueeze(0), dual(p))
    ratio = Lp(p).distance(last, x) / true
    assert float(ratio.median()) == pytest.approx(1, abs=0.3)


def test_optimality_is_of_the_area_between_the_envelope_and_nothing():
    """Distances 1 and 3: the best has area 2; an attack that finds only the first has (1 + 3) / 2 and one that fails has 3."""
    best = torch.tensor([1.0, 3.0])
    found = {"best": best, "half": torch.tensor([1.0, math.inf]), "none": torch.full((2,), math.inf)}
    found["worse"] = torch.tensor([2.0, 4.0])
    scores = closest.optimality(found)
    assert scores["best"] == 1
    assert scores["none"] == 0
    assert scores["half"] == 1
    assert scores["worse"] == pytest.approx(0.5)


@pytest.fixture(scope="module")
def digits():
    source = data.load("mnist-5k", split="train")
    model = train(networks.build("mnist-cnn(width=8, dense=32)"), source, RECIPES["mnist-cnn"].for_examples(len(source)))
    x, y = data.load("mnist-5k", limit=60).batch(0, 60)
    return model, x, y


@pytest.mark.peer
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("attack", "p"),
    [
        (DeepFool(), 2.0),
        (DeepFool(), math.inf),
        (DDN(50), 2.0),
        (CW(30, 5), 2.0),
        (CWLinf(200), math.inf),
        (EAD(30, 5), 1.0),
        (PDPGD(100), 1.0),
    ]
    + [(FAB(15), p) for p in (1.0, 2.0, math.inf)],
    ids=repr,
)
def test_no_further_than_the_same_attack_of_a_peer(digits, attack, p):
    if peers.peer("adv_lib") is None or peers.peer("foolbox") is None:
        pytest.skip("adv-lib or foolbox is not installed")
    model, x, y = digits
    ours = closest.measured(attack, model, x, y, p)
    for name, rival in closest.rivals(attack, p):
        theirs = closest.measured_peer(rival, model, x, y, p)
        cap = float(theirs.distance[theirs.distance < math.inf].max())
        assert closest.area(ours.distance, cap) <= 1.005 * closest.area(theirs.distance, cap), name
