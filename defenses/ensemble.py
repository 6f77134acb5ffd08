"""Ensemble adversarial training: examples that other, fixed networks are fooled by.

Symbols: f is the source of x', drawn for each batch from the fixed networks and the model itself; k is the class that f says;
CE the cross entropy; v is Gaussian noise.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from advkit import models as models_by_name
from advkit.defenses.adversary import Adversarial, Ascent, both, check_adversary, ramped
from advkit.engine import perturb
from advkit.errors import UsageError
from advkit.losses import ce
from advkit.oracle import Model
from advkit.spec import check_between
from advkit.streams import Streams
from advkit.threat import Change, Lp


@dataclass(frozen=True)
class EnsembleTraining(Adversarial):
    r"""alpha * CE(x) + (1 - alpha) * CE(x'), x' = x_0 + eps / 2 * steepest(g), x_0 = x + eps / 2 * steepest(v).

    g is the gradient at x_0 of f's cross entropy for its own answer k, not for the label, so that x' does not tell the label.

    Tramer, Kurakin, Papernot, Goodfellow, Boneh and McDaniel, 2018, "Ensemble adversarial training: attacks and defenses",
    https://arxiv.org/abs/1705.07204; the step is its R+FGSM. It is meant against examples from other networks, not against
    an adversary who has the gradients of this one.

    Arguments:
        threat: What the adversary may change, with a radius.
        models: The fixed networks: modules or other callables from inputs (N, *) to logits (N, K), or specs as
            ``advkit.models.load`` takes them; in one string they are joined by ``+``.
        alpha: The weight of the clean inputs, in [0, 1].
        ramp: The share of the training in which the radius grows to its full size; 0 for a constant one.
        smoothing: The share of the label that is spread over all classes.

    Raises:
        UsageError: A setting out of range, no fixed network, one that cannot be loaded, or a threat model that is not of l_inf,
            l_2 or l_1.
    """

    threat: Lp | Change
    models: str | Sequence[Model | str]
    alpha: float = 0.5
    ramp: float = 0.0
    smoothing: float = 0.0

    def __post_init__(self) -> None:
        if not self._sources():
            raise UsageError("ensemble: models is empty; give at least one fixed network, as in models='a.safetensors'")
        for model in self._sources():
            if not isinstance(model, str) and not callable(model):
                raise UsageError(f"ensemble: models has {model!r}; it should hold modules, other callables or specs of models")
        check_between("ensemble: alpha", self.alpha)
        check_adversary("ensemble", Ascent(_noise, 1, loss=_said), self.threat, self.ramp, self.smoothing)

    def __deepcopy__(self, memo: dict[int, object]) -> EnsembleTraining:
        """Itself: nothing is kept from step to step, and networks are not copied for it."""
        return self

    def _sources(self) -> list[Model | str]:
        given = self.models.split("+") if isinstance(self.models, str) else self.models
        stripped = [model.strip() if isinstance(model, str) else model for model in given]
        return [model for model in stripped if not isinstance(model, str) or model]

    def examples(self, model: nn.Module, x: Tensor, y: Tensor, rng: torch.Generator, at: float) -> Tensor:
        """x', with shape (B, *)."""
        threat = ramped(self.threat, self.ramp, at)
        sources = [model, *self._sources()]
        source = sources[int(torch.randint(len(sources), (1,), generator=rng, device=rng.device))]
        if isinstance(source, str):
            source = _loaded(source, str(x.device))
        return perturb(Ascent(_noise, 1, threat.eps / 2, _said), source, x, y, threat, rng=rng)

    def value(self, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor, rng: torch.Generator, at: float) -> Tensor:
        """The mean loss, with shape ()."""
        clean, robust = (F.cross_entropy(z, y, label_smoothing=self.smoothing) for z in both(model, x, x_adv))
        return self.alpha * clean + (1 - self.alpha) * robust


@functools.cache
def _loaded(spec: str, device: str) -> Model:
    return models_by_name.load(spec, device=device).module


def _noise(x: Tensor, threat: Lp, rng: Streams) -> Tensor:
    return threat.project(x + threat.eps / 2 * threat.steepest(rng.normal(*x.shape[1:], dtype=x.dtype)), x)


def _said(outputs: Tensor, y: Tensor) -> Tensor:
    return ce(outputs, outputs.argmax(1))
