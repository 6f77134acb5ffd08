"""How a network is trained: the optimizer, the learning rate over time, and what is done to the examples."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import nn

from advkit.spec import check_at_least, check_choice, check_positive, check_share, check_whole

LEAST_STEPS = 500
"""With fewer steps even a small network has hardly begun to learn."""


def _triangle(t: float, peak: float = 0.2) -> float:
    return max(t / peak, 1e-3) if t < peak else (1 - t) / (1 - peak)


SCHEDULES: dict[str, Callable[[float], float]] = {
    "triangle": _triangle,
    "cyclic": lambda t: _triangle(t, 0.4),
    "cosine": lambda t: 0.5 + 0.5 * math.cos(math.pi * t),
    "steps": lambda t: 1.0 if t < 0.5 else 0.1 if t < 0.75 else 0.01,
    "linear": lambda t: 1 - t,
    "constant": lambda t: 1.0,
}
"""The learning rate at a share t of all steps, as a share of the highest.

Up in the first fifth, or two fifths, and down (Smith and Topin, 2019, https://arxiv.org/abs/1708.07120; Wong, Rice and Kolter,
2020, https://arxiv.org/abs/2001.03994); half a cosine (Loshchilov and Hutter, 2017, https://arxiv.org/abs/1608.03983); a tenth
after one half, and again after three quarters (Rice, Wong and Kolter, 2020, https://arxiv.org/abs/2002.11569); a line
down to 0.
"""
OPTIMIZERS = {"sgd": "stochastic gradient descent with Nesterov's momentum", "adam": "Adam"}
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Recipe:
    """How a network is trained.

    Arguments:
        epochs: Passes over the data.
        batch_size: Examples a step.
        lr: The highest learning rate.
        momentum: Of stochastic gradient descent, in Nesterov's form, in [0, 1).
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
        check_share("momentum", self.momentum)
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


RECIPES = {
    "mnist-cnn": Recipe(epochs=2, batch_size=64, lr=0.1, shift=1),
    "mnist-mlp": Recipe(epochs=8, batch_size=128, lr=0.1),
    "mnist-small": Recipe(epochs=10, batch_size=100, lr=5e-3, weight_decay=0.0, optimizer="adam", schedule="cyclic"),
    "mnist-trades": Recipe(epochs=5, batch_size=128, lr=0.05),
    "mnist-ssl": Recipe(epochs=20, batch_size=100, lr=3e-3, weight_decay=0.0, optimizer="adam", schedule="linear"),
    "cifar-resnet": Recipe(epochs=10, batch_size=128, lr=0.2, shift=4, flip=True),
    "preact-resnet18": Recipe(epochs=30, batch_size=128, lr=0.2, shift=4, flip=True),
    "keyword-cnn": Recipe(epochs=14, batch_size=96, lr=4e-3, weight_decay=1e-4, optimizer="adam"),
    "speech-ctc": Recipe(epochs=8, batch_size=32, lr=5e-3, weight_decay=0.0, optimizer="adam", clip=5.0),
}
"""The recipe of each network that has a name."""
