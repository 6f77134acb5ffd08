"""What each attack cost and what it was worth, and an order of the same attacks that costs less.

A pass is one forward or one backward pass of one example; the passes of the evaluation itself are not counted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from advkit.benchmarks.records import Records
from advkit.benchmarks.statistics import Rate, rate
from advkit.errors import UsageError

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Spent:
    """What one attack did to one model under one threat model, over all seeds.

    Attributes:
        model: The model's name.
        family: The family of the threat model.
        eps: The radius; inf where the closest example was searched for.
        attack: The attack.
        examples: How many examples it was run on.
        broke: How many of them it broke.
        own: How many are its own. In a search for the closest example, those to which it found the closest; where every attack
            was run on every example, those that no other attack broke; else those that no attack before it had broken.
        alone: The robust accuracy against this attack alone; None where it did not meet every example, or without a radius.
        median: The median distance of its successes; NaN where there are none.
        forwards: Its forward passes.
        backwards: Its backward passes.
        seconds: How long it took.
        attempts: On how many examples it was timed, each seed counted.
        memory: The most bytes of the device in use; 0 where that is not known.
    """

    model: str
    family: str
    eps: float
    attack: str
    examples: int
    broke: int
    own: int
    alone: Rate | None
    median: float
    forwards: int
    backwards: int
    seconds: float
    attempts: int
    memory: int

    @property
    def passes(self) -> int:
        """Forward and backward passes together."""
        return self.forwards + self.backwards

    @property
    def passes_each(self) -> float:
        """Passes for each example of its own; inf where it has none."""
        return self.passes / self.own if self.own else math.inf

    @property
    def seconds_each(self) -> float:
        """Seconds for each example of its own; inf where it has none."""
        return self.seconds / self.own if self.own else math.inf

    @property
    def examples_a_second(self) -> float:
        """Attempts a second; NaN where no time was measured."""
        return self.attempts / self.seconds if self.seconds else math.nan

    @property
    def passes_a_second(self) -> float:
        """Passes a second; NaN where no time was measured."""
        return self.passes / self.seconds if self.seconds else math.nan


def ledger(records: Records, model: str, family: str, eps: float) -> tuple[Spent, ...]:
    """What each attack did to a model at a radius, in the order of the attacks.

    Arguments:
        records: The run.
        model: The model's name.
        family: The family of the threat model.
        eps: A radius that was attacked, or inf for the search for the closest examples.
    """
    tries = _at(records.tries, model, family, eps)
    costs = _at(records.costs, model, family, eps)
    ran = [name for name in records.attacks(family) if (costs["attack"] == name).any() or (tries["attack"] == name).any()]
    own = _own(records, tries[tries["success"]], ran, eps)
    known = alone(records, model, family, [eps])
    found = []
    for name in ran:
        mine, cost = tries[tries["attack"] == name], costs[costs["attack"] == name]
        wins = mine[mine["success"]]
        found.append(
            Spent(
                model,
                family,
                eps,
                name,
                examples=int(mine["index"].nunique()),
                broke=int(wins["index"].nunique()),
                own=len(own[name]),
                alone=known.get((eps, name)),
                median=float(wins["distance"].median()) if len(wins) else math.nan,
                forwards=int(mine["forwards"].sum()),
                backwards=int(mine["backwards"].sum()),
                seconds=float(cost["seconds"].sum()),
                attempts=int(cost["examples"].sum()),
                memory=int(cost["memory"].max()) if len(cost) else 0,
            )
        )
    return tuple(found)


def _at(table: pd.DataFrame, model: str, family: str, eps: float) -> pd.DataFrame:
    return table[(table["model"] == model) & (table["family"] == family) & (table["eps"] == eps)]


def owners(records: Records, model: str, family: str, eps: float) -> dict[str, set[int]]:
    """The numbers of the examples that are each attack's own, as :class:`Spent` counts them."""
    tries = _at(records.tries, model, family, eps)
    return _own(records, tries[tries["success"]], records.attacks(family), eps)


def _own(records: Records, wins: pd.DataFrame, attacks: Sequence[str], eps: float) -> dict[str, set[int]]:
    if eps == math.inf:
        order = {name: i for i, name in enumerate(attacks)}
        wins = wins.assign(order=wins["attack"].map(order)).sort_values(["distance", "order"]).drop_duplicates("index")
        return {name: set(wins.loc[wins["attack"] == name, "index"]) for name in attacks}
    broken = {name: set(wins.loc[wins["attack"] == name, "index"]) for name in attacks}
    others = {name: [n for n in attacks if n != name] for name in attacks}
    if not records.about["alone"]:
        others = {name: list(attacks[:i]) for i, name in enumerate(attacks)}
    return {name: broken[name].difference(*(broken[other] for other in others[name])) for name in attacks}


