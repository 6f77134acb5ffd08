"""Defenses for recognisers: what each hears, attacks that know of them, comparing transcripts, one sound for all clips."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from advkit import UsageError, perturb, run
from advkit.adaptive import Adaptive
from advkit.attacks import PGD
from advkit.attacks.audio.universal import SpeechUniversal
from advkit.audio.ctc import CTC
from advkit.audio.recogniser import Recogniser, TextOnly, goal
from advkit.combine import Expect
from advkit.defenses.audio import SPEECH_DEFENSES, Agreeing, Defended, Transcripts, adaptive, defend
from advkit.defenses.audio.transcripts import Half
from advkit.models.spoken import SpeechCTC
from advkit.sound.air import Gain
from advkit.sound.filters import Quantise
from advkit.sound.threats import Level, Snr, lengths
from advkit.sound.wav import quantised
from advkit.streams import Streams
from advkit.threat import Lp

RATE, FRAME = 8000, 400
WORDS = ("", "ba", "da", "ga", "ka")
PITCH = (400.0, 700.0, 1000.0, 1300.0)


class Tones(Recogniser):
    """A recogniser of four words, each a tone of 0.1 s: a frame of 50 ms says the tone that it has most of, or nothing."""

    rate, name = RATE, "tones"

    def __init__(self):
        super().__init__()
        place = torch.arange(FRAME) / RATE
        self.register_buffer("tones", torch.stack([torch.exp(2j * math.pi * pitch * place) for pitch in PITCH]))

    def forward(self, x):
        frames = F.pad(x, (0, -x.shape[1] % FRAME)).unfold(1, FRAME, FRAME)
        parts = torch.einsum("nft,kt->nfk", frames.to(self.tones.dtype), self.tones.conj())
        heard = (parts.real.square() + parts.imag.square() + 1e-9).sqrt() / FRAME
        return torch.cat([torch.full_like(heard[..., :1], 0.03), heard], 2) * 100

    def text(self, outputs):
        rows = [row.unique_consecutive().tolist() for row in outputs.argmax(2)]
        return [" ".join(WORDS[k] for k in row if k) for row in rows]

    def loss(self, outputs, texts):
        parts = zip(outputs, texts, strict=True)
        return torch.stack([F.cross_entropy(one, self._frames(text, len(one)), reduction="sum") for one, text in parts])

    def check_text(self, text):
        if missing := set(text.split()) - set(WORDS):
            raise UsageError(f"tones cannot say {sorted(missing)}")

    def _frames(self, text, n):
        return torch.tensor(
            [WORDS.index(word) for word in text.split() for _ in range(2)][:n] + [0] * (n - 2 * len(text.split()))
        )


def say(*texts, seed=0):
    """Each text as a sound, with a little noise, padded with zeros."""
    rng, rows = torch.Generator().manual_seed(seed), []
    for text in texts:
        pitches = [PITCH[WORDS.index(word) - 1] for word in text.split()]
        place = torch.arange(2 * FRAME) / RATE
        x = torch.cat([0.3 * torch.sin(2 * math.pi * pitch * place) for pitch in pitches])
        rows.append(x + 0.003 * torch.randn(len(x), generator=rng))
    return nn.utils.rnn.pad_sequence(rows, batch_first=True)


TEXTS = ("ba da ga", "ka ba", "da ka ga ba", "ga da")
TARGETS = ("ba ka ga", "ka da", "da ka ba ga", "ga ka")


@pytest.fixture(scope="module")
def letters():
    """A small network for CTC, with random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return CTC(SpeechCTC(width=8).build().requires_grad_(False)).eval()


class Loudness(nn.Module):
    """A classifier of sounds: which half of the spectrum is louder."""

    def forward(self, x):
        spectrum = torch.fft.rfft(x).abs()
        return torch.stack([part.sum(1) for part in spectrum.chunk(2, 1)], 1)


# Defenses


def test_the_recogniser_of_these_tests_understands():
    assert Tones().transcribe(say(*TEXTS)) == list(TEXTS)


SPECS = [{"resample": "resample(4000)", "room": "room(2)"}.get(name, name) for name in SPEECH_DEFENSES]


