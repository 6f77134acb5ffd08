"""PocketSphinx: its answers are a fresh decoder's, its acoustic model in torch is the one that it reads, bad input."""

import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from advkit.audio import senones
from advkit.audio.senones import UNIT, batch_normalised, cold_normalised, mel_filters, noise_gains, streams
from advkit.audio.sphinx import CHUNK, CLOSED, Hypothesis, PocketSphinx, Settings, load
from advkit.audio.sphinx_files import ALONE, FIRST, INSIDE, LAST, read_definition, read_weights
from advkit.errors import UsageError
from advkit.spec import parse, show

pocketsphinx = pytest.importorskip("pocketsphinx")
PHRASES = 'pocketsphinx(grammar="turn on airplane mode | call nine one one | don\'t stop")'


def babble(seed, seconds=1.0, level=0.2):
    """Something like speech: a buzz with moving resonances, some noise and pauses, 16 bits, (T,)."""
    rng = np.random.default_rng(seed)
    t = np.arange(int(16_000 * seconds)) / 16_000
    pitch = np.cumsum(100 + 40 * np.sin(2 * np.pi * rng.uniform(0.5, 3) * t)) / 16_000
    formants = 600 + 500 * np.sin(2 * np.pi * np.outer(rng.uniform(1, 5, 3), t) + rng.uniform(0, 6, (3, 1)))
    formants += np.array([[0], [1000], [2000]])
    sound = sum(np.sin(2 * np.pi * k * pitch) * np.exp(-((k * 110 - formants) ** 2).min(0) / 9e4) for k in range(1, 30))
    loud = np.clip(np.sin(2 * np.pi * rng.uniform(1, 4) * t) + 0.6, 0, 1)
    mixed = sound / np.abs(sound).max() * loud + 0.02 * rng.normal(size=len(t))
    return torch.from_numpy((level * mixed * 32768).clip(-32768, 32767).round() / 32768).float()


def spoken(decoder, x, streaming):
    """Everything that a decoder says of a sound: text, score, and each word with its times and scores."""
    data = (x * 32768).to(torch.int16).numpy()
    decoder.start_utt()
    for start in range(0, len(data), CHUNK if streaming else len(data)):
        stop = start + CHUNK if streaming else None
        decoder.process_raw(data[start:stop].tobytes(), False, not streaming)
    decoder.end_utt()
    found = decoder.hyp()
    words = [(s.word, s.start_frame, s.end_frame, s.ascore, s.lscore) for s in decoder.seg()] if found else []
    return (found.hypstr, found.score, found.prob, words) if found else None


@pytest.fixture(scope="module")
def grammar():
    return load(PHRASES)


@pytest.fixture(scope="module")
def model(grammar):
    return grammar.acoustic_model()


def dumped(folder, streaming, x):
    """What a decoder computed of a sound: MFCC (F, 13) and the scores of all senones, (frames, 5126), less is better."""
    decoder = pocketsphinx.Decoder(
        **{"loglevel": "FATAL", "keyphrase": "hello", "pl_window": 0, "compallsen": True},
        **{"mfclogdir": str(folder), "senlogdir": str(folder)},
    )
    spoken(decoder, x, streaming)
    mfcc = np.fromfile(folder / "000000000.mfc", ">f4", offset=4).reshape(-1, 13)
    data = (folder / "000000000.sen").read_bytes()
    scores = np.frombuffer(data[data.index(b"endhdr\n") + 11 :], "<i2").reshape(-1, 5127)[:, 1:]
    return mfcc, scores.astype(float)


@pytest.mark.parametrize("streaming", [False, True])
def test_features_and_senones_are_those_of_the_recogniser(model, tmp_path, streaming):
    x = babble(3, 1.03)
    mfcc, scores = dumped(tmp_path, streaming, x)
    c = model.front_end(x.double().unsqueeze(0))
    assert np.abs(c[0].numpy() - mfcc).max() < 1e-4
    features = streams((cold_normalised if streaming else batch_normalised)(c.float()))
    ours = model.scores(features)[0, : len(scores)].numpy()
    ours = (ours.max(1, keepdims=True) - ours) / UNIT
    assert len(scores) >= len(mfcc) - 4
    assert np.median([np.corrcoef(*rows)[0, 1] for rows in zip(ours, scores, strict=True)]) > 0.9995
    assert np.abs(ours - scores).mean() < 1.2
    assert np.percentile(np.abs(ours - scores), 99) < 5


def test_a_few_senones_are_those_of_all(model):
    features = streams(batch_normalised(model.front_end(babble(1, 0.1).unsqueeze(0))))
    some = torch.tensor([5, 4000, 131, 2])
    torch.testing.assert_close(model.scores(features, some), model.scores(features)[..., some])


def test_clipping_changes_only_what_is_far_from_the_best(model):
    features = streams(batch_normalised(model.front_end(babble(1, 0.3).unsqueeze(0))))
    clipped, plain = model.scores(features), model.scores(features, clip=False)
    assert torch.equal(clipped.argmax(-1), plain.argmax(-1))
    assert bool((clipped >= plain - 1e-3).all())
    assert float((clipped - plain).max()) > 10


