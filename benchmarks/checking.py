"""The checks of a benchmark's models: each family of threat models, with the attack that its numbers rest on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from advkit.attacks import FGSM
from advkit.benchmarks.cells import Prepared
from advkit.benchmarks.doctor import diagnose
from advkit.benchmarks.findings import Finding
from advkit.benchmarks.probe import inner
from advkit.benchmarks.records import shown
from advkit.engine import Attack
from advkit.oracle import Access

EXAMPLES = 64
"""How many examples the checks of a model look at."""


def check_model(prepared: Prepared, name: str) -> list[Finding]:
    """What the checks find of one model, under every family of threat models that has a radius."""
    found: list[Finding] = []
    for threat in prepared.suite.threats:
        if not threat.radii:
            continue
        # In the middle of the radii some examples are broken and some are left.
        made = prepared.plans[name, threat.family, threat.radii[len(threat.radii) // 2]]
        x, y = prepared.data.batch(0, min(EXAMPLES, len(prepared.data)))
        others = {other: model.module for other, model in prepared.models.items() if other != name}
        probed = diagnose(
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
        # The names that reports know; the commands have those that a model and a threat model are loaded by.
        found += [replace(finding, model=name, threat=shown(threat.family, made.threat.eps)) for finding in probed]
    return found


def leading(attacks: Sequence[Attack]) -> Attack:
    """The attack that is checked for the others: the one of most passes, if there are some of those that climb a gradient.

    Of these, one that does so by itself stands for those that wrap it, which cost many times as much.

    >>> from advkit.attacks import FGSM, PGD, Restarts, Square
    >>> leading([FGSM(), PGD(steps=3), Restarts(PGD(steps=9)), Square()]), leading([FGSM(), Restarts(PGD(), n=2)]).n
    (PGD(steps=3, step=None, loss='ce', start=True, momentum=0.0), 2)
    """

    def rank(attack: Attack) -> tuple[bool, bool, int]:
        return attack.access == Access.GRADIENTS and attack.cost > FGSM.cost, not inner(attack), attack.cost

    return max(attacks, key=rank)
