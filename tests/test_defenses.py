"""Every training loss: the contract, closed forms, what a step costs, and that it trains a network to withstand."""

import copy
import dataclasses
import math
import re
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from advkit import Lp, Rotation, UsageError, run, spec
from advkit.attacks import PGD
from advkit.benchmarks.training import ByHand, passes
from advkit.defenses import (
    AWP,
    DEFENSES,
    MART,
    NFGSM,
    TRADES,
    CrownIBPTraining,
    EnsembleTraining,
    FastTraining,
    FGSMTraining,
    FreeTraining,
    GaussianTraining,
    GradAlign,
    IBPTraining,
    MultiTraining,
    PGDTraining,
    SmoothAdv,
    WorstOfK,
)
from advkit.defenses.adversary import Adversarial, ramped
from advkit.models import checkpoint, networks
from advkit.train import CrossEntropy

LINF, L2 = Lp(math.inf, 0.1), Lp(2.0, 0.3)
FREE = {"low": -math.inf, "high": math.inf}


def still(x):
    """A fixed network of five classes for any input."""
    flat = x.flatten(1)
    return flat @ torch.linspace(-1, 1, flat.shape[1] * 5, dtype=flat.dtype).sin().view(-1, 5)


QUICK = {
    "awp": [AWP(PGDTraining(LINF, 2)), AWP(TRADES(L2, steps=2), gamma=0.1), AWP(GradAlign(LINF)), AWP(FreeTraining(LINF))],
    "crown-ibp": [CrownIBPTraining(LINF, warm=0.1, kappa=0.5)],
    "ensemble": [EnsembleTraining(LINF, (still,)), EnsembleTraining(L2, [still, still], alpha=0.2, ramp=0.5)],
    "fast": [FastTraining(LINF), FastTraining(L2, start=False, ramp=0.5)],
    "fgsm": [FGSMTraining(LINF), FGSMTraining(L2, alpha=0.0, ramp=0.5, smoothing=0.1)],
    "free": [FreeTraining(LINF, 3), FreeTraining(L2, 2, ramp=0.5)],
    "gaussian": [GaussianTraining(0.2)],
    "gradalign": [GradAlign(LINF), GradAlign(L2, lam=2.0, ramp=0.5)],
    "ibp": [IBPTraining(LINF, warm=0.1, kappa=0.5)],
    "mart": [MART(LINF, steps=2), MART(L2, steps=2, step=0.1, ramp=0.5)],
    "multi": [MultiTraining((LINF, L2), 2), MultiTraining((LINF, L2, Lp(1.0, 0.5)), 2, "average", ramp=0.5)],
    "n-fgsm": [NFGSM(LINF), NFGSM(L2, k=1.0, ramp=0.5)],
    "pgd": [PGDTraining(LINF, 2), PGDTraining(Lp(0.0, 3), 2, ramp=0.5), PGDTraining(L2, 2, step=0.1, ramp=0.5, smoothing=0.1)],
    "plain": [CrossEntropy(0.1)],
    "smoothadv": [SmoothAdv(L2, 0.2)],
    "trades": [TRADES(LINF, steps=2), TRADES(L2, steps=2, step=0.1, ramp=0.5)],
    "worst-of-k": [WorstOfK(LINF, 2), WorstOfK(Lp(0.0, 3), 2, ramp=0.5)],
}
"""A few of each loss, quick ones: a new loss is a line here."""
CASES = [loss for losses in QUICK.values() for loss in losses]
ADVERSARIAL = [loss for loss in CASES if isinstance(loss, Adversarial)]
"""Those with an adversary, whose examples are found first."""


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def dense(seed=0):
    """Inputs (B, 12), five classes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 5))


def normed(seed=0):
    """Inputs (B, 2, 6, 6), five classes, with batch normalization."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5))


def batch_for(net, n=10, seed=0):
    shape = (12,) if isinstance(net[0], nn.Linear) else (2, 6, 6)
    return torch.rand(n, *shape, generator=generator(seed)), torch.arange(n) % 5


def gradients(loss, net, x, y, at=1.0):
    """The loss of a copy of everything, and the gradient of the parameters, flat."""
    net, loss = copy.deepcopy(net), copy.deepcopy(loss)
    value = loss(net, x, y, generator(), at)
    value.backward()
    return value.detach(), torch.cat([w.grad.flatten() for w in net.parameters()])


def test_every_loss_of_the_table_is_tested():
    assert set(QUICK) == set(DEFENSES)
    assert list(DEFENSES) == sorted(DEFENSES)
    for name, losses in QUICK.items():
        assert all(type(loss) is DEFENSES[name] for loss in losses)


