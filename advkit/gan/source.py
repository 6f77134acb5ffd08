"""A source: what draws samples, as attacks, training, defenses and measures take it.

Symbols: z are latent codes, (N, d); y classes, (N,); x = decode(z, y) samples, (N, *), in [low, high].
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from advkit.errors import UsageError
from advkit.spec import check_choice, check_whole

PRIORS: dict[str, Callable[..., Tensor]] = {"normal": torch.randn, "uniform": torch.rand}
"""What latent codes are drawn from, entry by entry: a standard normal, or uniform in [0, 1)."""
BATCH = 500
"""How many samples are drawn at a time."""


class Source(Protocol):
    """What draws samples: a trained generator, or your own. An ``nn.Module`` that has these serves too."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one sample."""

    @property
    def low(self) -> float:
        """The least value of a sample."""

    @property
    def high(self) -> float:
        """The greatest."""

    @property
    def classes(self) -> int:
        """How many classes it can be asked for; 0 for one that draws what it likes."""

    def latent(self, n: int, rng: torch.Generator) -> Tensor:
        """Codes, with shape (n, d)."""

    def decode(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        """The samples of codes (N, d) and classes (N,) int64, with shape (N, *); differentiable in z."""

    def sample(self, n: int, y: Tensor | int | None, rng: torch.Generator) -> Tensor:
        """``n`` samples, with shape (n, *); of the classes ``y``, one for all or one for each."""


class Sampler:
    """What sources have in common: a sample is decoded from a code that is drawn; ``classes`` says which may be asked for."""

    classes: int

    def latent(self, n: int, rng: torch.Generator) -> Tensor:
        """Codes, with shape (n, d)."""
        raise NotImplementedError

    def decode(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        """The samples of codes (N, d) and classes (N,) int64, with shape (N, *)."""
        raise NotImplementedError

    def sample(self, n: int, y: Tensor | int | None, rng: torch.Generator) -> Tensor:
        """``n`` samples, with shape (n, *), without a graph.

        Arguments:
            n: How many.
            y: A class, or classes with shape (n,) and dtype int64; None draws them, where there are any.
            rng: Where codes and classes come from.

        Raises:
            UsageError: A class that there is not, or a class of a source that has none.
        """
        check_whole("the number of samples", n, 1)
        classes = classes_of(self.classes, n, y, rng)
        z = self.latent(n, rng)
        with torch.no_grad():
            return torch.cat([self.decode(z[i : i + BATCH], part(classes, i)) for i in range(0, n, BATCH)])


def part(y: Tensor | None, start: int) -> Tensor | None:
    """The classes of a batch."""
    return None if y is None else y[start : start + BATCH]


def classes_of(classes: int, n: int, y: Tensor | int | None, rng: torch.Generator) -> Tensor | None:
    """The classes of ``n`` samples, (n,) int64: those that are given, or drawn; None for a source that has none.

    Raises:
        UsageError: They are not classes of the source.
    """
    if y is None:
        return torch.randint(classes, (n,), generator=rng) if classes else None
    if not classes:
        raise UsageError(f"the class asked for is {_said(y)}; this generator has no classes and draws what it likes")
    given = torch.as_tensor(y).expand(n) if not isinstance(y, Tensor) or y.ndim == 0 else y
    if given.shape != (n,) or given.is_floating_point() or given.is_complex():
        raise UsageError(f"the classes are {given.dtype} of shape {tuple(given.shape)}; they should be {n} integers")
    if int(given.min()) < 0 or int(given.max()) >= classes:
        raise UsageError(f"the class asked for is {_said(y)}; the generator has classes 0 to {classes - 1}")
    return given.long()


def _said(y: Tensor | int) -> str:
    numbers = torch.as_tensor(y).unique().tolist()
    return ", ".join(map(str, numbers[:4])) + (" ..." if len(numbers) > 4 else "")


@dataclass(frozen=True, eq=False)
class Own(Sampler):
    """A source out of a generator of your own.

    Arguments:
        generator: Codes (N, d), and where there are classes also classes (N,), to samples (N, *) in [low, high]; a module is
            used in evaluation mode.
        d: Entries of a code.
        shape: The shape of one sample.
        low: The least value of a sample.
        high: The greatest.
        classes: How many classes it can be asked for; 0 for none.
        prior: What codes are drawn from: ``normal`` or ``uniform``.

    Raises:
        UsageError: A number out of range, or an unknown prior.

    >>> own = Own(lambda z: z.sigmoid().view(-1, 1, 2, 2), d=4, shape=(1, 2, 2))
    >>> own.sample(3, None, torch.Generator().manual_seed(0)).shape
    torch.Size([3, 1, 2, 2])
    """

    generator: Callable[..., Tensor]
    d: int
    shape: tuple[int, ...]
    low: float = 0.0
    high: float = 1.0
    classes: int = 0
    prior: str = "normal"

    def __post_init__(self) -> None:
        check_whole("the generator's d", self.d, 1)
        check_whole("the generator's classes", self.classes, 0)
        check_choice("prior", self.prior, PRIORS)
        if not callable(self.generator):
            raise UsageError(f"the generator is of type {type(self.generator).__name__}; it should be a module or a function")
        if isinstance(self.generator, nn.Module):
            self.generator.eval()

    def latent(self, n: int, rng: torch.Generator) -> Tensor:
        """Codes, with shape (n, d)."""
        return PRIORS[self.prior](n, self.d, generator=rng)

    def decode(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        """The samples of codes (N, d) and classes (N,) int64, with shape (N, *)."""
        return self.generator(z, y) if self.classes else self.generator(z)


def check_source(source: Any, name: str, shape: tuple[int, ...] | None = None, span: tuple[float, float] | None = None) -> None:
    """Look at a source before a long run: eight samples.

    Arguments:
        source: The source.
        name: What to call it.
        shape: The shape that a sample should have: that of the data.
        span: The range that it should have: that of the data.

    Raises:
        UsageError: It is none, it draws what it does not say, or not what the data are.
    """
    missing = [what for what in ("shape", "low", "high", "classes", "latent", "decode", "sample") if not hasattr(source, what)]
    if missing:
        raise UsageError(f"{name} is no source of samples: it has no {', '.join(missing)}; wrap a generator in gan.source.Own")
    rng = torch.Generator().manual_seed(0)
    try:
        x = source.sample(8, None, rng)
    except UsageError:
        raise
    except Exception as error:  # whatever a generator of the user's own raises
        raise UsageError(f"{name} raised {type(error).__name__} when it was asked for samples: {error}") from error
    own, least, most = tuple(source.shape), float(x.min()), float(x.max())
    if tuple(x.shape) != (8, *own):
        raise UsageError(f"{name} drew samples of shape {tuple(x.shape[1:])} and says {own}; both should be the same")
    if not (math.isfinite(least) and math.isfinite(most)):
        raise UsageError(f"{name} drew NaN or infinite values; samples should be finite")
    slack = 1e-4 * (source.high - source.low)
    if least < source.low - slack or most > source.high + slack:
        says = f"says [{source.low:g}, {source.high:g}]"
        raise UsageError(f"{name} drew values in [{least:.4g}, {most:.4g}] and {says}; give it the range that it has")
    _check_like(source, name, shape, span)


def _check_like(source: Source, name: str, shape: tuple[int, ...] | None, span: tuple[float, float] | None) -> None:
    if shape is not None and tuple(source.shape) != tuple(shape):
        raise UsageError(
            f"{name} draws samples of shape {tuple(source.shape)} and the data have {tuple(shape)}; use one for these"
        )
    if span is not None and (source.low, source.high) != span:
        has, wanted = ("[{:g}, {:g}]".format(*ends) for ends in ((source.low, source.high), span))
        raise UsageError(f"{name} draws samples in {has} and the data are in {wanted}; both should have one range")
