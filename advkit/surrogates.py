"""Transfer: examples that are made on one model, the surrogate, and shown to another, the target, once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from advkit.engine import Attack, check_serves, frozen, perturb
from advkit.errors import ModelError, UsageError
from advkit.oracle import Access, Goal, Model, answer, logits_of
from advkit.streams import Streams
from advkit.threat import Change, Lp


class Ensemble(nn.Module):
    """Several models as one, whose logits are the mean of theirs.

    Of the means of logits, of probabilities and of losses, that of logits makes the examples that transfer best (Dong et al.,
    2018, https://arxiv.org/abs/1710.06081).

    Arguments:
        models: Modules or other callables, each from inputs (N, *) to logits (N, K).

    Raises:
        UsageError: There are none.
    """

    def __init__(self, models: Sequence[Model]) -> None:
        super().__init__()
        if not models:
            raise UsageError("an ensemble needs at least one model")
        # A module's own list takes modules only.
        self.models = tuple(models)
        self.members = nn.ModuleList(model for model in models if isinstance(model, nn.Module))

    def forward(self, x: Tensor) -> Tensor:
        """The mean of the logits, with shape (N, K)."""
        outputs = [logits_of(model(x)) for model in self.models]
        if len({z.shape for z in outputs}) > 1:
            shapes = ", ".join(str(tuple(z.shape)) for z in outputs)
            raise ModelError(f"the models of the ensemble return shapes {shapes}; they should have the same classes")
        return torch.stack(outputs).mean(0)


@dataclass(frozen=True)
class Transfer:
    """What came of examples made on a surrogate.

    Attributes:
        x_adv: The examples, with shape (N, *): the attack's last iterates.
        outputs: The target's logits for them, with shape (N, K).
        success: Whether they meet the goal on the target, inside the threat model, with shape (N,).
        surrogate: Whether they meet it on the surrogate.
    """

    x_adv: Tensor
    outputs: Tensor
    success: Tensor
    surrogate: Tensor


def transfer(
    attack: Attack,
    surrogate: Model,
    target: Model,
    x: Tensor,
    y: Tensor,
    threat: Lp | Change,
    *,
    rng: torch.Generator | Streams | None = None,
    goal: Goal | None = None,
) -> Transfer:
    """Make examples on one model and ask another about them.

    The target is asked once, about the last iterates, so it need not give gradients. An example
    that the target gets wrong from the start is a success as well; leave such rows out to see what the attack did.

    Arguments:
        attack: The attack, with its radius in the threat model.
        surrogate: The model that the attack sees; several are one as an :class:`Ensemble`.
        target: The model that is to be fooled.
        x: The clean inputs, with shape (N, *).
        y: The labels, with shape (N,); the targets, where the goal is targeted.
        threat: What may change.
        rng: Where random draws come from; by default, a generator with seed 0.
        goal: What counts as success; by default, any answer but y.

    Raises:
        UsageError: There is no radius, or the inputs, the attack and the models do not fit.
    """
    goal = Goal() if goal is None else goal
    check_radius(attack, threat)
    x_adv = perturb(attack, surrogate, x, y, threat, rng=torch.Generator().manual_seed(0) if rng is None else rng, goal=goal)
    outputs, seen = ask(target, x_adv), ask(surrogate, x_adv)
    allowed = threat.allows(x_adv, x)
    return Transfer(x_adv, outputs, allowed & goal.met(outputs, y), allowed & goal.met(seen, y))


def ask(model: Model, x: Tensor) -> Tensor:
    """The logits of a model in evaluation mode, with shape (N, K)."""
    with torch.no_grad(), frozen(model):
        return answer(model, x)


def check_radius(attack: Attack, threat: Lp | Change) -> None:
    """Refuse an attack that does not serve the threat model, and one without a radius.

    Raises:
        UsageError: As it says.
    """
    check_serves(attack, threat)
    if threat.eps == float("inf"):
        raise UsageError(
            "the closest example of a surrogate is on its boundary and fools nothing else; give a radius, as in linf(0.1)"
        )


def check_gradients(name: str, attack: Attack) -> None:
    """Refuse to wrap an attack that takes no gradients in one that changes them.

    Raises:
        UsageError: The attack needs less than gradients.
    """
    if attack.access < Access.GRADIENTS:
        what = type(attack).__name__
        raise UsageError(f"{name} changes gradients and {what} takes none; wrap an attack that does, as in {name}(mi-fgsm)")
