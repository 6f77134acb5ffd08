"""``advkit train``: a small network, from data to a checkpoint."""

from __future__ import annotations

import argparse
import dataclasses
import time
from pathlib import Path
from typing import Any

EXAMPLES = """\
examples:
  advkit train --model mnist-cnn --data mnist-5k --out m.safetensors
  advkit train --model "cifar-resnet(width=32)" --data hf:uoft-cs/cifar10 --epochs 20 --out c.safetensors
  advkit train --model mnist-cnn --data mnist-5k --defense pgd --threat "linf(0.3)" --out robust.safetensors

A run that was stopped goes on after its last whole epoch when the same command is given again.
"""


def add(commands: Any) -> None:
    """Add the command."""
    command = commands.add_parser(
        "train",
        help="train a small network",
        description="Train a small network and write it to a safetensors file.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.add_argument("--model", required=True, help="a network: advkit list models")
    command.add_argument("--data", required=True, help="what to learn: advkit list data; its splits train and test are used")
    command.add_argument("--out", required=True, type=Path, metavar="FILE", help="the checkpoint, ending in .safetensors")
    command.add_argument("--defense", help="a training loss other than cross entropy: advkit list defenses")
    command.add_argument("--threat", help='what the defense should withstand: "linf(0.3)"')
    command.add_argument("--epochs", type=int, help="passes over the data")
    command.add_argument("--batch-size", type=int, help="examples a step")
    command.add_argument("--lr", type=float, help="the highest learning rate")
    command.add_argument("--limit", type=int, help="learn from at most so many examples, classes in proportion")
    command.add_argument("--seed", type=int, default=0, help="of the weights and the order of the examples (default 0)")
    command.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1 ...")
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Train, save, and say how good it is on the test split."""
    from advkit import data as data_by_name
    from advkit import models as models_by_name
    from advkit import spec, train
    from advkit.benchmarks.statistics import rate
    from advkit.cli.progress import training
    from advkit.data.dataset import check_seed
    from advkit.errors import UsageError
    from advkit.models import checkpoint, networks

    if arguments.out.suffix != ".safetensors" or arguments.out.is_dir():
        raise UsageError(f"--out is {arguments.out}; a checkpoint is a file that ends in .safetensors")
    check_seed(arguments.seed)
    network = spec.parse(arguments.model, networks.NETWORKS, "network")
    architecture = spec.show(network, networks.NETWORKS)
    given = {"epochs": arguments.epochs, "batch_size": arguments.batch_size, "lr": arguments.lr}
    data = data_by_name.load(arguments.data, split="train", limit=arguments.limit, seed=arguments.seed)
    recipe = train.RECIPES[architecture.split("(")[0]]
    recipe = dataclasses.replace(recipe, **{key: value for key, value in given.items() if value is not None})
    if arguments.epochs is None:
        recipe = recipe.for_examples(len(data))
    test = data_by_name.load(arguments.data, split="test")
    defense = f"{arguments.defense or 'cross entropy'} {arguments.threat or ''}".strip()
    device = models_by_name.find_device(arguments.device)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    model = networks.build(architecture, arguments.seed)
    partial = arguments.out.with_name(arguments.out.name + ".partial")
    x, _ = data.batch(0, 8)
    models_by_name.inspect(models_by_name.wrap(model), x, data.y, len(data.classes))
    whole, began = not partial.exists(), time.perf_counter()
    with training(recipe.epochs) as report:
        train.train(
            model,
            data,
            recipe,
            loss=_loss(arguments, data),
            seed=arguments.seed,
            device=device,
            partial=partial,
            identity=f"{architecture} {defense}",
            report=report,
        )
    about = {"data": arguments.data, "loss": defense, "seed": str(arguments.seed), "recipe": repr(recipe)}
    if whole:
        # What the training cost, for the trade-off that benchmarks show.
        about["seconds"] = f"{time.perf_counter() - began:.1f}"
    checkpoint.save(arguments.out, model.cpu(), architecture, **about)
    partial.unlink(missing_ok=True)
    right, of = train.accuracy(model, test)
    print(f"{arguments.out}: {architecture}, {len(data)} examples, clean accuracy on the test split {rate(right, of)}")
    return 0


def _loss(arguments: argparse.Namespace, data: Any) -> Any:
    from advkit import spec
    from advkit.benchmarks.plan import parse_threat
    from advkit.defenses import DEFENSES
    from advkit.errors import UsageError
    from advkit.train import CrossEntropy

    if arguments.defense is None:
        if arguments.threat is not None:
            raise UsageError("--threat was given without --defense; plain training knows no adversary")
        return CrossEntropy()
    if arguments.threat is None:
        raise UsageError(f'--defense {arguments.defense} needs --threat, as in --threat "linf(0.3)"')
    threat = parse_threat(arguments.threat, data)
    return spec.parse(arguments.defense, DEFENSES, "defense", defaults={"threat": threat})
