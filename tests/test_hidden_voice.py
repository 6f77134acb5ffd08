"""The white-box hidden voice command: its senones, its loss in closed form, sounds that a stock decoder hears."""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from advkit.attacks.audio.hidden_voice import AFTER, BEFORE, MARGIN, PEAK, HiddenVoice, senones_of, shortfall, spread
from advkit.audio.recogniser import TextOnly
from advkit.benchmarks.hidden_voice import PHRASES, table
from advkit.errors import AccessError, UsageError
from advkit.oracle import Access
from advkit.sound.wav import quantised


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def sphinx():
    pytest.importorskip("pocketsphinx")
    from advkit.audio.sphinx import load

    return load('pocketsphinx(grammar="call me | okay google | play some music | stop")')


@given(st.integers(3, 60))
def test_three_states_share_the_frames(frames):
    out = spread((7, 8, 9), frames)
    assert len(out) == frames
    assert out == sorted(out)
    counts = [out.count(k) for k in (7, 8, 9)]
    assert max(counts) - min(counts) <= 1
    assert counts[1] == max(counts)


def test_the_senones_of_a_text(sphinx):
    model = sphinx.acoustic_model()
    goal = senones_of("Call me!", model, 4)
    phones = [model.definition.phones[k] for k in model.codebooks[goal]]
    assert phones == [*["SIL"] * BEFORE, *(p for p in ("K", "AO", "L", "M", "IY") for _ in range(4)), *["SIL"] * AFTER]
    assert goal[BEFORE : BEFORE + 4].unique_consecutive().tolist() == list(model.definition.senones("K", "SIL", "AO", 1))
    assert goal[BEFORE + 8 : BEFORE + 12].unique_consecutive().tolist() == list(model.definition.senones("L", "AO", "M", 2))


class Indifferent:
    """A model of one filler and two phones for which every senone is equally likely in every frame."""

    bare = 9
    codebooks = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2, 1, 2])
    definition = SimpleNamespace(phones=("SIL", "A", "B"), fillers=frozenset({"SIL"}))

    def front_end(self, x):
        return torch.zeros(len(x), 4, 13)

    def scores(self, features, wanted, clip):
        assert not clip
        return torch.zeros(*features.shape[:2], len(wanted))


def test_the_loss_of_an_indifferent_model_in_closed_form():
    goal = torch.tensor([1, 10, 3, 10])
    speech, silence = math.log(7 + 3 * math.exp(MARGIN)), math.log(10)
    for n in (1, 3):
        loss = shortfall(Indifferent(), torch.ones(n, 100), goal)
        assert float(loss) == pytest.approx(2 * (3 * speech + silence) / 4, rel=1e-6)


def test_a_sound_is_its_seeds_and_as_a_file_holds_it(sphinx):
    attack = HiddenVoice(steps=2)
    made = attack.make("stop", sphinx, rng=rng())
    assert torch.equal(made.x, attack.make("Stop.", sphinx, rng=rng()).x)
    assert not torch.equal(made.x, attack.make("stop", sphinx, rng=rng(1)).x)
    assert torch.equal(made.x, quantised(made.x))
    assert float(made.x.abs().max()) == PEAK
    assert (made.queries, made.passes) == (0, 4)
    frames = BEFORE + AFTER + 4 * 4
    assert sphinx.acoustic_model().front_end(made.x.unsqueeze(0)).shape[1] == frames


def test_a_command_comes_out_of_noise(sphinx):
    text, model = "okay google", sphinx.acoustic_model()
    goal = senones_of(text, model, 4)
    first, last = (HiddenVoice(steps=steps).make(text, sphinx, rng=rng()).x.unsqueeze(0) for steps in (1, 10))
    assert float(shortfall(model, last, goal)) < 0.5 * float(shortfall(model, first, goal))
    assert sphinx.transcribe(last) == [text]


@pytest.mark.slow
@pytest.mark.parametrize("text", ["buy more batteries", "turn on airplane mode"])
def test_the_full_language_model_obeys_whole_streamed_and_in_noise(text):
    """The first is one whose first word a decoder takes for silence where the loss has no margin."""
    pytest.importorskip("pocketsphinx")
    from advkit.audio.sphinx import load

    ears, stream = load("pocketsphinx"), load("pocketsphinx(streaming=true)")
    x = HiddenVoice().make(text, ears, rng=rng()).x.unsqueeze(0)
    noise = torch.randn(x.shape, generator=rng(1))
    noisy = quantised(x + noise * (0.1 * x.norm() / noise.norm()))
    assert [*ears.transcribe(x), *stream.transcribe(x), *ears.transcribe(noisy)] == [text] * 3


@pytest.mark.slow
def test_what_learned_in_rooms_works_in_other_rooms():
    pytest.importorskip("pocketsphinx")
    pytest.importorskip("pyroomacoustics")
    from advkit.audio.sphinx import load
    from advkit.sound.air import play, rooms

    ears, others = load("pocketsphinx"), rooms(8, 16_000, rng(7))
    counts = []
    for bank in (0, 8):
        x = HiddenVoice(rooms=bank).make("okay google", ears, rng=rng()).x
        counts.append(ears.transcribe(quantised(play(x.expand(8, -1), others))).count("okay google"))
    assert counts[1] >= 5 > counts[0]


def test_what_cannot_be_attacked_so(sphinx):
    with pytest.raises(AccessError, match="needs an acoustic model, as pocketsphinx has; mine gives none"):
        HiddenVoice().make("stop", TextOnly(lambda x: "", name="mine"), rng=rng())
    with pytest.raises(UsageError, match="never 'go'"):
        HiddenVoice().make("go", sphinx, rng=rng())
    for settings, words in (({"frames": 2}, "frames is 2"), ({"steps": 0}, "steps is 0"), ({"step": 0.0}, "step is 0")):
        with pytest.raises(UsageError, match=words):
            HiddenVoice(**settings)
    assert (HiddenVoice.access, HiddenVoice.needs_voice) == (Access.GRADIENTS, False)


def test_the_table_counts():
    pytest.importorskip("jiwer")
    assert len(set(PHRASES)) == 30
    assert all(2 <= len(phrase.split()) <= 6 for phrase in PHRASES)

    def line(phrase, judge, streaming=""):
        heard = {"whole": phrase, "streaming": streaming, "noise 20 dB": "you", "judge": judge}
        return {"phrase": phrase, "cpu_s": 3.0, "heard": {"made": heard, "spoken": dict.fromkeys(heard, phrase)}}

    rows = table([line(PHRASES[0], "you", PHRASES[0]), line(PHRASES[1], PHRASES[1]), line(PHRASES[2], "call nine you")])
    assert [row.split()[-6:] for row in rows[1:4]] == [
        ["3/3", "1/3", "0/3", "1/3", "0.50", "2/3"],
        ["3/3", "3/3", "3/3", "3/3", "0.00", "0/3"],
        ["2/2", "0/2", "0/2", "1/2", "0.25", "1/2"],
    ]
    assert rows[4] == "CPU seconds a phrase: 3.0"
