import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from advkit.benchmarks.statistics import rate
from advkit.errors import UsageError


@given(st.integers(1, 300).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), st.sampled_from([0.9, 0.95, 0.99]))
def test_the_interval_is_the_exact_one(pair, confidence):
    count, of = pair
    got = rate(count, of, confidence)
    expected = binomtest(count, of).proportion_ci(confidence, method="exact")
    assert (got.low, got.high) == pytest.approx((expected.low, expected.high))
    assert got.low <= got.value <= got.high


def test_no_examples():
    nothing = rate(0, 0)
    assert (nothing.low, nothing.high) == (0.0, 1.0)
    assert nothing.value != nothing.value
    assert str(nothing) == "-"


@pytest.mark.parametrize("given", [(-1, 2), (3, 2), (1, 2, 1.0)])
def test_what_is_no_rate(given):
    with pytest.raises(UsageError, match="does not exist"):
        rate(*given)