@pytest.mark.parametrize("make", [dense, normed])
@pytest.mark.parametrize("loss", CASES, ids=repr)
class TestContract:
    def test_a_number_with_a_gradient_that_is_the_same_again(self, loss, make):
        net = make()
        x, y = batch_for(net)
        for at in (0.0, 0.3, 1.0):
            value, g = gradients(loss, net, x, y, at)
            assert value.shape == ()
            assert value.dtype == torch.float32
            assert value.isfinite()
            assert g.isfinite().all()
            assert g.abs().sum() > 0
            again, g_again = gradients(loss, net, x, y, at)
            assert torch.equal(value, again)
            assert torch.equal(g, g_again)
        assert torch.equal(copy.deepcopy(loss)(copy.deepcopy(net), x, y, generator()), value)

    def test_it_leaves_everything_as_it_was(self, loss, make):
        net, loss = make(), copy.deepcopy(loss)
        x, y = batch_for(net)
        net[0].bias.requires_grad_(False)
        net[0].weight.grad = torch.ones_like(net[0].weight)
        net[1].eval()
        before = copy.deepcopy(net)
        given = x.clone()
        state = torch.get_rng_state()
        value = loss(net, x, y, generator())
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.equal(x, given)
        assert [module.training for module in net.modules()] == [module.training for module in before.modules()]
        for (name, w), old in zip(net.named_parameters(), before.parameters(), strict=True):
            assert torch.equal(w, old)
            assert w.requires_grad == (name != "0.bias")
            assert (w.grad is None) == (name != "0.weight")
        for buffer, old in zip(net.buffers(), before.buffers(), strict=True):
            assert torch.equal(buffer, old), "a batch norm in evaluation mode"
        assert net[0].weight.grad.eq(1).all()
        value.backward()
        assert net[0].bias.grad is None

    def test_mixed_precision(self, loss, make):
        net = make()
        x, y = batch_for(net)
        exact, g = gradients(loss, net, x, y)
        with torch.autocast("cpu", torch.bfloat16):
            value = copy.deepcopy(loss)(net, x, y, generator())
        value.backward()
        assert value.dtype == torch.float32
        assert value.item() == pytest.approx(exact.item(), rel=0.1)
        mixed = torch.cat([w.grad.flatten() for w in net.parameters()])
        assert F.cosine_similarity(g, mixed, dim=0) > 0.8


@pytest.mark.parametrize("loss", ADVERSARIAL, ids=repr)
def test_bad_batches_get_a_sentence(loss):
    net = dense()
    x, y = batch_for(net)
    with pytest.raises(UsageError, match="range"):
        copy.deepcopy(loss)(net, x + 1, y, generator())
    with pytest.raises(UsageError, match="one label for each"):
        copy.deepcopy(loss)(net, x, y[:3], generator())


@pytest.mark.parametrize("loss", ADVERSARIAL, ids=repr)
def test_the_running_statistics_are_of_one_pass(loss):
    net = normed()
    x, y = batch_for(net)
    copy.deepcopy(loss)(net, x, y, generator())
    assert net[1].num_batches_tracked == 1


@pytest.mark.parametrize("loss", ADVERSARIAL, ids=repr)
def test_another_seed_draws_other_numbers(loss):
    net = dense()
    x, y = batch_for(net)
    values = {copy.deepcopy(loss)(net, x, y, generator(seed)).item() for seed in range(6)}
    inner = loss.loss if isinstance(loss, AWP) else loss
    drawn = not isinstance(inner, FGSMTraining | FreeTraining) and getattr(inner, "start", True)
    assert (len(values) > 1) == drawn


@pytest.mark.parametrize(
    ("loss", "forward", "backward"),
    [
        (CrossEntropy(), 1, 1),
        (ByHand(LINF), 8, 8),
        (PGDTraining(LINF), 8, 8),
        (FGSMTraining(LINF), 3, 3),
        (FastTraining(LINF), 2, 2),
        (NFGSM(LINF), 2, 2),
        (GradAlign(LINF), 4, 6),
        (FreeTraining(LINF), 1, 1),
        (TRADES(LINF), 13, 12),
        (MART(LINF), 12, 12),
        (AWP(PGDTraining(LINF)), 9, 9),
        (AWP(TRADES(LINF)), 15, 14),
        (MultiTraining((LINF, L2)), 23, 21),
        (MultiTraining((LINF, L2), rule="average"), 22, 22),
        (WorstOfK(LINF), 11, 1),
    ],
    ids=repr,
)
def test_passes(loss, forward, backward):
    net = dense()
    x, y = batch_for(net)
    assert passes(loss, net, x, y) == (forward, backward)
    assert all(w.grad is None for w in net.parameters())


# Closed forms.


class Score(nn.Module):
    """Two classes by the sign of <w, x>, in float64."""

    def __init__(self, size=6, seed=0):
        super().__init__()
        self.w = nn.Parameter(torch.randn(size, generator=generator(seed), dtype=torch.float64))

    def forward(self, x):
        score = x.flatten(1) @ self.w
        return torch.stack([-score / 2, score / 2], 1)


