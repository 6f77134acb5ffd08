"""The one training loop: plain training here, any other through the loss it is given.

Symbols: one step takes a batch x, (B, *), and its labels y, (B,); the learning rate rises linearly to ``lr`` over the first
fifth of all steps and falls linearly to 0 (Smith and Topin, 2019, https://arxiv.org/abs/1708.07120).

Everything random in epoch e is drawn from a generator seeded by (seed, e), so a run that was killed and resumed ends with
the same weights, bit for bit, as one that was not.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from advkit.data.dataset import Data
from advkit.errors import UsageError
from advkit.models import checkpoint
from advkit.oracle import answer, logits_of
from advkit.spec import check_positive, check_whole

LEAST_STEPS = 500
"""With fewer steps even a small network has hardly begun to learn."""


class TrainingLoss(Protocol):
    """What a step descends: (model, x, y, rng) to a mean over the batch, with shape ()."""

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, rng: torch.Generator) -> Tensor:
        """The loss; any random draw comes from ``rng``."""


@dataclass(frozen=True)
class CrossEntropy:
    """-log softmax(model(x))_y, the loss of plain training.

    Arguments:
        smoothing: The share of the label that is spread over all classes, in [0, 1).
    """

    smoothing: float = 0.0

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, rng: torch.Generator) -> Tensor:
        """The mean over the batch, with shape ()."""
        return F.cross_entropy(logits_of(model(x)), y, label_smoothing=self.smoothing)


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

    Raises:
        UsageError: A number out of range.
    """

    epochs: int = 5
    batch_size: int = 128
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    shift: int = 0
    flip: bool = False

    def __post_init__(self) -> None:
        check_whole("epochs", self.epochs, 1)
        check_whole("batch size", self.batch_size, 1)
        check_positive("learning rate", self.lr)

    def for_examples(self, n: int) -> Recipe:
        """The recipe with enough epochs over ``n`` examples to make at least ``LEAST_STEPS`` steps."""
        return replace(self, epochs=max(self.epochs, -(-LEAST_STEPS * self.batch_size // n)))


@dataclass(frozen=True)
class Progress:
    """Where a training run stands.

    Attributes:
        epoch: The epoch, from 0.
        step: How many steps are done, of all epochs.
        steps: How many there are.
        loss: The mean loss of the epoch so far.
    """

    epoch: int
    step: int
    steps: int
    loss: float


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
        report: Called after each step.

    Returns:
        The model.

    Raises:
        UsageError: ``partial`` holds another run, or the loss became NaN.
    """
    loss = CrossEntropy() if loss is None else loss
    model = model.to(device)
    optimizer = torch.optim.SGD(
        model.parameters(), recipe.lr, recipe.momentum, weight_decay=recipe.weight_decay, nesterov=recipe.momentum > 0
    )
    run = json.dumps({"recipe": asdict(recipe), "seed": seed, "data": data.digest(), "identity": identity}, sort_keys=True)
    first = _resume(partial, run, model, optimizer) if partial else 0
    for epoch in range(first, recipe.epochs):
        _epoch(model, optimizer, data, recipe, loss, epoch, seed, report)
        if partial:
            _save(partial, run, model, optimizer, epoch + 1)
    return model.eval()


def _epoch(
    model: nn.Module,
    optimizer: torch.optim.SGD,
    data: Data,
    recipe: Recipe,
    loss: TrainingLoss,
    epoch: int,
    seed: int,
    report: Callable[[Progress], None] | None,
) -> None:
    first = next(model.parameters())
    epoch_seed = int.from_bytes(hashlib.sha256(f"{seed} {epoch}".encode()).digest()[:7])
    rng = torch.Generator().manual_seed(epoch_seed)
    a_pass = -(-len(data) // recipe.batch_size)
    steps, total = recipe.epochs * a_pass, 0.0
    model.train()
    # Dropout and the like draw from the global generator: seeded here, and put back.
    with torch.random.fork_rng(), torch.enable_grad():
        torch.manual_seed(epoch_seed)
        for i, (x, y) in enumerate(_batches(data, recipe, rng)):
            step = epoch * a_pass + i
            for group in optimizer.param_groups:
                group["lr"] = recipe.lr * _schedule(step / steps)
            value = loss(model, x.to(first), y.to(first.device), rng)
            optimizer.zero_grad(set_to_none=True)
            value.backward()
            optimizer.step()
            total += float(value.detach())
            if total != total:
                raise UsageError(f"the loss became NaN in epoch {epoch + 1}; try a learning rate below {recipe.lr:g}")
            if report:
                report(Progress(epoch, step + 1, steps, total / (i + 1)))


def _schedule(t: float) -> float:
    """The learning rate at a share t of all steps, as a share of the highest."""
    return max(t / 0.2, 1e-3) if t < 0.2 else (1 - t) / 0.8


def _batches(data: Data, recipe: Recipe, rng: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    order = torch.randperm(len(data), generator=rng)
    for i in order.split(recipe.batch_size):
        x = data.take(data.index[i])
        yield _augmented(x, recipe, rng), data.y[i]


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


def _save(partial: Path, run: str, model: nn.Module, optimizer: torch.optim.SGD, epoch: int) -> None:
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        momentum = optimizer.state.get(parameter, {}).get("momentum_buffer")
        if momentum is not None:
            tensors[f"momentum.{name}"] = momentum
    checkpoint.write(partial, tensors, {"run": run, "epoch": str(epoch)})


def _resume(partial: Path, run: str, model: nn.Module, optimizer: torch.optim.SGD) -> int:
    """Put the run in ``partial`` back and return its next epoch; 0 where there is none."""
    if not partial.exists():
        return 0
    tensors, metadata = checkpoint.read(partial)
    if metadata.get("run") != run:
        raise UsageError(f"{partial} holds another run (network, data, recipe or seed differ); delete it to start anew")
    _part(model.load_state_dict, {k[6:]: v for k, v in tensors.items() if k.startswith("model.")}, partial)
    for name, parameter in model.named_parameters():
        if (momentum := tensors.get(f"momentum.{name}")) is not None:
            optimizer.state[parameter]["momentum_buffer"] = momentum.to(parameter.device)
    return int(metadata["epoch"])


def _part(load: Callable[[dict[str, Tensor]], Any], tensors: dict[str, Tensor], partial: Path) -> None:
    try:
        load(tensors)
    except RuntimeError:
        raise UsageError(f"{partial} does not fit the network; delete it to start anew") from None


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
    "cifar-resnet": Recipe(epochs=10, batch_size=128, lr=0.2, shift=4, flip=True),
}
"""The recipe of each network that has a name."""
