"""Over the air: how many targeted examples still say their target in rooms that the attack has never seen.

    advkit train --model speech-ctc --data strings:DATA --out ctc.safetensors
    python -m advkit.benchmarks.over_the_air --model ctc.safetensors --data strings:DATA --threat "linf_db(-20)"

Each clip should be heard as a text with as many words, all of them others. The lines are:

* the clean clips, and how many are heard as what was said: no attack can count on more;
* the attack as it is, which ends with its first success;
* the same attack with all of its steps, which goes on past it;
* the same on the mean over ``--draws`` views of the sound in simulated rooms, with as many steps.

What is heard in a channel is heard in the 16-bit file of what arrives.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from advkit import data as data_by_name
from advkit.attacks import PGD
from advkit.audio import loading
from advkit.audio.channels import channel
from advkit.audio.measures import snr
from advkit.audio.recogniser import Recogniser, goal
from advkit.benchmarks.plan import parse_threat
from advkit.combine import Expect
from advkit.data import Data
from advkit.engine import Attack, perturb, run
from advkit.errors import UsageError
from advkit.sound.threats import Level, Snr
from advkit.sound.wav import quantised


@dataclass(frozen=True)
class Task:
    """Clips that should be heard as something else.

    Attributes:
        recogniser: By whom.
        x: The clips, (N, T).
        texts: What is said in each.
        targets: What each should be heard as.
        threat: How far it may be changed.
    """

    recogniser: Recogniser
    x: Tensor
    texts: list[str]
    targets: list[str]
    threat: Snr | Level

    def attacked(self, attack: Attack, seed: int, whole: bool) -> Tensor:
        """What the attack makes, in 16 bits, (N, T): its first successes, or its last iterates."""
        wanted = goal(self.recogniser, self.targets, targeted=True)
        rng, y = torch.Generator().manual_seed(seed), torch.arange(len(self.x))
        if whole:
            return quantised(perturb(attack, self.recogniser, self.x, y, self.threat, rng=rng, goal=wanted))
        return quantised(run(attack, self.recogniser, self.x, y, self.threat, rng=rng, goal=wanted).x_adv)

    def heard(self, x: Tensor, texts: list[str], over: str, plays: int, seed: int) -> float:
        """The share of clips heard as a text of their own after a channel, the mean over so many plays."""
        rng, right = torch.Generator().manual_seed(seed), 0
        for _ in range(plays):
            z = quantised(channel(over)(x, self.recogniser.rate, rng)) if over else x
            right += sum(said == wanted for said, wanted in zip(self.recogniser.transcribe(z), texts, strict=True))
        return right / (plays * len(x))


def target(text: str, known: Sequence[str]) -> str:
    """The first of the known texts that has as many words and another one in each place.

    Raises:
        UsageError: There is none.
    """
    words = text.split()
    for one in known:
        others = one.split()
        if len(others) == len(words) and all(a != b for a, b in zip(words, others, strict=True)):
            return one
    raise UsageError(f"no other text has as many words as {text!r} and another one in each place; give more clips")


def task(recogniser: Recogniser, data: Data, threat: Snr | Level, n: int) -> Task:
    """The first n clips.

    Raises:
        UsageError: The data have no texts.
    """
    if data.classes is None:
        raise UsageError(f"the data {data.name} have no texts; give sounds with texts, as in strings:FOLDER")
    x, y = data.batch(0, min(n, len(data)))
    texts = [data.classes[k] for k in y.tolist()]
    # Another place to look from for each, so that not all have the same target.
    wanted = [target(text, data.classes[k:] + data.classes[:k]) for k, text in enumerate(texts)]
    return Task(recogniser, x, texts, wanted, threat)


def line(name: str, job: Task, attack: Attack | None, whole: bool, settings: argparse.Namespace) -> str:
    """A row of the table; without an attack, of the clean clips."""
    begin = time.process_time()
    x = quantised(job.x) if attack is None else job.attacked(attack, settings.seed, whole)
    seconds = (time.process_time() - begin) / len(x)
    ratio = sum(snr(one, other) for one, other in zip(job.x, x, strict=True)) / len(x)
    texts = job.texts if attack is None else job.targets
    shares = [job.heard(x, texts, over, settings.plays if over else 1, settings.seed) for over in ["", *settings.over]]
    ends = "| | |" if attack is None else f"| {ratio:.1f} | {seconds:.1f} |"
    return f"| {name} | {' | '.join(f'{100 * share:.0f}' for share in shares)} {ends}"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="sounds with texts, as in strings:FOLDER")
    parser.add_argument("--model", required=True, help="a recogniser, such as a checkpoint of speech-ctc")
    parser.add_argument("--threat", default="linf_db(-20)", help="default linf_db(-20)")
    parser.add_argument("--view", default="room(8)", help="what the robust attack looks through")
    parser.add_argument("--over", action="append", help="a channel to hear through; repeatable (default: room(24, seed=1))")
    parser.add_argument("--examples", type=int, default=24, help="how many clips (default 24)")
    parser.add_argument("--steps", type=int, default=200, help="of either attack (default 200)")
    parser.add_argument("--draws", type=int, default=4, help="views of each step (default 4)")
    parser.add_argument("--plays", type=int, default=8, help="how often each clip is played in a channel (default 8)")
    parser.add_argument("--seed", type=int, default=0, help="default 0")
    settings = parser.parse_args()
    settings.over = settings.over or ["room(24, seed=1)"]
    torch.set_num_threads(1)
    data = data_by_name.load(settings.data, split="test")
    threat = parse_threat(settings.threat, data)
    if not isinstance(threat, Snr | Level):
        raise UsageError(f"the threat model is {settings.threat}; it should be in decibels, as in linf_db(-20) or snr(10)")
    recogniser = loading.load(settings.model)
    for over in settings.over:
        channel(over).check(recogniser.rate)
    job = task(recogniser, data, threat, settings.examples)
    print("| sound | dry |", " | ".join(settings.over), "| SNR dB | CPU s a clip |")
    print("| --- " * (len(settings.over) + 4) + "|")
    attack = PGD(settings.steps, momentum=0.9)
    robust = Expect(attack, settings.draws, settings.view)
    print(line("clean, as said", job, None, False, settings), flush=True)
    print(line("first success", job, attack, False, settings), flush=True)
    print(line("all steps", job, attack, True, settings), flush=True)
    print(line(f"all steps, {settings.view}", job, robust, True, settings), flush=True)


if __name__ == "__main__":
    main()
