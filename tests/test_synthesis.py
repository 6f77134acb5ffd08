"""Synthesised commands: voices that are installed here, and what happens where they are not."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

import pytest
import torch

from advkit.audio import synthesis
from advkit.audio.synthesis import VOICES, installed, speak
from advkit.errors import UsageError

RATE = 16_000


def some_voice() -> str:
    if not installed():
        pytest.skip("no synthesiser of speech is installed")
    return installed()[0]


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine without programs."""
    monkeypatch.setattr(synthesis.shutil, "which", lambda program: None)
    installed.cache_clear()
    yield
    installed.cache_clear()


@pytest.mark.parametrize("name", VOICES)
def test_each_voice_says_a_command_of_a_plausible_length_with_the_peak(name: str) -> None:
    if name not in installed():
        pytest.skip(f"the voice {name} is not installed")
    x = speak("turn on airplane mode", RATE, name)
    assert x.dtype == torch.float32
    assert x.ndim == 1
    assert x.abs().amax() == pytest.approx(0.5, abs=1e-6)
    assert 1.0 < len(x) / RATE < 4.0


def test_the_same_text_is_the_same_sound_however_it_is_written() -> None:
    name = some_voice()
    assert torch.equal(speak("Call 911!", RATE, name), speak("call nine one one", RATE))


def test_the_rate_is_the_one_asked_for() -> None:
    some_voice()
    slow, fast = speak("okay", 8_000), speak("okay", 16_000)
    assert len(fast) / len(slow) == pytest.approx(2, rel=0.01)


def test_a_longer_text_takes_longer() -> None:
    some_voice()
    assert len(speak("open the front door", RATE)) > len(speak("open", RATE))


def test_programs_get_letters_and_no_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    """What could be a switch, a command or Lisp is gone before a program starts."""
    name = some_voice()
    calls = []
    run = subprocess.run

    def seen(arguments: tuple[str, ...], **settings: object) -> object:
        calls.append((arguments, settings))
        return run(arguments, **settings)  # type: ignore[call-overload]

    monkeypatch.setattr(synthesis.subprocess, "run", seen)
    speak('-o /x; $(touch y) `z` "(system)" \\', RATE, name)
    arguments, settings = calls[-1]
    assert settings["input"] == "o x touch y z system"
    assert not settings.get("shell")
    assert isinstance(arguments, tuple)
    assert all(bad not in " ".join(arguments[3:5]) for bad in ';$`"(')


@pytest.mark.parametrize(
    ("text", "says"), [("", "at least one word"), ("... !", "at least one word"), ("a " * 300, "at most 500")]
)
def test_a_text_that_cannot_be_said(text: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        speak(text, RATE)


def test_an_unknown_voice_names_those_that_are_known() -> None:
    with pytest.raises(UsageError, match=r"unknown voice 'flite-rsm'; known are .*flite-rms"):
        speak("okay", RATE, "flite-rsm")


@pytest.mark.usefixtures("bare")
def test_without_a_synthesiser_there_is_one_sentence_with_the_command() -> None:
    assert installed() == ()
    with pytest.raises(UsageError, match="apt-get install flite"):
        speak("okay", RATE)


@pytest.mark.usefixtures("bare")
def test_a_voice_that_is_not_installed_says_how_to_get_it() -> None:
    with pytest.raises(UsageError, match="apt-get install festival festvox-kallpc16k"):
        speak("okay", RATE, "festival-kal")


def test_a_program_that_hangs_or_fails_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    name = some_voice()

    def hangs(arguments: tuple[str, ...], **settings: object) -> object:
        raise subprocess.TimeoutExpired(arguments, 60)

    def fails(arguments: tuple[str, ...], **settings: object) -> object:
        raise subprocess.CalledProcessError(1, arguments, stderr="no such voice\nat line 2")

    monkeypatch.setattr(synthesis.subprocess, "run", hangs)
    with pytest.raises(UsageError, match="took more than 60 s"):
        speak("okay", RATE, name)
    monkeypatch.setattr(synthesis.subprocess, "run", fails)
    with pytest.raises(UsageError, match="failed: no such voice; try"):
        speak("okay", RATE, name)


def test_a_program_that_makes_no_file_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    name = some_voice()
    monkeypatch.setattr(
        synthesis.subprocess, "run", lambda arguments, **settings: subprocess.CompletedProcess(arguments, 0, "", "")
    )
    with pytest.raises(UsageError, match="made no sound"):
        speak("okay", RATE, name)