def alone(records: Records, model: str, family: str, radii: Sequence[float]) -> dict[tuple[float, str], Rate]:
    """The robust accuracy against one attack alone, by radius and attack, where it met every example that is right.

    With each of its seeds. An attempt inside the radius and a search for the closest example both count as a meeting.
    """
    right = records.clean_accuracy(model).count
    tries = records.tries[(records.tries["model"] == model) & (records.tries["family"] == family)]
    met = tries.groupby(["eps", "attack", "seed"])["index"].nunique().groupby(level=["eps", "attack"]).min()
    found = {}
    for name in records.attacks(family):
        for eps in (eps for eps in radii if eps < math.inf):
            if right in (met.get((eps, name), 0), met.get((math.inf, name), 0)):
                closest = records.closest(model, family, attack=name)
                found[eps, name] = rate(int((closest > eps).sum()), len(closest))
    return found


@dataclass(frozen=True)
class Step:
    """One attack in an order.

    Attributes:
        attack: The attack.
        broke: How many attempts it ends that no attack before it ended.
        passes: The passes it makes on what is left for it.
    """

    attack: str
    broke: int
    passes: int


@dataclass(frozen=True)
class Order:
    """An order of a family's attacks, each run on what those before it left.

    Attributes:
        family: The family.
        steps: The attacks in this order.
        given: The passes in the order of the suite.
    """

    family: str
    steps: tuple[Step, ...]
    given: int

    @property
    def passes(self) -> int:
        """The passes in this order."""
        return sum(step.passes for step in self.steps)

    @property
    def needed(self) -> int:
        """The passes without the attacks that break nothing in their place."""
        return sum(step.passes for step in self.steps if step.broke)

    @property
    def needless(self) -> tuple[str, ...]:
        """The attacks that break nothing in their place."""
        return tuple(step.attack for step in self.steps if not step.broke)

    @property
    def saving(self) -> float:
        """The share of the passes of the suite's order that this one saves; negative where it costs more."""
        return 1 - self.passes / self.given if self.given else 0.0


def plan_order(records: Records, family: str) -> Order | None:
    """The greedy order: next comes the attack that breaks the most new examples per pass on what is left.

    The passes are those of the run: an example's streams do not depend on the others, so an attack does the same to it in any
    order. The greedy order is within a factor of 4 of the best where a set's cost is the same for each element (K. Munagala,
    S. Babu, R. Motwani and J. Widom, 2005, The Pipelined Set Cover Problem,
    https://crypto.stanford.edu/portia/pubs/articles/MBMW426083269.html); here that is a heuristic.

    Arguments:
        records: The run.
        family: The family of the threat model.

    Returns:
        The order over all models, radii and seeds; None where not every attack met every example inside a radius, or there
        is one attack only.

    Raises:
        UsageError: The family is not in the run.
    """
    if family not in records.families:
        raise UsageError(f"{family} was not measured; measured are {', '.join(records.families)}")
    tries = records.tries[(records.tries["family"] == family) & (records.tries["eps"] < math.inf)]
    names = [name for name in records.attacks(family) if (tries["attack"] == name).any()]
    if not records.about["alone"] or len(names) < 2:
        return None
    tries = tries.assign(passes=tries["forwards"] + tries["backwards"])
    wide = tries.pivot(index=["model", "eps", "seed", "index"], columns="attack", values=["success", "passes"])
    if wide.isna().any(axis=None):
        return None
    success, passes = wide["success"].astype(bool), wide["passes"].astype(int)
    given = _chain(names, success, passes)
    return Order(family, _chain(_greedy(names, success, passes), success, passes), sum(step.passes for step in given))


def _greedy(names: Sequence[str], success: pd.DataFrame, passes: pd.DataFrame) -> list[str]:
    order: list[str] = []
    while len(order) < len(names):
        left = ~success[order].any(axis=1)
        cost = {name: max(1, int(passes.loc[left, name].sum())) for name in names if name not in order}
        order.append(max(cost, key=lambda name: (success.loc[left, name].sum() / cost[name], -cost[name])))
    return order


def _chain(order: Sequence[str], success: pd.DataFrame, passes: pd.DataFrame) -> tuple[Step, ...]:
    steps = []
    for i, name in enumerate(order):
        left = ~success[list(order[:i])].any(axis=1)
        steps.append(Step(name, int(success.loc[left, name].sum()), int(passes.loc[left, name].sum())))
    return tuple(steps)
