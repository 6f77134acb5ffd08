"""What a sound hides, and changes that stay under it."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from advkit import run, spec
from advkit.attacks import FMN, PGD
from advkit.attacks.audio.imperceptible import Imperceptible
from advkit.errors import UsageError
from advkit.oracle import Goal
from advkit.sound import psychoacoustics
from advkit.sound.masking import Masking, bounds
from advkit.sound.psychoacoustics import HOP, WINDOW, above, bark, excess, psd, quiet, share_above, sound, spectrum, threshold
from advkit.sound.wav import quantised
from advkit.streams import Streams
from advkit.threat import THREATS, Level, Lp

RATE = 16_000
BIN = RATE / WINDOW


def tone(f, samples=8192, level=0.5):
    return level * torch.sin(2 * math.pi * f * torch.arange(samples, dtype=torch.float64) / RATE).unsqueeze(0)


def vowels(n=2, samples=12_000, seed=0, dtype=torch.float64):
    """Harmonics that swell and fade, over a little noise."""
    rng = torch.Generator().manual_seed(seed)
    t = torch.arange(samples, dtype=torch.float64) / RATE
    pitch = 100 + 80 * torch.rand(n, 1, generator=rng, dtype=torch.float64)
    tones = sum(torch.sin(2 * math.pi * k * pitch * t) / k for k in range(1, 20))
    noise = torch.randn(n, samples, generator=rng, dtype=torch.float64)
    return (0.1 * tones * torch.sin(9 * t) ** 2 + 1e-3 * noise).to(dtype)


def test_the_threshold_in_quiet_is_that_of_the_formula():
    """Terhardt's curve, as printed: 3.4 dB at 1 kHz, its least near 3.3 kHz, and steep at both ends; less 12 dB."""
    f = torch.tensor([100.0, 1000.0, 3300.0, 10_000.0])
    assert torch.allclose(quiet(f), torch.tensor([10.95, -8.63, -16.98, -1.42]), atol=0.05)
    f = torch.arange(100.0, 16_000.0, 10.0)
    assert 3200 < float(f[quiet(f).argmin()]) < 3500


def test_the_scale_is_that_of_critical_bands():
    """The edges of Zwicker's bands, in Hz."""
    edges = torch.tensor([100.0, 510.0, 1270.0, 2700.0, 6400.0, 15_500.0])
    assert torch.allclose(bark(edges), torch.tensor([1.0, 5.0, 10.0, 15.0, 20.0, 24.0]), atol=0.25)