@pytest.fixture
def score():
    net = Score()
    x = torch.randn(20, 6, generator=generator(1), dtype=torch.float64)
    y = torch.arange(20) % 2
    return net, x, y, (2 * y - 1) * (x @ net.w)


@pytest.mark.parametrize("loss", [FGSMTraining, PGDTraining, FastTraining], ids=lambda loss: loss.__name__)
def test_adversarial_training_of_a_linear_model_is_logistic_regression_with_an_l1_penalty(score, loss):
    net, x, y, margin = score
    settings = {FGSMTraining: {"alpha": 0.25}, PGDTraining: {}, FastTraining: {"alpha": 2.0}}[loss]
    value = loss(Lp(math.inf, 0.3, **FREE), **settings)(net, x, y, generator())
    robust = F.softplus(-(margin - 0.3 * net.w.abs().sum())).mean()
    share = settings.get("alpha", 0.0) if loss is FGSMTraining else 0.0
    expected = share * F.softplus(-margin).mean() + (1 - share) * robust
    assert torch.allclose(value, expected)
    (g,), (g_expected,) = torch.autograd.grad(value, net.w), torch.autograd.grad(expected, net.w)
    # x' is given: the gradient of ||w||_1 is its sign.
    assert torch.allclose(g, g_expected)


def test_fast_training_starts_at_random_and_stays_in_the_ball(score):
    net, x, y, _ = score
    threat = Lp(math.inf, 0.3, **FREE)
    x_adv = FastTraining(threat).examples(net, x, y, generator(), 1.0)
    assert threat.allows(x_adv, x).all()
    moved = ((x_adv - x) * (2 * y - 1).unsqueeze(1) * -net.w.detach().sign()) / 0.3
    # From u in [-1, 1] by 1.25: what starts above -0.25 ends at 1, the rest between 0.25 and 1.
    assert moved.min() >= 0.25 - 1e-6
    assert 0.5 < float((moved > 1 - 1e-6).double().mean()) < 0.75


def test_n_fgsm_of_a_linear_model_is_noise_and_a_whole_step(score):
    net, x, y, _ = score
    x_adv = NFGSM(Lp(math.inf, 0.3, **FREE)).examples(net, x, y, generator(), 1.0)
    noise = x_adv - x + 0.3 * (2 * y - 1).unsqueeze(1) * net.w.detach().sign()
    assert noise.abs().max() <= 0.6 + 1e-6
    assert 0.25 < noise.abs().mean() < 0.35
    assert (x_adv - x).abs().max() > 0.6
    inside = NFGSM(Lp(math.inf, 0.3, low=-0.5, high=0.5)).examples(net, x.clamp(-0.5, 0.5), y, generator(), 1.0)
    assert inside.abs().max() == 0.5


def test_trades_without_its_divergence_is_the_cross_entropy():
    net = dense()
    x, y = batch_for(net)
    value, g = gradients(TRADES(LINF, beta=0.0, steps=1, smoothing=0.1), net, x, y)
    plain, g_plain = gradients(CrossEntropy(0.1), net, x, y)
    assert torch.allclose(value, plain)
    assert torch.allclose(g, g_plain, atol=1e-7)


def test_trades_and_mart_by_hand():
    net = dense()
    x, y = batch_for(net)
    for loss in (TRADES(LINF, beta=3.0, steps=2), MART(LINF, lam=3.0, steps=2)):
        x_adv = loss.examples(net, x, y, generator(), 1.0)
        assert LINF.allows(x_adv, x).all()
        p, q = net(x).softmax(1), net(x_adv).softmax(1)
        divergence = (p * (p / q).log()).sum(1)
        assert divergence.mean() > 1e-5
        p_y, q_y = (r[torch.arange(10), y] for r in (p, q))
        if isinstance(loss, TRADES):
            expected = -p_y.log() + 3 * divergence
        else:
            rival = q.scatter(1, y.unsqueeze(1), 0.0).amax(1)
            expected = -q_y.log() - (1 - rival).log() + 3 * divergence * (1 - p_y)
        assert torch.allclose(loss(net, x, y, generator()), expected.mean(), rtol=1e-5)


def test_mart_of_a_sure_and_wrong_model_stays_finite(score):
    net, x, y, _ = score
    with torch.no_grad():
        net.w.mul_(1e4)
    value = MART(Lp(math.inf, 0.3, **FREE), steps=1)(net, x, y, generator())
    value.backward()
    assert value.isfinite()
    assert net.w.grad.isfinite().all()


def test_the_divergence_that_trades_finds_is_that_of_a_strong_attack(score):
    net, x, y, _ = score
    threat = Lp(math.inf, 0.3, **FREE)
    x_adv = TRADES(threat).examples(net, x, y, generator(), 1.0)
    # Of a line of scores the farthest are the two ends; which of them has the greater divergence is for each example.
    reach = (x_adv - x) @ net.w
    assert torch.allclose(reach.abs(), 0.3 * net.w.abs().sum().expand(20), rtol=1e-5)


