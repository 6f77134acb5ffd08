import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog
from torch import nn
from torch.nn import functional as F

from advkit import Lp, UsageError, data, spec
from advkit.attacks import PGD
from advkit.defenses.certificates import CERTIFICATES, verified
from advkit.defenses.certificates import ibp as intervals_of
from advkit.defenses.certificates.crown import crown
from advkit.defenses.certificates.layers import observe, trace
from advkit.defenses.certificates.region import Region
from advkit.defenses.crown_ibp import CrownIBPTraining
from advkit.defenses.ibp import IBPTraining, balance, initialize, strength
from advkit.engine import run
from advkit.models import networks

BOUNDS = ["ibp", "crown-ibp", "crown", "alpha-crown"]
BALLS = [Lp(math.inf, 0.1), Lp(2, 0.3), Lp(1, 0.5)]


class Joined(nn.Module):
    """A sum of two branches, with functions in place of layers."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(2, 2, 1), nn.Linear(18, 3)

    def forward(self, x):
        h = F.relu(self.a(x))
        h = F.max_pool2d(torch.relu(h + self.b(x)), 2, 2, 1)
        return self.head(h.view(h.size(0), -1))


def _mlp():
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Dropout()), nn.Linear(6, 3))


def _norms():
    return nn.Sequential(
        networks.Normalize((0.3, 0.5), (0.2, 0.7)),
        nn.Conv2d(2, 3, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(3),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(3, 4),
        nn.BatchNorm1d(4),
        nn.ReLU(),
        nn.Linear(4, 3),
        nn.BatchNorm1d(3, affine=False),
    )


def _maxima():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, groups=2),
        nn.MaxPool2d(2, stride=1, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 2, 2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(2, 3),
    )


def _residual():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        networks.Residual(4, 4, 1),
        networks.Residual(4, 6, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 3),
    )


NETWORKS = {
    "mlp": (_mlp, (5,)),
    "norms": (_norms, (2, 4, 4)),
    "maxima": (_maxima, (2, 5, 5)),
    "residual": (_residual, (2, 4, 4)),
    "joined": (Joined, (2, 4, 4)),
}


def _random(name, seed):
    """A network with random weights and statistics, three inputs and their labels."""
    make, shape = NETWORKS[name]
    torch.manual_seed(seed)
    model = make().double().eval()
    for part in model.modules():
        if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d):
            part.running_mean.normal_()
            part.running_var.uniform_(0.3, 2.0)
            if part.affine:
                nn.init.normal_(part.weight)
                nn.init.normal_(part.bias)
    x = torch.rand(3, *shape, dtype=torch.float64)
    return model.requires_grad_(False), x, torch.tensor([0, 1, 2])


def _inside(region, threat, n=200):
    """Allowed inputs: at random, and corners."""
    x = region.x.repeat_interleave(n, 0)
    d = torch.randn_like(x)
    d[::2] = d[::2].sign()
    d *= torch.rand(len(x), *(1,) * (x.ndim - 1), dtype=x.dtype) * 10 * threat.eps
    return threat.project(x + d, x)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_graph_computes_what_the_model_does(name):
    model, x, _ = _random(name, 0)
    assert torch.allclose(trace(model, x)(x), model(x), atol=1e-12)
    assert trace(model.float(), x, torch.float64)(x).dtype == torch.float64


@pytest.mark.parametrize("name", ["mnist-cnn(width=4)", "mnist-small", "mnist-small(norm=true)", "mnist-trades", "mnist-mlp"])
def test_the_networks_of_the_table_have_bounds(name):
    model, x = networks.build(name).eval(), torch.rand(2, 1, 28, 28)
    network = trace(model, x)
    assert torch.allclose(network(x), model(x), atol=1e-5)
    low, high = intervals_of.intervals(network, x - 0.01, x + 0.01)[-1]
    assert (low < high).all()


def test_the_networks_have_the_sizes_of_their_papers():
    count = lambda name: sum(weight.numel() for weight in networks.build(name).parameters())
    assert count("mnist-small") == 166406
    assert count("mnist-small(norm=true)") == 166406 + 2 * (16 + 32 + 100)
    assert count("mnist-trades") == 312202
    assert count("preact-resnet18") == 11172170
    model = networks.build("preact-resnet18").eval()
    assert model(torch.rand(1, 3, 32, 32)).shape == (1, 10)
    assert [len(model), model[-5](torch.rand(1, 512, 4, 4)).shape] == [15, (1, 512, 4, 4)]


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(sorted(NETWORKS)), st.integers(0, 10**6), st.sampled_from(BALLS), st.sampled_from([0.1, 1.0, 3.0]))
def test_no_value_leaves_its_bounds(name, seed, ball, scale):
    model, x, y = _random(name, seed)
    ball = dataclasses.replace(ball, eps=scale * ball.eps)
    network, region, c = trace(model, x), Region.around(x, ball), intervals_of.versus(y, 3, x.dtype)
    z = _inside(region, ball)
    assert ball.allows(z, x.repeat_interleave(200, 0)).all()
    values = [z]
    for node in network.nodes[1:]:
        values.append(node.layer(*(values[i] for i in node.inputs)))
    real = (c.repeat_interleave(200, 0) @ values[-1].unsqueeze(2)).squeeze(2)
    found = intervals_of.intervals(network, region.low, region.high)
    by_intervals = intervals_of.margins(network, found, c)
    bounds = [crown(network, region, c, tight=False), crown(network, region, c), crown(network, region, c, steps=3)]
    for boxes in (found, bounds[1].found):
        for value, (low, high) in zip(values, boxes, strict=True):
            assert (value >= low.repeat_interleave(200, 0) - 1e-9).all()
            assert (value <= high.repeat_interleave(200, 0) + 1e-9).all()
    for least in (by_intervals, *(bound.least for bound in bounds)):
        assert (real >= least.repeat_interleave(200, 0) - 1e-9).all()
    for bound in bounds:
        line = torch.einsum("nkd,nd->nk", bound.a.flatten(2).repeat_interleave(200, 0), z.flatten(1))
        assert (real >= line + bound.b.repeat_interleave(200, 0) - 1e-9).all()
        assert (bound.least >= by_intervals - 1e-9).all()
    assert (bounds[2].least >= bounds[1].least - 1e-9).all()


@pytest.mark.parametrize("p", [1, 2, math.inf])
def test_linear_models_have_exact_bounds(p):
    torch.manual_seed(0)
    layer = nn.Linear(7, 4).double().requires_grad_(False)
    x, y = torch.randn(5, 7, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 0])
    network, ball = trace(nn.Sequential(layer), x), Lp(p, 0.3, -math.inf, math.inf)
    c, region = intervals_of.versus(y, 4, x.dtype), Region.around(x, ball)
    w = c @ layer.weight
    q = {1: math.inf, 2: 2, math.inf: 1}[p]
    exact = (c @ layer(x).unsqueeze(2)).squeeze(2) - 0.3 * torch.linalg.vector_norm(w, q, dim=2)
    bound = crown(network, region, c)
    assert torch.allclose(bound.least, exact, atol=1e-5)
    if p == math.inf:
        assert torch.allclose(intervals_of.margins(network, [(region.low, region.high)] * 2, c), exact, atol=1e-5)
    corner = region.corner(bound.a)
    corner = ball.project(corner.flatten(0, 1), x.repeat_interleave(3, 0)).view_as(corner)
    assert ball.allows(corner.flatten(0, 1), x.repeat_interleave(3, 0)).all()
    reached = torch.einsum("nkd,nkd->nk", bound.a, corner) + bound.b
    assert torch.allclose(reached, exact, atol=1e-5)


def test_the_range_of_the_data_counts():
    network = trace(nn.Sequential(nn.Linear(1, 2)), torch.zeros(1, 1), torch.float64)
    x, c = torch.tensor([[0.1]], dtype=torch.float64), torch.tensor([[[1.0, -1.0]]], dtype=torch.float64)
    w = network.nodes[1].layer.weight.diff(dim=0).item()
    for p in (1, 2, math.inf):
        region = Region.around(x, Lp(p, 0.3))
        ends = [region.least(torch.full((1, 1, 1), sign * w, dtype=torch.float64)).item() for sign in (1, -1)]
        assert sorted(abs(end) for end in ends) == pytest.approx([0.0, abs(w) * 0.4], abs=1e-6)
        assert crown(network, region, c).found[0][0].item() == 0.0


@pytest.mark.parametrize("p", [1, 2, math.inf])
def test_the_region_holds_all_that_is_allowed(p):
    """One entry may use the rounding that all of them are allowed, and the range is that of the data's type."""
    x = torch.full((1, 400), 0.9)
    x[0, 0] = 0.0
    ball = Lp(p, 0.25, 0.0, 0.9)
    z = x.nextafter(torch.zeros(())).repeat(4001, 1)
    z[:, 0] = 0.25 + torch.linspace(-1e-4, 4e-6, 4001)
    region = Region.around(x, ball, torch.float64)
    allowed = z[ball.allows(z, x.expand_as(z))].double()
    assert len(allowed)
    assert (allowed >= region.low).all()
    assert (allowed <= region.high).all()
    assert ball.allows(x, x).all()
    assert (x.double() <= region.high).all()


