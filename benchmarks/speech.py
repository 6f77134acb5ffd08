"""How far a recogniser of speech can be fooled: commands that it obeys, recordings that it hears as something else.

A sound counts by its file: what an attack made is written as a WAV file of 16 bits, read again, and given to the recogniser.
The rows come first, one for each clip or command. Every number is computed from them.

A second recogniser, the listener, which the attack has never asked, says whether more than the attacked one understands the
sound. It is a proxy for people and no measurement of them, so three controls are heard beside each sound: the clean one, the
same sped up to the same length, and noise of the same length and level.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import platform
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, is_dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from advkit import spec
from advkit.attacks import ATTACKS
from advkit.attacks.audio import SPEECH_ATTACKS
from advkit.attacks.audio.phases import Filed, quietest
from advkit.audio import clips as clips_in
from advkit.audio import measures
from advkit.audio.channels import Channel, channel
from advkit.audio.clips import Clip
from advkit.audio.command import CommandAttack
from advkit.audio.recogniser import Recogniser, TextOnly, goal
from advkit.audio.text import MATCHES, Exact, Match, Wer, cer, check_said, wer
from advkit.benchmarks.folder import Row, append, claimed, damaged, resumable
from advkit.benchmarks.folder import replace as write
from advkit.benchmarks.speech_result import COLUMNS, KIND, Speech, checked
from advkit.data.dataset import check_seed
from advkit.defenses.audio import Defended
from advkit.defenses.audio import defend as behind
from advkit.engine import Attack, check_serves, frozen, perturb
from advkit.errors import AccessError, UsageError
from advkit.models.digest import digest_of
from advkit.oracle import Access
from advkit.sound import wav
from advkit.streams import Streams
from advkit.threat import THREATS, Change, Lp
from advkit.version import __version__

KNOWN: spec.Table = {**ATTACKS, **SPEECH_ATTACKS}
"""The attacks that a spec may name for a recogniser; where two have the name, the one made for speech."""

DRAWS = 8
"""How often a sound is sent over a channel that draws at random."""

OWN_TARGETS = "@"
"""Stands for the targets that the data themselves list."""

Report = Callable[[float, str], None]


def evaluate_speech(
    recogniser: str | Recogniser,
    data: str | Path | Sequence[Clip] | None = None,
    *,
    attack: str | Attack | CommandAttack,
    say: str | Sequence[str] = (),
    target: str | Sequence[str] | None = None,
    threat: str | Change | Lp | None = None,
    match: str | Match | None = None,
    listener: str | Recogniser | None = None,
    stand_in: str | Recogniser | None = None,
    over: Sequence[str] = (),
    voice: str | None = None,
    defend: Sequence[str] = (),
    access: str | None = None,
    budget: int | None = None,
    limit: int | None = None,
    batch_size: int = 1,
    device: str = "cpu",
    seed: int = 0,
    out: str | Path | None = None,
    report: Report | None = None,
) -> Speech:
    """Attack a recogniser and say what it, and a listener, hear.

    Either commands: ``say`` has the texts and the attack is one that makes sounds, as hidden-voice. Or recordings: ``data`` has
    them, ``threat`` says how far they may be changed, and ``target`` what should be heard; without one, anything but what is
    said.

    Arguments:
        recogniser: A recogniser, or its spec.
        data: A sound file, a folder of them, or clips. For commands, how somebody says them, in their order.
        attack: An attack or its spec.
        say: The commands.
        target: What should be heard, one for all clips or one for each; ``@`` for those that the data list.
        threat: How far a recording may be changed: ``snr(30)``.
        match: When what is heard counts as what is wanted: ``exact`` (default), ``contains``, ``wer(0.5)``. Without a target,
            a success is what does not match what was said; the default is then ``wer(0.5)``.
        listener: A second recogniser that the attack never asks.
        stand_in: A recogniser that an attack on commands may ask in place of a person.
        over: Channels, as in ``room`` and ``noise(20)+mp3``; the share of draws after which a sound still works.
        voice: Who says the commands where there are no recordings; by default, the first synthesiser that is installed.
        defend: Defenses that the recogniser stands behind, a sound going through the first of them first; the attack is the one
            that knows of them.
        access: The most that the attack may ask for: ``gradients``, ``scores`` or ``labels``.
        budget: The most forward passes for a recording.
        limit: At most so many clips or commands.
        batch_size: Recordings that are attacked together. With several, those that are shorter than the longest are filled up:
            with ``snr`` a random start spends a part of its norm there.
        device: Where the recognisers run.
        seed: What every random draw comes from.
        out: A folder for the sounds, the rows and the summary. The same call goes on where it was stopped.
        report: Called with the share that is done and what is running.

    Raises:
        UsageError: Something given is not of this form; the message says what was given and what is allowed.
    """
    check_seed(seed)
    spec.check_whole("batch size", batch_size, 1)
    for name, count in (("limit", limit), ("budget", budget)):
        if count is not None:
            spec.check_whole(name, count, 1)
    given = {"target": target, "threat": threat, "budget": budget, "stand_in": stand_in, "voice": voice}
    _check_options(_attack(attack, {}), say, data, {name for name, value in given.items() if value is not None})
    _check_apart(recogniser, listener, stand_in, lambda one, other: one is other or (isinstance(one, str) and one == other))
    subject = _recogniser(recogniser, device)
    assert subject is not None
    subject = behind(subject, *defend, seed=seed) if defend else subject
    chosen = _attack(attack, {"rate": subject.rate})
    if defend and not callable(chosen):
        raise UsageError(f"{_name(chosen)} cannot know of a defense; use an attack that changes recordings, as in pgd or cw")
    judge, ally = (_recogniser(one, device) for one in (listener, stand_in))
    _check_apart(subject, judge, ally, _alike)
    tasks, notes = _tasks(subject, judge, data, say, target, limit)
    learned, tasks, notes = _parted(chosen, tasks, (*getattr(subject, "notes", ()), *notes))
    seen = _access(access, subject, chosen)
    if _needs(chosen) > seen:
        needs, sees = _needs(chosen).name.lower(), seen.name.lower()
        raise AccessError(f"{_name(chosen)} needs {needs}; of {subject.name} the adversary sees {sees}")
    decided = _match(match, targeted=tasks[0].target is not None)
    ball = _threat(threat, chosen, subject.rate)
    channels = {one: channel(one) for one in over}
    for one in channels.values():
        one.check(subject.rate)
    settings = {
        "access": seen.name.lower(),
        "budget": budget,
        "batch_size": batch_size,
        "seed": seed,
        "voice": voice,
        "defend": list(defend),
    }
    work = _Work(subject, judge, ally, chosen, ball, decided, channels, tuple(tasks), tuple(learned), settings)
    return work.execute(notes, None if out is None else Path(out), report or (lambda share, text: None))


def _check_options(attack: Any, say: Any, data: Any, given: set[str]) -> None:
    """Refuse what does not go together: an attack makes a sound out of a text, or changes a recording."""
    name = _name(attack)
    if hasattr(attack, "make"):
        if not say:
            raise UsageError(f"{name} makes a sound out of a text, and none was given; give one with say, as in open the door")
        _check_none(f"{name} makes a sound out of a text, which has no", given, "target", "threat", "budget")
        if data is not None:
            _check_none("the data are how somebody says the commands, which leaves no", given, "voice")
        return
    if say:
        raise UsageError(f"{name} changes a recording and says nothing itself; give the text as target, or use hidden-voice")
    if data is None:
        raise UsageError(f"{name} changes recordings, and none was given; give data, as in clip.wav")
    _check_none(f"{name} changes recordings, which has no", given, "stand_in", "voice")
    if hasattr(attack, "fit"):
        _check_none(f"{name} learns to make any clip misheard, which has no", given, "target", "budget")
    if "threat" not in given:
        raise UsageError(f"{name} needs a threat model, which says how far a recording may be changed, as in snr(30)")


def _check_none(why: str, given: set[str], *names: str) -> None:
    if wrong := next((name for name in names if name in given), None):
        raise UsageError(f"{why} {wrong}; leave {wrong} out")


def _check_apart(recogniser: Any, listener: Any, stand_in: Any, same: Callable[[Any, Any], bool]) -> None:
    """Refuse to judge by somebody whom the attack has asked."""
    for name, other in (("recogniser that is attacked", recogniser), ("stand-in that the attack asks", stand_in)):
        if listener is not None and other is not None and same(listener, other):
            raise UsageError(f"the listener is the {name}; it should be another, which the attack has never asked")


def _alike(one: Recogniser, other: Recogniser) -> bool:
    """Whether two recognisers are one, whatever they are called: the same weights from another folder, or other settings."""
    return one is other or digest_of(_told(one)) == digest_of(_told(other))


def _recogniser(one: str | Recogniser | None, device: str) -> Recogniser | None:
    if one is None or isinstance(one, Recogniser):
        return one
    from advkit.audio.loading import load

    return load(one, device=device)


def _access(access: str | None, subject: Recogniser, attack: Any) -> Access:
    """What the adversary sees, by default all; an attack that makes sounds may know what a recogniser is made of."""
    most = Access.GRADIENTS if hasattr(attack, "make") else subject.access
    if access is None:
        return most
    levels = {level.name.lower(): level for level in Access}
    spec.check_choice("access", access, levels)
    if levels[access] > most:
        raise AccessError(f"{subject.name} answers with {most.name.lower()} only; the access asked for is {access}")
    return levels[access]


def _match(match: str | Match | None, targeted: bool) -> Match:
    if match is None:
        return Exact() if targeted else Wer(0.5)
    return spec.parse(match, MATCHES, "match") if isinstance(match, str) else match


def _attack(attack: Any, defaults: dict[str, Any]) -> Any:
    return spec.parse(attack, KNOWN, "attack", defaults) if isinstance(attack, str) else attack


def _threat(threat: str | Change | Lp | None, attack: Any, rate: int) -> Change | Lp | None:
    """The threat model, over waveforms in [-1, 1]."""
    if threat is None:
        return None
    about = {"low": -1.0, "high": 1.0, "rate": rate}
    ball = spec.parse(threat, THREATS, "threat", defaults=about) if isinstance(threat, str) else threat
    if callable(attack):
        check_serves(attack, ball)
    return ball


def _needs(attack: Any) -> Access:
    """The least that an attack has to see; one that learns follows gradients."""
    return getattr(attack, "access", Access.GRADIENTS)


@dataclass(frozen=True)
class Task:
    """One thing to do.

    Attributes:
        index: Its number.
        name: The command, or what the recording is called.
        text: What is said: the command, or what is written down of the recording; None for what the recogniser hears.
        target: What should be heard, normalised; None for anything else.
        x: The recording, or how somebody says the command, (T,) as a file of 16 bits holds it; None where nobody has said it.
    """

    index: int
    name: str
    text: str | None
    target: str | None
    x: Tensor | None


def _tasks(
    subject: Recogniser,
    judge: Recogniser | None,
    data: Any,
    say: str | Sequence[str],
    target: str | Sequence[str] | None,
    limit: int | None,
) -> tuple[list[Task], tuple[str, ...]]:
    """What there is to do, and what to announce."""
    commands = clips_in.phrases([say] if isinstance(say, str) else say, "--say")[:limit]
    longest = min(one.seconds for one in (subject, judge) if one is not None)
    clips, notes = _clips(data, subject.rate, longest, limit)
    if commands:
        return _commands(subject, commands, clips), notes
    targets = _targets(subject, target, clips)
    unknown = sum(clip.text is None for clip in clips)
    if unknown:
        said = f"of {unknown} of {len(clips)} clips nobody wrote down what is said; it is taken for what {subject.name} hears"
        notes = (*notes, said)
    rows = zip(clips, targets, strict=True)
    return [Task(i, clip.name, clip.text, wanted, wav.quantised(clip.x)) for i, (clip, wanted) in enumerate(rows)], notes


def _parted(attack: Any, tasks: list[Task], notes: tuple[str, ...]) -> tuple[list[Task], list[Task], tuple[str, ...]]:
    """The clips that an attack learns from, if it does; those that it is tried on; what to announce."""
    if not hasattr(attack, "fit"):
        return [], tasks, notes
    if len(tasks) < 2:
        raise UsageError(f"{_name(attack)} learns from one half of the clips and is tried on the other; give two clips or more")
    said = f"learned from {len(tasks[0::2])} clips, every other one, and tried on those between them"
    return tasks[0::2], tasks[1::2], (*notes, said)


def _clips(data: Any, rate: int, longest: float, limit: int | None) -> tuple[list[Clip], tuple[str, ...]]:
    if data is None:
        return [], ()
    if isinstance(data, str | Path):
        return clips_in.load(data, rate, longest, limit)
    clips = list(data)[:limit]
    if not clips or not all(isinstance(clip, Clip) and _is_sound(clip.x) for clip in clips):
        raise UsageError(
            "the data should be a file, a folder, or a list of clips, each a waveform (T,) in [-1, 1] that is not silent"
        )
    if long := next((clip.name for clip in clips if len(clip.x) > longest * rate), None):
        raise UsageError(f"the clip {long} is too long; it should last at most {longest:g} s")
    return clips, ()


def _is_sound(x: Tensor) -> bool:
    """Whether it is a waveform (T,) in [-1, 1], of which a file of 16 bits holds something."""
    fine = x.ndim == 1 and x.is_floating_point() and bool((x.abs() <= 1).all())
    return fine and bool((wav.quantised(x) != 0).any())


def _commands(subject: Recogniser, commands: list[str], clips: list[Clip]) -> list[Task]:
    if clips and len(clips) != len(commands):
        raise UsageError(f"there are {len(commands)} commands and {len(clips)} recordings; there should be one for each")
    for text in commands:
        subject.check_text(text)
    said: list[Tensor | None] = [wav.quantised(clip.x) for clip in clips]
    pairs = zip(commands, said or [None] * len(commands), strict=True)
    return [Task(i, text, text, text, x) for i, (text, x) in enumerate(pairs)]


def _targets(subject: Recogniser, target: str | Sequence[str] | None, clips: list[Clip]) -> list[str | None]:
    """What each clip should be heard as."""
    if target is None:
        return [None] * len(clips)
    if target == OWN_TARGETS:
        found = [clip.target for clip in clips]
        if missing := [clip.name for clip in clips if clip.target is None]:
            raise UsageError(f"the data list no target for {missing[0]}; give one, as in --target 'open the front door'")
    else:
        given = clips_in.phrases([target] if isinstance(target, str) else target, "--target")
        if len(given) not in (1, len(clips)):
            raise UsageError(f"there are {len(given)} targets for {len(clips)} clips; there should be one, or one for each")
        found = [*given] * (len(clips) if len(given) == 1 else 1)
    for text in found:
        subject.check_text(check_said(str(text)))
    return list(found)


def _name(attack: Any) -> str:
    """The spec of an attack, or its repr where it is not in the table."""
    able = any(hasattr(attack, name) for name in ("__call__", "make", "fit"))
    if isinstance(attack, type) or not is_dataclass(attack) or not able:
        raise UsageError(f"the attack is {attack!r}; it should be an attack or a spec, as in hidden-voice(frames=4)")
    try:
        return spec.show(attack, KNOWN)
    except UsageError:
        return repr(attack)


@dataclass(frozen=True)
class _Done:
    """What an attack came to on one task: the sound, (T,), and what it took."""

    x: Tensor
    queries: int
    passes: int
    seconds: float


@dataclass(frozen=True)
class _Work:
    """One evaluation, fully said."""

    subject: Recogniser
    judge: Recogniser | None
    ally: Recogniser | None
    attack: Any
    threat: Change | Lp | None
    match: Match
    channels: dict[str, Channel]
    tasks: tuple[Task, ...]
    learned: tuple[Task, ...]
    settings: dict[str, Any]

    @property
    def makes(self) -> bool:
        """Whether the attack makes sounds rather than changing them."""
        return hasattr(self.attack, "make")

    @property
    def targeted(self) -> bool:
        """Whether there is something that should be heard."""
        return self.tasks[0].target is not None

    def run(self) -> dict[str, Any]:
        """What makes two runs the same."""
        sha = hashlib.sha256()
        for task in (*self.tasks, *self.learned):
            sha.update(json.dumps([task.name, task.text, task.target]).encode())
            sha.update(b"" if task.x is None else task.x.double().numpy().tobytes())
        threat = spec.show(self.threat, THREATS) if type(self.threat) in _TYPES else repr(self.threat)
        return {
            "kind": KIND,
            "advkit": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "model": _about(self.subject),
            "listener": _about(self.judge),
            "stand_in": _about(self.ally),
            "attack": _name(self.attack),
            "threat": None if self.threat is None else threat,
            "match": spec.show(self.match, MATCHES) if type(self.match) in MATCHES.values() else repr(self.match),
            "goal": "command" if self.makes else "target" if self.targeted else "untargeted",
            "over": list(self.channels),
            "rate": self.subject.rate,
            "sounds": {"count": len(self.tasks), "digest": sha.hexdigest()},
            **self.settings,
        }

    def execute(self, notes: tuple[str, ...], out: Path | None, report: Report) -> Speech:
        """Do what is not done yet, batch by batch."""
        run = {**self.run(), "notes": list(notes)}
        names, size = [task.name for task in self.tasks], 1 if self.makes else self.settings["batch_size"]
        keep = lambda rows, path: _kept(rows, path, names, size)
        with contextlib.ExitStack() as stack:
            stack.enter_context(resumable())
            rows = stack.enter_context(claimed(out, run, set(COLUMNS), keep))
            for one in (self.subject, self.judge, self.ally):
                stack.enter_context(frozen(one))
            folder = out or Path(stack.enter_context(tempfile.TemporaryDirectory()))
            (folder / "clips").mkdir(exist_ok=True)
            for batch in self._batches(len(rows), size):
                said = _Said(report, len(rows) / len(self.tasks), _progress(rows, batch[0].name))
                with said.passes(self.subject):
                    new = self._rows(batch, folder)
                if out is not None:
                    append(out / "rows.jsonl", new)
                rows.extend(new)
            result = Speech(run, rows, notes, out)
            if out is not None:
                write(out / "summary.json", json.dumps(result.summary(), indent=2, allow_nan=False) + "\n")
        return result

    def _batches(self, done: int, size: int) -> Iterator[list[Task]]:
        for start in range(done, len(self.tasks), size):
            yield [self._complete(task) for task in self.tasks[start : start + size]]

    def _complete(self, task: Task) -> Task:
        """The task with a voice, where there is one, and with a text."""
        if task.x is None:
            return replace(task, x=self._voice(str(task.text)))
        return task if task.text is not None else replace(task, text=_hear(self.subject, task.x))

    def _voice(self, text: str) -> Tensor | None:
        """The command as a synthesiser says it; None where none is installed and the attack needs none."""
        from advkit.audio.synthesis import speak

        try:
            return wav.quantised(speak(text, self.subject.rate, voice=self.settings["voice"]))
        except UsageError:
            if self.attack.needs_voice or self.settings["voice"] is not None:
                raise
            return None

    def _rows(self, batch: list[Task], folder: Path) -> list[Row]:
        if self.learned:
            done = [self._added(task) for task in batch]
        else:
            done = [self._made(batch[0])] if self.makes else self._perturbed(batch)
        return [self._row(task, made, folder) for task, made in zip(batch, done, strict=True)]

    def _made(self, task: Task) -> _Done:
        began = time.process_time()
        rng = torch.Generator().manual_seed(_seed(self.settings["seed"], task.index, "attack"))
        made = self.attack.make(task.text, self.subject, voice=task.x, listener=self.ally, rng=rng)
        return _Done(made.x, made.queries, made.passes, time.process_time() - began)

    @cached_property
    def _delta(self) -> Tensor:
        """What an attack that learns adds to every clip, in the threat model's units, (L,)."""
        tasks = [self._complete(task) for task in self.learned]
        x = pad_sequence([task.x for task in tasks if task.x is not None], batch_first=True).to(_device(self.subject))
        rng = torch.Generator().manual_seed(_seed(self.settings["seed"], 0, "learn"))
        return self.attack.fit(self.subject, x, [task.text for task in tasks], self.threat, rng=rng)

    def _added(self, task: Task) -> _Done:
        assert task.x is not None
        delta, began = self._delta, time.process_time()
        x_adv = self.attack.apply(task.x.unsqueeze(0).to(delta), delta, self.threat)[0]
        return _Done(x_adv.cpu(), 0, 0, time.process_time() - began)

    @property
    def _to_the_end(self) -> bool:
        """Whether a recording is changed at full length, for an error rate as high as can be, and not until a success."""
        assert self.threat is not None
        free = not self.targeted and self.settings["budget"] is None
        return free and self.threat.eps < math.inf and self.attack.access is Access.GRADIENTS

    def _perturbed(self, batch: list[Task]) -> list[_Done]:
        """Recordings, attacked together."""
        began, where = time.process_time(), _device(self.subject)
        x = pad_sequence([task.x for task in batch if task.x is not None], batch_first=True).to(where)
        y, texts = torch.arange(len(batch), device=where), [task.target or str(task.text) for task in batch]
        aim = goal(self.subject, texts, targeted=self.targeted, match=self.match)
        rng = Streams.seeded(self.settings["seed"], [task.index for task in batch], _name(self.attack), where)
        attack = self.subject.adaptive(self.attack) if isinstance(self.subject, Defended) else self.attack
        assert self.threat is not None
        if self._to_the_end:
            x_adv = perturb(attack, Filed(self.subject), x, y, self.threat, goal=aim, rng=rng)
            queries = torch.zeros_like(y)
            passes = torch.full_like(queries, attack.cost)
        else:
            level = Access[self.settings["access"].upper()]
            limits: dict[str, Any] = {"access": level, "budget": self.settings["budget"]}
            found = quietest(attack, self.subject, x, y, self.threat, goal=aim, rng=rng, **limits)
            x_adv, queries, passes = found.x_adv, found.forwards, found.forwards + found.backwards
        seconds = (time.process_time() - began) / len(batch)
        ends = [0 if task.x is None else len(task.x) for task in batch]
        parts = zip(x_adv, ends, queries.tolist(), passes.tolist(), strict=True)
        return [_Done(one[:end].cpu(), asked, passed, seconds) for one, end, asked, passed in parts]

    def _row(self, task: Task, made: _Done, folder: Path) -> Row:
        """What is heard in what was made, in its file, and in the controls."""
        text, rate = str(task.text), self.subject.rate
        other = None if self.makes else task.target
        files = self._files(task, made, folder)
        x_adv, _ = wav.read(folder / files["adversarial"], rate, math.inf)
        after = _hear(self.subject, x_adv)
        rng = torch.Generator().manual_seed(_seed(self.settings["seed"], task.index, "noise"))
        controls = {name: self._control(task, x) for name, x in self._controls(task, x_adv, rng).items()}
        proxy = None if self.judge is None else self._judged(x_adv)
        return {
            "index": task.index,
            "name": task.name,
            "reference": text,
            "target": task.target,
            "before": controls["clean"]["heard"] if "clean" in controls else None,
            "after": after,
            "success": self._success(task, after),
            "wer": wer(text, after),
            "cer": cer(text, after),
            "target_wer": None if other is None else wer(other, after),
            "target_cer": None if other is None else cer(other, after),
            **self._measures(task, x_adv),
            "proxy": proxy,
            "proxy_wer": None if proxy is None else min(1.0, wer(text, proxy)),
            "controls": controls,
            "channels": {name: self._over(name, task, x_adv) for name in self.channels},
            "queries": made.queries,
            "passes": made.passes,
            "seconds": made.seconds,
            "files": files,
        }

    def _success(self, task: Task, heard: str) -> bool:
        if task.target is None:
            return not self.match(str(task.text), heard)
        return self.match(task.target, heard)

    def _files(self, task: Task, made: _Done, folder: Path) -> dict[str, str]:
        """The sounds, written; their paths in the folder."""
        sounds = {"adversarial": made.x}
        if task.x is not None:
            sounds["original"] = task.x
        if task.x is not None and not self.makes:
            sounds["difference"] = wav.quantised(made.x) - task.x
        # A name may be long, or another's when what no file may be called is left out; a number is only its own.
        number = f"{task.index + 1:0{len(str(self.tasks[-1].index + 1))}d}"
        name = re.sub(r"[^\w.-]+", "-", task.name)[:40]
        paths = {kind: f"clips/{number}-{name}.{kind}.wav" for kind in sounds}
        for kind, x in sounds.items():
            wav.write(folder / paths[kind], x, self.subject.rate)
        return paths

    def _controls(self, task: Task, x_adv: Tensor, rng: torch.Generator) -> dict[str, Tensor]:
        """The clean sound; the same sped up, where what was made has a length of its own; and noise.

        For a recording it is noise in place of what the attack added, as loud; for a command, in place of the sound.
        """
        if task.x is None:
            return {"noise": measures.noise(x_adv, rng)}
        if not self.makes:
            added = measures.noise(x_adv - task.x, rng) if bool((x_adv != task.x).any()) else torch.zeros_like(task.x)
            return {"clean": task.x, "noise": (task.x + added).clamp(-1, 1)}
        return {"clean": task.x, "fast": measures.sped_up(task.x, len(x_adv)), "noise": measures.noise(x_adv, rng)}

    def _control(self, task: Task, x: Tensor) -> Row:
        text, x = str(task.text), wav.quantised(x)
        heard, proxy = _hear(self.subject, x), None if self.judge is None else self._judged(x)
        wrong = None if proxy is None else min(1.0, wer(text, proxy))
        rates = {"wer": min(1.0, wer(text, heard)), "proxy": proxy, "proxy_wer": wrong}
        return {"heard": heard, "success": self._success(task, heard), **rates}

    def _judged(self, x: Tensor) -> str:
        assert self.judge is not None
        own, rate = self.subject.rate, self.judge.rate
        return _hear(self.judge, x if own == rate else torch.from_numpy(wav.resample(x.numpy(), own, rate)).clamp(-1, 1))

    def _measures(self, task: Task, x_adv: Tensor) -> Row:
        """How much of a recording was changed; nothing for a sound that was no recording."""
        if self.makes or task.x is None or not bool((x_adv != task.x).any()):
            return dict.fromkeys(("snr", "db_x", "above", "pesq", "stoi"))
        pair, rate = (task.x, x_adv), self.subject.rate
        return {
            "snr": measures.snr(*pair),
            "db_x": measures.db_x(*pair),
            "above": measures.share_above(*pair, rate),
            "pesq": measures.pesq(*pair, rate),
            "stoi": measures.stoi(*pair, rate),
        }

    def _over(self, name: str, task: Task, x_adv: Tensor) -> Row:
        """In how many draws of a channel the sound still works."""
        through = self.channels[name]
        n = DRAWS if any(part.random for part in through.parts) else 1
        rng = torch.Generator().manual_seed(_seed(self.settings["seed"], task.index, name))
        heard = wav.quantised(through(x_adv.expand(n, -1), self.subject.rate, rng))
        return {"count": sum(self._success(task, _hear(self.subject, x)) for x in heard), "of": n}


