"""A run in a folder: rows appended batch by batch, so that a run that was stopped goes on where it was.

``run.json`` says which run it is, ``records.jsonl`` holds a row an example, ``times.jsonl`` a row a batch and attack,
``examples/`` a safetensors file a batch, ``pictures/`` and ``files/`` PNG images, ``summary.json`` the result.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from advkit.errors import UsageError

Row = dict[str, Any]


@dataclass
class Batch:
    """What came of one batch.

    Attributes:
        rows: A record an example.
        times: A record an attack: how long it took.
        tensors: ``x``, ``x_adv`` and, where they were rounded, ``x_8bit``; one row an example, in the order of ``rows``.
    """

    rows: list[Row]
    times: list[Row]
    tensors: dict[str, Tensor] = field(default_factory=dict)


class Folder:
    """The folder of one run.

    Arguments:
        path: Where; made if it is not there.
        run: Everything that makes two runs the same.
        total: How many examples the run has.
        batch_size: How many a batch has.

    Raises:
        UsageError: The folder holds another run, or something else.
    """

    def __init__(self, path: Path, run: Mapping[str, Any], total: int, batch_size: int) -> None:
        self.path, self.batch_size = path, batch_size
        if path.exists() and not path.is_dir():
            raise UsageError(f"{path} is a file; --out should be a folder")
        path.mkdir(parents=True, exist_ok=True)
        self._claim(json.loads(json.dumps(run)))
        rows, times = read_rows(path / "records.jsonl"), read_rows(path / "times.jsonl")
        # A batch is kept whole or not at all, so that the batches after a restart are the ones there would have been.
        kept = total if len(rows) >= total else len(rows) // batch_size * batch_size
        self.rows, self.times = rows[:kept], [row for row in times if row["start"] < kept]
        if len(rows) != kept or len(times) != len(self.times) or _torn(path / "records.jsonl"):
            replace(path / "records.jsonl", _lines(self.rows))
            replace(path / "times.jsonl", _lines(self.times))

    def _claim(self, run: Mapping[str, Any]) -> None:
        identity = self.path / "run.json"
        if not identity.exists():
            if any(entry for entry in self.path.iterdir() if not entry.name.endswith(".tmp")):
                raise UsageError(f"{self.path} holds other files; give --out a new or an empty folder")
            replace(identity, json.dumps(run, indent=2) + "\n")
            return
        known = read_json(identity)
        different = [key for key in {**known, **run} if known.get(key) != run.get(key)]
        if different:
            changes = "; ".join(f"{key} was {_short(known.get(key))}, now {_short(run.get(key))}" for key in different)
            raise UsageError(
                f"{self.path} holds another run ({changes}); give --out another folder, or the same command to go on"
            )

    def append(self, batch: Batch) -> None:
        """Keep a batch: its examples first, its rows last, so that a row stands for a batch that is there."""
        from safetensors.torch import save

        start = len(self.rows)
        if batch.tensors:
            (self.path / "examples").mkdir(exist_ok=True)
            tensors = {name: tensor.contiguous() for name, tensor in batch.tensors.items()}
            replace(self.path / "examples" / f"{start:08d}.safetensors", save(tensors))
        _append(self.path / "times.jsonl", batch.times)
        _append(self.path / "records.jsonl", batch.rows)
        self.rows += batch.rows
        self.times += batch.times

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write the result."""
        replace(self.path / "summary.json", json.dumps(summary, indent=2) + "\n")


def load_tensors(path: Path) -> dict[str, Tensor]:
    """The examples of all batches of a folder, joined: ``x``, ``x_adv`` and, where they were rounded, ``x_8bit``."""
    import torch
    from safetensors.torch import load_file

    parts = [load_file(part) for part in sorted((path / "examples").glob("*.safetensors"))]
    return {name: torch.cat([part[name] for part in parts]) for name in (parts[0] if parts else {})}


def read_rows(path: Path) -> list[Row]:
    """The complete rows of a JSON Lines file; a last line that was cut off does not count."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    try:
        return [json.loads(line) for line in lines]
    except json.JSONDecodeError as error:
        raise UsageError(f"{path} is damaged ({error}); give another folder, or delete this one to start anew") from None


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise UsageError(f"{path} is damaged; give another folder, or delete this one to start anew") from None
    if not isinstance(content, dict):
        raise UsageError(f"{path} does not describe a run; give another folder")
    return content


def replace(path: Path, content: str | bytes) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    data = content.encode() if isinstance(content, str) else content
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _lines(rows: list[Row]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def _append(path: Path, rows: list[Row]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(_lines(rows))
        file.flush()
        os.fsync(file.fileno())


def _short(value: Any) -> str:
    """A setting for a message; of a model or data set, its name and the start of its digest."""
    if isinstance(value, dict) and "digest" in value:
        return f"{value['name']} ({value['digest'][:8]})"
    return json.dumps(value)


def _torn(path: Path) -> bool:
    """Whether the file ends in the middle of a line."""
    if not path.exists() or not path.stat().st_size:
        return False
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"