def test_rounding_that_is_seen_counts():
    """The margin is 4e-5 everywhere; the model's own is 6e-5 where a unit in the last place is that, and 0 where it is more."""
    first, last = nn.Linear(1, 2), nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        first.weight.fill_(1000.0)
        first.bias.copy_(torch.tensor([4e-5, 0.0]))
        last.weight.copy_(torch.tensor([[0.0, 0.0], [1.0, -1.0]]))
    model, x, y = nn.Sequential(first, last), torch.tensor([[1.0]]), torch.tensor([1])
    assert model(torch.cat([x, x + 0.05])).argmax(1).tolist() == [1, 0]
    assert not verified(model, x, y, Lp(math.inf, 0.1, 0.0, 2.0), "crown").any()


def test_one_hidden_layer_by_the_linear_program_of_its_triangles():
    """CROWN is the best single line; the triangles' linear program is its upper limit, and alpha comes close to it."""
    torch.manual_seed(3)
    model = (
        nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2)).double().requires_grad_(False)
    )
    x, y = torch.rand(4, 3, dtype=torch.float64), torch.tensor([0, 1, 0, 1])
    network, region = trace(model, x), Region.around(x, Lp(math.inf, 0.2))
    c = intervals_of.versus(y, 2, x.dtype)
    plain, better = crown(network, region, c), crown(network, region, c, steps=200)
    optimum = torch.tensor([_program(model, region, plain.found, c, row) for row in range(4)], dtype=torch.float64)
    assert (plain.least.squeeze(1) <= optimum + 1e-8).all()
    assert (better.least.squeeze(1) <= optimum + 1e-8).all()
    assert torch.allclose(better.least.squeeze(1), optimum, atol=2e-3)
    assert (better.least > plain.least + 1e-3).any()


