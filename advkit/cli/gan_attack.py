"""``advkit gan attack``: a generator that draws perturbations against a model."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

    from advkit.attacks.advgan import AdvGANGame, Trained
    from advkit.benchmarks.statistics import Rate
    from advkit.data import Data
    from advkit.gan.game import Match, Status
    from advkit.models import Model
    from advkit.oracle import Access
    from advkit.threat import Lp

EXAMPLES = """\
examples:
  advkit gan attack --model m.safetensors --data mnist-5k --threat "linf(0.3)" --out a.safetensors
  advkit gan attack --model m.onnx --data mnist-5k --threat "linf(0.3)" --black-box --out a.safetensors
  advkit gan attack --model m.safetensors --data mnist-5k --threat "linf(0.3)" --black-box labels --target 3 --out a.safetensors

Then the file attacks any model in one pass: advkit attack --attack "advgan('a.safetensors')" ... A run that was stopped goes on
after its last whole epoch when the same command is given again.
"""
OPTIONS = {
    "epochs": (int, "passes over the data"),
    "batch_size": (int, "examples a step"),
    "lr": (float, "the generator's learning rate"),
}
USUAL = {"epochs": 5, "batch_size": 32, "lr": 2e-3, "lr_discriminator": 1e-3, "average": 0.99}
"""How the game is played."""
BATCH = 250
"""How many examples are tried at a time."""


def add(commands: Any) -> None:
    """Add the command."""
    command = commands.add_parser(
        "attack",
        help="train a generator that fools a model in one pass",
        description="Train a generator of perturbations against a model, and try it on unseen examples.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.add_argument("--model", required=True, help="the model to fool: advkit list models")
    command.add_argument("--data", required=True, help="advkit list data; learns from the split train, is tried on test")
    command.add_argument("--threat", required=True, help='how large a perturbation may be: "linf(0.3)"')
    command.add_argument("--out", required=True, type=Path, metavar="FILE", help="the file, ending in .safetensors")
    command.add_argument("--target", type=int, metavar="K", help="the class that the model should see (default: any wrong one)")
    command.add_argument(
        "--black-box",
        nargs="?",
        const="scores",
        choices=("scores", "labels"),
        help="use the model's answers only: a student learns from its scores (default), or its labels",
    )
    command.add_argument("--student", metavar="NETWORK", help="the student: advkit list models (default: a small network)")
    command.add_argument("--width", type=int, default=8, help="channels of the generator's first convolution (default 8)")
    command.add_argument("--limit", type=int, help="learn from at most so many examples, classes in proportion")
    command.add_argument("--seed", type=int, default=0, help="of the weights, the examples' order and all draws (default 0)")
    command.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1 ...")
    command.add_argument("--probabilities", action="store_true", help="the model returns probabilities")
    command.add_argument(
        "--trust-pickle", action="store_true", help="load a pickled model: it can run any code on this machine"
    )
    group = command.add_argument_group("match", "what goes before the usual way to train it")
    for name, (kind, about) in OPTIONS.items():
        group.add_argument(f"--{name.replace('_', '-')}", type=kind, help=about)
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Train, save, try, and say what came of it."""
    from advkit import data as data_by_name
    from advkit import models as models_by_name
    from advkit.benchmarks.plan import parse_ball, threat_name
    from advkit.cli.progress import shares
    from advkit.data.dataset import check_seed
    from advkit.errors import UsageError
    from advkit.gan.game import play

    out: Path = arguments.out
    if out.suffix != ".safetensors" or out.is_dir():
        raise UsageError(f"--out is {out}; a generator is a file that ends in .safetensors")
    check_seed(arguments.seed)
    data = data_by_name.load(arguments.data, split="train", limit=arguments.limit, seed=arguments.seed)
    unseen = data_by_name.load(arguments.data, split="test", low=data.low, high=data.high)
    given = {"trust_pickle": arguments.trust_pickle, "probabilities": arguments.probabilities}
    model = models_by_name.load(arguments.model, device=arguments.device, **given)
    threat = parse_ball(arguments.threat, data)
    game, trained, match = made(arguments, model, data, threat)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(out.name + ".partial")
    with shares() as tell:

        def report(at: Status) -> None:
            tell(at.step / at.steps, f"epoch {at.epoch + 1} of {at.epochs}, losses {at.d_loss:.3f} and {at.g_loss:.3g}")

        identity = f"{model.digest} {threat!r} {arguments.target} {arguments.black_box} {arguments.student} {arguments.width}"
        play(
            game,
            data,
            match,
            seed=arguments.seed,
            device=arguments.device,
            partial=partial,
            identity=identity,
            report=report,
        )
    trained.save(out)
    success, seconds = tried(out, model, unseen, threat, arguments.target, arguments.device)
    partial.unlink(missing_ok=True)
    whom = "any wrong class" if arguments.target is None else f"class {arguments.target}"
    print(f"{out}: {threat_name(threat)}, {whom}, learned from {len(data)} examples")
    if arguments.black_box is not None:
        print(f"the student asked {model.name} about {2 * match.epochs * len(data)} inputs, for their {arguments.black_box}")
    print(f"success on unseen examples of {unseen.name} that {model.name} gets right: {success}")
    print(f"one pass takes {1000 * seconds:.3g} ms an example")
    return 0


