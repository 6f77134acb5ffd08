"""Random numbers that belong to rows, not to batches.

A row (one example) draws the same numbers whatever batch it is in, whichever rows are still being attacked, and on any
device. This is what lets an evaluation give the same answer for every batch size, and resume to the same bytes.

Each row has a 64-bit key; the i-th word of its stream is the SplitMix64 finalizer of ``key + i * GAMMA`` (Steele, Lea and
Flood, 2014, "Fast splittable pseudorandom number generators", https://doi.org/10.1145/2660193.2660195), so a draw is a few
integer operations on a tensor, with no state but a counter.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable

import torch
from torch import Tensor


def _signed(word: int) -> int:
    return word - (1 << 64) if word >= 1 << 63 else word


GAMMA = _signed(0x9E3779B97F4A7C15)
MIX_1 = _signed(0xBF58476D1CE4E5B9)
MIX_2 = _signed(0x94D049BB133111EB)


def _shift(z: Tensor, bits: int) -> Tensor:
    """Logical right shift (torch's own keeps the sign)."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _mix(z: Tensor) -> Tensor:
    z = (z ^ _shift(z, 30)) * MIX_1
    z = (z ^ _shift(z, 27)) * MIX_2
    return z ^ _shift(z, 31)


class Streams:
    """Independent random streams, one a row.

    Arguments:
        keys: One 64-bit key a row, with shape (N,) and dtype int64.
    """

    def __init__(self, keys: Tensor) -> None:
        self.keys = keys
        self.drawn = 0

    @classmethod
    def seeded(cls, seed: int, rows: Iterable[int], label: str = "", device: torch.device | str = "cpu") -> Streams:
        """The streams of the examples numbered ``rows``, for a purpose named by ``label``."""
        digest = hashlib.sha256(f"{seed}\0{label}".encode()).digest()
        base = int.from_bytes(digest[:8], "little", signed=True)
        index = torch.as_tensor(list(rows), dtype=torch.int64, device=device)
        return cls(_mix(_mix(index * GAMMA + base)))

    @classmethod
    def of(cls, rng: torch.Generator, n: int, device: torch.device | str = "cpu") -> Streams:
        """``n`` streams keyed by one draw from ``rng``; the first rows get the same streams whatever ``n`` is."""
        bound = torch.iinfo(torch.int64)
        base = int(torch.randint(bound.min, bound.max, (1,), generator=rng, device=rng.device))
        return cls(_mix(_mix(torch.arange(n, device=device) * GAMMA + base)))

    def words(self, shape: tuple[int, ...], rows: Tensor | None = None) -> Tensor:
        """Uniform 64-bit words, with shape (N, *shape): the next of each row's stream.

        Arguments:
            shape: The shape of one row's draw.
            rows: Which rows draw; the others skip as many words, so that no row's stream depends on the rest.
        """
        keys = self.keys if rows is None else self.keys[rows]
        size = math.prod(shape)
        index = torch.arange(self.drawn + 1, self.drawn + size + 1, device=keys.device)
        self.drawn += size
        return _mix(keys.unsqueeze(1) + index * GAMMA).reshape(len(keys), *shape)

    def uniform(self, *shape: int, rows: Tensor | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
        """Uniform in [0, 1), with shape (N, *shape)."""
        bits = {torch.float64: 53, torch.float32: 24, torch.float16: 11, torch.bfloat16: 8}[dtype]
        return _shift(self.words(shape, rows), 64 - bits).to(dtype) * 2.0**-bits

    def normal(self, *shape: int, rows: Tensor | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
        """Standard normal, with shape (N, *shape), by Box and Muller (1958)."""
        radius = (-2.0 * torch.log1p(-self.uniform(*shape, rows=rows, dtype=dtype))).sqrt()
        return radius * torch.cos(2.0 * math.pi * self.uniform(*shape, rows=rows, dtype=dtype))

    def integers(self, high: int, *shape: int, rows: Tensor | None = None) -> Tensor:
        """Uniform integers in [0, high), with shape (N, *shape); the bias is below high / 2**63."""
        return _shift(self.words(shape, rows), 1) % high
