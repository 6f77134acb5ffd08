"""Who fools whom: examples made on each model, and on all others together, shown to every model once."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from advkit import models as models_by_name
from advkit import spec
from advkit.attacks import ATTACKS
from advkit.benchmarks.evaluate import examples_of
from advkit.benchmarks.plan import ENTRIES_A_BATCH, attack_name, dtype_of, parse_threat
from advkit.benchmarks.statistics import Rate, rate
from advkit.data import Data
from advkit.data.dataset import check_seed
from advkit.engine import Attack, perturb
from advkit.errors import UsageError
from advkit.models import Model
from advkit.streams import Streams
from advkit.surrogates import Ensemble, ask, check_radius
from advkit.threat import THREATS, Change, Lp
from advkit.version import __version__

if TYPE_CHECKING:
    import pandas as pd

ATTACK = "di(mi-fgsm)"
"""The attack where none is named."""

OTHERS = "all others"
"""The name of the surrogate that is, for each target, the ensemble of all other models."""


@dataclass(frozen=True)
class TransferMatrix:
    """How often the examples made on one model fool another, of the images that both get right.

    Attributes:
        run: What was run: models, data, attack, threat and seed.
        surrogates: The names of the rows.
        targets: The names of the columns, which are the models.
        clean: How many images each model gets right.
        fooled: For each (surrogate, target), how many examples fooled the target, of the images that both get right. Where
            they are one model, that is the attack's own success.
        notes: What was announced.
    """

    run: dict[str, Any]
    surrogates: tuple[str, ...]
    targets: tuple[str, ...]
    clean: dict[str, Rate]
    fooled: dict[tuple[str, str], Rate]
    notes: tuple[str, ...] = ()

    def to_pandas(self) -> pd.DataFrame:
        """A row for each surrogate and target, with the columns surrogate, target, fooled, of, rate, low and high."""
        import pandas as pd

        return pd.DataFrame(
            {"surrogate": s, "target": t, "fooled": r.count, "of": r.of, "rate": r.value, "low": r.low, "high": r.high}
            for (s, t), r in self.fooled.items()
        )

    def table(self) -> pd.DataFrame:
        """The rates, with a row for each surrogate and a column for each target."""
        import pandas as pd

        rates = [[self.fooled[s, t].value if (s, t) in self.fooled else None for t in self.targets] for s in self.surrogates]
        return pd.DataFrame(rates, index=list(self.surrogates), columns=list(self.targets), dtype=float)

    def save(self, out: str | Path) -> None:
        """Write the rows of ``to_pandas`` to a CSV file; to a folder, as ``transfer.csv``, and what was run as ``run.json``.

        Raises:
            UsageError: ``out`` is a file of another kind.
        """
        path = check_out(out)
        if path.suffix == ".csv":
            path.parent.mkdir(parents=True, exist_ok=True)
            self.to_pandas().to_csv(path, index=False)
            return
        path.mkdir(parents=True, exist_ok=True)
        self.to_pandas().to_csv(path / "transfer.csv", index=False)
        clean = {name: {"count": r.count, "of": r.of, "low": r.low, "high": r.high} for name, r in self.clean.items()}
        text = json.dumps({**self.run, "clean": clean, "notes": self.notes}, indent=2)
        (path / "run.json").write_text(text + "\n", encoding="utf-8")


def check_out(out: str | Path) -> Path:
    """Where a matrix can be written: a file that ends in .csv, or a folder.

    Raises:
        UsageError: It is neither.
    """
    path = Path(out)
    if path.is_dir() if path.suffix == ".csv" else path.is_file():
        raise UsageError(f"{path} is in the way; the matrix is written to a file that ends in .csv, or to a folder")
    return path


def transfer_matrix(
    models: Mapping[str, Any] | Sequence[Any],
    data: Any,
    *,
    threat: str | Lp | Change,
    attack: str | Attack = ATTACK,
    limit: int | None = None,
    split: str = "test",
    batch_size: int | None = None,
    device: str = "cpu",
    seed: int = 0,
    report: Callable[[float, str], None] | None = None,
) -> TransferMatrix:
    """Make examples on every model and show them to every model.

    A model that does not give what the attack needs (gradients, most often) is a target only. A row more is for each target
    the ensemble of all others, where these are several.

    Arguments:
        models: Names and models, or a list of models, each a module, another callable, what ``advkit.models.load`` returns,
            or its spec.
        data: A pair (x, y) of tensors or arrays, an ``advkit.data.Data``, or its spec.
        threat: What may change, and how far: ``linf(8/255)``.
        attack: The attack or its spec; its last iterates are the examples.
        limit: At most how many images, with the classes in proportion; by default, all.
        split: Which part of a data set that is named.
        batch_size: Images at a time; the result does not depend on it, but for the rounding of floats.
        device: Where to run.
        seed: What every random draw comes from; each image has its own streams.
        report: Called with the share that is done and what was run.

    Raises:
        UsageError: Something given is not of this form; the message says what was given and what is allowed.
    """
    check_seed(seed)
    place = models_by_name.find_device(device)
    named = _models(models, device)
    examples = examples_of(data, split, limit, seed)
    if not len(examples):
        raise UsageError(f"{examples.name} holds no examples; there should be at least one")
    ball = parse_threat(threat, examples)
    built: Attack = spec.parse(attack, ATTACKS, "attack") if isinstance(attack, str) else attack
    check_radius(built, ball)
    able = tuple(name for name, model in named.items() if model.access >= built.access)
    if not able:
        raise UsageError(f"the attack needs {built.access.name.lower()}, which none of the models gives; add one that does")
    size = batch_size if batch_size is not None else max(16, min(256, ENTRIES_A_BATCH // examples.batch(0, 1)[0].numel()))
    spec.check_whole("batch size", size, 1)
    notes = (*examples.notes, *_inspected(named, examples, place))
    only = [name for name in named if name not in able]
    notes += tuple(
        f"{name} does not give the {built.access.name.lower()} that the attack needs; it is a target only" for name in only
    )
    batches = _Batches(named, able, examples, ball, built, size, place, seed)
    return batches.matrix(notes, report or (lambda share, text: None))


@dataclass(frozen=True)
class _Source:
    """What examples are made on, and for whom.

    Attributes:
        name: The row of the matrix.
        module: The surrogate.
        dtype: What it computes in.
        targets: The names of the models that its examples are shown to.
    """

    name: str
    module: Callable[[Tensor], Any]
    dtype: torch.dtype
    targets: tuple[str, ...]


@dataclass(frozen=True)
class _Batches:
    """One matrix, fully said, and the work on it batch by batch."""

    models: dict[str, Model]
    able: tuple[str, ...]
    data: Data
    threat: Lp | Change
    attack: Attack
    size: int
    place: torch.device
    seed: int

    def sources(self) -> list[_Source]:
        """Each model that can be a surrogate, and the ensembles: for each target, all the others, where these are several."""
        found = [_Source(name, self.models[name].module, dtype_of(self.models[name]), tuple(self.models)) for name in self.able]
        ensembles: dict[tuple[str, ...], tuple[str, ...]] = {}
        for target in self.models:
            others = tuple(name for name in self.able if name != target)
            if len(others) > 1:
                ensembles[others] = (*ensembles.get(others, ()), target)
        for others, targets in ensembles.items():
            module = Ensemble([self.models[name].module for name in others])
            found.append(_Source(OTHERS, module, dtype_of(self.models[others[0]]), targets))
        return found

    def matrix(self, notes: tuple[str, ...], report: Callable[[float, str], None]) -> TransferMatrix:
        """Do the work."""
        sources, total = self.sources(), len(self.data)
        right = dict.fromkeys(self.models, 0)
        fooled = {(source.name, target): [0, 0] for source in sources for target in source.targets}
        for first in range(0, total, self.size):
            x, y = (part.to(self.place) for part in self.data.batch(first, min(first + self.size, total)))
            index = self.data.index[first : first + self.size]
            clean = {name: self._logits(name, x).argmax(1) == y for name in self.models}
            for name, flags in clean.items():
                right[name] += int(flags.sum())
            for k, source in enumerate(sources):
                for target, success in self._shown(source, x, y, index, clean).items():
                    fooled[source.name, target][0] += int(success.sum())
                    fooled[source.name, target][1] += len(success)
                report((first + len(x) * (k + 1) / len(sources)) / total, f"examples of {source.name}")
        return TransferMatrix(
            self._run(),
            tuple(dict.fromkeys(source.name for source in sources)),
            tuple(self.models),
            {name: rate(count, total) for name, count in right.items()},
            {pair: rate(count, of) for pair, (count, of) in fooled.items()},
            notes,
        )

    def _shown(self, source: _Source, x: Tensor, y: Tensor, index: Tensor, clean: dict[str, Tensor]) -> dict[str, Tensor]:
        """For each target, whether it is fooled, for the images that it and the surrogate get right, with shape (M,) bool."""
        x = x.to(source.dtype)
        rows = (ask(source.module, x).argmax(1) == y).nonzero().squeeze(1)
        if not len(rows):
            return {}
        x, y = x[rows], y[rows]
        # The name of the surrogate is not part of the seed, so that all of them draw the same.
        rng = Streams.seeded(self.seed, index[rows.cpu()].tolist(), attack_name(self.attack), self.place)
        x_adv = perturb(self.attack, source.module, x, y, self.threat, rng=rng)
        allowed = self.threat.allows(x_adv, x)
        answers = {}
        for target in source.targets:
            both = clean[target][rows]
            if bool(both.any()):
                answers[target] = allowed[both] & (self._logits(target, x_adv[both]).argmax(1) != y[both])
        return answers

    def _logits(self, name: str, x: Tensor) -> Tensor:
        return ask(self.models[name].module, x.to(dtype_of(self.models[name])))

    def _run(self) -> dict[str, Any]:
        return {
            "advkit": __version__,
            "models": {name: {"name": model.name, "digest": model.digest} for name, model in self.models.items()},
            "data": {"name": self.data.name, "digest": self.data.digest(), "examples": len(self.data)},
            "attack": attack_name(self.attack),
            "threat": spec.show(self.threat, THREATS),
            "seed": self.seed,
        }


def _models(models: Mapping[str, Any] | Sequence[Any], device: str) -> dict[str, Model]:
    """The models by their names, in order."""
    if isinstance(models, str) or not isinstance(models, Mapping | Sequence):
        raise UsageError(f"the models are {models!r}; they should be a list of at least two, or names and models")
    pairs = list(models.items()) if isinstance(models, Mapping) else [(None, model) for model in models]
    loaded = [
        (name, models_by_name.load(model, device=device) if isinstance(model, str) else models_by_name.wrap(model))
        for name, model in pairs
    ]
    named = {model.name if name is None else name: model for name, model in loaded}
    if len(named) < len(loaded):
        raise UsageError("two models have the same name; give them names of their own, as in {'a': model, 'b': other}")
    if len(named) < 2:
        raise UsageError(f"there are {len(named)} models; who fools whom takes at least two")
    return named


def _inspected(models: dict[str, Model], data: Data, place: torch.device) -> Iterator[str]:
    """What should be known of each model; one that does not take the data is refused."""
    x, _ = data.batch(0, 8)
    for name, model in models.items():
        found = models_by_name.inspect(model, x.to(place, dtype_of(model)), data.y.to(place), len(data.classes))
        yield from (f"{name}: {note}" for note in (*model.notes, *found))
