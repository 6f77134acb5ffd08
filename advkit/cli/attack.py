"""``advkit attack``: how robust a model is, and the adversarial examples."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from advkit.cli import speech, tables
from advkit.cli.given import add_options, behind, data_of, model_of

if TYPE_CHECKING:
    from advkit.benchmarks.result import Evaluation

EXAMPLES = """\
examples:
  advkit attack --model m.safetensors --data mnist-5k --threat "linf(0.3)" --out run
  advkit attack --model m.safetensors --data mnist-5k --threat l2 --out closest      (no radius: the closest examples)
  advkit attack --model net.py:load --data images/ --threat "linf(8/255)" --attack "pgd(steps=40)" --attack square --limit 500
  advkit attack --model m.onnx --data test.npz --threat "linf(8/255)" --access scores --budget 1000
  advkit attack --model m.safetensors --defend "jpeg(quality=75)" --data mnist-5k --threat "linf(0.1)" --limit 200
  advkit attack --model hf:org/name --data hf:org/data --threat "linf(4/255)" --target least-likely --limit 100

  advkit attack --model pocketsphinx --attack "hidden-voice(frames=4)" --say "turn on airplane mode" --out DIR
  advkit attack --model whisper:FOLDER --data clip.wav --target "open the front door" --attack cw --threat "snr(30)" --out DIR

Several attacks count together, example by example: cheap ones first, later ones on what is left. With --out, a run that
was stopped goes on when the same command is given again.
"""


def add(commands: Any) -> None:
    """Add the command."""
    command = commands.add_parser(
        "attack",
        help="attack a model on data",
        description="Attack a model on data: how robust it is, how sure that is, and the adversarial examples.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.add_argument("--model", required=True, help="advkit list models")
    command.add_argument(
        "--defend", action="append", metavar="DEFENSE", help='put the model behind it: "jpeg(quality=75)"; repeatable, in order'
    )
    command.add_argument("--data", help="advkit list data; for a recogniser, a sound or a folder of them")
    command.add_argument("--threat", help='what may change, and how far: "linf(8/255)", "snr(30)"; advkit list threats')
    command.add_argument(
        "--attack", action="append", help="advkit list attacks; or a suite: standard (default), fast, black-box; repeatable"
    )
    command.add_argument(
        "--target", help="push to a class: 3, next, random or least-likely; for a recogniser, what it should hear"
    )
    command.add_argument("--access", choices=("gradients", "scores", "labels"), help="what the adversary sees (default: all)")
    command.add_argument("--budget", type=int, help="the most forward passes of each attack for an example")
    add_options(command, "at most so many examples, classes in proportion")
    command.add_argument("--batch-size", type=int, help="examples at a time")
    command.add_argument(
        "--quantize",
        action=argparse.BooleanOptionalAction,
        help="round successes to 8 bits inside the ball and test them again (default: for 8-bit images)",
    )
    command.add_argument("--alone", action="store_true", help="run every attack on every example and report each alone too")
    command.add_argument(
        "--votes", type=int, metavar="N", help="a random model: most of N answers decide (default 1; with --defend, 5)"
    )
    command.add_argument("--fast", action="store_true", help="attack a copy in bfloat16; the model confirms every success")
    command.add_argument("--compile", action="store_true", help="with --fast: translate that copy with torch.compile first")
    command.add_argument("--pictures", type=int, default=64, metavar="N", help="how many PNG pictures to save (default 64)")
    command.add_argument("--out", type=Path, metavar="DIR", help="a folder for the rows, examples, pictures and summary")
    speech.add_options(command)
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Attack, keep and print."""
    from advkit.audio.loading import is_recogniser

    if is_recogniser(arguments.model):
        return speech.run(arguments)
    speech.refuse(arguments)
    from advkit.benchmarks.evaluate import execute
    from advkit.benchmarks.plan import plan
    from advkit.cli.progress import attacking
    from advkit.spec import check_whole

    check_whole("--pictures", arguments.pictures, 0)
    data = data_of(arguments)
    model = behind(model_of(arguments, arguments.model), arguments.defend or [], data)
    planned = plan(
        model,
        data,
        threat=arguments.threat,
        attacks=arguments.attack,
        goal="untargeted" if arguments.target is None else arguments.target,
        access=arguments.access,
        budget=arguments.budget,
        batch_size=arguments.batch_size,
        device=arguments.device,
        seed=arguments.seed,
        quantize=arguments.quantize,
        alone=arguments.alone,
        votes=arguments.votes,
        fast=arguments.fast,
        compile=arguments.compile,
        adaptive=True,
    )
    for note in planned.notes:
        print(f"note: {note}")
    with attacking() as report:
        result = execute(planned, arguments.out, report)
    for note in result.notes[len(planned.notes) :]:
        print(f"note: {note}")
    show(result)
    if arguments.out is not None:
        _draw(result, arguments.out, arguments.pictures)
    return 0


