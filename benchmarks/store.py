"""A benchmark in a folder: a file for each cell and block of examples, written whole or not at all.

``benchmark.json`` says what is run: the suite with everything resolved, its cells and its blocks. ``rows/KEY/START.jsonl``
holds the rows of one cell for the block of examples that starts at START, after a line that says what they are, so a file that
is there is done, whoever wrote it. ``examples/KEY/START.safetensors`` holds the closest adversarial examples of that block.
``checks/KEY.json`` holds what the checks of one model found.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

from torch import Tensor

from advkit.benchmarks.folder import Row, read_json, replace
from advkit.errors import UsageError, first_line

FORMAT = 1
"""The version of the layout."""

Columns = Mapping[str, Sequence[Any]]
"""Rows by their columns."""

Kinds = Mapping[str, set[Any]]

_TEXT, _WHOLE, _FLAG, _MEASURE = {str}, {int}, {bool}, {int, float}
_HEAD = {"examples": _WHOLE, "seconds": _MEASURE, "memory": _WHOLE, "rows": _WHOLE}
_CLEAN: Kinds = {"index": _WHOLE, "label": _WHOLE, "clean": _WHOLE, "correct": _FLAG}
_PASSES: Kinds = {"forwards": _WHOLE, "backwards": _WHOLE, "checks": _WHOLE}
_TRY: Kinds = {"index": _WHOLE, "success": _FLAG, "distance": {float, type(None)}, "adversarial": _WHOLE, **_PASSES}
_OR_NONE = {type(None)}
_KEY = re.compile("[0-9a-f]{32}")
_ABOUT: dict[str, Any] = {
    "title": _TEXT,
    "advkit": _TEXT,
    "torch": _TEXT,
    "command": _TEXT,
    "gates": {"require": [_TEXT], "strict": _FLAG, "sequential": _FLAG},
    "data": {
        "name": _TEXT,
        "digest": _TEXT,
        "examples": _WHOLE,
        "classes": [_TEXT],
        "kind": _TEXT,
        "low": _MEASURE,
        "high": _MEASURE,
    },
    "models": [{"name": _TEXT, "spec": _TEXT, "digest": _TEXT, "training_seconds": _MEASURE | _OR_NONE, "checks": _KEY}],
    "families": {"": {"radii": [_MEASURE | _OR_NONE], "attacks": [_TEXT]}},
    "seeds": [_WHOLE],
    "alone": _FLAG,
    "block": _WHOLE,
    "blocks": [_WHOLE],
    "cells": [
        {
            "model": _TEXT,
            "family": _TEXT | _OR_NONE,
            "eps": _MEASURE | _OR_NONE,
            "attack": _TEXT | _OR_NONE,
            "seed": _WHOLE | _OR_NONE,
            "key": _KEY,
        }
    ],
    "notes": [_TEXT],
}
"""What ``benchmark.json`` holds: types of values, a list of such, or an object; one of the name "" stands for all names."""


class Store:
    """The files of a benchmark.

    Arguments:
        path: The folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def about(self) -> Path:
        """The file that says what is run."""
        return self.path / "benchmark.json"

    def claim(self, about: Mapping[str, Any]) -> None:
        """Make the folder this benchmark's; rows of other cells that are there stay.

        Raises:
            UsageError: It holds something else.
        """
        if self.path.exists() and not self.path.is_dir():
            raise UsageError(f"{self.path} is a file; --out should be a folder")
        self.path.mkdir(parents=True, exist_ok=True)
        if not self.about.exists() and any(entry for entry in self.path.iterdir() if not entry.name.endswith(".tmp")):
            raise UsageError(f"{self.path} holds other files; give --out a new or an empty folder")
        if self.about.exists():
            read_about(self.path)
        text = json.dumps(about, indent=2) + "\n"
        if not self.about.exists() or self.about.read_text(encoding="utf-8") != text:
            replace(self.about, text)

    def rows_path(self, key: str, start: int) -> Path:
        """Where the rows of a cell and block are."""
        return self.path / "rows" / key / f"{start:08d}.jsonl"

    def write(self, key: str, start: int, head: Mapping[str, Any], columns: Columns, tensors: Mapping[str, Tensor]) -> None:
        """Keep a block of a cell: its examples first, its rows last."""
        from safetensors.torch import save

        if tensors:
            path = self.path / "examples" / key / f"{start:08d}.safetensors"
            path.parent.mkdir(parents=True, exist_ok=True)
            replace(path, save({name: tensor.contiguous() for name, tensor in tensors.items()}), sync=False)
        path = self.rows_path(key, start)
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        lines = [json.dumps({"format": FORMAT, **head, "rows": len(rows)}), *(json.dumps(row) for row in rows)]
        # A file that lost its end with the power is seen by its number of rows, and made anew.
        replace(path, "\n".join(lines) + "\n", sync=False)

    def whole(self, key: str, start: int) -> bool:
        """Whether a block of a cell is there and was not cut off.

        Raises:
            UsageError: The file is of a newer version, or damaged in another way than by being cut.
        """
        return self._lines(key, start) is not None

    def read(self, key: str, start: int, attack: str | None) -> tuple[Row, Columns] | None:
        """What a block of a cell holds: its head and its rows; None if it is not there, or was cut off.

        Arguments:
            key: The cell's key.
            start: The first example of the block.
            attack: The cell's attack; None where the rows are clean answers.

        Raises:
            UsageError: The file is of a newer version, or damaged in another way than by being cut.
        """
        there = self._lines(key, start)
        if there is None:
            return None
        head, lines = there
        kinds = _CLEAN if attack is None else _TRY
        try:
            rows = json.loads(b"[" + b",".join(lines) + b"]", parse_constant=_refuse)
            values = list(zip(*map(itemgetter(*kinds), rows), strict=True)) or [()] * len(kinds)
        except (ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
            raise self.damaged(key, start, first_line(error)) from None
        columns = dict(zip(kinds, values, strict=True))
        for name, column in columns.items():
            known = [value for value in column if value is not None] if None in column else column
            if not set(map(type, column)) <= kinds[name] or (known and not _bounded(max(map(abs, known)))):
                raise self.damaged(key, start, f"a value of {name} is none that it can have")
        return head, columns

    def _lines(self, key: str, start: int) -> tuple[Row, list[bytes]] | None:
        """The head of a block of a cell, and its rows as lines; None if it is not there, or was cut off."""
        path = self.rows_path(key, start)
        try:
            lines = path.read_bytes().split(b"\n")[:-1]
        except FileNotFoundError:
            return None
        if not lines:
            return None
        try:
            head = json.loads(lines[0], parse_constant=_refuse)
        except (ValueError, RecursionError) as error:
            raise self.damaged(key, start, first_line(error)) from None
        if isinstance(head, dict) and head.get("format") != FORMAT:
            raise _newer(path, head.get("format"))
        if not _is(head, _HEAD):
            raise self.damaged(key, start, "its first line does not say what its rows are")
        return (head, lines[1:]) if len(lines) == head["rows"] + 1 else None

    def damaged(self, key: str, start: int, why: str) -> UsageError:
        """The error for a block of a cell that holds something else."""
        return _damaged(self.rows_path(key, start), why)

    def read_tensors(self, key: str, start: int) -> dict[str, Tensor]:
        """The adversarial examples that were kept of a block: ``index``, ``x`` and ``x_adv``; empty where there are none.

        Raises:
            UsageError: The file is damaged.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = self.path / "examples" / key / f"{start:08d}.safetensors"
        if not path.exists():
            return {}
        try:
            tensors = load_file(path)
        except SafetensorError as error:
            raise _damaged(path, first_line(error)) from None
        if set(tensors) != {"index", "x", "x_adv"} or len({tensor.shape[:1] for tensor in tensors.values()}) > 1:
            raise _damaged(path, "it does not hold the examples of a block")
        return tensors

    def write_checks(self, key: str, findings: Sequence[Mapping[str, Any]]) -> None:
        """Keep what the checks of a model found."""
        (self.path / "checks").mkdir(exist_ok=True)
        replace(
            self.path / "checks" / f"{key}.json", json.dumps({"format": FORMAT, "findings": list(findings)}, indent=2) + "\n"
        )

    def read_checks(self, key: str) -> list[Any] | None:
        """What the checks of a model found; None if they were not run.

        Raises:
            UsageError: The file is damaged or of a newer version.
        """
        path = self.path / "checks" / f"{key}.json"
        if not path.exists():
            return None
        content = read_json(path)
        if content.get("format") != FORMAT:
            raise _newer(path, content.get("format"))
        if not isinstance(content.get("findings"), list):
            raise _damaged(path, "it does not hold findings")
        return list(content["findings"])


def read_about(path: Path) -> dict[str, Any]:
    """What is run in a folder.

    Raises:
        UsageError: There is no benchmark, or one of a newer version.
    """
    about = read_json(path / "benchmark.json")
    if about.get("format") != FORMAT:
        raise _newer(path / "benchmark.json", about.get("format"))
    for name, kind in _ABOUT.items():
        if not _is(about.get(name), kind):
            raise UsageError(f"{path / 'benchmark.json'} is damaged (its {name} are not of advkit); repeat the run elsewhere")
    return about


def _is(value: Any, kind: Any) -> bool:
    """Whether a value of JSON is of a kind, as in ``_ABOUT``."""
    if isinstance(kind, re.Pattern):
        return isinstance(value, str) and kind.fullmatch(value) is not None
    if isinstance(kind, set):
        return type(value) in kind and _bounded(value)
    if isinstance(kind, list):
        return isinstance(value, list) and all(_is(one, kind[0]) for one in value)
    if not isinstance(value, dict):
        return False
    named = dict.fromkeys(value, kind[""]) if "" in kind else kind
    return all(_is(value.get(name), one) for name, one in named.items())


def _bounded(value: Any) -> bool:
    """Whether a value is no number, or one that an integer or a finite float of 64 bits holds."""
    return not isinstance(value, int | float) or abs(value) < (2**63 if isinstance(value, int) else math.inf)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number")


def _newer(path: Path, found: Any) -> UsageError:
    return UsageError(
        f"{path} has format {found!r} and this advkit reads {FORMAT}; use the advkit that wrote it, or a newer one"
    )


def _damaged(path: Path, why: str) -> UsageError:
    return UsageError(f"{path} is damaged ({why}); delete that file, and the same command computes it anew")
