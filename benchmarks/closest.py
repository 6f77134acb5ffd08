"""How close the attacks that search for the closest example come, side by side with those of adv-lib and foolbox.

    make peers
    python -m advkit.benchmarks.closest --data DATA --models plain.safetensors robust.safetensors --examples 100

Each attack of ``ATTACKS`` that needs no radius runs with its default settings on the examples that the model gets right, and so
does the same attack of each peer, with the same number of steps. A line says how many examples were broken, the median
distance, the area under the curve of robust accuracy over the distance (the mean of the distances, each at most the cap), the
forward and backward passes an example, and the CPU seconds of one thread as a multiple of the floor: as many bare passes.

Optimality is AttackBench's (Cina et al., 2025, https://arxiv.org/abs/2404.19460), 1 - (A - A_best) / (cap - A_best), where
the A are areas, A_best that of the closest examples found by any attack in the table, and the cap the greatest distance of
these: 1 for an attack that always finds the closest, 0 for one that finds nothing. It changes when a line is added.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from advkit import data as data_by_name
from advkit import models as models_by_name
from advkit.attacks import ATTACKS
from advkit.benchmarks.peers import Adversary, peer
from advkit.engine import Attack, frozen, run
from advkit.norms import NORMS, norm_name
from advkit.oracle import Access
from advkit.threat import Lp

ROUNDS = 3
"""How many times the bare passes are timed."""


@dataclass(frozen=True)
class Measured:
    """What one attack did.

    Attributes:
        distance: The distance of each example found, inf where there is none, with shape (N,).
        forwards: Forward passes an example, on average.
        backwards: Backward passes.
        seconds: CPU seconds.
    """

    distance: Tensor
    forwards: float
    backwards: float
    seconds: float


class Counting(nn.Module):
    """A model that counts the rows that go forward and those whose gradient comes back."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.forwards, self.backwards = model, 0, 0

    def forward(self, x: Tensor) -> Tensor:
        """The model's answer."""
        self.forwards += len(x)
        if x.requires_grad:
            x = x.view_as(x)
            x.register_hook(self._count)
        answer: Tensor = self.model(x)
        return answer

    def _count(self, g: Tensor) -> None:
        self.backwards += len(g)


def measured(attack: Attack, model: nn.Module, x: Tensor, y: Tensor, p: float) -> Measured:
    """An attack of advkit."""
    began = time.process_time()
    result = run(attack, model, x, y, Lp(p))
    seconds = time.process_time() - began
    return Measured(result.distance, float(result.forwards.double().mean()), float(result.backwards.double().mean()), seconds)


def measured_peer(rival: Adversary, model: nn.Module, x: Tensor, y: Tensor, p: float) -> Measured:
    """A peer's attack, (model, x, y) to x_adv; what it returns counts if the model says so and it is in the range."""
    counting = Counting(model)
    with frozen(counting):
        began = time.process_time()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            z = rival(counting, x, y).detach()
        seconds = time.process_time() - began
        forwards, backwards = counting.forwards / len(x), counting.backwards / len(x)
        with torch.no_grad():
            fooled = model(z).argmax(1) != y
    found = fooled & Lp(p).allows(z, x)
    return Measured(torch.where(found, Lp(p).distance(z, x), math.inf), forwards, backwards, seconds)


def rivals(attack: Any, p: float) -> Iterator[tuple[str, Adversary]]:
    """The same attack of the peers that are installed, with the same number of steps."""
    adv_lib, foolbox = peer("adv_lib.attacks"), peer("foolbox")
    name = next(name for name, make in ATTACKS.items() if type(attack) is make)
    if adv_lib and name in ADV_LIB:
        make = ADV_LIB[name]
        yield "adv-lib", lambda model, x, y: make(adv_lib, attack, p)(model, x, y)
    if foolbox and (name, p) in FOOLBOX:
        theirs = FOOLBOX[name, p](foolbox.attacks, attack)
        yield "foolbox", lambda model, x, y: _foolbox(foolbox, theirs, model, x, y)


def _foolbox(foolbox: Any, attack: Any, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device=x.device)
    result: Tensor = attack.run(wrapped, x, foolbox.criteria.Misclassification(y))
    return result


def _adv_lib(name: str, settings: Callable[[Any, float], dict[str, Any]]) -> Callable[[Any, Any, float], Adversary]:
    return lambda package, attack, p: lambda model, x, y: getattr(package, name)(model, x, y, **settings(attack, p))


