"""A suite's results as a table in a Markdown page, which each run brings up to date."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from advkit.benchmarks.folder import read_json, replace
from advkit.benchmarks.records import Records
from advkit.benchmarks.report import marked_down
from advkit.errors import UsageError


def update(path: str | Path, records: Records, reference: Sequence[str | Path] = ()) -> None:
    """Write a run's table into a page, in place of the one of the same title, or at the end.

    The table stands between two comments, ``<!-- advkit benchmark: TITLE -->`` and ``<!-- end of TITLE -->``.

    Arguments:
        path: The page; made if it is not there.
        records: The run.
        reference: Files of RobustBench's ``model_info``, whose numbers are added as reported.

    Raises:
        UsageError: The page is not text, or has the first comment without the second; or a reference cannot be read.
    """
    page = Path(path)
    try:
        text = page.read_text(encoding="utf-8") if page.exists() else ""
    except UnicodeDecodeError:
        raise UsageError(f"{page} is not text in UTF-8; give another page") from None
    # Two hyphens would end the comment.
    title = re.sub("-+", "-", marked_down(records.title))
    first, last = (f"<!-- {words}{title} -->" for words in ("advkit benchmark: ", "end of "))
    block = f"{first}\n{table(records, reference)}\n{last}"
    if first not in text:
        new = f"{text.rstrip()}\n\n{block}\n".lstrip()
    else:
        before, rest = text.split(first, 1)
        if last not in rest:
            raise UsageError(f"{page} has {first} without {last} after it; add that line, or remove the first")
        new = before + block + rest.split(last, 1)[1]
    page.parent.mkdir(parents=True, exist_ok=True)
    replace(page, new)


def table(records: Records, reference: Sequence[str | Path] = ()) -> str:
    """The table: a row a model, most robust first by the mean over the columns, and the command that repeats it."""
    columns = [(family, eps) for family in records.families for eps in records.columns(family)]
    rows = sorted(records.models, key=lambda model: -_mean(records, model, columns))
    cells = [_row(records, model, columns) for model in rows]
    cells += [_reported(records, Path(file), columns) for file in reference]
    head = ["model", "clean", *(records.threat(*column) for column in columns)]
    lines = [f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *cells)]
    data = records.about["data"]
    about = (
        f"{len(records.clean) // max(len(rows), 1)} examples of {marked_down(data['name'])}, advkit {records.about['advkit']}"
    )
    command = " ".join(records.about.get("command", "").split())
    return "\n".join([*lines, "", f"{about}{f': `{command}`' if command else ''}"])


def _row(records: Records, model: str, columns: Sequence[tuple[str, float]]) -> list[str]:
    return [marked_down(model), str(records.clean_accuracy(model)), *(_cell(records, model, *column) for column in columns)]


def _mean(records: Records, model: str, columns: Sequence[tuple[str, float]]) -> float:
    values = [records.robust(model, *column).value for column in columns]
    return sum(values) / len(values) if values else records.clean_accuracy(model).value


def _cell(records: Records, model: str, family: str, eps: float) -> str:
    suspect = " (suspect)" if records.suspect(model, family) else ""
    return f"{records.robust(model, family, eps)}{suspect}"


def _reported(records: Records, path: Path, columns: Sequence[tuple[str, float]]) -> list[str]:
    """A row of RobustBench's numbers, where the norm and the radius are the same; of several, the least that is known."""
    info: dict[str, Any] = read_json(path)
    try:
        norm, radius = {"Linf": "linf", "L2": "l2"}[path.parent.name], _fraction(str(info["eps"]))
        clean, robust = float(info["clean_acc"]), min(float(info[key]) for key in ("autoattack_acc", "external") if key in info)
        name = f"{marked_down(path.stem)} ({marked_down(str(info['architecture']))}), as reported by RobustBench"
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        what = "a folder Linf or L2 with files of eps, clean_acc, autoattack_acc and architecture"
        raise UsageError(f"{path} is not of RobustBench's model_info; that is {what}") from None
    shown = [f"{robust:.2f} %" if family == norm and math.isclose(r, radius, rel_tol=1e-6) else "" for family, r in columns]
    return [name, f"{clean:.2f} %", *shown]


def _fraction(text: str) -> float:
    top, _, bottom = text.partition("/")
    return float(top) / float(bottom or 1)
