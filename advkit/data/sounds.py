"""Encoded sounds with labels: what a folder of WAV files and a data set of the hub have in common, and strings of words.

A data set has one rate. Shorter sounds end in zeros, which nothing in advkit hears; all are rounded to 16 bits, as a file
holds them.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO

import torch
from torch import Tensor

from advkit.data.dataset import Data, check_labels, stratified
from advkit.errors import UsageError
from advkit.sound import wav
from advkit.sound.threats import lengths
from advkit.spec import check_whole

LEVELS = 2 * wav.STEPS
"""The steps of 16 bits from -1 to 1."""
GAP = 0.05
"""The seconds of silence between the words of a string."""


@dataclass(frozen=True)
class Sounds:
    """Encoded sounds with labels, not read yet.

    Arguments:
        name: Of the data.
        y: The labels, with shape (N,) and dtype int64.
        streams: Numbers of examples, with shape (M,), to their files, opened one by one in this order.
        where: What to call an example in a message.
        classes: The names of the labels.
        notes: What was inferred about them.
    """

    name: str
    y: Tensor
    streams: Callable[[Tensor], Iterator[IO[bytes]]]
    where: Callable[[int], str]
    classes: tuple[str, ...]
    notes: tuple[str, ...]

    def load(self, limit: int | None, seed: int, low: float | None, high: float | None, size: int | None) -> Data:
        """The data, as :func:`advkit.data.load` describes; only examples within the limit are read.

        Raises:
            UsageError: A sound cannot be read or is silent, or a range or a size is given that sounds do not have.
        """
        if not len(self.y):
            raise UsageError(f"{self.name} has no examples; there should be at least one")
        check_labels(self.y, self.classes)
        if size is not None:
            raise UsageError(f"{self.name} holds sounds, which have no height and width; leave --size out (in Python, size=)")
        if (low, high) not in [(None, None), (-1, 1)]:
            raise UsageError(f"the range goes from {low} to {high}; the samples of {self.name} go from -1 to 1: leave it out")
        index = stratified(self.y, limit, seed)
        x, rate, notes = self.decode(index)
        return _data(self.name, x, self.y[index], index, rate, self.classes, (*self.notes, *notes))

    def decode(self, index: Tensor) -> tuple[list[Tensor], int, tuple[str, ...]]:
        """The waveforms (T,), their rate, that of the most, and what was changed on the way."""
        files = []
        for number, stream in zip(index.tolist(), self.streams(index), strict=True):
            with stream:
                files.append(wav.decode(stream.read(), self.where(number)))
        rate = Counter(file.rate for file in files).most_common(1)[0][0]
        notes = []
        if several := sum(file.channels > 1 for file in files):
            notes.append(f"{several} of {len(files)} sounds have several channels, which were averaged")
        if others := sum(file.rate != rate for file in files):
            notes.append(f"{others} of {len(files)} sounds have another rate and were resampled to {rate} samples a second")
        return [wav.quantised(file.at(rate)) for file in files], rate, tuple(notes)


def _data(
    name: str, x: list[Tensor], y: Tensor, index: Tensor, rate: int, classes: tuple[str, ...], notes: tuple[str, ...]
) -> Data:
    """Waveforms that are held in memory, as data; ``index`` is ascending."""
    longest = max(len(one) for one in x)

    def rows(numbers: Tensor) -> list[Tensor]:
        found = torch.searchsorted(index, numbers).clamp(max=len(index) - 1)
        if not torch.equal(index[found], numbers):
            raise UsageError(f"not all of these examples of {name} were loaded; ask for numbers among those of index")
        return [x[row] for row in found.tolist()]

    def take(numbers: Tensor) -> Tensor:
        padded = torch.zeros(len(numbers), longest)
        for row, one in zip(padded, rows(numbers), strict=True):
            row[: len(one)] = one
        return padded

    def fingerprint(numbers: Tensor) -> str:
        sha = hashlib.sha256(f"{rate} {longest}".encode())
        for one in rows(numbers):
            sha.update(len(one).to_bytes(8, "little") + one.numpy().tobytes())
        return sha.hexdigest()

    return Data(
        name=name,
        y=y,
        take=take,
        low=-1.0,
        high=1.0,
        kind="waveform",
        index=index,
        fingerprint=fingerprint,
        classes=classes,
        levels=LEVELS,
        notes=notes,
        rate=rate,
    )


def strings(words: Data, most: int = 4, seed: int = 0) -> Data:
    """One to ``most`` words after each other, each a recording, as many strings as there are words; classes are the texts.

    Arguments:
        words: Labelled sounds whose classes are words: the digits, spoken one by one.
        most: The most words of a string; each length is as frequent.
        seed: Of the choice; strings of the same words and seed are the same.

    Raises:
        UsageError: The words are no sounds, or have no names.
    """
    check_whole("the most words", most, 1)
    if words.kind != "waveform" or not words.classes or words.rate is None:
        raise UsageError(f"{words.name} is of kind {words.kind}; strings are made of sounds with a rate and names of classes")
    rng = torch.Generator().manual_seed(seed)
    counts = torch.randint(1, most + 1, (len(words),), generator=rng)
    chosen = [torch.randint(len(words), (n,), generator=rng) for n in counts.tolist()]
    said = [" ".join(words.classes[k] for k in words.y[one].tolist()) for one in chosen]
    texts = tuple(sorted(set(said)))
    number = {text: k for k, text in enumerate(texts)}
    gap = torch.zeros(round(GAP * words.rate))
    single = [one[0, : int(lengths(one))] for one in (words.batch(k, k + 1)[0] for k in range(len(words)))]
    joined = [torch.cat([part for k in one.tolist() for part in (single[k], gap)][:-1]) for one in chosen]
    y = torch.tensor([number[text] for text in said])
    return _data(f"strings:{words.name}", joined, y, torch.arange(len(y)), words.rate, texts, words.notes)
