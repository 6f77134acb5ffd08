"""Whether the statistics keep what they promise, on simulated models of which the truth is known.

    python -m advkit.benchmarks.coverage

A model has a distance for each example, which is normal, and is wrong from the start where that is not positive. Two
models' distances are correlated, so that they differ on as many examples as two networks that were trained apart, or as one
network that was attacked twice.
"""

from __future__ import annotations

import argparse

import numpy as np

from advkit.benchmarks.compare import WORSE, verdicts
from advkit.benchmarks.statistics import bootstrap, evidence, examples_needed, mcnemar, paired, rate, sequence

MEAN = 1.5
"""The mean distance, in deviations: 93 % are right from the start."""

RADII = (0.75, 1.5, 2.25)
"""Where 77 %, 50 % and 23 % are robust."""


def counts(rng: np.random.Generator, n: int, correlation: float) -> list[tuple[int, int]]:
    """How many examples a comparison of two equal models loses and gains: clean, at each radius, by distance.

    Arguments:
        rng: Where the examples come from.
        n: How many examples.
        correlation: Of the two models' distances, in [0, 1).
    """
    shared = rng.standard_normal(n)
    both = correlation**0.5 * shared + (1 - correlation) ** 0.5 * rng.standard_normal((2, n))
    base, head = np.maximum(MEAN + both, 0)
    right = [(base > eps, head > eps) for eps in (0.0, *RADII)]
    found = [(int((b & ~h).sum()), int((h & ~b).sum())) for b, h in right]
    return [*found, (int((head < base).sum()), int((head > base).sum()))]


def alarms(pairs: int, n: int, correlation: float, alpha: float = 0.05) -> tuple[int, int]:
    """How many of ``pairs`` comparisons of equal models say worse, and how many would if the p-values were not corrected."""
    rng = np.random.default_rng(0)
    found = [counts(rng, n, correlation) for _ in range(pairs)]
    single = sum(any(mcnemar(*line, one_sided=True) <= alpha for line in lines) for lines in found)
    return sum(WORSE in verdicts(lines, alpha) for lines in found), single


def power(pairs: int, n: int, gap: float, discordant: float, alpha: float = 0.05) -> int:
    """How many of ``pairs`` comparisons of one line show a true gap of two accuracies, with ``n`` examples each."""
    rng = np.random.default_rng(0)
    shares = [(discordant + gap) / 2, (discordant - gap) / 2, 1 - discordant]
    found = rng.multinomial(n, shares, size=pairs)
    return sum(mcnemar(int(lost), int(gained), one_sided=True) <= alpha for lost, gained, _ in found)


def stopping(runs: int, n: int, p: float, confidence: float = 0.95) -> tuple[int, int]:
    """How many of ``runs`` runs, looked at after each of ``n`` examples, have an interval without the true share p.

    Returns:
        For the intervals of ``sequence``, and for those of ``rate``, which are for one look.
    """
    from scipy.stats import binom

    of = np.arange(1, n + 1)
    total = np.cumsum(np.random.default_rng(0).random((runs, n)) < p, axis=1)
    tail = (1 - confidence) / 2
    once = (binom.cdf(total, of, p) < tail) | (binom.sf(total - 1, of, p) < tail)
    always = evidence(total, of, p) > -np.log(1 - confidence)
    return int(always.any(axis=1).sum()), int(once.any(axis=1).sum())


def covered(runs: int, n: int) -> dict[str, int]:
    """How many of ``runs`` intervals hold the true number, with ``n`` examples.

    Returns:
        Of the difference of two shares that differ by 3 points and on 10 % of the examples; of the mean of a distance whose
        logarithm is normal; of an area under a curve, as gates have it.
    """
    rng = np.random.default_rng(0)
    held = {"paired": 0, "bootstrap": 0, "area": 0}
    for _ in range(runs):
        lost, gained, _ = rng.multinomial(n, [0.065, 0.035, 0.9])
        distances = np.exp(0.8 * rng.standard_normal(n))
        areas = rng.beta(0.3, 0.9, n)
        found = {
            "paired": (paired(int(lost), int(gained), n), -0.03),
            "bootstrap": (bootstrap(distances, n=1000), float(np.exp(0.32))),
            "area": (bootstrap([*areas, 0.0, 1.0], n=1000), 0.25),
        }
        for name, (interval, truth) in found.items():
            held[name] += interval.low <= truth <= interval.high
    return held