@pytest.mark.parametrize("k", [32, 128, 500])
def test_a_tone_masks_by_two_slopes(k):
    """A tone on a bin has 96 dB, and with the two neighbours that a Hann window gives, at a quarter each, 1.76 dB more."""
    theta = threshold(tone(k * BIN), RATE).theta[0, 8]
    f = torch.arange(1, WINDOW // 2 + 1, dtype=torch.float64) * BIN
    dz = bark(f) - bark(f[k - 1])
    P = 96 + 10 * math.log10(1.5)
    slope = torch.where(dz > 0, -27 + 0.37 * (P - 40), 27.0)
    beside = P - 6.025 - 0.275 * bark(f[k - 1]) + slope * dz
    alone = quiet(f.clamp(min=float(f[bark(f) > 1][0])))
    expected = 10 * (10 ** (beside / 10) + 10 ** (alone / 10)).log10()
    assert torch.allclose(10 * theta[1:].log10(), expected, atol=1e-4)


def test_a_loud_tone_hides_its_neighbours_and_not_what_is_far():
    x = tone(1000.0)
    hidden = threshold(x, RATE)
    near, far = tone(1100.0, level=0.5 / 30), tone(200.0, level=0.5 / 30)
    middle = slice(6, 12)

    def loudest(delta):
        return float((psd(delta, hidden) / hidden.theta)[0, middle].amax())

    assert loudest(near) < 1 < loudest(far)
    assert loudest(tone(1100.0, level=0.5)) > 1


def test_the_loudest_bin_is_at_96_decibels_whatever_the_level():
    x = vowels()
    for scale in (1.0, 0.01):
        hidden = threshold(scale * x, RATE)
        p = psd(scale * x, hidden)
        assert torch.allclose(p.amax((1, 2)).log10(), torch.full((2,), 9.6, dtype=torch.float64))
        assert torch.allclose(hidden.theta, threshold(x, RATE).theta, rtol=1e-6)


def brute_force(level, z, alone):
    """The threshold of one frame, masker by masker."""
    peaks = [k for k in range(1, len(level) - 1) if level[k] > level[k - 1] and level[k] > level[k + 1]]
    P = {k: 10 * math.log10(sum(10 ** (level[j] / 10) for j in (k - 1, k, k + 1))) for k in peaks}
    P = {k: p for k, p in P.items() if p > alone[k]}
    maskers = {k: p for k, p in P.items() if all(p >= P[j] for j in P if abs(z[j] - z[k]) < 0.5)}
    theta = [10 ** (a / 10) for a in alone]
    for k, p in maskers.items():
        for j, at in enumerate(z):
            slope = -27 + 0.37 * max(p - 40, 0) if at > z[k] else 27
            theta[j] += 10 ** ((p - 6.025 - 0.275 * z[k] + slope * (at - z[k])) / 10)
    return torch.tensor(theta, dtype=torch.float64)


@pytest.mark.parametrize("rate", [8000, 44_100])
def test_the_threshold_is_that_of_each_masker_on_its_own(rate):
    x = vowels(1, 5000)
    p = psd(x, threshold(x, rate))[0]
    z, alone = (part.tolist() for part in psychoacoustics._scale(rate))
    theta = threshold(x, rate).theta[0]
    for frame in (2, 5):
        expected = brute_force((10 * p[frame].clamp(min=1e-20).log10()).tolist(), z, alone)
        assert torch.allclose(theta[frame], expected, rtol=1e-9)


@given(seed=st.integers(0, 999), bins=st.integers(1, 40))
@settings(max_examples=30, deadline=None)
def test_the_greatest_of_stretches(seed, bins):
    rng = torch.Generator().manual_seed(seed)
    values = torch.randn(3, bins, generator=rng)
    first = torch.stack([torch.randint(0, k + 1, (), generator=rng) for k in range(bins)])
    last = torch.stack([torch.randint(k, bins, (), generator=rng) for k in range(bins)])
    expected = torch.stack([values[:, a : b + 1].amax(1) for a, b in zip(first.tolist(), last.tolist(), strict=True)], 1)
    assert torch.equal(psychoacoustics._greatest(values, first, last), expected)


@given(samples=st.integers(1, 6000), seed=st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_frames_and_back(samples, seed):
    x = vowels(2, samples, seed)
    z = spectrum(x)
    assert z.shape == (2, -(-(samples + WINDOW - HOP) // HOP), WINDOW // 2 + 1)
    assert torch.allclose(sound(z, samples), x, atol=1e-12)


@given(seed=st.integers(0, 99), zeros=st.integers(1, 2000), level=st.sampled_from([1e-4, 1e-3, 1e-2]))
@settings(max_examples=5, deadline=None)
def test_measures_do_not_depend_on_the_batch(seed, zeros, level):
    x = vowels(2, 3000, seed)
    delta = level * torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=x.dtype)
    hidden = threshold(x, RATE)
    longer = [torch.nn.functional.pad(part, (0, zeros)) for part in (x, delta)]
    assert torch.allclose(share_above(sum(longer), longer[0], RATE), above(delta, hidden))
    assert torch.allclose(excess(longer[1], threshold(longer[0], RATE)), excess(delta, hidden))
    assert torch.allclose(excess(delta[1:], threshold(x[1:], RATE)), excess(delta, hidden)[1:])
    assert bool(((above(delta, hidden) > 0) == (excess(delta, hidden) > 0)).all())
    assert bool((above(2 * delta, hidden) >= above(delta, hidden)).all())
    assert torch.equal(share_above(x, x, RATE), torch.zeros(2))


def test_the_gradient_of_the_excess_is_that_of_finite_differences():
    x = vowels(1, 3000)
    rng = torch.Generator().manual_seed(0)
    delta, v = (torch.randn(x.shape, generator=rng, dtype=x.dtype) for _ in range(2))
    delta, hidden, h = (1e-3 * delta).requires_grad_(), threshold(x, RATE), 1e-8
    (g,) = torch.autograd.grad(excess(delta, hidden).sum(), delta)
    with torch.no_grad():
        slope = (excess(delta + h * v, hidden) - excess(delta - h * v, hidden)) / (2 * h)
    assert float((g * v).sum()) == pytest.approx(float(slope), rel=1e-4)
    (g,) = torch.autograd.grad(excess(torch.zeros_like(x).requires_grad_(), hidden).sum() + 0 * delta.sum(), delta)
    assert not g.any()


@pytest.mark.parametrize("rate", [8000, 11_025, 48_000])
def test_other_rates_have_thresholds(rate):
    hidden = threshold(vowels(2, 5000, dtype=torch.float32), rate)
    assert bool((hidden.theta > 0).all())
    assert bool(hidden.theta.isfinite().all())


@pytest.mark.parametrize(
    ("x", "rate", "said"),
    [
        (torch.ones(1, 100), 4000, "the rate is 4000; .* from 8000 to 48000"),
        (torch.zeros(2, 100), RATE, "2 of 2 waveforms are digital silence"),
        (torch.ones(1, 1, 100), RATE, r"shape \(1, 1, 100\)"),
    ],
)
def test_what_has_no_threshold_is_refused(x, rate, said):
    with pytest.raises(UsageError, match=said):
        threshold(x, rate)


def pieces(seed, dtype=torch.float32):
    """Sounds of which one begins in silence, one has a gap, and one ends early."""
    x = vowels(3, 6000, seed, dtype)
    x[0, :2500], x[1, 2000:4500], x[2, 4000:] = 0.0, 0.0, 0.0
    return x


@given(seed=st.integers(0, 99), db=st.sampled_from([-20.0, 0.0, 10.0]), signs=st.booleans())
@settings(max_examples=8, deadline=None)
def test_whatever_theta_is_the_change_is_under_the_threshold(seed, db, signs):
    x, change = pieces(seed), Masking(db)
    theta = change.ball.start(change.zero(x), Streams.seeded(seed, range(3)))
    theta = change.eps * theta.sign() if signs else theta
    y = change.apply(x, theta)
    hidden = threshold(x, RATE)
    assert float((psd(y - x, hidden) / hidden.theta).amax()) <= 10 ** (db / 10) * 1.002
    # And it is no timid one: the loudest bin is close to the bound.
    assert float((psd(y - x, hidden) / hidden.theta).amax()) >= 10 ** (db / 10) * 0.1
    assert not y[2, 4000:].any()
    assert bool(change.allows(y, x).all())


def test_the_change_is_proportional_to_theta_and_does_not_depend_on_the_batch():
    x, change = pieces(0, torch.float64), Masking(0)
    theta = change.ball.start(change.zero(x), Streams.seeded(0, range(3)))
    theta = theta.double()
    assert torch.equal(change.apply(x, change.zero(x)), x)
    y = change.apply(x, theta)
    assert torch.allclose(change.apply(x, 0.25 * theta) - x, 0.25 * (y - x), atol=1e-9)
    assert torch.allclose(change.apply(x[1:2], theta[1:2]), y[1:2], atol=1e-12)
    longer = torch.nn.functional.pad(x, (0, 3 * HOP))
    wide = torch.nn.functional.pad(theta, (0, 0, 0, 3))
    assert torch.allclose(change.apply(longer, wide)[:, : x.shape[1]], y, atol=1e-12)


def test_the_gradient_of_masking_is_that_of_finite_differences():
    """At a theta of signs, where frames are turned down and the whole is."""
    x, change = vowels(1, 1500), Masking(0)
    rng = torch.Generator().manual_seed(0)
    theta = change.zero(x)
    theta, v, w = (torch.randn(shape, generator=rng, dtype=x.dtype) for shape in (theta.shape, theta.shape, x.shape))
    theta, h = theta.clamp(-0.5, 0.5).requires_grad_(), 1e-7
    (g,) = torch.autograd.grad((change.apply(x, theta) * w).sum(), theta)
    with torch.no_grad():
        slope = ((change.apply(x, theta + h * v) - change.apply(x, theta - h * v)) * w).sum() / (2 * h)
    assert float((g * v).sum()) == pytest.approx(float(slope), rel=1e-4)


def test_what_is_lowered_is_lowered_only_beside_what_is_lower():
    A, safe = bounds(vowels(1), RATE)
    assert bool((safe <= A).all())
    assert bool((safe == A).any())


class Listener(nn.Module):
    """A random network that hears the spectrum of a sound, in one of three ways."""

    def __init__(self, seed=0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.first, self.second = nn.Linear(WINDOW // 2 + 1, 16), nn.Linear(16, 3)

    def forward(self, x):
        z = spectrum(x)
        seen = (1e-3 + z.real**2 + z.imag**2).log().mean(1)
        return self.second(torch.tanh(self.first(seen - seen.mean(1, keepdim=True))))


def heard(samples=8000, n=3):
    x = quantised(vowels(n, samples, dtype=torch.float32))
    model = Listener()
    return model, x, model(x).argmax(1)


def test_pgd_finds_what_cannot_be_heard():
    model, x, y = heard()
    result = run(PGD(10), model, x, (y + 1) % 3, Masking(0), goal=Goal(targeted=True))
    assert bool(result.success.all())
    assert float(share_above(result.x_adv, x, RATE).max()) < 1e-4
    quieter = run(PGD(5), model, x, (y + 1) % 3, Masking(-60), goal=Goal(targeted=True))
    assert not quieter.success.any()


def test_the_quietest_success_under_the_threshold_is_searched_for():
    model, x, y = heard()
    result = run(FMN(20), model, x, y, Masking(), goal=Goal())
    assert bool(result.success.all())
    assert float(result.distance.max()) < 0.5
    hidden = threshold(x, RATE)
    loudest = (psd(result.x_adv - x, hidden) / hidden.theta).amax((1, 2)).sqrt()
    assert bool((loudest <= result.distance * 1.002).all())


@pytest.mark.parametrize(("threat", "most"), [(Level(), 0.001), (Level(-20), 0.001)])
def test_the_imperceptible_attack_hides_its_success(threat, most):
    model, x, y = heard(16_000, 2)
    x = torch.nn.functional.pad(x, (0, 2000))
    attack = Imperceptible(steps=20, hiding=40)
    result = run(attack, model, x, (y + 1) % 3, threat, goal=Goal(targeted=True))
    z = quantised(result.x_adv)
    assert bool(result.success.all())
    assert torch.equal(model(z).argmax(1), (y + 1) % 3)
    assert float(share_above(z, x, RATE).max()) <= most
    assert int((result.forwards + result.backwards).max()) <= attack.cost + 1
    assert not z[:, -2000:].any()
    first = run(PGD(20), model, x, (y + 1) % 3, Level(-10), goal=Goal(targeted=True))
    assert float(share_above(quantised(first.x_adv), x, RATE).min()) > 0.3


def test_the_success_that_is_hidden_is_the_models_and_not_its_stand_ins():
    model, x, y = heard()
    stand_in = Listener()
    with torch.no_grad():
        stand_in.second.bias[0] += 3.0
    y = torch.where(y == 0, 1, 0)
    result = run(Imperceptible(steps=20, hiding=40), model, x, y, Level(), goal=Goal(targeted=True), fast=stand_in)
    assert bool(result.success.all())
    assert torch.equal(model(quantised(result.x_adv)).argmax(1), y)
    assert float(share_above(quantised(result.x_adv), x, RATE).max()) < 0.05


def test_the_imperceptible_attack_keeps_to_its_budget_and_leaves_what_is_done():
    model, x, y = heard()
    result = run(Imperceptible(steps=20, hiding=40), model, x, y, Level(), goal=Goal(targeted=True))
    assert torch.equal(result.distance, torch.zeros(3))
    result = run(Imperceptible(), model, x, (y + 1) % 3, Level(), goal=Goal(targeted=True), budget=40)
    assert int(result.forwards.max()) <= 40
    assert bool(result.success.all())


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Masking(math.nan), "db is nan"),
        (lambda: Masking(0, rate=4000), "rate is 4000; it should be from 8000 to 48000"),
        (lambda: Masking(0, low=1.0), "low less than high"),
        (lambda: Masking(0).zero(torch.zeros(1, 100)), "digital silence"),
        (lambda: Masking(0).zero(torch.ones(1, 3, 100)), "changes waveforms"),
        (lambda: run(Imperceptible(), *heard(3000), Lp(math.inf, 0.1, -1.0)), "imperceptible adds to a sound"),
        (lambda: Imperceptible(hiding=0), "imperceptible: hiding is 0"),
        (lambda: Imperceptible(lr2=0.0), "imperceptible: lr2 is 0.0"),
    ],
)
def test_settings_that_cannot_be_are_refused(make, said):
    with pytest.raises(UsageError, match=said):
        make()


def test_masking_has_a_spec():
    assert spec.parse("masking(0)", THREATS, "threat model") == Masking(0.0)
    assert spec.parse("masking", THREATS, "threat model").eps == math.inf
    change = Masking(-6, rate=8000)
    assert spec.parse(spec.show(change, THREATS), THREATS, "threat model") == change
    assert change.eps == pytest.approx(0.501, abs=1e-3)