_TYPES = {getattr(make, "func", make) for make in THREATS.values()}


def _hear(recogniser: Recogniser, x: Tensor) -> str:
    """What is heard in a waveform (T,)."""
    return recogniser.transcribe(x.float().unsqueeze(0).to(_device(recogniser)))[0]


def _device(recogniser: Recogniser) -> torch.device:
    return next((parameter.device for parameter in recogniser.parameters()), torch.device("cpu"))


def _about(recogniser: Recogniser | None) -> dict[str, str] | None:
    if recogniser is None:
        return None
    return {"name": recogniser.name or type(recogniser).__name__, "digest": digest_of(_told(recogniser))}


def _told(recogniser: Recogniser) -> Any:
    """What tells a recogniser from another: one without weights keeps a decoder, which is not the same in every process."""
    if not isinstance(recogniser, TextOnly):
        return recogniser
    return recogniser.hear if type(recogniser) is TextOnly else type(recogniser)


def _seed(seed: int, index: int, what: str) -> int:
    """A seed of a task's own."""
    return int.from_bytes(hashlib.sha256(f"{seed}\0{index}\0{what}".encode()).digest()[:7], "big")


class _Said:
    """What is reported while a batch is attacked: what is done, what is running, and how far that is.

    Arguments:
        report: Who is told.
        share: The share of all sounds that is done.
        text: What is running.
    """

    def __init__(self, report: Report, share: float, text: str) -> None:
        self.report, self.share, self.text, self.count = report, share, text, 0
        report(share, text)

    @contextlib.contextmanager
    def passes(self, recogniser: Recogniser) -> Iterator[None]:
        """Report each time that the recogniser is asked."""
        hook = recogniser.register_forward_pre_hook(self._asked)
        try:
            yield
        finally:
            hook.remove()

    def _asked(self, *_: Any) -> None:
        self.count += 1
        self.report(self.share, f"{self.text}, asked {self.count} times")


def _progress(rows: Sequence[Row], name: str) -> str:
    return f"{sum(row['success'] for row in rows)} of {len(rows)} heard as wanted, now {name}"


def _kept(rows: list[Row], path: Path, names: list[str], size: int) -> list[Row]:
    """The rows, where they are those of this run; a batch is kept whole or not at all."""
    if [row["name"] for row in checked(rows, path.parent)] != names[: len(rows)]:
        raise damaged(path, "its rows are not those of this run")
    return rows if len(rows) == len(names) else rows[: len(rows) // size * size]
