"""A benchmark in a folder: a file for each cell and block of examples, written whole or not at all.

``benchmark.json`` says what is run: the suite with everything resolved, its cells and its blocks. ``rows/KEY/START.jsonl``
holds the rows of one cell for the block of examples that starts at START, after a line that says what they are, so a file that
is there is done, whoever wrote it. ``examples/KEY/START.safetensors`` holds the closest adversarial examples of that block.
``checks/KEY.json`` holds what the checks of one model found.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from advkit.benchmarks.folder import Row, read_json, replace
from advkit.errors import UsageError, first_line

FORMAT = 1
"""The version of the layout."""


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

    def write(self, key: str, start: int, head: Mapping[str, Any], rows: Sequence[Row], tensors: Mapping[str, Tensor]) -> None:
        """Keep a block of a cell: its examples first, its rows last."""
        from safetensors.torch import save

        if tensors:
            path = self.path / "examples" / key / f"{start:08d}.safetensors"
            path.parent.mkdir(parents=True, exist_ok=True)
            replace(path, save({name: tensor.contiguous() for name, tensor in tensors.items()}), sync=False)
        path = self.rows_path(key, start)
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps({"format": FORMAT, **head, "rows": len(rows)}), *(json.dumps(row) for row in rows)]
        # A file that lost its end with the power is seen by its number of rows, and made anew.
        replace(path, "\n".join(lines) + "\n", sync=False)

    def read(self, key: str, start: int) -> tuple[Row, list[Row]] | None:
        """What a block of a cell holds: its head and its rows; None if it is not there, or was cut off.

        Raises:
            UsageError: The file is of a newer version, or damaged in another way than by being cut.
        """
        path = self.rows_path(key, start)
        if not path.exists():
            return None
        lines = path.read_bytes().split(b"\n")
        try:
            head, *rows = [json.loads(line) for line in lines[:-1]] or [None]
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise _damaged(path, first_line(error)) from None
        if head is None:
            return None
        if not isinstance(head, dict) or not {"format", "rows"} <= set(head) or not all(isinstance(row, dict) for row in rows):
            raise _damaged(path, "it does not hold the rows of a block")
        if head["format"] != FORMAT:
            raise _newer(path, head["format"])
        return (head, rows) if len(rows) == head["rows"] else None

    def read_tensors(self, key: str, start: int) -> dict[str, Tensor]:
        """The adversarial examples that were kept of a block: ``index``, ``x`` and ``x_adv``; empty where there are none.

        Raises:
            UsageError: The file is damaged.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = self.path / "examples" / key / f"{start:08d}.safetensors"
        try:
            return load_file(path) if path.exists() else {}
        except SafetensorError as error:
            raise _damaged(path, first_line(error)) from None

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
        return list(content["findings"])


def read_about(path: Path) -> dict[str, Any]:
    """What is run in a folder.

    Raises:
        UsageError: There is no benchmark, or one of a newer version.
    """
    about = read_json(path / "benchmark.json")
    if about.get("format") != FORMAT:
        raise _newer(path / "benchmark.json", about.get("format"))
    return about


def _newer(path: Path, found: Any) -> UsageError:
    return UsageError(
        f"{path} has format {found!r} and this advkit reads {FORMAT}; use the advkit that wrote it, or a newer one"
    )


def _damaged(path: Path, why: str) -> UsageError:
    return UsageError(f"{path} is damaged ({why}); delete that file, and the same command computes it anew")
