"""The one training loop: plain training here, any other through the loss it is given.

Symbols: one step takes a batch x, (B, *), and its labels y, (B,); t is the share of all steps that are done.

Everything random in epoch e is drawn from a generator seeded by (seed, e), so a run that was killed and resumed ends with
the same weights, bit for bit, as one that was not. Under torchrun each process takes its share of every batch, and all of
them step with the mean of the gradients.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from advkit import models, processes
from advkit.audio.ctc import CTC
from advkit.audio.recogniser import Phrases
from advkit.audio.text import wer
from advkit.course import Check as Check
from advkit.course import Course, numbers
from advkit.course import Diverged as Diverged
from advkit.course import kept as kept
from advkit.data.dataset import Data
from advkit.engine import frozen
from advkit.errors import ModelError, UsageError, first_line
from advkit.oracle import answer, logits_of, top1
from advkit.recipe import RECIPES as RECIPES
from advkit.recipe import SCHEDULES as SCHEDULES
from advkit.recipe import Recipe as Recipe
from advkit.spec import check_positive, check_share


class TrainingLoss(Protocol):
    """What a step descends: (model, x, y, rng, at) to a mean over the batch, with shape ().

    A loss with an attribute ``replays`` is called, and a step taken, so many times on each batch, over as many times fewer
    epochs. One with an attribute ``settled`` is at its full strength once that share of all steps is done. What a loss keeps
    from step to step lasts for an epoch: each begins with a fresh copy of the loss.
    """

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, rng: torch.Generator, at: float = 1.0) -> Tensor:
        """The loss; any random draw comes from ``rng``, and schedules go by ``at``, the share of all steps that are done."""


@dataclass(frozen=True)
class CrossEntropy:
    """-log softmax(model(x))_y, the loss of plain training.

    Arguments:
        smoothing: The share of the label that is spread over all classes, in [0, 1).

    Raises:
        UsageError: The share is out of range.
    """

    smoothing: float = 0.0

    def __post_init__(self) -> None:
        check_share("smoothing", self.smoothing)

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, rng: torch.Generator, at: float = 1.0) -> Tensor:
        """The mean over the batch, with shape ()."""
        return F.cross_entropy(logits_of(model(x)), y, label_smoothing=self.smoothing)


@dataclass(frozen=True)
class Spelling:
    """-log P(text | x) over all ways to say it, the loss of a network that spells: see :class:`advkit.audio.ctc.CTC`.

    Arguments:
        texts: The texts; label y stands for ``texts[y]``.
    """

    texts: tuple[str, ...]

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, rng: torch.Generator, at: float = 1.0) -> Tensor:
        """The mean over the batch, with shape ()."""
        recogniser = CTC(model)
        return recogniser.loss(recogniser(x), [self.texts[k] for k in y.tolist()]).mean()


@dataclass(frozen=True)
class Progress:
    """Where a training run stands.

    Attributes:
        epoch: The epoch, from 0.
        epochs: How many there are.
        step: How many steps are done, of all epochs.
        steps: How many there are.
        loss: The mean loss of the epoch so far.
        history: The checks so far, one for each epoch that is done, where there are any.
    """

    epoch: int
    epochs: int
    step: int
    steps: int
    loss: float
    history: tuple[Check, ...] = ()


@dataclass(frozen=True)
class Extra:
    """Examples that fill a share of every batch: generated ones, or unlabelled ones with the labels of another network.

    Gowal, Rebuffi, Wiles, Stimberg, Calian and Mann, 2021, "Improving robustness using generated data",
    https://arxiv.org/abs/2110.09468. An epoch has as many steps as without them, so that runs can be compared.

    Arguments:
        data: The examples.
        share: Of a batch, greater than 0 and less than 1.

    Raises:
        UsageError: The share is out of range.
    """

    data: Data
    share: float = 0.7

    def __post_init__(self) -> None:
        check_positive("the share of extra data", self.share)
        check_share("the share of extra data", self.share)


def train(
    model: nn.Module,
    data: Data,
    recipe: Recipe,
    *,
    loss: TrainingLoss | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    partial: Path | None = None,
    identity: str = "",
    report: Callable[[Progress], None] | None = None,
    check: Callable[[nn.Module, int, bool], Check] | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    extra: Extra | None = None,
    compile: bool = False,
) -> nn.Module:
    """Train ``model`` in place.

    Arguments:
        model: The network; it is moved to ``device`` and left in evaluation mode.
        data: What to learn.
        recipe: How.
        loss: What a step descends; by default, the cross entropy.
        seed: Where the order of the examples, and whatever the loss draws, come from.
        device: Where to train; under torchrun, ``cuda`` is a GPU for each process.
        partial: A file that holds the run after each epoch, so that the same call goes on where it stopped; the caller
            removes it when the model is safe.
        identity: What else (network, data, loss) makes this run the same as the one in ``partial``.
        report: Called after each step, and at the end of an epoch that was checked.
        check: Called with the model, the epoch and whether the loss is at full strength, at the end of each epoch; the
            model is then left with the weights that :func:`kept` names, else with the last.
        optimizer: In place of the recipe's, made from the model's parameters on ``device``; the recipe's schedule scales
            the learning rates that it has. With ``partial``, what it keeps should be tensors, numbers and text.
        extra: Examples that fill a share of every batch.
        compile: Whether the loss is given the model as torch.compile translates it.

    Returns:
        The model.

    Raises:
        UsageError: The model, the data, the loss or the optimizer cannot be trained with, ``partial`` holds another run; or, as
            ``Diverged``, the loss became NaN or infinite.
    """
    loss = CrossEntropy() if loss is None else loss
    model = model.to(place(device))
    check_fits(model, data)
    _check_batches(model, data, recipe, extra)
    replays = getattr(loss, "replays", 1)
    recipe = replace(recipe, epochs=max(1, round(recipe.epochs / replays)))
    about = {"recipe": asdict(recipe), "seed": seed, "data": data.digest(), "identity": identity}
    if extra:
        about |= {"extra": extra.data.digest(), "share": extra.share}
    run = Course(model, recipe.build(model.parameters()) if optimizer is None else optimizer, recipe)
    about["optimizer"] = [type(run.optimizer).__name__, *map(numbers, run.optimizer.param_groups)]
    name = json.dumps(about, sort_keys=True)
    epoch_of = _Epoch(run, data, loss, extra, replays, _compiled(model) if compile else model, report)
    with processes.together():
        first = run.resume(partial, name) if partial else 0
        run.agree()
        if report and run.history:
            report(epoch_of.progress(first - 1, first * epoch_of.steps))
        for epoch in range(first, recipe.epochs):
            epoch_of(epoch, seed)
            run.end(epoch, epoch_of.few, check and _checked(check, run, loss))
            if report and run.history:
                report(epoch_of.progress(epoch, (epoch + 1) * epoch_of.steps))
            if partial:
                run.save(partial, name, epoch + 1)
    model.load_state_dict(run.good)
    return model.eval()


def place(device: torch.device | str) -> torch.device:
    """The device of a name; under torchrun, ``cuda`` is a GPU for each process.

    Raises:
        UsageError: There is no such device.
    """
    return models.find_device(processes.device_of(str(device)))


FEW = 8
"""How many examples a model is looked at with."""


def plain(model: nn.Module, data: Data) -> TrainingLoss:
    """The loss of plain training: :class:`Spelling` for a network that spells, and the cross entropy for any other."""
    return Spelling(data.classes) if hasattr(model, "alphabet") else CrossEntropy()


def answering(model: nn.Module, data: Data) -> tuple[nn.Module, Callable[[Tensor, Tensor], Tensor]]:
    """What answers for a network, and when its outputs say a label, (outputs, y) to (N,) bool: the class, or the text."""
    if not hasattr(model, "alphabet"):
        return model, top1
    recogniser = CTC(model)
    return recogniser, Phrases(recogniser, data.classes).says


def check_fits(model: nn.Module, data: Data) -> None:
    """Refuse data that a model cannot learn from, or be checked on.

    Raises:
        UsageError: There are no parameters or no examples, the model does not take such inputs, or labels are not its classes.
    """
    first = next(model.parameters(), None)
    if first is None:
        raise UsageError("the model has no parameters; there is nothing to train")
    if not len(data):
        raise UsageError(f"{data.name} holds no examples; there should be at least one")
    _check_rate(model, data)
    x, _ = data.batch(0, FEW)
    if hasattr(model, "alphabet"):
        _check_spells(model, data, x.to(first))
        return
    # A model whose answers are random draws from the global generator.
    with drawing(0):
        models.inspect(models.wrap(model), x.to(first), data.y, len(data.classes))


def _check_rate(model: nn.Module, data: Data) -> None:
    """Refuse sounds at another rate than a network's own."""
    rate = getattr(model, "rate", None)
    if rate is None:
        return
    if data.kind != "waveform":
        raise UsageError(f"{data.name} is of kind {data.kind}; the network takes waveforms")
    if data.rate not in (None, rate):
        has = f"{data.name} has {data.rate} samples a second and the network takes {rate}"
        raise UsageError(f"{has}; build it for that, with rate={data.rate}")


