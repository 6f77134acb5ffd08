"""What a certificate says of a batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from advkit.threat import Lp


@dataclass(frozen=True)
class Certified:
    """What is certain, row by row.

    Attributes:
        certified: Whether the answer is the label's and nothing that the threat model allows changes it, with shape (N,).
        predicted: The answer, with shape (N,) and dtype int64; -1 where the certificate abstains.
        bound: What the margin, the label's logit minus the greatest other, is never below inside the threat model, with shape
            (N,); for smoothing, the radius.
        radius: Up to where the answer is certain, in the threat model's norm, with shape (N,): of methods that find one;
            otherwise the threat model's radius where the row is certified and 0 where it is not.
        broken: Of complete verification: whether an allowed input with another answer is known, with shape (N,). A row that is
            neither certified nor broken is open.
        x_adv: That input, with shape (N, *); x where none is known.
    """

    certified: Tensor
    predicted: Tensor
    bound: Tensor
    radius: Tensor
    broken: Tensor | None = None
    x_adv: Tensor | None = None


class Certificate(Protocol):
    """What every certificate is: frozen data whose fields are its settings, called on a model and a batch."""

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, threat: Lp, rng: torch.Generator) -> Certified:
        """What is certain of inputs (N, *) with labels (N,); draws, where there are any, come from rng."""