def _program(model, region, found, c, row):
    """The least margin with each ReLU replaced by its triangle; the variables are the input and both sides of each ReLU."""
    sizes, bounds = [3, 6, 6, 5, 5], list(zip(region.low[row].tolist(), region.high[row].tolist(), strict=True))
    start = [0, *itertools.accumulate(sizes)]
    equal, equal_to, less, less_than = [], [], [], []
    for layer, before, pre in ((model[0], 0, 1), (model[2], 2, 3)):
        low, high = (end[row].numpy() for end in found[pre])
        bounds += list(zip(low, high, strict=True)) + [(0, None)] * len(low)
        for i, (l, u) in enumerate(zip(low, high, strict=True)):
            a = np.zeros(start[-1])
            a[start[before] : start[before + 1]] = -layer.weight[i].numpy()
            a[start[pre] + i] = 1.0
            equal.append(a)
            equal_to.append(layer.bias[i].item())
            v, r = np.zeros(start[-1]), np.zeros(start[-1])
            v[start[pre] + i], r[start[pre + 1] + i] = 1.0, 1.0
            slope = u / (u - l) if l < 0 < u else float(l >= 0)
            less += [v - r, r - slope * v]
            less_than += [0.0, -slope * l if l < 0 < u else 0.0]
    w = (c[row, 0] @ model[4].weight).numpy()
    cost = np.zeros(start[-1])
    cost[start[4] :] = w
    result = linprog(cost, np.array(less), np.array(less_than), np.array(equal), np.array(equal_to), bounds)
    assert result.status == 0
    return result.fun + (c[row, 0] @ model[4].bias).item()


