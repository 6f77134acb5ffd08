"""Side by side with foolbox, torchattacks and adv-lib: the same numbers, and the time as a multiple of the floor.

    make peers
    advkit train --model mnist-cnn --data DATA --out plain.safetensors
    python -m advkit.benchmarks.peers --data DATA --train-robust robust.safetensors
    python -m advkit.benchmarks.peers --data DATA --plain plain.safetensors --robust robust.safetensors

DATA is full MNIST (``hf:ylecun/mnist``, or a folder in the hub's layout). The floor is 40 bare forward and input-gradient
backward passes on the same batch, moved to a random place in the ball as the attacks' iterates are. Every figure is the median
over interleaved rounds, in CPU seconds of one thread, and the ratio is to the floor of the same rounds.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from advkit import data as data_by_name
from advkit import models as models_by_name
from advkit.attacks import BIM, FGSM, FMN, PGD
from advkit.defenses import PGDTraining
from advkit.engine import Attack, frozen, perturb, run
from advkit.fast import fast
from advkit.models import checkpoint, networks
from advkit.streams import Streams
from advkit.threat import Lp
from advkit.train import Recipe, train

ROBUST = "mnist-cnn(width=16)"
EPS, STEPS, STEP = 0.3, 40, 0.01


def peer(name: str) -> ModuleType | None:
    """A peer's package, or None where it is not installed.

    What it imports and does not need here is stood in for, while it is imported and no longer: others ask what is installed.
    """
    if importlib.util.find_spec(name.split(".")[0]) is None:
        return None
    needless = ("git", "requests", "tqdm", "visdom", "torchvision")
    absent = [one for one in needless if one not in sys.modules and importlib.util.find_spec(one) is None]
    sys.modules.update({one: MagicMock() for one in absent})
    try:
        return importlib.import_module(name)
    finally:
        for one in absent:
            del sys.modules[one]


Adversary = Callable[[nn.Module, Tensor, Tensor], Tensor]


def fixed_peers(kind: str) -> Iterator[tuple[str, Adversary]]:
    """The peers' FGSM, BIM (ten steps of eps / 10) or PGD (40 steps of 0.01), each (model, x, y) to x_adv."""
    foolbox, torchattacks, adv_lib = peer("foolbox"), peer("torchattacks"), peer("adv_lib.attacks")
    if foolbox:
        yield "foolbox", _foolbox(foolbox, kind)
    if torchattacks:
        make = {
            "fgsm": lambda model: torchattacks.FGSM(model, eps=EPS),
            "bim": lambda model: torchattacks.BIM(model, eps=EPS, alpha=EPS / 10, steps=10),
            "pgd": lambda model: torchattacks.PGD(model, eps=EPS, alpha=STEP, steps=STEPS, random_start=True),
        }[kind]
        yield "torchattacks", lambda model, x, y: make(model)(x, y)
    if adv_lib and kind == "pgd":
        yield (
            "adv-lib",
            lambda model, x, y: adv_lib.pgd_linf(model, x, y, ε=EPS, steps=STEPS, random_init=True, absolute_step_size=STEP),
        )