def _draw(result: Evaluation, out: Path, pictures: int) -> None:
    from advkit.benchmarks.pictures import save_curve, save_pictures

    save_pictures(result, out, pictures)
    curve = result.summary()["curve"]
    if curve:
        save_curve(curve, result.clean_accuracy.value, f"radius, {result.run['threat']}", out / "curve.png")


def show(result: Evaluation) -> None:
    """Print what was found as tables."""
    from rich.markup import escape
    from rich.table import Table

    summary = result.summary()
    title = f"{result.run['model']['name']} on {result.run['data']['name']}, {result.run['threat']}"
    table = Table(title=escape(title), show_header=False)
    for name, value in _lines(result, summary):
        table.add_row(escape(name), escape(value))
    shown = [table, _attack_table(summary["attacks"])]
    if summary["curve"]:
        curve = Table("radius", escape("robust accuracy [95 %]"), title="robust accuracy over the radius")
        for row in summary["curve"]:
            curve.add_row(f"{row['eps']:g}", escape(_percent(row)))
        shown.append(curve)
    tables.show(*shown)


def _lines(result: Evaluation, summary: dict[str, Any]) -> list[tuple[str, str]]:
    from advkit.threat import BALLS

    robust = "robust accuracy" if result.run["goal"] == "untargeted" else f"not pushed to target {result.run['goal']}"
    lines = [
        ("examples", str(summary["examples"])),
        ("clean accuracy", str(result.clean_accuracy)),
    ]
    if result.robust_accuracy_naive is None:
        lines.append((robust, str(result.robust_accuracy)))
    else:
        lines.append((f"{robust} (naive attacks only)", str(result.robust_accuracy_naive)))
        lines.append((f"{robust} (adaptive too)", str(result.robust_accuracy)))
    if result.robust_accuracy_once is not None:
        lines.append((f"{robust}, never fooled once", str(result.robust_accuracy_once)))
    if result.robust_accuracy_8bit is not None:
        bits = 16 if result.run["data"]["kind"] == "waveform" else 8
        lines.append((f"{robust}, as {bits}-bit files", str(result.robust_accuracy_8bit)))
    lines.append(("attack success, of those right", str(result.success_rate)))
    distance = "distance" if result.run["threat"].split("(")[0] in BALLS else "size of the change"
    lines.append((f"{distance}, quantiles of those right", _quantiles(summary["distance"], "unbroken")))
    lines.append(("forward passes, of those broken", _quantiles(summary["forwards_of_broken"], "-")))
    checks = f"{summary['forwards']} forward, {summary['backwards']} backward, {summary['checks']} to check"
    lines.append(("passes", checks))
    lines.append(("seconds", f"{summary['seconds']:.1f}"))
    return lines


def _quantiles(values: dict[str, float | None] | None, missing: str) -> str:
    if values is None:
        return "-"
    names = {"q50": "median"}
    return ", ".join(f"{names.get(k, k)} {missing if v is None else format(v, '.4g')}" for k, v in values.items())


def _percent(row: dict[str, float]) -> str:
    return f"{100 * row['value']:.2f} % [{100 * row['low']:.2f}, {100 * row['high']:.2f}]"


def _attack_table(attacks: list[dict[str, Any]]) -> Any:
    from rich.markup import escape
    from rich.table import Table

    alone = any(row["robust_accuracy_alone"] for row in attacks)
    table = Table("attack", "run on", "broke", "counted", *(["robust accuracy alone"] if alone else []), "passes", "seconds")
    for row in attacks:
        percent = _percent(row["robust_accuracy_alone"]) if row["robust_accuracy_alone"] else "-"
        passes = str(row["forwards"] + row["backwards"])
        cells = [row["attack"], str(row["examples"]), str(row["broke"]), str(row["counted"]), *([percent] if alone else [])]
        table.add_row(*(escape(cell) for cell in cells), passes, f"{row['seconds']:.1f}")
    return table