def test_splits_of_a_relu_cover_the_ball():
    """Each side of a split is bounded better than the whole, and the lesser of the two sides is still a bound."""
    model, x, y = _random("mlp", 1)
    network, ball = trace(model, x), Lp(math.inf, 0.3)
    region, c = Region.around(x, ball), intervals_of.versus(y, 3, x.dtype)
    whole = crown(network, region, c, steps=20)
    node = network.relus[0]
    low, high = whole.found[node]
    split = int(((low < 0) & (high > 0)).all(0).nonzero()[0])
    sides, gains = [], []
    for sign in (1.0, -1.0):
        known = {i: tuple(end.clone() for end in whole.found[i]) for i in network.relus}
        known[node][0 if sign > 0 else 1][:, split] = 0.0
        signs = torch.zeros_like(low)
        signs[:, split] = sign
        bound = crown(network, region, c, steps=20, known=known, splits={node: signs}, slopes=whole.slopes)
        assert bound.slopes[node].shape == whole.slopes[node].shape
        without = crown(network, region, c, steps=20, known=known, slopes=whole.slopes)
        assert (bound.least >= without.least - 1e-3).all()
        gains.append((bound.least - without.least).max())
        sides.append(bound.least)
    assert max(gains) > 1e-3
    assert torch.minimum(*sides).sum() > whole.least.sum() + 1e-3
    z = _inside(region, ball)
    real = (c.repeat_interleave(200, 0) @ model(z).unsqueeze(2)).squeeze(2).view(3, 200, 2).amin(1)
    assert (torch.minimum(*sides) <= real + 1e-9).all()


def test_given_bounds_are_used():
    model, x, y = _random("mlp", 2)
    network, region = trace(model, x), Region.around(x, Lp(math.inf, 0.2))
    c = intervals_of.versus(y, 3, x.dtype)
    point = {i: (value, value) for i, value in _values(network, x) if i in network.relus}
    # Once every ReLU is known to be on or off the network is affine, and its bound exact.
    assert torch.allclose(crown(network, region, c, known=point).a, _jacobian(model, x, c), atol=1e-9)


def _values(network, x):
    values = [x]
    for node in network.nodes[1:]:
        values.append(node.layer(*(values[i] for i in node.inputs)))
    return enumerate(values)


def _jacobian(model, x, c):
    rows = [torch.autograd.functional.jacobian(lambda v, i=i: c[i] @ model(v.unsqueeze(0))[0], x[i]) for i in range(len(x))]
    return torch.stack(rows)


def test_versus():
    z = torch.tensor([[1.0, 5.0, 2.0], [3.0, 1.0, 7.0]])
    assert (intervals_of.versus(torch.tensor([1, 0]), 3) @ z.unsqueeze(2)).squeeze(2).tolist() == [[4.0, 3.0], [2.0, -4.0]]


