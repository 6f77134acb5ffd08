"""A run in a folder: rows appended batch by batch, so that a run that was stopped goes on where it was.

``run.json`` says which run it is, ``records.jsonl`` holds a row an example, ``times.jsonl`` a row a batch and attack,
``examples/`` a safetensors file a batch, ``pictures/`` and ``files/`` PNG images, ``summary.json`` the result.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from advkit.errors import UsageError, first_line

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
        index: The numbers of the run's examples, in their order.
        batch_size: How many a batch has.

    Raises:
        UsageError: The folder holds another run or something else, is damaged, or another process is writing to it.
    """

    def __init__(self, path: Path, run: Mapping[str, Any], index: Sequence[int], batch_size: int) -> None:
        self.path, self.batch_size = path, batch_size
        if path.exists() and not path.is_dir():
            raise UsageError(f"{path} is a file; --out should be a folder")
        path.mkdir(parents=True, exist_ok=True)
        self._lock = locked(path)
        try:
            self._open(json.loads(json.dumps(run)), index)
        except BaseException:
            os.close(self._lock)
            raise

    def _open(self, run: Mapping[str, Any], index: Sequence[int]) -> None:
        """Claim the folder, and keep what is whole of what is there."""
        path, batch_size = self.path, self.batch_size
        self._claim(run)
        rows, times = read_records(path), read_times(path)
        if [row["index"] for row in rows] != list(index[: len(rows)]):
            raise UsageError(f"the rows in {path} are not those of this run; give another folder, or delete this one")
        # A batch is kept whole or not at all, so that the batches after a restart are the ones there would have been.
        kept = len(rows) if len(rows) == len(index) else len(rows) // batch_size * batch_size
        missing = (start for start in range(0, kept, batch_size) if not self._examples(start).exists())
        kept = next(missing, kept)
        self.rows, self.times = rows[:kept], [row for row in times if row["start"] < kept]
        for name, found, wanted in (("records.jsonl", rows, self.rows), ("times.jsonl", times, self.times)):
            if len(found) != len(wanted) or _torn(path / name):
                replace(path / name, _lines(wanted))

    def __enter__(self) -> Folder:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._lock)

    def _examples(self, start: int) -> Path:
        return self.path / "examples" / f"{start:08d}.safetensors"

    def _claim(self, run: Mapping[str, Any]) -> None:
        identity = self.path / "run.json"
        if not identity.exists() and any(entry for entry in self.path.iterdir() if not entry.name.endswith(".tmp")):
            raise UsageError(f"{self.path} holds other files; give --out a new or an empty folder")
        known = read_json(identity) if identity.exists() else {}
        different = [key for key in {**known, **run} if known.get(key) != run.get(key)]
        if not (self.path / "records.jsonl").exists():
            # Nothing was done yet, so nothing of another run is lost.
            replace(identity, json.dumps(run, indent=2) + "\n")
        elif different:
            changes = "; ".join(f"{key} was {_short(known.get(key))}, now {_short(run.get(key))}" for key in different)
            raise UsageError(
                f"{self.path} holds another run ({changes}); give --out another folder, or the same command to go on"
            )

    def append(self, batch: Batch) -> None:
        """Keep a batch: its examples first, its rows last, so that a row stands for a batch that is there."""
        from safetensors.torch import save

        start = len(self.rows)
        (self.path / "examples").mkdir(exist_ok=True)
        replace(self._examples(start), save({name: tensor.contiguous() for name, tensor in batch.tensors.items()}))
        append(self.path / "times.jsonl", batch.times)
        append(self.path / "records.jsonl", batch.rows)
        self.rows += batch.rows
        self.times += batch.times

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write the result."""
        replace(self.path / "summary.json", json.dumps(summary, indent=2) + "\n")


@contextlib.contextmanager
def claimed(
    path: Path | None,
    run: Mapping[str, Any],
    keys: set[str],
    keep: Callable[[list[Row], Path], list[Row]],
    name: str = "rows.jsonl",
) -> Iterator[list[Row]]:
    """The rows that a folder holds of a run; the folder is this process's for as long as this lasts.

    Arguments:
        path: Where; made if it is not there. None for a run that is kept nowhere.
        run: Everything that makes two runs the same, for ``run.json``.
        keys: What every row has.
        keep: The complete rows and their file to the rows that count; it refuses those that are not of this run.
        name: Of the file of rows.

    Raises:
        UsageError: The folder holds another run or something else, is damaged, or another process is writing to it.
    """
    if path is None:
        yield []
        return
    if path.exists() and not path.is_dir():
        raise UsageError(f"{path} is a file; --out should be a folder")
    path.mkdir(parents=True, exist_ok=True)
    lock = locked(path)
    try:
        found = read_rows(path / name, keys)
        _say(path, json.loads(json.dumps(run)), bool(found))
        rows = keep(found, path / name)
        # What was cut off, in the middle of a line or of what belongs together, goes.
        replace(path / name, _lines(rows))
        yield rows
    finally:
        os.close(lock)


def _say(path: Path, run: dict[str, Any], begun: bool) -> None:
    """Write which run a folder is of, where it is of no other; before the first row nothing of another is lost."""
    identity = path / "run.json"
    if not identity.exists() and any(entry for entry in path.iterdir() if not entry.name.endswith(".tmp")):
        raise UsageError(f"{path} holds other files; give --out a new or an empty folder")
    known = read_json(identity) if begun and identity.exists() else run
    if different := ", ".join(key for key in {**known, **run} if known.get(key) != run.get(key)):
        raise UsageError(
            f"{path} holds another run (other {different}); give --out another folder, or the same command to go on"
        )
    replace(identity, json.dumps(run, indent=2) + "\n")


def locked(path: Path) -> int:
    """A descriptor that holds a lock on the folder until it is closed; where a system has no such locks, none is held."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:
        pass
    except BlockingIOError:
        os.close(descriptor)
        raise UsageError(f"another process is writing to {path}; wait for it, or give --out another folder") from None
    return descriptor


