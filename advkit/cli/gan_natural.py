"""``advkit gan judge``: whether adversarial examples still show what they should."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from advkit.benchmarks.result import Evaluation
    from advkit.gan.naturalness import Opinion, Scores

EXAMPLES = """\
examples:
  advkit gan judge run --judge other.safetensors --judge third.safetensors --generator g.safetensors

RUN is the folder of advkit attack --out RUN. A judge is a classifier that was trained apart from the attacked model. What it
says of the successes is written to judge.json in the folder.
"""


def add(commands: Any) -> None:
    """Add the command."""
    command = commands.add_parser(
        "judge",
        help="say how natural found examples are: other classifiers, and a discriminator",
        description="Say of how many adversarial examples of a run other classifiers still see the label.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.add_argument("folder", type=Path, metavar="RUN", help="the folder that advkit attack --out wrote")
    command.add_argument(
        "--judge", action="append", required=True, metavar="MODEL", help="a classifier: advkit list models; repeatable"
    )
    command.add_argument("--generator", type=Path, metavar="FILE", help="a generator whose discriminator scores them too")
    command.add_argument("--seed", type=int, default=0, help="of the generator's samples (default 0)")
    command.add_argument("--device", default="cpu", help="of the judges: cpu (default), cuda, cuda:1 ...")
    command.add_argument("--probabilities", action="store_true", help="the judges return probabilities")
    command.add_argument(
        "--trust-pickle", action="store_true", help="load a pickled model: it can run any code on this machine"
    )
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Ask the judges, print and keep what they say."""
    import torch

    from advkit import models as models_by_name
    from advkit.benchmarks.plan import dtype_of
    from advkit.benchmarks.result import Evaluation
    from advkit.data.dataset import check_seed
    from advkit.errors import UsageError
    from advkit.gan import pair
    from advkit.gan.naturalness import opinion, scores

    check_seed(arguments.seed)
    evaluation = Evaluation.load(arguments.folder)
    rows = torch.tensor([i for i, row in enumerate(evaluation.rows) if row["success"]], dtype=torch.int64)
    if not len(rows):
        raise UsageError(f"no attack of {arguments.folder} succeeded, so there is nothing to judge")
    tensors = evaluation.examples()
    y, said = (torch.tensor([evaluation.rows[i][key] for i in rows.tolist()]) for key in ("label", "adversarial"))
    x, z = tensors["x"][rows], tensors["x_adv"][rows]
    given = {"device": arguments.device, "trust_pickle": arguments.trust_pickle, "probabilities": arguments.probabilities}
    judges = [models_by_name.load(name, **given) for name in arguments.judge]
    for judge in judges:
        if judge.digest == evaluation.run["model"]["digest"]:
            raise UsageError(f"the judge {judge.name} is the attacked model; give one that was trained apart from it")
    place = models_by_name.find_device(arguments.device)
    y, said = y.to(place), said.to(place)
    opinions = [opinion(judge, x.to(place, dtype_of(judge)), z.to(place, dtype_of(judge)), y, said) for judge in judges]
    found = None
    if arguments.generator is not None:
        labels = torch.tensor([row["label"] for row in evaluation.rows])
        rng = torch.Generator().manual_seed(arguments.seed)
        found = scores(pair.read(arguments.generator)[0], tensors["x"], labels, z, y.cpu(), rng)
    _show(evaluation, opinions, found)
    _save(arguments, evaluation, opinions, found)
    return 0


def _unmoved(evaluation: Evaluation) -> int:
    """How many successes are at distance 0: with a latent threat model, drawings that the model is wrong about as they are."""
    return sum(row["success"] and row["distance"] == 0 for row in evaluation.rows)


def _show(evaluation: Evaluation, opinions: Sequence[Opinion], found: Scores | None) -> None:
    from rich.markup import escape
    from rich.table import Table

    from advkit.benchmarks.statistics import rate
    from advkit.cli import tables
    from advkit.gan.naturalness import together

    n = opinions[0].of
    table = Table("judge", "still the label", "what the model says", "the label, before", title=f"{n} successes")
    for one in opinions:
        table.add_row(escape(one.judge), *(str(rate(count, one.of)) for count in (one.label, one.fooled, one.clean)))
    if len(opinions) > 1:
        table.add_row("all of them", str(rate(together(opinions), n)), "", "")
    tables.show(table, width=140)
    if (unmoved := _unmoved(evaluation)) > 0:
        print(f"{unmoved} of them are at distance 0: the model is wrong about what the search started from")
    if found is not None:
        above = rate(found.examples, found.of_examples), rate(found.samples, found.of_samples)
        print(f"the discriminator takes for data: 95 % of the data, {above[0]} of the successes, {above[1]} of plain samples")


def _save(arguments: argparse.Namespace, evaluation: Evaluation, opinions: Sequence[Opinion], found: Scores | None) -> None:
    from advkit.benchmarks.statistics import rate
    from advkit.gan.naturalness import together
    from advkit.version import __version__

    judges = [
        {
            "model": one.judge,
            "digest": one.digest,
            **{key: rate(getattr(one, key), one.of).to_json() for key in ("label", "fooled", "clean")},
        }
        for one in opinions
    ]
    discriminator = (
        None
        if found is None
        else {
            "generator": str(arguments.generator),
            "threshold": found.threshold,
            "successes": rate(found.examples, found.of_examples).to_json(),
            "samples": rate(found.samples, found.of_samples).to_json(),
        }
    )
    about = {
        "schema": "advkit/judge/1",
        "advkit": __version__,
        "successes": opinions[0].of,
        "at_distance_0": _unmoved(evaluation),
        "judges": judges,
        "together": rate(together(opinions), opinions[0].of).to_json(),
        "discriminator": discriminator,
    }
    (arguments.folder / "judge.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
