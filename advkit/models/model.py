"""A model that advkit can attack: what it is called, what it can answer, and a look at it before a long run."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from advkit.engine import check_device, frozen
from advkit.errors import ModelError, UsageError
from advkit.models.digest import digest_of
from advkit.oracle import Access, answer, logits_of

_FEW = 4
RANDOM = "the model is random: its answers to the same input change from call to call"
"""What is said of a model that answers twice differently."""
_PROBABILITIES = "the model is said to return probabilities; attacks see their logarithm"


@dataclass(frozen=True)
class Model:
    """A model and what is known of it.

    Attributes:
        module: Inputs (N, *) to logits (N, K); nearly always a module in evaluation mode.
        name: The spec as it was typed, or the name of the class.
        access: The most that it can answer.
        digest: The hex SHA-256 of its contents: of the file, or of the code, settings and weights.
        notes: What a person should be told, each a sentence.
    """

    module: Callable[[Tensor], Any]
    name: str
    access: Access
    digest: str
    notes: tuple[str, ...] = ()


class LogProbabilities(nn.Module):
    """The logarithm of a model's probabilities; a softmax of it gives the probabilities back.

    Arguments:
        inner: Inputs (N, *) to probabilities (N, K).
    """

    def __init__(self, inner: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        """Log-probabilities, with shape (N, K); those of 0 are the logarithm of the least positive number."""
        p = logits_of(self.inner(x))
        return p.clamp(min=torch.finfo(p.dtype).tiny).log()


def _name(module: Callable[..., Any]) -> str:
    return str(getattr(module, "__name__", type(module).__name__))


def wrap(module: Callable[[Tensor], Any] | Model, name: str | None = None, probabilities: bool = False) -> Model:
    """A model out of any callable; a :class:`Model` comes back as it is.

    Arguments:
        module: A module, or any callable of inputs (N, *).
        name: What reports call it; by default, the name of its class or function.
        probabilities: Whether it returns probabilities; attacks are then given their logarithm.

    Raises:
        UsageError: It cannot be called.
    """
    if not isinstance(module, Model):
        if not callable(module):
            raise UsageError(f"the model is of type {type(module).__name__}; it should be a module or another callable")
        module = Model(module, name or _name(module), Access.GRADIENTS, digest_of(module))
    if not probabilities:
        return module
    logarithm, notes = LogProbabilities(module.module), (*module.notes, _PROBABILITIES)
    # Another model, as far as telling two runs apart goes.
    digest = hashlib.sha256(f"{module.digest} log".encode()).hexdigest()
    return dataclasses.replace(module, module=logarithm, notes=notes, digest=digest)


def inspect(model: Model, x: Tensor, y: Tensor, classes: int = 0) -> tuple[str, ...]:
    """Look at a model before a long run: two forward passes of a few examples.

    Arguments:
        model: The model; its mode and flags are left as they were.
        x: Inputs, with shape (N, *); the first few are used.
        y: Their labels, with shape (N,) and dtype int64.
        classes: How many classes the data has; 0 where that is not known.

    Returns:
        What was noticed, each a sentence; the model's own notes are not repeated.

    Raises:
        ModelError: The model cannot take such inputs, or its answers are not finite logits (N, K) with K at least 2.
        UsageError: The labels are not classes of the model, or the inputs are on another device.
    """
    few = x[:_FEW] if len(x) > 1 else x[:1].repeat(2, *(1,) * (x.ndim - 1))
    check_device(model.module, x)
    training = _training(model.module)
    with torch.no_grad(), frozen(model.module):
        outputs = _first(model.module, few)
        again = answer(model.module, few.clone())
    _check_logits(outputs, few)
    if model.access > Access.LABELS:
        _check_probabilities(outputs)
    k = outputs.shape[1]
    _check_labels(y, k, classes)
    notes = [training]
    if 0 < classes < k:
        notes.append(f"the model has {k} classes and the data {classes}; the labels should be the model's numbers")
    if not torch.allclose(outputs, again, rtol=1e-4, atol=1e-5):
        notes.append(RANDOM)
    return tuple(note for note in notes if note)


def _training(module: Callable[[Tensor], Any]) -> str:
    modules = module.modules() if isinstance(module, nn.Module) else ()
    if any(part.training and isinstance(part, _DropoutNd | _BatchNorm) for part in modules):
        return (
            "the model is in training mode and has dropout or batch normalization; "
            "it is evaluated in evaluation mode and left as it was"
        )
    return ""


def _first(module: Callable[[Tensor], Any], x: Tensor) -> Tensor:
    """The answer; if the model raises because a layer was given another size, a sentence that says so."""
    calls: list[tuple[str, nn.Module, Tensor]] = []
    try:
        with _watched(module, calls):
            return answer(module, x.clone())
    except ModelError as error:
        if error.__cause__ is not None and calls:
            raise ModelError(_mismatch(*calls[-1], x) or str(error)) from error.__cause__
        raise


@contextlib.contextmanager
def _watched(module: Callable[[Tensor], Any], calls: list[tuple[str, nn.Module, Tensor]]) -> Iterator[None]:
    """Note each convolution and dense layer that is called, with its name and input."""
    parts = list(module.named_modules()) if isinstance(module, nn.Module) else []
    hooks = []
    try:
        for name, part in parts:
            if isinstance(part, _CONVOLUTIONS | nn.Linear):
                note = lambda layer, args, name=name: calls.append((name, layer, args[0])) if args else None
                hooks.append(part.register_forward_pre_hook(note))
        yield
    finally:
        for hook in hooks:
            hook.remove()


_CONVOLUTIONS = nn.Conv1d | nn.Conv2d | nn.Conv3d


def _mismatch(name: str, layer: nn.Module, got: Tensor, x: Tensor) -> str:
    """What the layer that was called last wanted and was given; nothing, if they fit."""
    where = f"the model's layer {name or type(layer).__name__!r}"
    inputs = f"for inputs of shape {tuple(x.shape[1:])}"
    weight = getattr(layer, "weight", None)
    if isinstance(weight, Tensor) and weight.dtype != got.dtype:
        return f"{where} is in {weight.dtype} and got {got.dtype}; give the inputs the model's dtype (x.to({weight.dtype}))"
    if isinstance(layer, nn.Linear) and got.shape[-1] != layer.in_features:
        advice = "give the inputs the size that it was trained with (--size)"
        return f"{where} takes {layer.in_features} features and got {got.shape[-1]} {inputs}; {advice}"
    if isinstance(layer, _CONVOLUTIONS):
        rank = len(layer.kernel_size)
        if got.ndim != rank + 2:
            return f"{where} takes a batch of {rank + 1} dimensions an example and got shape {tuple(got.shape)}"
        if got.shape[1] != layer.in_channels:
            advice = "give the inputs as many channels"
            return f"{where} takes {layer.in_channels} channels and got {got.shape[1]} {inputs}; {advice}"
        if any(size < kernel for size, kernel in zip(got.shape[2:], layer.kernel_size, strict=True)):
            return f"{where} got maps of {tuple(got.shape[2:])} {inputs}, which are too small for it; use larger ones (--size)"
    return ""


def _check_logits(outputs: Tensor, x: Tensor) -> None:
    if outputs.ndim != 2 or outputs.shape[1] < 2:
        what = f"the model returned shape {tuple(outputs.shape)} for {len(x)} examples"
        raise ModelError(f"{what}; it should return (N, K) logits with K at least 2")


def _check_probabilities(outputs: Tensor) -> None:
    inside = bool(((outputs >= 0) & (outputs <= 1)).all())
    if inside and bool(((outputs.sum(1) - 1).abs() < 1e-3).all()):
        raise ModelError(
            "the model returned values in [0, 1] whose rows sum to 1, which are probabilities, and attacks need logits; "
            "return the layer before the softmax, or use --probabilities (probabilities=True) to attack their logarithm"
        )


def _check_labels(y: Tensor, k: int, classes: int) -> None:
    if y.ndim != 1 or y.is_floating_point() or y.is_complex():
        raise UsageError(f"the labels are {y.dtype} of shape {tuple(y.shape)}; they should be integers of shape (N,)")
    least, most = int(y.min()), int(y.max())
    if least < 0 or most >= k:
        raise UsageError(f"the labels are between {least} and {most}; the model has classes 0 to {k - 1}")
    if classes > k:
        raise UsageError(f"the data has {classes} classes and the model has {k}; it should know all of them")
