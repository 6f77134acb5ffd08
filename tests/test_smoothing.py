"""Randomized smoothing: counts, bounds and radii against closed forms, and the losses that train for it."""

import math

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from advkit import Lp, UsageError
from advkit.attacks import PGD
from advkit.benchmarks.statistics import rate
from advkit.data import load
from advkit.defenses.certificates import smoothing
from advkit.defenses.certificates.smoothing import Smoothing, Soft, lower_bound, votes
from advkit.defenses.gaussian import GaussianTraining
from advkit.defenses.smoothadv import SmoothAdv
from advkit.engine import run
from advkit.models import networks
from advkit.streams import Streams
from advkit.threat import Rotation
from advkit.train import Recipe, train

SEEDS = torch.arange(40)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(autouse=True)
def _same_weights():
    torch.manual_seed(0)


@pytest.fixture
def plane():
    """A linear network of two classes in ten dimensions, 40 inputs, and the distance of each from the boundary."""
    model = nn.Linear(10, 2)
    with torch.no_grad():
        model.weight.copy_(torch.randn(2, 10, generator=rng(1)))
        model.bias.copy_(torch.tensor([0.2, -0.1]))
    w, b = (model.weight[1] - model.weight[0]).detach(), (model.bias[1] - model.bias[0]).detach()
    x = torch.randn(40, 10, generator=rng(2)) / 2
    signed = (x @ w + b) / w.norm()
    return model, x, signed, w / w.norm()


# What is counted.


@pytest.mark.parametrize("n", [1, 7, 128, 129, 300])
def test_every_copy_is_counted_once(plane, n, monkeypatch):
    monkeypatch.setattr(smoothing, "ENTRIES", 1280)
    model, x, _, _ = plane
    counts = votes(model, x, 0.5, n, SEEDS)
    assert counts.shape == (40, 2)
    assert counts.sum(1).tolist() == [n] * 40


def test_counts_are_those_of_the_same_noise_asked_at_once(plane):
    model, x, _, _ = plane
    counts = votes(model, x[:3], 0.5, 200, torch.tensor([5, 6, 7]))
    for i in range(3):
        noise = torch.randn((200, 10), generator=rng(5 + i))
        assert counts[i].tolist() == model(x[i] + 0.5 * noise).argmax(1).bincount(minlength=2).tolist()


@pytest.mark.parametrize("together", [1, 2, 5])
def test_an_example_does_not_depend_on_its_batch(plane, together, monkeypatch):
    model, x, _, _ = plane
    monkeypatch.setattr(smoothing, "ENTRIES", 320)
    whole = votes(model, x, 0.5, 100, SEEDS)
    monkeypatch.setattr(smoothing, "BLOCKS", {"cpu": together})
    parts = [votes(model, x[i : i + 7], 0.5, 100, SEEDS[i : i + 7]) for i in range(0, 40, 7)]
    assert torch.equal(torch.cat(parts), whole)
    method, streams = Smoothing(0.5, n=200), Streams.seeded(0, range(40))
    found = method.certify(model, x, streams)
    again = method.certify(model, x[30:], Streams.seeded(0, range(30, 40)))
    assert torch.equal(found.radius[30:], again.radius)
    assert torch.equal(found.predicted[30:], again.predicted)


def test_smoothing_says_how_far_it_is(plane):
    model, x, _, _ = plane
    seen = []
    votes(model, x[:4], 0.5, 50, SEEDS[:4], seen.append)
    assert seen == [0.25, 0.5, 0.75, 1.0]


def test_a_network_is_asked_in_evaluation_mode_and_left_as_it_was():
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.9), nn.Linear(4, 3)).train()
    x = torch.rand(2, 1, 2, 2)
    before = torch.random.get_rng_state()
    counts = votes(model, x, 1e-6, 50, SEEDS[:2])
    assert counts.max(1).values.tolist() == [50, 50]
    assert model.training
    assert all(p.requires_grad for p in model.parameters())
    assert torch.equal(before, torch.random.get_rng_state())


