"""``advkit certify``: of which examples it is certain that no adversary changes the answer."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from advkit.cli import tables
from advkit.cli.given import add_options, data_of, model_of

if TYPE_CHECKING:
    from advkit.benchmarks.certify import Certification

EXAMPLES = """\
examples:
  advkit certify --model m.safetensors --data mnist-5k --threat "linf(0.1)" --method crown --out proof
  advkit certify --model m.safetensors --data mnist-5k --threat "linf(0.02)" --method complete --limit 100 --attack standard
  advkit certify --model noisy.safetensors --data mnist-5k --threat "l2(0.5)" --method "smoothing(sigma=0.5)" --limit 200

The robust accuracy is at least what is certified, and at most what --attack leaves. With --out, a run that was stopped goes
on when the same command is given again. Exit codes: 0 done, 1 a certified example was broken, 2 misuse.
"""


def add(commands: Any) -> None:
    """Add the command."""
    command = commands.add_parser(
        "certify",
        help="prove of which examples no adversary changes the answer",
        description="Prove, example by example, that nothing inside a radius changes the answer of a model.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.add_argument("--model", required=True, help="advkit list models")
    command.add_argument("--data", required=True, help="advkit list data")
    command.add_argument("--threat", required=True, help='what may change, and how far: "linf(0.1)", "l2(0.5)"')
    command.add_argument("--method", default="crown", help="how: ibp, crown (default), complete, smoothing(sigma=0.5) ...")
    command.add_argument(
        "--attack", action="append", help="attack the same examples too: advkit list attacks, or a suite; repeatable"
    )
    add_options(command, "at most so many examples, classes in proportion")
    command.add_argument("--out", type=Path, metavar="DIR", help="a folder for the rows, the summary and the attack")
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Certify, keep and print."""
    from advkit.benchmarks.certify import certify
    from advkit.cli.progress import shares

    with shares() as report:
        result = certify(
            model_of(arguments, arguments.model),
            data_of(arguments),
            threat=arguments.threat,
            method=arguments.method,
            attacks=arguments.attack,
            device=arguments.device,
            seed=arguments.seed,
            out=arguments.out,
            report=report,
        )
    for note in result.notes:
        print(f"note: {note}")
    show(result)
    if arguments.out is not None and (curve := result.curve()):
        from advkit.benchmarks.pictures import save_curve

        save_curve(curve, result.accuracy.value, f"certified radius, {result.run['method']}", arguments.out / "curve.png")
    for index in result.violations:
        print(f"error: example {index} is certified and was broken; {_why(result)}", file=sys.stderr)
    return int(bool(result.violations))


def _why(result: Certification) -> str:
    if result.smoothed:
        return "by chance this may be so for a share alpha of the examples; for more, it is an error of the program"
    return "this is an error of the program: please report it with the model"


def show(result: Certification) -> None:
    """Print what is certain as tables."""
    from rich.markup import escape
    from rich.table import Table

    run = result.run
    title = f"{run['model']['name']} on {run['data']['name']}, {run['threat']}, {run['method']}"
    table = Table(title=escape(title), show_header=False)
    for name, value in _lines(result):
        table.add_row(escape(name), escape(value))
    shown = [table]
    if curve := result.curve():
        over = Table("radius", escape("certified accuracy [95 %]"), title="certified accuracy over the radius")
        for row in curve:
            share = f"{100 * row['value']:.2f} % [{100 * row['low']:.2f}, {100 * row['high']:.2f}]"
            over.add_row(f"{row['eps']:g}", escape(share))
        shown.append(over)
    tables.show(*shown)


def _lines(result: Certification) -> list[tuple[str, str]]:
    under = " under noise" if result.smoothed else ""
    lines = [
        ("examples", str(len(result.rows))),
        (f"clean accuracy{under}", str(result.accuracy)),
        ("certified accuracy", str(result.certified_accuracy)),
    ]
    if result.smoothed:
        lines.insert(2, ("abstained", str(result.abstained)))
    attacked, interval = result.attacked_accuracy, result.robust_interval
    if attacked and interval:
        ends = f"from {100 * result.certified_accuracy.value:.2f} % (certified) to {100 * attacked.value:.2f} % (attacked)"
        lines.append(("not known to be broken", str(attacked)))
        lines.append((f"robust accuracy{under}", f"{ends} [{100 * interval[0]:.2f}, {100 * interval[1]:.2f}]"))
    if result.mean_radius is not None:
        lines.append(("mean certified radius", f"{result.mean_radius:.4g}"))
    seconds = sum(row["seconds"] for row in result.rows)
    lines.append(("seconds", f"{seconds:.1f}, {seconds / len(result.rows):.3g} an example"))
    return lines