def failing(n: int, p: float) -> float:
    """How often a gate fails that asks for exactly the true share p, with ``n`` examples."""
    from scipy.stats import binom

    return float(sum(binom.pmf(k, n, p) for k in range(n + 1) if rate(k, n).high < p))


def share(count: int, of: int) -> str:
    """A share with its interval, as text."""
    return str(rate(count, of))


def print_alarms(pairs: int, n: int) -> None:
    """Print how often comparisons of equal models say worse."""
    print(f"comparisons of five lines of equal models on {n:,} examples that say worse, of {pairs:,} [95 %]; alpha 5 %")
    for name, correlation in (("trained apart", 0.95), ("attacked twice", 0.999)):
        differ = sum(counts(np.random.default_rng(1), 100_000, correlation)[2]) / 1000
        said, single = (share(count, pairs) for count in alarms(pairs, n, correlation))
        print(f"  {name}, differing on {differ:.1f} % at the middle radius: {said}; uncorrected {single}")


def print_power(pairs: int, n: int) -> None:
    """Print how often a gap of 3 points is shown."""
    print(f"gaps of 3 points that one line shows, of {pairs:,} [95 %]; alpha 5 %, one-sided")
    for discordant in (0.05, 0.1, 0.2, 0.3):
        needed = examples_needed(0.45, 0.42, discordant=discordant, one_sided=True)
        found = power(pairs, needed, 0.03, discordant), power(pairs, n, 0.03, discordant)
        least = power(pairs, n, 0.03, discordant, alpha=0.01)
        at, more, fifth = (share(count, pairs) for count in (*found, least))
        print(f"  differing on {100 * discordant:.0f} %: with {needed:,} examples, which should be 80 %: {at}")
        print(f"    with {n:,}: {more}; as one of five lines, at the least: {fifth}")
    print(f"  each model on examples of its own: {examples_needed(0.45, 0.42, one_sided=True):,} examples each for 80 %")


def main() -> None:
    """Simulate and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=1000, help="how many pairs of models, or runs (default 1000)")
    parser.add_argument("--examples", type=int, default=2000, help="on how many examples (default 2000)")
    arguments = parser.parse_args()
    pairs, n = arguments.pairs, arguments.examples
    print_alarms(pairs, n)
    print_power(pairs, n)
    print(f"runs of {n:,} examples, looked at after each, that ever exclude the true share, of {pairs:,} [95 %]")
    for p in (0.5, 0.9, 0.99):
        always, once = (share(count, pairs) for count in stopping(pairs, n, p))
        print(f"  {100 * p:.0f} %: sequence {always}; rate {once}")
    print("the width of an interval of sequence over that of rate")
    for of in (100, 1000, 10_000):
        wide = [(found(of // 2, of), found(of * 9 // 10, of)) for found in (sequence, rate)]
        ratios = [(a.high - a.low) / (b.high - b.low) for a, b in zip(*wide, strict=True)]
        print(f"  {of:,} examples: {ratios[0]:.2f} at 50 %, {ratios[1]:.2f} at 90 %")
    print(f"intervals of 95 % that hold the truth, of {pairs:,} [95 %]")
    for of in (50, 200, 1000):
        print(f"  {of:,} examples: {'; '.join(f'{name} {share(held, pairs)}' for name, held in covered(pairs, of).items())}")
    print("gates that fail where the truth is exactly what they ask for")
    print(
        "  " + "; ".join(f"{100 * p:.0f} % on {of:,}: {100 * failing(of, p):.2f} %" for of in (200, 1000) for p in (0.45, 0.9))
    )


if __name__ == "__main__":
    main()
