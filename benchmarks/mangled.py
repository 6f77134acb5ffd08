"""What the black-box attack reaches: thirty commands, PocketSphinx with its full language model, and who else hears them.

    python -m advkit.benchmarks.mangled --ears whisper-tiny whisper-base --out mangled.jsonl

The ears are folders of Whisper models, or names on the Hugging Face hub. The attack runs without a listener, judged by every
ear, and with each ear as its listener, judged by the others: a judge is never asked during the search. A command is hidden from
a judge when PocketSphinx hears it exactly and the judge's word error rate is at least one half; the last column leaves out
the commands that the judge does not hear even as they are spoken. Controls are the command as spoken by the first voice
that is installed, the same said faster in the time of the sound that was made without a listener, and white noise of its length
and power. The file has a line for each phrase; those that it has are not made again. The runs of a phrase share the answers
of recognisers that were asked before, so the time of those with a listener is what the listener takes.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from advkit.attacks.audio.mangle import Mangle
from advkit.audio import sphinx, whisper
from advkit.audio.measures import noise, sped_up
from advkit.audio.recogniser import Recogniser, TextOnly
from advkit.audio.synthesis import speak
from advkit.audio.text import wer
from advkit.benchmarks.hidden_voice import PHRASES
from advkit.sound.wav import quantised

SPHINX, NOBODY = "pocketsphinx", "nobody"


def remembering(recogniser: Recogniser) -> TextOnly:
    """The recogniser, asked only once about the same sound."""
    known: dict[bytes, str] = {}

    def hear(x: Tensor) -> str:
        key = x.numpy().tobytes()
        if key not in known:
            known[key] = recogniser.transcribe(x.unsqueeze(0))[0]
        return known[key]

    return TextOnly(hear, recogniser.rate, recogniser.name)


def measured(phrase: str, seed: int, queries: int, ears: Mapping[str, Recogniser], listeners: Sequence[str]) -> dict[str, Any]:
    """The line of a phrase: the attack with each listener, the controls, and what everybody heard in each sound."""
    asked = {name: remembering(one) for name, one in ears.items()}

    def everybody(x: Tensor) -> dict[str, str]:
        return {name: one.transcribe(quantised(x).unsqueeze(0))[0] for name, one in asked.items()}

    line: dict[str, Any] = {"phrase": phrase, "seed": seed, "runs": {}}
    made: dict[str, Tensor] = {}
    for listener in (NOBODY, *listeners):
        began = time.process_time()
        result = Mangle(queries).make(
            phrase, asked[SPHINX], listener=asked.get(listener), rng=torch.Generator().manual_seed(seed)
        )
        spent = time.process_time() - began
        made[listener] = result.x
        seconds = len(result.x) / asked[SPHINX].rate
        line["runs"][listener] = {"queries": result.queries, "cpu_s": spent, "seconds": seconds, "heard": everybody(result.x)}
    x, spoken = made[NOBODY], speak(phrase, asked[SPHINX].rate)
    controls = {"spoken": spoken, "faster": sped_up(spoken, len(x)), "noise": noise(x, torch.Generator().manual_seed(seed))}
    return line | {"controls": {name: everybody(sound) for name, sound in controls.items()}}


def table(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """The rows: what was made or said, who judged it, and how often it was heard and hidden."""
    rows = [f"{'sound':<24}{'judge':<24}{'obeyed':>8}{'judge exact':>12}{'WER':>8}{'hidden':>8}{'heard when spoken':>18}"]
    runs = {f"listener {name}": lambda line, name=name: line["runs"][name]["heard"] for name in lines[0]["runs"]}
    controls = {name: lambda line, name=name: line["controls"][name] for name in lines[0]["controls"]}
    judges = [name for name in lines[0]["controls"]["spoken"] if name != SPHINX]
    for name, heard in (runs | controls).items():
        rows.extend(_row(lines, name, heard, judge) for judge in judges if name != f"listener {judge}")
    return rows


def _row(lines: Sequence[Mapping[str, Any]], name: str, heard: Callable[[Any], Mapping[str, str]], judge: str) -> str:
    n = len(lines)
    obeyed = [heard(line)[SPHINX] == line["phrase"] for line in lines]
    errors = [min(1.0, wer(line["phrase"], heard(line)[judge])) for line in lines]
    fair = [wer(line["phrase"], line["controls"]["spoken"][judge]) < 0.5 for line in lines]
    hidden = [yes and error >= 0.5 for yes, error in zip(obeyed, errors, strict=True)]
    both = sum(yes and spoken for yes, spoken in zip(hidden, fair, strict=True))
    figures = f"{sum(obeyed):>5}/{n}{errors.count(0):>9}/{n}{sum(errors) / n:>8.2f}{sum(hidden):>5}/{n}"
    return f"{name:<24}{judge:<24}{figures}{both:>15}/{n}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ears", nargs="+", required=True, help="folders or names of Whisper models, at least one")
    parser.add_argument("--listeners", nargs="*", help="the names of those ears that listen in turn; by default, each")
    parser.add_argument("--out", type=Path, required=True, help="the file of lines; phrases that it has are not made again")
    parser.add_argument("--queries", type=int, default=100, help="how many sounds PocketSphinx is asked about, a phrase")
    parser.add_argument("--phrases", type=int, nargs=2, default=(0, len(PHRASES)), help="the first, and the one after the last")
    given = parser.parse_args(arguments)
    listeners = [Path(name).name for name in (given.ears if given.listeners is None else given.listeners)]
    lines = [json.loads(row) for row in given.out.read_text().splitlines()] if given.out.exists() else []

    @cache
    def ears() -> dict[str, Recogniser]:
        return {SPHINX: sphinx.load("pocketsphinx")} | {Path(name).name: whisper.load(name) for name in given.ears}

    for k in range(*given.phrases):
        if PHRASES[k] not in {line["phrase"] for line in lines}:
            lines.append(measured(PHRASES[k], k, given.queries, ears(), listeners))
            with given.out.open("a") as file:
                file.write(json.dumps(lines[-1]) + "\n")
    print(*table(lines), sep="\n")


if __name__ == "__main__":
    main()
