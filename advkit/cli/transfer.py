"""``advkit transfer``: which model's adversarial examples fool which other."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from advkit.cli import tables

if TYPE_CHECKING:
    from advkit.benchmarks.transfer import TransferMatrix

EXAMPLES = """\
examples:
  advkit transfer --model a.safetensors --model b.safetensors --data mnist-5k --threat "linf(0.2)"
  advkit transfer --model a.safetensors --model net.py:load --model m.onnx --data test.npz --threat "linf(8/255)" --out who.csv
  advkit transfer --model a.safetensors --model b.safetensors --data mnist-5k --threat "l2(2)" --attack "vmi(mi-fgsm)"

Examples are made on each model and shown to every model once; a model without gradients is shown them and makes none.
"""


def add(commands: Any) -> None:
    """Add the command."""
    command = commands.add_parser(
        "transfer",
        help="which model's examples fool which other",
        description="Make adversarial examples on each model and show them to the others: who fools whom.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.add_argument("--model", required=True, action="append", help="advkit list models; two or more")
    command.add_argument("--data", required=True, help="advkit list data")
    command.add_argument("--threat", required=True, help='what may change, and how far: "linf(8/255)"; advkit list threats')
    command.add_argument("--attack", dest="attack_spec", help='advkit list attacks (default "di(mi-fgsm)")')
    command.add_argument("--split", default="test", help="the part of the data (default test)")
    command.add_argument("--limit", type=int, help="at most so many examples, classes in proportion")
    command.add_argument("--range", nargs=2, type=float, metavar=("LOW", "HIGH"), help="the range of the data's values")
    command.add_argument("--size", type=int, help="resize and crop images to this height and width")
    command.add_argument("--batch-size", type=int, help="examples at a time")
    command.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1 ...")
    command.add_argument("--seed", type=int, default=0, help="of every random draw (default 0)")
    command.add_argument("--probabilities", action="store_true", help="the models return probabilities")
    command.add_argument(
        "--trust-pickle", action="store_true", help="load pickled models: they can run any code on this machine"
    )
    command.add_argument("--out", type=Path, metavar="FILE.csv|DIR", help="a CSV file, or a folder for it and what was run")
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Make, show and print."""
    from advkit import data as data_by_name
    from advkit import models as models_by_name
    from advkit.benchmarks.transfer import ATTACK, check_out, transfer_matrix
    from advkit.cli.progress import shares
    from advkit.errors import UsageError

    if arguments.out is not None:
        check_out(arguments.out)
    if len(set(arguments.model)) < max(2, len(arguments.model)):
        raise UsageError(f"the models are {', '.join(arguments.model)}; give at least two with --model, each once")
    low, high = arguments.range or (None, None)
    options = {"split": arguments.split, "limit": arguments.limit, "seed": arguments.seed}
    data = data_by_name.load(arguments.data, **options, low=low, high=high, size=arguments.size)
    given = {"device": arguments.device, "trust_pickle": arguments.trust_pickle, "probabilities": arguments.probabilities}
    models = {spec: models_by_name.load(spec, **given) for spec in arguments.model}
    with shares() as report:
        result = transfer_matrix(
            models,
            data,
            threat=arguments.threat,
            attack=arguments.attack_spec or ATTACK,
            batch_size=arguments.batch_size,
            device=arguments.device,
            seed=arguments.seed,
            report=report,
        )
    for note in result.notes:
        print(f"note: {note}")
    show(result)
    if arguments.out is not None:
        result.save(arguments.out)
    return 0


def show(result: TransferMatrix) -> None:
    """Print the matrix as a table."""
    from rich.markup import escape
    from rich.table import Table

    about = f"{result.run['attack']} in {result.run['threat']} on {result.run['data']['name']}"
    names = short(result.targets)
    heads = [escape(f"on {names[target]}") for target in result.targets]
    table = Table("made on", *heads, title=escape(f"fooled, of those that both get right [95 %]: {about}"))
    for surrogate in result.surrogates:
        cells = [result.fooled.get((surrogate, target)) for target in result.targets]
        table.add_row(escape(names.get(surrogate, surrogate)), *("-" if cell is None else escape(str(cell)) for cell in cells))
    table.add_section()
    table.add_row("clean accuracy", *(escape(str(result.clean[target])) for target in result.targets))
    tables.show(table)


def short(names: tuple[str, ...]) -> dict[str, str]:
    """The last part of each path, where these differ."""
    last = {name: Path(name).name or name for name in names}
    return last if len(set(last.values())) == len(names) else {name: name for name in names}
