"""CTC: texts and losses against counting all alignments, the networks of transformers, and advkit's own."""

import itertools
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from advkit.audio.ctc import CTC
from advkit.audio.loading import RECOGNISERS, is_recogniser, load
from advkit.errors import UsageError
from advkit.models import checkpoint, networks

SIGNS = ("", " ", "a", "b")


class Table(nn.Module):
    """A frame a sample, whose log-probabilities are a table's."""

    rate, alphabet = 16_000, SIGNS

    def __init__(self, scores):
        super().__init__()
        self.scores = scores

    def frames(self, n):
        return n

    def forward(self, x):
        return self.scores[: x.shape[1]].log_softmax(1).expand(len(x), -1, -1)


def outputs(frames, seed, n=1):
    scores = 2 * torch.randn(frames, len(SIGNS), generator=torch.Generator().manual_seed(seed))
    recogniser = CTC(Table(scores))
    return recogniser, recogniser(torch.ones(n, frames))


def collapsed(path):
    return "".join(SIGNS[i] for i, _ in itertools.groupby(path))


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 10**6), text=st.sampled_from(["a", "ab", "a b", "aa", "bab"]))
def test_the_loss_sums_over_all_alignments(seed, text):
    recogniser, said = outputs(5, seed)
    paths = [path for path in itertools.product(range(4), repeat=5) if collapsed(path) == text]
    total = sum(math.exp(sum(float(said[0, t, i]) for t, i in enumerate(path))) for path in paths)
    assert float(recogniser.loss(said, [text])) == pytest.approx(-math.log(total), rel=1e-4)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 10**6), silence=st.integers(1, 4))
def test_trailing_zeros_change_neither_text_nor_loss_nor_gradient(seed, silence):
    scores = torch.randn(9, len(SIGNS), generator=torch.Generator().manual_seed(seed), requires_grad=True)
    recogniser = CTC(Table(scores))
    answers = []
    for x in (torch.ones(1, 5), torch.cat([torch.ones(1, 5), torch.zeros(1, silence)], 1)):
        said = recogniser(x)
        loss = recogniser.loss(said, ["ab"])
        (g,) = torch.autograd.grad(loss.sum(), scores)
        answers.append((recogniser.text(said), loss.detach(), g))
    assert answers[0][0] == answers[1][0]
    torch.testing.assert_close(answers[0][1:], answers[1][1:])


def test_what_is_said_is_the_likeliest_sign_without_repetitions_and_blanks():
    path = [2, 2, 0, 2, 1, 0, 3, 3, 1]
    recogniser = CTC(Table(9 * torch.eye(4)[path]))
    said = recogniser(torch.ones(2, len(path)))
    assert recogniser.text(said) == ["aa b", "aa b"]
    assert recogniser.says(said, ["AA b!", "ab"]).tolist() == [True, False]


def test_texts_that_cannot_be_said():
    recogniser, said = outputs(3, 0)
    with pytest.raises(UsageError, match=r"needs 4 frames and the sound has 3"):
        recogniser.loss(said, ["abb"])
    with pytest.raises(UsageError, match=r"\['c'\], which the network cannot say; it says ' ab'"):
        recogniser.check_text("a cab")
    with pytest.raises(UsageError, match="at least one word"):
        recogniser.check_text("!")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small wav2vec2 with random weights."""
    pytest.importorskip("transformers")
    from transformers import Wav2Vec2Config, Wav2Vec2ForCTC

    path = tmp_path_factory.mktemp("ctc") / "wav2vec2"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        parts = {"conv_dim": (8, 8), "conv_kernel": (10, 3), "conv_stride": (5, 2), "num_feat_extract_layers": 2}
        other = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "vocab_size": 5, "pad_token_id": 1}
        model = Wav2Vec2ForCTC(Wav2Vec2Config(**sizes, **parts, **other))
    model.save_pretrained(path, safe_serialization=True)
    (path / "vocab.json").write_text(json.dumps({"<s>": 0, "<pad>": 1, "|": 2, "A": 3, "B": 4}))
    (path / "preprocessor_config.json").write_text(json.dumps({"do_normalize": True, "sampling_rate": 8000}))
    return path


def test_a_network_of_transformers(folder):
    from transformers import AutoModelForCTC

    recogniser = load(f"ctc:{folder}")
    assert (recogniser.rate, recogniser.blank, recogniser.signs) == (8000, 1, ["", "", " ", "a", "b"])
    x = torch.randn(2, 400, generator=torch.Generator().manual_seed(1)) / 9
    x[1, 300:] = 0
    said = recogniser(x)
    model = AutoModelForCTC.from_pretrained(folder).eval()
    for row, n in ((0, 400), (1, 300)):
        alone = x[row : row + 1, :n]
        alone = (alone - alone.mean()) / (alone.var(correction=0) + 1e-7).sqrt()
        wanted = model(alone).logits.log_softmax(2)
        torch.testing.assert_close(said[row, : wanted.shape[1]], wanted[0])
        assert int((said[row].exp()[:, 1] < 1).sum()) == wanted.shape[1]
    x.requires_grad_(True)
    (g,) = torch.autograd.grad(recogniser.loss(recogniser(x), ["ab", "b a"]).sum(), x)
    assert (g[0] != 0).any()
    assert (g[1, :300] != 0).any()
    assert (g[1, 300:] == 0).all()
    with pytest.raises(UsageError, match="too few for a frame"):
        recogniser(torch.ones(1, 5))


def test_pickled_weights_and_wrong_folders_are_refused(folder, tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UsageError, match="pickled weights are not loaded"):
        load(f"ctc:{tmp_path}")
    with pytest.raises(UsageError, match="there is no folder nowhere"):
        load("ctc:nowhere")


def test_the_network_that_advkit_trains(tmp_path):
    path = tmp_path / "digits.safetensors"
    network = networks.build("speech-ctc(width=8)")
    checkpoint.save(path, network, "speech-ctc(width=8)")
    recogniser = load(str(path))
    assert is_recogniser(str(path))
    assert recogniser.rate == 8000
    x = torch.randn(2, 4000, generator=torch.Generator().manual_seed(0)) / 9
    x[1, 3000:] = 0
    said, frames = recogniser(x), network.frames(torch.tensor([4000, 3000])).tolist()
    torch.testing.assert_close(said[0, : frames[0]], network.eval()(x)[0, : frames[0]])
    alone = recogniser(x[1:, :3000])
    torch.testing.assert_close(said[1, : frames[1]], alone[0, : frames[1]])
    torch.testing.assert_close(recogniser.loss(said, ["one two", "three"])[1:], recogniser.loss(alone, ["three"]))
    checkpoint.save(path, networks.build("keyword-cnn"), "keyword-cnn")
    assert not is_recogniser(str(path))
    with pytest.raises(UsageError, match="holds a classifier"):
        load(str(path))


def test_a_function_of_the_users(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("def hear(x):\n    assert x.dtype == 'float32'\n    return f'Yes, {len(x)}!'\n")
    recogniser = load(f"text:{path}:hear")
    assert recogniser.transcribe(torch.tensor([[0.1] * 7 + [0.0] * 3])) == ["yes seven"]


@pytest.mark.parametrize("spec", ["wisper:folder", "pocket", "text"])
def test_unknown_recognisers(spec):
    assert not is_recogniser(spec)
    with pytest.raises(UsageError, match=f"unknown recogniser '{spec}'; a recogniser is one of {next(iter(RECOGNISERS))}"):
        load(spec)
    with pytest.raises(UsageError, match=r"names nothing; write text:FILE\.py:FUNCTION"):
        load("text:")
