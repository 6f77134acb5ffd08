"""Adversarial weight perturbation: the loss at weights that an adversary moved.

Symbols: w_l are the weights of layer l, v_l what is added to them, g_l the gradient of the loss in them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from advkit.defenses.adversary import Adversarial
from advkit.errors import UsageError
from advkit.spec import check_positive


class _Moved(nn.Module):
    """A module with other tensors in place of some of its own."""

    def __init__(self, inner: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.inner, self.tensors = inner, dict(tensors)
        # The flag only: the modules inside keep theirs.
        self.training = inner.training

    def forward(self, x: Tensor) -> object:
        return functional_call(self.inner, self.tensors, (x,))


@dataclass(frozen=True)
class AWP(Adversarial):
    r"""The wrapped loss at the weights w + v, v_l = gamma * ||w_l|| * g_l / ||g_l||, with v as given.

    Wu, Xia and Wang, 2020, "Adversarial weight perturbation helps robust generalization",
    https://arxiv.org/abs/2004.05884. The examples are found once, against w, and serve for v and for the loss. What has fewer
    than two axes (offsets, normalization) is not moved. v costs a forward and a backward pass at the examples; running
    statistics are those of the pass at w + v. The parameters themselves are never changed, so the gradient is theirs.

    Arguments:
        loss: An adversarial loss: ``pgd``, ``trades`` ...
        gamma: How far each layer's weights are moved, as a share of their norm; the paper has 0.01 for PGD, 0.005 for
            TRADES.

    Raises:
        UsageError: gamma is not positive, the loss is not an adversarial one, or the model has no weights to move.
    """

    loss: Adversarial
    gamma: float = 0.01

    def __post_init__(self) -> None:
        check_positive("awp: gamma", self.gamma)
        if not isinstance(self.loss, Adversarial):
            raise UsageError(f"awp: loss is {self.loss!r}; it should be an adversarial loss, as in awp(pgd(steps=7))")

    @property
    def replays(self) -> int:
        """The wrapped loss's."""
        return getattr(self.loss, "replays", 1)

    @property
    def settled(self) -> float:
        """The wrapped loss's."""
        return self.loss.settled

    def examples(self, model: nn.Module, x: Tensor, y: Tensor, rng: torch.Generator, at: float) -> Tensor:
        """The wrapped loss's, with shape (B, *)."""
        return self.loss.examples(model, x, y, rng, at)

    def value(self, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor, rng: torch.Generator, at: float) -> Tensor:
        """The mean loss, with shape ()."""
        again = torch.Generator(rng.device)
        again.set_state(rng.get_state())
        # The pass that finds v leaves no trace in the running statistics.
        aside = _Moved(model, {name: buffer.clone() for name, buffer in model.named_buffers()})
        v = self._direction(model, self.loss.value(aside, x, x_adv, y, again, at))
        parameters = dict(model.named_parameters())
        moved = {name: parameters[name] + v[name] for name in v}
        return self.loss.value(_Moved(model, moved), x, x_adv, y, rng, at)

    def _direction(self, model: nn.Module, value: Tensor) -> dict[str, Tensor]:
        """v, by the names of the parameters."""
        weights = {name: w for name, w in model.named_parameters() if w.requires_grad and w.ndim > 1}
        if not weights:
            raise UsageError("awp: the model has no weights with two axes that require a gradient; there is nothing to move")
        gradients = torch.autograd.grad(value, list(weights.values()), allow_unused=True)
        return {
            name: self.gamma * w.detach().norm() * g / g.norm().clamp(min=torch.finfo(g.dtype).tiny)
            for (name, w), g in zip(weights.items(), gradients, strict=True)
            if g is not None
        }
