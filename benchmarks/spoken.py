"""Spoken digits: speakers who were never heard, and sentences that are made to say other digits.

    python -m advkit.benchmarks.spoken strangers --data ../shared/data/fsdd --held speaker=theo --held speaker=lucas
    python -m advkit.benchmarks.spoken sentences --data ../shared/data/fsdd --model ctc.safetensors --clips 50 --steps 1000

The first trains the keyword classifier without each of these speakers in turn and tries it on that one. The second takes
sentences of three digits that the network hears right, asks for three others, and measures what the attack of Carlini and
Wagner adds; ``--peer`` gives the same to the package asr-attacks. Successes are those of the waveform in 16 bits.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from advkit import data as data_by_name
from advkit.attacks.audio.cw import SpeechCW
from advkit.attacks.audio.phases import quietest
from advkit.audio import loading
from advkit.audio.ctc import CTC
from advkit.audio.recogniser import Recogniser, goal
from advkit.benchmarks.statistics import rate
from advkit.data.sounds import strings
from advkit.errors import UsageError
from advkit.models import networks
from advkit.sound.threats import lengths
from advkit.sound.wav import quantised
from advkit.spec import parse
from advkit.threat import SOUNDS
from advkit.train import RECIPES, accuracy, train

WORDS = 3
"""How many words a sentence has."""
BATCH = 25
"""How many sentences are attacked at a time."""


def stranger(data: str, held: str, network: str, seed: int) -> tuple[int, int, float]:
    """Train without ``held``, as in ``speaker=theo``: how many of these words are heard right, of how many, the CPU seconds."""
    known, unknown = (data_by_name.load(f"{data}@{held}", split=split) for split in ("train", "test"))
    model, began = networks.build(network, seed), time.process_time()
    train(model, known, RECIPES[network], seed=seed)
    return *accuracy(model, unknown), time.process_time() - began


@dataclass(frozen=True)
class Task:
    """A sentence and what it should say instead.

    Attributes:
        x: The waveform, (T,), without trailing zeros.
        said: What is said, and heard.
        wanted: The target: another digit in each place.
    """

    x: Tensor
    said: str
    wanted: str


def tasks(recogniser: Recogniser, data: str, clips: int, seed: int) -> list[Task]:
    """Sentences of three words that the recogniser hears right, each with a target that differs in every word.

    Raises:
        UsageError: There are fewer.
    """
    words = data_by_name.load(data, split="test")
    sentences = strings(words, WORDS, seed)
    rng = torch.Generator().manual_seed(seed)
    found: list[Task] = []
    for k in range(len(sentences)):
        x, y = sentences.batch(k, k + 1)
        said = sentences.classes[int(y)]
        if len(said.split()) < WORDS or recogniser.transcribe(x) != [said]:
            continue
        shifts = torch.randint(1, len(words.classes), (WORDS,), generator=rng).tolist()
        numbers = [words.classes.index(word) for word in said.split()]
        wanted = [words.classes[(n + shift) % len(words.classes)] for n, shift in zip(numbers, shifts, strict=True)]
        found.append(Task(x[0, : int(lengths(x))], said, " ".join(wanted)))
        if len(found) == clips:
            return found
    raise UsageError(f"the network hears {len(found)} sentences of {data} right, and {clips} were asked for; give fewer clips")


Attack = Callable[[list[Task]], list[Tensor]]
"""Sentences to waveforms (T,)."""


def ours(recogniser: Recogniser, attack: SpeechCW, threat: str) -> Attack:
    """The attack of Carlini and Wagner, in a search for the quietest success; ``threat`` says of what size."""
    built = parse(threat, SOUNDS, "threat")

    def make(some: list[Task]) -> list[Tensor]:
        x = torch.nn.utils.rnn.pad_sequence([task.x for task in some], batch_first=True)
        wanted = goal(recogniser, [task.wanted for task in some], targeted=True)
        found = quietest(attack, recogniser, x, torch.arange(len(some)), built, goal=wanted)
        return [row[: len(task.x)] for row, task in zip(found.x_adv, some, strict=True)]

    return make


def peer(recogniser: CTC, steps: int) -> Attack:
    """The attack of the package asr-attacks, one sentence after the other, with its own settings."""
    try:
        from asr_attacks.attacks.cw import cw
        from asr_attacks.backends.module import CTCModuleBackend
    except ImportError:
        raise UsageError("the comparison needs asr-attacks; pip install asr-attacks==0.3.0") from None
    backend = CTCModuleBackend(recogniser, recogniser.signs, blank_id=recogniser.blank)

    def make(some: list[Task]) -> list[Tensor]:
        settings: dict[str, Any] = {"targeted": True, "num_iter": steps, "verbose": False, "return_tensor": True}
        return [torch.as_tensor(cw(backend, task.x[None], target=task.wanted, **settings)).view(-1) for task in some]

    return make


def measured(recogniser: Recogniser, attack: Attack, some: list[Task]) -> tuple[int, float, float, float]:
    """How many sentences say their target, the means over these of dB_x(delta) and of the SNR in dB, and the CPU seconds."""
    began = time.process_time()
    made = [one for start in range(0, len(some), BATCH) for one in attack(some[start : start + BATCH])]
    seconds = time.process_time() - began
    levels, ratios = [], []
    for task, x_adv in zip(some, map(quantised, made), strict=True):
        delta = x_adv - task.x
        if recogniser.transcribe(x_adv[None]) == [task.wanted]:
            levels.append(20 * float(torch.log10(delta.abs().max() / task.x.abs().max())))
            ratios.append(20 * float(torch.log10(task.x.norm() / delta.norm())))
    n = max(1, len(levels))
    return len(levels), sum(levels) / n, sum(ratios) / n, seconds


def _strangers(arguments: argparse.Namespace) -> None:
    right = of = 0
    for held in arguments.held:
        hits, words, seconds = stranger(arguments.data, held, arguments.model, arguments.seed)
        print(f"{held:20} {rate(hits, words)} in {seconds:.0f} CPU s", flush=True)
        right, of = right + hits, of + words
    print(f"{'all':20} {rate(right, of)}")


def _sentences(arguments: argparse.Namespace) -> None:
    recogniser = loading.load(arguments.model)
    if not isinstance(recogniser, CTC):
        raise UsageError(f"{arguments.model} is no network for CTC; train one with advkit train --model speech-ctc")
    some = tasks(recogniser, arguments.data, arguments.clips, arguments.seed)
    cw = SpeechCW(arguments.steps, c=arguments.c)
    attacks = {f"cw, {arguments.threat}": ours(recogniser, cw, arguments.threat)}
    if arguments.peer:
        attacks["asr-attacks"] = peer(recogniser, arguments.steps)
    for name, attack in attacks.items():
        hits, level, ratio, seconds = measured(recogniser, attack, some)
        each = f"{seconds / len(some):.1f} CPU s each"
        print(f"{name}: {hits} of {len(some)} say the target, dB_x {level:.1f}, SNR {ratio:.1f} dB, {each}", flush=True)


def main() -> None:
    """Print a line a speaker, or a line an attack."""
    parser = argparse.ArgumentParser(description="Spoken digits: strangers, and sentences that say other digits.")
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("strangers")
    one.add_argument("--data", required=True)
    one.add_argument("--held", action="append", required=True, help="who is never heard: speaker=theo; repeatable")
    one.add_argument("--model", default="keyword-cnn")
    one.set_defaults(run=_strangers)
    two = commands.add_parser("sentences")
    two.add_argument("--data", required=True)
    two.add_argument("--model", required=True)
    two.add_argument("--steps", type=int, default=1000)
    two.add_argument("--c", type=float, default=SpeechCW.c, help="the weight of the loss beside the squares of what is added")
    two.add_argument("--threat", default="snr", help="what should be little: snr, or linf_db")
    two.add_argument("--clips", type=int, default=50)
    two.add_argument("--peer", action="store_true", help="try asr-attacks too, with as many steps")
    two.set_defaults(run=_sentences)
    for command in (one, two):
        command.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.run(arguments)


if __name__ == "__main__":
    main()
