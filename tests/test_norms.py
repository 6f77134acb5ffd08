import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from advkit import norms
from advkit.errors import UsageError

PS = (0.0, 1.0, 2.0, math.inf)
vectors = hnp.arrays("float64", st.tuples(st.integers(1, 4), st.integers(1, 6)), elements=st.floats(-10, 10, width=32))
radii = st.floats(0.01, 20)


@pytest.mark.parametrize("p", PS)
@given(d=vectors, eps=radii)
@settings(max_examples=60, deadline=None)
def test_projection_is_feasible_and_idempotent(p, d, eps):
    d = torch.as_tensor(d)
    z = norms.project(d, p, eps)
    assert (norms.lp_norm(z, p) <= eps * (1 + 1e-9) + 1e-9).all()
    assert torch.allclose(norms.project(z, p, eps), z, atol=1e-9)


@pytest.mark.parametrize("p", [1.0, 2.0, math.inf])
@given(d=vectors, eps=radii, seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_projection_is_the_closest_point(p, d, eps, seed):
    """The angle between d - z and any feasible u - z is obtuse (the ball is convex)."""
    d = torch.as_tensor(d)
    z = norms.project(d, p, eps)
    rng = torch.Generator().manual_seed(seed)
    u = norms.project(10 * torch.randn(d.shape, generator=rng, dtype=d.dtype), p, eps)
    assert (((d - z) * (u - z)).sum(1) <= 1e-7).all()


@given(d=vectors, eps=radii, seed=st.integers(0, 99))
@settings(max_examples=100, deadline=None)
def test_the_l1_projection_with_room_is_the_closest_point_of_both(d, eps, seed):
    d = torch.as_tensor(d)
    rng = torch.Generator().manual_seed(seed)
    room = 4 * torch.rand(d.shape, generator=rng, dtype=d.dtype)
    z = norms.project_l1_box(d, eps, room)
    assert (norms.lp_norm(z, 1) <= eps * (1 + 1e-9)).all()
    assert (z.abs() <= room).all()
    # Bisection for theta is another way to the same point.
    low, high = torch.zeros(len(d), 1, dtype=d.dtype), torch.full((len(d), 1), 20.0, dtype=d.dtype)
    for _ in range(80):
        theta = (low + high) / 2
        over = torch.minimum((d.abs() - theta).clamp(min=0), room).sum(1, keepdim=True) > eps
        low, high = torch.where(over, theta, low), torch.where(over, high, theta)
    theta = torch.where(torch.minimum(d.abs(), room).sum(1, keepdim=True) > eps, high, 0.0)
    assert torch.allclose(z, d.sign() * torch.minimum((d.abs() - theta).clamp(min=0), room), atol=1e-7)


@given(d=vectors, eps=radii)
@settings(max_examples=60, deadline=None)
def test_with_room_for_all_the_l1_projection_is_that_of_the_ball(d, eps):
    d = torch.as_tensor(d)
    everywhere = torch.full_like(d, math.inf)
    assert torch.allclose(norms.project_l1_box(d, eps, everywhere), norms.project(d, 1, eps), atol=1e-9)


@given(d=vectors, eps=st.integers(1, 6))
@settings(max_examples=60, deadline=None)
def test_l0_projection_keeps_the_largest(d, eps):
    d = torch.as_tensor(d)
    z = norms.project(d, 0, float(eps))
    kept = d.abs().sort(1, descending=True).values[:, :eps].pow(2).sum(1)
    assert torch.allclose(z.pow(2).sum(1), kept)


@pytest.mark.parametrize("p", [1.0, 2.0, math.inf])
@given(g=vectors)
@settings(max_examples=60, deadline=None)
def test_steepest_attains_the_dual_norm(p, g):
    g = torch.as_tensor(g)
    v = norms.steepest(g, p)
    assert (norms.lp_norm(v, p) <= 1 + 1e-9).all()
    assert torch.allclose((g * v).sum(1), norms.lp_norm(g, norms.dual(p)), atol=1e-9)


def test_steepest_l1_shares_the_step_among_the_largest():
    v = norms.steepest(torch.tensor([[1.0, -5.0, 3.0, 0.5]]), 1, k=2)
    assert v.tolist() == [[0.0, -0.5, 0.5, 0.0]]


@pytest.mark.parametrize("p", PS)
def test_a_zero_gradient_has_no_direction(p):
    assert not norms.steepest(torch.zeros(2, 3), p).any()


@pytest.mark.parametrize("p", PS)
def test_radii_per_row(p):
    d = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(0))
    eps = torch.tensor([0.0, 1.0, math.inf])
    z = norms.project(d, p, eps)
    assert not z[0].any()
    assert torch.allclose(z[1:2], norms.project(d[1:2], p, 1.0))
    assert torch.equal(z[2], d[2])


def test_unknown_norm():
    with pytest.raises(UsageError, match="p is 3; the norms are 0, 1, 2 and inf"):
        norms.check_norm(3)