def _trained(loss, steps=120, width=24):
    """A small network for 8x8 digits trained with a certified loss; the digits and their labels."""
    digits = data.load("mnist-5k", split="train", limit=1000)
    x, y = digits.batch(0, len(digits))
    x = F.avg_pool2d(x[:, :, 2:26, 2:26], 3).flatten(1)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(64, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)
    )
    rng = torch.Generator().manual_seed(0)
    loss.prepare(model, rng)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for step in range(steps):
        rows = torch.randint(len(x), (100,), generator=rng)
        optimizer.zero_grad()
        loss(model, x[rows], y[rows], rng, step / steps).backward()
        optimizer.step()
    return model, x[:200], y[:200]


@pytest.fixture(scope="module")
def certified_network():
    return _trained(IBPTraining(Lp(math.inf, 0.05), warm=0.1, ramp=0.5))


def test_certified_training_certifies(certified_network):
    model, x, y = certified_network
    threat, share = Lp(math.inf, 0.05), lambda model, method: verified(model, x, y, threat, method).double().mean()
    plain, _, _ = _trained(IBPTraining(threat, warm=0.99, ramp=0.0))
    assert share(model, "ibp") > 0.45
    assert share(plain, "ibp") < 0.1
    linear, _, _ = _trained(CrownIBPTraining(threat, warm=0.1, ramp=0.5, kappa=0.1))
    assert share(linear, "ibp") > 0.45


@pytest.mark.parametrize("threat", [Lp(math.inf, 0.07), Lp(2, 0.3)])
@pytest.mark.parametrize("method", BOUNDS)
def test_what_is_certified_is_not_fooled(certified_network, method, threat):
    model, x, y = certified_network
    x, y = x[:60], y[:60]
    training = model.training
    certificate = spec.parse(method, CERTIFICATES, "certificate")
    sure = certificate(model, x, y, threat, torch.Generator())
    fooled = run(PGD(steps=40), model, x, y, threat).success
    # Intervals know of the l_2 ball only the box around it.
    assert sure.certified.any() or "ibp" in method
    assert fooled.any()
    assert not (sure.certified & fooled).any()
    assert (sure.radius > 0).equal(sure.certified)
    assert model.training == training


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mnist-small(norm=true)", "mnist-cnn(width=8, dense=64)"])
def test_digits_that_are_certified_are_not_fooled(name):
    digits = data.load("mnist-5k", split="train")
    x, y = digits.batch(0, len(digits))
    model, rng, threat = networks.build(name), torch.Generator().manual_seed(0), Lp(math.inf, 0.1)
    loss = IBPTraining(Lp(math.inf, 0.12))
    loss.prepare(model, rng)
    optimizer, steps = torch.optim.Adam(model.parameters(), lr=2e-3), 500
    for step in range(steps):
        rows = torch.randint(len(x), (100,), generator=rng)
        optimizer.zero_grad()
        loss(model, x[rows], y[rows], rng, step / steps).backward()
        optimizer.step()
    held = data.load("mnist-5k", split="test")
    x, y = held.batch(0, 200)
    robust = ~run(PGD(steps=40), model, x, y, threat).success
    assert verified(model, x, y, threat).double().mean() > 0.7
    for method in BOUNDS:
        assert not (verified(model, x, y, threat, method) & ~robust).any()


def test_bounds_are_ordered(certified_network):
    model, x, y = certified_network
    threat, rng = Lp(math.inf, 0.08), torch.Generator()
    rows = [spec.parse(name, CERTIFICATES, "certificate")(model, x[:40], y[:40], threat, rng) for name in BOUNDS]
    by_name = dict(zip(BOUNDS, (row.bound for row in rows), strict=True))
    for worse, better in itertools.pairwise(BOUNDS):
        assert (by_name[better] >= by_name[worse] - 1e-9).all()
        assert by_name[better].sum() > by_name[worse].sum()
    assert rows[0].predicted.equal(model.eval()(x[:40]).argmax(1))
    assert not (rows[0].certified & (rows[0].predicted != y[:40])).any()


