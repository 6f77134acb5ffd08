"""Attacks that see only labels: distances on a linear model, rows that find no start, and queries."""

import math

import pytest
import torch

from advkit import Access, Goal, Lp, run
from advkit.attacks import Boundary, HopSkipJump, RayS, SurFree
from advkit.attacks.rays import _block, _level, _next
from advkit.benchmarks.labels import EnoughError, Recorder, at_marks, foolbox_attacks, recorded
from advkit.benchmarks.peers import peer
from advkit.errors import UsageError
from advkit.norms import dual, lp_norm
from advkit.oracle import Oracle
from advkit.starts import Meter, begin, bisect, start, way
from advkit.streams import Streams

FREE = {"low": -math.inf, "high": math.inf}
CASES = [
    (Boundary, 2.0),
    (HopSkipJump, 2.0),
    (HopSkipJump, math.inf),
    (RayS, math.inf),
    (SurFree, 2.0),
]
# What the median distance may be after 1000 queries in 20 dimensions, as a multiple of the true one.
NEAR = {Boundary: 1.01, HopSkipJump: 1.05, RayS: 1.01, SurFree: 1.05}


def ratios(attack, p, linear, size=20, **options):
    model, w, x, y = linear(size)
    true = (x @ w).abs() / lp_norm(w.unsqueeze(0), dual(p))
    result = run(attack, model, x, y, Lp(p, **FREE), access=Access.LABELS, **options)
    return result, result.distance / true


def watched(model):
    """The model, and a list of what it was shown."""
    seen = []

    def call(z):
        seen.append(z.clone())
        return model(z)

    return call, seen


@pytest.mark.parametrize(("attack", "p"), CASES)
def test_the_distance_to_a_linear_boundary_is_found_and_never_undercut(attack, p, linear):
    result, ratio = ratios(attack(queries=1000), p, linear)
    print(attack, p, ratio.median(), ratio.max())
    assert result.success.all()
    assert float(ratio.min()) > 1 - 1e-9
    assert float(ratio.median()) < NEAR[attack]


@pytest.mark.parametrize(("attack", "p"), CASES)
def test_more_queries_bring_closer_examples(attack, p, linear):
    medians = [float(ratios(attack(queries=n), p, linear)[1].median()) for n in (30, 150, 1000)]
    assert medians[0] > 1.1 * medians[1]
    assert medians[1] > medians[2]


@pytest.mark.parametrize(("attack", "p"), CASES)
def test_every_query_is_counted_and_none_is_above_the_plan(attack, p, linear):
    for n in (1, 2, 17, 150):
        result, _ = ratios(attack(queries=n), p, linear)
        # The engine's own look at the last iterate is one more.
        assert int(result.forwards.max()) <= n + 1
        if n >= 17:
            assert int(result.forwards.min()) == n + 1


@pytest.mark.parametrize(("attack", "p"), CASES)
def test_a_budget_below_the_plan_ends_the_attack_there(attack, p, linear):
    result, ratio = ratios(attack(queries=1000), p, linear, budget=200)
    assert int(result.forwards.max()) <= 200
    assert result.success.all()
    assert float(ratio.min()) > 1 - 1e-9


@pytest.mark.parametrize(("attack", "p"), CASES)
def test_inside_a_radius_the_first_allowed_success_ends_a_row(attack, p, linear):
    model, w, x, y = linear(20)
    true = (x @ w).abs() / lp_norm(w.unsqueeze(0), dual(p))
    eps = float(true.median())
    result = run(attack(queries=600), model, x, y, Lp(p, eps, **FREE))
    assert not result.success[true > eps].any()
    assert result.success[true < 0.8 * eps].all()
    assert int(result.forwards[true < 0.5 * eps].max()) < 600


