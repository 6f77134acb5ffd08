"""Attacking a model that has a defense: gradients from a stand-in, every verdict from the model itself.

Many defenses do not make a model robust but take its gradient away: by rounding, by a softmax that saturates, by a part that
gives no gradient or a useless one. An attack on such a model should follow the gradient of a model without that part, and be
judged by the model with it:

    stand_in = straighten(model, {"quantize": Straight})
    run(Adaptive(PGD(), stand_in), model, x, y, threat)
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from advkit.combine import Lens, Wrapper
from advkit.engine import Attack, check_device, frozen
from advkit.errors import ModelError, UsageError
from advkit.losses import Loss
from advkit.models.digest import digest_of
from advkit.oracle import Oracle, Through, logits_of
from advkit.spec import unknown
from advkit.streams import Streams
from advkit.threat import Lp


class Straight(nn.Module):
    """A function that has no useful gradient, with the gradient of another: f(x) forward, the gradient of g(x) backward.

    Athalye, Carlini and Wagner, 2018, "Obfuscated gradients give a false sense of security: circumventing defenses to
    adversarial examples", https://arxiv.org/abs/1802.00420 (BPDA; with the identity, the straight-through estimator).

    Arguments:
        exact: f, from a tensor to a tensor: a function or a module.
        smooth: g, differentiable, whose result has the shape of f(x); None for the identity.

    >>> x = torch.tensor([0.2, 0.7], requires_grad=True)
    >>> y = Straight(torch.round)(x)
    >>> y.tolist(), torch.autograd.grad(y.sum(), x)[0].tolist()
    ([0.0, 1.0], [1.0, 1.0])
    """

    def __init__(self, exact: Callable[[Tensor], Tensor], smooth: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.exact, self.smooth = exact, smooth

    def forward(self, x: Tensor) -> Tensor:
        """f(x).

        Raises:
            ModelError: f(x) and g(x) have different shapes.
        """
        with torch.no_grad():
            exact = self.exact(x)
        if not torch.is_grad_enabled():
            return exact
        smooth = x if self.smooth is None else self.smooth(x)
        if exact.shape != smooth.shape:
            shapes = f"{tuple(exact.shape)} forward and {tuple(smooth.shape)} backward"
            raise ModelError(f"a straight-through layer gives {shapes}; the two functions should give the same shape")
        return _Swap.apply(smooth, exact)


class _Swap(torch.autograd.Function):
    """The second argument, with the gradient going to the first."""

    @staticmethod
    def forward(ctx: Any, smooth: Tensor, exact: Tensor) -> Tensor:
        return exact.view_as(exact)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def straighten(model: nn.Module, layers: Mapping[str, nn.Module | Callable[[nn.Module], nn.Module]]) -> nn.Module:
    """A copy of a model, with the same weights (shared, not copied), in which named layers are replaced.

    Arguments:
        model: The model; it is left alone.
        layers: For the name of a layer, as ``named_modules`` has it, what stands in for it: a module, or what makes one of
            the layer, as :class:`Straight` does.

    Raises:
        UsageError: The model has no such layer.

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.Threshold(0.5, 0.0))
    >>> straighten(model, {"1": Straight})[1]
    Straight(
      (exact): Threshold(threshold=0.5, value=0.0)
    )
    """
    kept: list[Tensor] = [*model.parameters(), *model.buffers()]
    stand_in = copy.deepcopy(model, {id(tensor): tensor for tensor in kept})
    for name, make in layers.items():
        layer = _layer(model, name)
        parent, _, last = name.rpartition(".")
        setattr(stand_in.get_submodule(parent), last, make if isinstance(make, nn.Module) else make(layer))
    return stand_in


def tap(model: nn.Module, layer: str) -> nn.Module:
    """A model whose outputs are those of a layer: the logits before a softmax or a scaling that saturates.

    Arguments:
        model: The model.
        layer: The name of the layer, as ``named_modules`` has it; its outputs should be one number a class.

    Raises:
        UsageError: The model has no such layer.

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.Softmax(1))
    >>> x = torch.rand(3, 2)
    >>> torch.equal(tap(model, "0")(x), model[0](x))
    True
    """
    _layer(model, layer)
    return _Tap(model, layer)


class _Tap(nn.Module):
    def __init__(self, model: nn.Module, layer: str) -> None:
        super().__init__()
        self.model, self.layer = model, layer

    def forward(self, x: Tensor) -> Tensor:
        """What the layer returned, the last time if it was called several times."""
        seen: list[Any] = []
        hook = _layer(self.model, self.layer).register_forward_hook(lambda _layer, _given, outputs: seen.append(outputs))
        try:
            self.model(x)
        finally:
            hook.remove()
        if not seen:
            raise ModelError(f"the model did not call its layer {self.layer!r}; tap one that it calls")
        return logits_of(seen[-1])


def _layer(model: nn.Module, name: str) -> nn.Module:
    known = {known: layer for known, layer in model.named_modules(remove_duplicate=False) if known}
    if name not in known:
        raise unknown("layer", name, known)
    return known[name]


@dataclass(frozen=True)
class Adaptive(Wrapper):
    """The attack with the gradients of a stand-in; whether an input fools is for the model to say.

    Where the attack asks for a gradient, the loss and its gradient are the stand-in's, and the model is shown the candidate
    as well, so that a success is noted. Whatever else it asks, the model answers. A pass of the stand-in counts as one of the
    model.

    Tramer, Carlini, Brendel and Madry, 2020, "On adaptive attacks to adversarial example defenses",
    https://arxiv.org/abs/2002.08347.

    Arguments:
        attack: The attack.
        model: The stand-in, inputs (N, *) to logits (N, K), as :func:`straighten` and :func:`tap` make; used in evaluation
            mode, and left as it was. In names and comparisons its digest stands for it.

    Raises:
        UsageError: The stand-in is not a module.
    """

    attack: Attack
    model: nn.Module = field(repr=False, compare=False)
    stand_in: str = field(init=False)
    paper = "wrapper: gradients of a stand-in"

    def __post_init__(self) -> None:
        if not isinstance(self.model, nn.Module):
            raise UsageError(f"adaptive: model is of type {type(self.model).__name__}; it should be a module")
        object.__setattr__(self, "stand_in", digest_of(self.model)[:16])

    @property
    def cost(self) -> int:
        """The attack's, and a forward pass of the model for each of its gradients, of two passes at least."""
        return self.attack.cost + self.attack.cost // 2

    def __call__(self, oracle: Oracle, x: Tensor, threat: Lp, rng: Streams) -> Tensor:
        """The attack's last iterate."""
        check_device(self.model, x)
        with frozen(self.model):
            return self.attack(_Guided(oracle, _guide(oracle, self.model)), x, threat, rng)


