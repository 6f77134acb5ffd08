r"""Losses per example, never reduced: (outputs, y) -> (N,), low where the outputs say y.

An attack maximizes them for the true label and minimizes them for a target; that sign is the oracle's. Symbols: z are the
logits of one row, z_y the logit of its label, z_(1) >= z_(2) >= ... the logits in order. ``outputs`` has shape (N, K) and
``y`` has shape (N,) and dtype int64, unless said otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

Loss = Callable[..., Tensor]


def ce(outputs: Tensor, y: Tensor) -> Tensor:
    """Cross entropy, -log softmax(z)_y."""
    return F.cross_entropy(outputs, y, reduction="none")


def _others(outputs: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """z_y, and the greatest of the other logits; each with shape (N,)."""
    label = y.unsqueeze(1)
    z_y = outputs.gather(1, label).squeeze(1)
    return z_y, outputs.scatter(1, label, -torch.inf).amax(1)


def margin(outputs: Tensor, y: Tensor) -> Tensor:
    """Max over k != y of z_k, less z_y: positive exactly where the outputs say another class.

    Carlini and Wagner, 2017, https://arxiv.org/abs/1608.04644.
    """
    z_y, z_other = _others(outputs, y)
    return z_other - z_y


def _finite(outputs: Tensor) -> Tensor:
    """The logits, those of -inf (a class that is ruled out) raised to the least of the others in the row."""
    least = outputs.masked_fill(outputs == -torch.inf, torch.inf).amin(1, keepdim=True)
    return torch.where(outputs == -torch.inf, least, outputs)


def dlr(outputs: Tensor, y: Tensor) -> Tensor:
    """The difference of logits ratio, (max over k != y of z_k - z_y) / (z_(1) - z_(3)), free of the logits' scale.

    Croce and Hein, 2020, https://arxiv.org/abs/2003.01690. It needs three classes; with two, where the ratio would be
    constant, this is the margin.
    """
    if outputs.shape[1] < 3:
        return margin(outputs, y)
    z = _finite(outputs).topk(3, dim=1).values
    return margin(outputs, y) / (z[:, 0] - z[:, 2] + 1e-12)


def dlr_targeted(outputs: Tensor, y: Tensor) -> Tensor:
    """A targeted form, (max over k != y of z_k - z_y) / (z_(1) - (z_(3) + z_(4)) / 2), where y is the target.

    After Croce and Hein, 2020, https://arxiv.org/abs/2003.01690, who measure the target against the true label; here it is
    measured against the greatest other logit, so that the loss needs no label and is negative exactly on success. With three
    classes z_(3) stands for both; with two this is the margin.
    """
    if outputs.shape[1] < 3:
        return margin(outputs, y)
    z = _finite(outputs).topk(min(4, outputs.shape[1]), dim=1).values
    return margin(outputs, y) / (z[:, 0] - z[:, 2:].mean(1) + 1e-12)


def kl(outputs: Tensor, y: Tensor) -> Tensor:
    """KL(softmax(y) || softmax(z)), where y are the logits of a reference, with shape (N, K).

    The inner loss of TRADES (Zhang et al., 2019, https://arxiv.org/abs/1901.08573). For labels, with shape (N,), the
    reference is one-hot and this is the cross entropy.
    """
    if y.ndim == 1:
        return ce(outputs, y)
    return F.kl_div(outputs.log_softmax(1), y.log_softmax(1), reduction="none", log_target=True).sum(1)


def towards_margin(outputs: Tensor, y: Tensor, towards: Tensor) -> Tensor:
    """z_t - z_y for the class t that each row is pushed to; towards is (N,), or (N, C) for several, like the result."""
    t = towards if towards.ndim == 2 else towards.unsqueeze(1)
    return (outputs.gather(1, t) - outputs.gather(1, y.unsqueeze(1))).view_as(towards)


def towards_dlr(outputs: Tensor, y: Tensor, towards: Tensor) -> Tensor:
    """The targeted difference of logits ratio, (z_t - z_y) / (z_(1) - (z_(3) + z_(4)) / 2), for towards = t, (N,).

    Croce and Hein, 2020, https://arxiv.org/abs/2003.01690. With three classes z_(3) stands for both; with two this is the
    margin.
    """
    if outputs.shape[1] < 3:
        return towards_margin(outputs, y, towards)
    z = _finite(outputs).topk(min(4, outputs.shape[1]), dim=1).values
    return towards_margin(outputs, y, towards) / (z[:, 0] - z[:, 2:].mean(1) + 1e-12)


LOSSES: Mapping[str, Loss] = {
    "ce": ce,
    "margin": margin,
    "dlr": dlr,
    "dlr-targeted": dlr_targeted,
    "kl": kl,
}
