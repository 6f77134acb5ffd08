"""Certificates: what no adversary can do inside a radius."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from advkit import spec
from advkit.defenses.certificates.bounds import CROWN as CROWN
from advkit.defenses.certificates.bounds import IBP as IBP
from advkit.defenses.certificates.bounds import AlphaCROWN as AlphaCROWN
from advkit.defenses.certificates.complete import Complete as Complete
from advkit.defenses.certificates.result import Certificate as Certificate
from advkit.defenses.certificates.result import Certified as Certified
from advkit.defenses.certificates.smoothing import Smoothing as Smoothing
from advkit.spec import Table
from advkit.threat import Lp

CERTIFICATES: Table = {
    "ibp": IBP,
    "crown-ibp": partial(CROWN, intermediate="ibp"),
    "crown": CROWN,
    "alpha-crown": AlphaCROWN,
    "complete": Complete,
    "smoothing": Smoothing,
}
"""The certificates that a spec may name: ``alpha-crown(steps=50)``."""


def verified(model: nn.Module, x: Tensor, y: Tensor, threat: Lp, method: str | Certificate = "ibp", seed: int = 0) -> Tensor:
    """Which rows are answered with their label, whatever the threat model allows, with shape (N,) and dtype bool.

    Arguments:
        model: Inputs (N, *) to logits (N, classes); used in evaluation mode and left as it was.
        x: The inputs, with shape (N, *), inside the threat model's range.
        y: The labels, with shape (N,) and dtype int64.
        threat: A ball with a radius.
        method: A certificate, or a spec of one in ``CERTIFICATES``.
        seed: Of the draws of a certificate that makes some.

    Raises:
        UsageError: An unknown method, or a model, inputs or a threat model that it does not serve.
    """
    certificate = spec.parse(method, CERTIFICATES, "certificate") if isinstance(method, str) else method
    return certificate(model, x, y, threat, torch.Generator().manual_seed(seed)).certified
