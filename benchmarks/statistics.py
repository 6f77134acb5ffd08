"""How sure a rate is."""

from __future__ import annotations

from dataclasses import dataclass

from advkit.errors import UsageError


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

    def __float__(self) -> float:
        return self.value

    def __str__(self) -> str:
        return f"{100 * self.value:.2f} % [{100 * self.low:.2f}, {100 * self.high:.2f}]" if self.of else "-"


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
