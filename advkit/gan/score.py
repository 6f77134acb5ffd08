"""What a generator has learned: how good, how diverse and how much its own its samples are.

Every number stands beside that of as many real examples, which a perfect generator would draw, and where it has one beside
that of noise, which is as bad as it gets: without these two no such number means anything, because it depends on the features
and on how many images there are.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from advkit.data.dataset import Data, check_seed
from advkit.errors import UsageError
from advkit.gan.measures.birthday import Birthday, birthday, collisions, scale, thumbnails
from advkit.gan.measures.coverage import Coverage, agreement, coverage
from advkit.gan.measures.discriminator import scores, told_apart
from advkit.gan.measures.features import check_network, features
from advkit.gan.measures.fid import fid
from advkit.gan.measures.kid import Kid, kid
from advkit.gan.measures.memory import Memory, Near, beyond, memory
from advkit.gan.measures.neighbours import Tell, nearest
from advkit.gan.measures.precision_recall import PrecisionRecall, precision_recall
from advkit.gan.pair import Pair
from advkit.gan.source import Source, check_source
from advkit.models import find_device
from advkit.spec import check_whole

T = TypeVar("T")
SAMPLES, LEAST = 10_000, 100
"""How many samples are drawn where there are as many held-out examples, and the fewest that say anything."""
ASIDE, CONTROL = 2000, 2000
"""The most training examples that stand in for a generator, and the most held-out ones that are ranked against samples."""
PICTURED = 40
"""How many samples are shown beside their nearest training examples."""
SURE, COPIED, BOUND = 1e-3, 0.01, 0.1
"""A generator has memorized where chance brings it about less often than the first, and at least the second are copies beyond
the share among real examples, or at least the third are bound to the training data."""

Report = Callable[[float, str], None]


@dataclass(frozen=True)
class Beside(Generic[T]):
    """A measure of samples, and what makes it readable.

    Attributes:
        samples: Of the generator's samples.
        real: Of as many real examples.
        noise: Of as much uniform noise; None where that says nothing.
    """

    samples: T
    real: T
    noise: T | None = None


@dataclass(frozen=True, eq=False)
class Score:
    """What a generator has learned.

    Attributes:
        n: How many samples, held-out examples, training examples and images of noise were compared.
        train: How many training examples were searched for copies.
        held_out: How many held-out examples.
        features: How many features an image has.
        accuracy: How many of the n held-out examples the features' network names right, and n.
        fid: The Frechet distance from training examples.
        kid: The kernel distance from training examples.
        neighbourhoods: Precision and recall, with training examples for the data.
        coverage: The classes beside those of training examples.
        agreement: How many samples the features' network names as the class that was asked for, and n; None for a source
            without classes.
        birthday: The size of the support; what is real there is training examples.
        memory: Of samples, and of training examples in their place, each sought among the others.
        told: How many of the held-out examples the pair's own discriminator tells from samples, and n; None where there is
            none.
        pictures: The first samples and the training example that is nearest to each, with shape (P, 2, *).
        closest: The same for the samples that are most like copies.
    """

    n: int
    train: int
    held_out: int
    features: int
    accuracy: tuple[int, int]
    fid: Beside[float]
    kid: Beside[Kid]
    neighbourhoods: Beside[PrecisionRecall]
    coverage: Beside[Coverage]
    agreement: tuple[int, int] | None
    birthday: Birthday
    memory: Beside[Memory]
    told: tuple[int, int] | None
    pictures: Tensor
    closest: Tensor

    @property
    def warnings(self) -> tuple[str, ...]:
        """What is wrong with the generator, a sentence each."""
        return tuple(text for text in (self._memorized(), self._few_modes(), self._small_support()) if text)

    def _memorized(self) -> str:
        ours, real = self.memory.samples, self.memory.real
        copied, bound = ours.copies / ours.of - real.copies / real.of, beyond(ours, real)
        if bound[0] >= max(BOUND, 2 * copied) and bound[1] < SURE:
            near = f"{_percent(ours.near, ours.of)} of the samples are closer to a training example than to any held-out one"
            return f"memorized: {near}, and of real examples {_percent(real.near, real.of)}"
        if copied >= COPIED and _more(ours.copies, ours.of, real.copies, real.of) < SURE:
            return f"memorized: {_percent(ours.copies, ours.of)} of the samples are copies of training examples"
        return ""

    def _few_modes(self) -> str:
        ours = self.coverage.samples
        which = ", ".join(map(str, ours.missing))
        return f"few modes: {len(ours.missing)} of {ours.present} classes are all but left out: {which}" if which else ""

    def _small_support(self) -> str:
        if self.birthday.high >= self.train:
            return ""
        pictures = f"{self.birthday.support:,.0f} [{self.birthday.low:,.0f}, {self.birthday.high:,.0f}]"
        return f"small support: the number of pictures that it draws is about {pictures}, of training examples {self.train:,}"

    def as_dict(self) -> dict[str, Any]:
        """The numbers and the warnings as they are written to a file: null for what is not known or infinite."""
        fields = [field.name for field in dataclasses.fields(self) if field.name not in ("pictures", "closest")]
        return {name: _plain(getattr(self, name)) for name in fields} | {"warnings": list(self.warnings)}


def _more(count: int, of: int, other: int, other_of: int) -> float:
    """The p-value of Fisher's exact test that the first share is no greater than the other."""
    from scipy.stats import fisher_exact

    return float(fisher_exact([[count, of - count], [other, other_of - other]], alternative="greater").pvalue)


