"""A trained generator with its discriminator, as a file holds them, and the table of their networks.

Symbols: z are latent codes, (N, d); y classes, (N,); x samples, (N, *), in [low, high]. The networks themselves work in [0, 1].
"""

from __future__ import annotations

import functools
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from advkit import spec, tensors
from advkit.errors import UsageError
from advkit.gan.biggan import BigGAN
from advkit.gan.dcgan import DCGAN
from advkit.gan.inverter import Inverter
from advkit.gan.mlp import MLP
from advkit.gan.source import PRIORS, Sampler, Source, check_source
from advkit.gan.ssgan import SSGAN
from advkit.python import call, is_python
from advkit.spec import Table
from advkit.version import __version__

GANS: Table = {"mlp": MLP, "dcgan": DCGAN, "biggan": BigGAN, "ssgan": SSGAN}
"""The networks that a spec may name: ``dcgan(width=64)``."""


@dataclass(frozen=True, eq=False)
class Pair(Sampler):
    """A generator, what it was trained against, and what it draws.

    Arguments:
        settings: The networks' settings: an entry of :data:`GANS`.
        shape: The shape of one sample.
        low: The least value of a sample.
        high: The greatest.
        names: The names of the classes of the data; empty where they have none.
        labels: How many classes the data have.
        generator: Codes, and classes where it is conditional, to samples in [0, 1].
        discriminator: What it was trained against.
        inverter: Samples to codes, where one was trained: see :class:`advkit.gan.inverter.Inverter`.
        digest: A hex SHA-256 of all of it.
    """

    settings: Any
    shape: tuple[int, ...]
    low: float
    high: float
    names: tuple[str, ...]
    labels: int
    generator: nn.Module
    discriminator: Any
    inverter: Inverter | None = None
    digest: str = ""

    def __post_init__(self) -> None:
        for part in _parts(self).values():
            part.eval()

    @property
    def classes(self) -> int:  # type: ignore[override]
        """How many classes it can be asked for; 0 for one that draws what it likes."""
        return self.labels if self.settings.conditional else 0

    def latent(self, n: int, rng: torch.Generator) -> Tensor:
        """Codes, with shape (n, d)."""
        return PRIORS[self.settings.prior](n, self.settings.d, generator=rng)

    def decode(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        """The samples of codes (N, d) and classes (N,) int64, with shape (N, *), on the device of z.

        Raises:
            UsageError: The generator is conditional and no class was given.
        """
        first = next(self.generator.parameters())
        z, device = z.to(first), z.device
        if self.settings.conditional and y is None:
            raise UsageError(f"no class was given; the generator has classes 0 to {self.labels - 1}")
        x = self.generator(z, y.to(first.device)) if self.settings.conditional and y is not None else self.generator(z)
        return self.low + (self.high - self.low) * x.to(device)

    def score(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """The discriminator's scores of inputs (N, *) in [low, high], with shape (N,): high where it takes them for data.

        Arguments:
            x: The inputs.
            y: Their classes, with shape (N,), for a conditional pair.
        """
        first = next(self.discriminator.parameters())
        with torch.no_grad():
            f = self.discriminator.features(((x - self.low) / (self.high - self.low)).to(first))
            if isinstance(self.settings, SSGAN):
                return self.discriminator.real(f, self.discriminator.logits(f)).to(x.device)
            return self.discriminator.score(f, None if y is None else y.to(first.device)).to(x.device)

    def invert(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The codes (N, d) and classes (N,) from which it would draw inputs (N, *) like these.

        Raises:
            UsageError: It has no inverter.
        """
        if self.inverter is None:
            raise UsageError(
                "the generator has no inverter, which finds the code of an input; train one: advkit gan invert FILE"
            )
        first = next(self.inverter.parameters())
        with torch.no_grad():
            z, logits = self.inverter(((x - self.low) / (self.high - self.low)).to(first))
        return z.to(x), logits.argmax(1).to(x.device) if self.settings.conditional else None


def build(text: str, shape: tuple[int, ...], labels: int, seed: int = 0) -> tuple[Any, nn.Module, nn.Module]:
    """The settings, the generator and the discriminator of a spec, with weights drawn from ``seed``.

    Raises:
        UsageError: An unknown name or setting, data that the networks cannot draw, or sizes that do not fit in memory.
    """
    settings = spec.parse(text, GANS, "generator")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            return settings, settings.generator(shape, labels), settings.discriminator(shape, labels)
        except UsageError:
            raise
        except (RuntimeError, MemoryError, OverflowError, TypeError):
            raise UsageError(f"the networks {text!r} do not fit in memory; give them a smaller width") from None


def save(path: str | Path, pair: Pair, **metadata: str) -> None:
    """Write a pair; whoever reads the path meanwhile sees the old file or the new one, never a part.

    Arguments:
        path: Where to write, a file that ends in .safetensors.
        pair: The pair.
        metadata: What else to note.

    Raises:
        UsageError: The file cannot be written.
    """
    about = {
        "advkit": __version__,
        "gan": spec.show(pair.settings, GANS),
        "draws": json.dumps(
            {
                "shape": list(pair.shape),
                "low": pair.low,
                "high": pair.high,
                "names": list(pair.names),
                "labels": pair.labels,
            }
        ),
    }
    if isinstance(pair.settings, SSGAN):
        # The same file serves where a classifier is wanted.
        about |= {"architecture": f"mnist-ssl(minibatch={pair.settings.minibatch})", "prefix": "discriminator."}
    tensors.write(path, _state(pair), {**metadata, **about})


def _parts(pair: Pair) -> dict[str, nn.Module]:
    parts = {"generator": pair.generator, "discriminator": pair.discriminator, "inverter": pair.inverter}
    return {name: part for name, part in parts.items() if part is not None}


def _state(pair: Pair) -> dict[str, Tensor]:
    return {f"{name}.{key}": value for name, part in _parts(pair).items() for key, value in part.state_dict().items()}


def read(path: str | Path) -> tuple[Pair, dict[str, str]]:
    """The pair in a file that :func:`save` wrote, in evaluation mode, and the metadata.

    Raises:
        UsageError: The file is damaged, was written by another program, or its tensors do not fit its networks.
    """
    state, metadata = tensors.read(path)
    if "gan" not in metadata or "draws" not in metadata:
        raise UsageError(f"{path} holds no generator of advkit's; advkit gan train writes one, or give a file.py:function")
    try:
        draws = json.loads(metadata["draws"])
        shape, labels = tuple(map(int, draws["shape"])), int(draws["labels"])
        settings, generator, discriminator = build(metadata["gan"], shape, labels)
        with torch.random.fork_rng(devices=[]):
            inverter = Inverter(shape, settings.d, labels) if any(key.startswith("inverter.") for key in state) else None
        digest = hashlib.sha256()
        for key in sorted(state):
            digest.update(key.encode() + state[key].contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        digest.update((metadata["gan"] + metadata["draws"]).encode())
        pair = Pair(
            settings,
            shape,
            float(draws["low"]),
            float(draws["high"]),
            tuple(map(str, draws["names"])),
            labels,
            generator,
            discriminator,
            inverter,
            digest.hexdigest(),
        )
        for name, part in _parts(pair).items():
            part.load_state_dict({key.removeprefix(f"{name}."): v for key, v in state.items() if key.startswith(f"{name}.")})
            part.requires_grad_(False)
    except UsageError as error:
        raise UsageError(f"{path} holds a generator that advkit does not have: {error}") from None
    except Exception as error:
        raise UsageError(f"the tensors in {path} do not fit the networks that it names: {tensors.telling(error)}") from None
    return pair, metadata


def load(text: str) -> Source:
    """The source that a spec names: a file that advkit wrote, or what a function of your own returns.

    Arguments:
        text: ``g.safetensors``, ``file.py:function`` or ``package.module:function``; the function returns a source, such as
            :class:`advkit.gan.source.Own`.

    Raises:
        UsageError: There is none, it is damaged, or it draws what it does not say.
    """
    if is_python(text):
        source = call(text, "generator")
        check_source(source, text)
        return source
    path = Path(text).expanduser()
    if path.suffix != ".safetensors":
        raise UsageError(f"{text!r} names no generator; give a .safetensors that advkit gan train wrote, or a file.py:function")
    if not path.is_file():
        raise UsageError(f"there is no file {text}; advkit gan train writes a generator")
    return _cached(str(path.resolve()), path.stat().st_mtime_ns)


@functools.lru_cache(maxsize=4)
def _cached(path: str, changed: int) -> Source:
    return read(path)[0]


def is_generator(path: str | Path) -> bool:
    """Whether a file is a pair that :func:`save` wrote."""
    return Path(path).suffix == ".safetensors" and Path(path).is_file() and "gan" in tensors.read(path)[1]
