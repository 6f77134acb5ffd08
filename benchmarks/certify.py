"""What of a model is certain, example by example: the certificates behind ``advkit certify``.

``run.json`` says which run it is, ``certificates.jsonl`` holds a row an example, ``attack/`` the evaluation of the attacks,
where there were any, and ``summary.json`` the result.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from advkit import models as models_by_name
from advkit import spec
from advkit.benchmarks.cells import shuffled
from advkit.benchmarks.evaluate import Status, examples_of, execute
from advkit.benchmarks.folder import Row, append, claimed, damaged, read_json, read_rows, replace, resumable
from advkit.benchmarks.plan import Plan, dtype_of, parse_ball, plan, threat_name
from advkit.benchmarks.result import Evaluation
from advkit.benchmarks.statistics import Rate, rate
from advkit.data import Data
from advkit.data.dataset import check_seed
from advkit.defenses.certificates import CERTIFICATES, CROWN, IBP, AlphaCROWN
from advkit.defenses.certificates.result import Certificate, Certified
from advkit.defenses.certificates.smoothing import ABSTAINED, Smoothing, Soft
from advkit.engine import Attack
from advkit.errors import UsageError
from advkit.models import Model
from advkit.streams import Streams
from advkit.threat import THREATS, Lp
from advkit.version import __version__

if TYPE_CHECKING:
    import pandas as pd

SCHEMA = "advkit/certificates/1"
ROWS = "certificates.jsonl"
BATCH = 16
"""How many examples bounds are computed for at once; the other methods take one."""
COPIES = 32
"""Over how many noisy copies an attack on a smoothed model takes its mean."""
MOST_RADII = 12

_KINDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("index", "label", "predicted", "seed"), (int,)),
    **dict.fromkeys(("seconds",), (float, int)),
    **dict.fromkeys(("bound", "radius"), (float, int, type(None))),
    **dict.fromkeys(("method", "threat"), (str,)),
    "certified": (bool,),
    "broken": (bool, type(None)),
}

Report = Callable[[float, str], None]


@dataclass(frozen=True)
class Certification:
    """What was certified, computed from its rows.

    Attributes:
        run: What was run: model, data, threat, method, seed.
        rows: A record an example: index, label, predicted, certified, broken, bound, radius, seconds, method, threat, seed.
        notes: What was announced.
        evaluation: What the attacks found on the same examples; None where none was named.
        broken: Which examples are surely wrong or were broken, in the order of the rows; None where no attack was named and
            the method does not look for what breaks them. Of a smoothed model, those where its own vote is another class at the
            example that was found.
    """

    run: dict[str, Any]
    rows: list[Row]
    notes: tuple[str, ...] = ()
    evaluation: Evaluation | None = None
    broken: list[bool] | None = None

    @property
    def threat(self) -> Lp:
        """What the adversary may change."""
        return spec.parse(self.run["threat"], THREATS, "threat")

    @property
    def smoothed(self) -> bool:
        """Whether it is the model under noise that was certified, not the model itself."""
        return self.run["method"].split("(")[0] == "smoothing"

    @property
    def accuracy(self) -> Rate:
        """How many answers are the label; of a smoothed model, of its own answers."""
        return self._rate(lambda row: row["predicted"] == row["label"])

    @property
    def abstained(self) -> Rate:
        """For how many examples the method gave no answer."""
        return self._rate(lambda row: row["predicted"] == ABSTAINED)

    @property
    def certified_accuracy(self) -> Rate:
        """How many are right and certified inside the threat model: the robust accuracy is at least this."""
        return self._rate(lambda row: row["certified"])

    @property
    def attacked_accuracy(self) -> Rate | None:
        """How many are not known to be wrong or broken: the robust accuracy is at most this; None where nobody looked."""
        return None if self.broken is None else rate(self.broken.count(False), len(self.broken))

    @property
    def robust_interval(self) -> tuple[float, float] | None:
        """What holds the robust accuracy with 95 % confidence.

        From the low end of the certified share to the high end of what the attacks left.
        """
        attacked = self.attacked_accuracy
        return None if attacked is None else (self.certified_accuracy.low, attacked.high)

    @property
    def violations(self) -> list[int]:
        """The numbers of the examples that are certified and were broken: of a sound method, none."""
        return [row["index"] for row, broken in zip(self.rows, self.broken or (), strict=False) if row["certified"] and broken]

    @property
    def mean_radius(self) -> float | None:
        """The mean certified radius, 0 where the answer is wrong; None where the method searches no radius."""
        radii = self._radii()
        return sum(radii) / len(radii) if self.smoothed and radii else None

    def curve(self) -> list[Row]:
        """Certified accuracy over the radius, in the threat model's norm; empty where the method searches no radius."""
        if not self.smoothed or not self.rows:
            return []
        radii = self._radii()
        step = self.threat.eps / 2
        while max(radii) >= MOST_RADII * step:
            step *= 2
        steps = [i * step for i in range(1, max(3, math.floor(max(radii) / step) + 2))]
        return [{"eps": eps, **rate(sum(radius >= eps for radius in radii), len(radii)).to_json()} for eps in steps]

    def table(self) -> pd.DataFrame:
        """A row an example; with attacks, also whether it was broken."""
        import pandas as pd

        rows = pd.DataFrame(self.rows)
        return rows if self.broken is None else rows.assign(broken=self.broken)

    def summary(self) -> dict[str, Any]:
        """Everything but the rows, as it is written to ``summary.json``; ``docs/certify.md`` says what each field is."""
        attacked = self.attacked_accuracy
        return {
            "schema": SCHEMA,
            "run": self.run,
            "examples": len(self.rows),
            "accuracy": self.accuracy.to_json(),
            "abstained": self.abstained.to_json(),
            "certified_accuracy": self.certified_accuracy.to_json(),
            "attacked_accuracy": attacked.to_json() if attacked else None,
            "robust_interval": self.robust_interval,
            "attacks": self.evaluation.run["attacks"] if self.evaluation else [],
            "violations": self.violations,
            "mean_radius": self.mean_radius,
            "curve": self.curve(),
            "seconds": round(sum(row["seconds"] for row in self.rows), 3),
            "notes": list(self.notes),
        }

    def _rate(self, holds: Callable[[Row], bool]) -> Rate:
        return rate(sum(map(holds, self.rows)), len(self.rows))

    def _radii(self) -> list[float]:
        return [(row["radius"] or 0.0) if row["predicted"] == row["label"] else 0.0 for row in self.rows]

    @classmethod
    def load(cls, folder: str | Path) -> Certification:
        """Read the rows that are in a folder that ``advkit certify`` wrote; of a run that was stopped, those that are done.

        Raises:
            UsageError: There are no certificates in the folder, or they are damaged.
        """
        path = Path(folder)
        if not (path / ROWS).exists() or not (path / "run.json").exists():
            raise UsageError(f"{path} holds no certificates; it should be a folder that advkit certify wrote")
        run = read_json(path / "run.json")
        texts = [run.get("method"), run.get("threat")]
        for part, name in (("model", "name"), ("model", "digest"), ("data", "name"), ("data", "digest"), ("data", "shuffled")):
            texts.append(run[part].get(name) if isinstance(run.get(part), dict) else None)
        if not all(isinstance(text, str) for text in texts):
            raise damaged(path / "run.json", "it does not describe certificates")
        rows = _checked(read_rows(path / ROWS, set(_KINDS)), path / ROWS)
        return cls(run, rows, broken=_decided(rows))


