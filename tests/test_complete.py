"""Complete verification: against every pattern of ReLUs, a mixed-integer program, and attacks."""

import itertools
import math
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import Bounds, LinearConstraint, linprog, milp
from torch import nn
from torch.nn import functional as F

from advkit import Lp, UsageError, data, run, spec
from advkit.attacks import PGD
from advkit.benchmarks.suites import standard
from advkit.defenses.certificates import CERTIFICATES, Complete
from advkit.defenses.certificates import complete as complete_of
from advkit.defenses.certificates.condensed import OutOfTime, Rows, adaptive, ascend, bounds, condense
from advkit.defenses.certificates.layers import trace
from advkit.defenses.certificates.region import Region
from advkit.models import networks
from advkit.train import Recipe, train


def mlp(*sizes, seed=0):
    rng = torch.Generator().manual_seed(seed)
    layers = []
    for a, b in itertools.pairwise(sizes):
        layer = nn.Linear(a, b)
        layer.weight.data = torch.randn(b, a, generator=rng) * (1.5 / a) ** 0.5
        layer.bias.data = torch.randn(b, generator=rng) * 0.3
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers[:-1]).eval()


def some(n, size, seed=0):
    return torch.rand(n, size, generator=torch.Generator().manual_seed(seed))


def right(model, x):
    return model(x).argmax(1).detach()


def certify(model, x, y, threat, **given):
    return Complete(**given)(model, x, y, threat, torch.Generator().manual_seed(0))


def patterns(model, x, y, eps):
    """The least margin in the box, by a linear program for each pattern of ReLUs."""
    linears = [part for part in model if isinstance(part, nn.Linear)]
    low, high = (x - eps).clamp(0, 1).double().numpy(), (x + eps).clamp(0, 1).double().numpy()
    units, best = sum(part.out_features for part in linears[:-1]), math.inf
    for signs in itertools.product((1.0, -1.0), repeat=units):
        w, b, rows, ends, at = np.eye(len(x)), np.zeros(len(x)), [], [], 0
        for part in linears[:-1]:
            weight, bias = part.weight.detach().double().numpy(), part.bias.detach().double().numpy()
            w, b = weight @ w, weight @ b + bias
            s = np.array(signs[at : at + len(b)])
            rows, ends, at = [*rows, -s[:, None] * w], [*ends, s * b], at + len(b)
            w, b = w * (s > 0)[:, None], b * (s > 0)
        weight, bias = linears[-1].weight.detach().double().numpy(), linears[-1].bias.detach().double().numpy()
        w, b = weight @ w, weight @ b + bias
        for j in range(len(b)):
            if j != y:
                found = linprog(w[y] - w[j], np.vstack(rows), np.concatenate(ends), bounds=np.stack([low, high], 1))
                best = min(best, found.fun + b[y] - b[j]) if found.status == 0 else best
    return best


def program(model, x, y, eps):
    """The least margin in the box, by one mixed-integer program a rival; big-M from intervals."""
    linears = [part for part in model if isinstance(part, nn.Linear)]
    low, high = (x - eps).clamp(0, 1).double().numpy(), (x + eps).clamp(0, 1).double().numpy()
    sizes = [len(x), *(part.out_features for part in linears[:-1])]
    starts = np.cumsum([0, *sizes])
    hidden = starts[-1] - len(x)
    total = starts[-1] + hidden
    lows, highs, whole = np.zeros(total), np.ones(total), np.zeros(total)
    lows[: len(x)], highs[: len(x)], whole[starts[-1] :] = low, high, 1
    a, top = [], []
    for k, part in enumerate(linears[:-1]):
        weight, bias = part.weight.detach().double().numpy(), part.bias.detach().double().numpy()
        mid, rad = weight @ ((low + high) / 2) + bias, np.abs(weight) @ ((high - low) / 2)
        l, u = np.minimum(mid - rad, -1e-3), np.maximum(mid + rad, 1e-3)
        for i in range(len(bias)):
            h, d = starts[k + 1] + i, starts[-1] + starts[k + 1] - len(x) + i
            highs[h] = u[i]
            under, over, off = np.zeros(total), np.zeros(total), np.zeros(total)
            under[starts[k] : starts[k + 1]], under[h] = weight[i], -1
            over[starts[k] : starts[k + 1]], over[h], over[d] = -weight[i], 1, -l[i]
            off[h], off[d] = 1, -u[i]
            a, top = [*a, under, over, off], [*top, -bias[i], bias[i] - l[i], 0.0]
        low, high = np.maximum(mid - rad, 0), np.maximum(mid + rad, 0)
    weight, bias = linears[-1].weight.detach().double().numpy(), linears[-1].bias.detach().double().numpy()
    best = math.inf
    for j in range(len(bias)):
        if j != y:
            cost = np.zeros(total)
            cost[starts[-2] : starts[-1]] = weight[y] - weight[j]
            limits = LinearConstraint(np.array(a), -np.inf, np.array(top))
            found = milp(cost, constraints=limits, bounds=Bounds(lows, highs), integrality=whole)
            best = min(best, found.fun + bias[y] - bias[j])
    return best