@pytest.mark.parametrize("method", BOUNDS)
def test_a_batch_is_certified_as_its_rows_are(certified_network, method):
    model, x, y = certified_network
    certificate, threat, rng = spec.parse(method, CERTIFICATES, "certificate"), Lp(math.inf, 0.08), torch.Generator()
    whole = certificate(model, x[:16], y[:16], threat, rng)
    one = [certificate(model, x[i : i + 1], y[i : i + 1], threat, rng).bound for i in range(16)]
    assert torch.allclose(torch.cat(one), whole.bound, rtol=1e-9)


def test_the_radius_of_a_schedule():
    assert [strength(at, 0.1, 0.4) for at in (0.0, 0.1, 0.5, 1.0)] == [0.0, 0.0, 1.0, 1.0]
    steps = np.array([strength(at, 0.1, 0.4) for at in np.linspace(0.1, 0.5, 401)])
    assert (np.diff(steps) > 0).all()
    slopes = np.diff(steps)
    assert np.abs(np.diff(slopes)).max() < 0.05 * slopes.max()
    settled = IBPTraining(Lp(2, 0.1), warm=0.1, ramp=0.4).settled
    assert strength(settled, 0.1, 0.4) == 1.0 > strength(settled - 1e-6, 0.1, 0.4)
    assert strength(0.3, 0.3, 0.0) == strength(0.0, 0.0, 0.0) == 1.0


def test_fresh_weights_keep_the_width_of_intervals():
    widths = {}
    for fresh in (False, True):
        model = nn.Sequential(*(layer for _ in range(6) for layer in (nn.Linear(300, 300), nn.ReLU())))
        if fresh:
            initialize(model, torch.Generator().manual_seed(0))
        x = torch.rand(20, 300)
        found = intervals_of.intervals(trace(model, x), x - 0.1, x + 0.1)
        widths[fresh] = float((found[-1][1] - found[-1][0]).mean().detach()) / 0.2
    assert 0.5 < widths[True] < 2
    assert widths[False] > 20


def test_the_regularizer():
    network = trace(nn.Sequential(nn.Identity(), nn.ReLU()), torch.zeros(1, 4))
    box = (torch.zeros(1, 4), torch.ones(1, 4))
    even = (torch.tensor([[1.0, 1.0, -2.0, -2.0]]), torch.tensor([[2.0, 2.0, -1.0, -1.0]]))
    assert balance(network, [box, even]).item() == pytest.approx(0.0)
    wide = (even[0] - 1.5, even[1] + 1.5)
    assert balance(network, [box, wide]).item() == pytest.approx(0.5)
    # Active centres of 4 and inactive ones of -1: means in the ratio of 4 to 1, spreads alike.
    uneven = (torch.tensor([[3.5, 3.5, -1.5, -1.5]]), torch.tensor([[4.5, 4.5, -0.5, -0.5]]))
    assert balance(network, [box, uneven]).item() == pytest.approx(0.5)


def test_the_loss_is_the_cross_entropy_of_the_worst_logits():
    model, x, y = _random("mlp", 4)
    for at, kappa in ((0.0, 0.0), (0.5, 0.0), (1.0, 0.0), (0.5, 0.3), (1.0, 0.3)):
        ball = Lp(math.inf, 0.2 * max(at, 1e-9))
        loss = IBPTraining(Lp(math.inf, 0.2), warm=0.0, ramp=0.8, kappa=kappa, weight=0.0)
        region = Region.around(x, dataclasses.replace(ball, eps=0.2 * strength(at, 0.0, 0.8) or 1e-9))
        network, c = trace(model, x), intervals_of.versus(y, 3, x.dtype)
        found = intervals_of.intervals(network, region.low, region.high)
        m = intervals_of.margins(network, found, c)
        worst = F.cross_entropy(torch.cat([torch.zeros(3, 1, dtype=x.dtype), -m], 1), torch.zeros(3, dtype=torch.int64))
        clean, share = F.cross_entropy(model(x), y), strength(at, 0.0, 0.8)
        k = 1 - share * (1 - kappa) if kappa else float(at == 0)
        expected = k * clean + (1 - k) * worst
        assert loss(model, x, y, torch.Generator(), at).item() == pytest.approx(expected.item(), rel=1e-6)


