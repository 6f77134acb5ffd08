"""Training of the inverter, which reads from an input the code that a generator would draw it from.

Symbols: x is an input in [0, 1] and y its label, z a code and w a class drawn at random, G the generator, I the inverter, whose
two heads give a code and logits of classes.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from advkit.course import Diverged
from advkit.data import Data
from advkit.engine import frozen
from advkit.errors import UsageError
from advkit.gan.inverter import Inverter
from advkit.gan.pair import Pair
from advkit.gan.source import check_source
from advkit.spec import check_positive, check_whole
from advkit.train import drawing, place, seed_of, split

LAMBDA = 0.1
"""The weight of the error of codes, and of the cross entropy of classes."""
BATCH = 250
"""How many inputs are read at a time where nothing is learned."""


@dataclass(frozen=True)
class Progress:
    """Where a fit stands.

    Attributes:
        step: How many steps are done.
        steps: How many there are.
        loss: The last one's loss.
    """

    step: int
    steps: int
    loss: float


def fit(
    pair: Pair,
    data: Data,
    *,
    epochs: int = 1,
    batch_size: int = 32,
    lr: float = 1e-3,
    seed: int = 0,
    device: torch.device | str = "cpu",
    report: Callable[[Progress], None] | None = None,
) -> Pair:
    r"""The pair with an inverter, by Adam on mean (G(I(x)) - x)^2 + lambda * mean (I(G(z)) - z)^2.

    For a conditional generator, G(I(x)) is drawn of the class y, and lambda times the cross entropy of the classes is added,
    on x and on G(z, w). The learning rate falls to 0 along half a cosine.

    Zhao, Dua and Singh, 2018, "Generating natural adversarial examples", https://arxiv.org/abs/1710.11342.

    Arguments:
        pair: The generator; it is not changed.
        data: What inputs are like, with their labels.
        epochs: Passes over the data.
        batch_size: Inputs a step, and as many samples.
        lr: The first learning rate.
        seed: Of the first weights, the order and the draws.
        device: Where to train.
        report: Called after each step.

    Raises:
        UsageError: The data are not what the generator draws, a number is out of range; or, as ``Diverged``, the loss became
            NaN or infinite.
    """
    check_whole("epochs", epochs, 1)
    check_whole("batch size", batch_size, 2)
    check_positive("the learning rate", lr)
    check_data(pair, data)
    where = place(device)
    with drawing(seed_of(seed, "inverter")):
        inverter = Inverter(pair.shape, pair.settings.d, pair.labels).to(where).train()
    moved = dataclasses.replace(pair, generator=copy.deepcopy(pair.generator).to(where), inverter=inverter)
    optimizer = torch.optim.Adam(inverter.parameters(), lr)
    batches = [(epoch, i) for epoch in range(epochs) for i in _order(data, batch_size, seed, epoch)]
    with frozen(moved.generator), torch.enable_grad():
        for step, (epoch, positions) in enumerate(batches):
            x, y = unit(pair, data.take(data.index[positions])).to(where, torch.float32), data.y[positions].to(where)
            rng = torch.Generator().manual_seed(seed_of(seed, f"{epoch} {step}"))
            optimizer.param_groups[0]["lr"] = lr * (1 + math.cos(math.pi * step / len(batches))) / 2
            optimizer.zero_grad(set_to_none=True)
            loss = _loss(moved, x, y, rng)
            loss.backward()
            value = float(loss.detach())
            if not math.isfinite(value):
                raise Diverged(f"the inverter's loss became {value}; try a lower learning rate than {lr:g}")
            optimizer.step()
            if report is not None:
                report(Progress(step + 1, len(batches), value))
    return dataclasses.replace(pair, inverter=inverter.cpu().eval().requires_grad_(False), digest="")


def _order(data: Data, batch_size: int, seed: int, epoch: int) -> list[Tensor]:
    rng = torch.Generator().manual_seed(seed_of(seed, epoch))
    return split(torch.randperm(len(data), generator=rng), batch_size)


def _loss(pair: Pair, x: Tensor, y: Tensor, rng: torch.Generator) -> Tensor:
    """The loss of a batch of inputs in [0, 1] and their labels, and of as many samples, with shape ()."""
    conditional = bool(pair.settings.conditional)
    z, w = pair.latent(len(x), rng).to(x), torch.randint(pair.labels, y.shape, generator=rng).to(y)
    with torch.no_grad():
        drawn = pair.generator(z, w) if conditional else pair.generator(z)
    assert pair.inverter is not None
    codes, logits = pair.inverter(torch.cat([x, drawn]))
    own, other = codes.split(len(x))
    back = pair.generator(own, y) if conditional else pair.generator(own)
    named = F.cross_entropy(logits, torch.cat([y, w])) if conditional else 0.0
    return (back - x).square().mean() + LAMBDA * ((other - z).square().mean() + named)


def unit(pair: Pair, x: Tensor) -> Tensor:
    """Inputs in the pair's range as inputs in [0, 1]."""
    return (x - pair.low) / (pair.high - pair.low)


def check_data(pair: Pair, data: Data) -> None:
    """Refuse data that are not what a pair draws.

    Raises:
        UsageError: There are fewer than two examples, of another shape, range, or with other classes.
    """
    if len(data) < 2:
        raise UsageError(f"{data.name} holds {len(data)} examples; an inverter needs at least two")
    check_source(pair, "the generator", tuple(data.batch(0, 1)[0].shape[1:]), (data.low, data.high))
    if pair.settings.conditional and int(data.y.max()) >= pair.labels:
        raise UsageError(f"the greatest label is {int(data.y.max())}; the generator has classes 0 to {pair.labels - 1}")


@dataclass(frozen=True)
class Reading:
    """How well an inverter reads inputs.

    Attributes:
        error: The root of the mean square of G(I(x)) - x, as a share of the range.
        right: How many classes it reads right; 0 where the generator takes none.
        of: How many inputs there are.
    """

    error: float
    right: int
    of: int


def read(pair: Pair, data: Data) -> Reading:
    """How well the inverter of a pair reads data.

    Raises:
        UsageError: It has none, or the data are not what it draws.
    """
    check_data(pair, data)
    squares, right = 0.0, 0
    for start in range(0, len(data), BATCH):
        x, y = data.batch(start, start + BATCH)
        z, w = pair.invert(x)
        with torch.no_grad():
            squares += float((unit(pair, pair.decode(z, w)) - unit(pair, x)).double().square().mean()) * len(x)
        right += 0 if w is None else int((w == y).sum())
    return Reading(math.sqrt(squares / len(data)), right, len(data))
