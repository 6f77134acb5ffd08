"""The features in which images are compared: what a classifier's last dense layer is given.

Symbols: x are images, (N, *); f their features, (N, F); l the classifier's logits, (N, K).

A classifier learns what of an image matters for its name, so its hidden units are closer to what a person compares than pixels
are. Numbers in the features of one network say nothing about those in another's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from advkit.engine import frozen
from advkit.errors import UsageError
from advkit.oracle import answer

BATCH = 500
"""How many images the network sees at a time."""


def features(module: Any, x: Tensor, batch: int = BATCH) -> tuple[Tensor, Tensor]:
    """f, with shape (N, F), and l, with shape (N, K), in one pass, in float64 on the CPU.

    Arguments:
        module: The classifier, an ``nn.Module``; its mode and flags are left as they were.
        x: Images, with shape (N, *), as the classifier takes them.
        batch: How many it sees at a time.

    Raises:
        UsageError: It is no module, has no dense layer, or one that is not given a row of finite numbers for each image.
        ModelError: It does not take such images, or returns something other than logits.

    >>> f, l = features(nn.Sequential(nn.Flatten(), nn.ReLU(), nn.Linear(4, 2)), torch.rand(3, 1, 2, 2))
    >>> f.shape, l.shape
    (torch.Size([3, 4]), torch.Size([3, 2]))
    """
    first = next(check_network(module).parameters())
    found = []
    with frozen(module), torch.no_grad(), _heard(module) as given:
        for part in x.split(batch):
            logits = answer(module, part.to(first))
            found.append((_row(given, len(part)), logits.flatten(1).double().cpu()))
    f, logits = (torch.cat(parts) for parts in zip(*found, strict=True))
    return f, logits


def check_network(module: Any) -> nn.Module:
    """The network, if it has features.

    Raises:
        UsageError: It is no module, or has no dense layer.
    """
    if not isinstance(module, nn.Module):
        kind = type(module).__name__
        raise UsageError(f"the features' network is of type {kind}; it should be an nn.Module, whose hidden units can be seen")
    if not any(isinstance(layer, nn.Linear) for layer in module.modules()):
        raise UsageError("the features' network has no nn.Linear; the features are what its last one is given")
    return module


@contextlib.contextmanager
def _heard(module: nn.Module) -> Iterator[list[Tensor]]:
    """What the dense layer that was called last was given, as the only item of a list."""
    given: list[Tensor] = []

    def note(_: nn.Module, arguments: tuple[Any, ...]) -> None:
        given[:] = arguments[:1]

    hooks = [layer.register_forward_pre_hook(note) for layer in module.modules() if isinstance(layer, nn.Linear)]
    try:
        yield given
    finally:
        for hook in hooks:
            hook.remove()


def _row(given: list[Tensor], n: int) -> Tensor:
    if not given:
        raise UsageError("the features' network has an nn.Linear and never calls it; the features are what its last is given")
    f = given.pop().detach().double().cpu()
    if f.ndim != 2 or len(f) != n or not bool(f.isfinite().all()):
        what = f"the last nn.Linear of the features' network was given shape {tuple(f.shape)} for {n} images"
        raise UsageError(f"{what}; it should be a row of finite numbers for each")
    return f
