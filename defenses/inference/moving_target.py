"""A moving target: each answer is that of a random member."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from advkit import models, spec
from advkit.defenses.inference.bit_depth import BitDepth
from advkit.defenses.inference.defended import Defense, Random, adaptive
from advkit.defenses.inference.jpeg import JPEG
from advkit.defenses.inference.median import Median
from advkit.defenses.inference.resize_pad import ResizePad
from advkit.engine import Attack
from advkit.errors import ModelError, UsageError
from advkit.oracle import logits_of


@dataclass(frozen=True)
class MovingTarget:
    """The answer of one of several networks, each behind one of several transformations, drawn for each input and call.

    The idea is of Sengupta, Chakraborti and Kambhampati, 2019, "MTDeep: boosting the security of deep neural nets against
    adversarial attacks with moving target defense", https://arxiv.org/abs/1705.07213 (networks), and of Raff, Sylvester,
    Forsyth and McLean, 2019, "Barrage of random transforms for adversarially robust defense" (transformations); here each
    choice is as likely as any other. An adaptive attack takes the mean over draws, with the gradients that the members'
    own adaptive attacks take.

    Arguments:
        transformations: Other defenses of this package; with none, the networks as they are.
        networks: Checkpoints of further networks, divided by commas.
        seed: Of the choice.

    Raises:
        UsageError: There are fewer than two members, or the seed is less than 0.
    """

    transformations: tuple[Defense, ...] = (JPEG(), BitDepth(), Median(2), ResizePad())
    networks: str = ""
    seed: int = 0

    def __post_init__(self) -> None:
        spec.check_whole("moving-target: seed", self.seed, 0)
        if max(1, len(self.transformations)) * (len(self._files()) + 1) < 2:
            raise UsageError("moving-target: there is one member only; give several transformations, or networks")

    def around(self, model: Callable[[Tensor], Any]) -> nn.Module:
        """The model and the further networks, one of which answers."""
        device = next(model.parameters(), torch.zeros(0)).device if isinstance(model, nn.Module) else "cpu"
        networks = [model, *(models.load(file, device=str(device)).module for file in self._files())]
        behind = [defense.around(network) for defense in self.transformations for network in networks]
        return Moving(behind or networks, self.seed)

    def _files(self) -> list[str]:
        return [file.strip() for file in self.networks.split(",") if file.strip()]


class Moving(Random):
    """Several models, one of which answers.

    Arguments:
        members: The models, inputs (N, *) to logits (N, K).
        seed: Of the choice.
    """

    def __init__(self, members: Sequence[Callable[[Tensor], Any]], seed: int = 0) -> None:
        super().__init__(seed, 20)
        self.members = nn.ModuleList(m if isinstance(m, nn.Module) else _Called(m) for m in members)

    def forward(self, x: Tensor) -> Tensor:
        """The logits of a random member for each row, with shape (N, K).

        Raises:
            ModelError: Two members answer with different numbers of classes.
        """
        choice = self.dice.throw(x).integers(len(self.members))
        rows = [(choice == i).nonzero().squeeze(1) for i in range(len(self.members))]
        said = [logits_of(member(x[who])) for member, who in zip(self.members, rows, strict=True) if len(who)]
        shapes = sorted({tuple(z.shape[1:]) for z in said})
        if len(shapes) > 1:
            raise ModelError(
                f"the networks of a moving target answer with the shapes {shapes}; they should have the same classes"
            )
        return torch.cat(said)[torch.cat(rows).argsort()]

    def adaptive(self, attack: Attack) -> Attack:
        """The attack that knows of the defense."""
        return adaptive(self, attack)


class _Called(nn.Module):
    """A callable that is no module."""

    def __init__(self, model: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Any:
        return self.model(x)