def agrees(model, x, eps, exact):
    """Every row is decided, as the exact margin says; both answers occur."""
    y = right(model, x)
    found = certify(model, x, y, Lp(math.inf, eps))
    least = torch.tensor([exact(model, row, int(label), eps) for row, label in zip(x, y, strict=True)])
    assert (least.abs() > 1e-3).all()
    assert found.certified.tolist() == (least > 0).tolist()
    assert found.broken.tolist() == (least < 0).tolist()
    assert (found.bound <= least + 1e-6).all()
    assert 0 < int(found.certified.sum()) < len(x)


@pytest.mark.parametrize("seed", [7, 9])
def test_it_decides_as_every_pattern_of_relus_does(seed):
    agrees(mlp(3, 3, 3, 3, seed=seed), some(5, 3, seed), 0.15, patterns)


def test_it_decides_as_a_mixed_integer_program_does():
    agrees(mlp(8, 12, 12, 3), some(12, 8), 0.12, program)


def test_a_linear_model_has_its_closed_form():
    model, x, eps = mlp(4, 3, seed=2), 0.2 + 0.6 * some(20, 4), 0.1
    y = right(model, x)
    w, z = model[0].weight.detach(), model(x).detach()
    drop = eps * (w[y].unsqueeze(1) - w).abs().sum(2)
    others = torch.ones(20, 3, dtype=torch.bool).scatter(1, y.unsqueeze(1), False)
    least = (z.gather(1, y.unsqueeze(1)) - z - drop)[others].view(20, 2).amin(1).double()
    found = certify(model, x, y, Lp(math.inf, eps))
    torch.testing.assert_close(found.bound, least, rtol=0, atol=1e-4)
    assert found.certified.tolist() == (least > 1e-3).tolist()
    assert found.broken.tolist() == (least < 0).tolist()
    assert 0 < int(found.certified.sum()) < 20


def test_the_linear_programs_of_all_patterns_hold_the_least_margin():
    model, x = mlp(3, 4, 3, 3), some(6, 3)[:1]
    (net, logits), _ = condensed(model, x, 0.3)
    y = int(right(model, x))
    found = []
    for j in {0, 1, 2} - {y}:
        row = Rows(*(part[y] - part[j] for part in logits))
        for signs in itertools.product((1.0, -1.0), repeat=len(net.c)):
            found.append(complete_of.solve(net, row, torch.tensor(signs, dtype=torch.float64), 10.0)[0])
    assert min(found) == pytest.approx(patterns(model, x[0], y, 0.3), abs=1e-5)
    assert math.inf in found


def test_without_prices_linear_programs_decide(monkeypatch):
    model, x = mlp(8, 12, 12, 3), some(12, 8)
    y, threat, calls, solve = right(model, x), Lp(math.inf, 0.1), [], complete_of.solve
    expected = certify(model, x, y, threat)
    monkeypatch.setattr(complete_of, "solve", lambda *given: calls.append(given) or solve(*given))
    monkeypatch.setattr(complete_of, "ascend", lambda net, rows, box, alpha, beta, *_: (alpha, torch.zeros_like(beta)))
    found = certify(model, x, y, threat)
    assert calls
    assert torch.equal(found.certified, expected.certified)
    assert torch.equal(found.broken, expected.broken)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(1, 2, 3, padding=1), nn.Conv2d(2, 2, 3, padding=1), nn.Linear(32, 3)

    def forward(self, x):
        h = F.relu(self.a(x))
        return self.head(F.relu(h + self.b(h)).flatten(1))


