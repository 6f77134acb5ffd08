"""``advkit gan score``: what a generator has learned."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from advkit.data import Data
    from advkit.gan.score import Beside, Score
    from advkit.gan.source import Source
    from advkit.models import Model

SCHEMA = "advkit/gan-score/1"
NETWORKS = {(1, 28, 28): "mnist-cnn(width=16)", (3, 32, 32): "cifar-resnet"}
"""The network that is trained for features, for images of a shape."""
KEPT = "features.safetensors"

EXAMPLES = """\
examples:
  advkit gan score --generator g.safetensors --data mnist-5k --out score
  advkit gan score --generator g.safetensors --data hf:ylecun/mnist --features m.safetensors --samples 5000
  advkit gan score --generator mine.py:generator --data faces --features mine.py:network --out score

The split train is what the generator has learned from, the split test what it has not seen. Images are compared in the hidden
units of a classifier, by default one that is trained on the split train; numbers in those of another network say something
else. The folder has score.json, the network, and pictures of samples beside their nearest training examples.
"""


def add(commands: Any) -> None:
    """Add the command."""
    command = commands.add_parser(
        "score",
        help="see what a generator has learned, and whether by heart",
        description="Measure how good and how diverse a generator's samples are, and whether they are copies.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.add_argument("--generator", required=True, help="g.safetensors, or a file.py:function of your own")
    command.add_argument("--data", required=True, help="what it was to learn, with splits train and test: advkit list data")
    command.add_argument("--features", metavar="MODEL", help="the classifier to compare in (default: one is trained)")
    command.add_argument("--samples", type=int, metavar="N", help="how many (default 10000, or all held-out examples)")
    command.add_argument(
        "--limit", type=int, metavar="N", help="at most N examples of each split; copies of others are then not seen"
    )
    command.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1 ...")
    command.add_argument("--seed", type=int, default=0, help="of every random draw (default 0)")
    command.add_argument("--out", type=Path, metavar="DIR", help="a folder for score.json, pictures and the network")
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Measure, keep and print."""
    import sys

    from advkit import data as data_by_name
    from advkit.cli.progress import shares
    from advkit.errors import UsageError
    from advkit.gan.pair import load
    from advkit.gan.score import check_compared, score

    source = load(arguments.generator)
    train, test = (
        data_by_name.load(arguments.data, split=split, limit=arguments.limit, seed=arguments.seed)
        for split in ("train", "test")
    )
    if train.kind != "image":
        raise UsageError(f"{train.name} are of kind {train.kind}; a score is for images")
    # Before a network is trained.
    check_compared(source, train, test, arguments.samples)
    _place(source, arguments.device)
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
    model = _network(arguments, train)
    with shares() as report:
        found = score(
            source,
            train,
            test,
            model.module,
            n=arguments.samples,
            seed=arguments.seed,
            device=arguments.device,
            report=report,
        )
    show(found, f"{arguments.generator}, {found.n} samples and as many of {arguments.data}, features of {model.name}")
    for warning in found.warnings:
        print(f"advkit: warning: {warning}", file=sys.stderr)
    if arguments.out is not None:
        _save(arguments, source, train, test, model, found)
    return 0


def _place(source: Source, device: str) -> None:
    """Draw on the device, where the networks are advkit's."""
    from advkit.gan.pair import Pair
    from advkit.models import find_device

    if isinstance(source, Pair):
        for network in (source.generator, source.discriminator):
            network.to(find_device(device))


def _network(arguments: argparse.Namespace, train: Data) -> Model:
    """The classifier that gives the features: the one that is named, the one in the folder, or a new one."""
    from advkit import models

    if arguments.features is not None:
        return models.load(arguments.features, device=arguments.device)
    kept = arguments.out / KEPT if arguments.out is not None else None
    if kept is None or not kept.exists():
        return _trained(arguments, train, kept)
    _check_kept(kept, train, arguments.seed)
    return models.load(str(kept), device=arguments.device)


def _check_kept(kept: Path, train: Data, seed: int) -> None:
    from advkit import tensors
    from advkit.errors import UsageError

    about = tensors.read(kept)[1]
    if (about.get("data"), about.get("seed")) != (train.digest(), str(seed)):
        raise UsageError(f"{kept} was trained on other examples or with another seed; give another --out, or it as --features")


def _trained(arguments: argparse.Namespace, train: Data, kept: Path | None) -> Model:
    from advkit import models
    from advkit.cli.progress import training
    from advkit.errors import UsageError
    from advkit.models import checkpoint, networks
    from advkit.train import RECIPES
    from advkit.train import train as fit

    shape = tuple(train.batch(0, 1)[0].shape[1:])
    if shape not in NETWORKS:
        known = " or ".join(map(str, NETWORKS))
        raise UsageError(f"the images have shape {shape}; without --features a network is trained for {known} only")
    architecture = NETWORKS[shape]
    recipe = RECIPES[architecture.split("(")[0]].for_examples(len(train))
    with training() as report:
        module = fit(
            networks.build(architecture, arguments.seed),
            train,
            recipe,
            seed=arguments.seed,
            device=arguments.device,
            report=report,
        )
    if kept is not None:
        checkpoint.save(kept, module, architecture, data=train.digest(), seed=str(arguments.seed))
    return models.wrap(module, name=architecture)


