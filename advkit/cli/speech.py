"""``advkit attack`` and ``advkit report`` where the model is a recogniser of speech."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from advkit.cli import tables

if TYPE_CHECKING:
    from advkit.benchmarks.gates import Decision
    from advkit.benchmarks.speech_result import Speech

OWN = ("say", "listener", "stand_in", "over", "match", "voice")
"""The options that only a recogniser has."""

FOREIGN = {
    **dict.fromkeys(("size", "range", "quantize", "votes")),
    **dict.fromkeys(("alone", "fast", "compile", "probabilities", "trust_pickle"), False),
    "pictures": 64,
    "split": "test",
}
"""The options that only a classifier has, and what they are where they are not given."""


def add_options(command: Any) -> None:
    """Add the options for recognisers of speech."""
    group = command.add_argument_group("recognisers of speech")
    group.add_argument(
        "--say",
        action="append",
        metavar="TEXT",
        help="a command that the recogniser should hear; @FILE has one a line; repeatable",
    )
    group.add_argument("--voice", help="who says it, where there is no --data: advkit list voices")
    group.add_argument("--match", help='what counts as heard: exact (default), contains, "wer(0.5)" (default without a target)')
    group.add_argument(
        "--listener", metavar="MODEL", help="a second recogniser, as a proxy for people, that the attack never asks"
    )
    group.add_argument("--stand-in", metavar="MODEL", help="a recogniser that the attack may ask in place of people")
    group.add_argument(
        "--over",
        action="append",
        metavar="CHANNEL",
        help='does it still work over "room+noise(20)"; advkit list channels; repeatable',
    )


def refuse(arguments: argparse.Namespace) -> None:
    """Refuse options of recognisers where the model is none, and data and a threat model that are missing.

    Raises:
        UsageError: There is such an option.
    """
    from advkit.errors import UsageError

    if given := [name for name in OWN if getattr(arguments, name) is not None]:
        option = f"--{given[0].replace('_', '-')}"
        raise UsageError(f"{option} is for recognisers of speech, and {arguments.model} is none; advkit list recognisers")
    for name in ("data", "threat"):
        if getattr(arguments, name) is None:
            raise UsageError(f"--{name} is missing; advkit list {name if name == 'data' else 'threats'} says what it may be")


def run(arguments: argparse.Namespace) -> int:
    """Attack a recogniser, keep and print."""
    from advkit.benchmarks.speech import evaluate_speech
    from advkit.benchmarks.speech_report import report
    from advkit.cli.progress import shares
    from advkit.errors import UsageError

    for name, default in FOREIGN.items():
        if getattr(arguments, name) != default:
            raise UsageError(f"--{name.replace('_', '-')} is for classifiers, and {arguments.model} is a recogniser of speech")
    if not arguments.attack or len(arguments.attack) > 1:
        raise UsageError("name one attack with --attack, as in hidden-voice, cw or pgd; advkit list speech-attacks")
    if arguments.data is None and not arguments.say:
        raise UsageError("there is nothing to attack with; give recordings with --data, or commands with --say")
    with shares() as tell:
        result = evaluate_speech(
            arguments.model,
            arguments.data,
            attack=arguments.attack[0],
            say=arguments.say or (),
            target=arguments.target,
            threat=arguments.threat,
            match=arguments.match,
            listener=arguments.listener,
            stand_in=arguments.stand_in,
            over=arguments.over or (),
            voice=arguments.voice,
            defend=arguments.defend or (),
            access=arguments.access,
            budget=arguments.budget,
            limit=arguments.limit,
            batch_size=arguments.batch_size or 1,
            device=arguments.device,
            seed=arguments.seed,
            out=arguments.out,
            report=tell,
        )
    show(result)
    if arguments.out is not None:
        print(f"{report(result, arguments.out / 'report')[0]}: the report, with the sounds")
    return 0


def write(arguments: argparse.Namespace) -> int:
    """Write the report of a run again, decide the gates, and say where it is."""
    from advkit.benchmarks.gates import Gate
    from advkit.benchmarks.speech_report import report
    from advkit.benchmarks.speech_result import Speech, decide

    result = Speech.load(arguments.folder)
    decided = [decide(Gate.parse(gate), result, strict=arguments.strict) for gate in arguments.require]
    for path in report(result, arguments.out or arguments.folder / "report", decided, arguments.title):
        print(path)
    return verdicts(decided)


def verdicts(decided: Sequence[Decision]) -> int:
    """Print what the gates decided; 1 where one fails the run, else 0."""
    for decision in decided:
        print(f"gate {decision.verdict}: {decision.sentence}")
    return 0 if all(decision.ok for decision in decided) else 1


MOST_ROWS = 30
"""How many sounds a table on the terminal has."""


def show(result: Speech) -> None:
    """Print what was found: the numbers, what was heard, and the controls."""
    from rich.markup import escape
    from rich.table import Table

    for note in result.notes:
        print(f"note: {note}")
    run = result.run
    first = Table(title=escape(f"{run['attack']} on {run['model']['name']}"), show_header=False)
    for name, value in lines(result):
        first.add_row(escape(name), escape(value))
    told = result.run["listener"] is not None
    second = Table("sound", "heard", "success", *(["the proxy hears"] if told else []), title="what was heard")
    for row in result.rows[:MOST_ROWS]:
        cells = (row["name"], row["after"], "yes" if row["success"] else "no", *([row["proxy"]] if told else []))
        second.add_row(*map(escape, cells))
    tables.show(first, second, controls(result))


def controls(result: Speech) -> Any:
    """The table of what the recogniser and the proxy hear in what was made and in the controls."""
    from rich.markup import escape
    from rich.table import Table

    from advkit.benchmarks.speech_report import SOUNDS

    proxy = ("proxy exact", "proxy wer") if result.run["listener"] else ()
    table = Table("sound", "sounds", "as wanted", "exact", "wer", *proxy, title="beside the controls")
    for row in result.controls():
        told = (share(row["proxy_exact"]), f"{row['proxy_wer']:.2f}") if proxy else ()
        rates = (share(row["success"]), share(row["exact"]), f"{row['wer']:.2f}")
        cells = (SOUNDS[row["sound"]], str(row["sounds"]), *rates, *told)
        table.add_row(*map(escape, cells))
    return table


def share(rate: dict[str, Any]) -> str:
    """A rate as a count and a share."""
    return f"{rate['count']} of {rate['of']}"


def lines(result: Speech) -> list[tuple[str, str]]:
    """The numbers of a run, by name."""
    from advkit.benchmarks.speech_report import WHAT

    found = [
        ("sounds", str(len(result.rows))),
        ("heard as wanted", str(result.success)),
        *([("heard as wanted, proxy word error rate >= 50 %", str(result.hidden))] if result.hidden else []),
    ]
    for name, what in WHAT.items():
        value = result.mean(name)
        if value is not None:
            found.append((what, f"{value.value:.4g}"))
    found += [(f"works over {row['channel']}", f"{row['count']} of {row['of']} draws") for row in result.channels()]
    return found
