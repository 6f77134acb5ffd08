"""Attacks on recognisers of speech, one paper a file, and the table of their names."""

from __future__ import annotations

from advkit.attacks.audio.cw import SpeechCW as SpeechCW
from advkit.attacks.audio.hidden_voice import HiddenVoice as HiddenVoice
from advkit.attacks.audio.imperceptible import Imperceptible as Imperceptible
from advkit.attacks.audio.mangle import Mangle as Mangle
from advkit.attacks.audio.universal import SpeechUniversal as SpeechUniversal
from advkit.spec import Table

SPEECH_ATTACKS: Table = {
    "hidden-voice": HiddenVoice,
    "mangle": Mangle,
    "cw": SpeechCW,
    "imperceptible": Imperceptible,
    "universal": SpeechUniversal,
}
"""The attacks made for speech that a spec may name: ``hidden-voice(frames=4)``."""
