"""How well detectors tell adversarial examples from clean ones, where the attack does not know of them and where it does.

The rows come first: one for each detector and example. Every number is computed from them.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from advkit import models as models_by_name
from advkit import spec
from advkit.attacks import ATTACKS
from advkit.benchmarks.evaluate import examples_of
from advkit.benchmarks.folder import Row, append, claimed, damaged, replace, resumable
from advkit.benchmarks.plan import ENTRIES_A_BATCH, attack_name, dtype_of, parse_threat, threat_name
from advkit.benchmarks.statistics import Estimate, Rate, rate
from advkit.data import Data
from advkit.data.dataset import check_seed, stratified
from advkit.defenses.detectors import DETECTORS, UNNOTICED, Detector, Evade, Rejecting, Selective
from advkit.engine import Attack, check_serves, frozen, perturb
from advkit.engine import run as attack_run
from advkit.errors import UsageError
from advkit.models import Model
from advkit.oracle import answer
from advkit.streams import Streams
from advkit.threat import Change, Lp
from advkit.version import __version__

if TYPE_CHECKING:
    import numpy as np

ATTACK = "pgd(steps=40)"
"""The attack on the classifier alone, where none is named."""

ADAPTIVE = "selective(steps=100)"
"""The attack on classifier and detector together, where none is named."""

KNOWING: spec.Table = {**ATTACKS, "selective": Selective}
"""The attacks that may be adaptive ones."""

FIT_LIMIT = 5000
"""How many clean examples are there to learn from, where that is not said."""

HELD = 0.2
"""The share of them that no detector learns from: the threshold is set on these."""

COLUMNS = {
    "detector": str,
    "threshold": float,
    "index": int,
    "label": int,
    "correct": bool,
    "clean": float,
    "fooled": bool,
    "naive": float | None,
    "naive_detected": bool | None,
    "adaptive": float | None,
    "adaptive_detected": bool | None,
}
"""What a row holds."""


def auc(clean: Sequence[float], adversarial: Sequence[float], confidence: float = 0.95) -> Estimate:
    """The area under the ROC curve: how often an adversarial example has the greater score; of equal ones, half count.

    The interval is method 5 of Newcombe, 2006, "Confidence intervals for an effect size measure based on the Mann-Whitney
    statistic. Part 2: asymptotic methods and evaluation", https://doi.org/10.1002/sim.2324: the areas A with
    (A - U / (n m))^2 <= z^2 A (1 - A) (1 + k (1 - A) / (2 - A) + k A / (1 + A)) / (n m), where k = (n + m) / 2 - 1. Unlike
    DeLong's it has a width also where the scores do not overlap, and for a single one.

    Arguments:
        clean: The scores of clean examples.
        adversarial: Those of adversarial ones.
        confidence: How often such an interval holds the true area, nearly.

    Raises:
        UsageError: One of them is empty or holds NaN.

    >>> print(auc([1, 2, 3], [2, 4]))
    0.75 [0.2601, 0.96]
    """
    import numpy as np
    from scipy.optimize import brentq
    from scipy.stats import norm, rankdata

    if not len(clean) or not len(adversarial):
        raise UsageError(f"there are {len(clean)} clean and {len(adversarial)} adversarial scores; an area needs one of each")
    n, m = len(clean), len(adversarial)
    if np.isnan([*clean, *adversarial]).any():
        raise UsageError("a score is NaN; scores should be numbers")
    area = float(rankdata([*clean, *adversarial])[n:].sum() - m * (m + 1) / 2) / (n * m)
    z, k = float(norm.isf((1 - confidence) / 2)), (n + m) / 2 - 1

    def outside(a: float) -> float:
        return (a - area) ** 2 - z**2 * a * (1 - a) * (1 + k * (1 - a) / (2 - a) + k * a / (1 + a)) / (n * m)

    # The area itself is inside, also where, at 0 and 1, it is a second root.
    low = float(brentq(outside, 0, area - 1e-12)) if area > 0 else 0.0
    return Estimate(area, low, float(brentq(outside, area + 1e-12, 1)) if area < 1 else 1.0)


def roc(clean: Sequence[float], adversarial: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """The false and the true positive rates at every threshold, from (0, 0) to (1, 1).

    >>> [rates.tolist() for rates in roc([1, 2], [2, 3])]
    [[0.0, 0.0, 0.5, 1.0], [0.0, 0.5, 1.0, 1.0]]
    """
    import numpy as np

    thresholds = np.concatenate([[np.inf], np.unique(np.concatenate([clean, adversarial]))[::-1]])
    fpr, tpr = (1 - np.searchsorted(np.sort(scores), thresholds) / len(scores) for scores in (clean, adversarial))
    return fpr, tpr


def threshold_at(clean: Sequence[float], fpr: float) -> float:
    """The least clean score that no more than a share ``fpr`` of them exceeds.

    >>> threshold_at([1.0, 2.0, 3.0, 4.0], 0.25)
    3.0
    """
    # In this order, because a share such as 0.05 of 100 may come out just below 5.
    return sorted(clean, reverse=True)[min(math.floor(fpr * len(clean) + 1e-9), len(clean) - 1)]


@dataclass(frozen=True)
class Found:
    """What a detector is worth, computed from its rows.

    A clean input that is rejected is an error as one that is answered wrongly is, and so is an adversarial one that is answered
    wrongly and not rejected (Tramer, 2022, "Detecting adversarial examples is (nearly) as hard as classifying them",
    https://arxiv.org/abs/2107.11630).

    Attributes:
        detector: Its name.
        threshold: The score above which an input is rejected.
        fpr: The share of clean inputs that are rejected: those that are evaluated, none of which set the threshold.
        accuracy: The share of clean inputs that are answered, and rightly.
        auc_naive: The area under the ROC curve against the attack that does not know of it; None where nothing fooled.
        auc_adaptive: The area against the one that does.
        tpr_naive: The share of naive adversarial examples that are rejected.
        tpr_adaptive: Of the adaptive ones.
        robust_naive: The share of examples that no naive attack makes an error of.
        robust_adaptive: That no attack makes one of.
    """

    detector: str
    threshold: float
    fpr: Rate
    accuracy: Rate
    auc_naive: Estimate | None
    auc_adaptive: Estimate | None
    tpr_naive: Rate
    tpr_adaptive: Rate
    robust_naive: Rate
    robust_adaptive: Rate

    def to_json(self) -> dict[str, Any]:
        """The numbers as they are written to a file."""
        areas = {name: None if area is None else vars(area) for name, area in vars(self).items() if name.startswith("auc")}
        rates = {name: value.to_json() for name, value in vars(self).items() if isinstance(value, Rate)}
        return {"detector": self.detector, "threshold": self.threshold, **areas, **rates}


@dataclass(frozen=True)
class Detection:
    """What came of an evaluation of detectors.

    Attributes:
        run: What was run: model, data, attack, threat, fpr, detectors and seed.
        rows: A row a detector and example: ``detector``, ``threshold``, ``index``, ``label``, ``correct`` (whether the
            classifier is right about the clean input), ``clean`` (its score), ``fooled`` (whether the naive attack makes the
            classifier wrong), ``naive`` (the score of that example; None without), ``naive_detected``, ``adaptive`` (the least
            score of an example that makes the classifier wrong, over both attacks; None without), ``adaptive_detected``.
        notes: What was announced.
    """

    run: dict[str, Any]
    rows: list[Row]
    notes: tuple[str, ...] = ()

    def of(self, detector: str) -> list[Row]:
        """The rows of a detector."""
        return [row for row in self.rows if row["detector"] == detector]

    def found(self) -> list[Found]:
        """What each detector is worth."""
        return [_found(name, self.of(name)) for name in self.run["detectors"]]

    def undefended(self) -> tuple[Rate, Rate]:
        """The clean and the robust accuracy of the classifier alone, under the naive attack."""
        rows = self.of(self.run["detectors"][0])
        right, robust = (sum(row["correct"] and not (row["fooled"] and k) for row in rows) for k in (False, True))
        return rate(right, len(rows)), rate(robust, len(rows))

    def summary(self) -> dict[str, Any]:
        """Every number, as it is written to a file."""
        clean, robust = self.undefended()
        return {
            "schema": "advkit/detect/1",
            "run": self.run,
            "notes": list(self.notes),
            "undefended": {"accuracy": clean.to_json(), "robust": robust.to_json()},
            "detectors": [found.to_json() for found in self.found()],
        }

    def draw(self, path: Path) -> None:
        """Write the ROC curves as a PNG, two for each detector."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(5.6, 5.0), dpi=120, layout="constrained")
        axes = figure.add_subplot()
        for i, name in enumerate(self.run["detectors"]):
            rows = self.of(name)
            for kind, line in (("naive", "-"), ("adaptive", "--")):
                if scores := _scores(rows, kind):
                    axes.plot(*roc(_scores(rows, "clean"), scores), line, color=f"C{i}", label=f"{name}, {kind}")
        axes.plot([0, 1], [0, 1], ":", color="grey", linewidth=1)
        axes.axvline(self.run["fpr"], color="grey", linewidth=0.7)
        axes.set(xlabel="false positive rate", ylabel="true positive rate", xlim=(0, 1), ylim=(0, 1.01))
        axes.legend(loc="lower right", fontsize="small")
        figure.savefig(path)


def _scores(rows: Sequence[Row], kind: str) -> list[float]:
    return [row[kind] for row in rows if row[kind] is not None]


def _found(name: str, rows: list[Row]) -> Found:
    clean, threshold = _scores(rows, "clean"), rows[0]["threshold"]
    answered = [row["correct"] and row["clean"] <= threshold for row in rows]

    def count(kind: str) -> tuple[Estimate | None, Rate, Rate]:
        scores = _scores(rows, kind)
        lost = [row[kind] is not None and row[kind] <= threshold for row in rows]
        robust = sum(ok and not bad for ok, bad in zip(answered, lost, strict=True))
        area = auc(clean, scores) if scores else None
        return area, rate(sum(s > threshold for s in scores), len(scores)), rate(robust, len(rows))

    (auc_naive, tpr_naive, robust_naive), (auc_adaptive, tpr_adaptive, robust_adaptive) = count("naive"), count("adaptive")
    return Found(
        name,
        threshold,
        rate(sum(s > threshold for s in clean), len(clean)),
        rate(sum(answered), len(rows)),
        auc_naive,
        auc_adaptive,
        tpr_naive,
        tpr_adaptive,
        robust_naive,
        robust_adaptive,
    )


def detect(
    model: Any,
    data: Any,
    *,
    detectors: str | Detector | Sequence[str | Detector],
    threat: str | Lp | Change,
    attack: str | Attack = ATTACK,
    adaptive: str | Attack = ADAPTIVE,
    fpr: float = 0.05,
    fit: Any = None,
    limit: int | None = None,
    fit_limit: int | None = FIT_LIMIT,
    split: str = "test",
    batch_size: int | None = None,
    device: str = "cpu",
    seed: int = 0,
    out: str | Path | None = None,
    report: Callable[[float, str], None] | None = None,
) -> Detection:
    """Fit detectors to clean examples and attack the classifier, once without and once with the knowledge of each detector.

    Arguments:
        model: A module, what ``advkit.models.load`` returns, or its spec.
        data: What is attacked: a pair (x, y) of tensors or arrays, an ``advkit.data.Data``, or its spec.
        detectors: One or more detectors or specs.
        threat: What may change, and how far: ``linf(8/255)``.
        attack: The naive attack, or its spec: on the classifier alone.
        adaptive: The adaptive attack, or its spec: on the classifier and a detector together. What the naive attack finds
            counts for it as well.
        fpr: The share of clean inputs that may be rejected. It sets the threshold, on the fifth of the examples of ``fit`` from
            which no detector learns.
        fit: The clean examples that there are to learn from, in the same forms; by default, the split ``train`` of the data.
        limit: At most how many examples are attacked, with the classes in proportion; by default, all.
        fit_limit: At most how many of these; None for all.
        split: Which part of a data set that is named is attacked.
        batch_size: Examples at a time.
        device: Where to run.
        seed: What every random draw comes from.
        out: A folder for the rows, the summary and the curves. The same call goes on after the last whole detector.
        report: Called with the share that is done and what is running.

    Raises:
        UsageError: Something given is not of this form; the message says what was given and what is allowed.
    """
    check_seed(seed)
    if isinstance(fpr, bool) or not isinstance(fpr, int | float) or not 0 < fpr < 1:
        raise UsageError(f"the false positive rate is {fpr!r}; it should be between 0 and 1, as 0.05 is")
    place = models_by_name.find_device(device)
    named = _named(detectors)
    loaded = models_by_name.load(model, device=device) if isinstance(model, str) else models_by_name.wrap(model)
    if not isinstance(loaded.module, nn.Module):
        raise UsageError(f"the model is of type {type(loaded.module).__name__}; detectors look into an nn.Module")
    examples = examples_of(data, split, limit, seed)
    if not len(examples):
        raise UsageError(f"{examples.name} holds no examples; there should be at least one")
    clean = _clean(fit, data, examples, fit_limit, seed)
    ball = parse_threat(threat, examples)
    given = ((attack, ATTACKS), (adaptive, KNOWING))
    naive, knowing = (spec.parse(one, table, "attack") if isinstance(one, str) else one for one, table in given)
    for one in (naive, knowing):
        check_serves(one, ball)
    if ball.eps == math.inf:
        raise UsageError(f"the threat model is {threat_name(ball)}; here it should have a radius, as linf(0.1) has")
    x, _ = examples.batch(0, 8)
    size = max(16, min(256, ENTRIES_A_BATCH // x[0].numel())) if batch_size is None else batch_size
    spec.check_whole("batch size", size, 1)
    found = models_by_name.inspect(loaded, x.to(place, dtype_of(loaded)), examples.y.to(place), len(examples.classes))
    notes = (*loaded.notes, *examples.notes, *found)
    work = _Work(loaded, examples, clean, named, ball, naive, knowing, float(fpr), size, place, seed)
    return work.execute(notes, None if out is None else Path(out), report or (lambda share, text: None))


def _named(detectors: str | Detector | Sequence[str | Detector]) -> dict[str, Detector]:
    """The detectors by their specs, in order."""
    listed = detectors if isinstance(detectors, list | tuple) else [detectors]
    built: list[Any] = [spec.parse(one, DETECTORS, "detector") if isinstance(one, str) else one for one in listed]
    for one in built:
        if isinstance(one, type) or not hasattr(one, "fit"):
            raise UsageError(f"the detector is {one!r}; it should be a detector or a spec: {', '.join(DETECTORS)}")
    named = {spec.show(one, DETECTORS) if type(one) in DETECTORS.values() else repr(one): one for one in built}
    if not named or len(named) < len(built):
        raise UsageError(f"the detectors are {', '.join(map(str, listed)) or 'none'}; name at least one, and each once")
    return named


def _knowing_name(attack: Attack) -> str:
    try:
        return spec.show(attack, KNOWING)
    except UsageError:
        return attack_name(attack)


def _clean(fit: Any, data: Any, examples: Data, limit: int | None, seed: int) -> Data:
    """The examples to learn from, none of which is attacked, and which are of the same form."""
    if fit is None and not isinstance(data, str):
        raise UsageError("the data are examples and not a name, so they have no split train; give clean examples as fit")
    clean = examples_of(data if fit is None else fit, "train", None, seed)
    if len(clean) < 2 or limit == 1:
        given = f"{min(len(clean), limit or len(clean))} examples of {clean.name} to learn from"
        raise UsageError(f"there are {given}; there should be at least two, one of them for the threshold")
    there = examples.index[examples.index <= int(clean.index.max())]
    if len(there) and clean.fingerprint(there) == examples.fingerprint(there):
        raise UsageError(
            f"{clean.name} gives the same examples to learn from as to attack; name others to learn from (--fit, fit)"
        )
    forms = [(tuple(one.batch(0, 1)[0].shape[1:]), one.low, one.high) for one in (clean, examples)]
    if forms[0] != forms[1]:
        own, other = (f"of shape {shape} in [{low:g}, {high:g}]" for shape, low, high in forms)
        raise UsageError(f"the inputs to learn from are {own} and those to attack {other}; they should be of one form")
    return clean.limited(limit, seed)


def _parted(clean: Data, seed: int) -> tuple[Data, Data]:
    """The examples to learn from, and those to set the threshold on, both with the classes in proportion."""
    held = torch.zeros(len(clean), dtype=torch.bool)
    held[stratified(clean.y, max(1, int(HELD * len(clean))), seed)] = True
    return clean.select((~held).nonzero().squeeze(1)), clean.select(held.nonzero().squeeze(1))


@dataclass(frozen=True)
class _Naive:
    """What is known before any detector is attacked: on all examples, which are right, and the naive adversarial ones.

    Attributes:
        correct: With shape (N,) and dtype bool.
        fooled: With shape (N,) and dtype bool.
        x_adv: With shape (N, *); x where nothing fools.
        gap: By how much the greatest logit of a clean input exceeds the next, in the mean over those where it does; or else 1.
    """

    correct: Tensor
    fooled: Tensor
    x_adv: Tensor
    gap: float


@dataclass(frozen=True)
class _Work:
    """One evaluation, fully said."""

    model: Model
    data: Data
    clean: Data
    detectors: dict[str, Detector]
    threat: Lp | Change
    attack: Attack
    adaptive: Attack
    fpr: float
    size: int
    place: torch.device
    seed: int

    def run(self) -> dict[str, Any]:
        """What makes two runs the same."""
        return {
            "advkit": __version__,
            "model": {"name": self.model.name, "digest": self.model.digest},
            "data": {"name": self.data.name, "digest": self.data.digest(), "examples": len(self.data)},
            "fit": {"name": self.clean.name, "digest": self.clean.digest(), "examples": len(self.clean)},
            "attack": attack_name(self.attack),
            "adaptive": _knowing_name(self.adaptive),
            "threat": threat_name(self.threat),
            "fpr": self.fpr,
            "detectors": list(self.detectors),
            "seed": self.seed,
            "batch_size": self.size,
        }

    def execute(self, notes: tuple[str, ...], out: Path | None, report: Callable[[float, str], None]) -> Detection:
        """Do the work, detector by detector."""
        assert isinstance(self.model.module, nn.Module)
        run, index = self.run(), self.data.index.tolist()
        keep = lambda rows, path: _kept(rows, path, run["detectors"], index)
        with resumable(), claimed(out, run, set(COLUMNS), keep) as rows, frozen(self.model.module):
            result = Detection(self.run(), rows, notes)
            self._add(result, out, report)
            if out is not None:
                replace(out / "summary.json", json.dumps(result.summary(), indent=2) + "\n")
                result.draw(out / "roc.png")
        return result

    def _add(self, result: Detection, out: Path | None, report: Callable[[float, str], None]) -> None:
        """The rows that are missing. All detectors are fitted before anything is attacked: one of them may be refused."""
        learned, held = _parted(self.clean, self.seed)
        missing = [name for name in self.detectors if not result.of(name)]
        fitted = {name: self._fitted(self.detectors[name], learned) for name in missing}
        if not fitted:
            return
        parts = len(fitted) + 1
        naive = self._naive(lambda share: report(share / parts, "the naive attack"))
        for k, (name, detector) in enumerate(fitted.items(), 1):
            tell = lambda share, k=k, name=name: report((k + share) / parts, name)
            rows = self._rows(name, detector, held, naive, tell)
            if out is not None:
                append(out / "rows.jsonl", rows)
            result.rows.extend(rows)

    def _fitted(self, detector: Detector, learned: Data) -> nn.Module:
        assert isinstance(self.model.module, nn.Module)
        fitted = detector.fit(self.model.module, learned, torch.Generator().manual_seed(self.seed))
        return fitted.to(self.place).eval().requires_grad_(False)

    def _batches(self, data: Data) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """The positions, the inputs and the labels."""
        for start in range(0, len(data), self.size):
            x, y = data.batch(start, start + self.size)
            yield torch.arange(start, start + len(y)), x.to(self.place, dtype_of(self.model)), y.to(self.place)

    def _streams(self, at: Tensor, what: str) -> Streams:
        return Streams.seeded(self.seed, self.data.index[at].tolist(), what, self.place)

    @torch.no_grad()
    def _naive(self, report: Callable[[float], None]) -> _Naive:
        """The attack at full length; where its last iterate does not fool, the success that it passed on its way."""
        parts = []
        run = functools.partial(attack_run, self.attack, self.model.module, access=self.model.access)
        for at, x, y in self._batches(self.data):
            z = answer(self.model.module, x)
            top = z.topk(2, dim=1).values
            first = run(x, y, self.threat, rng=self._streams(at, "naive"))
            last = perturb(self.attack, self.model.module, x, y, self.threat, rng=self._streams(at, "naive"))
            still = (answer(self.model.module, last).argmax(1) != y) & self.threat.allows(last, x)
            fooled = (first.success | still) & (z.argmax(1) == y)
            x_adv = torch.where(still.view(-1, *(1,) * (x.ndim - 1)), last, first.x_adv)
            parts.append((z.argmax(1) == y, fooled, x_adv, top[:, 0] - top[:, 1]))
            report((int(at[-1]) + 1) / len(self.data))
        correct, fooled, x_adv, gap = (torch.cat(part) for part in zip(*parts, strict=True))
        gap = gap[gap.isfinite() & (gap > 0)]
        return _Naive(correct, fooled, x_adv, float(gap.mean()) if len(gap) else 1.0)

    @torch.no_grad()
    def _rows(self, name: str, detector: nn.Module, held: Data, naive: _Naive, report: Callable[[float], None]) -> list[Row]:
        """Set a detector's threshold and attack it."""
        scores = torch.cat([_score(detector, x) for _, x, _ in self._batches(held)]).tolist()
        limit, middle = threshold_at(scores, self.fpr), threshold_at(scores, 0.5)
        clean = torch.cat([_score(detector, x) for _, x, _ in self._batches(self.data)])
        told = torch.cat([_score(detector, naive.x_adv[at]) for at, _, _ in self._batches(self.data)])
        # So that a rejection weighs as much as a class does, where the naive attack leaves the score.
        beyond = (told[naive.fooled] - limit).median() if bool(naive.fooled.any()) else torch.tensor(0.0)
        scale = naive.gap / max(float(beyond), limit - middle, 1e-6)
        told = torch.where(naive.fooled, told, math.inf)
        rows = []
        for at, x, y in self._batches(self.data):
            least = told[at].clone()
            # First at full length, and below the threshold: the curve should be of scores that are as low as can be.
            for most, full in ((middle, True), (limit, False)):
                left = (naive.correct[at] & (least > most)).nonzero().squeeze(1)
                if len(left):
                    guarded = Rejecting(self.model.module, detector, most, scale)
                    rng = self._streams(at[left.cpu()], f"{name}, {full=}")
                    least[left] = torch.minimum(least[left], self._evaded(guarded, x[left], y[left], rng, full))
            columns = [self.data.index[at], y, naive.correct[at], clean[at], naive.fooled[at], told[at], least]
            rows += [_row(name, limit, *values) for values in zip(*(c.tolist() for c in columns), strict=True)]
            report((int(at[-1]) + 1) / len(self.data))
        return rows

    def _evaded(self, guarded: Rejecting, x: Tensor, y: Tensor, rng: Streams, full: bool) -> Tensor:
        """The scores of what an attack finds, inf where the classifier is not wrong about it, with shape (N,).

        Both are asked once more. ``full``: what it returns at its end, not the first success.
        """
        attack = Evade(self.adaptive)
        given: dict[str, Any] = {"rng": rng, "goal": UNNOTICED}
        if full:
            x_adv = perturb(attack, guarded, x, y, self.threat, **given)
        else:
            x_adv = attack_run(attack, guarded, x, y, self.threat, access=self.model.access, **given).x_adv
        wrong = (answer(guarded.model, x_adv).argmax(1) != y) & self.threat.allows(x_adv, x)
        return torch.where(wrong, _score(guarded.detector, x_adv), math.inf)


def _score(detector: nn.Module, x: Tensor) -> Tensor:
    """The scores, with shape (N,), in double precision."""
    scores: Any = detector(x)
    if not isinstance(scores, Tensor) or scores.shape != x.shape[:1] or not bool(scores.isfinite().all()):
        what = f"shape {tuple(scores.shape)}" if isinstance(scores, Tensor) else type(scores).__name__
        raise UsageError(f"the detector returned {what} for {len(x)} inputs; it should be a finite score each")
    return scores.double()


def _row(
    name: str, limit: float, index: int, label: int, correct: bool, clean: float, fooled: bool, naive: float, adaptive: float
) -> Row:
    found = {"naive": naive if naive < math.inf else None, "adaptive": adaptive if adaptive < math.inf else None}
    detected = {f"{kind}_detected": None if score is None else score > limit for kind, score in found.items()}
    about = {"detector": name, "threshold": limit, "index": index, "label": label, "correct": correct, "clean": clean}
    return {**about, "fooled": fooled, **found, **detected}


def _kept(rows: list[Row], path: Path, detectors: list[str], index: list[int]) -> list[Row]:
    """The rows of whole detectors."""
    # NaN is what is not itself.
    if not all(isinstance(row[key], kind) and row[key] == row[key] for row in rows for key, kind in COLUMNS.items()):
        raise damaged(path, "a row holds something of another type")
    wanted = [(name, i) for name in detectors for i in index]
    if [(row["detector"], row["index"]) for row in rows] != wanted[: len(rows)]:
        raise damaged(path, "its rows are not those of this run")
    return rows[: len(rows) // len(index) * len(index)]
