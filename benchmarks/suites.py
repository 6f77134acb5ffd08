"""The attacks that an evaluation runs where none is named, by threat model and by what the adversary sees.

``standard`` is composed by measurement (``docs/measurements.md``): each attack is there because it breaks examples that those
before it leave, and cheap ones come first, so that dear ones meet only the survivors; ``if-masked`` is dear only for rows whose
gradients mislead, and early, as gradients are wasted on them. ``fast`` is for every commit,
``black-box`` for a model of which only answers are seen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from advkit import spec
from advkit.attacks import ATTACKS, Grid
from advkit.engine import Attack
from advkit.errors import UsageError
from advkit.norms import norm_name
from advkit.oracle import Access
from advkit.threat import Change, Lp

Table = Mapping[Access, Mapping[float, tuple[str, ...]]]

_CLIMBS = (
    'pgd(steps=10, loss="margin")',
    "apgd(steps=50)",
    'if-masked(square(queries=2500), climb=apgd(steps=10, loss="margin"), search=square(queries=100))',
    'apgd(steps=50, loss="margin")',
    "multi-targeted(apgd(steps=20), n=3)",
    "restarts(apgd(steps=50), n=3)",
    "multi-targeted(apgd(steps=20), n=9)",
)
_CLIMBS_L1 = (
    "apgd-l1(steps=50)",
    'if-masked(square(queries=2500), climb=apgd-l1(steps=10, loss="margin"), search=square(queries=100))',
    'apgd-l1(steps=50, loss="margin")',
    "multi-targeted(apgd-l1(steps=30), n=5)",
)
_CLIMBS_L0 = ("sigma-zero(steps=50)", "pgd(steps=100)", "fmn", "sigma-zero(steps=300)", "sparse-rs(queries=1000)")
_NOISE = ("uniform(n=10)", "gaussian(n=10)", "salt-and-pepper(n=10)")

STANDARD: Table = {
    Access.GRADIENTS: {math.inf: _CLIMBS, 2.0: _CLIMBS, 1.0: _CLIMBS_L1, 0.0: _CLIMBS_L0},
    Access.SCORES: {math.inf: ("square",), 2.0: ("square",), 1.0: ("square",), 0.0: ("sparse-rs",)},
    Access.LABELS: {
        math.inf: ("uniform(n=10)", "rays"),
        2.0: ("gaussian(n=10)", "surfree", "hopskipjump"),
        1.0: _NOISE,
        0.0: ("uniform(n=10)", "salt-and-pepper(n=10)"),
    },
}
"""Inside a radius."""

FAST: Table = {
    Access.GRADIENTS: {
        math.inf: ('pgd(steps=10, loss="margin")', "multi-targeted(apgd(steps=20), n=3)"),
        2.0: ('pgd(steps=10, loss="margin")', "multi-targeted(apgd(steps=20), n=3)"),
        1.0: ('apgd-l1(steps=30, loss="margin")',),
        0.0: ("sigma-zero(steps=50)",),
    },
    Access.SCORES: {
        **dict.fromkeys((math.inf, 2.0, 1.0), ("square(queries=300)",)),
        0.0: ("sparse-rs(queries=300)",),
    },
    Access.LABELS: {
        math.inf: ("rays(queries=300)",),
        2.0: ("surfree(queries=300)",),
        1.0: _NOISE,
        0.0: ("salt-and-pepper(n=10)",),
    },
}
"""Inside a radius, in a small part of the passes."""

CLOSEST: Table = {
    Access.GRADIENTS: {
        math.inf: ("fmn", "fab"),
        2.0: ("ddn", "fmn(steps=200, alpha=3)", "fab"),
        1.0: ("fmn", "fmn(steps=200, alpha=3)", "ead"),
        0.0: ("sigma-zero", "fmn", "sigma-zero(steps=300)"),
    },
    Access.SCORES: {},
    Access.LABELS: {math.inf: ("rays", "hopskipjump"), 2.0: ("surfree", "hopskipjump")},
}
"""Without a radius: the closest example."""

FEW: Mapping[Access, tuple[str, ...]] = {
    Access.GRADIENTS: ("uniform(n=10)", "pgd(steps=40)", "grid"),
    Access.SCORES: ("uniform(n=10)", "square(queries=500)", "grid"),
    Access.LABELS: ("uniform(n=10)", "grid"),
}
"""On a change that has so few parameters that a grid of them can be tried."""


def standard(threat: Lp | Change, access: Access = Access.GRADIENTS, entries: int | None = None) -> tuple[Attack, ...]:
    """The default: the strongest set of attacks for its time.

    Arguments:
        threat: What may change; without a radius, attacks that search for the closest example.
        access: What the adversary sees.
        entries: How many numbers an example's change has, where few enough for a grid matter.

    Raises:
        UsageError: No attack serves the threat model with this access.
    """
    if entries is not None and entries <= Grid().dimensions:
        return _parsed(FEW[access])
    return _chosen(STANDARD if threat.eps < math.inf else CLOSEST, threat, access)


def fast(threat: Lp | Change, access: Access = Access.GRADIENTS, entries: int | None = None) -> tuple[Attack, ...]:
    """For every commit: an upper bound of the robust accuracy in a small part of the passes.

    The arguments are those of :func:`standard`.
    """
    if entries is not None and entries <= Grid().dimensions:
        return _parsed(FEW[access][:1])
    return _chosen(FAST, threat, access) if threat.eps < math.inf else _chosen(CLOSEST, threat, access)[:1]


def black_box(threat: Lp | Change, access: Access = Access.SCORES, entries: int | None = None) -> tuple[Attack, ...]:
    """Without gradients: with scores where they may be seen, else with labels.

    The arguments are those of :func:`standard`.
    """
    return standard(threat, min(access, Access.SCORES), entries)


SUITES: Mapping[str, Callable[[Lp | Change, Access, int | None], tuple[Attack, ...]]] = {
    "standard": standard,
    "fast": fast,
    "black-box": black_box,
}
"""The suites that may be named in place of an attack."""


def _chosen(table: Table, threat: Lp | Change, access: Access) -> tuple[Attack, ...]:
    """The attacks of the greatest access, up to ``access``, that has any for the norm."""
    p = threat.p if isinstance(threat, Lp) else threat.ball.p
    for level in sorted(table, reverse=True):
        if level <= access and p in table[level]:
            return _parsed(table[level][p])
    raise UsageError(
        f"no suite has attacks for {norm_name(p)} with access to {access.name.lower()}; name attacks, or give a radius"
    )


def _parsed(names: tuple[str, ...]) -> tuple[Attack, ...]:
    return tuple(spec.parse(name, ATTACKS, "attack") for name in names)