def test_batches_are_normalized_by_their_clean_statistics():
    model = _norms().train()
    x = torch.rand(6, 2, 4, 4)
    logits, statistics = observe(model, x)
    assert torch.allclose(trace(model, x, statistics=statistics)(x), logits, atol=1e-5)
    before = model[2].running_mean.clone()
    IBPTraining(Lp(math.inf, 0.1))(model, x, torch.zeros(6, dtype=torch.int64), torch.Generator()).backward()
    assert not torch.equal(before, model[2].running_mean)
    assert model.training
    assert all(weight.grad.isfinite().all() for weight in model.parameters())


@pytest.mark.parametrize("loss", [IBPTraining, CrownIBPTraining])
def test_every_weight_learns(loss):
    model, x, y = _random("joined", 1)
    model.requires_grad_(True)
    for at in (0.0, 0.4, 1.0):
        model.zero_grad()
        loss(Lp(math.inf, 0.05), warm=0.0, ramp=0.8)(model, x, y, torch.Generator(), at).backward()
        assert all(bool(weight.grad.any()) for weight in model.parameters())


def _hooked():
    layer = nn.Linear(4, 2)
    layer.register_forward_hook(lambda _m, _given, value: value + 1.0 * value[:, :1])
    return nn.Sequential(layer)


class Says(nn.Module):
    """A forward of one's own over layers of one's own."""

    def __init__(self, forward, **layers):
        super().__init__()
        self.how = forward
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x):
        return self.how(self, x)


def _turning():
    """The opposite answer away from what is asked about: the graph agrees with the model there."""
    layer = nn.Linear(4, 2)
    layer.register_forward_hook(lambda _m, given, value: torch.where(given[0].sum() > 100, -value, value))
    return nn.Sequential(layer)


def _patched():
    layer = nn.Linear(4, 2)
    layer.forward = lambda x: nn.Linear.forward(layer, x)
    return nn.Sequential(layer)


def _overwritten(self, x):
    h = self.a(x)
    F.relu(h, inplace=True)
    return self.b(h)


def _overwritten_view(self, x):
    h = self.a(x)
    h.flatten(1).clamp_(max=0.5)
    return self.b(h)


class Scaled(nn.Linear):
    def forward(self, x):
        return super().forward(x) * torch.sigmoid(x).sum()


class Branching(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 2)), "'1' is a GELU, which has no bounds; bounds know Linear"),
        (nn.Sequential(nn.Linear(4, 4), nn.Softmax(1)), "'1' is a Softmax"),
        (nn.Sequential(Scaled(4, 2)), "no bounds"),
        (nn.Sequential(nn.Linear(5, 2)), "cannot take values of shape"),
        (nn.Sequential(nn.Linear(4, 2), Branching()), "cannot be read"),
        (nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, track_running_stats=False)), "running statistics"),
        (nn.Sequential(nn.BatchNorm1d(1), nn.Linear(4, 2)), "takes 1 channels and gets 4"),
        (_hooked(), "without hooks"),
        (_turning(), "'0' has a hook"),
        (_patched(), "'0' has a hook, or a forward of its own"),
        (Says(_overwritten, a=nn.Linear(4, 4), b=nn.Linear(4, 2)), "'relu' changes in place a value that is used elsewhere"),
        (Says(_overwritten_view, a=nn.Linear(4, 4), b=nn.Linear(4, 2)), "'clamp_' changes in place"),
        (
            Says(lambda s, x: s.a(x) + s.b, a=nn.Linear(4, 2), b=nn.Parameter(torch.zeros(2))),
            "numbers of its own that no layer",
        ),
        (Says(lambda s, x: s.a(x) + s.b(x), a=nn.Linear(4, 2), b=nn.Linear(4, 1)), "the shapes \\(2,\\) and \\(1,\\)"),
        (Says(lambda s, x: {"features": s.a(x)}, a=nn.Linear(4, 2)), "in which bounds find no logits"),
        (Says(lambda s, x: F.avg_pool2d(x.view(x.size(0), -1), x.size(1))), "cannot take values|takes images"),
        (lambda x: x, "bounds need a module"),
    ],
)
def test_models_without_bounds_are_named(model, words):
    with pytest.raises(UsageError, match=words):
        verified(model, torch.rand(2, 4), torch.tensor([0, 1]), Lp(math.inf, 0.1))


