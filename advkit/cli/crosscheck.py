"""``advkit crosscheck``: the same threat model through other libraries, and why they break what advkit does not."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from advkit.cli import tables
from advkit.cli.given import add_options, data_of, model_of

if TYPE_CHECKING:
    from advkit.benchmarks.crosscheck import CrossCheck

EXAMPLES = """\
examples:
  advkit crosscheck --model m.safetensors --data mnist-5k --threat "linf(0.1)"
  advkit crosscheck --model m.safetensors --data mnist-5k --threat "l2(1)" --library foolbox --library adv-lib --out check

Libraries: foolbox, torchattacks, adv-lib, autoattack (https://github.com/fra31/auto-attack). Exit codes: 0 everything is
explained, 1 another library broke an example and nothing explains why advkit does not, 2 misuse or stopped.
"""


def add(commands: Any) -> None:
    """Add the command."""
    command = commands.add_parser(
        "crosscheck",
        help="run other libraries too, and explain what only they break",
        description="Run the same threat model through other libraries; explain each example that only they break.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.add_argument("--model", required=True, help="advkit list models")
    command.add_argument("--data", required=True, help="advkit list data")
    command.add_argument("--threat", required=True, help='what may change, and how far: "linf(8/255)"; an l_p ball')
    command.add_argument("--attack", action="append", help="our attacks or a suite (default standard); repeatable")
    command.add_argument("--library", action="append", metavar="NAME", help="with whom (default: all installed); repeatable")
    add_options(command, "at most so many examples (default 100)")
    command.add_argument("--batch-size", type=int, help="examples at a time")
    command.add_argument("--json", action="store_true", help="print JSON")
    command.add_argument("--out", type=Path, metavar="DIR", help="a folder for the result and the points")
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Compare, keep and print."""
    from advkit.benchmarks.crosscheck import check_folder
    from advkit.errors import UsageError

    if arguments.out is not None:
        check_folder(arguments.out)
    try:
        result = compared(arguments)
    except KeyboardInterrupt:
        raise UsageError("stopped; nothing is kept of a cross-check that is not finished") from None
    try:
        if arguments.out is not None:
            result.save(arguments.out)
    finally:
        # What cannot be kept is said all the same.
        if arguments.json:
            print(json.dumps(result.to_json(), indent=2))
        else:
            show(result)
    return 1 if result.unexplained else 0


def compared(arguments: argparse.Namespace) -> CrossCheck:
    """Compare, and show how far it is."""
    from advkit.benchmarks.crosscheck import EXAMPLES, crosscheck
    from advkit.cli.progress import shares

    with shares() as report:
        return crosscheck(
            model_of(arguments, arguments.model),
            data_of(arguments, EXAMPLES),
            threat=arguments.threat,
            attacks=arguments.attack,
            libraries=arguments.library,
            limit=None,
            batch_size=arguments.batch_size,
            device=arguments.device,
            seed=arguments.seed,
            report=report,
        )


def show(result: CrossCheck) -> None:
    """Print what every library broke, and why some examples were broken by others only."""
    from rich.markup import escape
    from rich.table import Table

    for note in result.notes:
        print(f"note: {note}")
    run = result.run
    title = f"{run['model']['name']} on {run['data']['name']}, {run['threat']}: {result.right} of {result.examples} right"
    table = Table("library", "broke", "only they", "only we", "invalid", "seconds", "attacks", title=escape(title))
    for tally in (result.ours, *result.libraries):
        counts = (tally.broke, tally.only_they, tally.only_we, tally.invalid, f"{tally.seconds:.1f}")
        own = tally is result.ours
        table.add_row(
            tally.library,
            *("-" if own and 0 < k < 4 else str(count) for k, count in enumerate(counts)),
            escape("\n".join(tally.attacks)),
        )
    only = Table("example", "library", "attack", "distance", "why", title="broken by others only")
    for row in result.rows:
        only.add_row(str(row.index), row.library, escape(row.attack), f"{row.distance:.5g}", escape(row.sentence))
    tables.show(table, *([only] if result.rows else []))
    for tally in result.libraries:
        for failure in tally.failures:
            print(f"{tally.library}: {failure}")
    print(verdict(result))


def verdict(result: CrossCheck) -> str:
    """The result in a sentence."""
    if not result.rows:
        return "no other library broke an example that advkit did not"
    left = len(result.unexplained)
    examples = len({row.index for row in result.rows})
    return f"{examples} examples were broken by others only; " + (
        f"{left} rows are unexplained" if left else "all are explained"
    )
