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
  advkit report run --require "robust[linf(0.1)] >= 40 %"
  advkit report spoken --require "success <= 20 %"

It writes report.html (one file, nothing is fetched), report.md, junit.xml, report.sarif, summary.json, results.csv and
examples.csv. In GitHub Actions the text is also appended to the summary of the step.
Of a recogniser of speech: report.html with the sounds, junit.xml, summary.json and sounds.csv.
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
    command.add_argument(
        "--require",
        action="append",
        default=[],
        metavar="GATE",
        help='exit with 1 where it fails: "success <= 20 %%"; repeatable',
    )
    command.add_argument("--strict", action="store_true", help="a gate that is not decided fails as well")
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Read, write and say where."""
    from advkit.benchmarks.speech_result import is_speech
    from advkit.cli import speech

    return speech.write(arguments) if is_speech(arguments.folder) else _classifier(arguments)


def _classifier(arguments: argparse.Namespace) -> int:
    from dataclasses import replace

    from advkit.benchmarks import records as runs
    from advkit.benchmarks.gates import Gate, decide, decisions
    from advkit.benchmarks.report import append_step_summary, report
    from advkit.cli.speech import verdicts

    records = runs.with_certificates(runs.load(arguments.folder), arguments.certificates)
    if arguments.title is not None:
        records = replace(records, title=arguments.title)
    asked = [one for gate in arguments.require for one in decide(Gate.parse(gate), records, strict=arguments.strict)]
    out = arguments.out or arguments.folder / "report"
    for path in report(records, out, [*decisions(records), *asked]):
        print(path)
    append_step_summary(out / "report.md")
    return verdicts(asked)
