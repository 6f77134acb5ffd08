"""How many passes a second a model makes, at which batch size it is quickest, and how long attacks on it will take.

Symbols: b is a batch size, r(b) the seconds that one example's forward and backward pass takes in a batch of b.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from advkit import models as models_by_name
from advkit.benchmarks.batch import GRID
from advkit.benchmarks.evaluate import examples_of, execute
from advkit.benchmarks.memory import out_of_memory
from advkit.benchmarks.plan import Plan, plan
from advkit.benchmarks.result import Evaluation
from advkit.benchmarks.statistics import Rate, rate
from advkit.data import Data
from advkit.engine import Attack, frozen
from advkit.errors import UsageError
from advkit.fast import fast
from advkit.models import Model
from advkit.oracle import Access, answer
from advkit.threat import Change, Lp

if TYPE_CHECKING:
    import pandas as pd

FULL, HALF, COMPILED = "float32", "bfloat16", "bfloat16, compiled"
"""The precisions: the model itself (in float64 where its weights are), its stand-in, and that one compiled."""

ROUNDS = 5
"""How often a pass is timed, at most, after one that warms up."""
SECONDS = 0.4
"""How long one figure is timed, unless the first two rounds take longer."""
SLOWEST = 1.5
"""The seconds of a pass from which on no greater batch is tried."""
PILOT = (8, 32)
"""The fewest and the most examples of a pilot."""
PILOT_SECONDS = 10.0
"""How long a pilot may take, if no example ever broke; with the fewest examples it may take longer."""
CLOCK = 0.15
"""By what share the same work may take more or less time."""
NEARLY = 0.95
"""The smallest batch with this share of the greatest speed is the best."""


@dataclass(frozen=True)
class Speed:
    """How fast one precision is at one batch size.

    Attributes:
        precision: ``float32``, ``bfloat16`` or ``bfloat16, compiled``.
        batch_size: Examples at a time.
        forwards: Forward passes of one example a second.
        gradients: Forward and input-gradient backward passes of one example a second, a pair counted once; None where the
            model gives no gradient.
        memory: The most bytes of a CUDA device in use meanwhile; 0 elsewhere.
    """

    precision: str
    batch_size: int
    forwards: float
    gradients: float | None
    memory: int


@dataclass(frozen=True)
class Forecast:
    """How long attacks will take.

    Attributes:
        threat: The threat model's spec.
        attacks: The attacks.
        examples: On how many examples.
        batch_size: How many at a time.
        passes: An upper bound of the forward and backward passes: each attack's cost for every example, as if none ever broke.
        bound: The seconds that so many would take.
        seconds: What is expected, from the pilot.
        low: The lower end of what is to be expected.
        high: The upper end.
        pilot: How many examples were attacked to know that.
        to_the_end: How many of these met every attack.
    """

    threat: str
    attacks: tuple[str, ...]
    examples: int
    batch_size: int
    passes: int
    bound: float
    seconds: float
    low: float
    high: float
    pilot: int
    to_the_end: int

    def __str__(self) -> str:
        return in_words(self.low, self.high)


@dataclass(frozen=True)
class Profile:
    """What a model costs.

    Attributes:
        model: The model's name.
        data: The data's.
        device: Where it was timed.
        speeds: A row for each precision and batch size.
        agreement: For how many examples the stand-in in bfloat16 says the same class; None where there is no stand-in.
        best: The smallest batch size that is nearly as fast as any.
        default: The batch size that an evaluation takes by itself.
        forecast: How long attacks will take; None where no threat model was given.
        notes: What was noticed, each a sentence.
    """

    model: str
    data: str
    device: str
    speeds: tuple[Speed, ...]
    agreement: Rate | None
    best: int
    default: int
    forecast: Forecast | None
    notes: tuple[str, ...] = ()

    def to_pandas(self) -> pd.DataFrame:
        """A row for each precision and batch size; the columns of :class:`Speed`."""
        import pandas as pd

        return pd.DataFrame([asdict(speed) for speed in self.speeds], columns=[part.name for part in fields(Speed)])

    def to_json(self) -> dict[str, Any]:
        """All of it, with the forecast in words too."""
        words = {"words": str(self.forecast)} if self.forecast else {}
        return {
            "schema": "advkit/profile/1",
            **asdict(self),
            "forecast": {**asdict(self.forecast), **words} if self.forecast else None,
        }


UNITS = (("second", 1.0), ("minute", 60.0), ("hour", 3600.0), ("day", 86400.0))


def in_words(low: float, high: float) -> str:
    """A time between two numbers of seconds, as a person says it.

    >>> in_words(170, 430)
    'between 3 and 7 minutes'
    >>> in_words(50, 4000)
    'between 50 seconds and 1.1 hours'
    >>> in_words(0.2, 0.7), in_words(61, 62)
    ('less than a second', 'about 1 minute')
    """
    if high < 1:
        return "less than a second"
    (least, unit), (most, other) = _in_units(low), _in_units(high)
    if (least, unit) == (most, other):
        return f"about {_count(most, other)}"
    if unit == other:
        return f"between {least} and {_count(most, other)}"
    return f"between {_count(least, unit)} and {_count(most, other)}"


def _in_units(seconds: float) -> tuple[str, str]:
    """The number and the unit of a time: a digit after the point below two, except for seconds."""
    unit, size = [(name, size) for name, size in UNITS if size <= max(seconds, 1.0)][-1]
    value = seconds / size
    text = f"{value:.1f}".removesuffix(".0") if 1 < value < 2 and unit != "second" else f"{value:.0f}"
    return text, unit


def _count(number: str, unit: str) -> str:
    return f"{number} {unit}" if number == "1" else f"{number} {unit}s"


def profile(
    model: Any,
    data: Any,
    *,
    threat: str | Lp | Change | None = None,
    attacks: str | Attack | Sequence[str | Attack] | None = None,
    limit: int | None = None,
    split: str = "test",
    compile: bool = False,
    device: str = "cpu",
    seed: int = 0,
    report: Callable[[float, str], None] | None = None,
) -> Profile:
    """Time a model, and say how long attacks on it will take.

    The forecast is from a pilot: the attacks on a few examples, whose time is carried over to all of them by the speeds that
    were measured at both batch sizes. How many examples meet every attack decides most of the time and is known from a few
    only; its exact 95 % interval (Clopper and Pearson, 1934, https://doi.org/10.1093/biomet/26.4.404) gives the spread.

    Arguments:
        model: A module, any callable from inputs (N, *) to logits (N, K), what ``advkit.models.load`` returns, or its spec.
        data: A pair (x, y) of tensors or arrays, an ``advkit.data.Data``, or its spec.
        threat: What the adversary may change; without it there is no forecast.
        attacks: As for ``advkit.evaluate``.
        limit: How many examples are planned; by default, all.
        split: Which part of a data set that is named.
        compile: Whether ``torch.compile`` translates the stand-in as well, which takes from seconds to minutes.
        device: Where to run.
        seed: Of the pilot's examples and draws.
        report: Called with the share that is done and what is running.

    Raises:
        UsageError: Something given is not of this form; the message says what was given and what is allowed.
    """
    if threat is None and attacks is not None:
        raise UsageError("attacks are given and no threat model; give one, as in linf(8/255), or leave the attacks out")
    place = models_by_name.find_device(device)
    loaded = models_by_name.load(model, device=device) if isinstance(model, str) else models_by_name.wrap(model)
    examples = examples_of(data, split, limit, seed)
    planned = plan(loaded, examples, threat=threat or "linf(1)", attacks=attacks, device=device, seed=seed)
    tell = report or (lambda share, text: None)
    timing = _Timing(loaded, examples, planned, tell)
    made, notes = _precisions(loaded, compile)
    for name, module in made.items():
        timing.measure(name, module)
    forecast = None
    if threat is not None:
        tell(0.7, "the pilot")
        forecast = _forecast(planned, seed, timing.seconds)
    return Profile(
        loaded.name,
        examples.name,
        str(place),
        tuple(timing.speeds),
        _agreement(made, timing.inputs(min(256, len(examples)))) if HALF in made else None,
        timing.best,
        planned.batch_size,
        forecast,
        (*planned.notes, *notes, *timing.notes),
    )


def _precisions(model: Model, compile: bool) -> tuple[dict[str, Callable[[Tensor], Any]], tuple[str, ...]]:
    """The model in each precision, and what is said of those that there are not."""
    made: dict[str, Callable[[Tensor], Any]] = {FULL: model.module}
    if not isinstance(model.module, nn.Module):
        if compile:
            fast(model.module, compile=True)
        return made, ("the model is no torch module, so there is no stand-in in bfloat16",)
    made[HALF] = fast(model.module)
    if compile:
        made[COMPILED] = fast(model.module, compile=True)
    return made, ()


def _agreement(made: dict[str, Callable[[Tensor], Any]], x: Tensor) -> Rate:
    """For how many of the inputs the stand-in says the same class."""
    with torch.no_grad(), frozen(made[FULL]):
        same = answer(made[FULL], x).argmax(1) == answer(made[HALF], x).argmax(1)
    return rate(int(same.sum()), len(x))


class _Timing:
    """The speeds of a model, measured one after the other.

    Attributes:
        speeds: What was measured.
        notes: Why no greater batch was tried.
    """

    def __init__(self, model: Model, data: Data, plan: Plan, tell: Callable[[float, str], None]) -> None:
        self.model, self.data, self.plan, self.tell = model, data, plan, tell
        self.speeds: list[Speed] = []
        self.notes: list[str] = []
        few = self.data.batch(0, min(len(data), 512))[0]
        self.few = few.to(plan.device, plan.dtype)

    def inputs(self, n: int) -> Tensor:
        """A batch of n, (n, *); the examples again where there are too few."""
        return self.few[torch.arange(n, device=self.few.device) % len(self.few)]

    def sizes(self) -> Iterator[int]:
        """The batch sizes to try, up to eight times the default."""
        default = self.plan.batch_size
        wanted = {1, 8, default, *(32 * 4**k for k in range(12))}
        yield from sorted(size for size in wanted if size <= 8 * default)

    def measure(self, name: str, module: Callable[[Tensor], Any]) -> None:
        """Time one precision at every batch size that fits."""
        for size in self.sizes():
            self.tell(0.05 + 0.2 * len(self.speeds) / 10, f"{name}, {size} at a time")
            try:
                speed = self._speed(name, module, size)
            except RuntimeError as error:
                if not out_of_memory(error.__cause__ or error):
                    raise
                self.notes.append(f"{name}: no memory for {size} examples at a time")
                return
            self.speeds.append(speed)
            if size / (speed.gradients or speed.forwards) > SLOWEST:
                return

    def _speed(self, name: str, module: Callable[[Tensor], Any], size: int) -> Speed:
        x = self.inputs(size)
        cuda = x.device.type == "cuda"
        if cuda:
            torch.cuda.reset_peak_memory_stats(x.device)
        gradients = None
        with frozen(module):
            forwards = size / _timed(lambda: _forward(module, x), x.device)
            if self.model.access == Access.GRADIENTS:
                gradients = size / _timed(lambda: _gradient(module, x), x.device)
        return Speed(name, size, forwards, gradients, torch.cuda.max_memory_allocated(x.device) if cuda else 0)

    @property
    def best(self) -> int:
        """The smallest batch size at which the model itself is nearly as fast as at any."""
        rates = {speed.batch_size: speed.gradients or speed.forwards for speed in self.speeds if speed.precision == FULL}
        return min(size for size, value in rates.items() if value >= NEARLY * max(rates.values()))

    def seconds(self, b: float) -> float:
        """The time of a forward and backward pass of one example in a batch of b, as seconds: r(b), between what was measured.

        Of a model without gradients, of a forward pass.
        """
        rows = [(math.log(s.batch_size), -math.log(s.gradients or s.forwards)) for s in self.speeds if s.precision == FULL]
        at = min(max(math.log(b), rows[0][0]), rows[-1][0])
        for (low, first), (high, last) in itertools.pairwise(rows):
            if at <= high:
                return math.exp(first + (last - first) * (at - low) / (high - low))
        return math.exp(rows[-1][1])


def _forward(module: Callable[[Tensor], Any], x: Tensor) -> None:
    with torch.no_grad():
        answer(module, x)


def _gradient(module: Callable[[Tensor], Any], x: Tensor) -> None:
    z = x.detach().requires_grad_()
    with torch.enable_grad():
        outputs = answer(module, z)
    if not outputs.requires_grad:
        raise UsageError("the model gives no gradient with respect to its input; give one that does, or load it as scores only")
    torch.autograd.grad(outputs.logsumexp(1).sum(), z)


def _timed(call: Callable[[], None], device: torch.device) -> float:
    """The median seconds of a call, after one that warms up."""
    call()
    taken: list[float] = []
    while len(taken) < ROUNDS and (len(taken) < 2 or sum(taken) < SECONDS):
        _wait(device)
        began = time.perf_counter()
        call()
        _wait(device)
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(frozen=True)
class _Work:
    """What one attack did in a pilot of several examples.

    Attributes:
        passes: Forward and backward passes of each example.
        seconds: How long it took.
    """

    passes: tuple[int, ...]
    seconds: float

    @property
    def in_flight(self) -> float:
        """How many examples were in a pass, on average."""
        return max(1.0, sum(self.passes) / max(*self.passes, 1))


def _works(result: Evaluation) -> dict[str, _Work]:
    """What each attack of a pilot did, and the rounding to the grid after them."""
    seconds: dict[str, float] = {}
    for row in result.times:
        seconds[row["attack"]] = seconds.get(row["attack"], 0.0) + row["seconds"]
    passes: dict[str, list[int]] = {name: [0] * len(result.rows) for name in (*result.run["attacks"], GRID)}
    for i, row in enumerate(result.rows):
        for part in row["attacks"]:
            passes[part["attack"]][i] = part["forwards"] + part["backwards"]
        passes[GRID][i] = row["forwards"] + row["backwards"] - sum(passes[name][i] for name in result.run["attacks"])
    return {name: _Work(tuple(passes[name]), taken) for name, taken in seconds.items()}


def _forecast(plan: Plan, seed: int, seconds: Callable[[float], float]) -> Forecast:
    """The attacks on a few examples, and what that says of all of them."""
    total = len(plan.data)
    costs = {name: attack.cost for name, attack in plan.attacks}
    each = sum(costs.values()) * seconds(PILOT[1]) / 2
    n = min(total, max(PILOT[0], int(min(PILOT[1], PILOT_SECONDS / each))))
    few = plan.data.limited(n, seed)
    result = execute(replace(plan, data=few, data_digest="", batch_size=n), None, None)
    works = _works(result)
    batch = min(plan.batch_size, total)
    each_pass = {name: _pass(work, seconds, batch / n) for name, work in works.items()}
    taken = [sum(each_pass[name] * work.passes[i] for name, work in works.items()) for i in range(n)]
    bound = sum(cost * max(each_pass[name], seconds(batch) / 2) for name, cost in costs.items())
    radius = plan.threat.eps < math.inf
    ends = [row["correct"] and not (radius and row["success"]) for row in result.rows]
    # Where no example of the pilot met every attack, one that does may take as long as the bound.
    to_the_end = statistics.fmean(t for t, end in zip(taken, ends, strict=True) if end) if any(ends) else bound
    others = statistics.fmean(t for t, end in zip(taken, ends, strict=True) if not end) if not all(ends) else 0.0
    share = rate(sum(ends), n)
    low, middle, high = (total * (p * to_the_end + (1 - p) * others) for p in (share.low, share.value, share.high))
    return Forecast(
        result.run["threat"],
        tuple(costs),
        total,
        plan.batch_size,
        total * sum(costs.values()),
        total * bound,
        middle,
        (1 - CLOCK) * low,
        min((1 + CLOCK) * high, (1 + CLOCK) * total * bound),
        n,
        sum(ends),
    )


def _pass(work: _Work, seconds: Callable[[float], float], times: float) -> float:
    """Seconds of one example's pass of an attack when so many times as many examples are in flight; 0 where it made none.

    What the model takes of it changes as r does. What the attack takes becomes less with a batch, but not more.
    """
    if not sum(work.passes):
        return 0.0
    now = seconds(work.in_flight)
    ratio = seconds(max(1.0, work.in_flight * times)) / now
    whole = work.seconds / sum(work.passes)
    of_model = min(whole, now / 2)
    return of_model * ratio + (whole - of_model) * min(1.0, ratio)