def condensed(model, x, eps, steps=10):
    with torch.no_grad():
        region = Region.around(x, Lp(math.inf, eps), torch.float64)
        return condense(trace(model, x, torch.float64), region, steps, math.inf), region


@pytest.mark.parametrize("eps", [0.1, 0.3])
def test_the_condensed_network_is_the_network_in_its_box(eps):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, x = Residual().eval(), torch.rand(1, 1, 4, 4)
    (net, logits), region = condensed(model, x, eps)
    z = region.low + torch.rand(200, 1, 4, 4, generator=torch.Generator().manual_seed(1)) * (region.high - region.low)
    h = net.relus(z.flatten(1))
    torch.testing.assert_close(z.flatten(1) @ logits.p.T + h @ logits.q.T + logits.r, model.double()(z))
    open_ones = z.flatten(1) @ net.g.T + h @ net.t.T + net.c
    assert ((net.box.low <= open_ones) & (open_ones <= net.box.high)).all()
    assert 0 < len(net.c) < 64


@given(seed=st.integers(0, 2**16), eps=st.floats(0.01, 0.5))
@settings(max_examples=25, deadline=None)
def test_bounds_are_below_the_margin_whatever_the_slopes_and_prices(seed, eps):
    """With signs assumed, on the inputs that have these signs."""
    rng = torch.Generator().manual_seed(seed)
    (net, logits), region = condensed(mlp(4, 6, 5, 3, seed=seed), some(1, 4, seed), eps)
    z = region.low + torch.rand(500, 4, generator=rng, dtype=torch.float64) * (region.high - region.low)
    h = net.relus(z)
    value = z @ net.g.T + h @ net.t.T + net.c
    sign = torch.randint(-1, 2, net.c.shape, generator=rng).double() * (torch.rand(len(net.c), generator=rng) < 0.4)
    box = net.box._replace(
        low=torch.where(sign > 0, net.box.low.clamp(min=0), net.box.low),
        high=torch.where(sign < 0, net.box.high.clamp(max=0), net.box.high),
        sign=sign,
    )
    inside = (value * sign >= 0).all(1)
    truth = (z @ logits.p.T + h @ logits.q.T + logits.r)[inside]
    drawn = torch.rand(2, 3, len(net.c), generator=rng, dtype=torch.float64)
    better = ascend(net, logits, box, adaptive(box), torch.zeros_like(net.c), 10, math.inf)
    for alpha, beta in (drawn, better):
        assert (bounds(net, logits, box, alpha, beta) <= truth + 1e-9).all()


def test_prices_and_slopes_improve_the_bound():
    (net, logits), _ = condensed(mlp(6, 16, 16, 3), some(1, 6), 0.3)
    alpha, beta = adaptive(net.box), torch.zeros_like(net.c)
    first = bounds(net, logits, net.box, alpha, beta)
    slopes = bounds(net, logits, net.box, *ascend(net, logits, net.box, alpha, beta, 20, math.inf))
    assert (slopes >= first).all()
    assert (slopes > first + 1e-3).any()
    split = net.box._replace(low=net.box.low.clamp(min=0), sign=torch.ones_like(net.c))
    free = bounds(net, logits, split, alpha, beta)
    priced = bounds(net, logits, split, *ascend(net, logits, split, alpha, beta, 50, math.inf))
    assert (priced > free + 1e-3).any()


@given(seed=st.integers(0, 2**16), eps=st.floats(0.01, 0.4))
@settings(max_examples=20, deadline=None)
def test_a_proof_and_an_attack_never_contradict(seed, eps):
    model, x = mlp(4, 8, 8, 3, seed=seed), some(4, 4, seed)
    y, threat = right(model, x), Lp(math.inf, eps)
    found = certify(model, x, y, threat, seconds=2.0)
    attacked = run(PGD(20), model, x, y, threat).success
    assert not (found.certified & (attacked | found.broken)).any()
    # Only a margin within rounding of 0 may stay open.
    assert (found.bound[~found.certified & ~found.broken].abs() < 1e-3).all()
    assert threat.allows(found.x_adv, x).all()
    assert ((model(found.x_adv).argmax(1) != y) == found.broken).all()


