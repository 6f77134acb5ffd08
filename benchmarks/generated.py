"""What generated data are worth in adversarial training on few real ones: with them, without, and with a Gaussian's.

    python -m advkit.benchmarks.generated --data ../shared/data/mnist --reals 1000 --generator g1000.safetensors

Every network takes as many steps, on batches of one size. The generator should have been trained on the same real examples
(``advkit gan train --limit 1000``, whose seed 0 chooses the same). Generated examples have the labels of a plain classifier
that knows the real ones only. The Gaussian's are drawn from a normal distribution of the pixels of each class: Gowal et al.,
2021, https://arxiv.org/abs/2110.09468, found that even these help.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import replace

import torch
from scipy import stats
from torch import Tensor

from advkit import data as data_by_name
from advkit.benchmarks.evaluate import evaluate
from advkit.benchmarks.plan import parse_threat
from advkit.benchmarks.statistics import rate
from advkit.data import Data, from_source
from advkit.defenses import label, named
from advkit.gan.pair import load
from advkit.gan.source import Own, Source
from advkit.models.networks import build
from advkit.train import RECIPES, Extra, Recipe, accuracy, train

SHRUNK = 0.05
"""The share of a class's covariance that is replaced by its mean variance: of few images it has no full rank."""


def gaussian(data: Data) -> Source:
    """A source that draws the pixels of each class from a normal distribution with the mean and covariance of the data's."""
    x, y = data.batch(0, len(data))
    classes, roots, means = int(y.max()) + 1, [], []
    for k in range(classes):
        flat = x[y == k].flatten(1).double()
        means.append(flat.mean(0))
        spread = torch.cov(flat.T)
        spread = (1 - SHRUNK) * spread + SHRUNK * spread.diagonal().mean() * torch.eye(len(spread), dtype=torch.float64)
        roots.append(torch.linalg.cholesky(spread + 1e-6 * torch.eye(len(spread), dtype=torch.float64)))
    mean, root = torch.stack(means).float(), torch.stack(roots).float()

    def draw(z: Tensor, y: Tensor) -> Tensor:
        pixels = mean[y] + (root[y] @ z.unsqueeze(2)).squeeze(2)
        return pixels.clamp(data.low, data.high).view(-1, *x.shape[1:])

    return Own(draw, x[0].numel(), tuple(x.shape[1:]), data.low, data.high, classes)


def interval(gains: list[float]) -> tuple[float, float, float]:
    """The mean of paired gains, and a 95 % interval by Student's t; in points."""
    values = 100 * torch.tensor(gains, dtype=torch.float64)
    if len(gains) < 2:
        return float(values.mean()), -math.inf, math.inf
    half = float(stats.t.ppf(0.975, len(gains) - 1)) * float(values.std()) / math.sqrt(len(gains))
    return float(values.mean()), float(values.mean()) - half, float(values.mean()) + half


def main() -> None:
    """Train, attack and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--reals", type=int, default=1000, help="how many real examples there are to learn from")
    parser.add_argument("--generator", required=True, help="one that was trained on these")
    parser.add_argument("--samples", type=int, default=20_000)
    parser.add_argument("--share", type=float, default=0.7, help="of a batch that is generated")
    parser.add_argument("--network", default="mnist-small")
    parser.add_argument("--defense", default="pgd(steps=7, ramp=0.4)")
    parser.add_argument("--threat", default="linf(0.3)")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--limit", type=int, default=500, help="how many test examples are attacked")
    parser.add_argument("--attack", default="standard")
    arguments = parser.parse_args()

    data = data_by_name.load(arguments.data, split="train", limit=arguments.reals)
    test = data_by_name.load(arguments.data, split="test")
    threat = parse_threat(arguments.threat, data)
    recipe = _recipe(RECIPES[arguments.network.split("(")[0]], arguments.steps, len(data))
    plain = train(build(arguments.network), data, replace(recipe, epochs=max(1, recipe.epochs // 2)))
    right, of = accuracy(plain, test)
    print(f"the classifier that labels, trained on the {len(data)} real examples: {rate(right, of)}", flush=True)
    sources: dict[str, Source | None] = {"real only": None, "generated": load(arguments.generator), "gaussian": gaussian(data)}
    extras: dict[str, Extra | None] = {}
    for name, source in sources.items():
        extras[name] = None
        if source is not None:
            drawn = from_source(source, name, n=arguments.samples)
            labelled = label(plain, drawn)
            if source.classes:
                agree = int((labelled.y == drawn.y).sum())
                print(f"{name}: the classifier gives the class that was asked for to {rate(agree, len(drawn))}", flush=True)
            extras[name] = Extra(labelled, arguments.share)

    robust: dict[str, list[float]] = {name: [] for name in extras}
    for seed in range(arguments.seeds):
        for name, extra in extras.items():
            loss = named(arguments.defense, threat)
            model = train(build(arguments.network, seed), data, recipe, loss=loss, seed=seed, extra=extra)
            result = evaluate(model, test.limited(arguments.limit, 0), threat=threat, attacks=arguments.attack, quantize=False)
            robust[name].append(result.robust_accuracy.value)
            right, of = accuracy(model, test)
            found = f"robust {result.robust_accuracy}, clean {rate(right, of)}"
            print(f"seed {seed}, {name}: {recipe.epochs} epochs, {found}", flush=True)
    for name, values in robust.items():
        gain, low, high = interval([a - b for a, b in zip(values, robust["real only"], strict=True)])
        mean = 100 * sum(values) / len(values)
        print(f"{name}: robust {mean:.1f} %, gain over real only {gain:+.1f} points [{low:+.1f}, {high:+.1f}]", flush=True)


def _recipe(own: Recipe, steps: int, n: int) -> Recipe:
    """The recipe with as many epochs as make ``steps`` steps."""
    return replace(own, epochs=max(1, round(steps / math.ceil(n / own.batch_size))))


if __name__ == "__main__":
    main()
