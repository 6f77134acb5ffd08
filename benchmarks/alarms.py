"""How often the checks of ``advkit doctor`` raise an alarm where nothing is wrong, and whether they do where something is.

    python -m advkit.benchmarks.alarms --data mnist-5k --model robust.safetensors --threat "linf(0.3)" --seeds 5 15
    python -m advkit.benchmarks.alarms --data mnist-5k --model plain.safetensors --threat "linf(0.1)" --planted mlp.safetensors

Without ``--planted`` the model is taken as it is, with ``pgd(steps=40)``, whose robust accuracy is close to the best that is
known: every alarm is a false one. With it, one thing at a time is broken, in the model or in the attack, and the check that
should fire is named. Each seed draws other examples. Cost is forward and backward passes, as a multiple of ``pgd(steps=40)``
on every example.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from advkit import data as data_by_name
from advkit import models as models_by_name
from advkit.attacks import PGD
from advkit.benchmarks.broken import Detached, Noisy, Quantized, Saturated, Scale, winners
from advkit.benchmarks.doctor import EXAMPLES, diagnose
from advkit.benchmarks.findings import Finding
from advkit.benchmarks.plan import parse_ball, parse_threat
from advkit.combine import Wrapper
from advkit.data import Data
from advkit.engine import Attack
from advkit.models import Model
from advkit.oracle import Oracle
from advkit.streams import Streams
from advkit.threat import Change, Lp
from advkit.train import Recipe, train


class Wavy(nn.Module):
    """The identity with a ripple that is too small to matter and so steep that the gradient is the ripple's.

    Gradients that explode, as those of purifiers of many steps do (Athalye, Carlini and Wagner, 2018).
    """

    def forward(self, x: Tensor) -> Tensor:
        """X + 0.01 sin(10^4 x)."""
        return x + 0.01 * torch.sin(1e4 * x)


class NoGraph(nn.Module):
    """A model that computes its answers without a graph."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """The answers."""
        outputs: Tensor = self.model(x)
        return outputs


@dataclass(frozen=True)
class Clipped(Wrapper):
    """The attack in a ball a fifth of a fixed size, whatever radius it is given: a clipping left in from another experiment."""

    attack: Attack
    eps: float
    paper = "planted"

    @property
    def cost(self) -> int:
        """The attack's."""
        return self.attack.cost

    def __call__(self, oracle: Oracle, x: Tensor, threat: Lp, rng: Streams) -> Tensor:
        """The last iterate of the attack in the smaller ball."""
        return self.attack(oracle, x, replace(threat, eps=self.eps / 5), rng)


@dataclass(frozen=True)
class Back(Wrapper):
    """The attack, which goes back to where it began at the end."""

    attack: Attack
    paper = "planted"

    @property
    def cost(self) -> int:
        """The attack's."""
        return self.attack.cost

    def __call__(self, oracle: Oracle, x: Tensor, threat: Lp, rng: Streams) -> Tensor:
        """X."""
        self.attack(oracle, x, threat, rng)
        return x


@dataclass(frozen=True)
class Planted:
    """One failure, and the check that should see it."""

    name: str
    check: str
    model: nn.Module
    attack: Attack | None = None
    surrogate: nn.Module | None = None


def planted(network: nn.Module, threat: Lp, other: nn.Module, train_data: Data | None = None) -> Iterator[Planted]:
    """Failures around a network.

    Arguments:
        network: The network.
        threat: The threat model, in l_inf.
        other: A network that has nothing to do with it.
        train_data: What a network with k-winners-take-all is trained on; None to leave that out.
    """
    yield Planted("input detached", "unavailable-gradients", Detached(network))
    yield Planted("no graph at all", "unavailable-gradients", NoGraph(network))
    yield Planted("input rounded to 32 levels", "unavailable-gradients", Quantized(network))
    yield Planted("softmax at temperature 0.01", "unavailable-gradients", Saturated(network))
    yield Planted("logits times 1000", "unavailable-gradients", nn.Sequential(network, Scale(1000.0)))
    yield Planted("exploding gradients", "unstable-predictions", nn.Sequential(Wavy(), network))
    yield Planted("noise of 0.05", "answers-change", Noisy(network, 0.05))
    yield Planted("back at the end", "silent-success", network, Back(PGD(steps=40)))
    yield Planted("three short steps", "not-converged", network, PGD(steps=3, step=threat.eps / 10))
    yield Planted("a fifth of the radius", "more-radius-does-not-help", network, Clipped(PGD(steps=40), threat.eps))
    yield Planted("another surrogate", "transfer-failure", network, surrogate=other)
    if train_data is not None:
        recipe = Recipe(epochs=2, batch_size=64, lr=0.02)
        yield Planted("5 % winners take all", "unstable-predictions", train(winners(network, 0.05), train_data, recipe))