@pytest.mark.parametrize("name", SPECS)
def test_a_defended_recogniser_is_a_recogniser_that_hears_the_change(name):
    recogniser, x = Tones(), say(*TEXTS)
    defended = defend(recogniser, name)
    assert (defended.rate, defended.access, defended.name) == (recogniser.rate, recogniser.access, "tones")
    change = defended.ear.change
    assert getattr(change, "rate", RATE) == RATE
    streams = Streams.of(torch.Generator().manual_seed(0), len(x))
    heard = recogniser(change(x, streams, torch.arange(len(x))))
    outputs = defended(x)
    assert torch.allclose(outputs, heard)
    assert defended.text(outputs) == recogniser.text(heard)
    assert torch.equal(defended.loss(outputs, TEXTS), recogniser.loss(heard, TEXTS))
    assert torch.equal(defended.says(outputs, TEXTS), recogniser.says(heard, TEXTS))
    with pytest.raises(UsageError, match="tones cannot say"):
        defended.check_text("zebra")


@pytest.mark.parametrize("name", [name for name in SPECS if name != "room(2)"])  # it smears such short words
def test_clean_speech_is_still_understood(name):
    assert defend(Tones(), name).transcribe(say(*TEXTS)) == list(TEXTS)


@pytest.mark.parametrize("name", SPECS)
def test_an_adaptive_attack_has_a_gradient_where_the_deployed_model_has_none(name):
    defended, x = defend(Tones(), name), say(*TEXTS)
    attack = defended.adaptive(PGD(5))
    straight = defended.ear.change.straight
    inner = attack.attack if isinstance(attack, Expect) else attack
    assert isinstance(inner, Adaptive) == straight
    assert isinstance(attack, Expect) == defended.ear.change.random
    z = x.clone().requires_grad_(True)
    (naive,) = torch.autograd.grad(defended.loss(defended(z), TARGETS).sum(), z)
    assert bool(naive.any()) != straight
    if straight:
        (guided,) = torch.autograd.grad(defended.loss(inner.model(z), TARGETS).sum(), z)
        assert bool((guided.norm(dim=1) > 0).all())


def test_naive_attacks_fail_on_a_rounding_that_adaptive_ones_pass():
    defended, x = defend(Tones(), Quantise(31)), say(*TEXTS)
    wanted, y = goal(defended, TARGETS, targeted=True), torch.arange(4)
    rates = [
        float(run(attack, defended, x, y, Snr(2), goal=wanted).success.double().mean())
        for attack in (PGD(40), defended.adaptive(PGD(40)))
    ]
    assert rates == [0.0, 1.0]


def test_defenses_stack_and_draw_apart():
    x = say(*TEXTS)
    defended = defend(Tones(), "noise(10)", "resample(4000)", "mp3")
    assert [type(ear.change).__name__ for ear in (defended.ear, defended.model.ear, defended.model.model.ear)] == [
        "Noise",
        "Resample",
        "MP3",
    ]
    attack = adaptive(defended, PGD(2))
    assert isinstance(attack, Expect)
    assert isinstance(attack.attack, Adaptive)
    assert not torch.equal(defended(x), defended(x))
    assert torch.equal(defend(Tones(), "noise(10)", seed=3)(x), defend(Tones(), "noise(10)", seed=3)(x))
    assert not torch.equal(defend(Tones(), "noise(10)", seed=3)(x), defend(Tones(), "noise(10)", seed=5)(x))


def test_a_classifier_of_sounds_can_be_defended():
    x = say(*TEXTS)
    defended = defend(Loudness(), Gain(0))
    assert torch.allclose(defended(x), Loudness()(x))
    y = Loudness()(x).argmax(1)
    result = run(defended.adaptive(PGD(10)), defended, x, y, Snr(0))
    assert result.x_adv.shape == x.shape


@pytest.mark.parametrize("change", ["quantise(3)", "quantise(3)+median(3)"])
def test_a_sound_that_a_defense_silences_can_still_be_attacked(letters, change):
    """The last tenths of a second are too quiet for the rounding; the rest has too few frames for the text."""
    x = say("ba ka", "da ga").index_fill_(1, torch.tensor([0]), 0.9)
    x[:, 400:] *= 0.1
    x.requires_grad_(True)
    defended = defend(letters, *change.split("+"))
    loss = defended.loss(defended(x), ["da ga ba", "ga ba da"])
    assert bool(loss.isfinite().all())
    stand_in = adaptive(defended, PGD(1)).model
    (g,) = torch.autograd.grad(stand_in.loss(stand_in(x), ["da ga ba", "ga ba da"]).sum(), x)
    assert g.isfinite().all()
    assert g.any()


