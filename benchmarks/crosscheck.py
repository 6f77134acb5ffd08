"""The same threat model through other libraries: what only they break is listed, and each such example is explained.

Every library runs the attacks of :data:`LIBRARIES` for the norm, one after the other on what the ones before did not break,
at settings that the result states. What a library says of its own success does not count: each point that it returns is
checked here, for being finite, in the range and in the ball, and for fooling the model in a pass of its own.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from advkit import models as models_by_name
from advkit.benchmarks.batch import attack_rows
from advkit.benchmarks.evaluate import examples_of, execute
from advkit.benchmarks.folder import replace as write
from advkit.benchmarks.memory import Fit
from advkit.benchmarks.peers import peer
from advkit.benchmarks.plan import Plan, attack_name, parse_ball, plan
from advkit.benchmarks.probe import longer
from advkit.benchmarks.suites import standard
from advkit.combine import Restarts
from advkit.engine import Attack, frozen
from advkit.errors import AccessError, UsageError, first_line
from advkit.norms import norm_name
from advkit.oracle import Access, Goal, logits_of
from advkit.spec import check_choice
from advkit.surrogates import ask
from advkit.threat import Lp

if TYPE_CHECKING:
    import pandas as pd

EXPLANATIONS = {
    "invalid": "the point is outside the ball or the range by rounding, and moved inside it fools no more",
    "random": "the model answers differently from call to call, or with the batch",
    "effort": "our attacks break it too, with more steps, restarts and seeds",
    "unexplained": "nothing of this explains it",
}
"""Why only another library broke an example."""

LADDER = ((2, 3), (4, 5))
"""(times as many steps and queries, restarts): what our attacks are tried with, the first at the seed, the next at the next."""

EXAMPLES = 100
"""How many examples are tried where nothing else is said."""
ANSWERS = 4
"""How often the model is asked for one point alone."""


class Unit(nn.Module):
    """A model as other libraries want it: a module of inputs in [0, 1] that returns a tensor of logits.

    Arguments:
        model: Inputs in [low, high], with shape (N, *), to logits (N, K).
        low: The least value of the data.
        high: The greatest.
        classes: K.
    """

    def __init__(self, model: Callable[[Tensor], Any], low: float, high: float, classes: int) -> None:
        super().__init__()
        self.model, self.low, self.width, self.classes = model, low, high - low, classes
        self.training = False

    def forward(self, x: Tensor) -> Tensor:
        """The logits for inputs in [0, 1]."""
        return logits_of(self.model(self.back(x)))

    def back(self, x: Tensor) -> Tensor:
        """From [0, 1] to the range of the data."""
        return x if (self.low, self.width) == (0, 1) else self.low + self.width * x

    def to_unit(self, x: Tensor) -> Tensor:
        """From the range of the data to [0, 1]."""
        return x if (self.low, self.width) == (0, 1) else ((x - self.low) / self.width).clamp(0, 1)


@dataclass(frozen=True)
class Peer:
    """An attack of another library.

    Attributes:
        name: The attack with its settings, as they are stated.
        call: (package, model, x, y, threat, seed) to x_adv, with shape (N, *), for inputs and a radius in the unit range.
        closest: Whether it searches for the closest example, so that a point beyond the radius is a failure and no fault.
    """

    name: str
    call: Callable[[Any, Unit, Tensor, Tensor, Lp, int], Tensor]
    closest: bool = False


@dataclass(frozen=True)
class Library:
    """Another library.

    Attributes:
        load: Its package, or None where it is not installed.
        attacks: For each norm p that it serves, its attacks, in order.
    """

    load: Callable[[], Any]
    attacks: Mapping[float, tuple[Peer, ...]]


def _stated(name: str, settings: Mapping[str, Any]) -> str:
    inside = ", ".join(f"{key}={value!r}" for key, value in settings.items())
    return f"{name}({inside})"


def _foolbox(name: str, closest: bool = False, **settings: Any) -> Peer:
    def call(package: Any, model: Unit, x: Tensor, y: Tensor, threat: Lp, seed: int) -> Tensor:
        wrapped, attack = (
            package.PyTorchModel(model, bounds=(0, 1), device=x.device),
            getattr(package.attacks, name)(**settings),
        )
        if closest:
            return attack.run(wrapped, x, package.criteria.Misclassification(y))
        return attack(wrapped, x, y, epsilons=threat.eps)[1]

    return Peer(_stated(name, settings), call, closest)


def _torchattacks(name: str, closest: bool = False, many: bool = False, **settings: Any) -> Peer:
    def call(package: Any, model: Unit, x: Tensor, y: Tensor, threat: Lp, seed: int) -> Tensor:
        norm = {} if closest else {"norm": _letter(threat.p), "eps": threat.eps, "seed": seed}
        classes = {"n_classes": model.classes} if many else {}
        attack = getattr(package, name)(model, **norm, **classes, **settings)
        attack.set_device(x.device)
        return attack(x, y)

    return Peer(_stated(name, settings), call, closest)


def _adv_lib(name: str, closest: bool = False, **settings: Any) -> Peer:
    def call(package: Any, model: Unit, x: Tensor, y: Tensor, threat: Lp, seed: int) -> Tensor:
        norm = {} if name in ("ddn", "sigma_zero") else {"norm": threat.p}
        radius = {} if closest else {"eps": threat.eps, "use_large_reps": threat.p == 1}
        return getattr(package, name)(model, x, y, **norm, **radius, **settings)

    return Peer(_stated(name, settings), call, closest)


def _autoattack(package: Any, model: Unit, x: Tensor, y: Tensor, threat: Lp, seed: int) -> Tensor:
    made = package.AutoAttack(model, norm=_letter(threat.p), eps=threat.eps, seed=seed, verbose=False, device=x.device)
    # Its standard version asks for nine targets, whether there are as many classes or not.
    for part in (made.apgd_targeted, made.fab):
        part.n_target_classes = min(9, model.classes - 1)
    return made.run_standard_evaluation(x, y, bs=len(x))


def _letter(p: float) -> str:
    return norm_name(p).replace("l_", "L")


_APGD_OF_TORCHATTACKS = (
    _torchattacks("APGD", loss="ce", steps=100),
    _torchattacks("APGDT", many=True, steps=100),
    _torchattacks("Square", n_queries=1000),
)
_APGD_OF_ADV_LIB = (
    _adv_lib("apgd", n_iter=100, loss_function="ce"),
    _adv_lib("apgd_targeted", n_iter=100),
    _adv_lib("fmn", closest=True, steps=100),
)
_STANDARD = (Peer("AutoAttack(version='standard')", _autoattack),)

LIBRARIES: dict[str, Library] = {
    "foolbox": Library(
        partial(peer, "foolbox"),
        {
            math.inf: (_foolbox("LinfPGD", steps=100), _foolbox("LInfFMNAttack", closest=True, steps=100)),
            2.0: (_foolbox("L2PGD", steps=100), _foolbox("DDNAttack", closest=True, steps=100)),
            1.0: (_foolbox("SparseL1DescentAttack", steps=100), _foolbox("L1FMNAttack", closest=True, steps=100)),
            0.0: (_foolbox("L0FMNAttack", closest=True, steps=100),),
        },
    ),
    "torchattacks": Library(
        partial(peer, "torchattacks"),
        {
            math.inf: _APGD_OF_TORCHATTACKS,
            2.0: _APGD_OF_TORCHATTACKS,
            1.0: (_torchattacks("EADL1", closest=True, binary_search_steps=5, max_iterations=100),),
        },
    ),
    "adv-lib": Library(
        partial(peer, "adv_lib.attacks"),
        {
            math.inf: _APGD_OF_ADV_LIB,
            2.0: (*_APGD_OF_ADV_LIB, _adv_lib("ddn", closest=True, steps=100, levels=None)),
            1.0: _APGD_OF_ADV_LIB,
            0.0: (_adv_lib("sigma_zero", closest=True, num_steps=300), _adv_lib("fmn", closest=True, steps=100)),
        },
    ),
    "autoattack": Library(partial(peer, "autoattack"), dict.fromkeys((math.inf, 2.0, 1.0), _STANDARD)),
}
"""The other libraries. ``autoattack`` is its authors' code, https://github.com/fra31/auto-attack."""


