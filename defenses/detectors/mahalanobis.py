"""How far the features of an input are from those of every class.

Symbols: f_l are the features of layer l, averaged over space, mu_lc their mean over the examples of class c, Sigma_l their
covariance around these means, d_l the squared distance to the closest class.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from advkit.adaptive import Straight
from advkit.data import Data
from advkit.defenses.detectors.detector import batches
from advkit.engine import frozen
from advkit.errors import ModelError, UsageError
from advkit.oracle import answer, logits_of
from advkit.spec import check_at_least, unknown

LEAST = 1e-6
"""Directions whose variance is a smaller share than this of the greatest, or is that of rounding, are left out."""


@dataclass(frozen=True)
class Mahalanobis:
    r"""The score is the mean over layers of d_l = min_c (f_l - mu_lc)^T Sigma_l^-1 (f_l - mu_lc), each standardized.

    Lee, Lee, Lee and Shin, 2018, "A simple unified framework for detecting out-of-distribution samples and adversarial
    attacks", https://arxiv.org/abs/1807.03888. They weigh the layers by a logistic regression on adversarial examples of the
    attack to come. Here no adversarial example is needed: each d_l is standardized by its mean and deviation over the clean
    examples, and all weigh the same. As there, the input may first be moved by a small step towards the closest class, to
    x - noise * sign(g); g is the gradient of the score, so there is one step for all layers. This step has no useful gradient;
    that of the identity stands in for it.

    Arguments:
        layers: The names of the layers, as ``named_modules`` has them, with commas; by default, the model's direct children
            that have parameters, without the last one.
        noise: The length of the step, in the units of the data.

    Raises:
        UsageError: The noise is less than 0.
    """

    layers: str = ""
    noise: float = 0.0

    def __post_init__(self) -> None:
        check_at_least("mahalanobis: noise", self.noise, 0)

    def fit(self, model: nn.Module, data: Data, rng: torch.Generator) -> nn.Module:
        """The fitted detector.

        Raises:
            UsageError: The model has no such layer, or a class has fewer than two examples.
        """
        features = Features(model, layers_of(model, self.layers))
        with torch.no_grad(), frozen(model):
            seen = [(features(x), y) for x, y in batches(model, data)]
        y = torch.cat([y for _, y in seen])
        _check_classes(y, data)
        return Distances(features, [Tied(torch.cat(layer), y) for layer in zip(*(f for f, _ in seen), strict=True)], self.noise)


def layers_of(model: nn.Module, names: str) -> list[str]:
    """The layers that are named, or else the direct children with parameters but the last.

    Raises:
        UsageError: There is no such layer, or the model has too few children.
    """
    known = {name: layer for name, layer in model.named_modules() if name}
    if names:
        listed = [name.strip() for name in names.split(",")]
        for name in listed:
            if name not in known:
                raise unknown("layer", name, known)
        return listed
    found = [name for name, child in model.named_children() if next(child.parameters(), None) is not None][:-1]
    if not found:
        raise UsageError(
            'mahalanobis: the model has fewer than two parts with parameters; name its layers, as in layers="a.b,c"'
        )
    return found


def _check_classes(y: Tensor, data: Data) -> None:
    count = y.bincount(minlength=len(data.classes))
    if int(count.min()) < 2:
        c = int(count.argmin())
        raise UsageError(
            f"mahalanobis: class {c} has {int(count[c])} examples in {data.name}; it should have at least 2 to learn from"
        )


class Features(nn.Module):
    """A model whose outputs are those of some of its layers, averaged over space.

    Arguments:
        model: The model.
        layers: Their names.
    """

    def __init__(self, model: nn.Module, layers: Sequence[str]) -> None:
        super().__init__()
        self.model, self.layers = model, tuple(layers)

    def forward(self, x: Tensor) -> list[Tensor]:
        """A tensor a layer, with shape (N, C_l)."""
        seen: dict[str, Tensor] = {}
        hooks = [
            self.model.get_submodule(name).register_forward_hook(
                lambda _layer, _given, outputs, name=name: seen.__setitem__(name, logits_of(outputs))
            )
            for name in self.layers
        ]
        try:
            answer(self.model, x)
        finally:
            for hook in hooks:
                hook.remove()
        for name in self.layers:
            if name not in seen:
                raise ModelError(f"the model did not call its layer {name!r}; name one that it calls")
            _check_features(name, seen[name], len(x))
        return [seen[name] if seen[name].ndim == 2 else seen[name].flatten(2).mean(2) for name in self.layers]


def _check_features(name: str, f: Tensor, n: int) -> None:
    if f.ndim < 2 or len(f) != n or not bool(f.isfinite().all()):
        raise ModelError(f"layer {name!r} returned shape {tuple(f.shape)} for {n} inputs; it should be (N, C, *), and finite")


class Tied(nn.Module):
    """Gaussians of one covariance, one a class, and the distance to the closest.

    Arguments:
        f: Features, with shape (N, C).
        y: Their classes, with shape (N,).
    """

    whiten: Tensor
    mu: Tensor
    center: Tensor
    spread: Tensor

    def __init__(self, f: Tensor, y: Tensor) -> None:
        super().__init__()
        wide = f.double()
        mu = torch.stack([wide[y == c].mean(0) for c in y.unique()])
        off = wide - mu[y.unique(return_inverse=True)[1]]
        variance, axes = torch.linalg.eigh(off.T @ off / len(f))
        rounding = torch.finfo(f.dtype).eps * wide.abs().amax()
        kept = variance > torch.maximum(LEAST * variance[-1], rounding**2)
        whiten = axes[:, kept] / variance[kept].sqrt()
        self.register_buffer("whiten", whiten.to(f.dtype))
        self.register_buffer("mu", (mu @ whiten).to(f.dtype))
        d = self.distance(f)
        self.register_buffer("center", d.mean())
        self.register_buffer("spread", d.std().clamp(min=torch.finfo(d.dtype).tiny))

    def distance(self, f: Tensor) -> Tensor:
        """d, with shape (N,)."""
        return (f @ self.whiten).unsqueeze(1).sub(self.mu).square().sum(2).amin(1)

    def forward(self, f: Tensor) -> Tensor:
        """d, standardized by what it was for the examples of the fit."""
        return (self.distance(f) - self.center) / self.spread


class Distances(nn.Module):
    """The fitted detector.

    Arguments:
        features: Inputs to the features of each layer.
        gaussians: One a layer.
        noise: How far an input is moved before.
    """

    def __init__(self, features: Features, gaussians: Sequence[Tied], noise: float) -> None:
        super().__init__()
        self.features, self.gaussians, self.noise = features, nn.ModuleList(gaussians), noise
        self.moved = Straight(self._closer)

    def forward(self, x: Tensor) -> Tensor:
        """The scores, with shape (N,)."""
        return self._score(self.moved(x) if self.noise else x)

    def _score(self, x: Tensor) -> Tensor:
        return torch.stack([gaussian(f) for gaussian, f in zip(self.gaussians, self.features(x), strict=True)]).mean(0)

    def _closer(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            z = x.detach().requires_grad_(True)
            (g,) = torch.autograd.grad(self._score(z).sum(), z)
        return x - self.noise * g.sign()
