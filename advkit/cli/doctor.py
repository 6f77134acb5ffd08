"""``advkit doctor``: can the robust accuracy that an attack gives be trusted?"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from advkit.cli import tables
from advkit.cli.given import add_options, data_of, model_of

if TYPE_CHECKING:
    from advkit.benchmarks.findings import Finding

EXAMPLES = """\
examples:
  advkit doctor m.safetensors --data mnist-5k --threat "linf(0.3)"
  advkit doctor net.py:load --data test.npz --threat "linf(8/255)" --attack "apgd(steps=50)"
  advkit doctor m.onnx --data test.npz --threat "linf(8/255)" --attack pgd --surrogate net.safetensors --json

Exit codes: 0 nothing suspect, 1 the robust accuracy is too high, 2 misuse. A check that finds nothing proves nothing.
"""


def add(commands: Any) -> None:
    """Add the command."""
    command = commands.add_parser(
        "doctor",
        help="whether an attack fails where the model should",
        description="Look for signs that an attack fails on a model, so that the robust accuracy it gives is too high.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.add_argument("model", metavar="MODEL", help="advkit list models")
    command.add_argument("--data", required=True, help="advkit list data")
    command.add_argument("--threat", required=True, help='what may change, and how far: "linf(8/255)"; advkit list threats')
    command.add_argument("--attack", action="append", help="what the evaluation relies on (default pgd(steps=40)); repeatable")
    command.add_argument("--surrogate", metavar="MODEL", help="the model that the evaluation makes its examples on")
    command.add_argument("--access", choices=("gradients", "scores", "labels"), help="what the adversary sees (default: all)")
    add_options(command, "at most so many examples, classes in proportion (default 64)")
    command.add_argument("--json", action="store_true", help="print the findings as JSON")
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Check and print."""
    from advkit.benchmarks.doctor import EXAMPLES, diagnose
    from advkit.benchmarks.plan import plan
    from advkit.benchmarks.report import finding_row
    from advkit.combine import Worst

    data = data_of(arguments, EXAMPLES)
    model = model_of(arguments, arguments.model)
    surrogate = None if arguments.surrogate is None else model_of(arguments, arguments.surrogate).module
    planned = plan(
        model,
        data,
        threat=arguments.threat,
        attacks=arguments.attack,
        access=arguments.access,
        device=arguments.device,
        seed=arguments.seed,
    )
    attacks = tuple(attack for _, attack in planned.attacks) if arguments.attack else ()
    x, y = data.batch(0, len(data))
    found = diagnose(
        model,
        x.to(planned.device, planned.dtype),
        y.to(planned.device),
        planned.threat,
        attack=Worst(attacks) if len(attacks) > 1 else next(iter(attacks), None),
        surrogate=surrogate,
        access=planned.access,
        seed=arguments.seed,
        data=arguments.data,
    )
    if arguments.json:
        print(json.dumps([finding_row(finding) for finding in found], indent=2, allow_nan=False))
    else:
        for note in planned.notes:
            print(f"note: {note}")
        show(found, f"{model.name} on {data.name}, {arguments.threat}")
    return int(any(finding.severity == "suspect" for finding in found))


def show(found: Sequence[Finding], title: str) -> None:
    """Print the findings as a table, then what to do about those that fired."""
    from rich.markup import escape
    from rich.table import Table

    table = Table("check", "verdict", "evidence", title=escape(title))
    for finding in found:
        table.add_row(finding.check, finding.severity, escape(finding.evidence))
    tables.show(table)
    for finding in found:
        if finding.severity != "fine":
            print(f"{finding.check}: {finding.advice}\n  {finding.command}")