@pytest.mark.parametrize(("attack", "p"), CASES)
def test_a_row_without_a_start_fails_alone(attack, p):
    """The model never says class 2: the rows with that target cannot be fooled, and the others are all the same."""
    x = torch.rand(6, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def model(z):
        score = z.sum(1) - 4.0
        return torch.stack([torch.zeros_like(score), score, torch.full_like(score, -100.0)], 1)

    y = model(x).argmax(1)
    target = torch.where(torch.arange(6) % 2 == 0, 1 - y, torch.full_like(y, 2))
    result = run(attack(queries=300), model, x, target, Lp(p), goal=Goal(targeted=True))
    assert result.success.tolist() == [True, False] * 3
    true = (x.sum(1) - 4.0).abs() / 8 ** (1 / dual(p))
    assert float((result.distance / true)[::2].max()) < 1.5
    assert float((result.distance / true)[::2].min()) > 1 - 1e-9
    assert torch.equal(result.x_adv[1::2], x[1::2])


def test_a_start_meets_the_goal_and_takes_few_queries(linear):
    model, _w, x, y = linear(20)
    for threat in (Lp(2.0, **FREE), Lp(2.0, low=-5.0, high=5.0), Lp(2.0, low=-5.0)):
        oracle = Oracle(model, x, y, threat)
        oracle.begin()
        meter = Meter(oracle, x, 100)
        z, found = start(meter, x, threat, Streams.seeded(0, range(len(x))))
        assert found.all()
        assert (model(z).argmax(1) != y).all()
        assert float(z.min()) >= threat.low
        assert float(z.max()) <= threat.high
        assert float((100 - meter.left).double().mean()) < 6


def test_all_draws_after_the_start_are_those_of_the_row_alone(linear):
    """A batch in which some rows take many tries leaves the streams where a batch of one does."""
    model, _w, x, y = linear(20)
    after = []
    for rows in (slice(None), slice(3, 4)):
        oracle = Oracle(model, x[rows], y[rows], Lp(2.0, **FREE))
        rng = Streams(Streams.seeded(0, range(len(x))).keys[rows])
        start(Meter(oracle, x[rows], 40), x[rows], Lp(2.0, **FREE), rng)
        after.append(rng.drawn)
    assert after[0] == after[1]


@pytest.mark.parametrize("p", [2.0, math.inf])
def test_the_way_to_the_boundary(p, linear):
    model, w, x, y = linear(20)
    z = torch.where((y == 1).unsqueeze(1), -5.0, 5.0) * w.sign()
    oracle = Oracle(model, x, y, Lp(p, **FREE))
    meter = Meter(oracle, x, 100)
    found = bisect(meter, x, z, torch.arange(len(x)), p, 30)
    assert (model(found).argmax(1) != y).all()
    assert float((found @ w).abs().max()) < 1e-6
    assert (meter.left == 70).all()
    a = torch.full((len(x),), 0.25, dtype=x.dtype)
    assert torch.allclose(lp_norm(way(x, z, a, p) - x, p), 0.25 * lp_norm(z - x, p))


def test_begin_gives_up_a_row_without_a_start(linear):
    _model, _w, x, y = linear(4)
    threat = Lp(2.0, **FREE)
    oracle = Oracle(lambda z: torch.tensor([[1.0, 0.0]]).expand(len(z), 2), x, torch.zeros_like(y), threat)
    meter = Meter(oracle, x, 50)
    x_t = begin(meter, x, threat, Streams.seeded(0, range(len(x))), 8)
    assert torch.equal(x_t, x)
    assert not len(meter.live)


def test_a_meter_asks_no_more_than_it_may(linear):
    model, _w, x, y = linear(4)
    call, seen = watched(model)
    meter = Meter(Oracle(call, x, y, Lp(2.0, **FREE)), x, 2)
    rows = torch.tensor([0, 3])
    for _ in range(3):
        meter.fooled(-50 * x[rows], rows)
    assert sum(len(z) for z in seen) == 4
    assert meter.left[rows].tolist() == [0, 0]
    assert len(meter.live) == len(x) - 2
    met = meter.fooled_each(torch.stack([-50 * x[:2], x[:2], x[:2]], 1), torch.tensor([1, 2]), torch.tensor([2, 1]))
    assert met.shape == (2, 3)
    assert sum(len(z) for z in seen) == 7


@pytest.mark.parametrize(
    ("attack", "settings"),
    [
        (Boundary, {"queries": 0}),
        (HopSkipJump, {"probes": 1}),
        (HopSkipJump, {"memory": 1.5}),
        (RayS, {"tol": -1.0}),
        (SurFree, {"share": 0.0}),
    ],
)
def test_wrong_settings_are_refused(attack, settings):
    with pytest.raises(UsageError, match=f"{attack.__name__.lower()}: {next(iter(settings))}"):
        attack(**settings)


@pytest.mark.parametrize("size", [1, 5, 20, 784])
def test_every_entry_is_in_one_block_of_each_level(size):
    level, k, levels = torch.zeros(size, dtype=torch.int64), torch.tensor([1]), []
    for _ in range(3 * size + 20):
        level += _block(k, size)[0].long()
        before, k = k, _next(k, size)
        if _level(k) != _level(before) or (k <= before).item():
            levels.append(level.clone())
            level.zero_()
    assert len(levels) >= math.ceil(math.log2(size)) + 1
    assert all((count == 1).all() for count in levels)
    assert bool(_block(k, size).sum() == 1)


class Net(torch.nn.Module):
    """A linear model of inputs in [0, 1], as a module."""

    def __init__(self, w):
        super().__init__()
        self.w = w

    def forward(self, z):
        score = (z - 0.5) @ self.w
        return torch.stack([-score / 2, score / 2], 1)


@pytest.mark.peer
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("attack", [Boundary, HopSkipJump])
def test_closer_than_foolbox_after_as_many_queries(attack):
    foolbox = peer("foolbox")
    if foolbox is None:
        pytest.skip("foolbox is not installed")
    rng = torch.Generator().manual_seed(0)
    model = Net(torch.randn(60, generator=rng))
    x = torch.rand(12, 60, generator=rng)
    y = model(x).argmax(1)
    marks, threat = [200, 800], Lp(2.0)
    recorder = Recorder(model, x, y, threat, marks)
    theirs = recorded(foolbox, foolbox_attacks(foolbox, 2.0)[attack.__name__.lower()], recorder)
    mine = at_marks(attack(), model, x, y, threat, marks)
    for mark in marks:
        assert float(mine[mark].median()) < 0.95 * float(theirs[mark].median())


def test_the_benchmark_notes_what_a_peer_shows_the_model(linear):
    model, _w, x, y = linear(6)
    recorder = Recorder(model, x, y, Lp(2.0, **FREE), [1, 3])
    recorder(x)
    recorder(-2 * x)
    far = recorder.best.clone()
    with pytest.raises(EnoughError):
        recorder(-x)
    assert recorder.at[1].isinf().all()
    assert torch.allclose(far, 3 * x.norm(dim=1))
    assert torch.allclose(recorder.at[3], 2 * x.norm(dim=1))
