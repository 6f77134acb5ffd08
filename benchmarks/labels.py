"""Attacks that see only labels, side by side with foolbox: the distance after as many queries, and the time over the floor.

    python -m advkit.benchmarks.labels --data DATA --model FILE --examples 24 --queries 500 1000 2400

Both attack the examples that the model gets right, one batch of them, and a query is a forward pass of one example. What
foolbox has after q queries is the closest input among the first q that it showed the model. The floor is as many bare
forward passes on the same batch, moved to a random place in a ball as the attacks' iterates are: pooling is faster on clean
digits. Times are CPU seconds of one thread, and the floor is timed before and after each attack. An attack can be below the
floor by sending several candidates of a row at once.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from advkit import data as data_by_name
from advkit import models as models_by_name
from advkit import spec
from advkit.attacks import ATTACKS
from advkit.benchmarks.peers import peer
from advkit.engine import Attack, frozen, run
from advkit.norms import norm_name
from advkit.streams import Streams
from advkit.threat import Lp

NOISE = 0.2
"""The radius of the ball, in l_inf, in which the floor is timed."""
OURS = {2.0: ("boundary", "hopskipjump", "surfree"), math.inf: ("hopskipjump", "rays")}


class EnoughError(Exception):
    """Raised when the peer has had its queries."""


class Recorder(nn.Module):
    """A model that notes the closest success of each row of one batch, and stops at a number of queries.

    Arguments:
        model: The model.
        x: The clean inputs, with shape (N, *); every call must be on these rows, in this order.
        y: Their labels, with shape (N,).
        threat: What distance is.
        marks: The numbers of queries at which the distances are noted; the greatest is the last.
    """

    def __init__(self, model: nn.Module, x: Tensor, y: Tensor, threat: Lp, marks: list[int]) -> None:
        super().__init__()
        self.model, self.x, self.y, self.threat, self.marks = model, x, y, threat, marks
        self.queries, self.at = 0, dict[int, Tensor]()
        self.best = torch.full((len(x),), math.inf, dtype=x.dtype)

    def forward(self, z: Tensor) -> Tensor:
        """The model's outputs."""
        outputs: Tensor = self.model(z)
        fooled = outputs.argmax(1) != self.y
        self.best = torch.where(fooled, torch.minimum(self.best, self.threat.distance(z, self.x)), self.best)
        self.queries += 1
        if self.queries in self.marks:
            self.at[self.queries] = self.best
        if self.queries >= max(self.marks):
            raise EnoughError
        return outputs


def foolbox_attacks(foolbox: Any, p: float) -> dict[str, Any]:
    """Foolbox's label-only attacks in a norm, with more steps than there are queries."""
    hopskipjump = foolbox.attacks.HopSkipJumpAttack(constraint="l2" if p == 2 else "linf", steps=10_000)
    boundary = {"boundary": foolbox.attacks.BoundaryAttack(steps=1_000_000)} if p == 2 else {}
    return {**boundary, "hopskipjump": hopskipjump}


def floor(model: nn.Module, x: Tensor, passes: int = 50) -> float:
    """CPU seconds of a bare forward pass of the batch."""
    z = Lp(math.inf, NOISE).start(x, Streams.seeded(0, range(len(x))))
    with torch.no_grad():
        model(z)
        began = time.process_time()
        for _ in range(passes):
            model(z)
    return (time.process_time() - began) / passes


def measure(name: str, call: Callable[[], dict[int, Tensor]], model: nn.Module, x: Tensor, queries: int) -> None:
    """Print the distances of one attack, and its CPU time for ``queries`` as a multiple of the floor."""
    before = floor(model, x)
    began = time.process_time()
    at = call()
    seconds = time.process_time() - began
    base = (before + floor(model, x)) / 2
    line = ", ".join(f"{mark}: {float(d.median()):.4f} ({int(d.isfinite().sum())} found)" for mark, d in sorted(at.items()))
    print(f"{name:22} median after {line}; {seconds / (base * queries):.2f} of the floor", flush=True)


def compare(model: nn.Module, x: Tensor, y: Tensor, threat: Lp, marks: list[int], names: list[str]) -> None:
    """Ours and foolbox's, in one norm."""
    foolbox = peer("foolbox")
    theirs = foolbox_attacks(foolbox, threat.p) if foolbox else {}
    print(f"{norm_name(threat.p)}, {len(x)} examples, floor {1e6 * floor(model, x) / len(x):.0f} us a query", flush=True)
    for text in names:
        attack = spec.parse(text, ATTACKS, "attack")
        if threat.p not in attack.norms:
            continue
        measure(text, partial(at_marks, attack, model, x, y, threat, marks), model, x, sum(marks))
        name = text.partition("(")[0]
        if name in theirs:
            call = partial(recorded, foolbox, theirs[name], Recorder(model, x, y, threat, marks))
            measure(f"foolbox {name}", call, model, x, max(marks))


def at_marks(attack: Attack, model: nn.Module, x: Tensor, y: Tensor, threat: Lp, marks: list[int]) -> dict[int, Tensor]:
    """The distances of an attack that plans for each number of queries."""
    planned = {mark: type(attack)(**{**vars(attack), "queries": mark}) for mark in marks}
    return {mark: run(planned[mark], model, x, y, threat, budget=mark).distance for mark in marks}


def recorded(foolbox: Any, attack: Any, recorder: Recorder) -> dict[int, Tensor]:
    """The distances of an attack of foolbox; none where it finds no start for some row, and so raises."""
    try:
        attack(foolbox.PyTorchModel(recorder.eval(), bounds=(0, 1)), recorder.x, recorder.y, epsilons=None)
    except EnoughError:
        pass
    except ValueError as error:
        print(f"foolbox: {error}")
    return recorder.at


def main() -> None:
    """Compare on one model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="images in [0, 1]")
    parser.add_argument("--model", required=True, help="a checkpoint")
    parser.add_argument("--examples", type=int, default=24, help="how many test images (default 24)")
    parser.add_argument("--queries", type=int, nargs="+", default=[500, 1000, 2400], help="the numbers of queries")
    parser.add_argument("--norms", nargs="+", choices=("l2", "linf"), default=["l2", "linf"], help="the norms (default: both)")
    parser.add_argument("--attacks", nargs="+", help="our attacks (default: all that see only labels)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = models_by_name.load(arguments.model).module
    assert isinstance(model, nn.Module)
    x, y = data_by_name.load(arguments.data, split="test").batch(0, arguments.examples)
    with frozen(model):
        with torch.no_grad():
            right = model(x).argmax(1) == y
        for p in (2.0 if norm == "l2" else math.inf for norm in arguments.norms):
            names = arguments.attacks or list(OURS[p])
            compare(model, x[right], y[right], Lp(p), sorted(set(arguments.queries)), names)


if __name__ == "__main__":
    main()
