"""Commands said aloud by an installed synthesiser of speech: a text to a waveform."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from torch import Tensor

from advkit.audio.text import check_said
from advkit.errors import UsageError, first_line
from advkit.sound.wav import read
from advkit.spec import unknown

PEAK = 0.5
"""The loudest sample of what is said."""

LETTERS = 500
"""The most characters of a command."""

PATIENCE = 60.0
"""How many seconds a synthesiser may take."""


@dataclass(frozen=True)
class Voice:
    """A voice of a synthesiser.

    Attributes:
        program: What is run.
        own: What the program calls the voice.
        packages: Debian's packages that hold it.
        about: What it is.
    """

    program: str
    own: str
    packages: str
    about: str


_SLT, _KAL = "cmu_us_slt_arctic_hts", "kal_diphone"
VOICES: dict[str, Voice] = {
    "flite-rms": Voice("flite", "rms", "flite", "a man's recordings; PocketSphinx hears it best"),
    "flite-slt": Voice("flite", "slt", "flite", "a woman's recordings"),
    "festival-slt": Voice("text2wave", _SLT, "festival festvox-us-slt-hts", "a woman, hidden Markov models"),
    "festival-kal": Voice("text2wave", _KAL, "festival festvox-kallpc16k", "a man, diphones"),
    "flite-awb": Voice("flite", "awb", "flite", "a Scotsman's recordings"),
    "flite-kal16": Voice("flite", "kal16", "flite", "a man, diphones"),
    "espeak-ng": Voice("espeak-ng", "en-us", "espeak-ng", "formants; Whisper hears it, PocketSphinx hardly"),
}
"""The voices by name; without one, the first that is installed speaks."""

_LISTS = {"flite": ("flite", "-lv"), "text2wave": ("festival", "-b", "(print (voice.list))")}
"""How a program is asked which voices it has; the others always have their own."""


def speak(text: str, rate: int, voice: str | None = None) -> Tensor:
    """The command as a synthesiser says it, (T,) float32 at ``rate``, with a peak of 0.5; the same on every call.

    Arguments:
        text: What is said; it is normalised first, so that a program gets letters, apostrophes and spaces only.
        rate: Samples a second.
        voice: A name in ``VOICES``; by default, the first that is installed.

    Raises:
        UsageError: The text has no word or more than 500 characters, there is no such voice, or it is not installed.

    Example:
        >>> speak("turn on airplane mode", 16_000).abs().amax()  # doctest: +SKIP
        tensor(0.5000)
    """
    plain = check_said(text)
    if len(plain) > LETTERS:
        raise UsageError(f"the command has {len(plain)} characters; a synthesiser is given at most {LETTERS}")
    chosen = _chosen(voice)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "said.wav")
        _run(_arguments(VOICES[chosen], plain, path), plain)
        if not path.is_file():
            raise UsageError(f"{chosen} made no sound of {plain!r}; try another voice: {', '.join(installed())}")
        x, _ = read(path, rate)
    return x * (PEAK / x.abs().amax())


@lru_cache
def installed() -> tuple[str, ...]:
    """The names of the voices that can speak here, in the order of ``VOICES``."""
    known = {program: _known(program) for program in {voice.program for voice in VOICES.values()}}
    return tuple(name for name, voice in VOICES.items() if voice.own in known[voice.program])


def _known(program: str) -> list[str]:
    """The voices of a program; none where it is missing or does not work."""
    if shutil.which(program) is None:
        return []
    if program not in _LISTS:
        return [voice.own for voice in VOICES.values() if voice.program == program]
    try:
        return re.findall(r"\w+", _run(_LISTS[program], ""))
    except UsageError:
        return []


def _chosen(name: str | None) -> str:
    if name is not None and name not in VOICES:
        raise unknown("voice", name, VOICES)
    if name in installed():
        return str(name)
    if name is not None:
        raise UsageError(f"the voice {name!r} is not installed; apt-get install {VOICES[name].packages}")
    if not installed():
        raise UsageError("no synthesiser of speech is installed; apt-get install flite, or give the command as a recording")
    return installed()[0]


def _arguments(voice: Voice, plain: str, path: Path) -> tuple[str, ...]:
    """The command line; text2wave reads the text from its standard input."""
    if voice.program == "flite":
        return ("flite", "-voice", voice.own, "-t", plain, "-o", str(path))
    if voice.program == "text2wave":
        return ("text2wave", "-o", str(path), "-eval", f"(voice_{voice.own})")
    return ("espeak-ng", "-v", voice.own, "-w", str(path), plain)


def _run(arguments: tuple[str, ...], given: str) -> str:
    """What a program prints."""
    try:
        done = subprocess.run(arguments, input=given, capture_output=True, text=True, timeout=PATIENCE, check=True)
    except subprocess.TimeoutExpired:
        raise UsageError(f"{arguments[0]} took more than {PATIENCE:g} s to say {given!r}; give a shorter command") from None
    except (OSError, subprocess.CalledProcessError) as error:
        why = getattr(error, "stderr", None) or error
        raise UsageError(f"{arguments[0]} failed: {first_line(Exception(why))}; try another voice") from None
    return done.stdout
