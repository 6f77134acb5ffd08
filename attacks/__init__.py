"""The attacks, one paper a file, and the table of their names."""

from __future__ import annotations

from advkit.attacks.bim import BIM as BIM
from advkit.attacks.fgsm import FGSM as FGSM
from advkit.attacks.fmn import FMN as FMN
from advkit.attacks.noise import Gaussian as Gaussian
from advkit.attacks.noise import SaltAndPepper as SaltAndPepper
from advkit.attacks.noise import Uniform as Uniform
from advkit.attacks.pgd import PGD as PGD
from advkit.attacks.square import Square as Square
from advkit.combine import Restarts, Worst
from advkit.spec import Table

ATTACKS: Table = {
    "fgsm": FGSM,
    "bim": BIM,
    "pgd": PGD,
    "fmn": FMN,
    "square": Square,
    "uniform": Uniform,
    "gaussian": Gaussian,
    "salt-and-pepper": SaltAndPepper,
    "restarts": Restarts,
    "worst": Worst,
}
"""The attacks that a spec may name: ``pgd(steps=40)``."""
