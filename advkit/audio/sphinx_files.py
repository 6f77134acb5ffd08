"""The files of a CMU Sphinx acoustic model: phones and their states, Gaussians, mixture weights, settings, dictionary.

A model for PocketSphinx is a folder. ``mdef`` ties the states of each phone in its context (a triphone) to senones;
``means`` and ``variances`` hold one codebook of Gaussians a phone, ``sendump`` the weights with which a senone mixes them.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from advkit.errors import UsageError

INSIDE, FIRST, LAST, ALONE = range(4)
"""Where a phone stands in its word, as model definitions count."""

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, eq=False)
class Definition:
    """Phones in context and the senones of their states.

    Attributes:
        phones: The names of the phones without context; their states are the first senones.
        fillers: Those that are noises, not speech.
        states: The senones of each distinct sequence of states, (sequences, 3).
        codebooks: The phone whose Gaussians each senone mixes, (senones,).
    """

    phones: tuple[str, ...]
    fillers: frozenset[str]
    states: Array
    codebooks: Array
    _keys: Array
    _sequences: Array

    def senones(self, phone: str, left: str, right: str, position: int) -> tuple[int, ...]:
        """The senones of a phone between two others, at a position in its word.

        Where the model has no such triphone: at another position, then beside silence, then the phone without context.
        """
        near, next_ = ("SIL" if name in self.fillers else name for name in (left, right))
        outer = "SIL" if position in (FIRST, ALONE) else near, "SIL" if position in (LAST, ALONE) else next_
        for before, after in ((near, next_), outer):
            for place in (position, *range(4)):
                found = self._find(phone, before, after, place)
                if found is not None:
                    return found
        return self.bare(phone)

    def bare(self, phone: str) -> tuple[int, ...]:
        """The senones of a phone without context."""
        return tuple(int(k) for k in self.states[self._sequences[self.phones.index(phone)]])

    def _find(self, phone: str, left: str, right: str, position: int) -> tuple[int, ...] | None:
        key = _key(position, *(self.phones.index(name) for name in (phone, left, right)))
        place = int(np.searchsorted(self._keys, key))
        if place == len(self._keys) or self._keys[place] != key:
            return None
        return tuple(int(k) for k in self.states[self._sequences[len(self.phones) + place]])


def _key(position: Any, phone: Any, left: Any, right: Any) -> Any:
    return ((position * 256 + phone) * 256 + left) * 256 + right


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(f"cannot read {path}, a part of an acoustic model: {error.strerror}") from None


def read_definition(path: Path) -> Definition:
    """The binary ``mdef`` of a model.

    Raises:
        UsageError: The file cannot be read, or is no binary model definition.
    """
    data = _bytes(path)
    if data[:4] != b"BMDF":
        raise UsageError(f"{path} is no binary model definition; the model that comes with pocketsphinx has one")
    start = 12 + int(np.frombuffer(data, "<i4", 1, 8)[0])
    sizes = np.frombuffer(data, "<i4", 10, start).tolist()
    bare, all_, emitting, _, senones, _, sequences, _, nodes, _ = sizes
    names = data[start + 40 :].split(b"\0", bare)[:bare]
    at = start + 40 + -(-sum(len(name) + 1 for name in names) // 4) * 4 + 8 * nodes
    entry = np.dtype([("sequence", "<i4"), ("transitions", "<i4"), ("position", "u1"), ("context", "u1", 3)])
    entries = np.frombuffer(data, entry, all_, at)
    states = np.frombuffer(data, "<u2", sequences * emitting, at + all_ * entry.itemsize + 4)
    states = states.reshape(sequences, emitting).astype(np.int64)
    phones = tuple(name.decode() for name in names)
    own = entries[bare:]
    keys = _key(own["position"].astype(np.int64), *own["context"].astype(np.int64).T)
    order = np.argsort(keys)
    codebooks = np.zeros(senones, np.int64)
    bases = np.concatenate([np.arange(bare), own["context"][:, 0]])
    codebooks[states[entries["sequence"]]] = bases[:, None]
    return Definition(
        phones,
        frozenset(name for name, one in zip(phones, entries["position"], strict=False) if one),
        states,
        codebooks,
        keys[order],
        np.concatenate([entries["sequence"][:bare], own["sequence"][order]]),
    )


def read_gaussians(path: Path) -> Array:
    """``means`` or ``variances``, float32, (codebooks, streams, Gaussians, coefficients).

    Raises:
        UsageError: The file cannot be read, or its streams differ in length.
    """
    data = _bytes(path)
    at = data.index(b"endhdr\n") + 11
    books, streams, densities = np.frombuffer(data, "<i4", 3, at).tolist()
    widths = np.frombuffer(data, "<i4", streams, at + 12)
    if len(set(widths.tolist())) != 1:
        raise UsageError(f"{path} has streams of {widths.tolist()} coefficients; they should be equally long")
    values = np.frombuffer(data, "<f4", books * densities * int(widths.sum()), at + 16 + 4 * streams)
    return values.reshape(books, streams, densities, int(widths[0]))


def read_weights(path: Path, streams: int) -> Array:
    """``sendump``, uint8, (streams, Gaussians, senones): negated logarithms of mixture weights, in units of a score.

    Raises:
        UsageError: The file cannot be read, or its weights are clustered.
    """
    data = _bytes(path)
    at = 0
    while size := int(np.frombuffer(data, "<i4", 1, at)[0]):
        if data[at + 4 :].startswith(b"cluster_count ") and not data[at + 4 :].startswith(b"cluster_count 0\0"):
            raise UsageError(f"{path} has clustered weights; this reads weights of 8 bits each")
        at += 4 + size
    rows, columns = np.frombuffer(data, "<i4", 2, at + 4).tolist()
    return np.frombuffer(data, "u1", streams * rows * columns, at + 12).reshape(streams, rows, columns)


def read_settings(path: Path) -> dict[str, str]:
    """``feat.params``: the settings of the front end, by name."""
    words = _bytes(path).decode().split()
    return {name.lstrip("-"): value for name, value in zip(words[::2], words[1::2], strict=True)}


@functools.lru_cache(maxsize=2)
def read_dictionary(path: Path) -> dict[str, tuple[tuple[str, ...], ...]]:
    """The pronunciations of each word, a tuple of phones each, in the order of the file.

    Raises:
        UsageError: The file cannot be read.
    """
    words: dict[str, tuple[tuple[str, ...], ...]] = {}
    for line in _bytes(path).decode().splitlines():
        name, *phones = line.split()
        word = re.sub(r"\(\d+\)$", "", name)
        words[word] = (*words.get(word, ()), tuple(phones))
    return words
