"""``advkit profile``: how fast a model is, at which batch size, and how long attacks on it will take."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from advkit.cli import tables
from advkit.cli.given import add_options, data_of, model_of

if TYPE_CHECKING:
    from advkit.benchmarks.profile import Profile

EXAMPLES = """\
examples:
  advkit profile --model m.safetensors --data mnist-5k
  advkit profile --model m.safetensors --data mnist-5k --threat "linf(0.1)" --limit 500
  advkit profile --model net.py:load --data images/ --threat "linf(8/255)" --attack fast --device cuda --compile

With a threat model, the attacks run on a few examples, and what they will take on all of them is worked out from that.
"""


def add(commands: Any) -> None:
    """Add the command."""
    command = commands.add_parser(
        "profile",
        help="how fast a model is, and how long attacks will take",
        description="Time a model's passes at several batch sizes and precisions; say how long attacks on it will take.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.add_argument("--model", required=True, help="advkit list models")
    command.add_argument("--data", required=True, help="advkit list data")
    command.add_argument("--threat", help='what may change: "linf(8/255)"; without it there is no forecast')
    command.add_argument("--attack", action="append", help="attacks or a suite (default standard); repeatable")
    add_options(command, "how many examples are planned (default: all)")
    command.add_argument("--compile", action="store_true", help="time the stand-in translated with torch.compile too")
    command.add_argument("--json", action="store_true", help="print JSON")
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Time and print."""
    from advkit.benchmarks.profile import profile
    from advkit.cli.progress import shares

    with shares() as report:
        result = profile(
            model_of(arguments, arguments.model),
            data_of(arguments),
            threat=arguments.threat,
            attacks=arguments.attack,
            compile=arguments.compile,
            device=arguments.device,
            seed=arguments.seed,
            report=report,
        )
    if arguments.json:
        print(json.dumps(result.to_json(), indent=2))
    else:
        show(result)
    return 0


def show(result: Profile) -> None:
    """Print the speeds as a table, and the rest as sentences."""
    from rich.markup import escape
    from rich.table import Table

    for note in result.notes:
        print(f"note: {note}")
    memory = any(speed.memory for speed in result.speeds)
    heads = ("precision", "batch size", "forward a second", "forward and backward a second", *(["memory"] if memory else []))
    table = Table(*heads, title=escape(f"{result.model} on {result.device}, in examples"))
    for speed in result.speeds:
        both = "-" if speed.gradients is None else f"{speed.gradients:,.0f}"
        used = [f"{speed.memory / 2**20:,.0f} MiB"] if memory else []
        table.add_row(speed.precision, str(speed.batch_size), f"{speed.forwards:,.0f}", both, *used)
    tables.show(table)
    for sentence in sentences(result):
        print(sentence)


def sentences(result: Profile) -> list[str]:
    """What follows from the speeds, and the forecast."""
    from advkit.benchmarks.profile import in_words

    said = [f"best batch size: {result.best} (an evaluation takes {result.default} where none is given)"]
    if result.agreement is not None:
        agreement = result.agreement
        said.append(f"the stand-in in bfloat16 says the same class for {agreement.count} of {agreement.of} examples")
    forecast = result.forecast
    if forecast is not None:
        what = f"{len(forecast.attacks)} attacks in {forecast.threat} on {forecast.examples} examples"
        said += [
            f"{what} will take {forecast}; {in_words(forecast.seconds, forecast.seconds)} if the pilot is typical",
            f"a pilot of {forecast.pilot} examples, {forecast.to_the_end} of which met every attack, says so",
            f"at most {forecast.passes:,} passes, which take {in_words(forecast.bound, forecast.bound)}",
        ]
    return said
