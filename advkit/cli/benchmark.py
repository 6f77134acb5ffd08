"""``advkit benchmark``: models against threat models, as a suite says, with reports and gates."""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from advkit.cli import tables

if TYPE_CHECKING:
    from collections.abc import Sequence

    from advkit.benchmarks.gates import Decision
    from advkit.benchmarks.records import Records
    from advkit.benchmarks.suitefile import Suite

EXAMPLES = """\
examples:
  advkit benchmark quick --model m.safetensors --data mnist-5k --out bench
  advkit benchmark suite.toml --out bench --require "robust[linf(0.1)] >= 0.45"
  advkit benchmark standard-linf --model old=a.safetensors --model new=b.safetensors --data images/ --out bench --device cuda
  advkit benchmark suite.toml --out bench --require "robust[linf(0.1)] >= 0.45" --sequential

SUITE is a TOML file, or one that advkit ships: advkit list benchmarks. The folder gets the rows, and in report/ a page,
Markdown, JSON, JUnit, SARIF and CSV. A run that was stopped goes on when the same command is given again, and
what does not depend on a change is not run again. Exit codes: 0 done, 1 a gate failed, 2 misuse.
"""


def add(commands: Any) -> None:
    """Add the command."""
    command = commands.add_parser(
        "benchmark",
        help="measure models as a suite says",
        description="Measure models against threat models, as a suite says: the trade-off, the evidence, and gates for CI.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.add_argument("suite", metavar="SUITE", help="a TOML file, or the name of a suite: advkit list benchmarks")
    command.add_argument("--out", type=Path, required=True, metavar="DIR", help="a folder for the rows and the reports")
    command.add_argument(
        "--model", action="append", metavar="[NAME=]MODEL", help="a model beside those of the suite; repeatable"
    )
    command.add_argument("--data", help="the data in place of the suite's; advkit list data")
    command.add_argument("--limit", type=int, help="at most so many examples, in place of the suite's limit")
    command.add_argument("--alone", action="store_true", default=None, help="every attack meets every example")
    command.add_argument("--require", action="append", default=[], metavar="GATE", help='as in "robust[linf(8/255)] >= 0.45"')
    command.add_argument("--strict", action="store_true", help="a gate that is not decided fails as well")
    command.add_argument("--sequential", action="store_true", help="stop as soon as every gate is decided")
    command.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1 ...")
    command.add_argument("--block", type=int, metavar="N", help="examples that are kept at a time")
    command.add_argument("--fast", action="store_true", default=None, help="attack a copy in bfloat16; the model confirms")
    command.add_argument("--compile", action="store_true", default=None, help="with --fast: translate that copy first")
    command.add_argument("--engine", choices=("local", "ray"), default="local", help="who does the work (default local)")
    command.add_argument("--markdown", type=Path, metavar="FILE", help="keep the suite's table in this file current")
    command.add_argument(
        "--reference", type=Path, action="append", default=[], metavar="FILE", help="with --markdown: RobustBench's model_info"
    )
    command.add_argument("--probabilities", action="store_true", help="the models return probabilities")
    command.add_argument(
        "--trust-pickle", action="store_true", help="load pickled models: they can run any code on this machine"
    )
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the suite, write the reports, and decide the gates."""
    from advkit.benchmarks import runner
    from advkit.benchmarks.gates import decisions
    from advkit.benchmarks.report import append_step_summary, report
    from advkit.cli.progress import shares
    from advkit.processes import group

    with shares() as tell:
        records = runner.run(
            _suite(arguments),
            out=arguments.out,
            models=_models(arguments.model or ()),
            data=arguments.data,
            device=arguments.device,
            engine=arguments.engine,
            require=arguments.require,
            strict=arguments.strict,
            sequential=arguments.sequential,
            trust_pickle=arguments.trust_pickle,
            probabilities=arguments.probabilities,
            command=shlex.join(["advkit", *getattr(arguments, "typed", ())]),
            report=lambda status: tell(status.share, status.text),
        )
    if group()[0] > 0:
        return 0
    decided = decisions(records)
    written = report(records, arguments.out / "report", decided)
    append_step_summary(arguments.out / "report" / "report.md")
    show(records, decided)
    if arguments.markdown is not None:
        from advkit.benchmarks.leaderboard import update

        update(arguments.markdown, records, arguments.reference)
    print(f"{written[0]}: the report")
    return 0 if all(decision.ok for decision in decided) else 1


def _suite(arguments: argparse.Namespace) -> Suite:
    from advkit.benchmarks import suitefile
    from advkit.spec import check_whole

    for name in ("limit", "block"):
        if getattr(arguments, name) is not None:
            check_whole(f"--{name}", getattr(arguments, name), 1)
    options = {name: getattr(arguments, name) for name in ("limit", "alone", "block", "fast", "compile")}
    return suitefile.changed(suitefile.read(arguments.suite), **options)


def _models(given: Sequence[str]) -> dict[str, str]:
    """The specs of models by their names."""
    from advkit.errors import UsageError

    models: dict[str, str] = {}
    for name, model in map(_named, given):
        if name in models:
            raise UsageError(f"{models[name]} and {model} are both called {name}; give each a name: --model NAME={model}")
        models[name] = model
    return models


def _named(given: str) -> tuple[str, str]:
    """The name and the spec of a model: what is before ``=``, else the name of its file."""
    name, equals, model = given.partition("=")
    if equals and re.fullmatch(r"[\w.-]+", name) and not Path(given).exists():
        return name, model
    return Path(given.partition("(")[0]).stem or given, given


def show(records: Records, decisions: Sequence[Decision] = ()) -> None:
    """Print what was found as tables."""
    from rich.markup import escape
    from rich.table import Table

    for note in records.notes:
        print(f"note: {note}")
    table = Table("model", "clean", "threat", escape("robust accuracy [95 %]"), "checks", title=escape(records.title))
    for model in records.models:
        for family in records.families:
            suspect = "suspect" if records.suspect(model, family) else ""
            for eps in records.columns(family):
                rates = (records.clean_accuracy(model), records.robust(model, family, eps))
                cells = (model, str(rates[0]), records.threat(family, eps), str(rates[1]), suspect)
                table.add_row(*map(escape, cells))
    tables.show(table)
    _show_findings(records)
    for decision in decisions:
        print(f"gate {decision.verdict}: {decision.sentence}")


def _show_findings(records: Records) -> None:
    """Print what the checks found that is not fine, with the next command."""
    for finding in records.findings:
        if finding.severity != "fine":
            said = "; ".join(part for part in (finding.evidence.rstrip("."), finding.advice) if part)
            print(f"{finding.severity}: {finding.model}, {finding.threat}, {finding.check}: {said}")
            if finding.command:
                print(f"  {finding.command}")
