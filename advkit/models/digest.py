"""What tells one model from another: a hex SHA-256 of its code, its settings and its weights, the same in every process."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
import itertools
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import BuiltinFunctionType, CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from advkit.errors import UsageError, first_line
from advkit.python import is_python

_PLAIN = (bool, int, float, complex, str, bytes, type(None), type(...), np.generic, torch.dtype, torch.Size, torch.device)
_ADDRESS = re.compile(r"0x[0-9a-fA-F]+")
# What every module has, of which parameters, buffers and submodules are visited by name; and where transformers notes a folder.
_SKIPPED = {*vars(nn.Module()), "name_or_path"}


def digest_file(path: str | Path) -> str:
    """The hex SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_of(module: Callable[..., Any]) -> str:
    """The hex SHA-256 of what a module or another callable computes.

    For a module: its text (``repr``), and for each submodule its class with that class's source file, its settings, its
    parameters and its buffers, those that are not saved among them. For another callable: its source file and its code, and
    the tensors, arrays, modules and plain values in its closure, its defaults, the arguments of a ``functools.partial``, the
    attributes of its object, and the global names that it reads. A count of its calls kept in one of these is part of it too.
    """
    return _Digest().add(module).sha.hexdigest()


def digest_files(value: Any) -> dict[str, str]:
    """The hex SHA-256 of every file that a setting in a value names, by that setting.

    Arguments:
        value: An attack or a threat model (a dataclass), or a list, tuple or mapping of such; those within count too. A
            setting names a file as a path with an ending, or as file.py:function.

    Raises:
        UsageError: A file cannot be read.

    >>> from advkit.attacks import PGD
    >>> digest_files(PGD(steps=40))
    {}
    """
    if isinstance(value, str):
        path = Path(value.rpartition(":")[0] if is_python(value) else value).expanduser()
        # What has no ending names something else, as "margin", whatever lies in the folder. os.path takes any text.
        try:
            return {value: digest_file(path)} if path.suffix and os.path.isfile(path) else {}
        except OSError as error:
            raise UsageError(f"{path} cannot be read: {first_line(error)}") from None
    if dataclasses.is_dataclass(value):
        parts: Iterable[Any] = [getattr(value, entry.name) for entry in dataclasses.fields(value)]
    elif isinstance(value, Mapping):
        parts = value.values()
    else:
        parts = value if isinstance(value, list | tuple) else ()
    return {name: digest for part in parts for name, digest in digest_files(part).items()}