def test_an_attack_that_knows_already_is_left_as_it_is():
    defended = defend(Tones(), "mp3", "noise(10)")
    knowing = defended.adaptive(PGD(2))
    assert defended.adaptive(knowing) == knowing


def test_a_recogniser_of_texts_only_stays_one():
    hears = TextOnly(lambda x: "loud" if float(x.norm()) > 0.5 else "quiet", name="mine")
    defended = defend(hears, "average(15)")
    assert isinstance(defended, Defended)
    assert defended.access == hears.access
    assert defended.transcribe(0.9 * torch.ones(1, 50)) == ["loud"]
    with pytest.raises(UsageError, match="mine answers with texts only"):
        defended.loss(defended(torch.ones(1, 50)), ["loud"])


def test_what_is_no_defense_is_refused():
    with pytest.raises(UsageError, match="there is no defense; name at least one of resample, quantise"):
        defend(Tones())
    with pytest.raises(UsageError, match="unknown defense 'jpeg'"):
        defend(Tones(), "jpeg")


# Comparing transcripts


def test_a_comparison_sees_what_does_not_survive_a_change_and_not_what_was_made_to():
    """The first attack stops at a boundary, from which noise takes it back; the second keeps the text of both views."""
    recogniser, x, y = Tones(), say(*TEXTS), torch.arange(4)
    compared = Transcripts("noise(0)").fit(recogniser, say(*TEXTS, seed=1))
    assert not compared.suspected(x).any()
    naive = run(PGD(60), recogniser, x, y, Snr(2), goal=goal(recogniser, TARGETS, targeted=True)).x_adv
    assert recogniser.transcribe(naive) == list(TARGETS)
    assert compared.suspected(naive).any()
    agreeing = compared.agreeing()
    knowing = perturb(PGD(60), agreeing, x, y, Snr(2), goal=goal(agreeing, TARGETS, targeted=True), rng=torch.Generator())
    assert recogniser.transcribe(knowing) == list(TARGETS)
    assert not compared.suspected(knowing).any()


def test_the_score_is_the_greatest_error_rate_in_characters():
    recogniser = TextOnly(lambda x: "abcd efgh" if x.norm() > 0.5 else "abcx", rate=RATE)
    loud = torch.full((2, 50), 0.9)
    compared = Transcripts("gain(0) average(3)").fit(recogniser, loud)
    assert compared.threshold == 0
    assert not compared.suspected(loud).any()
    # Averaged, the first click is no longer loud: one substitution and five deletions in nine characters.
    clicks = torch.zeros(2, 50).index_put_((torch.tensor([0, 1]), torch.tensor([20, 20])), torch.tensor([0.6, 0.2]))
    assert compared(clicks).tolist() == pytest.approx([6 / 9, 0])
    assert compared.suspected(clicks).tolist() == [True, False]


def test_the_first_half_of_speech_says_the_first_half_of_the_words():
    recogniser = Tones()
    x = say("ba da ga ka", "ka ga")
    assert recogniser.transcribe(Half()(x)) == ["ba da", "ka"]
    compared = Transcripts("", half=True).fit(recogniser, x)
    assert compared.threshold == 0
    assert compared(x).tolist() == [0, 0]
    agreeing = compared.agreeing()
    assert isinstance(agreeing, Agreeing)
    outputs = agreeing(x)
    assert agreeing.says(outputs, ["ba da ga ka", "ka ga"]).tolist() == [True, True]
    assert agreeing.says(outputs, ["ba da ga", "ga ga"]).tolist() == [False, False]
    assert agreeing.text(outputs) == ["ba da ga ka", "ka ga"]


