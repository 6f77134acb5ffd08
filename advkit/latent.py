"""What a generator can draw instead of an input: the adversary moves in the space of its codes.

Symbols: x is an input, z(x) the code and y(x) the class from which a generator draws one like it, theta an offset of the code.
"""

from __future__ import annotations

import copy
import functools
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from advkit.ball import Lp
from advkit.changes import _Ranged
from advkit.errors import UsageError
from advkit.gan.pair import Pair, load
from advkit.gan.source import check_source
from advkit.python import is_python


@dataclass(frozen=True)
class Latent(_Ranged):
    r"""What a generator draws from the code z(x) + theta and the class y(x), which an inverter reads from the input.

    With a radius in l_inf the search space of Song, Shu, Kushman and Ermon, 2018, "Constructing unrestricted adversarial
    examples with generative models", https://arxiv.org/abs/1805.07894; without one, in l_2, that of Zhao, Dua and Singh, 2018,
    "Generating natural adversarial examples", https://arxiv.org/abs/1710.11342. Theta = 0 gives the generator's own drawing of
    x, not x: a model that is wrong about the drawing has an adversarial example at distance 0. No norm of pixels bounds what is
    found; whether it still shows the class, other classifiers say (``advkit gan judge``).

    Arguments:
        source: The generator with its inverter: a file that ``advkit gan invert`` wrote, or the file.py:function of a source
            that has ``invert(x)``, from inputs (N, *) to codes (N, d) and classes (N,), or None where it takes none.
        eps: The greatest norm of theta, in the units of the codes; inf asks for the closest code.
        p: The norm: 0, 1, 2 or inf.
        low: The least value the data may have.
        high: The greatest.

    Raises:
        UsageError: A norm that is not 0, 1, 2 or inf, a radius that is not positive, or an empty or infinite range.
    """

    source: str
    eps: float = math.inf
    p: float = math.inf
    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        self._check_range()
        _ = self.ball

    @property
    def ball(self) -> Lp:
        """The offsets that are allowed."""
        return Lp(self.p, self.eps, -math.inf, math.inf)

    def zero(self, x: Tensor) -> Tensor:
        """Zeros, with shape (N, d).

        Raises:
            UsageError: There is no such source, it has no inverter, or it does not draw what the data are.
        """
        source = _opened(self.source, x.device)
        check_source(source, self.source, tuple(x.shape[1:]), (self.low, self.high))
        if isinstance(source, Pair) and source.inverter is None:
            what = f"{self.source} has no inverter, which finds the code of an input"
            raise UsageError(f"{what}; train one: advkit gan invert {self.source}")
        if not callable(getattr(source, "invert", None)):
            what = f"{self.source} has no method invert"
            raise UsageError(f"{what}; it should give the codes, (N, d), and the classes, (N,) or None, of inputs (N, *)")
        return x.new_zeros(len(x), source.latent(1, torch.Generator().manual_seed(0)).shape[1])

    def apply(self, x: Tensor, theta: Tensor) -> Tensor:
        """What is drawn, in the range, with the shape of x; differentiable in theta."""
        source = _opened(self.source, x.device)
        with torch.no_grad():
            z, y = source.invert(x)
        drawn: Tensor = source.decode(z.to(theta) + theta, y)
        return drawn.to(x).clamp(self.low, self.high)


def _opened(text: str, device: torch.device) -> Any:
    """The source of a spec; the networks of a pair are on the device.

    One of Python is made once, as it is asked for at every step of an attack.
    """
    # Weights that are read under inference_mode would give no gradients for as long as they are kept, and networks draw
    # weights before they are read.
    with torch.inference_mode(False), torch.random.fork_rng(devices=[]):
        source = _made(text, *_changed(text)) if is_python(text) else load(text)
        return _placed(source, device) if isinstance(source, Pair) and device.type != "cpu" else source


def _changed(text: str) -> tuple[str, int]:
    """The folder that a name is relative to, and when the file of Python was changed; 0 for a module."""
    path = Path(text.rpartition(":")[0]).expanduser()
    return str(Path.cwd()), path.stat().st_mtime_ns if path.is_file() else 0


@functools.lru_cache(maxsize=4)
def _made(text: str, folder: str, changed: int) -> Any:
    return load(text)


@functools.lru_cache(maxsize=4)
def _placed(pair: Pair, device: torch.device) -> Pair:
    inverter = None if pair.inverter is None else copy.deepcopy(pair.inverter).to(device)
    return replace(pair, generator=copy.deepcopy(pair.generator).to(device), inverter=inverter)
