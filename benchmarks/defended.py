"""Inference-time defenses around a network: what plain PGD says of each, and what an attack that knows of it does.

    advkit train --model mnist-cnn --data DATA --out plain.safetensors
    python -m advkit.benchmarks.defended --data DATA --model plain.safetensors --threat "linf(0.2)"

The naive attack follows the gradient that the defended model has by itself; the adaptive one is what the defense declares
(``defenses/inference/``), and comes after the naive one, on what that leaves. The first line is the network without a
defense, under the same attacks. The verdict is the defended model's own; of one that is random, by most of five answers.
"""

from __future__ import annotations

import argparse

import torch
from torch import nn

from advkit import data as data_by_name
from advkit import models as models_by_name
from advkit.attacks import APGD, PGD
from advkit.benchmarks.evaluate import evaluate
from advkit.combine import Restarts, Worst
from advkit.data import Data
from advkit.defenses.inference import INFERENCE, defend
from advkit.engine import Attack

NAIVE = PGD(steps=40)


class _Stronger(nn.Module):
    """A model whose adaptive attack is another one's, of an attack that takes more steps than the naive one.

    Arguments:
        model: The model.
        attack: What its adaptive attack is made of.
    """

    def __init__(self, model: nn.Module, attack: Attack) -> None:
        super().__init__()
        self.model, self.attack = model, attack

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The model's answer."""
        return self.model(x)

    def adaptive(self, attack: Attack) -> Attack:
        """The model's adaptive form of the stronger attack, or that attack where it declares none."""
        make = getattr(self.model, "adaptive", None)
        return make(self.attack) if callable(make) else self.attack


def line(name: str, model: nn.Module, data: Data, threat: str, attack: Attack) -> str:
    """A row of the table."""
    found = evaluate(_Stronger(model, attack), data, threat=threat, attacks=NAIVE, quantize=False)
    assert found.robust_accuracy_naive is not None
    numbers = (found.clean_accuracy, found.robust_accuracy_naive, found.robust_accuracy)
    cells = " | ".join(f"{100 * rate.value:.1f}" for rate in numbers if rate.value is not None)
    return f"| {name} | {cells} | {sum(row['seconds'] for row in found.times):.0f} |"


def main() -> None:
    """Print a line for the network, and one for each defense."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--model", required=True, help="the network that is defended")
    parser.add_argument("--threat", default="linf(0.2)", help="default linf(0.2)")
    parser.add_argument("--defend", action="append", help="a defense; repeatable (default: each, with its own settings)")
    parser.add_argument("--examples", type=int, default=200, help="how many test images (default 200)")
    parser.add_argument("--steps", type=int, default=50, help="of the adaptive attack (default 50)")
    parser.add_argument("--restarts", type=int, default=1, help="of the adaptive attack (default 1)")
    settings = parser.parse_args()
    torch.set_num_threads(1)
    data = data_by_name.load(settings.data, split="test").limited(settings.examples, 0)
    network = models_by_name.load(settings.model).module
    assert isinstance(network, nn.Module)
    attack = Worst(tuple(Restarts(APGD(settings.steps, loss=loss), settings.restarts) for loss in ("ce", "margin")))
    print("| defense | clean | naive | adaptive | seconds |\n| --- | --- | --- | --- | --- |")
    print(line("none", network, data, settings.threat, attack), flush=True)
    for name in settings.defend or INFERENCE:
        print(line(name, defend(network, name), data, settings.threat, attack), flush=True)


if __name__ == "__main__":
    main()