@dataclass(frozen=True)
class Tally:
    """What one library did.

    Attributes:
        library: Its name.
        attacks: What it ran, with the settings.
        broke: How many examples it broke, by points that hold.
        invalid: For how many examples it returned a point that is not finite or outside the ball or the range.
        only_they: How many examples it broke and advkit did not.
        only_we: How many examples advkit broke and it did not.
        seconds: How long it took.
        failures: What went wrong, each a sentence.
    """

    library: str
    attacks: tuple[str, ...]
    broke: int
    invalid: int = 0
    only_they: int = 0
    only_we: int = 0
    seconds: float = 0.0
    failures: tuple[str, ...] = ()


@dataclass(frozen=True)
class OnlyThey:
    """An example that another library broke and advkit did not.

    Attributes:
        index: Its number in the data.
        label: Its label.
        library: Who broke it.
        attack: By which attack, with the settings.
        distance: How far the point is from it, in the threat model's norm.
        why: One of :data:`EXPLANATIONS`.
        sentence: The explanation, with its numbers.
    """

    index: int
    label: int
    library: str
    attack: str
    distance: float
    why: str
    sentence: str


@dataclass(frozen=True)
class CrossCheck:
    """What several libraries broke of the same model, on the same examples.

    Attributes:
        run: What was run: model, data, threat, seed.
        examples: How many examples there were.
        right: How many of them the model gets right; only these are attacked.
        ours: What advkit did.
        libraries: What each other library did.
        rows: Each example that only another library broke, explained.
        notes: What was announced, each a sentence.
        points: ``x`` and ``x_adv`` of the rows, each of shape (rows, *); empty where there are no rows.
    """

    run: dict[str, Any]
    examples: int
    right: int
    ours: Tally
    libraries: tuple[Tally, ...]
    rows: tuple[OnlyThey, ...]
    notes: tuple[str, ...] = ()
    points: dict[str, Tensor] = field(default_factory=dict, repr=False, compare=False)

    @property
    def unexplained(self) -> tuple[OnlyThey, ...]:
        """The rows that nothing explains."""
        return tuple(row for row in self.rows if row.why == "unexplained")

    def to_pandas(self) -> pd.DataFrame:
        """A row for each example and library that broke it where advkit did not; the columns of :class:`OnlyThey`."""
        import pandas as pd

        return pd.DataFrame([asdict(row) for row in self.rows], columns=[part.name for part in fields(OnlyThey)])

    def table(self) -> pd.DataFrame:
        """A row for each library, advkit first; the columns of :class:`Tally`."""
        import pandas as pd

        return pd.DataFrame([asdict(tally) for tally in (self.ours, *self.libraries)])

    def to_json(self) -> dict[str, Any]:
        """Everything but the points."""
        return {
            "schema": "advkit/crosscheck/1",
            "run": self.run,
            "examples": self.examples,
            "right": self.right,
            "ours": asdict(self.ours),
            "libraries": [asdict(tally) for tally in self.libraries],
            "rows": [asdict(row) for row in self.rows],
            "unexplained": len(self.unexplained),
            "notes": list(self.notes),
        }

    def save(self, out: str | Path) -> None:
        """Write ``crosscheck.json``, and where there are rows ``rows.csv`` and their points, ``points.safetensors``.

        Raises:
            UsageError: ``out`` is a file, or a folder with something else in it.
        """
        from safetensors.torch import save

        path = check_folder(out)
        for name in ("rows.csv", "points.safetensors"):
            (path / name).unlink(missing_ok=True)
        if self.rows:
            self.to_pandas().to_csv(path / "rows.csv", index=False)
            write(path / "points.safetensors", save({name: points.contiguous() for name, points in self.points.items()}))
        write(path / "crosscheck.json", json.dumps(self.to_json(), indent=2) + "\n")