def smooth(seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def test_gradalign_has_no_penalty_for_a_linear_model_and_one_for_another(score):
    net, x, y, _ = score
    threat = Lp(math.inf, 0.3, **FREE)
    without, with_penalty = (GradAlign(threat, lam=lam)(net, x, y, generator()) for lam in (0.0, 5.0))
    assert torch.allclose(without, with_penalty)
    bent, y = smooth(), torch.arange(20) % 3
    x = 3 * x
    threat = Lp(math.inf, 2.0, **FREE)
    without, with_penalty = (GradAlign(threat, lam=lam)(bent, x, y, generator()).item() for lam in (0.0, 5.0))
    assert 0.01 < (with_penalty - without) / 5 < 2


def test_the_gradient_of_gradaligns_penalty_is_that_of_finite_differences():
    net, y = smooth(), torch.arange(20) % 3
    x = 3 * torch.randn(20, 6, generator=generator(1), dtype=torch.float64)
    losses = [GradAlign(Lp(math.inf, 1.0, **FREE), lam=lam) for lam in (1.0, 0.0)]

    def penalty():
        return losses[0](net, x, y, generator()) - losses[1](net, x, y, generator())

    w = net[0].weight
    (g,) = torch.autograd.grad(penalty(), w)
    for i, j in ((0, 0), (2, 3), (4, 5)):
        sides = []
        for step in (1e-5, -2e-5):
            with torch.no_grad():
                w[i, j] += step
            sides.append(penalty().item())
        with torch.no_grad():
            w[i, j] += 1e-5
        assert float(g[i, j]) == pytest.approx((sides[0] - sides[1]) / 2e-5, rel=1e-4, abs=1e-9)


def test_gradalign_leaves_out_examples_without_a_gradient():
    net = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 5))
    with torch.no_grad():
        net[0].bias.fill_(-100.0)
    x, y = batch_for(net)
    value = GradAlign(LINF, lam=7.0)(net, x, y, generator())
    value.backward()
    assert torch.allclose(value, F.cross_entropy(net(x), y))
    assert net[0].weight.grad.isfinite().all()


