"""``advkit tradeoff``: what robustness costs in clean accuracy."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from advkit.cli import tables

if TYPE_CHECKING:
    from advkit.benchmarks.statistics import Estimate
    from advkit.benchmarks.tradeoff import Tradeoff

EXAMPLES = """\
examples:
  advkit tradeoff --model mnist-mlp --data mnist-5k --defense plain --defense fgsm --threat "linf(0.1)" --seeds 3 --out family
  advkit tradeoff --model mnist-cnn --data hf:ylecun/mnist --defense plain --defense "trades(beta=1)" \\
    --defense "trades(beta=6)" --threat "linf(0.1)" --threat "linf(0.2)" --at "linf(0.2)" --epochs 5 --out family

Each defense is trained for each threat, or for its own ("pgd linf(0.3)"), once a seed. What is done is not done again: give the
same command to go on, or with more defenses, threats or seeds to extend the family.
"""


def add(commands: Any) -> None:
    """Add the command."""
    command = commands.add_parser(
        "tradeoff",
        help="what robustness costs in clean accuracy",
        description="Train a family of networks over the same seeds, and draw clean against robust accuracy.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.add_argument("--model", required=True, help="a network: advkit list models")
    command.add_argument("--data", required=True, help="advkit list data; its splits train and test are used")
    command.add_argument(
        "--defense",
        required=True,
        action="append",
        help="advkit list defenses; repeatable; compared with the first",
    )
    command.add_argument("--threat", action="append", help='what they should withstand: "linf(0.1)"; repeatable')
    command.add_argument("--at", action="append", metavar="THREAT", help="what they are measured under (default: --threat)")
    command.add_argument("--attack", default="standard", help="advkit list attacks, or a suite (default standard)")
    command.add_argument("--limit", type=int, default=1000, help="attack at most so many test examples (default 1000)")
    command.add_argument("--seeds", type=int, default=3, help="how many seeds: 0, 1, 2 ... (default 3)")
    command.add_argument("--epochs", type=int, help="passes over the data (default: the network's own recipe)")
    command.add_argument("--batch-size", type=int, help="examples a step")
    command.add_argument("--lr", type=float, help="the highest learning rate")
    command.add_argument("--optimizer", help="sgd or adam")
    command.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1 ...")
    command.add_argument("--out", required=True, type=Path, metavar="DIR", help="a folder for rows, checkpoints, picture")
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Train, measure, draw and print."""
    from advkit import data as data_by_name
    from advkit.benchmarks.tradeoff import draw, tradeoff
    from advkit.cli.given import recipe_of
    from advkit.cli.progress import shares
    from advkit.spec import check_whole

    check_whole("--seeds", arguments.seeds, 1)
    data = data_by_name.load(arguments.data, split="train")
    test = data_by_name.load(arguments.data, split="test")
    recipe = recipe_of(arguments, len(data))
    with shares() as report:
        result = tradeoff(
            arguments.model,
            data,
            test,
            defenses=arguments.defense,
            threats=arguments.threat or [],
            at=arguments.at,
            attack=arguments.attack,
            limit=arguments.limit,
            recipe=recipe,
            seeds=range(arguments.seeds),
            device=arguments.device,
            out=arguments.out,
            report=report,
        )
    draw(result, arguments.out / "tradeoff.png")
    result.table().to_csv(arguments.out / "tradeoff.csv", index=False)
    show(result)
    print(f"{arguments.out / 'tradeoff.png'}: clean against robust accuracy")
    return 0


def show(result: Tradeoff) -> None:
    """Print the family as a table."""
    from rich.markup import escape
    from rich.table import Table

    measures: dict[str, str | None] = {"clean": None, **{at: at for at in result.at}}
    heads = [head for name in measures for head in (name, "above the first")]
    seeds = len({row["seed"] for row in result.rows})
    table = Table("trained", *heads, title=escape(f"accuracy (%), mean of {seeds} seeds [95 %]"))
    for member in result.members:
        cells = []
        for at in measures.values():
            cells.append(percent(result.accuracy(member, at)))
            cells.append("" if member == result.members[0] else percent(result.difference(member, at), "+"))
        table.add_row(escape(member), *map(escape, cells))
    tables.show(table, width=160)


def percent(value: Estimate, sign: str = "") -> str:
    """A share, or a difference of shares, in percent with its interval; without one for a single seed."""
    ends = f" [{100 * value.low:{sign}.2f}, {100 * value.high:{sign}.2f}]" if value.high < float("inf") else ""
    return f"{100 * value.value:{sign}.2f}{ends}"
