"""The one training loop of generators and discriminators.

Symbols: one step takes a batch x of data, (B, *), scaled to [0, 1], and its labels y; the discriminator moves first. t is the
share of all steps that are done.

Everything random in epoch e is drawn from generators seeded by (seed, e), so a run that was killed and resumed ends with the
same weights as one that was not. Under torchrun each process takes its share of every batch, and all step with the mean of the
gradients.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from advkit import processes, tensors
from advkit.course import Course, Diverged, damaged, resumed
from advkit.data.dataset import Data
from advkit.errors import UsageError
from advkit.gan.collapse import ALARM, DATA, SAMPLES, Bins
from advkit.recipe import PRECISIONS, SCHEDULES, Recipe
from advkit.spec import check_at_least, check_choice, check_positive, check_share, check_whole
from advkit.train import drawing, mean_gradients, place, seed_of, split

HOPELESS = 1000
"""After so many steps in which the discriminator made no mistake, the generator learns nothing more."""
GRID = 100
"""How many samples a picture of an epoch shows."""


class Game(Protocol):
    """Two networks and what each of them descends. Inputs are in [0, 1]."""

    generator: nn.Module
    discriminator: Any

    @property
    def evenly(self) -> bool:
        """Whether the generator learns from being told apart, so that a discriminator that is always right ends the game."""

    def begin(self, x: Tensor) -> None:
        """Start from a batch of data, (N, *), before the first step."""

    def draw(self, n: int, y: Tensor, rng: torch.Generator) -> Tensor:
        """``n`` samples, with shape (n, *), of classes (n,) where the generator takes any."""

    def discriminate(self, x: Tensor, y: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """The discriminator's loss, with shape (), and the share of data and of drawings that it tells apart, with shape ()."""

    def generate(self, x: Tensor, y: Tensor, rng: torch.Generator) -> Tensor:
        """The generator's loss, with shape ()."""


@dataclass(frozen=True)
class Match:
    """How a game is played.

    Arguments:
        epochs: Passes over the data.
        batch_size: Examples a step.
        lr: The generator's learning rate.
        lr_discriminator: The discriminator's: two time scales (Heusel et al., 2017, https://arxiv.org/abs/1706.08500).
        beta_1: Of Adam, for both, in [0, 1).
        beta_2: Of Adam, for both, in [0, 1).
        small: What Adam adds to the root of the second moment.
        turns: Steps of the discriminator for each of the generator.
        average: The weights at the end are an exponential moving average that keeps this share at each step, in [0, 1).
        schedule: Of the learning rates: one of :data:`advkit.recipe.SCHEDULES`.
        precision: ``float32``, or ``bfloat16`` for mixed precision.

    Raises:
        UsageError: A number out of range, or an unknown name.
    """

    epochs: int = 20
    batch_size: int = 64
    lr: float = 2e-4
    lr_discriminator: float = 2e-4
    beta_1: float = 0.5
    beta_2: float = 0.999
    small: float = 1e-8
    turns: int = 1
    average: float = 0.999
    schedule: str = "constant"
    precision: str = "float32"

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "turns"):
            check_whole(name.replace("_", " "), getattr(self, name), 1)
        check_at_least("batch size", self.batch_size, 2)
        check_positive("the generator's learning rate", self.lr)
        check_positive("the discriminator's learning rate", self.lr_discriminator)
        check_positive("small", self.small)
        for name in ("beta_1", "beta_2", "average"):
            check_share(name, getattr(self, name))
        check_choice("schedule", self.schedule, SCHEDULES)
        check_choice("precision", self.precision, PRECISIONS)


MATCHES = {
    "mlp": Match(epochs=50, batch_size=100),
    "dcgan": Match(epochs=10, lr=1e-3, schedule="linear"),
    "biggan": Match(epochs=4, lr=1e-3, lr_discriminator=5e-4, schedule="linear"),
    "ssgan": Match(epochs=100, batch_size=100, lr=3e-3, lr_discriminator=3e-3, small=1e-4, average=0.99, schedule="linear"),
}
"""How each pair of networks that has a name is trained."""