def _foolbox(foolbox: Any, kind: str) -> Adversary:
    attacks = foolbox.attacks
    attack = {
        "fgsm": lambda: attacks.LinfFastGradientAttack(),
        "bim": lambda: attacks.LinfBasicIterativeAttack(abs_stepsize=EPS / 10, steps=10, random_start=False),
        "pgd": lambda: attacks.LinfProjectedGradientDescentAttack(abs_stepsize=STEP, steps=STEPS, random_start=True),
    }[kind]()

    def call(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        result: Tensor = attack(foolbox.PyTorchModel(model.eval(), bounds=(0, 1)), x, y, epsilons=EPS)[1]
        return result

    return call


def ours(attack: Attack, seed: int = 0) -> Adversary:
    """An attack of advkit run to its last iterate, as the peers do."""
    return lambda model, x, y: perturb(attack, model, x, y, Lp(math.inf, EPS), rng=torch.Generator().manual_seed(seed))


def same_examples(model: nn.Module, x: Tensor, y: Tensor) -> None:
    """The greatest difference between our FGSM and BIM and the peers'."""
    for kind, attack in (("fgsm", FGSM()), ("bim", BIM(10))):
        mine = ours(attack)(model, x, y)
        for name, theirs in fixed_peers(kind):
            z = theirs(model, x, y)
            far = (z - mine).abs()
            share = float((far > 1e-6).float().mean())
            print(f"{kind:5} max |advkit - {name}| = {float(far.max()):.2e}; {100 * share:.4f} % of pixels differ by over 1e-6")


def robust_accuracy(model: nn.Module, x: Tensor, y: Tensor, x_adv: Tensor) -> float:
    """The share of examples that are right clean and at x_adv, which must be in the ball."""
    assert bool(Lp(math.inf, EPS + 1e-6).allows(x_adv, x).all()), "outside the threat model"
    with torch.no_grad(), frozen(model):
        right = (model(x).argmax(1) == y) & (model(x_adv).argmax(1) == y)
    return 100 * float(right.float().mean())


def mean_accuracy(make: Callable[[Attack, int], Adversary], model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Robust accuracy under 40 steps of 0.01, the mean over random starts from four seeds."""
    accuracies = []
    for seed in range(4):
        with torch.random.fork_rng(devices=[]):
            # The peers draw from the global generator.
            torch.manual_seed(seed)
            accuracies.append(robust_accuracy(model, x, y, make(PGD(STEPS, STEP), seed)(model, x, y)))
    return statistics.mean(accuracies)


def pgd_accuracy(label: str, model: nn.Module, x: Tensor, y: Tensor) -> None:
    """Robust accuracy under 40 steps of 0.01 in l_inf 0.3, ours and the peers'."""
    result = run(PGD(STEPS, STEP), model, x, y, Lp(math.inf, EPS), rng=torch.Generator().manual_seed(0))
    print(f"{label:7} PGD-40: advkit as an evaluation {100 - 100 * float(result.success.float().mean()):.2f} %")
    print(f"{label:7} PGD-40: advkit, last iterate {mean_accuracy(ours, model, x, y):.2f} %")
    for name, theirs in fixed_peers("pgd"):
        print(f"{label:7} PGD-40: {name} {mean_accuracy(lambda *_, theirs=theirs: theirs, model, x, y):.2f} %")


def closest(label: str, model: nn.Module, x: Tensor, y: Tensor) -> None:
    """Median distance of FMN with 100 steps, ours and adv-lib's, over the examples that are right clean; l_2 and l_1 too."""
    adv_lib = peer("adv_lib.attacks")
    with torch.no_grad(), frozen(model):
        right = model(x).argmax(1) == y
    x, y = x[right], y[right]
    for p in (math.inf, 2.0, 1.0, 0.0):
        threat = Lp(p)
        result = run(FMN(100), model, x, y, threat)
        line = f"{label:7} FMN-100 l_{p:g}: advkit median {float(result.distance.median()):.5f}, found {_share(result.success)}"
        if adv_lib:
            with frozen(model):
                z = adv_lib.fmn(model, x, y, norm=p, steps=100)
                with torch.no_grad():
                    fooled = model(z).argmax(1) != y
            distance = torch.where(fooled, threat.distance(z, x), torch.full((len(x),), math.inf))
            ratio = float(result.distance.median() / distance.median())
            line += f"; adv-lib {float(distance.median()):.5f}, found {_share(fooled)}; ratio of medians {ratio:.4f}"
        print(line)


def _share(flags: Tensor) -> str:
    return f"{100 * float(flags.float().mean()):.1f} %"


def floor(model: nn.Module, x: Tensor, y: Tensor) -> None:
    """The bare passes that a 40-step attack needs, with the parameters fixed."""
    with frozen(model):
        z = Lp(math.inf, EPS).start(x, Streams.seeded(0, range(len(x)))).requires_grad_()
        for _ in range(STEPS):
            torch.autograd.grad(F.cross_entropy(model(z), y, reduction="sum"), z)


def _floors(model: nn.Module, x: Tensor, y: Tensor) -> None:
    for a, b in zip(x.split(250), y.split(250), strict=True):
        floor(model, a, b)


def speed(label: str, model: nn.Module, x: Tensor, y: Tensor, rounds: int) -> None:
    """CPU time as a multiple of the floor: to the end, as an evaluation, and the peers."""
    threat, attack = Lp(math.inf, EPS), PGD(STEPS, STEP)
    rivals: dict[str, Adversary] = {
        "advkit, to the end": ours(attack),
        "advkit, evaluation": lambda model, x, y: run(attack, model, x, y, threat).x_adv,
        **dict(fixed_peers("pgd")),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ("floor", *rivals)}
    for _ in range(rounds + 1):
        _timed(seconds["floor"], lambda: floor(model, x, y))
        for name, rival in rivals.items():
            _timed(seconds[name], lambda rival=rival: rival(model, x, y))  # type: ignore[misc]
    # The first round warms up.
    ratios = {
        name: [value / base for value, base in zip(values[1:], seconds["floor"][1:], strict=True)]
        for name, values in seconds.items()
    }
    base = statistics.median(seconds["floor"][1:])
    print(f"{label:7} floor: {base:.3f} CPU s for {len(x)} examples, {1e3 * base / STEPS / len(x):.4f} ms a pass and example")
    for name, values in ratios.items():
        if name != "floor":
            low, high = min(values), max(values)
            print(f"{label:7} PGD-40 {name}: {statistics.median(values):.3f} of the floor ({low:.3f} to {high:.3f})")


def fast_speed(label: str, model: nn.Module, x: Tensor, y: Tensor, threat: Lp, rounds: int, compiled: bool) -> None:
    """CPU time of an evaluation with and without a stand-in as a multiple of the float32 floor, and robust accuracy."""
    attack = PGD(STEPS, STEP if threat.eps == EPS else threat.eps / 4)
    models: dict[str, nn.Module | None] = {"float32": None, "bfloat16": fast(model)}
    if compiled:
        models["bfloat16, compiled"] = fast(model, compile=True)
    seconds: dict[str, list[float]] = {name: [] for name in ("floor", *models)}
    left: dict[str, int] = {}
    for _ in range(rounds + 1):
        _timed(seconds["floor"], lambda: _floors(model, x, y))
        for name, quick in models.items():
            _timed(seconds[name], lambda name=name, quick=quick: left.update({name: _left(attack, model, x, y, threat, quick)}))  # type: ignore[misc]
    for name in models:
        # The first round warms up.
        ratios = [a / b for a, b in zip(seconds[name][1:], seconds["floor"][1:], strict=True)]
        accuracy = 100 * left[name] / len(x)
        print(f"{label:7} PGD-40 as an evaluation, {name}: {statistics.median(ratios):.3f} of the floor", end="")
        print(f" ({min(ratios):.3f} to {max(ratios):.3f}), robust accuracy {accuracy:.2f} %", flush=True)


def _left(attack: Attack, model: nn.Module, x: Tensor, y: Tensor, threat: Lp, quick: nn.Module | None) -> int:
    """How many rows an evaluation in batches of 250 leaves standing."""
    parts = zip(x.split(250), y.split(250), strict=True)
    return sum(int((~run(attack, model, a, b, threat, fast=quick).success).sum()) for a, b in parts)


def _timed(seconds: list[float], call: Callable[[], object]) -> None:
    began = time.process_time()
    call()
    seconds.append(time.process_time() - began)


def train_robust(source: str, path: str) -> None:
    """Adversarial training at 0.3, the radius raised from epoch to epoch: from the start, the network would learn nothing."""
    data = data_by_name.load(source, split="train")
    model = networks.build(ROBUST)
    for epoch, eps in enumerate((0.1, 0.2, 0.3, 0.3)):
        loss = PGDTraining(Lp(math.inf, eps), steps=5, step=eps / 3)
        train(model, data, Recipe(epochs=1, batch_size=64, lr=0.05), loss=loss, seed=epoch)
        print(f"epoch {epoch + 1}: eps {eps}", flush=True)
    checkpoint.save(path, model, ROBUST)


def compare(label: str, model: nn.Module, x: Tensor, y: Tensor, arguments: argparse.Namespace) -> None:
    """Print the parts asked for."""
    if "examples" in arguments.parts:
        same_examples(model, x[:250], y[:250])
    if "accuracy" in arguments.parts:
        pgd_accuracy(label, model, x, y)
    if "distance" in arguments.parts:
        closest(label, model, x, y)
    if "speed" in arguments.parts:
        speed(label, model, x[:250], y[:250], arguments.rounds)
    if "fast" in arguments.parts:
        fast_speed(label, model, x, y, Lp(math.inf, arguments.eps), arguments.rounds, arguments.compile)


def main() -> None:
    """Compare on the checkpoints given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="full MNIST")
    parser.add_argument("--train-robust", metavar="FILE", help="train the checkpoint of adversarial training, and end")
    parser.add_argument("--plain", help="a checkpoint of plain training")
    parser.add_argument("--robust", help="one of adversarial training")
    parts = ("examples", "accuracy", "distance", "speed", "fast")
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts, help="what to compare (default: all)")
    parser.add_argument("--examples", type=int, default=1000, help="how many test images (default 1000)")
    parser.add_argument("--rounds", type=int, default=5, help="how many rounds are timed (default 5)")
    parser.add_argument("--eps", type=float, default=EPS, help="the radius of the part fast (default 0.3)")
    parser.add_argument("--compile", action="store_true", help="in the part fast: a compiled stand-in as well")
    arguments = parser.parse_args()
    if arguments.train_robust:
        train_robust(arguments.data, arguments.train_robust)
        return
    torch.set_num_threads(1)
    data = data_by_name.load(arguments.data, split="test")
    x, y = data.batch(0, arguments.examples)
    paths = {"plain": arguments.plain, "robust": arguments.robust}
    for label, path in paths.items():
        if path is None:
            continue
        model = models_by_name.load(path).module
        assert isinstance(model, nn.Module)
        print(f"{label:7} {path}, {len(x)} examples, one thread", flush=True)
        compare(label, model, x, y, arguments)


if __name__ == "__main__":
    main()
