"""What every source of data is loaded into, and the checks that all of them share."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral

import torch
from torch import Tensor

from advkit import spec
from advkit.errors import UsageError

KINDS = {"image": "(N, C, H, W)", "waveform": "(N, T) or (N, 1, T) in [-1, 1]", "features": "anything else"}
"""The kinds of data, and the shapes of their inputs."""


@dataclass(frozen=True, eq=False)
class Data:
    """Labelled inputs, fetched when they are asked for; a subset keeps the numbers that its examples had.

    Arguments:
        name: The spec as typed, or a name.
        y: The labels, with shape (N,) and dtype int64.
        take: Numbers of examples, among those of ``index``, with shape (M,) and dtype int64, to inputs, with shape (M, *)
            and dtype float32 or float64, in [low, high]. Arrays in float64 stay so, for models in float64; 8-bit integers,
            float16, bfloat16 and the rest become float32.
        low: The least value that an input may have.
        high: The greatest.
        kind: ``image``, ``waveform`` or ``features``.
        index: The number of each example in the original split, with shape (N,) and dtype int64.
        fingerprint: Numbers of examples to a hex SHA-256 of their contents.
        classes: The names of the labels 0, 1, ..., where they are known.
        levels: 255 where the data came as 8-bit integers, so that the values k / 255 of the way from low to high, for whole
            k, are the ones that can be saved; 65536 for sounds of 16 bits; None where there is no such grid.
        notes: What was inferred and should be announced, a sentence each.
        rate: Of waveforms, samples a second; None where it is not known.

    Raises:
        UsageError: The labels or the numbers are not of this form, or the kind is unknown.
    """

    name: str
    y: Tensor
    take: Callable[[Tensor], Tensor]
    low: float
    high: float
    kind: str
    index: Tensor
    fingerprint: Callable[[Tensor], str]
    classes: tuple[str, ...] = ()
    levels: int | None = None
    notes: tuple[str, ...] = ()
    rate: int | None = None

    def __post_init__(self) -> None:
        spec.check_choice("kind of data", self.kind, KINDS)
        if self.y.shape != self.index.shape:
            raise UsageError(
                f"{self.name} has {len(self.y)} labels and {len(self.index)} numbers; there should be one for each"
            )
        check_labels(self.y, self.classes)

    def __len__(self) -> int:
        return len(self.y)

    def batch(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """The inputs, (M, *), and the labels, (M,), of the positions from ``start`` up to ``stop``."""
        return self.take(self.index[start:stop]), self.y[start:stop]

    def select(self, positions: Tensor) -> Data:
        """The examples at ``positions``, with shape (M,) and dtype int64, in that order; there may be none."""
        return dataclasses.replace(self, y=self.y[positions], index=self.index[positions])

    def limited(self, limit: int | None, seed: int) -> Data:
        """At most ``limit`` examples with the classes in proportion, drawn by :func:`stratified`; all of them for None.

        Raises:
            UsageError: The limit is less than 1, or the seed is not allowed.
        """
        positions = stratified(self.y, limit, seed)
        return self if len(positions) == len(self) else self.select(positions)

    def digest(self) -> str:
        """A hex SHA-256 of the labels, the numbers and the contents of these examples."""
        numbers = torch.stack([self.y, self.index]).numpy().astype("<i8").tobytes()
        return hashlib.sha256(numbers + self.fingerprint(self.index).encode()).hexdigest()


def check_seed(seed: int) -> None:
    """Refuse a seed that is not a whole number from 0 to 2**63 - 1."""
    if isinstance(seed, bool) or not isinstance(seed, Integral) or not 0 <= seed < 2**63:
        raise UsageError(f"the seed is {seed!r}; it should be a whole number from 0 to 2**63 - 1")


def stratified(y: Tensor, limit: int | None, seed: int) -> Tensor:
    """The positions of at most ``limit`` examples, in their order, with each class in proportion.

    Class c, with n_c of the N examples, is given the floor of limit * n_c / N, and one more where the remainder is among the
    largest, so that the sum is ``limit``. Which examples, and which of equal remainders, is drawn from ``seed``.

    Arguments:
        y: The labels, with shape (N,) and dtype int64.
        limit: How many to choose; all, where it is None or at least N.
        seed: Of the draw, as :func:`check_seed` allows.

    Raises:
        UsageError: The limit is less than 1, or the seed is not allowed.

    >>> stratified(torch.tensor([0, 0, 0, 0, 1, 1]), 3, seed=0).shape
    torch.Size([3])
    """
    check_seed(seed)
    if limit is not None and limit < 1:
        raise UsageError(f"the limit is {limit}; it should be at least 1")
    if limit is None or limit >= len(y):
        return torch.arange(len(y))
    rng = torch.Generator().manual_seed(int(seed))
    _, which, n = y.unique(return_inverse=True, return_counts=True)
    quota = limit * n // len(y)
    lots = torch.randperm(len(n), generator=rng)
    largest = lots[(limit * n % len(y))[lots].argsort(descending=True, stable=True)]
    quota[largest[: limit - int(quota.sum())]] += 1
    order = torch.randperm(len(y), generator=rng)
    grouped = order[which[order].argsort(stable=True)]
    rank = torch.arange(len(y)) - (n.cumsum(0) - n).repeat_interleave(n)
    return grouped[rank < quota.repeat_interleave(n)].sort().values


def check_labels(y: Tensor, classes: tuple[str, ...] = ()) -> None:
    """Refuse labels that are not one non-negative integer an example, or that have no name where there are names."""
    if y.ndim != 1 or y.dtype != torch.int64:
        raise UsageError(f"the labels have shape {tuple(y.shape)} and type {y.dtype}; they should be one integer an example")
    if not len(y):
        return
    if int(y.min()) < 0:
        raise UsageError(f"the least label is {int(y.min())}; labels should be 0, 1, 2 and so on")
    if classes and int(y.max()) >= len(classes):
        raise UsageError(f"the greatest label is {int(y.max())} and there are {len(classes)} class names; each should have one")


def check_range(low: float | None, high: float | None, dtype: torch.dtype = torch.float32) -> tuple[float, float] | None:
    """The range that was given, rounded to the dtype that the data have; None where there was none.

    Raises:
        UsageError: Only one end was given, or the range is empty or not finite.
    """
    if low is None and high is None:
        return None
    if low is None or high is None:
        raise UsageError(f"the range goes from {low} to {high}; give both ends, or neither")
    low, high = torch.tensor([low, high], dtype=torch.float64).to(dtype).tolist()
    if not -math.inf < low < high < math.inf:
        raise UsageError(f"the range goes from {low:g} to {high:g}; its low end should be less than its high end, both finite")
    return low, high


def spread(x: Tensor, low: float, high: float) -> Tensor:
    """8-bit integers as float32, with 0 at ``low`` and 255 at ``high``; any shape.

    >>> spread(torch.tensor([0, 255], dtype=torch.uint8), -1.0, 1.0)
    tensor([-1.,  1.])
    """
    return x.to(torch.float32).div_(255).mul_(high - low).add_(low).clamp_(low, high)


def spread_notes(low: float, high: float) -> tuple[str, ...]:
    """What to announce where the 8-bit values do not become [0, 1]."""
    return () if (low, high) == (0, 1) else (f"the 8-bit values 0 to 255 were mapped to [{low:g}, {high:g}]",)
