"""Five defenses that are known to be broken, around any network: what plain PGD says of them, and what an adaptive attack does.

    advkit train --model mnist-cnn --data DATA --out plain.safetensors
    python -m advkit.benchmarks.broken --data DATA --model plain.safetensors --threat "linf(0.15)"

None of the five makes a network robust: each takes its gradient away, or makes it noise. So the robust accuracy of each should
be that of the network itself, and what plain PGD says beyond that is an illusion (Athalye, Carlini and Wagner, 2018,
https://arxiv.org/abs/1802.00420). The verdict is the defended model's own; of the one that is random, by most of five answers.
"""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Iterator

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from advkit import data as data_by_name
from advkit import models as models_by_name
from advkit.adaptive import Adaptive, Straight, straighten, tap
from advkit.attacks import APGD, PGD
from advkit.benchmarks.plan import parse_threat
from advkit.combine import Expect, Restarts
from advkit.data import Data
from advkit.engine import Attack, frozen, run
from advkit.models.networks import Normalize
from advkit.threat import Change, Lp
from advkit.train import Recipe, train

STEPS, DRAWS, VOTES, RESTARTS = 40, 10, 5, 5
WIDER = 3.0
"""How many times as many winners have a gradient."""


class Saturated(nn.Sequential):
    """A softmax at a temperature so low that its gradient is 0 in floating point (as after defensive distillation).

    Papernot, McDaniel, Wu, Jha and Swami, 2016, https://arxiv.org/abs/1511.04508; broken by Carlini and Wagner, 2017,
    https://arxiv.org/abs/1608.04644.
    """

    def __init__(self, model: nn.Module, temperature: float = 0.01) -> None:
        super().__init__()
        self.logits, self.scale, self.softmax = model, Scale(1 / temperature), nn.Softmax(1)


class Scale(nn.Module):
    """Multiplies by a number."""

    def __init__(self, by: float) -> None:
        super().__init__()
        self.by = by

    def forward(self, x: Tensor) -> Tensor:
        """By * x."""
        return self.by * x


class Quantized(nn.Sequential):
    """The input rounded to a few levels between 0 and 1, which has no gradient.

    Guo, Rana, Cisse and van der Maaten, 2018, https://arxiv.org/abs/1711.00117.
    """

    def __init__(self, model: nn.Module, levels: int = 32) -> None:
        super().__init__()
        self.quantize, self.model = Round(levels), model


class Round(nn.Module):
    """The nearest of so many values from 0 to 1."""

    def __init__(self, levels: int) -> None:
        super().__init__()
        self.levels = levels

    def forward(self, x: Tensor) -> Tensor:
        """X on the grid."""
        return (x * (self.levels - 1)).round() / (self.levels - 1)


class Noisy(nn.Sequential):
    """Fresh Gaussian noise on the input in each call, in [0, 1].

    Xie, Wang, Zhang, Ren and Yuille, 2018, https://arxiv.org/abs/1711.01991, draw sizes and places in the same way.
    """

    def __init__(self, model: nn.Module, sigma: float = 0.05) -> None:
        super().__init__()
        self.noise, self.model = Noise(sigma), model


class Noise(nn.Module):
    """Adds what it draws from the global generator."""

    def __init__(self, sigma: float) -> None:
        super().__init__()
        self.sigma = sigma

    def forward(self, x: Tensor) -> Tensor:
        """X and noise of standard deviation sigma."""
        return x + self.sigma * torch.randn_like(x)


class Detached(nn.Sequential):
    """The input passed on by value, so that the gradient that comes back is 0."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.guard, self.model = Guard(), model


class Guard(nn.Module):
    """The identity, without its gradient."""

    def forward(self, x: Tensor) -> Tensor:
        """X."""
        return x.detach() + 0.0 * x


class KWTA(nn.Module):
    """K winners take all: the greatest entries of each example pass, the others become 0; the gradient jumps everywhere.

    Xiao, Zhong and Zheng, 2020, "Enhancing adversarial defense by k-winners-take-all", https://arxiv.org/abs/1905.10510;
    broken by Tramer, Carlini, Brendel and Madry, 2020, https://arxiv.org/abs/2002.08347.
    """

    def __init__(self, ratio: float) -> None:
        super().__init__()
        self.ratio = ratio

    def forward(self, x: Tensor) -> Tensor:
        """X, (N, *), with all but the greatest entries of each row 0."""
        flat = x.flatten(1)
        k = max(1, math.ceil(self.ratio * flat.shape[1]))
        return torch.where(x >= flat.topk(k, dim=1).values[:, -1].view(-1, *(1,) * (x.ndim - 1)), x, 0.0)


class _Tracer(fx.Tracer):
    """Leaves the normalization whole: it looks at the shape of its input."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, Normalize) or super().is_leaf_module(m, module_qualified_name)


