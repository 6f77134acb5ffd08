"""What ``advkit patch`` and ``advkit universal`` share: one change is learned from some examples and tried on others."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from advkit.cli import tables
from advkit.cli.pictures import save_image

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from advkit.benchmarks.statistics import Rate
    from advkit.data import Data
    from advkit.models import Model
    from advkit.stochastic import Progress

BATCH = 250
"""How many examples are tried at a time."""


def add_options(command: Any, steps: int) -> None:
    """Add the options that both commands have."""
    command.add_argument("--model", required=True, help="the model to learn from: advkit list models")
    command.add_argument(
        "--data", required=True, help="advkit list data; learns from the split train, or from half of the rest"
    )
    command.add_argument(
        "--transfer-to", action="append", default=[], metavar="MODEL", help="try it on this one too; repeatable"
    )
    command.add_argument("--split", default="test", help="the part of the data that it is tried on (default test)")
    command.add_argument(
        "--fit-limit", type=int, default=5000, metavar="N", help="learn from at most N examples (default 5000)"
    )
    command.add_argument("--limit", type=int, default=1000, metavar="N", help="try at most N examples (default 1000)")
    command.add_argument("--steps", type=int, default=steps, help=f"batches to learn from (default {steps})")
    command.add_argument("--batch-size", type=int, default=64, help="examples in a batch (default 64)")
    command.add_argument("--range", nargs=2, type=float, metavar=("LOW", "HIGH"), help="the range of the data's values")
    command.add_argument("--size", type=int, help="resize and crop images to this height and width")
    command.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1 ...")
    command.add_argument("--seed", type=int, default=0, help="of every random draw (default 0)")
    command.add_argument("--probabilities", action="store_true", help="the models return probabilities")
    command.add_argument(
        "--trust-pickle", action="store_true", help="load a pickled model: it can run any code on this machine"
    )
    command.add_argument("--out", type=Path, metavar="DIR", help="a folder for the tensor, the pictures and the summary")


@dataclass(frozen=True)
class Task:
    """What is given: the models, the first of which is learned from, and the data.

    Attributes:
        models: The models.
        fit: The examples to learn from.
        test: Those to try, none of which is among the former.
        seed: Of every random draw.
        device: Where it runs.
    """

    models: tuple[Model, ...]
    fit: Data
    test: Data
    seed: int
    device: torch.device

    def examples(self) -> tuple[Tensor, Tensor]:
        """What is learned from."""
        x, y = self.fit.batch(0, len(self.fit))
        return x.to(self.device), y.to(self.device)

    def generator(self) -> torch.Generator:
        """Where the fit's random draws come from."""
        import torch

        return torch.Generator().manual_seed(self.seed)


def task(arguments: argparse.Namespace) -> Task:
    """Load the models and the data, and look at them."""
    from advkit import models as models_by_name
    from advkit.data.dataset import check_seed

    check_seed(arguments.seed)
    device = models_by_name.find_device(arguments.device)
    fit, test = _parts(arguments)
    given = {"trust_pickle": arguments.trust_pickle, "probabilities": arguments.probabilities}
    named = [arguments.model, *arguments.transfer_to]
    loaded = tuple(models_by_name.load(name, device=arguments.device, **given) for name in named)
    x, _ = test.batch(0, 8)
    for model in loaded:
        for note in (*model.notes, *models_by_name.inspect(model, x.to(device), test.y, len(test.classes))):
            print(f"note: {model.name}: {note}")
    return Task(loaded, fit, test, arguments.seed, device)


def _parts(arguments: argparse.Namespace) -> tuple[Data, Data]:
    """The examples to learn from and those to try: two splits, or where there is one only, its halves."""
    import torch

    from advkit import data as data_by_name
    from advkit.errors import UsageError

    low, high = arguments.range or (None, None)
    given = {"seed": arguments.seed, "low": low, "high": high, "size": arguments.size}
    test = data_by_name.load(arguments.data, split=arguments.split, **given)
    try:
        fit = data_by_name.load(arguments.data, split="train", **given)
    except UsageError:
        fit = test
    if len(fit) == len(test) and torch.equal(fit.y, test.y):
        if len(test) < 2:
            raise UsageError(f"{test.name} has {len(test)} examples; it should have some to learn from and others to try")
        order = torch.randperm(len(test), generator=torch.Generator().manual_seed(arguments.seed))
        fit, test = (test.select(half.sort().values) for half in order.chunk(2))
        print(f"note: {test.name} has one split: half of it is learned from, and the other half is tried")
    return fit.limited(arguments.fit_limit, arguments.seed), test.limited(arguments.limit, arguments.seed)