def test_free_training_moves_its_perturbation_with_the_gradient_of_the_step(score):
    net, x, y, _ = score
    threat = Lp(math.inf, 0.3, **FREE)
    loss = FreeTraining(threat)
    toward = -(2 * y - 1).unsqueeze(1) * net.w.detach().sign()
    first = loss(net, x, y, generator())
    assert torch.allclose(first, F.cross_entropy(net(x), y)), "it starts at x"
    loss(net, x, y, generator())
    first.backward()
    assert torch.allclose(loss.examples(net, x, y, generator(), 1.0), x + 0.3 * toward)
    # The next batch starts where this one ended, row by row: labels that are turned around take it back in two steps.
    turned = 1 - y[:5]
    loss(net, x[10:15], turned, generator()).backward()
    after = loss.examples(net, x, y, generator(), 1.0) - x
    assert torch.allclose(after[:5], torch.zeros(5, 6, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(after[5:], 0.3 * toward[5:])
    assert loss == FreeTraining(threat)
    assert repr(loss) == repr(FreeTraining(threat))


def test_free_training_keeps_the_range_and_the_radius():
    net, loss = dense(), FreeTraining(LINF)
    for seed in range(4):
        x, y = batch_for(net, 10 if seed < 2 else 14, seed)
        x_adv = loss.examples(net, x, y, generator(), 1.0)
        assert LINF.allows(x_adv, x).all()
        loss(net, x, y, generator()).backward()


# Adversarial weight perturbation.


class Watched(Adversarial):
    """The cross entropy, and a note of the weights that the model had: those of a linear layer are its answers to the unit
    inputs."""

    def __init__(self):
        self.seen = []

    def examples(self, model, x, y, rng, at):
        self.attacked = model
        return x

    def value(self, model, x, x_adv, y, rng, at):
        self.seen.append((model(torch.eye(12)) - model(torch.zeros(1, 12))).detach().T)
        self.drawn = torch.rand(3, generator=rng)
        return super().value(model, x, x_adv, y, rng, at)


def test_awp_moves_each_layer_by_gamma_of_its_norm_uphill():
    net = nn.Linear(12, 5)
    x, y = torch.rand(10, 12, generator=generator()), torch.arange(10) % 5
    loss = Watched()
    value = AWP(loss, gamma=0.03)(net, x, y, generator())
    weights, moved = loss.seen
    assert loss.attacked is net
    assert torch.allclose(weights, net.weight, atol=1e-6)
    v = moved - weights
    assert (v.norm() / net.weight.norm()).item() == pytest.approx(0.03, rel=1e-3)
    (g,) = torch.autograd.grad(F.cross_entropy(net(x), y), net.weight)
    assert F.cosine_similarity(v.flatten(), g.flatten(), dim=0) > 1 - 1e-5
    assert value > F.cross_entropy(net(x), y)
    # Offsets stay, and the gradient is of the parameters, taken at the moved weights.
    value.backward()
    there = copy.deepcopy(net)
    with torch.no_grad():
        there.weight.copy_(moved)
    there.zero_grad()
    F.cross_entropy(there(x), y).backward()
    assert torch.allclose(net.weight.grad, there.weight.grad, atol=1e-6)
    assert torch.allclose(net.bias.grad, there.bias.grad, atol=1e-6)


def test_awp_needs_weights_to_move():
    net = nn.BatchNorm1d(5)
    with pytest.raises(UsageError, match="awp: the model has no weights with two axes"):
        AWP(PGDTraining(LINF, 1))(net, torch.rand(10, 5, generator=generator()), torch.arange(10) % 5, generator())


def test_awp_draws_the_same_numbers_twice():
    loss, rng = Watched(), generator(5)
    AWP(loss)(nn.Linear(12, 5), *batch_for([nn.Linear(1, 1)]), rng)
    assert torch.equal(loss.drawn, torch.rand(3, generator=generator(5)))


@pytest.mark.parametrize("loss", [*QUICK["pgd"], *QUICK["trades"], *QUICK["gradalign"], *QUICK["mart"]], ids=repr)
@pytest.mark.parametrize("make", [dense, normed])
def test_awp_with_a_vanishing_gamma_is_the_wrapped_loss(loss, make):
    net = make().double()
    x, y = batch_for(net)
    value, g = gradients(loss, net, x.double(), y)
    moved, g_moved = gradients(AWP(loss, gamma=1e-12), net, x.double(), y)
    assert torch.allclose(value, moved)
    assert torch.allclose(g, g_moved, rtol=1e-6, atol=1e-10)


def test_awp_around_free_training_moves_the_perturbation_once():
    net = dense()
    x, y = batch_for(net)
    loss, plain = AWP(FreeTraining(LINF, 3), gamma=1e-6), FreeTraining(LINF)
    assert loss.replays == 3
    assert AWP(PGDTraining(LINF)).replays == 1
    loss(net, x, y, generator()).backward()
    plain(net, x, y, generator()).backward()
    once = LINF.allows(loss.examples(net, x, y, generator(), 1.0), x)
    assert once.all()
    assert torch.equal(loss.examples(net, x, y, generator(), 1.0), plain.examples(net, x, y, generator(), 1.0))


# Several threat models, several networks, several draws.


def test_training_against_several_threats_takes_the_worst_of_each_example_or_the_mean(score):
    net, x, y, margin = score
    threats = (Lp(math.inf, 0.1, **FREE), Lp(2.0, 0.3, **FREE))
    costs = torch.stack([0.1 * net.w.abs().sum(), 0.3 * net.w.norm()])
    worst = MultiTraining(threats, steps=30)(net, x, y, generator())
    assert torch.allclose(worst, F.softplus(costs.max() - margin).mean(), rtol=0.02)
    average = MultiTraining(threats, steps=30, rule="average")(net, x, y, generator())
    assert torch.allclose(average, F.softplus(costs.unsqueeze(1) - margin).mean(), rtol=0.02)
    assert average < worst


def test_the_worst_threat_is_chosen_for_each_example():
    net = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    x, y = torch.tensor([[0.05, 0.5], [0.5, 0.5]]), torch.tensor([0, 0])
    found = MultiTraining((LINF, Lp(1.0, 0.15)), 10).examples(net, x, y, generator(), 1.0)
    each = [PGDTraining(threat, 10).examples(net, x, y, generator(), 1.0) for threat in (LINF, Lp(1.0, 0.15))]
    values = torch.stack([F.cross_entropy(net(z), y, reduction="none") for z in each])
    assert torch.allclose(F.cross_entropy(net(found), y, reduction="none"), values.max(0).values, rtol=0.01)


def test_the_worst_of_more_draws_is_worse():
    net = normed()
    x, y = batch_for(net, 30)
    threat = Rotation(angle=90)
    few, many = (float(WorstOfK(threat, k).examples(net, x, y, generator(), 1.0).sub(x).abs().sum()) for k in (1, 30))
    assert few > 0
    losses = []
    for k in (1, 5, 30):
        x_adv = WorstOfK(threat, k).examples(net, x, y, generator(), 1.0)
        losses.append(F.cross_entropy(copy.deepcopy(net).eval()(x_adv), y, reduction="none"))
    assert (losses[0] <= losses[1]).all()
    assert (losses[1] <= losses[2]).all()
    assert losses[2].mean() > losses[0].mean()
    assert many > 0


def test_ensemble_training_draws_its_sources_and_does_not_see_the_labels(score):
    net, x, y, _ = score
    asked = Counter()

    def source(name, w):
        def model(z):
            asked[name] += 1
            s = z @ w
            return torch.stack([-s, s], 1)

        return model

    others = [source("a", net.w.detach()), source("b", -net.w.detach())]
    loss, rng = EnsembleTraining(Lp(math.inf, 0.2, **FREE), others), generator()
    for _ in range(60):
        loss.examples(net, x, y, rng, 1.0)
    assert 10 < asked["a"] < 30
    assert 10 < asked["b"] < 30
    x_adv = loss.examples(net, x, y, generator(1), 1.0)
    assert torch.equal(x_adv, loss.examples(net, x, 1 - y, generator(1), 1.0))
    # Half of the radius by the sign of noise, half by that of the gradient.
    steps = ((x_adv - x) / 0.2).abs()
    assert torch.allclose(steps, steps.round())
    assert 0.3 < float(steps.mean()) < 0.7
    pushed = others[0](x_adv)[:, 1] - others[0](x)[:, 1]
    assert ((pushed.sign() == -(x @ net.w).sign()) | (pushed.sign() == (x @ net.w).sign())).all()


def test_ensemble_training_is_not_copied_with_its_networks():
    net = nn.utils.parametrizations.weight_norm(nn.Linear(12, 5))
    loss = EnsembleTraining(LINF, (net,))
    assert copy.deepcopy(loss).models[0] is net


def test_ensemble_training_loads_its_networks_by_their_files(tmp_path):
    paths = []
    for seed in range(2):
        paths.append(str(tmp_path / f"{seed}.safetensors"))
        checkpoint.save(paths[-1], networks.build("mnist-mlp(width=4)", seed), "mnist-mlp(width=4)")
    text = f'ensemble(models="{paths[0]} + {paths[1]}")'
    loss = spec.parse(text, DEFENSES, "defense", {"threat": LINF})
    net = networks.build("mnist-mlp(width=4)", 5)
    x, y = torch.rand(4, 1, 28, 28, generator=generator()), torch.arange(4)
    for seed in range(6):
        assert LINF.allows(loss.examples(net, x, y, generator(seed), 1.0), x).all()
    with pytest.raises(UsageError, match="there is no file"):
        [EnsembleTraining(LINF, str(tmp_path / "no.safetensors"))(net, x, y, generator(seed)) for seed in range(20)]


# Ramps and settings.


@given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1), st.sampled_from([0.0, 1.0, 2.0, math.inf]))
def test_a_ramp_only_grows_and_ends_at_the_full_radius(ramp, a, b, p):
    threat = Lp(p, 4.0)
    first, second = (ramped(threat, ramp, at) for at in sorted((a, b)))
    assert 0 < first.eps <= second.eps <= 4
    assert ramped(threat, ramp, 1.0) == threat
    for at in (a, b):
        expected = 4 * min(1.0, max(at / ramp, 1e-3)) if ramp else 4.0
        assert ramped(threat, ramp, at).eps == pytest.approx(max(expected, 1.0 if p == 0 else 0.0))


