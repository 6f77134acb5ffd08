"""Defenses: training losses, one paper a file, and the table of their names."""

from __future__ import annotations

from advkit.defenses.pgd import PGDTraining as PGDTraining
from advkit.spec import Table

DEFENSES: Table = {
    "pgd": PGDTraining,
}
"""The training losses that a spec may name: ``pgd(steps=7)``; the threat model is given beside it."""