class _Counting(nn.Module):
    """Counts the rows that pass a model, forward and backward."""

    def __init__(self, model: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.model, self.passes = model, 0

    def forward(self, x: Tensor) -> Tensor:
        """The model's outputs."""
        self.passes += len(x)
        if x.requires_grad:
            x = x.view_as(x)
            x.register_hook(self._count)
        return self.model(x)

    def _count(self, g: Tensor) -> None:
        self.passes += len(g)


def alarms(
    model: Model, data: Data, threat: Lp | Change, seed: int, attack: Attack | None = None, surrogate: nn.Module | None = None
) -> tuple[list[Finding], float]:
    """What fired on examples that the seed draws, and the cost as a multiple of ``pgd(steps=40)``."""
    some = data.limited(EXAMPLES, seed)
    x, y = some.batch(0, len(some))
    counting = _Counting(model.module)
    found = diagnose(replace(model, module=counting), x, y, threat, attack=attack, surrogate=surrogate, seed=seed)
    return [f for f in found if f.severity != "fine"], counting.passes / (2 * 40 * len(x))


def false_alarms(model: Model, data: Data, threat: Lp | Change, seeds: Sequence[int]) -> None:
    """Print a line for a model on which nothing should fire."""
    runs = [alarms(model, data, threat, seed) for seed in seeds]
    suspect = [f.check for found, _ in runs for f in found if f.severity == "suspect"]
    warned = [f.check for found, _ in runs for f in found if f.severity == "warning"]
    sets = sum(any(f.severity == "suspect" for f in found) for found, _ in runs)
    cost = sum(cost for _, cost in runs) / len(runs)
    names = ", ".join(sorted({*suspect, *warned})) or "-"
    print(f"| {model.name} | {len(runs)} | {sets} | {len(suspect)} | {len(warned)} | {names} | {cost:.1f} |", flush=True)


def detected(failures: Iterator[Planted], data: Data, threat: Lp | Change, seeds: Sequence[int]) -> None:
    """Print a line for each failure: how often its check fired, and what else did."""
    for failure in failures:
        model = models_by_name.wrap(failure.model)
        runs = [alarms(model, data, threat, seed, failure.attack, failure.surrogate)[0] for seed in seeds]
        hits = sum(any(f.check == failure.check for f in found) for found in runs)
        rest = sorted({f.check for found in runs for f in found} - {failure.check})
        line = (
            f"| {failure.name} | `{failure.check}` | {hits} of {len(runs)} | {', '.join(f'`{name}`' for name in rest) or '-'} |"
        )
        print(line, flush=True)


def main() -> None:
    """Print one of the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--threat", required=True)
    parser.add_argument("--seeds", nargs=2, type=int, metavar=("FIRST", "END"), default=(5, 15), help="default 5 15")
    parser.add_argument("--planted", metavar="OTHER", help="break something, one thing at a time; a model for a bad surrogate")
    settings = parser.parse_args()
    torch.set_num_threads(1)
    data = data_by_name.load(settings.data, split="test")
    model = models_by_name.load(settings.model)
    threat = parse_threat(settings.threat, data)
    seeds = range(*settings.seeds)
    if settings.planted is None:
        false_alarms(model, data, threat, seeds)
        return
    other = models_by_name.load(settings.planted).module
    assert isinstance(model.module, nn.Module)
    assert isinstance(other, nn.Module)
    few = data_by_name.load(settings.data, split="train", limit=8_000)
    detected(planted(model.module, parse_ball(settings.threat, data), other, few), data, threat, seeds)


if __name__ == "__main__":
    main()