def load_tensors(path: Path, n: int) -> dict[str, Tensor]:
    """The examples of the first ``n`` rows of a folder: ``x``, ``x_adv`` and, where they were rounded, ``x_8bit``.

    Raises:
        UsageError: They are missing or damaged.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        parts = [load_file(part) for part in sorted((path / "examples").glob("*.safetensors"))]
    except SafetensorError as error:
        raise UsageError(f"the examples in {path} are damaged ({first_line(error)}); repeat the run elsewhere") from None
    tensors = {name: torch.cat([part[name] for part in parts])[:n] for name in (parts[0] if parts else {})}
    there = len(tensors["x"]) if tensors else 0
    if there < n:
        raise UsageError(f"{path} holds {n} rows and the examples of {there}; repeat the run elsewhere")
    return tensors


def read_records(path: Path) -> list[Row]:
    """The records of a folder, those that are complete."""
    return read_rows(path / "records.jsonl", {"index", "correct", "success", "attacks", "distance"})


def read_times(path: Path) -> list[Row]:
    """The times of a folder."""
    return read_rows(path / "times.jsonl", {"start", "attack", "seconds"})


def read_rows(path: Path, keys: set[str]) -> list[Row]:
    """The complete rows of a JSON Lines file; a last line that was cut off does not count."""
    if not path.exists():
        return []
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
    except (ValueError, RecursionError) as error:
        raise damaged(path, first_line(error)) from None
    if not all(isinstance(row, dict) and keys <= set(row) for row in rows):
        raise damaged(path, f"a row lacks one of {', '.join(sorted(keys))}")
    return rows


def damaged(path: Path, why: str) -> UsageError:
    """What is said of a file of a run that cannot be read."""
    return UsageError(f"{path} is damaged ({why}); give another folder, or delete this one to start anew")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise damaged(path, first_line(error)) from None
    if not isinstance(content, dict):
        raise damaged(path, "it does not describe a run")
    return content


def replace(path: Path, content: str | bytes, sync: bool = True) -> None:
    """Write a file whole or not at all; with ``sync``, so that it also survives a loss of power."""
    temporary = path.with_name(path.name + ".tmp")
    data = content.encode() if isinstance(content, str) else content
    try:
        with temporary.open("wb") as file:
            file.write(data)
            if sync:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        # On a full disk, half a file is in the way of whole ones.
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def resumable() -> Iterator[None]:
    """Say what is left where the system refuses to go on: a full disk, a folder that is gone.

    Raises:
        UsageError: The system refused something.
    """
    try:
        yield
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        sentence = f"{error.strerror or error}{where}; what was finished before is kept, and the same command goes on"
        raise UsageError(sentence) from error


def _lines(rows: list[Row]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def append(path: Path, rows: list[Row]) -> None:
    """Add rows to a JSON Lines file, and wait until they are on the disk."""
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
