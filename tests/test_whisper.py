"""Whisper: features, tokens and losses against transformers and openai-whisper, and what a short context changes."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

pytest.importorskip("transformers")

from advkit.audio import whisper_engines
from advkit.audio.loading import is_recogniser, load
from advkit.audio.text import normalise
from advkit.audio.whisper import written
from advkit.errors import UsageError
from advkit.sound import wav

SHARED = Path(__file__).parents[2] / "shared"
SPECIALS = ("endoftext", "startoftranscript", "notimestamps")
SIZES = {"encoder_layers": 2, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
DIMS = {"encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "d_model": 16, "max_source_positions": 50, "max_target_positions": 24}


def tokenizer():
    """A sign a token."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    signs = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = Tokenizer(models.BPE({sign: i for i, sign in enumerate(signs)}, []))
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokens.decoder = decoders.ByteLevel()
    tokens.add_special_tokens([AddedToken(f"<|{name}|>") for name in SPECIALS])
    return tokens


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small Whisper with random weights that hears one second."""
    from transformers import GenerationConfig, WhisperConfig, WhisperForConditionalGeneration

    path = tmp_path_factory.mktemp("whisper") / "small"
    tokens = tokenizer()
    ids = {name: tokens.token_to_id(f"<|{name}|>") for name in SPECIALS}
    ends = {"bos_token_id": 256, "eos_token_id": 256, "pad_token_id": 256, "decoder_start_token_id": 257}
    # The letters of two words, the signs of a text and the end: other tokens are never written.
    allowed = {*tokens.encode("oneOtw .,2").ids, 256}
    rules = {"suppress_tokens": [i for i in range(259) if i not in allowed], "begin_suppress_tokens": [256], "max_length": 15}
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = WhisperForConditionalGeneration(WhisperConfig(vocab_size=259, **SIZES, **DIMS, **ends))
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.6)
        # Tokens of one length, and places that matter: else it writes one letter for ever.
        embedding = model.model.decoder.embed_tokens.weight.data
        embedding /= embedding.norm(dim=1, keepdim=True)
        model.model.decoder.embed_positions.weight.data *= 2
    model.generation_config = GenerationConfig(**ends, **rules, no_timestamps_token_id=ids["notimestamps"])
    model.save_pretrained(path, safe_serialization=True)
    tokens.save(str(path / "tokenizer.json"))
    return path


@pytest.fixture(scope="module")
def small(folder):
    return load(f"whisper:{folder}").requires_grad_(False)


def sounds(n, seconds=1.0, seed=0):
    return torch.randn(n, round(16_000 * seconds), generator=torch.Generator().manual_seed(seed)) / 9


def test_features_are_those_of_transformers_and_of_openai(small):
    from transformers import WhisperFeatureExtractor

    x = sounds(2)
    x[1, 9000:] = 0
    theirs = WhisperFeatureExtractor(chunk_length=1)(list(x.numpy()), sampling_rate=16_000, return_tensors="pt")
    torch.testing.assert_close(small.features(x), theirs.input_features, atol=1e-4, rtol=0)
    audio = pytest.importorskip("whisper").audio
    torch.testing.assert_close(small.features(x[:1]), audio.log_mel_spectrogram(x[:1], 80), atol=1e-4, rtol=0)


def test_tokens_are_those_that_transformers_generates(folder, small):
    from transformers import WhisperForConditionalGeneration

    model = WhisperForConditionalGeneration.from_pretrained(folder).eval()
    x = sounds(6, seed=1)
    prompt = torch.tensor([small.prompt])
    for row in x:
        features = small.features(row[None])
        rules = {"do_sample": False, "num_beams": 1, "return_timestamps": False}
        ids = model.generate(features, decoder_input_ids=prompt, **rules)[0].tolist()
        wanted = [i for i in ids if i < 256]
        assert small.tokens(small(row[None])) == [wanted]
    assert small.tokens(small(x)) == [small.tokens(small(row[None]))[0] for row in x]


@settings(deadline=None, max_examples=8)
@given(seed=st.integers(0, 10**6), other=st.sampled_from(["one", "two", "one two", "two one"]))
def test_saying_without_decoding_is_decoding(small, seed, other):
    states = 3 * torch.randn(3, 50, 16, generator=torch.Generator().manual_seed(seed))
    heard = small.text(states)
    for texts in (heard, [other] * 3, [text + "e" for text in heard]):
        known = [text or "one" for text in texts]
        assert small.says(states, known).tolist() == [text == said for text, said in zip(known, heard, strict=True)]


class Likes:
    """Greedy decoding of an engine that writes a given text, whatever it hears."""

    def __init__(self, engine, text):
        self.engine, self.said = engine, [*engine.ids(text), engine.special("endoftext")]

    def __getattr__(self, name):
        return getattr(self.engine, name)

    def logits(self, tokens, states):
        at = torch.tensor([0, *range(len(self.said)), *[len(self.said) - 1] * 30])[: tokens.shape[1]]
        return torch.nn.functional.one_hot(torch.tensor(self.said)[at], 259).float().expand(len(tokens), -1, -1)

    def decoding(self, states):
        import contextlib

        left = iter(self.said)

        def step(tokens):
            return torch.nn.functional.one_hot(torch.tensor([next(left)]), 259).float()

        return contextlib.nullcontext(step)


@pytest.mark.parametrize(("text", "said"), [(" One two.", True), (" one, TWO", True), (" One 2.", True), (" One tw.", False)])
def test_a_text_in_other_signs_is_said_too(small, text, said):
    from advkit.audio.whisper import Whisper

    config = {"num_mel_bins": 80, "max_source_positions": 50, "max_target_positions": 24, "vocab_size": 259}
    recogniser = Whisper(Likes(small.engine, text), config, {}, "whisper:likes")
    assert recogniser.says(torch.zeros(1, 50, 16), ["one two"]).tolist() == [said]


def test_the_loss_is_the_probability_of_the_text(small):
    states = small(sounds(2))
    ids = [*small.engine.ids(" One."), small.end]
    total = 0.0
    with small.engine.decoding(states[:1]) as step:
        new = torch.tensor([small.prompt])
        for k, i in enumerate(ids):
            total -= float((step(new) + small.never[min(k, 1)]).log_softmax(1)[0, i])
            new = torch.tensor([[i]])
    # A longer text beside it changes nothing.
    assert float(small.loss(states, ["one", "one two two"])[0]) == pytest.approx(total, rel=1e-4)


def test_trailing_zeros_and_sounds_that_are_too_long(small):
    x = sounds(2, seconds=0.5)
    padded = torch.cat([x, torch.zeros(2, 20_000)], 1)
    torch.testing.assert_close(small(padded), small(x), rtol=0, atol=0)
    with pytest.raises(UsageError, match=r"the sound lasts 1\.5 s; whisper:small hears 1 s at once"):
        small(sounds(1, seconds=1.5))


def test_gradients_reach_every_part_of_the_sound(small):
    x = sounds(2, seconds=0.5).requires_grad_(True)
    (g,) = torch.autograd.grad(small.loss(small(x), ["one", "two"]).sum(), x)
    assert g.isfinite().all()
    assert (g.unflatten(1, (10, -1)).abs().amax(2) > 0).all()


def test_both_engines_agree(folder, small):
    pytest.importorskip("whisper")
    engine, config, generation = whisper_engines.openai(folder)
    assert config["d_model"] == 16
    assert generation["max_length"] == 15
    engine = engine.eval()
    states = small(sounds(2))
    torch.testing.assert_close(engine.encode(small.features(sounds(2))), states, atol=1e-4, rtol=1e-4)
    tokens = torch.tensor([[257, 258, 5, 7], [257, 258, 9, 9]])
    torch.testing.assert_close(engine.logits(tokens, states), small.engine.logits(tokens, states), atol=1e-3, rtol=1e-4)
    with engine.decoding(states) as step, small.engine.decoding(states) as other:
        for part in (tokens[:, :2], tokens[:, 2:3], tokens[:, 3:]):
            torch.testing.assert_close(step(part), other(part), atol=1e-3, rtol=1e-4)


def test_folders_that_are_no_whisper(folder, tmp_path, monkeypatch):
    assert is_recogniser(f"whisper:{folder}")
    with pytest.raises(UsageError, match="there is no folder nowhere; write whisper:FOLDER"):
        load("whisper:nowhere")
    with pytest.raises(UsageError, match="cannot read"):
        load(f"whisper:{tmp_path}")
    (tmp_path / "config.json").write_text('{"model_type": "whisper"}')
    with pytest.raises(UsageError, match="pickled weights are not loaded"):
        load(f"whisper:{tmp_path}")
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(UsageError, match="a model of type 'vit'"):
        load(f"whisper:{tmp_path}")
    monkeypatch.setattr(whisper_engines, "_has", lambda package: False)
    with pytest.raises(UsageError, match=r'run pip install "advkit\[hf\]"'):
        load(f"whisper:{folder}")


def test_texts_that_it_cannot_say(small):
    with pytest.raises(UsageError, match=r"has 17 tokens; whisper:small writes fewer than 15"):
        small.check_text("one two one two")
    with pytest.raises(UsageError, match="signs that whisper:small never writes"):
        small.check_text("hello")
    with pytest.raises(UsageError, match="at least one word"):
        small.check_text("...")
    small.check_text("one two")


@pytest.fixture(scope="module")
def tiny():
    path = SHARED / "models" / "whisper-tiny"
    if not path.is_dir():
        pytest.skip(f"{path} is not here")
    return path


def clips(count):
    folder = SHARED / "data" / "speech" / "librispeech10"
    lines = [line.split(",") for line in (folder / "read_data.txt").read_text().splitlines()]
    for name, text in list(zip(lines[0], lines[1], strict=True))[:count]:
        yield wav.read(next(folder.rglob(Path(name).name)), 16_000)[0].unsqueeze(0), normalise(text)


@pytest.mark.slow
def test_tokens_of_real_clips_are_those_of_openai_whisper(tiny):
    whisper = pytest.importorskip("whisper")
    recogniser = load(f"whisper:{tiny}")
    engine, _, _ = whisper_engines.openai(tiny)
    right = 0
    for x, text in clips(4):
        options = whisper.DecodingOptions(language="en", without_timestamps=True, fp16=False)
        reference = whisper.decode(engine.model, recogniser.features(x), options)[0]
        outputs = recogniser(x)
        assert recogniser.tokens(outputs) == [reference.tokens]
        assert recogniser.says(outputs, [reference.text]).all()
        right += recogniser.text(outputs) == [text]
    assert right >= 2


@pytest.mark.slow
def test_tokens_of_real_clips_are_those_of_transformers(tiny):
    from transformers import WhisperForConditionalGeneration

    recogniser = load(f"whisper:{tiny}")
    model = WhisperForConditionalGeneration.from_pretrained(tiny, dtype=torch.float32).eval()
    settings = json.loads((tiny / "generation_config.json").read_text())
    for x, _ in clips(4):
        ids = model.generate(
            recogniser.features(x),
            decoder_input_ids=torch.tensor([recogniser.prompt]),
            suppress_tokens=settings["suppress_tokens"],
            begin_suppress_tokens=settings["begin_suppress_tokens"],
        )[0].tolist()
        assert recogniser.tokens(recogniser(x)) == [[i for i in ids if i < recogniser.end]]


def test_how_texts_are_written():
    assert written("the more i know") == " The more I know."


@pytest.mark.parametrize("own", [False, True], ids=["transformers", "openai"])
def test_remembered_silence(folder, small, own):
    from advkit.audio.whisper import Nearly, Whisper

    if own:
        pytest.importorskip("whisper")
    x = nn.functional.pad(sounds(1, seconds=0.3), (0, 3000))
    config, generation = ({"num_mel_bins": 80, "max_source_positions": 50, "max_target_positions": 24, "vocab_size": 259}, {})
    engine = whisper_engines.openai(folder)[0].eval().requires_grad_(False) if own else small.engine
    recogniser = Whisper(engine, config, generation, "whisper:small")
    nearly = Nearly(recogniser, 0.3, every=2)
    nearly.frames = 20
    x.requires_grad_(True)
    near, whole = nearly(x), recogniser(x)
    torch.testing.assert_close(near, whole, atol=1e-4, rtol=1e-4)
    # The sound's own part of the gradient, and of the silence's nothing.
    (g,) = torch.autograd.grad(small.loss(near, ["one"]).sum(), x)
    assert g.isfinite().all()
    assert (g[0, :4000] != 0).any()
    louder = (2 * x).detach()
    second, third = nearly(louder), nearly(louder)
    torch.testing.assert_close(second[:, 20:], whole[:, 20:], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(third, recogniser(louder), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(second, third, atol=1e-3)
