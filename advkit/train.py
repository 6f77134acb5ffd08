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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from advkit import processes
from advkit.data.dataset import Data
from advkit.errors import ModelError, UsageError
from advkit.models import checkpoint
from advkit.oracle import answer, logits_of
from advkit.spec import check_at_least, check_choice, check_positive, check_share, check_whole

LEAST_STEPS = 500
"""With fewer steps even a small network has hardly begun to learn."""


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


def _triangle(t: float) -> float:
    return max(t / 0.2, 1e-3) if t < 0.2 else (1 - t) / 0.8


SCHEDULES: dict[str, Callable[[float], float]] = {
    "triangle": _triangle,
    "cosine": lambda t: 0.5 + 0.5 * math.cos(math.pi * t),
    "steps": lambda t: 1.0 if t < 0.5 else 0.1 if t < 0.75 else 0.01,
    "constant": lambda t: 1.0,
}
"""The learning rate at a share t of all steps, as a share of the highest: up in the first fifth and down (Smith and Topin,
2019, https://arxiv.org/abs/1708.07120); half a cosine (Loshchilov and Hutter, 2017, https://arxiv.org/abs/1608.03983); a
tenth after one half, and again after three quarters (Rice, Wong and Kolter, 2020, https://arxiv.org/abs/2002.11569)."""
OPTIMIZERS = {"sgd": "stochastic gradient descent with Nesterov's momentum", "adam": "Adam"}
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Recipe:
    """How a network is trained.

    Arguments:
        epochs: Passes over the data.
        batch_size: Examples a step.
        lr: The highest learning rate.
        momentum: Of stochastic gradient descent, in Nesterov's form.
        weight_decay: The share of a weight that a step of rate 1 takes away.
        shift: The most pixels by which an image is moved, at random, up or down and left or right.
        flip: Whether an image is mirrored, at random.
        optimizer: ``sgd`` or ``adam``.
        schedule: Of the learning rate, from :data:`SCHEDULES`.
        clip: The greatest l_2 norm of a step's gradient; 0 for any.
        average: The weights at the end are an exponential moving average that keeps this share at each step, in [0, 1).
        precision: ``float32``, or ``bfloat16`` for mixed precision.

    Raises:
        UsageError: A number out of range, or an unknown name.
    """

    epochs: int = 5
    batch_size: int = 128
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    shift: int = 0
    flip: bool = False
    optimizer: str = "sgd"
    schedule: str = "triangle"
    clip: float = 0.0
    average: float = 0.0
    precision: str = "float32"

    def __post_init__(self) -> None:
        check_whole("epochs", self.epochs, 1)
        check_whole("batch size", self.batch_size, 1)
        check_positive("learning rate", self.lr)
        check_choice("optimizer", self.optimizer, OPTIMIZERS)
        check_choice("schedule", self.schedule, SCHEDULES)
        check_choice("precision", self.precision, PRECISIONS)
        check_whole("shift", self.shift, 0)
        check_at_least("weight decay", self.weight_decay, 0)
        check_at_least("clip", self.clip, 0)
        check_share("average", self.average)

    def for_examples(self, n: int) -> Recipe:
        """The recipe with enough epochs over ``n`` examples to make at least ``LEAST_STEPS`` steps."""
        return replace(self, epochs=max(self.epochs, -(-LEAST_STEPS * self.batch_size // n)))

    def build(self, parameters: Iterator[nn.Parameter]) -> torch.optim.Optimizer:
        """The optimizer of the recipe."""
        if self.optimizer == "adam":
            return torch.optim.Adam(parameters, self.lr, weight_decay=self.weight_decay)
        return torch.optim.SGD(parameters, self.lr, self.momentum, weight_decay=self.weight_decay, nesterov=self.momentum > 0)


@dataclass(frozen=True)
class Check:
    """What a network was worth at the end of an epoch, on examples that it does not learn from.

    Attributes:
        epoch: The epoch, from 0.
        clean: The share of the examples that it gets right.
        robust: The share that it gets right under attack.
        one_step: The share that it gets right under an attack of one step, where there is such an attack.
        of: How many examples.
        full: Whether the loss was at its full strength by then: a network that still learns from a smaller radius is not
            the one that was asked for.
    """

    epoch: int
    clean: float
    robust: float
    one_step: float | None
    of: int
    full: bool


def kept(history: Sequence[Check]) -> Check | None:
    """The check of the epoch whose weights are kept: the latest that is within a standard error of the best before it.

    The best of many noisy checks is often luck; of two that cannot be told apart, the one that was trained longer is kept.
    """
    best, found = -1.0, None
    for check in history:
        error = math.sqrt(best * (1 - best) / check.of) if best > 0 else 0.0
        if not check.full or check.robust >= best - error:
            found = check
        best = max(best, check.robust) if check.full else best
    return found


class Diverged(UsageError):
    """The loss became NaN; the model holds the last weights that were good."""


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
        device: Where to train.
        partial: A file that holds the run after each epoch, so that the same call goes on where it stopped; the caller
            removes it when the model is safe.
        identity: What else (network, data, loss) makes this run the same as the one in ``partial``.
        report: Called after each step, and at the end of an epoch that was checked.
        check: Called with the model, the epoch and whether the loss is at full strength, at the end of each epoch; the
            model is then left with the weights that :func:`kept` names, else with the last.
        optimizer: In place of the recipe's, made from the model's parameters on ``device``; the recipe's schedule scales
            the learning rates that it has.
        extra: Examples that fill a share of every batch.
        compile: Whether the loss is given the model as torch.compile translates it.

    Returns:
        The model.

    Raises:
        UsageError: ``partial`` holds another run; or, as ``Diverged``, the loss became NaN.
    """
    loss = CrossEntropy() if loss is None else loss
    model = model.to(device)
    replays = getattr(loss, "replays", 1)
    recipe = replace(recipe, epochs=max(1, round(recipe.epochs / replays)))
    run = _Run(model, recipe.build(model.parameters()) if optimizer is None else optimizer, recipe)
    about = {"recipe": asdict(recipe), "seed": seed, "data": data.digest(), "identity": identity}
    if extra:
        about |= {"extra": extra.data.digest(), "share": extra.share}
    name = json.dumps(about, sort_keys=True)
    first = run.resume(partial, name) if partial else 0
    epoch_of = _Epoch(run, data, loss, extra, replays, _compiled(model) if compile else model, report)
    if report and run.history:
        report(epoch_of.progress(first - 1, first * epoch_of.steps))
    for epoch in range(first, recipe.epochs):
        epoch_of(epoch, seed)
        run.end(epoch, check and _checked(check, run, loss))
        if report and run.history:
            report(epoch_of.progress(epoch, (epoch + 1) * epoch_of.steps))
        if partial:
            run.save(partial, name, epoch + 1)
    model.load_state_dict(run.good)
    return model.eval()


def _compiled(model: nn.Module) -> nn.Module:
    compiled: nn.Module = torch.compile(model)  # type: ignore[assignment]
    return compiled


def _checked(check: Callable[[nn.Module, int, bool], Check], run: _Run, loss: TrainingLoss) -> Callable[[int], Check]:
    """The check at the end of an epoch, with the averaged weights where there are any."""

    def at_end(epoch: int) -> Check:
        full = (epoch + 1) / run.recipe.epochs >= getattr(loss, "settled", 0.0)
        with run.averaged():
            return check(run.model, epoch, full)

    return at_end


def _seed(seed: int, what: int | str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {what}".encode()).digest()[:7])


@dataclass
class _Run:
    """What a run carries from epoch to epoch, and what the file of a stopped one holds."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    recipe: Recipe
    average: dict[str, Tensor] = field(default_factory=dict)
    good: dict[str, Tensor] = field(default_factory=dict)
    history: list[Check] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.rates = [float(group["lr"]) for group in self.optimizer.param_groups]
        self.taken = 0
        if self.recipe.average:
            self.average = _copied(self.model.state_dict())
        self.good = _copied(self.model.state_dict())

    def set_rate(self, t: float) -> None:
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * SCHEDULES[self.recipe.schedule](t)

    def step(self) -> None:
        """One step of the optimizer, with the gradients that are there, and of the average."""
        if self.recipe.clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip)
        self.optimizer.step()
        self.taken += 1
        # Young averages forget the first weights faster.
        share = min(self.recipe.average, (1 + self.taken) / (10 + self.taken))
        for name, value in self.model.state_dict().items() if self.average else ():
            if value.is_floating_point():
                self.average[name].lerp_(value, 1 - share)
            else:
                self.average[name].copy_(value)

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """The model with the averaged weights, where there are any."""
        if not self.average:
            yield
            return
        own = _copied(self.model.state_dict())
        self.model.load_state_dict(self.average)
        try:
            yield
        finally:
            self.model.load_state_dict(own)

    def end(self, epoch: int, check: Callable[[int], Check] | None) -> None:
        """Check an epoch that is done, and keep its weights if they are the ones to keep."""
        for buffer in self.model.buffers():
            if buffer.is_floating_point():
                processes.mean(buffer)
        if not all(bool(value.isfinite().all()) for value in self.model.parameters()):
            raise self.diverged(epoch)
        if check is not None:
            self.history.append(check(epoch))
        if check is None or kept(self.history) is self.history[-1]:
            self.good = _copied(self.average or self.model.state_dict())

    def diverged(self, epoch: int) -> Diverged:
        """The error for a loss that became NaN; the model is given the last good weights."""
        self.model.load_state_dict(self.good)
        self.model.eval()
        found = kept(self.history)
        last = epoch if found is None else found.epoch + 1
        weights = f"the weights after epoch {last} were kept" if epoch else "no epoch was done"
        return Diverged(f"the loss became NaN in epoch {epoch + 1} and {weights}; try a learning rate below {self.recipe.lr:g}")

    def save(self, partial: Path, name: str, epoch: int) -> None:
        """Write the run to its file, in the first process."""
        if processes.group()[0] == 0:
            parts = {"model": self.model.state_dict(), "average": self.average, "good": self.good}
            tensors = {f"{part}.{key}": value for part, of in parts.items() for key, value in of.items()}
            for i, state in self.optimizer.state_dict()["state"].items():
                tensors |= {f"optimizer.{i}.{key}": torch.as_tensor(value) for key, value in state.items() if value is not None}
            about = {"run": name, "epoch": str(epoch), "taken": str(self.taken)}
            checkpoint.write(partial, tensors, about | {"history": json.dumps([asdict(check) for check in self.history])})
        processes.barrier()

    def resume(self, partial: Path, name: str) -> int:
        """Put the run in ``partial`` back and return its next epoch; 0 where there is none."""
        if not partial.exists():
            return 0
        tensors, metadata = checkpoint.read(partial)
        if metadata.get("run") != name:
            raise UsageError(f"{partial} holds another run (network, data, recipe or seed differ); delete it to start anew")
        try:
            self._put_back(tensors)
            self.history = [Check(**check) for check in json.loads(metadata["history"])]
            self.taken = int(metadata["taken"])
            return int(metadata["epoch"])
        except (RuntimeError, KeyError, ValueError, TypeError):
            raise UsageError(f"{partial} does not fit the network; delete it to start anew") from None

    def _put_back(self, tensors: dict[str, Tensor]) -> None:
        device = next(self.model.parameters()).device
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "average": {}, "good": {}, "optimizer": {}}
        for key, value in tensors.items():
            part, _, name = key.partition(".")
            parts[part][name] = value.to(device)
        self.model.load_state_dict(parts["model"])
        self.average, self.good = parts["average"], parts["good"]
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in parts["optimizer"].items():
            i, _, name = key.partition(".")
            state.setdefault(int(i), {})[name] = value
        self.optimizer.load_state_dict({"state": state, "param_groups": self.optimizer.state_dict()["param_groups"]})


def _copied(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in state.items()}


@dataclass
class _Epoch:
    """One pass over the data."""

    run: _Run
    data: Data
    loss: TrainingLoss
    extra: Extra | None
    replays: int
    model: nn.Module
    report: Callable[[Progress], None] | None
    mean: float = math.nan

    @property
    def steps(self) -> int:
        """How many batches there are, each as often as it is replayed."""
        return -(-len(self.data) // self.run.recipe.batch_size) * self.replays

    def progress(self, epoch: int, step: int) -> Progress:
        """Where the run stands after so many steps."""
        epochs = self.run.recipe.epochs
        return Progress(epoch, epochs, step, epochs * self.steps, self.mean, tuple(self.run.history))

    def __call__(self, epoch: int, seed: int) -> None:
        """Take every step of an epoch."""
        rank, world = processes.group()
        order = torch.Generator().manual_seed(_seed(seed, epoch))
        # Each process draws for itself what its loss needs.
        rng = order if world == 1 else torch.Generator().manual_seed(_seed(seed, f"{epoch} {rank}"))
        loss, total, step = copy.deepcopy(self.loss), 0.0, epoch * self.steps
        self.run.model.train()
        # Dropout and the like draw from the global generator: seeded here, and put back.
        with torch.random.fork_rng(), torch.enable_grad():
            torch.manual_seed(_seed(seed, epoch if world == 1 else f"{epoch} {rank}"))
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
        if world > 1 and n >= world:
            x, y = x[rank::world], y[rank::world]
        x = x.to(first)
        if x.ndim == 4 and first.is_cuda:
            x = x.contiguous(memory_format=torch.channels_last)
        return x, y.to(first.device), len(x) * world / n if n >= world else 1.0

    def _step(self, loss: TrainingLoss, x: Tensor, y: Tensor, rng: torch.Generator, step: int, weight: float) -> float:
        """Take one step and return the loss before it."""
        run, t = self.run, step / (self.run.recipe.epochs * self.steps)
        run.set_rate(t)
        mixed = torch.autocast(x.device.type, torch.bfloat16, enabled=run.recipe.precision == "bfloat16")
        try:
            with mixed:
                value = weight * loss(self.model, x, y, rng, t)
        except ModelError:
            # An attack refuses a model that answers NaN.
            if all(bool(p.isfinite().all()) for p in run.model.parameters()):
                raise
            raise run.diverged(step // self.steps) from None
        run.optimizer.zero_grad(set_to_none=True)
        value.backward()
        mean = _mean_gradients(run.model, value.detach())
        if not math.isfinite(mean):
            raise run.diverged(step // self.steps)
        run.step()
        return mean


def _mean_gradients(model: nn.Module, value: Tensor) -> float:
    """The mean of the loss over the processes, with the gradients replaced by theirs."""
    if processes.group()[1] == 1:
        return float(value)
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([*(g.flatten() for g in gradients), value.view(1)])
    processes.mean(flat)
    for p, g in zip(parameters, flat[:-1].split([p.numel() for p in parameters]), strict=True):
        p.grad = g.view_as(p).clone()
    return float(flat[-1])


def _batches(data: Data, recipe: Recipe, rng: torch.Generator, extra: Extra | None) -> Iterator[tuple[Tensor, Tensor]]:
    order = torch.randperm(len(data), generator=rng)
    others = torch.randperm(len(extra.data), generator=rng) if extra else order
    for k, i in enumerate(order.split(recipe.batch_size)):
        if extra is None:
            x, y = data.take(data.index[i]), data.y[i]
        else:
            n = min(max(1, round(extra.share * len(i))), len(i) - 1)
            j = others[(torch.arange(n) + k * n) % len(others)]
            i = i[: len(i) - n]
            x = torch.cat([data.take(data.index[i]), extra.data.take(extra.data.index[j])])
            y = torch.cat([data.y[i], extra.data.y[j]])
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
    from advkit.engine import frozen

    first = next(model.parameters(), torch.empty(0))
    right = 0
    with frozen(model), torch.no_grad():
        for start in range(0, len(data), batch_size):
            x, y = data.batch(start, start + batch_size)
            right += int((answer(model, x.to(first)).argmax(1).cpu() == y).sum())
    return right, len(data)


RECIPES = {
    "mnist-cnn": Recipe(epochs=2, batch_size=64, lr=0.1, shift=1),
    "mnist-mlp": Recipe(epochs=8, batch_size=128, lr=0.1),
    "mnist-small": Recipe(epochs=10, batch_size=100, lr=5e-3, weight_decay=0.0, optimizer="adam"),
    "mnist-trades": Recipe(epochs=5, batch_size=128, lr=0.05),
    "cifar-resnet": Recipe(epochs=10, batch_size=128, lr=0.2, shift=4, flip=True),
    "preact-resnet18": Recipe(epochs=30, batch_size=128, lr=0.2, shift=4, flip=True),
}
"""The recipe of each network that has a name."""
