"""Transfer attacks side by side with torchattacks: how often each one's examples fool another model, at equal steps.

    make peers
    python -m advkit.benchmarks.transfer_peers --surrogate a.safetensors --target b.safetensors --data DATA --eps 8/255

Examples are made in l_inf with 10 steps of eps / 10 and momentum 1, on the images that both models get right; those of
torchattacks are given the same settings. Attacks with random draws are run with several seeds, and the mean is printed.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from advkit import data as data_by_name
from advkit import models as models_by_name
from advkit import spec
from advkit.attacks import ATTACKS
from advkit.benchmarks.peers import peer
from advkit.engine import perturb
from advkit.surrogates import ask
from advkit.threat import Lp

STEPS = 10
SEEDS = 3

PAIRS = {
    "bim": ("BIM", {}),
    "mi-fgsm": ("MIFGSM", {}),
    "ni-fgsm": ("NIFGSM", {}),
    "di(mi-fgsm)": ("DIFGSM", {"decay": 1.0}),
    "ti(di(mi-fgsm), sigma=7/3)": ("TIFGSM", {"decay": 1.0}),
    "si(ni-fgsm)": ("SINIFGSM", {}),
    "vmi(mi-fgsm)": ("VMIFGSM", {}),
    "ti(mi-fgsm)": None,
    "ti(di(mi-fgsm))": None,
    "admix(mi-fgsm)": None,
    "vmi(di(mi-fgsm))": None,
}
"""Ours, and the attack of torchattacks with its settings that is the same."""

Make = Callable[[int], Tensor]


def ours(name: str, model: nn.Module, x: Tensor, y: Tensor, eps: float) -> Make:
    """What makes the examples of one of our attacks from a seed."""
    attack = spec.parse(name, ATTACKS, "attack")
    return lambda seed: perturb(attack, model, x, y, Lp(math.inf, eps), rng=torch.Generator().manual_seed(seed))


def theirs(name: str, settings: dict[str, Any], model: nn.Module, x: Tensor, y: Tensor, eps: float) -> Make:
    """The same of an attack of torchattacks, which draws from the global generator."""
    attack = getattr(peer("torchattacks"), name)(model, eps=eps, alpha=eps / STEPS, steps=STEPS, **settings)

    def make(seed: int) -> Tensor:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            found: Tensor = attack(x, y)
        return found

    return make


def fooled(make: Make, target: nn.Module, y: Tensor) -> str:
    """The share of examples that the target gets wrong, the mean over seeds, with the least and the greatest."""
    shares = [100 * float((ask(target, make(seed)).argmax(1) != y).float().mean()) for seed in range(SEEDS)]
    return f"{statistics.mean(shares):6.2f} % ({min(shares):.2f} to {max(shares):.2f})"


def main() -> None:
    """Compare on the models given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--surrogate", required=True, help="the model that the attacks see")
    parser.add_argument("--target", required=True, help="the model that is shown the examples")
    parser.add_argument("--data", required=True, help="labelled images in [0, 1]")
    parser.add_argument("--eps", default="8/255", help="the radius (default 8/255)")
    parser.add_argument("--examples", type=int, default=200, help="how many images are read (default 200)")
    parser.add_argument("--attacks", nargs="+", choices=tuple(PAIRS), default=tuple(PAIRS), help="default: all")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    numerator, _, denominator = arguments.eps.partition("/")
    eps = float(numerator) / float(denominator or 1)
    x, y = data_by_name.load(arguments.data, split="test").batch(0, arguments.examples)
    surrogate, target = (models_by_name.load(path).module for path in (arguments.surrogate, arguments.target))
    assert isinstance(surrogate, nn.Module)
    assert isinstance(target, nn.Module)
    both = (ask(surrogate, x).argmax(1) == y) & (ask(target, x).argmax(1) == y)
    x, y = x[both], y[both]
    print(f"{len(x)} images that both get right, eps {arguments.eps}", flush=True)
    for name in arguments.attacks:
        line = f"{name:34} advkit {fooled(ours(name, surrogate, x, y, eps), target, y)}"
        pair = PAIRS[name]
        if pair is not None and peer("torchattacks") and (pair[0] != "TIFGSM" or x.shape[1] == 3):
            line += f"; torchattacks {fooled(theirs(*pair, surrogate, x, y, eps), target, y)}"
        print(line, flush=True)


if __name__ == "__main__":
    main()
