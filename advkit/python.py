"""Objects of the user's own Python code: ``path/to/file.py:function`` and ``package.module:function``.

The code is run, so only what a person typed may be given to this module.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from advkit.errors import UsageError, first_line


def is_python(spec: str) -> bool:
    """Whether ``spec`` names something in a file or a module of Python.

    >>> is_python("my/data.py:load"), is_python("package.data:load"), is_python("hf:mnist"), is_python("data.npz")
    (True, True, False, False)
    """
    head, _, name = spec.rpartition(":")
    is_module = head != "hf" and all(part.isidentifier() for part in head.split("."))
    return name.isidentifier() and (head.endswith(".py") or is_module)


def resolve(spec: str, what: str) -> Callable[..., Any]:
    """The function (or class) that ``spec`` names; its file or module is imported.

    Arguments:
        spec: ``path/to/file.py:function`` or ``package.module:function``.
        what: What it should give, for messages: ``model``.

    Raises:
        UsageError: There is no such file, module or function, or importing it raises.
    """
    if not is_python(spec):
        raise UsageError(f"{spec!r} names no Python {what}; write path/to/file.py:function or package.module:function")
    head, _, name = spec.rpartition(":")
    with _path(head), _guarded(spec, what):
        module = _from_file(Path(head).expanduser(), what) if head.endswith(".py") else importlib.import_module(head)
    function = getattr(module, name, None)
    if not callable(function):
        known = [key for key, value in vars(module).items() if inspect.isfunction(value) and not key.startswith("_")]
        raise UsageError(f"{head} has no function {name!r} for the {what}; it has {', '.join(known) or 'none'}")
    return function


def call(spec: str, what: str = "function", /, **optional: Any) -> Any:
    """What the function that ``spec`` names returns.

    Arguments:
        spec: As for :func:`resolve`.
        what: As for :func:`resolve`.
        optional: Keyword arguments, each passed if the function takes one of this name.

    Raises:
        UsageError: As for :func:`resolve`, or the function raises.
    """
    function = resolve(spec, what)
    with _path(spec.rpartition(":")[0]), _guarded(spec, what):
        return function(**_taken(function, optional))


def _taken(function: Callable[..., Any], optional: dict[str, Any]) -> dict[str, Any]:
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # some built-in functions have none
        return {}
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return optional
    by_name = {name for name, parameter in parameters.items() if parameter.kind is not parameter.POSITIONAL_ONLY}
    return {key: value for key, value in optional.items() if key in by_name}


def _from_file(path: Path, what: str) -> ModuleType:
    """The module of a file, under a name that its place and contents make unique; it is imported once."""
    if not path.is_file():
        raise UsageError(f"there is no file {path} for the {what}")
    mark = hashlib.sha256(str(path.resolve()).encode() + path.read_bytes()).hexdigest()
    name = f"_advkit_{path.stem}_{mark[:16]}"
    if name in sys.modules:
        return sys.modules[name]
    found = importlib.util.spec_from_file_location(name, path)
    if found is None or found.loader is None:
        raise UsageError(f"{path} cannot be imported for the {what}; it should be a file of Python")
    module = sys.modules[name] = importlib.util.module_from_spec(found)
    try:
        found.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


@contextlib.contextmanager
def _path(head: str) -> Iterator[None]:
    """The file's own folder on the path first, as Python does for a script; for a module, the working folder last."""
    before = sys.path.copy()
    if head.endswith(".py"):
        sys.path.insert(0, str(Path(head).expanduser().resolve().parent))
    else:
        sys.path.append(str(Path.cwd()))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path[:] = before


@contextlib.contextmanager
def _guarded(spec: str, what: str) -> Iterator[None]:
    """Whatever the user's code raises, as a sentence."""
    try:
        yield
    except UsageError:
        raise
    except (Exception, SystemExit) as error:
        raise UsageError(f"{spec}, for the {what}, raised {type(error).__name__}: {first_line(error)}") from error
