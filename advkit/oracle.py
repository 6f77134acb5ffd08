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
from advkit.losses import Loss, towards_margin
from advkit.threat import ThreatModel

Model = Callable[[Tensor], Any]
Through = Callable[[Tensor, Tensor], Tensor]
"""(candidates, the numbers of their rows) to what the model is shown."""


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
        loss: Where outputs are no logits of classes, what takes the place of every attack's own loss: (outputs, y) -> (N,),
            not negative. In a search for the closest its values have the sign of the margin: positive on success.
    """

    targeted: bool = False
    says: Callable[[Tensor, Tensor], Tensor] = top1
    loss: Loss | None = None

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
    except (ModelError, torch.OutOfMemoryError):
        # Whoever chose the size of the batch can do with less.
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

        fast: A cheaper stand-in that gives nearly the same outputs and gradients; the model itself confirms each success, and
            a row whose success it does not confirm goes on with the model itself.
        votes: How often a success is tried again, where the model's answers change from call to call. Inside a fixed radius it
            stands if more than half of the answers are fooled, and the row goes on until all are, and all of twice as many
            more; of several, that with the most votes is kept. In a search for the closest it stands only then.
        render: Candidates and their row numbers to the model's inputs, where candidates are not inputs but what changes them.

    Attributes:
        forwards: How many forward passes each row was part of, with shape (N,).
        backwards: How many backward passes.
        checks: How many forward passes were made to confirm successes, and for the clean inputs.
        once: Which rows the model was fooled on at least once, inside the threat model.
        found: Which rows have an allowed success, with shape (N,).
        distance: The distance of the closest, inf where there is none, with shape (N,).
        best: The closest success, x where there is none, with shape (N, *).

    The methods take candidates ``x_adv``. Without ``rows`` there is one for each row, with shape (N, *); with ``rows``, of
    shape (M,), candidate j belongs to row ``rows[j]``, and a row may have several. Candidates of rows that are done (fooled
    inside a fixed radius, or out of budget) are not sent to the model: their loss is -inf, their gradient 0, their outputs
    NaN, and they are not fooled. When no row of the batch is left, :class:`Stop` is raised.

    A loss takes (outputs, y), or with ``towards``, one class (or several) for each candidate, (outputs, y, towards). With
    ``through``, (candidates, their row numbers) to inputs, the model is shown what that makes of the candidates; gradients
    pass back through it, and no success is noted, as the model did not see the candidates themselves.
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
        *,
        fast: Model | None = None,
        votes: int = 1,
        render: Through | None = None,
    ) -> None:
        self._model, self.x, self._y, self.threat = model, x, y, threat
        self.goal = Goal() if goal is None else goal
        self.access, self.budget, self.track = access, budget, track
        self._fast, self.votes, self.render = fast, votes, render
        # The logits of a reference, in training, are no labels.
        self._checked = not track and y.ndim == 2
        self._none_sent = torch.empty(0, 0, dtype=x.dtype, device=x.device)
        count = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        self.forwards, self.backwards, self.checks = count, count.clone(), count.clone()
        self.found = torch.zeros_like(count, dtype=torch.bool)
        self.done, self.once = self.found.clone(), self.found.clone()
        self.exact = torch.full_like(self.found, fast is None)
        self.distance = torch.full((len(x),), math.inf, dtype=x.dtype, device=x.device)
        self.best = x.clone() if track else x
        # Successes are compared by distance; inside a fixed radius by votes first, and of as many votes the later one is kept.
        self._rank = self.distance.clone()
        self._vote = 2 * threat.eps + 1 if votes > 1 and threat.eps < math.inf else 0.0

    @property
    def live(self) -> Tensor:
        """The numbers of the rows still in play, with shape (L,)."""
        return self._alive().nonzero().squeeze(1)

    def begin(self) -> Tensor:
        """The outputs for x itself, (N, K); rows that already meet the goal are done, at distance 0. Not the attack's pass."""
        given = self.x.clone()
        with torch.no_grad():
            outputs = self._see(given, torch.arange(len(given), device=given.device), exact=True)
        if not torch.equal(given, self.x):
            raise ModelError("the model changes its input in place; it should leave its input alone")
        self.checks += 1
        self._keep(self.x, outputs, torch.arange(len(given), device=given.device))
        return outputs

    def outputs(self, x_adv: Tensor, rows: Tensor | None = None, *, through: Through | None = None) -> Tensor:
        """The logits, (N, K). One forward pass; needs access to scores."""
        self._need(Access.SCORES)
        outputs, sent, _ = self._forward(x_adv, rows, through)
        return _scatter(outputs, sent, len(x_adv), math.nan)

    def fooled(self, x_adv: Tensor, rows: Tensor | None = None, *, through: Through | None = None) -> Tensor:
        """Which candidates meet the goal, inside the threat model or not, (N,) bool. One forward pass; needs labels only."""
        outputs, sent, who = self._forward(x_adv, rows, through)
        return _scatter(self.goal.met(outputs, self._y[who]), sent, len(x_adv), False)

    def loss(
        self,
        x_adv: Tensor,
        loss: Loss,
        rows: Tensor | None = None,
        *,
        towards: Tensor | None = None,
        through: Through | None = None,
    ) -> Tensor:
        """What the adversary maximizes: the loss for a label, less it for a target, (N,). One forward; needs scores."""
        self._need(Access.SCORES)
        outputs, sent, who = self._forward(x_adv, rows, through)
        values = self._value(loss, outputs, who, _part(towards, sent)).to(x_adv.dtype)
        return _scatter(values, sent, len(x_adv), -math.inf)

    def grad(
        self,
        x_adv: Tensor,
        loss: Loss,
        rows: Tensor | None = None,
        *,
        towards: Tensor | None = None,
        through: Through | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The loss, (N,), and its gradient in the input, (N, *): one forward and one backward pass; needs gradients.

        The gradient is of the sum over rows, so it does not depend on the batch. Entries that are not finite become 0.
        """
        values, g = self._backward(x_adv, loss, rows, towards, through)
        return values, g[:, 0]

    def jacobian(self, x_adv: Tensor, towards: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """What is to be gained towards each of C classes, z_t - z_y (less it for a target), (N, C), and gradients, (N, C, *).

        One forward and C backward passes; needs gradients. ``towards`` has shape (N, C), or (M, C) with ``rows``.
        """
        return self._backward(x_adv, towards_margin, rows, towards, None)

    def rivals(self, outputs: Tensor, n: int, rows: Tensor | None = None) -> Tensor:
        """The classes other than y with the greatest logits, greatest first, (N, min(n, K - 1)) int64. No pass."""
        self._need_classes()
        y = self._y if rows is None else self._y[rows]
        z = outputs.nan_to_num(nan=0.0).clamp(min=torch.finfo(outputs.dtype).min)
        order = z.scatter(1, y.unsqueeze(1), -math.inf).argsort(dim=1, descending=True, stable=True)
        return order[:, : min(n, outputs.shape[1] - 1)]

    def _backward(
        self, x_adv: Tensor, loss: Loss, rows: Tensor | None, towards: Tensor | None, through: Through | None
    ) -> tuple[Tensor, Tensor]:
        """The values, (N,) or (N, C), and their gradients, (N, 1 or C, *)."""
        self._need(Access.GRADIENTS)
        sent, who = self._admit(x_adv, rows)
        z = (x_adv if sent is None else x_adv[sent]).detach().requires_grad_(True)
        with torch.enable_grad():
            outputs = self._see(z, who, through)
            if len(z) and not outputs.requires_grad:
                raise AccessError(
                    "the model gives no gradient with respect to its input; "
                    'say that the adversary sees scores only (--access scores, access="scores"), or use such an attack'
                )
            values = self._value(loss, outputs, who, _part(towards, sent))
            columns = values.unsqueeze(1) if values.ndim == 1 else values
            parts = [_input_gradient(column.sum(), z, c + 1 < columns.shape[1]) for c, column in enumerate(columns.unbind(1))]
            g = torch.stack(parts, 1)
        said = outputs.detach()
        known = self._record(z.detach(), said, who, columns.shape[1], through)
        if known is not said:
            values = self._value(loss, known, who, _part(towards, sent))
        values = _scatter(values.detach().to(x_adv.dtype), sent, len(x_adv), -math.inf)
        return values, _scatter(g.nan_to_num_(0.0, 0.0, 0.0), sent, len(x_adv), 0.0)

    def _see(self, z: Tensor, who: Tensor, through: Through | None = None, exact: bool = False) -> Tensor:
        """The outputs for candidates ``z`` of rows ``who``: of the fast model, but for rows that need the exact one."""
        if not len(z):
            return self._none_sent
        if self.render is not None:
            z = self.render(z, who)
        if through is not None:
            z = through(z, who)
        outputs = answer(self._model, z) if exact or self._fast is None else self._quick(z, self.exact[who])
        if not self._checked:
            check_outputs(outputs, self._y, self.goal)
            self._checked = True
        self._none_sent = outputs.detach()[:0]
        return outputs

    def _quick(self, z: Tensor, exact: Tensor) -> Tensor:
        assert self._fast is not None
        if not bool(exact.any()):
            return answer(self._fast, z)
        if bool(exact.all()):
            return answer(self._model, z)
        parts = answer(self._fast, z[~exact]), answer(self._model, z[exact])
        order = torch.cat([(~exact).nonzero().squeeze(1), exact.nonzero().squeeze(1)])
        return torch.cat([part.to(z.dtype) for part in parts])[order.argsort()]

    def _value(self, loss: Loss, outputs: Tensor, who: Tensor, towards: Tensor | None) -> Tensor:
        y = self._y[who]
        if towards is None:
            values = self._sign((self.goal.loss or loss)(outputs, y))
            return self._margin(values, outputs, y) if self.goal.loss and self.threat.eps == math.inf else values
        self._need_classes()
        return self._sign(loss(outputs, y, towards))

    def _margin(self, values: Tensor, outputs: Tensor, y: Tensor) -> Tensor:
        """The goal's own loss in the sense of the margin, which searches for the closest go by: positive on success only."""
        far = values.detach().abs()
        below = far if self.goal.targeted else 1 / (1 + far)
        return values - values.detach() + torch.where(self.goal.met(outputs.detach(), y), far, -below)

    def _need_classes(self) -> None:
        if self.goal.loss is not None:
            raise UsageError("the attack compares classes, and these outputs have none; use another, as in pgd")

    def _need(self, access: Access) -> None:
        if access > self.access:
            raise AccessError(f"the attack asked for {access.name.lower()}; the adversary sees {self.access.name.lower()} only")

    def _sign(self, values: Tensor) -> Tensor:
        return -values if self.goal.targeted else values

    def _alive(self) -> Tensor:
        return ~self.done if self.budget is None else ~self.done & (self.forwards < self.budget)

    def _admit(self, x_adv: Tensor, rows: Tensor | None) -> tuple[Tensor | None, Tensor]:
        """Which candidates are sent to the model, their numbers or None for all; and which rows they belong to."""
        who = torch.arange(len(x_adv), device=x_adv.device) if rows is None else rows
        if not self.track:
            return None, who
        alive = self._alive()
        allowed = alive[who]
        if rows is not None and self.budget is not None:
            allowed &= self.forwards[rows] + _occurrence(rows) < self.budget
        if bool(allowed.all()) and len(allowed):
            return None, who
        if not bool(alive.any()):
            raise Stop
        sent = allowed.nonzero().squeeze(1)
        return sent, who[sent]

    def _forward(self, x_adv: Tensor, rows: Tensor | None, through: Through | None) -> tuple[Tensor, Tensor | None, Tensor]:
        sent, who = self._admit(x_adv, rows)
        z = x_adv if sent is None else x_adv[sent]
        with torch.no_grad():
            outputs = self._see(z, who, through)
        return self._record(z, outputs, who, 0, through), sent, who

    def _record(self, z: Tensor, outputs: Tensor, who: Tensor, backwards: int, through: Through | None) -> Tensor:
        """The outputs, as :meth:`_keep` leaves them."""
        if not self.track:
            return outputs
        one = torch.ones_like(who)
        self.forwards.index_add_(0, who, one)
        if backwards:
            self.backwards.index_add_(0, who, backwards * one)
        return outputs if through is not None else self._keep(z, outputs, who)

    def _keep(self, z: Tensor, outputs: Tensor, who: Tensor) -> Tensor:
        """Note the successes among candidates ``z`` of rows ``who`` that are allowed and closer than what was known.

        The outputs come back; where the model denies what a stand-in called a success, with the model's own in their place, so
        that no attack builds on it.
        """
        hit = self.goal.met(outputs, self._y[who]).nonzero().squeeze(1)
        if not len(hit):
            return outputs
        z, who = z[hit], who[hit]
        distance = self.threat.distance(z, self.x[who])
        better = self.threat.allows(z, self.x[who]) & (distance - self._vote * (self.votes + 1) < self._rank[who])
        hit, z, who, distance = hit[better], z[better], who[better], distance[better]
        guessed = ~self.exact[who]
        votes, said = self._confirmed(z, who)
        if said is not None and bool((denied := guessed & (votes == 0)).any()):
            outputs = outputs.index_put((hit[denied],), said[denied].to(outputs.dtype))
        rank = torch.where(votes > 0, distance - self._vote * votes, math.inf)
        first = (votes > 0) & (rank == self._rank.scatter_reduce(0, who, rank, "amin")[who])
        z, who, distance, votes = z[first], who[first], distance[first], votes[first]
        self.best[who], self.distance[who], self.found[who] = z, distance, True
        self._rank[who] = self._vote * (0.5 - votes) if self._vote else distance
        # Inside a fixed radius one success is enough; a search for the closest ends only at distance 0.
        self.done[who] |= distance == 0 if self.threat.eps == math.inf else votes > self.votes
        return outputs

    def _confirmed(self, z: Tensor, who: Tensor) -> tuple[Tensor, Tensor | None]:
        """How many of the exact model's answers each success fools, (M,), 0 where it does not stand; and one of them.

        One vote more where it is sure: a success that was picked among many tries may have been lucky in all of the votes.
        A row whose fast success does not stand goes on with the exact model.
        """
        self.once[who[self.exact[who]]] = True
        if not len(z) or (self.votes == 1 and bool(self.exact[who].all())):
            return 2 * torch.ones_like(who), None
        answers = [self.verify(z, who) for _ in range(self.votes)]
        met = torch.stack([met for _, met in answers]).sum(0)
        sure = met == self.votes
        for _ in range(2 * self.votes if self.votes > 1 else 0):
            left = sure.nonzero().squeeze(1)
            sure[left] = self.verify(z[left], who[left])[1]
        stands = sure if self.threat.eps == math.inf else 2 * met > self.votes
        self.once[who[met > 0]] = True
        self.exact[who[~stands]] = True
        return torch.where(stands, met + sure.long(), 0), answers[0][0]

    def verify(self, z: Tensor, who: Tensor) -> tuple[Tensor, Tensor]:
        """The outputs of the model itself for candidates of rows ``who``, (M, K), and which meet the goal, (M,). A check."""
        with torch.no_grad():
            outputs = self._see(z, who, exact=True)
        self.checks.index_add_(0, who, torch.ones_like(who))
        return outputs, self.goal.met(outputs, self._y[who])


def _input_gradient(value: Tensor, z: Tensor, keep: bool) -> Tensor:
    """The gradient of a number in the input; zero where no candidate was sent."""
    if not len(z):
        return torch.zeros_like(z)
    (g,) = torch.autograd.grad(value, z, retain_graph=keep)
    return g


def _part(values: Tensor | None, sent: Tensor | None) -> Tensor | None:
    """What belongs to the candidates that are sent."""
    return values if values is None or sent is None else values[sent]


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