@dataclass(frozen=True)
class Round:
    """What an epoch was like.

    Attributes:
        epoch: The epoch, from 0.
        d_loss: The discriminator's mean loss.
        g_loss: The generator's.
        told: The mean share of data and of drawings that the discriminator told apart: 1/2 where it cannot.
        lost: The share of the data that the generator, with averaged weights, all but leaves out at the end of the epoch.
    """

    epoch: int
    d_loss: float
    g_loss: float
    told: float
    lost: float

    @property
    def collapsed(self) -> bool:
        """Whether so much of the data is left out that the modes of the generator have collapsed."""
        return self.lost >= ALARM


def alarm(history: Sequence[Round]) -> str:
    """A sentence of warning where the generator has collapsed at the end of a game, or stayed so; empty where it has not.

    One bad epoch on the way may pass; the last two, or the last one of a short game, are what the weights are.
    """
    last = history[-2:]
    if not last or not all(entry.collapsed for entry in last):
        return ""
    lost = f"{100 * last[-1].lost:.0f} % of the data lie where the generator hardly draws"
    return f"mode collapse: {lost}; try more epochs, another seed, a lower learning rate, or dcgan(minibatch=16)"


@dataclass(frozen=True)
class Status:
    """Where a game stands.

    Attributes:
        epoch: The epoch, from 0.
        epochs: How many there are.
        step: How many steps of the discriminator are done, of all epochs.
        steps: How many there are.
        d_loss: The discriminator's mean loss of the epoch so far.
        g_loss: The generator's.
        told: The share told apart, of the epoch so far.
        history: The rounds that are done.
        samples: At the end of an epoch, what the generator draws with averaged weights, in [0, 1]; else None.
    """

    epoch: int
    epochs: int
    step: int
    steps: int
    d_loss: float
    g_loss: float
    told: float
    history: tuple[Round, ...]
    samples: Tensor | None = None


def play(
    game: Game,
    data: Data,
    match: Match,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    partial: Path | None = None,
    identity: str = "",
    report: Callable[[Status], None] | None = None,
) -> tuple[Round, ...]:
    """Train the two networks of a game in place.

    Arguments:
        game: The game; its networks are moved to ``device`` and left in evaluation mode, with averaged weights where the match
            has them.
        data: What to learn from; the labels are the game's to use.
        match: How.
        seed: Where the order of the examples, and all draws, come from.
        device: Where to train; under torchrun, ``cuda`` is a GPU for each process.
        partial: A file that holds the game after each epoch, so that the same call goes on where it stopped; the caller
            removes it when the networks are safe.
        identity: What else (networks, losses) makes this game the same as the one in ``partial``.
        report: Called after each step, and at the end of each epoch with samples.

    Returns:
        A round for each epoch.

    Raises:
        UsageError: There are fewer than ten examples, ``partial`` holds another game; or, as ``Diverged``, a loss became NaN or
            infinite, or the discriminator made no mistake for a thousand steps. The networks then have the last good weights.
    """
    if len(data) < 10:
        raise UsageError(f"{data.name} holds {len(data)} examples; a game needs at least 10")
    where = place(device)
    for net in (game.generator, game.discriminator):
        # Convolutions of either kind of device are faster so; it is an order in memory and nothing else.
        net.to(where).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    about = {"match": asdict(match), "seed": seed, "data": data.digest(), "identity": identity}
    table = _Table(game, data, match, seed, where, json.dumps(about, sort_keys=True), report)
    with processes.together():
        for epoch in range(table.open(partial), match.epochs):
            table.epoch(epoch)
            if partial:
                table.save(partial, epoch + 1)
    table.close()
    return tuple(table.history)


Means = dict[str, float]
"""The mean losses of an epoch, and the share that was told apart."""


def _means(sums: Tensor, n: int) -> Means:
    return dict(zip(("d_loss", "g_loss", "told"), (sums / n).tolist(), strict=True))