def certify(
    model: Any,
    data: Any,
    *,
    threat: str | Lp,
    method: str | Certificate = "crown",
    attacks: str | Attack | Sequence[str | Attack] | None = None,
    limit: int | None = None,
    split: str = "test",
    device: str = "cpu",
    seed: int = 0,
    out: str | Path | None = None,
    report: Report | None = None,
) -> Certification:
    """Certify a model on data, example by example, and attack it too where attacks are named.

    Arguments:
        model: A module, what ``advkit.models.load`` returns, or its spec.
        data: A pair (x, y) of tensors or arrays, an ``advkit.data.Data``, or its spec (``mnist-5k``).
        threat: What the adversary may change: an l_p ball with a radius, as in ``linf(0.1)``.
        method: A certificate or its spec: ``crown``, ``smoothing(sigma=0.5)``.
        attacks: Attacks, specs or a suite, which then bound the robust accuracy of the same examples from above; of a model
            under noise, they attack the mean of its probabilities.
        limit: At most how many examples, with the classes in proportion; by default, all.
        split: Which part of a data set that is named.
        device: Where to run.
        seed: What every random draw comes from; each example has its own.
        out: A folder to keep the rows in; the same call goes on where it stopped.
        report: Called as it goes with the share that is done and a text.

    Raises:
        UsageError: Something given is not of this form; the message says what was given and what is allowed.
    """
    loaded = models_by_name.load(model, device=device) if isinstance(model, str) else models_by_name.wrap(model)
    job = _job(loaded, examples_of(data, split, limit, seed), threat, method, device, seed)
    folder = None if out is None else Path(out)
    with resumable(), claimed(folder, job.run, set(_KINDS), job.kept, ROWS) as rows:
        # Plans and refuses before the first row is computed.
        attacking = None if attacks is None else _plan(job, attacks)
        for new, text in _rows(job, rows):
            rows += new
            if folder is not None:
                append(folder / ROWS, new)
            if report is not None:
                report(len(rows) / len(job.data), text)
        result = Certification(job.run, rows, job.notes, broken=_decided(rows))
        if attacking is not None:
            evaluation = execute(attacking, folder and folder / "attack", _told(report))
            notes = tuple(dict.fromkeys((*job.notes, *evaluation.notes)))
            pairs = zip(_broken(job, rows, evaluation), result.broken or [False] * len(rows), strict=True)
            result = dataclasses.replace(result, notes=notes, evaluation=evaluation, broken=[a or b for a, b in pairs])
        if folder is not None:
            replace(folder / "summary.json", json.dumps(result.summary(), indent=2, allow_nan=False) + "\n")
    return result