def made(arguments: argparse.Namespace, model: Model, data: Data, threat: Lp) -> tuple[AdvGANGame, Trained, Match]:
    """The game with fresh weights, its generator as it will be saved, and how it is played."""
    from advkit import models as models_by_name
    from advkit.attacks.advgan import AdvGANGame, Critic, Generator, Judges, Trained
    from advkit.benchmarks.plan import dtype_of, threat_name
    from advkit.gan.game import Match
    from advkit.oracle import Access
    from advkit.train import drawing

    access = _access(arguments, model)
    place = models_by_name.find_device(arguments.device)
    x, y = data.batch(0, 8)
    for note in (*model.notes, *models_by_name.inspect(model, x.to(place, dtype_of(model)), y.to(place), len(data.classes))):
        print(f"note: {model.name}: {note}")
    shape = tuple(x.shape[1:])
    with drawing(arguments.seed):
        generator = Generator(shape, arguments.width)
        judges = Judges(Critic(shape), _student(arguments, model, x.to(place, dtype_of(model))))
    given = {name: getattr(arguments, name) for name in OPTIONS if getattr(arguments, name) is not None}
    match = Match(**{**USUAL, **given})
    about = {
        "model": model.name,
        "model digest": model.digest,
        "data": data.name,
        "threat": threat_name(threat),
        "range": f"[{data.low:g}, {data.high:g}]",
        "target": "any" if arguments.target is None else str(arguments.target),
        "access": access.name.lower(),
        "seed": str(arguments.seed),
    }
    game = AdvGANGame(model.module, generator, judges, threat, arguments.target, labels=access == Access.LABELS)
    return game, Trained(generator, shape, arguments.width, about), match


def _access(arguments: argparse.Namespace, model: Model) -> Access:
    """What is used of the model.

    Raises:
        UsageError: It does not show so much.
    """
    from advkit.errors import AccessError, UsageError
    from advkit.oracle import Access

    if arguments.black_box is None:
        if arguments.student is not None:
            raise UsageError(f"--student is {arguments.student}; a student learns with --black-box only")
        if model.access < Access.GRADIENTS:
            sees = model.access.name.lower()
            raise AccessError(f"{model.name} answers with {sees} only; let a student learn from it: --black-box {sees}")
        return Access.GRADIENTS
    access = Access.SCORES if arguments.black_box == "scores" else Access.LABELS
    if access > model.access:
        raise AccessError(f"{model.name} answers with labels only; give --black-box labels")
    return access


def _student(arguments: argparse.Namespace, model: Model, x: Tensor) -> nn.Module | None:
    """The student with fresh weights, where there is to be one, of the classes that the model has.

    Raises:
        UsageError: There is no such network, or it takes other inputs or has other classes.
    """
    import torch

    from advkit.attacks.advgan import Student
    from advkit.engine import frozen
    from advkit.errors import UsageError
    from advkit.models import networks
    from advkit.oracle import answer

    if arguments.black_box is None:
        return None
    with torch.no_grad(), frozen(model.module):
        classes = answer(model.module, x).shape[1]
    if arguments.student is None:
        return Student(tuple(x.shape[1:]), classes)
    student = networks.build(arguments.student)
    with torch.no_grad(), frozen(student):
        own = answer(student, x.cpu().float()).shape[1]
    if own != classes:
        has = f"--student {arguments.student} has {own} classes and {model.name} has {classes}"
        raise UsageError(f"{has}; both should have as many")
    return student


def tried(out: Path, model: Model, data: Data, threat: Lp, target: int | None, device: str) -> tuple[Rate, float]:
    """How many unseen examples that the model gets right the generator pushes over, and the seconds that one takes it.

    Raises:
        UsageError: Every example is of the target's class.
    """
    import torch

    from advkit.attacks.advgan import AdvGAN
    from advkit.benchmarks.plan import dtype_of
    from advkit.benchmarks.statistics import rate
    from advkit.engine import perturb
    from advkit.engine import run as attack
    from advkit.errors import UsageError
    from advkit.oracle import Access, Goal

    one, goal = AdvGAN(str(out)), Goal(targeted=target is not None)
    if target is not None:
        data = data.select((data.y != target).nonzero().squeeze(1))
        if not len(data):
            raise UsageError(f"every unseen example is of class {target}; there should be some of others")
    right, success, seconds = 0, 0, 0.0
    for start in range(0, len(data), BATCH):
        x, y = data.batch(start, start + BATCH)
        x, y = x.to(device, dtype_of(model)), y.to(device)
        wanted = y if target is None else torch.full_like(y, target)
        rng = torch.Generator().manual_seed(0)
        began = time.perf_counter()
        perturb(one, model.module, x, wanted, threat, goal=goal, rng=rng)
        seconds += time.perf_counter() - began
        result = attack(one, model.module, x, wanted, threat, goal=goal, access=Access.LABELS, rng=rng)
        good = result.clean.argmax(1) == y
        right, success = right + int(good.sum()), success + int((result.success & good).sum())
    return rate(success, right), seconds / len(data)
