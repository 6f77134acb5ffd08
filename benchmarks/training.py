"""What a step of each training loss costs, beside a PGD loop that is written by hand.

    python -m advkit.benchmarks.training --data mnist-5k --threat "linf(0.3)"

A step is the loss, its backward pass and an update. Rounds are interleaved and each is compared with the loop's own round, so
a machine that slows down slows both.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from advkit import data as data_by_name
from advkit.ball import Lp
from advkit.benchmarks import memory
from advkit.benchmarks.plan import parse_threat
from advkit.defenses import named
from advkit.errors import UsageError
from advkit.models import find_device, networks
from advkit.train import CrossEntropy, TrainingLoss

STEPS = 7
"""How many gradients the loop's attack takes."""
LOSSES = (
    f"pgd(steps={STEPS})",
    "fgsm",
    "fast",
    "n-fgsm",
    "gradalign",
    "free",
    "trades",
    "mart",
    f"awp(pgd(steps={STEPS}))",
    "worst-of-k",
)


@dataclass(frozen=True)
class ByHand:
    """PGD training in l_inf as one writes it: no threat model, no oracle, nothing checked.

    Arguments:
        threat: The ball.
        steps: How many gradients are taken.
    """

    threat: Lp
    steps: int = STEPS

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, rng: torch.Generator, at: float = 1.0) -> Tensor:
        """The cross entropy at the last iterate, with shape ()."""
        eps = self.threat.eps
        model.eval()
        delta = torch.empty_like(x).uniform_(-eps, eps)
        delta = (x + delta).clamp(self.threat.low, self.threat.high) - x
        for _ in range(self.steps):
            delta.requires_grad_(True)
            (g,) = torch.autograd.grad(F.cross_entropy(model(x + delta), y), delta)
            delta = (delta.detach() + 2.5 * eps / self.steps * g.sign()).clamp(-eps, eps)
            delta = (x + delta).clamp(self.threat.low, self.threat.high) - x
        model.train()
        return F.cross_entropy(model(x + delta), y)


def passes(loss: TrainingLoss, model: nn.Module, x: Tensor, y: Tensor) -> tuple[float, float]:
    """How many forward and backward passes through the model an example costs in a step."""
    rows = [0, 0]

    def forward(module: nn.Module, given: tuple[Tensor, ...], outputs: Tensor) -> None:
        rows[0] += len(given[0])
        if outputs.requires_grad:
            outputs.register_hook(lambda g: rows.__setitem__(1, rows[1] + len(g)))

    handle = model.register_forward_hook(forward)
    try:
        copy.deepcopy(loss)(model, x, y, torch.Generator().manual_seed(0)).backward()
    finally:
        handle.remove()
    model.zero_grad()
    return rows[0] / len(x), rows[1] / len(x)


def step_of(loss: TrainingLoss, model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], None]:
    """One step of training with the loss, on a model of its own."""
    model, loss, rng = copy.deepcopy(model), copy.deepcopy(loss), torch.Generator().manual_seed(0)
    optimizer = torch.optim.SGD(model.parameters(), 1e-4, 0.9)

    def step() -> None:
        value = loss(model, x, y, rng)
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        optimizer.step()

    return step


def seconds(step: Callable[[], None], repeats: int, device: torch.device) -> float:
    """The mean time of a step; on a CPU that of the processor, which others on the machine do not lengthen."""
    if device.type == "cpu":
        began = time.process_time()
        for _ in range(repeats):
            step()
        return (time.process_time() - began) / repeats
    torch.cuda.synchronize(device)
    began = time.perf_counter()
    for _ in range(repeats):
        step()
    torch.cuda.synchronize(device)
    return (time.perf_counter() - began) / repeats


def held(step: Callable[[], None], device: torch.device) -> int:
    """The most bytes of tensors in a step, on top of those before it."""
    step()
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        memory.start_peak(device)
        step()
        return memory.peak(device) - before
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step()
    assert profile.profiler is not None
    assert profile.profiler.kineto_results is not None
    most = now = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


def main() -> None:
    """Print a line a loss."""
    parser = argparse.ArgumentParser(description="What a step of each training loss costs.")
    parser.add_argument("--data", required=True)
    parser.add_argument("--threat", required=True)
    parser.add_argument("--model", default="mnist-cnn")
    parser.add_argument("--defense", action="append")
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    # The profiler says when it starts and stops.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    torch.set_num_threads(1)
    data = data_by_name.load(arguments.data, split="train", limit=arguments.batch_size)
    threat = parse_threat(arguments.threat, data)
    if not isinstance(threat, Lp) or threat.p != torch.inf:
        raise UsageError(f"the threat model is {arguments.threat}; the loop that is written by hand is for one as linf(0.3)")
    device = find_device(arguments.device)
    x, y = (part.to(device) for part in data.batch(0, arguments.batch_size))
    model = networks.build(arguments.model).to(device).train()
    given = {text: named(text, threat) for text in arguments.defense or LOSSES}
    losses: dict[str, TrainingLoss] = {"by hand": ByHand(threat), "cross entropy": CrossEntropy(), **given}
    steps = {name: step_of(loss, model, x, y) for name, loss in losses.items()}
    bytes_of = {name: held(step, device) for name, step in steps.items()}
    rounds = [{name: seconds(step, arguments.repeats, device) for name, step in steps.items()} for _ in range(arguments.rounds)]
    print(f"{'loss':24} {'forward':>8} {'backward':>9} {'ms':>8} {'time':>6} {'memory':>7}")
    for name, loss in losses.items():
        forward, backward = passes(loss, model, x, y)
        took = statistics.median(times[name] for times in rounds)
        ratio = statistics.median(times[name] / times["by hand"] for times in rounds)
        share = bytes_of[name] / bytes_of["by hand"]
        print(f"{name:24} {forward:8g} {backward:9g} {1000 * took:8.1f} {ratio:6.3f} {share:7.3f}")


if __name__ == "__main__":
    main()
