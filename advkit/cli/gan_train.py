"""``advkit gan train``: a generator and its discriminator, from data to a file."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from advkit.data import Data
    from advkit.gan.game import Match, Round, Status
    from advkit.gan.pair import Pair

EXAMPLES = """\
examples:
  advkit gan train --model dcgan --data mnist-5k --out g.safetensors
  advkit gan train --model biggan --data hf:ylecun/mnist --out c.safetensors
  advkit gan train --model "biggan(width=64)" --data hf:uoft-cs/cifar10 --out c.safetensors \\
    --lr 1e-4 --lr-discriminator 4e-4 --device cuda
  advkit gan train --model ssgan --labels 100 --data hf:ylecun/mnist --out s.safetensors
  torchrun --nproc-per-node 8 -m advkit gan train --model dcgan --data hf:uoft-cs/cifar10 --device cuda --out c.safetensors

A run that was stopped goes on after its last whole epoch when the same command is given again. Each epoch's samples are drawn
from the same codes and written to a folder beside the file.
"""
OPTIONS = {
    "epochs": (int, "passes over the data"),
    "batch_size": (int, "examples a step"),
    "lr": (float, "the generator's learning rate"),
    "lr_discriminator": (float, "the discriminator's learning rate"),
    "turns": (int, "steps of the discriminator for each of the generator"),
    "average": (float, "keep a moving average of the weights with this decay, as 0.999"),
    "schedule": (str, "of the learning rates: constant, linear, cosine ..."),
    "precision": (str, "float32, or bfloat16 for mixed precision"),
}


def add(commands: Any) -> None:
    """Add the command."""
    command = commands.add_parser(
        "train",
        help="train a generator against a discriminator",
        description="Train a generator against a discriminator and write both to a safetensors file.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.add_argument("--model", required=True, help="the networks: advkit list gans")
    command.add_argument("--data", required=True, help="what to learn: advkit list data; its split train is used")
    command.add_argument("--out", required=True, type=Path, metavar="FILE", help="the file, ending in .safetensors")
    command.add_argument("--labels", type=int, metavar="N", help="ssgan: how many examples have labels (default 100)")
    command.add_argument("--limit", type=int, help="learn from at most so many examples, classes in proportion")
    command.add_argument("--grids", type=Path, metavar="DIR", help="where each epoch's samples go (default: beside the file)")
    command.add_argument("--seed", type=int, default=0, help="of the weights, the examples' order and all draws (default 0)")
    command.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1 ...")
    group = command.add_argument_group("match", "what goes before the networks' own way to be trained")
    for name, (kind, about) in OPTIONS.items():
        group.add_argument(f"--{name.replace('_', '-')}", type=kind, help=about)
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Train, save, and say what came of it."""
    from advkit import data as data_by_name
    from advkit.cli.progress import shares
    from advkit.course import Diverged
    from advkit.data.dataset import check_seed
    from advkit.errors import UsageError
    from advkit.gan.game import alarm, play
    from advkit.processes import group, together

    if arguments.out.suffix != ".safetensors" or arguments.out.is_dir():
        raise UsageError(f"--out is {arguments.out}; a generator is a file that ends in .safetensors")
    check_seed(arguments.seed)
    data = data_by_name.load(arguments.data, split="train", limit=arguments.limit, seed=arguments.seed)
    pair, game, match = made(arguments, data)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    partial = arguments.out.with_name(arguments.out.name + ".partial")
    with together(), shares() as tell:
        try:
            rounds = play(
                game,
                data,
                match,
                seed=arguments.seed,
                device=arguments.device,
                partial=partial,
                identity=f"{pair.settings!r} {arguments.labels}",
                report=_reports(tell, _grids(arguments, data)) if group()[0] == 0 else None,
            )
        except Diverged as error:
            if not partial.exists():
                raise
            _save(arguments, pair, partial, ended=str(error))
            raise Diverged(f"{error}; {arguments.out} holds them") from None
    if group()[0] == 0:
        _save(arguments, pair, partial, history=json.dumps([dataclasses.asdict(entry) for entry in rounds]))
        warning = alarm(rounds)
        if warning:
            print(f"advkit: warning: {warning}", file=sys.stderr)
        print(f"{arguments.out}: {arguments.model}, {len(data)} examples, {said(rounds[-1])}")
        _classified(arguments, pair)
    return 0


