"""AdvGAN beside PGD-40: how many examples each fools, and how long it takes, on the same examples in one run.

    advkit train --model mnist-cnn --data DATA --out m.safetensors
    advkit gan attack --model m.safetensors --data DATA --threat "linf(0.3)" --limit 20000 --epochs 2 --out a.safetensors
    python -m advkit.benchmarks.one_pass --generator a.safetensors --model m.safetensors --data DATA --limit 1000

The seconds are those of making the examples, the best of three rounds in which both take turns, with one thread. PGD makes all
of its steps on all of them.
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import nn

from advkit import data as data_by_name
from advkit import models as models_by_name
from advkit.attacks import PGD, AdvGAN
from advkit.benchmarks.statistics import rate
from advkit.engine import Attack, frozen, perturb
from advkit.threat import Lp

ROUNDS = 3


def main() -> None:
    """Print a line for each attack, and the ratio of their times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--generator", required=True, help="what advkit gan attack wrote")
    parser.add_argument("--model", required=True, help="the network that is attacked")
    parser.add_argument("--data", required=True)
    parser.add_argument("--limit", type=int, default=1000, help="how many test examples (default 1000)")
    parser.add_argument("--eps", type=float, default=0.3, help="the radius in l_inf (default 0.3)")
    settings = parser.parse_args()
    torch.set_num_threads(1)
    x, y = data_by_name.load(settings.data, split="test").limited(settings.limit, 0).batch(0, settings.limit)
    network = models_by_name.load(settings.model).module
    assert isinstance(network, nn.Module)
    attacks: dict[str, Attack] = {"advgan": AdvGAN(settings.generator), "pgd(steps=40)": PGD(40)}
    seconds = dict.fromkeys(attacks, float("inf"))
    fooled = {}
    with frozen(network), torch.no_grad():
        right = network(x).argmax(1) == y
        for _ in range(ROUNDS):
            for name, attack in attacks.items():
                began = time.perf_counter()
                x_adv = perturb(attack, network, x, y, Lp(torch.inf, settings.eps), rng=torch.Generator().manual_seed(0))
                seconds[name] = min(seconds[name], time.perf_counter() - began)
                fooled[name] = int((right & (network(x_adv).argmax(1) != y)).sum())
    for name, spent in seconds.items():
        print(f"{name}: fools {rate(fooled[name], int(right.sum()))} of those right, {1000 * spent / len(x):.3g} ms an example")
    print(f"pgd(steps=40) takes {seconds['pgd(steps=40)'] / seconds['advgan']:.0f} times as long")


if __name__ == "__main__":
    main()
