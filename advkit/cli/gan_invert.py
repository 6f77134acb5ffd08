"""``advkit gan invert``: teach a generator's file to read the code of an input."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

EXAMPLES = """\
examples:
  advkit gan invert g.safetensors --data mnist-5k
  advkit gan invert g.safetensors --data hf:ylecun/mnist --epochs 2 --out gi.safetensors

Then the generator is a threat model: advkit attack --threat "latent('g.safetensors', eps=0.5)" ...
"""


def add(commands: Any) -> None:
    """Add the command."""
    command = commands.add_parser(
        "invert",
        help="train what reads the code of an input, for latent threat models",
        description="Train an inverter, from inputs to the codes that a generator draws them from, and keep it in its file.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.add_argument("generator", type=Path, metavar="FILE", help="the generator: what advkit gan train wrote")
    command.add_argument("--data", required=True, help="advkit list data; learns from the split train, is tried on test")
    command.add_argument("--out", type=Path, metavar="FILE", help="where the generator goes with its inverter (default: FILE)")
    command.add_argument("--epochs", type=int, default=1, help="passes over the data (default 1)")
    command.add_argument("--batch-size", type=int, default=32, help="examples a step (default 32)")
    command.add_argument("--lr", type=float, default=1e-3, help="the first learning rate (default 0.001)")
    command.add_argument("--limit", type=int, help="learn from at most so many examples, classes in proportion")
    command.add_argument("--seed", type=int, default=0, help="of the weights, the examples' order and all draws (default 0)")
    command.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1 ...")
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Train, save, and say how well inputs are read."""
    from advkit import data as data_by_name
    from advkit.benchmarks.statistics import rate
    from advkit.cli.progress import shares
    from advkit.data.dataset import check_seed
    from advkit.errors import UsageError
    from advkit.gan import invert, pair

    out: Path = arguments.generator if arguments.out is None else arguments.out
    if out.suffix != ".safetensors" or out.is_dir():
        raise UsageError(f"the file is {out}; a generator's file ends in .safetensors")
    check_seed(arguments.seed)
    given, about = pair.read(arguments.generator)
    low, high = given.low, given.high
    data = data_by_name.load(arguments.data, split="train", limit=arguments.limit, seed=arguments.seed, low=low, high=high)
    unseen = data_by_name.load(arguments.data, split="test", low=low, high=high)
    with shares() as tell:
        made = invert.fit(
            given,
            data,
            epochs=arguments.epochs,
            batch_size=arguments.batch_size,
            lr=arguments.lr,
            seed=arguments.seed,
            device=arguments.device,
            report=lambda at: tell(at.step / at.steps, f"step {at.step} of {at.steps}, loss {at.loss:.4f}"),
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    pair.save(out, made, **about)
    found = invert.read(made, unseen)
    print(f"{out}: an inverter, learned from {len(data)} examples")
    print(f"drawings differ from unseen examples by {100 * found.error:.2f} % of the range (root mean square)")
    if given.settings.conditional:
        print(f"the class is read right of {rate(found.right, found.of)}")
    return 0
