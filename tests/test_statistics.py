"""Intervals and tests: against scipy, against definitions, and by simulation."""

import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from advkit.benchmarks import coverage
from advkit.benchmarks.statistics import (
    Estimate,
    anytime,
    bootstrap,
    evidence,
    examples_needed,
    holm,
    mcnemar,
    paired,
    rate,
    sequence,
)
from advkit.errors import UsageError

COUNTS = st.integers(1, 300).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))


@settings(deadline=None)
@given(COUNTS, st.sampled_from([0.9, 0.95, 0.99]))
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
    assert (sequence(0, 0).low, sequence(0, 0).high) == (0.0, 1.0)


@pytest.mark.parametrize("interval", [rate, sequence])
@pytest.mark.parametrize("given", [(-1, 2), (3, 2), (1, 2, 1.0)])
def test_what_is_no_rate(interval, given):
    with pytest.raises(UsageError, match="does not exist"):
        interval(*given)


def log_ratio(count, of, p):
    """The logarithm of the uniform mixture's likelihood over that of p, from factorials."""
    mixture = -math.log(of + 1) - math.log(math.comb(of, count))
    likelihood = (count * math.log(p) if count else 0.0) + ((of - count) * math.log1p(-p) if of > count else 0.0)
    return mixture - likelihood


@settings(deadline=None)
@given(COUNTS, st.sampled_from([0.8, 0.95, 0.99]))
def test_the_sequence_is_the_set_of_shares_with_little_evidence_against_them(pair, confidence):
    count, of = pair
    got, most = sequence(count, of, confidence), math.log(1 / (1 - confidence))
    assert got.low <= got.value <= got.high
    for end, outward in ((got.low, -1e-9), (got.high, 1e-9)):
        if 0 < end < 1:
            assert log_ratio(count, of, end - outward) <= most + 1e-9
            assert log_ratio(count, of, min(max(end + outward, 1e-300), 1 - 1e-16)) >= most - 1e-9
            assert float(evidence(count, of, end)) == pytest.approx(log_ratio(count, of, end), abs=1e-8)
    assert (got.low == 0) == (count == 0)
    assert (got.high == 1) == (count == of)


@pytest.mark.parametrize(("count", "of"), [(50, 100), (90, 100), (5000, 10_000), (0, 100)])
def test_a_sequence_is_wider_than_one_look_but_not_by_much(count, of):
    many, one = sequence(count, of), rate(count, of)
    assert many.low <= one.low
    assert many.high >= one.high
    assert many.high - many.low < 2.1 * (one.high - one.low)


def test_a_sequence_holds_at_every_look_and_one_look_does_not():
    always, once = coverage.stopping(300, 400, 0.9)
    assert always <= 300 * 0.05
    assert once > 300 * 0.15


def test_numbers_between_0_and_1_have_the_interval_of_their_sum():
    assert anytime(30.0, 100) == (sequence(30, 100).low, sequence(30, 100).high)
    rng = np.random.default_rng(0)
    of = np.arange(1, 301)
    total = np.cumsum(rng.beta(0.2, 0.6, (300, 300)), axis=1)
    assert (evidence(total, of, 0.25) > math.log(20)).any(axis=1).mean() <= 0.05


@settings(deadline=None)
@given(st.integers(0, 200), st.integers(0, 200))
def test_mcnemar_is_the_binomial_test(lost, gained):
    both = binomtest(lost, lost + gained).pvalue if lost + gained else 1.0
    one = binomtest(lost, lost + gained, alternative="greater").pvalue if lost + gained else 1.0
    assert mcnemar(lost, gained) == pytest.approx(both)
    assert mcnemar(lost, gained, one_sided=True) == pytest.approx(one)


@settings(deadline=None)
@given(st.lists(st.floats(0, 1), max_size=8), st.sampled_from([0.01, 0.05, 0.3]))
def test_holm_rejects_step_by_step(p_values, alpha):
    rejected = set()
    for rank, i in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        if (len(p_values) - rank) * p_values[i] > alpha:
            break
        rejected.add(i)
    assert {i for i, p in enumerate(holm(p_values)) if p <= alpha} == rejected


@settings(deadline=None)
@given(st.integers(0, 60), st.integers(0, 60), st.integers(1, 400))
def test_the_difference_is_in_its_interval(lost, gained, more):
    of = lost + gained + more
    got, mirrored = paired(lost, gained, of), paired(gained, lost, of)
    assert got.value == (gained - lost) / of
    assert -1 <= got.low <= got.value <= got.high <= 1
    assert (mirrored.low, mirrored.high) == pytest.approx((-got.high, -got.low))


def test_intervals_hold_the_truth():
    held = coverage.covered(80, 100)
    assert all(count >= 0.87 * 80 for count in held.values())
    assert held["bootstrap"] < 80


def test_the_bootstrap_is_that_of_scipy():
    numbers = np.exp(np.random.default_rng(1).standard_normal(80))
    got = bootstrap(numbers)
    with np.errstate(all="ignore"):
        expected = scipy.stats.bootstrap((numbers,), np.mean, n_resamples=10_000, method="BCa").confidence_interval
    assert got.value == pytest.approx(numbers.mean())
    assert (got.low, got.high) == pytest.approx((expected.low, expected.high), rel=0.02)
    assert bootstrap(numbers) == got
    assert bootstrap(numbers, seed=1) != got


def test_the_same_numbers_have_no_width():
    assert bootstrap([0.1] * 7) == Estimate(pytest.approx(0.1), pytest.approx(0.1), pytest.approx(0.1))


@pytest.mark.parametrize("numbers", [[], [math.inf, 1.0], [[1.0, 2.0]]])
def test_what_has_no_bootstrap(numbers):
    with pytest.raises(UsageError, match="finite numbers"):
        bootstrap(numbers)


@pytest.mark.parametrize("discordant", [0.05, 0.2])
def test_so_many_examples_show_the_gap(discordant):
    needed = examples_needed(0.45, 0.42, discordant=discordant, one_sided=True)
    assert 0.76 * 1000 <= coverage.power(1000, needed, 0.03, discordant) <= 0.87 * 1000
    assert coverage.power(1000, needed // 2, 0.03, discordant) < 0.65 * 1000


def test_fewer_examples_are_needed_where_models_agree_more():
    few, more, most = (examples_needed(0.45, 0.42, discordant=d) for d in (0.05, 0.3, None))
    assert few < more < most
    assert examples_needed(0.45, 0.42, one_sided=True) < most < examples_needed(0.45, 0.42, power=0.9)


def test_unpaired_examples_are_those_of_the_exact_test():
    needed = examples_needed(0.9, 0.6)
    rng = np.random.default_rng(0)
    found = [
        scipy.stats.fisher_exact([[a, needed - a], [b, needed - b]])[1] for a, b in rng.binomial(needed, [0.9, 0.6], (300, 2))
    ]
    assert 0.72 < np.mean(np.array(found) <= 0.05) < 0.88


@pytest.mark.parametrize(
    ("p", "q", "more"), [(0.5, 0.5, {}), (0.5, 1.2, {}), (0.5, 0.4, {"discordant": 0.05}), (0.5, 0.4, {"power": 1})]
)
def test_what_no_number_of_examples_tells(p, q, more):
    with pytest.raises(UsageError, match=r"two different shares|cannot differ"):
        examples_needed(p, q, **more)


@pytest.mark.parametrize("call", [lambda: mcnemar(-1, 2), lambda: paired(3, 3, 5), lambda: paired(0, 0, 0)])
def test_counts_that_do_not_exist(call):
    with pytest.raises(UsageError, match="exist"):
        call()
