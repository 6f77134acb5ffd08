"""One attack on one model, as the checks of an evaluation look at it, and the rule by which they judge counts."""

from __future__ import annotations

import dataclasses
import math
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from advkit import spec
from advkit.attacks import ATTACKS
from advkit.benchmarks.findings import Finding
from advkit.benchmarks.plan import threat_name
from advkit.benchmarks.statistics import rate
from advkit.engine import Attack, AttackResult, frozen, perturb, run
from advkit.errors import UsageError
from advkit.losses import margin
from advkit.models import Model
from advkit.oracle import Access, answer, logits_of, top1
from advkit.streams import Streams
from advkit.threat import Change, Lp

CONFIDENCE = 0.99
"""How sure a check is that what it counts is no accident."""
ALLOWED = 0.02
"""The share of examples that may fall to another attack before the robust accuracy counts as overstated."""


def surely(count: int, of: int, share: float) -> bool:
    """Whether more than a share have a property, as sure as :data:`CONFIDENCE`: the lower end of the exact interval is above.

    Clopper and Pearson, 1934, https://doi.org/10.1093/biomet/26.4.404.

    Arguments:
        count: How many have it.
        of: Of how many; of none, nothing is sure.
        share: The share, in [0, 1].

    >>> surely(4, 64, 0.02), surely(5, 64, 0.02)
    (False, True)
    """
    return rate(count, of, 2 * CONFIDENCE - 1).low > share


@dataclass(frozen=True)
class Climb:
    """An attack's way on n rows, to its end.

    Attributes:
        last: The last iterates, with shape (n, *).
        fooled: Whether they fool the model inside the threat model, with shape (n,).
        margins: The greatest other logit less the label's, positive on success, in each call that the attack made with a
            candidate for every row, and at the end; with shape (T, n), T at least 1.
    """

    last: Tensor
    fooled: Tensor
    margins: Tensor

    @property
    def best(self) -> Tensor:
        """The greatest margin of each row, with shape (n,)."""
        return self.margins.amax(0)


class _Recorder(nn.Module):
    """A model that notes the margins of each full batch that it is shown."""

    def __init__(self, model: Callable[[Tensor], Any], y: Tensor) -> None:
        super().__init__()
        self.model, self.y = model, y
        self.margins: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        """The model's outputs."""
        outputs = logits_of(self.model(x))
        if len(x) == len(self.y):
            self.margins.append(margin(outputs.detach(), self.y))
        return outputs


@dataclass(frozen=True)
class Case:
    """What the checks look at: the attack that an evaluation relies on, and examples that the model gets right.

    Attributes:
        model: The model.
        x: The inputs, with shape (N, *), N at least 1, in the threat model's range.
        y: Their labels, with shape (N,), which the model says.
        threat: What may change; with a radius.
        attack: The attack.
        access: The most that an adversary sees.
        seed: What every random draw comes from.
        data: What commands call the data.
        name: What findings call the model.
        surrogate: The model that the evaluation makes its examples on, where that is another one.
        others: Models whose examples may transfer, by name.
    """

    model: Model
    x: Tensor
    y: Tensor
    threat: Lp | Change
    attack: Attack
    access: Access
    seed: int = 0
    data: str = "DATA"
    name: str = ""
    surrogate: Callable[[Tensor], Any] | None = None
    others: Mapping[str, Callable[[Tensor], Any]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.x)

    @property
    def p(self) -> float:
        """The norm of the ball that is searched."""
        return self.threat.p if isinstance(self.threat, Lp) else self.threat.ball.p

    @property
    def gradients(self) -> bool:
        """Whether the adversary sees gradients and the attack uses them."""
        return min(self.access, self.attack.access) == Access.GRADIENTS

    @cached_property
    def base(self) -> AttackResult:
        """What the attack does, the best point of its way counted."""
        return self._run(self.attack, self.threat, torch.arange(len(self)), "")

    @cached_property
    def left(self) -> Tensor:
        """The numbers of the rows that it leaves unbroken, with shape (L,)."""
        return (~self.base.success).nonzero().squeeze(1)

    @cached_property
    def way(self) -> Climb:
        """The same attack with the same draws, to its end on every row."""
        return self.climb(self.attack, torch.arange(len(self)), label="")

    def breaks(self, attack: Attack, threat: Lp | Change | None = None) -> int:
        """How many of the rows left another attack breaks, or the same one in another threat model."""
        if not len(self.left):
            return 0
        return int(self._run(attack, threat or self.threat, self.left, "again").success.sum())

    def climb(self, attack: Attack, rows: Tensor, threat: Lp | Change | None = None, label: str = "again") -> Climb:
        """An attack's way on the rows, (n,), n at least 1, with draws that the label names."""
        threat = threat or self.threat
        x, y = self.x[rows], self.y[rows]
        recorder = _Recorder(self.model.module, y)
        last = perturb(attack, recorder, x, y, threat, rng=self._streams(rows, label))
        outputs = self.ask(last)
        fooled = ~top1(outputs, y) & threat.allows(last, x)
        return Climb(last, fooled, torch.stack([*recorder.margins, margin(outputs, y)]))

    def ask(self, x: Tensor) -> Tensor:
        """The model's logits, with shape (M, K)."""
        with torch.no_grad(), frozen(self.model.module):
            return answer(self.model.module, x)

    def transferred(self, source: Callable[[Tensor], Any], rows: Tensor) -> tuple[Tensor, Tensor]:
        """Which of the attack's last iterates on another model fool that model, and which fool this one; each (n,)."""
        x, y = self.x[rows], self.y[rows]
        last = perturb(self.attack, source, x, y, self.threat, rng=self._streams(rows, "transfer"))
        with torch.no_grad(), frozen(source):
            there = ~top1(answer(source, last), y)
        return there, ~top1(self.ask(last), y) & self.threat.allows(last, x)

    def _run(self, attack: Attack, threat: Lp | Change, rows: Tensor, label: str) -> AttackResult:
        rng = self._streams(rows, label)
        return run(attack, self.model.module, self.x[rows], self.y[rows], threat, access=self.access, rng=rng)

    def _streams(self, rows: Tensor, label: str) -> Streams:
        return Streams.seeded(self.seed, rows.tolist(), label, self.x.device)

    def widened(self, factor: float) -> Lp | None:
        """The threat model with so many times the radius; None for one that has no radius to change."""
        if not isinstance(self.threat, Lp):
            return None
        eps = min(factor * self.threat.eps, _most(self.threat, self.x))
        return dataclasses.replace(self.threat, eps=eps) if self.threat.eps < eps < math.inf else None

    def command(self, *options: str) -> str:
        """``advkit attack`` on this model, data and threat model, with more options."""
        known = ("--model", self.model.name, "--data", self.data, "--threat", threat_name(self.threat))
        return shlex.join(["advkit", "attack", *known, *options])

    def named(self, attack: Attack | None) -> str:
        """The attack's spec; the default attacks where it has none."""
        try:
            return spec.show(attack, ATTACKS)
        except UsageError:
            return "standard"

    def stronger(self) -> str:
        """A command with four times the steps; with the default attacks, where the attack has no steps or no spec."""
        seen = () if self.access == Access.GRADIENTS else ("--access", self.access.name.lower())
        return self.command("--attack", self.named(longer(self.attack, 4)), *seen)

    def finding(
        self, check: str, evidence: str, fired: bool, advice: str, command: str, severity: str = "suspect", **numbers: float
    ) -> Finding:
        """A finding with this severity and advice where the check fired, else a fine one."""
        if not fired:
            severity, advice, command = "fine", "", ""
        return Finding(check, severity, self.name, threat_name(self.threat), evidence, advice, command, numbers)