def winners(model: nn.Module, ratio: float) -> nn.Module:
    """A copy of a network with k-winners-take-all in place of each ReLU; its layers are ``kwta_0`` and on."""
    model = copy.deepcopy(model)
    graph = _Tracer().trace(model)
    traced = fx.GraphModule(model, graph)
    for node in graph.nodes:
        module = traced.get_submodule(node.target) if node.op == "call_module" else None
        if node.target is F.relu or isinstance(module, nn.ReLU):
            name = f"kwta_{sum(isinstance(part, KWTA) for part in traced.children())}"
            traced.add_module(name, KWTA(ratio))
            node.op, node.target, node.kwargs = "call_module", name, {}
    traced.delete_all_unused_submodules()
    traced.recompile()
    return traced.eval()


def adaptive(model: nn.Module, attack: Attack) -> Attack:
    """The attack that a defense's author should have run."""
    match model:
        case Saturated():
            return Adaptive(attack, tap(model, "logits"))
        case Quantized():
            return Adaptive(attack, straighten(model, {"quantize": Straight}))
        case Detached():
            return Adaptive(attack, straighten(model, {"guard": Straight}))
        case Noisy():
            return Expect(attack, DRAWS)
    layers = [name for name, layer in model.named_modules() if isinstance(layer, KWTA)]
    return Adaptive(Restarts(APGD(2 * STEPS), RESTARTS), straighten(model, dict.fromkeys(layers, wider)))


def wider(layer: nn.Module) -> nn.Module:
    """K-winners-take-all with the gradient of a layer of more winners, so that those that are about to win have one too."""
    assert isinstance(layer, KWTA)
    return Straight(layer, KWTA(min(1.0, WIDER * layer.ratio)))


def defended(model: nn.Module, data: Data, settings: argparse.Namespace) -> Iterator[tuple[str, nn.Module]]:
    """The five, by name."""
    yield "saturated softmax", Saturated(model)
    yield f"input rounded to {settings.levels} levels", Quantized(model, settings.levels)
    yield f"noise of {settings.sigma:g}", Noisy(model, settings.sigma)
    yield "detached gradient", Detached(model)
    recipe = Recipe(epochs=settings.epochs, batch_size=64, lr=0.02)
    yield f"{settings.ratio:g} winners take all", train(winners(model, settings.ratio), data, recipe)


def accuracy(attack: Attack, model: nn.Module, x: Tensor, y: Tensor, threat: Lp | Change, votes: int) -> tuple[float, float]:
    """Clean and robust accuracy, percent; what the model draws comes from one seed."""
    with torch.random.fork_rng(devices=[]), frozen(model):
        torch.manual_seed(0)
        with torch.no_grad():
            right = torch.stack([model(x).argmax(1) == y for _ in range(votes)])
        success = run(attack, model, x, y, threat, votes=votes).success
    return 100 * float((2 * right.sum(0) > votes).float().mean()), 100 - 100 * float(success.float().mean())


def main() -> None:
    """Print a line for each defense."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--model", required=True, help="the network that is defended")
    parser.add_argument("--threat", default="linf(0.15)", help="default linf(0.15)")
    parser.add_argument("--examples", type=int, default=200, help="how many test images (default 200)")
    parser.add_argument("--levels", type=int, default=32, help="of the rounded input (default 32)")
    parser.add_argument("--sigma", type=float, default=0.05, help="of the noise (default 0.05)")
    parser.add_argument("--ratio", type=float, default=0.05, help="the share of winners (default 0.05)")
    parser.add_argument("--epochs", type=int, default=1, help="how long the winners are trained (default 1)")
    settings = parser.parse_args()
    torch.set_num_threads(1)
    threat = parse_threat(settings.threat, data_by_name.load(settings.data, split="test"))
    x, y = data_by_name.load(settings.data, split="test").batch(0, settings.examples)
    network = models_by_name.load(settings.model).module
    assert isinstance(network, nn.Module)
    few = data_by_name.load(settings.data, split="train", limit=10_000)
    clean, robust = accuracy(PGD(STEPS), network, x, y, threat, 1)
    print(f"| undefended | {clean:.1f} | {robust:.1f} | |", flush=True)
    for name, model in defended(network, few, settings):
        votes = VOTES if isinstance(model, Noisy) else 1
        clean, plain = accuracy(PGD(STEPS), model, x, y, threat, votes)
        _, broken = accuracy(adaptive(model, PGD(STEPS)), model, x, y, threat, votes)
        print(f"| {name} | {clean:.1f} | {plain:.1f} | {broken:.1f} |", flush=True)


if __name__ == "__main__":
    main()
