"""C&W on speech: the optimum of a recogniser that is known, on CTC, on Whisper in two phases."""

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from advkit.attacks.audio.cw import Repair, SpeechCW
from advkit.attacks.audio.phases import Filed, quietest
from advkit.audio.ctc import CTC
from advkit.audio.recogniser import Recogniser, goal
from advkit.engine import perturb, run
from advkit.errors import UsageError
from advkit.sound import wav
from advkit.sound.threats import Level, Snr

SHARED = Path(__file__).parents[2] / "shared"


class Linear(Recogniser):
    """Says "yes" where w @ x > b, else "no"."""

    name = "linear"

    def __init__(self, w, b):
        super().__init__()
        self.w, self.b = w, b

    def forward(self, x):
        score = x @ self.w - self.b
        return torch.stack([score, -score], 1)

    def text(self, outputs):
        return ["yes" if row[0] > row[1] else "no" for row in outputs]

    def loss(self, outputs, texts):
        return nn.functional.cross_entropy(
            outputs, torch.tensor([["yes", "no"].index(text) for text in texts]), reduction="none"
        )


def linear(seed=0, n=3, T=400):
    rng = torch.Generator().manual_seed(seed)
    w, x = torch.randn(T, generator=rng, dtype=torch.float64), torch.randn(n, T, generator=rng, dtype=torch.float64) / 9
    return Linear(w, float((x @ w).max()) + 4), x


@pytest.mark.parametrize(("threat", "p", "q"), [(Snr(), 2.0, 2.0), (Level(), math.inf, 1.0)])
def test_the_quietest_of_a_linear_recogniser(threat, p, q):
    recogniser, x = linear()
    y = torch.zeros(3, dtype=torch.int64)
    result = run(SpeechCW(steps=150), recogniser, x, y, threat, goal=goal(recogniser, ["yes"], targeted=True))
    far = (recogniser.b - x @ recogniser.w) / torch.linalg.vector_norm(recogniser.w, q) / torch.linalg.vector_norm(x, p, dim=1)
    assert result.success.all()
    assert (result.distance >= far - 1e-9).all()
    assert (result.distance <= 1.3 * far).all()


def test_rows_are_attacked_alone():
    recogniser, x = linear()
    x[1, 300:] = 0
    y = torch.zeros(3, dtype=torch.int64)
    attack, aim = SpeechCW(steps=30), goal(recogniser, ["yes"], targeted=True)
    together = run(attack, recogniser, x, y, Snr(), goal=aim)
    for row in range(3):
        n = 300 if row == 1 else 400
        padded = nn.functional.pad(x[row : row + 1, :n], (0, 400 - n))
        alone = run(attack, recogniser, padded, y[:1], Snr(), goal=aim)
        torch.testing.assert_close(alone.distance, together.distance[row : row + 1])
    assert (together.x_adv[1, 300:] == 0).all()


def test_inside_a_radius_the_first_success_ends_it_and_nothing_is_louder():
    recogniser, x = linear()
    y, aim = torch.zeros(3, dtype=torch.int64), goal(recogniser, ["yes"], targeted=True)
    result = run(SpeechCW(steps=100), recogniser, x, y, Snr(0), goal=aim)
    assert result.success.all()
    assert (result.forwards < 100).all()
    none = run(SpeechCW(steps=20), recogniser, x, y, Snr(80), goal=aim)
    assert not none.success.any()
    last = perturb(SpeechCW(steps=20), recogniser, x, y, Snr(40), goal=aim, rng=torch.Generator())
    snr = 20 * (x.norm(dim=1) / (last - x).norm(dim=1)).log10()
    assert (snr >= 40 - 1e-6).all()


class Tones(nn.Module):
    """Hears a letter for each of three tones, in frames of 16 samples."""

    rate, alphabet = 8000, ("", "a", "b", "c")

    def frames(self, n):
        return n // 16

    def forward(self, x):
        tones = torch.cos(math.pi / 8 * torch.outer(torch.tensor([2.0, 4.0, 6.0]), torch.arange(16))).unsqueeze(1)
        loud = nn.functional.conv1d(x.unsqueeze(1), tones, stride=16).square()
        return torch.cat([torch.full_like(loud[:, :1], 5), 20 * loud], 1).mT.log_softmax(2)


