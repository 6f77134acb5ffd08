"""Recordings and what is said in them, from files and folders as they are found in the world.

========================  ==========================================================================================
transcripts               where
========================  ==========================================================================================
``metadata.csv``          the AudioFolder of Hugging Face: a head with ``file_name`` and ``transcription`` (or ``text``)
``metadata.csv``          LJ Speech: ``id|text|normalized text``, without a head
``*.trans.txt``           LibriSpeech: ``id text``
``read_data.txt``         three lines, parted by commas: files, what they say, what an attack should make of them
``NAME.txt``              beside ``NAME.wav``
========================  ==========================================================================================
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from advkit.audio.text import check_said, normalise
from advkit.errors import UsageError, first_line
from advkit.sound import wav

SUFFIXES = (".wav", ".flac", ".ogg", ".mp3", ".opus", ".aiff", ".aif")
"""The files of a folder that are taken for sounds."""


@dataclass(frozen=True)
class Clip:
    """A recording.

    Attributes:
        name: Of the file, without its end.
        x: The waveform, (T,) float32 in [-1, 1].
        text: What is said in it, normalised; None where nobody wrote it down.
        target: What the data's own list says that an attack should make of it, normalised; None without.
    """

    name: str
    x: Tensor
    text: str | None = None
    target: str | None = None


def load(path: str | Path, rate: int, longest: float, limit: int | None = None) -> tuple[list[Clip], tuple[str, ...]]:
    """The clips of a file, or of a folder and the folders in it, in the order of their paths; and what was changed on the way.

    Arguments:
        path: The file or folder.
        rate: Samples a second of the waveforms.
        longest: The most seconds that a clip may last.
        limit: The most clips.

    Raises:
        UsageError: There is none, or one cannot be read, is silent or too long, or two have the same name.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise UsageError(f"there is no file or folder {path}; --data is a sound, as clip.wav, or a folder of sounds")
    files = _files(path)[:limit]
    known = _transcripts(path, "**/") if path.is_dir() else _transcripts(path.parent)
    clips: list[Clip] = []
    notes: list[str] = []
    for file in files:
        x, said = wav.read(file, rate, longest)
        text, target = known.get(file.stem, (None, None))
        clips.append(Clip(file.stem, x, text or _beside(file), target))
        notes += said
    return clips, tuple(_brief(notes))


def _files(path: Path) -> list[Path]:
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if _is_sound(file))
    if not files:
        raise UsageError(f"{path} holds no sounds; it should hold files that end in {', '.join(SUFFIXES)}")
    names = [file.stem for file in files]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UsageError(f"{path} holds two sounds called {twice}; each clip needs a name of its own")
    return files


def _is_sound(file: Path) -> bool:
    """Whether it is taken for one; hidden files are what systems write beside sounds."""
    return file.suffix.lower() in SUFFIXES and not file.name.startswith(".") and file.is_file()


def _brief(notes: Sequence[str]) -> list[str]:
    """The notes of many files: the first few, and how many there are more."""
    return list(notes) if len(notes) <= 3 else [*notes[:2], f"and {len(notes) - 2} notes more of this kind"]


def _transcripts(folder: Path, below: str = "") -> dict[str, tuple[str | None, str | None]]:
    """What is said in the files of a folder and what their targets are, by the names of the files without their end.

    ``below`` is ``**/`` where the folders in it count too. Files that the lists name are never opened.
    """
    known: dict[str, tuple[str | None, str | None]] = {}
    for listing in sorted(folder.glob(f"{below}*.trans.txt")):
        for line in _text(listing).splitlines():
            name, _, said = line.partition(" ")
            known[name] = (normalise(said) or None, None)
    for listing in sorted(folder.glob(f"{below}metadata.csv")):
        known |= {name: (normalise(said) or None, None) for name, said in _metadata(listing)}
    if (listing := folder / "read_data.txt").is_file():
        known |= _read_data(listing)
    return known


def _metadata(path: Path) -> list[tuple[str, str]]:
    """The names and texts of a metadata.csv, of either kind."""
    content = _text(path)
    try:
        lines = csv.reader(io.StringIO(content))
        if "file_name" in (head := next(lines, [])):
            return _named(path, head, list(lines))
        rows = list(csv.reader(io.StringIO(content), delimiter="|", quoting=csv.QUOTE_NONE))
    except csv.Error as error:
        raise UsageError(f"cannot read {path}: {first_line(error)}") from None
    if not all(len(row) in (2, 3) for row in rows):
        raise UsageError(f"cannot read {path}; it should have the columns file_name and transcription, or lines id|text")
    return [(row[0], row[-1]) for row in rows]


def _named(path: Path, head: list[str], rows: list[list[str]]) -> list[tuple[str, str]]:
    """The names and texts of rows under a head; a row that is cut off has none."""
    column = next((name for name in ("transcription", "text", "sentence") if name in head), None)
    if column is None:
        raise UsageError(f"{path} has the columns {', '.join(head)}; beside file_name it should have transcription")
    file, said = head.index("file_name"), head.index(column)
    return [(Path(row[file]).stem, row[said]) for row in rows if len(row) > max(file, said)]


def _read_data(path: Path) -> dict[str, tuple[str | None, str | None]]:
    lines = [line.split(",") for line in _text(path).splitlines() if line.strip()]
    if len(lines) not in (2, 3) or len({len(line) for line in lines}) != 1:
        counts = ", ".join(str(len(line)) for line in lines) or "no"
        raise UsageError(f"{path} has lines of {counts} entries; it should have a line each of files, texts and targets")
    files, texts, targets = (*lines, [""] * len(lines[0]))[:3]
    return {
        Path(file.strip()).stem: (normalise(text) or None, normalise(target) or None)
        for file, text, target in zip(files, texts, targets, strict=True)
    }


def _beside(file: Path) -> str | None:
    written = file.with_suffix(".txt")
    return (normalise(_text(written)) or None) if written.is_file() else None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise UsageError(f"{path} is not text in UTF-8; transcripts should be") from None


def phrases(given: Sequence[str], what: str) -> list[str]:
    """The texts that were typed, normalised; one that begins with ``@`` names a file with a text a line.

    Arguments:
        given: The texts.
        what: The option, for messages: ``--say``.

    Raises:
        UsageError: There is no such file, or a text has no words.
    """
    found: list[str] = []
    for text in given:
        found += _lines(Path(text[1:]).expanduser(), what) if text.startswith("@") else [text]
    return [check_said(text) for text in found]


def _lines(path: Path, what: str) -> list[str]:
    if not path.is_file():
        raise UsageError(f"there is no file {path}; {what} @FILE names a text file with a phrase a line")
    lines = [line for line in _text(path).splitlines() if line.strip()]
    if not lines:
        raise UsageError(f"{path} holds no phrases; it should have one a line")
    return lines