def _percent(count: int, of: int) -> str:
    return f"{100 * count / of:.1f} %"


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def score(
    source: Source,
    train: Data,
    test: Data,
    module: Callable[..., Any],
    *,
    n: int | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    report: Report | None = None,
) -> Score:
    """Measure a generator.

    Samples are asked for in the classes of training examples where the source has classes, and rounded to the levels that the
    data have, as they would be in a file.

    Arguments:
        source: What draws.
        train: What it has learned from.
        test: Examples like these that it has not seen.
        module: A classifier of such images: the features' network. It is moved to ``device``.
        n: How many samples; by default 10,000, or as many as there are held-out or training examples.
        seed: Of all draws.
        device: Where images are compared.
        report: Called with the share that is done, and what is being done.

    Raises:
        UsageError: The source does not draw what the data are, there are too few examples for so many samples, or the module
            has no features.
        ModelError: The module does not take such images.
    """
    check_seed(seed)
    n = check_compared(source, train, test, n)
    where, stage = find_device(str(device)), _Stages(report)
    stage("drawing", 0.05)
    images = _drawn(source, train, test, n, torch.Generator().manual_seed(seed))
    seen = _seen(check_network(module).to(where), images, stage)
    f = {name: found[0] for name, found in seen.items()}
    named = {name: found[1].argmax(1) for name, found in seen.items()}
    stage("distances of features", 0.4)
    quality: dict[str, Any] = {
        "fid": _beside(lambda name: fid(f["real"], f[name])),
        "kid": _beside(lambda name: kid(f["real"], f[name])),
        "neighbourhoods": _beside(lambda name: precision_recall(f["real"], f[name])),
        "coverage": _beside(lambda name: coverage(named[name], named["real"], seen["real"][1].shape[1])),
    }
    near, learned = _memory(images, named, where, stage)
    support = _birthday(images, where, stage)
    told = _told(source, images, stage)
    suspect = near.trained[:, 0] / near.trained[:, 1].clamp(min=1e-12)
    return Score(
        n=n,
        train=len(images.train),
        held_out=len(images.held),
        features=f["real"].shape[1],
        accuracy=agreement(named["held"], images.held_y[:n]),
        **quality,
        agreement=None if images.asked is None else agreement(named["x"], images.asked),
        birthday=support,
        memory=learned,
        told=told,
        pictures=images.beside(near, torch.arange(min(PICTURED, n))),
        closest=images.beside(near, suspect.argsort()[:PICTURED]),
    )


def check_compared(source: Source, train: Data, test: Data, n: int | None = None) -> int:
    """Look at what is to be compared, before a long run.

    Returns:
        How many samples to draw.

    Raises:
        UsageError: The source does not draw what the data are, the splits are not alike or the same, or there are too few
            examples for so many samples.
    """
    most = min(len(train), len(test))
    if most < LEAST:
        counts = f"there are {len(train)} training and {len(test)} held-out examples"
        raise UsageError(f"{counts}; a score needs at least {LEAST} of each")
    if _form(train) != _form(test):
        forms = " and ".join("{} in {}".format(*_form(d)) for d in (train, test))
        raise UsageError(f"training and held-out examples have shape {forms}; both should be alike")
    if train.digest() == test.digest():
        raise UsageError(f"{test.name} are the training examples themselves; held-out ones should be others")
    check_source(source, "the generator", *_form(train))
    if 0 < source.classes <= int(train.y.max()):
        has = f"the generator has classes 0 to {source.classes - 1} and {train.name} 0 to {int(train.y.max())}"
        raise UsageError(f"{has}; it should have all of them, as it is asked for samples of each")
    n = min(SAMPLES, most) if n is None else n
    check_whole("the number of samples", n, LEAST)
    if n > most:
        counts = f"{n} samples are asked for, and there are {len(train)} training and {len(test)} held-out examples"
        raise UsageError(f"{counts}; as many real images are compared, so ask for at most {most}")
    return n


def _form(data: Data) -> tuple[tuple[int, ...], tuple[float, float]]:
    """The shape of an input, and the range of its values."""
    return tuple(data.batch(0, 1)[0].shape[1:]), (data.low, data.high)


