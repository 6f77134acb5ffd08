"""``advkit compare``: whether a run's models are worse than another's."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from advkit.cli import tables

if TYPE_CHECKING:
    from advkit.benchmarks.compare import Comparison
    from advkit.benchmarks.records import Records

EXAMPLES = """\
examples:
  advkit compare main-run this-run --fail-if-worse
  advkit compare main-run this-run --fail-if-worse --alpha 0.01 --markdown comment.md
  advkit compare main-run this-run --pair old.safetensors=new.safetensors

Exit codes: 0 done, 1 worse with --fail-if-worse, 2 misuse.
"""


def add(commands: Any) -> None:
    """Add the command."""
    command = commands.add_parser(
        "compare",
        help="whether a run's models are worse than another's",
        description="Compare two runs on the same examples: which of the models in HEAD are worse than in BASE, and how sure.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.add_argument("base", type=Path, metavar="BASE", help="the folder of the run before")
    command.add_argument("head", type=Path, metavar="HEAD", help="the folder of the run after")
    command.add_argument("--fail-if-worse", action="store_true", help="exit with 1 where any line says worse")
    command.add_argument("--alpha", type=float, default=0.05, help="how often that may be wrong, over all lines (default 0.05)")
    command.add_argument(
        "--pair",
        action="append",
        metavar="OLD=NEW",
        help="a model of BASE and the one of HEAD to compare it with; may be repeated",
    )
    command.add_argument("--markdown", metavar="FILE", help="write the table as Markdown; - prints it in place of the table")
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Compare and print."""
    from advkit.benchmarks.compare import compare
    from advkit.benchmarks.records import load

    base, head = load(arguments.base), load(arguments.head)
    result = compare(base, head, alpha=arguments.alpha, pairs=pairs(arguments.pair, base, head))
    if arguments.markdown == "-":
        print(result.to_markdown(), end="")
    else:
        show(result)
    if arguments.markdown not in (None, "-"):
        Path(arguments.markdown).write_text(result.to_markdown(), encoding="utf-8")
    return int(arguments.fail_if_worse and result.worse)


def pairs(given: Sequence[str] | None, base: Records, head: Records) -> dict[str, str] | None:
    """What ``--pair`` says, for names that may hold ``=`` themselves.

    Raises:
        UsageError: A text is not two names of models joined by =, or a model of base is there twice.
    """
    from advkit.errors import UsageError

    found: dict[str, str] = {}
    for text in given or ():
        splits = [(text[:i], text[i + 1 :]) for i, character in enumerate(text) if character == "="]
        known = [(old, new) for old, new in splits if old in base.models and new in head.models]
        if not known:
            there = f"base has {', '.join(base.models)}; head has {', '.join(head.models)}"
            raise UsageError(f"--pair is {text!r}; it should be OLD=NEW: {there}")
        if known[0][0] in found:
            raise UsageError(f"--pair names {known[0][0]} twice; each model of base is compared once")
        found.update(known[:1])
    return found or None


def show(result: Comparison) -> None:
    """Print the comparison as a table."""
    from rich.markup import escape
    from rich.table import Table

    from advkit.benchmarks.compare import HEADS

    for note in result.notes:
        print(f"note: {note}")
    table = Table(*(escape(head) for head in HEADS), title=escape(f"{result.head} (head) beside {result.base} (base)"))
    for row in result.rows:
        table.add_row(*map(escape, row.cells()))
    tables.show(table, width=160)
    worse = [row for row in result.rows if row.verdict == "worse"]
    lines = [f"{row.head} is worse{f' than {row.base}' if row.base != row.head else ''} in {row.quantity}" for row in worse]
    print("; ".join(lines) if lines else f"nothing is shown to be worse, at alpha {result.alpha:g}")