def test_the_threshold_lets_clean_sounds_pass():
    x = torch.cat([say(*TEXTS, seed=seed) for seed in range(5)])
    noisy = x + 0.05 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0)) * (x != 0)
    for alarms in (0.0, 0.1, 0.5):
        compared = Transcripts("quantise(3)", alarms=alarms).fit(Tones(), noisy)
        assert float(compared.suspected(noisy).double().mean()) <= alarms


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Transcripts(""), "there is nothing to compare"),
        (lambda: Transcripts("rotate(3)"), "unknown view 'rotate'"),
        (lambda: Transcripts(alarms=1.0), "transcripts: alarms"),
        (lambda: Transcripts(seed=-1), "transcripts: seed"),
        (lambda: Transcripts().fit(Tones(), torch.zeros(0, 9)), "no clean sounds"),
    ],
)
def test_a_comparison_of_nothing_is_refused(make, says):
    with pytest.raises(UsageError, match=says):
        make()


# One sound for all clips


@pytest.mark.parametrize("threat", [Level(-3), Snr(4)], ids=repr)
def test_one_sound_makes_clips_misheard_that_it_has_not_seen(threat):
    recogniser = Tones()
    known = ("ba da", "da ba", "ga ba", "ba ga da", "da ba ga", "ga da ba da", "da ga", "ga ka ba")
    attack = SpeechUniversal(40, 4, seconds=0.1)
    delta = attack.fit(recogniser, say(*known), known, threat, rng=torch.Generator().manual_seed(0))
    unseen = ("ga ba da", "da ba ga da", "ka ba", "ga ka da")
    x = say(*unseen, seed=9)
    x_adv = attack.apply(x, delta, threat)
    noise = 2 * torch.rand(delta.shape, generator=torch.Generator().manual_seed(0)) - 1
    random = attack.apply(x, noise * float(delta.abs().max()), threat)
    assert delta.shape == (800,)
    wrong = lambda x: sum(said != text for said, text in zip(recogniser.transcribe(quantised(x)), unseen, strict=True))
    assert wrong(x) == 0
    assert wrong(x_adv) >= max(3, wrong(random) + 1)
    assert bool(threat.allows(x_adv, x).all())
    relative = (x_adv - x) / threat.size(x).unsqueeze(1)
    assert float(torch.linalg.vector_norm(relative, threat.p, dim=1).max()) <= threat.eps * (1 + 1e-5)
    assert torch.equal(lengths(x_adv), lengths(x))


def test_one_sound_raises_the_loss_of_a_network_on_clips_that_it_has_not_heard(letters):
    known, unseen, threat = say(*TEXTS, seed=1), say(*TEXTS, seed=2), Snr(5)
    attack = SpeechUniversal(20, 4, seconds=0.1, beta=100.0)
    delta = attack.fit(letters, known, TEXTS, threat, rng=torch.Generator().manual_seed(0))
    noise = delta[torch.randperm(len(delta), generator=torch.Generator().manual_seed(0))]
    hear = lambda x: letters.loss(letters(x), TEXTS).mean()
    clean, loud, learned = hear(unseen), *(hear(attack.apply(unseen, one, threat)) for one in (noise, delta))
    assert float(learned) > max(float(clean), float(loud)) + 0.3


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"threat": Level()}, "needs a fixed loudness"),
        ({"threat": Lp(math.inf, 0.1)}, "needs a fixed loudness"),
        ({"texts": ["ba"]}, "something should be said in each clip"),
        ({"texts": ["ba", ""]}, "something should be said in each clip"),
        ({"x": torch.zeros(2, 800, dtype=torch.int64)}, "float32 or float64"),
    ],
)
def test_what_cannot_be_learned_from_is_refused(change, says):
    given = {"x": say("ba", "da"), "texts": ["ba", "da"], "threat": Level(-10)} | change
    with pytest.raises(UsageError, match=says):
        SpeechUniversal(1).fit(Tones(), given["x"], given["texts"], given["threat"], rng=torch.Generator())


@pytest.mark.parametrize(
    "wrong", [{"steps": 0}, {"batch_size": 0}, {"seconds": 0.0}, {"seconds": 1e9}, {"alpha": -1.0}, {"beta": 0.0}]
)
def test_settings_are_checked(wrong):
    with pytest.raises(UsageError, match="universal: "):
        SpeechUniversal(**wrong)