def test_gradients_of_the_scores_are_those_of_differences(model):
    x = babble(2, 0.1)[:810].double().unsqueeze(0)
    wanted = torch.tensor([0, 60, 900])
    c = model.front_end(x).detach()

    def total(c):
        return model.scores(streams(batch_normalised(c)), wanted, clip=False).log_softmax(-1)[..., 1].sum()

    along = torch.randn(c.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    free = c.clone().requires_grad_()
    total(free).backward()
    ahead = (total(c + 1e-5 * along) - total(c - 1e-5 * along)) / 2e-5
    assert float((free.grad * along).sum()) == pytest.approx(float(ahead), rel=1e-4)


def test_the_front_end_has_a_gradient_for_every_sample_but_those_of_silence(model):
    x = babble(2, 0.2).unsqueeze(0).requires_grad_()
    model.front_end(x).square().sum().backward()
    assert x.grad.isfinite().all()
    assert float((x.grad != 0).float().mean()) > 0.99


def test_mel_filters_have_unit_area_and_overlap_by_half():
    filters = mel_filters(senones.Bands(130.0, 6800.0, 25, 22))
    assert filters.shape == (25, 257)
    np.testing.assert_allclose(filters.sum(1) * 16_000 / 512, 1, atol=1e-9)
    assert (filters[:, : int(130 / 31.25)] == 0).all()
    assert (filters[:, int(6850 / 31.25) + 1 :] == 0).all()


def test_noise_removal_of_a_first_frame_in_closed_form():
    power = np.full((1, 1, 4), 1e6)
    envelope = 0.995 / 20 + 0.005
    np.testing.assert_allclose(noise_gains(power), 1 - envelope)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.floats(-3, 12))
def test_noise_removal_does_not_depend_on_the_level_of_loud_sounds(seed, level):
    power = np.exp(np.random.default_rng(seed).normal(20, 3, (2, 12, 5)))
    gains = noise_gains(power)
    assert (gains >= 1 / 20).all()
    assert (gains <= 20).all()
    np.testing.assert_allclose(noise_gains(power * np.exp(level)), gains, rtol=1e-6)


def test_silence_is_learned_as_noise():
    gains = noise_gains(np.full((1, 2000, 3), 1e6))
    assert gains[0, -1, 0] < 0.1 < 0.9 < gains[0, 0, 0]


def test_normalisation_leaves_frames_of_no_energy_out():
    c = torch.randn((1, 9, 13), generator=torch.Generator().manual_seed(0))
    c[0, :, 0] = torch.tensor([30.0, -2, 40, 50, -1, 35, 33, 20, 10])
    heard = c[0, :, 0] >= 0
    torch.testing.assert_close(batch_normalised(c)[0, heard].mean(0), torch.zeros(13), atol=1e-5, rtol=0)
    cold = cold_normalised(c)
    assert torch.equal(cold[0, ~heard], c[0, ~heard])
    torch.testing.assert_close((c - cold)[0, 0, :4], torch.tensor([40.0, 3, -1, 0]))


def test_differences_of_a_line_are_constant():
    c = torch.arange(12.0).view(1, 12, 1) * torch.ones(13)
    features = streams(c)
    assert torch.equal(features[0, 3:-3, 1], torch.full((6, 13), 4.0))
    assert torch.equal(features[0, 3:-3, 2], torch.zeros(6, 13))
    assert torch.equal(features[0, :, 0], c[0])


def test_the_definition_ties_states_to_the_senones_of_their_phone(model):
    definition = model.definition
    assert (len(definition.phones), len(definition.codebooks)) == (42, 5126)
    assert definition.fillers == {"+NSN+", "+SPN+", "SIL"}
    assert [definition.bare(phone) for phone in definition.phones[:2]] == [(0, 1, 2), (3, 4, 5)]
    for phone, left, right, place in [("K", "SIL", "AE", FIRST), ("AE", "K", "T", INSIDE), ("T", "AE", "SIL", LAST)]:
        found = definition.senones(phone, left, right, place)
        assert {definition.phones[definition.codebooks[k]] for k in found} == {phone}
        assert min(found) >= model.bare
    assert definition.senones("AY", "+NSN+", "+SPN+", ALONE) == definition.senones("AY", "SIL", "SIL", ALONE)
    assert definition.senones("SIL", "AA", "AA", INSIDE) == definition.bare("SIL")


def test_files_of_another_kind_are_refused(tmp_path, grammar):
    own = grammar.folder / "en-us"
    with pytest.raises(UsageError, match="part of an acoustic model"):
        read_definition(tmp_path / "mdef")
    (tmp_path / "mdef").write_text("0.3\n")
    with pytest.raises(UsageError, match="no binary model definition"):
        read_definition(tmp_path / "mdef")
    words = b"cluster_count 16\0"
    (tmp_path / "sendump").write_bytes(len(words).to_bytes(4, "little") + words + bytes(4))
    with pytest.raises(UsageError, match="clustered"):
        read_weights(tmp_path / "sendump", 3)
    (tmp_path / "feat.params").write_text((own / "feat.params").read_text().replace("dct", "legacy"))
    with pytest.raises(UsageError, match="has transform 'legacy'; this computes models with transform 'dct'"):
        senones.AcousticModel(tmp_path, grammar.dictionary)