RAMPED = [loss for loss in ADVERSARIAL if getattr(loss, "ramp", 0) and not isinstance(loss, FreeTraining)]


@pytest.mark.parametrize("loss", [loss for loss in RAMPED if loss.threat != Lp(0.0, 3)], ids=repr)
def test_a_ramp_reaches_the_adversary(loss):
    net = dense()
    x, y = batch_for(net)
    far = [(loss.examples(net, x, y, generator(), at).view(-1, *x.shape) - x).abs().sum() for at in (0.0, 0.25, 0.5, 1.0)]
    assert far[0] < far[1] < far[2] == far[3]


def test_a_step_shrinks_with_the_ramp(score):
    net, x, y, _ = score
    loss = PGDTraining(Lp(math.inf, 0.4, **FREE), steps=1, step=0.1, ramp=1.0)
    start = dataclasses.replace(loss, step=1e-9)
    for at in (0.5, 1.0):
        step = loss.examples(net, x, y, generator(), at) - start.examples(net, x, y, generator(), at)
        assert float(step.abs().max()) == pytest.approx(0.1 * at, rel=1e-4)


def test_a_change_has_no_radius_that_could_grow():
    with pytest.raises(UsageError, match="single radius"):
        ramped(Rotation(), 0.5, 0.1)
    with pytest.raises(UsageError, match="ramp needs one with a single radius"):
        PGDTraining(Rotation(), ramp=0.5)
    assert ramped(Rotation(), 0.0, 0.1) == Rotation()


