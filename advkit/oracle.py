"""What an attack may ask of a model, and the books of what it asked.

An attack sees a model only through an oracle, which answers, counts, enforces access and budget, sends only the rows that
are still in play to the model, and keeps the closest success of each row. So an attack is its paper's loop and nothing else.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from advkit.errors import AccessError, ModelError, UsageError, first_line
from advkit.losses import Loss
from advkit.threat import ThreatModel

Model = Callable[[Tensor], Any]


class Access(enum.IntEnum):
    """What the adversary sees of the model; each level includes the ones before it."""

    LABELS = 0
    SCORES = 1
    GRADIENTS = 2


def top1(outputs: Tensor, y: Tensor) -> Tensor:
    """Whether the greatest logit is the label's; outputs (N, K), y (N,) int64, result (N,) bool."""
    return outputs.argmax(1) == y


@dataclass(frozen=True)
class Goal:
    """What counts as success.

    Arguments:
        targeted: False: the outputs must not say y, the truth. True: they must say y, the target.
        says: Compares outputs with y, row by row: (outputs, y) -> (N,) bool.
    """

    targeted: bool = False
    says: Callable[[Tensor, Tensor], Tensor] = top1

    def met(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Which rows are successes, with shape (N,) and dtype bool."""
        return self.says(outputs, y) if self.targeted else ~self.says(outputs, y)


class Stop(Exception):
    """Raised by the oracle when no row is left to ask about; whoever opened the oracle catches it."""


def logits_of(outputs: Any) -> Tensor:
    """The tensor of logits in what a model returns: a tensor, an object or a mapping with ``logits``, or a tuple's first."""
    if isinstance(outputs, Tensor):
        return outputs
    if isinstance(outputs, dict) and "logits" in outputs:
        return logits_of(outputs["logits"])
    if hasattr(outputs, "logits"):
        return logits_of(outputs.logits)
    if isinstance(outputs, tuple | list) and outputs:
        return logits_of(outputs[0])
    raise ModelError(
        f"the model returned {type(outputs).__name__}; it should return a tensor of logits or an object with .logits"
    )


def answer(model: Model, x: Tensor) -> Tensor:
    """The model's logits for a batch, checked: one row an example, no NaN.

    Raises:
        ModelError: The model raised, or returned something else.
    """
    try:
        outputs = logits_of(model(x))
    except ModelError:
        raise
    except Exception as error:
        shape = tuple(x.shape)
        what = f"the model raised {type(error).__name__} on an input of shape {shape}"
        raise ModelError(f"{what}: {first_line(error)}") from error
    if outputs.ndim == 0 or len(outputs) != len(x) or not outputs.is_floating_point():
        kind = f"{str(outputs.dtype).removeprefix('torch.')} of shape {tuple(outputs.shape)}"
        raise ModelError(f"the model returned {kind} for {len(x)} examples; it should return one row of float logits for each")
    bad = int(outputs.detach().isnan().reshape(len(x), -1).any(1).sum())
    if bad:
        raise ModelError(f"the model returned NaN for {bad} of {len(x)} examples; logits must be numbers")
    return outputs


def check_outputs(outputs: Tensor, y: Tensor, goal: Goal) -> None:
    """Refuse classes that the model does not have; where a goal has its own idea of an answer, anything goes.

    Raises:
        ModelError: The outputs are not (N, K) logits with K at least 2.
        UsageError: y is not (N,) int64 with values from 0 to K - 1.
    """
    if goal.says is not top1:
        return
    if outputs.ndim != 2 or outputs.shape[1] < 2:
        raise ModelError(f"the model returned shape {tuple(outputs.shape)}; it should return at least two logits an example")
    what = "targets" if goal.targeted else "labels"
    if y.ndim != 1 or y.dtype != torch.int64:
        raise UsageError(f"the {what} are {y.dtype} of shape {tuple(y.shape)}; they should be int64 of shape (N,)")
    if int(y.min()) < 0 or int(y.max()) >= outputs.shape[1]:
        allowed = f"the model has classes 0 to {outputs.shape[1] - 1}"
        raise UsageError(f"the {what} are between {int(y.min())} and {int(y.max())}; {allowed}")


class Oracle:
    """One model, one batch, one threat model, one goal: everything an attack may ask.

    Arguments:
        model: Inputs (M, *) to outputs, one row an example.
        x: The clean inputs, with shape (N, *).
        y: The labels (targets, where the goal is targeted), with shape (N,).
        threat: What may change.
        goal: What counts as success.
        access: The most that may be asked.
        budget: The most forward passes that each row may be part of; None for no limit.
        track: False to answer and nothing else (training wants the last iterate, not the best).

    Attributes:
        forwards: How many forward passes each row was part of, with shape (N,).
        backwards: How many backward passes.
        found: Which rows have an allowed success, with shape (N,).
        distance: The distance of the closest, inf where there is none, with shape (N,).
        best: The closest success, x where there is none, with shape (N, *).

    The methods take candidates ``x_adv``. Without ``rows`` there is one for each row, with shape (N, *); with ``rows``, of
    shape (M,), candidate j belongs to row ``rows[j]``, and a row may have several. Candidates of rows that are done (fooled
    inside a fixed radius, or out of budget) are not sent to the model: their loss is -inf, their gradient 0, their outputs
    NaN, and they are not fooled. When no row is left, :class:`Stop` is raised.
    """

    def __init__(
        self,
        model: Model,
        x: Tensor,
        y: Tensor,
        threat: ThreatModel,
        goal: Goal | None = None,
        access: Access = Access.GRADIENTS,
        budget: int | None = None,
        track: bool = True,
    ) -> None:
        self._model, self.x, self._y, self.threat = model, x, y, threat
        self.goal = Goal() if goal is None else goal
        self.access, self.budget, self.track = access, budget, track
        # The logits of a reference, in training, are no labels.
        self.checked = not track and y.ndim == 2
        count = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        self.forwards, self.backwards = count, count.clone()
        self.found = torch.zeros_like(count, dtype=torch.bool)
        self.done = self.found.clone()
        self.distance = torch.full((len(x),), math.inf, dtype=x.dtype, device=x.device)
        self.best = x.clone() if track else x

    @property
    def live(self) -> Tensor:
        """The numbers of the rows still in play, with shape (L,)."""
        return self._alive().nonzero().squeeze(1)

    def outputs(self, x_adv: Tensor, rows: Tensor | None = None) -> Tensor:
        """The logits, (N, K). One forward pass; needs access to scores."""
        self._need(Access.SCORES)
        outputs, sent = self._forward(x_adv, rows)
        return _scatter(outputs, sent, len(x_adv), math.nan)

    def fooled(self, x_adv: Tensor, rows: Tensor | None = None) -> Tensor:
        """Which candidates meet the goal, inside the threat model or not, (N,) bool. One forward pass; needs labels only."""
        outputs, sent = self._forward(x_adv, rows)
        return _scatter(self.goal.met(outputs, self._labels(rows, sent)), sent, len(x_adv), False)

    def loss(self, x_adv: Tensor, loss: Loss, rows: Tensor | None = None) -> Tensor:
        """What the adversary maximizes: the loss for a label, less it for a target, (N,). One forward; needs scores."""
        self._need(Access.SCORES)
        outputs, sent = self._forward(x_adv, rows)
        values = self._sign(loss(outputs, self._labels(rows, sent))).to(x_adv.dtype)
        return _scatter(values, sent, len(x_adv), -math.inf)

    def grad(self, x_adv: Tensor, loss: Loss, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The loss, (N,), and its gradient in the input, (N, *). One forward and one backward pass; needs gradients.

        The gradient is of the sum over rows, so it does not depend on the batch. Entries that are not finite become 0.
        """
        self._need(Access.GRADIENTS)
        sent = self._admit(x_adv, rows)
        z = (x_adv if sent is None else x_adv[sent]).detach().requires_grad_(True)
        with torch.enable_grad():
            outputs = self._answer(z)
            if not outputs.requires_grad:
                raise AccessError(
                    "the model gives no gradient with respect to its input; "
                    'say that the adversary sees scores only (--access scores, access="scores"), or use such an attack'
                )
            values = self._sign(loss(outputs, self._labels(rows, sent)))
            (g,) = torch.autograd.grad(values.sum(), z)
        self._record(z.detach(), outputs.detach(), rows, sent, backward=True)
        values = _scatter(values.detach().to(x_adv.dtype), sent, len(x_adv), -math.inf)
        return values, _scatter(g.nan_to_num_(0.0, 0.0, 0.0), sent, len(x_adv), 0.0)

    def _answer(self, z: Tensor) -> Tensor:
        outputs = answer(self._model, z)
        if not self.checked:
            check_outputs(outputs, self._y, self.goal)
            self.checked = True
        return outputs

    def _need(self, access: Access) -> None:
        if access > self.access:
            raise AccessError(f"the attack asked for {access.name.lower()}; the adversary sees {self.access.name.lower()} only")

    def _sign(self, values: Tensor) -> Tensor:
        return -values if self.goal.targeted else values

    def _alive(self) -> Tensor:
        return ~self.done if self.budget is None else ~self.done & (self.forwards < self.budget)

    def _admit(self, x_adv: Tensor, rows: Tensor | None) -> Tensor | None:
        """Which candidates are sent to the model: their numbers, or None for all."""
        if not self.track:
            return None
        allowed = self._alive() if rows is None else self._alive()[rows]
        if rows is not None and self.budget is not None:
            allowed &= self.forwards[rows] + _occurrence(rows) < self.budget
        if bool(allowed.all()) and len(allowed):
            return None
        sent = allowed.nonzero().squeeze(1)
        if not len(sent):
            raise Stop
        return sent

    def _rows(self, rows: Tensor | None, sent: Tensor | None) -> Tensor | slice:
        if rows is None:
            return slice(None) if sent is None else sent
        return rows if sent is None else rows[sent]

    def _labels(self, rows: Tensor | None, sent: Tensor | None) -> Tensor:
        return self._y[self._rows(rows, sent)]

    def _forward(self, x_adv: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor | None]:
        sent = self._admit(x_adv, rows)
        z = x_adv if sent is None else x_adv[sent]
        with torch.no_grad():
            outputs = self._answer(z)
        self._record(z, outputs, rows, sent)
        return outputs, sent

    def _record(self, z: Tensor, outputs: Tensor, rows: Tensor | None, sent: Tensor | None, backward: bool = False) -> None:
        if not self.track:
            return
        who = self._rows(rows, sent)
        if isinstance(who, slice):
            who = torch.arange(len(self.x), device=self.x.device)
        one = torch.ones_like(who)
        self.forwards.index_add_(0, who, one)
        if backward:
            self.backwards.index_add_(0, who, one)
        self.keep(z, outputs, who)

    def keep(self, z: Tensor, outputs: Tensor, who: Tensor) -> None:
        """Note the successes among candidates ``z`` of rows ``who`` that are allowed and closer than what was known."""
        hit = self.goal.met(outputs, self._y[who])
        if not bool(hit.any()):
            return
        z, who = z[hit], who[hit]
        distance = self.threat.distance(z, self.x[who])
        allowed = self.threat.allows(z, self.x[who])
        closest = self.distance.scatter_reduce(0, who[allowed], distance[allowed], "amin")
        better = allowed & (distance < self.distance[who]) & (distance == closest[who])
        z, who = z[better], who[better]
        self.best[who], self.distance[who], self.found[who] = z, distance[better], True
        # Inside a fixed radius one success is enough; a search for the closest ends only at distance 0.
        self.done[who] |= distance[better] == 0 if self.threat.eps == math.inf else True


def _scatter(answers: Tensor, sent: Tensor | None, n: int, missing: float) -> Tensor:
    """``answers`` to the candidates numbered ``sent``, at their places among ``n``."""
    if sent is None:
        return answers
    full = answers.new_full((n, *answers.shape[1:]), missing)
    full[sent] = answers
    return full


def _occurrence(rows: Tensor) -> Tensor:
    """How many times the same number stands earlier in ``rows``, with shape (M,)."""
    ordered, order = rows.sort(stable=True)
    index = torch.arange(len(rows), device=rows.device)
    first = torch.ones_like(ordered, dtype=torch.bool)
    first[1:] = ordered[1:] != ordered[:-1]
    start = torch.where(first, index, torch.zeros_like(index)).cummax(0).values if len(rows) else index
    return torch.empty_like(rows).scatter_(0, order, index - start)
