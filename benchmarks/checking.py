"""The checks of a benchmark's models: each family of threat models, with the attack that its numbers rest on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

from advkit.benchmarks.cells import Prepared
from advkit.benchmarks.doctor import diagnose
from advkit.benchmarks.findings import Finding
from advkit.engine import Attack
from advkit.oracle import Access

EXAMPLES = 64
"""How many examples the checks of a model look at."""


def check_model(prepared: Prepared, name: str) -> list[Finding]:
    """What the checks find of one model, under every family of threat models that has a radius."""
    found = []
    for threat in prepared.suite.threats:
        if not threat.radii:
            continue
        # In the middle of the radii some examples are broken and some are left.
        made = prepared.plans[name, threat.family, threat.radii[len(threat.radii) // 2]]
        x, y = prepared.data.batch(0, min(EXAMPLES, len(prepared.data)))
        others = {other: model.module for other, model in prepared.models.items() if other != name}
        found += diagnose(
            made.model,
            x.to(made.device, made.dtype),
            y.to(made.device),
            made.threat,
            attack=leading([attack for _, attack in made.attacks]),
            others=others,
            seed=prepared.suite.seeds[0],
            access=made.access,
            data=prepared.data.name,
        )
    # A name that reports know; the commands have the one that a model is loaded by.
    return [replace(finding, model=name) for finding in found]


def leading(attacks: Sequence[Attack]) -> Attack | None:
    """The attack that is checked for the others: of those that climb a gradient by themselves, the one of most passes."""
    climbing = [a for a in attacks if a.access is Access.GRADIENTS and not _nested(a) and 2 < a.cost < math.inf]
    return max(climbing, key=lambda attack: attack.cost, default=None)


def _nested(attack: Attack) -> bool:
    values: list[Any] = [getattr(attack, field.name) for field in fields(attack)] if is_dataclass(attack) else []
    return any(is_dataclass(one) for value in values for one in (value if isinstance(value, tuple) else (value,)))