def test_a_model_that_stays_in_training_mode_is_refused():
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 2)).eval()
    model.eval = lambda: model
    model[0].train()
    with pytest.raises(UsageError, match="'0' stays in training mode"):
        verified(model, torch.rand(8, 4), torch.zeros(8, dtype=torch.int64), Lp(math.inf, 0.1))


def _block(self, x):
    h = F.relu(self.a(x), inplace=True)
    out = self.b(h)
    out += self.a(h)
    return {"features": h, "logits": self.c(out.view(out.size(0), -1).relu_())}


def test_in_place_layers_of_a_value_that_is_used_once_have_bounds():
    model = Says(_block, a=nn.Linear(4, 4), b=nn.Linear(4, 4), c=nn.Linear(4, 3)).eval()
    x = torch.randn(20, 4)
    assert torch.allclose(trace(model, x)(x), model(x)["logits"], atol=1e-6)


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (nn.Conv2d(1, 2, 3, padding=1, padding_mode="reflect"), "reflect"),
        (nn.Conv2d(1, 2, 3, padding="same"), "same"),
        (nn.MaxPool2d(2, ceil_mode=True), "ceil_mode"),
        (nn.MaxPool2d(2, dilation=2), "dilation"),
        (nn.AvgPool2d(2, divisor_override=-4), "divides by a number less than 0"),
        (nn.Sequential(nn.Flatten(), nn.MaxPool2d(2)), "takes images"),
        (nn.Sequential(nn.Flatten(), nn.Conv2d(1, 1, 2)), "takes images"),
        (nn.Flatten(2), "dimensions 2 to -1"),
    ],
)
def test_layers_without_bounds_are_named(layer, words):
    with pytest.raises(UsageError, match=words):
        trace(nn.Sequential(layer), torch.rand(1, 1, 5, 5))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m, x, y: verified(m, x, y, Lp(0, 3)), "l_0; bounds serve l_inf, l_2 and l_1"),
        (lambda m, x, y: verified(m, x, y, Lp(2)), "no radius"),
        (lambda m, x, y: verified(m, x, y, Lp(2, 0.1), "interval"), "unknown certificate 'interval'"),
        (lambda m, x, y: verified(m, x, y, Lp(2, 0.1), "crown(intermediate='lp')"), "known are crown, ibp"),
        (lambda m, x, y: verified(m, x, y, Lp(2, 0.1), "alpha-crown(steps=0)"), "at least 1"),
        (lambda m, x, y: verified(m, x, y + 3, Lp(2, 0.1)), "classes 0 to 2"),
        (lambda m, x, y: verified(m, 2 * x + 1, y, Lp(2, 0.1)), "range is"),
        (lambda m, x, y: IBPTraining(Lp(0, 3)), "bounds serve"),
        (lambda m, x, y: IBPTraining(Lp(2, 0.1), warm=0.5, ramp=0.6), "together they should be at most 1"),
        (lambda m, x, y: IBPTraining(Lp(2, 0.1), ramp=1.5), "ramp is 1.5"),
        (lambda m, x, y: CrownIBPTraining(Lp(2, 0.1), weight=-1), "weight is -1"),
    ],
)
def test_bad_input_is_one_sentence(call, words):
    model, x, y = _random("mlp", 0)
    with pytest.raises(UsageError, match=words) as caught:
        call(model.float(), x.float(), y)
    assert "\n" not in str(caught.value)