def show(found: Score, title: str) -> None:
    """Print what was found as a table."""
    from rich.markup import escape
    from rich.table import Table

    from advkit.cli import tables

    table = Table("measure", "samples", "real", "noise", "what it says", title=escape(title))
    for row in [*_quality(found), *_copying(found)]:
        table.add_row(*(escape(cell) for cell in row))
    tables.show(table, width=140)


Row = tuple[str, str, str, str, str]


def _quality(found: Score) -> list[Row]:
    """How good and how diverse the samples are."""
    from advkit.benchmarks.statistics import rate

    right, near = str(rate(*found.accuracy)), found.neighbourhoods
    rows = [
        _row("FID", found.fid, lambda value: f"{value:.4g}", "distance from data: 0 for the same distribution"),
        _row("KID", found.kid, lambda kid: f"{kid.value:.3g} +- {kid.error:.2g}", "the same without bias by numbers"),
        _row("precision", near, lambda both: _percent(both.precision), "samples among data; void where noise is too"),
        _row("recall", near, lambda both: _percent(both.recall), "data among samples"),
        _row("realistic", near, lambda both: _percent(both.realistic), "samples where data are dense"),
        _row("classes", found.coverage, lambda c: f"{c.covered} of {c.present}", "with a tenth of their share or more"),
        _row("shares of classes", found.coverage, lambda c: _percent(c.distance), "would have to be of another class"),
    ]
    if found.agreement is not None:
        rows.append(("class asked for", str(rate(*found.agreement)), right, "-", "is what the classifier sees"))
    else:
        rows.append(("classifier", "-", right, "-", "names the class of real examples right"))
    if found.told is not None:
        rows.append(("told apart", str(rate(*found.told)), "50 %", "-", "by its own discriminator"))
    return rows


def _row(name: str, of: Beside[Any], text: Callable[[Any], str], about: str) -> Row:
    samples, real, noise = ("-" if value is None else text(value) for value in (of.samples, of.real, of.noise))
    return name, samples, real, noise, about


def _copying(found: Score) -> list[Row]:
    """How many different pictures there are, and whether they are copies."""
    from advkit.benchmarks.statistics import rate

    b, chance = found.birthday, _percent(found.memory.samples.chance)
    known = b.high < float("inf")
    support = f"{b.support:,.0f} [{b.low:,.0f}, {b.high:,.0f}]" if known else f"more than {b.low:,.0f}"
    about = f"a batch of {b.batch:,.0f} often holds two alike" if known else "different pictures, as far as can be told"
    return [
        ("pairs alike", f"{b.collisions:,}", f"{b.real_collisions:,}", "-", f"of {b.pairs:,}"),
        ("support", support, "-", "-", about),
        _row("copies", found.memory, lambda m: str(rate(m.copies, m.of)), "far closer to one training example than to others"),
        _row("nearest is trained", found.memory, lambda m: _percent(m.near / m.of), f"{chance} by chance; more: by heart"),
        _row("closer than held out", found.memory, lambda m: _percent(m.closer), "to training data; 50 %: as good as real"),
        _row("C_T", found.memory, lambda m: f"{m.c_t:.2f}", "far below 0: copies; far above: unlike data"),
    ]


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _save(arguments: argparse.Namespace, source: Source, train: Data, test: Data, model: Model, found: Score) -> None:
    """Write the numbers and the pictures."""
    import json

    from advkit.benchmarks.statistics import rate
    from advkit.cli.pictures import save_grid
    from advkit.version import __version__

    numbers = found.as_dict()
    for name in ("accuracy", "agreement", "told"):
        numbers[name] = None if numbers[name] is None else rate(*numbers[name]).to_json()
    about = {
        "schema": SCHEMA,
        "advkit": __version__,
        "generator": {"name": arguments.generator, "digest": getattr(source, "digest", None)},
        "data": {"name": arguments.data, "train": train.digest(), "test": test.digest()},
        "network": {"name": model.name, "digest": model.digest},
        "seed": arguments.seed,
    }
    (arguments.out / "score.json").write_text(json.dumps(about | numbers, indent=2, allow_nan=False) + "\n")
    for name, pairs in (("nearest.png", found.pictures), ("closest.png", found.closest)):
        save_grid(_unit(pairs.flatten(0, 1), train), arguments.out / name)
    print(f"{arguments.out}: score.json; nearest.png, samples beside their nearest training examples; closest.png, the likest")


def _unit(x: Tensor, data: Data) -> Tensor:
    return (x - data.low) / (data.high - data.low)
