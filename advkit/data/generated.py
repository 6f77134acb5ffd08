"""Data that a generator draws: ``g.safetensors``, or a source that a function of the user's own returns."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from advkit.data.dataset import Data, check_range, spread
from advkit.errors import UsageError
from advkit.gan.pair import load
from advkit.gan.source import BATCH, Source
from advkit.spec import check_whole

SPLITS = {"train": 20_000, "test": 10_000}
"""How many examples each split has."""
NO_CLASSES = "the generator has no classes, so every label is 0; label the examples with a classifier (--pseudo-labels)"


def read_generated(spec: str, split: str, low: float | None = None, high: float | None = None) -> Data:
    """What the generator of a spec draws: see :func:`from_source`.

    Raises:
        UsageError: There is no such generator, or another range was asked for than it draws in.
    """
    source = load(spec)
    if check_range(low, high) not in (None, check_range(source.low, source.high)):
        raise UsageError(f"{spec} draws in [{source.low:g}, {source.high:g}]; leave the range out, or give this one")
    return from_source(source, spec, split)


def from_source(source: Source, name: str, split: str = "train", n: int | None = None, seed: int = 0) -> Data:
    """Labelled examples that a source draws, the same whenever they are asked for.

    Arguments:
        source: The source. The classes take turns; of one without classes, every label is 0.
        name: What to call the data.
        split: ``train`` or ``test``, which are drawn from different numbers.
        n: How many; by default, 20,000 to train and 10,000 to test.
        seed: Of the draws.

    Raises:
        UsageError: The split is neither.

    >>> from advkit.gan.source import Own
    >>> data = from_source(Own(lambda z: z.sigmoid().view(-1, 1, 2, 2), d=4, shape=(1, 2, 2)), "mine", n=10)
    >>> data.batch(0, 10)[0].shape, data.kind, data.levels
    (torch.Size([10, 1, 2, 2]), 'image', 255)
    """
    if split not in SPLITS:
        raise UsageError(f"{name} has no split {split!r}; it has {', '.join(SPLITS)}")
    check_whole("the number of samples", SPLITS[split] if n is None else n, 1)
    n = SPLITS[split] if n is None else n
    z = source.latent(n, torch.Generator().manual_seed(2 * seed + (split == "test")))
    y = torch.arange(n) % max(1, source.classes)
    low, high = float(source.low), float(source.high)
    levels = 255 if len(source.shape) == 3 else None

    def take(numbers: Tensor) -> Tensor:
        """The samples of those numbers, decoded when they are asked for."""
        with torch.no_grad():
            x = source.decode(z[numbers], y[numbers] if source.classes else None).float().cpu().clamp(low, high)
        # As files hold images: what learns from both should not tell generated ones by finer steps.
        return x if levels is None else spread(((x - low) / (high - low) * levels).round().byte(), low, high)

    def fingerprint(numbers: Tensor) -> str:
        parts = (take(some).numpy().astype("<f4").tobytes() for some in numbers.split(BATCH))
        sha = hashlib.sha256()
        for part in parts:
            sha.update(part)
        return sha.hexdigest()

    return Data(
        name=name,
        y=y,
        take=take,
        low=low,
        high=high,
        kind="image" if levels else "features",
        index=torch.arange(n),
        fingerprint=fingerprint,
        classes=tuple(getattr(source, "names", ())) if source.classes else (),
        levels=levels,
        notes=() if source.classes else (NO_CLASSES,),
    )
