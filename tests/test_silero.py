"""Silero VAD as a classifier: the package's own answers, sounds that end, silence, and attacks that evade it."""

import importlib.metadata
import shutil
import subprocess

import numpy as np
import pytest
import torch

from advkit import UsageError, models, run
from advkit.attacks import PGD
from advkit.models import silero
from advkit.models.silero import CHUNK, CONTEXT
from advkit.sound import wav
from advkit.sound.threats import Snr


@pytest.fixture(scope="module")
def detector():
    pytest.importorskip("onnx")
    try:
        silero.weights()
    except UsageError:
        pytest.skip("silero-vad is not installed")
    return silero.load().requires_grad_(False)


@pytest.fixture(scope="module")
def speech(tmp_path_factory):
    """Somebody says something, a second of it, with digital silence after it."""
    if shutil.which("flite") is None:
        pytest.skip("flite is not installed")
    file = tmp_path_factory.mktemp("speech") / "said.wav"
    subprocess.run(["flite", "-voice", "rms", "-t", "good morning everyone", "-o", str(file)], check=True)
    return wav.read(file, 16_000)[0][:16_000].unsqueeze(0)


def test_speech_is_told_from_noise_and_from_silence(detector, speech):
    rng = torch.Generator().manual_seed(0)
    noise = 0.05 * torch.randn(1, 16_000, generator=rng)
    assert detector(torch.cat([speech, noise, torch.zeros_like(noise)])).argmax(1).tolist() == [1, 0, 0]


def test_an_answer_does_not_depend_on_the_batch(detector, speech):
    short = speech[:, :9000]
    batch = torch.zeros(2, 20_001)
    batch[0, :9000], batch[1, :16_000] = short, speech
    alone = torch.cat([detector(short), detector(speech)])
    assert torch.allclose(detector(batch), alone, atol=1e-4)


def test_the_logit_is_that_of_the_loudest_chunk(detector, speech):
    chunks = detector.chunks(speech)
    assert chunks.shape == (1, -(-speech.shape[1] // CHUNK))
    assert float(detector(speech)[0, 1]) == pytest.approx(float(chunks.max()), abs=1e-5)
    assert float(detector(speech)[0, 0]) == 0


def test_the_gradient_is_finite_on_silence_and_reaches_every_chunk_of_speech(detector, speech):
    x = torch.cat([speech, torch.zeros_like(speech)]).requires_grad_(True)
    (g,) = torch.autograd.grad(detector(x)[:, 1].sum(), x)
    assert g.isfinite().all()
    said = detector.chunks(speech)[0] > detector.chunks(speech).max() - 3
    moved = g[0].unfold(0, CHUNK, CHUNK).norm(dim=1)
    assert bool((moved[said[: len(moved)]] > 0).all())


def test_voice_detection_is_evaded_through_the_kernel(detector, speech):
    model = models.load("silero-vad")
    result = run(PGD(20, loss="margin"), model.module, speech, torch.tensor([1]), Snr(10))
    assert bool(result.success.all())
    assert model.module(wav.quantised(result.x_adv)).argmax(1).tolist() == [0]
    ratio = 20 * (speech.norm() / (result.x_adv - speech).norm()).log10()
    assert float(ratio) >= 10 - 1e-3


def test_other_shapes_are_refused(detector):
    with pytest.raises(UsageError, match=r"silero-vad hears sounds \(N, T\)"):
        detector(torch.zeros(2, 1, 512))


def test_without_the_package_there_is_a_sentence(monkeypatch):
    def missing(_):
        raise importlib.metadata.PackageNotFoundError

    monkeypatch.setattr(importlib.metadata, "files", missing)
    with pytest.raises(UsageError, match="weights of silero-vad are not here; pip install"):
        models.load("silero-vad")


def test_other_weights_are_refused(detector, monkeypatch):
    monkeypatch.setattr(silero, "_arrays", lambda file: {})
    with pytest.raises(UsageError, match="holds other weights than those of silero-vad"):
        silero.load()


@pytest.mark.slow
def test_probabilities_are_those_of_the_package(detector, speech):
    """Its own ONNX file, a chunk at a time with the state in between, as it is deployed."""
    runtime = pytest.importorskip("onnxruntime")
    session = runtime.InferenceSession(str(silero.weights().with_name("silero_vad.onnx")))
    rng = torch.Generator().manual_seed(0)
    for x in (speech[0].numpy(), (0.1 * torch.randn(10_000, generator=rng)).numpy()):
        state, context, expected = np.zeros((2, 1, 128), np.float32), np.zeros((1, CONTEXT), np.float32), []
        for chunk in np.pad(x, (0, -len(x) % CHUNK)).reshape(-1, 1, CHUNK):
            heard = np.concatenate([context, chunk], 1)
            p, state = session.run(None, {"input": heard, "state": state, "sr": np.array(16_000)})
            context = heard[:, -CONTEXT:]
            expected.append(float(p[0, 0]))
        ours = detector.chunks(torch.from_numpy(x).unsqueeze(0)).sigmoid()[0]
        assert np.allclose(ours.numpy(), expected, atol=1e-4)