def _check_spells(model: nn.Module, data: Data, x: Tensor) -> None:
    """Refuse texts that a network cannot say, and sounds that it cannot take."""
    if not data.classes:
        raise UsageError(f"{data.name} has no names of classes; a network that spells learns their letters")
    recogniser = CTC(model)
    for text in data.classes:
        recogniser.check_text(text)
    with frozen(model), torch.no_grad():
        answer(recogniser, x)


def _check_batches(model: nn.Module, data: Data, recipe: Recipe, extra: Extra | None) -> None:
    if min(recipe.batch_size, len(data)) == 1 and any(isinstance(layer, nn.BatchNorm1d) for layer in model.modules()):
        raise UsageError("a batch would be one example, which has no statistics for the model's batch normalization; give more")
    if extra is None:
        return
    check_fits(model, extra.data)
    of, extra_of = ((tuple(d.batch(0, 1)[0].shape[1:]), d.low, d.high) for d in (data, extra.data))
    if of != extra_of:
        given, wanted = ("{} in [{:g}, {:g}]".format(*form) for form in (extra_of, of))
        raise UsageError(f"the extra data have shape {given} and the data {wanted}; both should be alike")
    if recipe.batch_size == 1:
        raise UsageError("the batch size is 1, which leaves no room for extra data; it should be at least 2")


