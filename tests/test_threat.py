import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from advkit.errors import UsageError
from advkit.streams import Streams
from advkit.threat import Lp

PS = (0.0, 1.0, 2.0, math.inf)
RANGES = [(0.0, 1.0), (-1.0, 1.0), (0.0, 255.0), (-math.inf, math.inf), (-2.1179, 2.64)]


def _pair(low, high, seed, dtype):
    rng = torch.Generator().manual_seed(seed)
    a, b = (low, high - low) if math.isfinite(low) else (-5.0, 10.0)
    x = (a + b * torch.rand(5, 2, 7, generator=rng, dtype=dtype)).clamp(low, high)
    return x, x + b * torch.randn(x.shape, generator=rng, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("low", "high"), RANGES)
@pytest.mark.parametrize("p", PS)
@given(seed=st.integers(0, 1000), share=st.floats(0.01, 1.0))
@settings(max_examples=25, deadline=None)
def test_a_projection_is_allowed_and_idempotent(p, low, high, dtype, seed, share):
    width = high - low if math.isfinite(high) else 10.0
    threat = Lp(p, max(1.0, 14 * share) if p == 0 else share * width, low, high)
    x, z = _pair(low, high, seed, dtype)
    projected = threat.project(z, x)
    assert threat.allows(projected, x).all()
    assert torch.allclose(threat.project(projected, x), projected, atol=1e-5 * width)


@pytest.mark.parametrize("p", PS)
def test_what_is_not_allowed(p):
    threat, x = Lp(p, 2.0, 0.0, 1.0), torch.full((1, 9), 0.5)
    outside = x.clone()
    outside[0, 0] = 1.01
    assert not threat.allows(outside, x)
    far = 1 - x if p == 0 else x + 0.5
    far[:, :] = 1.0
    assert bool(Lp(p, 1e-3 if p else 8.0, 0.0, 1.0).allows(far, x)) is False
    assert not threat.allows(torch.full_like(x, math.nan), x)


@pytest.mark.parametrize("p", PS)
@pytest.mark.parametrize(("low", "high"), RANGES[:3])
def test_starts_are_allowed_and_random(p, low, high):
    threat = Lp(p, 3.0 if p == 0 else 0.1 * (high - low), low, high)
    x, _ = _pair(low, high, 0, torch.float32)
    rng = Streams.seeded(0, range(5))
    a, b = threat.start(x, rng), threat.start(x, rng)
    assert threat.allows(a, x).all()
    assert not torch.equal(a, b)
    anywhere = Lp(p, low=low, high=high).start(x, rng)
    assert ((anywhere >= low) & (anywhere <= high)).all()


@pytest.mark.parametrize("p", [1.0, 2.0])
def test_uniform_in_the_ball_has_the_right_radius(p):
    """In d dimensions ||u||^d is uniform in [0, 1]."""
    x = torch.zeros(4000, 3, dtype=torch.float64)
    d = Lp(p, 1.0, -math.inf, math.inf).start(x, Streams.seeded(0, range(4000)))
    share = torch.linalg.vector_norm(d, p, dim=1) ** 3
    assert abs(float(share.mean()) - 0.5) < 0.02
    assert abs(float(d.mean())) < 0.02


@pytest.mark.parametrize("p", PS)
@pytest.mark.parametrize("outward", [False, True])
def test_snapped_inputs_are_on_the_grid_and_allowed(p, outward):
    rng = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (20, 30), generator=rng) / 255
    threat = Lp(p, {0.0: 9.0, 1.0: 2.0, 2.0: 0.5, math.inf: 8 / 255}[p])
    x_adv = threat.project(x + 0.3 * torch.randn(x.shape, generator=rng), x)
    z = threat.snap(x_adv, x, 255, outward)
    assert threat.allows(z, x).all()
    assert torch.equal(z, (z * 255).round() / 255)
    assert float((z - x_adv).abs().max()) <= 1.001 / 255
    untouched = x_adv == x
    assert torch.equal(z[untouched], x[untouched])


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ((3.0,), "the norms are"),
        ((2.0, 0.0), "eps is 0.0"),
        ((2.0, math.nan), "eps is nan"),
        ((2.0, 1.0, 1.0, 0.0), "is empty"),
    ],
)
def test_bad_settings(settings, sentence):
    with pytest.raises(UsageError, match=sentence):
        Lp(*settings)


def test_a_random_start_needs_a_finite_range():
    with pytest.raises(UsageError, match="needs a finite range"):
        Lp(2.0, low=-math.inf, high=math.inf).start(torch.zeros(1, 2), Streams.seeded(0, [0]))
