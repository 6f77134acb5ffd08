"""The one syntax for attacks, threats, networks and losses: ``pgd(steps=100, loss="margin")``.

It is what a person types on the command line, what Python accepts in place of an object, and the column in a report.
``parse`` and ``show`` invert each other, both from the fields of dataclasses, so an option is written down once.
A table maps names to dataclasses, or to ``functools.partial`` of one where some fields are fixed (``linf`` is ``Lp`` with
``p = inf``).
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import math
import operator
import re
from collections.abc import Callable, Mapping
from typing import Any

from advkit.errors import UsageError

Table = Mapping[str, Callable[..., Any]]

_OPERATORS: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
# "salt-and-pepper" is a name; Python's grammar would read subtractions.
_HYPHEN, _DASH = re.compile(r"(?<![0-9.][eE])(?<=[A-Za-z])-(?=[A-Za-z0-9])"), "__dash__"
_CONSTANTS = {"inf": math.inf, "true": True, "false": False, "none": None}


def unknown(what: str, name: str, known: Mapping[str, Any] | list[str]) -> UsageError:
    """The error for a name that is not in a table: it lists the names that are, and the closest."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return UsageError(f"unknown {what} {name!r}; known are {', '.join(names)}{hint}")


def parse(text: str, table: Table, what: str, defaults: Mapping[str, Any] | None = None) -> Any:
    """The object that ``text`` describes.

    Arguments:
        text: A name, or a name with settings: ``pgd`` or ``pgd(steps=40, loss="margin")``. Numbers may be written as
            ``8/255`` and ``inf``; a setting may itself be a spec of the table: ``restarts(pgd(steps=40), n=10)``.
        table: The names there are.
        what: What the table holds, for messages: ``attack``.
        defaults: Values for the settings that the text does not give, also of specs inside it.

    Raises:
        UsageError: The text is not of this form, or a name or a setting is unknown or has a wrong value.

    >>> parse("point(x=8/255)", {"point": dataclasses.make_dataclass("point", [("x", float)])}, "thing")
    point(x=0.03137254901960784)
    """
    try:
        node = ast.parse(_HYPHEN.sub(_DASH, text.strip()), mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        raise UsageError(f"cannot read the {what} {text!r}; write a name, or name(setting=value, ...)") from None
    if not isinstance(node, ast.Name | ast.Call):
        raise UsageError(f"cannot read the {what} {text!r}; write a name, or name(setting=value, ...)")
    try:
        return _build(node, table, what, dict(defaults or {}))
    except (OverflowError, RecursionError):
        raise UsageError(
            f"cannot read the {what} {text[:40]!r}...; a number is too large, or it is nested too deeply"
        ) from None


def _name(node: ast.expr, what: str) -> str:
    if not isinstance(node, ast.Name):
        raise UsageError(f"cannot read the {what} {ast.unparse(node)!r}; it should start with a name")
    return node.id.replace(_DASH, "-")


def _build(node: ast.expr, table: Table, what: str, defaults: dict[str, Any]) -> Any:
    call = node if isinstance(node, ast.Call) else ast.Call(node, [], [])
    name = _name(call.func, what)
    if name not in table:
        raise unknown(what, name, table)
    make = table[name]
    names = [field.name for field in settings(make)]
    if len(call.args) > len(names):
        raise UsageError(f"{what} {name} takes {len(names)} settings ({', '.join(names)}), {len(call.args)} given")
    given = dict(zip(names, (_value(arg, table, what, defaults) for arg in call.args), strict=False))
    for keyword in call.keywords:
        if keyword.arg not in names:
            raise unknown(f"setting of {what} {name}:", str(keyword.arg), names)
        if keyword.arg in given:
            raise UsageError(f"{what} {name} has two values for {keyword.arg}")
        given[keyword.arg] = _value(keyword.value, table, what, defaults)
    for key, value in defaults.items():
        if key in names:
            given.setdefault(key, value)
    return _make(make, name, given, what)


def _make(make: Callable[..., Any], name: str, given: dict[str, Any], what: str) -> Any:
    for field in settings(make):
        if field.name in given:
            given[field.name] = _fit(given[field.name], field, f"{name}: {field.name}")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise UsageError(f"{what} {name} needs a value for {field.name}")
    return make(**given)


def _fit(value: Any, field: dataclasses.Field[Any], where: str) -> Any:
    """``value`` in the type that the field declares, or a sentence; whole floats serve as integers."""
    declared = field.type.__name__ if isinstance(field.type, type) else str(field.type)
    if declared.startswith("int") and isinstance(value, float) and value.is_integer():
        return int(value)
    wanted = {"int": int, "float": (int, float), "bool": bool, "str": str}
    kinds = [wanted[kind.strip()] for kind in declared.split("|") if kind.strip() in wanted]
    if not kinds:
        return _fit_nested(value, declared, where)
    if value is None and "None" in declared:
        return value
    is_number_for_flag = isinstance(value, bool) and "bool" not in declared
    if is_number_for_flag or not any(isinstance(value, kind) for kind in kinds):  # type: ignore[arg-type]
        raise UsageError(f"{where} is {value!r}; it should be of type {declared}")
    return float(value) if "float" in declared and "int" not in declared and isinstance(value, int) else value


def _fit_nested(value: Any, declared: str, where: str) -> Any:
    """``value`` where another object is wanted, or several."""
    several = declared.startswith("tuple")
    if several != isinstance(value, tuple) or not all(map(dataclasses.is_dataclass, value if several else (value,))):
        wanted = "a list of others, as in [fgsm, pgd]" if several else f"another, of type {declared}"
        raise UsageError(f"{where} is {value!r}; it should be {wanted}")
    return value


def _value(node: ast.expr, table: Table, what: str, defaults: dict[str, Any]) -> Any:
    match node:
        case ast.Constant(value=str() as value):
            return value.replace(_DASH, "-")
        case ast.Constant(value=bool() | int() | float() | None as value):
            return _literal(value)
        case ast.Name(id=name) if name.lower() in _CONSTANTS:
            return _CONSTANTS[name.lower()]
        case ast.Name() | ast.Call():
            return _build(node, table, what, defaults)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_number(operand, table, what)
        case ast.BinOp():
            return _arithmetic(node, table, what)
        case ast.List(elts=items) | ast.Tuple(elts=items):
            return tuple(_value(item, table, what, defaults) for item in items)
    raise UsageError(f"cannot read {ast.unparse(node)!r}; a setting is a number, a string, a flag or another {what}")


def _literal(value: float | None) -> float | None:
    if value == math.inf:
        raise OverflowError
    return value


def _arithmetic(node: ast.BinOp, table: Table, what: str) -> float:
    if type(node.op) not in _OPERATORS:
        raise UsageError(f"cannot read {ast.unparse(node)!r}; numbers may be joined by +, -, * and /")
    try:
        return _OPERATORS[type(node.op)](_number(node.left, table, what), _number(node.right, table, what))
    except ZeroDivisionError:
        raise UsageError(f"{ast.unparse(node)} divides by zero") from None


def _number(node: ast.expr, table: Table, what: str) -> float:
    value = _value(node, table, what, {})
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UsageError(f"{ast.unparse(node)!r} should be a number")
    return value


def settings(make: Callable[..., Any]) -> list[dataclasses.Field[Any]]:
    """The fields of a table's entry that a spec may set, in order."""
    cls, fixed = (make.func, make.keywords) if isinstance(make, functools.partial) else (make, {})
    return [field for field in dataclasses.fields(cls) if field.init and field.name not in fixed]  # type: ignore[arg-type]


def show(thing: Any, table: Table) -> str:
    """The text that ``parse`` turns into ``thing``: its name, and the settings that are not the defaults.

    Raises:
        UsageError: No entry of the table makes such an object.
    """
    for name, make in table.items():
        cls, fixed = (make.func, make.keywords) if isinstance(make, functools.partial) else (make, {})
        if type(thing) is cls and all(getattr(thing, key) == value for key, value in fixed.items()):
            parts = [_setting(thing, field, table) for field in settings(make)]
            inside = ", ".join(part for part in parts if part)
            return f"{name}({inside})" if inside else name
    raise UsageError(f"{type(thing).__name__} is not in the table of {', '.join(sorted(table))}")


def _setting(thing: Any, field: dataclasses.Field[Any], table: Table) -> str:
    value = getattr(thing, field.name)
    if field.default is not dataclasses.MISSING and value == field.default:
        return ""
    return f"{field.name}={_text(value, table)}"


def _text(value: Any, table: Table) -> str:
    if dataclasses.is_dataclass(value):
        return show(value, table)
    if isinstance(value, tuple):
        return "[" + ", ".join(_text(item, table) for item in value) + "]"
    return f'"{value}"' if isinstance(value, str) else repr(value)


def number(value: float) -> str:
    """A number as a person would write it: in 255ths where that is what it is, else with a few digits.

    >>> number(0.3), number(8 / 255), number(2**0.5)
    ('0.3', '8/255', '1.4142')
    """
    short, parts = f"{value:.5g}", round(value * 255, 6)
    return f"{parts:g}/255" if float(short) != value and parts.is_integer() and 0 < parts < 255 else short


def check_choice(where: str, name: str, known: Mapping[str, Any]) -> None:
    """Refuse a name that is not in a table."""
    if name not in known:
        raise unknown(where, name, known)


def check_at_least(where: str, value: float, least: float) -> None:
    """Refuse a number that is too small, or is not one."""
    if not least <= value < math.inf:
        raise UsageError(f"{where} is {value}; it should be at least {least}")


MOST = 2**53
"""The greatest whole number that is accepted: beyond it floats no longer tell one from the next."""


def check_between(where: str, value: float) -> None:
    """Refuse a number that is not from 0 to 1."""
    if not 0 <= value <= 1:
        raise UsageError(f"{where} is {value}; it should be between 0 and 1")


def check_share(where: str, value: float) -> None:
    """Refuse a number that is not at least 0 and less than 1."""
    if not 0 <= value < 1:
        raise UsageError(f"{where} is {value}; it should be at least 0 and less than 1")


def check_whole(where: str, value: int, least: int) -> None:
    """Refuse what is not a whole number from ``least`` to 2**53."""
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= MOST:
        raise UsageError(f"{where} is {value}; it should be at least {least}, a whole number up to 2**53")


def check_positive(where: str, value: float | None) -> None:
    """Refuse a number that is not greater than 0; None stands for a default."""
    if value is not None and not 0 < value < math.inf:
        raise UsageError(f"{where} is {value}; it should be a number greater than 0")
