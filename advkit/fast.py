"""A cheaper stand-in for a network, which attacks may ask in its place: nearly the same answers and gradients in less time.

What it says counts for nothing by itself: the oracle has every success confirmed by the network (see ``fast`` of
:class:`advkit.oracle.Oracle`). So the stand-in only has to be close.
"""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from advkit.errors import UsageError, first_line
from advkit.oracle import logits_of

_CAST = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_COMPILERS = ("c++", "g++", "clang++", "cl")


class Fast(nn.Module):
    """A frozen copy of a network that computes in bfloat16; made by :func:`fast`.

    Matrix products and convolutions are in bfloat16; the input, its normalization and the last dense layer stay in float32,
    as what they round away would be as large as a small step, or as a small margin.

    Arguments:
        inner: The copy, which is changed.
        half: Whether to compute in bfloat16; else in float32.
        channels_last: Whether images, (N, C, H, W), are laid out pixel by pixel.
    """

    def __init__(self, inner: nn.Module, half: bool, channels_last: bool) -> None:
        super().__init__()
        self.in_half, self.channels_last, self.compiled = half, channels_last, False
        _pool_first(inner)
        inner.float().eval().requires_grad_(False)
        if half:
            _halve(inner)
        if channels_last:
            inner.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.inner: Callable[[Tensor], Any] = inner

    def forward(self, x: Tensor) -> Tensor:
        """The logits for inputs (N, *), in the dtype of x."""
        z = x.float()
        if self.channels_last and z.ndim == 4:
            z = z.contiguous(memory_format=torch.channels_last)
        # The weights are in bfloat16 already and fixed, so there is nothing to cache.
        with torch.autocast(z.device.type, torch.bfloat16, enabled=self.in_half, cache_enabled=False):
            return logits_of(self.inner(z)).to(x.dtype)


class _Full(nn.Linear):
    """A dense layer that stays in float32."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, in) to (N, out)."""
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.float(), self.weight, self.bias)


def fast(model: Callable[[Tensor], Any], *, half: bool = True, channels_last: bool = True, compile: bool = False) -> Fast:
    """A cheaper stand-in for a module, for ``run(..., fast=...)``; the module itself is left as it was.

    Arguments:
        model: Inputs (N, *) to logits (N, K).
        half: Whether to compute in bfloat16; else in float32.
        channels_last: Whether images, (N, C, H, W), are laid out pixel by pixel, which convolutions prefer.
        compile: Whether ``torch.compile`` translates it, once for all sizes of a batch; that takes from seconds to minutes.

    Raises:
        UsageError: The model is not a module, or one that cannot be copied, or there is no C++ compiler for ``compile``.
    """
    if not isinstance(model, nn.Module):
        kind = type(model).__name__
        raise UsageError(f"the model is of type {kind}, of which there is no fast stand-in; it should be a torch module")
    try:
        inner = copy.deepcopy(model)
    except Exception as error:
        what = f"the model {type(model).__name__} cannot be copied ({first_line(error)})"
        raise UsageError(f"{what}, so there is no fast stand-in for it; leave fast out") from error
    made = Fast(inner, half, channels_last)
    if compile:
        _check_compiler()
        made.inner, made.compiled = torch.compile(inner, dynamic=True), True
    return made


def _check_compiler() -> None:
    names = (os.environ.get("CXX") or "", *_COMPILERS)
    if not any(shutil.which(name) for name in names if name):
        raise UsageError(f"compiling needs a C++ compiler ({', '.join(_COMPILERS)}) and none is installed; leave compile out")


def _halve(model: nn.Module) -> None:
    """The weights of dense and convolutional layers in bfloat16, but for the last dense layer."""
    layers = [layer for layer in model.modules() if type(layer) in _CAST]
    dense = [layer for layer in layers if type(layer) is nn.Linear]
    for layer in layers:
        if dense and layer is dense[-1]:
            layer.__class__ = _Full
        else:
            for name, parameter in layer.named_parameters(recurse=False):
                setattr(layer, name, nn.Parameter(parameter.to(torch.bfloat16), requires_grad=False))


def _pool_first(model: nn.Module) -> None:
    """The greatest of a window before its ReLU rather than after it: the same numbers, from fewer entries."""
    for layers in model.modules():
        if type(layers) is not nn.Sequential:
            continue
        for i in range(len(layers) - 1):
            if type(layers[i]) is nn.ReLU and type(layers[i + 1]) is nn.MaxPool2d and not layers[i + 1].return_indices:
                layers[i], layers[i + 1] = layers[i + 1], layers[i]
