import dataclasses
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from advkit import data as data_by_name
from advkit.attacks import PGD
from advkit.audio.ctc import CTC
from advkit.audio.recogniser import goal
from advkit.audio.text import wer
from advkit.benchmarks.tradeoff import tradeoff
from advkit.cli import main
from advkit.data import from_tensors
from advkit.data.sounds import strings
from advkit.defenses import named
from advkit.defenses.adversary import LEAST, ramped
from advkit.engine import perturb, run
from advkit.errors import UsageError
from advkit.models import checkpoint
from advkit.models.networks import build
from advkit.models.spoken import ALPHABET, LogMel, Varied
from advkit.norms import lp_norm
from advkit.recipe import Recipe
from advkit.threat import Level, Masking, Rotation, Snr
from advkit.train import Spelling, accuracy, plain, train, word_error_rate

RATE = 2000
FSDD = Path(__file__).parents[1].parent / "shared" / "data" / "fsdd"
needs_fsdd = pytest.mark.skipif(not FSDD.is_dir(), reason="the spoken digits are not in ../shared/data")
NETWORKS = {"keyword-cnn": f"keyword-cnn(rate={RATE}, words=3, width=4)", "speech-ctc": f"speech-ctc(rate={RATE}, width=16)"}


def sounds(n=4, size=600, seed=0):
    """Noises of different lengths."""
    x = 0.2 * torch.randn(n, size, generator=torch.Generator().manual_seed(seed)).clamp(-4, 4)
    for i in range(n):
        x[i, size - 50 * i :] = 0
    return x


def tones(n=60, seed=0):
    """Three words, which are three pitches with some noise, as data."""
    rng = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 3
    time = torch.arange(400) / RATE
    x = 0.3 * torch.sin(2 * math.pi * (150 + 250 * y).unsqueeze(1) * time) + 0.02 * torch.randn(n, 400, generator=rng)
    x *= torch.arange(400) < torch.randint(250, 400, (n, 1), generator=rng)
    return dataclasses.replace(from_tensors(x, y, "tones", -1.0, 1.0, ["low", "mid", "top"]), rate=RATE)


def network(name):
    """A network with fresh weights; of one that spells, the recogniser that it is."""
    model = build(NETWORKS[name]).eval()
    return CTC(model).eval() if name == "speech-ctc" else model


