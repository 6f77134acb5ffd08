"""Attacks with scores only side by side: how many examples fall, after how many queries, and at what price in CPU time.

    make peers
    python -m advkit.benchmarks.queries --data DATA --model M --threat "l2(2)" --queries 1000 --examples 100 --autoattack PATH

Every attack of the table that sees scores and serves the threat model, the Square of AutoAttack's authors (PATH is a checkout
of theirs) and what torchattacks has, on the same images, those that the model gets right, with the same number of queries.

An example that does not fall counts with all queries in the median and in the mean. Peers that do not count queries have
none to show; a success of theirs is what a last forward pass says. The time is in CPU seconds of one thread for each pass
that a row was part of, as a multiple of the floor: bare forward passes of all rows in one batch, without gradients.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from advkit import data as data_by_name
from advkit import models as models_by_name
from advkit import spec
from advkit.attacks import ATTACKS, SPSA, SimBA
from advkit.benchmarks.peers import Adversary, peer
from advkit.engine import Attack, frozen, run
from advkit.oracle import Access
from advkit.threat import BALLS, Lp

FLOOR_PASSES = 20
"""How many bare passes are timed."""


@dataclass(frozen=True)
class Outcome:
    """What came of one attack.

    Attributes:
        fell: Which examples fell, with shape (N,).
        queries: After how many queries, all of them where it did not, with shape (N,); None where nobody counted.
        passes: How many row-passes the model made.
        seconds: The CPU time.
    """

    fell: Tensor
    queries: Tensor | None
    passes: int
    seconds: float


class Counted(nn.Module):
    """A model that counts the rows it is shown."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.rows = model, 0

    def forward(self, x: Tensor) -> Tensor:
        """The model's logits."""
        self.rows += len(x)
        logits: Tensor = self.model(x)
        return logits


def ours(threat: Lp, queries: int) -> Iterator[tuple[str, Attack]]:
    """The attacks of the table that see scores only, search inside a fixed radius and serve the threat model."""
    for name, make in ATTACKS.items():
        # What wraps another attack has the access and the norms of that one.
        if getattr(make, "access", None) == Access.SCORES and threat.p in getattr(make, "norms", ()):
            yield name, make(queries=queries)
    if threat.p in SimBA.norms:
        yield 'simba(basis="pixel")', SimBA(queries, "pixel")


def measure_ours(attack: Attack, model: nn.Module, x: Tensor, y: Tensor, threat: Lp, queries: int) -> Outcome:
    """One of our attacks as an evaluation runs it."""
    began = time.process_time()
    result = run(attack, model, x, y, threat, budget=queries, rng=torch.Generator().manual_seed(0))
    seconds = time.process_time() - began
    needed = torch.where(result.success, result.forwards, queries)
    return Outcome(result.success, needed, int((result.forwards + result.checks).sum()), seconds)


def measure_theirs(attack: Adversary, model: nn.Module, x: Tensor, y: Tensor, threat: Lp) -> Outcome:
    """One of the peers' attacks, which give only their examples."""
    counted = Counted(model)
    with torch.random.fork_rng(devices=[]), frozen(counted):
        torch.manual_seed(0)
        began = time.process_time()
        z = attack(counted, x, y)
        seconds = time.process_time() - began
        with torch.no_grad():
            fell = (model(z).argmax(1) != y) & Lp(threat.p, threat.eps * (1 + 1e-5)).allows(z, x)
    return Outcome(fell, None, counted.rows, seconds)


def measure_square(square: Any, model: nn.Module, x: Tensor, y: Tensor, threat: Lp, queries: int) -> Outcome:
    """The Square of AutoAttack's authors, which counts its queries."""
    counted = Counted(model)
    norm = "Linf" if threat.p == math.inf else f"L{threat.p:g}"
    with frozen(counted), torch.no_grad(), contextlib.redirect_stdout(io.StringIO()):
        attack = square(counted, norm=norm, eps=threat.eps, n_queries=queries, p_init=0.8, device="cpu")
        attack.init_hyperparam(x)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            began = time.process_time()
            needed, z = attack.attack_single_run(x, y)
            seconds = time.process_time() - began
        fell = (model(z).argmax(1) != y) & Lp(threat.p, threat.eps * (1 + 1e-5)).allows(z, x)
    return Outcome(fell, torch.where(fell, needed.to(torch.int64), queries), counted.rows, seconds)