def _most(threat: Lp, x: Tensor) -> float:
    """The radius that reaches the whole range; inf where there is no end to it."""
    entries = x[0].numel()
    width = 1.0 if threat.p == 0 else threat.high - threat.low
    return width * {math.inf: 1.0, 2.0: math.sqrt(entries), 1.0: entries, 0.0: entries}[threat.p]


def inner(attack: Any) -> dict[str, Any]:
    """The attacks that an attack wraps, by field: one, or a tuple of several."""
    found = {f.name: getattr(attack, f.name) for f in dataclasses.fields(attack)} if dataclasses.is_dataclass(attack) else {}
    attacks = {name: value if isinstance(value, tuple) else (value,) for name, value in found.items()}
    return {name: found[name] for name, parts in attacks.items() if parts and all(hasattr(part, "norms") for part in parts)}


def parts(attack: Any) -> list[Any]:
    """The attacks that an attack wraps."""
    return [part for value in inner(attack).values() for part in (value if isinstance(value, tuple) else (value,))]


def leaves(attack: Any) -> list[Any]:
    """The attacks at the bottom of wrappers; one that wraps nothing is its own.

    >>> from advkit.attacks import FGSM, PGD, Restarts, Worst
    >>> leaves(Worst((FGSM(), Restarts(PGD())))) == [FGSM(), PGD()]
    True
    """
    return [leaf for part in parts(attack) for leaf in leaves(part)] or [attack]


def rebuilt(attack: Any, change: Callable[[Any], Mapping[str, Any]]) -> Any:
    """The attack, with other settings at the bottom of its wrappers.

    Arguments:
        attack: The attack.
        change: An attack that wraps nothing to the settings that change.
    """
    wrapped = inner(attack)
    if not wrapped:
        new = change(attack)
        return dataclasses.replace(attack, **new) if new else attack
    several = {k: tuple(rebuilt(p, change) for p in v) for k, v in wrapped.items() if isinstance(v, tuple)}
    return dataclasses.replace(attack, **{k: rebuilt(v, change) for k, v in wrapped.items() if k not in several}, **several)


def longer(attack: Any, factor: int) -> Any | None:
    """The attack with so many times the steps or queries; None where it has neither.

    >>> from advkit.attacks import FGSM, PGD, Restarts
    >>> longer(Restarts(PGD(steps=20)), 2), longer(FGSM(), 2)
    (Restarts(attack=PGD(steps=40, step=None, loss='ce', start=True, momentum=0.0), n=10), None)
    """

    def more(leaf: Any) -> dict[str, int]:
        return {name: factor * getattr(leaf, name) for name in ("steps", "queries") if name in vars(leaf)}

    new = rebuilt(attack, more)
    return None if new == attack else new