class _Table:
    """A game that is being played: both sides, and what is known of the past."""

    def __init__(self, game: Game, data: Data, match: Match, seed: int, device: torch.device, name: str, report: Any) -> None:
        self.game, self.data, self.match, self.seed, self.device = game, data, match, seed, device
        self.name, self.report = name, report
        self.steps = len(split(torch.arange(len(data)), match.batch_size))
        self.history: list[Round] = []
        self.faultless = 0
        rng = torch.Generator().manual_seed(seed_of(seed, "bins"))
        self.look = torch.randperm(len(data), generator=rng)[:DATA]
        self.bins = Bins.of(self.unit(data.take(data.index[self.look])), rng)

    def unit(self, x: Tensor) -> Tensor:
        """Inputs in the data's range as inputs in [0, 1]."""
        return (x - self.data.low) / (self.data.high - self.data.low)

    def open(self, partial: Path | None) -> int:
        """Begin, or go on with the game in a file; the first epoch to play."""
        found = resumed(partial, self.name) if partial else None
        if found is None:
            with drawing(seed_of(self.seed, "begin")), torch.no_grad():
                self.game.discriminator.train()
                self.game.begin(self.unit(self.data.take(self.data.index[self.look[:500]])).to(self.device))
        match = self.match
        recipe = Recipe(epochs=match.epochs, schedule=match.schedule, average=match.average, precision=match.precision)
        betas = match.beta_1, match.beta_2
        nets = {
            "generator": (self.game.generator, match.lr),
            "discriminator": (self.game.discriminator, match.lr_discriminator),
        }
        self.sides = {
            name: Course(net, torch.optim.Adam(_learned(net), lr, betas, match.small), recipe)
            for name, (net, lr) in nets.items()
        }
        first = self._resume(partial, *found) if partial and found else 0
        for side in self.sides.values():
            side.agree()
        return first

    def _resume(self, partial: Path, held: dict[str, Tensor], about: dict[str, Any]) -> int:
        with damaged(partial):
            for name, side in self.sides.items():
                own = {key.removeprefix(f"{name}."): value for key, value in held.items() if key.startswith(f"{name}.")}
                side.put_back(own, about[name])
            self.history = [Round(**entry) for entry in about["rounds"]]
            self.faultless = int(about["faultless"])
            return len(self.history)

    def save(self, partial: Path, epoch: int) -> None:
        """Write the game to its file, in the first process."""
        if processes.group()[0] == 0:
            held: dict[str, Tensor] = {}
            about: dict[str, Any] = {"rounds": [asdict(entry) for entry in self.history], "faultless": self.faultless}
            for name, side in self.sides.items():
                own, about[name] = side.state()
                held |= {f"{name}.{key}": value for key, value in own.items()}
            tensors.write(partial, held, {"run": self.name, "progress": json.dumps(about)})
        processes.barrier()

    def close(self) -> None:
        """Leave both networks with the weights to keep."""
        for side in self.sides.values():
            side.model.load_state_dict(side.good)
            side.model.eval()

    def epoch(self, epoch: int) -> None:
        """Play every step of an epoch, and look at what the generator draws."""
        rank, world = processes.group()
        order = torch.Generator().manual_seed(seed_of(self.seed, epoch))
        rng = torch.Generator().manual_seed(seed_of(self.seed, f"{epoch} {rank}"))
        sums, g_loss, batches = torch.zeros(3, dtype=torch.float64), math.nan, self._batches(order)
        for side in self.sides.values():
            side.model.train()
        with drawing(seed_of(self.seed, f"{epoch} {rank}")), torch.enable_grad():
            for i, (own, other) in enumerate(batches):
                step = epoch * self.steps + i
                d_loss, told = self._discriminate(*self._share(own, rank, world), rng, step)
                if (step + 1) % self.match.turns == 0 or not math.isfinite(g_loss):
                    g_loss = self._generate(*self._share(other, rank, world), rng, step)
                sums += torch.tensor([d_loss, g_loss, told], dtype=torch.float64)
                self._watch(told, epoch)
                if self.report:
                    self.report(self._status(epoch, step + 1, _means(sums, i + 1)))
        self._end(epoch, _means(sums, self.steps))

    def _batches(self, order: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """The positions of each step's batches: the discriminator's and the generator's."""
        own, other = (split(torch.randperm(len(self.data), generator=order), self.match.batch_size) for _ in range(2))
        return zip(own, other, strict=True)

    def _share(self, positions: Tensor, rank: int, world: int) -> tuple[Tensor, Tensor]:
        """This process's share of a batch, on its device, in [0, 1]."""
        if len(positions) >= 2 * world:
            positions = positions[rank::world]
        x = self.unit(self.data.take(self.data.index[positions])).to(self.device, torch.float32)
        x = x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x
        return x, self.data.y[positions].to(self.device)

    def _discriminate(self, x: Tensor, y: Tensor, rng: torch.Generator, step: int) -> tuple[float, float]:
        with self._mixed():
            loss, told = self.game.discriminate(x, y, rng)
        told = told.detach().float()
        processes.mean(told)
        return self._step("discriminator", loss, step), float(told)

    def _generate(self, x: Tensor, y: Tensor, rng: torch.Generator, step: int) -> float:
        with _fixed(self.game.discriminator), self._mixed():
            loss = self.game.generate(x, y, rng)
        return self._step("generator", loss, step)

    def _mixed(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.match.precision == "bfloat16")

    def _step(self, name: str, loss: Tensor, step: int) -> float:
        side = self.sides[name]
        side.set_rate(step / (self.match.epochs * self.steps))
        side.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        value = mean_gradients(side.model, loss.detach())
        if not math.isfinite(value):
            raise self._ended(step // self.steps, f"the {name}'s loss became {'NaN' if math.isnan(value) else 'infinite'}")
        side.step()
        return value

    def _watch(self, told: float, epoch: int) -> None:
        """End a game in which the discriminator makes no mistakes any more."""
        self.faultless = self.faultless + 1 if told == 1.0 else 0
        if self.game.evenly and self.faultless >= HOPELESS:
            raise self._ended(epoch, f"the discriminator made no mistake in {HOPELESS:,} steps")

    def _ended(self, epoch: int, why: str) -> Diverged:
        self.close()
        weights = f"the weights after epoch {epoch} were kept" if epoch else "no epoch was done"
        lower = f"try lower learning rates than {self.match.lr:g} and {self.match.lr_discriminator:g}"
        return Diverged(
            f"{why} in epoch {epoch + 1}, and {weights}; {lower}, or a hinge loss on a pair with spectral norms (biggan)"
        )

    def _status(self, epoch: int, step: int, means: Means, samples: Tensor | None = None) -> Status:
        epochs, history = self.match.epochs, tuple(self.history)
        return Status(epoch, epochs, step, epochs * self.steps, **means, history=history, samples=samples)

    def _end(self, epoch: int, means: Means) -> None:
        for side in self.sides.values():
            for name, buffer in side.model.named_buffers():
                for value in (buffer, side.average.get(name)):
                    if value is not None and value.is_floating_point():
                        processes.mean(value)
        samples = self._samples()
        if not bool(samples.isfinite().all()):
            raise self._ended(epoch, "the generator drew NaN or infinite values")
        for side in self.sides.values():
            side.good = {key: v.detach().clone() for key, v in (side.average or side.model.state_dict()).items()}
        self.history.append(Round(epoch, **means, lost=self.bins.lost(samples)))
        if self.report:
            self.report(self._status(epoch, (epoch + 1) * self.steps, means, samples[:GRID]))

    def _samples(self) -> Tensor:
        """What the generator draws with averaged weights, of classes as the data have them, with shape (N, *)."""
        rng, side = torch.Generator().manual_seed(seed_of(self.seed, "samples")), self.sides["generator"]
        y = self.data.y[self.look[torch.arange(SAMPLES) % len(self.look)]].to(self.device)
        side.model.eval()
        with side.averaged(), torch.no_grad():
            return self.game.draw(SAMPLES, y, rng).float().cpu()


def _learned(net: nn.Module) -> list[nn.Parameter]:
    """The parameters that are learned."""
    return [p for p in net.parameters() if p.requires_grad]


@contextlib.contextmanager
def _fixed(net: nn.Module) -> Iterator[None]:
    """No gradient for the parameters of the other side."""
    learned = _learned(net)
    try:
        for p in learned:
            p.requires_grad_(False)
        yield
    finally:
        for p in learned:
            p.requires_grad_(True)
