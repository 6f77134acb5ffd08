"""Adam inside the ball, away from what the model should say and along what another classifier still says.

Symbols: theta is the candidate (an offset of a code, where the threat model is ``latent``), x(theta) what the model is shown,
L the loss of the attacked model, c the guard, y_c what it said at the start, lambda its weight, m and v the moments of Adam.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from advkit import models
from advkit.engine import frozen
from advkit.errors import ModelError, UsageError
from advkit.losses import ce
from advkit.models import Model
from advkit.oracle import Access, Oracle, answer
from advkit.python import is_python
from advkit.spec import check_at_least, check_positive, check_whole
from advkit.streams import Streams
from advkit.threat import Lp

BETA_1, BETA_2 = 0.9, 0.999
"""How fast Adam's moments forget."""


@dataclass(frozen=True)
class Unrestricted:
    r"""Adam on L(x(theta)) - lambda * CE(c(x(theta)), y_c) from the center of the ball, projected into it after each step.

    Made for codes of a generator: with the threat model ``latent`` the ball is in l_inf around the code, which the paper holds
    by a hinge. The paper's guard is the auxiliary classifier of its generator; here it is any classifier that the attack is
    not tried on. The search stays where the guard goes on saying the class, for an attack that draws another class is no
    success; whether others than the guard still see the class is for judges to say (``advkit gan judge``). The paper's second
    variant also adds small noise to the pixels; this is the first. In l_2 all entries share one v, so that a step goes along m.

    Song, Shu, Kushman and Ermon, 2018, "Constructing unrestricted adversarial examples with generative models",
    https://arxiv.org/abs/1805.07894.

    Arguments:
        steps: How many gradients are taken.
        lr: Adam's step, as a share of the radius; in l_2 of what each entry has of it.
        guard: The classifier c, a spec of :func:`advkit.models.load`; empty for none. Its passes are not counted: it is the
            adversary's own.
        weight: lambda.
    """

    steps: int = 100
    lr: float = 0.02
    guard: str = ""
    weight: float = 10.0
    access = Access.GRADIENTS
    norms = (math.inf, 2.0)
    minimum = False
    paper = "Song et al. 2018"

    def __post_init__(self) -> None:
        check_whole("unrestricted: steps", self.steps, 1)
        check_positive("unrestricted: lr", self.lr)
        check_at_least("unrestricted: weight", self.weight, 0)

    @property
    def cost(self) -> int:
        """A forward and a backward pass a step."""
        return 2 * self.steps

    def __call__(self, oracle: Oracle, x: Tensor, threat: Lp, rng: Streams) -> Tensor:
        """The last iterate, with shape (N, *)."""
        alpha = self.lr * threat.eps / (1.0 if threat.p == math.inf else math.sqrt(x[0].numel()))
        guard = _Guard(self.guard, oracle, x) if self.guard else None
        theta, m, v = x, torch.zeros_like(x), torch.zeros_like(x)
        for t in range(1, self.steps + 1):
            _, g = oracle.grad(theta, ce)
            if guard is not None:
                g = g - self.weight * guard.grad(theta)
            square = g.square() if threat.p == math.inf else g.square().flatten(1).mean(1).view(-1, *(1,) * (g.ndim - 1))
            m, v = m.lerp(g, 1 - BETA_1), v.lerp(square.expand_as(g), 1 - BETA_2)
            size = (v / (1 - BETA_2**t)).sqrt().clamp(min=torch.finfo(x.dtype).tiny)
            theta = threat.project(theta + alpha * m / (1 - BETA_1**t) / size, x)
        return theta


class _Guard:
    """The cross entropy of a classifier and what it said at the start, for candidates of the rows in play."""

    def __init__(self, spec: str, oracle: Oracle, x: Tensor) -> None:
        self.spec, self.oracle = spec, oracle
        path = Path(spec.rpartition(":")[0] if is_python(spec) else spec)
        self.model = _loaded(spec, str(x.device), path.stat().st_mtime_ns if path.is_file() else 0)
        first = next(self.model.module.parameters(), x) if isinstance(self.model.module, nn.Module) else x
        self.dtype = first.dtype
        if self.model.access < Access.GRADIENTS:
            raise UsageError(f"unrestricted: the guard {spec} gives no gradient; give a model that does, as a checkpoint")
        with frozen(self.model.module), torch.no_grad():
            self.said = self._outputs(x, torch.arange(len(x), device=x.device)).argmax(1)

    def grad(self, theta: Tensor) -> Tensor:
        """The gradient in theta, with shape (N, *); 0 for rows that are done."""
        rows, whole = self.oracle.live, torch.zeros_like(theta)
        if not len(rows):
            return whole
        z = theta[rows].detach().requires_grad_(True)
        with frozen(self.model.module), torch.enable_grad():
            outputs = self._outputs(z, rows)
            if not outputs.requires_grad:
                raise UsageError(f"unrestricted: the guard {self.spec} gives no gradient; give a model that does")
            (g,) = torch.autograd.grad(ce(outputs, self.said[rows]).sum(), z)
        whole[rows] = g.nan_to_num(0.0, 0.0, 0.0)
        return whole

    def _outputs(self, z: Tensor, rows: Tensor) -> Tensor:
        seen = z if self.oracle.render is None else self.oracle.render(z, rows)
        try:
            outputs = answer(self.model.module, seen.to(self.dtype))
        except ModelError as error:
            raise UsageError(f"unrestricted: the guard {self.spec} does not serve: {error}") from error
        if outputs.ndim != 2:
            raise UsageError(f"unrestricted: the guard {self.spec} returned shape {tuple(outputs.shape)}; it should be (N, K)")
        return outputs


@functools.lru_cache(maxsize=4)
def _loaded(spec: str, device: str, changed: int) -> Model:
    with torch.inference_mode(False), torch.random.fork_rng(devices=[]):
        return models.load(spec, device=device)
