"""Defenses: training losses, one paper a file, and the table of their names."""

from __future__ import annotations

import torch
from torch import nn

from advkit.defenses.awp import AWP as AWP
from advkit.defenses.crown_ibp import CrownIBPTraining as CrownIBPTraining
from advkit.defenses.ensemble import EnsembleTraining as EnsembleTraining
from advkit.defenses.fast import FastTraining as FastTraining
from advkit.defenses.fgsm import FGSMTraining as FGSMTraining
from advkit.defenses.free import FreeTraining as FreeTraining
from advkit.defenses.gaussian import GaussianTraining as GaussianTraining
from advkit.defenses.gradalign import GradAlign as GradAlign
from advkit.defenses.ibp import IBPTraining as IBPTraining
from advkit.defenses.mart import MART as MART
from advkit.defenses.multi import MultiTraining as MultiTraining
from advkit.defenses.n_fgsm import NFGSM as NFGSM
from advkit.defenses.pgd import PGDTraining as PGDTraining
from advkit.defenses.smoothadv import SmoothAdv as SmoothAdv
from advkit.defenses.tensorboard import tensorboard as tensorboard
from advkit.defenses.trades import TRADES as TRADES
from advkit.defenses.training import Guard as Guard
from advkit.defenses.training import Threats as Threats
from advkit.defenses.training import Trained as Trained
from advkit.defenses.training import check_radius as check_radius
from advkit.defenses.training import held_out as held_out
from advkit.defenses.training import label as label
from advkit.defenses.training import threats_of as threats_of
from advkit.defenses.training import train as train
from advkit.defenses.worst_of_k import WorstOfK as WorstOfK
from advkit.errors import UsageError
from advkit.models.networks import build
from advkit.spec import Table, parse
from advkit.train import CrossEntropy, TrainingLoss

DEFENSES: Table = {
    "awp": AWP,
    "crown-ibp": CrownIBPTraining,
    "ensemble": EnsembleTraining,
    "fast": FastTraining,
    "fgsm": FGSMTraining,
    "free": FreeTraining,
    "gaussian": GaussianTraining,
    "gradalign": GradAlign,
    "ibp": IBPTraining,
    "mart": MART,
    "multi": MultiTraining,
    "n-fgsm": NFGSM,
    "pgd": PGDTraining,
    "plain": CrossEntropy,
    "smoothadv": SmoothAdv,
    "trades": TRADES,
    "worst-of-k": WorstOfK,
}
"""The training losses that a spec may name: ``pgd(steps=7)``; the threat model is given beside it."""


def fresh(network: str, loss: TrainingLoss, seed: int = 0) -> nn.Module:
    """A network with the weights that training with a loss begins with: those of the network, or the loss's own.

    Arguments:
        network: ``mnist-small``; advkit list models.
        loss: One with a method ``prepare(model, rng)`` draws the weights anew, as certified training does.
        seed: Of the weights.

    Raises:
        UsageError: An unknown network.
    """
    model = build(network, seed)
    if prepare := getattr(loss, "prepare", None):
        prepare(model, torch.Generator().manual_seed(seed))
    return model


def named(text: str, threat: Threats | None = None) -> TrainingLoss:
    """The training loss that a spec names.

    Arguments:
        text: ``trades(beta=6)``.
        threat: What it should withstand, several for ``multi``; None for a loss that knows no adversary.

    Raises:
        UsageError: An unknown name or setting, a loss that needs a threat model and has none, or one that takes a single one.
    """
    try:
        loss: TrainingLoss = parse(text, DEFENSES, "defense", defaults={} if threat is None else {"threat": threat})
    except UsageError as error:
        if threat is None and str(error).endswith("needs a value for threat"):
            raise UsageError(f"the defense {text} needs a threat model to withstand, as in linf(0.3)") from None
        if threat is not None and ": threat is" in str(error):
            takes = "takes one; multi takes several" if isinstance(threat, tuple) else "takes several"
            n = len(threat) if isinstance(threat, tuple) else 1
            raise UsageError(f"threat models were given: {n}; the defense {text} {takes}") from None
        raise
    return loss
