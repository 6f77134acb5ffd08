"""The Frechet distance of two sets of features.

Symbols: f and g are features, (N, F) and (M, F), with means m and covariances S.
"""

from __future__ import annotations

import torch
from torch import Tensor

from advkit.errors import UsageError


def fid(f: Tensor, g: Tensor) -> float:
    """||m_f - m_g||^2 + tr(S_f + S_g - 2 (S_f S_g)^(1/2)), the squared 2-Wasserstein distance of two Gaussians.

    Heusel, Ramsauer, Unterthiner, Nessler and Hochreiter, 2017, "GANs trained by a two time-scale update rule converge to a
    local Nash equilibrium", https://arxiv.org/abs/1706.08500. With S = A^T A for the centred features A over sqrt(N - 1), the
    trace of the root is the sum of the singular values of A_f A_g^T, which are never complex, also where N < F. The estimate is
    too high by an amount that falls with N, so it is read beside that of as many real examples.

    Arguments:
        f: Features, with shape (N, F), in float64.
        g: The others, with shape (M, F).

    Raises:
        UsageError: There are fewer than two of either, or they are of different sizes or not finite.

    >>> f = torch.tensor([[0.0], [2.0]], dtype=torch.float64)
    >>> round(fid(f, f + 3), 6)
    9.0
    """
    check_sets(f, g)
    a, b = _root(f), _root(g)
    between = (f.mean(0) - g.mean(0)).square().sum()
    within = a.square().sum() + b.square().sum() - 2 * torch.linalg.svdvals(a @ b.T).sum()
    return max(0.0, float(between + within))


def _root(f: Tensor) -> Tensor:
    """A small matrix A with A^T A = S, with shape (min(N, F), F)."""
    a = (f - f.mean(0)) / (len(f) - 1) ** 0.5
    return torch.linalg.qr(a, mode="r").R


def check_sets(f: Tensor, g: Tensor, least: int = 2) -> None:
    """Refuse two sets of features that cannot be compared.

    Raises:
        UsageError: There are fewer than ``least`` of either, or they are of different sizes or not finite.
    """
    if f.ndim != 2 or g.ndim != 2 or f.shape[1] != g.shape[1]:
        shapes = f"{tuple(f.shape)} and {tuple(g.shape)}"
        raise UsageError(f"the features have shapes {shapes}; they should be (N, F) and (M, F), of one network")
    if min(len(f), len(g)) < least:
        raise UsageError(f"there are features of {len(f)} and {len(g)} images; there should be at least {least} of each")
    if not (bool(f.isfinite().all()) and bool(g.isfinite().all())):
        raise UsageError("the features hold NaN or infinite values; they should be finite")