def test_a_network_in_float64_is_asked_in_float64():
    kinds = []

    class Seen(nn.Linear):
        def forward(self, z):
            kinds.append(z.dtype)
            return super().forward(z)

    votes(Seen(4, 2, dtype=torch.float64), torch.rand(1, 4, dtype=torch.float64), 0.5, 10, SEEDS[:1])
    assert kinds == [torch.float64]


# The bound.


@given(st.integers(1, 2000), st.data(), st.sampled_from([1e-4, 1e-3, 0.05, 0.3]))
def test_the_bound_is_that_of_clopper_and_pearson(n, data, alpha):
    k = data.draw(st.integers(0, n))
    bound = float(lower_bound(torch.tensor([k]), n, alpha)[0])
    assert bound == pytest.approx(rate(k, n, 1 - 2 * alpha).low, abs=1e-9)
    assert bound < k / n or k == 0


def test_the_bound_of_all_is_the_root_of_alpha():
    n = torch.tensor([10_000])
    assert float(lower_bound(n, 10_000, 0.001)[0]) == pytest.approx(0.001**1e-4, abs=1e-12)


@pytest.mark.parametrize("p", [0.5, 0.9, 0.99])
def test_the_bound_is_wrong_at_most_so_often(p):
    # Summed over all that can happen, so there is no chance in it.
    counts = torch.arange(1001)
    wrong = lower_bound(counts, 1000, 0.001).numpy() > p
    assert 0 < scipy.stats.binom.pmf(counts.numpy()[wrong], 1000, p).sum() <= 0.001


# The radius: a linear model under noise has that of the model itself, the distance from the boundary.


def test_the_radius_of_a_linear_model_is_its_distance(plane):
    model, x, signed, _ = plane
    found = Smoothing(0.5, n=20_000).certify(model, x, rng())
    sure, inside = found.predicted >= 0, signed.abs() < 1.4
    assert sure.sum() > 30
    assert torch.equal(found.predicted[sure], (signed > 0).long()[sure])
    assert (found.radius[sure] < signed.abs().double()[sure]).all()
    near = sure & inside
    assert (signed.abs().double() - found.radius)[near].max() < 0.12
    assert (found.radius[~sure] == 0).all()
    assert (signed[~sure].abs() < 0.05).all()


def test_bounds_hold_as_often_as_they_say(plane):
    model, x, signed, _ = plane
    method = Smoothing(0.5, n0=20, n=100, alpha=0.05)
    wrong = sum(int((method.certify(model, x, rng(i)).radius > signed.abs().double()).sum()) for i in range(50))
    # 2,000 certificates: 100 may be wrong; more than 130 happens in one of a thousand.
    assert 20 < wrong < 130


def test_inside_the_radius_the_worst_input_has_the_same_answer(plane):
    model, x, signed, normal = plane
    method = Smoothing(0.5, n=5_000)
    found = method.certify(model, x, rng())
    rows = found.predicted >= 0
    worst = x - (0.98 * found.radius * signed.sign()).float().unsqueeze(1) * normal
    counts = votes(model, worst[rows], 0.5, 20_000, SEEDS[: int(rows.sum())] + 1000)
    assert torch.equal(counts.argmax(1), found.predicted[rows])
    beyond = x - (1.3 * signed).unsqueeze(1) * normal
    assert not torch.equal(votes(model, beyond, 0.5, 2_000, SEEDS).argmax(1)[rows], found.predicted[rows])


def test_on_the_boundary_it_abstains(plane):
    model, x, signed, normal = plane
    edge = x - signed.unsqueeze(1) * normal
    method = Smoothing(0.5, n=1_000)
    assert (method.certify(model, edge, rng()).predicted == -1).all()
    assert (method.predict(model, edge, rng()) == -1).sum() >= 39
    assert torch.equal(method.predict(model, x[signed.abs() > 0.2], rng()), (signed > 0).long()[signed.abs() > 0.2])


@given(st.lists(st.integers(0, 300), min_size=2, max_size=4), st.sampled_from([0.001, 0.05]))
def test_predict_is_the_two_sided_binomial_test(counts, alpha):
    counts[0] += 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(smoothing, "votes", lambda *_: torch.tensor([counts]))
        said = int(Smoothing(alpha=alpha).predict(nn.Identity(), torch.zeros(1, 1), rng())[0])
    second, first = sorted(counts)[-2:]
    significant = scipy.stats.binomtest(first, first + second, 0.5).pvalue <= alpha
    assert said == (int(np.argmax(counts)) if significant else -1)