@pytest.mark.parametrize("streaming", [False, True])
def test_answers_are_those_of_a_decoder_that_has_heard_nothing(streaming):
    ears = PocketSphinx(Settings(grammar="stop | go on | call me", streaming=streaming))
    before, x = babble(10, 0.9, 0.5), babble(11, 0.8)
    fresh = PocketSphinx(ears.settings)._decoder
    own = ears._decoder
    for one in (before, x):
        ears.transcribe(one.unsqueeze(0))
    own.reinit_feat()
    assert spoken(own, x, streaming) == spoken(fresh, x, streaming)


@pytest.mark.slow
def test_with_the_full_language_model_answers_are_those_of_a_fresh_decoder():
    """Whole sounds and streams in turn, on one decoder; text, scores and word times."""
    used = load("pocketsphinx")._decoder
    for seed in range(12):
        for streaming in (False, True):
            x = babble(seed, 0.6 + seed / 15, 0.05 + seed / 30)
            used.reinit_feat()
            assert spoken(used, x, streaming) == spoken(pocketsphinx.Decoder(loglevel="FATAL"), x, streaming)


def test_what_a_decoder_carries_over_changes_answers():
    """Why the front end is made anew: without it, the same sound has another score the second time."""
    decoder = PocketSphinx(Settings(grammar="stop | go on | call me", streaming=True))._decoder
    first, _ = (spoken(decoder, x, True) for x in (babble(11), babble(10)))
    assert spoken(decoder, babble(11), True) != first


def test_no_answer_depends_on_padding_and_silence_is_nothing(grammar, capfd):
    x = babble(5, 0.7)
    wide = torch.zeros(3, 20_000)
    wide[0, : len(x)], wide[1, 7] = x, 0.3
    assert grammar.transcribe(wide)[0] == grammar.transcribe(x.unsqueeze(0))[0]
    assert grammar.transcribe(wide)[1:] == ["", ""]
    assert grammar.transcribe(torch.zeros(1, 50)) == [""]
    assert capfd.readouterr() == ("", "")


def test_texts_that_cannot_be_heard(grammar):
    grammar.check_text("Call 911")
    grammar.check_text("don't stop")
    with pytest.raises(UsageError, match=r"can hear 'turn on airplane mode', .* never 'play some music'"):
        grammar.check_text("play some music")
    with pytest.raises(UsageError, match="not in PocketSphinx's dictionary: flurbl, airplan"):
        load('pocketsphinx(keyphrase="flurbl the airplan")')
    with pytest.raises(UsageError, match=r"dictionary: airplan \(close to 'airplan' is 'airplan\w*'\)"):
        load('pocketsphinx(keyphrase="airplan")')
    with pytest.raises(UsageError, match="at least one word"):
        load("pocketsphinx").check_text(" ?! ")


def test_settings():
    table = {"pocketsphinx": Settings}
    for spec in ("pocketsphinx", "pocketsphinx(streaming=True)", 'pocketsphinx(keyphrase="hello", threshold=1e-30)'):
        assert show(parse(spec, table, "recogniser"), table) == load(spec).name == spec
    assert load(PHRASES).notes == (CLOSED,)
    assert load("pocketsphinx").notes == ()
    assert Settings(grammar="Yes | Call 911!").phrases == ("yes", "call nine one one")
    with pytest.raises(UsageError, match="a grammar and a keyphrase"):
        Settings(grammar="yes", keyphrase="no")
    with pytest.raises(UsageError, match="at least one word"):
        Settings(grammar="yes | ")
    with pytest.raises(UsageError, match="threshold is 0"):
        Settings(keyphrase="yes", threshold=0)
    with pytest.raises(UsageError, match="unknown recogniser 'sphinx'"):
        load("sphinx")


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "pocketsphinx", None)
    with pytest.raises(UsageError, match="pip install pocketsphinx"):
        load("pocketsphinx")


def test_a_sound_that_is_too_long_is_refused(grammar):
    with pytest.raises(UsageError, match="lasts 121 s; PocketSphinx is given at most 120 s"):
        grammar.transcribe(torch.full((1, 121 * 16_000), 0.1))


def test_hypotheses_are_ranked():
    ears = load("pocketsphinx")
    x = babble(4, 0.4)
    found = ears.hypotheses(x, 5)
    assert 1 < len(found) <= 5
    assert all(isinstance(one, Hypothesis) for one in found)
    assert [one.score for one in found] == sorted((one.score for one in found), reverse=True)
    assert len({one.text for one in found}) == len(found)
    assert ears.transcribe(x.unsqueeze(0))[0] in {one.text for one in found}