@pytest.mark.parametrize("name", NETWORKS)
def test_no_answer_depends_on_the_batch(name):
    x, model = sounds(), network(name)
    with torch.no_grad():
        together, padded = model(x), model(F.pad(x, (0, 777)))
        alone = [model(one[None, : len(one) - 50 * i])[0] for i, one in enumerate(x)]
    for i, one in enumerate(alone):
        torch.testing.assert_close(together[i, : len(one)], one, rtol=0, atol=1e-5)
        torch.testing.assert_close(padded[i, : len(one)], one, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", NETWORKS)
@settings(max_examples=10, deadline=None)
@given(st.floats(-30, 6))
def test_no_answer_depends_on_how_loud_a_sound_is(name, db):
    x, model = sounds(2), network(name)
    with torch.no_grad():
        torch.testing.assert_close(model(x * 10 ** (db / 20)), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_are_finite_and_stop_at_the_end_of_a_sound(name):
    x = sounds().requires_grad_()
    network(name)(x).sum().backward()
    assert x.grad.isfinite().all()
    # The last frame's window, 64 samples long, has its middle at 450.
    assert (x.grad[3, 482:] == 0).all()
    assert (x.grad[:, :400] != 0).any(1).all()


def test_frames_are_those_of_the_answer():
    model = build(NETWORKS["speech-ctc"]).eval()
    for n in (100, 599, 600, 601, 1000):
        assert model(torch.ones(1, n)).shape == (1, int(model.frames(torch.tensor(n))), len(ALPHABET))
    with torch.no_grad():
        torch.testing.assert_close(model(sounds()).exp().sum(2), torch.ones(4, 13), rtol=0, atol=1e-5)


def test_a_varied_spectrum_keeps_its_kind():
    """Without anything to vary it is the same; with much, it has the same form, and silence stays silence."""
    x = sounds()
    still = LogMel(RATE, 20, 25, varied=Varied(0.0, 0.0, 0.0, 0.0))
    torch.manual_seed(0)
    (there, frames), (here, heard) = still.train()(x), still.eval()(x)
    torch.testing.assert_close(there[:, :, : here.shape[2]], here, rtol=1e-4, atol=1e-3)
    assert torch.equal(frames[:, : heard.shape[1]], heard)
    spectrum, heard = LogMel(RATE, 20, 25, varied=Varied()).train()(x)
    assert spectrum.shape == (4, 20, heard.shape[1])
    assert (spectrum.mT[~heard] == 0).all()
    paces = heard.sum(1) / frames.sum(1)
    assert (paces != 1).any()
    assert ((paces > 0.7) & (paces < 1.3)).all()


def test_training_learns_words_and_is_repeatable():
    data, recipe = tones(), Recipe(epochs=4, batch_size=15, lr=1e-2, weight_decay=0.0, optimizer="adam")
    models = [train(build(NETWORKS["keyword-cnn"]), data, recipe) for _ in range(2)]
    assert accuracy(models[0], tones(30, seed=1)) == (30, 30)
    assert all(torch.equal(a, b) for a, b in zip(*(model.state_dict().values() for model in models), strict=True))


def test_training_learns_to_spell():
    data = strings(tones(), most=1)
    model = build(NETWORKS["speech-ctc"])
    assert isinstance(plain(model, data), Spelling)
    before = word_error_rate(model, data)
    train(model, data, Recipe(epochs=12, batch_size=10, lr=1e-2, weight_decay=0.0, optimizer="adam"), loss=plain(model, data))
    right, of = accuracy(model, data)
    assert (right > of / 2, of) == (True, 60)
    assert word_error_rate(model, data) < 0.5 < before
    recogniser = CTC(model)
    x, y = data.batch(0, of)
    heard = recogniser.transcribe(x)
    assert right == sum(text == data.classes[k] for text, k in zip(heard, y.tolist(), strict=True))
    assert word_error_rate(model, data) == pytest.approx(sum(map(wer, (data.classes[k] for k in y.tolist()), heard)) / of)


def test_what_a_network_cannot_learn_from_is_refused():
    digits, recipe = data_by_name.load("mnist-5k", limit=20), Recipe(epochs=1)
    model = build(NETWORKS["speech-ctc"])
    with pytest.raises(UsageError, match="the network takes waveforms"):
        train(model, digits, recipe)
    with pytest.raises(
        UsageError, match="has 8000 samples a second and the network takes 2000; build it for that, with rate=8000"
    ):
        train(model, dataclasses.replace(tones(), rate=8000), recipe)
    with pytest.raises(UsageError, match="has no names of classes"):
        train(model, dataclasses.replace(tones(), classes=()), recipe)
    with pytest.raises(UsageError, match="cannot say"):
        train(model, dataclasses.replace(tones(), classes=("a", "b", "\N{GREEK SMALL LETTER OMEGA}")), recipe)
    with pytest.raises(UsageError, match="rate is 100"):
        build("keyword-cnn(rate=100)")


@pytest.mark.parametrize("threat", [Snr(20), Level(-30)])
@pytest.mark.parametrize("defense", ["pgd(steps=2)", "pgd(steps=2, ramp=0.5)", "trades(steps=2)", "mart(steps=2)"])
def test_a_defense_learns_inside_a_threat_in_decibels(threat, defense):
    data, recipe = tones(30), Recipe(epochs=1, batch_size=15, lr=1e-3, optimizer="adam")
    model = build(NETWORKS["keyword-cnn"])
    before = [parameter.clone() for parameter in model.parameters()]
    train(model, data, recipe, loss=named(defense, threat))
    assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("threat", [Snr(20), Level(-30)])
def test_training_sees_what_the_threat_allows(threat):
    x, model = sounds(), network("keyword-cnn")
    x_adv = perturb(PGD(3), model, x, torch.zeros(4, dtype=torch.int64), threat, rng=torch.Generator().manual_seed(0))
    size = lp_norm(x_adv - x, threat.p) / lp_norm(x, threat.p)
    assert ((size <= threat.eps * (1 + 1e-5)) & (size > threat.eps / 2)).all()
    assert (x_adv[3, 450:] == 0).all()


@pytest.mark.parametrize("threat", [Snr(20), Level(-30), Masking(0)])
def test_a_ramp_is_of_the_radius(threat):
    for at, share in ((0.0, LEAST), (0.25, 0.5), (0.5, 1.0), (1.0, 1.0)):
        assert ramped(threat, 0.5, at).eps == pytest.approx(share * threat.eps)
    with pytest.raises(UsageError, match="single radius"):
        ramped(Rotation(), 0.5, 0.1)


def test_the_kernel_attacks_what_spells():
    recogniser, x = network("speech-ctc"), sounds()
    said = recogniser.transcribe(x)
    found = run(PGD(10), recogniser, x, torch.arange(4), Snr(10), goal=goal(recogniser, said))
    heard = recogniser.transcribe(found.x_adv)
    assert found.success.any()
    assert [text != before for text, before in zip(heard, said, strict=True)] == found.success.tolist()


def test_the_commands(tmp_path, capsys):
    (tmp_path / "own.py").write_text("from tests.test_spoken import tones\n\ndef load(split):\n    return tones()\n")
    options = ["--data", f"{tmp_path}/own.py:load", "--epochs", "2", "--optimizer", "adam", "--lr", "0.01"]
    spells, names = tmp_path / "s.safetensors", tmp_path / "k.safetensors"
    assert main(["train", "--model", NETWORKS["speech-ctc"], "--out", str(spells), *options]) == 0
    assert "that is whole sentences; the word error rate is" in capsys.readouterr().out
    assert hasattr(checkpoint.load(spells)[0], "alphabet")
    robust = ["--defense", "pgd(steps=2)", "--threat", "snr(30)"]
    assert main(["train", "--model", NETWORKS["speech-ctc"], "--out", str(spells), *options, *robust]) == 2
    assert "defenses are for classifiers" in capsys.readouterr().err
    assert main(["train", "--model", NETWORKS["keyword-cnn"], "--out", str(names), *options, *robust]) == 0
    assert "under PGD" in capsys.readouterr().out
    attack = ["attack", "--model", str(names), "--data", f"{tmp_path}/own.py:load", "--limit", "9", "--attack", "pgd(steps=2)"]
    assert main([*attack, "--threat", "linf_db(-30)"]) == 0
    assert "robust accuracy" in capsys.readouterr().out


def test_a_tradeoff_over_decibels(tmp_path):
    recipe = Recipe(epochs=1, batch_size=15, lr=5e-3, weight_decay=0.0, optimizer="adam")
    found = tradeoff(
        NETWORKS["keyword-cnn"],
        tones(30),
        tones(12, seed=1),
        defenses=["plain", "pgd(steps=1)"],
        threats=["snr(40)", "snr(20)"],
        attack="pgd(steps=1)",
        recipe=recipe,
        seeds=(0,),
        out=tmp_path,
    )
    assert found.members == ("plain", "pgd(steps=1) snr(40)", "pgd(steps=1) snr(20)")
    assert found.at == ("snr(db=40.0)", "snr(db=20.0)")
    assert all(found.accuracy(name, at).value <= found.accuracy(name).value for name in found.members for at in found.at)


@needs_fsdd
@pytest.mark.slow
def test_spoken_digits_of_a_stranger():
    """A sixth of the recipe's training already tells the digits of a speaker apart who was never heard."""
    train_on, test = (data_by_name.load(f"{FSDD}@speaker=jackson", split=split) for split in ("train", "test"))
    recipe = Recipe(epochs=4, batch_size=64, lr=4e-3, weight_decay=0.0, optimizer="adam")
    right, of = accuracy(train(build("keyword-cnn"), train_on, recipe), test)
    assert right / of > 0.6
