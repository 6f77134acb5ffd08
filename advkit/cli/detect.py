"""``advkit detect``: how well detectors tell adversarial examples from clean ones."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from advkit.cli import tables

if TYPE_CHECKING:
    from advkit.benchmarks.detect import Detection

LIMIT = 500
"""How many examples are attacked where that is not said."""

EXAMPLES = """\
examples:
  advkit detect --model m.safetensors --data mnist-5k --detector "squeezing(bits=1)" --threat "linf(0.1)" --out run
  advkit detect --model m.safetensors --data mnist-5k --detector mahalanobis --detector likelihood --threat "l2(2)" --fpr 0.01

A detector learns from clean examples of the split train, and its threshold is set on others of these. Each is measured
twice: against an attack on the model alone, and against one that has to get past the detector as well.
"""


def add(commands: Any) -> None:
    """Add the command."""
    from advkit.cli import given

    command = commands.add_parser(
        "detect",
        help="whether a detector sees adversarial examples, also where the attack knows of it",
        description="Fit detectors to clean examples, and attack the model without and with the knowledge of each.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.add_argument("--model", required=True, help="a PyTorch model: advkit list models")
    command.add_argument("--data", required=True, help="advkit list data")
    command.add_argument(
        "--detector", required=True, action="append", help="squeezing, mahalanobis or likelihood, with settings; repeatable"
    )
    command.add_argument("--threat", required=True, help='what may change, and how far: "linf(8/255)"; advkit list threats')
    command.add_argument(
        "--attack", dest="attack_spec", help='on the model alone: advkit list attacks (default "pgd(steps=40)")'
    )
    command.add_argument("--adaptive", help='on model and detector together: an attack, or "selective(steps=100)" (default)')
    command.add_argument(
        "--fpr",
        type=float,
        default=0.05,
        help="the share of clean inputs that may be rejected, which sets the threshold (default 0.05)",
    )
    command.add_argument(
        "--fit", metavar="DATA", help="clean examples to learn from, their split train (default those of --data)"
    )
    command.add_argument(
        "--fit-limit",
        type=int,
        default=5000,
        metavar="N",
        help="at most N of these, a fifth of them for the threshold (default 5000)",
    )
    given.add_options(command, f"attack at most so many examples, classes in proportion (default {LIMIT})")
    command.add_argument("--batch-size", type=int, help="examples at a time")
    command.add_argument("--out", type=Path, metavar="DIR", help="a folder for the rows, summary.json and roc.png")
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Fit, attack and print."""
    from advkit import data as data_by_name
    from advkit.benchmarks.detect import ADAPTIVE, ATTACK, detect
    from advkit.cli import given
    from advkit.cli.progress import shares

    low, high = arguments.range or (None, None)
    fit = data_by_name.load(
        arguments.fit or arguments.data, split="train", seed=arguments.seed, size=arguments.size, low=low, high=high
    )
    with shares() as report:
        result = detect(
            given.model_of(arguments, arguments.model),
            given.data_of(arguments, LIMIT),
            detectors=arguments.detector,
            threat=arguments.threat,
            attack=arguments.attack_spec or ATTACK,
            adaptive=arguments.adaptive or ADAPTIVE,
            fpr=arguments.fpr,
            fit=fit,
            fit_limit=arguments.fit_limit,
            batch_size=arguments.batch_size,
            device=arguments.device,
            seed=arguments.seed,
            out=arguments.out,
            report=report,
        )
    for note in result.notes:
        print(f"note: {note}")
    show(result)
    return 0


def show(result: Detection) -> None:
    """Print what was found as a table, the classifier alone first."""
    from rich.markup import escape
    from rich.table import Table

    run = result.run
    what = f"{run['attack']}, adaptive {run['adaptive']}, in {run['threat']}"
    about = f"{what} on {run['data']['name']}, {run['data']['examples']} examples [95 %]"
    heads = ("AUC", "adversarial rejected", "robust accuracy")
    table = Table("detector", "attack", *heads, "clean rejected", "clean accuracy", title=escape(about))
    clean, robust = result.undefended()
    table.add_row("none", "", "-", "-", *(escape(str(cell)) for cell in (robust, "-", clean)))
    for found in result.found():
        naive = ("naive", found.auc_naive, found.tpr_naive, found.robust_naive, found.fpr, found.accuracy)
        adaptive = ("adaptive", found.auc_adaptive, found.tpr_adaptive, found.robust_adaptive, "", "")
        for name, cells in ((found.detector, naive), ("", adaptive)):
            table.add_row(escape(name), *("-" if cell is None else escape(str(cell)) for cell in cells))
    tables.show(table, width=160)