@dataclass(frozen=True)
class _Job:
    """What is certified, fully said."""

    model: Model
    data: Data
    threat: Lp
    method: Certificate
    device: torch.device
    dtype: torch.dtype
    seed: int
    run: dict[str, Any]
    notes: tuple[str, ...]

    def kept(self, rows: list[Row], path: Path) -> list[Row]:
        """The rows that were found, where they are of this run."""
        if [row["index"] for row in _checked(rows, path)] != self.data.index[: len(rows)].tolist():
            raise damaged(path, "its rows are not those of this run")
        return rows


def _job(model: Model, data: Data, threat: str | Lp, method: str | Certificate, device: str, seed: int) -> _Job:
    where = models_by_name.find_device(device)
    check_seed(seed)
    if not len(data):
        raise UsageError(f"{data.name} holds no examples; there should be at least one")
    ball = parse_ball(threat, data)
    if ball.eps == math.inf:
        raise UsageError(f"the threat model is {threat_name(ball)}; a certificate is for a radius, as in linf(0.1)")
    built = spec.parse(method, CERTIFICATES, "method") if isinstance(method, str) else method
    if not isinstance(built, Smoothing) and not isinstance(model.module, nn.Module):
        raise UsageError(f"{model.name} is no torch module, through whose layers bounds could go; smoothing serves any model")
    dtype, (x, _) = dtype_of(model), data.batch(0, 8)
    seen = models_by_name.inspect(model, x.to(where, dtype), data.y.to(where), len(data.classes))
    run = {
        "format": 1,
        "advkit": __version__,
        "model": {"name": model.name, "digest": model.digest},
        # A benchmark has the same examples in an order of its own.
        "data": {
            "name": data.name,
            "digest": data.digest(),
            "shuffled": shuffled(data).digest(),
            "examples": len(data),
        },
        "method": _name(built),
        "threat": threat_name(ball),
        "seed": seed,
    }
    return _Job(model, data, ball, built, where, dtype, seed, run, (*model.notes, *data.notes, *seen))


def _name(method: Certificate) -> str:
    """The spec of a method, or its repr where it is not in the table."""
    try:
        return spec.show(method, CERTIFICATES)
    except UsageError:
        return repr(method)