class _Digest:
    """A hash to which anything can be added; what has no contents that are known here counts by its type."""

    def __init__(self) -> None:
        self.sha = hashlib.sha256()
        # The objects are kept so that no other gets the same id.
        self.seen: dict[int, tuple[int, Any]] = {}

    def add(self, value: Any) -> _Digest:
        """Add a value, and what is in it."""
        if isinstance(value, _PLAIN):
            return self.text(f"{type(value).__name__} {value!r}")
        if id(value) in self.seen:
            return self.text(f"again {self.seen[id(value)][0]}")
        self.seen[id(value)] = len(self.seen), value
        for kind, add in _KINDS:
            if isinstance(value, kind):
                add(self, value)
                return self
        return self.other(value)

    def text(self, text: str) -> _Digest:
        """Add text, without the addresses in it."""
        data = _ADDRESS.sub("0x", text).encode(errors="backslashreplace")
        self.sha.update(f"{len(data)} ".encode() + data)
        return self

    def tensor(self, tensor: Tensor) -> None:
        if is_lazy(tensor):  # it gets its shape and values in the first call
            self.text(f"{tensor.dtype} lazy")
            return
        tensor = tensor.detach()
        self.text(f"{tensor.dtype} {tuple(tensor.shape)} {tensor.layout}")
        if not tensor.is_meta:
            dense = tensor.cpu() if tensor.layout is torch.strided else tensor.cpu().to_dense()
            self.sha.update(dense.resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())

    def array(self, array: np.ndarray[Any, Any]) -> None:
        self.text(f"array {array.dtype} {array.shape}")
        if array.dtype.hasobject:
            self.add(array.tolist())
        else:
            self.sha.update(array.tobytes())

    def module(self, module: nn.Module) -> None:
        self.text(repr(module))
        for name, part in module.named_modules():
            self.seen.setdefault(id(part), (len(self.seen), part))
            self.text(name).add(type(part)).text(_code(part)).items(_settings(part))
        for name, tensor in itertools.chain(module.named_parameters(), module.named_buffers()):
            self.text(name).tensor(tensor)

    def items(self, mapping: Mapping[Any, Any]) -> None:
        self.text(f"mapping {len(mapping)}")
        for key, value in mapping.items():
            self.add(key).add(value)

    def sequence(self, values: Iterable[Any]) -> None:
        values = list(values)
        self.text(f"sequence {len(values)}")
        for value in values:
            self.add(value)

    def unordered(self, values: Iterable[Any]) -> None:
        self.sequence(sorted(_ADDRESS.sub("0x", repr(value)) for value in values))

    def partial(self, call: functools.partial[Any]) -> None:
        self.text("partial").add(call.func).add(call.args).add(call.keywords)

    def method(self, method: MethodType) -> None:
        self.text("method").add(method.__func__).instance(method.__self__)

    def function(self, function: FunctionType) -> None:
        self.text(_qualified(function))
        if _is_torch(function):
            return
        self.source(function).add(function.__code__).add(function.__defaults__).add(function.__kwdefaults__)
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            self.text(name).add(_contents(cell))
        for name in function.__code__.co_names:
            value = function.__globals__.get(name)
            if isinstance(value, (*_PLAIN, Tensor, np.ndarray, nn.Module)):
                self.text(name).add(value)

    def code(self, code: CodeType) -> None:
        self.text(f"{code.co_code.hex()} {code.co_names} {code.co_varnames} {code.co_freevars}").add(code.co_consts)

    def type(self, cls: type) -> None:
        self.text(_qualified(cls))
        if not _is_torch(cls) and cls.__module__ != "builtins":
            self.source(cls)

    def source(self, thing: Any) -> _Digest:
        """The file that defines a class or a function; where there is none, the methods of the class."""
        path = _source(thing)
        if path is not None:
            return self.text(digest_file(path))
        methods = vars(thing).values() if isinstance(thing, type) else ()
        return self.add([method for method in methods if isinstance(method, FunctionType)])

    def other(self, value: Any) -> _Digest:
        return self.instance(value) if callable(value) else self.add(type(value))

    def instance(self, value: Any) -> _Digest:
        """An object whose attributes count."""
        if isinstance(value, nn.Module | type | ModuleType | None):
            return self.add(value)
        self.add(type(value)).text(str(getattr(value, "__name__", "")))
        if not _is_torch(type(value)) and hasattr(value, "__dict__"):
            self.items(vars(value))
        return self

    def named(self, value: Any) -> None:
        self.text(f"{getattr(value, '__module__', '')} {getattr(value, '__qualname__', value.__name__)}")
        owner = getattr(value, "__self__", None)
        self.add(None if isinstance(owner, ModuleType) else owner)


_KINDS: tuple[tuple[Any, Callable[[_Digest, Any], object]], ...] = (
    (nn.Module, _Digest.module),
    (Tensor, _Digest.tensor),
    (np.ndarray, _Digest.array),
    (Mapping, _Digest.items),
    ((list, tuple), _Digest.sequence),
    ((set, frozenset), _Digest.unordered),
    (functools.partial, _Digest.partial),
    (MethodType, _Digest.method),
    (FunctionType, _Digest.function),
    (CodeType, _Digest.code),
    (type, _Digest.type),
    ((BuiltinFunctionType, ModuleType), _Digest.named),
)


def _contents(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # a name that is not bound yet
        return None


def _is_torch(thing: Any) -> bool:
    return str(getattr(thing, "__module__", "")).partition(".")[0] == "torch"


def _qualified(thing: Any) -> str:
    """The name; with the package's, where the file does not count. A user's file has another name wherever it is."""
    return f"{thing.__module__}.{thing.__qualname__}" if _is_torch(thing) else str(thing.__qualname__)


def _source(thing: Any) -> Path | None:
    try:
        source = inspect.getsourcefile(thing)
    except (TypeError, OSError):
        return None
    return Path(source) if source and Path(source).is_file() else None


def _settings(module: nn.Module) -> dict[str, Any]:
    """The attributes of a module; those of one that was traced or compiled are not the same in every process."""
    if isinstance(module, torch.fx.GraphModule | torch.jit.ScriptModule) or "_orig_mod" in vars(module)["_modules"]:
        return {}
    return {key: value for key, value in vars(module).items() if key not in _SKIPPED}


def _code(module: nn.Module) -> str:
    """The code of a module that was traced or compiled, which no file has."""
    if not isinstance(module, torch.fx.GraphModule | torch.jit.ScriptModule):
        return ""
    try:
        return str(module.code)
    except (RuntimeError, AttributeError):  # a part without a function of its own
        return ""