# As a certificate of a threat model.


def test_what_is_certified_is_right_and_far_enough(plane):
    model, x, signed, _ = plane
    y = (signed > 0).long()
    y[:20] = 1 - y[:20]
    method = Smoothing(0.5, n=1_000)
    radius = method.certify(model, x, rng()).radius
    eps = float(radius.median())
    found = method(model, x, y, Lp(2, eps, -9, 9), rng())
    assert torch.equal(found.radius, radius)
    assert not found.certified[:20].any()
    assert torch.equal(found.certified[20:], radius[20:] >= eps * (1 + 1e-6))
    assert 0 < found.certified.sum() < 20


def test_other_norms_are_served_by_the_ball_around_them(plane):
    model, x, _, _ = plane
    method = Smoothing(0.5, n=500)
    y = torch.zeros(40, dtype=torch.int64)
    radii = [method(model, x, y, Lp(p, 0.1, -9, 9), rng()).radius for p in (2.0, 1.0, math.inf)]
    assert torch.equal(radii[0], radii[1])
    assert torch.allclose(radii[2] * 10**0.5, radii[0])


@pytest.mark.parametrize("threat", [Lp(0, 3), Lp(2), Rotation(10)])
def test_other_threat_models_are_refused(plane, threat):
    model, x, _, _ = plane
    with pytest.raises(UsageError, match="bounds"):
        Smoothing()(model, x, torch.zeros(40, dtype=torch.int64), threat, rng())


@pytest.mark.parametrize(
    ("given", "says"),
    [({"sigma": 0}, "sigma"), ({"n0": 0}, "n0"), ({"n": 1.5}, "n is"), ({"alpha": 1.0}, "alpha"), ({"alpha": 0.0}, "alpha")],
)
def test_settings_out_of_range_are_refused(given, says):
    with pytest.raises(UsageError, match=says):
        Smoothing(**given)


@pytest.mark.parametrize(
    ("x", "y", "says"),
    [
        (torch.ones(2, 10, dtype=torch.int64), torch.tensor([0, 1]), "the inputs are torch.int64"),
        (torch.full((2, 10), math.nan), torch.tensor([0, 1]), "NaN"),
        (torch.full((2, 10), 3.0), torch.tensor([0, 1]), "range is"),
        (torch.zeros(2, 10), torch.tensor([0, 2]), "classes 0 to 1"),
        (torch.zeros(2, 10), torch.tensor([[0], [1]]), "of shape \\(2, 1\\)"),
        (torch.zeros(2, 10), torch.tensor([0]), "one label for each"),
    ],
)
def test_inputs_are_checked_as_for_other_certificates(plane, x, y, says):
    with pytest.raises(UsageError, match=says):
        Smoothing(n=10)(plane[0], x, y, Lp(2, 0.1), rng())


def test_a_model_of_one_class_is_refused():
    with pytest.raises(UsageError, match="two classes"):
        votes(nn.Linear(3, 1), torch.rand(2, 3), 0.5, 10, SEEDS[:2])


# The losses.


def test_soft_is_the_logarithm_of_the_mean_probability():
    model, x = nn.Linear(5, 3), torch.rand(4, 5)
    noise = torch.randn(6, 4, 5, generator=rng())
    expected = torch.stack([model(x + n).softmax(1) for n in noise]).mean(0)
    assert torch.allclose(Soft(model, noise)(x).exp(), expected, atol=1e-6)
    shared = torch.stack([model(x + n).softmax(1) for n in noise[:, :1]]).mean(0)
    assert torch.allclose(Soft(model, noise[:, :1])(x).exp(), shared, atol=1e-6)


