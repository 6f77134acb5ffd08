"""Features of sounds: those of librosa, with gradients, and sounds made of cepstra."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from advkit.errors import UsageError
from advkit.sound.features import Mel, decibels, filters, mangled


def sounds(n=2, samples=3000, rate=8000, seed=0, dtype=torch.float64):
    """Harmonics whose pitch glides, and a little noise: something like a vowel."""
    rng = torch.Generator().manual_seed(seed)
    t = torch.arange(samples, dtype=torch.float64) / rate
    pitch = 100 + 80 * torch.rand(n, 1, generator=rng, dtype=torch.float64)
    tones = sum(torch.sin(2 * math.pi * k * pitch * (t + 0.2 * t**2)) / k**2 for k in range(1, 12))
    noise = torch.randn(n, samples, generator=rng, dtype=torch.float64)
    return (0.1 * tones * (1 + torch.sin(20 * t)) + 0.003 * noise).to(dtype)


MELS = st.builds(
    Mel,
    rate=st.sampled_from([8000, 16000, 22050]),
    n_fft=st.sampled_from([256, 400, 511, 512]),
    hop=st.integers(50, 300),
    window=st.one_of(st.none(), st.integers(100, 256)),
    bands=st.integers(1, 40),
    low=st.sampled_from([0.0, 20.0, 300.0]),
    high=st.sampled_from([None, 3000.0, 4000.0]),
    htk=st.booleans(),
    norm=st.sampled_from(["slaney", None]),
    center=st.booleans(),
    pad=st.sampled_from(["constant", "reflect"]),
)


@pytest.fixture(scope="module")
def librosa():
    return pytest.importorskip("librosa")


@pytest.mark.slow  # librosa compiles itself for twenty seconds.
@pytest.mark.filterwarnings("ignore:Empty filters")
@given(mel=MELS, seed=st.integers(0, 99), cepstra=st.integers(1, 20), lifter=st.sampled_from([0, 10, 22]))
@settings(max_examples=20, deadline=None)
def test_the_features_are_those_of_librosa(librosa, mel, seed, cepstra, lifter):
    x = sounds(1, rate=mel.rate, seed=seed)
    frames = {"n_fft": mel.n_fft, "hop_length": mel.hop, "win_length": mel.window, "center": mel.center, "pad_mode": mel.pad}
    bands = {"n_mels": mel.bands, "fmin": mel.low, "fmax": mel.top, "htk": mel.htk, "norm": mel.norm, "dtype": float}
    y = x[0].numpy()
    spectrum = librosa.stft(y, **frames)
    assert (mel.stft(x)[0] - torch.from_numpy(spectrum)).abs().max() <= 1e-4
    power = librosa.feature.melspectrogram(y=y, sr=mel.rate, **frames, **bands)
    assert (mel.mel(x)[0] - torch.from_numpy(power)).abs().max() <= 1e-4
    log = librosa.power_to_db(power)
    assert (mel.log_mel(x)[0] - torch.from_numpy(log)).abs().max() <= 1e-4
    cepstra = min(cepstra, mel.bands)
    mfcc = librosa.feature.mfcc(S=log, n_mfcc=cepstra, lifter=lifter)
    assert (mel.mfcc(x, cepstra, lifter)[0] - torch.from_numpy(mfcc)).abs().max() <= 1e-4


@pytest.mark.parametrize("htk", [True, False])
def test_bands_are_as_wide_as_the_scale_says(htk):
    """The tops of the triangles are even steps of the scale, and neighbours add up to one between the first and the last."""
    mel = Mel(16_000, 16_000, 160, bands=30, htk=htk, norm=None)
    tops = filters(mel).argmax(1).double()
    slaney = torch.where(tops < 1000, tops * 3 / 200, 15 + (tops / 1000).log() * 27 / math.log(6.4))
    steps = (2595 * torch.log10(1 + tops / 700) if htk else slaney).diff()
    assert torch.allclose(steps, steps.mean(), rtol=0.02)
    between = filters(mel).sum(0)[int(tops[0]) + 1 : int(tops[-1])]
    assert torch.allclose(between, torch.ones_like(between))


def test_decibels():
    power = torch.tensor([[[1.0, 0.1, 1e-3, 0.0]]])
    assert decibels(power).tolist() == [[[0.0, -10.0, -30.0, -100.0]]]
    assert decibels(power, 20.0).tolist() == [[[0.0, -10.0, -20.0, -20.0]]]


@pytest.mark.parametrize("pad", ["constant", "reflect"])
def test_gradients_are_those_of_finite_differences_and_finite_on_silence(pad):
    mel = Mel(8000, 32, 16, bands=5, pad=pad)
    x = sounds(1, 60)
    assert torch.autograd.gradcheck(lambda z: mel.mfcc(z, 5, 22), x.requires_grad_(), atol=1e-3, rtol=1e-3)
    silence = torch.zeros(1, 100, requires_grad=True)
    mel.mfcc(silence, 5).sum().backward()
    assert bool(silence.grad.isfinite().all())


def test_a_row_has_the_features_that_it_has_alone():
    x = sounds(3)
    x[1] *= 1e-3
    mel = Mel(8000, 256, 100, bands=20)
    alone = torch.cat([mel.mfcc(row.unsqueeze(0), 13) for row in x])
    assert torch.allclose(mel.mfcc(x, 13), alone, atol=1e-10)
    assert torch.allclose(mel.mfcc(x[0], 13), alone[0], atol=1e-10)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"hop": 0}, "hop is 0"),
        ({"n_fft": 1}, "n_fft is 1"),
        ({"window": 3000}, "window is 3000; it should be from 1 to n_fft, 2048"),
        ({"low": 9000.0}, "half of the rate"),
        ({"high": 8001.0}, "half of the rate"),
        ({"pad": "edge"}, "known are constant, reflect"),
        ({"norm": "l1"}, "norm is 'l1'"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, said):
    with pytest.raises(UsageError, match=said):
        Mel(**settings)


SHORT = [(True, "reflect", 128), (False, "constant", 255), (True, "constant", 0)]


@pytest.mark.parametrize(("center", "pad", "samples"), SHORT)
def test_a_sound_shorter_than_a_frame_is_refused(center, pad, samples):
    mel = Mel(8000, 256, 100, bands=20, center=center, pad=pad)
    with pytest.raises(UsageError, match=f"the sound has {samples} samples"):
        mel.mel(torch.zeros(1, samples))
    assert mel.mel(torch.zeros(1, samples + 1)).shape[-1] == 1 + (samples // 100 if center else 0)


@pytest.mark.parametrize(("cepstra", "lifter"), [(0, 0.0), (21, 0.0), (5, -1.0)])
def test_cepstra_are_at_most_the_bands(cepstra, lifter):
    with pytest.raises(UsageError, match="from 1 to the number of bands, 20"):
        Mel(8000, 256, 100, bands=20).mfcc(sounds(), cepstra, lifter)


@given(
    window=st.sampled_from([0.025, 0.04, 0.064]),
    hop=st.sampled_from([0.01, 0.02, 0.03]),
    cepstra=st.sampled_from([8, 13]),
    bands=st.sampled_from([14, 40]),
    lifter=st.sampled_from([0.0, 22.0]),
    center=st.booleans(),
)
@settings(max_examples=10, deadline=None)
def test_the_inverted_sound_has_the_cepstra_wanted(window, hop, cepstra, bands, lifter, center):
    rate = 16_000
    mel = Mel(rate, 1024, round(hop * rate), round(window * rate), bands, center=center)
    x = sounds(2, rate, rate)
    wanted = mel.mfcc(x, cepstra, lifter)
    y = mel.invert(wanted, rate, rng=torch.Generator().manual_seed(0), lifter=lifter)
    assert y.shape == x.shape
    weight = 1 + lifter / 2 * torch.sin(math.pi * torch.arange(2, cepstra + 1) / lifter) if lifter else torch.ones(cepstra - 1)
    error, spread = mel.mfcc(y, cepstra, lifter) - wanted, wanted - wanted.mean((0, 2), keepdim=True)
    error, spread = (part[:, 1:] / weight.view(-1, 1) for part in (error, spread))
    # Noise of one draw differs from its mean by some decibels in each band: not less than a fifth of what speech does.
    assert float(error.square().mean()) < 0.25**2 * float(spread.square().mean()) + 4
    assert float((y - x).square().mean()) > float(x.square().mean())


def test_mangled_is_another_sound_of_the_same_length_and_level():
    x = sounds(1, 16_000, 16_000, dtype=torch.float32)[0]
    y, same, other = (mangled(x, 16_000, rng=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert y.shape == x.shape
    assert y.dtype == x.dtype
    assert torch.equal(y, same)
    assert float(y.norm() / x.norm()) == pytest.approx(1, rel=0.01)
    for one in (other, x):
        assert abs(float(torch.corrcoef(torch.stack([y, one]))[0, 1])) < 0.3
    assert float(y.abs().max()) <= 1
    mel = Mel(16_000, 512, 320, 400, 40)
    near = (mel.mfcc(y, 13) - mel.mfcc(x, 13))[1:].square().mean()
    assert float(near) < 0.2 * float((mel.mfcc(x.flip(0), 13) - mel.mfcc(x, 13))[1:].square().mean())


def test_mangled_silence_is_silence():
    assert not mangled(torch.zeros(4000), 8000, rng=torch.Generator()).any()


@pytest.mark.parametrize(("given", "said"), [({"hop": 0.0}, "greater than 0"), ({"cepstra": 50}, "number of bands, 40")])
def test_mangling_that_cannot_be_is_refused(given, said):
    with pytest.raises(UsageError, match=said):
        mangled(sounds()[0], 8000, rng=torch.Generator(), **given)