class _Guide(Oracle):
    """An oracle's books with another model, whose successes are not noted."""

    classes: int

    def _see(self, z: Tensor, who: Tensor, through: Through | None = None, exact: bool = False) -> Tensor:
        outputs = super()._see(z, who, through, exact)
        if self.classes and outputs.ndim == 2 and outputs.shape[1] != self.classes:
            what = f"the stand-in returned {outputs.shape[1]} outputs an example and the model {self.classes}"
            raise ModelError(f"{what}; it should be one with as many, such as the layer before the softmax")
        return outputs

    def _keep(self, z: Tensor, outputs: Tensor, who: Tensor) -> Tensor:
        """Nothing is kept: the model itself was not asked."""
        return outputs


def _guide(oracle: Oracle, model: nn.Module) -> Oracle:
    """The same oracle, its counts and all, with another model; what lies in front of it stays there."""
    if isinstance(oracle, Lens):
        guide = object.__new__(type(oracle))
        vars(guide).update(vars(oracle), oracle=_guide(oracle.oracle, model))
        return guide
    books = _Guide.__new__(_Guide)
    classes = oracle._none_sent.shape[1] if oracle._none_sent.ndim == 2 else 0
    vars(books).update(vars(oracle), _model=model, _fast=None, _checked=False, classes=classes)
    return books


class _Guided(Lens):
    """An oracle whose gradients are those of a guide."""

    def __init__(self, oracle: Oracle, guide: Oracle) -> None:
        super().__init__(oracle)
        self.guide = guide

    def grad(
        self,
        x_adv: Tensor,
        loss: Loss,
        rows: Tensor | None = None,
        *,
        towards: Tensor | None = None,
        through: Through | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The guide's, after the model has seen the candidates."""
        self._show(x_adv, rows, through)
        return self.guide.grad(x_adv, loss, rows, towards=towards, through=through)

    def jacobian(self, x_adv: Tensor, towards: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The guide's, after the model has seen the candidates."""
        self._show(x_adv, rows, None)
        return self.guide.jacobian(x_adv, towards, rows)

    def _show(self, x_adv: Tensor, rows: Tensor | None, through: Through | None) -> None:
        # In training nothing is noted, and what goes through a change is not a candidate.
        if self.oracle.track and through is None:
            self.oracle.fooled(x_adv, rows)