def test_gaussian_is_the_cross_entropy_under_noise():
    model, x, y = nn.Linear(5, 3), torch.rand(4, 5), torch.tensor([0, 1, 2, 0])
    expected = F.cross_entropy(model(x + 0.3 * torch.randn(4, 5, generator=rng(3))), y)
    assert torch.equal(GaussianTraining(0.3)(model, x, y, rng(3)), expected)
    with pytest.raises(UsageError, match="sigma"):
        GaussianTraining(-1.0)


def test_smoothadv_attacks_the_mean_with_the_noise_that_it_learns_from():
    model, x, y = nn.Linear(5, 3), torch.rand(4, 5), torch.tensor([0, 1, 2, 0])
    threat = Lp(2, 0.4, -9, 9)
    noise = 0.5 * torch.randn((3, 4, 5), generator=rng(1))
    # By hand: two steps of length eps on -log of the mean probability, from x.
    x_t = x.clone()
    for _ in range(2):
        x_t.requires_grad_(True)
        g = torch.autograd.grad(F.nll_loss(Soft(model, noise)(x_t), y, reduction="sum"), x_t)[0]
        d = x_t.detach() + 0.4 * g / g.norm(dim=1, keepdim=True) - x
        x_t = x + d * (0.4 / d.norm(dim=1, keepdim=True)).clamp(max=1)
    expected = F.cross_entropy(model((x_t + noise).flatten(0, 1)), y.repeat(3))
    loss = SmoothAdv(threat, sigma=0.5, m=3)(model, x, y, rng(1))
    assert torch.allclose(loss, expected, atol=1e-5)
    early = SmoothAdv(threat, sigma=0.5, m=3)(model, x, y, rng(1), at=0.0)
    assert early < loss
    loss.backward()
    assert model.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"sigma": 0.0}, "sigma"),
        ({"steps": 0}, "steps"),
        ({"m": 0}, "m is"),
        ({"ramp": 2.0}, "ramp"),
        ({"threat": Lp(2)}, "radius"),
    ],
)
def test_bad_settings_of_smoothadv_are_refused(given, says):
    with pytest.raises(UsageError, match=says):
        SmoothAdv(**{"threat": Lp(2, 1.0), **given})


# On digits.


@pytest.fixture(scope="module")
def noisy():
    with torch.random.fork_rng(devices=[]):
        data = load("mnist-5k", split="train")
        return train(networks.build("mnist-mlp(width=64)"), data, Recipe(epochs=8), loss=GaussianTraining(0.5))


@pytest.mark.slow
def test_no_attack_at_the_certified_radius_changes_the_answer(noisy):
    x, _ = load("mnist-5k", split="test", limit=60).batch(0, 60)
    method = Smoothing(0.5, n=5_000)
    found = method.certify(noisy, x, Streams.seeded(0, range(60)))
    failures = 0
    for i in (found.radius > 0.1).nonzero().squeeze(1).tolist():
        threat = Lp(2, 0.99 * float(found.radius[i]))
        soft = Soft(noisy, 0.5 * torch.randn(64, *x[:1].shape, generator=rng(i)))
        result = run(PGD(30), soft, x[i : i + 1], found.predicted[i : i + 1], threat, rng=rng(i))
        x_adv = result.x_adv if result.success else _last(soft, x[i : i + 1], found.predicted[i : i + 1], threat)
        failures += int(votes(noisy, x_adv, 0.5, 20_000, torch.tensor([i]) + 77)[0].argmax()) != int(found.predicted[i])
    assert (found.radius > 0.1).sum() > 40
    assert failures == 0


def _last(soft, x, y, threat):
    from advkit.engine import perturb

    return perturb(PGD(30), soft, x, y, threat, rng=rng())


@pytest.mark.slow
def test_training_with_noise_is_what_makes_certificates():
    digits, (x, y) = load("mnist-5k", split="train"), load("mnist-5k", split="test", limit=100).batch(0, 100)
    method, shares = Smoothing(0.5, n=300), []
    for loss in (None, GaussianTraining(0.5)):
        model = train(networks.build("mnist-cnn(width=8)"), digits, Recipe(epochs=4), loss=loss)
        shares.append(float(method(model, x, y, Lp(2, 0.5), rng()).certified.float().mean()))
    assert shares[1] > shares[0] + 0.1
