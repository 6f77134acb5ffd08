"""Detectors of adversarial examples, one paper a file, and the table of their names."""

from __future__ import annotations

from advkit.defenses.detectors.detector import Detector as Detector
from advkit.defenses.detectors.evasion import UNNOTICED as UNNOTICED
from advkit.defenses.detectors.evasion import Evade as Evade
from advkit.defenses.detectors.evasion import Rejecting as Rejecting
from advkit.defenses.detectors.evasion import Selective as Selective
from advkit.defenses.detectors.likelihood import Likelihood as Likelihood
from advkit.defenses.detectors.mahalanobis import Mahalanobis as Mahalanobis
from advkit.defenses.detectors.squeezing import Squeezing as Squeezing
from advkit.spec import Table

DETECTORS: Table = {
    "squeezing": Squeezing,
    "mahalanobis": Mahalanobis,
    "likelihood": Likelihood,
}
"""The detectors that a spec may name: ``squeezing(bits=1)``."""