def check_folder(out: str | Path) -> Path:
    """A folder that a cross-check can be written to, made if it is not there.

    Raises:
        UsageError: It is a file, or holds something else.
    """
    path = Path(out)
    if path.is_file():
        raise UsageError(f"{path} is a file; --out should be a folder")
    path.mkdir(parents=True, exist_ok=True)
    if any(path.iterdir()) and not (path / "crosscheck.json").exists():
        raise UsageError(f"{path} holds other files; give --out a new or an empty folder")
    return path


def crosscheck(
    model: Any,
    data: Any,
    *,
    threat: str | Lp,
    attacks: str | Attack | Sequence[str | Attack] | None = None,
    libraries: Sequence[str] | None = None,
    limit: int | None = EXAMPLES,
    split: str = "test",
    batch_size: int | None = None,
    device: str = "cpu",
    seed: int = 0,
    report: Callable[[float, str], None] | None = None,
) -> CrossCheck:
    """Run a threat model through advkit and every other library that is installed, and explain what only they broke.

    Arguments:
        model: A module, any callable from inputs (N, *) to logits (N, K) that gives gradients, what ``advkit.models.load``
            returns, or its spec.
        data: A pair (x, y) of tensors or arrays, an ``advkit.data.Data``, or its spec; its range is finite.
        threat: An l_p ball with a radius: ``linf(8/255)``.
        attacks: Our attacks or specs; by default, the suite for the threat model.
        libraries: Names of :data:`LIBRARIES`; by default, all that are installed.
        limit: At most how many examples, with the classes in proportion; None for all.
        split: Which part of a data set that is named.
        batch_size: Examples at a time.
        device: Where to run.
        seed: What every random draw comes from.
        report: Called with the share that is done and what is running.

    Raises:
        UsageError: Something given is not of this form, or no library is there to compare with.
    """
    examples = examples_of(data, split, limit, seed)
    ball = _ball(parse_ball(threat, examples))
    loaded = models_by_name.load(model, device=device) if isinstance(model, str) else models_by_name.wrap(model)
    if loaded.access < Access.GRADIENTS:
        raise AccessError(
            f"{loaded.name} gives no gradients, which the attacks of other libraries need; give a model that does"
        )
    packages, absent = _installed(libraries, ball.p)
    planned = plan(
        loaded, examples, threat=ball, attacks=attacks, batch_size=batch_size, device=device, seed=seed, quantize=False
    )
    return _Comparison(planned, packages, report or (lambda share, text: None)).result(absent)