@pytest.mark.parametrize("loss", [FGSMTraining, FastTraining, PGDTraining, TRADES, MART, WorstOfK])
def test_a_loss_trains_against_changes(loss):
    net = normed()
    x, y = batch_for(net)
    value = loss(Rotation(angle=20))(net, x, y, generator())
    value.backward()
    assert net[0].weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: PGDTraining(LINF, steps=0), "pgd: steps is 0"),
        (lambda: PGDTraining(LINF, ramp=1.5), "pgd: ramp is 1.5; it should be between 0 and 1"),
        (lambda: PGDTraining(LINF, smoothing=1.0), "pgd: smoothing is 1.0"),
        (lambda: PGDTraining(Lp(2.0)), "none was given"),
        (lambda: PGDTraining("linf"), "threat model is 'linf'"),
        (lambda: FGSMTraining(LINF, alpha=-0.1), "fgsm: alpha is -0.1"),
        (lambda: FGSMTraining(Lp(0.0, 3)), "FGSM does not serve l_0"),
        (lambda: FastTraining(LINF, alpha=0.0), "fast: alpha is 0.0"),
        (lambda: NFGSM(LINF, k=0.0), "n-fgsm: k is 0.0"),
        (lambda: NFGSM(Rotation()), "n-fgsm takes one with a single radius"),
        (lambda: GradAlign(LINF, lam=-1.0), "gradalign: lam is -1.0"),
        (lambda: GradAlign(Rotation()), "gradalign takes one with a single radius"),
        (lambda: FreeTraining(LINF, replays=0), "free: replays is 0"),
        (lambda: FreeTraining(Rotation()), "free takes one with a single radius"),
        (lambda: TRADES(LINF, beta=-1.0), "trades: beta is -1.0"),
        (lambda: TRADES(LINF, steps=0), "trades: steps is 0"),
        (lambda: TRADES(LINF, step=0.0), "trades: step is 0.0"),
        (lambda: MART(LINF, lam=math.nan), "mart: lam is nan"),
        (lambda: AWP(PGDTraining(LINF), gamma=0.0), "awp: gamma is 0.0"),
        (lambda: AWP(CrossEntropy()), "awp: loss is CrossEntropy"),
        (lambda: EnsembleTraining(LINF, ""), "ensemble: models is empty"),
        (lambda: EnsembleTraining(LINF, ()), "ensemble: models is empty"),
        (lambda: EnsembleTraining(LINF, " + "), "ensemble: models is empty"),
        (lambda: EnsembleTraining(LINF, (3,)), "ensemble: models has 3"),
        (lambda: EnsembleTraining(LINF, (still,), alpha=2.0), "ensemble: alpha is 2.0"),
        (lambda: MultiTraining(LINF), "two or more threat models"),
        (lambda: MultiTraining((LINF,)), "two or more threat models"),
        (lambda: MultiTraining((LINF, L2), rule="sum"), "unknown multi: rule 'sum'"),
        (lambda: WorstOfK(LINF, k=0), "worst-of-k: k is 0"),
    ],
)
def test_bad_settings(make, said):
    with pytest.raises(UsageError, match=said.replace("(", r"\(")):
        make()


@pytest.mark.parametrize(
    ("text", "loss"),
    [
        ("trades(beta=2)", TRADES(LINF, beta=2.0)),
        ("awp(trades(beta=2), gamma=0.005)", AWP(TRADES(LINF, beta=2.0), gamma=0.005)),
        ("n-fgsm(k=1)", NFGSM(LINF, k=1.0)),
        ("free(replays=4)", FreeTraining(LINF, 4)),
        ("worst-of-k(k=5)", WorstOfK(LINF, 5)),
        ('ensemble(models="a.safetensors")', EnsembleTraining(LINF, "a.safetensors")),
    ],
)
def test_losses_are_named_by_specs(text, loss):
    assert spec.parse(text, DEFENSES, "defense", {"threat": LINF}) == loss


# Training.

TOY = Lp(math.inf, 0.12)


def toy(n, seed):
    """Two classes by five entries: one that is far apart and wrong for an example in twelve, four that are close and right."""
    rng = generator(seed)
    y = torch.arange(n) % 2
    s = (2 * y - 1).float().unsqueeze(1)
    far = torch.where(torch.rand(n, 1, generator=rng) < 1 / 12, -s, s)
    x = torch.cat([0.5 + 0.3 * far, 0.5 + 0.08 * s.expand(n, 4)], 1)
    return (x + 0.02 * torch.randn(n, 5, generator=rng)).clamp(0, 1), y


def trained(loss, steps=60):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(5, 24), nn.ReLU(), nn.Linear(24, 2))
    x, y = toy(600, 0)
    loss, rng = copy.deepcopy(loss), generator()
    optimizer = torch.optim.Adam(net.parameters(), 0.03)
    for i in range(steps):
        rows = torch.randperm(600, generator=rng)[:64]
        optimizer.zero_grad()
        loss(net, x[rows], y[rows], rng, i / steps).backward()
        optimizer.step()
    return net


def withstood(net):
    x, y = toy(300, 1)
    return 1 - run(PGD(10), net, x, y, TOY).success.double().mean().item()


@pytest.fixture(scope="module")
def plain():
    net = trained(CrossEntropy())
    return net, withstood(net)