def fitted(fit: Callable[[Callable[[Progress], None]], Tensor]) -> tuple[Tensor, int]:
    """The change that ``fit`` returns, or where it is interrupted, the one so far; and after how many steps."""
    from advkit.cli.progress import fitting

    last: Progress | None = None
    with fitting() as tell:

        def report(at: Progress) -> None:
            nonlocal last
            last = at
            tell(at)

        try:
            fit(report)
        except KeyboardInterrupt:
            if last is None:
                raise
    assert last is not None
    if last.step < last.steps:
        print(f"note: stopped after step {last.step} of {last.steps}; what follows is the change as it was then")
    return last.theta, last.step


@dataclass(frozen=True)
class Outcome:
    """What a change does to a model, on the examples that count.

    Attributes:
        model: The model's name.
        before: The share that met the goal without the change.
        success: The share that meets it with the change.
        accuracy_before: The share of all examples that the model gets right without the change.
        accuracy: With it.
    """

    model: str
    before: Rate
    success: Rate
    accuracy_before: Rate
    accuracy: Rate


def tried(
    task: Task, change: Callable[[Tensor, Tensor], Tensor], target: int | None
) -> tuple[list[Outcome], list[tuple[int, int, int, Tensor, Tensor]]]:
    """What the change does to each model, and the first few successes on the first: number, label, answer, before, after.

    With a target, the examples of other classes count; without, those that the model gets right.

    Arguments:
        task: The models and the examples.
        change: Inputs (N, *) and their numbers (N,) to changed inputs.
        target: The class that the models should see; None for any wrong one.
    """
    import torch

    from advkit.benchmarks.statistics import rate
    from advkit.errors import UsageError

    test = task.test
    if target is not None and bool((test.y == target).all()):
        raise UsageError(f"every example is of class {target}; a change is tried on examples of other classes")
    answers = [_answers(model, task, change) for model in task.models]
    outcomes = []
    for model, (clean, says) in zip(task.models, answers, strict=True):
        counts = clean == test.y if target is None else test.y != target
        met, was = ((s != test.y if target is None else s == target) & counts for s in (says, clean))
        shares = [rate(int(n.sum()), int(counts.sum())) for n in (was, met)]
        accuracies = [rate(int((s == test.y).sum()), len(test)) for s in (clean, says)]
        outcomes.append(Outcome(model.name, *shares, *accuracies))
    clean, says = answers[0]
    hit = (says != test.y) & (clean == test.y) if target is None else (says == target) & (test.y != target)
    shown = []
    for i in hit.nonzero().squeeze(1)[:8].tolist():
        x, _ = test.batch(i, i + 1)
        z = change(x.to(task.device), torch.tensor([int(test.index[i])]))
        shown.append((int(test.index[i]), int(test.y[i]), int(says[i]), x[0], z[0].cpu()))
    return outcomes, shown


def _answers(model: Model, task: Task, change: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """What a model says of the examples, and of the changed ones, each with shape (N,)."""
    import torch

    from advkit.engine import frozen
    from advkit.oracle import answer

    parts = []
    with torch.no_grad(), frozen(model.module):
        for start in range(0, len(task.test), BATCH):
            x = task.test.batch(start, start + BATCH)[0].to(task.device)
            z = change(x, task.test.index[start : start + BATCH])
            parts.append(torch.stack([answer(model.module, seen).argmax(1).cpu() for seen in (x, z)]))
    clean, says = torch.cat(parts, 1)
    return clean, says


def show(title: str, outcomes: list[Outcome], target: int | None) -> None:
    """Print what was found as a table."""
    from rich.markup import escape
    from rich.table import Table

    goal = "fooled, of those right" if target is None else f"says {target}, of other classes"
    table = Table("model", goal, "before", "accuracy", "before", title=escape(title))
    for one in outcomes:
        table.add_row(*(escape(str(cell)) for cell in (one.model, one.success, one.before, one.accuracy, one.accuracy_before)))
    tables.show(table, width=140)


def save(
    out: Path,
    name: str,
    tensor: Tensor,
    about: dict[str, Any],
    outcomes: list[Outcome],
    shown: list[tuple[int, int, int, Tensor, Tensor]],
    data: Data,
) -> None:
    """Write the tensor, the summary, and where the inputs are images, a few of them before and after, side by side."""
    import torch

    from advkit.models import checkpoint
    from advkit.version import __version__

    out.mkdir(parents=True, exist_ok=True)
    text = {key: str(value) for key, value in about.items()}
    checkpoint.write(out / f"{name}.safetensors", {name: tensor}, {**text, "advkit": __version__})
    models = [{**asdict(one), **{key: _as_dict(rate) for key, rate in vars(one).items() if key != "model"}} for one in outcomes]
    summary = {"schema": f"advkit/{name}/1", "advkit": __version__, **about, "models": models}
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    if data.kind != "image":
        return
    (out / "pictures").mkdir(exist_ok=True)
    for number, label, says, x, z in shown:
        side_by_side = (torch.cat([x, z], 2) - data.low) / (data.high - data.low)
        save_image(side_by_side, out / "pictures" / f"{number:06d}-{label}-as-{says}.png")


def _as_dict(share: Rate) -> dict[str, float]:
    return {**asdict(share), "value": share.value}
