"""Defense-GAN: the closest drawing of a generator in place of the input.

Symbols: G is the generator and z a code, (d,), for which is searched from R = ``restarts`` starts by L = ``steps`` steps; v is
the momentum of a step. J is the derivative of G at the code that is found.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from advkit import spec
from advkit.defenses.inference.defended import Defended, Filter, Random, opaque
from advkit.errors import ModelError
from advkit.gan import pair
from advkit.gan.source import Source, check_source
from advkit.models.digest import digest_of
from advkit.streams import Streams

MOMENTUM = 0.7
"""The authors' in v = 0.7 v + gradient."""
LAST, SLOWER = 0.8, 0.1
"""After this share of the steps the rate is a tenth, as in the authors' code."""
ROWS = 1_000
"""For how many codes is searched at a time."""
SHORTER = 2
"""By how much the search of an attack's stand-in is shorter."""
PRODUCTS = 10
"""After how many products with J^T J the solver stops."""


@dataclass(frozen=True)
class DefenseGAN:
    """t(x) = G(z*), z* the best of R codes, each the end of L steps of z = z - lr * v down the mean square of G(z) - x.

    Samangouei, Kabkab and Chellappa, 2018, "Defense-GAN: protecting classifiers against adversarial attacks using generative
    models", https://arxiv.org/abs/1805.06605. Steps and starts are those of the authors' code: gradient descent with a momentum
    of 0.7 that is ten times slower at the end, from codes near the middle of the prior. With a conditional generator the
    starts go over its classes.

    It has no gradient; an adaptive attack takes J (J^T J + lambda I)^-1 J^T, that of the projection on what G can draw, of a
    shorter search, and the mean over draws (Athalye, Carlini and Wagner, 2018, https://arxiv.org/abs/1802.00420, take the
    identity's). A search that stops early is damped least squares: lambda is 1 over twice the sum of its steps' rates. Slow:
    each answer costs L R passes through G, there and back.

    Arguments:
        generator: A source of images in [0, 1]: a .safetensors that ``advkit gan train`` wrote, or ``file.py:function``.
        steps: L.
        restarts: R.
        lr: The rate, for the mean over the entries of an image.
        seed: Of the starts.

    Attributes:
        source: The generator.
        digest: The first digits of a SHA-256 of it.

    Raises:
        UsageError: A setting is not greater than 0, the seed less than 0, or the source cannot be loaded or has another range.
    """

    generator: str
    steps: int = 200
    restarts: int = 10
    lr: float = 10.0
    seed: int = 0
    source: Source = field(init=False, repr=False, compare=False)
    digest: str = field(init=False)
    draws = 2

    def __post_init__(self) -> None:
        spec.check_whole("defense-gan: steps", self.steps, 1)
        spec.check_whole("defense-gan: restarts", self.restarts, 1)
        spec.check_positive("defense-gan: lr", self.lr)
        spec.check_whole("defense-gan: seed", self.seed, 0)
        source = pair.load(self.generator)
        check_source(source, self.generator, span=(0.0, 1.0))
        object.__setattr__(self, "source", source)
        object.__setattr__(self, "digest", digest_of(source.decode)[:16])

    def exact(self, x: Tensor, rng: Streams) -> Tensor:
        """The closest drawings.

        Raises:
            ModelError: The inputs have another shape than the drawings.
        """
        z, y = self._found(x, rng)
        return opaque(self._drawn(z, y, x).clamp(0, 1), x)

    def guide(self, x: Tensor, rng: Streams) -> Tensor:
        """The same, with the gradient of the projection."""
        z, y = self._found(x, rng)
        shown = self._drawn(z, y, x).detach().clamp(0, 1) + (x - x.detach())
        if shown.requires_grad:
            damping = (1 - MOMENTUM) * x[0].numel() / (2 * self.lr * self.steps)
            shown.register_hook(lambda g: projected(lambda codes: self._drawn(codes, y, x), z, g, damping))
        return shown

    def around(self, model: Callable[[Tensor], Any]) -> nn.Module:
        """The model behind it; the generator goes to its device."""
        first = next(model.parameters(), None) if isinstance(model, nn.Module) else None
        network = getattr(self.source, "generator", None)
        if first is not None and isinstance(network, nn.Module):
            network.to(first.device)
        behind = Defended(self, model)
        behind.filter = Searching(self)
        return behind

    def shorter(self) -> DefenseGAN:
        """The same with fewer steps, from one code or one of each class: what an attack takes its gradient from."""
        other = copy.copy(self)
        object.__setattr__(other, "steps", -(-self.steps // SHORTER))
        object.__setattr__(other, "restarts", max(1, self.source.classes))
        return other

    def _drawn(self, z: Tensor, y: Tensor | None, like: Tensor) -> Tensor:
        """G(z), in the type of the inputs."""
        return self.source.decode(z, y).to(like.dtype)

    def _found(self, x: Tensor, rng: Streams) -> tuple[Tensor, Tensor | None]:
        """The codes (N, d) and classes (N,) of the closest drawings."""
        if x.shape[1:] != tuple(self.source.shape):
            shapes = f"{tuple(self.source.shape)} and the inputs have {tuple(x.shape[1:])}"
            raise ModelError(f"the generator of defense-gan draws images of shape {shapes}; both should be the same")
        n = max(1, ROWS // self.restarts)
        # Under inference_mode nothing could be searched for.
        with torch.inference_mode(False), torch.enable_grad():
            starts, classes = self._starts(x, rng)
            parts = zip(x.detach().clone().split(n), starts.split(n), classes.split(n), strict=True)
            z, y = zip(*(self._best(*part) for part in parts), strict=True)
        return torch.cat(z), torch.cat(y) if self.source.classes else None

    def _starts(self, x: Tensor, rng: Streams) -> tuple[Tensor, Tensor]:
        """Where each search begins: codes, with shape (N, R, d), and classes, with shape (N, R), all 0 where there are none."""
        codes = torch.stack([self._start(word) for word in rng.words(()).tolist()])
        first = rng.integers(max(1, self.source.classes)).unsqueeze(1)
        classes = (first + torch.arange(self.restarts, device=x.device)) % max(1, self.source.classes)
        return codes.to(x), classes

    def _start(self, word: int) -> Tensor:
        """Codes of one row, with shape (R, d): each the mean of d draws, of a standard normal the authors' N(0, I / d)."""
        rng = torch.Generator().manual_seed(word)
        d = self.source.latent(1, rng).shape[1]
        return self.source.latent(self.restarts * d, rng).reshape(self.restarts, d, d).mean(1)

    def _best(self, x: Tensor, z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """The best code of each row and its class, after the steps from all of its starts."""
        n, r, d = z.shape
        x, z, classes = x.repeat_interleave(r, 0), z.flatten(0, 1), y.flatten() if self.source.classes else None
        v = torch.zeros_like(z)
        for i in range(self.steps):
            z.requires_grad_(True)
            (g,) = torch.autograd.grad(self._errors(z, classes, x).sum(), z)
            v = MOMENTUM * v + g
            z = z.detach() - self.lr * (1.0 if i < LAST * self.steps else SLOWER) * v
        with torch.no_grad():
            errors = self._errors(z, classes, x).view(n, r).nan_to_num(nan=torch.inf)
        best = errors.argmin(1, keepdim=True)
        return z.view(n, r, d).take_along_dim(best.unsqueeze(2), 1).squeeze(1), y.gather(1, best).squeeze(1)

    def _errors(self, z: Tensor, y: Tensor | None, x: Tensor) -> Tensor:
        """The mean square of G(z) - x, with shape (N,)."""
        return (self._drawn(z, y, x) - x).square().flatten(1).mean(1)


class Searching(Filter):
    """The layer that shows the drawings.

    Arguments:
        gan: The defense.
    """

    def __init__(self, gan: DefenseGAN) -> None:
        super().__init__(gan)
        self.gan = gan

    def stand_in(self) -> nn.Module:
        """A shorter search with other draws, and with the guide's gradient."""
        return Imitation(self.gan.shorter())


class Imitation(Random):
    """What an adaptive attack takes in place of the layer: the guide, which shows the drawings as well.

    Arguments:
        gan: The defense that is imitated.
    """

    def __init__(self, gan: DefenseGAN) -> None:
        super().__init__(gan.seed + 1, gan.draws)
        self.gan = gan

    def forward(self, x: Tensor) -> Tensor:
        """The drawings, with the gradient of the projection."""
        return self.gan.guide(x, self.dice.throw(x))

    def extra_repr(self) -> str:
        """The settings."""
        return repr(self.gan)


def projected(draw: Callable[[Tensor], Tensor], z: Tensor, g: Tensor, damping: float) -> Tensor:
    """J (J^T J + lambda I)^-1 J^T g, by the method of conjugate gradients, each row for itself.

    Hestenes and Stiefel, 1952, "Methods of conjugate gradients for solving linear systems". J is only multiplied with, never
    written down: J^T by a backward pass, J by the backward pass of a backward pass.

    Arguments:
        draw: G, codes (N, d) to samples (N, *), each from its own code, twice differentiable where it is differentiable.
        z: The codes.
        g: What is projected, with the shape of the samples.
        damping: lambda.

    >>> z, g = torch.zeros(1, 1), torch.tensor([[1.0, 0.0]])
    >>> projected(lambda z: z * torch.tensor([[3.0, 4.0]]), z, g, 0.0)
    tensor([[0.3600, 0.4800]])
    """
    with torch.enable_grad():
        z = z.detach().requires_grad_(True)
        shown = draw(z)
        u = torch.zeros_like(shown, requires_grad=True)
        (pulled,) = torch.autograd.grad(shown, z, u, create_graph=True)

    def down(a: Tensor) -> Tensor:
        return torch.autograd.grad(shown, z, a, retain_graph=True)[0]

    def up(b: Tensor) -> Tensor:
        return torch.autograd.grad(pulled, u, b, retain_graph=True)[0]

    r = down(g)
    p, solution, tiny = r, torch.zeros_like(r), torch.finfo(r.dtype).tiny
    for _ in range(PRODUCTS):
        q = down(up(p)) + damping * p
        size = r.square().sum(1, keepdim=True)
        alpha = size / (p * q).sum(1, keepdim=True).clamp(min=tiny)
        solution, r = solution + alpha * p, r - alpha * q
        p = r + r.square().sum(1, keepdim=True) / size.clamp(min=tiny) * p
    return up(solution)
