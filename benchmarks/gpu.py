"""Images a second on a GPU, and time as a multiple of the bare passes: PGD, APGD and the default suite.

    python -m advkit.benchmarks.gpu --device cuda
    python -m advkit.benchmarks.gpu --device cpu --tiny

A PreActResNet-18 and a small vision transformer for images of 32 x 32, with random weights. The labels are the networks' own
answers and the radius is small, so that hardly a row is broken and every step is made on the whole batch. The floor is as many
bare forward and input-gradient passes in float32 as the attack makes. torchattacks is timed where it is installed.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from advkit import spec
from advkit.attacks import ATTACKS
from advkit.benchmarks.evaluate import evaluate
from advkit.benchmarks.peers import peer
from advkit.data import from_tensors
from advkit.engine import Attack, frozen, run
from advkit.fast import fast
from advkit.models import networks
from advkit.threat import Lp

EPS = 1e-4


class Transformer(nn.Module):
    """A vision transformer (Dosovitskiy et al., 2021, https://arxiv.org/abs/2010.11929) for (N, 3, 32, 32), ten classes.

    Arguments:
        width: Entries of a patch's vector.
        depth: How many layers.
    """

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.place = nn.Parameter(0.02 * torch.randn(1, 64, width))
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, batch_first=True, norm_first=True, dropout=0.0)
        self.layers = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, 32, 32) to (N, 10)."""
        z = self.patches(x).flatten(2).transpose(1, 2) + self.place
        return self.head(self.layers(z).mean(1))


def preact_resnet18(width: int) -> nn.Module:
    """Four stages of two pre-activation blocks (He et al., 2016, https://arxiv.org/abs/1603.05027); 64 is the usual width."""
    blocks: list[nn.Module] = []
    c_in = width
    for stage in range(4):
        c_out = width * 2**stage
        blocks += [networks.Residual(c_in, c_out, 2 if stage else 1), networks.Residual(c_out, c_out, 1)]
        c_in = c_out
    head = [nn.BatchNorm2d(c_in), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c_in, 10)]
    return nn.Sequential(nn.Conv2d(3, width, 3, padding=1, bias=False), *blocks, *head)


def seconds(call: Callable[[], object], device: str, rounds: int) -> float:
    """The least wall time of several calls, after one to warm up."""
    times = []
    for _ in range(rounds + 1):
        began = time.perf_counter()
        call()
        if device != "cpu":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return min(times[1:])


def passes(model: nn.Module, x: Tensor, y: Tensor, n: int) -> None:
    """As many bare forward and input-gradient passes."""
    with frozen(model):
        z = x.clone().requires_grad_()
        for _ in range(n):
            torch.autograd.grad(F.cross_entropy(model(z), y, reduction="sum"), z)


def compare(name: str, model: nn.Module, x: Tensor, arguments: argparse.Namespace) -> None:
    """Print a network's figures."""
    with torch.no_grad(), frozen(model):
        y = model(x).argmax(1)
    threat, device, rounds, steps = Lp(math.inf, EPS), arguments.device, arguments.rounds, arguments.steps
    base = seconds(lambda: passes(model, x, y, steps), device, rounds)
    print(f"{name}: floor {base:.3f} s for {len(x)} images and {steps} passes, {len(x) / base:.1f} images a second", flush=True)
    models = {"float32": None, "fast": fast(model)}
    if arguments.compile:
        models["fast, compiled"] = fast(model, compile=True)

    def show(what: str, call: Callable[[], object]) -> None:
        took = seconds(call, device, rounds)
        print(f"{name}: {what}: {len(x) / took:.1f} images a second, {took / base:.3f} of the floor", flush=True)

    for attack in [spec.parse(f"{kind}(steps={steps})", ATTACKS, "attack") for kind in ("pgd", "apgd") if kind in ATTACKS]:
        for how, quick in models.items():
            show(f"{type(attack).__name__}, {how}", _run(attack, model, x, y, threat, quick))
    data = from_tensors(x.cpu(), y.cpu())
    if not arguments.tiny:
        for half in (False, True):
            given = {"threat": threat, "device": device, "batch_size": len(x), "fast": half, "quantize": False}
            show(f"default suite, {'fast' if half else 'float32'}", lambda given=given: evaluate(model, data, **given))  # type: ignore[misc]
    torchattacks = peer("torchattacks")
    if torchattacks:
        rival = torchattacks.PGD(model, eps=EPS, alpha=EPS / 4, steps=steps)
        show("torchattacks PGD", lambda: rival(x, y))


def _run(attack: Attack, model: nn.Module, x: Tensor, y: Tensor, threat: Lp, quick: nn.Module | None) -> Callable[[], object]:
    return lambda: run(attack, model, x, y, threat, fast=quick)


def main() -> None:
    """Time both networks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small sizes, to see that it runs")
    parser.add_argument("--compile", action="store_true", help="a compiled stand-in as well")
    parser.add_argument("--examples", type=int, default=512)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    if arguments.tiny:
        arguments.examples, arguments.steps, arguments.rounds = 4, 2, 1
    torch.manual_seed(0)
    width = 4 if arguments.tiny else 64
    made = {"PreActResNet-18": preact_resnet18(width), "ViT": Transformer(4 * width, 2 if arguments.tiny else 6)}
    x = torch.rand(arguments.examples, 3, 32, 32).to(arguments.device)
    for name, model in made.items():
        compare(name, model.to(arguments.device).eval(), x, arguments)


if __name__ == "__main__":
    main()