def torchattacks_pairs(threat: Lp, queries: int) -> Iterator[tuple[str, Adversary]]:
    """What torchattacks has, with its defaults and with the settings of ours."""
    torchattacks = peer("torchattacks")
    if torchattacks is None or threat.p not in (2.0, math.inf):
        return
    norm, eps = "Linf" if threat.p == math.inf else "L2", threat.eps
    square = partial(torchattacks.Square, norm=norm, eps=eps, n_queries=queries, p_init=0.8)
    yield "torchattacks Square", partial(_attacked, square)
    if threat.p != math.inf:
        return
    for what, pairs, settings in (("", 128, {}), (", our settings", SPSA().pairs, {"delta": 0.2 * eps, "lr": 0.2 * eps})):
        steps = max(1, queries // (2 * pairs))
        spsa = partial(torchattacks.SPSA, eps=eps, nb_iter=steps, nb_sample=pairs, **settings)
        yield f"torchattacks SPSA{what}", partial(_attacked, spsa)


def _attacked(make: Callable[[nn.Module], Any], model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    z: Tensor = make(model)(x, y)
    return z


def floor(model: nn.Module, x: Tensor) -> float:
    """CPU seconds of a bare forward pass for one row, in batches of all rows."""
    with frozen(model), torch.no_grad():
        model(x)
        began = time.process_time()
        for _ in range(FLOOR_PASSES):
            model(x)
        return (time.process_time() - began) / FLOOR_PASSES / len(x)


def line(name: str, outcome: Outcome, base: float) -> str:
    """One row of the report."""
    needed = outcome.queries
    counted = (
        "      -       -" if needed is None else f"{float(needed.double().median()):7.0f} {float(needed.double().mean()):7.0f}"
    )
    price = outcome.seconds / outcome.passes / base
    return f"{name:32} {100 * float(outcome.fell.double().mean()):6.1f} % {counted} {outcome.passes:9d} {price:7.2f}"


def main() -> None:
    """Compare on the model given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="labelled images in [0, 1]")
    parser.add_argument("--model", required=True, help="a checkpoint")
    parser.add_argument("--threat", default="linf(0.3)", help="the threat model (default linf(0.3))")
    parser.add_argument("--queries", type=int, default=1000, help="how many queries (default 1000)")
    parser.add_argument("--examples", type=int, default=100, help="how many test images are read (default 100)")
    parser.add_argument("--autoattack", help="a checkout of AutoAttack")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    threat = spec.parse(arguments.threat, BALLS, "threat model")
    model = models_by_name.load(arguments.model).module
    assert isinstance(model, nn.Module)
    x, y = data_by_name.load(arguments.data, split="test").batch(0, arguments.examples)
    with frozen(model), torch.no_grad():
        right = model(x).argmax(1) == y
    x, y = x[right], y[right]
    print(
        f"{len(x)} images, {arguments.threat}, {arguments.queries} queries; {1e3 * floor(model, x):.3f} ms a bare pass and row"
    )
    print(f"{'attack':32} success  median    mean    passes x floor", flush=True)
    for name, measure in _measures(model, x, y, threat, arguments):
        base = floor(model, x)
        print(line(name, measure(), base), flush=True)


def _measures(
    model: nn.Module, x: Tensor, y: Tensor, threat: Lp, arguments: argparse.Namespace
) -> Iterator[tuple[str, Callable[[], Outcome]]]:
    """What is measured: ours, then the peers'."""
    for name, attack in ours(threat, arguments.queries):
        yield name, partial(measure_ours, attack, model, x, y, threat, arguments.queries)
    if arguments.autoattack and threat.p != 0:
        sys.path.insert(0, arguments.autoattack)
        square = importlib.import_module("autoattack.square").SquareAttack
        yield "AutoAttack Square", partial(measure_square, square, model, x, y, threat, arguments.queries)
    for name, adversary in torchattacks_pairs(threat, arguments.queries):
        yield name, partial(measure_theirs, adversary, model, x, y, threat)


if __name__ == "__main__":
    main()