ADV_LIB: Mapping[str, Callable[[Any, Any, float], Adversary]] = {
    "fmn": _adv_lib("fmn", lambda attack, p: {"norm": p, "steps": attack.steps}),
    "deepfool": _adv_lib("df", lambda attack, p: {"norm": p, "steps": attack.steps}),
    "ddn": _adv_lib("ddn", lambda attack, p: {"steps": attack.steps, "levels": None}),
    "fab": _adv_lib("fab", lambda attack, p: {"norm": p, "n_iter": attack.steps}),
    "cw": _adv_lib(
        "carlini_wagner_l2",
        lambda attack, p: {"max_iterations": attack.steps, "binary_search_steps": attack.searches},
    ),
    # At the constants' defaults it makes 21 rounds before it gives up, and more where it succeeds.
    "cw-linf": _adv_lib("carlini_wagner_linf", lambda attack, p: {"max_iterations": max(1, attack.steps // 21)}),
    "pdpgd": _adv_lib("pdpgd", lambda attack, p: {"norm": p, "num_steps": attack.steps}),
    "sigma-zero": _adv_lib("sigma_zero", lambda attack, p: {"num_steps": attack.steps}),
}
"""Attacks of adv-lib: (package, our attack, p) to the same attack."""

FOOLBOX: Mapping[tuple[str, float], Callable[[Any, Any], Any]] = {
    ("deepfool", 2.0): lambda attacks, attack: attacks.L2DeepFoolAttack(steps=attack.steps, candidates=attack.classes),
    ("deepfool", math.inf): lambda attacks, attack: attacks.LinfDeepFoolAttack(steps=attack.steps, candidates=attack.classes),
    ("ddn", 2.0): lambda attacks, attack: attacks.DDNAttack(steps=attack.steps),
    ("cw", 2.0): lambda attacks, attack: attacks.L2CarliniWagnerAttack(steps=attack.steps, binary_search_steps=attack.searches),
    ("ead", 1.0): lambda attacks, attack: attacks.EADAttack(
        steps=attack.steps, binary_search_steps=attack.searches, decision_rule="L1"
    ),
}
"""Attacks of foolbox: (its attacks, our attack) to the same attack."""


def area(distance: Tensor, cap: float) -> float:
    """The area under the curve of robust accuracy from 0 to the cap."""
    return float(distance.clamp(max=cap).double().mean())


def optimality(found: Mapping[str, Tensor]) -> dict[str, float]:
    """AttackBench's optimality of each of several attacks' distances, (N,), of the same examples."""
    best = torch.stack(list(found.values())).amin(0)
    cap = greatest(best)
    least = area(best, cap)
    return {name: 1 - (area(d, cap) - least) / max(cap - least, 1e-12) for name, d in found.items()}


def greatest(best: Tensor) -> float:
    """The cap: the greatest finite distance, 1 where there is none."""
    finite = best[best.isfinite()]
    return float(finite.max()) if len(finite) else 1.0


def floor(model: nn.Module, x: Tensor) -> tuple[float, float]:
    """CPU seconds of a bare forward pass of the batch, and of a backward pass."""
    forward, both = [], []
    with frozen(model):
        for _ in range(ROUNDS + 1):
            began = time.process_time()
            with torch.no_grad():
                model(x)
            forward.append(time.process_time() - began)
            began = time.process_time()
            z = x.clone().requires_grad_()
            torch.autograd.grad(model(z).amax(1).sum(), z)
            both.append(time.process_time() - began)
    f, b = (statistics.median(seconds[1:]) for seconds in (forward, both))
    return f, b - f


def chosen(names: list[str] | None, p: float) -> dict[str, Attack]:
    """The attacks of the table that search for the closest example in a norm, by default those that use gradients."""
    table = {name: make for name, make in ATTACKS.items() if getattr(make, "minimum", None) is True and p in make.norms}  # type: ignore[attr-defined]
    kept = {name: make for name, make in table.items() if (make.access == Access.GRADIENTS if names is None else name in names)}  # type: ignore[attr-defined]
    return {name: make() for name, make in kept.items()}


def compare(label: str, model: nn.Module, x: Tensor, y: Tensor, p: float, names: list[str] | None) -> dict[str, float]:
    """Print a line an attack, and return the optimality of each."""
    done: dict[str, Measured] = {}
    for name, attack in chosen(names, p).items():
        done[name] = measured(attack, model, x, y, p)
        for package, rival in rivals(attack, p):
            done[f"{name} of {package}"] = measured_peer(rival, model, x, y, p)
    if not done:
        return {}
    scores = optimality({name: one.distance for name, one in done.items()})
    cap = greatest(torch.stack([one.distance for one in done.values()]).amin(0))
    forward, backward = floor(model, x)
    for name, one in sorted(done.items(), key=lambda item: -scores[item[0]]):
        bare = one.forwards * forward + one.backwards * backward
        print(
            f"{label:12} {norm_name(p):5} {name:24} found {100 * float(one.distance.isfinite().float().mean()):5.1f} % "
            f"median {float(one.distance.median()):9.5f} area {area(one.distance, cap):9.5f} "
            f"passes {one.forwards:7.1f} + {one.backwards:7.1f} time {one.seconds / bare:5.2f} "
            f"optimality {100 * scores[name]:5.1f} %",
            flush=True,
        )
    return scores


def main() -> None:
    """Compare on the checkpoints given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="the data set")
    parser.add_argument("--models", nargs="+", required=True, metavar="FILE", help="checkpoints")
    parser.add_argument("--examples", type=int, default=100, help="how many test examples (default 100)")
    parser.add_argument("--norms", nargs="+", type=float, default=[math.inf, 2.0, 1.0, 0.0], choices=NORMS, metavar="P")
    parser.add_argument("--attacks", nargs="+", choices=sorted(ATTACKS), metavar="NAME", help="which (default: with gradients)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    x, y = data_by_name.load(arguments.data, split="test").batch(0, arguments.examples)
    scores: defaultdict[tuple[float, str], list[float]] = defaultdict(list)
    for path in arguments.models:
        model = models_by_name.load(path).module
        assert isinstance(model, nn.Module)
        with torch.no_grad(), frozen(model):
            right = model(x).argmax(1) == y
        for p in arguments.norms:
            for name, score in compare(Path(path).stem, model, x[right], y[right], p, arguments.attacks).items():
                scores[p, name].append(score)
    for (p, name), values in sorted(scores.items(), key=lambda item: (item[0][0], -statistics.mean(item[1]))):
        print(f"{norm_name(p):5} {name:24} optimality {100 * statistics.mean(values):5.1f} %, the mean of {len(values)} models")


if __name__ == "__main__":
    main()
