"""The contract kit finds what it says it finds: one broken attack for each part."""

import math
from dataclasses import dataclass, field

import pytest
import torch

from advkit.attacks import PGD
from advkit.losses import ce
from advkit.oracle import Access
from advkit.testing import CONTRACT, check_attack, problem


@dataclass(frozen=True)
class Good:
    """One gradient step; the base of the broken ones."""

    access = Access.GRADIENTS
    norms = (math.inf,)
    minimum = False
    paper = "test"
    cost = 2

    def __call__(self, oracle, x, threat, rng):
        _, g = oracle.grad(x, ce)
        return threat.project(x + threat.eps * g.sign() * rng.uniform(*x.shape[1:], dtype=x.dtype), x)


class Unseeded(Good):
    def __call__(self, oracle, x, threat, rng):
        return threat.project(x + threat.eps * torch.randn(x.shape, generator=_FRESH, dtype=x.dtype), x)


class BatchMean(Good):
    def __call__(self, oracle, x, threat, rng):
        _, g = oracle.grad(x, ce)
        return threat.project(x + threat.eps * g / g.abs().mean(), x)


class GlobalRandom(Good):
    def __call__(self, oracle, x, threat, rng):
        torch.rand(1)
        return super().__call__(oracle, x, threat, rng)


class Unfreezes(Good):
    def __call__(self, oracle, x, threat, rng):
        _, g = oracle.grad(x, ce)
        with torch.enable_grad():
            model = oracle._model
            next(model.parameters()).requires_grad_()
            ce(model(x), oracle._y).sum().backward()
        return threat.project(x + threat.eps * g.sign(), x)


class NeedsGrad(Good):
    def __call__(self, oracle, x, threat, rng):
        z = (2 * x).requires_grad_()
        (z.sum() * 2).backward()
        return super().__call__(oracle, x, threat, rng)


class InPlace(Good):
    def __call__(self, oracle, x, threat, rng):
        return super().__call__(oracle, x.mul_(1.0).add_(1e-3), threat, rng)


class Outside(Good):
    def __call__(self, oracle, x, threat, rng):
        _, g = oracle.grad(x, ce)
        return (x + 2 * threat.eps * g.sign()).clamp(threat.low, threat.high)


class Hidden(Good):
    def __call__(self, oracle, x, threat, rng):
        oracle._model(x)
        return super().__call__(oracle, x, threat, rng)


class Longer(Good):
    def __call__(self, oracle, x, threat, rng):
        for _ in range(5):
            x_adv = super().__call__(oracle, x, threat, rng)
        return x_adv


class Understates(Good):
    access = Access.LABELS


class Cheats(Good):
    """Writes successes into the oracle's books."""

    def __call__(self, oracle, x, threat, rng):
        oracle.best.fill_(threat.high)
        oracle.found.fill_(True)
        oracle.distance.fill_(1e-3)
        return x


@dataclass(frozen=True)
class Unhashable(Good):
    hook: object = field(default_factory=lambda: lambda: 0)


_FRESH = torch.Generator().manual_seed(0)


def test_a_good_attack_passes():
    check_attack(Good())


@pytest.mark.parametrize(
    ("attack", "part"),
    [
        (Unseeded(), "deterministic"),
        (BatchMean(), "independent of batch"),
        (GlobalRandom(), "global random state"),
        (Unfreezes(), "model untouched"),
        (InPlace(), "inputs unmodified"),
        (Outside(), "inside"),
        (Longer(), "within cost"),
        (Understates(), "access respected"),
        (Hidden(), "honest counts"),
    ],
)
def test_a_broken_attack_is_found(attack, part):
    with pytest.raises(AssertionError):
        CONTRACT[part](problem(attack, math.inf))


def test_an_attack_that_relies_on_the_callers_autograd_is_found():
    with pytest.raises(RuntimeError):
        CONTRACT["under no_grad"](problem(NeedsGrad(), math.inf))


def test_cheating_in_the_books_gains_nothing():
    task = problem(Cheats(), math.inf)
    assert not task.run().success.any()


def test_the_text_says_what_and_where():
    with pytest.raises(AssertionError, match=r"breaks the contract \(inside; l_inf.*the last iterate should be inside"):
        check_attack(Outside())


def test_an_attack_that_cannot_be_pickled_is_found():
    with pytest.raises((AssertionError, AttributeError)):
        CONTRACT["picklable"](problem(Unhashable(), math.inf))


def test_norms_can_be_chosen():
    check_attack(PGD(2), norms=(2.0,))
