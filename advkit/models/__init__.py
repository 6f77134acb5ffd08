"""Models by name: what a spec on the command line may be, and loading it safely.

Nothing in a model's file runs unless the user said so: tensors come from safetensors, graphs from ONNX or from the parts of
an exported program that are data, code from a Python file that the user names, and pickles only with ``trust_pickle``.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from advkit.errors import UsageError
from advkit.models import checkpoint, huggingface, onnx, silero, sklearn
from advkit.models.digest import digest_file, digest_of
from advkit.models.model import RANDOM as RANDOM
from advkit.models.model import LogProbabilities as LogProbabilities
from advkit.models.model import Model as Model
from advkit.models.model import inspect as inspect
from advkit.models.model import wrap as wrap
from advkit.models.networks import NETWORKS as NETWORKS
from advkit.oracle import Access
from advkit.python import call, is_python, resolve

MODELS = {
    "FILE.safetensors": "a checkpoint that advkit wrote",
    "FILE.py:FUNCTION": "what a function of your own returns: a module, or any callable; package.module:function too",
    "FILE.pt2": "a program that torch.export saved",
    "FILE.onnx": "an ONNX graph: scores; with onnx2torch installed, gradients",
    "FOLDER": "an image classifier of transformers: config.json and safetensors",
    "hf:ORG/NAME": "the same from the Hugging Face hub, downloaded",
    "FILE.pkl, FILE.joblib": "a classifier or pipeline of scikit-learn, with --trust-pickle",
    "silero-vad": "the detector of speech of the package silero-vad, for sounds at 16 kHz: class 1 is speech",
    **{name: f"a network to train: {(make.__doc__ or '').splitlines()[0].rstrip('.')}" for name, make in NETWORKS.items()},
}
"""The kinds of spec that :func:`load` understands, and the networks that training does."""

_HUB = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)
_CHECKPOINTS = (".pt", ".pth", ".bin", ".ckpt")

_Loaded = tuple[Callable[..., object], Access, tuple[str, ...]]


def load(spec: str, *, device: str = "cpu", trust_pickle: bool = False, probabilities: bool = False) -> Model:
    """The model that a spec names, on a device, in evaluation mode.

    Arguments:
        spec: One of the kinds in :data:`MODELS`.
        device: Where to put it: ``cpu``, ``cuda``, ``cuda:1``.
        trust_pickle: Whether files whose loading can run code may be loaded.
        probabilities: Whether the model returns probabilities; attacks are then given their logarithm.

    Raises:
        UsageError: There is no such model, or it cannot be loaded, or not safely.
    """
    where = find_device(device)
    module, access, notes = _load(spec, where, trust_pickle)
    if isinstance(module, nn.Module):
        module = module.to(where).eval()
    # The bytes of a safetensors file are not a function of its contents: the order of its metadata is not fixed.
    by_file = Path(spec).is_file() and Path(spec).suffix != ".safetensors"
    digest = digest_file(spec) if by_file else digest_of(module)
    return wrap(Model(module, spec, access, digest, notes), probabilities=probabilities)


def find_device(device: str) -> torch.device:
    """The device of a name: ``cpu``, ``cuda``, ``cuda:1``.

    Raises:
        UsageError: There is no such device.
    """
    try:
        where = torch.device(device)
        torch.zeros(1, device=where).item()
    except Exception:  # the module of a backend may be missing, and what others raise is theirs
        known = "cpu, cuda" if torch.cuda.is_available() else "cpu"
        raise UsageError(f"cannot use the device {device!r}; there is {known}") from None
    return where


def _load(spec: str, where: torch.device, trust_pickle: bool) -> _Loaded:
    path = Path(spec)
    if spec == "silero-vad":
        return silero.load(), Access.GRADIENTS, ()
    if spec.startswith("hf:"):
        return _hub(spec.removeprefix("hf:"))
    if is_python(spec):
        return _python(spec)
    if path.is_dir():
        return _folder(path)
    if path.suffix in _FILES or path.suffix in _CHECKPOINTS:
        if not path.is_file():
            raise UsageError(f"there is no file {spec}; a model is given by the path of its file")
        return _FILES.get(path.suffix, _pickled)(path, where, trust_pickle)
    raise _unknown(spec)


def _unknown(spec: str) -> UsageError:
    name = spec.partition("(")[0].strip()
    if name in NETWORKS:
        train = f"advkit train --model {name} ..."
        return UsageError(f"{spec} is a network without weights; train it first, as in {train}, and give the checkpoint")
    close = difflib.get_close_matches(name, NETWORKS, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    kinds = ", ".join(kind for kind in MODELS if kind not in NETWORKS)
    return UsageError(f"unknown model {spec!r}; a model is one of {kinds}{hint}")


def _hub(name: str) -> _Loaded:
    if not _HUB.fullmatch(name):
        raise UsageError(f"the name {name!r} is not one of the Hugging Face hub; write hf:org/name (a folder goes without hf:)")
    module, notes = huggingface.load(name, local=False)
    return module, Access.GRADIENTS, notes


def _folder(path: Path) -> _Loaded:
    if not (path / "config.json").is_file():
        raise UsageError(f"the folder {path} has no config.json; it should hold an image classifier of transformers")
    module, notes = huggingface.load(str(path), local=True)
    return module, Access.GRADIENTS, notes


def _python(spec: str) -> _Loaded:
    made = resolve(spec, "model")
    if not isinstance(made, nn.Module):
        made = call(spec, "model")
    if not callable(made):
        raise UsageError(f"{spec} returned {type(made).__name__}; it should return a module or another callable")
    return made, Access.GRADIENTS, ()


def _safetensors(path: Path, where: torch.device, trust_pickle: bool) -> _Loaded:
    return checkpoint.load(path)[0], Access.GRADIENTS, ()


def _exported(path: Path, where: torch.device, trust_pickle: bool) -> _Loaded:
    from advkit.models import exported  # half a second, as it imports sympy

    return exported.load(path, where, trust_pickle), Access.GRADIENTS, ()


def _onnx(path: Path, where: torch.device, trust_pickle: bool) -> _Loaded:
    return onnx.load(path)


def _sklearn(path: Path, where: torch.device, trust_pickle: bool) -> _Loaded:
    return sklearn.load(path, trust_pickle)


def _pickled(path: Path, where: torch.device, trust_pickle: bool) -> _Loaded:
    raise UsageError(
        f"{path} is a pickled checkpoint, which advkit does not load; save the network with torch.export.save, "
        "or give a file.py:function that builds the network and loads the weights into it"
    )


_FILES: dict[str, Callable[[Path, torch.device, bool], _Loaded]] = {
    ".safetensors": _safetensors,
    ".pt2": _exported,
    ".onnx": _onnx,
    ".pkl": _sklearn,
    ".pickle": _sklearn,
    ".joblib": _sklearn,
}
