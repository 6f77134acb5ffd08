"""How far an adversary can push a model, how sure that number is, and what it costs in clean accuracy to do better.

The doors: :func:`evaluate` for a number with its interval and the examples behind it, :func:`run` to attack one batch,
:func:`perturb` for training. Attacks are in :mod:`advkit.attacks`, training losses in :mod:`advkit.defenses`.
"""

from advkit.benchmarks.evaluate import evaluate as evaluate
from advkit.benchmarks.result import Evaluation as Evaluation
from advkit.combine import Restarts as Restarts
from advkit.combine import Worst as Worst
from advkit.engine import Attack as Attack
from advkit.engine import AttackResult as AttackResult
from advkit.engine import frozen as frozen
from advkit.engine import perturb as perturb
from advkit.engine import run as run
from advkit.errors import AccessError as AccessError
from advkit.errors import ModelError as ModelError
from advkit.errors import UsageError as UsageError
from advkit.oracle import Access as Access
from advkit.oracle import Goal as Goal
from advkit.oracle import Oracle as Oracle
from advkit.threat import Lp as Lp
from advkit.version import __version__ as __version__
