"""How sure a rate, a mean or a difference is, and how many examples tell two models apart."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from advkit.errors import UsageError

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Rate:
    """A share of examples, with its interval.

    Attributes:
        count: How many.
        of: Of how many.
        low: The lower end of the interval.
        high: The upper end.
    """

    count: int
    of: int
    low: float
    high: float

    @property
    def value(self) -> float:
        """The share, count / of; NaN where there are no examples."""
        return self.count / self.of if self.of else float("nan")

    def to_json(self) -> dict[str, Any]:
        """The share, its interval and the counts, as they are written to a file; the share is null where it is of nothing."""
        ends = {"low": self.low, "high": self.high, "count": self.count, "of": self.of}
        return {"value": self.value if self.of else None, **ends}

    def __float__(self) -> float:
        return self.value

    def __str__(self) -> str:
        return f"{100 * self.value:.2f} % [{100 * self.low:.2f}, {100 * self.high:.2f}]" if self.of else "-"


@dataclass(frozen=True)
class Estimate:
    """A number that is no share of examples, with its interval.

    Attributes:
        value: The number.
        low: The lower end of the interval.
        high: The upper end.
    """

    value: float
    low: float
    high: float

    def __float__(self) -> float:
        return self.value

    def __str__(self) -> str:
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}]"


def rate(count: int, of: int, confidence: float = 0.95) -> Rate:
    """A share with its exact interval (Clopper and Pearson, 1934, https://doi.org/10.1093/biomet/26.4.404).

    Arguments:
        count: How many of the examples have the property.
        of: How many examples there are; where there are none, the interval is [0, 1].
        confidence: How often such an interval holds the true share, at least.

    Raises:
        UsageError: The numbers are not 0 <= count <= of and 0 < confidence < 1.

    >>> print(rate(0, 10))
    0.00 % [0.00, 30.85]
    """
    from scipy.stats import beta

    if not 0 <= count <= of or not 0 < confidence < 1:
        raise UsageError(f"a rate of {count} in {of} at confidence {confidence} does not exist")
    tail = (1 - confidence) / 2
    low = float(beta.ppf(tail, count, of - count + 1)) if count else 0.0
    high = float(beta.ppf(1 - tail, count + 1, of - count)) if count < of else 1.0
    return Rate(count, of, low, high)


def sequence(count: int, of: int, confidence: float = 0.95) -> Rate:
    """A share with an interval that holds however often one looks, and whatever one saw when one stopped.

    The interval is {p : M(p) < 1 / alpha}, where alpha = 1 - confidence and M(p) = B(count + 1, of - count + 1) /
    (p^count (1 - p)^(of - count)), the likelihood ratio of a uniform mixture of all shares to p. At the true p it is a
    martingale that starts at 1, so it ever reaches 1 / alpha with a probability of at most alpha, by Ville's inequality
    (H. Robbins, 1970, "Statistical methods related to the law of the iterated logarithm",
    https://doi.org/10.1214/aoms/1177696786). The examples have to come in random order.

    Arguments:
        count: How many of the examples so far have the property.
        of: How many examples there are so far.
        confidence: How often all intervals, one after each example, hold the true share together, at least.

    Raises:
        UsageError: The numbers are not 0 <= count <= of and 0 < confidence < 1.

    >>> print(sequence(50, 100))
    50.00 % [34.46, 65.54]
    """
    return Rate(count, of, *anytime(count, of, confidence))


def anytime(total: float, of: int, confidence: float = 0.95) -> tuple[float, float]:
    """The interval of :func:`sequence` for the mean of numbers in [0, 1] that sum to ``total``.

    The ratio of :func:`sequence` is convex in each number, so its mean is no greater than for numbers that are only 0 and 1 and
    have the same mean: the interval holds for them too, and is wider than it need be.

    Raises:
        UsageError: The numbers are not 0 <= total <= of and 0 < confidence < 1.

    >>> low, high = anytime(0, 10)
    >>> low, round(high, 4)
    (0.0, 0.4169)
    """
    from scipy.optimize import bisect

    if not 0 <= total <= of or not 0 < confidence < 1:
        raise UsageError(f"a rate of {total} in {of} at confidence {confidence} does not exist")
    most, share = -math.log1p(-confidence), total / of if of else 0.5

    def over(p: float) -> float:
        return float(evidence(total, of, p)) - most

    low = bisect(over, 0.0, share, xtol=1e-13) if over(0.0) > 0 else 0.0
    high = bisect(over, share, 1.0, xtol=1e-13) if over(1.0) > 0 else 1.0
    return min(low, share), max(high, share)


def evidence(total: float | np.ndarray, of: int | np.ndarray, p: float) -> np.ndarray:
    """The logarithm of M(p) of :func:`sequence`: how much the examples speak against the share p.

    >>> round(float(evidence(90, 100, 0.5)), 2)
    34.22
    """
    from scipy.special import betaln, xlog1py, xlogy

    return betaln(total + 1, of - total + 1) - xlogy(total, p) - xlog1py(of - total, -p)


def mcnemar(lost: int, gained: int, *, one_sided: bool = False) -> float:
    """The exact p-value of McNemar's test, that a loss is as likely as a gain.

    Only the examples on which two models differ count (Q. McNemar, 1947, "Note on the sampling error of the difference between
    correlated proportions or percentages", https://doi.org/10.1007/BF02295996). On pairs of numbers it is the sign test.

    Arguments:
        lost: How many examples only the first model gets right.
        gained: How many only the second gets right.
        one_sided: Count only losses as evidence.

    Raises:
        UsageError: A count is less than 0.

    >>> mcnemar(8, 2), mcnemar(8, 2, one_sided=True), mcnemar(0, 0)
    (0.109375, 0.0546875, 1.0)
    """
    from scipy.stats import binom

    if min(lost, gained) < 0:
        raise UsageError(f"{lost} lost and {gained} gained examples do not exist; counts should be at least 0")
    most = lost if one_sided else max(lost, gained)
    p = float(binom.sf(most - 1, lost + gained, 0.5))
    return p if one_sided else min(1.0, 2 * p)


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values corrected for their number.

    To call significant those up to alpha is wrong about any of them with a probability of at most alpha (S. Holm, 1979, "A
    simple sequentially rejective multiple test procedure", https://www.jstor.org/stable/4615733).

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    corrected, least = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        least = max(least, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = least
    return corrected


def paired(lost: int, gained: int, of: int, confidence: float = 0.95) -> Estimate:
    """The difference of two shares over the same examples, with its interval.

    Half an example is added to each of the four kinds of pairs (A. Agresti and Y. Min, 2005, "Simple improved
    confidence intervals for comparing matched proportions", https://doi.org/10.1002/sim.1781).

    Arguments:
        lost: How many examples only the first model gets right.
        gained: How many only the second gets right.
        of: How many examples there are.
        confidence: How often such an interval holds the true difference, nearly.

    Raises:
        UsageError: The counts are less than 0 or more than the examples, of which there should be at least one, or the
            confidence is not between 0 and 1.

    >>> print(paired(40, 10, 1000))
    -0.03 [-0.04379, -0.01609]
    """
    from scipy.stats import norm

    if min(lost, gained) < 0 or lost + gained > of or of < 1 or not 0 < confidence < 1:
        raise UsageError(f"{lost} lost and {gained} gained of {of} examples at confidence {confidence} do not exist")
    n, b, c = of + 2, lost + 0.5, gained + 0.5
    half = float(norm.isf((1 - confidence) / 2)) * math.sqrt(b + c - (c - b) ** 2 / n) / n
    middle = (c - b) / n
    return Estimate((gained - lost) / of, max(-1.0, middle - half), min(1.0, middle + half))


def student(numbers: Sequence[float], confidence: float = 0.95) -> Estimate:
    """The mean of a few numbers, one a seed, with Student's interval; it is infinite for a single number.

    Arguments:
        numbers: The numbers, at least one.
        confidence: How often such an interval holds the true mean, where the numbers are normal.

    Raises:
        UsageError: There are no numbers.

    >>> print(student([1.0, 2.0, 3.0]))
    2 [-0.4841, 4.484]
    """
    from scipy.special import stdtrit

    if not numbers:
        raise UsageError("there are no numbers to take a mean of; give at least one")
    n, mean = len(numbers), sum(numbers) / len(numbers)
    if n == 1:
        return Estimate(mean, -math.inf, math.inf)
    error = math.sqrt(sum((number - mean) ** 2 for number in numbers) / (n - 1) / n)
    half = float(stdtrit(n - 1, 0.5 + confidence / 2)) * error
    return Estimate(mean, mean - half, mean + half)


def bootstrap(numbers: Sequence[float] | np.ndarray, confidence: float = 0.95, seed: int = 0, n: int = 10_000) -> Estimate:
    """The mean of numbers, one an example, with the interval of the bootstrap, corrected for bias and skew.

    The examples are drawn again, with replacement, ``n`` times (BC_a of B. Efron, 1987, "Better bootstrap confidence
    intervals", https://doi.org/10.1080/01621459.1987.10478410). It is right for many examples and too narrow for a few dozen:
    numbers that are all the same have an interval of width 0.

    Arguments:
        numbers: Shape (N,), finite: differences of two models on the same examples, or numbers of one. Distances that may be
            inf have to be clipped first.
        confidence: How often such an interval holds the true mean, nearly.
        seed: Of the draws.
        n: How many draws.

    Raises:
        UsageError: There are no numbers, one is not finite, or the confidence is not between 0 and 1.

    >>> print(bootstrap([0.1, 0.3, 0.2, 0.6, 0.1, 0.4]))
    0.2833 [0.1667, 0.4667]
    """
    import numpy as np
    from scipy.stats import norm

    values = np.asarray(numbers, dtype=float)
    if values.ndim != 1 or not len(values) or not np.isfinite(values).all() or not 0 < confidence < 1:
        raise UsageError("a bootstrap needs a list of finite numbers, at least one, and a confidence between 0 and 1")
    mean, rng = float(values.mean()), np.random.default_rng(seed)
    off = values - mean
    if np.allclose(off, 0, atol=1e-12 * abs(mean)):
        return Estimate(mean, mean, mean)
    means = np.array([values[rng.integers(0, len(values), len(values))].mean() for _ in range(n)])
    below = ((means < mean).mean() + (means <= mean).mean()) / 2
    bias, skew = norm.ppf(np.clip(below, 1 / n, 1 - 1 / n)), (off**3).sum() / (6 * (off**2).sum() ** 1.5)
    z = bias + norm.ppf([(1 - confidence) / 2, (1 + confidence) / 2])
    low, high = np.quantile(means, norm.cdf(bias + z / (1 - skew * z)))
    return Estimate(mean, min(float(low), mean), max(float(high), mean))


def examples_needed(
    p: float, q: float, *, discordant: float | None = None, alpha: float = 0.05, power: float = 0.8, one_sided: bool = False
) -> int:
    """How many examples it takes to tell two accuracies apart.

    On the same examples for both models, by McNemar's test (R. J. Connor, 1987, "Sample size for testing differences in
    proportions for the paired-sample design", https://doi.org/10.2307/2531961); on examples of their own, so many for each.
    Both with the correction for exact tests (J. T. Casagrande, M. C. Pike and P. G. Smith, 1978, "An improved approximate
    formula for calculating sample sizes for comparing two binomial distributions", https://doi.org/10.2307/2530613).

    Arguments:
        p: The accuracy of one model.
        q: That of the other.
        discordant: The share of examples that exactly one of them gets right; by default, each has examples of its own.
        alpha: How often the test may call a difference that is not there.
        power: How often it should find this one.
        one_sided: Whether the test is for one direction.

    Raises:
        UsageError: The accuracies are equal or not in [0, 1], no two models with them differ on such a share, or alpha and
            power are not between 0 and 1.

    >>> examples_needed(0.45, 0.42, discordant=0.1), examples_needed(0.45, 0.42)
    (936, 4353)
    """
    from scipy.stats import norm

    if not 0 <= min(p, q) < max(p, q) <= 1 or not 0 < alpha < 1 or not 0 < power < 1:
        raise UsageError(
            f"to tell {p} from {q} at alpha {alpha} with power {power} needs two different shares, and both in (0, 1)"
        )
    gap, error = abs(p - q), float(norm.isf(alpha if one_sided else alpha / 2))
    if discordant is None:
        middle = (p + q) / 2
        null, true = 2 * middle * (1 - middle), p * (1 - p) + q * (1 - q)
    else:
        # Shares that come from counts may miss the bounds by a rounding.
        if not gap - 1e-9 <= discordant <= min(p + q, 2 - p - q) + 1e-9:
            raise UsageError(f"accuracies {p} and {q} cannot differ on a share {discordant} of the examples")
        null, true = discordant, max(0.0, discordant - gap**2)
    # The test's statistic is gap * n - 1, with the correction, and its deviation grows with the root of n.
    deviation = error * math.sqrt(null) + float(norm.ppf(power)) * math.sqrt(true)
    return math.ceil(((deviation + math.sqrt(deviation**2 + 4 * gap)) / (2 * gap)) ** 2)
