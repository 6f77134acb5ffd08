"""The attacks, one paper a file, and the table of their names."""

from __future__ import annotations

from advkit.attacks.admix import Admix as Admix
from advkit.attacks.advgan import AdvGAN as AdvGAN
from advkit.attacks.apgd import APGD as APGD
from advkit.attacks.apgd_l1 import APGDL1 as APGDL1
from advkit.attacks.bim import BIM as BIM
from advkit.attacks.boundary import Boundary as Boundary
from advkit.attacks.cw import CW as CW
from advkit.attacks.cw_linf import CWLinf as CWLinf
from advkit.attacks.ddn import DDN as DDN
from advkit.attacks.deepfool import DeepFool as DeepFool
from advkit.attacks.di import DI as DI
from advkit.attacks.ead import EAD as EAD
from advkit.attacks.fab import FAB as FAB
from advkit.attacks.fgsm import FGSM as FGSM
from advkit.attacks.fmn import FMN as FMN
from advkit.attacks.grid import Grid as Grid
from advkit.attacks.hopskipjump import HopSkipJump as HopSkipJump
from advkit.attacks.if_masked import IfMasked as IfMasked
from advkit.attacks.jsma import JSMA as JSMA
from advkit.attacks.mifgsm import MIFGSM as MIFGSM
from advkit.attacks.multitargeted import MultiTargeted as MultiTargeted
from advkit.attacks.natural import Natural as Natural
from advkit.attacks.nes import NES as NES
from advkit.attacks.nifgsm import NIFGSM as NIFGSM
from advkit.attacks.noise import Gaussian as Gaussian
from advkit.attacks.noise import SaltAndPepper as SaltAndPepper
from advkit.attacks.noise import Uniform as Uniform
from advkit.attacks.pdpgd import PDPGD as PDPGD
from advkit.attacks.pgd import PGD as PGD
from advkit.attacks.rays import RayS as RayS
from advkit.attacks.si import SI as SI
from advkit.attacks.sigma_zero import SigmaZero as SigmaZero
from advkit.attacks.simba import SimBA as SimBA
from advkit.attacks.sparse_rs import SparseRS as SparseRS
from advkit.attacks.spsa import SPSA as SPSA
from advkit.attacks.square import Square as Square
from advkit.attacks.surfree import SurFree as SurFree
from advkit.attacks.ti import TI as TI
from advkit.attacks.unrestricted import Unrestricted as Unrestricted
from advkit.attacks.vmi import VMI as VMI
from advkit.combine import Expect, Restarts, Worst
from advkit.spec import Table

ATTACKS: Table = {
    "fgsm": FGSM,
    "bim": BIM,
    "pgd": PGD,
    "apgd": APGD,
    "apgd-l1": APGDL1,
    "multi-targeted": MultiTargeted,
    "if-masked": IfMasked,
    "mi-fgsm": MIFGSM,
    "ni-fgsm": NIFGSM,
    "di": DI,
    "ti": TI,
    "si": SI,
    "vmi": VMI,
    "admix": Admix,
    "fmn": FMN,
    "deepfool": DeepFool,
    "ddn": DDN,
    "fab": FAB,
    "cw": CW,
    "cw-linf": CWLinf,
    "ead": EAD,
    "pdpgd": PDPGD,
    "square": Square,
    "nes": NES,
    "spsa": SPSA,
    "simba": SimBA,
    "jsma": JSMA,
    "sigma-zero": SigmaZero,
    "sparse-rs": SparseRS,
    "boundary": Boundary,
    "hopskipjump": HopSkipJump,
    "rays": RayS,
    "surfree": SurFree,
    "advgan": AdvGAN,
    "unrestricted": Unrestricted,
    "natural": Natural,
    "uniform": Uniform,
    "grid": Grid,
    "gaussian": Gaussian,
    "salt-and-pepper": SaltAndPepper,
    "expect": Expect,
    "restarts": Restarts,
    "worst": Worst,
}
"""The attacks that a spec may name: ``pgd(steps=40)``."""
