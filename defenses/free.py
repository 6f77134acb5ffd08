"""Free adversarial training: the gradient that updates the weights also updates the perturbation.

Symbols: delta is the perturbation, one for each place in the batch; x' = x + delta; m is how often each batch is replayed.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from advkit.attacks import FGSM
from advkit.defenses.adversary import Adversarial, ball_of, check_adversary, ramped
from advkit.engine import check_inputs
from advkit.spec import check_whole
from advkit.threat import Lp


@dataclass
class FreeTraining(Adversarial):
    r"""The cross entropy at x' = project(x + delta); at the backward pass, delta = project(delta + eps * steepest(g)).

    g is the gradient at x' of the very loss whose gradient updates the weights, so an example costs one forward and one
    backward pass. The loop takes ``replays`` steps on each batch, and so 1 / ``replays`` of the epochs. delta is kept from
    step to step and from batch to batch.

    Shafahi, Najibi, Ghiasi, Xu, Dickerson, Studer, Davis, Taylor and Goldstein, 2019, "Adversarial training for free!",
    https://arxiv.org/abs/1904.12843.

    Arguments:
        threat: A ball with a radius.
        replays: m, the steps that the loop takes on each batch.
        ramp: The share of the training in which the radius grows to its full size; 0 for a constant one.
        smoothing: The share of the label that is spread over all classes.

    Raises:
        UsageError: A setting out of range, or a threat model that is not a ball of l_inf, l_2 or l_1.
    """

    threat: Lp
    replays: int = 8
    ramp: float = 0.0
    smoothing: float = 0.0
    _delta: Tensor | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        ball_of(self.threat, "free takes")
        check_whole("free: replays", self.replays, 1)
        check_adversary("free", FGSM(), self.threat, self.ramp, self.smoothing)

    def examples(self, model: nn.Module, x: Tensor, y: Tensor, rng: torch.Generator, at: float) -> Tensor:
        """x', with shape (B, *); a backward pass to it moves delta."""
        threat = ball_of(ramped(self.threat, self.ramp, at), "free takes")
        check_inputs(x, y, threat)
        x = x.detach()
        delta = self._delta
        if delta is None or delta.shape[1:] != x.shape[1:] or len(delta) < len(x):
            delta = torch.zeros_like(x)
        self._delta = delta = delta.to(x)
        x_adv = threat.project(x + delta[: len(x)], x)

        def move(g: Tensor) -> None:
            moved = threat.project(x_adv + threat.eps * threat.steepest(g), x) - x
            self._delta = torch.cat([moved, delta[len(x) :]])

        # A tensor of its own: one that its own hook refers to would stay in memory.
        watched = x_adv.detach().requires_grad_(True)
        watched.register_hook(move)
        return watched