@pytest.mark.parametrize(
    "make",
    [
        lambda net: PGDTraining(TOY, 3),
        lambda net: PGDTraining(TOY, 3, ramp=0.3, smoothing=0.1),
        lambda net: FGSMTraining(TOY),
        lambda net: FastTraining(TOY),
        lambda net: NFGSM(TOY),
        lambda net: GradAlign(TOY),
        lambda net: FreeTraining(TOY),
        lambda net: TRADES(TOY, steps=3),
        lambda net: MART(TOY, steps=3),
        lambda net: AWP(PGDTraining(TOY, 3)),
        lambda net: EnsembleTraining(TOY, (net,)),
        lambda net: MultiTraining((TOY, Lp(2.0, 0.2)), 3),
        lambda net: WorstOfK(TOY, 10),
    ],
    ids=lambda make: repr(make(still))[:60],
)
def test_a_trained_network_withstands_more_than_plain_training(plain, make):
    net, before = plain
    assert withstood(trained(make(net))) > before + 0.2


# The page, and other people's loops.

PAGE = (Path(__file__).parents[1] / "docs/defenses.md").read_text(encoding="utf-8")
ROWS = re.findall(
    r"^\| `([\w-]+)` \| .*? \| ([^|]*) \| ([^|]*) \|$",
    PAGE.split("## The losses")[1].split("\nFor [certificates]")[0],
    re.MULTILINE,
)


def test_the_table_of_the_page_has_every_adversarial_loss_and_its_settings():
    assert [name for name, _, _ in ROWS] == [name for name, make in DEFENSES.items() if issubclass(make, Adversarial)]
    for name, _, said in ROWS:
        fields = [field for field in spec.settings(DEFENSES[name]) if field.name not in ("threat", "ramp", "smoothing")]
        default = ["" if f.default in (dataclasses.MISSING, None) else f"={f.default}" for f in fields]
        expected = [f.name + text for f, text in zip(fields, default, strict=True)]
        assert said.replace("`", "").replace('"', "").split(", ") == expected


def test_the_table_of_the_page_has_the_passes():
    net = dense()
    x, y = batch_for(net)
    for name, said, _ in ROWS:
        if name != "awp":
            threat = (LINF, L2) if name == "multi" else LINF
            # Its own source, that those of another network count as well.
            more = {"models": (net,)} if name == "ensemble" else {}
            forward, backward = map(int, said.removesuffix(" for two").split(" + "))
            assert passes(DEFENSES[name](threat, **more), net, x, y) == (forward, backward)


def block(name, stand_in, monkeypatch):
    """What the page's block for a library defines, run with a stand-in for that library."""
    monkeypatch.setitem(sys.modules, name, stand_in)
    found = re.findall(r"```python no-run\n(.*?)```", PAGE, re.DOTALL)
    space = {}
    exec(next(text for text in found if f"import {name}\n" in text), space)
    return space


def test_the_module_for_lightning(monkeypatch):
    module = block("lightning", SimpleNamespace(LightningModule=nn.Module), monkeypatch)["Robust"](normed())
    module.trainer = SimpleNamespace(global_step=3, estimated_stepping_batches=10)
    x, y = batch_for(normed())
    value = module.training_step((x, y), 0)
    expected = TRADES(Lp(math.inf, 8 / 255), ramp=0.2)(normed(), x, y, generator(), 0.3)
    assert torch.equal(value, expected)
    value.backward()
    assert len(module.configure_optimizers().param_groups[0]["params"]) == len(list(module.network.parameters()))


def test_the_trainer_of_transformers(monkeypatch):
    class Trainer:
        state = SimpleNamespace(global_step=3, max_steps=10)

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return "evaluated", return_outputs

    class Answers(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = normed()

        def forward(self, pixel_values):
            return SimpleNamespace(loss=None, logits=self.inner(pixel_values))

    trainer = block("transformers", SimpleNamespace(Trainer=Trainer), monkeypatch)["RobustTrainer"]()
    model = Answers()
    x, y = batch_for(normed())
    inputs = {"pixel_values": 2 * x - 1, "labels": y}
    value = trainer.compute_loss(model, inputs)
    loss = PGDTraining(Lp(math.inf, 16 / 255, low=-1, high=1))
    assert torch.equal(value, loss(normed(), 2 * x - 1, y, generator()))
    value.backward()
    assert trainer.compute_loss(model.eval(), inputs, return_outputs=True) == ("evaluated", True)


def test_black_pixels_do_not_all_end_at_the_ends_of_the_ball():
    # From a start inside the range, half of the pixels at 0 would end at exactly eps, and the rest at exactly 0.
    x = torch.zeros(50, 12)
    x_adv = FastTraining(Lp(math.inf, 0.3)).examples(dense(), x, torch.zeros(50, dtype=torch.long), generator(), 1.0)
    inner = ((x_adv > 0.01) & (x_adv < 0.29)).float().mean()
    assert 0.2 < inner < 0.5
    assert float(x_adv.min()) >= 0
    assert float(x_adv.max()) <= 0.3 + 1e-6
