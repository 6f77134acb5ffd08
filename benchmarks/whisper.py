"""How quietly Whisper can be made to hear another sentence, and how much of one it mishears.

    python -m advkit.benchmarks.whisper targeted --model whisper:FOLDER --data ../shared/data/speech/librispeech10
    python -m advkit.benchmarks.whisper untargeted --model whisper:FOLDER --data ../shared/data/speech/librispeech10

The data list what is said in each clip, and, for ``targeted``, what should be heard instead. One line a clip: what is heard in
the file of 16 bits that was written, how far it is from the clip, and the CPU seconds of one thread that the attack took.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from advkit.attacks.audio.cw import SpeechCW
from advkit.attacks.audio.phases import Filed, quietest
from advkit.attacks.pgd import PGD
from advkit.audio import clips as clips_in
from advkit.audio import loading, measures
from advkit.audio.clips import Clip
from advkit.audio.recogniser import Recogniser, goal
from advkit.audio.text import normalise, wer
from advkit.audio.whisper import Nearly, Whisper
from advkit.engine import perturb
from advkit.errors import UsageError
from advkit.sound import wav
from advkit.sound.threats import Snr


@dataclass(frozen=True)
class Line:
    """What came of one clip.

    Attributes:
        name: The clip.
        heard: What is heard in the file.
        wrong: The word error rate against what should be heard (targeted), or against what is said.
        snr: The signal-to-noise ratio, in dB.
        db_x: The loudest sample added against the loudest there is, in dB.
        seconds: CPU seconds.
    """

    name: str
    heard: str
    wrong: float
    snr: float
    db_x: float
    seconds: float


def targeted(recogniser: Recogniser, clip: Clip, steps: int, repair: int) -> Tensor:
    """The clip, (T,), as something that is heard as its target, as quietly as was found; the clip itself where nothing was.

    Raises:
        UsageError: The data list no target for it.
    """
    if clip.target is None:
        raise UsageError(f"the data list no target for {clip.name}; their read_data.txt should have a third line")
    aim, y = goal(recogniser, [clip.target], targeted=True), torch.zeros(1, dtype=torch.int64)
    return quietest(SpeechCW(steps, repair=repair), recogniser, clip.x[None], y, Snr(), goal=aim).x_adv[0]


def untargeted(recogniser: Recogniser, clip: Clip, steps: int, db: float) -> Tensor:
    """The clip, (T,), with a change of a given signal-to-noise ratio that raises the loss of what is said in it."""
    model: nn.Module = recogniser
    if isinstance(recogniser, Whisper):
        model = Nearly(recogniser, len(clip.x) / recogniser.rate)
    aim, y = goal(recogniser, [clip.text or recogniser.transcribe(clip.x[None])[0]]), torch.zeros(1, dtype=torch.int64)
    rng = torch.Generator().manual_seed(0)
    return perturb(PGD(steps=steps), Filed(model), clip.x[None], y, Snr(db), goal=aim, rng=rng)[0]


def lines(recogniser: Recogniser, clips: list[Clip], arguments: argparse.Namespace) -> Iterator[Line]:
    """A line for each clip."""
    for clip in clips:
        began = time.process_time()
        if arguments.command == "targeted":
            x_adv, wanted = targeted(recogniser, clip, arguments.steps, arguments.repair), str(clip.target)
        else:
            x_adv, wanted = untargeted(recogniser, clip, arguments.steps, arguments.db), str(clip.text)
        seconds = time.process_time() - began
        with tempfile.TemporaryDirectory() as folder:
            wav.write(Path(folder) / "adversarial.wav", x_adv, recogniser.rate)
            x_adv, _ = wav.read(Path(folder) / "adversarial.wav", recogniser.rate)
        heard = recogniser.transcribe(x_adv[None])[0]
        distances = measures.snr(clip.x, x_adv), measures.db_x(clip.x, x_adv)
        yield Line(clip.name, heard, wer(normalise(wanted), heard), *distances, seconds)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name, steps in (("targeted", 200), ("untargeted", 200)):
        command = commands.add_parser(name)
        command.add_argument("--model", required=True)
        command.add_argument("--data", required=True)
        command.add_argument("--clips", type=int, nargs=2, default=(0, 10), metavar=("FROM", "TO"), help="which clips")
        command.add_argument("--steps", type=int, default=steps)
        if name == "targeted":
            command.add_argument("--repair", type=int, default=10)
        else:
            command.add_argument("--db", type=float, default=35.0, help="the signal-to-noise ratio")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    recogniser = loading.load(arguments.model)
    clips, _ = clips_in.load(arguments.data, recogniser.rate, recogniser.seconds)
    done = []
    for line in lines(recogniser, clips[slice(*arguments.clips)], arguments):
        done.append(line)
        what = f"WER {line.wrong:.2f}, SNR {line.snr:.1f} dB, dB_x {line.db_x:.1f}, {line.seconds:.0f} CPU s"
        print(f"{line.name}: {what}: {line.heard}", flush=True)
    mean = {name: sum(getattr(line, name) for line in done) / len(done) for name in ("wrong", "snr", "db_x", "seconds")}
    exact = sum(line.wrong == 0 for line in done)
    print(f"{exact} of {len(done)} exact, " + ", ".join(f"mean {name} {value:.2f}" for name, value in mean.items()))


if __name__ == "__main__":
    main()