def made(arguments: argparse.Namespace, data: Data) -> tuple[Pair, Any, Match]:
    """The pair with fresh weights, its game, and how it is played."""
    from advkit import spec
    from advkit.gan.adversarial import Adversarial
    from advkit.gan.game import MATCHES
    from advkit.gan.losses import GAME_LOSSES
    from advkit.gan.pair import GANS, Pair, build
    from advkit.gan.ssgan import SSGAN, SemiSupervised

    x, _ = data.batch(0, 1)
    shape, labels = tuple(x.shape[1:]), max(len(data.classes), int(data.y.max()) + 1)
    settings, generator, discriminator = build(arguments.model, shape, labels, arguments.seed)
    pair = Pair(settings, shape, data.low, data.high, data.classes, labels, generator, discriminator)
    given = {name: getattr(arguments, name) for name in OPTIONS if getattr(arguments, name) is not None}
    match = dataclasses.replace(MATCHES[spec.show(settings, GANS).split("(")[0]], **given)
    if isinstance(settings, SSGAN):
        return pair, SemiSupervised(settings, generator, discriminator, *_labelled(arguments, data)), match
    _check_unlabelled(arguments)
    return pair, Adversarial(settings, generator, discriminator, spec.parse(settings.loss, GAME_LOSSES, "loss")), match


def _check_unlabelled(arguments: argparse.Namespace) -> None:
    from advkit.errors import UsageError

    if arguments.labels is not None:
        raise UsageError(f"--labels is {arguments.labels} and --model {arguments.model}; only ssgan learns from few labels")


def _labelled(arguments: argparse.Namespace, data: Data) -> tuple[Tensor, Tensor]:
    """The examples whose labels the classifier sees, in [0, 1], with as many of each class as can be."""
    import torch

    from advkit.errors import UsageError

    n = 100 if arguments.labels is None else arguments.labels
    classes = len(data.y.unique())
    if not classes <= n <= len(data):
        raise UsageError(f"--labels is {n}; it should be between {classes}, one for each class, and {len(data)}")
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(arguments.seed))
    y = data.y[order]
    # The first of each class, then the second of each, and so on.
    rank = torch.zeros_like(y)
    for k in y.unique():
        rank[y == k] = torch.arange(int((y == k).sum()))
    x, y = data.select(order[rank.argsort(stable=True)[:n]]).batch(0, n)
    return (x - data.low) / (data.high - data.low), y


def said(entry: Round) -> str:
    """A round in words."""
    told, lost = 100 * entry.told, 100 * entry.lost
    return f"losses {entry.d_loss:.3f} and {entry.g_loss:.3g}, {told:.0f} % told apart, {lost:.0f} % of the data left out"


def _save(arguments: argparse.Namespace, pair: Pair, partial: Path, **about: str) -> None:
    """Write the file, and remove that of the run."""
    from advkit.gan.pair import save
    from advkit.processes import group

    if group()[0] == 0:
        save(arguments.out, pair, data=arguments.data, seed=str(arguments.seed), **about)
        partial.unlink(missing_ok=True)


def _grids(arguments: argparse.Namespace, data: Data) -> Path | None:
    """The folder for the samples of each epoch; None where they are no pictures."""
    x, _ = data.batch(0, 1)
    if x.ndim != 4 or x.shape[1] not in (1, 3):
        return None
    folder: Path = arguments.grids or arguments.out.with_name(arguments.out.stem + "-samples")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _reports(tell: Callable[[float, str], None], grids: Path | None) -> Callable[[Status], None]:
    """Progress on the terminal, a line and a picture an epoch."""
    from advkit.cli.pictures import save_grid

    said_of = 0

    def report(at: Status) -> None:
        nonlocal said_of
        so_far = f"losses {at.d_loss:.3f} and {at.g_loss:.3g}, {100 * at.told:.0f} % told apart"
        tell(at.step / at.steps, f"epoch {at.epoch + 1} of {at.epochs}, {so_far}")
        if at.samples is None:
            return
        for entry in at.history[said_of:]:
            print(f"epoch {entry.epoch + 1}: {said(entry)}", flush=True)
        said_of = len(at.history)
        if grids is not None:
            save_grid(at.samples, grids / f"epoch-{at.epoch + 1:03d}.png")

    return report


def _classified(arguments: argparse.Namespace, pair: Pair) -> None:
    """Say how good the classifier of a semi-supervised pair is."""
    from advkit import data as data_by_name
    from advkit.benchmarks.statistics import rate
    from advkit.gan.ssgan import SSGAN
    from advkit.train import accuracy

    if isinstance(pair.settings, SSGAN):
        right, of = accuracy(pair.discriminator, data_by_name.load(arguments.data, split="test"))
        print(f"its classifier, which is a model for advkit attack too: accuracy on the test split {rate(right, of)}")