@contextlib.contextmanager
def drawing(seed: int) -> Iterator[None]:
    """Dropout and the like draw from the global generators: seeded here, and put back."""
    with torch.random.fork_rng(range(torch.accelerator.device_count())):
        torch.manual_seed(seed)
        yield


def _compiled(model: nn.Module) -> nn.Module:
    compiled: nn.Module = torch.compile(model)  # type: ignore[assignment]
    return compiled


def _checked(check: Callable[[nn.Module, int, bool], Check], run: Course, loss: TrainingLoss) -> Callable[[int], Check]:
    """The check at the end of an epoch, with the averaged weights where there are any."""

    def at_end(epoch: int) -> Check:
        full = (epoch + 1) / run.recipe.epochs >= getattr(loss, "settled", 0.0)
        with run.averaged():
            return check(run.model, epoch, full)

    return at_end


def seed_of(seed: int, what: int | str) -> int:
    """The seed of one part of a run: an epoch, or what a process draws in it."""
    return int.from_bytes(hashlib.sha256(f"{seed} {what}".encode()).digest()[:7])


@dataclass
class _Epoch:
    """One pass over the data."""

    run: Course
    data: Data
    loss: TrainingLoss
    extra: Extra | None
    replays: int
    model: nn.Module
    report: Callable[[Progress], None] | None
    mean: float = math.nan

    def __post_init__(self) -> None:
        self.steps = len(split(torch.arange(len(self.data)), self.run.recipe.batch_size)) * self.replays
        self.few = self.data.batch(0, FEW)[0].to(next(self.run.model.parameters()))

    def progress(self, epoch: int, step: int) -> Progress:
        """Where the run stands after so many steps."""
        epochs = self.run.recipe.epochs
        return Progress(epoch, epochs, step, epochs * self.steps, self.mean, tuple(self.run.history))

    def __call__(self, epoch: int, seed: int) -> None:
        """Take every step of an epoch."""
        rank, world = processes.group()
        order = torch.Generator().manual_seed(seed_of(seed, epoch))
        # Each process draws for itself what its loss needs.
        rng = order if world == 1 else torch.Generator().manual_seed(seed_of(seed, f"{epoch} {rank}"))
        loss, total, step = _afresh(self.loss), 0.0, epoch * self.steps
        self.run.model.train()
        with drawing(seed_of(seed, epoch if world == 1 else f"{epoch} {rank}")), torch.enable_grad():
            for x, y in _batches(self.data, self.run.recipe, order, self.extra):
                x, y, weight = self._share(x, y, rank, world)
                for _ in range(self.replays):
                    total += self._step(loss, x, y, rng, step, weight)
                    step += 1
                    self.mean = total / (step - epoch * self.steps)
                    if self.report:
                        self.report(self.progress(epoch, step))

    def _share(self, x: Tensor, y: Tensor, rank: int, world: int) -> tuple[Tensor, Tensor, float]:
        """This process's share of a batch, on its device, and by how much its mean counts for more than others'."""
        first, n = next(self.run.model.parameters()), len(x)
        # Two for each, as a batch norm refuses one; of fewer, each takes all.
        shared = world > 1 and n >= 2 * world
        if shared:
            x, y = x[rank::world], y[rank::world]
        x = x.to(first)
        if x.ndim == 4 and first.is_cuda:
            x = x.contiguous(memory_format=torch.channels_last)
        return x, y.to(first.device), len(x) * world / n if shared else 1.0

    def _step(self, loss: TrainingLoss, x: Tensor, y: Tensor, rng: torch.Generator, step: int, weight: float) -> float:
        """Take one step and return the loss before it."""
        run, t = self.run, step / (self.run.recipe.epochs * self.steps)
        run.set_rate(t)
        mixed = torch.autocast(x.device.type, torch.bfloat16, enabled=run.recipe.precision == "bfloat16")
        try:
            with mixed:
                value = loss(self.model, x, y, rng, t)
        except ModelError:
            # An attack refuses a model that answers NaN.
            if run.sound(x):
                raise
            raise run.diverged(step // self.steps) from None
        _check_value(value)
        value = weight * value
        run.optimizer.zero_grad(set_to_none=True)
        value.backward()
        mean = mean_gradients(run.model, value.detach())
        if not math.isfinite(mean):
            raise run.diverged(step // self.steps, "NaN" if math.isnan(mean) else "infinite")
        run.step()
        return mean


def _afresh(loss: TrainingLoss) -> TrainingLoss:
    try:
        return copy.deepcopy(loss)
    except Exception as error:
        sentence = f"the loss {type(loss).__name__} cannot be copied for each epoch ({first_line(error)})"
        raise UsageError(f"{sentence}; give it a method __deepcopy__ that returns itself, if it keeps nothing") from error


def _check_value(value: Any) -> None:
    if not isinstance(value, Tensor) or value.shape != ():
        what = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise UsageError(f"the loss returned {what}; it should return the mean over the batch, a tensor with shape ()")
    if not value.requires_grad:
        raise UsageError("the loss has no gradient; it should depend on parameters of the model that require one")


def mean_gradients(model: nn.Module, value: Tensor) -> float:
    """The mean of the loss over the processes, with the gradients replaced by theirs."""
    if processes.group()[1] == 1:
        return float(value)
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([*(g.flatten() for g in gradients), value.view(1)])
    processes.mean(flat)
    for p, g in zip(parameters, flat[:-1].split([p.numel() for p in parameters]), strict=True):
        p.grad = g.view_as(p).to(p.dtype, copy=True)
    return float(flat[-1])


def split(order: Tensor, batch_size: int) -> list[Tensor]:
    """The batches of an order, (N,); a last one of a single example, which a batch norm refuses, joins the one before."""
    batches = list(order.split(batch_size))
    if len(batches) > 1 and len(batches[-1]) == 1 < batch_size:
        batches[-2:] = [torch.cat(batches[-2:])]
    return batches


def _batches(data: Data, recipe: Recipe, rng: torch.Generator, extra: Extra | None) -> Iterator[tuple[Tensor, Tensor]]:
    order = torch.randperm(len(data), generator=rng)
    others = torch.randperm(len(extra.data), generator=rng) if extra else order
    for k, i in enumerate(split(order, recipe.batch_size)):
        n = min(max(1, round(extra.share * len(i))), len(i) - 1) if extra else 0
        own = i[: len(i) - n]
        x, y = data.take(data.index[own]), data.y[own]
        if extra and n:
            j = others[(torch.arange(n) + k * n) % len(others)]
            x = torch.cat([x, extra.data.take(extra.data.index[j])])
            y = torch.cat([y, extra.data.y[j]])
        yield _augmented(x, recipe, rng), y


def _augmented(x: Tensor, recipe: Recipe, rng: torch.Generator) -> Tensor:
    """Images (B, C, H, W) moved by up to ``shift`` pixels, the border filled with 0, and mirrored by a coin."""
    if recipe.shift and x.ndim == 4:
        _, _, height, width = x.shape
        padded = F.pad(x, (recipe.shift,) * 4)
        top, left = torch.randint(0, 2 * recipe.shift + 1, (2, len(x), 1), generator=rng)
        rows, columns = top + torch.arange(height), left + torch.arange(width)
        example = torch.arange(len(x)).view(-1, 1, 1)
        x = padded[example, :, rows.unsqueeze(2), columns.unsqueeze(1)].permute(0, 3, 1, 2)
    if recipe.flip and x.ndim == 4:
        coin = torch.rand(len(x), generator=rng) < 0.5
        x = torch.where(coin.view(-1, 1, 1, 1), x.flip(3), x)
    return x.contiguous()


def accuracy(model: nn.Module, data: Data, batch_size: int = 500) -> tuple[int, int]:
    """How many examples the model gets right, and how many there are; the model's mode is left as it was."""
    first = next(model.parameters(), torch.empty(0))
    right, (module, says) = 0, answering(model, data)
    with frozen(module), torch.no_grad():
        for start in range(0, len(data), batch_size):
            x, y = data.batch(start, start + batch_size)
            right += int(says(answer(module, x.to(first)).cpu(), y).sum())
    return right, len(data)


def word_error_rate(model: nn.Module, data: Data, batch_size: int = 100) -> float:
    """The edits from the words that were said to those that a network spells, as a share of the words that were said.

    Raises:
        UsageError: jiwer is not installed.
    """
    first, recogniser = next(model.parameters()), CTC(model)
    edits, words = 0.0, 0
    with frozen(recogniser):
        for start in range(0, len(data), batch_size):
            x, y = data.batch(start, start + batch_size)
            for text, heard in zip((data.classes[k] for k in y.tolist()), recogniser.transcribe(x.to(first)), strict=True):
                n = len(text.split())
                edits, words = edits + n * wer(text, heard), words + n
    return edits / words
