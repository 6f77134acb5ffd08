r"""A sound made for a recogniser's acoustic model, from noise, with no speech in it (Carlini et al., 2016).

Symbols: the text is a sequence of senones, s_t for frame t: silence, then the states of each phone in its context, d frames a
phone, then silence. l_t(s) is the log likelihood of senone s in frame t of the waveform x.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from advkit.audio.command import Made
from advkit.audio.recogniser import Recogniser
from advkit.audio.senones import SHIFT, WINDOW, AcousticModel, batch_normalised, cold_normalised, streams
from advkit.audio.sphinx_files import ALONE, FIRST, INSIDE, LAST
from advkit.audio.text import check_said
from advkit.errors import AccessError
from advkit.oracle import Access
from advkit.sound import air
from advkit.sound.wav import quantised
from advkit.spec import check_positive, check_whole

SILENCE = "SIL"
BEFORE, AFTER = 20, 25
"""How many frames of silence are around the command: the cepstral mean and the search need some."""
LOUD = 0.02
"""The standard deviation of the noise that the search starts from; only its ratio to the step matters."""
PEAK = 0.5
"""The largest sample of the sound, and of every iterate: a cold decoder hears how loud a sound is."""
VIEWS = 2
"""In how many rooms a step hears the sound."""
MARGIN = 10.0
"""By how many nats a frame of the text is to be more likely than silence: short words are else taken for a part of it."""


@dataclass(frozen=True)
class HiddenVoice:
    r"""min over x of \sum_t -log (e^{l_t(s_t)} / \sum_s e^{l_t(s) + m_t(s)}), by Adam, normalised as a whole and cold.

    Carlini, Mishra, Vaidya, Zhang, Sherr, Shields, Wagner and Zhou, 2016, "Hidden voice commands", USENIX Security,
    https://www.usenix.org/conference/usenixsecurity16/technical-sessions/presentation/carlini, the white-box attack: few frames
    a phone, straight to the states of the acoustic model. The sum over s is over the phones without context and the senones of
    the text, and m_t(s) is 10 where the text speaks in frame t and s is silence or a noise, else 0. The two normalisations are
    those of a decoder that is given a whole sound and of one that hears it as it comes and has heard nothing before.

    No sound is asked about: the recogniser's files are all that is used.

    Arguments:
        frames: d, frames of 10 ms a phone. Few are hard to understand for a person: 8 is fast speech, 4 noise, and below 3 no
            phone passes through its three states.
        steps: How many gradients are taken.
        step: Adam's step, for a start of standard deviation 0.02.
        rooms: In how many simulated rooms the sound should be understood as well; each step hears it in two. 0 for none.
    """

    frames: int = 4
    steps: int = 40
    step: float = 0.004
    rooms: int = 0
    access = Access.GRADIENTS
    needs_voice = False
    paper = "Carlini et al. 2016"

    def __post_init__(self) -> None:
        check_whole("hidden-voice: frames", self.frames, 3)
        check_whole("hidden-voice: steps", self.steps, 1)
        check_positive("hidden-voice: step", self.step)
        check_whole("hidden-voice: rooms", self.rooms, 0)

    def make(
        self,
        text: str,
        recogniser: Recogniser,
        *,
        voice: Tensor | None = None,
        listener: Recogniser | None = None,
        rng: torch.Generator,
    ) -> Made:
        """The sound.

        Arguments:
            text: What the recogniser should hear.
            recogniser: A recogniser with a method ``acoustic_model``, as PocketSphinx has.
            voice: Not used: the sound begins as noise.
            listener: Not used.
            rng: Where the noise comes from.

        Raises:
            UsageError: The recogniser cannot say the text.
            AccessError: The recogniser has no acoustic model to open.
        """
        del voice, listener
        opened = getattr(recogniser, "acoustic_model", None)
        if opened is None:
            raise AccessError(f"hidden-voice needs an acoustic model, as pocketsphinx has; {recogniser.name} gives none")
        recogniser.check_text(text)
        model = opened()
        goal = senones_of(text, model, self.frames)
        noise = LOUD * torch.randn((1, (len(goal) - 2) * SHIFT + WINDOW), generator=rng)
        x = noise.requires_grad_()
        adam = torch.optim.Adam([x], self.step)
        bank = air.rooms(self.rooms, recogniser.rate, rng) if self.rooms else None
        for _ in range(self.steps):
            adam.zero_grad()
            shortfall(model, _heard(levelled(x), bank, rng), goal).backward()
            adam.step()
        return Made(quantised(levelled(x.detach()))[0], queries=0, passes=2 * self.steps * (1 if bank is None else 1 + VIEWS))


def _heard(x: Tensor, bank: Tensor | None, rng: torch.Generator) -> Tensor:
    """The sound (1, T) as it is, and as it arrives in rooms drawn from a bank (R, L), if there is one."""
    if bank is None:
        return x
    drawn = bank[torch.randint(len(bank), (VIEWS,), generator=rng)]
    return torch.cat([x, air.play(x.expand(VIEWS, -1), drawn)])


def levelled(x: Tensor) -> Tensor:
    """``x`` at the level that it is played at, with the same shape."""
    return PEAK * x / x.abs().amax(1, keepdim=True)


def shortfall(model: AcousticModel, x: Tensor, goal: Tensor) -> Tensor:
    """The mean of -log (e^{l_t(s_t)} / sum_s e^{l_t(s) + m_t(s)}) over frames, once a normalisation; x (N, T), goal (F,)."""
    rivals = torch.cat([torch.arange(model.bare), goal[goal >= model.bare].unique()])
    place = torch.searchsorted(rivals, goal).repeat(len(x))
    fillers = [model.definition.phones.index(name) for name in model.definition.fillers]
    pause, pauses = (torch.isin(model.codebooks[senones], torch.tensor(fillers)) for senones in (goal, rivals))
    margin = MARGIN * (~pause).unsqueeze(1) * pauses
    c = model.front_end(x)
    scores = [model.scores(streams(normal(c)), rivals, clip=False) + margin for normal in (batch_normalised, cold_normalised)]
    return torch.stack([functional.cross_entropy(one.flatten(0, 1), place) for one in scores]).sum()


def senones_of(text: str, model: AcousticModel, frames: int) -> Tensor:
    """The senone of each frame, (F,): the first pronunciation of each word, ``frames`` a phone, between silences."""
    phones = [(SILENCE, ALONE)]
    for word in check_said(text).split():
        own = model.words[word][0]
        places = [ALONE] if len(own) == 1 else [FIRST, *[INSIDE] * (len(own) - 2), LAST]
        phones += zip(own, places, strict=True)
    phones.append((SILENCE, ALONE))
    quiet = model.definition.bare(SILENCE)
    sequence = spread(quiet, BEFORE)
    for (left, _), (phone, place), (right, _) in zip(phones, phones[1:], phones[2:], strict=False):
        sequence += spread(model.definition.senones(phone, left, right, place), frames)
    return torch.tensor(sequence + spread(quiet, AFTER))


def spread(states: tuple[int, ...], frames: int) -> list[int]:
    """Three states over at least three frames: what is left over goes to the middle one, then to the last."""
    third, rest = divmod(frames, 3)
    counts = (third, third + (rest > 0), third + (rest > 1))
    return [state for state, count in zip(states, counts, strict=True) for _ in range(count)]
