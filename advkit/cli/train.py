"""``advkit train``: a small network, from data to a checkpoint, plain or with a defense."""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from advkit.data import Data
    from advkit.defenses import Trained
    from advkit.train import Extra, Progress, Recipe

EXAMPLES = """\
examples:
  advkit train --model mnist-cnn --data mnist-5k --out m.safetensors
  advkit train --model "cifar-resnet(width=32)" --data hf:uoft-cs/cifar10 --epochs 20 --out c.safetensors
  advkit train --model mnist-cnn --data mnist-5k --defense "trades(beta=6)" --threat "linf(0.3)" --epochs 10 --out r.safetensors
  torchrun --nproc-per-node 8 -m advkit train --model cifar-resnet --data hf:uoft-cs/cifar10 --device cuda --out c.safetensors

A run that was stopped goes on after its last whole epoch when the same command is given again.
"""


def add(commands: Any) -> None:
    """Add the command."""
    command = commands.add_parser(
        "train",
        help="train a small network, plain or with a defense",
        description="Train a small network and write it to a safetensors file.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.add_argument("--model", required=True, help="a network: advkit list models")
    command.add_argument("--data", required=True, help="what to learn: advkit list data; its splits train and test are used")
    command.add_argument("--out", required=True, type=Path, metavar="FILE", help="the checkpoint, ending in .safetensors")
    command.add_argument("--defense", help="a training loss other than cross entropy: advkit list defenses")
    command.add_argument(
        "--threat", action="append", help='what the defense should withstand: "linf(0.3)"; repeatable with multi'
    )
    command.add_argument("--start", metavar="FILE", help="begin with the weights of this checkpoint of the same network")
    command.add_argument("--limit", type=int, help="learn from at most so many examples, classes in proportion")
    command.add_argument(
        "--validation", type=int, metavar="N", help="examples held out to watch the defense on (default 1000, a tenth at most)"
    )
    command.add_argument("--seed", type=int, default=0, help="of the weights and the order of the examples (default 0)")
    command.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1 ...")
    command.add_argument("--log", type=Path, metavar="DIR", help="write TensorBoard's event files there")
    _add_recipe(command.add_argument_group("recipe", "what goes before the network's own recipe"))
    _add_extra(command.add_argument_group("extra data"))
    command.set_defaults(run=run)


def _add_recipe(group: Any) -> None:
    group.add_argument("--epochs", type=int, help="passes over the data")
    group.add_argument("--batch-size", type=int, help="examples a step")
    group.add_argument("--lr", type=float, help="the highest learning rate")
    group.add_argument("--weight-decay", type=float, help="the share of a weight that a step of rate 1 takes away")
    group.add_argument("--optimizer", help="sgd or adam")
    group.add_argument("--schedule", help="of the learning rate: triangle, cyclic, cosine, steps, linear or constant")
    group.add_argument("--shift", type=int, help="move images by up to so many pixels, at random")
    group.add_argument("--clip", type=float, help="the greatest norm of a step's gradient")
    group.add_argument("--average", type=float, help="keep a moving average of the weights with this decay, as 0.995")
    group.add_argument("--precision", help="float32, or bfloat16 for mixed precision")
    group.add_argument("--compile", action="store_true", help="translate the network with torch.compile first")


def _add_extra(group: Any) -> None:
    group.add_argument("--extra", metavar="DATA", help="generated or unlabelled examples that fill a share of every batch")
    group.add_argument("--extra-share", "--extra-ratio", type=float, default=0.7, help="of a batch (default 0.7)")
    group.add_argument("--pseudo-labels", metavar="MODEL", help="give the extra examples the labels of this checkpoint")


def run(arguments: argparse.Namespace) -> int:
    """Train, save, and say how good it is on the test split."""
    from advkit import data as data_by_name
    from advkit import spec
    from advkit.cli.given import recipe_of
    from advkit.data.dataset import check_seed
    from advkit.errors import UsageError
    from advkit.models import networks
    from advkit.processes import group, together

    if arguments.out.suffix != ".safetensors" or arguments.out.is_dir():
        raise UsageError(f"--out is {arguments.out}; a checkpoint is a file that ends in .safetensors")
    check_seed(arguments.seed)
    architecture = spec.show(spec.parse(arguments.model, networks.NETWORKS, "network"), networks.NETWORKS)
    data = data_by_name.load(arguments.data, split="train", limit=arguments.limit, seed=arguments.seed)
    test = data_by_name.load(arguments.data, split="test")
    loss = _loss(arguments, architecture, data)
    model = _network(arguments, architecture, loss)
    recipe = recipe_of(arguments, len(data))
    job = _Job(arguments, architecture, data, recipe, loss, _extra(arguments))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with together():
        trained = job.train(model)
        if group()[0] == 0:
            job.finish(trained, test)
    return 0


@dataclasses.dataclass
class _Job:
    """One training run of the command."""

    arguments: argparse.Namespace
    architecture: str
    data: Data
    recipe: Recipe
    loss: Any
    extra: Extra | None
    seconds: float | None = None

    @property
    def defense(self) -> str:
        given = self.arguments.threat or []
        return " ".join([self.arguments.defense or "cross entropy", *given])

    @property
    def partial(self) -> Path:
        out: Path = self.arguments.out
        return out.with_name(out.name + ".partial")

    def train(self, model: Any) -> Trained:
        """Train; a run that diverges leaves the last good weights in the checkpoint."""
        from advkit import defenses
        from advkit.cli.progress import training
        from advkit.processes import group
        from advkit.train import Diverged

        whole, began = not self.partial.exists(), time.perf_counter()
        with training() as tell:
            try:
                trained = defenses.train(
                    model,
                    self.data,
                    self.loss,
                    self.recipe,
                    threat=_watched(self.arguments, self.data),
                    validation=self.arguments.validation,
                    seed=self.arguments.seed,
                    device=self.arguments.device,
                    partial=self.partial,
                    identity=" ".join([self.architecture, self.defense, self.arguments.start or ""]),
                    report=_reports(tell, self.arguments.log if group()[0] == 0 else None),
                    extra=self.extra,
                    compile=self.arguments.compile,
                )
            except Diverged as error:
                raise self._rescued(model, error) from None
        # What the training cost, for the trade-off that benchmarks show.
        self.seconds = time.perf_counter() - began if whole else None
        return trained

    def _rescued(self, model: Any, error: Exception) -> Exception:
        from advkit.processes import group

        if not self.partial.exists():
            return error
        if group()[0] == 0:
            self.save(model, ended="diverged")
        return type(error)(f"{error}; {self.arguments.out} holds them")

    def save(self, model: Any, **about: str) -> None:
        """Write the checkpoint, and remove the file of the run."""
        from advkit.models import checkpoint

        about |= {
            "data": self.arguments.data,
            "loss": self.defense,
            "seed": str(self.arguments.seed),
            "recipe": repr(self.recipe),
        }
        if self.seconds is not None:
            about["seconds"] = f"{self.seconds:.1f}"
        checkpoint.save(self.arguments.out, model, self.architecture, **about)
        self.partial.unlink(missing_ok=True)

    def finish(self, trained: Trained, test: Data) -> None:
        """Save what was trained, and say what it is worth."""
        import json
        import sys

        from advkit.benchmarks.statistics import rate
        from advkit.train import accuracy, word_error_rate

        history = json.dumps([dataclasses.asdict(check) for check in trained.history])
        self.save(trained.model, **({"history": history} if trained.history else {}))
        if trained.warning:
            print(f"advkit: warning: {trained.warning}", file=sys.stderr)
        if trained.epoch is not None:
            check = trained.history[trained.epoch]
            print(f"the weights of epoch {trained.epoch + 1} of {len(trained.history)} were kept: {worth(check)}")
        right, of = accuracy(trained.model, test)
        examples = f"{self.architecture}, {len(self.data)} examples"
        print(f"{self.arguments.out}: {examples}, clean accuracy on the test split {rate(right, of)}")
        if hasattr(trained.model, "alphabet"):
            print(f"that is whole sentences; the word error rate is {100 * word_error_rate(trained.model, test):.1f} %")


def worth(check: Any) -> str:
    """A check in words."""
    return f"of {check.of} held out {100 * check.clean:.1f} % right, {100 * check.robust:.1f} % under PGD"


def _reports(tell: Callable[[Progress], None], log: Path | None) -> Callable[[Progress], None]:
    """Progress on the terminal, a line an epoch, and TensorBoard's files where they are wanted."""
    from advkit.defenses import tensorboard
    from advkit.processes import group

    others = [tensorboard(log)] if log else []
    said = 0

    def report(progress: Progress) -> None:
        nonlocal said
        tell(progress)
        for other in others:
            other(progress)
        if len(progress.history) > said and group()[0] == 0:
            for check in progress.history[said:]:
                print(f"epoch {check.epoch + 1}: {worth(check)}", flush=True)
            said = len(progress.history)

    return report


def _network(arguments: argparse.Namespace, architecture: str, loss: Any) -> Any:
    """The network, with fresh weights or those of --start."""
    from advkit.defenses import fresh
    from advkit.errors import UsageError
    from advkit.models import checkpoint

    if arguments.start is None:
        return fresh(architecture, loss, arguments.seed)
    model, metadata = checkpoint.load(arguments.start)
    if metadata["architecture"] != architecture:
        raise UsageError(f"{arguments.start} is a checkpoint of {metadata['architecture']}, and --model is {architecture}")
    return model


def _loss(arguments: argparse.Namespace, architecture: str, data: Data) -> Any:
    from advkit.defenses import named
    from advkit.errors import UsageError
    from advkit.models import networks
    from advkit.train import Spelling, plain

    own, threats = plain(networks.build(architecture), data), _watched(arguments, data)
    if arguments.defense is None and threats is not None:
        raise UsageError("--threat was given without --defense; plain training knows no adversary")
    if arguments.defense is None:
        return own
    if isinstance(own, Spelling):
        raise UsageError(f"--defense is {arguments.defense}; defenses are for classifiers, and {architecture} spells")
    return named(arguments.defense, threats)


def _watched(arguments: argparse.Namespace, data: Data) -> Any:
    """The threat models, one or several; None where none was given."""
    from advkit.benchmarks.plan import parse_threat

    threats = tuple(parse_threat(threat, data) for threat in arguments.threat or ())
    return threats if len(threats) > 1 else threats[0] if threats else None


def _extra(arguments: argparse.Namespace) -> Extra | None:
    from advkit import data as data_by_name
    from advkit.defenses import label
    from advkit.errors import UsageError
    from advkit.models import checkpoint
    from advkit.train import Extra

    if arguments.extra is None:
        if arguments.pseudo_labels is not None:
            raise UsageError("--pseudo-labels was given without --extra; they are for extra data")
        return None
    data = data_by_name.load(arguments.extra, split="train")
    if arguments.pseudo_labels is not None:
        data = label(checkpoint.load(arguments.pseudo_labels)[0], data)
    return Extra(data, arguments.extra_share)