def _ball(threat: Lp) -> Lp:
    if threat.eps == math.inf:
        raise UsageError("libraries are compared inside a radius and none was given; give one, as in linf(0.1)")
    if not math.isfinite(threat.low) or not math.isfinite(threat.high):
        raise UsageError(f"the range is [{threat.low:g}, {threat.high:g}]; other libraries need a finite one")
    return threat


def _installed(names: Sequence[str] | None, p: float) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The packages that can be compared with, and what is said of the others."""
    for name in names or ():
        check_choice("library", name, LIBRARIES)
    packages, notes = {}, []
    for name in names or LIBRARIES:
        package, why = _loaded(name)
        if package is None:
            notes.append(f"{name} {why} and is left out")
        elif p not in LIBRARIES[name].attacks:
            notes.append(f"{name} has no attack for {norm_name(p)} and is left out")
        else:
            packages[name] = package
    if not packages:
        raise UsageError(f"there is no library to compare with: {'; '.join(notes)}")
    return packages, tuple(notes)


def _loaded(name: str) -> tuple[Any, str]:
    """The package of a library, or None; and why there is none."""
    try:
        with _quiet():
            return LIBRARIES[name].load(), "is not installed"
    except (Exception, SystemExit) as error:  # what is wrong with what is installed is its own
        return None, f"cannot be imported ({type(error).__name__}: {first_line(error)})"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what other libraries print and warn of."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@dataclass(frozen=True)
class _Broken:
    """What one library did to the examples that the model gets right.

    Attributes:
        z: Its points that hold, x where there are none, with shape (N, *).
        broke: Where there are some, (N,).
        invalid: Where it returned a point that does not hold, (N,).
        attack: Which attack broke each.
        failures: What went wrong.
    """

    z: Tensor
    broke: Tensor
    invalid: Tensor
    attack: list[str]
    failures: list[str]


class _Comparison:
    """One cross-check, and the work on it."""

    def __init__(self, plan: Plan, packages: Mapping[str, Any], report: Callable[[float, str], None]) -> None:
        assert isinstance(plan.threat, Lp)
        self.plan, self.threat, self.packages, self.report = plan, plan.threat, packages, report
        self.module = plan.model.module

    def result(self, notes: tuple[str, ...]) -> CrossCheck:
        """Do the work."""
        plan, steps = self.plan, len(self.packages) + 2
        self.report(0.0, "advkit")
        result = execute(plan, None, None)
        right = torch.tensor([row["correct"] for row in result.rows])
        if not bool(right.any()):
            raise UsageError(f"{plan.model.name} gets none of the {len(right)} examples right, so there is nothing to attack")
        x, y = plan.data.batch(0, len(plan.data))
        self.x, self.y = x[right].to(plan.device, plan.dtype), y[right].to(plan.device)
        self.index = plan.data.index[right].tolist()
        we = torch.tensor([row["success"] for row in result.rows])[right]
        seconds = sum(row["seconds"] for row in result.times)
        ours = Tally("advkit", tuple(name for name, _ in plan.attacks), int(we.sum()), seconds=round(seconds, 3))
        tallies: list[Tally] = []
        found: list[tuple[OnlyThey, Tensor]] = []
        for k, (name, package) in enumerate(self.packages.items()):
            self.report((k + 1) / steps, name)
            tally, only = self._compared(name, package, we)
            tallies.append(tally)
            found += only
        self.report((steps - 1) / steps, f"explaining {len(found)} examples that only others broke")
        rows = self._explained(found)
        picked = [self.index.index(row.index) for row in rows]
        points = {"x": self.x[picked].cpu(), "x_adv": torch.stack([z for _, z in found]).cpu()} if rows else {}
        about = {key: value for key, value in plan.identity().items() if key in ("advkit", "model", "data", "threat", "seed")}
        return CrossCheck(about, len(right), len(we), ours, tuple(tallies), rows, (*plan.notes, *notes), points)

    def _compared(self, name: str, package: Any, we: Tensor) -> tuple[Tally, list[tuple[OnlyThey, Tensor]]]:
        """What a library did, and the examples that only it broke with its points."""
        peers = LIBRARIES[name].attacks[self.threat.p]
        began = time.perf_counter()
        found = self._broken(package, peers)
        seconds = round(time.perf_counter() - began, 3)
        they = found.broke.cpu()
        distance = self.threat.distance(found.z, self.x).tolist()
        rows = [
            (OnlyThey(self.index[i], int(self.y[i]), name, found.attack[i], distance[i], "unexplained", ""), found.z[i])
            for i in (they & ~we).nonzero().flatten().tolist()
        ]
        counts = (int(they.sum()), int(found.invalid.sum()), len(rows), int((we & ~they).sum()))
        return Tally(name, tuple(one.name for one in peers), *counts, seconds, tuple(found.failures)), rows

    def _broken(self, package: Any, peers: Sequence[Peer]) -> _Broken:
        none = torch.zeros(len(self.x), dtype=torch.bool, device=self.x.device)
        found = _Broken(self.x.clone(), none, none.clone(), [""] * len(self.x), [])
        with torch.no_grad(), frozen(self.module):
            classes = logits_of(self.module(self.x[:1])).shape[1]
        model = Unit(self.module, self.threat.low, self.threat.high, classes)
        for one in peers:
            for rows in (~found.broke).nonzero().squeeze(1).split(self.plan.batch_size):
                if not len(rows) or not self._tried(one, package, model, rows, found):
                    break
        return found

    def _tried(self, one: Peer, package: Any, model: Unit, rows: Tensor, found: _Broken) -> bool:
        """Run one attack on some rows and note what holds; False where it could not be run."""
        x, y = self.x[rows], self.y[rows]
        width = self.threat.high - self.threat.low
        unit = Lp(self.threat.p, self.threat.eps / (width if self.threat.p else 1.0))
        try:
            with _quiet(), frozen(self.module), torch.enable_grad(), torch.random.fork_rng(_cuda(x)):
                # They draw from the global generator.
                torch.manual_seed(self.plan.seed)
                z = one.call(package, model, model.to_unit(x.clone()), y.clone(), unit, self.plan.seed)
            z = model.back(z.detach().to(x))
        except (Exception, SystemExit) as error:  # what others raise is theirs
            found.failures.append(f"{one.name} raised {type(error).__name__}: {first_line(error)}")
            return False
        if z.shape != x.shape:
            found.failures.append(f"{one.name} returned shape {tuple(z.shape)} for inputs of shape {tuple(x.shape)}")
            return False
        holds = self._loose(self.threat.eps).allows(z, x)
        # Of a search for the closest, a point beyond the radius is a failure and no fault.
        found.invalid[rows] |= ~(self._loose(math.inf).allows(z, x) if one.closest else holds)
        fooled = self._fooled(z[holds], y[holds])
        done = rows[holds][fooled]
        found.z[done], found.broke[done] = z[holds][fooled], True
        for i in done.tolist():
            found.attack[i] = one.name
        return True

    def _loose(self, eps: float) -> Lp:
        """The ball and the range with room for the rounding of floats."""
        room = 1e-6 * (self.threat.high - self.threat.low)
        eps = eps * (1 + 1e-5) + room if self.threat.p else eps
        return Lp(self.threat.p, eps, self.threat.low - room, self.threat.high + room)

    def _fooled(self, z: Tensor, y: Tensor) -> Tensor:
        """Whether the model is fooled, (M,), in a pass of its own."""
        return ask(self.module, z).argmax(1) != y if len(z) else torch.zeros_like(y, dtype=torch.bool)

    def _explained(self, found: list[tuple[OnlyThey, Tensor]]) -> tuple[OnlyThey, ...]:
        rows: list[OnlyThey] = []
        together = self._together(found)
        for (row, z), once in zip(found, together, strict=True):
            why, sentence = self._flaw(z, self.index.index(row.index), once)
            rows.append(replace(row, why=why, sentence=sentence))
        open_ = sorted({self.index.index(row.index) for row in rows if row.why == "unexplained"})
        effort = self._effort(torch.tensor(open_, device=self.x.device)) if open_ else {}
        return tuple(_with_effort(row, effort.get(self.index.index(row.index))) for row in rows)

    def _together(self, found: list[tuple[OnlyThey, Tensor]]) -> list[bool]:
        """Whether each point fools the model when it is one of a batch of them."""
        if not found:
            return []
        z, rows = torch.stack([z for _, z in found]), [self.index.index(row.index) for row, _ in found]
        parts = zip(z.split(self.plan.batch_size), self.y[rows].split(self.plan.batch_size), strict=True)
        return torch.cat([self._fooled(some, labels) for some, labels in parts]).tolist()

    def _flaw(self, z: Tensor, i: int, once: bool) -> tuple[str, str]:
        """What is wrong with a point of row i, or with the model's answers to it."""
        z, x, y = z.unsqueeze(0), self.x[i : i + 1], self.y[i : i + 1]
        if not bool(self.threat.allows(z, x)) and not bool(self._fooled(self.threat.project(z, x), y)):
            far = float((z - self.threat.project(z, x)).abs().max())
            return "invalid", f"the point is outside by rounding ({far:.1e}), and moved inside it fools no more"
        answers = [once, *(bool(self._fooled(z, y)) for _ in range(ANSWERS))]
        if not all(answers):
            return (
                "random",
                f"the model is not deterministic: the same point fools it in {sum(answers)} of {len(answers)} answers",
            )
        return "unexplained", ""

    def _effort(self, rows: Tensor) -> dict[int, str]:
        """For the rows that our attacks break with more effort, which attack did it and with how many passes."""
        said: dict[int, str] = {}
        spent = torch.zeros(len(self.x), dtype=torch.int64, device=self.x.device)
        attacks = dict.fromkeys((*(attack for _, attack in self.plan.attacks), *standard(self.threat)))
        for k, (times, n) in enumerate(LADDER):
            for attack in (Restarts(longer(attack, times) or attack, n) for attack in attacks):
                name = attack_name(attack)
                given = (self.x[rows], self.y[rows], torch.tensor(self.index)[rows.cpu()])
                result = attack_rows(self.plan, name, attack, *given, Goal(), self.plan.seed + k, Fit(self.plan.batch_size))
                spent[rows] += result.forwards + result.backwards
                for i in rows[result.success].tolist():
                    said[i] = f"effort: {name} breaks it too, after {int(spent[i])} passes"
                rows = rows[~result.success]
                if not len(rows):
                    return said
        return said


def _with_effort(row: OnlyThey, sentence: str | None) -> OnlyThey:
    if row.why != "unexplained":
        return row
    if sentence is None:
        return replace(row, sentence="no attack of ours breaks it, with up to four times the steps, restarts and other seeds")
    return replace(row, why="effort", sentence=sentence)


def _cuda(x: Tensor) -> list[torch.device]:
    return [x.device] if x.device.type == "cuda" else []