class _Stages:
    """The stages of a long work, each a share of it."""

    def __init__(self, report: Report | None) -> None:
        self.report, self.done = report, 0.0

    def __call__(self, what: str, last: float) -> Tell:
        """Begin a stage that ends at a share of the work; what is returned is told the share of the stage that is done."""
        first, self.done = self.done, last

        def tell(share: float) -> None:
            if self.report:
                self.report(first + share * (last - first), what)

        tell(0.0)
        return tell


@dataclass(frozen=True, eq=False)
class _Images:
    """What is compared: ``real`` are n training examples, ``aside`` some others or the same, by number."""

    train: Tensor
    held: Tensor
    held_y: Tensor
    real: Tensor
    aside: Tensor
    asked: Tensor | None
    x: Tensor
    noise: Tensor
    rounding: float

    def beside(self, near: Near, which: Tensor) -> Tensor:
        """Samples and the training examples nearest to them, with shape (P, 2, *)."""
        return torch.stack([self.x[which], self.train[near.trained_index[which, 0]]], 1)


def _drawn(source: Source, train: Data, test: Data, n: int, rng: torch.Generator) -> _Images:
    """The samples, and what they are compared with."""
    held = test.select(torch.randperm(len(test), generator=rng))
    order = torch.randperm(len(train), generator=rng)
    asked = train.y[order[:n]] if source.classes else None
    every = train.batch(0, len(train))[0].float()
    x = source.sample(n, asked, rng).detach().cpu().float()
    if not bool(x.isfinite().all()):
        raise UsageError("the generator drew NaN or infinite values; samples should be finite")
    span = train.high - train.low
    return _Images(
        train=every,
        held=held.batch(0, len(held))[0].float(),
        held_y=held.y,
        real=every[order[:n]],
        aside=order[-min(ASIDE, len(order) // 4) :],
        asked=asked,
        x=_on_levels(x, train),
        noise=_on_levels(train.low + span * torch.rand(x.shape, generator=rng), train),
        # How far apart rounding to levels, or in numbers without levels that of float32, takes equal images.
        rounding=span * math.sqrt(x[0].numel()) * (0.5 / train.levels if train.levels else 1e-6),
    )


def _on_levels(x: Tensor, data: Data) -> Tensor:
    """Values as a file of such data would hold them."""
    unit = ((x - data.low) / (data.high - data.low)).clamp(0, 1)
    if data.levels:
        unit = (unit * data.levels).round() / data.levels
    return data.low + (data.high - data.low) * unit


def _seen(module: Any, images: _Images, stage: _Stages) -> dict[str, tuple[Tensor, Tensor]]:
    """The features and logits of each kind of image; there are n of each, but for those set aside."""
    n = len(images.x)
    kinds = {"real": images.real, "held": images.held[:n], "x": images.x, "noise": images.noise}
    kinds["aside"] = images.train[images.aside]
    found = {}
    for i, (name, x) in enumerate(kinds.items()):
        stage("features", 0.05 + 0.06 * (i + 1))
        found[name] = features(module, x)
    return found


def _beside(measure: Callable[[str], T]) -> Beside[T]:
    return Beside(measure("x"), measure("held"), measure("noise"))


def _memory(images: _Images, named: dict[str, Tensor], device: torch.device, stage: _Stages) -> tuple[Near, Beside[Memory]]:
    """The samples' neighbours, and what was memorized."""
    train, held = images.train.to(device), images.held.to(device)
    near = Near.of(images.x.to(device), train, held, tell=stage("nearest real examples", 0.75))
    control, _ = nearest(held[: min(CONTROL, len(images.x))], train, tell=stage("those of held-out examples", 0.82))
    own = images.aside.to(device)
    usual = Near.of(train[own], train, held, own, tell=stage("those of training examples", 0.9))
    cells = named["held"][: len(control)]
    found = [
        memory(one, named[name], control[:, 0].cpu(), cells, images.rounding) for one, name in ((near, "x"), (usual, "aside"))
    ]
    return near, Beside(*found)


def _birthday(images: _Images, device: torch.device, stage: _Stages) -> Birthday:
    """The support, with as many training examples for the real ones."""
    stage("collisions", 0.97)
    x, real, held = (thumbnails(kind.to(device)) for kind in (images.x, images.real, images.held[: len(images.x)]))
    return birthday(*(collisions(kind, scale(kind, held, images.rounding)).cpu() for kind in (x, real)))


def _told(source: Source, images: _Images, stage: _Stages) -> tuple[int, int] | None:
    """How many held-out examples the source's own discriminator tells from samples."""
    tell, n, found = stage("the discriminator", 1.0), len(images.x), None
    if isinstance(source, Pair):
        found = told_apart(scores(source, images.held[:n], images.held_y[:n]), scores(source, images.x, images.asked))
    tell(1.0)
    return found
