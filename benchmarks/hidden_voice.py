"""What the white-box attack reaches: thirty commands, stock PocketSphinx decoders, and a recogniser that it never saw.

    python -m advkit.benchmarks.hidden_voice --judge whisper-tiny --out hidden.jsonl

Each command is made once, from its seed, and decoded by PocketSphinx with its full language model: as a whole, in pieces of
128 ms, and as a whole with white noise 20 dB below it, always by a fresh decoder. The judge, a folder of a Whisper
model or its name on the Hugging Face hub, is only asked in the end. A command is hidden from it when PocketSphinx hears it
exactly and the judge's word error rate is at least one half. Controls are the command as spoken by an installed voice, and the
same said faster in the time of the sound that was made. The settings of the attack were chosen on every third phrase, beginning
with the first; the table has the other twenty in a row of their own. The file has a line for each phrase; those that it has are
not made again.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from advkit.attacks.audio.hidden_voice import HiddenVoice
from advkit.audio import sphinx, whisper
from advkit.audio.measures import noise, sped_up
from advkit.audio.recogniser import Recogniser
from advkit.audio.synthesis import speak
from advkit.audio.text import wer
from advkit.sound.wav import quantised

PHRASES = (
    "okay google",
    "turn on airplane mode",
    "call nine one one",
    "unlock the front door",
    "play some music",
    "start recording now",
    "turn on the camera",
    "what is my current location",
    "order a pizza",
    "open the garage door",
    "send a message to mom",
    "read my last email",
    "turn off the alarm",
    "set a timer for ten minutes",
    "delete all my photos",
    "open the web browser",
    "take a picture",
    "show me my bank account",
    "transfer one hundred dollars",
    "turn up the volume",
    "stop the car",
    "navigate to the airport",
    "what time is it",
    "cancel my next meeting",
    "buy more batteries",
    "turn off the lights",
    "post this on the internet",
    "call my office",
    "disable the security system",
    "share my contact list",
)

DECIBELS = 20
WHOLE, STREAM, NOISY, JUDGE = "whole", "streaming", "noise 20 dB", "judge"


def heard(x: Tensor, ears: Mapping[str, Recogniser], seed: int) -> dict[str, str]:
    """What each of the ears hears in a sound (T,), and PocketSphinx with noise."""
    noisy = x + 10 ** (-DECIBELS / 20) * noise(x, torch.Generator().manual_seed(seed))
    sounds = {WHOLE: (WHOLE, x), STREAM: (STREAM, x), NOISY: (WHOLE, noisy), JUDGE: (JUDGE, x)}
    return {name: ears[ear].transcribe(quantised(y).unsqueeze(0))[0] for name, (ear, y) in sounds.items()}


def measured(phrase: str, attack: HiddenVoice, seed: int, ears: Mapping[str, Recogniser]) -> dict[str, Any]:
    """The line of a phrase: its cost, and what everybody heard in it and in the controls."""
    began = time.process_time()
    made = attack.make(phrase, ears[WHOLE], rng=torch.Generator().manual_seed(seed))
    spent, spoken = time.process_time() - began, speak(phrase, ears[WHOLE].rate)
    sounds = {"made": made.x, "spoken": spoken, "faster": sped_up(spoken, len(made.x))}
    line = {"phrase": phrase, "seed": seed, "cpu_s": spent, "seconds": len(made.x) / ears[WHOLE].rate, "queries": made.queries}
    return line | {"heard": {name: heard(x, ears, seed) for name, x in sounds.items()}}


def table(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """The rows: a sound, how many were heard exactly by whom, the judge's mean word error rate, how many were hidden."""
    rest = [line for line in lines if line["phrase"] not in PHRASES[::3]]
    rows = [f"{'sound':<24}{WHOLE:>10}{STREAM:>12}{NOISY:>14}{JUDGE:>8}{'WER':>7}{'hidden':>9}"]
    rows += [_row(name, name, lines) for name in lines[0]["heard"]]
    rows += [_row("made, phrases untuned", "made", rest)] if rest else []
    return [*rows, f"CPU seconds a phrase: {sum(line['cpu_s'] for line in lines) / len(lines):.1f}"]


def _row(title: str, name: str, lines: Sequence[Mapping[str, Any]]) -> str:
    n = len(lines)
    right = {ear: sum(line["heard"][name][ear] == line["phrase"] for line in lines) for ear in (WHOLE, STREAM, NOISY, JUDGE)}
    errors = [min(1.0, wer(line["phrase"], line["heard"][name][JUDGE])) for line in lines]
    obeyed = [line["heard"][name][WHOLE] == line["phrase"] for line in lines]
    hidden = sum(yes and error >= 0.5 for yes, error in zip(obeyed, errors, strict=True))
    counts = [f"{count}/{n}".rjust(width) for count, width in zip(right.values(), (10, 12, 14, 8), strict=True)]
    return f"{title:<24}{''.join(counts)}{sum(errors) / n:>7.2f}{f'{hidden}/{n}':>9}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--judge", required=True, help="the folder or the name of a Whisper model")
    parser.add_argument("--out", type=Path, required=True, help="the file of lines; phrases that it has are not made again")
    parser.add_argument("--frames", type=int, default=4, help="frames of 10 ms a phone")
    parser.add_argument("--seed", type=int, default=0, help="of the noise that each sound begins as")
    parser.add_argument("--phrases", type=int, nargs=2, default=(0, len(PHRASES)), help="the first, and the one after the last")
    given = parser.parse_args(arguments)
    lines = [json.loads(row) for row in given.out.read_text().splitlines()] if given.out.exists() else []

    @cache
    def ears() -> dict[str, Recogniser]:
        modes = {WHOLE: "pocketsphinx", STREAM: "pocketsphinx(streaming=true)"}
        return {name: sphinx.load(spec) for name, spec in modes.items()} | {JUDGE: whisper.load(given.judge)}

    for phrase in PHRASES[slice(*given.phrases)]:
        if phrase not in {line["phrase"] for line in lines}:
            lines.append(measured(phrase, HiddenVoice(given.frames), given.seed, ears()))
            with given.out.open("a") as file:
                file.write(json.dumps(lines[-1]) + "\n")
    print(*table(lines), sep="\n")


if __name__ == "__main__":
    main()
