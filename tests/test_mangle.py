"""Mangled commands, against recognisers whose limits are known."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from advkit.attacks.audio.mangle import DOWN, Mangle, faster
from advkit.audio import synthesis
from advkit.audio.recogniser import TextOnly
from advkit.benchmarks import mangled
from advkit.errors import UsageError
from advkit.sound.wav import quantised

RATE = 8_000
TEXT = "open the door"


def voice(seconds: float = 1.0, seed: int = 0) -> Tensor:
    """Noise in the rhythm of syllables."""
    t = torch.arange(int(seconds * RATE)) / RATE
    noise = torch.randn(len(t), generator=torch.Generator().manual_seed(seed))
    return 0.1 * noise * (1 + torch.sin(2 * torch.pi * 4 * t))


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Hears:
    """Hears the command in sounds of at least so many seconds, and writes down what it was asked."""

    def __init__(self, seconds: float, text: str = TEXT) -> None:
        self.seconds, self.said = seconds, text
        self.asked: list[Tensor] = []

    def __call__(self, x: Tensor) -> str:
        self.asked.append(x)
        return self.said if len(x) / RATE >= self.seconds else "open"


@pytest.mark.parametrize("limit", [0.25, 0.4, 0.8])
def test_the_fastest_sound_that_is_obeyed_is_near_the_limit_of_the_recogniser(limit: float) -> None:
    ear = Hears(limit)
    made = Mangle(40, voices="").make(TEXT, TextOnly(ear, RATE), voice=voice(), rng=rng())
    assert made.queries == len(ear.asked) == 40
    assert limit <= len(made.x) / RATE <= limit * DOWN + 1e-3
    assert torch.equal(made.x, quantised(made.x))
    assert made.x.abs().amax() == pytest.approx(0.5, abs=1e-4)


def test_the_result_was_heard_as_the_command() -> None:
    ear = Hears(0.4)
    made = Mangle(20, voices="").make(TEXT, TextOnly(ear, RATE), voice=voice(), rng=rng())
    assert any(torch.equal(made.x, x) for x in ear.asked)
    assert ear(made.x) == TEXT


def played(answers: list[str]) -> tuple[list[Tensor], TextOnly]:
    """A listener with these answers, the last from then on, and what it is played."""
    sounds: list[Tensor] = []

    def listens(x: Tensor) -> str:
        sounds.append(x)
        return answers[min(len(sounds), len(answers)) - 1]

    return sounds, TextOnly(listens, RATE)


def test_of_the_sounds_that_are_obeyed_the_one_that_the_listener_hears_worst_is_taken() -> None:
    ear, (sounds, listener) = Hears(0.3), played([TEXT, TEXT, "over the door", TEXT])
    made = Mangle(40, voices="").make(TEXT, TextOnly(ear, RATE), voice=voice(), listener=listener, rng=rng())
    assert len(sounds) == sum(ear(x) == TEXT for x in ear.asked[:40]) > 4
    assert all(ear(x) == TEXT for x in sounds)
    assert torch.equal(made.x, sounds[2])
    assert made.queries == 40


def test_the_search_ends_when_the_listener_hears_something_else_altogether() -> None:
    ear, (sounds, listener) = Hears(0.3), played([TEXT, "over the door", "", TEXT])
    made = Mangle(40, voices="").make(TEXT, TextOnly(ear, RATE), voice=voice(), listener=listener, rng=rng())
    assert torch.equal(made.x, sounds[-1])
    assert len(sounds) == 3
    assert made.queries == len(ear.asked) < 20


def test_of_two_voices_the_one_that_stays_obeyed_is_used() -> None:
    """The recogniser does not understand the first voice, a low tone: it gets few of the queries."""
    low = torch.sin(2 * torch.pi * 200 * torch.arange(RATE) / RATE)
    is_low: list[bool] = []

    def hears(x: Tensor) -> str:
        power = torch.fft.rfft(x).abs() ** 2
        is_low.append(bool(power[: len(power) // 8].sum() > 0.5 * power.sum()))
        return "open" if is_low[-1] or len(x) / RATE < 0.4 else TEXT

    said = {"flite-rms": voice()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("advkit.attacks.audio.mangle.speak", lambda text, rate, name: said[name])
        made = Mangle(30, voices="flite-rms").make(TEXT, TextOnly(hears, RATE), voice=low, rng=rng())
    assert 1 <= sum(is_low) <= 6
    assert hears(made.x) == TEXT


def test_without_success_the_result_is_the_closest_in_words() -> None:
    def hears(x: Tensor) -> str:
        return "open the bar" if 0.7 < len(x) / RATE < 0.9 else "and so on"

    made = Mangle(20, voices="").make(TEXT, TextOnly(hears, RATE), voice=voice(), rng=rng())
    assert hears(made.x) == "open the bar"


def test_the_draws_come_from_the_generator_alone() -> None:
    def once(seed: int, state: int) -> Tensor:
        torch.manual_seed(state)
        return Mangle(5, voices="").make(TEXT, TextOnly(Hears(0.3), RATE), voice=voice(), rng=rng(seed)).x

    assert torch.equal(once(0, 1), once(0, 2))
    assert not torch.equal(once(0, 1), once(1, 1))


def test_silence_at_the_end_of_a_voice_makes_no_difference() -> None:
    padded = torch.cat([voice(), torch.zeros(500)])
    plain, same = (Mangle(5, voices="").make(TEXT, TextOnly(Hears(0.3), RATE), voice=x, rng=rng()).x for x in (voice(), padded))
    assert torch.equal(plain, same)


def test_a_voice_of_a_few_samples_is_made_into_a_sound() -> None:
    made = Mangle(3, voices="").make(TEXT, TextOnly(Hears(0), RATE), voice=voice()[:20], rng=rng())
    assert made.x.isfinite().all()


@given(st.floats(0.5, 5), st.integers(100, 8000))
def test_a_faster_sound_has_the_length_that_it_should(s: float, length: int) -> None:
    assert len(faster(torch.ones(length), s, RATE)) == round(length / s)


def test_a_sound_as_fast_as_before_is_the_same() -> None:
    x = voice()
    assert torch.allclose(faster(x, 1, RATE), x, atol=1e-6)


@pytest.mark.parametrize("s", [1.5, 2.0, 3.0])
def test_a_faster_tone_keeps_its_pitch(s: float) -> None:
    tone = torch.sin(2 * torch.pi * 1000 * torch.arange(2 * RATE) / RATE)
    fast = faster(tone, s, RATE)
    peak = torch.fft.rfft(fast).abs().argmax() * RATE / len(fast)
    assert float(peak) == pytest.approx(1000, abs=35)


def test_synthesised_voices_say_the_command_besides_the_one_given(monkeypatch: pytest.MonkeyPatch) -> None:
    said = {"flite-rms": voice(seed=1), "flite-slt": voice()}
    monkeypatch.setattr("advkit.attacks.audio.mangle.speak", lambda text, rate, name: said[name])
    monkeypatch.setattr("advkit.attacks.audio.mangle.installed", lambda: tuple(said))
    for names, many in (("", 1), ("all", 2), ("flite-rms, flite-slt", 2), ("flite-slt", 1)):
        assert len(Mangle(1, names)._voices(TEXT, RATE, voice())) == many


def test_settings_and_inputs_that_cannot_be() -> None:
    with pytest.raises(UsageError, match="mangle: queries is 0"):
        Mangle(0)
    with pytest.raises(UsageError, match="unknown voice 'robot'"):
        Mangle(voices="robot")
    ear = TextOnly(Hears(0.3), RATE)
    with pytest.raises(UsageError, match="at least one word"):
        Mangle(voices="").make(" .", ear, voice=voice(), rng=rng())
    with pytest.raises(UsageError, match="no voice that says the command"):
        Mangle(voices="").make(TEXT, ear, rng=rng())
    with pytest.raises(UsageError, match="the voice is digital silence"):
        Mangle(voices="").make(TEXT, ear, voice=torch.zeros(100), rng=rng())
    with pytest.raises(UsageError, match="the listener hears 16000 samples a second and the recogniser 8000"):
        Mangle(voices="").make(TEXT, ear, voice=voice(), listener=TextOnly(Hears(0.3)), rng=rng())


@pytest.mark.slow
def test_pocketsphinx_obeys_a_command_twice_as_fast() -> None:
    """Its open vocabulary hears the command in a sound of half the length, or less."""
    pytest.importorskip("pocketsphinx")
    if "flite-rms" not in synthesis.installed():
        pytest.skip("flite is not installed")
    from advkit.audio.sphinx import PocketSphinx

    spoken = synthesis.speak("turn on airplane mode", 16_000, "flite-rms")
    ear = PocketSphinx()
    made = Mangle(20, voices="").make("turn on airplane mode", ear, voice=spoken, rng=rng())
    assert ear.transcribe(made.x.unsqueeze(0)) == ["turn on airplane mode"]
    assert len(made.x) <= len(spoken) / 2


def test_the_measurement_asks_about_a_sound_once_and_counts_what_is_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("advkit.attacks.audio.mangle.speak", lambda text, rate, name: voice())
    monkeypatch.setattr("advkit.attacks.audio.mangle.installed", lambda: ("flite-rms",))
    monkeypatch.setattr("advkit.benchmarks.mangled.speak", lambda text, rate: voice())
    sphinx = Hears(0.3)
    ears = {
        "pocketsphinx": TextOnly(sphinx, RATE),
        "sharp": TextOnly(Hears(0.2), RATE),
        "dull": TextOnly(Hears(0.5), RATE),
    }
    line = mangled.measured(TEXT, 0, 12, ears, ["sharp"])
    assert line["runs"]["nobody"]["queries"] == 12
    assert line["runs"]["nobody"]["heard"] == {"pocketsphinx": TEXT, "sharp": TEXT, "dull": "open"}
    assert line["controls"]["spoken"] == {"pocketsphinx": TEXT, "sharp": TEXT, "dull": TEXT}
    # Both runs search alike; the spoken command, the faster one and noise are three sounds more.
    assert len(sphinx.asked) <= 12 + 3
    rows = {(row[:24].strip(), row[24:48].strip()): row[48:].split() for row in mangled.table([line])[1:]}
    assert ("listener sharp", "sharp") not in rows
    assert rows["listener nobody", "dull"] == ["1/1", "0/1", "0.67", "1/1", "1/1"]
    assert rows["listener nobody", "sharp"] == ["1/1", "1/1", "0.00", "0/1", "0/1"]
    assert rows["spoken", "dull"] == ["1/1", "1/1", "0.00", "0/1", "0/1"]