def _rows(job: _Job, rows: Sequence[Row]) -> Iterator[tuple[list[Row], str]]:
    """The rows after those that are there, batch by batch, each with a text for whoever waits."""
    size = BATCH if isinstance(job.method, IBP | CROWN | AlphaCROWN) else 1
    about = {name: job.run[name] for name in ("method", "threat", "seed")}
    while len(rows) < len(job.data):
        start = len(rows)
        x, y = job.data.batch(start, start + size)
        index = job.data.index[start : start + size].tolist()
        began = time.perf_counter()
        found = job.method(
            cast(nn.Module, job.model.module),
            x.to(job.device, job.dtype),
            y.to(job.device),
            job.threat,
            _rng(job, index[0], "certify"),
        )
        seconds = round((time.perf_counter() - began) / len(y), 6)
        new = [
            {"index": i, "label": label, **one, "seconds": seconds, **about}
            for i, label, one in zip(index, y.tolist(), _found(found), strict=True)
        ]
        yield new, f"certified {sum(row['certified'] for row in [*rows, *new])} of {len(rows) + len(new)}"


def _found(found: Certified) -> Iterator[Row]:
    """What a certificate says of each row."""
    columns = (found.predicted, found.certified, found.bound, found.radius)
    broken = [None] * len(found.predicted) if found.broken is None else found.broken.tolist()
    for (predicted, certified, bound, radius), fell in zip(
        zip(*(c.tolist() for c in columns), strict=True), broken, strict=True
    ):
        ends = {"bound": _number(bound), "radius": _number(radius)}
        yield {"predicted": predicted, "certified": certified, "broken": fell, **ends}


def _decided(rows: Sequence[Row]) -> list[bool] | None:
    """Which examples the method itself broke; None where it does not try."""
    return [bool(row["broken"]) for row in rows] if any(row["broken"] is not None for row in rows) else None


def _number(value: float) -> float | None:
    """A number for JSON, which has neither inf nor NaN."""
    return value if math.isfinite(value) else None


def _rng(job: _Job, index: int, label: str) -> torch.Generator:
    """An example's own draws, whatever was certified before it."""
    word = Streams.seeded(job.seed, [index], label).integers(2**63 - 1)
    return torch.Generator().manual_seed(int(word))


def _target(job: _Job) -> Model:
    """What is attacked: the model, or of one under noise the mean of its probabilities over the same few draws for all."""
    if not isinstance(job.method, Smoothing):
        return job.model
    x, _ = job.data.batch(0, 1)
    noise = torch.randn((COPIES, *x.shape), generator=_rng(job, 0, "attack")) * job.method.sigma
    soft = Soft(job.model.module, noise.to(job.device, job.dtype))
    return models_by_name.wrap(soft, name=f"{job.model.name} under noise")


def _plan(job: _Job, attacks: str | Attack | Sequence[str | Attack]) -> Plan:
    size = BATCH // 2 if isinstance(job.method, Smoothing) else None
    return plan(
        _target(job), job.data, threat=job.threat, attacks=attacks, device=str(job.device), seed=job.seed, batch_size=size
    )


def _told(report: Report | None) -> Callable[[Status], None] | None:
    if report is None:
        return None
    return lambda status: report(status.done / status.total, f"{status.attack}: unbroken {status.robust} of {status.seen}")


def _broken(job: _Job, rows: Sequence[Row], evaluation: Evaluation) -> list[bool]:
    """Which examples are wrong or were broken; of a model under noise, where its own vote says so."""
    if not isinstance(job.method, Smoothing):
        return [not row["correct"] or row["success"] for row in evaluation.rows]
    wrong = [row["predicted"] not in (ABSTAINED, row["label"]) for row in rows]
    found = [i for i, row in enumerate(evaluation.rows) if row["success"] and not wrong[i]]
    x_adv = evaluation.examples()["x_adv"] if found else None
    for i in found:
        assert x_adv is not None
        x = x_adv[i : i + 1].to(job.device)
        said = int(job.method.predict(job.model.module, x, _rng(job, rows[i]["index"], "vote")))
        wrong[i] = said not in (ABSTAINED, rows[i]["label"])
    return wrong


def _sized(value: Any) -> bool:
    """Whether a value is no number, or one that is finite as a float."""
    return not isinstance(value, int | float) or abs(value) <= sys.float_info.max


def _checked(rows: list[Row], path: Path) -> list[Row]:
    """The rows, where each is one that there can be."""
    for row in rows:
        wrong = [name for name, kinds in _KINDS.items() if type(row[name]) not in kinds or not _sized(row[name])]
        if wrong:
            raise damaged(path, f"the {wrong[0]} of a row is none that it can have")
    return rows