def test_wrong_answers_are_broken_at_once():
    model, x = mlp(3, 4, 3), some(5, 3)
    found = certify(model, x, (right(model, x) + 1) % 3, Lp(math.inf, 0.1))
    assert found.broken.all()
    assert not found.certified.any()
    torch.testing.assert_close(found.x_adv, x, rtol=0, atol=0)


def test_what_runs_out_of_time_is_open():
    model, x = mlp(40, 120, 120, 120, 4), some(2, 40)
    y = right(model, x)
    began = time.monotonic()
    found = certify(model, x, y, Lp(math.inf, 0.05), seconds=0.5)
    assert time.monotonic() - began < 4
    still = ~found.certified & ~found.broken
    assert still.any()
    assert (found.bound[still] < 0).all()
    assert (found.radius[still] == 0).all()
    none = certify(model, x, y, Lp(math.inf, 0.05), seconds=1e-6)
    assert not none.certified.any()
    with pytest.raises(OutOfTime), torch.no_grad():
        condense(trace(model, x, torch.float64), Region.around(x[:1], Lp(math.inf, 0.1), torch.float64), 0, 0.0)


def test_a_weight_that_is_infinite_leaves_rows_open():
    model, x = mlp(3, 3), 0.5 + some(2, 3)
    with torch.no_grad():
        model[0].weight[0, 0] = math.inf
    found = certify(model, x, right(model, x), Lp(math.inf, 0.1, 0.0, 2.0))
    assert not found.certified.any()
    assert not found.broken.any()


def test_a_keyboard_interrupt_passes(monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(complete_of, "least", interrupt)
    model, x = mlp(8, 12, 12, 3), some(12, 8)
    with pytest.raises(KeyboardInterrupt):
        certify(model, x, right(model, x), Lp(math.inf, 0.15))


def test_the_model_is_left_as_it_was_and_results_repeat():
    model, x = mlp(8, 12, 12, 3).train(), some(6, 8)
    y, before = right(model, x), [p.clone() for p in model.parameters()]
    first, second = (certify(model, x, y, Lp(math.inf, 0.1)) for _ in range(2))
    assert model.training
    assert all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert torch.equal(first.bound, second.bound)
    assert torch.equal(first.x_adv, second.x_adv)


@pytest.mark.parametrize(
    ("model", "threat", "said"),
    [
        (networks.build("mnist-cnn(width=2, dense=4)"), Lp(math.inf, 0.1), "is a maximum; complete verification knows"),
        (nn.Sequential(nn.Flatten(), nn.Linear(784, 3), nn.Tanh()), Lp(math.inf, 0.1), "Tanh"),
        (networks.build("mnist-mlp(width=4)"), Lp(2, 0.1), "complete verification serves l_inf"),
        (networks.build("mnist-mlp(width=4)"), Lp(0, 3), "complete verification serves l_inf"),
        (networks.build("mnist-mlp(width=4)"), Lp(math.inf), "no radius"),
    ],
)
def test_what_it_cannot_verify_is_said(model, threat, said):
    x = torch.rand(2, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    with pytest.raises(UsageError, match=said):
        certify(model, x, torch.zeros(2, dtype=torch.int64), threat)


@pytest.mark.parametrize("text", ["complete(seconds=0)", "complete(batch=0)", "complete(steps=-1)", "complete(seconds=inf)"])
def test_settings_out_of_range_are_refused(text):
    with pytest.raises(UsageError, match="should be"):
        spec.parse(text, CERTIFICATES, "certificate")


@pytest.mark.slow
@pytest.mark.parametrize("eps", [0.02, 0.05])
def test_on_digits_nothing_certified_falls_to_the_suite(eps):
    model = networks.build("mnist-mlp(width=32, depth=2)")
    train(model, data.load("mnist-5k", split="train"), Recipe(epochs=10, lr=0.1))
    x, y = data.load("mnist-5k", limit=50).batch(0, 50)
    threat = Lp(math.inf, eps)
    found = certify(model, x, y, threat, seconds=5.0)
    attacked = torch.stack([run(attack, model, x, y, threat).success for attack in standard(threat)]).any(0)
    assert not (found.certified & attacked).any()
    assert int((found.certified | found.broken).sum()) >= 48
    assert (model(found.x_adv).argmax(1) != y).tolist() == found.broken.tolist()
    assert 0 < int(found.certified.sum()) < 50