@pytest.mark.parametrize("threats", [(Snr(), Snr(0)), (Level(), Level(0))])
def test_a_ctc_network_says_the_text_and_the_search_is_quieter_than_the_first_success(threats):
    recogniser = CTC(Tones())
    x = torch.randn(4, 320, generator=torch.Generator().manual_seed(1)) / 9
    texts = ["abc", "cab", "aab", "cb"]
    aim, y = goal(recogniser, texts, targeted=True), torch.arange(4)
    results = [quietest(SpeechCW(steps=250), recogniser, x, y, threat, goal=aim) for threat in threats]
    for result in results:
        assert result.success.all()
        assert recogniser.transcribe(wav.quantised(result.x_adv)) == texts
    assert (results[0].distance < results[1].distance).all()


def test_rounding_to_a_file_is_heard_and_lets_gradients_pass():
    recogniser, x = linear()
    x.requires_grad_(True)
    outputs = Filed(recogniser)(x)
    torch.testing.assert_close(outputs, recogniser(wav.quantised(x)))
    (g,) = torch.autograd.grad(outputs[:, 0].sum(), x)
    torch.testing.assert_close(g, recogniser.w.expand_as(g))


def test_a_repair_begins_with_what_was_found():
    recogniser, x = linear()
    y, aim = torch.zeros(3, dtype=torch.int64), goal(recogniser, ["yes"], targeted=True)
    attack = SpeechCW(steps=100, repair=1)
    found = run(attack, recogniser, x, y, Snr(), goal=aim)
    again = run(attack.after(found), recogniser, x, y, Snr(), goal=aim)
    assert isinstance(attack.after(found), Repair)
    assert (again.distance <= found.distance * (1 + 1e-6)).all()
    # A recogniser that is a little harder to persuade.
    harder = Linear(recogniser.w, recogniser.b + 0.5)
    repaired = run(SpeechCW(repair=25).after(found), harder, x, y, Snr(), goal=goal(harder, ["yes"], targeted=True))
    assert repaired.success.all()
    assert (repaired.distance <= 1.25 * found.distance).all()


@pytest.mark.parametrize("settings", [{"steps": 0}, {"lr": 0.0}, {"c": -1.0}, {"repair": 0}])
def test_settings_that_make_no_sense(settings):
    with pytest.raises(UsageError, match=f"cw: {next(iter(settings))}"):
        SpeechCW(**settings)


@pytest.mark.slow
def test_whisper_hears_another_sentence_in_a_file(tmp_path):
    pytest.importorskip("transformers")
    from advkit.audio import loading

    model, folder = SHARED / "models" / "whisper-tiny", SHARED / "data" / "speech" / "librispeech10"
    if not model.is_dir() or not folder.is_dir():
        pytest.skip(f"{model} or {folder} is not here")
    recogniser = loading.load(f"whisper:{model}")
    x = wav.read(next(folder.rglob("5142-36377-0007.wav")), 16_000)[0][None, :48_000]
    target = "open the front door"
    aim, y = goal(recogniser, [target], targeted=True), torch.zeros(1, dtype=torch.int64)
    result = quietest(SpeechCW(steps=60, repair=15), recogniser, x, y, Snr(15), goal=aim)
    assert result.success.all()
    # The stand-in's steps, and the recogniser's own.
    assert int(result.forwards) > int(result.checks)
    wav.write(tmp_path / "adversarial.wav", result.x_adv[0], 16_000)
    x_adv, _ = wav.read(tmp_path / "adversarial.wav", 16_000)
    assert recogniser.transcribe(x_adv[None]) == [target]
    assert 20 * float((x.norm() / (x_adv - x).norm()).log10()) > 14.9
