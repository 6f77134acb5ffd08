"""``advkit report``: what a run found, as a page, a text, tables and files for CI."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

EXAMPLES = """\
examples:
  advkit report run
  advkit report run --out public --title "Release 2.1"
  advkit report run --certificates proof

It writes report.html (one file, nothing is fetched), report.md, junit.xml, report.sarif, summary.json, results.csv and
examples.csv. In GitHub Actions the text is also appended to the summary of the step.
"""


def add(commands: Any) -> None:
    """Add the command."""
    command = commands.add_parser(
        "report",
        help="write the report of a run",
        description="Write the report of a run, from its rows alone.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.add_argument("folder", type=Path, metavar="DIR", help="what advkit benchmark or advkit attack wrote")
    command.add_argument("--out", type=Path, metavar="DIR", help="where the report goes (default DIR/report)")
    command.add_argument("--title", help="the title of the report (default that of the run)")
    command.add_argument(
        "--certificates",
        type=Path,
        action="append",
        default=[],
        metavar="DIR",
        help="what advkit certify wrote of the same model, data and threat model; repeatable",
    )
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Read, write and say where."""
    from dataclasses import replace

    from advkit.benchmarks import records as runs
    from advkit.benchmarks.gates import decisions
    from advkit.benchmarks.report import append_step_summary, report

    records = runs.with_certificates(runs.load(arguments.folder), arguments.certificates)
    if arguments.title is not None:
        records = replace(records, title=arguments.title)
    out = arguments.out or arguments.folder / "report"
    for path in report(records, out, decisions(records)):
        print(path)
    append_step_summary(out / "report.md")
    return 0
